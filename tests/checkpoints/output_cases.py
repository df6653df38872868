"""A small model to write through OutputFolder, and processes that write it and die.

python -m tests.checkpoints.output_cases write FINAL [PAUSE]
    writes the model into FINAL, resuming; prints "open" when it starts writing, the name of each tensor when
    it is finished, and "done" at the end; or the code and text of the typed error that it met
python -m tests.checkpoints.output_cases nobody FINAL
    the same as an unprivileged user
python -m tests.checkpoints.output_cases sweep FOLDER FAULT
    for n = 1, 2, 3 … makes the n-th call to the operating system fail until a run meets no fault, and after
    each checks what a second run makes of it; prints a JSON summary. FAULT: kill, or error (a full disk and
    a broken one in turn)
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from merging.checkpoints import disk
from merging.checkpoints.header import build_header
from merging.checkpoints.output import OutputFile, OutputFolder
from merging.checkpoints.output_rules import work_folder
from merging.checkpoints.verify import verify
from merging.errors import AmalgamError

ROOT = Path(__file__).resolve().parent.parent.parent
PLAN = "ab" * 32
SIDE_FILES = {"config.json": b'{"model_type": "none"}', "README.md": b"# Merged\n", "empty.txt": b""}
MANIFEST = {"recipe": {"method": "none", "density": 0.5}, "warnings": ["déjà vu"], "version": "0"}


def layout(tensors: int = 12, shards: int = 2, largest: int = 40_000) -> list[OutputFile]:
    """``tensors`` tensors of up to ``largest`` elements in ``shards`` files; one is a scalar, one empty."""
    shapes: list[tuple[int, ...]] = [(), (0, 3)]
    shapes += [(1 + largest * (number * 7919 % 101) // 101,) for number in range(tensors - 2)]
    names = [f"block.{number}.weight" for number in range(tensors)]
    files = []
    for shard in range(shards):
        part = [(n, "F16", s) for n, s in list(zip(names, shapes, strict=True))[shard::shards]]
        header, entries = build_header(part, {"format": "pt"})
        size = len(header) + sum(entry.nbytes for entry in entries.values())
        files.append(OutputFile(f"model-{shard + 1:05}-of-{shards:05}.safetensors", header, entries, size))
    return files


LARGER = layout(40)  # 1.6 MB: what the processes write


def content(tensor: str, nbytes: int) -> bytes:
    return np.random.default_rng(zlib.crc32(tensor.encode())).bytes(nbytes)


def fill(
    folder: OutputFolder,
    files: list[OutputFile],
    pause: float = 0,
    count: int | None = None,
    tell: Callable[[str], object] = str,
) -> int:
    """Write all tensors (or ``count``) that are not finished, from two threads; returns how many."""
    todo = [e for file in files for e in file.entries.values() if e.name not in folder._finished][:count]
    queue, errors = iter(todo), []
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                entry = next(queue, None)
            if entry is None or errors:
                return
            data = content(entry.name, entry.nbytes)
            try:
                for offset in range(0, entry.nbytes, 16_384):
                    folder.write(entry.name, offset, memoryview(data)[offset : offset + 16_384])
                    time.sleep(pause)
                folder.complete(entry.name, xxhash.xxh3_128_hexdigest(data))
                tell(entry.name)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return len(todo)


def produce(
    final: Path,
    files: list[OutputFile] | None = None,
    pause: float = 0,
    tell: Callable[[str], object] = str,
) -> Path:
    """The whole way: open, write what is missing, publish."""
    files = files or layout()
    with OutputFolder.open(final, files, PLAN) as folder:
        tell("open")
        fill(folder, files, pause, tell=tell)
        for name, data in SIDE_FILES.items():
            folder.add(name, data)
        return folder.finish(MANIFEST)


def expected_files(files: list[OutputFile] | None = None) -> dict[str, bytes]:
    """What must stand in the published folder, manifest aside."""
    weights = {
        file.name: file.header + b"".join(content(e.name, e.nbytes) for e in file.entries.values())
        for file in files or layout()
    }
    return {**weights, **SIDE_FILES}


def differences(final: Path, files: list[OutputFile] | None = None) -> str:
    """Empty if ``final`` is exactly the model that was to be written and nothing is left beside it."""
    expected = expected_files(files)
    present = {path.name: path.read_bytes() for path in final.iterdir() if path.name != "manifest.json"}
    wrong = sorted(n for n in expected.keys() | present.keys() if expected.get(n) != present.get(n))
    report = verify(final)
    left = [name for name in os.listdir(final.parent) if name.endswith(".partial")]
    return f"{wrong} {left} {report.problems}" if wrong or left or not report.ok else ""


# --------------------------------------------------------------- making the n-th call to the system fail

# The calls by which OutputFolder changes the disk. Reads cannot do harm; they are in the list for EIO.
CALLS = ["open", "mkdir", "ftruncate", "pwrite", "write", "fsync", "unlink", "rmdir", "listdir", "preadv"]
LIBRARY_CALLS = ["_fallocate", "_renameat2"]


class Fault:
    """Counts the calls of all kinds together; the one number ``at`` fails."""

    def __init__(self, kind: str, at: int):
        self.kind, self.at, self.count, self.struck = kind, at, 0, ""
        self.lock = threading.Lock()

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            with self.lock:
                self.count += 1
                mine = self.count == self.at
            if mine:
                self.struck = name
                if self.kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                code = [errno.ENOSPC, errno.EIO][self.at % 2]
                if name in LIBRARY_CALLS:
                    disk.ctypes.set_errno(code)
                    return -1
                raise OSError(code, os.strerror(code))
            return call(*arguments, **options)

        return wrapped

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.wrap(name, getattr(os, name)))
        for name in LIBRARY_CALLS:
            setattr(disk, name, self.wrap(name, getattr(disk, name)))


def in_child(work: Callable[[], int]) -> int:
    """Run ``work`` in a forked process; its exit code, or -9 if it was killed."""
    process = os.fork()
    if not process:
        code = 99
        with contextlib.suppress(BaseException):
            code = work()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def one_fault(final: Path, files: list[OutputFile], kind: str, at: int) -> int:
    """0: no fault was met; 1: it gave a typed error; 2: published in spite of it; anything else is a bug."""
    fault = Fault(kind, at)
    fault.install()
    try:
        produce(final, files)
    except AmalgamError as error:
        return 1 if error.code in ("E_OUTPUT_WRITE", "E_NO_SPACE", "E_MANIFEST") else 98
    return 2 if fault.struck else 0


def finish_job(final: Path, files: list[OutputFile]) -> int:
    """Run again without faults. 0: finished now; 1: it was finished already; else wrong."""
    code = 0
    try:
        produce(final, files)
    except AmalgamError as error:
        if error.code != "E_OUTPUT_EXISTS" or "very plan" not in error.why:
            return 97
        code = 1
    return 96 if differences(final, files) else code


def sweep(folder: Path, kind: str) -> dict[str, Any]:
    """Outcomes for n = 1, 2, 3 … until a run meets no fault."""
    files = layout(tensors=6, largest=30_000)
    outcomes: dict[str, int] = {}
    for at in itertools.count(1):
        final = folder / "model"
        first = in_child(lambda final=final, at=at: one_fault(final, files, kind, at))  # type: ignore[misc]
        visible_and_wrong = final.exists() and not verify(final).ok
        again = in_child(lambda final=final: finish_job(final, files))  # type: ignore[misc]
        key = f"{first} then {again}" + (" VISIBLE BUT WRONG" if visible_and_wrong else "")
        outcomes[key] = outcomes.get(key, 0) + 1
        shutil.rmtree(final, ignore_errors=True)
        shutil.rmtree(work_folder(final), ignore_errors=True)
        if first == 0:
            return {"faults": at - 1, "outcomes": outcomes}
    raise AssertionError


def main() -> None:
    command, where, *rest = sys.argv[1:]
    if command == "sweep":
        print(json.dumps(sweep(Path(where), rest[0])))
        return
    if command == "nobody":
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        pause = float(rest[0]) if rest else 0
        produce(Path(where), LARGER, pause, lambda text: os.write(1, f"{text}\n".encode()))
        print("done", flush=True)
    except AmalgamError as error:
        print(error.code, error.what, error.why, error.fix, sep="\n")


if __name__ == "__main__":
    main()
