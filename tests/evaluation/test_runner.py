"""The runner with real models in real child processes: stopped, killed, resumed, and the records are those of an
uninterrupted evaluation in this process."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file

from merging.errors import Cancelled, InputError, OutputError, TaskError
from merging.evaluation.models import load_model
from merging.evaluation.records import Record, read_records_file, write_records
from merging.evaluation.runner import Evaluation, Progress, _batches, _typed, _work, evaluate
from merging.evaluation.scoring import Settings, make_scorer, score_batch
from merging.evaluation.store import Results
from merging.evaluation.tasks import Task, read_tasks

ASSETS = Path(__file__).parents[2] / "assets"
DEMO = ASSETS / "demo"
BATCH = 16
TEXT_SETTINGS = Settings(window=64, overlap=32)  # what the runner finds for these models


class World:
    """Tasks, models and a folder of kept results, and what happened to them in turn."""

    def __init__(self, folder: Path):
        self.cache = folder / "cache"
        self.tasks = {task.name: task for task in read_tasks(write_tasks(folder / "tasks"))}
        copy = Path(shutil.copytree(DEMO / "experts" / "sort", folder / "sort again"))
        broken = Path(shutil.copytree(DEMO / "base", folder / "broken"))
        weights = load_file(broken / "model.safetensors")
        weights["model.norm.weight"][3] = torch.nan
        save_file(weights, broken / "model.safetensors", {"format": "pt"})
        unreadable = Path(shutil.copytree(DEMO / "base", folder / "unreadable"))
        os.truncate(unreadable / "model.safetensors", 1_000_000)
        self.models = {
            "victim": DEMO / "experts" / "rotate",
            "base": DEMO / "base",
            "sort": DEMO / "experts" / "sort",
            "sort again": copy,
            "vision": ASSETS / "tiny_vit" / "experts" / "turned",
            "broken": broken,
            "unreadable": unreadable,
        }
        self.keep_the_first_batch()
        self.expected = {name: self.in_this_process(name) for name in ("base", "sort", "vision")}
        self.stopped, self.seconds_to_stop = self.run_and_stop()
        self.kept_after_stop = self.kept("victim")
        self.seen: list[Progress] = []
        self.result = self.run_and_kill("loading victim")

    def keep_the_first_batch(self) -> None:
        """As if an earlier evaluation had been interrupted after one batch."""
        model, task = load_model(self.models["sort"]), self.tasks["letters"]
        self.first = score_batch(model, make_scorer(model, task, Settings(), BATCH), task, task.items[:BATCH])
        Results(self.cache, model.key, task, Settings()).add(self.first)

    def in_this_process(self, name: str) -> list[Record]:
        model = load_model(self.models[name])
        records = []
        for task in self.tasks.values():
            if (task.kind == "image_label") == (model.kind == "image"):
                scorer = make_scorer(model, task, TEXT_SETTINGS, BATCH)
                for start in range(0, len(task.items), BATCH):
                    records += score_batch(model, scorer, task, task.items[start : start + BATCH])
        return records

    def kept(self, name: str) -> int:
        task = self.tasks["letters"]
        return len(Results(self.cache, load_model(self.models[name]).key, task, Settings()).found)

    def run_and_stop(self) -> tuple[Cancelled, float]:
        stop, asked = threading.Event(), []

        def look(progress: Progress) -> None:
            if progress.rate and not asked:  # the first batch is done
                asked.append(time.monotonic())
                stop.set()

        with pytest.raises(Cancelled) as caught:
            evaluate(
                self.models, list(self.tasks.values()), batch_size=BATCH, cache=self.cache, progress=look, stop=stop
            )
        return caught.value, time.monotonic() - asked[0]

    def run_and_kill(self, when: str) -> Evaluation:
        def look(progress: Progress) -> None:
            self.seen.append(progress)
            if progress.doing == when:
                (child,) = multiprocessing.active_children()
                os.kill(child.pid or 0, signal.SIGKILL)

        roles = {"base": "baseline"}
        tasks = list(self.tasks.values())
        return evaluate(self.models, tasks, roles=roles, batch_size=BATCH, cache=self.cache, progress=look)


def write_tasks(folder: Path) -> Path:
    folder.mkdir()
    lines = (DEMO / "tasks" / "sort.jsonl").read_text().splitlines()
    (folder / "letters.jsonl").write_text("\n".join(lines[:40]))
    items = [json.loads(line) for line in lines[40:46]]
    choices = [
        {"prompt": i["prompt"], "choices": [i["answer"][::-1], i["answer"]], "answer": 1, "cluster": "c"} for i in items
    ]
    (folder / "pick.jsonl").write_text("\n".join(map(json.dumps, choices)))
    (folder / "words.jsonl").write_text("\n".join(json.dumps({"text": i["prompt"] + i["answer"]}) for i in items))
    found = load_arrays(ASSETS / "tiny_vit" / "test.safetensors")
    np.savez(folder / "turned.npz", images=np.rot90(found["images"][:20], 1, (1, 2)), labels=found["labels"][:20])
    (folder / "turned.yaml").write_text("kind: image\narrays: turned.npz\nrescale_factor: 0.125\nimage_mean: 1\n")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def timeless(records: list[Record]) -> list[Record]:
    return [replace(record, seconds=0.0) for record in records]


def test_stopping_takes_no_time_and_loses_nothing(world: World) -> None:
    assert world.stopped.code == "E_CANCELLED" and world.seconds_to_stop < 2
    assert world.kept_after_stop == BATCH


def test_records_are_those_of_an_uninterrupted_evaluation_in_this_process(world: World) -> None:
    keys = {info.name: info.key for info in world.result.models}
    for name, expected in world.expected.items():
        found = [record for record in world.result.records if record.model == keys[name]]
        assert timeless(found) == timeless(expected) and len(found) > 15
    first = [record for record in world.result.records if record.model == keys["sort"]][:BATCH]
    assert first == world.first  # its times too: it was not scored again


def test_what_failed_is_named_and_the_rest_went_on(world: World) -> None:
    failures = {(failure.model, failure.task): failure.error for failure in world.result.failures}
    broken = {("broken", task) for task in ("letters", "pick", "words")}
    assert failures.keys() == {("unreadable", ""), ("victim", ""), *broken}
    assert failures["unreadable", ""].code == "E_HEADER_LAYOUT"
    assert failures["victim", ""].code == "E_WORKER"
    assert "signal 9" in failures["victim", ""].what and "while it loaded victim" in failures["victim", ""].what
    for key in broken:
        assert failures[key].code == "E_LOGITS" and "line 1" in failures[key].what
    with pytest.raises(InputError):
        world.result.raise_if_bad()


def test_the_same_content_is_scored_once(world: World) -> None:
    names = {info.name: info for info in world.result.models}
    assert names["sort"].key == names["sort again"].key and names["sort again"].path.endswith("sort again")
    assert (names["base"].role, names["sort"].role) == ("baseline", "")
    cells = [(r.model, r.task, r.item, r.metric) for r in world.result.records]
    assert len(cells) == len(set(cells))


def test_progress_counts_every_item_once(world: World) -> None:
    last = world.seen[-1]
    # victim, base, sort and broken: 40 + 6 + 6; vision: 20; of these victim 16 and sort 16 were known
    assert last.total == 4 * 52 + 20 and world.seen[0].total == 0
    assert world.result.kept == 2 * BATCH and world.result.fresh == 52 + 36 + 20
    assert last.done == 2 * BATCH + world.result.fresh
    assert last.rate is not None and last.rate > 0
    assert last.seconds_left == (last.total - last.done) / last.rate
    doing = [progress.doing for progress in world.seen]
    assert doing.index("loading base") < doing.index("base: letters") < doing.index("loading sort")


def test_what_a_model_cannot_do_is_said(world: World) -> None:
    notes = "\n".join(world.result.notes)
    assert "turned needs an image classifier: not scored on victim, base, sort, sort again, broken" in notes
    assert "letters needs a causal language model: not scored on vision" in notes


def test_the_result_goes_through_a_file(world: World, tmp_path: Path) -> None:
    for name in ("run.jsonl", "run.parquet"):
        write_records(tmp_path / name, world.result.records, world.result.models, world.result.tasks)
        found = read_records_file(tmp_path / name)
        assert found.records == world.result.records
        assert [info.name for info in found.tasks] == ["letters", "pick", "turned", "words"]


def test_nothing_is_computed_twice(world: World) -> None:
    seen: list[str] = []
    models = {name: world.models[name] for name in ("sort", "base", "vision")}
    started = time.monotonic()
    again = evaluate(
        models, list(world.tasks.values()), cache=world.cache, progress=lambda progress: seen.append(progress.doing)
    )
    assert time.monotonic() - started < 2
    assert seen == ["reading sort", "reading base", "reading vision"]  # no child was started
    assert (again.fresh, again.kept, again.failures) == (0, 52 + 52 + 20, [])
    assert sorted(again.records, key=repr) == sorted(
        (r for r in world.result.records if r.model in {info.key for info in again.models}), key=repr
    )
    part = evaluate({"base": world.models["base"]}, [world.tasks["letters"]], limit=7, cache=world.cache)
    assert len(part.records) == 7 and part.kept == 7


# -- without a child ----------------------------------------------------------------------------------------------


def test_a_task_that_no_model_can_do_fails_before_anything_is_computed(world: World, tmp_path: Path) -> None:
    tasks = [world.tasks["letters"], world.tasks["turned"]]
    with pytest.raises(TaskError, match="None of the models can do the task turned .*turned.npz"):
        evaluate({"base": DEMO / "base"}, tasks, cache=tmp_path / "cache")
    with pytest.raises(InputError, match="E_HEADER_LAYOUT"):  # perhaps that one could have
        evaluate({"base": DEMO / "base", "unreadable": world.models["unreadable"]}, tasks, cache=tmp_path / "cache")
    assert not (tmp_path / "cache" / "results").exists()


def test_two_tasks_of_one_name(world: World) -> None:
    task: Task = world.tasks["letters"]
    with pytest.raises(TaskError, match="both called"):
        evaluate({"base": DEMO / "base"}, [task, replace(task, path="elsewhere")], cache=None)


def test_stopping_before_it_began() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        evaluate({"base": DEMO / "base"}, read_tasks(DEMO / "tasks" / "sort.jsonl"), cache=None, stop=stop)


def test_a_device_that_is_not_there() -> None:
    """(What the child raises is raised here: test_child.py.)"""
    with pytest.raises(OutputError, match="abacus") as caught:
        _work(lambda *message: None, [], {}, Settings(), 0, 1, "abacus")
    assert caught.value.code == "E_DEVICE"


def test_batches_begin_where_they_would_have_begun() -> None:
    assert _batches([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3], [4]]
    assert _batches([1, 2, 3, 6], 2) == [[1], [2, 3], [6]]


def test_whatever_a_library_raises_becomes_a_typed_error() -> None:
    def raised(error: Exception) -> Exception:
        try:
            raise error
        except Exception as caught:
            return caught

    memory = _typed(raised(RuntimeError("CUDA out of memory. Tried to")), "It failed.")
    other = _typed(raised(ValueError("odd\nmore")), "It failed.")
    assert (memory.code, other.code) == ("E_MEMORY", "E_WORKER")
    assert "ValueError: odd (test_runner.py, line" in other.why and other.what == "It failed."
    mine = TaskError("E_TASK", "x")
    assert _typed(mine, "It failed.") is mine
