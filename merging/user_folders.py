"""Where this user's files lie that are not asked for by name."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(part: str) -> Path:
    """Folder of one kind of kept results, which may be deleted at any time: below ``AMALGAM_CACHE`` if that is set,
    else below the usual place for caches of this user."""
    chosen = os.environ.get("AMALGAM_CACHE") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/amalgam"
    return Path(chosen).expanduser() / part


def data_folder() -> Path:
    """Folder of what this user made and wants to keep: ``AMALGAM_DATA`` if that is set, else the usual place."""
    chosen = os.environ.get("AMALGAM_DATA") or f"{os.environ.get('XDG_DATA_HOME') or '~/.local/share'}/amalgam"
    return Path(chosen).expanduser()
