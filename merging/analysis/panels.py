"""Reading matrices in panels: groups of rows (or columns), so that no matrix is ever held as a whole.

Whatever is asked of a matrix here (its Gram matrix, its product with a few vectors) is a sum over groups of its rows,
or is made group by group. Of a wide matrix the transpose is taken: its singular values are the same, and its Gram
matrix is the smaller one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..checkpoints.checkpoint import Source
from ..checkpoints.header import ITEM_BITS, TORCH_NAMES
from ..methods import Workspace
from ..methods.lazy_torch import torch
from .models import Compared, refuse_block

if TYPE_CHECKING:
    from torch import Tensor

PANEL, NARROWEST = 1 << 19, 256
"""Elements in a panel, and its least number of rows: products of large blocks are fast. Part of the numerics."""
WINDOW_BYTES = 8 << 20
"""Of a wide matrix as many columns are read at a time: short reads are slow."""


def is_matrix(tensor: Compared) -> bool:
    """Whether the tensor is one matrix. (Stacks of matrices and convolution kernels are not: their shape does not say
    which dimensions belong together.)"""
    return len(tensor.shape) == 2 and tensor.numel > 0


def task_vector_panels(
    tensor: Compared, sums: Sequence[tuple[int, ...]], workspace: Workspace
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(panel of W_0, panels of the sums of task vectors). They may be overwritten, and are in the next step."""
    used = sorted({k for terms in sums for k in terms})
    sources = [tensor.base, *(tensor.changed[k] for k in used)]
    for base, *experts in source_panels(sources, tensor.shape, tensor.dtype, workspace):
        task_vectors = dict(zip(used, (expert.sub_(base) for expert in experts), strict=True))
        parts = []
        for number, terms in enumerate(sums):
            part = task_vectors[terms[0]]
            if len(terms) > 1:
                own = workspace.buffer(f"sum{number}", part.numel(), part.dtype)
                part = like(part, own).copy_(part)
                for k in terms[1:]:
                    part += task_vectors[k]
            parts.append(part)
        yield base, parts


def source_panels(
    sources: Sequence[Source], shape: tuple[int, ...], dtype: Any, workspace: Workspace
) -> Iterator[list[Tensor]]:
    """Panels of the matrices that lie in ``sources``, with the smaller side as columns.

    A tall matrix gives groups of its rows. A wide one gives groups of its columns, turned (a view: in memory they lie
    as in the file).
    """
    rows, columns = shape
    n, length = min(shape), max(shape)
    step = max(NARROWEST, PANEL // n)
    if rows >= columns:
        for start in range(0, length, step):
            stop = min(length, start + step)
            found = []
            for i, source in enumerate(sources):
                out = workspace.buffer(f"panel{i}", (stop - start) * n, dtype)
                found.append(out.copy_(_read(source, start * n, stop * n, i, workspace)).view(-1, n))
            yield found
        return
    sizes = [ITEM_BITS[source.dtype] // 8 for source in sources]
    stride = max(1, WINDOW_BYTES // (n * max(sizes) * step)) * step
    for left in range(0, columns, stride):
        right = min(columns, left + stride)
        windows = [_read_columns(source, left, right, shape, i, workspace) for i, source in enumerate(sources)]
        for start in range(0, right - left, step):
            stop = min(right - left, start + step)
            found = []
            for i, window in enumerate(windows):
                out = workspace.buffer(f"panel{i}", (stop - start) * n, dtype).view(n, stop - start)
                found.append(out.copy_(window[:, start:stop]).T)
            yield found


def _read(source: Source, start: int, stop: int, slot: int, workspace: Workspace) -> Tensor:
    raw = workspace.window(f"panel{slot}", None, (stop - start) * ITEM_BITS[source.dtype] // 8)
    source.read(start, stop, raw.numpy().data)
    return raw.view(getattr(torch, TORCH_NAMES[source.dtype]))


def _read_columns(
    source: Source, left: int, right: int, shape: tuple[int, ...], slot: int, workspace: Workspace
) -> Tensor:
    rows, columns = shape
    if right - left == columns:
        return _read(source, 0, rows * columns, slot, workspace).view(rows, columns)
    width = (right - left) * ITEM_BITS[source.dtype] // 8
    raw = workspace.window(f"panel{slot}", None, rows * width)
    out = raw.numpy().data
    for row in range(rows):
        source.read(row * columns + left, row * columns + right, out[row * width : (row + 1) * width])
    return raw.view(getattr(torch, TORCH_NAMES[source.dtype])).view(rows, right - left)


def like(panel: Tensor, memory: Tensor) -> Tensor:
    """``memory`` (1-D) as a matrix that lies in memory as ``panel`` does."""
    return memory.view(panel.shape) if panel.is_contiguous() else memory.view(panel.shape[::-1]).T


def refuse(tensor: Compared) -> None:
    """Raise E_NOT_FINITE or E_OVERFLOW, naming tensor, element and file, if there is a reason in the weights."""
    for start in range(0, tensor.numel, PANEL):
        refuse_block(tensor, start, min(tensor.numel, start + PANEL))
