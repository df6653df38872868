"""The terminal, through rich: one place for its settings."""

from __future__ import annotations

import os
import sys

from rich import console as rich_console


class Console(rich_console.Console):
    """Rich's, but for one thing: when the reader of our output goes away, only the output ends."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if self.stderr else sys.stdout).fileno())


def stdout() -> Console:
    """For results. Wide enough for a table when the output goes into a file."""
    console = Console(soft_wrap=False)
    return console if console.is_terminal else Console(width=140)


def stderr() -> Console:
    """For progress and errors."""
    return Console(stderr=True)
