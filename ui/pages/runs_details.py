"""One run in detail: how it ended, where it lies, what happened, and its recipe: pure functions."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merging.errors import AmalgamError
from merging.recipe import Recipe
from merging.recipe_yaml import to_yaml

from ..components.cards import STATUS_WORDS, duration, progress_words, size, text
from ..components.text_table import table
from .runs_view import Line, recipe_data


def details_html(line: Line, folder: Path) -> str:
    """What it was, how it ended, and where it lies."""
    state, result = line.state, line.state.result or {}
    rows: list[tuple[str, str]] = [("Kind", text(line.kind)), ("Status", text(STATUS_WORDS[state.status]))]
    if line.method:
        rows.append(("Method", text(line.method)))
    if line.experts:
        rows.append(("Models", text(", ".join(line.experts))))
    rows.append(("Started", text(time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.created)))))
    if line.seconds is not None:
        rows.append(("Time", duration(line.seconds)))
    if line.kept is not None:
        rows.append((f"Retention of {text(line.kept.model)}", f"mean {line.kept.mean:.1%}, least {line.kept.least:.1%} "
                     f"({text(line.kept.worst)})"))  # fmt: skip
    if result.get("model"):
        there = os.path.isdir(str(result["model"]))
        rows.append(("Model", text(result["model"]) + ("" if there else " (no longer there)")))
    if line.bytes is not None:
        rows.append(("Size", size(line.bytes)))
    rows.append(("Folder", text(folder)))
    rows.append(("Run", f"<code>{text(state.id)}</code>"))
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    parts = [f"<dl>{items}</dl>"]
    if state.status == "running" and state.progress is not None:
        parts.append(f"<p>{text(state.progress.doing)} · {progress_words(state.progress)}</p>")
    if state.error:
        said = "".join(f"<p>{text(state.error[key])}</p>" for key in ("what", "why", "fix") if state.error.get(key))
        parts.append(f'<div class="message problem">{said}<p class="code">{text(state.error["code"])}</p></div>')
    for warning in result.get("warnings") or ():
        parts.append(f'<p class="reading">Warning: {text(warning)}</p>')
    for failure in result.get("failures") or ():
        place = " on ".join(filter(None, (failure.get("model"), failure.get("task"))))
        parts.append(f'<p class="state problem">{text(place)} was not scored: {text(failure.get("what", ""))}</p>')
    if state.note:
        parts.append(f'<p class="note">{text(state.note)}</p>')
    return f'<section class="card" aria-label="Run">{"".join(parts)}</section>'


def events_html(events: Sequence[Mapping[str, Any]], log: str = "") -> str:
    """What happened, the newest last, and the end of what the libraries printed."""
    rows = []
    for event in events[-200:]:
        facts = {k: v for k, v in event.items() if k not in ("event", "time", "result", "error")}
        said = "; ".join(f"{k} {_brief(v)}" for k, v in facts.items())
        rows.append([time.strftime("%H:%M:%S", time.localtime(event["time"])), event["event"], said])
    shown = table(["Time", "Event", "Facts"], rows)
    tail = f'<p class="reading">The end of log.txt:</p><pre class="log">{text(log)}</pre>' if log.strip() else ""
    return f'<details class="numbers"><summary>What happened ({len(events)} events)</summary>{shown}{tail}</details>'


def _brief(value: Any) -> str:
    said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return said if len(said) <= 160 else f"{said[:159]}…"


def log_tail(folder: Path, most: int = 4000) -> str:
    try:
        with open(folder / "log.txt", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - most))
            return file.read(most).decode("utf-8", "replace")
    except OSError:
        return ""


def recipe_text(arguments: Mapping[str, Any]) -> str:
    """The recipe of a merge as YAML; of other runs ""."""
    data = recipe_data(arguments)
    if not data:
        return ""
    try:
        return to_yaml(Recipe.parse(data))
    except AmalgamError:
        return json.dumps(data, indent=2, ensure_ascii=False)


def as_json(line: Line) -> str:
    """Everything about a run but its files."""
    state = line.state
    facts = {
        "amalgam_exported_run": 1, "id": state.id, "kind": state.kind, "title": state.title, "status": state.status,
        "created": state.created, "started": state.started, "ended": state.ended, "tags": state.tags,
        "note": state.note, "arguments": line.arguments, "result": state.result, "error": state.error,
    }  # fmt: skip
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


def repeated(line: Line) -> tuple[str, dict[str, Any], str]:
    """(kind, arguments, title) of the same once more. A merge that was written to a place of its own goes into the
    run's folder: its place is taken."""
    arguments = {key: value for key, value in line.arguments.items() if key != "out"}
    title = line.state.title
    return line.state.kind, arguments, title if title.endswith("(again)") or not title else f"{title} (again)"
