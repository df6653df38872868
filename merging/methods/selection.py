"""Exact order statistics of numbers that are too many to hold.

TIES needs the k-th largest |τ| of a tensor, PCB-Merging quantiles of |τ| and of its scores, either per
tensor or over a whole model. Sorting costs 60 ns per element and all of the memory; this costs about one
pass over the data and a small buffer, and is exact:

1. a sample gives an interval that very probably holds the wanted element, and the values in it that are
   heavy (16-bit weights: a fifth of all |τ| can be equal);
2. one pass counts what lies below and inside the interval and how often each heavy value occurs, and collects
   the rest that lies inside;
3. the wanted element is found by its rank. If the sample was misleading or the rest too much to collect, the
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

SMALL_SAMPLE, LARGE_SAMPLE = 1 << 16, 1 << 21
"""Elements of the first sample of each series: a 64th of all within these limits, and never more than a 24th."""
COLLECT = 1 << 24
"""Elements that are collected at most, over all searches together. Usual are a fifth of it or far less."""
HEAVY = 1 / 512
"""A value with more than this share of a sample is heavy: it is counted, not collected."""
DEVIATIONS = 6
"""Half width of an interval, in standard deviations of the sampled rank."""


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
    """Looks for the element of ``rank``, which certainly is in the closed interval [low, high]."""

    series: int
    rank: int
    low: Any = -math.inf
    high: Any = math.inf
    first: Any = -math.inf
    """The next pass looks into [first, last], a part of [low, high]."""
    last: Any = math.inf
    heavy: list[Any] = field(default_factory=list)
    """Values in [first, last] that are only counted; ascending. If first = last, that one."""
    largest: bool = False
    """Looks for the largest element: no interval needed."""
    found: OrderStatistic | None = None


@dataclass(slots=True)
class _Seen:
    """What one search saw in a block (then: in all blocks)."""

    below: int
    inside: int
    heavy: list[int]
    rest: np.ndarray
    """The elements inside that are not heavy, thinned out evenly if they were too many."""


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
        search.largest = search.rank == total - 1
    guessed = [search for search in pending if not search.largest]
    if guessed and total > 4 * BLOCK:
        _first_guess(scan, keys, guessed, total)
    while pending:
        _narrow(scan, keys, pending, total)
        pending = [search for search in pending if search.found is None]
    return [[search.found for search in group if search.found] for group in searches]


def memory(total: int, series: int, itemsize: int) -> int:
    """Bytes that a search through ``total`` elements takes in the process that starts it (usually at most)."""
    sampled = _sample_size(total) if total > 4 * BLOCK else total
    return sampled * (series * itemsize + 8) + 2 * min(total * series // 128, COLLECT) * itemsize


def _sample_size(total: int) -> int:
    return min(max(SMALL_SAMPLE, min(total // 64, LARGE_SAMPLE)), total // 24)


def _first_guess(scan: Scan, keys: Callable, searches: list[_Search], total: int) -> None:
    wanted = sorted({search.series for search in searches})

    def look(block: Block) -> list[np.ndarray]:
        tensors = keys(block)
        return [to_numpy(tensors[s]).copy() for s in wanted]

    pieces = scan.sample(look, _sample_size(total))
    drawn = sum(len(piece[0]) for piece in pieces)
    reached = np.arange(1, drawn + 1) * (total / drawn)
    for i, s in enumerate(wanted):
        sample = np.concatenate([piece[i] for piece in pieces])
        sample.sort()
        for search in searches:
            if search.series == s:
                _focus(search, sample, reached, search.rank + 0.5)


def _focus(search: _Search, values: np.ndarray, reached: np.ndarray, place: float) -> None:
    """Choose where to look next: around the element that has ``place`` elements below it.

    ``values``: a sorted sample; ``reached``: how many elements each of them and those before it stand for. The
    interval is widened by so many standard deviations and a little.
    """
    total, drawn = float(reached[-1]), len(values)
    share = min(max(place / total, 0.0), 1.0)
    margin = (DEVIATIONS * math.sqrt(share * (1 - share) * drawn) + 8) * total / drawn
    begin, end = np.searchsorted(reached, [place - margin, place + margin])
    if place - margin > 0:
        search.first = max(search.low, values[begin])
    if end < drawn:
        search.last = min(search.high, values[end])
    inside = slice(np.searchsorted(values, search.first), np.searchsorted(values, search.last, side="right"))
    before = reached[inside.start - 1] if inside.start else 0.0
    values, reached = values[inside], reached[inside]
    ends = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)  # of the runs of equal values
    heavy = np.diff(reached[ends], prepend=before) > HEAVY * total
    search.heavy = list(values[ends[heavy]]) if len(ends) > 1 else [values[0]]


def _narrow(scan: Scan, keys: Callable, pending: list[_Search], total: int) -> None:
    """One pass: settle each search, or give it a narrower interval that certainly holds its element."""
    share, free = COLLECT / (total * len(pending)), COLLECT
    tops = [-math.inf] * len(pending)

    def look(block: Block) -> list[_Seen]:
        nonlocal free
        tensors, found = keys(block), []
        for i, search in enumerate(pending):
            x = to_numpy(tensors[search.series])
            if search.largest:
                found.append(_look_for_largest(x, tops[i]))
                tops[i] = max(tops[i], found[-1].rest[0])
            else:
                found.append(_look(x, search, max(64, int(share * x.size), free)))
                free -= found[-1].rest.size
        return found

    blocks = [block for tensor in scan.map(look) for block in tensor]
    for i, search in enumerate(pending):
        parts = [block[i] for block in blocks]
        if search.largest:
            top = max(part.rest[0] for part in parts)
            equal = sum(part.inside for part in parts if part.rest[0] == top)
            search.found = OrderStatistic(float(top), total - equal, equal)
        else:
            seen = _Seen(
                sum(part.below for part in parts),
                sum(part.inside for part in parts),
                [sum(column) for column in zip(*(part.heavy for part in parts), strict=True)],
                np.concatenate([part.rest for part in parts]),
            )
            _settle(search, seen)


def _look_for_largest(x: np.ndarray, known: Any) -> _Seen:
    """The largest of the block, and how often it occurs (left out if ``known`` is larger already)."""
    top = x.max(keepdims=True)
    return _Seen(0, int(np.count_nonzero(x == top)) if top[0] >= known else 0, [], top)


def _look(x: np.ndarray, search: _Search, room: int) -> _Seen:
    if search.first == search.last:
        equal = int(np.count_nonzero(x == search.first))
        return _Seen(int(np.count_nonzero(x < search.first)), equal, [equal], x[:0])
    mask = x >= search.first
    below = x.size - int(np.count_nonzero(mask))
    if search.last < math.inf:
        mask &= x <= search.last
    rest = x[mask]
    inside, counts = rest.size, []
    for value in search.heavy:
        other = rest != value
        kept = int(np.count_nonzero(other))
        counts.append(rest.size - kept)
        if counts[-1]:
            rest = rest[other]
    return _Seen(below, inside, counts, rest[:: -(-rest.size // room)] if rest.size > room else rest)


def _settle(search: _Search, seen: _Seen) -> None:
    if search.rank < seen.below or search.rank >= seen.below + seen.inside:
        _look_beside(search, seen)
        return
    place, rest, total = search.rank - seen.below, seen.rest, seen.inside - sum(seen.heavy)
    if len(rest) == total:
        search.found = _pick(place, seen.below, rest, search.heavy, seen.heavy)
        return
    before = search.first, search.last
    search.low, search.high = before
    values = np.concatenate([rest, np.array(search.heavy, rest.dtype)])
    weights = np.concatenate([np.full(len(rest), total / len(rest)), np.array(seen.heavy, float)])
    order = np.argsort(values, kind="stable")
    values, reached = values[order], np.cumsum(weights[order])
    _focus(search, values, reached, place + 0.5)
    if (search.first, search.last) == before:  # cannot narrow: split at the likeliest
        likeliest = values[min(int(np.searchsorted(reached, place + 0.5)), len(values) - 1)]
        search.first = search.last = likeliest
        search.heavy = [likeliest]


def _look_beside(search: _Search, seen: _Seen) -> None:
    """The element is not where the sample said: look on that side, as far as the density of what was seen suggests."""
    width = float(search.last) - float(search.first)
    missed = seen.below - search.rank if search.rank < seen.below else search.rank - seen.below - seen.inside + 1
    reach = 3 * missed * width / seen.inside if seen.inside else 0.0
    kind = type(search.first)
    if search.rank < seen.below:
        search.high = search.last = _neighbour(search.first, -math.inf)
        near = reach > 0 and math.isfinite(reach)
        search.first = max(search.low, kind(search.last - reach)) if near else search.low
    else:
        search.low = search.first = _neighbour(search.last, math.inf)
        near = reach > 0 and math.isfinite(reach)
        search.last = min(search.high, kind(search.first + reach)) if near else search.high
    search.heavy = [search.first] if search.first == search.last else []


def _pick(place: int, below: int, rest: np.ndarray, heavy: list[Any], counts: list[int]) -> OrderStatistic:
    """The element of rank ``place`` among ``rest`` and the heavy values with their counts."""
    passed = 0
    for value, count in zip(heavy, counts, strict=True):
        smaller = passed + int(np.count_nonzero(rest < value))
        if place < smaller:
            break
        if place < smaller + count:
            return OrderStatistic(float(value), below + smaller, count)
        passed += count
    value = np.partition(rest, place - passed)[place - passed]
    smaller, equal = int(np.count_nonzero(rest < value)), int(np.count_nonzero(rest == value))
    return OrderStatistic(float(value), below + passed + smaller, equal)


def _neighbour(value: Any, towards: float) -> Any:
    """The next number of the same type: limits keep the keys' own dtype, float32 or float64."""
    return np.nextafter(value, value.dtype.type(towards))


def to_numpy(x: Tensor) -> np.ndarray:
    """The values on the host; possibly the tensor's own memory."""
    return x.cpu().numpy()
