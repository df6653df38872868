"""Keep exactly the k largest entries of a vector by magnitude (numeric rule N4).

Among 16-bit fine-tunes a fifth of all entries can sit exactly on the threshold, so the rule for ties is
part of the method: everything above the threshold stays, and the places that are left over go to the
entries on the threshold with the lowest flat index (for a global threshold: tensors in order of their names).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .base import Block, Scan
from .formula import percent
from .lazy_torch import torch
from .selection import order_statistics

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Threshold:
    """What to keep of one expert's task vector in one tensor."""

    value: float
    """Entries with |τ| above this stay."""
    quota: int
    """So many entries with |τ| equal to it stay too, the first ones."""
    _below: float | None = None

    def trim(self, tau: Tensor, scratch: Tensor) -> Tensor:
        """Zero what falls away, in place. Blocks of a tensor must come in order."""
        if self.value < 0:
            return tau
        if self.quota == 0:
            return _shrink(tau, self.value)
        torch.abs(tau, out=scratch)
        on_threshold = int(torch.eq(scratch, self.value, out=scratch).sum().item())
        if on_threshold > self.quota:
            beyond = torch.nonzero(scratch).flatten()[self.quota :]
            tau[beyond] = 0
            on_threshold = self.quota
        self.quota -= on_threshold
        return _shrink(tau, self.just_below(tau.dtype))

    def just_below(self, dtype: object) -> float:
        """The number before ``value`` in the task vector's type."""
        if self._below is None:
            kind = np.float32 if dtype == torch.float32 else np.float64
            self._below = float(np.nextafter(kind(self.value), kind(0)))
        return self._below


KEEP_ALL = -1.0


def trimmed_words(name: str, density: float, size: int | None) -> str:
    """What τ̂ of an expert is. ``size``: elements of the tensor; None: ranked within the whole model."""
    if density <= 0:
        return f"τ̂_{name} = 0 (density 0)"
    if density >= 1:
        return f"τ̂_{name} = τ_{name} (density 1: nothing is trimmed)"
    if size is None:
        return f"τ̂_{name}: τ_{name} where it is among {name}'s largest {percent(density)} in the whole model, else 0"
    return f"τ̂_{name}: the {count_kept(density, size):,} largest of the {size:,} entries of τ_{name}, else 0"


def _shrink(tau: Tensor, limit: float) -> Tensor:
    """Zero all entries with |τ| ≤ limit (limit ≥ 0)."""
    return torch.hardshrink(tau, limit, out=tau)


def count_kept(density: float, size: int) -> int:
    """k = ⌊density · size⌋, at least 1 if anything is to stay at all (as mergekit 0.1.5)."""
    if density <= 0 or size == 0:
        return 0
    return size if density >= 1 else max(1, int(density * size))


def thresholds(scan: Scan, densities: list[float]) -> list[list[Threshold]]:
    """Per tensor of the scan, per expert: the threshold that keeps exactly k = ⌊density · n⌋ entries.

    With a scan over one tensor this is the per-tensor rule, with a scan over all of them the exact global
    one (n is then the size of the whole model).
    """
    total = sum(scan.sizes)
    kept = [count_kept(d, total) for d in densities]
    trimmed = [k for k, n in enumerate(kept) if 0 < n < total]

    def magnitudes(block: Block) -> list[Tensor]:
        vectors = block.task_vectors()
        return [torch.abs(vectors[k], out=block.buffer(f"magnitude{k}")) for k in trimmed]

    found = order_statistics(scan, magnitudes, [[total - kept[k]] for k in trimmed])
    result = [[Threshold(KEEP_ALL if n else float("inf"), 0) for n in kept] for _ in scan.sizes]
    for k, (statistic,) in zip(trimmed, found, strict=True):
        above = total - statistic.below - statistic.equal
        left = kept[k] - above
        if left == statistic.equal:  # all of them stay, wherever they are
            shares = list(scan.sizes)
        elif len(scan.sizes) == 1:
            shares = [left]
        else:
            shares = []
            for equal in _equal_per_tensor(scan, k, statistic.value):
                shares.append(min(left, equal))
                left -= shares[-1]
        for tensor, share in enumerate(shares):
            result[tensor][k] = Threshold(statistic.value, share)
    return result


def _equal_per_tensor(scan: Scan, expert: int, value: float) -> list[int]:
    """How many entries of each tensor sit on the threshold. One pass."""

    def count(block: Block) -> int:
        magnitude = torch.abs(block.task_vectors()[expert], out=block.buffer("magnitude"))
        return int(torch.eq(magnitude, value, out=magnitude).sum().item())

    return [sum(counts) for counts in scan.map(count)]
