"""A run history that was never run: jobs as they lie on the disk after they have ended, with made-up scores."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merging.evaluation.records import ModelInfo, TaskInfo, write_records
from merging.job_files import JobFile, JobWriter, write_job
from merging.jobs import Jobs
from tests.evaluation.evaluated import SHARES, by_task, records_of
from ui.context import App

ROLES = {"base": "base", "sorter": "expert", "coder": "expert"}


def app_in(folder: Path, **options: Any) -> App:
    jobs = Jobs(folder / "runs")
    jobs.path.mkdir(parents=True, exist_ok=True)
    return App(data=folder, jobs=jobs, executor=None, **options)  # type: ignore[arg-type]


def ended(
    jobs: Jobs, number: int, kind: str, arguments: dict[str, Any], result: dict[str, Any] | None,
    title: str = "", error: Mapping[str, str] | None = None, tags: list[str] | None = None,
) -> str:  # fmt: skip
    """A job that has finished, or failed with ``error``. Higher numbers are newer."""
    job = f"20261122-1000{number:02}-{number:08x}"
    folder = jobs.path / job
    folder.mkdir(parents=True)
    write_job(folder, JobFile(kind, arguments, title, 1_795_300_000.0 + 60 * number, os.getcwd(), tags or [], ""))
    with JobWriter(folder) as writer:
        writer.event({"event": "waiting"})
        writer.event({"event": "started", "pid": 1})
        writer.end({"event": "failed", "error": error} if error else {"event": "finished", "result": result})
    return job


def scores_in(folder: Path, models: Mapping[str, str], items: int = 120, validation: bool = False) -> Path:
    """records.jsonl with {name: role} of models in ``SHARES``; their keys are their names with "k-" before."""
    found = by_task(items, {task: {name: shares[name] for name in models} for task, shares in SHARES.items()})
    if validation:
        more = by_task(60, {"sort": {name: SHARES["sort"][name] for name in models}})
        found = {name: {**found[name], "sort.validation": more[name]["sort"]} for name in found}
    records = records_of({f"k-{name}": tasks for name, tasks in found.items()})
    infos = [ModelInfo(f"k-{name}", name, f"/models/{name}", role) for name, role in models.items()]
    tasks = [TaskInfo(task, kind="exact_match", items=items) for task in next(iter(found.values()))]
    write_records(folder / "records.jsonl", records, infos, tasks)
    return folder / "records.jsonl"


def evaluation(jobs: Jobs, number: int, models: Mapping[str, str], title: str = "", **how: Any) -> str:
    """A finished evaluation of these models."""
    named = [[name, f"/models/{name}", role] for name, role in models.items()]
    arguments = {"models": named, "tasks": []}
    job = ended(jobs, number, "evaluate", arguments, {"records": "records.jsonl", "failures": [], "notes": []}, title)
    scores_in(jobs.path / job, models, **how)
    return job
