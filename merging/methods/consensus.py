"""Sign consensus: experts vote on the direction of each entry, and only those that agree count."""

from __future__ import annotations

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
    agreed = block.buffer("agreed").zero_()
    if not used:
        return agreed
    direction, share = block.buffer("direction").zero_(), block.buffer("share")
    for k in used:
        direction.add_(vectors[k], alpha=factors[k])
    torch.ge(direction, 0, out=direction).mul_(2).sub_(1)
    total = block.buffer("total").zero_() if shares is not None else None
    for k in used:
        # the entry in the elected direction: positive if it agrees (negative, for a negative factor)
        along = vectors[k].mul_(direction)
        if factors[k] > 0:
            along.clamp_(min=0)
        else:
            along.clamp_(max=0)
        agreed.add_(along, alpha=factors[k])
        if total is not None and shares is not None:
            total.add_(torch.ne(along, 0, out=share), alpha=shares[k])
    if total is not None and shares is not None:
        if min(shares[k] for k in used) > 0:  # zero only where nobody agrees, and there the sum is zero too
            total.clamp_(min=min(shares[k] for k in used))
        else:
            total.add_(torch.eq(total, 0, out=share))
        agreed.div_(total)
    return agreed.mul_(direction)
