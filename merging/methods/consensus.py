"""Sign consensus: experts vote on the direction of each entry, and only those that agree count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .base import Block
from .formula import on_base, scaled, sum_of
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


def agreeing_formula(
    names: Sequence[str], factors: Sequence[float], shares: Sequence[float] | None, lambda_: float
) -> tuple[str, tuple[str, ...]]:
    """``agreeing_sum`` times λ on the base, as a formula of the sparse task vectors τ̂, and what its symbols mean."""
    agreed = sum_of(zip(factors, (f"a_{n}·τ̂_{n}" for n in names), strict=True))
    if agreed == "0" or lambda_ == 0:
        return "W = W₀", ()
    voted = sum_of(zip(factors, (f"τ̂_{n}" for n in names), strict=True))
    vote = (f"a_k = 1 where expert k pulls in the direction of {voted} (up where that is 0), else 0",)
    if shares is None:
        return f"W = {on_base(scaled(lambda_, agreed if lambda_ == 1 else f'({agreed})'))}", vote
    total = sum_of(zip(shares, (f"a_{n}" for n in names), strict=True))
    return f"W = {on_base(scaled(lambda_, f'({agreed}) / ({total})'))}", (*vote, "0 / 0 counts as 0: nobody agrees")


def sum_into(out: Tensor, terms: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Σ factor · vector over at least one term, in the listed order."""
    (first, factor), *others = terms
    torch.mul(first, factor, out=out)
    for vector, factor in others:
        out.add_(vector, alpha=factor)
    return out
