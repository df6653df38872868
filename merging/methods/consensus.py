"""Sign consensus: experts vote on the direction of each entry, and only those that agree count."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Block
from .lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def agreeing_sum(block: Block, vectors: list[Tensor], weights: list[float], normalize: bool) -> Tensor:
    """Σ w_k τ_k over the experts whose weighted entry has the elected sign; overwrites ``vectors``.

    Elected sign: that of Σ_k w_k τ_k, and + where the sum is zero. An entry agrees if w_k τ_k has that
    sign; zeros (trimmed, dropped, weight 0) never do. With ``normalize`` the result is divided by the sum
    of the agreeing (signed) weights, and where that sum is zero by 1.
    Source: Yadav et al. (TIES, arXiv 2306.01708) in the weighted form of mergekit 0.1.5.
    """
    used = [k for k, w in enumerate(weights) if w]
    result, votes, share = block.buffer("sum").zero_(), block.buffer("votes"), block.buffer("share")
    if not used:
        return result
    for k in used:
        result.add_(vectors[k].mul_(weights[k]))
    one = block.workspace.buffer("one", 1, result.dtype).fill_(1)
    direction = torch.copysign(one, result.add_(0), out=result)  # −0.0 + 0 = +0.0, so zero elects +
    agreed, total = block.buffer("agreed").zero_(), block.buffer("total").zero_()
    for k in used:
        torch.mul(vectors[k], direction, out=votes).clamp_(min=0)
        agreed.add_(votes)
        if normalize:
            total.add_(torch.gt(votes, 0, out=share), alpha=weights[k])
    if normalize:
        total.add_(torch.eq(total, 0, out=share))
        agreed.div_(total)
    return torch.mul(agreed, direction, out=agreed)
