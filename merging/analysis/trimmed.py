"""What is left of the task vectors when each is trimmed to its largest entries, and whether they still get on.

TIES and its relatives keep of each task vector the k = ⌊density · n⌋ entries of largest magnitude per tensor. Two
questions decide whether trimming helps: do the experts keep the *same* entries (overlap), and where they do, do they
pull in the *same* direction (agreement)? For each pair of experts every kept entry is one of

* *agree*: both keep it, with equal signs;
* *conflict*: both keep it, with opposite signs;
* *alone*: only one of the two keeps it.

Shares are given by number of entries and by weight, where each expert's kept |τ| is scaled to sum 1 so that a larger
expert does not drown the other. The thresholds are exact (``methods.selection``), so is every count; ties at the
threshold are kept in order of their index, as the methods do (N4). An entry that an expert never changed is not kept,
however high the density.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ..errors import RecipeError
from ..methods import Workspace
from ..methods.lazy_torch import torch
from ..methods.scan import BlockScan, TensorInputs
from ..methods.trimming import KEEP_ALL, Threshold, count_kept, thresholds
from ..reading import SourceReader
from .models import Compared, Models
from .passes import Progress, Pulse, over_tensors

DENSITY = 0.2
"""The share that TIES' authors keep."""


@dataclass(slots=True)
class TrimmedTensor:
    """One tensor at one density. Lists hold one value per expert, or per pair in the order (0,1), (0,2), …, (1,2), …"""

    name: str
    block: int | None
    kind: str
    numel: int
    threshold: list[float]
    """The smallest |τ| that is kept; 0 if everything is that changed."""
    kept: list[int]
    """Entries that stay and are not 0."""
    weight: list[float]
    """Σ |τ| over them."""
    both: list[int]
    """Entries that both experts of the pair keep."""
    opposite: list[int]
    """Of those, how many have opposite signs."""
    both_weight: list[tuple[float, float]]
    """Σ |τ_a| and Σ |τ_b| over the entries that both keep."""
    opposite_weight: list[tuple[float, float]]
    """The same over those with opposite signs."""


@dataclass(frozen=True, slots=True)
class PairShares:
    """Two experts over some tensors. ``agree + conflict + alone`` = 1 if anything is kept, else all are 0."""

    agree: float
    conflict: float
    alone: float
    agree_weight: float
    """Mean of the two experts' shares of Σ |τ| (kept entries) that lies on entries where they agree."""
    conflict_weight: float
    alone_weight: float

    @property
    def overlap(self) -> float:
        """Jaccard index of the kept entries: kept by both / kept by either."""
        return self.agree + self.conflict

    @property
    def overlap_weight(self) -> float:
        """The same with entries weighted by |τ|, each expert scaled to Σ |τ| = 1."""
        return self.agree_weight + self.conflict_weight

    @property
    def conflict_of_both(self) -> float:
        """Of what both keep, the share with opposite signs, by weight; 0 if they share nothing. Chance: one half."""
        return self.conflict_weight / self.overlap_weight if self.overlap_weight else 0.0


@dataclass
class Trimmed:
    """What ``measure_trimmed`` found, and the shares of any choice of tensors."""

    names: list[str]
    density: float
    tensors: list[TrimmedTensor]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(combinations(range(len(self.names)), 2))

    @property
    def blocks(self) -> list[int | None]:
        """The blocks that there are, in order, None first if there are tensors outside of blocks."""
        found = {t.block for t in self.tensors}
        return [None] * (None in found) + sorted(block for block in found if block is not None)

    def select(self, block: int | None | str = "any", kind: str | None = None) -> list[TrimmedTensor]:
        """The tensors of one block (None: those outside of blocks) and of one kind."""
        return [t for t in self.tensors if block in ("any", t.block) and kind in (None, t.kind)]

    def shares(self, tensors: Iterable[TrimmedTensor] | None = None) -> list[PairShares]:
        """For each pair of experts, over the given tensors joined (default: all)."""
        chosen = list(self.tensors if tensors is None else tensors)
        kept, weight = (
            _sum([t.kept for t in chosen], len(self.names)),
            _sum([t.weight for t in chosen], len(self.names)),
        )
        result = []
        for i, (a, b) in enumerate(self.pairs):
            both = sum(t.both[i] for t in chosen)
            opposite = sum(t.opposite[i] for t in chosen)
            either = int(kept[a] + kept[b]) - both
            both_weight = _share([t.both_weight[i] for t in chosen], weight[[a, b]])
            opposite_weight = _share([t.opposite_weight[i] for t in chosen], weight[[a, b]])
            result.append(
                PairShares(
                    agree=(both - opposite) / max(1, either),
                    conflict=opposite / max(1, either),
                    alone=(either - both) / max(1, either),
                    agree_weight=both_weight - opposite_weight,
                    conflict_weight=opposite_weight,
                    alone_weight=1 - both_weight if either else 0.0,
                )
            )
        return result

    def as_dict(self) -> dict[str, Any]:
        """JSON values; ``Trimmed.from_dict`` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trimmed:
        pairs = ("both_weight", "opposite_weight")
        tensors = [
            TrimmedTensor(**t | {key: [tuple(pair) for pair in t[key]] for key in pairs}) for t in data["tensors"]
        ]
        return cls(data["names"], data["density"], tensors)


def measure_trimmed(
    models: Models,
    density: float = DENSITY,
    *,
    threads: int = 0,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Trimmed:
    """Trim every task vector, tensor by tensor, to ``density`` in (0, 1], and compare what is left of each pair.

    Usually two passes over the files and a sample. Source of the rule: Yadav et al., TIES-Merging, arXiv 2306.01708,
    with the count of mergekit 0.1.5. Raises RecipeError E_RECIPE_FIELD for another density, NumbersError E_NOT_FINITE,
    InputError E_READ or E_INPUT_CHANGED, Cancelled.
    """
    if not 0 < density <= 1:
        raise RecipeError(
            "E_RECIPE_FIELD",
            f"The density {density} makes no sense.",
            "It is the share of entries that is kept.",
            "Give a number above 0, up to 1, for example 0.2.",
        )

    def work(tensor: Compared, workspace: Workspace, pulse: Pulse) -> TrimmedTensor:
        return trim_tensor(tensor, density, workspace, pulse)

    tensors = over_tensors(
        work, models.tensors, threads=threads, progress=progress, stop=stop, what=f"density {density:g}", passes=2
    )
    models.check_unchanged()
    return Trimmed(list(models.names), density, tensors)


def trim_tensor(tensor: Compared, density: float, workspace: Workspace, pulse: Pulse) -> TrimmedTensor:
    """One tensor. With the kept task vectors as rows of T and their signs as rows of S, all sums over pairs are the
    products T Sᵀ (agreeing minus opposing) and |T| |S|ᵀ (agreeing plus opposing), and S Sᵀ and |S| |S|ᵀ for numbers."""
    experts = len(tensor.experts)
    readers = [SourceReader(source, slot, check=True) for slot, source in enumerate((tensor.base, *tensor.experts))]
    inputs = TensorInputs(tensor.name, tensor.numel, tensor.dtype, readers[0], readers[1:])
    limits = [Threshold(KEEP_ALL, 0)] * experts
    if count_kept(density, tensor.numel) < tensor.numel:
        (limits,) = thresholds(BlockScan([inputs], workspace, pulse=pulse), [density] * experts)
    minus, plus = np.zeros((2 * experts, experts)), np.zeros((2 * experts, experts))
    for block in inputs.blocks(workspace, 0):
        size = block.like.numel()
        rows = workspace.buffer("rows", 2 * experts * size, tensor.dtype).view(2 * experts, size)
        kept, signs = rows[:experts], rows[experts:]
        for row, tau, limit in zip(kept, block.task_vectors(), limits, strict=True):
            row.copy_(limit.trim(tau, block.buffer("scratch")))
        torch.sign(kept, out=signs)
        minus += torch.mm(rows, signs.T).numpy()
        rows.abs_()
        plus += torch.mm(rows, signs.T).numpy()
        pulse(size)
    pairs = list(combinations(range(experts), 2))
    both, opposite = plus[experts:], (plus[experts:] - minus[experts:]) / 2  # sums of whole numbers: exact
    weight, against = plus[:experts], np.clip((plus[:experts] - minus[:experts]) / 2, 0, None)
    return TrimmedTensor(
        name=tensor.name,
        block=tensor.block,
        kind=tensor.kind,
        numel=tensor.numel,
        threshold=[max(0.0, limit.value) for limit in limits],
        kept=[int(both[k, k]) for k in range(experts)],
        weight=[float(weight[k, k]) for k in range(experts)],
        both=[int(both[a, b]) for a, b in pairs],
        opposite=[int(opposite[a, b]) for a, b in pairs],
        both_weight=[(float(weight[a, b]), float(weight[b, a])) for a, b in pairs],
        opposite_weight=[(float(against[a, b]), float(against[b, a])) for a, b in pairs],
    )


def _sum(rows: Sequence[Sequence[float]], length: int) -> np.ndarray:
    return np.sum(rows, axis=0) if rows else np.zeros(length)


def _share(weights: Sequence[tuple[float, float]], whole: np.ndarray) -> float:
    """Mean of the two experts' shares; an expert that keeps nothing has none."""
    parts = np.divide(_sum(weights, 2), whole, out=np.zeros(2), where=whole > 0)
    return float(parts.sum() / max(1, np.count_nonzero(whole)))
