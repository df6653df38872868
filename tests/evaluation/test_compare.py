"""The comparison against naive recomputation from the same records, and what it refuses and says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests

from merging.errors import TaskError
from merging.evaluation import compare as compare_module
from merging.evaluation.comparison import Comparison
from merging.evaluation.run_file import parse_run
from merging.evaluation.statistics import bootstrap_p, resampled_means, wilson_interval
from tests.evaluation.evaluated import SHARES, by_task, records_of, run_of


def compare(*arguments: Any, **options: Any) -> Comparison:
    return compare_module.compare(*arguments, **{"resamples": 2_000, **options})


SCORES = by_task(400, SHARES)
RECORDS = records_of(SCORES, lengths={"tuned": 6})
COMPARISON = compare(RECORDS, run_of())


def warnings_of(comparison: Comparison) -> str:
    return "\n".join(note.text for note in comparison.notes if note.level == "warning")


def notes_of(comparison: Comparison) -> str:
    return "\n".join(note.text for note in comparison.notes)


# -- the figures --------------------------------------------------------------------------------------------------


def test_rows_are_in_the_order_a_reviewer_reads_them() -> None:
    assert [row.name for row in COMPARISON.rows] == ["base", "expert sort", "expert code", "average", "tuned", "ties"]
    assert [row.role for row in COMPARISON.rows] == ["base", "expert", "expert", "average", "tuned", "candidate"]


def test_figures_are_those_of_a_naive_count() -> None:
    share = {model: {task: values.mean() for task, values in tasks.items()} for model, tasks in SCORES.items()}
    ties = COMPARISON.row("ties")
    assert ties.tasks["sort"].mean == pytest.approx(share["ties"]["sort"])
    assert ties.tasks["sort"].correct == SCORES["ties"]["sort"].sum()
    assert ties.mean is not None and ties.retention is not None and ties.gain_kept is not None
    assert ties.mean.value == pytest.approx((share["ties"]["sort"] + share["ties"]["code"]) / 2)
    kept = [share["ties"][t] / share[e][t] for t, e in (("sort", "sorter"), ("code", "coder"))]
    assert [one.value for one in ties.retention.tasks.values()] == pytest.approx(kept)
    assert (ties.retention.mean.value, ties.retention.least.value) == pytest.approx((np.mean(kept), min(kept)))
    gains = [
        (share["ties"][t] - share["base"][t]) / (share[e][t] - share["base"][t])
        for t, e in (("sort", "sorter"), ("code", "coder"))
    ]
    assert (ties.gain_kept.mean.value, ties.gain_kept.least.value) == pytest.approx((np.mean(gains), min(gains)))
    assert ties.gain_kept.worst == ("sort", "code")[int(np.argmin(gains))]
    assert (COMPARISON.row("tuned").length, ties.length) == (6, 4)


def test_intervals_hold_their_values() -> None:
    for row in COMPARISON.rows:
        for cell in row.tasks.values():
            assert cell.low <= cell.mean <= cell.high
        assert row.mean is not None and row.mean.low < row.mean.value < row.mean.high
        for share in (row.retention, row.gain_kept):
            assert (share is None) is not row.is_merged
            if share is not None:
                assert share.mean.low < share.mean.value < share.mean.high
                assert share.least.low < share.least.value <= share.least.high


def test_the_mean_has_the_interval_of_independent_tasks() -> None:
    """Two tasks with items of their own: the variances of their means add up."""
    ties = COMPARISON.row("ties")
    assert ties.mean is not None
    variance = sum(scipy.stats.sem(values) ** 2 for values in SCORES["ties"].values()) / 4
    assert (ties.mean.high - ties.mean.low) / 2 == pytest.approx(1.96 * math.sqrt(variance), rel=0.05)


def test_tests_are_mcnemar_and_corrected_together() -> None:
    assert len(COMPARISON.tests) == 6  # two baselines × (two tasks and their mean)
    for test in COMPARISON.tests:
        if test.task is not None:
            one, two = SCORES["ties"][test.task], SCORES[test.baseline][test.task]
            wins, losses = int((one > two).sum()), int((one < two).sum())
            assert (test.wins, test.losses, test.items) == (wins, losses, 400)
            assert test.p == pytest.approx(scipy.stats.binomtest(wins, wins + losses).pvalue)
            assert test.advantage == pytest.approx(float((one - two).mean()))
    draws = [resampled_means(np.stack([SCORES[m][t] for m in ("average", "tuned")], axis=1), resamples=2_000,
                             seed=[0, compare_module._number(t)]) for t in ("sort", "code")]  # fmt: skip
    between = bootstrap_p(np.mean(draws, axis=0) @ [1, -1])  # the one pair of merges that is not in the table
    corrected = multipletests([*(test.p for test in COMPARISON.tests), between], method="holm")[1]
    assert [test.p_holm for test in COMPARISON.tests] == pytest.approx(corrected[:-1])


def test_verdicts() -> None:
    verdicts = {(test.baseline, test.task): test.verdict for test in COMPARISON.tests}
    assert verdicts["average", "sort"] == verdicts["tuned", "sort"] == verdicts["average", None] == "better"
    assert verdicts["tuned", "code"] == "tied"
    swapped = run_of(tuned={"model": "ties"}, candidates={"mine": {"model": "average"}})
    assert {test.verdict for test in compare(RECORDS, swapped).tests if test.baseline == "tuned"} >= {"worse"}


def test_groups_of_ties_and_the_front() -> None:
    average, tuned, ties = (COMPARISON.row(name) for name in ("average", "tuned", "ties"))
    assert ties.groups and not set(ties.groups) & set(average.groups)
    assert min(ties.groups) == 0
    assert ties.on_front and not average.on_front
    longest = next(front for front in COMPARISON.fronts if "response length" in front.objectives)
    assert longest.objectives == ("sort", "code", "response length")
    assert ties.distance_to_utopia is not None and tuned.distance_to_utopia is not None
    gains = [one.value for one in tuned.gain_kept.tasks.values()] if tuned.gain_kept else []
    assert tuned.distance_to_utopia == pytest.approx(math.dist(gains, (1, 1)))
    assert COMPARISON.measure == "gain kept"
    assert COMPARISON.hypervolumes["all"].value > COMPARISON.hypervolumes["baselines"].value > 0


def test_the_json_is_complete_and_strict() -> None:
    data = json.loads(json.dumps(COMPARISON.as_dict(), allow_nan=False))
    assert data["format"] == 1 and len(data["rows"]) == 6 and len(data["tests"]) == 6
    assert data["rows"][0]["retention"] is None
    assert data["tasks"][0]["signal_to_noise"]["usable"] is True
    assert data["rows"][5]["gain_kept"]["worst"] in ("sort", "code")
    assert {note["level"] for note in data["notes"]} <= {"note", "warning"}


def test_order_of_records_does_not_matter_and_the_seed_repeats() -> None:
    again = compare(list(reversed(RECORDS)), run_of())
    assert again.as_dict()["tests"] == COMPARISON.as_dict()["tests"]
    assert compare(RECORDS, run_of(), seed=1).as_dict()["rows"] != COMPARISON.as_dict()["rows"]
    only = compare(RECORDS, run_of(tasks=["code"]))
    assert only.row("ties").tasks["code"] == COMPARISON.row("ties").tasks["code"]


# -- other kinds of scores ----------------------------------------------------------------------------------------


def test_losses_are_turned_so_that_more_is_better() -> None:
    generator = np.random.default_rng(0)
    text = generator.gamma(4, 0.5, 300)
    levels = {"base": 1.0, "sorter": 0.5, "coder": 1.1, "average": 0.8, "tuned": 0.75, "ties": 0.6}
    losses = {
        m: {"sort": text * level + generator.normal(0, 0.02, 300), "code": text[::-1] * level}
        for m, level in levels.items()
    }
    losses["coder"]["code"] = text[::-1] * 0.5
    found = compare(records_of(losses, metric="nll_per_byte"), run_of())
    ties = found.row("ties")
    assert ties.gain_kept is not None and ties.gain_kept.tasks["sort"].value == pytest.approx(0.8, abs=0.01)
    assert ties.retention is not None and ties.retention.tasks["code"].value == pytest.approx(0.5 / 0.6)
    verdicts = {(test.baseline, test.task): (test.verdict, test.test) for test in found.tests}
    assert verdicts["tuned", "sort"] == ("better", "paired bootstrap")
    assert next(test for test in found.tests if test.task == "sort").wins > 290
    assert "Less is better on sort (bits per byte) and code" in notes_of(found)


def test_tasks_of_different_kinds_have_no_mean() -> None:
    losses = {model: {"code": 1 + values["code"]} for model, values in SCORES.items()}
    records = [r for r in RECORDS if r.task == "sort"] + records_of(losses, metric="nll_per_token")
    found = compare(records, run_of())
    assert all(row.mean is None and row.groups == [] for row in found.rows)
    assert {test.task for test in found.tests} == {"sort", "code"}
    assert "no mean over tasks" in notes_of(found)


def test_clusters_are_what_is_independent() -> None:
    clusters = [f"document {number // 40}" for number in range(400)]
    found = compare(records_of(SCORES, clusters=clusters), run_of())
    assert [task.units for task in found.tasks] == [10, 10]
    assert {test.verdict for test in found.tests} == {"too few items"}  # ten documents
    assert "10 clusters" in notes_of(found)
    many = [f"document {number // 4}" for number in range(400)]
    found = compare(records_of(SCORES, clusters=many), run_of())
    test = next(test for test in found.tests if test.task == "sort")
    assert test.test == "paired bootstrap over clusters" and test.verdict == "better"


def test_forgetting_is_measured_where_nobody_trained() -> None:
    general = {model: {"general": values} for model, values in by_task(400, {"g": {
        "base": 0.8, "sorter": 0.6, "coder": 0.7, "average": 0.8, "tuned": 0.75, "ties": 0.5}}).items()
        for values in values.values()}  # fmt: skip
    found = compare(RECORDS + records_of(general), run_of())
    base, ties = general["base"]["general"], general["ties"]["general"]
    forgotten = found.row("ties").forgetting
    assert forgotten is not None and forgotten.mean is not None
    assert forgotten.mean.value == forgotten.tasks["general"].value == pytest.approx((base - ties).mean())
    assert forgotten.mean.low > 0.2
    assert found.row("expert sort").forgetting is not None
    assert list(found.row("ties").gain_kept.tasks) == ["sort", "code"]  # type: ignore[union-attr]
    assert COMPARISON.row("ties").forgetting is None and "forget of the base is not measured" in notes_of(COMPARISON)


def test_repeats_with_other_seeds_are_averaged() -> None:
    flipped = {model: {task: 1 - values for task, values in tasks.items()} for model, tasks in SCORES.items()}
    found = compare(RECORDS + records_of(flipped, seed=1), run_of())
    cell = found.row("ties").tasks["sort"]
    assert (cell.mean, cell.correct) == (0.5, None)
    assert "means over 2 seeds" in notes_of(found)


# -- degenerate, and what is said ---------------------------------------------------------------------------------


def test_few_items_give_counts_and_no_tests() -> None:
    found = compare(records_of(by_task(20, SHARES)), run_of())
    assert {test.verdict for test in found.tests} == {"too few items"}
    assert all(test.p is None and test.p_holm is None for test in found.tests)
    assert all(row.groups == [] for row in found.rows)
    assert "Fewer than 50 independent items: sort (20) and code (20)" in warnings_of(found)
    assert "Two points would take about" in notes_of(found)


def test_one_item_each() -> None:
    found = compare(records_of({model: {t: [1.0] for t in SHARES} for model in SCORES}), run_of())
    json.dumps(found.as_dict(), allow_nan=False)
    assert found.tests[0].advantage == 0


def test_models_that_are_all_equal() -> None:
    found = compare(records_of({model: SCORES["base"] for model in SCORES}), run_of())
    assert {test.p_holm for test in found.tests} == {1.0}
    assert "no better than the base there" in warnings_of(found)
    ties = found.row("ties")
    assert ties.gain_kept is not None and math.isnan(ties.gain_kept.mean.value) and ties.gain_kept.left_out
    assert ties.retention is not None and ties.retention.mean.value == 1
    assert found.measure == "retention" and ties.on_front and ties.groups == [0]
    assert found.tasks[0].visible != found.tasks[0].visible  # NaN: nothing is known about it


def test_an_expert_of_only_its_own_task_is_enough() -> None:
    records = [r for r in RECORDS if not (r.model == "sorter" and r.task == "code")]
    row = compare(records, run_of()).row("expert sort")
    assert list(row.tasks) == ["sort"] and row.mean is None and row.length is None


def test_budgets_are_said_and_unequal_ones_warned_of() -> None:
    assert "Evaluations spent on choosing: average 0, tuned 8, ties 8." in notes_of(COMPARISON)
    more = run_of(candidates={"ties": {"model": "ties", "evaluations": 15}})
    assert "ties: chosen with more evaluations than the tuned task arithmetic (8)" in warnings_of(
        compare(RECORDS, more)
    )
    unknown = run_of(candidates={"ties": {"model": "ties"}})
    assert "not said how many evaluations were spent on choosing ties" in warnings_of(compare(RECORDS, unknown))


def test_missing_baselines_are_warned_of() -> None:
    found = compare(RECORDS, run_of(average=None, tuned=None))
    assert "no plain average" in warnings_of(found) and "no task arithmetic" in warnings_of(found)
    assert found.tests == [] and found.row("ties").on_front


def test_mini_scale_is_labelled() -> None:
    assert "Mini-scale: models of 862,080 parameters" in notes_of(compare(RECORDS, run_of(parameters=862_080)))
    assert "Mini-scale" not in notes_of(compare(RECORDS, run_of(parameters=7_000_000_000)))


# -- selection ----------------------------------------------------------------------------------------------------


def test_items_that_were_chosen_on_are_refused() -> None:
    elsewhere = [replace(r, task=f"{r.task}.validation", item=f"v{r.item}") for r in RECORDS]
    found = compare(RECORDS, run_of(), selected_on=elsewhere)
    assert "None of the 800 items that were used for choosing is among them" in notes_of(found)
    assert "selected" not in warnings_of(found)
    leaked = [*elsewhere, replace(RECORDS[0], task="sort.validation")]
    with pytest.raises(TaskError, match="was used to choose settings") as caught:
        compare(RECORDS, run_of(), selected_on=leaked)
    assert caught.value.code == "E_SELECTION"


def test_one_name_for_both_splits_is_refused() -> None:
    with pytest.raises(TaskError, match="that is also reported on"):
        compare(RECORDS, run_of(selection={"split": "test"}))


def test_an_unknown_choice_is_warned_of() -> None:
    assert "whether an item is in both is unknown" in warnings_of(COMPARISON)
    assert "It is not said which items" in warnings_of(compare(RECORDS, run_of(selection=None)))
    nothing_chosen = parse_run(
        run_of().model_dump(exclude_defaults=True)
        | {"selection": None, "tuned": None, "candidates": {"ties": {"model": "ties", "evaluations": 0}}}
    )
    assert "It is not said which items" not in warnings_of(compare(RECORDS, nothing_chosen))


# -- records that do not pair -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: None if r.model == "ties" else r, "no records of ties on the task"),
        (lambda r: None if r.model == "ties" and r.task == "code" else r, "no records of ties on the task code"),
        (lambda r: None if r.model == "ties" and r.item == "sort-0007" else r, "not scored on the same items of sort"),
        (lambda r: replace(r, item="x") if r.model == "ties" and r.item == "sort-0007" else r, "ties lacks 1 items that base has"),
        (lambda r: replace(r, prompt="chat") if r.model == "ties" else r, "shown other prompts for item code-0000"),
        (lambda r: replace(r, shots=5) if r.model == "ties" else r, "shown other prompts"),
        (lambda r: replace(r, seed=3) if r.model == "ties" else r, "shown other seeds"),
        (lambda r: replace(r, metric="accuracy") if r.model == "ties" else r, "not scored by the same metric"),
        (lambda r: replace(r, score=math.nan) if r.item == "code-0003" else r, "NaN or infinite"),
        (lambda r: None if r.task == "code" else r, "expert code's own"),
        (lambda r: None, "no records of these models"),
    ],
)  # fmt: skip
def test_records_that_do_not_pair_are_refused(spoil, message: str) -> None:
    spoilt = [new for new in map(spoil, sorted(RECORDS, key=lambda r: (r.task, r.item))) if new is not None]
    with pytest.raises(TaskError) as caught:
        compare(spoilt, run_of())
    assert message in str(caught.value) and caught.value.code == "E_COMPARE"


def test_a_record_twice_is_one_but_two_scores_are_not() -> None:
    assert compare(RECORDS + RECORDS[:5], run_of()).as_dict() == COMPARISON.as_dict()
    with pytest.raises(TaskError, match="two different records"):
        compare([*RECORDS, replace(RECORDS[0], score=1 - RECORDS[0].score)], run_of())


def test_metrics_can_be_chosen() -> None:
    both = RECORDS + [replace(r, metric="accuracy", score=1 - r.score) for r in RECORDS]
    found = compare(both, run_of())
    assert found.tasks[0].metric == "exact_match" and "also recorded: accuracy" in notes_of(found)
    found = compare(both, run_of(metrics={"sort": "accuracy"}))
    assert [task.metric for task in found.tasks] == ["accuracy", "exact_match"]
    with pytest.raises(TaskError, match="Not all models have records of choice"):
        compare(both, run_of(metrics={"sort": "choice"}))


def test_records_of_other_models_are_not_looked_at() -> None:
    stranger = [replace(r, model="stranger", prompt="other", score=0.0) for r in RECORDS[:10]]
    assert compare(RECORDS + stranger, run_of()).as_dict() == COMPARISON.as_dict()


def test_all_right_and_all_wrong_have_intervals_too() -> None:
    """There is nothing to resample; the mean of two tasks is still not known exactly."""
    shares = {"base": 0.0, "sorter": 1.0, "coder": 1.0, "average": 0.5, "tuned": 0.5, "ties": 1.0}
    answers = {model: (np.arange(60) < share * 60).astype(float) for model, share in shares.items()}
    scores = {model: {"sort": values, "code": values} for model, values in answers.items()}
    rows = {row.name: row for row in compare_module.compare(records_of(scores), run_of(), resamples=200).rows}
    low = wilson_interval(60, 60)[0]
    mean = rows["ties"].mean
    assert mean is not None and mean.value == 1 == mean.high
    assert mean.low == pytest.approx(1 - np.hypot(1 - low, 1 - low) / 2)
    assert rows["base"].mean is not None and rows["base"].mean.high > 0.02
