"""``app.py evaluate`` as people run it: what it prints and writes, its exit codes, and signals."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import app
from merging.evaluation.models import load_model
from merging.evaluation.records import read_records_file
from merging.evaluation.scoring import Settings, make_scorer, score_batch
from merging.evaluation.statistics import wilson_interval
from merging.evaluation.store import Results
from merging.evaluation.tasks import read_tasks
from merging.user_folders import cache_folder

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "assets" / "demo"
SORT, BASE = DEMO / "experts" / "sort", DEMO / "base"
SIZES = {"letters": 60, "few": 12, "words": 5}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    lines = (DEMO / "tasks" / "sort.jsonl").read_text().splitlines()
    (folder / "letters.jsonl").write_text("\n".join(lines[: SIZES["letters"]]))
    (folder / "few.jsonl").write_text("\n".join(lines[100 : 100 + SIZES["few"]]))
    texts = [{"text": json.loads(line)["prompt"]} for line in lines[: SIZES["words"]]]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return folder


@pytest.fixture(scope="module")
def cache(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of base and expert, as an earlier evaluation has left them: with them no child process is needed."""
    folder = tmp_path_factory.mktemp("cache")
    settings = Settings(window=64, overlap=32)
    for path in (BASE, SORT):
        model = load_model(path)
        for task in read_tasks(tasks):
            records = score_batch(model, make_scorer(model, task, settings), task, task.items)
            Results(folder / "evaluation", model.key, task, settings).add(records)
    return folder


@pytest.fixture(autouse=True)
def _cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMALGAM_CACHE", str(cache))
    assert cache_folder("evaluation") == cache / "evaluation"


def run(*arguments: Any) -> int:
    return app.main(["evaluate", *map(str, arguments)])


def test_table_json_and_records(tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, facts = tmp_path / "run.jsonl", tmp_path / "run.json"
    assert run(SORT, "--baseline", f"before={BASE}", "--tasks", tasks, "--out", out, "--json", facts) == 0
    said, err = capsys.readouterr()
    assert err == ""
    assert "0 items scored" in said and f"{2 * sum(SIZES.values())} more were known" in said
    found = read_records_file(out)
    assert [(m.name, m.role) for m in found.models] == [("before", "baseline"), ("sort", "candidate")]
    assert len(found.records) == 2 * (60 + 12 + 2 * 5)
    data = json.loads(facts.read_text(), parse_constant=pytest.fail)
    rows = {(row["task"], row["metric"], row["model"]): row for row in data["results"]}
    assert len(rows) == 2 * 4 and data["failures"] == []
    for (task, metric, model), row in rows.items():
        key = next(info.key for info in found.models if info.name == model)
        scores = [r.score for r in found.records if (r.task, r.metric, r.model) == (task, metric, key)]
        assert row["score"] == pytest.approx(sum(scores) / len(scores)) and row["items"] == len(scores) == SIZES[task]
        if metric == "exact_match":
            assert (row["low"], row["high"]) == wilson_interval(sum(score == 1 for score in scores), len(scores))
            assert row["length"] == pytest.approx(8, abs=0.3)
    letters = rows["letters", "exact_match", "sort"]
    line = next(line for line in said.splitlines() if "letters" in line)  # the first of the group: before
    assert f"{rows['letters', 'exact_match', 'before']['score']:.3f}" in line and "60" in line
    assert f"{letters['score']:.3f}" in said and f"{letters['low']:.2f}–{letters['high']:.2f}" in said
    few = rows["few", "exact_match", "sort"]
    assert f"{few['right']} of 12" in said and f"{few['score']:.3f}" not in said
    assert re.search(r"Mini-scale: fewer than 50 items in few, words\.", said)
    assert "bits per byte (less is better)" in said


def test_parquet_limit_and_json_to_the_screen(tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.parquet"
    assert run(SORT, "--tasks", tasks / "letters.jsonl", "--limit", 3, "--out", out, "--json", "-") == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["items"] for row in data["results"]] == [3] and len(read_records_file(out).records) == 3
    assert "Only the first 3 items of letters were used." in data["notes"]


def test_the_same_model_twice_is_said(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(SORT, "--baseline", f"twin={SORT}", "--tasks", tasks / "letters.jsonl") == 0
    assert "twin and sort are the same model, byte for byte." in capsys.readouterr().out


def test_what_can_be_scored_is_shown_when_something_fails(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "run.jsonl"
    assert run(SORT, tmp_path / "empty", "--tasks", tasks / "letters.jsonl", "--out", out) == 3
    said, err = capsys.readouterr()
    assert "letters" in said and "E_NOT_A_MODEL" in err and "Traceback" not in err
    assert len(read_records_file(out).records) == 60


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([SORT, "--tasks", "{absent}"], 8, ["E_TASK", "no task file"]),
        ([SORT, "--tasks", "{empty}"], 8, ["E_TASK", "holds no tasks"]),
        ([SORT, "--tasks", "{bad}"], 8, ["E_TASK", "bad.jsonl, line 2"]),
        ([SORT, "--tasks", "{tasks}", "--out", "{absent}.csv"], 8, ["E_RECORDS", ".parquet"]),
        ([SORT, "--tasks", "{tasks}", "--baseline", "base"], 8, ["NAME=PATH"]),
        ([SORT, "--tasks", "{tasks}", "--baseline", f"sort={BASE}"], 8, ["both", "sort"]),
        ([SORT, "--tasks", "{tasks}", "{tasks}"], 8, ["both called"]),
        (["{absent}/model", "--tasks", "{tasks}"], 3, ["E_NOT_FOUND"]),
        ([ROOT / "assets" / "tiny_vit" / "base", "--tasks", "{tasks}"], 8, ["None of the models can do"]),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_wrong_input(
    tasks: Path, tmp_path: Path, arguments: list, code: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "b"}\n')
    places = {"absent": tmp_path / "absent", "empty": tmp_path / "empty", "bad": tmp_path / "bad.jsonl", "tasks": tasks}
    assert run(*(str(one).format(**places) for one in arguments)) == code
    said, err = capsys.readouterr()
    assert err.startswith("error: ") and "Traceback" not in err and said == ""
    assert all(word in err or word == "both" for word in words), err


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_a_task_of_the_harness_asks_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.yaml").write_text("task: own\ndataset_path: json\noutput_type: multiple_choice\n")
    assert run(SORT, "--tasks", tmp_path) == 8
    assert "pip install lm_eval" in capsys.readouterr().err


def children(process: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_its_child(tmp_path: Path, number: signal.Signals, code: int) -> None:
    command = [sys.executable, "app.py", "evaluate", str(BASE), "--tasks", str(DEMO / "tasks" / "sort.jsonl")]
    environment = os.environ | {"AMALGAM_CACHE": str(tmp_path)}
    parent = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 60
    while len(started := children(parent.pid)) < 2 and time.monotonic() < limit:  # the worker, and Python's own helper
        time.sleep(0.02)
    assert len(started) == 2
    time.sleep(0.3)
    parent.send_signal(number)
    sent = time.monotonic()
    out, err = parent.communicate(timeout=30)
    assert parent.returncode == code and time.monotonic() - sent < 5, err
    assert "E_CANCELLED" in err and "Traceback" not in err and out == ""
    while any(map(alive, started)) and time.monotonic() < sent + 5:
        time.sleep(0.02)
    assert not any(map(alive, started))


@pytest.mark.parametrize(
    ("option", "place", "why"),
    [("--out", "no/such/x.jsonl", "There is no folder no/such"), ("--json", ".", "It is a folder")],
)
def test_places_are_checked_before_the_work(
    tasks: Path, option: str, place: str, why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merging.evaluation.runner.evaluate", lambda *_, **__: pytest.fail("worked in vain"))
    assert run(SORT, "--tasks", tasks, option, place) == 5
    assert why in capsys.readouterr().err


def test_one_model_twice_and_no_tasks(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(SORT, SORT, "--tasks", tasks) == 8 and "named more than once" in capsys.readouterr().err
    assert run(SORT, "--tasks", "") == 8 and "path of the tasks is empty" in capsys.readouterr().err
