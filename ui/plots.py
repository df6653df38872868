"""Numbers in, Plotly figures out. Pure functions: they read no weights, keep no state and know no page.

Each function's text says what the chart shows and how to read it. ``plot_style`` holds the look; what is common to all:
layers go down from 0, colours come with a dash, marker or pattern, and panels that are to be compared share one range.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .plot_style import (
    AMOUNT,
    GREY,
    OKABE_ITO,
    SHARE,
    SIGNED,
    bar_look,
    depth_axis,
    finish,
    label,
    marker,
    pattern_of,
    style,
)

MODULES = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_qkv": "qkv", "attn_o": "o", "mlp_gate": "gate", "mlp_up": "up",
    "mlp_down": "down", "mlp_other": "mlp", "norm": "norm", "bias": "bias", "other": "other",
}  # fmt: skip
"""Kind of tensor (``checkpoints.layout.KINDS``) -> its short name, in the order in which a block computes."""
MOST_POINTS = 128
"""Points of a drawn spectrum: the first ones all, then ever fewer."""


@dataclass(frozen=True, slots=True)
class Grid:
    """One number per layer and module."""

    layers: list[int]
    modules: list[str]
    values: np.ndarray
    """[layers, modules]; NaN where there is no such module."""

    def layer_means(self) -> np.ndarray:
        counts = np.isfinite(self.values).sum(axis=1)
        return np.divide(np.nansum(self.values, axis=1), counts, out=np.full(len(counts), np.nan), where=counts > 0)


def grid(cells: Iterable[tuple[int | None, str, float]]) -> Grid:
    """(layer, kind, value) -> a grid. Cells outside of blocks are left out; several values of one cell are averaged."""
    found: dict[tuple[int, str], list[float]] = {}
    for layer, kind, value in cells:
        if layer is not None and kind in MODULES:
            found.setdefault((layer, MODULES[kind]), []).append(value)
    layers = sorted({layer for layer, _ in found})
    modules = [name for name in MODULES.values() if any(module == name for _, module in found)]
    values = np.full((len(layers), len(modules)), np.nan)
    for (layer, module), several in found.items():
        values[layers.index(layer), modules.index(module)] = float(np.mean(several))
    return Grid(layers, modules, values)


@dataclass(frozen=True, slots=True)
class Curve:
    """The spectrum of one task vector's matrix, ready to be drawn."""

    name: str
    values: np.ndarray
    """Singular values, largest first."""
    frobenius: float
    """‖τ‖_F, known exactly also when ``values`` holds only the first ones."""
    k90: float | None = None
    edge: float | None = None
    """Largest singular value of noise of the same size (Marchenko-Pastur)."""


# -- spectra ------------------------------------------------------------------------------------------------------


def spectra(curves: Sequence[Curve], *, dark: bool | None = False) -> go.Figure:
    """Left: singular values σ_i/σ_1 of one matrix of each task vector, logarithmic; dotted: where they would end if the
    same energy were noise. Right: share of ‖τ‖² in the first k directions, with the k that reach 90 % marked.

    A steep curve is an update of few directions; a merged curve with few spikes says that shared directions drown the
    others (Iso-C, arXiv 2502.04959)."""
    figure = make_subplots(
        1, 2, column_titles=["σ<sub>i</sub> / σ<sub>1</sub>", "share of the energy"], shared_xaxes=True
    )
    lowest = 1.0
    for number, curve in enumerate(curves):
        line, name = style(number), label(curve.name)
        first = float(curve.values[0]) if len(curve.values) else 0.0
        if first <= 0:
            continue
        at = _points(len(curve.values))
        heights = np.asarray(curve.values, np.float64) / first
        shown = np.maximum(heights[at], 1e-6).astype(np.float32)
        lowest = min(lowest, float(shown[-1]))
        common = {"legendgroup": str(number), "name": name, "mode": "lines", "line": line}
        figure.add_scatter(
            x=at + 1, y=shown, hovertemplate="%{fullData.name}<br>direction %{x}: %{y:.3g} σ₁<extra></extra>",
            row=1, col=1, **common)  # fmt: skip
        energy = np.minimum(1, np.cumsum(np.square(curve.values, dtype=np.float64)) / max(curve.frobenius**2, 1e-300))
        figure.add_scatter(
            x=at + 1, y=energy[at].astype(np.float32), showlegend=False, row=1, col=2,
            hovertemplate="%{fullData.name}<br>first %{x}: %{y:.1%} of ‖τ‖²<extra></extra>", **common)  # fmt: skip
        if curve.edge and curve.edge / first > lowest:
            figure.add_scatter(
                x=[1, len(curve.values)], y=[curve.edge / first] * 2, mode="lines", legendgroup=str(number), name=name,
                line={"color": line["color"], "dash": "dot", "width": 1}, showlegend=False, row=1, col=1,
                hovertemplate="%{fullData.name}<br>noise ends at %{y:.3g} σ₁<extra></extra>")  # fmt: skip
        if curve.k90:
            figure.add_scatter(
                x=[curve.k90], y=[0.9], mode="markers", legendgroup=str(number), name=name, showlegend=False,
                marker=marker(number), hovertemplate="%{fullData.name}<br>90 % in %{x:.0f} directions<extra></extra>",
                row=1, col=2)  # fmt: skip
    figure.add_hline(y=0.9, line={"dash": "dot", "color": GREY, "width": 1}, row=1, col=2)
    figure.update_yaxes(
        type="log",
        range=[math.floor(math.log10(max(lowest, 1e-6))), 0.05],
        dtick=1,
        exponentformat="power",
        row=1,
        col=1,
    )
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%", row=1, col=2)
    figure.update_xaxes(title_text="direction i", row=1, col=1)
    figure.update_xaxes(title_text="directions k", row=1, col=2)
    return finish(figure, 400, dark=dark)


def _points(count: int) -> np.ndarray:
    """Indices to draw of ``count`` values: all, or the first half of MOST_POINTS and then ever fewer."""
    if count <= MOST_POINTS:
        return np.arange(count)
    tail = np.geomspace(MOST_POINTS // 2, count - 1, MOST_POINTS // 2)
    return np.unique(np.concatenate([np.arange(MOST_POINTS // 2), tail.round().astype(np.int64)]))


# -- layers and modules -------------------------------------------------------------------------------------------


def maps(
    grids: Mapping[str, Grid], unit: str, *, form: str = ".1f", scale: str = AMOUNT,
    limits: tuple[float, float] | None = None, dark: bool = False,
) -> go.Figure:  # fmt: skip
    """A map of layers and modules per expert (all in one range), and at the right the mean of each layer.

    ``unit``: what the numbers are, for axis and hover; ``form``: their format."""
    names = list(grids)
    layers = next(iter(grids.values())).layers if grids else []
    titles = [*(label(name, 18) for name in names), "mean of the layer"]
    figure = make_subplots(
        1, len(names) + 1, column_titles=titles, shared_yaxes=True, horizontal_spacing=0.02 + 0.02 / len(titles)
    )
    for column, (name, cells) in enumerate(grids.items(), 1):
        figure.add_heatmap(
            z=cells.values.astype(np.float32), x=cells.modules, y=cells.layers, coloraxis="coloraxis", name=label(name),
            hovertemplate=f"%{{fullData.name}}<br>layer %{{y}} %{{x}}: %{{z:{form}}} {unit}<extra></extra>",
            row=1, col=column)  # fmt: skip
        figure.add_scatter(
            x=cells.layer_means().astype(np.float32), y=cells.layers, mode="lines+markers", name=label(name),
            line=style(column - 1), marker=marker(column - 1) | {"size": 6}, row=1, col=len(names) + 1,
            hovertemplate=f"%{{fullData.name}}<br>layer %{{y}}: %{{x:{form}}} {unit}<extra></extra>")  # fmt: skip
    depth_axis(figure, layers)
    figure.update_yaxes(title_text="layer", row=1, col=1)
    figure.update_xaxes(rangemode="tozero", row=1, col=len(names) + 1)
    figure.update_xaxes(tickformat=form if "%" in form else None, nticks=4, row=1, col=len(names) + 1)
    axis: dict[str, Any] = {
        "colorscale": scale,
        "colorbar": {"title": {"text": unit, "side": "right"}, "tickformat": form},
    }
    if limits is not None:
        axis |= {"cmin": limits[0], "cmax": limits[1]}
    return finish(figure, _tall(layers), dark=dark, coloraxis=axis)


def importance(
    cells: Grid, unit: str, totals: Sequence[float], total_unit: str, *, form: str = ".2g", dark: bool = False
) -> go.Figure:
    """Bars of each layer's total beside the map of its modules. Long bars are where budget (coefficients, bits, rank)
    is well spent; equal bars say that one coefficient for all layers is enough."""
    figure = make_subplots(1, 2, column_widths=[0.35, 0.65], shared_yaxes=True, horizontal_spacing=0.03,
                           column_titles=[total_unit, unit])  # fmt: skip
    figure.add_bar(
        y=cells.layers, x=list(totals), orientation="h", marker_color=OKABE_ITO[0], showlegend=False,
        hovertemplate=f"layer %{{y}}: %{{x:{form}}} {total_unit}<extra></extra>", row=1, col=1)  # fmt: skip
    figure.add_heatmap(
        z=cells.values.astype(np.float32), x=cells.modules, y=cells.layers, colorscale=AMOUNT,
        colorbar={"tickformat": form}, hovertemplate=f"layer %{{y}} %{{x}}: %{{z:{form}}} {unit}<extra></extra>",
        row=1, col=2)  # fmt: skip
    depth_axis(figure, cells.layers)
    figure.update_yaxes(title_text="layer", row=1, col=1)
    figure.update_xaxes(rangemode="tozero", tickformat=form, row=1, col=1)
    return finish(figure, _tall(cells.layers), dark=dark, bargap=0.25)


def by_layer(
    lines: Mapping[str, tuple[Sequence[int], Sequence[float]]], unit: str, *, limits: tuple[float, float] | None = None,
    form: str = ".2f", marks: Mapping[str, float] | None = None, dark: bool = False,
) -> go.Figure:  # fmt: skip
    """One line per expert or pair, downwards through the layers. ``marks``: values worth a dotted line, by name."""
    figure = go.Figure()
    for number, (name, (layers, values)) in enumerate(lines.items()):
        figure.add_scatter(
            x=np.asarray(values, np.float32), y=list(layers), mode="lines+markers", name=label(name),
            line=style(number), marker=marker(number) | {"size": 6},
            hovertemplate=f"%{{fullData.name}}<br>layer %{{y}}: %{{x:{form}}}<extra></extra>")  # fmt: skip
    for text, value in (marks or {}).items():
        figure.add_vline(x=value, line={"dash": "dot", "color": GREY, "width": 1}, annotation_text=text,
                         annotation_position="top")  # fmt: skip
    everywhere = sorted({layer for layers, _ in lines.values() for layer in layers})
    depth_axis(figure, everywhere, title_text="layer")
    figure.update_xaxes(title_text=unit, tickformat=form, range=list(limits) if limits else None)
    return finish(figure, _tall(everywhere), dark=dark)


def _tall(layers: Sequence[int]) -> int:
    return min(1100, 160 + max(8, len(layers)) * 16)


# -- experts against experts --------------------------------------------------------------------------------------


def cosine(names: Sequence[str], matrix: np.ndarray, *, dark: bool = False) -> go.Figure:
    """Cosine of each pair of task vectors over the whole model. Near 0 is usual, above 0.3 means related tasks,
    negative means that they compete. More than six experts are put in the order of their likeness."""
    order = likeness(matrix) if len(names) > 6 else list(range(len(names)))
    texts, values = [label(names[i]) for i in order], np.asarray(matrix)[np.ix_(order, order)]
    return _matrix(texts, values, SIGNED, (-1.0, 1.0), "cosine", dark)


def overlap(names: Sequence[str], matrix: np.ndarray, unit: str, *, dark: bool = False) -> go.Figure:
    """Lower triangle of shares from 0 to 1, such as the mean ‖U_aᵀU_b‖²/k of leading directions. High overlap with
    signs that differ is interference."""
    values = np.where(np.tri(len(names), k=-1, dtype=bool), matrix, np.nan)[1:, :-1]
    texts = [label(name) for name in names]
    return _matrix(texts[1:], values, SHARE, (0.0, 1.0), unit, dark, across=texts[:-1])


def _matrix(
    down: list[str], values: np.ndarray, scale: str, limits: tuple[float, float], unit: str, dark: bool,
    across: list[str] | None = None,
) -> go.Figure:  # fmt: skip
    texts = [[f"{v:.2f}" if math.isfinite(v) else "" for v in row] for row in values]
    figure = go.Figure()
    figure.add_heatmap(
        z=values.astype(np.float32), x=across or down, y=down, text=texts, texttemplate="%{text}", colorscale=scale,
        zmin=limits[0], zmax=limits[1], zmid=0 if scale == SIGNED else None, hoverongaps=False,
        colorbar={"title": {"text": unit, "side": "right"}},
        hovertemplate=f"%{{y}}, %{{x}}<br>{unit} %{{z:.3f}}<extra></extra>")  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(showgrid=False, side="bottom")
    return finish(figure, 200 + 46 * max(3, len(down)), dark=dark)


def likeness(matrix: np.ndarray) -> list[int]:
    """An order of the experts in which alike ones are neighbours (average linkage on 1 − cosine)."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = np.clip(1 - np.asarray(matrix, np.float64), 0, 2)
    np.fill_diagonal(distance, 0)
    return [int(i) for i in leaves_list(linkage(squareform((distance + distance.T) / 2, checks=False), "average"))]


def sign_split(
    layers: Sequence[int], agree: Sequence[float], conflict: Sequence[float], alone: Sequence[float], *,
    dark: bool = False,
) -> go.Figure:  # fmt: skip
    """Of the entries that at least one of two experts keeps when trimmed: same sign, opposite signs, or kept by one
    only. The three shares add up to 1 in each layer."""
    figure = go.Figure()
    parts = [
        ("same sign", agree, OKABE_ITO[5], ""),
        ("opposite signs", conflict, OKABE_ITO[1], "/"),
        ("only one", alone, GREY, "."),
    ]
    for name, values, colour, pattern in parts:
        figure.add_bar(
            y=list(layers), x=list(values), orientation="h", name=name,
            marker={"color": colour, "pattern": pattern_of(pattern)},
            hovertemplate="layer %{y}: %{x:.1%} %{fullData.name}<extra></extra>")  # fmt: skip
    depth_axis(figure, layers, title_text="layer")
    figure.update_xaxes(range=[0, 1], tickformat=".0%", title_text="share of the kept entries")
    return finish(figure, _tall(layers), dark=dark, barmode="stack", bargap=0.15, legend_traceorder="normal")


def bars(
    names: Sequence[str], measures: Mapping[str, Sequence[float | None]], axis: str, *, dark: bool = False
) -> go.Figure:
    """One or several measures per expert, with a dotted line at 1: all of the expert's change that a merge could keep,
    or a ratio without preference."""
    figure = go.Figure()
    for number, (measure, values) in enumerate(measures.items()):
        figure.add_bar(
            y=[label(n) for n in names], x=list(values), orientation="h", name=measure,
            marker=bar_look(number),
            hovertemplate="%{y}<br>%{fullData.name}: %{x:.3f}<extra></extra>")  # fmt: skip
    figure.add_vline(x=1, line={"dash": "dot", "color": GREY, "width": 1})
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title_text=axis, zeroline=True)
    return finish(figure, 120 + 24 * max(1, len(measures)) * max(1, len(names)), dark=dark, barmode="group")
