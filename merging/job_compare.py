"""Two more kinds of jobs about scores: a fair comparison with baselines of its own, and results of another program.

    compare    plain average and tuned task arithmetic are made, everything is scored: ``comparison/run.json``, its
               records and its models (see ``evaluation.baselines``)
    import     what lm-evaluation-harness wrote, as records.jsonl

Both are checked when they are started, and can be resumed, as the kinds in ``job_kinds``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from .errors import TaskError
from .job_files import JobProgress
from .job_kind import Arguments, Count, Event, Kind, parsed
from .job_pace import Tell, downloads
from .job_scoring import RECORDS, _items, _read, check_models

Named = Annotated[list[str], Field(min_length=2, max_length=2)]
"""[name, reference]"""
COMPARISON = "comparison"


class CompareArguments(Arguments):
    base: str
    experts: list[Named] = Field(min_length=2)
    owners: dict[str, list[str]]
    """Name of an expert -> names of its own tasks."""
    tasks: list[str] = Field(min_length=1)
    selection_tasks: list[str] = Field(min_length=1)
    """Where settings are chosen: other items than those of ``tasks``."""
    candidates: list[Named] = []
    budget: int = Field(default=5, ge=1, le=100)
    """Settings of task arithmetic that are tried."""
    limit: Count = 0
    device: str = "cpu"
    threads: int = Field(default=1, ge=1)
    offline: bool = False


class ImportArguments(Arguments):
    path: str = Field(min_length=1)
    """A folder that was given to lm_eval as --output_path, or one file of results in it."""


def _tasks(paths: Sequence[str]) -> list[Any]:
    tasks, for_harness = _read(paths)
    if for_harness:
        what = f"{for_harness[0].name} is a task of lm-evaluation-harness."
        raise TaskError("E_TASK", what, "Settings cannot be chosen on those yet.", "Leave it out of the comparison.")
    return tasks


def _check_compare(arguments: dict[str, Any]) -> None:
    wish = parsed(CompareArguments, arguments)
    check_models([*([*pair, ""] for pair in wish.experts + wish.candidates)])
    names = {task.name for task in _tasks(wish.tasks)}
    if missing := [name for own in wish.owners.values() for name in own if name not in names]:
        raise TaskError("E_TASK", f"The task {missing[0]!r} of an expert is not among the tasks.")
    _tasks(wish.selection_tasks)


def _compare(
    arguments: dict[str, Any], folder: Path, tell: Tell, event: Event, stop: threading.Event
) -> dict[str, Any]:  # fmt: skip
    """Event ``note`` {text} for every setting that was tried. Result: {run, records, seconds}."""
    from .checkpoints.hub import resolve
    from .evaluation.baselines import Order, produce
    from .evaluation.run_file import NAME
    from .evaluation.selection import Sources, Work

    wish, began = parsed(CompareArguments, arguments), time.monotonic()
    out = folder / COMPARISON
    if not (out / NAME).exists():

        def place(reference: str) -> Path:
            return resolve(reference, offline=wish.offline, progress=downloads(tell, stop)).path

        tell(JobProgress(0, 0, "items", "looking at the models"))
        order = Order(
            sources=Sources(place(wish.base), {name: place(reference) for name, reference in wish.experts}),
            owners={name: wish.owners.get(name, []) for name, _ in wish.experts},
            tasks=_tasks(wish.tasks),
            selection_tasks=_tasks(wish.selection_tasks),
            budget=wish.budget,
            candidates={name: place(reference) for name, reference in wish.candidates},
        )

        def note(text: str) -> None:
            event({"event": "note", "text": text.strip()})

        produce(order, out, Work(wish.device, wish.threads, stop, note, wish.limit, _items(tell)))
    return {
        "run": str(out / NAME), "records": str(out / RECORDS), "seconds": round(time.monotonic() - began, 3),
        "failures": [], "notes": [],
    }  # fmt: skip


def _check_import(arguments: dict[str, Any]) -> None:
    from .evaluation.lm_eval import is_results

    wish = parsed(ImportArguments, arguments)
    if not is_results(Path(wish.path).expanduser()):
        what = f"{wish.path[:300]} holds no results of lm-evaluation-harness (results_*.json)."
        raise TaskError("E_RECORDS", what, "", "Name the folder that was given to lm_eval as --output_path.")


def _import(
    arguments: dict[str, Any], folder: Path, tell: Tell, event: Event, stop: threading.Event
) -> dict[str, Any]:  # fmt: skip
    """Result: {records, models, failures, notes, seconds}."""
    from .evaluation.lm_eval import read_results
    from .evaluation.records import write_records

    wish, began = parsed(ImportArguments, arguments), time.monotonic()
    tell(JobProgress(0, 0, "items", "reading the results"))
    found, notes = read_results(Path(wish.path).expanduser())
    write_records(folder / RECORDS, found.records, found.models, found.tasks)
    return {
        "records": str(folder / RECORDS), "models": {model.name: model.key for model in found.models},
        "failures": [], "notes": notes, "seconds": round(time.monotonic() - began, 3),
    }  # fmt: skip


COMPARE = Kind("Comparison", _check_compare, _compare)
IMPORT = Kind("Import", _check_import, _import)
