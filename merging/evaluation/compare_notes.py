"""What must be said beside a comparison, in sentences: how candidates were chosen, and what the numbers cannot show.

The one idea: a table is quoted without its caveats unless they are part of it. ``warning`` is what a reviewer would
hold against the table; ``note`` is what a reader needs to read it right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from merging.evaluation.comparison import FEW_ITEMS, Comparison, Note, TaskFacts
from merging.evaluation.pairing import Paired
from merging.evaluation.run_file import Run
from merging.evaluation.statistics import needed_items, power_factor

FEW_CLUSTERS = 10
MINI = 1_000_000_000  # parameters
TWO_POINTS = 0.02


def notes_of(comparison: Comparison, run: Run, paired: Sequence[Paired], chosen_items: int) -> list[Note]:
    """All notes on a comparison, the gravest first."""
    notes = [
        *_selection(comparison, run, chosen_items),
        *_budgets(comparison, run),
        *_samples(comparison),
        *_tasks(comparison, paired),
        *_ratios(comparison),
        *_scale(run),
    ]
    return sorted(notes, key=lambda note: note.level != "warning")


def _selection(comparison: Comparison, run: Run, chosen_items: int) -> Iterator[Note]:
    count = sum(task.items for task in comparison.tasks)
    where = f"the split {run.split!r}" if run.split else "a split without a name"
    chosen = [row for row in comparison.rows if row.is_merged and row.evaluations != 0]
    if run.selection is None:
        if chosen:
            names = _list(row.name for row in chosen)
            text = f"It is not said which items the settings of {names} were chosen on. If any of them is among the "
            yield Note("warning", text + "reported ones, that model looks better than it is.")
        return
    text = f"Settings were chosen on the split {run.selection.split!r}; reported are {count} items of {where}."
    if chosen_items:
        yield Note("note", f"{text} None of the {chosen_items} items that were used for choosing is among them.")
    else:
        text += " The records of the choice are not here: whether an item is in both is unknown."
        yield Note("warning", text)


def _budgets(comparison: Comparison, run: Run) -> Iterator[Note]:
    for name, what in (("average", "plain average"), ("tuned", "task arithmetic with a tuned coefficient")):
        if name not in run.entries:
            text = f"There is no {what} in this comparison; a reviewer will ask for it."
            yield Note("warning", text)
    spent = {row.name: row.evaluations for row in comparison.rows if row.is_merged}
    known = {name: count for name, count in spent.items() if count is not None}
    if known:
        yield Note("note", "Evaluations spent on choosing: " + ", ".join(f"{n} {c}" for n, c in known.items()) + ".")
    if unknown := [name for name, count in spent.items() if count is None]:
        yield Note("warning", f"It is not said how many evaluations were spent on choosing {_list(unknown)}.")
    if (budget := known.get("tuned")) is not None:
        more = [name for name, count in known.items() if count > budget]
        if more:
            text = f"{_list(more)}: chosen with more evaluations than the tuned task arithmetic ({budget})."
            yield Note("warning", text + " Part of the difference may be the search.")


def _samples(comparison: Comparison) -> Iterator[Note]:
    few = [task for task in comparison.tasks if task.units < FEW_ITEMS]
    if few:
        what = _list(f"{task.name} ({task.units})" for task in few)
        text = f"Fewer than {FEW_ITEMS} independent items: {what}. Counts are shown there, and nothing is tested."
        yield Note("warning", text)
    clustered = [task for task in comparison.tasks if task.units < task.items]
    for task in clustered:
        text = f"{task.name}: {task.items} items in {task.units} clusters, which are what is counted as independent."
        few_clusters = task.units < FEW_CLUSTERS
        yield Note("warning" if few_clusters else "note", text)
    seen = [task for task in comparison.tasks if not math.isnan(task.visible)]
    if seen:
        parts = [f"{task.name} {_amount(task.visible, task)} (n = {task.items})" for task in seen]
        text = "Differences between two models that stay invisible (5 %, power 80 %): below " + ", ".join(parts) + "."
        yield Note("note", text + _two_points(seen))
    if any(test.p_holm is not None for test in comparison.tests):
        text = "p-values are corrected (Holm) for all tests of the table and all pairs of merges together."
        yield Note("note", text)


def _two_points(tasks: Sequence[TaskFacts]) -> str:
    """How many items a difference of two points takes, at the discordance behind ``visible``."""
    binary = [task for task in tasks if task.kind == "binary" and task.units == task.items]
    if not binary:
        return ""
    widest = max(binary, key=lambda task: task.visible**2 * task.items)
    factor = power_factor()
    square = widest.visible**2 * (widest.items + factor) / factor
    if square <= TWO_POINTS**2:
        return ""
    return f" Two points would take about {_round(needed_items(TWO_POINTS, square)):,} items ({widest.name})."


def _tasks(comparison: Comparison, paired: Sequence[Paired]) -> Iterator[Note]:
    signals = {task.name: task.signal_to_noise for task in comparison.tasks}
    weak = [name for name, signal in signals.items() if signal is not None and not signal.usable]
    if weak:
        text = f"Signal to noise below 3 on {_list(weak)}: there, single scores hardly rank the merges. "
        text += "Trust the paired differences only."
        yield Note("note", text)
    if any(task.better < 0 for task in comparison.tasks):
        down = _list(f"{task.name} ({task.unit})" for task in comparison.tasks if task.better < 0)
        yield Note("note", f"Less is better on {down}; advantages are turned so that more is better.")
    if any(row.is_merged and row.mean is None for row in comparison.rows):
        yield Note("note", "The tasks have scores of different kinds: no mean over tasks, and no ranking by it.")
    for task in paired:
        if task.other_metrics:
            text = f"{task.task} is judged by {task.metric.name}; also recorded: {', '.join(task.other_metrics)}."
            yield Note("note", text)
        if task.repeats > 1:
            yield Note("note", f"{task.task}: scores are means over {task.repeats} seeds.")


def _ratios(comparison: Comparison) -> Iterator[Note]:
    merged = [row for row in comparison.rows if row.is_merged and row.gain_kept is not None]
    if merged and (row := merged[0]).gain_kept is not None and row.gain_kept.left_out:
        text = f"The experts of {_list(row.gain_kept.left_out)} are no better than the base there: no gain to keep, "
        yield Note("warning", text + "and these tasks are left out of its mean and minimum.")
    if not any(task.owner is None for task in comparison.tasks):
        yield Note("note", "Every task is some expert's own: what the merges forget of the base is not measured.")
    unbounded = {
        task
        for row in merged
        if row.gain_kept is not None
        for task, share in row.gain_kept.tasks.items()
        if not math.isnan(share.value) and math.isinf(share.low)
    }
    if unbounded:
        text = f"The expert's gain on {_list(sorted(unbounded))} may be nothing at all: the share kept is not bounded."
        yield Note("note", text)


def _scale(run: Run) -> Iterator[Note]:
    if run.parameters is not None and run.parameters < MINI:
        text = f"Mini-scale: models of {run.parameters:,} parameters. Figures to compare methods by, not to be quoted "
        yield Note("note", text + "beside those of large models.")


def _amount(difference: float, task: TaskFacts) -> str:
    return f"{100 * difference:.1f} points" if task.kind == "binary" else f"{difference:.3g} {task.unit}"


def _round(count: int) -> int:
    """Two digits: more would pretend."""
    digits = len(str(count)) - 2
    return round(count, -digits) if digits > 0 else count


def _list(names: Iterator[str] | Sequence[str]) -> str:
    found = list(names)
    return " and ".join(filter(None, [", ".join(found[:-1]), *found[-1:]]))
