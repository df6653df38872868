"""What jobs do, with the real thing: demo experts, worker processes, kills in the middle."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from merging import job_scoring
from merging.engine import run
from merging.errors import AmalgamError, Cancelled
from merging.evaluation.records import read_records_file
from merging.evaluation.tasks import read_task
from merging.job_files import JobProgress
from merging.job_kinds import KINDS
from merging.job_pace import Pace, downloads
from merging.jobs import Jobs
from merging.plan import make_plan
from merging.recipe import Recipe
from merging.recipe_yaml import load_recipe
from tests.odd_jobs import ended, wait_until

DEMO = Path(__file__).resolve().parent.parent / "assets" / "demo"
BASE, EXPERTS = str(DEMO / "base"), [str(DEMO / "experts" / name) for name in ("sort", "rotate", "unique")]
TASKS = [str(DEMO / "tasks" / "sort.jsonl"), str(DEMO / "tasks" / "rotate.jsonl")]


def recipe(method: str = "ties", **parameters: float) -> dict[str, Any]:
    experts = [{"model": path, "name": Path(path).name} for path in EXPERTS]
    return {"base": BASE, "experts": experts, "method": method, "parameters": parameters or {"density": 0.3, "weight": 1.0}}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of the merge, made without any job."""
    out = tmp_path_factory.mktemp("expected") / "model"
    with make_plan(Recipe.parse(recipe())) as plan:
        run(plan, out, threads=1)
    return (out / "model.safetensors").read_bytes()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path / "runs")
    yield jobs
    for state in jobs.states():
        jobs.stop(state.id)
        ended(jobs, state.id)


class Told:
    """What a kind tells, when it is run in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.progress, self.events, self.stop = folder, list[JobProgress](), list[dict](), threading.Event()

    def run(self, kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
        KINDS[kind].check(arguments)
        result = KINDS[kind].run(arguments, self.folder, self.progress.append, self.events.append, self.stop)
        json.dumps(result, allow_nan=False)
        return result


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path)


def refused(code: str, kind: str, arguments: dict[str, Any]) -> str:
    with pytest.raises(AmalgamError) as caught:
        KINDS[kind].check(arguments)
    assert caught.value.code == code
    return str(caught.value)


# -- whole jobs ---------------------------------------------------------------------------------------


def test_a_merge_that_is_killed_twice_gives_the_same_bytes(jobs: Jobs, expected: bytes) -> None:
    """Once its worker (as by the system, when memory runs out), once all of it (as by a power cut); then it is scored."""
    evaluation = {"tasks": [TASKS[0]], "limit": 20}
    models = [["base", BASE, "base"], ["gone", str(jobs.path / "gone"), "expert"]]
    job = jobs.start("merge", {"recipe": recipe(), "evaluate": evaluation, "models": models, "threads": 1})
    journal = jobs.folder(job) / ".model.partial" / "journal"

    def claims() -> int:
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    wait_until(lambda: claims() > 3, 60)
    os.kill(jobs.state(job).pid or 0, signal.SIGKILL)
    state = ended(jobs, job)
    assert state.error is not None and "signal 9" in state.error["what"] and state.resumable
    before = claims()
    assert 3 < before < 39 and not (jobs.folder(job) / "model").exists()

    jobs.resume(job)
    wait_until(lambda: claims() > before + 3, 60)
    os.kill(int((jobs.folder(job) / "lock").read_text()), signal.SIGKILL)
    assert ended(jobs, job).error == {**(jobs.state(job).error or {}), "code": "E_WORKER"}

    jobs.resume(job)
    state = ended(jobs, job, 120)
    assert state.status == "finished" and state.result is not None, state
    assert (jobs.folder(job) / "model" / "model.safetensors").read_bytes() == expected
    assert before < state.result["resumed"] < state.result["tensors"] == 39
    assert load_recipe(jobs.folder(job) / "recipe.yml").recipe == Recipe.parse(recipe())
    records = read_records_file(state.result["records"])
    assert [(m.name, m.role) for m in records.models] == [("base", "base"), ("ties", "candidate")]
    assert state.result["name"] == "ties" and len(records.records) == 40
    assert [(f["model"], f["code"]) for f in state.result["failures"]] == [("gone", "E_NOT_FOUND")]


def test_a_merge_is_stopped_within_two_seconds_whatever_it_does(jobs: Jobs) -> None:
    """While torch is being imported nobody looks up."""
    job = jobs.start("merge", {"recipe": recipe()})
    wait_until(lambda: jobs.state(job).status == "running")
    began = time.monotonic()
    jobs.stop(job)
    state = ended(jobs, job)
    assert time.monotonic() - began < 2.5 and state.status == "cancelled" and state.resumable


# -- merge --------------------------------------------------------------------------------------------


def test_progress_counts_bytes_up_to_all_of_them(told: Told, expected: bytes) -> None:
    result = told.run("merge", {"recipe": recipe(), "threads": 1, "device": "cpu"})
    assert Path(result["model"]) == told.folder / "model" and result["bytes"] == len(expected) and result["method"] == "ties"
    assert (told.folder / "model" / "model.safetensors").read_bytes() == expected
    done = [p.done for p in told.progress if p.total]
    assert done == sorted(done) and told.progress[-1].share == 1 and told.progress[0].doing == "planning"
    assert {p.unit for p in told.progress} == {"bytes"} and told.progress[-1].total > 4 * len(expected)
    assert [e["event"] for e in told.events] == ["merged"]


def test_a_merge_that_is_there_already_is_checked_and_not_made_again(told: Told, tmp_path: Path) -> None:
    """As after a kill between the merge and its scoring."""
    out = tmp_path / "far" / "away"
    arguments = {"recipe": recipe("linear", weight=0.3), "out": str(out)}
    assert told.run("merge", arguments)["resumed"] == 0
    before = (out / "manifest.json").stat().st_mtime_ns
    result = KINDS["merge"].run(arguments, told.folder, told.progress.append, told.events.append, told.stop)
    assert result["resumed"] == result["tensors"] and (out / "manifest.json").stat().st_mtime_ns == before
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(AmalgamError) as caught:
        KINDS["merge"].run(arguments, told.folder, told.progress.append, told.events.append, told.stop)
    assert caught.value.code == "E_VERIFY"
    assert str(out) in refused("E_OUTPUT_EXISTS", "merge", arguments)


def test_stop_ends_a_merge_and_keeps_what_is_finished(told: Told) -> None:
    def tell(progress: JobProgress) -> None:
        if progress.share and progress.share > 0.3:
            told.stop.set()

    arguments = {"recipe": recipe(), "threads": 1}
    with pytest.raises(Cancelled):
        KINDS["merge"].run(arguments, told.folder, tell, told.events.append, told.stop)
    told.stop.clear()
    assert told.run("merge", arguments)["resumed"] > 0


def test_wrong_merges_are_refused_before_they_start(tmp_path: Path) -> None:
    assert "unknown field 'densty'" in refused("E_RECIPE_FIELD", "merge", {"recipe": {**recipe(), "densty": 1}})
    assert "'recipe'" in refused("E_RECIPE_FIELD", "merge", {})
    assert "'token'" in refused("E_RECIPE_FIELD", "merge", {"recipe": recipe(), "token": "secret"})
    assert "'threads'" in refused("E_RECIPE_FIELD", "merge", {"recipe": recipe(), "threads": "2"})
    assert "'evaluate.tasks'" in refused("E_RECIPE_FIELD", "merge", {"recipe": recipe(), "evaluate": {"tasks": []}})
    refused("E_OUTPUT_EXISTS", "merge", {"recipe": recipe(), "out": str(tmp_path)})
    refused("E_OUTPUT_NAME", "merge", {"recipe": recipe(), "out": "/x/..\n"})
    refused("E_TASK", "merge", {"recipe": recipe(), "evaluate": {"tasks": [str(tmp_path / "none.jsonl")]}})


# -- evaluate -----------------------------------------------------------------------------------------


def test_prompts_are_answered_by_every_model_that_can(told: Told) -> None:
    models = [["base", BASE, "base"], ["sort", EXPERTS[0], "expert"], ["gone", str(told.folder / "gone"), "expert"]]
    items = read_task(TASKS[0]).items[:3]
    prompts = [item.prompt for item in (*items, items[0])]
    result = told.run("evaluate", {"models": models, "prompts": prompts, "length": 20})
    assert {(f["model"], f["code"]) for f in result["failures"]} == {("gone", "E_NOT_FOUND")}
    answers = json.loads(Path(result["answers"]).read_text("utf-8"))
    assert [one["prompt"] for one in answers] == prompts[:3]
    assert all(one["answers"].keys() == {"base", "sort"} for one in answers)
    assert sum(one["answers"]["sort"] == item.answer for one, item in zip(answers, items, strict=True)) >= 2
    assert told.progress[-1].unit == "items" and told.progress[-1].share == 1 and result["records"] is None


def test_a_short_context_leaves_room_for_the_prompt(told: Told) -> None:
    """The demo's models have room for 64 tokens."""
    assert job_scoring._room({"base": Path(BASE)}, ["x" * 10], 64) == 52
    assert job_scoring._room({"base": Path(BASE)}, ["x" * 10], 20) == 20


def test_without_a_single_record_it_fails(told: Told) -> None:
    with pytest.raises(AmalgamError) as caught:
        told.run("evaluate", {"models": [["gone", str(told.folder / "gone"), ""]], "tasks": TASKS})
    assert caught.value.code == "E_NOT_FOUND"


def test_wrong_evaluations_are_refused_before_they_start(told: Told) -> None:
    one = ["base", BASE, ""]
    assert "nothing to score" in refused("E_RECIPE_FIELD", "evaluate", {"models": [one]})
    assert "'models'" in refused("E_RECIPE_FIELD", "evaluate", {"models": [], "tasks": TASKS})
    assert "called 'base'" in refused("E_RECIPE_FIELD", "evaluate", {"models": [one, one], "tasks": TASKS})
    (told.folder / "bad.jsonl").write_text('{"prompt": "a"}\n')
    assert "line 1" in refused("E_TASK", "evaluate", {"models": [one], "tasks": [str(told.folder / "bad.jsonl")]})


# -- inspect ------------------------------------------------------------------------------------------


def test_parts_of_an_inspection_are_told_one_by_one_and_kept(told: Told) -> None:
    arguments = {"base": BASE, "experts": EXPERTS[:2], "options": {"parts": ["doctor", "changes", "trimmed"], "density": 0.25}}
    result = told.run("inspect", arguments)
    assert result["parts"] == [event["part"] for event in told.events] == ["doctor", "changes", "trimmed"]
    assert told.progress[-1].share == 1 and told.progress[-1].total == 3 and told.progress[-1].unit == "parts"
    again = Told(told.folder)
    again.run("inspect", arguments)
    assert [event["cached"] for event in again.events] == [True] * 3


def test_wrong_inspections_are_refused_before_they_start() -> None:
    refused("E_RECIPE_FIELD", "inspect", {"base": BASE, "experts": []})
    refused("E_RECIPE_FIELD", "inspect", {"base": BASE, "experts": EXPERTS, "options": {"parts": ["tea"]}})
    refused("E_RECIPE_FIELD", "inspect", {"base": BASE, "experts": EXPERTS, "options": {"colour": 1}})


# -- pace ---------------------------------------------------------------------------------------------


def test_what_was_done_before_is_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[JobProgress] = []
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace(told.append, "bytes")
    pace(900, 1000, "a")
    now[0] += 2
    pace(920, 1000, "a")
    assert told[0].rate is None and told[1].rate == 10 and told[1].seconds_left == 8


def test_a_download_ends_after_stop() -> None:
    stop, told = threading.Event(), list[JobProgress]()
    progress = downloads(told.append, stop)
    progress(1, 10, "model.safetensors")
    assert told[0].doing == "downloading model.safetensors"
    stop.set()
    with pytest.raises(Cancelled):
        progress(2, 10, "model.safetensors")
