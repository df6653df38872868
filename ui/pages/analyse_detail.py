"""One tensor in full: its spectra, where its changes lie, whose signs disagree, and all numbers about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from merging.analysis.histogram import Histogram
from merging.analysis.inspection import Inspection
from merging.analysis.models import MERGED
from merging.analysis.spectra import Spectrum

from .. import plots, plots_tensor
from ..chart import MOST_LINES, Table, pairs_of
from ..components.cards import text


@dataclass(frozen=True, slots=True)
class Detail:
    """What is shown of a tensor. A figure is None where there is nothing to draw; its words then say why."""

    head: str
    spectrum: go.Figure | None
    spectrum_words: str
    signs: go.Figure | None
    signs_words: str
    numbers: Table
    pairs: Table | None


def detail_of(result: Inspection, tensor: str) -> Detail:
    own = [s for s in result.spectra or [] if s.tensor == tensor and s.of in _drawn(result)]
    signs, signs_words = _signs(result, tensor)
    return Detail(
        _head(result, tensor),
        plots.spectra([_curve(one) for one in own]) if own else None,
        _spectrum_words(result, own),
        signs,
        signs_words,
        _numbers(result, tensor, own),
        _pairs(result, tensor),
    )


def histogram_words(histogram: Histogram) -> str:
    """HTML."""
    basis = (
        "Exact: all weights of the tensor."
        if histogram.exact
        else f"Sampled: {histogram.read:,} of {histogram.numel:,} weights, in evenly spaced runs."
    )
    return _words(
        "How the changes of single weights are distributed; all experts share one range. The scale is logarithmic: a "
        "bell looks like a parabola, and tails that stay up are single weights that moved far, which trimming keeps.",
        basis,
    )


def histogram_figure(histogram: Histogram) -> go.Figure:
    return plots_tensor.histogram(histogram.names, histogram.centres, histogram.counts)


def place_words(result: Inspection, tensor: str) -> str:
    """ "layer 3, q"; "outside of layers"."""
    block, kind = result.places[tensor]
    module = plots.MODULES.get(kind, kind)
    return f"{module}, outside of layers" if block is None else f"layer {block}, {module}"


def _head(result: Inspection, tensor: str) -> str:
    change = next((t for t in result.changes.tensors if t.name == tensor), None) if result.changes else None
    shape = " × ".join(map(str, change.shape)) if change else ""
    size = f" · {change.numel:,} weights" if change else ""
    return (
        f'<h3>{text(place_words(result, tensor))}</h3><p class="quiet"><code>{text(tensor)}</code> '
        f"{text(shape)}{text(size)}</p>"
    )


def _words(reading: str, basis: str = "") -> str:
    more = f'<p class="basis">{text(basis)}</p>' if basis else ""
    return f'<p class="reading">{text(reading)}</p>{more}'


# -- spectra --------------------------------------------------------------------------------------------------------


def _drawn(result: Inspection) -> list[str]:
    names = result.names
    return [*names, MERGED, *([f"{names[0]} + {names[1]}"] if len(names) == 2 else [])]


def _curve(one: Spectrum) -> plots.Curve:
    measures = one.measures()
    return plots.Curve(one.of, one.values, one.frobenius, float(measures.k90), measures.marchenko_pastur_edge)


def _spectrum_words(result: Inspection, own: list[Spectrum]) -> str:
    if own:
        estimated = " Everything behind the first values is estimated." if any(s.estimated_tail for s in own) else ""
        facts = result.parts["spectra"]
        return _words(
            "Left: singular values relative to the largest, logarithmic; dotted: where they would end if the "
            "same energy were noise (Marchenko-Pastur), so what lies above is structure. Right: share of ‖τ‖² in the "
            f"first k directions; the marks are at 90 %.{estimated}",
            f"{facts.basis}: {facts.how}",
        )
    if result.spectra is None:
        return _words("Singular values are not computed yet, or were not asked for.")
    return _words("This tensor is no single matrix, so it has no spectrum.")


# -- signs ----------------------------------------------------------------------------------------------------------


def _signs(result: Inspection, tensor: str) -> tuple[go.Figure | None, str]:
    titles = pairs_of(result.names)
    if not titles:
        return None, _words("With a single expert there are no signs to compare.")
    trimmed = result.trimmed
    own = [t for t in trimmed.tensors if t.name == tensor] if trimmed else []
    if trimmed is None or not own:
        return None, _words("The largest changes are not compared yet.")
    shares = trimmed.shares(own)
    worst = sorted(range(len(shares)), key=lambda i: -shares[i].conflict_weight)[:MOST_LINES]
    chosen = sorted(worst)
    figure = plots_tensor.pair_signs(
        [titles[i] for i in chosen],
        *([getattr(shares[i], f) for i in chosen] for f in ("agree_weight", "conflict_weight", "alone_weight")),
    )
    some = f" The {len(chosen)} pairs with most conflict are drawn." if len(chosen) < len(titles) else ""
    return figure, _words(
        f"Each expert keeps its largest {trimmed.density:.0%} of this tensor. Of what at least one of a pair keeps, by "
        f"size: kept by both with the same sign, with opposite signs (they cancel in a sum), or by one alone.{some}",
        f"{result.parts['trimmed'].basis}: {result.parts['trimmed'].how}",
    )


# -- tables ---------------------------------------------------------------------------------------------------------


def _numbers(result: Inspection, tensor: str, own: list[Spectrum]) -> Table:
    """A row per measure, a column per expert (and for the merged model)."""
    whose = [*result.names, *([MERGED] if result.reference["merged"] is not None else [])]
    rows: list[list[Any]] = []
    change = next((t for t in result.changes.tensors if t.name == tensor), None) if result.changes else None
    if change is not None:
        base = change.base_norm
        merged = change.merged
        norms = [*change.norm, *([merged.norm] if merged else [])]
        rows.append(["‖τ‖/‖W₀‖", *([n / base for n in norms] if base else [None])])
        rows.append(["‖τ‖", *norms])
        rows.append(["‖τ‖₁", *change.l1])
        rows.append(["max |τ|", *change.largest])
        rows.append(["weights that did not change", *change.unchanged])
        rows.append(["changes that survive bfloat16", *change.survival])
        if merged is not None:
            rows.append(["kept by the merge, along τ", *merged.projection])
    for field, name in (
        ("effective_rank_of_values", "effective rank of values"),
        ("effective_rank_of_energy", "effective rank of energy"),
        ("stable_rank", "stable rank"),
        ("k90", "directions for 90 % of the energy"),
        ("above_edge", "singular values above the noise edge"),
    ):
        values = {one.of: getattr(one.measures(), field) for one in own}
        if values:
            rows.append([name, *(values.get(who) for who in whose)])
    ratios = [t for t in result.principal.tensors if t.name == tensor] if result.principal else []
    if ratios and result.principal:
        rows.append(["change on principal weights (1: no preference)", *result.principal.ratios(ratios)])
    width = len(whose) + 1
    return Table(["measure", *whose], [(row + [None] * width)[:width] for row in rows])


def _pairs(result: Inspection, tensor: str) -> Table | None:
    """A row per pair of experts."""
    titles = pairs_of(result.names)
    if not titles or result.changes is None:
        return None
    change = [t for t in result.changes.tensors if t.name == tensor]
    matrix, total = result.changes.cosine(change), result.changes.total(change)
    columns = ["pair", "cosine", "sign conflict", "sign conflict, weighted"]
    rows: list[list[Any]] = [
        [title, float(matrix[a, b]), total.conflict[i], total.conflict_weighted[i]]
        for i, (title, (a, b)) in enumerate(zip(titles, result.changes.pairs, strict=True))
    ]
    if result.trimmed is not None:
        columns += ["overlap of the largest", "conflict of the largest, weighted"]
        shares = result.trimmed.shares([t for t in result.trimmed.tensors if t.name == tensor])
        for row, share in zip(rows, shares, strict=True):
            row += [share.overlap, share.conflict_of_both]
    if result.subspaces is not None:
        columns += ["overlap of directions, outputs", "overlap of directions, inputs"]
        known = {f"{p.a} and {p.b}": p for t in result.subspaces.tensors if t.name == tensor for p in t.pairs}
        for row in rows:
            pair = known.get(row[0])
            row += [pair.overlap_left, pair.overlap_right] if pair and pair.rank else [None, None]
    return Table(columns, rows)
