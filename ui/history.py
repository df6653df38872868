"""Undo and redo: the drafts before this one and after it, as texts in two stacks. Plain data, and never changed.

A slider that is dragged makes many small edits. Edits by the same control within a second are one step.
"""

from __future__ import annotations

import json
from typing import Any

from .draft import Draft

History = dict[str, Any]
"""``past`` and ``future`` (drafts as JSON texts, the nearest last), ``by`` and ``at`` (who edited last, and when)."""

STEPS, PAUSE = 100, 1.0


def start() -> History:
    return {"past": [], "future": [], "by": "", "at": 0.0}


def push(history: History, before: Draft, by: str, now: float) -> History:
    """Remember the draft ``before`` an edit by the control ``by`` at time ``now`` (seconds)."""
    same = by and by == history["by"] and now - history["at"] < PAUSE and history["past"] and not history["future"]
    past = history["past"] if same else [*history["past"], json.dumps(before)][-STEPS:]
    return {"past": past, "future": [], "by": by, "at": now}


def undo(history: History, current: Draft) -> tuple[History, Draft] | None:
    """The draft before this one; None if there is none."""
    if not history["past"]:
        return None
    past, future = history["past"][:-1], [*history["future"], json.dumps(current)]
    return {"past": past, "future": future, "by": "", "at": 0.0}, json.loads(history["past"][-1])


def redo(history: History, current: Draft) -> tuple[History, Draft] | None:
    """The draft that was undone last; None if nothing was."""
    if not history["future"]:
        return None
    past, future = [*history["past"], json.dumps(current)], history["future"][:-1]
    return {"past": past, "future": future, "by": "", "at": 0.0}, json.loads(history["future"][-1])
