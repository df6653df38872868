"""Every file of the hostile corpus ends in its error or is read right; quickly, and in little memory.

The corpus runs in a child process whose address space is limited: a case that would allocate what a header
claims dies there with MemoryError instead of taking the machine along.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import hostile_folders
from tests.checkpoints.hostile import CASES

ROOT = Path(__file__).resolve().parents[2]
SLOWEST = 1.0  # seconds of processor time for one case
MOST_MEMORY = 64 + 4 * 33  # MB above the start: 64 and four times the largest header

CHILD = """
import json, resource, sys, time
from pathlib import Path
from merging.checkpoints.checkpoint import open_checkpoint
import merging.checkpoints.adapter
from merging.errors import AmalgamError
from tests.checkpoints import hostile_folders
from tests.checkpoints.hostile import CASES

def resident(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1]) / 1024

limit = 4 << 30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
root, before = Path(sys.argv[1]), resident("VmRSS")
for number, (name, case) in enumerate(CASES.items()):
    folder = root / str(number) / "model"
    folder.mkdir(parents=True)
    path = case.make(folder)
    result = {"name": name, "code": None, "text": "", "fix": "", "tensors": 0}
    try:
        open("/proc/self/clear_refs", "w").write("5")  # start the peak of the resident memory again
    except OSError:
        pass
    started = time.process_time()
    try:
        with open_checkpoint(path) as model:
            result["tensors"] = len(model.tensors)
            for source in list(model.tensors.values())[:3]:
                count = min(source.numel, 4)
                size = {"F32": 4, "F16": 2, "U8": 1, "BOOL": 1}[source.dtype]
                source.read(0, count, memoryview(bytearray(count * size)))
            model.check_unchanged()
            json.dumps(model.identity())
    except AmalgamError as error:
        result |= {"code": error.code, "text": str(error), "fix": error.fix}
    except BaseException as error:
        result["code"] = f"{type(error).__name__}: {error}"[:300]
    result |= {"seconds": time.process_time() - started, "memory": resident("VmHWM") - before}
    print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("corpus")
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return {result["name"]: result for result in map(json.loads, run.stdout.splitlines())}


def test_the_corpus_is_large_enough() -> None:
    assert len(CASES) >= 200 and hostile_folders.CASES is CASES


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, results: dict[str, dict[str, Any]]) -> None:
    case, result = CASES[name], results[name]
    assert result["code"] == case.code, result
    assert case.words in result["text"]
    if case.code is None:
        assert result["tensors"] == case.tensors
    else:
        assert result["fix"] and len(result["text"]) < 2_000
        assert not set("\0\x1b\x7f\u202e") & set(result["text"]), "a message must not carry the attack along"
    assert result["seconds"] < SLOWEST
    assert result["memory"] < MOST_MEMORY
