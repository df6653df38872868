"""The cells of the map: one number per layer and module, for each expert, pair of experts, or all together.

A metric knows which part of an inspection it needs, and whose numbers it has. All maps of one metric share one range,
so that experts compare. Numbers of several tensors in one cell (two norms, say) are those of the tensors joined where
the measure allows it, else their mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from merging.analysis.importance import expert_merging_importance, importance_table
from merging.analysis.inspection import Inspection
from merging.analysis.models import MERGED

from .. import plots
from ..chart import Table, pairs_of
from ..plot_style import AMOUNT, SHARE, SIGNED

Cells = dict[str, list[tuple[int | None, str, float]]]
"""Whose -> (layer, kind of tensor, value)."""
ALL = "all experts"


@dataclass(frozen=True, slots=True)
class Metric:
    key: str
    title: str
    part: str
    """Of the inspection."""
    whose: Literal["expert", "pair", "all"]
    form: str
    reading: str
    cells: Callable[[Inspection], Cells]
    limits: tuple[float, float] | None = None
    """None: from 0 to the largest value of all."""
    scale: str = AMOUNT


@dataclass(frozen=True, slots=True)
class Map:
    """A metric's grids, ready to draw."""

    metric: Metric
    grids: dict[str, plots.Grid]
    limits: tuple[float, float]


def metrics_of(result: Inspection) -> list[Metric]:
    """The metrics of the parts that there are."""
    present = [m for m in METRICS if getattr(result, m.part)]
    if len(result.names) < 2:
        present = [m for m in present if m.whose != "pair" and m.key != "interference"]
    return present if _has_merge(result) else [m for m in present if m.key != "kept"]


def metric(key: str) -> Metric | None:
    return next((m for m in METRICS if m.key == key), None)


def map_of(result: Inspection, one: Metric) -> Map:
    grids = {whose: plots.grid(cells) for whose, cells in one.cells(result).items()}
    found = [float(v) for grid in grids.values() for v in grid.values.flat if math.isfinite(v)]
    top = max(found, default=1.0)
    low = min([0.0, *found])
    return Map(one, grids, one.limits or (low, top if top > low else low + 1.0))


def tensors_at(result: Inspection, layer: int | None, module: str) -> list[str]:
    """The tensors in a cell, by the module's short name."""
    kinds = {kind for kind, name in plots.MODULES.items() if name == module}
    return [tensor for tensor, (block, kind) in result.places.items() if block == layer and kind in kinds]


def cell_of(result: Inspection, tensor: str) -> tuple[int, str] | None:
    """Layer and module of a tensor; None for one outside of layers."""
    block, kind = result.places.get(tensor, (None, ""))
    return (block, plots.MODULES[kind]) if block is not None and kind in plots.MODULES else None


def map_table(drawn: Map) -> Table:
    """A row per layer and module, a column for each of "whose"."""
    cells: dict[tuple[int, str], dict[str, float]] = {}
    for whose, grid in drawn.grids.items():
        for layer, row in zip(grid.layers, grid.values, strict=True):
            for module, value in zip(grid.modules, row, strict=True):
                if math.isfinite(value):
                    cells.setdefault((layer, module), {})[whose] = float(value)
    order = list(plots.MODULES.values())
    rows = [
        [layer, module, *(values.get(whose) for whose in drawn.grids)]
        for (layer, module), values in sorted(cells.items(), key=lambda c: (c[0][0], order.index(c[0][1])))
    ]
    return Table(["layer", "module", *drawn.grids], rows)


def extreme(drawn: Map, whose: str, lowest: bool = False) -> tuple[int, str] | None:
    """Layer and module of the largest value, or of the smallest."""
    grid = drawn.grids.get(whose)
    found = [
        (float(value) if lowest else -float(value), layer, module)
        for layer, row in zip(grid.layers, grid.values, strict=True)
        for module, value in zip(grid.modules, row, strict=True)
        if math.isfinite(value)
    ] if grid else []  # fmt: skip
    return min(found)[1:] if found else None


# -- where the numbers come from ------------------------------------------------------------------------------------


def _has_merge(result: Inspection) -> bool:
    return result.reference["merged"] is not None


def _per_expert(measure: str, result: Inspection) -> Cells:
    """A measure of ``importance.MEASURES``."""
    assert result.changes is not None
    table = importance_table(result.changes, measure)
    return {
        name: [
            (block, kind, float(value))
            for block, row in zip(table.blocks, table.values[k], strict=True)
            for kind, value in zip(table.kinds, row, strict=True)
            if math.isfinite(value)
        ]
        for k, name in enumerate(result.names)
    }


def _places(tensors: Iterable[Any]) -> dict[tuple[int | None, str], list[Any]]:
    """Tensors by the cell they are in."""
    found: dict[tuple[int | None, str], list[Any]] = {}
    for tensor in tensors:
        found.setdefault((tensor.block, tensor.kind), []).append(tensor)
    return found


def _from_changes(field: str, result: Inspection) -> Cells:
    """A list of ``TensorChange`` (one value per expert or pair), of the tensors of a cell joined."""
    assert result.changes is not None
    titles = result.names if field == "survival" else pairs_of(result.names)
    cells: Cells = {title: [] for title in titles}
    for (block, kind), tensors in _places(result.changes.tensors).items():
        for title, value in zip(titles, getattr(result.changes.total(tensors), field), strict=True):
            cells[title].append((block, kind, float(value)))
    return cells


def _cosine(result: Inspection) -> Cells:
    assert result.changes is not None
    titles = pairs_of(result.names)
    cells: Cells = {title: [] for title in titles}
    for (block, kind), tensors in _places(result.changes.tensors).items():
        matrix = result.changes.cosine(tensors)
        for title, (a, b) in zip(titles, result.changes.pairs, strict=True):
            cells[title].append((block, kind, float(matrix[a, b])))
    return cells


def _kept(result: Inspection) -> Cells:
    assert result.changes is not None
    cells: Cells = {name: [] for name in result.names}
    for (block, kind), tensors in _places(result.changes.tensors).items():
        merged = result.changes.total(tensors).merged
        for k, name in enumerate(result.names if merged else []):
            assert merged is not None
            cells[name].append((block, kind, merged.projection[k]))
    return cells


def _trimmed(field: str, result: Inspection) -> Cells:
    assert result.trimmed is not None
    titles = pairs_of(result.names)
    cells: Cells = {title: [] for title in titles}
    for (block, kind), tensors in _places(result.trimmed.tensors).items():
        for title, shares in zip(titles, result.trimmed.shares(tensors), strict=True):
            cells[title].append((block, kind, getattr(shares, field)))
    return cells


def _spectra(field: str, result: Inspection) -> Cells:
    assert result.spectra is not None
    drawn = [*result.names, MERGED]
    cells: Cells = {}
    for one in result.spectra:
        if one.of in drawn:
            block, kind = result.places[one.tensor]
            cells.setdefault(one.of, []).append((block, kind, float(getattr(one.measures(), field))))
    return cells


def _overlap(field: str, result: Inspection) -> Cells:
    assert result.subspaces is not None
    cells: Cells = {title: [] for title in pairs_of(result.names)}
    for tensor in result.subspaces.tensors:
        for pair in tensor.pairs:
            if pair.b != MERGED and pair.rank and f"{pair.a} and {pair.b}" in cells:
                cells[f"{pair.a} and {pair.b}"].append((tensor.block, tensor.kind, float(getattr(pair, field))))
    return cells


def _interference(result: Inspection) -> Cells:
    assert result.subspaces is not None
    known = [t for t in result.subspaces.tensors if t.interference_relative is not None]
    return {ALL: [(t.block, t.kind, float(t.interference_relative or 0.0)) for t in known]}


def _importance(result: Inspection) -> Cells:
    """Added up by cell: the parts of all matrices sum to 1."""
    assert result.changes is not None
    sums: dict[tuple[int | None, str], float] = {}
    for tensor, value in expert_merging_importance(result.changes, result.coefficients).items():
        sums[result.places[tensor]] = sums.get(result.places[tensor], 0.0) + value
    return {ALL: [(block, kind, value) for (block, kind), value in sums.items()]}


def _principal(result: Inspection) -> Cells:
    assert result.principal is not None
    cells: Cells = {name: [] for name in result.principal.names}
    for tensor in result.principal.tensors:
        for name, ratio in zip(result.principal.names, result.principal.ratios([tensor]), strict=True):
            if ratio is not None:
                cells[name].append((tensor.block, tensor.kind, ratio))
    return cells


UNIT, BOTH = (0.0, 1.0), (-1.0, 1.0)
METRICS = (
    Metric("relative", "Relative change, ‖τ‖/‖W₀‖", "changes", "expert", ".2%",
           "How far training moved each module, relative to the size of its weights.",
           partial(_per_expert, "relative")),
    Metric("norm", "Size of the change, ‖τ‖", "changes", "expert", ".3g",
           "Large modules have large changes; for a fair look divide by the base (the first metric).",
           partial(_per_expert, "norm")),
    Metric("l1", "Sum of the change, ‖τ‖₁", "changes", "expert", ".3g",
           "Sum of |τ| over all weights of the module: what importance is made of.", partial(_per_expert, "l1")),
    Metric("spread", "Mean change of a weight", "changes", "expert", ".2g",
           "‖τ‖₁ divided by the number of weights.", partial(_per_expert, "spread")),
    Metric("largest", "Largest change of a weight", "changes", "expert", ".2g",
           "max |τ|: single weights that moved far.", partial(_per_expert, "largest")),
    Metric("unchanged", "Weights that did not change", "changes", "expert", ".0%",
           "Share with τ = 0: frozen modules, adapters, or changes that rounding removed.",
           partial(_per_expert, "unchanged"), UNIT),
    Metric("survival", "Changes that survive bfloat16", "changes", "expert", ".0%",
           "Of the changed weights, those that still differ from the base when both are saved in bfloat16.",
           partial(_from_changes, "survival"), UNIT),
    Metric("conflict", "Sign conflict, weighted by size", "changes", "pair", ".0%",
           "Share of what both experts change that points in opposite directions; 50 % is chance, above about 30 % "
           "methods that elect signs are worth comparing.", partial(_from_changes, "conflict_weighted"), UNIT, SHARE),
    Metric("kept_conflict", "Sign conflict of the largest changes", "trimmed", "pair", ".0%",
           "The same among the entries that both experts keep when trimmed.",
           partial(_trimmed, "conflict_of_both"), UNIT, SHARE),
    Metric("kept_overlap", "Overlap of the largest changes", "trimmed", "pair", ".0%",
           "Kept by both, of what at least one keeps when trimmed. Low: the experts use different weights.",
           partial(_trimmed, "overlap"), UNIT, SHARE),
    Metric("cosine", "Cosine of the changes", "changes", "pair", ".2f",
           "1 the same change, 0 unrelated, −1 the opposite.", _cosine, BOTH, SIGNED),
    Metric("erank", "Effective rank of values", "spectra", "expert", ".0f",
           "exp H(σ/Σσ): over how many directions the change is spread.",
           partial(_spectra, "effective_rank_of_values")),
    Metric("erank_energy", "Effective rank of energy", "spectra", "expert", ".0f",
           "exp H(σ²/Σσ²). Do not compare it with the other effective rank: it is always smaller.",
           partial(_spectra, "effective_rank_of_energy")),
    Metric("stable", "Stable rank, ‖τ‖²/σ₁²", "spectra", "expert", ".1f",
           "Low: one direction dominates.", partial(_spectra, "stable_rank")),
    Metric("k90", "Directions for 90 % of the energy", "spectra", "expert", ".0f",
           "Low: cheap to store, easy to keep apart.", partial(_spectra, "k90")),
    Metric("overlap_out", "Shared directions, outputs", "subspaces", "pair", ".2f",
           "1: the strongest directions of both experts span the same space; 0: they are at right angles.",
           partial(_overlap, "overlap_left"), UNIT, SHARE),
    Metric("overlap_in", "Shared directions, inputs", "subspaces", "pair", ".2f",
           "The same for what the modules listen to.", partial(_overlap, "overlap_right"), UNIT, SHARE),
    Metric("interference", "Singular task interference", "subspaces", "all", ".2f",
           "0 when all experts keep out of each other's way in outputs and inputs.", _interference),
    Metric("principal", "Change on principal weights", "principal", "expert", ".2f",
           "Share of the change on the entries that carry the base's main directions, over their share of all entries: "
           "1 means no preference, above 1 that training preferred them.",
           _principal),
    Metric("importance", "Importance of Expert Merging++", "changes", "all", ".1%",
           "Share of Σ |α|·‖τ‖₁: where finer coefficients, more bits or more rank pay first.", _importance),
    Metric("kept", "Kept by the merge, along τ", "changes", "expert", ".2f",
           "How much of an expert's change is found in the merged model: 1 all of it, 0 nothing, below 0 the opposite.",
           _kept),
)  # fmt: skip
