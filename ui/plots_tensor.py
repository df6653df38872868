"""Figures of the Analyse page: a map to be clicked, where the changes of a tensor lie, and whose signs disagree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from .plot_style import GREY, OKABE_ITO, SIGNED, depth_axis, finish, label, pattern_of, style
from .plots import Grid

MARK = "#e4572e"
"""Of the chosen cell: stands out from Cividis, Viridis and the middle of red and blue, in light and dark."""


def cell_map(
    grid: Grid,
    name: str,
    *,
    form: str,
    limits: tuple[float, float],
    scale: str,
    selected: tuple[int, str] | None = None,
) -> go.Figure:
    """One map of layers and modules, to be clicked. ``selected``: the cell to mark."""
    figure = go.Figure()
    figure.add_heatmap(
        z=grid.values.astype(np.float32), x=grid.modules, y=grid.layers, name=label(name), colorscale=scale,
        zmin=limits[0], zmax=limits[1], zmid=0 if scale == SIGNED else None, colorbar={"tickformat": form},
        xgap=1, ygap=1, hovertemplate=f"layer %{{y}} %{{x}}: %{{z:{form}}}<extra></extra>")  # fmt: skip
    depth_axis(figure, grid.layers, title_text="layer")
    if selected is not None and selected[0] in grid.layers and selected[1] in grid.modules:
        at = grid.modules.index(selected[1])
        figure.add_shape(
            name="selected", type="rect", x0=at - 0.5, x1=at + 0.5, y0=selected[0] - 0.5, y1=selected[0] + 0.5,
            line={"color": MARK, "width": 3})  # fmt: skip
    figure.update_xaxes(showgrid=False, side="top")
    finish(figure, min(1000, 110 + max(6, len(grid.layers)) * 22), dark=None)
    return figure.update_layout(margin={"l": 50, "r": 10, "t": 30, "b": 10})


def histogram(names: Sequence[str], centres: np.ndarray, counts: np.ndarray) -> go.Figure:
    """Share of the weights per bin of τ, on a logarithmic scale, one line per model. A parabola is a normal bell; tails
    that stay up are single weights that moved far."""
    figure = go.Figure()
    for number, (name, own) in enumerate(zip(names, counts, strict=True)):
        shares = np.where(own > 0, own / max(1, own.sum()), np.nan).astype(np.float32)
        figure.add_scatter(
            x=centres.astype(np.float32), y=shares, mode="lines", name=label(name), connectgaps=False,
            line=style(number) | {"shape": "hvh", "width": 1.5},
            hovertemplate="%{fullData.name}<br>τ about %{x:.3g}: %{y:.2%} of the weights<extra></extra>")  # fmt: skip
    figure.update_xaxes(
        title_text="τ of a weight", tickformat=".1~e" if np.abs(centres).max() < 1e-2 else None, nticks=7
    )
    figure.update_yaxes(type="log", title_text="share of the weights", exponentformat="power", dtick=1)
    return finish(figure, 320, dark=None)


def pair_signs(
    pairs: Sequence[str], agree: Sequence[float], conflict: Sequence[float], alone: Sequence[float]
) -> go.Figure:
    """Of what at least one of a pair keeps of this tensor, by weight: same sign, opposite signs, kept by one only."""
    figure = go.Figure()
    parts = [
        ("same sign", agree, OKABE_ITO[5], ""),
        ("opposite signs", conflict, OKABE_ITO[1], "/"),
        ("only one", alone, GREY, "."),
    ]
    for name, values, colour, pattern in parts:
        figure.add_bar(
            y=[label(pair, 40) for pair in pairs], x=list(values), orientation="h", name=name,
            marker={"color": colour, "pattern": pattern_of(pattern)},
            hovertemplate="%{y}<br>%{x:.1%} %{fullData.name}<extra></extra>")  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(range=[0, 1], tickformat=".0%", title_text="share of the kept entries, by size")
    figure.update_layout(barmode="stack", bargap=0.25, legend_traceorder="normal")
    return finish(figure, 110 + 26 * max(3, len(pairs)), dark=None)
