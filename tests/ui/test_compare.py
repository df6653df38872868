"""``python app.py compare``: its three ways in, and what it says to wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app import main
from merging.evaluation.records import ModelInfo, write_records
from tests.evaluation.evaluated import SHARES, by_task, records_of, run_of

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo"
RECORDS = records_of(by_task(60, SHARES))
NAMES = [ModelInfo(key, f"the {key}") for key in ("base", "sorter", "coder", "average", "tuned", "ties")]
ROLES = ["--base", "the base", "--expert", "sort=the sorter", "--expert", "code=coder:code",
         "--average", "the average", "--tuned", "tuned", "--candidate", "ties=the ties"]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(run_of().as_json())
    write_records(folder / "records.jsonl", RECORDS, NAMES)
    return folder


def test_a_run_is_printed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(run), "--json", str(tmp_path / "out.json")]) == 0
    text = capsys.readouterr().out
    assert "scores on the split test" in text and max(map(len, text.splitlines())) <= 120
    data = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in data["rows"]] == ["base", "expert sort", "expert code", "average", "tuned", "ties"]


def test_records_are_printed_with_roles_from_the_options(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(run), "--json", "-"]) == 0
    from_run = json.loads(capsys.readouterr().out)
    assert main(["compare", str(run / "records.jsonl"), *ROLES, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["tasks"] for row in found["rows"]] == [row["tasks"] for row in from_run["rows"]]
    assert [row["evaluations"] for row in found["rows"]][3:] == [0, None, None]
    assert any("not said how many evaluations" in note["text"] for note in found["notes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing to compare"),
        (["{run}", "--base", "x"], "--base does not go with a run"),
        (["{run}", "{run}/records.jsonl"], "cannot be mixed"),
        (["{run}/records.jsonl"], "--base is missing"),
        (["{run}/records.jsonl", "--base", "the base"], "--expert is missing"),
        (["{run}/records.jsonl", *ROLES, "--tune", "ties"], "--tune does not go with files of records"),
        (["{run}/records.jsonl", *ROLES, "--selection-tasks", "x"], "--selection-tasks does not go"),
        (["{run}/records.jsonl", "--base", "nobody", "--expert", "sort=sorter"], "no records of this model"),
        (["{run}/records.jsonl", "--base", "base", "--expert", "sorter"], "not of the form NAME=MODEL"),
        (["{run}/records.jsonl", *ROLES, "--expert", "sort=coder"], "Two models are called 'sort'"),
        (["{run}/nothing"], "cannot be read"),
        (["--base", "{demo}/base"], "--expert is missing"),
        (["--base", "b", "--expert", "a=b", "--tasks", "t", "--out", "o", "--tuned", "x"], "is for files of records"),
        (["--base", "b", "--expert", "a=b", "--tasks", "{demo}/tasks/sort.jsonl", "--out", "{run}/new"], "no validation split"),
        (["--base", "b", "--expert", "a=b", "--tasks", "{demo}/tasks", "--out", "{run}/new", "--tune", "ties:density=x"], "are not numbers"),
    ],
)  # fmt: skip
def test_wrong_ways_are_explained(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["compare", *(one.format(run=run, demo=DEMO) for one in arguments)]) == 8
    assert message in capsys.readouterr().err
    assert not (run / "new").exists()


def test_a_finished_run_is_not_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--base", str(DEMO / "base"), "--expert", f"sort={DEMO}/experts/sort", "--tasks", str(DEMO / "tasks")]
    assert main(["compare", *arguments, "--out", str(run)]) == 5
    assert "holds a finished run" in capsys.readouterr().err


def test_a_method_that_does_not_exist(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--base", str(DEMO / "base"), "--expert", f"sort={DEMO}/experts/sort", "--tasks", str(DEMO / "tasks")]
    assert main(["compare", *arguments, "--out", str(run / "new"), "--tune", "tees"]) == 2
    assert "ties" in capsys.readouterr().err and not (run / "new").exists()


def test_one_item_in_both_splits_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "run.json").write_text(run_of(selection={"split": "validation", "records": ["records.jsonl"]}).as_json())
    assert main(["compare", str(run)]) == 8
    assert "E_SELECTION" in capsys.readouterr().err


def test_results_of_the_harness_are_records_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Names are those that lm_eval was given; its notes stand below the table."""
    folder = Path(__file__).resolve().parents[1] / "data" / "lm_eval"
    roles = ["--base", "assets/demo/base", "--expert", "sort=assets/demo/experts/sort:demo_exact"]
    assert main(["compare", str(folder / "base"), str(folder / "sort"), *roles, "--json", "-"]) == 0
    apart = json.loads(capsys.readouterr().out)
    assert main(["compare", str(folder), *roles, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == apart
    shares = {row["name"]: row["tasks"]["demo_exact"]["correct"] for row in apart["rows"]}
    assert shares == {"base": 4, "expert sort": 6}
    assert any("Response lengths" in note["text"] for note in apart["notes"])
    assert main(["compare", str(folder / "base"), "--base", "nobody", "--expert", "a=b"]) == 8
    assert "Its models: assets/demo/base" in capsys.readouterr().err
