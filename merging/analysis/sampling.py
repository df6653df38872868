"""A quick look at weights: a few short runs of each tensor instead of all of it.

Norms, shares and angles of task vectors are sums over entries, and a sum is estimated by a part of it times the ratio
of the sizes. Runs are spread evenly over each tensor, larger tensors get more, and a small model is simply read whole:
``Sample.whole`` says so. Everything else in this package looks at all weights; this is for what must be known at once,
such as whether the base is the right one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..checkpoints.checkpoint import Checkpoint, Source
from ..checkpoints.header import TORCH_NAMES
from ..methods import Workspace
from ..methods.lazy_torch import torch
from ..methods.scan import compute_dtype
from ..reading import SourceReader
from .models import Compared, Models

if TYPE_CHECKING:
    from torch import Tensor

BUDGET = 2_000_000
"""Elements that are read of each model."""
RUN = 4096
"""Elements in a row that are read at a time."""
MATRICES, ROWS, STRIPES = 6, 192, 8
"""For the rank of the changes: so many matrices, so many rows of each, in stripes of neighbouring rows."""
USUAL_WEIGHT = 0.3
"""A common weight of an expert in a merge, at which survival is estimated (task arithmetic's usual 0.3)."""


@dataclass(slots=True)
class Sample:
    """What the sampled entries say; lists are per expert. Norms are of all compared tensors, scaled up."""

    elements: int
    """Entries that were looked at, per model."""
    total: int
    """Entries that there are."""
    base_norm: float
    norm: list[float]
    """‖τ_k‖_F."""
    unchanged: list[float]
    """Share of entries with τ_k = 0."""
    survival: list[float]
    """Share of the changed entries that still differ from the base when both are rounded to bfloat16."""
    survival_scaled: list[float]
    """The same of W_0 + 0.3 τ_k, rounded once."""
    cosine: list[list[float]]
    """Of the task vectors, expert by expert."""
    not_finite: list[str]
    """``model: tensor`` where a NaN or an infinity was met; such runs are left out."""
    other_norms: dict[str, list[float]] = field(default_factory=dict)
    """Other base -> ‖W_k − W_other‖ over what can be compared with both bases."""
    own_norms: dict[str, list[float]] = field(default_factory=dict)
    """Other base -> ‖W_k − W_0‖ over the same tensors."""
    rank99: dict[str, list[float]] = field(default_factory=dict)
    """Expert -> for each sampled matrix: directions that hold 99 % of the change's energy, as a share of those there
    could be. Only matrices that changed."""
    largest_rank: dict[str, int] = field(default_factory=dict)
    """Expert -> the largest such number of directions."""

    @property
    def whole(self) -> bool:
        """All entries were looked at: the numbers are exact."""
        return self.elements == self.total

    @property
    def basis(self) -> str:
        return "exact" if self.whole else "sampled"

    @property
    def label(self) -> str:
        return "all weights" if self.whole else f"sampled: {self.elements:,} of {self.total:,} weights"


def take_sample(models: Models, others: Mapping[str, Checkpoint] | None = None, budget: int = BUDGET) -> Sample:
    """Look at ``budget`` entries of each model. ``others``: further bases by name, compared where they have the tensor.

    Raises InputError E_READ, E_INPUT_CHANGED.
    """
    with torch.inference_mode():
        return _take(models, others or {}, budget)


def _take(models: Models, others: Mapping[str, Checkpoint], budget: int) -> Sample:
    count = len(models.names)
    share = min(1.0, budget / max(1, models.parameters))
    base2, looked = 0.0, 0
    changed, alive, alive_scaled, same = [0.0] * count, [0.0] * count, [0.0] * count, [0.0] * count
    dots = torch.zeros(count, count, dtype=torch.float64)
    bad: dict[str, None] = {}
    theirs = {name: [0.0] * count for name in others}
    ours = {name: [0.0] * count for name in others}
    for tensor in models.tensors:
        sources = [s if s is not None and s.shape == tensor.shape else None for s in
                   (other.tensors.get(tensor.name) for other in others.values())]  # fmt: skip
        runs = _runs(tensor.numel, share)
        scale = tensor.numel / sum(stop - start for start, stop in runs)
        for start, stop in runs:
            base = read(tensor.base, start, stop)
            experts = [read(source, start, stop) for source in tensor.experts]
            looked += stop - start
            wrong = [
                who for who, values in zip(("base", *models.names), (base, *experts), strict=True)
                if not torch.isfinite(values).all()
            ]  # fmt: skip
            if wrong:
                bad |= dict.fromkeys(f"{who}: {tensor.name}" for who in wrong)
                continue
            base2 += scale * float(base.square().sum())
            taus = torch.stack([values - base for values in experts])
            dots += scale * (taus @ taus.T)
            rounded = base.bfloat16()
            for k, (values, tau) in enumerate(zip(experts, taus, strict=True)):
                moved = tau != 0
                same[k] += scale * float((~moved).sum())
                changed[k] += scale * float(moved.sum())
                alive[k] += scale * float((moved & (values.bfloat16() != rounded)).sum())
                alive_scaled[k] += scale * float((moved & ((base + USUAL_WEIGHT * tau).bfloat16() != rounded)).sum())
            for (name, _), source in zip(others.items(), sources, strict=True):
                if source is not None:
                    other = read(source, start, stop)
                    for k, values in enumerate(experts):
                        theirs[name][k] += scale * float((values - other).square().sum())
                        ours[name][k] += scale * float(taus[k].square().sum())
    norms = dots.diagonal().clamp(min=0).sqrt()
    cosine = dots / (norms[:, None] * norms[None, :]).clamp(min=1e-300)
    sample = Sample(
        looked,
        models.parameters,
        base2**0.5,
        norms.tolist(),
        [s / max(1.0, s + c) for s, c in zip(same, changed, strict=True)],
        [a / c if c else 1.0 for a, c in zip(alive, changed, strict=True)],
        [a / c if c else 1.0 for a, c in zip(alive_scaled, changed, strict=True)],
        cosine.clamp(-1, 1).tolist(),
        list(bad),
        {name: [v**0.5 for v in values] for name, values in theirs.items()},
        {name: [v**0.5 for v in values] for name, values in ours.items()},
    )
    _add_ranks(sample, models)
    return sample


def read(source: Source, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a tensor in float64."""
    kind = compute_dtype([getattr(torch, TORCH_NAMES[source.dtype])])
    values = torch.empty(stop - start, dtype=kind)
    SourceReader(source, 0)(start, values, Workspace())
    return values.double()


def _runs(size: int, share: float) -> list[tuple[int, int]]:
    """Runs of at most RUN elements, evenly spread, about ``share`` of all and at least one."""
    if share >= 1 or size <= RUN:
        return [(start, min(size, start + RUN * 64)) for start in range(0, size, RUN * 64)]
    count = max(1, round(size * share / RUN))
    gap = (size - RUN) / max(1, count - 1)
    first = (size - RUN) // 2 if count == 1 else 0
    return [(start, start + RUN) for start in (first + int(i * gap) for i in range(count))]


def _add_ranks(sample: Sample, models: Models) -> None:
    """Some rows of some matrices: rows of a matrix of rank r have rank r at most, whatever the rounding adds.

    The 99 % energy rank of ``ROWS`` rows is compared with the number of rows (or columns, if that is less).
    """
    matrices = [t for t in models.tensors if len(t.shape) == 2 and t.block is not None and min(t.shape) >= 8]
    chosen = matrices[:: max(1, len(matrices) // MATRICES)][:MATRICES]
    for k, name in enumerate(models.names):
        ranks = [found for tensor in chosen if (found := _rank99(tensor, k)) is not None]
        sample.rank99[name] = [rank / most for rank, most in ranks]
        sample.largest_rank[name] = max((rank for rank, _ in ranks), default=0)


def _rank99(tensor: Compared, k: int) -> tuple[int, int] | None:
    """(directions that hold 99 % of the energy, how many there could be) of sampled rows of τ_k; None if unchanged."""
    rows, width = tensor.shape
    stripe = min(rows, ROWS) // STRIPES or 1
    starts = [0] if rows <= ROWS else [i * (rows - stripe) // (STRIPES - 1) for i in range(STRIPES)]
    length = rows if rows <= ROWS else stripe
    tau = torch.cat([
        read(tensor.experts[k], row * width, (row + length) * width)
        - read(tensor.base, row * width, (row + length) * width)
        for row in starts
    ]).view(-1, width)  # fmt: skip
    gram = tau @ tau.T if len(tau) <= width else tau.T @ tau
    if not torch.isfinite(gram).all() or not gram.any():
        return None
    energy = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    reached = torch.cumsum(energy, 0) >= 0.99 * energy.sum()
    return int(reached.int().argmax()) + 1, len(energy)


def relative(norms: Sequence[float], to: float) -> list[float]:
    """‖τ_k‖ / ‖W_0‖."""
    return [norm / to if to else float("inf") if norm else 0.0 for norm in norms]
