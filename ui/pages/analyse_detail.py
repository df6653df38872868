"""One tensor in full: its spectra, where its changes lie, whose signs disagree, and all numbers about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from merging.analysis.histogram import Histogram
from merging.analysis.inspection import Inspection
from merging.analysis.models import MERGED
from merging.analysis.spectra import Spectrum
from merging.analysis.trimmed import TrimmedTensor

from .. import plots, plots_tensor
from ..chart import MOST_LINES, Table, pairs_of
from ..components.cards import text


@dataclass(frozen=True, slots=True)
class Detail:
    """What is shown of a tensor. A figure is None where there is nothing to draw; the head then says why."""

    head: str
    spectrum: go.Figure | None
    histogram: go.Figure | None
    signs: go.Figure | None
    numbers: Table
    pairs: Table | None


@dataclass(frozen=True, slots=True)
class Words:
    """How to read the figures of any tensor: HTML."""

    spectrum: str
    histogram: str
    signs: str


def detail_of(result: Inspection, tensor: str, histogram: Histogram | str) -> Detail:
    """``histogram``: or why there is none."""
    own = [s for s in result.spectra or [] if s.tensor == tensor and s.of in _drawn(result)]
    notes, trimmed = [], [t for t in result.trimmed.tensors if t.name == tensor] if result.trimmed else []
    if result.spectra is not None and not own:
        notes.append("It is no single matrix, so it has no spectrum.")
    if isinstance(histogram, str):
        notes.append(histogram)
    elif not histogram.exact:
        notes.append(f"The histogram is sampled: {histogram.read:,} of {histogram.numel:,} weights, in even runs.")
    return Detail(
        _head(result, tensor, notes),
        plots.spectra([_curve(one) for one in own], dark=None) if own else None,
        None if isinstance(histogram, str) else _histogram(histogram),
        _signs(result, trimmed) if trimmed and len(result.names) > 1 else None,
        _numbers(result, tensor, own),
        _pairs(result, tensor),
    )


def words_of(result: Inspection) -> Words:
    if result.spectra is None:
        spectrum = _words("Singular values are not computed yet, or were not asked for.")
    else:
        tail = " Everything behind the first values is estimated." * any(s.estimated_tail for s in result.spectra)
        spectrum = _words(
            "Left: singular values relative to the largest, logarithmic; dotted: where they would end if the same "
            "energy were noise (Marchenko-Pastur), so what lies above is structure. Right: share of ‖τ‖² in the "
            f"first k directions; the marks are at 90 %.{tail}",
            _basis(result, "spectra"),
        )
    histogram = _words(
        "How the changes of single weights are distributed; all experts share one range. The scale is logarithmic: a "
        "bell looks like a parabola, and tails that stay up are single weights that moved far, which trimming keeps."
    )
    if len(result.names) < 2:
        signs = _words("With a single expert there are no signs to compare.")
    elif result.trimmed is None:
        signs = _words("The signs of the largest changes are not compared yet.")
    else:
        signs = _words(
            f"Each expert keeps its largest {result.trimmed.density:.0%} of the tensor. Of what at least one of a pair "
            "keeps, by size: kept by both with the same sign, with opposite signs (they cancel in a sum), or by one "
            f"alone. Of many pairs the {MOST_LINES} with most conflict are drawn.",
            _basis(result, "trimmed"),
        )
    return Words(spectrum, histogram, signs)


def _words(reading: str, basis: str = "") -> str:
    more = f'<p class="basis">{text(basis)}</p>' if basis else ""
    return f'<p class="reading">{text(reading)}</p>{more}'


def _basis(result: Inspection, part: str) -> str:
    return f"{result.parts[part].basis}: {result.parts[part].how}"


def place_words(result: Inspection, tensor: str) -> str:
    """ "layer 3, q"; "outside of layers"."""
    block, kind = result.places[tensor]
    module = plots.MODULES.get(kind, kind)
    return f"{module}, outside of layers" if block is None else f"layer {block}, {module}"


def _head(result: Inspection, tensor: str, notes: list[str]) -> str:
    change = next((t for t in result.changes.tensors if t.name == tensor), None) if result.changes else None
    facts = f" {' × '.join(map(str, change.shape))} · {change.numel:,} weights" if change else ""
    more = f'<p class="basis">{text(" ".join(notes))}</p>' if notes else ""
    return (
        f'<h3>{text(place_words(result, tensor))}</h3><p class="quiet"><code>{text(tensor)}</code>{text(facts)}</p>'
        f"{more}"
    )


# -- figures --------------------------------------------------------------------------------------------------------


def _drawn(result: Inspection) -> list[str]:
    names = result.names
    return [*names, MERGED, *([f"{names[0]} + {names[1]}"] if len(names) == 2 else [])]


def _curve(one: Spectrum) -> plots.Curve:
    measures = one.measures()
    return plots.Curve(one.of, one.values, one.frobenius, float(measures.k90), measures.marchenko_pastur_edge)


def _histogram(histogram: Histogram) -> go.Figure:
    return plots_tensor.histogram(histogram.names, histogram.centres, histogram.counts)


def _signs(result: Inspection, own: list[TrimmedTensor]) -> go.Figure:
    assert result.trimmed is not None
    titles, shares = pairs_of(result.names), result.trimmed.shares(own)
    chosen = sorted(sorted(range(len(shares)), key=lambda i: -shares[i].conflict_weight)[:MOST_LINES])
    fields = ("agree_weight", "conflict_weight", "alone_weight")
    return plots_tensor.pair_signs(
        [titles[i] for i in chosen], *([getattr(shares[i], field) for i in chosen] for field in fields)
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
