"""The charts about singular values: ranks, spectra, shared subspaces, principal weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from merging.analysis.inspection import Inspection
from merging.analysis.models import MERGED
from merging.analysis.spectra import Measures, Spectrum

from . import plots
from .chart import MOST_LINES, Chart, Table, chart, grouped, plain

MOST_MATRICES = 24
"""Matrices whose spectra can be looked at; the table has the measures of all."""
MEASURES = {
    "effective_rank_of_values": ("effective rank of values", "exp H(σ/Σσ), Roy and Vetterli", ".0f"),
    "effective_rank_of_energy": ("effective rank of energy", "exp H(σ²/Σσ²), D-Rank", ".0f"),
    "stable_rank": ("stable rank", "‖τ‖²/σ₁²", ".1f"),
    "participation": ("participation", "(Σσ²)²/Σσ⁴", ".1f"),
    "k90": ("k for 90 % of the energy", "directions", ".0f"),
}
"""Field of ``Measures`` -> its name, its formula, and its format."""


def spectra(result: Inspection) -> list[Chart]:
    assert result.spectra is not None
    found, names = result.spectra, result.names
    if not found:
        return []
    measured = {(s.tensor, s.of): s.measures() for s in found}
    drawn = [*names, MERGED, *([f"{names[0]} + {names[1]}"] if len(names) == 2 else [])]
    drawn = [of for of in drawn if any(s.of == of for s in found)]
    by_tensor: dict[str, list[Spectrum]] = {}
    for one in found:
        if one.of in drawn:
            by_tensor.setdefault(one.tensor, []).append(one)
    text = " Everything behind the first values is estimated." if any(s.estimated_tail for s in found) else ""
    columns = ["tensor", "whose", "rows", "columns", *(f"{name} = {unit}" for name, unit, _ in MEASURES.values())]
    columns += ["k95", "k99", "‖τ‖", "‖τ‖/‖W₀‖", "σ₁", "noise edge", "values above it"]
    rows = [[s.tensor, s.of, *s.shape, *_cells(s, measured[s.tensor, s.of])] for s in found]
    ranks = chart("ranks", result, "spectra", Table(columns, rows), estimated=text)
    for field, (name, _, form) in MEASURES.items():
        values = {of: [(*result.places[s.tensor], float(getattr(measured[s.tensor, of], field)))
                       for s in found if s.of == of] for of in drawn}  # fmt: skip
        grids = {of: plots.grid(cells) for of, cells in values.items()}
        top = max((float(np.nanmax(grid.values)) for grid in grids.values() if grid.layers), default=1.0)
        for title, group in grouped(drawn, name):
            if any(grids[of].layers for of in group):
                figure = plots.maps({of: grids[of] for of in group}, name, form=form, limits=(0.0, top))
                ranks.variants.append((title, figure))
    chosen = _chosen(result, list(by_tensor))
    first = [[tensor, s.of, *plain(s.values[:8])] for tensor in chosen for s in by_tensor[tensor]]
    single = chart(
        "spectra", result, "spectra", Table(["matrix", "whose", *(f"σ{i}" for i in range(1, 9))], first), estimated=text
    )
    for tensor in chosen:
        own = by_tensor[tensor]
        block, kind = result.places[tensor]
        where = tensor if block is None else f"layer {block}, {plots.MODULES.get(kind, kind)}"
        title = f"{where} ({own[0].shape[0]} × {own[0].shape[1]})"
        single.variants.append((title, plots.spectra([_curve(s, measured[s.tensor, s.of]) for s in own])))
    return [ranks, single]


def _chosen(result: Inspection, tensors: list[str]) -> list[str]:
    """Those of the middle, first and last block, in this order."""
    blocks = sorted({block for tensor in tensors if (block := result.places[tensor][0]) is not None})
    if not blocks:
        return tensors[:MOST_MATRICES]
    wanted = dict.fromkeys([blocks[len(blocks) // 2], blocks[0], blocks[-1]])
    return [tensor for block in wanted for tensor in tensors if result.places[tensor][0] == block][:MOST_MATRICES]


def _curve(one: Spectrum, measures: Measures) -> plots.Curve:
    return plots.Curve(one.of, one.values, one.frobenius, float(measures.k90), measures.marchenko_pastur_edge)


def _cells(one: Spectrum, m: Measures) -> list[Any]:
    first = float(one.values[0]) if len(one.values) else None
    named = [getattr(m, field) for field in MEASURES]
    return [*named, m.k95, m.k99, m.frobenius, m.relative, first, m.marchenko_pastur_edge, m.above_edge]


def subspaces(result: Inspection) -> list[Chart]:
    assert result.subspaces is not None
    known, names = result.subspaces, result.names
    if len(names) < 2 or not known.tensors:
        return []
    columns = ["tensor", "pair", "rank", "overlap of outputs", "chance", "overlap of inputs", "chance "]
    columns += ["largest angle of outputs (°)", "Grassmann distance of outputs", "cosine of the leading parts"]
    rows = [
        [
            *[t.name, f"{p.a} and {p.b}", p.rank, p.overlap_left, p.expected_left, p.overlap_right, p.expected_right],
            *[float(np.degrees(p.angles_left[-1])) if p.rank else None, p.distance_left, p.cosine],
            p.interference_relative,
        ]
        for t in known.tensors
        for p in t.pairs
    ]
    found = chart("subspaces", result, "subspaces", Table([*columns, "interference / Σσ"], rows), rank=known.rank)
    for side, overlap, expected in (
        ("outputs", "overlap_left", "expected_left"),
        ("inputs", "overlap_right", "expected_right"),
    ):
        pairs = [(t.block, p) for t in known.tensors for p in t.pairs if p.b != MERGED and p.rank]
        if not pairs:
            continue
        matrix = np.full((len(names), len(names)), np.nan)
        lines = {}
        for a, b in dict.fromkeys((p.a, p.b) for _, p in pairs):
            own = [(block, getattr(p, overlap)) for block, p in pairs if (p.a, p.b) == (a, b)]
            i, j = names.index(a), names.index(b)
            matrix[i, j] = matrix[j, i] = float(np.mean([value for _, value in own]))
            blocks = sorted({block for block, _ in own if block is not None})
            lines[f"{a} and {b}"] = (blocks, [float(np.mean([v for at, v in own if at == n])) for n in blocks])
        chance = {"chance": float(np.mean([getattr(p, expected) for _, p in pairs]))}
        unit = f"overlap of {side}"
        found.variants.append((f"{side}, mean of all matrices", plots.overlap(names, matrix, unit)))
        if len(lines) <= MOST_LINES and all(blocks for blocks, _ in lines.values()):
            found.variants.append((f"{side}, layer by layer", plots.by_layer(lines, unit, marks=chance)))
    together: dict[int, list[float]] = {}
    for tensor in known.tensors:
        if tensor.block is not None and tensor.interference_relative is not None:
            together.setdefault(tensor.block, []).append(tensor.interference_relative)
    if together:
        line = {"all experts": (sorted(together), [float(np.mean(together[block])) for block in sorted(together)])}
        found.variants.append(("singular task interference", plots.by_layer(line, "interference / Σσ")))
    return [found]


def principal(result: Inspection) -> list[Chart]:
    assert result.principal is not None
    known = result.principal
    if not known.tensors:
        return []
    ratios = known.ratios()
    rows: list[list[Any]] = [[name, ratio, None, None] for name, ratio in zip(known.names, ratios, strict=True)]
    for (a, b), (inside, outside) in zip(known.pairs, known.overlaps(), strict=True):
        rows.append([f"{known.names[a]} and {known.names[b]}", None, inside, outside])
    table = Table(["whose", "energy ratio", "overlap on principal weights", "overlap elsewhere"], rows)
    chance = known.density / (2 - known.density)
    found = chart("principal", result, "principal", table, density=known.density, rank=known.rank, chance=chance)
    found.variants = [("", plots.bars(known.names, {"energy ratio": ratios}, "1 = no preference"))]
    return [found]
