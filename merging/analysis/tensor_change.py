"""The figures of one tensor, and of several tensors as if they were one: numbers only, no weights.

Everything that is kept about a tensor can be added up (norms by their squares), so that figures of a layer, of all
attention weights or of the whole model follow from those of the tensors without a second look at the files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np


@dataclass(slots=True)
class MergedChange:
    """A merged model's task vector τ_m, seen against the experts' τ_k. Lists: one value per expert."""

    norm: float
    """‖τ_m‖."""
    dots: list[float]
    """⟨τ_m, τ_k⟩."""
    projection: list[float]
    """⟨τ_m, τ_k⟩ / ‖τ_k‖²: how much of τ_k is found along τ_k in the merge; 1 = all of it, 0 = none, negative = the
    contrary. Experts that resemble each other lend each other some."""
    kept: list[float]
    """⟨τ_m, τ_k⟩² / (‖τ_m‖² ‖τ_k‖²): the share of τ_k's energy that lies along the direction of τ_m."""
    coefficients: list[float]
    """c of the least-squares fit τ_m ≈ Σ c_k τ_k: what task arithmetic with these coefficients would come closest."""
    residual: float
    """‖τ_m − Σ c_k τ_k‖ / ‖τ_m‖: the share of the merge that no weighted sum of the experts explains. Computed from the
    dot products: below about 0.003 it cannot be told from 0."""


@dataclass(slots=True)
class TensorChange:
    """One tensor. Lists hold one value per expert, or per pair of experts in the order (0,1), (0,2), …, (1,2), …"""

    name: str
    block: int | None
    kind: str
    shape: tuple[int, ...]
    base_norm: float
    """‖W_0‖ (Frobenius, as all norms here)."""
    norm: list[float]
    """‖τ‖."""
    l1: list[float]
    """‖τ‖₁ = Σ |τ_i|."""
    largest: list[float]
    """max |τ_i|."""
    unchanged: list[float]
    """Share of entries with τ = 0."""
    survival: list[float]
    """Of the changed entries, the share that still differs from the base when both are rounded to bfloat16. 1 if
    nothing changed. See ``Changes.sampled``."""
    dots: list[float]
    """⟨τ_a, τ_b⟩."""
    both: list[int]
    """Entries that both experts of the pair changed."""
    conflict: list[float]
    """Of those, the share with opposite signs. Independent changes: about one half."""
    products: list[float]
    """Σ |τ_a τ_b|."""
    conflict_weighted: list[float]
    """Σ |τ_a τ_b| over entries with opposite signs / Σ |τ_a τ_b|."""
    merged: MergedChange | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def cosines(norms: Sequence[float], dots: Sequence[float]) -> np.ndarray:
    """The matrix of cosines from norms [n] and dot products [n (n - 1) / 2]; 0 where a norm is 0."""
    matrix = np.diag([float(norm > 0) for norm in norms])
    for (a, b), dot in zip(combinations(range(len(norms)), 2), dots, strict=True):
        scale = norms[a] * norms[b]
        matrix[a, b] = matrix[b, a] = min(1.0, max(-1.0, dot / scale)) if scale > 0 else 0.0
    return matrix


def ratio(part: np.ndarray, whole: np.ndarray, empty: float = 0.0) -> list[float]:
    """part / whole, and ``empty`` where the whole is 0."""
    return np.divide(part, whole, out=np.full(len(part), empty), where=whole > 0).tolist()


def merged_change(tau: np.ndarray, dots: np.ndarray, square: float) -> MergedChange:
    """From ⟨τ_a, τ_b⟩ [E, E], ⟨τ_m, τ_k⟩ [E] and ‖τ_m‖²."""
    squares = tau.diagonal()
    # Scaled to unit length, so that a small expert counts as much as a large one in what is called singular.
    lengths = np.sqrt(np.where(squares > 0, squares, 1.0))
    fit = np.linalg.lstsq(tau / np.outer(lengths, lengths), dots / lengths, rcond=1e-6)[0] / lengths
    rest = square - 2 * fit @ dots + fit @ tau @ fit
    return MergedChange(
        norm=math.sqrt(square),
        dots=dots.tolist(),
        projection=ratio(dots, squares),
        kept=np.clip(ratio(dots**2, squares * square), 0, 1).tolist(),
        coefficients=fit.tolist(),
        residual=math.sqrt(max(0.0, rest) / square) if square > 0 else 0.0,
    )


def joined(tensors: Sequence[TensorChange], experts: int, name: str) -> TensorChange:
    """The figures of one long tensor made of these: norms add by their squares, shares by what they are shares of. Its
    ``merged`` is about those of the tensors that the merged model has."""
    size = sum(t.numel for t in tensors)
    unchanged = _added(tensors, experts, lambda t: np.rint(np.array(t.unchanged) * t.numel))
    lost = _added(tensors, experts, lambda t: (1 - np.array(t.unchanged)) * t.numel * (1 - np.array(t.survival)))
    pairs = experts * (experts - 1) // 2
    squares = _added(tensors, experts, lambda t: np.square(t.norm))
    dots, both = _added(tensors, pairs, lambda t: t.dots), _added(tensors, pairs, lambda t: t.both)
    opposite = _added(tensors, pairs, lambda t: np.multiply(t.both, t.conflict))
    products = _added(tensors, pairs, lambda t: t.products)
    weighted = _added(tensors, pairs, lambda t: np.multiply(t.products, t.conflict_weighted))
    blocks, kinds = {t.block for t in tensors}, {t.kind for t in tensors}
    with_merged = [t for t in tensors if t.merged is not None]
    return TensorChange(
        name=name,
        block=blocks.pop() if len(blocks) == 1 else None,
        kind=kinds.pop() if len(kinds) == 1 else "other",
        shape=(size,),
        base_norm=math.sqrt(sum(t.base_norm**2 for t in tensors)),
        norm=np.sqrt(squares).tolist(),
        l1=_added(tensors, experts, lambda t: t.l1).tolist(),
        largest=np.max([t.largest for t in tensors], axis=0).tolist() if tensors else [0.0] * experts,
        unchanged=(unchanged / size).tolist() if size else [1.0] * experts,
        survival=(1 - np.array(ratio(lost, size - unchanged))).tolist(),
        dots=dots.tolist(),
        both=[round(count) for count in both],
        conflict=ratio(opposite, both),
        products=products.tolist(),
        conflict_weighted=ratio(weighted, products),
        merged=_total_merged(with_merged, experts) if with_merged else None,
    )


def _total_merged(tensors: Sequence[TensorChange], experts: int) -> MergedChange:
    merged = [t.merged for t in tensors if t.merged is not None]
    tau = np.diag(_added(tensors, experts, lambda t: np.square(t.norm)))
    for (a, b), dot in zip(
        combinations(range(experts), 2), _added(tensors, experts * (experts - 1) // 2, lambda t: t.dots), strict=True
    ):
        tau[a, b] = tau[b, a] = dot
    return merged_change(tau, np.sum([m.dots for m in merged], axis=0), sum(m.norm**2 for m in merged))


def _added(tensors: Sequence[TensorChange], length: int, values: Callable[[TensorChange], Any]) -> np.ndarray:
    total = np.zeros(length)
    for tensor in tensors:
        total += values(tensor)
    return total
