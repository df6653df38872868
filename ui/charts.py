"""An inspection as charts, in the order in which a reader asks. The report and the workbench both draw from here.

Here are the charts about sizes, directions and signs; ``charts_spectra`` has those about singular values,
``charts_with_text`` those that need texts. How a figure looks is the affair of ``plots``, what it means that of
``chart_words``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from merging.analysis import importance
from merging.analysis.inspection import Inspection
from merging.analysis.models import MERGED

from . import charts_spectra, charts_with_text, plots
from .chart import MOST_LINES, Chart, Table, chart, grouped, pairs_of, plain


def charts_of(result: Inspection, *wanted: str) -> list[Chart]:
    """The charts of all parts that there are; with ``wanted`` (keys) only those, and others of the same making."""
    makers: list[tuple[Any, tuple[str, ...], Callable[[Inspection], list[Chart]]]] = [
        (result.changes, ("sizes", "importance"), _sizes),
        (result.changes, ("cosine",), _directions),
        (result.changes, ("kept",), _kept),
        (result.trimmed, ("signs",), _signs),
        (result.spectra, ("ranks", "spectra"), charts_spectra.spectra),
        (result.subspaces, ("subspaces",), charts_spectra.subspaces),
        (result.principal, ("principal",), charts_spectra.principal),
        (result.texts, charts_with_text.KEYS, charts_with_text.with_texts),
    ]
    chosen = [make for part, keys, make in makers if part and (not wanted or set(keys) & set(wanted))]
    return [found for make in chosen for found in make(result)]


# -- sizes --------------------------------------------------------------------------------------------------------


def _sizes(result: Inspection) -> list[Chart]:
    assert result.changes is not None
    changes, names = result.changes, result.names
    relative = importance.importance_table(changes, "relative")
    sizes = chart("sizes", result, "changes", _by_place(relative, names))
    spread = importance.importance_table(changes, "spread")
    for title, table, unit, form in (
        ("‖τ‖/‖W₀‖", relative, "of ‖W₀‖", ".2%"),
        ("mean |τ| of a weight", spread, "mean |τ|", ".2g"),
    ):
        top = float(np.nanmax(table.values)) if np.isfinite(table.values).any() else 1.0
        for shown, group in grouped(names, title):
            grids = {name: _grid(table, names.index(name)) for name in group}
            if any(grid.layers for grid in grids.values()):
                sizes.variants.append((shown, plots.maps(grids, unit, form=form, limits=(0.0, top))))
    together = importance.expert_merging_table(changes, result.coefficients)
    grid = _grid(together, 0)
    if not grid.layers:
        return [sizes]
    totals = [float(v) for block, v in zip(together.blocks, together.per_block[0], strict=True) if block is not None]
    rows = [[n, *plain(row), total] for n, row, total in zip(grid.layers, grid.values, totals, strict=True)]
    given = ", ".join(f"{c:g}" for c in result.coefficients)
    columns = ["layer", *grid.modules, "layer in all"]
    budget = chart("importance", result, "changes", Table(columns, rows), coefficients=given)
    budget.variants = [
        ("", plots.importance(grid, "share of I per matrix", totals, "share of I per layer", form=".1%"))
    ]
    return [sizes, budget]


def _grid(table: importance.Table, expert: int) -> plots.Grid:
    """One expert's part of a table, blocks only."""
    cells = [
        (block, kind, float(value))
        for block, row in zip(table.blocks, table.values[expert], strict=True)
        for kind, value in zip(table.kinds, row, strict=True)
        if np.isfinite(value)
    ]
    return plots.grid(cells)


def _by_place(table: importance.Table, names: Sequence[str]) -> Table:
    """A row per layer and kind of module, a column per expert, and rows for whole layers."""
    rows: list[list[Any]] = []
    for i, block in enumerate(table.blocks):
        layer = "outside of layers" if block is None else block
        for j, kind in enumerate(table.kinds):
            values = plain(table.values[:, i, j])
            if any(value is not None for value in values):
                rows.append([layer, kind, *values])
        rows.append([layer, "all", *plain(table.per_block[:, i])])
    return Table(["layer", "module", *names], rows)


# -- experts against experts --------------------------------------------------------------------------------------


def _directions(result: Inspection) -> list[Chart]:
    assert result.changes is not None
    changes, names = result.changes, result.names
    if len(names) < 2:
        return []
    whole, by_block = changes.cosine(), changes.cosine_by_block()
    blocks = [block for block in changes.blocks if block is not None]
    lines = {
        pair: (blocks, [float(by_block[block][a, b]) for block in blocks])
        for pair, (a, b) in zip(pairs_of(names), changes.pairs, strict=True)
    }
    rows = [
        [pair, float(whole[a, b]), *lines[pair][1]] for pair, (a, b) in zip(pairs_of(names), changes.pairs, strict=True)
    ]
    table = Table(["pair", "whole model", *(f"layer {block}" for block in blocks)], rows)
    found = chart("cosine", result, "changes", table)
    found.variants = [("whole model", plots.cosine(names, whole))]
    if blocks and len(lines) <= MOST_LINES:
        found.variants.append(("layer by layer", plots.by_layer(lines, "cosine of the task vectors", marks={"": 0.0})))
    return [found]


def _signs(result: Inspection) -> list[Chart]:
    assert result.trimmed is not None
    trimmed, titles = result.trimmed, pairs_of(result.names)
    if not titles:
        return []
    blocks = [block for block in trimmed.blocks if block is not None]
    whole, by_block = trimmed.shares(), [trimmed.shares(trimmed.select(block)) for block in blocks]
    fields = {
        "same sign": "agree",
        "opposite signs": "conflict",
        "only one": "alone",
        "same sign, weighted": "agree_weight",
        "opposite signs, weighted": "conflict_weight",
        "only one, weighted": "alone_weight",
        "overlap (Jaccard)": "overlap",
        "overlap, weighted": "overlap_weight",
        "conflict of what both keep, weighted": "conflict_of_both",
    }
    rows = [[title, *(getattr(s, f) for f in fields.values())] for title, s in zip(titles, whole, strict=True)]
    found = chart("signs", result, "trimmed", Table(["pair", *fields], rows), density=trimmed.density)
    worst = sorted(range(len(whole)), key=lambda i: -whole[i].conflict_of_both)[: MOST_LINES if blocks else 0]
    for i in worst:
        shares = ([getattr(s[i], f) for s in by_block] for f in ("agree_weight", "conflict_weight", "alone_weight"))
        found.variants.append((titles[i], plots.sign_split(blocks, *shares)))
    return [found]


def _kept(result: Inspection) -> list[Chart]:
    assert result.changes is not None
    changes, names = result.changes, result.names
    merged = changes.total().merged
    if merged is None:
        return []
    measures: dict[str, Sequence[float | None]] = {
        "of τₖ, along τₖ": merged.projection,
        "nearest coefficient": merged.coefficients,
    }
    aligned = _alignment(result)
    if aligned:
        measures["in the merge's leading directions"] = aligned
    by_block = {b: changes.total(changes.select(b)).merged for b in changes.blocks if b is not None}
    lines = {
        name: ([b for b, m in by_block.items() if m], [m.projection[k] for m in by_block.values() if m])
        for k, name in enumerate(names)
    }
    blocks = lines[names[0]][0]
    rows = [
        [name, *(values[k] for values in measures.values()), merged.kept[k], *lines[name][1]]
        for k, name in enumerate(names)
    ]
    table = Table(["expert", *measures, "cos² of the two", *(f"along τₖ, layer {b}" for b in blocks)], rows)
    text = " Third: how much of it lies in the merge's leading directions (subspace alignment)." if aligned else ""
    found = chart("kept", result, "changes", table, residual=merged.residual, aligned=text)
    found.variants = [("whole model", plots.bars(names, measures, "1 = all of it"))]
    if blocks:
        found.variants.append(("layer by layer", plots.by_layer(lines, "of τₖ, along τₖ", marks={"all": 1.0})))
    return [found]


def _alignment(result: Inspection) -> list[float | None]:
    """Mean subspace alignment ratio of each expert with the merged model, on the side of the outputs."""
    found: dict[str, list[float]] = {name: [] for name in result.names}
    for tensor in result.subspaces.tensors if result.subspaces else []:
        for pair in tensor.pairs:
            if pair.b == MERGED and pair.kept_left is not None:
                found[pair.a].append(pair.kept_left)
    return [float(np.mean(v)) if v else None for v in found.values()] if any(found.values()) else []
