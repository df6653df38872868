"""A piece of HTML with buttons in it: ``<button data-pick="…">``. ``choices.pick(fn)``: ``event.pick`` says which."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .own import no_stub_file

SCRIPT = """element.addEventListener('click', event => {
  const button = event.target.closest('button[data-pick]');
  if (button && element.contains(button)) trigger('pick', { pick: button.dataset.pick });
});"""


with no_stub_file():

    class Choices(gr.HTML):
        """Its value is HTML in which everything from outside is escaped."""

        def __init__(self, value: str = "", **others: Any) -> None:
            super().__init__(value=value, js_on_load=SCRIPT, padding=False, apply_default_css=False, **others)

        def get_block_name(self) -> str:
            return "html"

        def api_info(self) -> dict[str, Any]:
            return {"type": "string"}
