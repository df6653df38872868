"""The results of a run as figures and tables: pure functions from ``ui.scored`` to what the page shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from merging.evaluation.comparison import Comparison, PairedTest
from merging.evaluation.overview import ModelScore
from merging.evaluation.retention import Estimate

from .. import plots_evaluation as plots
from ..chart import Chart, Table
from ..components.cards import text
from ..scored import Scored, overview

VERDICTS = {"better": "▲ better", "worse": "▼ worse", "tied": "= not told apart", "too few items": "too few items"}
MEASURES = {"retention": "merge / expert", "gain kept": "(merge − base) / (expert − base)"}
ALL_TASKS = "mean over tasks"


# -- head -----------------------------------------------------------------------------------------------


def head(scored: Scored, split: str, failures: Sequence[dict[str, str]] = (), notes: Sequence[str] = ()) -> str:
    """How much was scored, on which split, what failed and what must be said."""
    found = overview(scored, split)
    counts = sorted({len(t.items) for t in found.tables})
    items = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}" if counts else "0"
    few = [table.task for table in found.tables if len(table.items) < plots.FEW_ITEMS]
    models, tasks = _count(len(found.models), "model"), _count(len(found.tables), "task")
    parts = [f"<b>{models}</b> on <b>{tasks}</b>, {items} items each."]
    if split:
        parts.append(
            f'<span class="badge mark">{text(split)} items</span> Settings may be chosen on these; '
            "report scores of test items."
        )
    else:
        parts.append('<span class="badge">test items</span> Nothing may be chosen on these: they are for reporting.')
    if few:
        parts.append(
            f'<span class="badge mark">few items</span> Under {plots.FEW_ITEMS} items on {text(", ".join(few))}: '
            "only large differences mean anything."
        )
    lines = "".join(f"<p>{part}</p>" for part in parts)
    for failure in failures:
        where = " on ".join(filter(None, (failure.get("model"), failure.get("task"))))
        said = " ".join(filter(None, (failure.get("what"), failure.get("why"), failure.get("fix"))))
        lines += f'<p class="problem"><b>{text(where)} was not scored.</b> {text(said)}</p>'
    lines += "".join(f"<p>{text(note)}</p>" for note in notes)
    return f'<div class="card quiet">{lines}</div>'


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# -- scores ---------------------------------------------------------------------------------------------


def scores_chart(scored: Scored, split: str) -> Chart:
    """Dots with intervals; a variant per metric, since scores of different kinds share no axis."""
    found = overview(scored, split)
    all_scores = found.scores()
    rows = []
    for score in all_scores:
        percent = score.correct is not None
        few = "few items" if score.items < plots.FEW_ITEMS else None
        right = f"{score.correct} of {score.items}" if percent else None
        role = role_word(scored, score.task, score.model)
        rows.append(
            [score.task, score.model, role, *_finite(score.mean, score.low, score.high), right, score.items, few]
        )
    columns = ["task", "model", "role", "score", "95 % from", "to", "right", "items", "caution"]
    chart = Chart(
        "scores",
        "Scores",
        "Each dot is the score of one model on one task, each line its 95 % interval. Where two intervals do not "
        "overlap, the models differ; where they do, only the paired differences can tell. n is the number of items.",
        "Wilson intervals for shares of right answers, bootstrap over items (or clusters of items) for all else.",
        Table(columns, rows),
    )
    for metric in dict.fromkeys(table.metric for table in found.tables):
        tasks = {table.task for table in found.tables if table.metric == metric}
        mine = [plots.Score(s.model, s.task, s.mean, *_ends(s), s.items) for s in all_scores if s.task in tasks]
        less = ", less is better" if metric.better < 0 else ""
        axis = "share of right answers" if metric.kind == "binary" else f"{metric.unit}{less}"
        chart.variants.append((metric.unit, plots.scores(mine, axis, percent=metric.kind == "binary")))
    return chart


def _ends(score: ModelScore) -> tuple[float, float]:
    return (score.mean, score.mean) if math.isnan(score.low) else (score.low, score.high)


def _finite(*values: float) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def role_word(scored: Scored, task: str, model: str) -> str:
    if scored.who.owners.get(task) == model:
        return "own expert"
    role = scored.roles[model]
    return {"candidate": "merge", "average": "baseline", "tuned": "baseline"}.get(role, role)


# -- retention ------------------------------------------------------------------------------------------


def retention_chart(found: Comparison) -> Chart | None:
    """Bars per task, with mean and least; None where no ratio is defined."""
    chart = Chart(
        "retention",
        "What the merges keep of each task's own expert",
        "The dotted line is the expert: a merge that reaches it has lost nothing. The least says more than the mean: "
        "it is the skill that was lost. Retention (merge / expert) flatters where the base is already good; gain kept, "
        "(merge − base) / (expert − base), gives a merge that learned nothing 0.",
        "Intervals from the paired bootstrap: the same drawn items go through merge, base and expert.",
        Table(["merge", "measure", "of", "share", "95 % from", "to"], []),
    )
    for measure, axis in MEASURES.items():
        pairs = [(row.name, row.retention if measure == "retention" else row.gain_kept) for row in found.rows]
        shares = [(name, kept) for name, kept in pairs if kept is not None]
        tasks = list(dict.fromkeys(task for _, kept in shares for task in kept.tasks))
        if not tasks:
            continue
        bars = []
        for name, kept in shares:
            parts = {task: kept.tasks.get(task) for task in tasks}
            parts |= {"MEAN": kept.mean, "LEAST": kept.least}
            bars.append((name, [_middle(one) for one in parts.values()]))
            for what, one in parts.items():
                of = f"least ({kept.worst})" if what == "LEAST" else what.lower() if what == "MEAN" else what
                values = [None] * 3 if one is None else _finite(one.value, one.low, one.high)
                chart.table.rows.append([name, measure, of, *values])
        chart.variants.append((measure.capitalize(), plots.retention([*tasks, "MEAN", "LEAST"], bars, axis)))
    return chart if chart.variants else None


def _middle(one: Estimate | None) -> float | None:
    return None if one is None or not math.isfinite(one.value) else one.value


def comparison_notes(found: Comparison) -> str:
    lines = "".join(
        f'<li class="{note.level}"><b>{"Caution" if note.level == "warning" else "Note"}:</b> {text(note.text)}</li>'
        for note in found.notes
    )
    return f'<ul class="notes">{lines}</ul>' if lines else ""


# -- differences ----------------------------------------------------------------------------------------


def differences_chart(tests: Sequence[PairedTest], binary: set[str]) -> Chart:
    """``binary``: tasks with right and wrong answers; differences there are in points."""
    against = " and ".join(dict.fromkeys(test.baseline for test in tests))
    tasks = {test.task for test in tests if test.task is not None}
    percent = tasks <= binary
    rows = [
        [
            test.candidate, test.baseline, test.task or ALL_TASKS, VERDICTS[test.verdict],
            *_finite(test.advantage, test.low, test.high), test.wins, test.losses, test.items,
            p_text(test.p), p_text(test.p_holm), test.test,
        ]
        for test in tests
    ]  # fmt: skip
    columns = ["model", "against", "task", "verdict", "difference", "95 % from", "to", "better items", "worse items",
               "items", "p", "p (Holm)", "test"]  # fmt: skip
    chart = Chart(
        "differences",
        f"Differences from {against}",
        "Both models answered the same items, so these differences are sharper than the scores. Right of 0 is better. "
        "▲ and ▼ are proven at 5 %, corrected (Holm) for all tests of the table; = means that the items cannot tell "
        "them apart, not that they are equal.",
        "Exact McNemar test where answers are right or wrong, paired bootstrap otherwise.",
        Table(columns, rows),
    )
    for baseline in dict.fromkeys(test.baseline for test in tests):
        own = [test for test in tests if test.baseline == baseline]
        drawn = [plots.Score(t.candidate, t.task or ALL_TASKS, t.advantage, *_bounded(t), t.items) for t in own]
        if percent or len(tasks) == 1:
            figure = plots.scores(drawn, f"difference from {baseline[:40]}", percent=percent, zero=True)
            chart.variants.append((f"against {baseline}", figure))
    return chart


def p_text(p: float | None) -> str | None:
    return None if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _bounded(test: PairedTest) -> tuple[float, float]:
    low, high = test.low, test.high
    return (low if math.isfinite(low) else test.advantage), (high if math.isfinite(high) else test.advantage)


def binary_tasks(scored: Scored, split: str) -> set[str]:
    return {table.task for table in overview(scored, split).tables if table.metric.kind == "binary"}


# -- radar ----------------------------------------------------------------------------------------------


def radar_chart(scored: Scored, split: str) -> Chart | str:
    """The chart, or why there is none. Six models at most: base, baselines and merges go before experts."""
    found = overview(scored, split)
    tables = [table for table in found.tables if table.metric.kind == "binary"]
    least, most = plots.RADAR_TASKS
    if not least <= len(tables) <= most:
        return f"A radar needs {least} to {most} tasks with right and wrong answers; here are {len(tables)}."
    order = sorted(found.models, key=lambda name: scored.roles[name] == "expert")[:6]
    values = [
        (name, [float(t.column(name).mean()) if name in t.models else None for t in tables]) for name in order
    ]  # fmt: skip
    chart = Chart(
        "radar",
        "Shapes of skill",
        "One axis per task, from 0 in the middle to all answers right at the rim. An overview only: it has no "
        "intervals, and areas mean nothing, because they depend on the order of the tasks.",
        f"Shown are {len(order)} of {len(found.models)} models." if len(order) < len(found.models) else "",
        Table(["model", *(t.task for t in tables)], [[name, *scores] for name, scores in values]),
    )
    chart.variants = [("", plots.radar([t.task for t in tables], values))]
    return chart
