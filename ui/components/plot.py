"""A chart that answers: a Plotly figure whose points can be clicked, or reached with the arrow keys, from Python.

Gradio's own plot component reports no clicks, stays white in the dark and brings another plotly.js than the installed
plotly writes for. So this is a small HTML component around the plotly.js of the installed package (see
``assets/plot.js``), which the server hands out itself at ``SCRIPT``: nothing comes from the outside.
"""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import plotly
import plotly.graph_objects as go
from plotly.io.json import to_json_plotly

from ..context import ROOT
from ..plot_style import DARK, LIGHT
from .own import no_stub_file

SCRIPT = "/amalgam/plotly.min.js"
SCRIPT_FILE = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
MOST_BYTES = 300_000
"""Larger figures make the page slow: bin or sample their data first."""

HTML = (
    '<div class="plot-frame"><div class="plot-area"></div>'
    '<div class="plot-tools" role="group" aria-label="Save this chart">'
    '<button type="button" data-save="png">PNG</button><button type="button" data-save="svg">SVG</button>'
    '<button type="button" data-save="json">JSON</button></div>'
    '<div class="plot-spoken" role="status" aria-live="polite"></div></div>'
)
log = logging.getLogger("amalgam.ui")


with no_stub_file():

    class Plot(gr.HTML):
        """Its value is a figure, or None. ``plot.plot_click(fn)``: ``fn(event: gr.EventData)`` finds in
        ``event.points[0]`` the keys curve, index ([row, column] in a heat map), x, y, z, name, text and customdata."""

        def __init__(self, value: go.Figure | None = None, *, label: str = "Chart", **others: Any) -> None:
            classes = others.pop("elem_classes", [])
            super().__init__(
                value=value,
                label=label,
                html_template=HTML,
                js_on_load=_script(),
                head=f'<script src="{SCRIPT}"></script>',
                apply_default_css=False,
                padding=False,
                elem_classes=["plot", *([classes] if isinstance(classes, str) else classes)],
                **others,
            )

        def postprocess(self, value: go.Figure | str | None) -> str | None:
            if value is None or isinstance(value, str):
                return value
            text = figure_json(value)
            if len(text) > MOST_BYTES:
                log.warning(
                    "a figure of %d kB (%s): its data should be binned or sampled", len(text) // 1000, self.label
                )
            return text

        def get_block_name(self) -> str:
            return "html"

        def api_info(self) -> dict[str, Any]:
            return {"type": "string"}


def figure_json(figure: go.Figure) -> str:
    """The figure as JSON, without the template: the browser adds the one of its theme."""
    data = figure.to_plotly_json()
    data["layout"] = {key: value for key, value in data["layout"].items() if key != "template"}
    return to_json_plotly(data)


@lru_cache(maxsize=1)
def _script() -> str:
    """With the templates in it: properties of our own do not reach a component that is shown after it is updated."""
    looks = {"light": LIGHT.to_plotly_json(), "dark": DARK.to_plotly_json()}
    texts = json.dumps(looks, default=lambda part: part.to_plotly_json())
    return f"const TEMPLATES = {texts};\n" + (ROOT / "assets" / "plot.js").read_text("utf-8")
