"""The tensor W + s * B A, computed while it is read.

Rows are computed in tiles of a height that follows from the shape alone, so the same multiplications run in
the same order whichever range is asked for, and the bits never depend on block size or thread. A few
finished tiles and the factor that every tile needs are kept; nothing of the size of W ever is.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING

import numpy as np

from merging.checkpoints.checkpoint import Source, check_range
from merging.checkpoints.header import item_size

if TYPE_CHECKING:
    import torch

FLOATS = ("F16", "BF16", "F32", "F64")
TILE = 1 << 16  # elements of a tile, unless a single row has more
CACHE_BYTES = 64 << 20


class LowRankSource:
    """Source of ``below`` + scale * B A, for A of shape (rank, in, ...) and B of shape (out, rank, ...).

    ``below`` has the shape (out, in, ...), or, if ``transposed``, (in, out): embeddings, and GPT-2's
    Conv1D. The data type is F32 if ``below`` has 16 bits, else F64.
    """

    def __init__(self, name: str, below: Source, a: Source, b: Source, scale: float, transposed: bool):
        self.name, self.shape, self.numel = name, below.shape, below.numel
        self.dtype = "F32" if below.dtype in ("F16", "BF16") else "F64"
        self.below, self.a, self.b, self.scale, self.transposed = below, a, b, scale, transposed
        self.rank = a.shape[0]
        self.rows = below.shape[0]
        self.columns = below.numel // self.rows if self.rows else 0
        self.tile_rows = max(1, TILE // max(1, self.columns))

    def read(self, start: int, stop: int, out: memoryview) -> None:
        out = check_range(self, start, stop, out)
        size, step = item_size(self.dtype), self.tile_rows * self.columns
        position = start
        while position < stop:
            number = position // step
            tile = _cache.get((self, number))
            if tile is None:
                tile = self._compute(number)
                _cache.put((self, number), tile, tile.nbytes)
            begin = position - number * step
            end = min(stop - number * step, tile.size)
            part = out[(position - start) * size : (position - start + end - begin) * size]
            np.frombuffer(part, dtype=tile.dtype)[:] = tile[begin:end]
            position = number * step + end

    def _compute(self, number: int) -> np.ndarray:
        first = number * self.tile_rows
        last = min(self.rows, first + self.tile_rows)
        right = _cache.get((self, "right"))
        if right is None:
            right = self._right()
            _cache.put((self, "right"), right, right.numel() * 8)
        weight = read_float64(self.below, first * self.columns, last * self.columns)
        weight += (self._left(first, last) @ right).numpy().reshape(-1)
        with np.errstate(over="ignore"):  # what does not fit becomes infinite; the merge reports it
            return weight.astype(np.float32 if self.dtype == "F32" else np.float64)

    def _right(self) -> torch.Tensor:
        """The factor that all rows share: A, or B transposed. Shape (rank, columns)."""
        if self.transposed:
            return _matrix(read_float64(self.b, 0, self.b.numel).reshape(self.columns, self.rank).T)
        return _matrix(read_float64(self.a, 0, self.a.numel).reshape(self.rank, self.columns))

    def _left(self, first: int, last: int) -> torch.Tensor:
        """The factor of rows [first, last), times the scale: rows of B, or columns of A. Shape (rows, rank)."""
        if self.transposed:
            offsets = range(0, self.a.numel, self.rows)
            values = np.stack([read_float64(self.a, at + first, at + last) for at in offsets], axis=1)
        else:
            values = read_float64(self.b, first * self.rank, last * self.rank).reshape(-1, self.rank)
        return _matrix(values * self.scale)


def _matrix(values: np.ndarray) -> torch.Tensor:
    import torch

    # In memory of torch, which is aligned to 64 bytes: some multiplication kernels round by alignment.
    return torch.tensor(values, dtype=torch.float64)


def read_float64(source: Source, start: int, stop: int) -> np.ndarray:
    """Elements [start, stop) of a floating-point source, widened without loss."""
    raw = bytearray((stop - start) * item_size(source.dtype))
    source.read(start, stop, memoryview(raw))
    if source.dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(raw, dtype={"F16": "<f2", "F32": "<f4", "F64": "<f8"}[source.dtype]).astype(
        np.float64
    )


def same_bytes(one: Source, other: Source) -> bool:
    """Whether two sources hold the same tensor, bit for bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    step, size = 1 << 20, item_size(one.dtype)
    for start in range(0, one.numel, step):
        stop = min(one.numel, start + step)
        left, right = bytearray((stop - start) * size), bytearray((stop - start) * size)
        one.read(start, stop, memoryview(left))
        other.read(start, stop, memoryview(right))
        if left != right:
            return False
    return True


class _Cache:
    """The most recently used values, up to a number of bytes; always at least one."""

    def __init__(self, limit: int):
        self.limit, self.used, self.lock = limit, 0, threading.Lock()
        self.values: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()

    def get(self, key: Hashable):  # type: ignore[no-untyped-def]
        with self.lock:
            if key not in self.values:
                return None
            self.values.move_to_end(key)
            return self.values[key][0]

    def put(self, key: Hashable, value: object, size: int) -> None:
        with self.lock:
            if key in self.values:
                return
            self.values[key] = (value, size)
            self.used += size
            while self.used > self.limit and len(self.values) > 1:
                self.used -= self.values.popitem(last=False)[1][1]


_cache = _Cache(CACHE_BYTES)
