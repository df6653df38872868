"""A whole comparison from nothing but models and tasks: baselines made and tuned, everything scored, a run written.

The one idea: the fair comparison must be the easy one. One call makes the plain average, tunes task arithmetic (and
other methods) with a stated budget on the validation split, scores base, experts, baselines and candidates on the
reported split, and leaves a folder that anybody can compare again: ``run.json``, records of both splits, and models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merging.checkpoints.checkpoint import open_checkpoint
from merging.checkpoints.disk import take_lock, unlock_folder, writing
from merging.errors import OutputError, TaskError
from merging.evaluation.records import RecordsFile, write_records, write_whole
from merging.evaluation.run_file import NAME, Entry, Run, parse_run
from merging.evaluation.runner import Evaluation, evaluate
from merging.evaluation.selection import (
    Setting,
    Sources,
    Work,
    average_of,
    merge_into,
    settings_for,
    tune,
    validation_score,
)
from merging.evaluation.tasks import Task, split_of
from merging.recipe_parameters import suggestion


@dataclass
class Order:
    """What ``produce`` is to compare.

    ``owners``: expert -> its own tasks (names as in the reported split). ``candidates``: name -> folder of a merged
    model that exists already. ``methods``: name -> settings to choose from.
    """

    sources: Sources
    owners: Mapping[str, Sequence[str]]
    tasks: Sequence[Task]
    selection_tasks: Sequence[Task]
    budget: int
    candidates: Mapping[str, Path] = field(default_factory=dict)
    methods: Mapping[str, Sequence[Setting]] = field(default_factory=dict)


def produce(order: Order, out: Path, work: Work | None = None) -> Path:
    """Make the baselines, tune what is to be tuned, score everything, and write a run: ``out/run.json`` with records.

    Merged models stay in ``out/models``. Interrupted, the same call goes on: finished merges are kept there, and
    scored items in the user's cache. ``run.json`` is written last.

    Returns:
        The run file.

    Raises:
        TaskError: ``E_SELECTION`` when a validation task holds items that are reported on, ``E_RUN`` for names that
            cannot be used.
        OutputError: ``E_OUTPUT_EXISTS`` when there is a finished run in ``out``, ``E_BUSY`` while another process works
            there.
    """
    if (out / NAME).exists():
        raise OutputError("E_OUTPUT_EXISTS", f"{out} holds a finished run.", "", "Choose a new folder.")
    _check(order)
    with writing(out):
        (out / "models").mkdir(parents=True, exist_ok=True)
        lock = take_lock(out / "lock")
    if lock is None:
        raise OutputError("E_BUSY", f"Another process is making a run in {out}.", "", "Wait, or choose a new folder.")
    try:
        return _produce(order, out, work or Work())
    finally:
        unlock_folder(lock)


def _produce(order: Order, out: Path, work: Work) -> Path:
    models, sources = out / "models", order.sources
    folders: dict[str, Path] = {"base": sources.base}
    for name, path in sources.experts.items():
        whole = sources.whole(name)
        folders[f"expert {name}"] = merge_into(whole, models / f"expert {name}", work) if whole else path
    average = average_of(len(sources.experts))
    folders["average"] = merge_into(sources.recipe(average), models / "average", work)

    chosen = RecordsFile()

    def score(trials: Mapping[str, Path]) -> dict[str, float]:
        found = _evaluate({"base": sources.base, **trials}, order.selection_tasks, work)
        known = {info.key for info in chosen.models}
        chosen.models += [info for info in found.models if info.key not in known]
        chosen.records += [record for record in found.records if record.model not in known]  # equal bytes, equal key
        chosen.tasks = found.tasks
        of_key = {info.key: [r for r in found.records if r.model == info.key] for info in found.models}
        keys = {info.name: info.key for info in found.models}
        return {name: validation_score(of_key[keys[name]], of_key[keys["base"]]) for name in trials}

    entries = {"average": Entry(model="average", setting=average.text, evaluations=0)}
    searches = {"tuned": settings_for("task_arithmetic", order.budget), **order.methods}
    for name, settings in searches.items():
        if len(settings) == 1:  # nothing to choose
            folders[name] = merge_into(sources.recipe(settings[0]), models / name, work)
            entries[name] = Entry(model=name, setting=settings[0].text, evaluations=0)
            continue
        work.tell(f"{settings[0].method}: {len(settings)} settings, mean score on the validation items")
        tuned = tune(sources, settings, score, models / name, work)
        folders[name] = tuned.folder
        entries[name] = Entry(model=name, setting=tuned.setting.text, evaluations=len(tuned.tried))
    work.tell(f"Reporting on {sum(len(task.items[: work.limit or None]) for task in order.tasks)} other items")
    found = _evaluate({**folders, **order.candidates}, order.tasks, work)
    return _write(order, out, found, chosen, entries)


def _evaluate(models: Mapping[str, Path], tasks: Sequence[Task], work: Work) -> Evaluation:
    found = evaluate(
        models,
        tasks,
        limit=work.limit,
        threads=max(1, work.threads),
        device=work.device,
        progress=work.progress,
        stop=work.stop,
    )
    found.raise_if_bad()
    return found


def _write(order: Order, out: Path, found: Evaluation, chosen: RecordsFile, entries: Mapping[str, Entry]) -> Path:
    write_records(out / "records.jsonl", found.records, found.models, found.tasks)
    write_records(out / "selection.jsonl", chosen.records, chosen.models, chosen.tasks)
    described = _describe(order, {info.name: info.key for info in found.models}, entries)
    write_whole(out / NAME, described.as_json().encode())
    return out / NAME


def _describe(order: Order, keys: Mapping[str, str], entries: Mapping[str, Entry]) -> Run:
    """Who is who. ``keys``: name -> model key."""

    def entry(name: str, **facts: Any) -> dict[str, Any]:
        known = entries[name].model_dump() if name in entries else {}
        return {**known, "model": keys[name], **facts}

    split = next((task.split for task in order.selection_tasks if task.split), "validation")
    names = order.sources.experts
    return parse_run(
        {
            "amalgam_run": 1,
            "split": next((task.split for task in order.tasks if task.split), "test"),
            "base": entry("base"),
            "experts": {name: entry(f"expert {name}", tasks=list(order.owners[name])) for name in names},
            "average": entry("average"),
            "tuned": entry("tuned"),
            "candidates": {name: entry(name) for name in (*order.methods, *order.candidates)},
            "selection": {"split": split, "records": ["selection.jsonl"]},
            "parameters": _parameters(order.sources.base),
        }
    )


def _check(order: Order) -> None:
    """All that can be known to be wrong before hours are spent."""
    if both := sorted(order.methods.keys() & order.candidates.keys()):
        raise TaskError("E_RUN", f"Two candidates are called {both[0]!r}.", "", "Rename one of them.")
    rows = ["base", "average", "tuned", *order.methods, *order.candidates, *(f"expert {n}" for n in order.owners)]
    _describe(order, dict.fromkeys(rows, "not known yet"), {})
    for settings in order.methods.values():
        order.sources.recipe(settings[0])
    known = [task.name for task in order.tasks]
    for expert, tasks in order.owners.items():
        for name in tasks:
            if name not in known:
                what = f"Expert {expert}'s own task {name!r} is not among the tasks."
                raise TaskError("E_TASK", what, "", suggestion(name, known))
    reported = {item.id: task for task in order.tasks for item in task.items}
    for task in order.selection_tasks:
        for item in task.items:
            if item.id in reported:
                what = f"{task.where(item)} is also an item of {reported[item.id].name}, which is reported on."
                why = "The best of several settings looks better on the items it was chosen on than it is."
                raise TaskError("E_SELECTION", what, why, "Keep the two splits apart.")


def apart(tasks: Sequence[Task]) -> tuple[list[Task], list[Task]]:
    """Tasks to report on, and validation tasks, by the names of their splits."""
    held = [task for task in tasks if (task.split or split_of(task.name)) not in ("", "test")]
    return [task for task in tasks if task not in held], held


def _parameters(folder: Path) -> int:
    with open_checkpoint(folder) as checkpoint:
        return sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
