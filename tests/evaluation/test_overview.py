"""Models beside each other: the same numbers as in a comparison, and one correction for all that is shown."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from merging.errors import TaskError
from merging.evaluation.compare import compare
from merging.evaluation.overview import Overview
from tests.evaluation.evaluated import SHARES, by_task, records_of, run_of

SCORES = by_task(200, SHARES)
RECORDS = records_of(SCORES)
NAMES = {name: name for name in SCORES}


def overview(records: list = RECORDS, **models: str) -> Overview:
    return Overview(records, models or NAMES, resamples=500)


def test_scores_are_those_of_a_comparison() -> None:
    found = compare(RECORDS, run_of(), resamples=500)
    for score in overview().scores():
        row = next(row for row in found.rows if row.model == score.model)
        cell = row.tasks[score.task]
        assert (score.mean, score.low, score.high, score.correct, score.items) == (
            cell.mean, cell.low, cell.high, cell.correct, cell.items,
        )  # fmt: skip


def test_quantities_have_the_bootstrap_intervals_of_a_comparison() -> None:
    records = [replace(record, metric="nll_per_byte", score=1 + record.score) for record in RECORDS]
    found = compare(records, run_of(), resamples=500)
    by_name = {(row.model, task): cell for row in found.rows for task, cell in row.tasks.items()}
    for score in overview(records).scores():
        cell = by_name[score.model, score.task]
        assert (score.mean, score.low, score.high, score.correct) == (cell.mean, cell.low, cell.high, None)


def test_differences_are_counted_item_by_item_and_corrected_together() -> None:
    tests = overview().differences("base")
    assert [(test.candidate, test.task) for test in tests[:3]] == [
        ("sorter", "sort"),
        ("sorter", "code"),
        ("sorter", None),
    ]
    one = next(test for test in tests if (test.candidate, test.task) == ("ties", "sort"))
    steps = SCORES["ties"]["sort"] - SCORES["base"]["sort"]
    assert one.advantage == pytest.approx(steps.mean())
    assert (one.wins, one.losses, one.items) == ((steps > 0).sum(), (steps < 0).sum(), 200)
    corrected = multipletests([test.p for test in tests], method="holm")[1]
    assert [test.p_holm for test in tests] == pytest.approx(corrected)
    assert {test.verdict for test in tests} == {"better", "tied"}
    assert {test.verdict for test in overview().differences("sorter") if test.task == "sort"} == {"worse"}


def test_of_losses_the_smaller_one_is_better() -> None:
    records = [replace(record, metric="nll_per_byte", score=2 - record.score) for record in RECORDS]
    for test in overview(records).differences("base"):
        share = overview().differences("base")
        other = next(one for one in share if (one.candidate, one.task) == (test.candidate, test.task))
        assert test.advantage == pytest.approx(other.advantage)
        assert np.sign(test.low) == np.sign(other.low)


def test_a_model_without_a_task_is_missing_from_it_only() -> None:
    records = [record for record in RECORDS if (record.model, record.task) != ("ties", "code")]
    found = overview(records)
    assert {(s.model, s.task) for s in found.scores() if s.model == "ties"} == {("ties", "sort")}
    assert [test.task for test in found.differences("base", ["ties"])] == ["sort"]


def test_few_items_are_counted_and_not_tested() -> None:
    few = records_of(by_task(20, {"sort": SHARES["sort"]}))
    tests = overview(few, base="base", ties="ties").differences("base")
    assert [(test.verdict, test.p, test.p_holm) for test in tests] == [("too few items", None, None)]


def test_one_cluster_has_no_interval() -> None:
    records = records_of({"a": {"t": [1, 0, 1]}}, clusters=["x", "x", "x"])
    (score,) = overview(records, a="a").scores()
    assert score.mean == pytest.approx(2 / 3) and math.isnan(score.low)


def test_what_does_not_pair_is_refused() -> None:
    other = [replace(record, prompt="another") if record.model == "ties" else record for record in RECORDS]
    with pytest.raises(TaskError, match="other prompts"):
        overview(other)
