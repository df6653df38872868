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
PARTS = 4
MOST_MEMORY = 64 + 4 * 33  # MB above the start: 64 and four times the largest header

CHILD = """
import json, resource, sys, time
from pathlib import Path
from safetensors import deserialize
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
for number, (name, case) in list(enumerate(CASES.items()))[int(sys.argv[2]) :: int(sys.argv[3])]:
    folder = root / str(number) / "model"
    folder.mkdir(parents=True)
    path = case.make(folder)
    result = {"name": name, "code": None, "text": "", "fix": "", "tensors": 0, "read": 0}
    try:
        open("/proc/self/clear_refs", "w").write("5")  # start the peak of the resident memory again
    except OSError:
        pass
    started = time.process_time()
    try:
        with open_checkpoint(path) as model:
            result["tensors"] = len(model.tensors)
            for file in model.files:
                if file.header.file_size < 1 << 25:  # what is taken is what safetensors sees
                    for name, theirs in deserialize(file.path.read_bytes()):
                        ours = model.tensors[name]
                        data = bytearray(len(theirs["data"]))
                        ours.read(0, ours.numel, memoryview(data))
                        assert (ours.dtype, list(ours.shape)) == (theirs["dtype"], theirs["shape"])
                        assert data == theirs["data"]
                        result["read"] += 1
            model.check_unchanged()
            json.dumps(model.identity())
    except AmalgamError as error:
        result |= {"code": error.code, "text": str(error), "fix": error.fix}
    except BaseException as error:
        result["code"] = f"{type(error).__name__}: {error}"[:300]
    result |= {"seconds": time.process_time() - started, "memory": resident("VmHWM") - before}
    print(json.dumps(result))
"""


def run(part: int, root: Path) -> list[dict[str, Any]]:
    """What became of every PARTS-th case."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(root), str(part), str(PARTS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return [json.loads(line) for line in child.stdout.splitlines()]


def complaints(result: dict[str, Any]) -> list[str]:
    case = CASES[result["name"]]
    wrong = [f"{result['code']} instead of {case.code}"] if result["code"] != case.code else []
    if case.words not in result["text"]:
        wrong.append(f"{case.words!r} is not said")
    if case.code is None and result["tensors"] != case.tensors:
        wrong.append(f"{result['tensors']} tensors")
    if case.code is None and result["read"] != case.tensors and "TiB" not in result["name"]:
        wrong.append(f"{result['read']} tensors compared")
    if case.code is not None and not (result["fix"] and len(result["text"]) < 2_000):
        wrong.append("no advice, or a message without end")
    if set("\0\x1b\x7f\u202e") & set(result["text"]):
        wrong.append("the message carries the attack along")
    if result["seconds"] > SLOWEST:
        wrong.append(f"{result['seconds']:.2f} s")
    if result["memory"] > MOST_MEMORY:
        wrong.append(f"{result['memory']:.0f} MB")
    return wrong


@pytest.mark.parametrize("part", range(PARTS))
def test_the_corpus_ends_as_it_must(part: int, tmp_path: Path) -> None:
    results = run(part, tmp_path)
    assert [result["name"] for result in results] == list(CASES)[part::PARTS]
    wrong = {result["name"]: [*complaints(result), result] for result in results if complaints(result)}
    assert not wrong, json.dumps(wrong, indent=1)


def test_the_corpus_is_large_enough() -> None:
    assert len(CASES) >= 250 and hostile_folders.CASES is CASES
    assert len({case.code for case in CASES.values()}) >= 14
