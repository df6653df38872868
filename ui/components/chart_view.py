"""A chart as every page shows it: the question, how to read the answer, the figure, what it rests on, and the numbers.

``view = ChartView("sizes", find, inputs)`` builds it, hidden. An event shows a Chart with outputs ``view.outputs`` and
value ``view.show(chart)``; None hides it and unmounts its figure. A chart with several variants gets a choice of them:
``find(*values of inputs)`` must then give the same chart again, from whatever the page keeps on the server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ..chart import Chart
from .cards import text
from .plot import Plot
from .table import DataTable


class ChartView:
    def __init__(self, name: str, find: Callable[..., Chart | None] | None = None, inputs: Sequence[Any] = ()) -> None:
        """``name``: for the elements' ids, unique in the page."""
        with gr.Column(visible=False, elem_classes="chart-view", elem_id=f"chart-{name}") as self.box:
            self.words = gr.HTML(padding=False)
            self.choose = gr.Dropdown(
                [], label="Show", interactive=True, visible=False, elem_id=f"choose-{name}", filterable=False
            )
            self.plot = Plot(elem_id=f"plot-{name}")
            self.basis = gr.HTML(padding=False)
            self.table = DataTable(elem_id=f"table-{name}")
        self.outputs = [self.box, self.words, self.choose, self.plot, self.basis, self.table]
        if find is not None:
            event = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "always_last"}

            def choose(variant: str, *values: Any) -> Any:
                chart = find(*values)
                return gr.skip() if chart is None else figure_of(chart, variant)

            self.choose.input(choose, [self.choose, *inputs], [self.plot], **event)  # type: ignore[arg-type]

    def show(self, chart: Chart | None, variant: str = "") -> list[Any]:
        """The values of ``outputs``."""
        if chart is None:
            return [gr.Column(visible=False), "", gr.skip(), None, "", None]
        names = [name for name, _ in chart.variants]
        chosen = variant if variant in names else (names[0] if names else None)
        return [
            gr.Column(visible=True),
            f'<h3>{text(chart.title)}</h3><p class="reading">{text(chart.reading)}</p>',
            gr.Dropdown(choices=names, value=chosen, visible=len(names) > 1),
            gr.update(value=figure_of(chart, chosen or ""), label=chart.title),
            f'<p class="basis">{text(chart.basis)}</p>',
            gr.update(value=chart.table, label="The numbers", name=chart.title),
        ]


def figure_of(chart: Chart, variant: str) -> Any:
    """The figure of a variant, else of the first; None for a chart that is a table only."""
    return next((figure for name, figure in chart.variants if name == variant), None) or next(
        (figure for _, figure in chart.variants), None
    )
