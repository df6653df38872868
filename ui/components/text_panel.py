"""The recipe as text: it follows the draft, and what is typed is checked at once but used only when it is applied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from merging.errors import RecipeError

from ..draft import Draft, from_yaml, read_text, yaml_of
from . import cards

if TYPE_CHECKING:
    from ..shell import Shell


class TextPanel:
    def __init__(self) -> None:
        gr.Markdown("### Recipe as text")
        self.yaml = gr.Code(language="yaml", label="Recipe (YAML)", interactive=True, elem_id="yaml", lines=18)
        self.yaml_state = gr.HTML(elem_id="yaml-state", padding=False)
        with gr.Row(elem_classes="tight"):
            self.apply_yaml = gr.Button("Apply", size="sm", variant="primary", elem_id="yaml-apply", min_width=60)
            self.reset_yaml = gr.Button("Discard my text", size="sm", elem_id="yaml-reset", min_width=60)
        self.typed = gr.State("")
        """What was typed and not applied yet."""

    def connect(self, shell: Shell) -> None:
        def shown(draft: Draft, typed: str) -> Any:
            if typed and typed.strip() != yaml_of(draft).strip():
                note = "The recipe was changed elsewhere. Your text is kept: apply it, or discard it."
                return gr.skip(), cards.message("note", note)
            return yaml_of(draft), ""

        def check(text: str, draft: Draft) -> Any:
            if text.strip() == yaml_of(draft).strip():
                return "", ""
            try:
                from_yaml(text, draft)
            except RecipeError as error:
                return text, cards.error_message(error)
            return text, cards.message("note", "This text is a valid recipe. Apply it to use it.")

        def apply(draft: Draft, text: str) -> Any:
            new, notes = read_text(text, draft)
            return new, "", "", "".join(cards.message("note", note) for note in notes)

        def reset(draft: Draft) -> Any:
            return yaml_of(draft), "", ""

        shell.on_draft(shown, [self.yaml, self.yaml_state], [self.typed])
        shell.act(
            self.yaml.input, check, [self.yaml, shell.draft], [self.typed, self.yaml_state], trigger_mode="always_last"
        )
        shell.edit(self.apply_yaml.click, apply, [self.yaml], [self.typed, self.yaml_state, shell.message])
        shell.act(self.reset_yaml.click, reset, [shell.draft], [self.yaml, self.typed, self.yaml_state])
