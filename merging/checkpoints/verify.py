"""Is this model, byte for byte, what was written?

``verify`` hashes every file again and compares with ``manifest.json``. It reports *everything* that is not
as written: changed files (with the tensors that are hit), missing ones, the manifest itself, and files that
do not belong there. The last is no pedantry: a stray ``model.safetensors`` beside a sharded model is what
transformers would load instead of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.checkpoints.files import open_plain
from merging.checkpoints.hashing import BLOCK, Stopped, feed, hash_threads
from merging.checkpoints.header import read_header
from merging.checkpoints.manifest import NAME, read_manifest
from merging.errors import AmalgamError, InputError, VerificationError


@dataclass(frozen=True, slots=True)
class Problem:
    """One deviation. ``kind``: "manifest", "missing", "unexpected", "changed" or "unreadable"."""

    kind: str
    name: str  # of the file
    detail: str
    tensors: tuple[str, ...] = ()  # those whose bytes differ, where that could be told

    def __str__(self) -> str:
        return f"{self.kind}: {self.name!r}: {self.detail}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` found. ``ok`` is true only if every byte of every file is as written."""

    folder: Path
    files: int  # files that the manifest lists
    tensors: int
    bytes: int  # bytes that were hashed
    seconds: float
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        problems = [
            {"kind": item.kind, "name": item.name, "detail": item.detail, "tensors": list(item.tensors)}
            for item in self.problems
        ]
        numbers = {"files": self.files, "tensors": self.tensors, "bytes": self.bytes}
        return {"folder": str(self.folder), "ok": self.ok, **numbers, "problems": problems}

    def raise_if_bad(self) -> None:
        """VerificationError (E_MANIFEST or E_VERIFY) that lists the problems, unless ``ok``."""
        if self.problems:
            code = "E_MANIFEST" if any(item.kind == "manifest" for item in self.problems) else "E_VERIFY"
            shown = [f"- {item}" for item in self.problems[:20]]
            if len(self.problems) > 20:
                shown.append(f"- and {len(self.problems) - 20} more")
            raise VerificationError(
                code,
                f"{self.folder} is not what was written.",
                "\n".join(shown),
                "Restore it from a copy or merge again; the recipe is in its manifest and model card.",
            )


def verify(folder: str | Path, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Hash all files of ``folder`` again and compare with its manifest.

    ``progress(done, total)`` counts bytes; it is called from several threads, one at a time.
    Raises InputError E_NOT_FOUND if there is no such folder; everything else is in the report.
    """
    folder, began = Path(folder), time.monotonic()
    try:
        present = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(
            "E_NOT_FOUND",
            f"There is no folder {str(folder)!r} that can be read.",
            f"{error.strerror}.",
            "Check the path.",
        ) from None
    try:
        manifest = read_manifest(folder)
    except VerificationError as error:
        problem = Problem("manifest", NAME, error.why)
        return VerifyReport(folder, 0, 0, 0, time.monotonic() - began, (problem,))
    files, tensors = manifest["files"], manifest["tensors"]
    counter = _Counter(progress, sum(entry["size"] for entry in files.values()))

    def check(name: str) -> Problem | None:
        return _check_file(folder / name, files[name], tensors, counter)

    with ThreadPoolExecutor(hash_threads()) as pool:
        try:
            # The largest first, so that no thread starts on one when the others are done.
            found = list(pool.map(check, sorted(files, key=lambda name: -files[name]["size"])))
        except BaseException:  # Ctrl-C: the threads must not go on to the end of their files
            counter.stopped.set()
            raise
    problems = [problem for problem in found if problem]
    problems += [
        Problem("unexpected", name, "The manifest does not list it: it was put here later.")
        for name in present
        if name != NAME and name not in files
    ]
    problems.sort(key=lambda problem: problem.name)
    seconds = time.monotonic() - began
    return VerifyReport(folder, len(files), len(tensors), counter.done, seconds, tuple(problems))


class _Counter:
    """Sums up the bytes of all threads and tells ``progress``."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int):
        self.progress, self.total, self.done = progress, total, 0
        self.lock, self.stopped = threading.Lock(), threading.Event()

    def __call__(self, block: memoryview) -> None:
        if self.stopped.is_set():
            raise Stopped
        with self.lock:
            self.done += len(block)
            if self.progress:
                self.progress(self.done, self.total)


def _check_file(path: Path, expected: dict[str, Any], tensors: dict[str, Any], counter: _Counter) -> Problem | None:
    """What is wrong with one file that the manifest lists, or None."""
    try:
        descriptor = open_plain(path)
    except AmalgamError as error:
        kind = "missing" if error.code == "E_NOT_FOUND" else "unreadable"
        return Problem(kind, path.name, f"{error.what} {error.why}".strip())
    try:
        size = os.fstat(descriptor).st_size
        if size != expected["size"]:
            return Problem("changed", path.name, f"It has {size:,} bytes instead of {expected['size']:,}.")
        if _sha256(descriptor, 0, size, counter) == expected["sha256"]:
            return None
        mine = {name: entry for name, entry in tensors.items() if entry["file"] == path.name}
        if not mine:
            return Problem("changed", path.name, "Its SHA-256 is not the one that was written.")
        return _locate(descriptor, path, mine)
    except OSError as error:
        return Problem("unreadable", path.name, f"{error.strerror}.")
    finally:
        os.close(descriptor)


def _sha256(descriptor: int, start: int, size: int, counter: _Counter | None = None) -> str:
    digest = hashlib.sha256()
    updates = (digest.update, counter) if counter else (digest.update,)
    feed(descriptor, start, size, bytearray(max(1, min(BLOCK, size))), updates)
    return digest.hexdigest()


def _locate(descriptor: int, path: Path, tensors: dict[str, Any]) -> Problem:
    """Name the tensors that are hit in a weight file whose digest is wrong."""
    damaged: tuple[str, ...] = ()
    with contextlib.suppress(InputError):
        entries = read_header(descriptor, str(path)).tensors
        if entries.keys() == tensors.keys():
            damaged = tuple(
                name
                for name, entry in entries.items()
                if _sha256(descriptor, entry.start, entry.nbytes) != tensors[name]["sha256"]
            )
    if not damaged:
        return Problem("changed", path.name, "Its header is not the one that was written.")
    named = ", ".join(repr(name) for name in damaged[:5]) + (", …" if len(damaged) > 5 else "")
    return Problem("changed", path.name, f"The bytes of {len(damaged)} tensors differ: {named}.", damaged)
