"""Standard output that may go away.

When the reader of a pipe leaves, or the disk of a log file is full, the talking ends and not the work: a merge of hours
goes on. A lost result is told by the exit code.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Output:
    """A text stream that is written to as long as that is possible."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.error: OSError | None = None
        """Why nothing is written any more."""

    def write(self, text: str) -> int:
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, action: Any) -> None:
        try:
            action()
        except OSError as error:
            self.error = error
            with contextlib.suppress(OSError, ValueError):  # what is still buffered must go somewhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def patient_output() -> Iterator[Output]:
    """Within it, ``sys.stdout`` and ``sys.stderr`` raise no errors of the system; gives standard output."""
    before = sys.stdout, sys.stderr
    out, err = Output(sys.stdout), Output(sys.stderr)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
        out.flush()
    finally:
        sys.stdout, sys.stderr = before
