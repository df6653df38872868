"""An embedding (or head) as it would be in the output's vocabulary.

Where the models number their tokens differently, each model's table is read through its row map. A token
that a model lacks takes the default row that ``tokenizer.align`` names: the base's row, or the mean of the
rows of those that have it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .checkpoint import RowsSource, Source, check_range
from .header import item_size
from .tokenizer import Alignment

_CODES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"}


def in_vocabulary(sources: Sequence[Source], index: int, alignment: Alignment) -> Source:
    """The tensor of model ``index`` among ``sources`` (one per model, in the order of the alignment)."""
    source, rows = sources[index], alignment.row_of[index]
    if len(rows) == source.shape[0] and bool((rows == np.arange(len(rows))).all()):
        return source
    missing = np.flatnonzero(rows < 0)
    if not missing.size:
        return RowsSource(source, rows)
    donors = (alignment.default[:, missing] >= 0).sum(axis=0)
    if (donors == 1).all():
        donor = np.argmax(alignment.default[:, missing] >= 0, axis=0)
        other = sources[int(donor[0])]
        if (donor == donor[0]).all() and other.dtype == source.dtype:
            fallback = np.full(len(rows), -1)
            fallback[missing] = alignment.default[int(donor[0]), missing]
            return RowsSource(source, rows, other, fallback)
    return _FilledRows(sources, index, alignment)


class _FilledRows:
    """Own rows by the map; each missing row is computed in float64 and rounded once to float32 (or float64 if
    the model has 32 bits or more)."""

    def __init__(self, sources: Sequence[Source], index: int, alignment: Alignment) -> None:
        source, rows = sources[index], alignment.row_of[index]
        self.name = source.name
        self.dtype = "F32" if item_size(source.dtype) <= 2 else "F64"
        self.shape = (len(rows), *source.shape[1:])
        self.width = source.numel // source.shape[0]
        self.numel = len(rows) * self.width
        self._own = RowsSource(source, np.maximum(rows, 0))
        self._missing = np.flatnonzero(rows < 0)
        self._sources, self._index, self._alignment = sources, index, alignment
        self._mean: np.ndarray | None = None

    def read(self, start: int, stop: int, out: memoryview) -> None:
        out = check_range(self, start, stop, out)
        target = np.frombuffer(out, dtype=_CODES[self.dtype])
        target[:] = _values(self._own, start, stop)
        first, last = start // self.width, -(-stop // self.width)
        for row in self._missing[np.searchsorted(self._missing, first) : np.searchsorted(self._missing, last)]:
            begin, end = max(start, row * self.width), min(stop, (row + 1) * self.width)
            target[begin - start : end - start] = self._row(int(row))[begin - row * self.width : end - row * self.width]

    def _row(self, row: int) -> np.ndarray:
        donors = [(s, int(n)) for s, n in zip(self._sources, self._alignment.default[:, row], strict=True) if n >= 0]
        if donors:
            return np.mean([_values(s, n * self.width, (n + 1) * self.width) for s, n in donors], axis=0)
        if self._alignment.average[row]:
            if self._mean is None:
                self._mean = self._average_row()
            return self._mean
        return np.zeros(self.width)

    def _average_row(self) -> np.ndarray:
        source, total = self._sources[self._index], np.zeros(self.width)
        for row in range(source.shape[0]):
            total += _values(source, row * self.width, (row + 1) * self.width)
        return total / source.shape[0]


def _values(source: Source, start: int, stop: int) -> np.ndarray:
    """Elements [start, stop) in float64."""
    raw = bytearray((stop - start) * item_size(source.dtype))
    source.read(start, stop, memoryview(raw))
    values = np.frombuffer(raw, dtype=_CODES[source.dtype])
    if source.dtype == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)
