"""Who does a job: a process of its own, or the process that serves the page.

Both keep a job in the same folder, in the same form (``merging.jobs``), so pages never ask which of them is at work.

- ``BackgroundExecutor``, everywhere: a worker process, which survives a reload and the end of the app.
- ``RequestExecutor``, on ZeroGPU Spaces: there a GPU is lent only to a function that is called in the name of a
  visitor's request, in a fork of this process and for a limited time. The job runs in a thread that carries the
  request's context, and what is to be done on the GPU goes through ``on_gpu``. Time that runs out is a failure that can
  be resumed: finished tensors and scored items are kept. Without a GPU it does the same on the CPU.
"""

from __future__ import annotations

import contextvars
import importlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from merging.errors import AmalgamError, Cancelled, OutputError
from merging.job_queue import wait_for_turn
from merging.job_state import RESUME
from merging.job_worker import asked_to_stop, end_unless_ended, work
from merging.jobs import Jobs, JobState

Work = Callable[[str], None]
GPU_SECONDS = 60
"""For which a GPU is asked at a time: visitors have a few minutes a day."""


class Executor(Protocol):
    """Raises what ``Jobs.start``, ``Jobs.resume`` and ``Jobs.stop`` raise."""

    jobs: Jobs

    def start(self, kind: str, arguments: dict[str, Any], title: str = "") -> str:
        """Start a job and return its id at once."""

    def resume(self, id: str) -> None: ...

    def stop(self, id: str) -> None: ...


class BackgroundExecutor:
    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs

    def start(self, kind: str, arguments: dict[str, Any], title: str = "") -> str:
        return self.jobs.start(kind, arguments, title)

    def resume(self, id: str) -> None:
        self.jobs.resume(id)

    def stop(self, id: str) -> None:
        self.jobs.stop(id)


class RequestExecutor:
    """``on_gpu``: what lends a GPU to a function (``spaces.GPU(…)``); None: there is none.

    Jobs whose device is cuda go through it; ``auto`` means the CPU here, which is fast enough for merging.
    """

    def __init__(self, jobs: Jobs, on_gpu: Callable[[Work], Work] | None = None) -> None:
        self.jobs, self.on_gpu = jobs, on_gpu

    def start(self, kind: str, arguments: dict[str, Any], title: str = "") -> str:
        if arguments.get("device", "auto") == "auto" and kind != "inspect":
            arguments = {**arguments, "device": "cpu"}
        job, lock = self.jobs.prepare(kind, arguments, title)
        self._launch(job, lock, arguments)
        return job

    def resume(self, id: str) -> None:
        arguments = self.jobs.arguments(id)
        self._launch(id, self.jobs.hold_again(id), arguments)

    def stop(self, id: str) -> None:
        self.jobs.stop(id)

    def _launch(self, id: str, lock: int, arguments: dict[str, Any]) -> None:
        lent = self.on_gpu is not None and str(arguments.get("device", "")).startswith("cuda")
        doing = self.on_gpu(work) if lent and self.on_gpu is not None else work
        context = contextvars.copy_context()  # it says whose request this is
        thread = threading.Thread(
            target=context.run, args=(_live, self.jobs.path / id, lock, doing), name=f"job {id}", daemon=True
        )
        thread.start()


def _live(folder: Path, lock: int, doing: Work) -> None:
    """In the thread: wait for the turn, do the job, say how it ended, let go of the lock."""
    try:
        with wait_for_turn(folder.parent, folder.name, lambda: asked_to_stop(folder)) as mine:
            if mine:
                doing(str(folder))
            end_unless_ended(folder, Cancelled(fix=RESUME) if asked_to_stop(folder) else _broken_off())
    except BaseException as error:
        end_unless_ended(folder, _typed(error))
    finally:
        os.close(lock)


def _typed(error: BaseException) -> AmalgamError:
    """What lends a GPU takes it away by raising whatever it likes."""
    return error if isinstance(error, AmalgamError) else _broken_off(f"{type(error).__name__}: {str(error)[:300]}")


def _broken_off(why: str = "") -> OutputError:
    what = "The work was broken off, perhaps because the time on the GPU was over."
    return OutputError("E_WORKER", what, why, RESUME)


def follow(jobs: Jobs, id: str, every: float = 0.5) -> Iterator[JobState]:
    """The states of a job whenever they change, until it has ended. For a page that waits."""
    last: JobState | None = None
    while True:
        state = jobs.state(id)
        if state != last:
            last = state
            yield state
        if not state.alive:
            return
        time.sleep(every)


def choose_executor(jobs: Jobs) -> Executor:
    """The one for this place: ZeroGPU Spaces say so in their environment."""
    if not os.environ.get("SPACES_ZERO_GPU"):
        return BackgroundExecutor(jobs)
    return RequestExecutor(jobs, importlib.import_module("spaces").GPU(duration=GPU_SECONDS))
