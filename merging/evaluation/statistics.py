"""Is a difference real? Intervals, paired tests and sample sizes, from numbers alone.

The one idea: compare two models item by item. Most items are easy or hard for both, and that part of the noise is
common to both; what is left, the differences on the same items, shows far smaller effects than two separate scores
with their separate errors. And no difference is shown without saying how large one would have had to be to be seen.

All functions are pure and seeded. Scores are finite numbers; NaN and infinity are refused, since a mean over them
would be a guess. What the data cannot tell is NaN in the answer (the standard error of one item), never 0.

Sources: E. Miller, "Adding error bars to evals", arXiv 2411.00640 (paired differences, clusters, sample sizes);
B. Efron, R. Tibshirani, "An introduction to the bootstrap", 1993, ch. 13 (percentile interval).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z_95 = NormalDist().inv_cdf(0.975)  # 1.96: two-sided 95 %
RESAMPLES = 10_000
"""Draws of the bootstrap. Its smallest p-value is 2/(RESAMPLES + 1), which has to survive the correction for many
comparisons: with 2,000 draws nothing in a table of 50 tests could be significant."""
CHUNK = 1 << 21  # drawn items that are in memory at a time: 16 MB

Array = NDArray[np.float64]


# -- single scores ------------------------------------------------------------------------------------------------


def wilson_interval(correct: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Interval for a share that was measured on ``total`` items.

        (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n),   p = correct/n

    Unlike p ± z·sqrt(p(1-p)/n) it stays inside [0, 1] and does not collapse at p = 0 or 1.
    Source: E. B. Wilson, JASA 22 (1927) 209.

    Raises:
        ValueError: not 0 <= correct <= total, or no items.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} of {total} is no share")
    share = correct / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # the exact limits at 0 and 1 are 0 and 1; rounding would miss them by a last bit
    low = 0.0 if correct == 0 else (middle - half) / scale
    high = 1.0 if correct == total else (middle + half) / scale
    return low, high


def standard_error(values: ArrayLike, clusters: Sequence[Hashable] | None = None) -> float:
    """Standard error of a mean, in the unit of the values.

        sqrt(G/(G-1) · Σ_c (Σ_{i in c} (x_i − x̄))²) / n

    over the G clusters c. Items that share a document or a template are not independent: they are one cluster.
    Without clusters every item is its own, and the formula is the usual sd/sqrt(n) (with n − 1). Miller's formula
    lacks the factor G/(G−1); with it few clusters do not look better than they are.

    Returns:
        NaN for one item or one cluster: nothing is known about the spread.
    """
    numbers = checked(values)
    sums, _ = _by_cluster((numbers - numbers.mean())[:, None], clusters)
    groups = len(sums)
    if groups < 2:
        return math.nan
    return math.sqrt(groups / (groups - 1) * float((sums**2).sum())) / len(numbers)


# -- resampling ---------------------------------------------------------------------------------------------------


def resampled_means(
    columns: ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int | Sequence[int] = 0,
) -> Array:
    """Means of the same randomly drawn items in every column: the paired bootstrap.

    Each draw takes n items with replacement (or, with clusters, as many whole clusters as there are) and averages
    every column over *these same* items. Whatever is computed from the columns of one draw (a difference, a ratio, a
    minimum) is one draw from the distribution of that quantity. For a mean over tasks, call this per task with
    seeds of their own and average the results: that is resampling stratified by task.

    Args:
        columns: scores [items, models] (or [items] for one).
        clusters: a label per item; items with the same label are drawn together.
        seed: of the generator. The same seed, items and number of draws give the same answer.

    Returns:
        means [resamples, models].
    """
    values = _matrix(columns)
    sums, sizes = _by_cluster(values, clusters)
    units = len(sums)
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, values.shape[1]))
    step = max(1, CHUNK // units)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = generator.integers(units, size=(count, units))
        drawn += np.arange(count)[:, None] * units
        times = np.bincount(drawn.ravel(), minlength=count * units).reshape(count, units).astype(np.float64)
        means[start : start + count] = (times @ sums) / (times @ sizes)[:, None]
    return means


def percentile_interval(draws: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """The middle ``level`` of the draws.

    A draw may be NaN, "could be anything" (a ratio whose denominator came out at or below zero). It counts on both
    sides: too many of them, and the interval is unbounded.
    """
    numbers = np.asarray(draws, dtype=np.float64)
    tail = (1 - level) / 2
    lowest = np.where(np.isnan(numbers), -np.inf, numbers)
    highest = np.where(np.isnan(numbers), np.inf, numbers)
    # without interpolation, which would subtract infinities; on thousands of draws it makes no difference
    low = np.quantile(lowest, tail, method="lower")
    return float(low), float(np.quantile(highest, 1 - tail, method="higher"))


def bootstrap_p(draws: ArrayLike) -> float:
    """Two-sided p-value of "the mean difference is 0", from draws of it.

        min(1, 2·(1 + min(#{d ≤ 0}, #{d ≥ 0})) / (R + 1))

    It goes with the percentile interval: p < 5 % where the 95 % interval leaves out 0.
    """
    numbers = checked(draws)
    extreme = min(int((numbers <= 0).sum()), int((numbers >= 0).sum()))
    return min(1.0, 2 * (1 + extreme) / (len(numbers) + 1))


# -- two models on the same items ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of first − second over the same items, in the unit of the scores.

    ``units``: independent pieces (clusters, or items where there are none). ``wins`` and ``losses``: items on which
    the first is above or below the second. ``mean_square``: of the item differences; for 0/1 scores the share of
    items on which the two disagree. ``low``, ``high``: 95 %. Where there is only one unit, error, interval and p are
    NaN.
    """

    items: int
    units: int
    mean: float
    standard_error: float
    low: float
    high: float
    p: float
    wins: int
    losses: int
    mean_square: float
    test: str


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    draws: ArrayLike | None = None,
    seed: int | Sequence[int] = 0,
) -> Difference:
    """Compare two models item by item: ``first[i]`` and ``second[i]`` are scores of the same item.

    0/1 scores without clusters: exact McNemar test and Newcombe's interval. They are two different methods, so in
    rare cases at the edge one says 5 % and the other not. Everything else: the paired bootstrap, from ``draws`` of the
    mean difference where ``resampled_means`` has made them already.
    """
    one, two = checked(first), checked(second)
    if len(one) != len(two):
        raise ValueError(f"{len(one)} and {len(two)} scores cannot be paired")
    steps = one - two
    units = len(steps) if clusters is None else len(set(clusters))
    wins, losses = int((steps > 0).sum()), int((steps < 0).sum())
    low = high = p = math.nan
    if units == len(steps) and _is_binary(one) and _is_binary(two):
        both, only, other = int(one @ two), wins, losses
        low, high = newcombe_interval(both, only, other, len(steps) - both - only - other)
        p, test = mcnemar(only, other), "exact McNemar"
    else:
        test = "paired bootstrap" if units == len(steps) else "paired bootstrap over clusters"
        if units > 1:
            if draws is None:
                draws = resampled_means(steps, clusters=clusters, seed=seed)[:, 0]
            (low, high), p = percentile_interval(draws), bootstrap_p(draws)
    return Difference(
        items=len(steps),
        units=units,
        mean=float(steps.mean()),
        standard_error=standard_error(steps, clusters),
        low=low,
        high=high,
        p=p,
        wins=wins,
        losses=losses,
        mean_square=float((steps**2).mean()),
        test=test,
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value for two models with right/wrong answers to the same items.

        min(1, 2·P(X ≤ min(b, c))),   X ~ Binomial(b + c, 1/2)

    b, c: items that only the first, only the second got right. Items on which both agree say nothing.
    Source: Q. McNemar, Psychometrika 12 (1947) 153, in its exact (sign test) form. In whole numbers, so exact.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError("counts cannot be negative")
    tosses, fewest = only_first + only_second, min(only_first, only_second)
    ways = total = 1
    for k in range(fewest):
        ways = ways * (tosses - k) // (k + 1)
        total += ways
    return min(1.0, 2 * total / 2**tosses) if tosses else 1.0


def newcombe_interval(
    both: int, only_first: int, only_second: int, neither: int, z: float = Z_95
) -> tuple[float, float]:
    """Interval for the difference of two shares on the same items, from the two Wilson intervals.

        d − sqrt(a² − 2φab + b²),   a = p₁ − l₁, b = u₂ − p₂;   d + sqrt(…) with a = u₁ − p₁, b = p₂ − l₂

    φ: correlation of the two right/wrong columns, with a continuity correction. Unlike a bootstrap or p ± z·SE it does
    not shrink to a point when the two models never disagree.
    Source: R. G. Newcombe, Statistics in Medicine 17 (1998) 2635, method 10.
    """
    cells = (both, only_first, only_second, neither)
    total = sum(cells)
    if min(cells) < 0 or total < 1:
        raise ValueError(f"{cells} are no counts of items")
    right_1, right_2 = both + only_first, both + only_second
    share_1, share_2 = right_1 / total, right_2 / total
    (low_1, high_1), (low_2, high_2) = wilson_interval(right_1, total, z), wilson_interval(right_2, total, z)
    spread = right_1 * (total - right_1) * right_2 * (total - right_2)
    agreement: float = both * neither - only_first * only_second
    if agreement > 0:
        agreement = max(agreement - total / 2, 0.0)
    correlation = agreement / math.sqrt(spread) if spread else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    middle = share_1 - share_2
    low = middle - reach(share_1 - low_1, high_2 - share_2)
    return max(-1.0, low), min(1.0, middle + reach(high_1 - share_1, share_2 - low_2))


# -- many comparisons ---------------------------------------------------------------------------------------------


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for being many: the chance of even one false alarm among all stays below the level.

    Sorted p₍₁₎ ≤ … ≤ p₍ₘ₎ become the running maximum of min(1, (m − i + 1)·p₍ᵢ₎).
    Source: S. Holm, Scandinavian Journal of Statistics 6 (1979) 65.
    """
    values = np.asarray(p_values, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():  # NaN is neither
        raise ValueError("a p-value is not in [0, 1]")
    order = np.argsort(values, kind="stable")
    factors = np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
    return corrected.tolist()


def tied_groups(tied: ArrayLike) -> list[list[int]]:
    """Groups of models none of which can be told apart from another: all maximal sets that are tied pairwise.

    Being tied is not transitive (a ~ b and b ~ c, but a above c), so groups can overlap; a model that is told apart
    from every other stands alone. In a table, two models that share a group's letter are tied.

    Args:
        tied: symmetric yes/no matrix [models, models], in the order of the ranking. The diagonal does not matter.

    Returns:
        The groups as sorted indices, the group with the best member first.
    """
    matrix = np.asarray(tied, dtype=bool)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or (matrix != matrix.T).any():
        raise ValueError("who is tied with whom must be a symmetric matrix")
    neighbours = [{j for j in range(len(matrix)) if matrix[i, j] and j != i} for i in range(len(matrix))]
    groups: list[list[int]] = []

    def extend(group: set[int], candidates: set[int], seen: set[int]) -> None:  # Bron and Kerbosch, with a pivot
        if not candidates and not seen:
            groups.append(sorted(group))
            return
        pivot = max(candidates | seen, key=lambda node: len(neighbours[node] & candidates))
        for node in sorted(candidates - neighbours[pivot]):
            extend(group | {node}, candidates & neighbours[node], seen & neighbours[node])
            candidates = candidates - {node}
            seen = seen | {node}

    if len(matrix):
        extend(set(), set(range(len(matrix))), set())
    return sorted(groups)


# -- how many items does it take? ---------------------------------------------------------------------------------


def needed_items(difference: float, mean_square: float, *, level: float = 0.05, power: float = 0.8) -> int:
    """How many items it takes to see a difference.

        n = (z_{1−level/2} + z_power)² · (mean_square − difference²) / difference²     (7.85 for 5 % and 80 %)

    Args:
        difference: the true mean difference of the two models, in the unit of the scores.
        mean_square: mean of the squared item differences; for 0/1 scores the discordance, the share of items on which
            the models disagree.
    """
    if not math.isfinite(difference) or difference == 0 or not mean_square >= difference**2:
        raise ValueError("the difference must be finite, not 0, and its square at most the mean square")
    variance = mean_square - difference**2
    return max(1, math.ceil(power_factor(level, power) * variance / difference**2))


def smallest_visible_difference(items: int, mean_square: float, *, level: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference that ``items`` items show with the given power: ``needed_items`` turned around.

    difference = sqrt(f · mean_square / (n + f)),   f = (z_{1−level/2} + z_power)²

    0 when the models never differ: that says that nothing is known about it, not that anything would be visible.
    """
    if items < 1 or not 0 <= mean_square < math.inf:
        raise ValueError(f"{items} items with mean square {mean_square} are no sample")
    factor = power_factor(level, power)
    return math.sqrt(factor * mean_square / (items + factor))


def power_factor(level: float = 0.05, power: float = 0.8) -> float:
    """Its square root times a standard error is the smallest difference that is seen with this power."""
    normal = NormalDist()
    return (normal.inv_cdf(1 - level / 2) + normal.inv_cdf(power)) ** 2


# -- helpers ------------------------------------------------------------------------------------------------------


def checked(values: ArrayLike) -> Array:
    """A vector of at least one finite number, as float64."""
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) == 0:
        raise ValueError("a list of at least one score is needed")
    if not np.isfinite(numbers).all():
        raise ValueError("a score is NaN or infinite")
    return numbers


def _matrix(columns: ArrayLike) -> Array:
    values = np.asarray(columns, dtype=np.float64)
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError("a table of at least one score is needed")
    checked(values.ravel())
    return values


def _by_cluster(values: Array, clusters: Sequence[Hashable] | None) -> tuple[Array, Array]:
    """Sum of each column per cluster, in order of appearance, and the number of items per cluster."""
    if clusters is None:
        return values, np.ones(len(values))
    if len(clusters) != len(values):
        raise ValueError(f"{len(clusters)} cluster labels for {len(values)} items")
    numbers: dict[Any, int] = {}
    index = np.array([numbers.setdefault(label, len(numbers)) for label in clusters])
    sums = np.zeros((len(numbers), values.shape[1]))
    np.add.at(sums, index, values)
    return sums, np.bincount(index).astype(np.float64)


def _is_binary(values: Array) -> bool:
    return bool(((values == 0) | (values == 1)).all())
