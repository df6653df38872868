"""Sign consensus: experts vote on the direction of each entry, and only those that agree count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .base import Block
from .lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def agreeing_sum(block: Block, vectors: list[Tensor], factors: list[float], shares: list[float] | None) -> Tensor:
    """Σ f_k τ_k over the experts whose weighted entry f_k τ_k has the elected sign; overwrites ``vectors``.

    Elected sign: that of Σ_k f_k τ_k, and + where the sum is zero. Zeros (trimmed, dropped, factor 0) never agree.
    With ``shares`` the result is divided by the sum of the agreeing experts' (signed) shares, and where that is
    zero by 1. Source: Yadav et al. (TIES, arXiv 2306.01708) in the weighted form of mergekit 0.1.5.
    """
    used = [k for k, f in enumerate(factors) if f]
    if not used:
        return block.buffer("agreed").zero_()
    direction = sum_into(block.buffer("direction"), [(vectors[k], factors[k]) for k in used])
    torch.ge(direction, 0, out=direction).mul_(2).sub_(1)
    for k in used:
        # the entry in the elected direction: positive if it agrees (negative, for a negative factor)
        along = vectors[k].mul_(direction)
        if factors[k] > 0:
            along.clamp_(min=0)
        else:
            along.clamp_(max=0)
    agreed = sum_into(block.buffer("agreed"), [(vectors[k], factors[k]) for k in used])
    if shares is not None:
        for k in used:
            torch.ne(vectors[k], 0, out=vectors[k])
        total = sum_into(block.buffer("total"), [(vectors[k], shares[k]) for k in used])
        least = min(shares[k] for k in used)
        if least > 0:  # zero only where nobody agrees, and there the sum is zero too
            total.clamp_(min=least)
        else:
            total.add_(torch.eq(total, 0, out=block.buffer("nobody")))
        agreed.div_(total)
    return agreed.mul_(direction)


def sum_into(out: Tensor, terms: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Σ factor · vector over at least one term, in the listed order."""
    (first, factor), *others = terms
    torch.mul(first, factor, out=out)
    for vector, factor in others:
        out.add_(vector, alpha=factor)
    return out
