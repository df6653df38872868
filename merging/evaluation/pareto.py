"""Several goals at once: which candidates are not beaten in everything, and how much ground they cover.

The one idea: a merge that is best on mathematics and one that is best on code need not be ranked against each other.
What can be said without weighing the goals is that some candidates are worse than another in every respect; the rest
is the Pareto front, and the choice within it is the user's.

Every objective is "more is better" here: the caller turns the others around (minus size, minus response length).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

EXACT_UP_TO = 3  # objectives; beyond, the volume is sampled
SAMPLES = 100_000

Array = NDArray[np.float64]


def pareto_front(points: ArrayLike) -> list[bool]:
    """For each point [points, objectives]: is there no other that is at least as good in all and better in one?

    Equal points do not beat each other: all of them stand on the front.
    """
    table = _checked(points)
    at_least = (table[:, None, :] >= table[None, :, :]).all(axis=2)
    better = (table[:, None, :] > table[None, :, :]).any(axis=2)
    return [not column.any() for column in (at_least & better).T]


def distance_to_utopia(points: ArrayLike, utopia: ArrayLike = 1.0) -> list[float]:
    """Euclidean distance of each point to the utopia point: what nobody reaches, as good as the best in everything.

    With gain kept as objectives that is (1, …, 1), every expert fully kept. A point beyond it in one objective does not
    make up for another: only shortfalls count.
    """
    table = _checked(points)
    return np.linalg.norm(np.maximum(np.asarray(utopia, dtype=np.float64) - table, 0.0), axis=1).tolist()


@dataclass(frozen=True, slots=True)
class Hypervolume:
    """``standard_error``: of the sampling; 0 where the value is exact."""

    value: float
    standard_error: float


def hypervolume(points: ArrayLike, reference: ArrayLike = 0.0, *, samples: int = SAMPLES, seed: int = 0) -> Hypervolume:
    """Volume of the region that the points dominate, above the reference point: one number for a whole front.

    Exact for up to three objectives (by slices), by seeded Monte Carlo beyond: uniform samples in the box between the
    reference and the best of every objective, of which the dominated share counts. Points that are not better than
    the reference in every objective add nothing. The unit is the product of the objectives' units.
    Source: E. Zitzler, L. Thiele, PPSN V (1998) 292.
    """
    table = _checked(points)
    table = table - np.asarray(reference, dtype=np.float64)
    table = table[(table > 0).all(axis=1)]
    if len(table) == 0:
        return Hypervolume(0.0, 0.0)
    if table.shape[1] <= EXACT_UP_TO:
        return Hypervolume(_slices(table), 0.0)
    box = table.max(axis=0)
    generator = np.random.default_rng(seed)
    hits = 0
    for start in range(0, samples, 10_000):
        drawn = generator.random((min(10_000, samples - start), table.shape[1])) * box
        dominated = np.zeros(len(drawn), dtype=bool)
        for point in table:
            dominated |= (drawn <= point).all(axis=1)
        hits += int(dominated.sum())
    share, volume = hits / samples, float(box.prod())
    return Hypervolume(share * volume, volume * math.sqrt(share * (1 - share) / samples))


def _slices(table: Array) -> float:
    """Cut along the last objective: between two heights the cross section, one dimension lower, is constant."""
    if table.shape[1] == 1:
        return float(table.max())
    order = np.argsort(-table[:, -1], kind="stable")
    table = table[order]
    heights = np.append(table[:, -1], 0.0)
    volume = 0.0
    for index in range(len(table)):
        thickness = heights[index] - heights[index + 1]
        if thickness > 0:
            volume += thickness * _slices(table[: index + 1, :-1])
    return float(volume)


def _checked(points: ArrayLike) -> Array:
    table = np.asarray(points, dtype=np.float64)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError("points must be a table [points, objectives] with something in it")
    if not np.isfinite(table).all():
        raise ValueError("an objective is NaN or infinite")
    return table
