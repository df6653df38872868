"""What a preview scores and says is what the written merge does, whatever was in the network before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.checkpoints.checkpoint import open_checkpoint
from merging.errors import Cancelled, InputError, NumbersError, RecipeError, TaskError
from merging.evaluation.models import load_model
from merging.evaluation.records import ModelInfo, Record
from merging.evaluation.runner import Evaluation, evaluate
from merging.evaluation.scoring import Settings, make_scorer, score_batch
from merging.evaluation.tasks import Task, read_tasks
from merging.networks import load_network
from merging.preview.network import RunningNetwork, _places
from merging.preview.worker import Worker
from merging.recipe import Recipe
from tests import tiny_models
from tests.evaluation.small_models import language_model
from tests.small_checkpoints import merge
from ui.evaluate import results

ASSETS = Path(__file__).parents[2] / "assets"
DEMO, VIT = ASSETS / "demo", ASSETS / "tiny_vit"
LIMIT = 24
PROMPTS = ["sort hgfedcba=", "reverse abcdefgh=", "rotate abcdefgh=", "unique aabbccdd="]


def recipe(folder: Path, names: list[str], method: str, own: dict[str, Any], **fields: Any) -> dict[str, Any]:
    experts = [{"model": str(folder / "experts" / name), "name": name, "parameters": own} for name in names]
    return {"base": str(folder / "base"), "experts": experts, "method": method} | fields


def demo(method: str, own: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return recipe(DEMO, ["sort", "reverse", "rotate", "unique"], method, own, **fields)


@pytest.fixture
def make_worker(tmp_path: Path) -> Callable[[], Worker]:
    def make() -> Worker:
        (folder := tmp_path / "side files").mkdir(exist_ok=True)
        return Worker(folder)

    return make


def written(data: dict[str, Any], folder: Path) -> Path:
    shutil.rmtree(folder / "out", ignore_errors=True)
    return merge(Recipe.parse(data), folder / "out").folder


def without_time(records: list[Record]) -> list[Record]:
    return [replace(record, model="", seconds=0.0) for record in records]


def expected_rows(folder: Path, tasks: list[Task], limit: int, in_child: bool = False) -> list[dict[str, Any]]:
    """As ``app.py evaluate`` shows them; ``in_child``: and computes them (which starts a process each time)."""
    if in_child:
        found = evaluate({"merge": folder}, tasks, limit=limit, cache=None)
    else:
        model = load_model(folder)
        found = Evaluation(models=[ModelInfo(model.key, "merge")], tasks=[task.info for task in tasks])
        for task in tasks:
            scorer = make_scorer(model, task, Settings())
            found.records += score_batch(model, scorer, task, task.items[: limit or None])
    return [
        {"mean": row["score"], **{k: row[k] for k in ("task", "metric", "right", "items", "low", "high")}}
        for row in results(found)
    ]


def answers(folder: Path, prompts: list[str], tokens: int) -> list[str]:
    """By transformers alone, one prompt at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer, said = AutoTokenizer.from_pretrained(folder), []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            out = model.generate(**ids, do_sample=False, max_new_tokens=tokens)[0, ids["input_ids"].shape[1] :].tolist()
        if tokenizer.eos_token_id in out:
            out = out[: out.index(tokenizer.eos_token_id)]
        said.append(tokenizer.decode(out))
    return said


# -- the demo experts -------------------------------------------------------------------------------------------------


def test_scores_and_texts_are_those_of_the_written_merge(tmp_path: Path, make_worker: Callable[[], Worker]) -> None:
    worker, files = make_worker(), [str(DEMO / "tasks" / f"{name}.jsonl") for name in ("sort", "rotate")]
    tasks, networks = [task for file in files for task in read_tasks(file)], []
    for data in (
        demo("ties", {"weight": 1.0, "density": 0.3}),
        demo("ties", {"weight": 1.0, "density": 0.3}, parameters={"lambda": 0.7}),
        demo("task_arithmetic", {"weight": 0.4}),
        demo("task_arithmetic", {"weight": 0.4}, dtype="bfloat16"),
    ):
        worker.merge(data)
        folder = written(data, tmp_path)
        rows = expected_rows(folder, tasks, LIMIT, in_child=len(networks) == 1)
        assert worker.score(files, LIMIT) == rows
        loaded = load_model(folder)
        for task in tasks:
            direct = score_batch(loaded, make_scorer(loaded, task, Settings()), task, task.items[:LIMIT])
            assert without_time(worker.network.records(task, LIMIT)) == without_time(direct)
        if len(networks) > 1:
            assert worker.generate(PROMPTS, 10) == answers(folder, PROMPTS, 10)
        networks.append(worker.network.model.network)
    # The first three have the same form, so the numbers were written into one network; another type is another form.
    assert networks[0] is networks[1] is networks[2] is not networks[3]


def test_a_network_that_cannot_be_written_into_is_loaded_anew(
    tmp_path: Path, make_worker: Callable[[], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merging.preview.network._places", lambda *_: None)
    worker, seen = make_worker(), set()
    for lambda_ in (1.0, 0.5, 0.5):
        data = demo("ties", {"weight": 1.0}, parameters={"lambda": lambda_})
        worker.merge(data)
        rows = worker.score([str(DEMO / "tasks" / "sort.jsonl")], LIMIT)
        assert rows == expected_rows(written(data, tmp_path), read_tasks(DEMO / "tasks" / "sort.jsonl"), LIMIT)
        seen.add(id(worker.network.model.network))
    assert len(seen) == 2  # for the same numbers it is not loaded again


def test_texts_end_where_the_context_ends(make_worker: Callable[[], Worker]) -> None:
    worker = make_worker()
    worker.merge(demo("task_arithmetic", {"weight": 0.4}))
    worker.bring_up()
    context = worker.network.model.context
    assert context is not None
    (text,) = worker.generate(["sort hgfedcba="], 10 * context)
    assert text.startswith("abcdefg")
    with pytest.raises(TaskError):
        worker.generate(["a" * (context + 1)], 4)
    assert worker.generate([], 4) == []


# -- other models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_language_models_in_bfloat16(tmp_path: Path, make_worker: Callable[[], Worker], kind: str) -> None:
    for number, place in enumerate(["base", "experts/one", "experts/two"]):
        folder = language_model(tmp_path / place, kind)
        state = load_file(folder / "model.safetensors")
        generator = torch.Generator().manual_seed(number)
        for name, tensor in state.items():
            moved = tensor + torch.randn(tensor.shape, generator=generator) * 0.05 if number else tensor
            state[name] = moved.bfloat16()
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "loss.jsonl").write_text('{"text": "a bright cold day in april."}\n{"text": "two birds"}\n')
    (tmp_path / "best.jsonl").write_text('{"prompt": "a", "choices": [" b", " cc"], "answer": 1}\n')
    worker, tasks = make_worker(), [*read_tasks(tmp_path / "best.jsonl"), *read_tasks(tmp_path / "loss.jsonl")]
    for weight in (0.5, 1.5):
        data = recipe(tmp_path, ["one", "two"], "ties", {"weight": weight, "density": 0.4})
        worker.merge(data)
        folder = written(data, tmp_path)
        rows = worker.score([str(tmp_path / "best.jsonl"), str(tmp_path / "loss.jsonl")])
        assert rows == expected_rows(folder, tasks, 0)
        assert rows[-1]["right"] is rows[-1]["low"] is None
        assert worker.generate(["once ", "upon a time"], 8) == answers(folder, ["once ", "upon a time"], 8)
    assert worker.network.places is not None


def test_image_classifiers(tmp_path: Path, make_worker: Callable[[], Worker]) -> None:
    worker, task = make_worker(), VIT / "tasks" / "turned.validation.yaml"
    for weight in (0.3, 0.4):
        data = recipe(VIT, ["turned", "mirrored"], "task_arithmetic", {"weight": weight})
        worker.merge(data)
        rows = worker.score([str(task)], LIMIT)
        assert rows == expected_rows(written(data, tmp_path), read_tasks(task), LIMIT)
    with pytest.raises(InputError, match="E_NOT_A_MODEL"):
        worker.generate(["a"], 4)


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_every_weight_of_a_usual_architecture_has_one_place(tmp_path: Path, kind: str) -> None:
    folder = tiny_models.build(kind, tmp_path / "model")
    with open_checkpoint(folder) as checkpoint:
        network = load_network(checkpoint)
        tensors = {name: _in_memory(source) for name, source in checkpoint.tensors.items()}
    places = _places(network.module, network.stored, tensors)
    assert places is not None and places.keys() == tensors.keys()
    assert sum(len(found) for found in places.values()) >= len(list(network.module.parameters()))
    name = next(iter(tensors))
    tensors[name].data = tensors[name].data.copy()
    tensors[name].data[0] ^= 1
    assert _places(network.module, network.stored, tensors) is None  # one bit of one number differs
    del tensors[name]
    assert _places(network.module, network.stored, tensors) is None


def _in_memory(source: Any) -> Any:
    from merging.preview.merge import KeptMerge, MemorySource

    return MemorySource(source, KeptMerge().read(source))


# -- stops and errors -------------------------------------------------------------------------------------------------


def test_scores_and_texts_can_be_stopped_in_the_middle(make_worker: Callable[[], Worker]) -> None:
    worker, steps = make_worker(), []
    worker.merge(demo("task_arithmetic", {"weight": 0.4}))
    worker.bring_up()
    look_up = worker.network.check

    def stop_at_the_fifth() -> None:
        steps.append(1)
        if len(steps) == 5:
            worker.stop.set()
        look_up()

    worker.network.check = stop_at_the_fifth
    for ask in (
        lambda: worker.score([str(DEMO / "tasks" / "sort.jsonl")], LIMIT),
        lambda: worker.generate(PROMPTS, 10),
    ):
        steps.clear()
        with pytest.raises(Cancelled):
            ask()
        assert len(steps) == 5
        worker.stop.clear()
    assert worker.generate(PROMPTS[:1], 10)[0].startswith("abcdefg")


def test_without_a_merge_there_is_nothing_to_score(make_worker: Callable[[], Worker]) -> None:
    worker = make_worker()
    with pytest.raises(RecipeError, match="no merge"):
        worker.score([str(DEMO / "tasks")])
    worker.merge(demo("ties", {}), ["model.norm.weight"])
    with pytest.raises(RecipeError, match="no merge"):
        worker.generate(["a"])


def test_weights_that_are_too_large_are_a_typed_error(make_worker: Callable[[], Worker]) -> None:
    worker = make_worker()
    worker.merge(demo("task_arithmetic", {"weight": 1e18}))
    with pytest.raises(NumbersError, match="E_LOGITS") as caught:
        worker.score([str(DEMO / "tasks" / "sort.jsonl")], 4)
    assert "the merge in memory computed" in caught.value.what
    worker.merge(demo("task_arithmetic", {"weight": 0.4}))
    assert worker.score([str(DEMO / "tasks" / "sort.jsonl")], 4)[0]["right"] >= 3


def test_a_base_without_a_configuration_can_be_merged_but_not_run(
    tmp_path: Path, make_worker: Callable[[], Worker]
) -> None:
    bare = [tmp_path / name for name in ("base", "one")]
    for folder in bare:
        folder.mkdir()
        shutil.copy(DEMO / "base" / "model.safetensors", folder)
    worker = make_worker()
    worker.merge({"base": str(bare[0]), "experts": [str(bare[1])], "method": "ties"})
    with pytest.raises(InputError, match="E_NOT_A_MODEL"):
        worker.score([str(DEMO / "tasks")])


def test_side_files_of_an_earlier_model_do_not_stay(tmp_path: Path, make_worker: Callable[[], Worker]) -> None:
    worker = make_worker()
    worker.merge(demo("task_arithmetic", {"weight": 0.4}))
    worker.bring_up()
    worker.merge(recipe(VIT, ["turned"], "task_arithmetic", {"weight": 0.3}))
    worker.bring_up()
    assert isinstance(worker.network, RunningNetwork)
    assert not (worker.network.folder / "tokenizer.json").exists()
