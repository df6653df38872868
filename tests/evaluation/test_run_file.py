"""Run files: what they say comes back, and what is wrong with one is named."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from merging.errors import TaskError
from merging.evaluation import run_file
from merging.evaluation.compare import compare
from merging.evaluation.records import ModelInfo, RecordsFile, write_records
from merging.evaluation.run_file import join_runs, load_runs, parse_run, read_run, with_keys
from tests.evaluation.evaluated import SHARES, by_task, records_of, run_of

RECORDS = records_of(by_task(60, SHARES))


def write_run(folder: Path, run: Any = None, records: Any = RECORDS, models: tuple[ModelInfo, ...] = ()) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text((run or run_of()).as_json(), encoding="utf-8")
    write_records(folder / "records.jsonl", records, models)
    return folder


def test_a_run_file_comes_back_as_it_was(tmp_path: Path) -> None:
    run = run_of(parameters=5, metrics={"sort": "choice"}, tasks=["sort"], records=["a.jsonl", "b.parquet"])
    (tmp_path / "run.json").write_text(run.as_json())
    assert read_run(tmp_path) == (run, tmp_path)
    assert read_run(tmp_path / "run.json") == (run, tmp_path)
    assert run.owners == {"sort": "sort", "code": "code"}


def test_a_folder_is_compared(tmp_path: Path) -> None:
    loaded = load_runs([write_run(tmp_path / "run")])
    found = compare(loaded.records, loaded.run, selected_on=loaded.selected_on, resamples=200)
    assert len(found.rows) == 6 and found.tasks[0].items == 60


def test_models_may_be_given_by_name(tmp_path: Path) -> None:
    keyed = [replace(record, model=f"key of {record.model}") for record in RECORDS]
    infos = tuple(ModelInfo(f"key of {name}", name) for name in ("base", "sorter", "coder", "average", "tuned", "ties"))
    run = load_runs([write_run(tmp_path / "named", records=keyed, models=infos)]).run
    assert run.base.model == "key of base" and run.candidates["ties"].model == "key of ties"
    assert run.experts["sort"].model == "key of sorter" and run.tuned and run.tuned.setting == "weight 0.4"
    with pytest.raises(TaskError, match="has no records of this model"):
        load_runs([write_run(tmp_path / "unnamed", records=keyed)])
    with pytest.raises(TaskError, match="several models of this name"):
        load_runs([write_run(tmp_path / "twice", records=keyed, models=(*infos, ModelInfo("other", "base")))])


def test_validation_tasks_count_as_chosen_on(tmp_path: Path) -> None:
    held = [replace(record, task=f"{record.task}.validation", item=f"v {record.item}") for record in RECORDS]
    loaded = load_runs([write_run(tmp_path / "both", records=RECORDS + held)])
    assert len(loaded.records) == len(loaded.selected_on) == len(RECORDS)
    folder = write_run(tmp_path / "apart", run_of(selection={"split": "validation", "records": ["chosen.jsonl"]}))
    write_records(folder / "chosen.jsonl", held)
    assert load_runs([folder]).selected_on == loaded.selected_on
    write_records(folder / "chosen.jsonl", [*held, replace(RECORDS[0], task="sort.validation")])
    leaked = load_runs([folder])
    with pytest.raises(TaskError, match="was used to choose settings"):
        compare(leaked.records, leaked.run, selected_on=leaked.selected_on)


def test_runs_are_joined(tmp_path: Path) -> None:
    more = run_of(candidates={"dare": {"model": "tuned", "evaluations": 8}})
    loaded = load_runs([write_run(tmp_path / "one"), write_run(tmp_path / "two", more)])
    assert list(loaded.run.candidates) == ["ties", "dare"]
    found = compare(loaded.records, loaded.run, resamples=200)  # the base is in both files, and is one model
    assert [row.name for row in found.rows][-2:] == ["ties", "dare"] and found.tasks[0].items == 60


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"base": {"model": "sorter"}}, "different entries for base"),
        ({"tuned": {"model": "tuned", "evaluations": 9}}, "different entries for tuned"),
        ({"split": "dev"}, "different entries for split"),
        ({"candidates": {"ties": {"model": "average"}}}, "different models by 'ties'"),
        ({"experts": {"sort": {"model": "coder", "tasks": ["sort"]}}}, "different models by 'sort'"),
        ({"experts": {"other": {"model": "coder", "tasks": ["sort"]}}}, "two experts"),
    ],
)
def test_runs_that_contradict_each_other(other: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        join_runs([run_of(), run_of(**other)])
    assert caught.value.code == "E_RUN"


def test_a_run_may_leave_out_what_another_says() -> None:
    joined = join_runs([run_of(average=None, split=None, selection=None), run_of()])
    assert joined == run_of(records=["records.jsonl", "records.jsonl"])


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"amalgam_run": 2}, "amalgam_run"),
        ({"bases": {"model": "b"}}, "bases"),
        ({"base": None}, "base: Field required"),
        ({"base": {"model": ""}}, "base.model"),
        ({"base": {"model": 3}}, "base.model"),
        ({"base": {"model": "b", "weights": 1}}, "base.weights"),
        ({"experts": {}}, "experts"),
        ({"experts": {"a": {"model": "a", "tasks": "sort"}}}, "experts.a.tasks"),
        ({"tuned": {"model": "t", "evaluations": -1}}, "tuned.evaluations"),
        ({"tuned": {"model": "t", "setting": "a\nb"}}, "tuned.setting"),
        ({"candidates": {"tuned": {"model": "x"}}}, "another row"),
        ({"candidates": {"expert x": {"model": "x"}}}, "another row"),
        ({"candidates": {"a\x1b": {"model": "x"}}}, "printable"),
        ({"records": []}, "records"),
        ({"selection": {"records": []}}, "selection.split"),
    ],
)
def test_wrong_fields_are_named(change: dict[str, Any], place: str) -> None:
    data = {**run_of().model_dump(exclude_defaults=True), "amalgam_run": 1, **change}
    with pytest.raises(TaskError) as caught:
        parse_run({name: value for name, value in data.items() if value is not None}, "my run")
    assert caught.value.code == "E_RUN" and place in str(caught.value) and "my run" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"base": 1, "base": 2}', b"[" * 50_000, b" " * (2**20 + 1)]
)
def test_files_that_are_no_run_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(TaskError) as caught:
        read_run(tmp_path)
    assert caught.value.code == "E_RUN"


def test_files_that_are_not_there(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "pipe", tmp_path / "zero\0byte"):
        with pytest.raises(TaskError) as caught:
            read_run(path)
        assert caught.value.code == "E_RUN"
    (tmp_path / "run.json").write_text(run_of().as_json())
    with pytest.raises(TaskError) as caught:
        load_runs([tmp_path])
    assert caught.value.code == "E_RECORDS"


def test_the_documented_example_is_a_run_file() -> None:
    example = (run_file.__doc__ or "").split("\n\n")[2]
    without_remarks = [
        re.sub(r" {3,}[^ ].*", "", line.rstrip()[4:].replace("  ", "", 1)) for line in example.splitlines()
    ]
    assert parse_run(json.loads("\n".join(without_remarks))).experts["code"].tasks == ["python"]


def test_one_model_may_have_several_roles() -> None:
    """Its name is looked up for each of them."""
    records = records_of(by_task(5, SHARES))
    names = [ModelInfo(model, f"the {model}") for model in {record.model for record in records}]
    run = parse_run({"amalgam_run": 1, "base": {"model": "the base"}, "experts": {"sort": {"model": "the base"}}})
    found = with_keys(run, [RecordsFile(records, names)], "here")
    assert found.base.model == "base" == found.experts["sort"].model
