"""What a run has scored: who is who, both splits, what follows, and one line for the list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merging.evaluation.run_file import Run
from tests.evaluation.evaluated import SHARES, by_task, records_of, run_of
from tests.ui.pages.history import ROLES, scores_in
from ui import scored as module
from ui.scored import Scored, Who, comparison, keep_who, overview, read_scored, suggested, summary, why_no_comparison

ALL = {**ROLES, "average": "average", "ties": "candidate"}
OWNERS = {"sort": "sorter", "code": "coder"}


def made(folder: Path, models: dict[str, str] = ALL, who: Who | None = None, **how: bool) -> Scored:
    scores_in(folder, models, **how)
    if who:
        keep_who(folder, who)
    found = read_scored(folder, "mine")
    assert found is not None
    return found


def test_a_run_without_records_has_no_scores(tmp_path: Path) -> None:
    assert read_scored(tmp_path) is None and summary(tmp_path) is None


def test_names_suggest_the_owners() -> None:
    roles = {"base": "base", "sort": "expert", "code-7b": "expert", "both sort": "candidate"}
    found = suggested(roles, ["sort", "sort.validation", "code", "other"])
    assert found == Who("base", {"sort": "sort", "sort.validation": "sort", "code": "code-7b"})


def test_two_experts_that_fit_are_no_suggestion() -> None:
    assert suggested({"sort a": "expert", "sort b": "expert"}, ["sort"]).owners == {}


def test_splits_are_kept_apart(tmp_path: Path) -> None:
    scored = made(tmp_path, validation=True)
    assert scored.splits == ["", "validation"]
    assert (scored.tasks(""), scored.tasks("validation")) == (["sort", "code"], ["sort.validation"])
    assert {len(table.items) for table in overview(scored, "validation").tables} == {60}


def test_what_the_user_says_about_the_models_is_kept(tmp_path: Path) -> None:
    before = made(tmp_path)
    assert before.who == Who("base", OWNERS)
    after = made(tmp_path, who=Who("average", {"sort": "ties"}))
    assert (after.who.base, after.roles["average"], after.roles["ties"]) == ("average", "base", "expert")
    assert after.roles["base"] == "candidate"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"base": "nobody", "owners": {}}', '{"base": "base", "owners": 3}'])
def test_a_damaged_file_of_roles_is_passed_over(tmp_path: Path, text: str) -> None:
    scores_in(tmp_path, ALL)
    (tmp_path / "who.json").write_text(text)
    found = read_scored(tmp_path)
    assert found is not None and found.who.base == "base"


def test_retention_is_that_of_a_comparison(tmp_path: Path) -> None:
    scored = made(tmp_path, who=Who("base", OWNERS))
    assert why_no_comparison(scored, "") == ""
    found = comparison(scored, "")
    shares = {name: {task: values.mean() for task, values in own.items()} for name, own in by_task(
        120, {task: {name: shares[name] for name in ALL} for task, shares in SHARES.items()}).items()}  # fmt: skip
    kept = [shares["ties"]["sort"] / shares["sorter"]["sort"], shares["ties"]["code"] / shares["coder"]["code"]]
    retention = found.row("ties").retention
    assert retention is not None and found.split == "test"
    assert (retention.mean.value, retention.least.value) == pytest.approx((sum(kept) / 2, min(kept)))
    short = summary(tmp_path, "ties")
    assert short is not None and (short.mean, short.least) == pytest.approx((sum(kept) / 2, min(kept)))
    assert short.worst == ("sort" if kept[0] < kept[1] else "code")


def test_the_best_merge_stands_for_a_run_of_several(tmp_path: Path) -> None:
    made(tmp_path, who=Who("base", OWNERS))
    found = summary(tmp_path)
    assert found is not None and (found.model, found.of) == ("ties", 2)


def test_validation_items_can_be_compared_too_and_say_so(tmp_path: Path) -> None:
    scored = made(tmp_path, who=Who("base", {**OWNERS, "sort.validation": "sorter"}), validation=True)
    assert comparison(scored, "validation").split == "validation"


@pytest.mark.parametrize(
    ("models", "who", "says"),
    [
        ({"sorter": "expert", "ties": "candidate"}, Who("", {"sort": "sorter"}), "which model it is"),
        (ALL, Who("base", {}), "which expert"),
        (ROLES, Who("base", OWNERS), "merged models"),
    ],
)
def test_what_is_missing_for_retention_is_said(tmp_path: Path, models: dict, who: Who, says: str) -> None:
    assert says in why_no_comparison(made(tmp_path, models, who), "")


def test_names_that_a_comparison_reserves_are_marked(tmp_path: Path) -> None:
    records = records_of({"a": {"sort": [0, 1]}, "b": {"sort": [1, 1]}, "c": {"sort": [1, 0]}})
    from merging.evaluation.records import ModelInfo, write_records

    infos = [ModelInfo("a", "tuned", "", "base"), ModelInfo("b", "s", "", "expert"), ModelInfo("c", "base", "")]
    write_records(tmp_path / "records.jsonl", records, infos)
    keep_who(tmp_path, Who("tuned", {"sort": "s"}))
    scored = read_scored(tmp_path)
    assert scored is not None
    run = module.run_of(scored, "")
    assert isinstance(run, Run) and list(run.candidates) == ["“base”"]


def test_a_run_with_baselines_of_its_own_says_who_is_who(tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    folder.mkdir()
    scores_in(folder, {**ALL, "tuned": "tuned"})
    entries = json.loads(run_of().as_json())
    for entry in [entries["base"], *entries["experts"].values(), entries["average"], entries["tuned"],
                  *entries["candidates"].values()]:  # fmt: skip
        entry["model"] = f"k-{entry['model']}"
    (folder / "run.json").write_text(json.dumps(entries))
    scored = read_scored(tmp_path)
    assert scored is not None and scored.folder == tmp_path and scored.run is not None
    assert scored.who == Who("base", {"sort": "expert sort", "code": "expert code"})
    assert {test.baseline for test in comparison(scored, "").tests} == {"average", "tuned"}
    assert summary(tmp_path) is not None
