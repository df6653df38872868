"""Scores of any models on any tasks, and their differences from one of them: what needs no roles.

The one idea: ``compare`` answers a reviewer and must know who is the base and which expert owns which task. Often one
only wants to see some models beside each other. The same pairs, intervals and corrections do for that: tables of items
by ``pairing``, Wilson and bootstrap intervals, exact McNemar tests, and Holm's correction over all that is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from merging.evaluation.compare import LEVEL, _number, _unit
from merging.evaluation.comparison import FEW_ITEMS, PairedTest
from merging.evaluation.pairing import Array, Paired, pair
from merging.evaluation.records import Record
from merging.evaluation.statistics import (
    RESAMPLES,
    bootstrap_p,
    holm,
    paired_difference,
    percentile_interval,
    resampled_means,
    wilson_interval,
)


@dataclass(frozen=True, slots=True)
class ModelScore:
    """One model on one task, with its 95 % interval (NaN where one item or cluster is all there is). ``correct``: how
    many right answers, of 0/1 metrics."""

    model: str
    task: str
    mean: float
    low: float
    high: float
    correct: int | None
    items: int


class Overview:
    """Models beside each other. ``models``: name -> key in the records.

    A task is there if any of the models was scored on it; a model that was not is missing from its table. TaskError
    E_COMPARE if the records of a task do not pair (see ``pairing.pair``).
    """

    def __init__(
        self, records: Iterable[Record], models: Mapping[str, str], *, resamples: int = RESAMPLES, seed: int = 0
    ) -> None:
        by_task: dict[str, list[Record]] = {}
        for record in records:
            by_task.setdefault(record.task, []).append(record)
        self.tables: list[Paired] = []
        for own in by_task.values():
            there = {record.model for record in own}
            names = {name: key for name, key in models.items() if key in there}
            if names:
                self.tables += pair(own, names, needed=dict.fromkeys(names))
        self.models = [name for name in models if any(name in table.models for table in self.tables)]
        self._resamples, self._seed = resamples, seed
        self._draws: dict[str, Array] = {}

    @property
    def one_unit(self) -> bool:
        """May the scores of the tasks be averaged?"""
        return len({_unit(table.metric) for table in self.tables}) == 1

    def draws(self, table: Paired, model: str) -> Array:
        if table.task not in self._draws:
            self._draws[table.task] = resampled_means(
                table.scores,
                clusters=table.clusters,
                resamples=self._resamples,
                seed=[self._seed, _number(table.task)],
            )
        return self._draws[table.task][:, table.models.index(model)]

    def scores(self) -> list[ModelScore]:
        """By task, and in it by model."""
        return [self._score(table, name) for table in self.tables for name in self.models if name in table.models]

    def _score(self, table: Paired, name: str) -> ModelScore:
        column = table.column(name)
        binary = table.metric.kind == "binary" and bool(((column == 0) | (column == 1)).all())
        correct = int(column.sum()) if binary else None
        low = high = math.nan
        if correct is not None and table.clusters is None:
            low, high = wilson_interval(correct, len(column))
        elif table.units > 1:
            low, high = percentile_interval(self.draws(table, name))
        return ModelScore(name, table.task, float(column.mean()), low, high, correct, len(column))

    def differences(self, reference: str, models: Sequence[str] | None = None) -> list[PairedTest]:
        """Each model against ``reference`` on every task that both have, and on the mean over these tasks if there
        are several of one unit. All of them are one family for Holm's correction."""
        tests: list[PairedTest] = []
        for name in self.models if models is None else models:
            shared = [table for table in self.tables if {name, reference} <= {*table.models}]
            if name == reference or not shared:
                continue
            tests += [self._difference(table, name, reference) for table in shared]
            if len(shared) > 1 and self.one_unit:
                tests.append(self._of_mean(shared, name, reference))
        family = [test for test in tests if test.p is not None]
        for test, corrected in zip(family, holm([test.p for test in family if test.p is not None]), strict=True):
            test.p_holm = corrected
            test.verdict = "tied" if corrected >= LEVEL else "better" if test.advantage > 0 else "worse"
        return tests

    def _difference(self, table: Paired, name: str, reference: str) -> PairedTest:
        better = table.metric.better
        draws = better * (self.draws(table, name) - self.draws(table, reference))
        one, two = table.column(name), table.column(reference)
        if better < 0:  # of two losses the smaller one wins
            one, two = two, one
        found = paired_difference(one, two, clusters=table.clusters, draws=draws)
        p = found.p if found.units >= FEW_ITEMS else None
        return PairedTest(
            name, reference, table.task, found.mean, found.low, found.high, found.standard_error, found.items,
            found.units, found.wins, found.losses, found.test, p,
        )  # fmt: skip

    def _of_mean(self, tables: Sequence[Paired], name: str, reference: str) -> PairedTest:
        better = tables[0].metric.better
        draws = better * np.mean([self.draws(t, name) - self.draws(t, reference) for t in tables], axis=0)
        steps = [float((t.column(name) - t.column(reference)).mean()) for t in tables]
        units = sum(table.units for table in tables)
        p = bootstrap_p(draws) if units >= FEW_ITEMS else None
        return PairedTest(
            name, reference, None, better * math.fsum(steps) / len(steps), *percentile_interval(draws),
            float(draws.std()), sum(len(table.items) for table in tables), units, None, None,
            "paired bootstrap, stratified by task", p,
        )  # fmt: skip
