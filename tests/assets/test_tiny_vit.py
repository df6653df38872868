"""The bundled vision set: float32, loadable, experts ahead on their own view of real images."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from assets.tiny_vit.build import SPLITS, VIEWS, accuracy, pixels, read_digits

SET = Path(__file__).parents[2] / "assets" / "tiny_vit"
MODELS = ["base", *(f"experts/{view}" for view in VIEWS)]


def load(place: str):  # type: ignore[no-untyped-def]
    from transformers import ViTForImageClassification

    loaded = ViTForImageClassification.from_pretrained(SET / place, local_files_only=True, output_loading_info=True)
    model, report = loaded
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def test_the_set_is_small_and_its_files_are_those_of_the_provenance() -> None:
    recorded = json.loads((SET / "provenance.json").read_text())["sha256"]
    assert {name: hashlib.sha256((SET / name).read_bytes()).hexdigest() for name in recorded} == recorded
    present = {str(path.relative_to(SET)) for kind in ("safetensors", "json") for path in SET.rglob(f"*.{kind}")}
    assert present == set(recorded) | {"provenance.json"}
    assert sum((SET / name).stat().st_size for name in recorded) <= 4 * 2**20


@pytest.mark.parametrize("split", ["validation", "test"])
def test_images_are_the_real_ones_of_their_split(split: str) -> None:
    shipped = load_file(SET / f"{split}.safetensors")
    images, labels = read_digits()[split]
    assert torch.equal(shipped["images"], images)
    assert torch.equal(shipped["labels"], labels)
    assert images.shape == (SPLITS[split], 8, 8)
    assert images.max() == 16


def test_splits_share_no_image() -> None:
    rows = [row.tobytes() for images, _ in read_digits().values() for row in images.flatten(1).numpy()]
    assert len(rows) == sum(SPLITS.values()) == len(set(rows))


@pytest.mark.parametrize("place", MODELS)
def test_every_tensor_is_float32(place: str) -> None:
    assert {tensor.dtype for tensor in load_file(SET / place / "model.safetensors").values()} == {torch.float32}


def test_experts_lead_on_their_own_view() -> None:
    shipped = load_file(SET / "test.safetensors")
    split = shipped["images"], shipped["labels"]
    base = load("base")
    for view in VIEWS:
        before, own = accuracy(base, view, split), accuracy(load(f"experts/{view}"), view, split)
        assert 0.3 <= before <= 0.93
        assert own >= 0.85
        assert own >= before + 0.03, f"{view}: the expert scores {own}, the base {before}"


def test_task_files_show_the_views(tmp_path: Path) -> None:
    """Made by the script as they lie there; the evaluator sees what the experts were trained on."""
    from assets.tiny_vit.tasks import write_tasks
    from merging.evaluation.image_tasks import read_image_task

    write_tasks(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        p.name: p.read_bytes() for p in (SET / "tasks").iterdir()
    }
    shipped = load_file(SET / "test.safetensors")
    for view, show in VIEWS.items():
        task = read_image_task(SET / "tasks" / f"{view}.yaml")
        assert task.images is not None
        seen = torch.from_numpy(task.images.pixels(task.items))
        assert torch.equal(seen.reshape(-1, 8, 8), show(pixels(shipped["images"]))[:, 0])
        assert [item.label for item in task.items] == shipped["labels"].tolist()
