"""The methods as cards, of which one is chosen: a group of radio buttons, with what one must know to choose."""

from __future__ import annotations

from typing import Any

import gradio as gr

from merging.methods import METHODS, Method, get_method

from ..context import ROOT
from ..draft import Draft, active
from .cards import text
from .own import no_stub_file

TEMPLATE = '<div class="method-cards"></div>'

with no_stub_file():

    class MethodCards(gr.HTML):
        """Its value is the HTML of ``cards_of``. ``cards.choose(fn)``: ``event.method`` is the chosen one's name."""

        def __init__(self, value: str = "", **others: Any) -> None:
            script = (ROOT / "assets" / "method_cards.js").read_text("utf-8")
            super().__init__(
                value=value, html_template=TEMPLATE, js_on_load=script, apply_default_css=False, padding=False, **others
            )

        def get_block_name(self) -> str:
            return "html"


def cards_of(draft: Draft) -> str:
    """All methods, the draft's checked; and of each whether it could merge what is there."""
    data = active(draft)
    chosen, experts, base = data.get("method"), len(data["experts"]), data.get("base") is not None
    cards = (_card(name, get_method(name), name == chosen, misfit(name, experts, base)) for name in METHODS)
    return f'<div role="radiogroup" aria-label="Method" class="cards-grid">{"".join(cards)}</div>'


def misfit(name: str, experts: int, base: bool) -> str:
    """Why a method cannot merge that many experts with or without a base; "" if it can."""
    kind = get_method(name)
    least, most = kind.experts_range
    if kind.needs_base and not base:
        return "The recipe has no base yet."
    if experts < least or (most is not None and experts > most):
        there = "none yet" if not experts else f"{experts}"
        return f"The recipe has {there}; this takes {_how_many(kind)}."
    return ""


def cost(kind: type[Method]) -> str:
    """Arithmetic beside that of the others, and how often all inputs are read."""
    work = kind.nanoseconds * kind.passes
    word = "low" if work < 1.5 else "medium" if work < 12 else "high"
    return f"{word}, {kind.passes} pass{'es' if kind.passes > 1 else ''}"


def needs(kind: type[Method]) -> str:
    base = "a base" if kind.needs_base else "" if not kind.uses_base else "perhaps a base"
    return " and ".join(filter(None, [_how_many(kind), base]))


def yields(kind: type[Method]) -> str:
    if kind.experts_range[1] == 1 and not kind.needs_base:
        return "one model, of any depth"
    return "one model, by chance (see seed)" if kind.random else "one model"


def _how_many(kind: type[Method]) -> str:
    least, most = kind.experts_range
    if most is None:
        return f"{least} or more experts"
    return f"exactly {least} expert{'s' if least > 1 else ''}"


def _card(name: str, kind: type[Method], chosen: bool, problem: str) -> str:
    paper = kind.paper.removeprefix("https://").replace("arxiv.org/abs/", "arXiv ").replace("doi.org/", "doi ")
    link = f'<a href="{text(kind.paper)}" target="_blank" rel="noopener noreferrer">{text(paper)}</a>' if paper else ""
    misfit_ = f'<span class="misfit">{text(problem)}</span>' if problem else ""
    return (
        f'<div class="method-card{" chosen" if chosen else ""}"><label>'
        f'<input type="radio" name="merge-method" value="{text(name)}"{" checked" if chosen else ""}>'
        f"<b>{text(kind.title)}</b><span class='idea'>{text(kind.idea)}</span>"
        f"<span class='fact'>Takes {text(needs(kind))}</span><span class='fact'>Gives {text(yields(kind))}</span>"
        f"<span class='fact'>Cost {text(cost(kind))}</span>{misfit_}</label>{link}</div>"
    )
