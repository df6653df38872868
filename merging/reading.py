"""From bytes in a file to numbers in a block.

Blocks are small so that arithmetic stays in the processor's cache; files are better read in larger pieces. So a
reader fetches a window of several blocks at a time into the worker's memory and serves blocks from it, converted to
the compute dtype.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .checkpoints.checkpoint import Source
from .checkpoints.header import ITEM_BITS, TORCH_NAMES
from .errors import NumbersError
from .methods import Workspace
from .methods.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = 4
"""Blocks that are read at a time."""


class SourceReader:
    """Fills a compute tensor with a run of a source's elements. One thread at a time.

    ``slot``: which of the worker's windows it uses; readers of one block need different ones. ``check``: refuse what
    is not finite (not in samples: a whole pass follows). ``blank``: make it 0.
    """

    def __init__(self, source: Source, slot: int, check: bool = False, blank: bool = False) -> None:
        self.source, self.slot, self.check, self.blank = source, f"window{slot}", check, blank
        self.dtype, self.size = getattr(torch, TORCH_NAMES[source.dtype]), ITEM_BITS[source.dtype] // 8
        self.values: Tensor | None = None
        self.start = self.stop = 0

    def __call__(self, start: int, out: Tensor, workspace: Workspace, stride: int = 1) -> None:
        stop = start + (out.numel() - 1) * stride + 1
        if not (workspace.window_owner(self.slot) is self and self.start <= start and stop <= self.stop):
            self._fetch(start, stop, workspace, ahead=stride == 1)
        assert self.values is not None
        out.copy_(self.values[start - self.start : stop - self.start : stride])
        if self.blank:
            out.nan_to_num_(0.0, 0.0, 0.0)
        if self.check and stride == 1 and not math.isfinite(float(out.sum())):
            refuse_non_finite(self.source, start, out)

    def _fetch(self, start: int, stop: int, workspace: Workspace, ahead: bool) -> None:
        if ahead and stop - start >= workspace.block_size:  # a full block: more will follow
            stop = min(start + WINDOW * (stop - start), self.source.numel)
        raw = workspace.window(self.slot, self, (stop - start) * self.size)
        self.source.read(start, stop, raw.numpy().data)
        self.values, self.start, self.stop = raw.view(self.dtype), start, stop


def refuse_non_finite(source: Source, start: int, values: Tensor | None = None) -> None:
    """Raise E_NOT_FINITE if the values (or the one element at ``start``) hold a NaN or an infinity."""
    if values is None:
        raw = torch.empty(ITEM_BITS[source.dtype] // 8, dtype=torch.uint8)
        source.read(start, start + 1, raw.numpy().data)
        values = raw.view(getattr(torch, TORCH_NAMES[source.dtype]))
    wrong = torch.nonzero(~torch.isfinite(values)).flatten()
    if wrong.numel():
        place, value = start + int(wrong[0]), float(values[int(wrong[0])])
        raise NumbersError(
            "E_NOT_FINITE",
            f"{source.name}: element {place} is {value} in{place_of_source(source)}.",
            "NaN and infinity spread through a merge and ruin the model.",
            "Use another checkpoint, or set policies.non_finite: propagate if you mean it.",
        )


def place_of_source(source: Source) -> str:
    """A blank and the file of a tensor, or as much as is known."""
    where = getattr(getattr(source, "file", None), "path", None)
    return f" {where}" if where else " one of the models"
