"""What is known already, what is being computed, and what is still to come."""

from __future__ import annotations

from typing import Any

from merging.analysis.inspection import Inspection

from ..components.cards import text
from ..context import App
from .access import states_of
from .analyse_state import WORDS, wanted_parts

MOST_MERGES = 20


def status_html(question: str, found: Inspection | None, running: Any) -> tuple[str, str, bool]:
    """(the parts as HTML, words beside the button, whether it may be pressed). ``running``: the state of the job that
    answers this question, if it is the one in the sidebar."""
    wanted = wanted_parts(question)
    known = set(found.parts) if found else set()
    missing = [part for part in wanted if part not in known]
    alive = running is not None and running.alive
    doing = (running.progress.doing.split(" ")[0] if running.progress else "") if alive else ""
    chips = "".join(_chip(part, part in known, part == doing) for part in wanted)
    parts = f'<p class="parts" role="status"><span class="quiet">Parts:</span> {chips}</p>' if found or alive else ""
    if alive:
        word = "It waits for its turn" if running.status == "waiting" else "It is running"
        return parts, f"{word}: see the sidebar, where Stop is too. Each part is shown as soon as it is there.", False
    if not missing:
        return parts, "Everything is computed; this is what was kept.", False
    if running is not None and running.status == "failed" and running.error:
        return parts, f"It failed: {running.error.get('what', '')} {running.error.get('fix', '')}", True
    if known:
        return parts, f"Still missing: {', '.join(WORDS[part] for part in missing)}. It goes on where it stopped.", True
    return parts, "Reads all weights once; results are kept, and a second look is instant.", True


def _chip(part: str, known: bool, doing: bool) -> str:
    mark, word = ("✓", "known") if known else ("…", "being computed") if doing else ("○", "not yet")
    state = "known" if known else "doing" if doing else "missing"
    return f'<span class="chip part {state}"><span aria-hidden="true">{mark}</span> {text(WORDS[part])}' \
           f'<span class="sr"> ({word})</span></span>'  # fmt: skip


def merged_models(app: App) -> list[tuple[str, str]]:
    """Merges that were made here, newest first: (title, folder)."""
    found: list[tuple[str, str]] = [("none", "")]
    for state in states_of(app, []):
        model = (state.result or {}).get("model") if state.kind == "merge" and state.status == "finished" else None
        if model and len(found) <= MOST_MERGES:
            found.append((f"{state.title or state.id} ({state.id})", str(model)))
    return found
