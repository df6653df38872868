"""What a run has scored, ready to be drawn: its records, who is who among its models, and what follows from both.

The one idea: a run is read from its folder alone, so that a run of yesterday shows what it showed then. Who is the base
and which model owns which task is what the run says, else what the names suggest, else what the user says here; that is
kept beside the records (``who.json``), because retention has no meaning without it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from merging.checkpoints.disk import write_whole
from merging.errors import AmalgamError
from merging.evaluation.compare import compare
from merging.evaluation.comparison import Comparison
from merging.evaluation.overview import Overview
from merging.evaluation.records import METRICS, Record, RecordsFile, TaskInfo, read_records_file
from merging.evaluation.run_file import NAME, Run, apart, parse_run, read_run, with_keys
from merging.evaluation.tasks import split_of
from merging.job_compare import COMPARISON
from merging.job_scoring import RECORDS

WHO = "who.json"
BASELINES = ("average", "tuned")


@dataclass(frozen=True)
class Who:
    """``base``: a model's name; ``owners``: task -> the model that was trained for it."""

    base: str = ""
    owners: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """``models``: name -> key; ``roles``: name -> base, expert, average, tuned or candidate."""

    folder: Path
    title: str
    file: RecordsFile
    models: Mapping[str, str]
    roles: Mapping[str, str]
    who: Who
    run: Run | None
    """As a run file says it, for runs that made their own baselines."""

    @property
    def splits(self) -> list[str]:
        """Splits of the tasks, what is reported first: "" stands for test, or no name."""
        found = {held(record.task) for record in self.file.records}
        return sorted(found, key=lambda split: (split != "", split))

    def tasks(self, split: str) -> list[str]:
        return list(dict.fromkeys(r.task for r in self.file.records if held(r.task) == split))

    def records(self, split: str) -> list[Record]:
        return [record for record in self.file.records if held(record.task) == split]

    def info(self, task: str) -> TaskInfo | None:
        return next((info for info in self.file.tasks if info.name == task), None)

    @property
    def merged(self) -> list[str]:
        return [name for name in self.models if self.roles[name] not in ("base", "expert")]


def held(task: str) -> str:
    """The split of a task that is not for reporting; "" for test items and tasks without a named split."""
    split = split_of(task)
    return "" if split == "test" else split


# -- reading ------------------------------------------------------------------------------------------


def records_of(folder: Path) -> Path | None:
    """The file of records that a run has written; None if it has scored nothing."""
    for place in (folder / COMPARISON / RECORDS, folder / RECORDS):
        if place.is_file() and (place.parent == folder or (place.parent / NAME).is_file()):
            return place
    return None


def read_scored(folder: Path, title: str = "") -> Scored | None:
    """What the run in ``folder`` has scored; None if nothing. TaskError E_RECORDS, E_RUN if that is damaged."""
    place = records_of(folder)
    if place is None:
        return None
    who = folder / WHO
    return replace(_read(place, _stamp(place), _stamp(who)), title=title)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=24)
def _read(place: Path, stamp: tuple[int, int], who_stamp: tuple[int, int]) -> Scored:
    file = read_records_file(place)
    folder = place.parent if place.name == RECORDS and place.parent.name != COMPARISON else place.parent.parent
    if place.parent.name == COMPARISON:
        run, _ = read_run(place.parent)
        run = with_keys(run, [file], str(place.parent / NAME))
        models = {name: entry.model for name, (_, entry) in run.entries.items()}
        roles = {name: role for name, (role, _) in run.entries.items()}
        who = Who("base", {task: f"expert {name}" for task, name in run.owners.items()})
        return Scored(folder, "", file, models, roles, who, run)
    models = {info.name: info.key for info in file.models}
    for key in dict.fromkeys(record.model for record in file.records):
        if key not in models.values():
            models[key[:16]] = key
    said = {info.name: info.role for info in file.models}
    known = ("base", "expert", *BASELINES)
    roles = {name: said[name] if said.get(name) in known else "candidate" for name in models}
    who = _kept_who(folder, models) or suggested(roles, list(dict.fromkeys(r.task for r in file.records)))
    if who.base in models:
        roles = {name: "candidate" if role == "base" else role for name, role in roles.items()} | {who.base: "base"}
    roles |= {name: "expert" for name in who.owners.values()}
    return Scored(folder, "", file, models, roles, who, None)


def suggested(roles: Mapping[str, str], tasks: Sequence[str]) -> Who:
    """By role and name: the expert ``sort`` owns the task ``sort``, and its validation split."""
    base = next((name for name, role in roles.items() if role == "base"), "")
    experts = [name for name, role in roles.items() if role == "expert"]
    owners = {}
    for task in tasks:
        plain = task.rpartition(".")[0] if split_of(task) else task
        fitting = [name for name in experts if name.lower() == plain.lower()]
        fitting = fitting or [n for n in experts if plain.lower() in n.lower() or n.lower() in plain.lower()]
        if len(fitting) == 1:
            owners[task] = fitting[0]
    return Who(base, owners)


def _kept_who(folder: Path, models: Mapping[str, str]) -> Who | None:
    try:
        found = json.loads((folder / WHO).read_text("utf-8"))
        who = Who(str(found["base"]), {str(task): str(name) for task, name in found["owners"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return who if {who.base, *who.owners.values()} <= {*models, ""} else None


def keep_who(folder: Path, who: Who) -> None:
    """OutputError E_OUTPUT_WRITE, E_NO_SPACE."""
    write_whole(folder / WHO, json.dumps({"base": who.base, "owners": dict(who.owners)}).encode())


# -- what follows ---------------------------------------------------------------------------------------


@lru_cache(maxsize=48)
def _overview(place: Path, stamp: tuple[int, int], split: str) -> Overview:
    scored = _read(place, stamp, _stamp(_folder(place) / WHO))
    return Overview(scored.records(split), scored.models)


def overview(scored: Scored, split: str) -> Overview:
    """Scores and differences of all models. Kept for the next look. TaskError E_COMPARE."""
    place = records_of(scored.folder)
    assert place is not None
    return _overview(place, _stamp(place), split)


def _folder(place: Path) -> Path:
    return place.parent.parent if place.parent.name == COMPARISON else place.parent


def why_no_comparison(scored: Scored, split: str) -> str:
    """What is missing for retention; "" if nothing is."""
    if scored.run is not None:
        return "" if split == "" else "The comparison reports on test items; on these, settings were chosen."
    if not scored.who.base:
        return "Retention compares with the base: say below which model it is, or score it too."
    if not any(task in scored.who.owners for task in scored.tasks(split)):
        return "Retention compares with each task's own expert: say below which expert is meant for which task."
    if not scored.merged:
        return "Retention is about merged models: choose some beside base and experts."
    return ""


def comparison(scored: Scored, split: str) -> Comparison:
    """Retention, gain kept, tests against fair baselines, and what must be said beside them. TaskError E_COMPARE."""
    place = records_of(scored.folder)
    assert place is not None
    return _comparison(place, _stamp(place), _stamp(scored.folder / WHO), split)


@lru_cache(maxsize=48)
def _comparison(place: Path, stamp: tuple[int, int], who_stamp: tuple[int, int], split: str) -> Comparison:
    scored = _read(place, stamp, who_stamp)
    if scored.run is not None:
        chosen: list[Record] = []
        for name in scored.run.selection.records if scored.run.selection else ():
            chosen += read_records_file(place.parent / name).records
        reported, others = apart(scored.run, scored.file.records)
        return compare(reported, scored.run, selected_on=chosen + others)
    return compare(scored.records(split), run_of(scored, split))


def run_of(scored: Scored, split: str) -> Run:
    """A run file's content for a run that has none."""
    tasks = scored.tasks(split)
    metric = {task: _metrics(scored, task) for task in tasks}
    everywhere = [
        name for name in scored.merged if all(scored.models[name] in metric[task] for task in tasks)
    ]  # fmt: skip
    experts = {name: [t for t in tasks if scored.who.owners.get(t) == name] for name in scored.who.owners.values()}
    data: dict[str, Any] = {
        "amalgam_run": 1,
        "split": split or "test",
        "tasks": tasks,
        "base": {"model": scored.models[scored.who.base]},
        "experts": {_row(n): {"model": scored.models[n], "tasks": own} for n, own in experts.items() if own},
        "candidates": {
            _row(name): {"model": scored.models[name]} for name in everywhere if scored.roles[name] == "candidate"
        },
    }
    for name in everywhere:
        if scored.roles[name] in BASELINES:
            data[scored.roles[name]] = {"model": scored.models[name]}
    return parse_run(data)


def _metrics(scored: Scored, task: str) -> set[str]:
    return {record.model for record in scored.file.records if record.task == task}


def _row(name: str) -> str:
    """A model's name as the table of a comparison allows it."""
    text = "".join(c if c.isprintable() else "?" for c in name).strip()[:60] or "?"
    return f"“{text}”" if text in ("base", *BASELINES) or text.startswith("expert ") else text


# -- in one line, for the list of runs --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Summary:
    """Retention of one merged model, from the means alone. ``model``: which; ``of``: how many merged ones there are."""

    model: str
    of: int
    mean: float
    least: float
    worst: str
    split: str


def summary(folder: Path, model: str = "") -> Summary | None:
    """Of ``model``, else of the best merged one; None where retention is not defined."""
    try:
        scored = read_scored(folder)
    except AmalgamError:
        return None
    if scored is None or not scored.splits:
        return None
    split = scored.splits[0]
    means = _means(scored, split)
    found = []
    for name in scored.merged if not model else [model]:
        kept = {}
        for task, owner in scored.who.owners.items():
            own, best = means.get((task, name)), means.get((task, owner))
            if own is not None and best is not None and own[0] == best[0]:
                better = METRICS[own[0]].better
                low, high = (own[1], best[1]) if better > 0 else (best[1], own[1])
                if high > 0:
                    kept[task] = low / high
        if kept:
            worst = min(kept, key=kept.__getitem__)
            mean = sum(kept.values()) / len(kept)
            found.append(Summary(name, len(scored.merged), mean, kept[worst], worst, split))
    return max(found, key=lambda one: one.mean, default=None)


def _means(scored: Scored, split: str) -> dict[tuple[str, str], tuple[str, float]]:
    """(task, model) -> (metric, mean), by the first metric of ``METRICS`` that the task has."""
    sums: dict[tuple[str, str], dict[str, list[float]]] = {}
    for record in scored.records(split):
        sums.setdefault((record.task, record.model), {}).setdefault(record.metric, []).append(record.score)
    found: dict[tuple[str, str], tuple[str, float]] = {}
    for (task, key), by_metric in sums.items():
        metric = min(by_metric, key=list(METRICS).index)
        mean = sum(by_metric[metric]) / len(by_metric[metric])
        found |= {(task, name): (metric, mean) for name, own in scored.models.items() if own == key}
    return found
