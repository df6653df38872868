"""Blocks made from readers: the one loop that feeds every method.

A reader fills a tensor with elements ``start …`` of one model's tensor, from a file, from an adapter or from
memory; the loop does not know which. So a merge of tensors in memory (previews, tests) and a merge of
checkpoints on disk run through the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import NumbersError
from .base import Block, Method, Workspace
from .lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

R = TypeVar("R")
Reader = Callable[[int, "Tensor", Workspace, int], None]
"""``reader(start, out, workspace, stride)`` fills ``out`` with every ``stride``-th element from flat index ``start``,
converted to its dtype. The workspace lends it memory."""

SAMPLE_BLOCK, LONGEST_STRIDE = 1 << 12, 63
"""A sample's blocks have so many elements, each at most so far from the next."""


@dataclass(slots=True)
class TensorInputs:
    """One tensor of the merge, as it is in the base and in each expert."""

    name: str
    size: int
    dtype: Any
    """Compute dtype."""
    base: Reader | None
    experts: Sequence[Reader]
    coarse: int = 1
    """Blocks that are taken as one (see ``Method.coarse``)."""

    def block(self, start: int, size: int, workspace: Workspace, seed: int, stride: int = 1) -> Block:
        base = None
        if self.base is not None:
            base = workspace.buffer("base", size, self.dtype)
            self.base(start, base, workspace, stride)
        experts = []
        for k, read in enumerate(self.experts):
            expert = workspace.buffer(f"expert{k}", size, self.dtype)
            read(start, expert, workspace, stride)
            experts.append(expert)
        return Block(self.name, start, base, experts, workspace, seed)

    def blocks(self, workspace: Workspace, seed: int) -> Iterator[Block]:
        step = workspace.block_size * self.coarse
        for start in range(0, self.size, step):
            yield self.block(start, min(step, self.size - start), workspace, seed)


Spread = Callable[[Callable[[TensorInputs, Workspace], Any], Sequence[TensorInputs]], list]
"""Runs a function over tensors, possibly on several workers, and gives the results in order."""


class BlockScan:
    """A scan (see ``base.Scan``) over tensors made of readers."""

    def __init__(
        self,
        tensors: Sequence[TensorInputs],
        workspace: Workspace,
        seed: int = 0,
        spread: Spread | None = None,
        pulse: Callable[[int], None] = lambda elements: None,
    ) -> None:
        self.tensors, self.workspace, self.seed = tensors, workspace, seed
        self.spread = spread or (lambda function, items: [function(item, workspace) for item in items])
        self.pulse = pulse
        """Called with the number of elements after each block: progress, and the place to cancel."""

    @property
    def sizes(self) -> list[int]:
        return [t.size for t in self.tensors]

    @property
    def has_base(self) -> bool:
        return self.tensors[0].base is not None

    def map(self, function: Callable[[Block], R]) -> list[list[R]]:
        def one(tensor: TensorInputs, workspace: Workspace) -> list[R]:
            results = []
            for block in tensor.blocks(workspace, self.seed):
                size = block.like.numel()
                results.append(function(block))
                self.pulse(size)
            return results

        return self.spread(one, self.tensors)

    def sample(self, function: Callable[[Block], R], size: int) -> list[R]:
        # Neighbours are alike (a row of a matrix has its own scale), so single elements are taken. The stride is
        # odd, or it would see the same columns only.
        share = max(1, sum(self.sizes) // max(1, size))
        stride = min(share, LONGEST_STRIDE) | 1
        gap = SAMPLE_BLOCK * max(0, share - stride)
        results, offset, at = [], 0, gap // 2
        for tensor in self.tensors:
            while at < offset + tensor.size:
                start = at - offset
                count = min(SAMPLE_BLOCK, -(-(tensor.size - start) // stride))
                results.append(function(tensor.block(start, count, self.workspace, self.seed, stride)))
                at += count * stride + gap
            offset += tensor.size
        return results


def compute_dtype(dtypes: Sequence[Any]) -> Any:
    """N1: float32 if all inputs have 16 bits, float64 otherwise."""
    return torch.float32 if all(d.itemsize <= 2 for d in dtypes) else torch.float64


def merge_tensors(
    method: Method,
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor]],
    *,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Merge models that are in memory; the same numbers as a merge of files.

    Each output tensor has the dtype of the base's (or first expert's), rounded once. All models must have the
    same names and shapes, and only finite numbers (NumbersError E_NOT_FINITE). For global rules all tensors are
    ranked together, in the order of their names.
    """
    models = [*([base] if base is not None else []), *experts]
    workspace = Workspace(device)
    inputs = []
    for name, first in models[0].items():
        dtype = compute_dtype([m[name].dtype for m in models])
        with_base = base is not None and method.uses_base
        inputs.append(
            TensorInputs(
                name,
                first.numel(),
                dtype,
                memory_reader(base[name]) if with_base and base is not None else None,
                [memory_reader(e[name]) for e in experts],
                method.coarse,
            )
        )
    inputs.sort(key=lambda tensor: tensor.name)
    groups = [inputs] if method.whole_model() is not None else [[i] for i in inputs]
    merged: dict[str, Tensor] = {}
    copied = method.copies()
    if copied is None:
        for name in (name for model in models for name, tensor in model.items() if not torch.isfinite(tensor).all()):
            raise NumbersError("E_NOT_FINITE", f"{name} holds a NaN or an infinity.", "It would spread in the merge.")
    for group in groups:
        prepared = [None] * len(group) if copied is not None else method.prepare(BlockScan(group, workspace, seed))
        for tensor, known in zip(group, prepared, strict=True):
            like = models[0][tensor.name]
            if copied is not None:
                merged[tensor.name] = (experts[copied] if copied >= 0 else models[0])[tensor.name].clone()
                continue
            out = torch.empty(like.numel(), dtype=like.dtype)
            for block in tensor.blocks(workspace, seed):
                stop = block.start + block.like.numel()
                round_into(out[block.start : stop], method.combine(block, known))
            merged[tensor.name] = out.view(like.shape)
    return {name: merged[name] for name in models[0]}


def round_into(out: Tensor, values: Tensor) -> None:
    """``out`` = ``values``, rounded to the nearest (ties to even) once.

    torch goes from float64 to 16 bits by way of float32, and so rounds twice: 1 + 2⁻⁸ + 2⁻⁴⁰ becomes 1 in bfloat16.
    Here the first step rounds to odd (towards zero, then the last bit set if anything was lost), after which the
    second step gives what one alone would have (Boldo and Melquiond, "Emulation of a FMA and correctly rounded
    sums: proved algorithms using rounding to odd", 2008).
    """
    if values.dtype == torch.float64 and out.dtype.itemsize == 2:
        single = values.to(torch.float32)
        back = single.double()
        too_far, inexact = back.abs() > values.abs(), back != values
        single.view(torch.int32).sub_(too_far.int()).bitwise_or_(inexact.int())
        values = single
    out.copy_(values)


def memory_reader(values: Tensor) -> Reader:
    flat = values.detach().reshape(-1)

    def read(start: int, out: Tensor, workspace: Workspace, stride: int) -> None:
        out.copy_(flat[start : start + out.numel() * stride : stride])

    return read
