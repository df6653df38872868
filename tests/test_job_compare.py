"""Comparisons and imports as jobs: what is checked before, what is ordered, and what is left in the folder."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from merging.errors import AmalgamError, RecipeError, TaskError
from merging.evaluation import baselines
from merging.evaluation.records import read_records_file
from merging.evaluation.runner import Progress
from merging.job_files import JobProgress
from merging.job_kinds import KINDS

ROOT = Path(__file__).resolve().parents[1]
DEMO, LM_EVAL = ROOT / "assets" / "demo", ROOT / "tests" / "data" / "lm_eval"


def arguments(**changes: Any) -> dict[str, Any]:
    found = {
        "base": str(DEMO / "base"),
        "experts": [[name, str(DEMO / "experts" / name)] for name in ("sort", "rotate")],
        "owners": {"sort": ["sort"], "rotate": ["rotate"]},
        "candidates": [["mine", str(DEMO / "base")]],
        "tasks": [str(DEMO / "tasks" / f"{name}.jsonl") for name in ("sort", "rotate")],
        "selection_tasks": [str(DEMO / "tasks" / f"{name}.validation.jsonl") for name in ("sort", "rotate")],
        "budget": 3,
    }
    return {**found, **changes}


def done(kind: str, wish: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[Any], list[Any]]:
    told: list[Any] = []
    events: list[Any] = []
    KINDS[kind].check(wish)
    result = KINDS[kind].run(wish, folder, told.append, events.append, threading.Event())
    return result, told, events


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"owners": {"sort": ["sorting"]}}, TaskError, "'sorting'"),
        ({"experts": [["a", "x"]]}, RecipeError, "experts"),
        ({"experts": [["a", "x"], ["a", "y"]]}, RecipeError, "two models|Two models"),
        ({"selection_tasks": []}, RecipeError, "selection_tasks"),
        ({"tasks": ["/nowhere.jsonl"]}, TaskError, "There is no task file"),
        ({"budget": 0}, RecipeError, "budget"),
        ({"more": 1}, RecipeError, "more"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(changes: dict, error: type[AmalgamError], says: str) -> None:
    with pytest.raises(error, match=says):
        KINDS["compare"].check(arguments(**changes))


def test_a_comparison_orders_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def produce(order: baselines.Order, out: Path, work: Any) -> Path:
        seen.append((order, out, work))
        work.tell("  0.5000  weight 0.4")
        work.progress(Progress(3, 10, "sort: base", 2.0))
        return out / "run.json"

    monkeypatch.setattr(baselines, "produce", produce)
    result, told, events = done("compare", arguments(limit=7), tmp_path)
    order, out, work = seen[0]
    assert out == tmp_path / "comparison" and (work.limit, work.threads, work.device) == (7, 1, "cpu")
    assert order.sources.base == DEMO / "base" and list(order.sources.experts) == ["sort", "rotate"]
    assert {name: list(own) for name, own in order.owners.items()} == {"sort": ["sort"], "rotate": ["rotate"]}
    assert [task.name for task in order.selection_tasks] == ["sort.validation", "rotate.validation"]
    assert order.candidates == {"mine": DEMO / "base"} and order.budget == 3
    assert events == [{"event": "note", "text": "0.5000  weight 0.4"}]
    assert JobProgress(3, 10, "items", "sort: base", 2.0, 3.5) in told
    assert result["run"] == str(tmp_path / "comparison" / "run.json")


def test_a_finished_comparison_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison" / "run.json").write_text("{}")
    monkeypatch.setattr(baselines, "produce", lambda *_: pytest.fail("it was there"))
    assert done("compare", arguments(), tmp_path)[0]["failures"] == []


def test_results_of_the_harness_become_records(tmp_path: Path) -> None:
    result, _, _ = done("import", {"path": str(LM_EVAL)}, tmp_path)
    found = read_records_file(tmp_path / "records.jsonl")
    assert result["records"] == str(tmp_path / "records.jsonl") and found.records
    assert result["models"] == {model.name: model.key for model in found.models}
    assert any("lengths" in note for note in result["notes"])
    json.dumps(result)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="holds no results"):
        KINDS["import"].check({"path": str(tmp_path)})
    shutil.copy(LM_EVAL.parent / "mergekit_parameters.json", tmp_path / "results_x.txt")
    with pytest.raises(TaskError, match="output_path"):
        KINDS["import"].check({"path": str(tmp_path)})
