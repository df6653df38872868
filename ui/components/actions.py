"""A list of things with buttons and fields in it, as HTML of our own: models to choose from, cards, findings.

Gradio's own components cannot be put into a list that grows and is sorted by the user without losing the focus. Here a
list is one text of HTML, and ``assets/actions.js`` tells which button was pressed, or what was typed into which field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..context import ROOT
from .cards import text
from .own import no_stub_file

HTML = '<div class="actions" tabindex="-1"></div>'


@dataclass(frozen=True, slots=True)
class Act:
    """What was done: ``act`` to ``of``, with ``value`` ("" for a button). It comes from the browser: check it."""

    act: str
    of: str
    value: Any


with no_stub_file():

    class ActionList(gr.HTML):
        """Its value is HTML in which everything from outside is escaped. ``actions.act(fn)``: see ``act_of``."""

        def __init__(self, value: str = "", *, label: str = "", **others: Any) -> None:
            super().__init__(
                value=value,
                label=label,
                html_template=HTML,
                js_on_load=(ROOT / "assets" / "actions.js").read_text("utf-8"),
                apply_default_css=False,
                padding=False,
                **others,
            )

        def get_block_name(self) -> str:
            return "html"

        def api_info(self) -> dict[str, Any]:
            return {"type": "string"}


def act_of(event: gr.EventData) -> Act:
    data = event._data if isinstance(event._data, dict) else {}
    value = data.get("value", "")
    value = value if isinstance(value, bool) else str(value)[:5000]
    return Act(str(data.get("act", ""))[:50], str(data.get("of", ""))[:5000], value)


def button(act: str, of: str, label: str, *, name: str = "", why_not: str = "", kind: str = "") -> str:
    """``name``: what it is called aloud, if the label says too little by itself; ``why_not``: why it is disabled."""
    spoken = f' aria-label="{text(name)}"' if name else ""
    off = f' disabled title="{text(why_not)}"' if why_not else ""
    return (
        f'<button type="button" class="small {text(kind)}" data-act="{text(act)}" data-of="{text(of)}" '
        f'data-key="{text(act)} {text(of)}"{spoken}{off}>{text(label)}</button>'
    )


def field(act: str, of: str, value: str, name: str, *, kind: str = "text", more: str = "") -> str:
    """A field of one line, called ``name``. ``more``: attributes that we wrote ourselves."""
    return (
        f'<input type="{kind}" data-act="{text(act)}" data-of="{text(of)}" data-key="{text(act)} {text(of)}" '
        f'value="{text(value)}" aria-label="{text(name)}" autocomplete="off" spellcheck="false" {more}>'
    )
