"""A comparison as text: three tables of at most 120 columns, what the marks mean, and what must be said beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from merging.evaluation.comparison import FEW_ITEMS, Cell, Comparison, PairedTest, Row, TaskFacts
from merging.evaluation.retention import Estimate, Kept

WIDTH = 120
TASKS_PER_TABLE = 5
LABELS = {"base": "base", "average": "plain average", "tuned": "task arithmetic"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def print_comparison(console: Any, comparison: Comparison) -> None:
    """The three tables and the notes, at most 120 columns wide."""
    for table in (*_scores(comparison), _kept(comparison), *_tests(comparison)):
        if table is not None:
            console.print(table, width=min(console.width, WIDTH))
    for text in _legend(comparison):
        console.print(Text(text, style="dim"), width=min(console.width, WIDTH))
    for note in comparison.notes:
        line = Text(f"{note.level}: ", style="yellow" if note.level == "warning" else "")
        console.print(line.append(_plain(note.text), style="default"), width=min(console.width, WIDTH))


# -- scores -------------------------------------------------------------------------------------------------------


def _scores(comparison: Comparison) -> Iterator[Table]:
    """Every model on every task, a few tasks to a table."""
    split = f" on the split {comparison.split}" if comparison.split else ""
    has_mean = any(row.mean is not None for row in comparison.rows)
    for tasks, first, last in _chunks(comparison.tasks):
        table = _table(f"scores{split} (± half of a 95 % interval)" if first else "scores, continued")
        table.add_column("model", max_width=34, overflow="fold")
        for task in tasks:
            table.add_column(_heading(task), justify="right", overflow="fold")
        if last and has_mean:
            table.add_column("mean", justify="right", no_wrap=True)
        for row, end in _with_sections(comparison.rows):
            cells: list[Text | str] = [_score(row, task) for task in tasks]
            if last and has_mean:
                cells.append(_plus_minus(row.mean) if row.mean else "–")
            table.add_row(_label(row), *cells, end_section=end)
        yield table


def _heading(task: TaskFacts) -> Text:
    unit = {"binary": "", "real": f"\n{task.unit}"}[task.kind] + ("\n(less is better)" if task.better < 0 else "")
    weak = task.signal_to_noise is not None and not task.signal_to_noise.usable
    return Text(f"{_plain(task.name)}{unit}\nn = {task.items}", style="dim" if weak else "")


def _score(row: Row, task: TaskFacts) -> Text:
    cell = row.tasks.get(task.name)
    if cell is None:
        return Text("–")
    own = row.role == "expert" and task.owner is not None and row.name == f"expert {task.owner}"
    return Text(_cell(cell, task), style="bold" if own else "")


def _cell(cell: Cell, task: TaskFacts) -> str:
    if cell.correct is not None and task.units < FEW_ITEMS:
        return f"{cell.correct}/{cell.items}"
    if math.isnan(cell.low):
        return f"{cell.mean:.3f}"
    return f"{cell.mean:.3f} ±{(cell.high - cell.low) / 2:.3f}"


def _plus_minus(one: Estimate) -> str:
    return f"{one.value:.3f} ±{(one.high - one.low) / 2:.3f}"


# -- what is kept -------------------------------------------------------------------------------------------------


def _kept(comparison: Comparison) -> Table | None:
    """Retention, gain kept, forgetting, length and the price of the merged models."""
    rows = [row for row in comparison.rows if row.is_merged]
    if not rows:
        return None
    forgets = any(row.forgetting for row in rows)
    lengths = any(row.length is not None for row in rows)
    table = _table("what the merges keep of each task's own expert, with 95 % intervals")
    table.add_column("model", max_width=30, overflow="fold")
    for title in ("retention\nmean", "least", "gain kept\nmean", "least"):
        table.add_column(title, justify="right", overflow="fold")
    if forgets:
        table.add_column("forgetting", justify="right")
    if lengths:
        table.add_column("length", justify="right")
    for title in ("evalu-\nations", "tied", "front"):
        table.add_column(title, justify="center")
    for row in rows:
        cells = [*_shares(row.retention), *_shares(row.gain_kept)]
        if forgets:
            cells.append(_forgetting(row, comparison.tasks))
        if lengths:
            cells.append("–" if row.length is None else f"{row.length:.1f}")
        cells.append("?" if row.evaluations is None else str(row.evaluations))
        cells.append("".join(_letter(group) for group in row.groups) or "–")
        cells.append({True: "yes", False: "", None: "–"}[row.on_front])
        table.add_row(_plain(LABELS.get(row.name, row.name)), *cells)
    return table


def _shares(share: Kept | None) -> list[str]:
    if share is None or math.isnan(share.mean.value):
        return ["–", "–"]
    least = f"{share.least.value:.0%} {_plain(share.worst)}\n{_limits(share.least)}"
    return [f"{share.mean.value:.0%}\n{_limits(share.mean)}", least]


def _forgetting(row: Row, tasks: Sequence[TaskFacts]) -> str:
    """In points where all those tasks are right/wrong ones."""
    mean = row.forgetting.mean if row.forgetting else None
    if mean is None:
        return "–"
    task = next(task for task in tasks if task.owner is None)
    return f"{_signed(mean.value, task)}\n[{_signed(mean.low, task)}, {_signed(mean.high, task)}]"


def _limits(one: Estimate, form: str = ".0%") -> str:
    return "unbounded" if math.isinf(one.low) or math.isinf(one.high) else f"[{one.low:{form}}, {one.high:{form}}]"


def _letter(group: int) -> str:
    return LETTERS[group] if group < len(LETTERS) else f"({group + 1})"


# -- tests --------------------------------------------------------------------------------------------------------


def _tests(comparison: Comparison) -> Iterator[Table]:
    """Candidate − baseline on the same items, one row per pair."""
    found = {(test.candidate, test.baseline, test.task): test for test in comparison.tests}
    pairs = list(dict.fromkeys((test.candidate, test.baseline) for test in comparison.tests))
    if not pairs:
        return
    has_mean = any(task is None for _, _, task in found)
    for tasks, first, last in _chunks(comparison.tasks):
        title = "candidate − baseline, item by item (points for shares)" if first else "differences, continued"
        table = _table(title)
        table.add_column("candidate", max_width=22, overflow="fold")
        table.add_column("against", max_width=16, overflow="fold")
        for task in tasks:
            table.add_column(_plain(task.name), justify="right", overflow="fold")
        if last and has_mean:
            table.add_column("mean over tasks", justify="right")
        for index, (candidate, baseline) in enumerate(pairs):
            cells = [_difference(found[candidate, baseline, task.name], task) for task in tasks]
            if last and has_mean:
                cells.append(_mean_difference(found[candidate, baseline, None], comparison.tasks[0]))
            ends = index + 1 < len(pairs) and pairs[index + 1][0] != candidate
            table.add_row(_plain(candidate), LABELS[baseline], *cells, end_section=ends)
        yield table


def _difference(test: PairedTest, task: TaskFacts) -> str:
    if test.p is None and test.wins is not None:
        return f"{test.wins} won,\n{test.losses} lost"
    return _signed(test.advantage, task) + _mark(test)


def _mean_difference(test: PairedTest, task: TaskFacts) -> str:
    limits = f"[{_signed(test.low, task)}, {_signed(test.high, task)}]"
    if test.p_holm is None:
        return f"{_signed(test.advantage, task)} {limits}"
    return f"{_signed(test.advantage, task)}{_mark(test)} {limits}\n{_p(test.p_holm)}"


def _signed(value: float, task: TaskFacts) -> str:
    text = f"{100 * value:+.1f}" if task.kind == "binary" else f"{value:+.3f}"
    return text if text.strip("+-0.") else text.lstrip("+-")  # no sign before a zero


def _mark(test: PairedTest) -> str:
    return {"better": " ▲", "worse": " ▼"}.get(test.verdict, "  ")


def _p(p: float) -> str:
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def _legend(comparison: Comparison) -> Iterator[str]:
    merged = any(row.is_merged for row in comparison.rows)
    if merged:
        yield "retention = merge / expert, gain kept = (merge − base) / (expert − base), each on the expert's own task."
    if any(row.groups for row in comparison.rows):
        yield "tied: merges that share a letter cannot be told apart by their means (paired bootstrap, corrected)."
    if volumes := comparison.hypervolumes:
        both = [f"baselines {volumes['baselines'].value:.3f}"] if "baselines" in volumes else []
        parts = ", ".join([*both, f"with candidates {volumes['all'].value:.3f}"])
        yield f"hypervolume of the {comparison.measure} on all tasks, above 0: {parts}."
    if merged:
        yield "front: no other merge is at least as good on every task and better on one."
    if any(test.p is not None for test in comparison.tests):
        level = f"{comparison.level:.0%}"
        yield f"▲ better, ▼ worse at {level}, corrected; without a mark: not told apart. Brackets: 95 %, not corrected."
    if any(task.signal_to_noise is not None and not task.signal_to_noise.usable for task in comparison.tasks):
        yield "Grey task: signal to noise among the merges below 3."


# -- helpers ------------------------------------------------------------------------------------------------------


def _table(title: str) -> Table:
    return Table(title=f"\n{title}", title_justify="left", title_style="bold", pad_edge=False)


def _chunks(tasks: Sequence[TaskFacts]) -> Iterator[tuple[Sequence[TaskFacts], bool, bool]]:
    for start in range(0, len(tasks), TASKS_PER_TABLE):
        end = start + TASKS_PER_TABLE
        yield tasks[start:end], start == 0, end >= len(tasks)


def _with_sections(rows: Sequence[Row]) -> Iterator[tuple[Row, bool]]:
    """Rows, and whether a line is drawn below: after the base, the experts and the baselines."""
    section = {"base": 0, "expert": 1, "average": 2, "tuned": 2, "candidate": 3}
    for index, row in enumerate(rows):
        following = rows[index + 1].role if index + 1 < len(rows) else row.role
        yield row, section[following] != section[row.role]


def _label(row: Row) -> str:
    name = LABELS.get(row.name, row.name)
    return _plain(f"{name} ({row.setting})" if row.setting else name)


def _plain(text: str) -> str:
    """Text from files and users, without a meaning for the console."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else "?" for c in text))
