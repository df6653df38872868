"""What is known about a job at one moment, from its folder alone.

The order of looking is the trick: first whether anybody holds the lock, then the events. Whoever lets go of the lock
has written all its events before, so a job without an ending and without a holder is one whose process was killed.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .checkpoints.disk import holder_of, is_locked
from .errors import AmalgamError, Cancelled, OutputError
from .job_files import ENDINGS, JobFile, JobProgress, error_facts, read_events, read_progress

Status = Literal["waiting", "running", "finished", "failed", "cancelled"]
RESUME = "Resume the run: it goes on from what is finished."


@dataclass(frozen=True, slots=True)
class JobState:
    """What is known about a job at one moment. Times are seconds since 1970."""

    id: str
    kind: str
    title: str
    status: Status
    created: float
    started: float | None = None
    """When the work began, this time; None while it waits."""
    ended: float | None = None
    progress: JobProgress | None = None
    """The last that was told."""
    error: dict[str, str] | None = None
    """code, what, why, fix: of a failed or cancelled job."""
    result: dict[str, Any] | None = None
    tags: list[str] = field(default_factory=list)
    note: str = ""
    removed: float | None = None
    pid: int | None = None
    """The process that works, or waits for its turn."""

    @property
    def alive(self) -> bool:
        return self.status in ("waiting", "running")

    @property
    def resumable(self) -> bool:
        return self.status in ("failed", "cancelled") and self.removed is None and bool(self.kind)


def state_of(folder: Path, job: JobFile) -> JobState:
    alive = is_locked(folder / "lock")  # before the events: see the module
    state = JobState(folder.name, job.kind, job.title, "waiting", job.created, tags=job.tags, note=job.note,
                     removed=job.removed)  # fmt: skip
    for event in read_events(folder)[0]:
        state = _after(state, event)
    if state.alive and not alive:
        stopped = os.path.lexists(folder / "stop")
        error = _STOPPED if stopped else _KILLED
        state = replace(state, status="cancelled" if stopped else "failed", ended=last_sign(folder), error=error)
    elif state.status == "waiting":
        state = replace(state, pid=holder_of(folder / "lock"))
    if not state.alive:
        state = replace(state, pid=None)
    return replace(state, progress=read_progress(folder)) if state.started is not None else state


def _after(state: JobState, event: dict[str, Any]) -> JobState:
    """The state after one more event."""
    what, when = event["event"], event["time"]
    if what == "waiting":
        return replace(state, status="waiting", started=None, ended=None, error=None, result=None)
    if what == "started":
        pid = event.get("pid")
        return replace(state, status="running", started=when, pid=pid if type(pid) is int else None)
    if what in ENDINGS:
        error, result = event.get("error"), event.get("result")
        state = replace(state, status=what, ended=when, result=result if isinstance(result, dict) else None)
        if isinstance(error, dict):
            state = replace(state, error={key: str(error.get(key, "")) for key in ("code", "what", "why", "fix")})
    return state


_STOPPED = error_facts(Cancelled(fix=RESUME))
_KILLED = error_facts(
    OutputError(
        "E_WORKER",
        "The worker of this run was ended from outside.",
        "Another program killed it, or the machine was switched off: it left no last word.",
        RESUME,
    )
)


def damaged(folder: Path, error: AmalgamError) -> JobState:
    """The state of a job whose job.json cannot be read."""
    when = last_sign(folder)
    return JobState(folder.name, "", folder.name, "failed", when, ended=when, error=error_facts(error))


def last_sign(folder: Path) -> float:
    """When the job last wrote anything."""
    times = [0.0]
    for name in ("job.json", "events.jsonl", "progress"):
        with contextlib.suppress(OSError):
            times.append(os.lstat(folder / name).st_mtime)
    return max(times)
