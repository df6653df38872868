"""The terminal, through rich: one place for its settings."""

from __future__ import annotations

from rich.console import Console


def stdout() -> Console:
    """For results. Wide enough for a table when the output goes into a file."""
    console = Console(soft_wrap=False)
    return console if console.is_terminal else Console(width=140)


def stderr() -> Console:
    """For progress and errors."""
    return Console(stderr=True)
