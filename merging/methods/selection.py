"""Exact order statistics of numbers that are too many to hold.

TIES needs the k-th largest |τ| of a tensor, PCB-Merging quantiles of |τ| and of its scores, either per
tensor or over a whole model. Sorting costs 60 ns per element and all of the memory; this costs about one
pass over the data and a small buffer, and is exact:

1. a small sample gives an interval that very probably holds the wanted element;
2. one pass counts what lies below and inside the interval and collects what lies inside, or, where the
   sample shows only a few different values (16-bit weights: a fifth of all |τ| can be equal), counts those;
3. the wanted element is found by its rank. If the sample was misleading or the interval too full, the
   counts (which are exact) say where to look, and another pass follows.

Counts are integers, so the result does not depend on the order of blocks, threads or devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import BLOCK, Block, Scan

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = 1 << 17
"""Elements of the first sample of each series (or a 24th of all, if that is less)."""
COLLECT = 1 << 21
"""Elements that are collected at most, over all searches together (8 or 16 MB)."""
FEW = 4
"""So many different values in the sample's interval are counted one by one instead of collected."""


@dataclass(frozen=True, slots=True)
class OrderStatistic:
    """The element of rank r (0 = smallest) of a series, with its surroundings."""

    value: float
    below: int
    """How many elements are smaller than ``value``."""
    equal: int
    """How many are equal to it (at least 1)."""


@dataclass(slots=True)
class _Search:
    """Looks for the element of ``rank`` in the closed interval [low, high]."""

    series: int
    rank: int
    low: Any = -math.inf
    high: Any = math.inf
    values: list[Any] = field(default_factory=list)
    """If not empty: the only candidates seen in the interval; they are counted, nothing is collected."""
    heavy_ends: bool = False
    """Do many elements equal an end of the interval? They are counted then, not collected."""
    last: bool = False
    """Looks for the largest element: no interval needed."""
    found: OrderStatistic | None = None


def order_statistics(
    scan: Scan,
    keys: Callable[[Block], list[Tensor]],
    ranks: Sequence[Sequence[int]],
) -> list[list[OrderStatistic]]:
    """Exact order statistics of several series over all blocks of ``scan``.

    ``keys(block)`` gives one 1-D tensor per series (finite numbers, one per element of the block);
    ``ranks[s]`` are the 0-based ascending ranks wanted of series ``s``. Ranks outside the series are
    moved to its nearest end. An empty scan gives zeros.
    """
    total = sum(scan.sizes)
    if total == 0:
        return [[OrderStatistic(0.0, 0, 0) for _ in wanted] for wanted in ranks]
    searches = [[_Search(s, min(max(r, 0), total - 1)) for r in wanted] for s, wanted in enumerate(ranks)]
    pending = [search for group in searches for search in group]
    for search in pending:
        search.last = search.rank == total - 1
    if total > 4 * BLOCK:
        _first_guess(scan, keys, pending, total)
    while pending:
        _narrow(scan, keys, pending)
        pending = [search for search in pending if search.found is None]
    return [[search.found for search in group if search.found] for group in searches]


def _first_guess(scan: Scan, keys: Callable, pending: list[_Search], total: int) -> None:
    """Intervals from a sample: the rank's place in it, widened by eight standard deviations and a little
    (elements come in runs, which are less telling than as many single ones)."""
    wanted = sorted({search.series for search in pending})

    def look(block: Block) -> list[np.ndarray]:
        tensors = keys(block)
        return [to_numpy(tensors[s]).copy() for s in wanted]

    pieces = scan.sample(look, min(SAMPLE, total // 24))
    samples = {s: np.sort(np.concatenate([piece[i] for piece in pieces])) for i, s in enumerate(wanted)}
    for search in pending:
        if not search.last:
            _focus(search, samples[search.series], (search.rank + 0.5) / total, deviations=8)


def _focus(search: _Search, ordered: np.ndarray, share: float, deviations: float) -> None:
    """Narrow the interval to the neighbourhood of the quantile ``share`` of a sorted sample."""
    n = len(ordered)
    margin = deviations * math.sqrt(max(share * (1 - share), 0.0) * n) + 8
    first, last = math.floor(share * n - margin), math.ceil(share * n + margin)
    if first >= 0:
        search.low = max(search.low, ordered[first])
    if last < n:
        search.high = min(search.high, ordered[last])
    search.heavy_ends = any(
        np.searchsorted(ordered, end, "right") - np.searchsorted(ordered, end, "left") > n // 256
        for end in (search.low, search.high)
    )
    inside = ordered[max(first, 0) : last + 1]
    edges = np.flatnonzero(np.diff(inside)) if len(inside) else inside
    search.values = [inside[0], *inside[edges + 1]] if len(inside) and len(edges) < FEW else []


def _narrow(scan: Scan, keys: Callable, pending: list[_Search]) -> None:
    """One pass: settle each search, or give it a narrower interval that certainly holds its element."""
    share = COLLECT / (sum(scan.sizes) * len(pending))

    def look(block: Block) -> list[tuple]:
        tensors = keys(block)
        return [_look(to_numpy(tensors[s.series]), s, share) for s in pending]

    seen = [block for tensor in scan.map(look) for block in tensor]
    for i, search in enumerate(pending):
        if search.last:
            tops, equal = zip(*((block[i][1][0], block[i][0][0]) for block in seen), strict=True)
            number = sum(n for n, top in zip(equal, tops, strict=True) if top == max(tops))
            search.found = OrderStatistic(float(max(tops)), sum(scan.sizes) - number, number)
            continue
        counts = [sum(column) for column in zip(*(block[i][0] for block in seen), strict=True)]
        if search.values:
            _settle_among_values(search, counts)
        else:
            _settle_among_collected(search, counts, np.concatenate([block[i][1] for block in seen]))


def _look(x: np.ndarray, search: _Search, share: float) -> tuple[list[int], np.ndarray]:
    """Counts of one block, and the elements inside the interval (thinned out evenly if more than ``share`` of all).

    A search among values gets for each value how many elements are below and how many not above it. The others get
    how many are below low, not above low, below high, not above high, and the elements strictly between; where the
    ends are not heavy they count as inside, which saves two comparisons.
    """
    if search.last:
        top = x.max(keepdims=True)
        return [int(np.count_nonzero(x == top))], top
    if search.values:
        counts = []
        for value in search.values:
            counts += [int(np.count_nonzero(x < value)), int(np.count_nonzero(x <= value))]
        return counts, x[:0]
    if not search.heavy_ends:
        inside = x >= search.low
        below = x.size - int(np.count_nonzero(inside))
        if search.high < math.inf:
            inside &= x <= search.high
        found = x[inside]
        room = max(64, int(share * x.size))
        thin = found[:: -(-found.size // room)] if found.size > room else found
        return [below, below, below + found.size, below + found.size], thin
    above_low, below_high = x > search.low, x < search.high
    counts = [
        int(np.count_nonzero(x < search.low)),
        x.size - int(np.count_nonzero(above_low)),
        int(np.count_nonzero(below_high)),
        int(np.count_nonzero(x <= search.high)),
    ]
    above_low &= below_high
    found = x[above_low] if counts[2] > counts[1] else x[:0]
    room = max(64, int(share * x.size))
    return counts, found[:: -(-found.size // room)] if found.size > room else found


def _settle_among_values(search: _Search, counts: list[int]) -> None:
    values, search.values = search.values, []
    for value, below, through in zip(values, counts[::2], counts[1::2], strict=True):
        if search.rank < below:
            search.high = min(search.high, _neighbour(value, -math.inf))
            return
        if search.rank < through:
            search.found = OrderStatistic(float(value), below, through - below)
            return
        search.low = max(search.low, _neighbour(value, math.inf))
    search.high = math.inf if search.low > search.high else search.high


def _settle_among_collected(search: _Search, counts: list[int], collected: np.ndarray) -> None:
    below_low, through_low, below_high, through_high = counts
    place, inside = search.rank - through_low, below_high - through_low
    if search.rank < below_low:
        search.low, search.high = -math.inf, _neighbour(search.low, -math.inf)
    elif search.rank < through_low:
        search.found = OrderStatistic(float(search.low), below_low, through_low - below_low)
    elif search.rank >= through_high:
        search.low, search.high = _neighbour(search.high, math.inf), math.inf
    elif search.rank >= below_high:
        search.found = OrderStatistic(float(search.high), below_high, through_high - below_high)
    elif len(collected) == inside:
        value = np.partition(collected, place)[place]
        smaller = int(np.count_nonzero(collected < value))
        equal = int(np.count_nonzero(collected == value))
        search.found = OrderStatistic(float(value), through_low + smaller, equal)
    else:
        before = (search.low, search.high)
        collected.sort()
        _focus(search, collected, (place + 0.5) / inside, deviations=5)
        if not search.values and (search.low, search.high) == before:  # cannot narrow: split at the likeliest
            search.values = [collected[min(int(place / inside * len(collected)), len(collected) - 1)]]


def _neighbour(value: Any, towards: float) -> Any:
    """The next number of the same type: limits keep the keys' own dtype, float32 or float64."""
    return np.nextafter(value, value.dtype.type(towards))


def to_numpy(x: Tensor) -> np.ndarray:
    """The values on the host; possibly the tensor's own memory."""
    return x.cpu().numpy()
