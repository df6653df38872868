"""How all figures look: colours that everybody can tell apart, in light and dark.

The rules: categories in the Okabe-Ito colours *and* in a dash, marker or pattern of their own, so that colour is never
the only cue; amounts in Cividis, signed amounts in red and blue around zero, shares in Viridis from 0 to 1; the same
range for all experts, so that panels compare; layer 0 on top; modules in the order in which they compute.

Names come from files and users. Plotly reads a little HTML in every text and ``%{...}`` in hover templates, so names go
through ``label`` and never into a template.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import plotly.io

plotly.io.templates.default = None  # ours is given by ``finish``, or by the page: no figure has to carry Plotly's first
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#7F7F7F")
"""Okabe and Ito's colours for categories; their yellow and black, which vanish on one of the two backgrounds, are
replaced by a brown and a grey."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "diamond", "square", "triangle-up", "x", "cross", "star", "triangle-down")
PATTERNS = ("", "/", "x", ".", "\\", "+", "-", "|")
GREY = "#8a8a8a"
AMOUNT, SIGNED, SHARE = "Cividis", "RdBu_r", "Viridis"

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def _template(text: str, background: str, grid: str, line: str, control: str) -> go.layout.Template:
    axis = {
        "gridcolor": grid, "linecolor": line, "zerolinecolor": line, "automargin": True, "ticks": "outside",
        "ticklen": 4, "tickcolor": line, "title": {"standoff": 8},
    }  # fmt: skip
    layout = {
        "font": {"family": _FONT, "size": 13, "color": text},
        "title": {"x": 0, "xref": "container", "xanchor": "left", "font": {"size": 15}},
        "paper_bgcolor": background, "plot_bgcolor": background, "colorway": list(OKABE_ITO),
        "xaxis": axis, "yaxis": axis,
        "legend": {
            "orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0, "bgcolor": "rgba(0,0,0,0)",
        },
        "hoverlabel": {"font": {"family": _FONT}},
        "coloraxis": {"colorbar": {"thickness": 12, "outlinewidth": 0, "tickfont": {"color": text}}},
        "annotationdefaults": {"font": {"color": text}},
        "shapedefaults": {"line": {"color": line}},
        "updatemenudefaults": {"bgcolor": control, "bordercolor": line, "font": {"color": text}},
    }  # fmt: skip
    bar = {"thickness": 12, "outlinewidth": 0}
    return go.layout.Template(layout=layout, data={"heatmap": [go.Heatmap(colorbar=bar, xgap=1, ygap=1)]})


LIGHT = _template("#1b1f24", "#ffffff", "#e6e8eb", "#9aa1a9", "#f3f4f6")
DARK = _template("#e6e8eb", "#15181c", "#2d3238", "#6b737c", "#24292f")


def finish(figure: go.Figure, height: int, *, dark: bool | None = False, **layout: Any) -> go.Figure:
    """Give a figure its look and height in pixels, and room for a legend below if it has one. ``dark``: None leaves the
    look to the page that shows it."""
    listed = {trace.name for trace in figure.data if trace.showlegend is not False and trace.type != "heatmap"}
    bottom = 50 if len(listed) < 2 else 105
    margin = {"l": 60, "r": 20, "t": 40, "b": bottom}
    if dark is not None:
        layout["template"] = DARK if dark else LIGHT
    figure.update_layout(height=height + bottom - 50, margin=margin, **layout)
    return figure


def label(name: str, most: int = 28) -> str:
    """A name for a figure: without HTML, and cut in the middle if it is long."""
    text = "".join(c if c.isprintable() else "?" for c in name)
    if len(text) > most:
        text = f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}"
    return html.escape(text, quote=False)


def style(number: int) -> dict[str, Any]:
    """Colour and dash of the line with this number. No two of the first 24 are the same."""
    return {"color": OKABE_ITO[number % len(OKABE_ITO)], "dash": DASHES[number % len(DASHES)], "width": 2}


def marker(number: int) -> dict[str, Any]:
    """Colour and symbol of the points with this number. No two of the first 64 are the same."""
    symbol = MARKERS[(number * 5 + number // len(OKABE_ITO)) % len(MARKERS)]
    return {"color": OKABE_ITO[number % len(OKABE_ITO)], "symbol": symbol, "size": 8}


def pattern_of(shape: str) -> dict[str, Any]:
    """A pattern drawn over the bar's own colour."""
    return {"shape": shape, "fillmode": "overlay", "fgcolor": "rgba(255,255,255,0.75)", "size": 7, "solidity": 0.22}


def bar_look(number: int) -> dict[str, Any]:
    """Colour and pattern of the bars with this number."""
    colour = OKABE_ITO[number % len(OKABE_ITO)]
    return {"color": colour, "pattern": pattern_of(PATTERNS[number % len(PATTERNS)])}


def depth_axis(figure: go.Figure, layers: Sequence[int], **place: Any) -> None:
    """The axis of layers: 0 on top."""
    last = max(layers, default=0)
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if last / s <= 16)
    figure.update_yaxes(range=[last + 0.5, -0.5], tick0=0, dtick=step, zeroline=False, showgrid=False, **place)
