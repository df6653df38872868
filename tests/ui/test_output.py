"""The talking may end; the work and its exit code do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from merging.checkpoints.verify import verify
from tests.small_checkpoints import family, llama_like
from ui.output import Output

ROOT = Path(__file__).resolve().parents[2]


class Full:
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")

    flush = None

    def fileno(self) -> int:
        raise ValueError


def test_the_first_error_is_kept_and_nothing_is_raised() -> None:
    out = Output(Full())  # type: ignore[arg-type]
    assert out.write("abc") == 3 and out.error is not None and out.error.errno == 28


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_log_file_does_not_stop_a_merge(tmp_path: Path) -> None:
    base, *experts = family(tmp_path, llama_like(1), 2)
    recipe = tmp_path / "recipe.yml"
    models = ", ".join(f"{{model: {path}}}" for path in experts)
    recipe.write_text(f"base: {base}\nexperts: [{models}]\nmethod: linear\nparameters: {{weight: 0.5}}\n")
    command = [sys.executable, "app.py", "merge", str(recipe), str(tmp_path / "out")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5 and "E_OUTPUT_WRITE" in done.stderr and "Traceback" not in done.stderr
    assert verify(tmp_path / "out").ok


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "app.py", "errors"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
