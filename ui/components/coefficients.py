"""The editor of settings by layer: a heat map to see them all, and one curve per expert to drag or to move by keys.

A curve has a point per layer. Each point is a slider for the keyboard and for screen readers: left and right go to the
next layer, up and down change the value by 0.05, Page Up and Page Down by 0.2.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gradio as gr
import plotly.graph_objects as go

from merging.recipe_parameters import ParameterField

from ..context import ROOT
from ..plot_style import DASHES, OKABE_ITO, depth_axis, finish, label
from .cards import text
from .layer_values import SHARED, Line
from .own import no_stub_file

TEMPLATE = (
    '<div class="curves"><svg role="group"></svg>'
    '<div class="legend" role="group" aria-label="Curve in front"></div>'
    '<div class="spoken" role="status" aria-live="polite"></div></div>'
)
MOST_NUMBERS = 400
"""Cells of the heat map whose numbers are written into them."""

with no_stub_file():

    class Curves(gr.HTML):
        """Its value is ``curves_of``. ``curves.commit(fn)``: ``event.expert`` and ``event.values``, one per layer."""

        def __init__(self, value: str = "", **others: Any) -> None:
            script = (ROOT / "assets" / "curves.js").read_text("utf-8")
            super().__init__(
                value=value, html_template=TEMPLATE, js_on_load=script, apply_default_css=False, padding=False, **others
            )

        def get_block_name(self) -> str:
            return "html"


def curves_of(name: str, lines: Sequence[Line], low: float | None, high: float | None) -> str:
    """What the script draws, as JSON. Lines that are written as conditions are shown, not moved."""
    known = [v for line in lines for v in line.values if v is not None]
    bottom = low if low is not None else min(0.0, *known, 0.0)
    top = high if high is not None else max(1.0, *(1.25 * v for v in known), 0.0)
    data = {
        "name": "λ" if name == "lambda" else name,
        "low": bottom,
        "high": _round_up(top) if high is None else high,
        "lines": [
            {
                "expert": line.label,
                "title": title(line.label),
                "values": line.values,
                "fixed": line.written == "conditions" or None in line.values,
                "colour": OKABE_ITO[i % len(OKABE_ITO)],
                "dash": {"solid": "", "dash": "8 4", "dot": "2 4", "dashdot": "8 3 2 3"}.get(DASHES[i % 4], ""),
            }
            for i, line in enumerate(lines)
        ],
    }
    return json.dumps(data)


def heat_map(name: str, lines: Sequence[Line], centre: float) -> go.Figure | None:
    """One cell per layer and expert. White is ``centre``; orange is more, violet is less."""
    if not lines or not lines[0].values:
        return None
    layers = range(len(lines[0].values))
    z = [[line.values[i] for line in lines] for i in layers]
    known = [abs(v - centre) for row in z for v in row if v is not None]
    spread = max([*known, 0.1])
    names = [label(title(line.label)) for line in lines]
    shown = len(names) * len(z) <= MOST_NUMBERS
    figure = go.Figure(
        go.Heatmap(
            z=z, x=names, y=list(layers), colorscale="PuOr_r", zmid=centre, zmin=centre - spread, zmax=centre + spread,
            texttemplate="%{z:.2f}" if shown else None, colorbar={"title": {"text": name}},
            hovertemplate="layer %{y}, %{x}: %{z:.3g}<extra></extra>",
        )
    )  # fmt: skip
    depth_axis(figure, list(layers), title_text="layer")
    figure.update_xaxes(side="top", showgrid=False)
    return finish(figure, max(200, min(520, 90 + 26 * len(z))))


def numbers_table(name: str, lines: Sequence[Line]) -> str:
    """The heat map's numbers."""
    if not lines:
        return ""
    heads = "".join(f'<th scope="col">{text(title(line.label))}</th>' for line in lines)
    rows = "".join(
        f'<tr><th scope="row">{i}</th>{"".join(f"<td>{_number(line.values[i])}</td>" for line in lines)}</tr>'
        for i in range(len(lines[0].values))
    )
    caption = f"{'λ' if name == 'lambda' else name} by layer"
    return (
        f'<details class="figures"><summary>The same as a table</summary><div class="scroll"><table>'
        f'<caption>{text(caption)}</caption><thead><tr><th scope="col">Layer</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def centre_of(field: ParameterField, lines: Sequence[Line]) -> float:
    """What the colours are measured from: the mean of all values, so that what differs stands out."""
    known = [v for line in lines for v in line.values if v is not None]
    if not known:
        return float(field.default or 0)
    return round(sum(known) / len(known), 3)


def remarks(lines: Sequence[Line]) -> list[str]:
    """What is worth knowing about these values."""
    found = []
    conditional = [title(line.label) for line in lines if line.written == "conditions"]
    if conditional:
        found.append(
            f"{', '.join(conditional)}: set by conditions on names, so tensors of one layer may differ from "
            "what is shown, which is the first of each layer. Change them in the recipe's text, or set all "
            "layers below to replace them."
        )
    known = [v for line in lines for v in line.values if v is not None]
    if any(v < 0 for v in known):
        found.append("Some values are below 0: what an expert learned is taken away there.")
    if any(v > 1.5 for v in known):
        found.append("Some values are above 1.5: changes are blown up there, which often breaks a model.")
    return found


def title(expert: str) -> str:
    return "all experts" if expert == SHARED else expert.rstrip("/").rsplit("/", 1)[-1]


def _number(value: float | None) -> str:
    return "not set" if value is None else f"{value:.4g}"


def _round_up(value: float) -> float:
    return next(v for v in (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1e3, 1e6, 1e12, float(value) + 1) if v >= value)
