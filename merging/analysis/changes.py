"""How much each expert changed, and how the changes of different experts lie to each other: one pass over all weights.

A block of every model is read, widened and turned into task vectors τ_1 … τ_E, stacked as the rows of a matrix T. Then
nearly everything is one of two small products, whatever the number of experts:

* T Tᵀ holds all ‖τ_a‖² and ⟨τ_a, τ_b⟩, so norms, cosines, and how a merged model is made of its experts;
* |T| |T|ᵀ holds Σ |τ_a τ_b|. As Σ τ_a τ_b is the same sum with the entries of opposite signs counted negative, half the
  difference of the two is the weight of what pulls in opposite directions.

Signs are counted exactly, 64 at a time: one bit per entry says τ > 0, another τ < 0. Sums within a block are those of
the compute dtype (float32 for 16-bit weights), blocks are added in float64 in their order (N5), so results do not
depend on the number of workers. Every number is exact up to rounding (``ACCURACY``) except the survival, which is
measured on one block in eight where the weights are not bfloat16 already.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoints.checkpoint import Source
from ..checkpoints.header import TORCH_NAMES
from ..methods import Workspace
from ..methods.lazy_torch import torch
from ..methods.scan import round_into
from .models import Compared, Models, refuse_block
from .passes import Progress, Pulse, over_tensors
from .tensor_change import MergedChange, TensorChange, cosines, joined, merged_change, ratio

if TYPE_CHECKING:
    from torch import Tensor

STEP = 1 << 16
"""Elements of a block: few enough for a core's cache, enough that calls cost less than arithmetic."""
SURVIVAL_EVERY = 8
"""Survival is measured on every eighth block of a tensor (and always on the first)."""
ACCURACY = "norms, dot products and shares of weight: relative error below 1e-5; counts: exact"
_TINY = 1e-24
"""Squared norms in float32 below this have lost digits to underflow; such tensors are measured in float64."""


@dataclass
class Changes:
    """What ``measure_changes`` found, and sums of it over any choice of tensors."""

    names: list[str]
    """The experts."""
    tensors: list[TensorChange]
    sampled: dict[str, str] = field(default_factory=dict)
    """Field of ``TensorChange`` -> how it was sampled. Fields that are not named were measured on all entries."""
    accuracy: str = ACCURACY

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(combinations(range(len(self.names)), 2))

    def select(self, block: int | None | str = "any", kind: str | None = None) -> list[TensorChange]:
        """The tensors of one block (None: those outside of blocks) and of one kind."""
        return [t for t in self.tensors if block in ("any", t.block) and kind in (None, t.kind)]

    @property
    def blocks(self) -> list[int | None]:
        """The blocks that there are, in order, None first if there are tensors outside of blocks."""
        found = {t.block for t in self.tensors}
        return [None] * (None in found) + sorted(block for block in found if block is not None)

    def total(self, tensors: Iterable[TensorChange] | None = None, name: str = "all") -> TensorChange:
        """The same figures for several tensors (default: all) as if they were one long tensor."""
        return joined(list(self.tensors if tensors is None else tensors), len(self.names), name)

    def cosine(self, tensors: Iterable[TensorChange] | None = None) -> np.ndarray:
        """cos(τ_a, τ_b) = ⟨τ_a, τ_b⟩ / (‖τ_a‖ ‖τ_b‖) for all pairs, [experts, experts], over the given tensors joined
        (default: all). 0 where an expert changed nothing."""
        whole = self.total(tensors)
        return cosines(whole.norm, whole.dots)

    def cosine_by_block(self) -> dict[int | None, np.ndarray]:
        """``cosine`` of each block, None for what lies outside of blocks."""
        return {block: self.cosine(self.select(block)) for block in self.blocks}

    def as_dict(self) -> dict[str, Any]:
        """JSON values; ``Changes.from_dict`` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Changes:
        tensors = []
        for one in data["tensors"]:
            merged = None if one["merged"] is None else MergedChange(**one["merged"])
            tensors.append(TensorChange(**one | {"shape": tuple(one["shape"]), "merged": merged}))
        return cls(data["names"], tensors, data["sampled"], data["accuracy"])


def measure_changes(
    models: Models,
    *,
    threads: int = 0,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Changes:
    """Measure every compared tensor in one pass over the files; memory is bounded by a few blocks per worker.

    ``threads``: workers, 0 means one per core. Raises NumbersError E_NOT_FINITE or E_OVERFLOW for weights of which
    nothing can be told, InputError E_READ or E_INPUT_CHANGED, Cancelled.
    """
    tensors = over_tensors(
        measure_tensor, models.tensors, threads=threads, progress=progress, stop=stop, what="changes"
    )
    models.check_unchanged()
    sampled = {}
    if any(_loses_digits(tensor) for tensor in models.tensors):
        sampled["survival"] = f"one block of {STEP} entries in {SURVIVAL_EVERY}, where weights are not bfloat16 already"
    return Changes(list(models.names), tensors, sampled)


# ------------------------------------------------------------------------------------------------------ one tensor


def measure_tensor(tensor: Compared, workspace: Workspace, pulse: Pulse) -> TensorChange:
    """One tensor, block by block, in its compute dtype; again in float64 if that turns out too narrow."""
    sums = _add_up(tensor, tensor.dtype, workspace, pulse)
    squares = sums.gram.diagonal()
    if not np.isfinite(sums.gram).all() or not np.isfinite(sums.absolute).all():
        for start in range(0, tensor.numel, STEP):
            refuse_block(tensor, start, min(tensor.numel, start + STEP))
        sums = _add_up(tensor, torch.float64, workspace, lambda elements: pulse(0))
    elif tensor.dtype != torch.float64 and ((sums.largest > 0) & (squares[: sums.experts] < _TINY)).any():
        sums = _add_up(tensor, torch.float64, workspace, lambda elements: pulse(0))
    return sums.result(tensor)


class _Sums:
    """Running sums over the blocks of one tensor: E experts, and perhaps a merged model after them."""

    def __init__(self, experts: int, changed: int) -> None:
        self.experts = experts
        self.pairs = tuple(np.triu_indices(experts, 1))
        self.gram = np.zeros((changed + 1, changed + 1))
        """T Tᵀ of experts, perhaps the merged model, and the base as the last row."""
        self.absolute = np.zeros((experts + 1, experts + 1))
        """|T| |T|ᵀ of the experts, with a row of ones before the first: its products are ‖τ‖₁."""
        self.largest = np.zeros(experts)
        self.signs = np.zeros(experts + 2 * len(self.pairs[0]), np.int64)
        """Entries that each expert changed; that both of a pair changed; those of them with opposite signs."""
        self.latest = self.signs
        """The same of one block."""
        self.looked_at = np.zeros(experts, np.int64)
        self.survived = np.zeros(experts, np.int64)

    def add(self, room: _Room) -> None:
        """Add the block of weights that lies in ``room.weights``; overwrites it."""
        room.changed.sub_(room.base)
        torch.mm(room.weights, room.weights_transposed, out=room.gram)
        self.gram += room.results[0]
        self.count_signs(room)
        room.task_vectors.abs_()
        torch.mm(room.bordered, room.bordered_transposed, out=room.sizes)
        self.absolute += room.results[1]
        np.maximum(self.largest, np.maximum.reduce(room.tau, 1), out=self.largest)

    def count_signs(self, room: _Room) -> None:
        """Add the signs of a block. Two entries are opposite if both are changed and just one is negative."""
        plus = _packed(np.greater(room.tau, 0, out=room.flags))
        minus = _packed(np.less(room.tau, 0, out=room.flags))
        a, b = self.pairs
        experts, middle = self.experts, self.experts + len(a)
        bits = np.empty((len(self.signs), plus.shape[1]), plus.dtype)
        changed, both, opposite = bits[:experts], bits[experts:middle], bits[middle:]
        np.bitwise_or(plus, minus, out=changed)
        np.bitwise_and(changed.take(a, 0), changed.take(b, 0), out=both)
        np.bitwise_and(minus.take(a, 0) ^ minus.take(b, 0), both, out=opposite)
        self.latest = np.add.reduce(np.bitwise_count(bits), 1, np.int32)
        self.signs += self.latest

    def look_at_survival(self, raw: list[Tensor]) -> None:
        """Of the block that was added last, as it lies in the files: what differs from the base in bfloat16 too?"""
        *experts, base = [torch.empty(one.shape, dtype=torch.bfloat16) for one in (*raw[: self.experts], raw[-1])]
        for out, values in zip((*experts, base), (*raw[: self.experts], raw[-1]), strict=True):
            round_into(out, values)
        self.looked_at += self.latest[: self.experts]
        self.survived += [int(torch.count_nonzero(one != base)) for one in experts]

    def result(self, tensor: Compared) -> TensorChange:
        gram, experts, size = self.gram, self.experts, tensor.numel
        a, b = self.pairs
        changed, both, opposite = np.split(self.signs, [experts, experts + len(a)])
        dots, products = gram[a, b], self.absolute[1:, 1:][a, b]
        conflicting = np.clip((products - dots) / 2, 0, None)
        tau = gram[:experts, :experts]
        return TensorChange(
            name=tensor.name,
            block=tensor.block,
            kind=tensor.kind,
            shape=tensor.shape,
            base_norm=math.sqrt(gram[-1, -1]),
            norm=np.sqrt(tau.diagonal()).tolist(),
            l1=self.absolute[0, 1:].tolist(),
            largest=self.largest.tolist(),
            unchanged=((size - changed) / size).tolist(),
            survival=ratio(self.survived, self.looked_at, empty=1.0) if _loses_digits(tensor) else [1.0] * experts,
            dots=dots.tolist(),
            both=both.tolist(),
            conflict=ratio(opposite, both),
            products=products.tolist(),
            conflict_weighted=ratio(conflicting, products),
            merged=None
            if tensor.merged is None
            else merged_change(tau, gram[experts, :experts], gram[experts, experts]),
        )


class _Room:
    """A worker's memory for blocks of ``size`` elements, with every view of it that a block needs: making them anew for
    each block would cost as much as a tenth of the arithmetic."""

    def __init__(self, tensor: Compared, size: int, dtype: Any, workspace: Workspace) -> None:
        sources, experts = _sources(tensor), len(tensor.experts)
        rows = workspace.buffer("rows", (len(sources) + 1) * size, dtype).view(len(sources) + 1, size)
        rows[0] = 1  # stays; then come the experts, perhaps the merged model, and the base
        self.weights, self.changed, self.base = rows[1:], rows[1:-1], rows[-1]
        self.task_vectors, self.bordered = rows[1 : experts + 1], rows[: experts + 1]
        self.weights_transposed, self.bordered_transposed = self.weights.T, self.bordered.T
        self.tau = self.task_vectors.numpy()
        types = [getattr(torch, TORCH_NAMES[source.dtype]) for source in sources]
        if len(set(types)) == 1:  # all converted by one call
            raw = workspace.buffer("raw", len(sources) * size, types[0]).view(len(sources), size)
            self.raw, self.conversions = list(raw), [(self.weights, raw)]
        else:
            self.raw = [workspace.buffer(f"raw{k}", size, one) for k, one in enumerate(types)]
            self.conversions = list(zip(self.weights, self.raw, strict=True))
        self.bytes = [one.view(torch.uint8).numpy().data for one in self.raw]
        self.flags = workspace.buffer("flags", experts * size, torch.bool).view(experts, size).numpy()
        self.gram = torch.empty(len(sources), len(sources), dtype=dtype)
        self.sizes = torch.empty(experts + 1, experts + 1, dtype=dtype)
        self.results = self.gram.numpy(), self.sizes.numpy()


def _sources(tensor: Compared) -> list[Source]:
    return [*tensor.changed, tensor.base]


def _add_up(tensor: Compared, dtype: Any, workspace: Workspace, pulse: Pulse) -> _Sums:
    sources, rounding = _sources(tensor), _loses_digits(tensor)
    sums, room = _Sums(len(tensor.experts), len(sources) - 1), _Room(tensor, min(STEP, tensor.numel), dtype, workspace)
    for number, start in enumerate(range(0, tensor.numel, STEP)):
        size = min(STEP, tensor.numel - start)
        if size < len(room.base):
            room = _Room(tensor, size, dtype, workspace)
        for source, out in zip(sources, room.bytes, strict=True):
            source.read(start, start + size, out)
        for out, values in room.conversions:
            out.copy_(values)
        sums.add(room)
        if rounding and number % SURVIVAL_EVERY == 0:
            sums.look_at_survival(room.raw)
        pulse(size)
    return sums


def _loses_digits(tensor: Compared) -> bool:
    """Would rounding to bfloat16 change anything?"""
    return any(source.dtype != "BF16" for source in (tensor.base, *tensor.experts))


def _packed(flags: np.ndarray) -> np.ndarray:
    """Flags [E, n] as bits, in the widest words that they fill."""
    bits = np.packbits(flags, axis=1)
    return bits.view(np.uint64) if flags.shape[1] % 64 == 0 else bits
