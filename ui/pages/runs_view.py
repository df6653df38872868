"""The run history as a list, and one run in detail: pure functions from what the disk says to what the page shows."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.errors import AmalgamError
from merging.job_kinds import KINDS
from merging.job_state import JobState
from merging.jobs import Jobs
from merging.methods import METHODS, get_method

from ..components.cards import STATUS_WORDS, duration, size, text
from ..scored import Summary, records_of, summary

ANY_KIND = "all kinds"
SORTS = ("newest first", "best mean retention", "best least retention", "smallest", "fastest", "name")
MOST_CHOSEN = 4
MOST_LINES = 200
BUDGET = 0.6
"""Seconds for looking at scores that are not known yet, per look at the list."""
MARKS = {"finished": "✓", "failed": "✗", "cancelled": "◼", "running": "▶", "waiting": "…"}


@dataclass(frozen=True)
class Line:
    """One run. ``scored_in``: the run whose records its scores come from; ``pending``: they are not known yet."""

    state: JobState
    arguments: Mapping[str, Any]
    kept: Summary | None = None
    scored_in: str = ""
    pending: bool = False

    @property
    def kind(self) -> str:
        return KINDS[self.state.kind].title if self.state.kind in KINDS else self.state.kind or "damaged"

    @property
    def name(self) -> str:
        return self.state.title or self.kind

    @property
    def method(self) -> str:
        method = str(recipe_data(self.arguments).get("method", ""))
        return get_method(method).title if method in METHODS else method

    @property
    def experts(self) -> list[str]:
        """Names of the merged models, or of those that were scored."""
        data = recipe_data(self.arguments)
        if data:
            return [_name_of(expert) for expert in data.get("experts", [])]
        named = self.arguments.get("models") or self.arguments.get("experts") or []
        return [_name_of(one[0] if isinstance(one, list) and one else one) for one in named]

    @property
    def bytes(self) -> int | None:
        found = (self.state.result or {}).get("bytes")
        return found if isinstance(found, int) else None

    @property
    def seconds(self) -> float | None:
        if self.state.started is None:
            return None
        return (self.state.ended or time.time()) - self.state.started

    def holds(self, words: str) -> bool:
        """Are all of these words somewhere in it?"""
        error = self.state.error or {}
        parts = [
            self.name, self.kind, self.method, *self.experts, *self.state.tags, self.state.note, self.state.status,
            STATUS_WORDS[self.state.status], self.state.id, error.get("code", ""), error.get("what", ""),
        ]  # fmt: skip
        everything = "\n".join(parts).lower()
        return all(word in everything for word in words.lower().split())


def recipe_data(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    data = arguments.get("recipe")
    return data if isinstance(data, Mapping) else {}


def _name_of(model: Any) -> str:
    if isinstance(model, Mapping):
        model = model.get("name") or model.get("adapter") or model.get("model")
    last = str(model).rstrip("/").rpartition("/")[2] or str(model)
    return last if len(last) <= 40 else f"{last[:39]}…"


# -- the list -------------------------------------------------------------------------------------------


def lines_of(jobs: Jobs, states: Sequence[JobState]) -> list[Line]:
    """All runs with their scores: their own, else those that another run has given to their model."""
    known = {state.id: arguments_of(jobs, state.id) for state in states}
    scored = scored_models(states, known)
    lines, until = [], time.monotonic() + BUDGET
    for state in states:
        place = where_scored(state, known[state.id], scored)
        if place is None:
            lines.append(Line(state, known[state.id]))
            continue
        run, model = place
        kept, pending = _kept(jobs.path / run, model, until)
        lines.append(Line(state, known[state.id], kept, run if run != state.id else "", pending))
    return lines


def arguments_of(jobs: Jobs, id: str) -> Mapping[str, Any]:
    try:
        return jobs.arguments(id)
    except AmalgamError:
        return {}


def scored_models(
    states: Iterable[JobState], arguments: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[str, str]]:  # fmt: skip
    """Folder of a model -> (the newest run that scored it, its name there)."""
    found: dict[str, tuple[str, str]] = {}
    for state in states:
        if state.status != "finished" or not (state.result or {}).get("records"):
            continue
        asked = arguments.get(state.id, {})
        for one in [*asked.get("models", []), *asked.get("candidates", [])]:
            if isinstance(one, list) and len(one) >= 2:
                found.setdefault(str(one[1]), (state.id, str(one[0])))
    return found


def where_scored(
    state: JobState, arguments: Mapping[str, Any], scored: Mapping[str, tuple[str, str]]
) -> tuple[str, str] | None:
    """(run, name of the model in its records): for a merge its own model, else the best of the run ("")."""
    result = state.result or {}
    elsewhere = scored.get(str(result.get("model"))) if state.kind == "merge" else None
    if result.get("records"):
        own = str(result.get("name", ""))
        alone = state.kind == "merge" and not arguments.get("models")
        return elsewhere if alone and elsewhere else (state.id, own)  # alone: nothing to measure retention against
    return elsewhere


_known: dict[tuple[Any, ...], Summary | None] = {}


def _kept(folder: Path, model: str, until: float) -> tuple[Summary | None, bool]:
    """The summary, and whether it has to wait for the next look."""
    place = records_of(folder)
    if place is None:
        return None, False
    who = folder / "who.json"
    key = folder, model, place.stat().st_mtime_ns, who.stat().st_mtime_ns if who.exists() else 0
    if key not in _known:
        if time.monotonic() > until:
            return None, True
        if len(_known) > 2000:
            _known.clear()
        _known[key] = summary(folder, model)
    return _known[key], False


def kinds_of(lines: Iterable[Line]) -> list[str]:
    return [ANY_KIND, *dict.fromkeys(line.kind for line in lines)]


def found_lines(lines: Sequence[Line], words: str, kind: str, order: str) -> list[Line]:
    """Those that are searched for, sorted."""
    chosen = [line for line in lines if (kind == ANY_KIND or line.kind == kind) and line.holds(words)]
    keys: dict[str, Any] = {
        "best mean retention": lambda line: -(line.kept.mean if line.kept else -1),
        "best least retention": lambda line: -(line.kept.least if line.kept else -1),
        "smallest": lambda line: line.bytes if line.bytes is not None else float("inf"),
        "fastest": lambda line: line.seconds if line.seconds is not None else float("inf"),
        "name": lambda line: line.name.lower(),
    }
    return sorted(chosen, key=keys[order]) if order in keys else chosen


def list_html(lines: Sequence[Line], chosen: Sequence[str], total: int, removed: bool) -> str:
    """The table, with a box to tick per run."""
    if not lines:
        if total:
            return '<p class="reading">No run fits. Search for less, or choose all kinds.</p>'
        if removed:
            return '<p class="reading">No run was removed.</p>'
        return (
            '<p class="reading">Nothing was run yet. Merges, evaluations and analyses will stand here, also those that '
            "fail, with what is needed to repeat them.</p>"
        )
    heads = ("", "Name", "Method", "Models", "Kept: mean", "least", "Size", "Time", "Status", "When")
    numbers = (4, 5, 6, 7)
    head = "".join(
        f'<th scope="col"{" class=number" if i in numbers else ""}>{title or "<span class=sr>Choose</span>"}</th>'
        for i, title in enumerate(heads)
    )
    body = "".join(_row(line, line.state.id in chosen) for line in lines[:MOST_LINES])
    more = len(lines) - MOST_LINES
    note = f'<p class="reading">{more} older ones are not shown: search for them.</p>' if more > 0 else ""
    return (
        '<div class="text-table runs" role="region" aria-label="Runs" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}"
    )


def _row(line: Line, chosen: bool) -> str:
    state, name = line.state, text(line.name)
    tags = "".join(f' <span class="chip">{text(tag)}</span>' for tag in state.tags)
    experts = line.experts
    shown = ", ".join(experts[:4]) + (f" and {len(experts) - 4} more" if len(experts) > 4 else "")
    mean, least = ("…", "…") if line.pending else ("–", "–")
    if line.kept is not None:
        several = state.kind != "merge" and line.kept.of > 1
        best = f"best of {line.kept.of}: {line.kept.model}" if several else ""
        split = f"on {line.kept.split} items" if line.kept.split else ""
        words = "; ".join(filter(None, (best, split, "scored in another run" if line.scored_in else "")))
        mark = f"<br><small>{text(words)}</small>" if words else ""
        mean = f"{line.kept.mean:.0%}{mark}"
        least = f"{line.kept.least:.0%}<br><small>{text(line.kept.worst)}</small>"
    status = f'<span class="run-status {state.status}">{MARKS[state.status]} {STATUS_WORDS[state.status]}</span>'
    if state.status == "running" and state.progress is not None and state.progress.share is not None:
        status += f" {state.progress.share:.0%}"
    if state.error and state.status == "failed":
        status += f"<br><small>{text(state.error.get('what', ''))}</small>"
    seconds = line.seconds
    cells = [
        f'<th scope="row">{name}{tags}<br><small>{text(line.kind)}</small></th>', f"<td>{text(line.method)}</td>",
        f"<td>{text(shown)}</td>", f'<td class="number">{mean}</td>', f'<td class="number">{least}</td>',
        f'<td class="number">{size(line.bytes) if line.bytes is not None else "–"}</td>',
        f'<td class="number">{duration(seconds) if seconds is not None else "–"}</td>', f"<td>{status}</td>",
        f"<td>{text(when(state.created))}</td>",
    ]  # fmt: skip
    box = (
        f'<td><input type="checkbox" data-run="{text(state.id)}" aria-label="Choose {name}"'
        f"{' checked' if chosen else ''}></td>"
    )
    return f'<tr class="{"chosen" if chosen else ""}">{box}{"".join(cells)}</tr>'


def when(seconds: float) -> str:
    """Today only the time, else the day too."""
    then, now = time.localtime(seconds), time.localtime()
    if then[:3] == now[:3]:
        return time.strftime("%H:%M", then)
    return time.strftime("%-d %b %H:%M" if then[0] == now[0] else "%-d %b %Y", then)
