"""Records survive a file unchanged, in both formats, and what is not a record is refused with its line."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from merging.errors import TaskError
from merging.evaluation.records import (
    METRICS,
    ModelInfo,
    Record,
    TaskInfo,
    read_records,
    read_records_file,
    write_records,
)

GOOD = Record("m1", "sort", "i1", "exact_match", 1.0, "p1", 8, 0.01, "abc", "document 1", 3, 2)
MODELS = [ModelInfo("m1", "ties", "/models/ties", "candidate")]
TASKS = [TaskInfo("sort", "0" * 64, "exact_match", 400, "test")]


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_what_was_written_is_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"run.{ending}"
    records = [
        GOOD,
        replace(GOOD, item="i2", score=0.0, answer="ü\n\u2028\0"),
        replace(GOOD, metric="nll_per_byte", score=2.5),
    ]
    for _ in range(2):  # the second time it is replaced
        write_records(path, records, MODELS, TASKS)
    found = read_records_file(path)
    assert (found.records, found.models, found.tasks) == (records, MODELS, TASKS)
    assert read_records(path) == records
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_lines_without_a_header_and_without_optional_fields_are_records(tmp_path: Path) -> None:
    row = {name: value for name, value in asdict(GOOD).items() if name not in ("cluster", "seed", "shots")}
    assert read_records(lines(tmp_path / "a.jsonl", row)) == [replace(GOOD, cluster="", seed=0, shots=0)]


def test_a_parquet_file_from_elsewhere_is_read(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([asdict(GOOD)]), tmp_path / "a.parquet")
    assert read_records(tmp_path / "a.parquet") == [GOOD]


CHANGES = [
    ({"score": "1"}, "'score' is not a number"),
    ({"score": True}, "'score' is not a number"),
    ({"score": 1.5}, "not in [0, 1]"),
    ({"score": None}, "'score' is not a number"),
    ({"metric": "f1"}, "metric 'f1' is unknown"),
    ({"metric": ""}, "'metric' is empty"),
    ({"model": 4}, "'model' is not a text"),
    ({"item": ""}, "'item' is empty"),
    ({"length": 1.5}, "'length' is not a number"),
    ({"length": -1}, "'length' is negative"),
    ({"seconds": -0.1}, "'seconds' is negative"),
    ({"colour": "red"}, "'colour' is unknown"),
    ({"seed": -1}, "'seed' is negative"),
]


@pytest.mark.parametrize(("change", "says"), CHANGES, ids=lambda value: str(value)[:30])
def test_a_wrong_field_names_file_and_line(tmp_path: Path, change: dict, says: str) -> None:
    path = lines(tmp_path / "run.jsonl", asdict(GOOD), asdict(replace(GOOD, item="i2")) | change)
    with pytest.raises(TaskError) as caught:
        read_records(path)
    assert caught.value.code == "E_RECORDS"
    assert f"{path}, line 2" in caught.value.what and says in caught.value.what


@pytest.mark.parametrize("field", [name for name in asdict(GOOD) if name not in ("cluster", "seed", "shots")])
def test_a_missing_field(tmp_path: Path, field: str) -> None:
    row = asdict(GOOD)
    del row[field]
    with pytest.raises(TaskError, match=f"line 1: the field '{field}' is missing"):
        read_records(lines(tmp_path / "a.jsonl", row))


OTHERS = [
    ("", "blank"),
    ("{", "JSON"),
    ("[]", "object"),
    (json.dumps(asdict(GOOD)).replace("1.0", "NaN"), "NaN"),
    (json.dumps(asdict(GOOD)).replace("1.0", "1e999"), "not a finite number"),
    (json.dumps(asdict(GOOD)).replace("1.0", "9" * 400), "not a finite number"),
    (json.dumps(asdict(GOOD)).replace("abc", "\\ud800"), "surrogate"),
    (json.dumps(asdict(GOOD))[:-1] + ', "item": "x"}', "twice"),
    (json.dumps(asdict(GOOD)), "were there before, on line 1"),
    (json.dumps(asdict(replace(GOOD, model="m2", prompt="p2"))), "shown differently than on line 1"),
    (json.dumps({"amalgam_records": 1, "models": [], "tasks": []}), "'amalgam_records' is unknown"),
]


@pytest.mark.parametrize(("line", "says"), OTHERS, ids=[says for _, says in OTHERS])
def test_a_wrong_line(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(TaskError) as caught:
        read_records(lines(tmp_path / "run.jsonl", asdict(GOOD), line))
    assert "line 2" in caught.value.what and says in caught.value.what


@pytest.mark.parametrize(
    "header",
    [
        {"amalgam_records": 2, "models": [], "tasks": []},
        {"amalgam_records": 1, "models": []},
        {"amalgam_records": 1, "models": {}, "tasks": []},
        {"amalgam_records": 1, "models": [{"key": "a"}], "tasks": []},
        {"amalgam_records": 1, "models": [{"key": "a", "name": 3}], "tasks": []},
        {"amalgam_records": 1, "models": [], "tasks": [{"name": "a", "sise": 3}]},
    ],
    ids=str,
)
def test_a_wrong_header(tmp_path: Path, header: dict) -> None:
    with pytest.raises(TaskError, match="line 1"):
        read_records(lines(tmp_path / "run.jsonl", header, asdict(GOOD)))


def test_files_that_hold_no_records(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "wrong.parquet").write_bytes(b"PAR1 no PAR1")
    lines(tmp_path / "header.jsonl", {"amalgam_records": 1, "models": [], "tasks": []})
    for name in ("empty.jsonl", "wrong.parquet", "header.jsonl", "absent.jsonl", "run.csv"):
        with pytest.raises(TaskError) as caught:
            read_records(tmp_path / name)
        assert caught.value.code == "E_RECORDS" and name in caught.value.what


def test_parquet_names_the_row(tmp_path: Path) -> None:
    rows = [asdict(GOOD), asdict(replace(GOOD, item="i2", score=math.nan))]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(TaskError, match="row 2: the field 'score' is not a finite number"):
        read_records(tmp_path / "a.parquet")


def test_records_that_could_not_be_read_back_are_not_written(tmp_path: Path) -> None:
    for bad in (replace(GOOD, score=math.nan), GOOD, replace(GOOD, model="m2", prompt="p2"), replace(GOOD, metric="x")):
        with pytest.raises(TaskError, match="record 2"):
            write_records(tmp_path / "a.jsonl", [GOOD, bad])
    assert list(tmp_path.iterdir()) == []


TEXT = some.text(min_size=1, max_size=8).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))
RECORDS = some.builds(
    Record, TEXT, TEXT, TEXT, some.sampled_from(sorted(METRICS)), some.floats(0, 1), some.just("p"),
    some.integers(0, 2**40), some.floats(0, 1e9), some.just("") | TEXT, some.just("") | TEXT, some.integers(0, 9), some.integers(0, 9),
)  # fmt: skip


@settings(max_examples=30)
@given(some.lists(RECORDS, min_size=1, max_size=5, unique_by=lambda r: (r.model, r.task, r.item, r.metric, r.seed, r.shots)),
       some.sampled_from(["jsonl", "parquet"]))  # fmt: skip
def test_any_records_survive(tmp_path_factory: pytest.TempPathFactory, records: list[Record], ending: str) -> None:
    path = tmp_path_factory.mktemp("records") / f"a.{ending}"
    write_records(path, records)
    assert read_records(path) == records
