"""Image tasks: pixels are what the formula says, and what cannot be read is refused with the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from assets.tiny_vit.build import VIEWS, pixels
from merging.errors import TaskError
from merging.evaluation.tasks import read_tasks

SET = Path(__file__).parents[2] / "assets" / "tiny_vit"
IMAGES = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
LABELS = np.array([3, 0])


def write(folder: Path, fields: dict[str, Any] | str = "", **arrays: np.ndarray) -> Path:
    """A task file ``digits.yaml`` with its arrays."""
    np.savez(folder / "digits.npz", **({"images": IMAGES, "labels": LABELS} | arrays))
    given = fields if isinstance(fields, dict) else {}
    text = (
        json.dumps({"kind": "image", "arrays": "digits.npz", **given})
        if not isinstance(fields, str) or not fields
        else fields
    )
    (folder / "digits.yaml").write_text(text)
    return folder / "digits.yaml"


def test_pixels_of_the_bundled_set_are_what_its_model_was_trained_on(tmp_path: Path) -> None:
    found = load_file(SET / "test.safetensors")
    fields = {"rescale_factor": 0.125, "image_mean": 1, "image_std": [1.0]}
    (task,) = read_tasks(write(tmp_path, fields, images=found["images"], labels=found["labels"]))
    assert (task.kind, task.name, len(task.items)) == ("image_label", "digits", 500)
    assert task.images is not None and [item.label for item in task.items] == found["labels"].tolist()
    import torch

    expected = VIEWS["turned"](pixels(torch.from_numpy(found["images"])))
    turned = np.rot90(found["images"], 1, (1, 2))
    (task,) = read_tasks(write(tmp_path, fields, images=turned, labels=found["labels"]))
    assert task.images is not None
    assert np.array_equal(task.images.pixels(task.items[3:40]), expected[3:40].numpy())


def test_channels_are_found_or_stated(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).random((2, 3, 4, 5))
    right = colours.astype(np.float32)
    for images, fields in [
        (colours, {}),
        (colours.transpose(0, 2, 3, 1), {}),
        (colours.transpose(0, 2, 3, 1), {"layout": "NHWC"}),
    ]:
        (task,) = read_tasks(write(tmp_path, fields, images=images))
        assert task.images is not None and np.array_equal(task.images.pixels(task.items), right)
    fields = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 4]}
    (task,) = read_tasks(write(tmp_path, fields, images=colours))
    scale = np.array([1, 2, 4])[:, None, None]
    by_hand = ((colours - np.array([0.1, 0.2, 0.3])[:, None, None]) / scale).astype(np.float32)
    assert task.images is not None and np.array_equal(task.images.pixels(task.items), by_hand)
    with pytest.raises(TaskError, match="where the channels are"):
        read_tasks(write(tmp_path, images=np.zeros((2, 3, 4, 3)) + np.arange(2)[:, None, None, None]))


def test_yaml_names_splits_and_clusters(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "kind: image\narrays: digits.npz\nsplit: validation\nclusters: writers  # who\n",
        writers=np.array(["x", "y"]),
    )
    (task,) = read_tasks(path)
    assert (task.name, task.split, [item.cluster for item in task.items]) == (
        "digits.validation",
        "validation",
        ["x", "y"],
    )


def test_ids_depend_on_pixels_and_label(tmp_path: Path) -> None:
    first = read_tasks(write(tmp_path))[0]
    moved = read_tasks(write(tmp_path, images=IMAGES[::-1], labels=LABELS[::-1]))[0]
    other = read_tasks(write(tmp_path, labels=np.array([3, 1])))[0]
    assert [item.id for item in first.items] == [item.id for item in moved.items][::-1]
    assert first.items[0].id == other.items[0].id and first.items[1].id != other.items[1].id
    assert len({first.sha256, moved.sha256, other.sha256}) == 3


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kind": "images"}, "line 1: the field 'kind'"),
        ({"colour": 3}, "the field 'colour'"),
        ({"arrays": "../digits.npz"}, "the field 'arrays'"),
        ({"arrays": "other.npz"}, "other.npz"),
        ({"images": "pictures"}, "no array 'pictures', only images, labels"),
        ({"layout": "NCHW"}, "not NCHW"),
        ({"image_std": 0}, "image_std is 0"),
        ({"image_mean": [1, 2]}, "each of the 1 channels"),
        ({"rescale_factor": "much"}, "'rescale_factor'"),
        ("kind: image\narrays: digits.npz\nlayout: [", "line 4, column 1"),
        ("kind: image\narrays: digits.npz\n\nsize: 3", "line 4"),
        ("kind: image\nkind: image", "stands twice"),
        ("- a", "line 1"),
    ],
    ids=str,
)
def test_a_wrong_task_file(tmp_path: Path, fields: dict | str, says: str) -> None:
    with pytest.raises(TaskError) as caught:
        read_tasks(write(tmp_path, fields))
    assert caught.value.code == "E_TASK" and says in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"labels": np.array([1, 2, 3])}, "2 whole numbers"),
        ({"labels": np.array([1.0, 2.0])}, "whole numbers"),
        ({"labels": np.array([1, -2])}, "label of image 2 is negative"),
        ({"images": IMAGES[[0, 0]]}, "image 2 was there before, as image 1"),
        ({"images": np.array([[[1.0]], [[np.nan]]])}, "image 2 has pixels that are not finite"),
        ({"images": IMAGES[:0]}, "no array of numbers"),
        ({"images": np.array(["a", "b"])}, "no array of numbers"),
        ({"images": np.array([{}, {}], dtype=object)}, "cannot be read as .npz"),
        ({"images": IMAGES[0]}, "shape"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_arrays(tmp_path: Path, arrays: dict, says: str) -> None:
    with pytest.raises(TaskError) as caught:
        read_tasks(write(tmp_path, **arrays))
    assert "digits.npz" in caught.value.what and says in caught.value.what


def test_a_damaged_file_of_arrays(tmp_path: Path) -> None:
    path = write(tmp_path)
    packed = bytearray((tmp_path / "digits.npz").read_bytes())
    for content in (packed[:-30], b"", b"PK\x03\x04 nothing", packed[:200] + b"x" + packed[201:]):
        (tmp_path / "digits.npz").write_bytes(content)
        with pytest.raises(TaskError, match="cannot be read as .npz"):
            read_tasks(path)


def test_arrays_that_would_fill_the_memory_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merging.evaluation.image_tasks.LARGEST_ARRAYS", 1_000_000)
    path = write(tmp_path)
    np.savez_compressed(tmp_path / "digits.npz", images=np.zeros((2, 1000, 1000), np.uint8), labels=LABELS)
    assert (tmp_path / "digits.npz").stat().st_size < 10_000
    with pytest.raises(TaskError, match="bytes of arrays"):
        read_tasks(path)
