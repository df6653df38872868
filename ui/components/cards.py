"""The cards of the sidebar and the messages, as HTML. Every text that came from outside is escaped here."""

from __future__ import annotations

import html
from typing import Any

from merging.errors import AmalgamError
from merging.methods import METHODS, get_method

from ..draft import Draft, active, is_on, label_of, problem_of
from ..machine import Machine

STATUS_WORDS = {
    "waiting": "Waiting",
    "running": "Running",
    "finished": "Finished",
    "failed": "Failed",
    "cancelled": "Stopped",
}


def text(value: Any) -> str:
    """Any value as HTML that shows it and does nothing."""
    return html.escape(str(value), quote=True)


def message(kind: str, what: str, why: str = "", fix: str = "", code: str = "") -> str:
    """A line for the message panel. ``kind``: "ok", "note" or "problem"."""
    label = {"ok": "Done", "note": "Note", "problem": "Problem"}[kind]
    more = "".join(f"<p>{text(part)}</p>" for part in (why, fix) if part)
    tag = f' <span class="code">{text(code)}</span>' if code else ""
    role = "alert" if kind == "problem" else "status"
    return f'<div class="message {kind}" role="{role}"><p><b>{label}:</b> {text(what)}{tag}</p>{more}</div>'


def error_message(error: AmalgamError) -> str:
    return message("problem", error.what, error.why, error.fix, error.code)


def recipe_card(draft: Draft) -> str:
    """Base, experts, method and weights, and whether this can be run."""
    recipe = draft["recipe"]
    base = _short(_model(recipe.get("base")))
    chips = "".join(_chip(draft, expert) for expert in recipe["experts"])
    count = len(active(draft)["experts"])
    method = recipe.get("method")
    title = get_method(method).title if method in METHODS else "none yet"
    settings = ", ".join(f"{text(k)} {_value(v)}" for k, v in recipe.get("parameters", {}).items())
    problem = problem_of(draft)
    ready = (
        f'<p class="state problem">{text(problem.what)}</p>' if problem else '<p class="state ok">Ready to merge</p>'
    )
    return (
        '<section class="card" aria-label="Recipe"><dl>'
        f"<dt>Base</dt><dd title='{text(_model(recipe.get('base')))}'>{text(base) or 'none yet'}</dd>"
        f"<dt>Experts ({count})</dt><dd class='chips'>{chips or 'none yet'}</dd>"
        f"<dt>Method</dt><dd>{text(title)}{f'<br><small>{settings}</small>' if settings else ''}</dd></dl>"
        f"{ready}</section>"
    )


def machine_card(facts: Machine, offline: bool) -> str:
    rows = [
        ("Device", f"{text(facts.device)}, {facts.cores} cores"),
        ("Memory free", _of(facts.memory_free, facts.memory_total)),
    ]
    if facts.video_total:
        rows.append(("GPU memory free", _of(facts.video_free, facts.video_total)))
    rows += [("Disk free", size(facts.disk_free)), ("Network", "offline" if offline else "only when asked")]
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return f'<section class="card quiet" aria-label="This machine"><dl>{items}</dl></section>'


def job_card(state: Any, others: int = 0) -> str:
    """A job: what it does, how far it is, and how it ended. ``state``: merging.jobs.JobState, or None."""
    if state is None:
        return '<section class="card quiet" aria-label="Job"><p>Nothing is running.</p></section>'
    word = STATUS_WORDS[state.status]
    parts = [f'<p class="job-title"><b>{text(state.title or state.kind)}</b> <span class="badge">{word}</span></p>']
    progress = state.progress
    if state.status == "running" and progress is not None:
        share = min(1.0, progress.done / progress.total) if progress.total else 0.0
        parts.append(
            f'<progress max="1" value="{share:.4f}" aria-label="Progress of {text(state.title or state.kind)}">'
            f"{share:.0%}</progress><p>{text(progress.doing)}</p><p>{progress_words(progress)}</p>"
        )
    elif state.status == "running":
        parts.append('<progress aria-label="Starting"></progress><p>Starting</p>')
    elif state.status == "waiting":
        parts.append("<p>It starts when the job before it has ended.</p>")
    if state.error:
        lines = [state.error.get(key, "") for key in ("what", "why", "fix")]
        parts.append("".join(f"<p>{text(line)}</p>" for line in lines if line))
    if others:
        parts.append(f"<p>{others} more on the Runs page.</p>")
    return f'<section class="card job {state.status}" aria-label="Job">{"".join(parts)}</section>'


def progress_words(progress: Any) -> str:
    """ "3.1 of 6.4 MB · 12.0 MB/s · 2 s left"."""
    in_bytes = progress.unit == "bytes"
    words = [
        f"{size(progress.done)} of {size(progress.total)}"
        if in_bytes
        else f"{progress.done:,} of {progress.total:,} {text(progress.unit)}"
    ]
    if progress.rate:
        words.append(f"{size(progress.rate)}/s" if in_bytes else f"{progress.rate:.3g} {text(progress.unit)}/s")
    if progress.seconds_left is not None:
        words.append(f"{duration(progress.seconds_left)} left")
    return " · ".join(words)


def size(count: float | None) -> str:
    if count is None:
        return "unknown"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _of(free: int | None, total: int | None) -> str:
    return size(free) + (f" of {size(total)}" if total else "")


def _model(model: Any) -> str:
    if isinstance(model, dict):
        return label_of({**model, "name": None})
    return model or ""


def _short(reference: str) -> str:
    """The last two parts of a path or name."""
    parts = reference.replace("\\", "/").rstrip("/").split("/")
    return reference if len(parts) <= 2 else "…/" + "/".join(parts[-2:])


def _chip(draft: Draft, expert: dict[str, Any]) -> str:
    name = label_of(expert)
    shown = expert.get("name") or _short(name)
    weight = expert.get("parameters", {}).get("weight")
    value = f" <i>{_value(weight)}</i>" if weight is not None else ""
    off = "" if is_on(draft, name) else " off"
    note = "" if is_on(draft, name) else " (sits out)"
    return f'<span class="chip{off}" title="{text(name)}{note}">{text(shown)}{value}</span>'


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "by layer"
    return text(f"{value:g}" if isinstance(value, float) else value)
