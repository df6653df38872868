"""What visitors of a Space may reach, less than the owner of a computer: bundled files, and runs of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..context import App


def allowed_path(app: App, path: str) -> bool:
    """May this file be read for whoever asks? On a Space: only what comes with the program."""
    if not app.on_space:
        return True
    try:
        return Path(path).resolve().is_relative_to((app.root / "assets").resolve())
    except (OSError, ValueError):
        return False


def states_of(app: App, removed: bool = False) -> list[Any]:
    """The run history, newest first. On a Space there are runs of strangers in it: nobody sees it."""
    if app.jobs is None or app.on_space:
        return []
    return list(app.jobs.states(removed))


def how_to_work(app: App) -> dict[str, Any]:
    """Arguments that all scoring jobs take from the settings."""
    return {"device": app.device, "threads": app.threads or 1, "offline": app.offline}
