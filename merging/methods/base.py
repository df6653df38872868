"""What a merging method is, and what it sees of the world.

A method knows formulas, not files. The engine hands it one *block* at a time: a short run of elements
of one tensor, as it is in the base and in each expert, already in the compute dtype (float32 for 16-bit
inputs, float64 otherwise) and on the compute device. The method returns the merged block. If it must
know something about the whole tensor first (a threshold, a norm), it asks for it in ``prepare`` through
a *scan*, which runs a function over all blocks as often as needed. So memory stays bounded whatever the
model's size, and the result cannot depend on how many threads or files there are.

Blocks have a fixed size (``BLOCK`` elements, the last one shorter) and float64 sums are taken in block
order: numeric rules N1 to N5 of the design.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from .formula import Formula
from .lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 15
"""Elements in a block. Part of the numerics (N5): changing it may change last bits of norms."""

DEVICE_BLOCK = 1 << 22
"""Elements in a block on an accelerator, where a kernel's start costs more than its arithmetic."""

R = TypeVar("R")


class Parameters(BaseModel):
    """Base of all parameter models: unknown names are errors, values are checked, objects are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Workspace:
    """Reusable buffers of one worker. Fresh temporaries would cost page faults, not arithmetic."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.block_size = BLOCK if self.device.type == "cpu" else DEVICE_BLOCK
        self._buffers: dict[tuple[str, Any], Tensor] = {}
        self._windows: dict[str, tuple[object, Tensor]] = {}

    def buffer(self, name: str, size: int, dtype: Any) -> Tensor:
        """A 1-D tensor of ``size`` elements with arbitrary content; the same name gives the same memory."""
        kept = self._buffers.get((name, dtype))
        if kept is None or kept.numel() < size:
            kept = torch.empty(size, dtype=dtype, device=self.device)
            self._buffers[name, dtype] = kept
        return kept if kept.numel() == size else kept[:size]

    def window(self, name: str, owner: object, size: int) -> Tensor:
        """``size`` bytes of host memory to read a file into, lent to ``owner`` until another asks for that name.
        Pinned if they go on to a CUDA device."""
        kept = self._windows.get(name)
        if kept is None or kept[1].numel() < size:
            pinned = self.device.type == "cuda"
            kept = (owner, torch.empty(size, dtype=torch.uint8, pin_memory=pinned))
        self._windows[name] = (owner, kept[1])
        return kept[1][:size]

    def window_owner(self, name: str) -> object | None:
        """Whose bytes the window holds."""
        kept = self._windows.get(name)
        return kept[0] if kept else None


@dataclass(slots=True)
class Block:
    """A run of elements of one tensor. The tensors may be overwritten: they are refilled for each block."""

    tensor: str
    """Name of the output tensor."""
    start: int
    """Flat index of the first element."""
    base: Tensor | None
    """1-D, compute dtype; None for methods that take no base."""
    experts: list[Tensor]
    """1-D tensors like ``base``, in recipe order."""
    workspace: Workspace
    seed: int = 0
    _delta: bool = field(default=False)

    @property
    def like(self) -> Tensor:
        return self.experts[0]

    def buffer(self, name: str, dtype: Any = None) -> Tensor:
        """A scratch tensor as long as the block, in the compute dtype unless told otherwise."""
        return self.workspace.buffer(name, self.like.numel(), dtype or self.like.dtype)

    def task_vectors(self) -> list[Tensor]:
        """τ_k = θ_k − θ_0, computed in place of the experts (once)."""
        if not self._delta:
            assert self.base is not None
            for expert in self.experts:
                expert.sub_(self.base)
            self._delta = True
        return self.experts

    def add_to_base(self, change: Tensor) -> Tensor:
        """θ_0 + change, overwriting ``change``; where the change is zero, the base's bits (also −0.0) stay.

        −0.0 + 0.0 is +0.0, but −0.0 − 0.0 is −0.0: so the change is negated as ``0 − change``, which
        makes both zeros +0.0, and subtracted.
        """
        assert self.base is not None
        torch.sub(self.workspace.buffer("zero", 1, change.dtype).zero_(), change, out=change)
        return torch.sub(self.base, change, out=change)


class Scan(Protocol):
    """All blocks of one tensor, or (for exact global rules) of all tensors of the merge."""

    @property
    def sizes(self) -> Sequence[int]:
        """Elements per tensor."""

    @property
    def has_base(self) -> bool:
        """Do the blocks have a base?"""

    def map(self, function: Callable[[Block], R]) -> list[list[R]]:
        """``function`` of each block: one list per tensor, in block order. One pass over the inputs."""

    def sample(self, function: Callable[[Block], R], size: int) -> list[R]:
        """``function`` of blocks of elements (not neighbours) spread evenly, about ``size`` elements in all."""


class Method:
    """A merging rule with the parameters that hold for one tensor.

    Subclasses state what they are in class attributes, their parameters in two pydantic models, and
    their arithmetic in ``combine`` (and ``prepare``, if they look at a whole tensor first).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    idea: ClassVar[str]
    """One line for people who choose."""
    paper: ClassVar[str] = ""
    needs_base: ClassVar[bool]
    uses_base: ClassVar[bool] = True
    """False: a base in the recipe only supplies side files and excluded tensors."""
    experts_range: ClassVar[tuple[int, int | None]]
    """How many models besides the base: least, most (None: no limit)."""
    symmetric: ClassVar[bool] = True
    """Does permuting the experts with their parameters leave the result the same (up to rounding)?"""
    random: ClassVar[bool] = False
    spreads_nan: ClassVar[bool] = False
    """Does a NaN or infinity in any input that counts always show in the output?"""
    excluded_kinds: ClassVar[frozenset[str]] = frozenset()
    """Kinds of tensors (``checkpoints.layout.KINDS``) left as they are in the base unless a recipe asks."""
    coarse: ClassVar[int] = 1
    """Blocks that are taken as one: rules with few buffers still fit the cache with longer blocks."""
    passes: ClassVar[int] = 1
    """How often the inputs are read, for the estimate of time."""
    nanoseconds: ClassVar[float] = 2.0
    """Arithmetic per element, expert and pass on one core, for the estimate of time."""

    class Shared(Parameters):
        """Parameters of the merge as a whole."""

    class PerExpert(Parameters):
        """Parameters of each expert."""

    def __init__(self, shared: Any, experts: Sequence[Any]) -> None:
        self.shared = shared
        self.experts = list(experts)

    def coefficients(self) -> list[float] | None:
        """The factor that finally stands before each expert (or task vector), if there is such a number."""
        return None

    def copies(self) -> int | None:
        """N2: the input whose bytes *are* the result: −1 the base, k expert k, None if arithmetic is needed."""
        return None

    def whole_model(self) -> tuple | None:
        """For exact global rules: the parameters that must be the same in all tensors. None: per tensor."""
        return None

    def formula(self, names: Sequence[str], base: bool, size: int) -> Formula:
        """What is done to a tensor of ``size`` elements, in words of ``formula.py``, with the numbers that are known
        before a weight is read. ``names``: short names of the experts; ``base``: is there one?"""
        raise NotImplementedError

    def preparation(self) -> tuple:
        """The parameters that ``prepare`` depends on. Where they and the inputs stay the same, what it gave may be used
        again (a copy of it, if ``combine`` changes it): then a new strength costs no new search for thresholds."""
        return (self.shared, *self.experts)

    def prepare(self, scan: Scan) -> list[Any]:
        """What ``combine`` must know beforehand: one value per tensor of the scan."""
        return [None] * len(scan.sizes)

    def combine(self, block: Block, prepared: Any) -> Tensor:
        """The merged block, in the compute dtype."""
        raise NotImplementedError


def lone_expert(weights: Sequence[float], scale: float = 1.0) -> int | None:
    """N2 for rules of the form θ_0 + Σ c_k τ_k: −1 if all c_k are 0, k if only c_k = 1 is left, else None."""
    used = [k for k, w in enumerate(weights) if w * scale != 0]
    if not used:
        return -1
    if len(used) == 1 and weights[used[0]] * scale == 1:
        return used[0]
    return None
