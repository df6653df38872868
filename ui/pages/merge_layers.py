"""The editor of settings by layer on the Merge page: a curve per expert, a value for a range of layers, a heat map."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from ..components import coefficients, layer_values
from ..components.cards import text
from ..components.coefficients import Curves
from ..components.method_form import MethodForm
from ..components.plain import plain
from ..components.plot import Plot
from ..context import App
from ..draft import Draft, active, label_of
from ..shell import Shell
from .merge_plan import Look, look

ALL = "all experts"
HELP = (
    "Drag a point, or Tab to a curve: left and right choose the layer, up and down change it by 0.05, Page Up and Page "
    "Down by 0.2. Embeddings, final norm and head take the value of layer 0."
)
READING = (
    "One cell per layer and expert. White is the mean of all values, orange is more, violet is "
    "less. A click on a cell puts it into the boxes above."
)
MOST_LAYERS = 128


class Editor:
    """Its controls, what they show for a draft, and what they change. ``parts`` are the outputs of ``shown``."""

    def __init__(self, app: App) -> None:
        self.app = app
        with gr.Accordion("By layer: let settings change with depth", open=False, elem_id="by-layer") as self.box:
            self.name = gr.Dropdown([], label="Setting", interactive=True, elem_id="layer-setting")
            self.words = plain()
            self.tools = gr.Column(visible=False)
        with self.box, self.tools:
            self.curves = Curves(elem_id="curves")
            with gr.Row(elem_classes="tight wrap"):
                number: dict[str, Any] = {"interactive": True, "min_width": 80}
                self.who = gr.Dropdown(
                    [ALL], value=ALL, label="Of", elem_id="range-who", interactive=True, min_width=130
                )
                self.first = gr.Number(0, label="From layer", precision=0, elem_id="range-first", **number)
                self.last = gr.Number(0, label="To layer", precision=0, elem_id="range-last", **number)
                self.value = gr.Number(1.0, label="Value", step=0.05, elem_id="range-value", **number)
                self.apply = gr.Button("Apply to these layers", elem_id="range-apply", min_width=150)
            self.heat = Plot(None, label="Setting by layer", elem_id="layer-heat")
            self.table = plain()
        self.parts = [self.name, self.words, self.tools, self.curves, self.who, self.last, self.heat, self.table]

    def connect(self, shell: Shell, form: MethodForm) -> None:
        shell.edit(self.curves.commit, partial(_moved, self.app), self.name)
        inputs = [self.name, self.who, self.first, self.last, self.value]
        shell.edit(self.apply.click, partial(_applied, self.app), inputs)
        again = [shell.draft, self.name, self.last]
        shell.act(self.name.input, self._again, again, self.parts, trigger_mode="always_last")
        shell.act(form.by_layer, self._opened, [shell.draft, self.last], [self.box, *self.parts])
        shell.act(self.heat.plot_click, self._picked, [shell.draft], [self.who, self.first, self.last, self.value])

    def shown(self, draft: Draft, found: Look, name: Any, last: Any) -> list[Any]:
        names = list(layer_values.parameters_of(draft["recipe"].get("method")))
        count = len(found.layers)
        problem = why_not(draft, found, names)
        if problem:
            return [
                gr.Dropdown(choices=names, value=None),
                f'<p class="reason">{text(problem)}</p>',
                gr.Column(visible=False),
                "",
                gr.skip(),
                gr.skip(),
                None,
                "",
            ]
        name = name if name in names else names[0]
        field = layer_values.parameters_of(draft["recipe"]["method"])[name]
        lines = layer_values.lines_of(draft, name, found.firsts)
        words = "".join(f'<p class="reading">{text(line)}</p>' for line in [HELP, *coefficients.remarks(lines)])
        people = [(ALL, ALL)]
        if not layer_values.is_shared(draft["recipe"]["method"], name):
            people += [(coefficients.title(label_of(e)), label_of(e)) for e in active(draft)["experts"]]
        end = int(last) if isinstance(last, int | float) and 0 < last < count else count - 1
        reading = f'<p class="reading">{READING}</p>'
        return [
            gr.Dropdown(choices=names, value=name),
            words,
            gr.Column(visible=True),
            coefficients.curves_of(name, lines, *_ends(draft, name)),
            gr.Dropdown(choices=people),
            end,
            coefficients.heat_map(name, lines, coefficients.centre_of(field, lines)),
            reading + coefficients.numbers_table(name, lines),
        ]

    def _again(self, draft: Draft, name: Any, last: Any) -> Any:
        return tuple(self.shown(draft, look(self.app, draft), name, last))

    def _opened(self, draft: Draft, last: Any, event: gr.EventData) -> Any:
        """From the form: this setting is by layer, let me change it."""
        return (gr.Accordion(open=True), *self._again(draft, event.name, last))

    def _picked(self, draft: Draft, event: gr.EventData) -> Any:
        """A cell of the heat map was clicked: [layer, expert], and its value."""
        point = event.points[0]
        layer, column = point["index"]
        experts = active(draft)["experts"]
        who = label_of(experts[column]) if len(experts) > column and len(experts) > 1 else ALL
        return who, layer, layer, round(float(point["z"] or 0), 4)


def why_not(draft: Draft, found: Look, names: list[str]) -> str:
    """Why nothing can be edited by layer; "" if it can."""
    if not names:
        return "This method has no numbers to set." if draft["recipe"].get("method") else "Choose a method first."
    if draft["recipe"].get("slices"):
        return "The recipe stacks slices of layers: set their values in the recipe's text."
    if found.plan is None:
        return "The layers are known as soon as the recipe can be planned."
    if not found.layers:
        return "The model has no numbered layers."
    if len(found.layers) > MOST_LAYERS:
        return f"The model has {len(found.layers)} layers, more than can be drawn: write a list in the recipe's text."
    return ""


def _ends(draft: Draft, name: str) -> tuple[float | None, float | None]:
    from merging.methods import get_method

    from ..components.method_form import bounds_of

    kind = get_method(draft["recipe"]["method"])
    bounds = bounds_of(name, kind.Shared if layer_values.is_shared(kind.name, name) else kind.PerExpert)
    return bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))


def _moved(app: App, draft: Draft, name: Any, event: gr.EventData) -> Draft:
    return layer_values.set_line(draft, str(name), str(event.expert), [float(v) for v in event.values])


def _applied(app: App, draft: Draft, name: Any, who: Any, first: Any, last: Any, value: Any) -> Draft:
    firsts = look(app, draft).firsts
    every = [label_of(e) for e in active(draft)["experts"]]
    labels = every if who in (None, ALL) else [str(who)]
    start, end = (int(v) if isinstance(v, int | float) else -1 for v in (first, last))
    return layer_values.set_range(draft, str(name), labels, start, end, float(value or 0), firsts)
