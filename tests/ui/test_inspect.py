"""``app.py inspect`` as people and scripts run it: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import app
from merging.analysis.finding import Finding
from merging.analysis.inspection_run import Step
from tests.small_checkpoints import family, llama_like, merge, recipe, save
from ui import inspect as module

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMALGAM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("cli")
    paths = family(folder, llama_like(3, 16), 3, config={"model_type": "llama"})
    merge(recipe("task_arithmetic", [(p, {"weight": 0.4}) for p in paths[1:]], paths[0]), folder / "merged")
    return [*map(str, paths), str(folder / "merged")]


def run(models: list[str], *options: str, merged: bool = True) -> int:
    base, *experts, one = models
    more = ["--merged", one] if merged else []
    return app.main(["inspect", "--base", base, *experts, *more, "--threads", "1", *options])


# -- what it prints -----------------------------------------------------------------------------------------------


def test_what_a_newcomer_sees(models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(models) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert said.err == "" and 30 < len(lines) <= 60
    order = [
        "3 experts and the merge", "Findings", "checks found nothing wrong", "Size of the changes (exact)", "The merge holds",
        "Cosine of the task vectors", "Signs, when each keeps its largest 20%", "Directions that the changes use",
        "strongest output directions coincide", "Next",
    ]  # fmt: skip
    places = [next((i for i, line in enumerate(lines) if text in line), -1) for text in order]
    assert -1 not in places and places == sorted(places)
    assert "✓ fine" in said.out and "i note" in said.out  # words, not colour alone
    assert "app.py compare" in lines[-2] and "at chance" in lines[-1]
    assert any(line.startswith("expert2") and line.rstrip()[-1] in module.BARS for line in lines)
    assert all(len(line) <= 140 for line in lines)


def test_a_second_look_says_the_same(models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(models) == 0
    first = capsys.readouterr().out
    assert run(models) == 0
    assert capsys.readouterr().out == first


def test_one_expert_and_no_merge(models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["inspect", "--base", models[0], models[1], "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 expert against" in out and "Cosine" not in out and "Signs" not in out and "merge holds" not in out


def test_many_experts_do_not_flood_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = family(tmp_path, llama_like(1, 8), 12)
    assert run([*map(str, paths), "-"], merged=False) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 72 and "and 4 more experts" in out and "and 60 more pairs" in out


def test_a_terminal_without_unicode(models: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "app.py", "inspect", "--base", *models[:3], "--threads", "1", "--spectra", "none"],
        cwd=ROOT, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 0
    out = done.stdout.decode("ascii")
    assert "+ fine" in out and "||tau||/||W0||" in out and "-> " in out and "✓" not in out


def test_names_with_markup_are_shown_as_they_are(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = save(tmp_path / "[red]x[bold]", {n: t * 1.1 for n, t in llama_like(1, 8).items()})
    base = save(tmp_path / "base", llama_like(1, 8))
    assert app.main(["inspect", "--base", str(base), str(evil), str(base), "--threads", "1"]) == 0
    assert "[red]x[bold]" in capsys.readouterr().out


def test_findings_are_cut_to_the_worst(capsys: pytest.CaptureFixture[str]) -> None:
    found = [Finding(f"c{i}", "warning", f"title {i}", "evidence " * 40, 1.0, "remedy " * 40) for i in range(9)]
    module.print_findings(module._Screen(), [Finding("p", "problem", "the worst", "e", None, "r"), *found])
    out = capsys.readouterr().out
    assert "✗ problem" in out and "! warning" in out and "and 3 more (see --json or --html)" in out
    assert all(len(line) <= 140 for line in out.splitlines())
    assert [line for line in out.splitlines() if line.lstrip().startswith("evidence")][1].startswith(" " * 12)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (0.4, "about 0 s left"), (59.0, "about 59 s left"), (61.0, "about 1:01 left")]
)
def test_time_left(seconds: float | None, text: str) -> None:
    assert module._left(Step("changes", 2, 6, 0.5, seconds)) == text


# -- what it writes -----------------------------------------------------------------------------------------------


def test_files(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, html_file = tmp_path / "out.json", tmp_path / "out.html"
    options = ["--parts", "doctor, changes", "--coefficients", "0.3,0.5,1"]
    assert run(models, "--json", str(json_file), "--html", str(html_file), *options) == 0
    data = json.loads(json_file.read_text("utf-8"))
    assert data["options"]["parts"] == ["doctor", "changes"] and data["options"]["coefficients"] == [0.3, 0.5, 1.0]
    assert data["names"] == ["expert1", "expert2", "expert3"] and data["spectra"] is None
    assert html_file.read_text("utf-8").startswith("<!doctype html>")
    out = capsys.readouterr().out
    assert f"Wrote {json_file} and" in out.replace("\n", " ").replace("  ", " ") and "--html report.html" not in out


def test_json_to_a_pipe(models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(models, "--json", "-", "--parts", "changes") == 0
    assert json.loads(capsys.readouterr().out)["format"] == 1


# -- how it fails -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "exit_code"),
    [
        (["--parts", "nothing"], "E_RECIPE_FIELD", 2),
        (["--coefficients", "1,2"], "E_RECIPE_FIELD", 2),
        (["--coefficients", "a,b,c"], "E_RECIPE_FIELD", 2),
        (["--also-base", "./nowhere"], "E_NOT_FOUND", 3),
        (["--json", "no/such/folder/x.json"], "E_OUTPUT_WRITE", 5),
        (["--html", "."], "E_OUTPUT_WRITE", 5),
        (["--texts", "no-such-file.jsonl"], "E_TEXT", 8),
    ],
)
def test_mistakes_are_explained(
    models: list[str], options: list[str], code: str, exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(models, *options) == exit_code
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and code in said.err and "Traceback" not in said.err


def test_places_are_checked_before_the_work(models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "inspect", lambda *_, **__: pytest.fail("worked in vain"))
    assert run(models, "--html", "no/such/folder/x.html") == 5


@pytest.mark.parametrize(
    "options", [["--density", "0"], ["--density", "1.5"], ["--density", "x"], ["--rank", "0"], ["--spectra", "svd"], []]
)
def test_command_lines_that_make_no_sense(
    models: list[str], options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["inspect", *(["--base", *models[:2], *options] if options else [models[1]])]
    with pytest.raises(SystemExit) as caught:
        app.main(arguments)
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping(tmp_path: Path, number: signal.Signals, expected: int) -> None:
    """It ends soon, says so, and goes on with what it had when it is started again."""
    state = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(1024, 1024) for i in range(24)}
    paths = family(tmp_path, state, 2)
    command = [sys.executable, "app.py", "inspect", "--base", *map(str, paths), "--threads", "1", "--json", "-"]
    environment = os.environ | {"AMALGAM_CACHE": str(tmp_path / "cache")}
    options: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*command, "--spectra", "exact"], text=True, **options)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "cache").glob("analysis/*.npz"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)  # doctor, changes, trimmed: now it is at the spectra
    asked = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == expected and "Stopped." in said and "Traceback" not in said
    assert time.monotonic() - asked < 20
    done = subprocess.run([*command, "--spectra", "none"], **options, timeout=120)
    assert done.returncode == 0
    assert {name for name, part in json.loads(done.stdout)["parts"].items() if part["cached"]} >= {"changes", "trimmed"}
