"""Work in a child process of its own, without network.

The one idea: a model is somebody else's data, and loading it is a lot of somebody else's code. In a child it cannot
take the workbench down with it, its memory goes back to the system when it is done, and it can be stopped at once.

No network: the Hub client is told to stay offline, and an audit hook, which nothing in the process can remove, refuses
every connection, address look-up and packet that Python's sockets are asked for. That stops mistakes and anything
written in Python; machine code that calls the system by itself is not held by it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from merging.errors import AmalgamError, OutputError

_NETWORK = {
    *("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"),
    *("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"),
}
"""Audit events: what Python is asked to do with the network."""

Send = Callable[..., None]
"""``send(kind, *content)``: a message to the parent; content must be picklable."""


class Child:
    """A spawned process that runs ``work(send, *arguments)``; its messages are what ``messages`` yields.

    ``work`` must be a module's function. The main module of the program is imported again in the child, so a script
    that uses this needs the usual ``if __name__ == "__main__":``.

    Raises:
        OutputError: ``E_WORKER`` if it cannot be started.
    """

    def __init__(self, work: Callable[..., None], *arguments: Any, threads: int = 1):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_live, args=(work, arguments, theirs, os.getpid(), threads))
        try:
            self._process.start()
        except (OSError, AssertionError) as error:  # AssertionError: this process is itself a daemonic worker
            self._connection.close()
            reason = getattr(error, "strerror", None) or str(error)
            what = "A child process could not be started."
            raise OutputError("E_WORKER", what, f"{reason}.", "Close other programs and run it again.") from error
        finally:
            theirs.close()

    def messages(self, tick: float = 0.1) -> Iterator[tuple | None]:
        """Messages as they come, and None at least every ``tick`` seconds, so that the caller can look up.

        Ends when the work has ended. Raises the work's error (AmalgamError as it is, others as RuntimeError with their
        traceback), and OutputError ``E_WORKER`` if the process died.
        """
        while True:
            if not self._connection.poll(tick):
                yield None
                continue
            try:
                kind, *content = self._connection.recv()
            except EOFError:
                raise self._died() from None
            if kind == "error":
                raise content[0]
            if kind == "end":
                return
            yield (kind, *content)

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def close(self) -> None:
        """End the process now, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _died(self) -> OutputError:
        self._process.join(5)
        code = self._process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        why = "Usually the system ran out of memory and ended it." if code == -signal.SIGKILL else ""
        fix = "Run the same command again: what was finished is kept. Use a smaller --batch-size if it happens again."
        return OutputError("E_WORKER", f"The child process ended unexpectedly ({how}).", why, fix)


def _live(work: Callable[..., None], arguments: tuple, connection: Connection, parent: int, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    _end_with(parent)
    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(threads)  # before torch is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    no_network()

    def send(kind: str, *content: Any) -> None:
        connection.send((kind, *content))

    try:
        work(send, *arguments)
        send("end")
    except AmalgamError as error:
        send("error", error)
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):
            send("error", RuntimeError(f"in a child process:\n{text}"))
    finally:
        connection.close()


def no_network() -> None:
    """From now on this process has no network, for good. Sockets within the machine's file system stay usable."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    local = getattr(socket, "AF_UNIX", None)

    def refuse(event: str, details: tuple) -> None:
        if event in _NETWORK and (local is None or getattr(details[0], "family", None) != local):
            raise PermissionError(f"no network in this process: {event} {details!r}")

    sys.addaudithook(refuse)


def _end_with(parent: int) -> None:
    """End this process when its parent ends, however it ends."""
    from merging.workers import die_with

    if sys.platform == "linux":
        die_with(parent)
    else:  # no such service: look now and then
        import threading

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(0.5)
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
