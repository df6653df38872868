"""The process that does a job: ``python -m merging.job_worker FOLDER LOCK``.

It is two processes. The first one is small: it holds the job's lock (the open file number LOCK, which it inherited,
locked, from whoever started it), waits for the job's turn, forks the second and looks after it. The second one does the
work. So a worker that is killed because memory ran out, that crashes in a library or that does not react to a stop
leaves somebody behind who ends what is left of it and writes down how it ended. Only if both are killed nobody does;
then the lock tells.

The first process imports little and is there within milliseconds; what the work needs is imported in the second.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from .checkpoints.disk import sign_lock, write_error
from .errors import AmalgamError, Cancelled, InputError, OutputError
from .job_files import JobWriter, ending_of, error_facts, read_job
from .job_queue import wait_for_turn
from .job_state import RESUME

PATIENCE = 1.3
"""Seconds that the work has to stop by itself."""
LOOK = 0.05

_asked = False


def main(arguments: list[str]) -> None:
    folder, lock = Path(arguments[0]), int(arguments[1])
    os.set_inheritable(lock, False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ask)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        sign_lock(lock, os.getpid())
        with wait_for_turn(folder.parent, folder.name, lambda: asked_to_stop(folder)) as mine:
            if mine:
                _look_after(folder)
            else:
                end_unless_ended(folder, Cancelled(fix=RESUME))
    except OSError as error:
        end_unless_ended(folder, write_error(error, folder))


def asked_to_stop(folder: Path) -> bool:
    return _asked or os.path.lexists(folder / "stop")


def _ask(_number: int, _frame: Any) -> None:
    global _asked
    _asked = True


# -- the first process --------------------------------------------------------------------------------------------


def _look_after(folder: Path) -> None:
    """Fork the process that works, and see to it that it ends, and how."""
    parent = os.getpid()
    try:
        child = os.fork()
    except OSError as error:
        why = f"{error.strerror}."
        end_unless_ended(folder, OutputError("E_WORKER", "The worker could not be started.", why, RESUME))
        return
    if child == 0:
        try:
            from .workers import die_with

            os.setpgid(0, 0)
            die_with(parent)
            _be_the_first_to_go()
            faulthandler.enable()
            os.chdir(read_job(folder).folder)
            work(folder)
        except OSError as error:
            end_unless_ended(folder, InputError("E_NOT_FOUND", f"{error.filename}: {error.strerror}."))
        except AmalgamError as error:
            end_unless_ended(folder, error)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(0)
    asked_at: float | None = None
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(LOOK)
        if asked_to_stop(folder) and asked_at is None:
            asked_at = time.monotonic()
            os.kill(child, signal.SIGTERM)
        if asked_at is not None and time.monotonic() - asked_at > PATIENCE:
            _kill_group(child)
    _kill_group(child)  # whatever it may have left behind
    _, status = os.waitpid(child, 0)
    end_unless_ended(folder, Cancelled(fix=RESUME) if asked_at is not None else _died(status))


def _kill_group(leader: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(leader, signal.SIGKILL)


def _died(status: int) -> OutputError:
    if not os.WIFSIGNALED(status):
        return OutputError("E_WORKER", f"The worker ended without a result (exit code {os.WEXITSTATUS(status)}).",
                           "See log.txt in the run's folder.", RESUME)  # fmt: skip
    number = os.WTERMSIG(status)
    reasons: dict[int, str] = {
        signal.SIGKILL: "Usually the system ran out of memory and ended it.",
        signal.SIGSEGV: "A library crashed; see log.txt in the run's folder.",
        signal.SIGBUS: "A library crashed; see log.txt in the run's folder.",
    }
    what, fix = f"The worker ended unexpectedly (signal {number}).", f"{RESUME} If it happens again, use fewer threads."
    return OutputError("E_WORKER", what, reasons.get(number, ""), fix)


def end_unless_ended(folder: Path, error: AmalgamError) -> None:
    """Write the last event, if the one who should have done it did not. If even that fails, the lock will tell."""
    if ending_of(folder) is None:
        try:
            with JobWriter(folder) as writer:
                writer.end(_ending(error))
        except AmalgamError as failure:
            print(failure, file=sys.stderr)


def _ending(error: AmalgamError) -> dict[str, Any]:
    status = "cancelled" if error.code == "E_CANCELLED" else "failed"
    return {"event": status, "error": error_facts(error)}


def _be_the_first_to_go() -> None:
    """Should the system run out of memory, let it end this process and not the user's other programs."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


# -- the second process -------------------------------------------------------------------------------------------


def work(folder: str | Path) -> None:
    """Do the job, in this process, and write down how it ended. Whoever calls it holds the job's lock."""
    folder, stop, over = Path(folder), threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(LOOK):
            if asked_to_stop(folder):
                stop.set()

    with JobWriter(folder) as writer:
        threading.Thread(target=watch, daemon=True).start()
        try:
            writer.event({"event": "started", "pid": os.getpid()})
            job = read_job(folder)
            from .job_kinds import KINDS  # takes a while: what the work needs

            result = KINDS[job.kind].run(job.arguments, folder, writer.tell, writer.event, stop)
            ending = {"event": "finished", "result": result}
        except BaseException as error:
            ending = _ending(Cancelled(fix=RESUME) if stop.is_set() else _typed(error, folder))
        finally:
            over.set()
        writer.end(ending)


def _typed(error: BaseException, folder: Path) -> AmalgamError:
    if isinstance(error, AmalgamError):
        return error
    traceback.print_exception(error)
    if isinstance(error, MemoryError):
        fix = "Use fewer threads, smaller models, or a machine with more memory."
        return OutputError("E_MEMORY", "The memory was not enough for this run.", "", fix)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return write_error(error, folder)
    first = str(error).strip().split("\n")[0][:300]
    what = f"The run ended with an error that nobody expected ({type(error).__name__}: {first})."
    fix = "Please report it, with log.txt from the run's folder."
    return OutputError("E_WORKER", what, "This is a mistake in the program, not in your input.", fix)


if __name__ == "__main__":
    main(sys.argv[1:])
