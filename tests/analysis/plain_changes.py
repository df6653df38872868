"""The figures of ``merging.analysis.changes`` and ``trimmed`` once more: whole tensors, float64, one formula a line."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor


def plain_change(
    base: Tensor, experts: list[Tensor], merged: Tensor | None = None, block: int = 1 << 62, every: int = 1
) -> dict[str, Any]:
    """``every``: survival is told from each so-manieth ``block`` elements."""
    w0 = base.double().numpy().ravel()
    tau = [e.double().numpy().ravel() - w0 for e in experts]
    pairs = list(combinations(tau, 2))
    seen = np.arange(w0.size) // block % every == 0
    in_bf16 = [to_bfloat16(e) != to_bfloat16(base) for e in experts]
    both = [(a != 0) & (b != 0) for a, b in pairs]
    conflict = [a * b < 0 for a, b in pairs]
    result: dict[str, Any] = {
        "base_norm": np.linalg.norm(w0),
        "norm": [np.linalg.norm(t) for t in tau],
        "l1": [np.abs(t).sum() for t in tau],
        "largest": [np.abs(t).max() for t in tau],
        "unchanged": [(t == 0).mean() for t in tau],
        "survival": [
            kept[seen].sum() / (t[seen] != 0).sum() if t[seen].any() else 1
            for kept, t in zip(in_bf16, tau, strict=True)
        ],
        "dots": [a @ b for a, b in pairs],
        "both": [b.sum() for b in both],
        "conflict": [c.sum() / max(1, b.sum()) for c, b in zip(conflict, both, strict=True)],
        "products": [np.abs(a * b).sum() for a, b in pairs],
        "conflict_weighted": [
            np.abs(a * b)[c].sum() / (np.abs(a * b).sum() or 1) for (a, b), c in zip(pairs, conflict, strict=True)
        ],
    }
    if merged is not None:
        m = merged.double().numpy().ravel() - w0
        squares = [float(t @ t) for t in tau]
        fit, _, rank, _ = np.linalg.lstsq(np.stack(tau, axis=1), m, rcond=None)
        result["merged"] = {
            "norm": np.linalg.norm(m),
            "dots": [m @ t for t in tau],
            "projection": [m @ t / s if s else 0 for t, s in zip(tau, squares, strict=True)],
            "kept": [(m @ t) ** 2 / (s * (m @ m)) if s and m.any() else 0 for t, s in zip(tau, squares, strict=True)],
            "coefficients": fit,
            "residual": np.linalg.norm(m - np.stack(tau, axis=1) @ fit) / (np.linalg.norm(m) or 1),
        }
        if rank < len(tau):  # there are many; which one is a matter of taste
            del result["merged"]["coefficients"]
    return result


def to_bfloat16(values: Tensor) -> np.ndarray:
    """Rounded to nearest even, in whole numbers: the float64's mantissa (52 bits) is cut to 7. Normal numbers only."""
    bits = values.double().numpy().ravel().view(np.uint64)
    half, odd = np.uint64((1 << 44) - 1), (bits >> np.uint64(45)) & np.uint64(1)
    return (((bits + half + odd) >> np.uint64(45)) << np.uint64(45)).view(np.float64) + 0.0


def plain_trim(base: Tensor, expert: Tensor, density: float) -> np.ndarray:
    """τ with all but its ⌊density n⌋ (at least 1) largest entries set to 0; of equal ones the first stay."""
    tau = expert.double().numpy().ravel() - base.double().numpy().ravel()
    kept = np.zeros_like(tau)
    chosen = np.argsort(-np.abs(tau), kind="stable")[: max(1, int(density * tau.size))]
    kept[chosen] = tau[chosen]
    return kept


def plain_shares(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """For two trimmed task vectors: shares of the entries that at least one keeps, and shares of weight."""
    either, both, opposite = (a != 0) | (b != 0), (a != 0) & (b != 0), a * b < 0
    agree = both & ~opposite
    n = max(1, either.sum())
    x, y = (np.abs(v) / np.abs(v).sum() if v.any() else None for v in (a, b))
    weights = [w for w in (x, y) if w is not None]

    def share(where: np.ndarray) -> float:
        return float(np.mean([w[where].sum() for w in weights])) if weights else 0.0

    return {
        "agree": agree.sum() / n,
        "conflict": opposite.sum() / n,
        "alone": (either & ~both).sum() / n,
        "agree_weight": share(agree),
        "conflict_weight": share(opposite),
        "alone_weight": share(~both),
    }


def tensors(state: dict[str, Tensor], names: list[str]) -> Tensor:
    """Several tensors as one long one."""
    return torch.cat([state[name].reshape(-1) for name in names])
