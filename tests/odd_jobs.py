"""Kinds of jobs that do what real ones do on bad days, and the worker that knows them.

``python -m tests.odd_jobs FOLDER LOCK`` is ``merging.job_worker`` with these kinds. ``install`` makes them known to the
process that starts them, and ``JOBS`` is the command for ``Jobs``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging import job_worker
from merging.errors import Cancelled, RecipeError
from merging.job_files import JobProgress
from merging.job_kind import Event, Kind
from merging.job_kinds import KINDS
from merging.job_pace import Tell
from merging.jobs import Jobs, JobState

if TYPE_CHECKING:
    import pytest

WORKER = (sys.executable, "-m", "tests.odd_jobs")


def count(arguments: dict[str, Any], folder: Path, tell: Tell, event: Event, stop: threading.Event) -> dict[str, Any]:
    """Counts to ``to``, a step every ``every`` seconds, from where an earlier run stopped."""
    kept = folder / "count"
    first = int(kept.read_text()) if kept.exists() else 0
    for number in range(first, arguments["to"]):
        if stop.is_set():
            raise Cancelled()
        time.sleep(arguments.get("every", 0.01))
        kept.write_text(str(number + 1))
        event({"event": "counted", "number": number})
        tell(JobProgress(number + 1, arguments["to"], "items", "counting"))
    return {"from": first, "to": arguments["to"]}


def stubborn(arguments: dict[str, Any], folder: Path, tell: Tell, event: Event, stop: threading.Event) -> dict[str, Any]:
    """Does not look up, and has a child that does not either."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    (folder / "child").write_text(str(child))
    event({"event": "deaf"})
    time.sleep(60)
    return {}


def crash(arguments: dict[str, Any], folder: Path, tell: Tell, event: Event, stop: threading.Event) -> dict[str, Any]:
    if arguments.get("signal"):
        os.kill(os.getpid(), arguments["signal"])
    raise ValueError("an error that nobody foresaw")


def fill(arguments: dict[str, Any], folder: Path, tell: Tell, event: Event, stop: threading.Event) -> dict[str, Any]:
    """Tells more and more, on a disk that somebody else has filled up to the last byte."""
    event({"event": "begun"})
    with open(folder.parent / "filler", "wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                break
    if arguments.get("signal"):
        os.kill(os.getpid(), arguments["signal"])
    while True:
        event({"event": "more", "text": "x" * 1000})


def check(arguments: dict[str, Any]) -> None:
    if "wrong" in arguments:
        raise RecipeError("E_RECIPE_FIELD", "These arguments are wrong.")


ODD = {function.__name__: Kind(function.__name__, check, function) for function in (count, stubborn, crash, fill)}


def install(patch: pytest.MonkeyPatch) -> None:
    for name, kind in ODD.items():
        patch.setitem(KINDS, name, kind)


def wait_until(condition: Any, seconds: float = 30.0) -> Any:
    """What the condition gives, as soon as that is something."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)
    return found


def ended(jobs: Jobs, job: str, seconds: float = 60.0) -> JobState:
    wait_until(lambda: not jobs.state(job).alive, seconds)
    return jobs.state(job)


def running(jobs: Jobs, job: str) -> JobState:
    wait_until(lambda: jobs.state(job).status != "waiting")
    return jobs.state(job)


def main() -> None:
    """An app of its own: ``python -m tests.odd_jobs app RUNS KIND ARGUMENTS`` starts a job, prints its id and ends."""
    if sys.argv[1] == "app":
        KINDS.update(ODD)
        print(Jobs(sys.argv[2], WORKER).start(sys.argv[3], json.loads(sys.argv[4])), flush=True)
    else:
        KINDS.update(ODD)
        job_worker.main(sys.argv[1:])


if __name__ == "__main__":
    main()
