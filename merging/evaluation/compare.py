"""The table that a reviewer would ask for, from records: base, experts, baselines, candidates, and what is proven.

The one idea: everything is computed from one set of resamples per task. The same drawn items go through every model,
so a mean, a ratio, a minimum and a difference of any two models come with intervals that fit together, and a
comparison costs what one bootstrap costs.

What the numbers may be used for is part of the result: settings chosen on the reported items are refused, unequal
budgets, weak tasks and small samples are said in ``notes``, and all tests of the table are corrected together (Holm).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np

from merging.errors import TaskError
from merging.evaluation.compare_notes import notes_of
from merging.evaluation.comparison import FEW_ITEMS, Cell, Comparison, Forgetting, Front, PairedTest, Row, TaskFacts
from merging.evaluation.pairing import Array, Paired, pair
from merging.evaluation.pareto import Hypervolume, distance_to_utopia, hypervolume, pareto_front
from merging.evaluation.records import Metric, Record
from merging.evaluation.retention import (
    Estimate,
    Kept,
    SignalToNoise,
    estimate,
    forgetting,
    gain_kept,
    kept,
    retention,
    signal_to_noise,
)
from merging.evaluation.run_file import Run
from merging.evaluation.statistics import (
    RESAMPLES,
    bootstrap_p,
    holm,
    paired_difference,
    percentile_interval,
    power_factor,
    resampled_means,
    smallest_visible_difference,
    standard_error,
    tied_groups,
    wilson_interval,
)

LEVEL = 0.05


def compare(
    records: Iterable[Record],
    run: Run,
    *,
    selected_on: Iterable[Record] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare the models of a run on its records.

    Args:
        records: of the report split. Records of models that the run does not name are not used.
        run: who is who.
        selected_on: records of the split that settings were chosen on. Only their items are looked at.

    Raises:
        TaskError: ``E_SELECTION`` when an item was used for choosing and for reporting, or both splits have one name;
            ``E_COMPARE`` when the records are incomplete or do not pair (see ``pairing.pair``).
    """
    entries = run.entries
    needed = {name: entry.tasks if role == "expert" else None for name, (role, entry) in entries.items()}
    keys = {name: entry.model for name, (_, entry) in entries.items()}
    paired = pair(records, keys, needed=needed, tasks=run.tasks, metrics=run.metrics)
    owned = list(run.owners)  # these first, in the order of the experts
    paired.sort(key=lambda task: owned.index(task.task) if task.task in owned else len(owned))
    known = {task.task for task in paired}
    for name, expert in run.experts.items():
        for task in expert.tasks:
            if task not in known and run.tasks is None:
                what = f"There are no records of the task {task}, which is expert {name}'s own."
                raise TaskError("E_COMPARE", what, f"There are: {', '.join(sorted(known))}.", "Evaluate it there.")
    chosen_items = _check_selection(run, paired, selected_on)

    work = _Work(run, paired, resamples, seed)
    rows = work.rows()
    tests = work.tests()
    facts = [work.facts(task, tests) for task in paired]
    merged = [row for row in rows if row.is_merged]
    work.mark_groups(merged)
    fronts, volumes, measure = _trade_offs(merged, facts)
    comparison = Comparison(run.split, resamples, seed, LEVEL, facts, rows, tests, fronts, volumes, measure, [])
    comparison.notes = notes_of(comparison, run, paired, chosen_items)
    return comparison


def _check_selection(run: Run, paired: Sequence[Paired], selected_on: Iterable[Record]) -> int:
    """How many items settings were chosen on; refused if one of them is reported on."""
    selection = run.selection
    if selection and run.split and selection.split == run.split:
        what = f"Settings were chosen on the split {run.split!r} that is also reported on."
        raise TaskError("E_SELECTION", what, _BIASED, "Choose on one split, report on another.")
    reported = {item: task.task for task in paired for item in task.items}
    chosen = {(record.task, record.item) for record in selected_on}
    for task, item in sorted(chosen):
        if item in reported:
            count = sum(item in reported for _, item in chosen)
            what = f"Item {item} of {reported[item]} was used to choose settings (as {task}), and {count - 1} others."
            raise TaskError("E_SELECTION", what, _BIASED, "Report on items that nothing was chosen on.")
    return len(chosen)


_BIASED = "The best of several settings looks better on the items it was chosen on than it is."


class _Work:
    """The resampled means of every model on every task, and what follows from them."""

    def __init__(self, run: Run, paired: list[Paired], resamples: int, seed: int) -> None:
        self.run, self.paired, self.resamples, self.seed = run, paired, resamples, seed
        self.owners = run.owners
        self.by_task = {task.task: task for task in paired}
        self.draws = {
            task.task: resampled_means(
                task.scores, clusters=task.clusters, resamples=resamples, seed=[seed, _number(task.task)]
            )
            for task in paired
        }
        # a mean over tasks means something only where the scores have one unit
        self.one_unit = len({_unit(task.metric) for task in paired}) == 1
        self.names = list(run.entries)
        self.merged = [name for name, (role, _) in run.entries.items() if role not in ("base", "expert")]
        self.of_pairs: dict[frozenset[str], float] = {}

    def has_all(self, name: str) -> bool:
        return all(name in task.models for task in self.paired)

    def drawn(self, task: Paired, name: str) -> Array:
        return self.draws[task.task][:, task.models.index(name)]

    def mean_draws(self, name: str) -> Array:
        return np.mean([self.drawn(task, name) for task in self.paired], axis=0)

    def mean(self, name: str) -> float:
        return math.fsum(float(task.column(name).mean()) for task in self.paired) / len(self.paired)

    # -- rows -----------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        rows = []
        for name, (role, entry) in self.run.entries.items():
            cells = {task.task: self.cell(task, name) for task in self.paired if name in task.models}
            row = Row(name, role, entry.model, entry.setting, entry.evaluations, entry.bytes, cells)  # type: ignore[arg-type]
            lengths = [cell.length for cell in cells.values()]
            if self.has_all(name):
                row.length = math.fsum(lengths) / len(lengths) if any(lengths) else None
                if self.one_unit:
                    row.mean = self.mean_with_interval(name, list(cells.values()))
            if row.is_merged:
                row.retention, row.gain_kept = self.kept(name)
            if role != "base" and self.has_all(name):
                row.forgetting = self.forgetting(name)
            rows.append(row)
        return rows

    def mean_with_interval(self, name: str, cells: Sequence[Cell]) -> Estimate:
        """Bootstrap; where that has nothing to resample (all answers right, or all wrong) from the intervals of the
        tasks, m − √Σ(pₜ − lₜ)² / T and m + √Σ(uₜ − pₜ)² / T (MOVER; Zou and Donner 2008)."""
        mean, draws = self.mean(name), self.mean_draws(name)
        if np.ptp(draws) > 0:
            return estimate(mean, draws)
        below = math.hypot(*(cell.mean - cell.low for cell in cells)) / len(cells)
        above = math.hypot(*(cell.high - cell.mean for cell in cells)) / len(cells)
        return Estimate(mean, mean - below, mean + above)

    def cell(self, task: Paired, name: str) -> Cell:
        scores = task.column(name)
        binary = task.metric.kind == "binary" and bool(((scores == 0) | (scores == 1)).all())
        correct = int(scores.sum()) if binary else None
        if correct is not None and task.clusters is None:
            low, high = wilson_interval(correct, len(scores))
        elif task.units > 1:
            low, high = percentile_interval(self.drawn(task, name))
        else:
            low = high = math.nan
        length = float(task.lengths[:, task.models.index(name)].mean())
        return Cell(float(scores.mean()), low, high, correct, len(scores), length)

    def kept(self, name: str) -> tuple[Kept | None, Kept | None]:
        """Retention and gain kept on the tasks that have an expert of their own."""
        ratios: tuple[dict[str, float], dict[str, float]] = ({}, {})
        draws: tuple[dict[str, Array], dict[str, Array]] = ({}, {})
        for task in self.paired:
            if task.task not in self.owners:
                continue
            expert, better = f"expert {self.owners[task.task]}", task.metric.better
            mine, low, high = (float(task.column(model).mean()) for model in (name, "base", expert))
            ratios[0][task.task] = float(retention(mine, high, better))
            ratios[1][task.task] = float(gain_kept(mine, low, high, better))
            drawn, drawn_low, drawn_high = (self.drawn(task, model) for model in (name, "base", expert))
            draws[0][task.task] = retention(drawn, drawn_high, better)
            draws[1][task.task] = gain_kept(drawn, drawn_low, drawn_high, better)
        if not ratios[0]:
            return None, None
        return kept(ratios[0], draws[0]), kept(ratios[1], draws[1])

    def forgetting(self, name: str) -> Forgetting | None:
        nobodys = [task for task in self.paired if task.task not in self.owners]
        if not nobodys:
            return None
        found: dict[str, Estimate] = {}
        points, draws = [], []
        for task in nobodys:
            better = task.metric.better
            points.append(float(forgetting(task.column(name).mean(), task.column("base").mean(), better)))
            draws.append(forgetting(self.drawn(task, name), self.drawn(task, "base"), better))
            found[task.task] = estimate(points[-1], draws[-1])
        one_unit = len({_unit(task.metric) for task in nobodys}) == 1
        mean = estimate(math.fsum(points) / len(points), np.mean(draws, axis=0)) if one_unit else None
        return Forgetting(found, mean)

    # -- tests ----------------------------------------------------------------------------------------

    def tests(self) -> list[PairedTest]:
        """Each candidate against each baseline on every task and on the mean; and each merge against each by the mean.

        All of them are one family for the correction, so that no pair is told apart in one place and not in another.
        """
        tests: list[PairedTest] = []
        for candidate in self.run.candidates:
            for baseline in ("average", "tuned"):
                if baseline in self.names:
                    tests += [self.test(task, candidate, baseline) for task in self.paired]
                    if self.one_unit and len(self.paired) > 1:
                        tests.append(self.test_of_mean(candidate, baseline))
        family = [test for test in tests if test.p is not None and test.task is not None]
        pairs = self.pairs()
        corrected = holm([*(test.p for test in family if test.p is not None), *pairs.values()])
        self.of_pairs = dict(zip(pairs, corrected[len(family) :], strict=True))
        for test, p in zip(family, corrected, strict=False):
            test.p_holm = p
        for test in tests:
            if test.task is None:
                test.p_holm = self.of_pairs.get(frozenset((test.candidate, test.baseline)))
            if test.p_holm is not None:
                test.verdict = "tied" if test.p_holm >= LEVEL else "better" if test.advantage > 0 else "worse"
        return tests

    def pairs(self) -> dict[frozenset[str], float]:
        """p-values of all pairs of merged models by their means over tasks; empty where means are not tested."""
        if not self.one_unit or sum(task.units for task in self.paired) < FEW_ITEMS:
            return {}
        draws = {name: self.mean_draws(name) for name in self.merged}
        return {frozenset(pair): bootstrap_p(draws[pair[0]] - draws[pair[1]]) for pair in combinations(draws, 2)}

    def test(self, task: Paired, candidate: str, baseline: str) -> PairedTest:
        better = task.metric.better
        draws = better * (self.drawn(task, candidate) - self.drawn(task, baseline))
        one, two = (task.column(name) for name in (candidate, baseline))
        if better < 0:  # of two losses the smaller one wins
            one, two = two, one
        found = paired_difference(one, two, clusters=task.clusters, draws=draws)
        return PairedTest(
            candidate,
            baseline,
            task.task,
            *(found.mean, found.low, found.high, found.standard_error, found.items, found.units),
            *(found.wins, found.losses, found.test),
            found.p if found.units >= FEW_ITEMS else None,
        )

    def test_of_mean(self, candidate: str, baseline: str) -> PairedTest:
        better = self.paired[0].metric.better
        draws = better * (self.mean_draws(candidate) - self.mean_draws(baseline))
        units = sum(task.units for task in self.paired)
        return PairedTest(
            candidate,
            baseline,
            None,
            better * (self.mean(candidate) - self.mean(baseline)),
            *percentile_interval(draws),
            float(draws.std()),
            sum(len(task.items) for task in self.paired),
            units,
            None,
            None,
            "paired bootstrap, stratified by task",
            bootstrap_p(draws) if units >= FEW_ITEMS else None,
        )

    def facts(self, task: Paired, tests: Sequence[PairedTest]) -> TaskFacts:
        mine = [test for test in tests if test.task == task.task]
        return TaskFacts(
            name=task.task,
            metric=task.metric.name,
            unit=task.metric.unit,
            better=task.metric.better,
            kind=task.metric.kind,
            owner=self.owners.get(task.task),
            items=len(task.items),
            units=task.units,
            visible=self.visible(task, mine),
            signal_to_noise=self.signal(task) if len(self.merged) > 1 else None,
        )

    def visible(self, task: Paired, tests: Sequence[PairedTest]) -> float:
        """From how much the tested pairs differ item by item, on average; NaN where they never do."""
        if task.clusters is not None:
            errors = [t.standard_error for t in tests if t.standard_error > 0]  # NaN is not
            return math.sqrt(power_factor()) * math.fsum(errors) / len(errors) if errors else math.nan
        squares = [float(((task.column(test.candidate) - task.column(test.baseline)) ** 2).mean()) for test in tests]
        square = math.fsum(squares) / len(squares) if squares else 0.0
        return smallest_visible_difference(len(task.items), square) if square > 0 else math.nan

    def signal(self, task: Paired) -> SignalToNoise:
        columns = [task.column(name) for name in self.merged]
        errors = [standard_error(column, task.clusters) for column in columns]
        if any(math.isnan(error) for error in errors):  # one item, one cluster
            return SignalToNoise(math.nan, math.nan, math.nan)
        return signal_to_noise([float(column.mean()) for column in columns], errors)

    def mark_groups(self, merged: Sequence[Row]) -> None:
        """Numbers of the groups of merged models whose means over tasks cannot be told apart, best group first."""
        if not self.of_pairs:
            return
        better = self.paired[0].metric.better
        ranked = sorted(merged, key=lambda row: -better * self.mean(row.name))
        tied = np.eye(len(ranked), dtype=bool)
        for i, j in combinations(range(len(ranked)), 2):
            tied[i, j] = tied[j, i] = self.of_pairs[frozenset((ranked[i].name, ranked[j].name))] >= LEVEL
        for number, group in enumerate(tied_groups(tied)):
            for index in group:
                ranked[index].groups.append(number)


def _trade_offs(merged: Sequence[Row], tasks: Sequence[TaskFacts]) -> tuple[list[Front], dict[str, Hypervolume], str]:
    """Pareto fronts of the merged models; distance to utopia and volumes from gain kept (else retention)."""
    if not merged:
        return [], {}, ""
    names = [task.name for task in tasks]
    points = [[task.better * row.tasks[task.name].mean for task in tasks] for row in merged]
    fronts = [_front(merged, points, names)]
    for row in merged:
        row.on_front = row.name in fronts[0].rows
    extra: dict[str, list[float | None]] = {
        "response length": [row.length for row in merged],
        "size": [row.bytes for row in merged],
    }
    for name, values in extra.items():
        found = [value for value in values if value is not None]
        if len(found) == len(merged) and len(set(found)) > 1:
            longer = [[*point, -value] for point, value in zip(points, found, strict=True)]
            fronts.append(_front(merged, longer, [*names, name]))
    for measure in ("gain kept", "retention"):
        shares = [row.gain_kept if measure == "gain kept" else row.retention for row in merged]
        if any(share is None or share.left_out for share in shares):
            continue
        table = [[one.value for one in share.tasks.values()] for share in shares if share is not None]
        for row, distance in zip(merged, distance_to_utopia(table), strict=True):
            row.distance_to_utopia = distance
        volumes = {"all": hypervolume(table)}
        baselines = [point for row, point in zip(merged, table, strict=True) if row.role != "candidate"]
        if baselines:
            volumes["baselines"] = hypervolume(baselines)
        return fronts, volumes, measure
    return fronts, {}, ""


def _front(merged: Sequence[Row], points: Sequence[Sequence[float]], objectives: Sequence[str]) -> Front:
    on = pareto_front(points)
    return Front(tuple(objectives), tuple(row.name for row, yes in zip(merged, on, strict=True) if yes))


def _unit(metric: Metric) -> str:
    """Scores of one unit may be averaged: all shares of right answers, or quantities of the same name."""
    return "share" if metric.kind == "binary" else metric.unit


def _number(text: str) -> int:
    """A seed from a task's name, so that a task's draws do not depend on which other tasks there are."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "big")
