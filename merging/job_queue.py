"""One heavy job at a time, in the order in which they were started, whoever started them.

Two things lie beside the jobs: ``.turns/`` with an empty file per job that waits or works, named by time and job, and
``.running``, a lock that is held by the one that works. Nobody administers the queue: each waiting process looks
whether all who came before it have gone. A process that died has let go of its job's lock, so it cannot hold up
anybody.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .checkpoints.disk import is_locked, take_lock, writing

ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{8}")
_TURN = re.compile(rf"([0-9]{{20}})\.({ID.pattern})")
LOOK = 0.1
"""Seconds between two looks at the queue."""


def draw_turn(runs: Path, job: str) -> None:
    """Go to the end of the queue. The caller holds the job's lock, and so does whoever waits for the turn."""
    turns = runs / ".turns"
    with writing(turns):
        turns.mkdir(exist_ok=True)
        leave_queue(runs, job)
        os.close(os.open(turns / f"{time.time_ns():020}.{job}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))


def leave_queue(runs: Path, job: str) -> None:
    for name, other in _queue(runs):
        if other == job:
            with contextlib.suppress(OSError):
                os.unlink(runs / ".turns" / name)


@contextmanager
def wait_for_turn(runs: Path, job: str, stopped: Callable[[], bool]) -> Iterator[bool]:
    """Wait until all who came before have ended. Yields whether it is this job's turn: not if ``stopped`` came first.

    The turn ends with the block.
    """
    running: int | None = None
    try:
        while not stopped():
            if _is_first(runs, job) and (running := take_lock(runs / ".running")) is not None:
                break
            time.sleep(LOOK)
        yield running is not None
    finally:
        leave_queue(runs, job)
        if running is not None:
            os.close(running)


def _is_first(runs: Path, job: str) -> bool:
    for name, other in _queue(runs):
        if other == job:
            return True
        if is_locked(runs / other / "lock"):
            return False
        with contextlib.suppress(OSError):  # its lock was held before it drew its turn, so it has gone
            os.unlink(runs / ".turns" / name)
    return True  # somebody removed our turn: the lock alone must do


def _queue(runs: Path) -> list[tuple[str, str]]:
    """(name of the file, job) in the order of their turns."""
    try:
        names = sorted(os.listdir(runs / ".turns"))
    except OSError:
        return []
    return [(name, match[2]) for name in names if (match := _TURN.fullmatch(name))]
