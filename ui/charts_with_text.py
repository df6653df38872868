"""The charts of an inspection that need texts: sensitivities, whitened spectra, hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from merging.analysis.inspection import Inspection

from . import plots
from .chart import Chart, Table, chart, grouped
from .charts_spectra import MEASURES

KEYS = ("sensitivity", "entropy", "whitened", "representations")


def with_texts(result: Inspection) -> list[Chart]:
    assert result.texts is not None
    makers = (_sensitivities, _whitened, _representations)
    return [found for make in makers for found in make(result, result.texts)]


def _sensitivities(result: Inspection, texts: Mapping[str, Any]) -> list[Chart]:
    """By layer, for each loss that was measured."""
    charts = []
    for key in ("sensitivity", "entropy"):
        measured = [expert for expert in texts["experts"] if expert[key] is not None]
        layers = {e["expert"]: [one for one in e[key]["layers"] if one["block"] is not None] for e in measured}
        lines = {
            name: ([one["block"] for one in own], [one["coefficient"] for one in own]) for name, own in layers.items()
        }
        if not lines or not all(blocks for blocks, _ in lines.values()):
            continue
        rows = [
            [expert["expert"], one["name"], one["score"], one["error"], one["coefficient"]]
            for expert in measured
            for one in expert[key]["layers"]
        ]
        table = Table(["expert", "layer", "score", "standard error", "coefficient α"], rows)
        found = chart(key, result, "texts", table)
        found.variants = [("", plots.by_layer(lines, "coefficient α of the layer"))]
        charts.append(found)
    return charts


def _whitened(result: Inspection, texts: Mapping[str, Any]) -> list[Chart]:
    """Effective ranks of τ seen through the activations, layer by module."""
    measured = {e["expert"]: e["whitened"]["tensors"] for e in texts["experts"] if e["whitened"]}
    measured = {name: tensors for name, tensors in measured.items() if tensors}
    if not measured:
        return []
    fields = {field: (name, form) for field, (name, _, form) in MEASURES.items()}
    columns = ["tensor", "whose", *(name for name, _ in fields.values()), "tokens", "enough tokens"]
    rows = [
        [one["tensor"], name, *(one[field] for field in fields), one["tokens"], "yes" if one["enough"] else "no"]
        for name, tensors in measured.items()
        for one in tensors
    ]
    found = chart("whitened", result, "texts", Table(columns, rows))
    for field, (title, form) in fields.items():
        grids = {
            name: plots.grid((one["block"], one["kind"], float(one[field])) for one in tensors)
            for name, tensors in measured.items()
        }
        top = max((float(np.nanmax(grid.values)) for grid in grids.values() if grid.layers), default=1.0)
        for variant, group in grouped(list(grids), title):
            if any(grids[of].layers for of in group):
                shown = plots.maps({of: grids[of] for of in group}, title, form=form, limits=(0.0, top))
                found.variants.append((variant, shown))
    return [found]


def _representations(result: Inspection, texts: Mapping[str, Any]) -> list[Chart]:
    """RankMe by layer, of all models on the same tokens."""
    measured = texts["representations"]
    if not measured:
        return []
    rows = [
        [one["model"], layer["layer"], layer["rank"], layer["centred"], one["tokens"]]
        for one in measured
        for layer in one["layers"]
    ]
    table = Table(["model", "hidden state after layer", "RankMe", "of the centred states", "tokens"], rows)
    found = chart("representations", result, "texts", table)
    for key, name in (("rank", "RankMe"), ("centred", "of the centred states")):
        lines = {
            one["model"]: ([layer["layer"] for layer in one["layers"]], [layer[key] for layer in one["layers"]])
            for one in measured
        }
        found.variants.append((name, plots.by_layer(lines, "directions", form=".1f")))
    return [found]
