"""From loose records to tables in which every row is one item and every column one model.

The one idea: a paired comparison is only as good as its pairs. So what does not fit is an error that names the models,
the task and the item: another item, another prompt (a chat template that only one model got), another number of
examples in the prompt, two different scores for one item. Nothing is filled in, and no item is dropped.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from merging.errors import TaskError
from merging.evaluation.records import METRICS, Metric, Record

Array = NDArray[np.float64]
Cells = dict[str, list[Record]]  # item -> records (several where the item was repeated with other seeds)


@dataclass(frozen=True, slots=True)
class Paired:
    """One task. Rows are items (sorted by id, so that the order of the records does not matter), columns models.

    ``scores``, ``lengths`` [items, models]: means over the seeds where an item was repeated. ``clusters``: a label per
    item where the records have them, else None. ``other_metrics``: recorded as well, but not used.
    """

    task: str
    metric: Metric
    models: tuple[str, ...]
    items: tuple[str, ...]
    scores: Array
    lengths: Array
    clusters: tuple[str, ...] | None
    repeats: int
    other_metrics: tuple[str, ...]

    def column(self, model: str) -> Array:
        return self.scores[:, self.models.index(model)]

    @property
    def units(self) -> int:
        """Independent pieces: clusters, or items where there are none."""
        return len(set(self.clusters)) if self.clusters else len(self.items)


def pair(
    records: Iterable[Record],
    models: Mapping[str, str],
    *,
    needed: Mapping[str, Sequence[str] | None],
    tasks: Sequence[str] | None = None,
    metrics: Mapping[str, str] | None = None,
) -> list[Paired]:
    """Sort the records of some models into one table per task.

    Args:
        models: name in the comparison -> key in the records. Records of other models are not looked at.
        needed: name -> the tasks it must have records for; None: all of them.
        tasks: the tasks to use; by default all, in the order in which they first occur.
        metrics: task -> metric. By default the first of ``METRICS`` that all needed models have.

    Raises:
        TaskError: ``E_COMPARE`` when a needed model has no records for a task, or what was recorded does not pair.
    """
    found: dict[str, dict[str, dict[str, Cells]]] = {}  # task -> key -> metric -> item -> records
    keys = set(models.values())
    for record in records:
        if record.model in keys:
            by_metric = found.setdefault(record.task, {}).setdefault(record.model, {})
            cells = by_metric.setdefault(record.metric, defaultdict(list))
            _add(cells[record.item], record)
    chosen = list(found) if tasks is None else list(tasks)
    if not chosen:
        raise TaskError("E_COMPARE", "There are no records of these models.", "", "Evaluate them first.")
    paired = []
    for task in chosen:
        by_model = {name: found.get(task, {}).get(key, {}) for name, key in models.items()}
        must = [name for name in models if (own := needed.get(name)) is None or task in own]
        for name in must:
            if not by_model[name]:
                what = f"There are no records of {name} on the task {task}."
                raise TaskError("E_COMPARE", what, "", "Evaluate it there, or leave the task out.")
        metric = _metric(task, {name: by_model[name] for name in must}, (metrics or {}).get(task))
        with_it = {name: cells[metric] for name, cells in by_model.items() if metric in cells}
        paired.append(_table(task, metric, with_it, sorted({m for c in by_model.values() for m in c} - {metric})))
    return paired


def _add(there: list[Record], record: Record) -> None:
    """One more record of a (model, task, metric, item); the same one twice (two files with it) is fine."""
    if not math.isfinite(record.score):
        raise _problem(record, "its score is NaN or infinite.")
    for other in there:
        if other.seed == record.seed:
            if (other.score, other.prompt, other.shots) == (record.score, record.prompt, record.shots):
                return
            raise _problem(record, "there are two different records for it.", "Keep those of one run.")
    there.append(record)


def _metric(task: str, by_model: Mapping[str, Mapping[str, Cells]], wish: str | None) -> str:
    common = [metric for metric in METRICS if all(metric in found for found in by_model.values())]
    if wish is not None and wish not in common:
        known = f"All of them have: {', '.join(common)}." if common else ""
        raise TaskError("E_COMPARE", f"Not all models have records of {wish} on {task}.", known)
    if not common:
        lists = "; ".join(f"{name}: {', '.join(sorted(found))}" for name, found in by_model.items())
        raise TaskError("E_COMPARE", f"The models were not scored by the same metric on {task}.", f"{lists}.")
    return wish or common[0]


def _table(task: str, metric: str, by_model: Mapping[str, Cells], others: Sequence[str]) -> Paired:
    names = list(by_model)
    first, reference = names[0], by_model[names[0]]
    items = sorted(reference)
    for name in names[1:]:
        if by_model[name].keys() != reference.keys():
            missing = len(reference.keys() - by_model[name].keys())
            more = len(by_model[name].keys() - reference.keys())
            what = f"{first} and {name} were not scored on the same items of {task}."
            lacks = [f"{who} lacks {count} items that {other} has"
                     for who, other, count in ((name, first, missing), (first, name, more)) if count]  # fmt: skip
            why = f"{'; '.join(lacks)}."
            raise TaskError("E_COMPARE", what, why, "Evaluate both on the same file; what is finished is kept.")
    for item in items:
        expected = _shown(reference[item])
        for name in names[1:]:
            if (shown := _shown(by_model[name][item])) != expected:
                same_seeds = shown.keys() == expected.keys()
                difference = "other prompts" if same_seeds else "other seeds"
                what = f"{first} and {name} were shown {difference} for item {item} of {task}."
                why = "Their scores differ by more than the models: chat template, examples or system prompt."
                raise TaskError("E_COMPARE", what, why if same_seeds else "", "Evaluate both with the same settings.")
    labels = [reference[item][0].cluster for item in items]
    return Paired(
        task=task,
        metric=METRICS[metric],
        models=tuple(names),
        items=tuple(items),
        scores=np.array([[_mean([r.score for r in by_model[name][item]]) for name in names] for item in items]),
        lengths=np.array([[_mean([r.length for r in by_model[name][item]]) for name in names] for item in items]),
        # an item without a label stands for itself
        clusters=tuple(label or f"item {item}" for label, item in zip(labels, items, strict=True))
        if any(labels)
        else None,
        repeats=max(len(reference[item]) for item in items),
        other_metrics=tuple(others),
    )


def _shown(records: Sequence[Record]) -> dict[int, tuple[str, int]]:
    """What a model was really shown, per seed: hash of the prompt, and the number of examples in it."""
    return {record.seed: (record.prompt, record.shots) for record in records}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _problem(record: Record, why: str, fix: str = "") -> TaskError:
    what = f"Model {record.model[:16]}, task {record.task}, item {record.item}, {record.metric}: {why}"
    return TaskError("E_COMPARE", what, "", fix)
