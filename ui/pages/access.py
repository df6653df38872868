"""What visitors of a Space may reach, less than the owner of a computer: bundled files, and runs of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merging.errors import AmalgamError
from merging.jobs import JobState

from ..context import App


def allowed_path(app: App, path: str) -> bool:
    """May this file be read for whoever asks? On a Space: only what comes with the program."""
    if not app.on_space:
        return True
    try:
        return Path(path).resolve().is_relative_to((app.root / "assets").resolve())
    except (OSError, ValueError):
        return False


def states_of(app: App, mine: Any, removed: bool = False) -> list[JobState]:
    """The run history, newest first. On a Space only ``mine``, the ids that the visitor's browser knows."""
    if not app.on_space:
        return app.jobs.states(removed)
    found = [state for id in (mine if isinstance(mine, list) else []) if (state := state_of(app, id)) is not None]
    found = [state for state in found if (state.removed is not None) == removed]
    return sorted(found, key=lambda state: (state.created, state.id), reverse=True)


def state_of(app: App, id: Any) -> JobState | None:
    """None if there is no such run any more."""
    try:
        return app.jobs.state(id) if isinstance(id, str) and id else None
    except AmalgamError:
        return None


def how_to_work(app: App) -> dict[str, Any]:
    """Arguments that all scoring jobs take from the settings."""
    return {"device": app.device, "threads": app.threads or 1, "offline": app.offline}
