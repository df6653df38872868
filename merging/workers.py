"""Workers: the same function on many items, on all cores, with progress and a way to stop.

On Linux workers are forked processes: blocks are small, and threads would spend more time handing Python's
interpreter lock to each other than computing (measured: two threads slower than one). A forked worker shares the
parent's memory and open files, takes items from a common counter, writes into the output by itself and sends back only
what the function returns. On other systems, on a GPU and for a single worker, threads or a plain loop do the same.

A worker dies with its parent, and the parent notices a worker that died.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any

from .errors import AmalgamError, Cancelled, OutputError

PULSE = 0.05
"""Seconds between two messages about progress from one worker."""

Told = Callable[[int, int], None]
"""``told(elements, bytes)``: progress."""
Work = Callable[[Any, Told], Any]
"""``work(item, told)``: one item's work, calling ``told`` after each block."""


def can_fork(device: str) -> bool:
    """Forking is safe and useful on Linux as long as no GPU is involved. (A daemonic process may have no children.)"""
    return sys.platform == "linux" and device == "cpu" and not multiprocessing.current_process().daemon


def spread(
    work: Work,
    items: Sequence[Any],
    count: int,
    fork: bool,
    told: Told,
    stop: threading.Event,
    finished: Callable[[Any, Any], None] = lambda item, result: None,
) -> list[Any]:
    """``work`` of each item on ``count`` workers; results in the order of the items.

    ``told`` gets the progress and ``finished(item, result)`` each result as it comes, both in the caller's process,
    ``finished`` in the caller's thread unless threads are used. Raises the first error of any worker, and Cancelled
    soon after ``stop`` is set; nothing runs any more when this returns or raises.
    """
    count = min(count, len(items))
    if count > 1 and fork:
        return _in_processes(work, items, count, told, stop, finished)

    def one(item: Any) -> Any:
        result = work(item, told)
        finished(item, result)
        return result

    return [one(item) for item in items] if count <= 1 else _in_threads(one, items, count, stop)


def _in_threads(one: Callable[[Any], Any], items: Sequence[Any], count: int, stop: threading.Event) -> list[Any]:
    failed = threading.Event()

    def guarded(item: Any) -> Any:
        if failed.is_set() or stop.is_set():
            raise Cancelled()
        try:
            return one(item)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(guarded, item) for item in items]
    errors = [error for future in futures if (error := future.exception())]
    if errors:  # those that only noticed the failure say Cancelled; the cause is another
        raise next((e for e in errors if not isinstance(e, Cancelled)), errors[0])
    return [future.result() for future in futures]


def _in_processes(
    work: Work,
    items: Sequence[Any],
    count: int,
    told: Told,
    stop: threading.Event,
    finished: Callable[[Any, Any], None],
) -> list[Any]:
    context = multiprocessing.get_context("fork")
    counter = context.Value("q", 0)
    channels: dict[Connection, Any] = {}
    results: list[Any] = [None] * len(items)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # "fork with threads": see can_fork and _worker
            for _ in range(count):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_worker, args=(work, items, counter, theirs, os.getpid()), daemon=True
                )
                try:
                    process.start()
                except OSError as error:
                    raise OutputError(
                        "E_WORKER", "A worker process could not be started.", f"{error.strerror}.",
                        "Use fewer --threads, or close other programs.") from error
                theirs.close()
                channels[ours] = process
        while channels:
            if stop.is_set():
                raise Cancelled()
            for channel in wait(list(channels), timeout=0.1):
                assert isinstance(channel, Connection)
                try:
                    kind, *content = channel.recv()
                except EOFError:
                    raise _died(channels[channel]) from None
                if kind == "progress":
                    told(*content)
                elif kind == "result":
                    results[content[0]] = content[1]
                    finished(items[content[0]], content[1])
                elif kind == "error":
                    raise content[0]
                else:
                    channels.pop(channel).join()
        return results
    finally:
        for process in channels.values():
            process.kill()
        for channel, process in channels.items():
            process.join()
            channel.close()


def _worker(work: Work, items: Sequence[Any], counter: Any, channel: Connection, parent: int) -> None:
    """The life of a forked worker. It touches no lock that another thread of the parent may have held."""
    die_with(parent)
    gc.freeze()  # looking through the parent's objects would copy their memory
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    elements = moved = 0
    last = time.monotonic()

    def told(more_elements: int, more_bytes: int) -> None:
        nonlocal elements, moved, last
        elements, moved = elements + more_elements, moved + more_bytes
        if time.monotonic() - last > PULSE:
            channel.send(("progress", elements, moved))
            elements, moved, last = 0, 0, time.monotonic()

    try:
        while True:
            with counter.get_lock():
                index = counter.value
                counter.value += 1
            if index >= len(items):
                break
            channel.send(("result", index, work(items[index], told)))
        channel.send(("progress", elements, moved))
        channel.send(("end",))
    except AmalgamError as error:
        channel.send(("error", error))
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):
            channel.send(("error", RuntimeError(f"in a worker process:\n{text}")))
    finally:
        channel.close()
        os._exit(0)  # no handlers of the parent's, no flushing of its buffers


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however it ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _died(process: Any) -> OutputError:
    process.join(1)
    code = process.exitcode
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return OutputError(
        "E_WORKER",
        f"A worker process ended unexpectedly ({how}).",
        "Usually the system ran out of memory and ended it." if code == -signal.SIGKILL else "",
        "Run the same command again; it goes on from there. If it happens again, use fewer --threads.",
    )
