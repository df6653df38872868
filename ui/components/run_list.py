"""The list of runs as HTML with a box to tick per run. ``runs.choose(fn)``: ``event.runs`` are the ids of those that
are ticked."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..context import ROOT
from .own import no_stub_file

with no_stub_file():

    class RunList(gr.HTML):
        """Its value is HTML in which everything from outside is escaped."""

        def __init__(self, value: str = "", **others: Any) -> None:
            script = (ROOT / "assets" / "run_list.js").read_text("utf-8")
            super().__init__(value=value, js_on_load=script, padding=False, apply_default_css=False, **others)

        def get_block_name(self) -> str:
            return "html"

        def api_info(self) -> dict[str, Any]:
            return {"type": "string"}
