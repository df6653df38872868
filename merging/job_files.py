"""What a job keeps on disk, and the rules that make it readable at any moment, by anybody, after any crash.

::

    runs/20261122-101500-3f9a01c2/
        job.json        what was asked for: kind, arguments, title, tags, note; replaced in one step
        lock            held by the process that works on it; the kernel lets go of it when that process ends
        events.jsonl    what happened, one JSON object per line, only ever appended to
        progress        how far it is: one line of a fixed size that is overwritten in place
        stop            exists when somebody asked it to stop
        log.txt         what the libraries printed
        …               what the kind of job makes: recipe.yml, model/, records.jsonl

The one idea: only the holder of the lock writes ``events.jsonl``, and room for its last words is taken before it says
anything else. So a job that runs into a full disk can still say so, and one that was killed is recognised by a lock
that nobody holds and a last line that is no ending. A reader takes whole lines only: a line that was cut off by a kill
is not there yet, and the next holder removes it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .checkpoints.disk import fill_from, reserve, reserve_beyond, write_at, write_whole, writing
from .checkpoints.files import read_whole, shown
from .errors import AmalgamError, InputError

ENDINGS = ("finished", "failed", "cancelled")
"""Events after which nothing follows: the status of the job."""
ROOM = 1 << 16
"""Bytes that are always free for the last words."""
PROGRESS_SIZE = 1024
PACE = 0.2
"""Seconds between two writes of the progress."""
LARGEST_JOB, LARGEST_EVENTS = 1 << 24, 1 << 26


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job is. ``rate``: units per second; ``seconds_left``: None until there is something to learn from."""

    done: float
    """Whole but for parts, of which the current one counts by the share of the whole time that is behind it."""
    total: int
    """0: not known yet"""
    unit: str
    """bytes, items or parts"""
    doing: str
    rate: float | None = None
    seconds_left: float | None = None

    @property
    def share(self) -> float | None:
        """0 to 1; None where the total is not known."""
        return min(1.0, self.done / self.total) if self.total else None


def error_facts(error: AmalgamError) -> dict[str, str]:
    """An error as it stands in events and states."""
    return {"code": error.code, "what": error.what, "why": error.why, "fix": error.fix}


# -- job.json -----------------------------------------------------------------------------------------------------


@dataclass
class JobFile:
    """The content of job.json. ``created`` and ``removed``: seconds since 1970; ``folder``: where relative paths in the
    arguments start."""

    kind: str
    arguments: dict[str, Any]
    title: str
    created: float
    folder: str
    tags: list[str]
    note: str
    removed: float | None = None


def write_job(folder: Path, job: JobFile) -> None:
    write_whole(folder / "job.json", json.dumps(asdict(job), indent=1, allow_nan=False).encode() + b"\n")


def read_job(folder: Path) -> JobFile:
    """InputError E_JSON, E_NOT_FOUND, E_PATH or E_READ if it is not there or not as ``write_job`` writes it."""
    path = folder / "job.json"
    with contextlib.suppress(ValueError, TypeError, RecursionError, UnicodeDecodeError):
        job = JobFile(**json.loads(read_whole(path, LARGEST_JOB, "E_JSON")))
        texts = (job.kind, job.title, job.folder, job.note)
        times = [job.created, *([] if job.removed is None else [job.removed])]
        if (
            all(isinstance(text, str) for text in texts)
            and isinstance(job.arguments, dict)
            and isinstance(job.tags, list)
            and all(isinstance(tag, str) for tag in job.tags)
            and all(type(time) in (int, float) and math.isfinite(time) for time in times)
        ):
            return job
    raise InputError("E_JSON", f"{shown(path)} is damaged.", "", "If nothing in it is needed, delete its folder.")


# -- reading events and progress ----------------------------------------------------------------------------------


def read_events(folder: Path, cursor: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The events after ``cursor`` (a number that an earlier call gave, 0 for all), and the next cursor.

    Lines that are no events (damaged by a power cut, or by somebody else) are passed over.
    """
    try:
        descriptor = os.open(folder / "events.jsonl", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return [], cursor
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return [], cursor
        if not 0 <= cursor <= status.st_size:
            cursor = 0
        raw = os.pread(descriptor, min(status.st_size - cursor, LARGEST_EVENTS), cursor)
    except OSError:
        return [], cursor
    finally:
        os.close(descriptor)
    whole = raw[: raw.rfind(b"\n") + 1]
    return [event for line in whole.splitlines() if (event := _event(line)) is not None], cursor + len(whole)


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    return event if type(event.get("time")) in (int, float) and math.isfinite(event["time"]) else None


def read_progress(folder: Path) -> JobProgress | None:
    """None if there is none, or if it was just being written."""
    with contextlib.suppress(AmalgamError, ValueError, TypeError, RecursionError):
        found = JobProgress(**json.loads(read_whole(folder / "progress", PROGRESS_SIZE)))
        numbers = (found.done, found.total, found.rate or 0, found.seconds_left or 0)
        if all(type(n) in (int, float) and math.isfinite(n) for n in numbers) and isinstance(found.doing, str):
            return found
    return None


def ending_of(folder: Path) -> dict[str, Any] | None:
    """The event that ended the job's last run; None if there is none."""
    events, _ = read_events(folder)
    return events[-1] if events and events[-1]["event"] in ENDINGS else None


# -- writing, for the holder of the lock --------------------------------------------------------------------------


class JobWriter:
    """Appends events and shows the progress. Thread-safe. OutputError: E_NO_SPACE, E_OUTPUT_WRITE.

    ``anew``: forget the progress of an earlier run.
    """

    def __init__(self, folder: Path, anew: bool = False) -> None:
        self.folder, self._lock, self._last = folder, threading.Lock(), 0.0
        self._latest: JobProgress | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with writing(folder):
            self._events = os.open(folder / "events.jsonl", flags | os.O_APPEND, 0o666)
            self._progress = -1
            try:
                self._progress = os.open(folder / "progress", flags, 0o666)
                self._cut_torn_line()
                reserve_beyond(self._events, ROOM)
                if anew or os.fstat(self._progress).st_size != PROGRESS_SIZE:
                    os.ftruncate(self._progress, 0)
                    reserve(self._progress, PROGRESS_SIZE)
            except OSError:
                self.close()
                raise

    def _cut_torn_line(self) -> None:
        size = os.fstat(self._events).st_size
        start = max(0, size - LARGEST_EVENTS)
        tail = bytearray(size - start)
        fill_from(self._events, memoryview(tail), start)
        if tail[-1:] != b"\n":
            os.ftruncate(self._events, start + tail.rfind(b"\n") + 1)

    def event(self, event: Mapping[str, Any]) -> None:
        """Append an event. There stays room for the last one."""
        line = _line(event)
        with self._lock, writing(self.folder):
            reserve_beyond(self._events, ROOM + len(line))
            self._append(line)

    def end(self, event: Mapping[str, Any]) -> None:
        """Append the last event, into the room that was kept for it, and make it safe on the disk."""
        with self._lock, writing(self.folder):
            with contextlib.suppress(OSError):
                self._show()
            self._append(_line(event))
            os.fsync(self._events)
            with contextlib.suppress(OSError):
                os.ftruncate(self._events, os.fstat(self._events).st_size)  # gives back what is left of the room

    def _append(self, line: bytes) -> None:
        size, view = os.fstat(self._events).st_size, memoryview(line)
        try:
            while view:
                view = view[os.write(self._events, view) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._events, size)
            raise

    def tell(self, progress: JobProgress) -> None:
        """Show the progress, at most five times a second; the last one is shown before the end."""
        with self._lock, writing(self.folder):
            self._latest = progress
            if time.monotonic() - self._last >= PACE:
                self._show()

    def _show(self) -> None:
        if self._latest is None:
            return
        facts, self._latest, self._last = asdict(self._latest), None, time.monotonic()
        text = json.dumps(facts).encode()
        if len(text) >= PROGRESS_SIZE:
            text = json.dumps({**facts, "doing": facts["doing"][:60]}).encode()
        write_at(self._progress, text.ljust(PROGRESS_SIZE - 1) + b"\n", 0)

    def close(self) -> None:
        for descriptor in (self._events, self._progress):
            if descriptor >= 0:
                os.close(descriptor)
        self._events = self._progress = -1

    def __enter__(self) -> JobWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(event: Mapping[str, Any]) -> bytes:
    return json.dumps({"time": time.time(), **event}, allow_nan=False).encode() + b"\n"
