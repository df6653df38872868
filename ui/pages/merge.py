"""The Merge page: choose a method, set it, see what it will do, try it in memory, and make it.

All controls change the draft and show the draft. What takes longer than a moment (the plan with its formula and layers,
the preview) is worked out after the change in events of its own, so that nobody who types has to wait for it.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from merging.methods import METHODS, get_method

from .. import suggestions
from ..components.cards import text
from ..components.method_cards import MethodCards, cards_of
from ..components.method_form import MethodForm, changed, form_of
from ..components.plain import plain
from ..context import App
from ..draft import Draft
from ..shell import Shell
from . import merge_options, merge_preview, merge_save
from .merge_layers import Editor
from .merge_plan import Look, blockers_of, estimate_card, formula_card, layer_choices, look, tensors_in


def build(app: App, shell: Shell) -> None:
    gr.Markdown("## Merge")
    cards = MethodCards(elem_id="method")
    with gr.Row(elem_classes="tight"):
        note = plain(elem_id="suggestion")
        use = gr.Button(
            "Use the suggested settings", size="sm", visible=False, elem_id="suggest", min_width=200, scale=0
        )
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=400):
            form = MethodForm(elem_id="method-form")
            editor = Editor(app)
            with gr.Accordion("Advanced: which tensors, number type, vocabulary, misfits, seed", open=False):
                merge_options.build(shell)
            formula = _Formula(app)
            estimate = plain(elem_id="plan")
        with gr.Column(scale=5, min_width=400):  # beside the sliders, so that one sees what they do
            sections = [merge_preview.build(app, shell), merge_save.build(app, shell)]

    shell.edit(cards.choose, _choose, [])
    shell.edit(use.click, suggestions.suggested, [])
    shell.edit(form.set, _set, [], trigger_mode="multiple")
    shell.on_draft(cards_of, cards)
    shell.on_draft(form_of, form)
    shell.on_draft(_suggestion, [note, use])
    editor.connect(shell, form)
    formula.connect(shell)

    def planned(draft: Draft, layer: Any, tensor: Any, setting: Any, last: Any) -> Any:
        found = look(app, draft)
        reason = reason_not_to(app, found)
        doors = [gr.Button(interactive=not reason), f'<p class="reason">{text(reason)}</p>' if reason else ""]
        parts = [*formula.shown(found, layer, tensor), *editor.shown(draft, found, setting, last)]
        return (estimate_card(app, found), *parts, *doors, *doors, gr.skip())

    shell.act(
        shell.revision.change,
        planned,
        [shell.draft, formula.layer, formula.tensor, editor.name, editor.last],
        [
            estimate,
            *formula.parts,
            *editor.parts,
            *(s[part] for s in sections for part in ("button", "why")),
            shell.message,
        ],
        trigger_mode="always_last",
    )


def reason_not_to(app: App, found: Look) -> str:
    """Why the merge cannot be started, and what to do; "" if it can."""
    problem = next(iter(blockers_of(app, found.plan)), None) if found.plan is not None else found.problem
    return f"{problem.what} {problem.fix}".strip() if problem is not None else ""


def _choose(draft: Draft, event: gr.EventData) -> Draft:
    return suggestions.choose(draft, str(event.method))


def _set(draft: Draft, event: gr.EventData) -> Draft:
    return changed(draft, event.change)


def _suggestion(draft: Draft) -> Any:
    """Where the settings come from, or what is suggested instead."""
    method = draft["recipe"].get("method")
    if method not in METHODS:
        return "", gr.Button(visible=False)
    start, title = suggestions.suggestion_for(draft, method), get_method(method).title
    same = suggestions.is_as_suggested(draft)
    what = "has the suggested settings" if same else "has settings of your own. Suggested are"
    words = f"<b>{text(title)}</b> {what}: {text(suggestions.in_words(start))}. Source: {text(start.source)}."
    return f'<p class="reading">{words}</p>', gr.Button(visible=not same)


class _Formula:
    """The card with the formula of one tensor, and the two lists to choose it by. ``parts``: outputs of ``shown``."""

    def __init__(self, app: App) -> None:
        self.app = app
        style: dict[str, Any] = {"interactive": True, "min_width": 110}
        with gr.Row(elem_classes="tight"):
            self.layer = gr.Dropdown([], label="Formula for", elem_id="formula-layer", **style)
            self.tensor = gr.Dropdown([], label="Tensor", elem_id="formula-tensor", scale=2, **style)
        self.card = plain(elem_id="formula")
        self.parts = [self.layer, self.tensor, self.card]

    def shown(self, found: Look, layer: Any, tensor: Any) -> list[Any]:
        layers = layer_choices(found)
        if layer not in [value for _, value in layers]:
            layer = layers[0][1] if layers else None
        names = tensors_in(found, layer) if layers else []
        if tensor not in names:  # in another layer, the tensor of the same kind
            kind = str(tensor).split(".")[-3:]
            tensor = next((n for n in names if n.split(".")[-3:] == kind), names[0] if names else None)
        card = formula_card(found, tensor)
        return [gr.Dropdown(choices=layers, value=layer), gr.Dropdown(choices=names, value=tensor), card]

    def connect(self, shell: Shell) -> None:
        for choice in (self.layer, self.tensor):
            shell.act(
                choice.input,
                self._again,
                [shell.draft, self.layer, self.tensor],
                self.parts,
                trigger_mode="always_last",
            )

    def _again(self, draft: Draft, layer: Any, tensor: Any) -> Any:
        return tuple(self.shown(look(self.app, draft), layer, tensor))
