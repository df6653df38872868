"""PCB-Merging: parameter competition balancing (Du et al., NeurIPS 2024, arXiv 2410.02396).

Every entry of every task vector gets a score β = intra · inter: how large it is within its own expert, and
how well it goes together with the other experts at the same place. The best ``ratio`` of each expert's
entries stay, weighted by their score:

1. Clip: A_k = |τ_k| limited to its [q, 1−q] order statistics (the elements of rank ⌊Dq⌋ and ⌊D(1−q)−1⌋);
   C_k = sign(τ_k)·A_k;  n_k = A_k brought to [0, 1] by its smallest and largest value;  s_k = sign(τ_k)·n_k.
2. intra_k = exp(N·n_k²), N experts.
3. inter_k, by ``variant``:  C (authors' evolutionary version, closest to the paper)  Σ_j tanh(s_k·s_j);
   A  tanh(τ_k·Σ_j τ_j);  B  tanh(τ_k·Σ_j s_j).
4. β_k = intra_k·inter_k;  t_k = its element of rank ⌊D(1−r)⌋;  w_k = max(β_k − t_k, 0) / (max β_k − t_k).
5. τ = Σ_k λ_k C_k w_k / max(Σ_k w_k, 1e-12);  θ = θ_0 + λ·τ.

D is the size of the tensor (``scope: tensor``) or of all merged tensors (``scope: global``, the authors').
``variant: paper`` takes the formulas as printed, without clipping: intra_k = softmax(N·Norm(τ_k²)) and
inter_k = Σ_j softmax(Norm(τ_k τ_j)), softmax over all D places and Norm = min-max; as a constant factor per
expert cancels in step 4, softmax is taken relative to its mean 1/D, which keeps it from underflowing.
Where the spread in a min-max is zero, its result is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from .base import Block, Method, Parameters, Scan, lone_expert
from .formula import CHANGES, Formula, on_base, per_expert, percent, scaled, sum_of
from .lazy_torch import torch
from .selection import order_statistics

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Statistics:
    """What the scores of one tensor (or of the whole model) depend on."""

    lows: list[float] = field(default_factory=list)
    highs: list[float] = field(default_factory=list)
    """Clipping limits of |τ_k|; for the paper's variant none."""
    products: dict[tuple[int, int], tuple[float, float, float]] = field(default_factory=dict)
    """Paper's variant, per pair: smallest and largest τ_i τ_j, and the mean of exp(Norm(τ_i τ_j))."""
    intra_means: list[float] = field(default_factory=list)
    """Paper's variant: the mean of exp(N·Norm(τ_k²))."""
    thresholds: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)


class Pcb(Method):
    name = "pcb"
    title = "PCB-Merging"
    idea = "Score every change by its size and its agreement with the other experts; keep and weigh the best."
    paper = "https://arxiv.org/abs/2410.02396"
    needs_base = True
    experts_range = (1, None)
    passes = 3
    coarse = 2
    nanoseconds = 8.0

    class Shared(Parameters):
        lambda_: float = Field(1.0, alias="lambda", description="Factor on the merged task vector.")
        ratio: float = Field(0.2, gt=0, le=1, description="Share of each expert's entries that stays (r).")
        clip: float = Field(0.01, ge=0, lt=0.5, description="Share of extreme magnitudes clipped at each end (q).")
        variant: Literal["C", "A", "B", "paper"] = Field(
            "C", description="How agreement is scored: the authors' three programs, or the printed formula."
        )
        scope: Literal["tensor", "global"] = Field(
            "tensor", description="Rank entries within each tensor, or within the whole model."
        )

    class PerExpert(Parameters):
        weight: float = Field(1.0, description="Factor on this expert's task vector (the paper's λ_k).")

    def copies(self) -> int | None:
        return -1 if lone_expert([e.weight for e in self.experts], self.shared.lambda_) == -1 else None

    def whole_model(self) -> tuple | None:
        s = self.shared
        return (s.ratio, s.clip, s.variant) if s.scope == "global" else None

    def formula(self, names: Sequence[str], base: bool, size: int) -> Formula:
        shared, weights = self.shared, [e.weight for e in self.experts]
        # the paper's variant does not clip
        change = "C" if shared.variant != "paper" else "τ"
        balanced = sum_of(zip(weights, (f"v_{n}·{change}_{n}" for n in names), strict=True))
        total = " + ".join(f"v_{n}" for n in names)
        text = "0" if balanced == "0" else scaled(shared.lambda_, f"({balanced}) / ({total})")
        inter = {"C": "Σ_j tanh(s_k·s_j)", "A": "tanh(τ_k·Σ_j τ_j)", "B": "tanh(τ_k·Σ_j s_j)"}
        score = "softmax(N·Norm(τ_k²)) · Σ_j softmax(Norm(τ_k·τ_j))"
        if shared.variant != "paper":
            score = f"exp({len(names)}·s_k²) · {inter[shared.variant]}"
        among = f"{size:,} entries of the tensor" if shared.scope == "tensor" else "entries of the whole model"
        where = [CHANGES]
        if shared.variant != "paper":
            clipped = f"its smallest and largest {percent(shared.clip)} by magnitude clipped"
            where.append(f"C_k: τ_k, {clipped}; s_k: C_k brought to −1 … 1")
        where += [
            f"β_k = {score}: size within expert k, times agreement with the others",
            f"v_k: β_k above a threshold that {percent(shared.ratio)} of the {among} pass, brought to 0 … 1",
        ]
        values = (
            ("λ", "factor on the merged change", shared.lambda_),
            ("r", "share of entries that stays", shared.ratio),
            *per_expert("λ", "weight", names, weights),
        )
        return Formula(f"W = {on_base(text)}", tuple(where), values)

    def preparation(self) -> tuple:
        s = self.shared
        return (s.ratio, s.clip, s.variant, s.scope)

    # -- what must be known beforehand ----------------------------------------------------------------

    def prepare(self, scan: Scan) -> list[Statistics]:
        total, count = sum(scan.sizes), len(self.experts)
        if self.shared.variant == "paper":
            statistics = self._product_ranges(scan)
        else:
            q = self.shared.clip
            ranks = [int(total * q), int(total * (1 - q) - 1)]
            found = order_statistics(scan, self._magnitudes, [ranks] * count)
            statistics = Statistics([f[0].value for f in found], [f[1].value for f in found])
        ranks = [int(total * (1 - self.shared.ratio)), total - 1]
        found = order_statistics(scan, lambda block: self.scores(block, statistics), [ranks] * count)
        statistics.thresholds = [f[0].value for f in found]
        statistics.best = [f[1].value for f in found]
        return [statistics] * len(scan.sizes)

    @staticmethod
    def _magnitudes(block: Block) -> list[Tensor]:
        return [torch.abs(tau, out=tau) for tau in block.task_vectors()]

    def _product_ranges(self, scan: Scan) -> Statistics:
        pairs = [(i, j) for i in range(len(self.experts)) for j in range(i + 1)]

        def extremes(block: Block) -> list[tuple[float, float]]:
            taus = block.task_vectors()
            limits = []
            for i, j in pairs:
                low, high = torch.aminmax(torch.mul(taus[i], taus[j], out=block.buffer("product")))
                limits.append((float(low), float(high)))
            return limits

        seen = [limits for tensor in scan.map(extremes) for limits in tensor]
        ranges = {
            pair: (min(s[p][0] for s in seen), max(s[p][1] for s in seen)) if seen else (0.0, 0.0)
            for p, pair in enumerate(pairs)
        }

        def sums(block: Block) -> list[float]:
            taus = block.task_vectors()
            return [
                float(
                    _exp_norm(block, taus[i], taus[j], ranges[i, j], len(self.experts) if i == j and intra else 1).sum(
                        dtype=torch.float64
                    )
                )
                for i, j in pairs
                for intra in ((False, True) if i == j else (False,))
            ]

        parts = [s for tensor in scan.map(sums) for s in tensor]
        totals = iter([sum(column) for column in zip(*parts, strict=True)])
        size = sum(scan.sizes) or 1
        statistics = Statistics()
        for i, j in pairs:
            statistics.products[i, j] = (*ranges[i, j], next(totals, 0.0) / size)
            if i == j:
                statistics.intra_means.append(next(totals, 0.0) / size)
        return statistics

    # -- scores and the merge --------------------------------------------------------------------------

    def scores(self, block: Block, statistics: Statistics) -> list[Tensor]:
        """β_k at each entry. Leaves the task vectors as they are."""
        if self.shared.variant == "paper":
            return self._paper_scores(block, statistics)
        signed = [self._signed(block, k, statistics) for k in range(len(self.experts))]
        if self.shared.variant == "C":
            return self._scores_by_pairs(block, signed)
        taus, common = block.task_vectors(), block.buffer("common").zero_()
        for x in taus if self.shared.variant == "A" else signed:
            common.add_(x)
        zero, inter = _zero(common), block.buffer("inter")
        betas = []
        for k, (s, tau) in enumerate(zip(signed, taus, strict=True)):
            beta = torch.addcmul(zero, s, s, value=len(signed), out=block.buffer(f"beta{k}")).exp_()
            betas.append(beta.mul_(torch.mul(tau, common, out=inter).tanh_()))
        return betas

    def _signed(self, block: Block, k: int, statistics: Statistics) -> Tensor:
        """s_k = sign(τ_k)·n_k. Soft shrinkage is sign(τ)·max(|τ| − low, 0): clipping below and the minimum at once."""
        low, high = statistics.lows[k], statistics.highs[k]
        spread = high - low
        out = block.buffer(f"signed{k}")
        torch.ops.aten.softshrink.out(block.task_vectors()[k], low, out=out)
        return out.clamp_(-spread, spread).mul_(1 / spread if spread > 0 else 0.0)

    def _scores_by_pairs(self, block: Block, signed: list[Tensor]) -> list[Tensor]:
        """Variant C: exp(N s_k²)·Σ_j tanh(s_k s_j), each pair computed once."""
        sums, pair, zero = [], block.buffer("pair"), _zero(signed[0])
        for k, s in enumerate(signed):
            sums.append(torch.mul(s, s, out=block.buffer(f"inter{k}")).tanh_())
        for i in range(len(signed)):
            for j in range(i):
                torch.mul(signed[i], signed[j], out=pair).tanh_()
                sums[i].add_(pair)
                sums[j].add_(pair)
        intra = [torch.addcmul(zero, s, s, value=len(signed), out=s).exp_() for s in signed]
        return [i.mul_(total) for i, total in zip(intra, sums, strict=True)]

    def _paper_scores(self, block: Block, statistics: Statistics) -> list[Tensor]:
        taus, count = block.task_vectors(), len(self.experts)
        inters = [block.buffer(f"inter{k}").zero_() for k in range(count)]
        for (i, j), (low, high, mean) in statistics.products.items():
            share = _exp_norm(block, taus[i], taus[j], (low, high), 1)
            inters[i].add_(share, alpha=1 / mean if mean else 0.0)
            if i != j:
                inters[j].add_(share, alpha=1 / mean if mean else 0.0)
        for k, inter in enumerate(inters):
            low, high, _ = statistics.products[k, k]
            intra = _exp_norm(block, taus[k], taus[k], (low, high), count)
            inter.mul_(intra).mul_(1 / statistics.intra_means[k] if statistics.intra_means[k] else 0.0)
        return inters

    def combine(self, block: Block, prepared: Statistics) -> Tensor:
        betas = self.scores(block, prepared)
        merged, total = block.buffer("merged").zero_(), block.buffer("total").zero_()
        for k, (tau, beta) in enumerate(zip(block.task_vectors(), betas, strict=True)):
            spread = prepared.best[k] - prepared.thresholds[k]
            if spread > 0:
                excess = beta.sub_(prepared.thresholds[k]).clamp_(min=0)
                total.add_(excess, alpha=1 / spread)
                merged.addcmul_(self._clipped(block, tau, prepared, k), excess, value=self.experts[k].weight / spread)
            else:  # all scores equal: every w_k is 0, and only a NaN comes through
                merged.add_(tau, alpha=0)
        merged.div_(total.clamp_(min=1e-12))
        return block.add_to_base(merged if self.shared.lambda_ == 1 else merged.mul_(self.shared.lambda_))

    def _clipped(self, block: Block, tau: Tensor, statistics: Statistics, k: int) -> Tensor:
        """C_k, overwriting τ_k; for the paper's variant τ_k itself."""
        if self.shared.variant == "paper":
            return tau
        low, high = statistics.lows[k], statistics.highs[k]
        if low > 0:
            sign = torch.sign(tau, out=block.buffer("sign"))
            return tau.abs_().clamp_(low, high).mul_(sign)
        return tau.clamp_(-high, high)


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype, device=like.device)


def _exp_norm(block: Block, a: Tensor, b: Tensor, limits: tuple[float, float], factor: float) -> Tensor:
    """exp(factor · Norm(a·b)), Norm bringing the product to [0, 1] by its limits over all places."""
    spread = limits[1] - limits[0]
    scale = factor / spread if spread > 0 and math.isfinite(factor / spread) else 0.0
    out = torch.mul(a, b, out=block.buffer("product")).sub_(limits[0]).mul_(scale)
    return torch.exp(out, out=out)
