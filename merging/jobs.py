"""Jobs: long pieces of work, each in a process of its own, with everything about them on disk.

    jobs = Jobs(data_folder() / "runs")
    job = jobs.start("merge", {"recipe": recipe.to_data()}, "TIES, density 0.2")
    jobs.state(job).status          # waiting, running, finished, failed or cancelled
    jobs.stop(job)                  # within two seconds; jobs.resume(job) goes on from what is finished

The one idea: whoever asks reads the disk. Nothing about a job is remembered in the program that started it, so a page
that is loaded again, a second window and a program that was started again all see the same thing, and the list of jobs
is the history of runs. Whether a job is alive is the kernel's to say: its process holds a lock for as long as it lives
(see ``job_files`` for the folder, ``job_worker`` for the process).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoints.disk import holder_of, is_locked, take_lock, write_error, writing
from .checkpoints.files import shown
from .errors import AmalgamError, InputError, OutputError, RecipeError
from .job_files import JobFile, JobWriter, read_events, read_job, write_job
from .job_queue import ID, draw_turn, leave_queue
from .job_state import JobState, damaged, state_of

ROOT = Path(__file__).resolve().parent.parent
WORKER = (sys.executable, "-m", "merging.job_worker")
LONGEST_TITLE, LONGEST_NOTE, MOST_TAGS = 200, 20_000, 20
HOLD = 1.0
"""Seconds to wait for a lock that somebody looks at, or whose holder is just ending."""
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_PURGED = ".purged-"
_workers: list[subprocess.Popen] = []  # only so that those that ended are not left as zombies


class Jobs:
    """The jobs in one folder. Any number of objects and processes may use the same folder at once.

    ``worker``: the command that is started with a job's folder and the number of its locked file.
    Methods raise InputError E_NOT_FOUND for a job that there is not; those that need the arguments, or change what is
    kept, E_JSON (E_PATH, E_READ) for one whose job.json is damaged.
    """

    def __init__(self, folder: str | Path, worker: Sequence[str] = WORKER) -> None:
        self.path, self.worker = Path(folder).absolute(), list(worker)

    # -- working ----------------------------------------------------------------------------------------------

    def start(self, kind: str, arguments: dict[str, Any], title: str = "") -> str:
        """Start a job, or queue it behind those that were started before; its id. Takes milliseconds.

        Arguments are checked before: what their kind raises (RecipeError E_RECIPE_FIELD …). OutputError: E_NO_SPACE,
        E_OUTPUT_WRITE, E_WORKER (the process could not be started).
        """
        job, lock = self.prepare(kind, arguments, title)
        try:
            self._launch(job, lock)
        except BaseException:
            shutil.rmtree(self.path / job, ignore_errors=True)
            raise
        return job

    def resume(self, id: str) -> None:
        """Do a failed or cancelled job again, with the same arguments; it goes on from what was finished.

        OutputError: E_BUSY while it is at work; E_RESUME if it has finished; and as ``start``.
        """
        self._launch(id, self.hold_again(id))

    def stop(self, id: str) -> None:
        """Ask the job to stop: it is cancelled within two seconds, by force if need be. One that has ended stays so."""
        folder = self.folder(id)
        if not is_locked(folder / "lock"):
            return
        process = holder_of(folder / "lock")
        try:
            (folder / "stop").touch()
        except OSError as error:
            if process is None:
                raise write_error(error, folder) from error
        if process is not None and is_locked(folder / "lock"):
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGTERM)

    # -- for executors: a job that is held by this process ------------------------------------------------------

    def prepare(self, kind: str, arguments: dict[str, Any], title: str = "") -> tuple[str, int]:
        """Make the folder of a new job, in the queue: its id, and its locked file, which the caller must pass on or
        close. Raises as ``start``."""
        from .job_kinds import KINDS

        if kind not in KINDS:
            raise ValueError(f"there are no jobs of the kind {kind!r}")
        text = json.dumps(arguments, allow_nan=False)
        if _TOKEN.search(text):
            what, fix = "There is a Hub token among the settings of this run.", "Log in with `hf auth login` instead."
            raise RecipeError("E_RECIPE_FIELD", what, "Settings are kept in a file, tokens must not be.", fix)
        KINDS[kind].check(arguments)
        now = time.time()
        job = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}-{secrets.token_hex(4)}"
        folder = self.path / job
        with writing(folder):
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(mode=0o700)
            try:
                lock = self._hold(job)
                try:
                    with JobWriter(folder) as writer:
                        writer.event({"event": "waiting"})
                    draw_turn(self.path, job)
                    write_job(folder, JobFile(kind, json.loads(text), one_line(title), now, os.getcwd(), [], ""))
                except BaseException:
                    os.close(lock)
                    raise
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return job, lock

    def hold_again(self, id: str) -> int:
        """Ready a job for another run; its locked file, as ``prepare`` gives it. Raises as ``resume``."""
        folder = self.folder(id)
        lock = self._hold(id)
        try:
            if self.state(id).status == "finished":
                fix = "Start a new run with the same settings instead."
                raise OutputError("E_RESUME", "This run has finished.", "There is nothing left to do.", fix)
            with writing(folder):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(folder / "stop")
                os.ftruncate(lock, 0)
                with JobWriter(folder, anew=True) as writer:
                    writer.event({"event": "waiting"})
            draw_turn(self.path, id)
        except BaseException:
            os.close(lock)
            raise
        return lock

    def _hold(self, id: str) -> int:
        until = time.monotonic() + HOLD
        with writing(self.path / id):
            while (lock := take_lock(self.path / id / "lock")) is None:
                if time.monotonic() > until:
                    raise OutputError("E_BUSY", "This run is at work.", "", "Stop it first, or wait for its end.")
                time.sleep(0.01)
        return lock

    def _launch(self, id: str, lock: int) -> None:
        """Pass the lock on to a worker process. It is held without a gap: by us until now, by the worker from now."""
        _reap()
        folder = self.path / id
        try:
            with writing(folder), open(folder / "log.txt", "ab") as log:
                try:
                    worker = subprocess.Popen(
                        [*self.worker, str(folder), str(lock)],
                        cwd=ROOT, pass_fds=[lock], start_new_session=True,
                        stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    )  # fmt: skip
                except OSError as error:
                    leave_queue(self.path, id)
                    raise OutputError(
                        "E_WORKER", "The worker process could not be started.", f"{error.strerror}.",
                        "Close other programs and try again.") from error
            _workers.append(worker)
        finally:
            os.close(lock)

    # -- looking ----------------------------------------------------------------------------------------------

    def state(self, id: str) -> JobState:
        """What is known now. A damaged job is failed, with the error that says how it is damaged."""
        _reap()
        return _look(self.folder(id))

    def states(self, removed: bool = False) -> list[JobState]:
        """All jobs, newest first: those that were not removed, or (``removed``) those that were. Folders that are no
        jobs are passed over."""
        _reap()
        try:
            names = [name for name in os.listdir(self.path) if ID.fullmatch(name)]
        except OSError:
            return []
        found = []
        for name in names:
            with contextlib.suppress(InputError):
                found.append(_look(self.folder(name)))
        return sorted(
            (state for state in found if (state.removed is not None) == removed),
            key=lambda state: (state.created, state.id), reverse=True,
        )  # fmt: skip

    def events(self, id: str, cursor: int = 0) -> tuple[list[dict[str, Any]], int]:
        """The events after ``cursor`` (0: all), each with its ``time``, and the next cursor. In every run of the job:
        waiting, started {pid}, what its kind tells, and finished {result}, failed {error} or cancelled {error}."""
        return read_events(self.folder(id), cursor)

    def folder(self, id: str) -> Path:
        if not ID.fullmatch(id) or not os.path.lexists(self.path / id / "job.json") or (self.path / id).is_symlink():
            raise InputError("E_NOT_FOUND", f"There is no run {shown(id)!r}.", "", "Choose one from the list of runs.")
        return self.path / id

    def arguments(self, id: str) -> dict[str, Any]:
        return read_job(self.folder(id)).arguments

    # -- keeping ----------------------------------------------------------------------------------------------

    def change(
        self, id: str, title: str | None = None, tags: Sequence[str] | None = None, note: str | None = None
    ) -> None:
        """Change what people call it. Titles and tags become one line; what is too long is cut off."""

        def changed(job: JobFile) -> JobFile:
            return replace(
                job,
                title=job.title if title is None else one_line(title),
                tags=job.tags if tags is None else list(dict.fromkeys(filter(None, map(one_line, tags))))[:MOST_TAGS],
                note=job.note if note is None else note[:LONGEST_NOTE],
            )

        self._rewrite(id, changed)

    def remove(self, id: str) -> None:
        """Take it off the list; ``restore`` brings it back. OutputError E_BUSY while it is at work."""
        with self._held(id):
            self._rewrite(id, lambda job: replace(job, removed=time.time()))

    def restore(self, id: str) -> None:
        self._rewrite(id, lambda job: replace(job, removed=None))

    def purge(self) -> list[str]:
        """Delete the folders of all removed jobs, with the models in them, for good; their ids. Models that were
        written elsewhere stay."""
        gone = [state.id for state in self.states(removed=True)]
        for id in gone:
            with self._held(id), writing(self.path / id):
                os.rename(self.path / id, self.path / f"{_PURGED}{id}")  # in one step: never half a job in the list
        with contextlib.suppress(OSError):
            for name in os.listdir(self.path):
                if name.startswith(_PURGED):
                    shutil.rmtree(self.path / name, ignore_errors=True)
        return gone

    @contextmanager
    def _held(self, id: str) -> Iterator[None]:
        self.folder(id)
        lock = self._hold(id)
        try:
            yield
        finally:
            os.close(lock)

    def _rewrite(self, id: str, changed: Callable[[JobFile], JobFile]) -> None:
        folder, until = self.folder(id), time.monotonic() + HOLD
        with writing(folder):
            while (lock := take_lock(self.path / ".changes")) is None:
                if time.monotonic() > until:
                    raise OutputError("E_BUSY", "Another window is changing the list of runs.", "", "Try again.")
                time.sleep(0.005)
            try:
                write_job(folder, changed(read_job(folder)))
            finally:
                os.close(lock)


def _look(folder: Path) -> JobState:
    try:
        return state_of(folder, read_job(folder))
    except AmalgamError as error:
        return damaged(folder, error)


def one_line(text: str) -> str:
    """Printable text on one line, at most ``LONGEST_TITLE`` characters."""
    words = "".join(c if c.isprintable() else " " for c in text).split()
    return " ".join(words)[:LONGEST_TITLE]


def _reap() -> None:
    _workers[:] = [worker for worker in _workers if worker.poll() is None]
