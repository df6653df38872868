"""The commands as people and scripts run them: real child processes, their exit codes, and what they say."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import app
from merging.checkpoints.output_rules import work_folder
from merging.recipe_yaml import to_yaml
from tests.small_checkpoints import family, llama_like, load, merge, recipe, same_bits

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}


def run(*arguments: Any, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    return subprocess.run(
        [sys.executable, str(ROOT / "app.py"), *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=120, env=ENVIRONMENT | environment)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a recipe beside them, and its result."""
    folder = tmp_path_factory.mktemp("cli")
    paths = family(folder, llama_like(3, 16, dtype=torch.bfloat16), 2)
    own = {"weight": 1.0, "density": 0.5}
    what = recipe("ties", [(p, own) for p in paths[1:]], paths[0])
    (folder / "recipe.yaml").write_text(to_yaml(what))
    merge(what, folder / "expected")
    return folder


def changed(folder: Path, tmp_path: Path, old: str, new: str) -> Path:
    text = (folder / "recipe.yaml").read_text()
    assert old in text
    (tmp_path / "recipe.yaml").write_text(text.replace(old, new))
    return tmp_path / "recipe.yaml"


# -- the whole way ------------------------------------------------------------------------------------


def test_plan_merge_and_verify(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = run("plan", folder / "recipe.yaml")
    assert (plan.returncode, plan.stderr) == (0, "")
    for text in ("ties", "expert1", "density=0.5", "Nothing stands in the way", "parameters", "MB with"):
        assert text in plan.stdout
    done = run("merge", folder / "recipe.yaml", tmp_path / "out", "--threads", 2)
    said = [line for line in done.stderr.splitlines() if "%" not in line]  # a slow machine hears of the progress
    assert (done.returncode, said) == (0, [])
    assert f"Wrote {tmp_path / 'out'}" in done.stdout and "verified" in done.stdout
    assert "Delta survival: " in done.stdout
    assert same_bits(load(tmp_path / "out"), load(folder / "expected"))
    assert app.main(["merge", str(folder / "recipe.yaml"), str(tmp_path / "out")]) == 5
    assert "E_OUTPUT_EXISTS" in (text := capsys.readouterr().err) and "nothing left to do" in text
    assert run("verify", tmp_path / "out").returncode == 0


def test_verify_finds_a_flipped_bit(folder: Path, tmp_path: Path) -> None:
    good = run("verify", folder / "expected", "--json")
    assert good.returncode == 0 and json.loads(good.stdout)["ok"] is True
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (folder / "expected").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[-3] ^= 16
    (copy / "model.safetensors").write_bytes(raw)
    bad = run("verify", copy)
    assert bad.returncode == 6 and "E_VERIFY" in bad.stderr and "model.safetensors" in bad.stderr
    report = run("verify", copy, "--json")
    (problem,) = json.loads(report.stdout)["problems"]
    assert report.returncode == 6 and problem["kind"] == "changed" and len(problem["tensors"]) == 1
    (copy / "model.safetensors").unlink()
    assert run("verify", copy).returncode == 6
    (copy / "manifest.json").unlink()
    assert "E_MANIFEST" in run("verify", copy).stderr


def test_quiet_says_nothing_and_the_seed_can_be_given(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(changed(folder, tmp_path, "method: ties", "method: dare_linear"))
    options = ["--quiet", "--seed", "7", "--memory", "2GB", "--device", "cpu"]
    assert app.main(["merge", path, str(tmp_path / "out"), *options]) == 0
    assert capsys.readouterr() == ("", "")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["seed"] == 7


def test_a_recipe_of_mergekit_runs_as_it_is(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(f"""
merge_method: linear
models:
  - model: {folder / "expert1"}
    parameters: {{weight: 0.5}}
  - model: {folder / "expert2"}
    parameters: {{weight: 0.5}}
dtype: float32
""")
    assert app.main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "--shard-size", "1MB"]) == 0
    assert "dtype: float32 is taken as the output's type" in capsys.readouterr().out
    found, one, two = (load(p) for p in (tmp_path / "out", folder / "expert1", folder / "expert2"))
    assert all(torch.equal(t, ((one[n].double() + two[n].double()) / 2).float()) for n, t in found.items())


PLAN_KEYS = {
    "method", "models", "tensors", "parameters", "dtypes", "files", "bytes_read", "bytes_written", "disk_free",
    "memory", "seconds", "threads", "coefficients", "notes", "warnings", "blockers", "hash",
}  # fmt: skip


def test_the_plan_as_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = run("plan", folder / "recipe.yaml", "--json", "--threads", 3, "--out", tmp_path / "out")
    facts = json.loads(good.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert good.returncode == 0 and good.stderr == "" and facts.keys() >= PLAN_KEYS
    assert facts["blockers"] == [] and facts["threads"] == 3 and facts["disk_free"] > 0
    (group,) = facts["coefficients"]
    assert group["experts"] == [{"density": 0.5, "weight": 1.0}] * 2 and group["tensors"] == sum(
        facts["tensors"].values()
    )
    paths = family(tmp_path / "wide", llama_like(3, 24), 1)
    path = changed(folder, tmp_path, str(folder / "expert2"), str(paths[1]))
    bad = run("plan", path, "--json")
    facts = json.loads(bad.stdout)
    assert bad.returncode == 3 and [b["code"] for b in facts["blockers"]] == ["E_SHAPE"]
    assert facts["blockers"][0].keys() == {"code", "what", "why", "fix"}
    capsys.readouterr()
    assert app.main(["plan", str(path)]) == 3
    assert "blocked: Shapes differ" in (text := capsys.readouterr().out) and "E_SHAPE" in text
    assert app.main(["merge", str(path), str(tmp_path / "out")]) == 3
    assert "E_SHAPE" in capsys.readouterr().err and not (tmp_path / "out").exists()


# -- wrong input --------------------------------------------------------------------------------------


def in_process(capsys: pytest.CaptureFixture[str], *arguments: Any) -> subprocess.CompletedProcess[str]:
    """The same without the second that a new process takes."""
    code = app.main(list(map(str, arguments)))
    return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())


def is_helpful(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.startswith("error: ")
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize(
    ("old", "new", "code", "words"),
    [
        ("density", "denisty", 2, ["E_RECIPE_FIELD", 'Did you mean "density"?', "line "]),
        ("method: ties", "method: tise", 2, ["E_RECIPE_METHOD", "Did you mean ties"]),
        ("method: ties", "methods: ties", 2, ["E_RECIPE_FIELD", 'Did you mean "method"?']),
        ("0.5", "1.5", 2, ["E_RECIPE_FIELD", "density"]),
        ("weight: 1.0", "weight: 1e39", 2, ["E_RECIPE_FIELD", "too large"]),
        ("expert2", "expert3", 3, ["E_NOT_FOUND", "expert3"]),
        ("expert2", "recipe.yaml", 3, ["E_HEADER", "recipe.yaml"]),
        ("base: ", "base: [", 2, ["E_RECIPE_READ", "line"]),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_wrong_recipe(
    folder: Path,
    tmp_path: Path,
    old: str,
    new: str,
    code: int,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    is_helpful(in_process(capsys, "plan", changed(folder, tmp_path, old, new)), code, *words)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["plan", "absent.yaml"], 2, ["E_RECIPE_READ", "absent.yaml"]),
        (["verify", "{out}"], 3, ["E_NOT_FOUND"]),
        (["plan", "{recipe}", "--shard-size", "3kB"], 5, ["shard size", "1MB"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_command(folder: Path, tmp_path: Path, arguments: list[str], code: int, words: list[str]) -> None:
    places = {"folder": folder, "recipe": folder / "recipe.yaml", "out": tmp_path / "out"}
    is_helpful(run(*[a.format(**places) for a in arguments]), code, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["{folder}/base"], ["E_OUTPUT_EXISTS", "base"]),
        (["{out}", "--memory", "20MB"], ["E_MEMORY", "20 MB", "--memory"]),
        (["{out}", "--device", "abacus"], ["E_DEVICE", "abacus", "cpu"]),
        (["{out}", "--shard-size", "3kB"], ["E_OUTPUT_NAME", "shard size"]),
        (["{folder}/recipe.yaml/out"], ["E_OUTPUT"]),
        ([".."], ["E_OUTPUT_NAME"]),
    ],
    ids=str,
)
def test_an_output_that_cannot_be_made(
    folder: Path, tmp_path: Path, options: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [option.format(folder=folder, out=tmp_path / "out") for option in options]
    is_helpful(in_process(capsys, "merge", folder / "recipe.yaml", *filled), 5, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_seed_and_a_recipe_that_are_none(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong_seed = in_process(capsys, "merge", folder / "recipe.yaml", tmp_path / "out", "--seed", "-1")
    is_helpful(wrong_seed, 2, "E_RECIPE_FIELD", "seed")
    is_helpful(in_process(capsys, "merge", folder, tmp_path / "out"), 2, "E_RECIPE_READ", "not a file")


@pytest.mark.parametrize(
    "arguments",
    [
        ["mrege", "r.yaml"],
        ["merge", "r.yaml"],
        ["merge", "r.yaml", "out", "--threads", "0"],
        ["merge", "r.yaml", "out", "--threads", "²"],
        ["merge", "r.yaml", "out", "--memory", "much"],
        ["merge", "r.yaml", "out", "--memory", "-1GB"],
        ["merge", "r.yaml", "out", "--memory", "9" * 400],
        ["plan", "r.yaml", "--shard-size", "1e9GB"],
        ["merge", "r.yaml", "out", "--seed", "x"],
        ["plan", "r.yaml", "--jsn"],
    ],
    ids=str,
)
def test_a_command_line_that_makes_no_sense(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app.main(arguments)
    assert ended.value.code == 2 and "usage: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[("800", 800), ("1kB", 1000), ("1KB", 1000), ("1k", 1000), ("1KiB", 1024), ("400MB", 400_000_000)],
        *[("5GB", 5_000_000_000), ("2GiB", 2 << 30), ("1.5 GB", 1_500_000_000), ("1T", 10**12), ("0.5MB", 500_000)],
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert app.size(text) == expected


def test_help() -> None:
    """(Without a command the workbench opens: tests/ui/test_launch.py.)"""
    result = run("--help")
    assert result.returncode == 0 and "merge" in result.stdout and "Exit codes" in result.stdout


# -- signals, pipes and terminals ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge that takes a while on one thread: twelve million parameters."""
    folder = tmp_path_factory.mktemp("large")
    state = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(500, 1000).bfloat16() for i in range(24)}
    paths = family(folder, state, 2)
    (folder / "recipe.yaml").write_text(to_yaml(recipe("pcb", paths[1:], paths[0])))
    return folder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_work_and_the_same_command_goes_on(
    large: Path, tmp_path: Path, number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["merge", str(large / "recipe.yaml"), str(tmp_path / "out"), "--threads", "1"]
    child = subprocess.Popen(
        [sys.executable, "app.py", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    journal = work_folder(tmp_path / "out") / "journal"
    while child.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        time.sleep(0.005)
    child.send_signal(number)
    sent = time.monotonic()
    _, err = child.communicate(timeout=60)
    assert time.monotonic() - sent < 5
    assert child.returncode == code, err
    assert "Run the same command again" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists() and journal.exists()
    if number == signal.SIGTERM:
        assert app.main(arguments) == 0
        assert re.search(r"Resumed: [1-9]\d* of 24 tensors", capsys.readouterr().out) and not journal.exists()


def test_a_reader_that_goes_away_does_not_stop_the_work(folder: Path, tmp_path: Path) -> None:
    """As in ``app.py merge … | head -1``."""
    read, write = os.pipe()
    os.close(read)
    for arguments in (["merge", folder / "recipe.yaml", tmp_path / "out"], ["plan", folder / "recipe.yaml"]):
        command = [sys.executable, "app.py", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=write, env=ENVIRONMENT)
        assert done.returncode == 0, arguments
    os.close(write)
    assert same_bits(load(tmp_path / "out"), load(folder / "expected"))


def on_a_terminal(arguments: Sequence[str], cwd: Path, **environment: str) -> tuple[int, str]:
    """What a command shows on a real terminal."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "app.py"), *arguments], cwd=cwd, stdin=child, stdout=child, stderr=child,
        env=os.environ | {"COLUMNS": "100", "TERM": "xterm"} | environment)  # fmt: skip
    os.close(child)
    seen = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(parent)
    return process.wait(), seen.decode()


def test_a_terminal_gets_a_progress_bar_with_rate_and_time(folder: Path, tmp_path: Path) -> None:
    """Also one that knows ASCII only, in a folder whose name is no text at all."""
    strange = tmp_path / os.fsdecode(b"caf\xe9 \xf0\x9f\x8c\x8d")
    strange.mkdir()
    arguments = ["merge", str(folder / "recipe.yaml"), "out"]
    code, text = on_a_terminal(arguments, strange, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert code == 0 and "Wrote " in text and "caf\\udce9" in text, text
    assert re.search(r"[1-9]\d*%", text) and re.search(r"\d MB/s", text) and re.search(r"\d:\d\d:\d\d", text)
    expected = folder / "expected" / "model.safetensors"
    assert (strange / "out" / "model.safetensors").read_bytes() == expected.read_bytes()


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    from merging.engine import Progress
    from ui.terminal import _Lines

    progress = Progress(200, 50, 3_000_000, started=time.monotonic() - 2)
    often, seldom = _Lines(every=0), _Lines(every=3600)
    often.show(progress)
    seldom.show(progress)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r" *25% +[12] MB/s +6 s left", line), line


def test_a_python_without_the_packages_is_told_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "app.py"), "plan", "x.yml"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "lacks the package" in done.stderr and ("make run" in done.stderr or "Use " in done.stderr)
