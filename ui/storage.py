"""What this program keeps on the disk: how much of it there is, and how to be rid of what can be made again."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from merging.errors import InputError, OutputError
from merging.user_folders import cache_folder

PATIENCE = 3.0
"""Seconds to count for; then the rest is left out, and that is said."""


@dataclass(frozen=True)
class Use:
    bytes: int
    files: int
    complete: bool


def use_of(folder: Path, patience: float = PATIENCE) -> Use:
    """Size of all files below ``folder``; links are not followed, nor counted for what they point to."""
    until, size, files = time.monotonic() + patience, 0, 0
    for place, _, names in os.walk(folder, onerror=None, followlinks=False):
        for name in names:
            try:
                facts = os.lstat(os.path.join(place, name))
            except OSError:
                continue
            size, files = size + facts.st_size, files + 1
        if time.monotonic() > until:
            return Use(size, files, False)
    return Use(size, files, True)


def cache_root() -> Path:
    return cache_folder("any").parent.absolute()


def cache_parts() -> list[str]:
    """Names of the kinds of results that are kept."""
    try:
        return sorted(p.name for p in cache_root().iterdir() if p.is_dir() and not p.is_symlink())
    except OSError:
        return []


def purge(part: str) -> int:
    """Delete one kind of kept results; the bytes that were freed."""
    if part not in cache_parts():
        raise InputError("E_NOT_FOUND", f"Nothing is kept under {part[:40]!r} any more.", "", "Open the page again.")
    folder = cache_root() / part
    before = use_of(folder)
    try:
        shutil.rmtree(folder)
    except OSError as error:
        why = f"{error.strerror}: {error.filename}."
        raise OutputError("E_OUTPUT_WRITE", "Not everything could be deleted.", why, "Close what uses it.") from None
    return before.bytes
