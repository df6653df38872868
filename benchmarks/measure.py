"""Time, processor time and memory of a child process with all its descendants (Linux).

Wall and processor time are the kernel's own accounts. Memory is sampled from ``/proc`` every 50 ms, summed
over the process tree, in two kinds: *resident* counts also pages of mapped files, *anonymous* only what
the process itself needs and what cannot be dropped.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_EVERY = 0.05


@dataclass(frozen=True)
class Measurement:
    """Seconds and bytes. ``elsewhere``: processor seconds that other processes used meanwhile."""

    wall: float
    cpu: float
    resident: int
    anonymous: int
    elsewhere: float
    exit_code: int
    output: str
    """What it printed last, of both streams."""


def measure(
    command: Sequence[str | Path],
    environment: Mapping[str, str],
    folder: Path,
    log: Path,
    limit: float = 3600,
) -> Measurement:
    """Runs ``command`` in ``folder`` and watches it; after ``limit`` seconds it is killed."""
    resident = anonymous = 0
    busy = _busy_seconds()
    own = time.process_time()
    with open(log, "wb") as output:
        started = time.monotonic()
        child = subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdout=output, stderr=output, start_new_session=True
        )
        ended = os.pidfd_open(child.pid)
        try:
            while not select.select([ended], [], [], SAMPLE_EVERY)[0]:
                sample = [_memory(process) for process in _tree(child.pid)]
                resident = max(resident, sum(rss for rss, _ in sample))
                anonymous = max(anonymous, sum(anon for _, anon in sample))
                if time.monotonic() - started > limit:
                    os.killpg(child.pid, signal.SIGKILL)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        finally:
            os.close(ended)
        wall = time.monotonic() - started
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)  # it is reaped: Popen must not wait for it again
    cpu = usage.ru_utime + usage.ru_stime
    elsewhere = max(0.0, _busy_seconds() - busy - cpu - (time.process_time() - own))
    text = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    return Measurement(wall, cpu, resident, anonymous, elsewhere, child.returncode, text)


def _tree(process: int) -> list[int]:
    """The process and its living descendants."""
    found, waiting = [], [process]
    while waiting:
        process = waiting.pop()
        found.append(process)
        try:
            for task in os.listdir(f"/proc/{process}/task"):
                with open(f"/proc/{process}/task/{task}/children") as file:
                    waiting += map(int, file.read().split())
        except OSError:  # it ended meanwhile
            continue
    return found


def _memory(process: int) -> tuple[int, int]:
    """Resident and anonymous bytes now. Pages that several processes of a tree share count once in their sum
    (the kernel's proportional set size)."""
    try:
        with open(f"/proc/{process}/smaps_rollup") as file:
            fields = dict(line.split(":", 1) for line in file if line.startswith(("Pss:", "Pss_Anon:")))
    except OSError:
        return 0, 0
    return (
        int(fields.get("Pss", "0 kB").split()[0]) * 1024,
        int(fields.get("Pss_Anon", "0 kB").split()[0]) * 1024,
    )


def _busy_seconds() -> float:
    """Processor seconds of everybody since the machine started, stolen ones included."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _waiting, *others = (int(ticks) for ticks in file.readline().split()[1:9])
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")
