"""Results on disk, so that nothing is evaluated twice and nothing that was computed is lost.

One file per (model key, task hash, settings), to which each finished batch is added as one line, checksum first. The
content of a key never changes, so a file is never out of date, only unused. After Ctrl-C, ``kill -9`` or a power cut
the finished batches are there, and the next run asks only for the items that are missing. A line that is cut off or
damaged is as if it had never been written; so is a file whose first line does not say what was asked for, and a folder
that cannot be written makes everything slower, not wrong.

Batch size, threads, device and versions of libraries are not part of the key: they change the last bits of a score. The
first line tells with which ones the file was begun.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import xxhash

from merging.evaluation.records import METRICS, Record, as_dict
from merging.evaluation.scoring import KINDS, Settings
from merging.evaluation.tasks import Task

FORMAT = 1


class Results:
    """What is known of one model on one task. ``found``: item -> its records, one per metric.

    ``notes``: what was wrong with the file, in words. ``folder`` None: keep in memory only.
    """

    def __init__(self, folder: Path | None, model: str, task: Task, settings: Settings):
        kind = KINDS[task.kind]
        used = {name: value for name, value in asdict(settings).items() if name in kind.uses}
        self.key = {
            "format": FORMAT,
            "model": model,
            "task": task.sha256,
            "kind": task.kind,
            "version": kind.version,
            "settings": used,
        }
        self.task, self.model, self.metrics = task, model, kind.metrics
        self.found: dict[str, list[Record]] = {}
        self.notes: list[str] = []
        self.path: Path | None = None
        if folder is not None:
            digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
            self.path = folder / "results" / model[:2] / f"{model[:16]}-{digest[:32]}.jsonl"
            self._read()

    def missing(self, items: Sequence[Any]) -> list[int]:
        """Positions of the items that have not been scored."""
        return [place for place, item in enumerate(items) if item.id not in self.found]

    def records(self, items: Sequence[Any]) -> list[Record]:
        """The records of those items that have been scored, in the order of the items."""
        return [record for item in items for record in self.found.get(item.id, ())]

    def add(self, records: Sequence[Record]) -> None:
        """Keep a finished batch: in memory, and on disk before this returns."""
        by_item: dict[str, list[Record]] = {}
        for record in records:
            by_item.setdefault(record.item, []).append(record)
        self.found |= by_item
        if self.path is None:
            return
        try:
            self._append(_line([*map(as_dict, records)]))
        except OSError as error:
            self.notes.append(f"Results of {self.task.name} are not kept: {self.path}: {error.strerror}.")
            self.path = None

    def _append(self, line: bytes) -> None:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _lock(descriptor)
            end = os.lseek(descriptor, 0, os.SEEK_END)
            if end == 0:
                line = _line({"key": self.key, "with": _circumstances()}) + line
            elif os.pread(descriptor, 1, end - 1) != b"\n":  # the last writer was killed in the middle of a line
                line = b"\n" + line  # and what it left is a damaged line
            view = memoryview(line)
            while view:
                written = os.pwrite(descriptor, view, end)
                view, end = view[written:], end + written
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _read(self) -> None:
        assert self.path is not None
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return
        except OSError as error:
            self.notes.append(f"Kept results of {self.task.name} cannot be used: {self.path}: {error.strerror}.")
            self.path = None
            return
        with open(descriptor, "r+b", buffering=0) as file:
            _lock(descriptor)
            first, *lines = (file.readall() or b"").split(b"\n")
            tail = lines.pop() if lines else b"no line end"  # after the last line end: nothing, or a line cut off
            content = _content(first)
            if not isinstance(content, dict) or content.get("key") != self.key:
                self._set_aside()
                return
            known = {item.id: item for item in self.task.items}
            good = [first]
            for line in lines:
                batch = self._batch(_content(line), known)
                if batch is not None:
                    self.found |= batch
                    good.append(line)
            if lost := len(lines) + 1 - len(good) + bool(tail):
                what = f"{lost} line(s) of {self.path} were damaged or cut off"
                self.notes.append(f"Kept results of {self.task.name}: {what}; their items are scored anew.")
                with contextlib.suppress(OSError):  # said once is enough
                    file.seek(0)
                    file.write(b"".join(line + b"\n" for line in good))
                    file.truncate()

    def _batch(self, content: Any, known: dict[str, Any]) -> dict[str, list[Record]] | None:
        """The records of a line by item, under today's name of the task; None if anything about them is wrong."""
        found: dict[str, list[Record]] = {}
        try:
            for row in content:
                record = Record(**row)
                fits = record.model == self.model and record.item in known and record.metric in METRICS
                if not fits or not isinstance(record.score, float | int):
                    return None
                named = replace(record, task=self.task.name, cluster=known[record.item].cluster)
                found.setdefault(record.item, []).append(named)
        except TypeError:
            return None
        complete = all(tuple(record.metric for record in records) == self.metrics for records in found.values())
        return found if complete else None

    def _set_aside(self) -> None:
        assert self.path is not None
        aside = self.path.with_suffix(".damaged")
        try:
            os.replace(self.path, aside)
            self.notes.append(
                f"Kept results of {self.task.name} were damaged. They are in {aside}; all is scored anew."
            )
        except OSError as error:
            self.notes.append(f"Kept results of {self.task.name} are damaged: {self.path}: {error.strerror}.")
            self.path = None


def _lock(descriptor: int) -> None:
    """One writer at a time; given back when the descriptor is closed."""
    with contextlib.suppress(OSError):  # some network file systems have no locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _line(content: Any) -> bytes:
    text = json.dumps(content, ensure_ascii=True, allow_nan=False).encode()
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def _content(line: bytes) -> Any:
    """What ``_line`` wrote, or None."""
    checksum, _, text = line.partition(b" ")
    if xxhash.xxh3_64_hexdigest(text).encode() != checksum:
        return None
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return None


def _circumstances() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()}
