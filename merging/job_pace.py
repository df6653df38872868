"""How fast a job is: counts of what is done become a rate and a time left, for the person who waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .errors import Cancelled
from .job_files import JobProgress

Tell = Callable[[JobProgress], None]
LEARNING = 0.5
"""Seconds of work before a rate is told."""


class Pace:
    """``pace(done, total, doing)``: tells the progress, with the rate since the first call. What was done before that
    (by an earlier run) does not count as speed."""

    def __init__(self, tell: Tell, unit: str) -> None:
        self.tell, self.unit = tell, unit
        self.began: tuple[float, int] | None = None

    def __call__(self, done: int, total: int, doing: str) -> None:
        now = time.monotonic()
        began, before = self.began = self.began or (now, done)
        rate = (done - before) / (now - began) if now - began > LEARNING and done > before else None
        left = (total - done) / rate if rate else None
        self.tell(JobProgress(done, total, self.unit, doing, rate, left))


def downloads(tell: Tell, stop: threading.Event) -> Callable[[int, int, str], None]:
    """For the ``progress`` of downloads: tells it, and ends the download after ``stop``; what was received is kept."""
    pace = Pace(tell, "bytes")

    def progress(done: int, total: int, name: str) -> None:
        if stop.is_set():
            raise Cancelled()
        pace(done, total, f"downloading {name}")

    return progress
