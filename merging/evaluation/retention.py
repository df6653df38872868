"""What a merge keeps of its experts and of its base: retention, gain kept, forgetting; and which task can tell.

The one idea: a mean hides a loss. A merge that keeps 90 % of four experts and nothing of the fifth looks fine on
average, so the minimum stands beside every mean. And a ratio of two measured numbers is itself measured: it gets its
interval from the draws of the paired bootstrap, in which numerator and denominator come from the same items.

    retention  = merged / expert                     (as most papers print it)
    gain kept  = (merged − base) / (expert − base)   (the share of what fine-tuning brought)

both on a task, against that task's own expert. Retention flatters where the base is already good: a merge that learned
nothing keeps base/expert. Gain kept does not, but has no meaning where the expert is no better than its base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from merging.evaluation.statistics import checked, percentile_interval

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval. NaN: undefined. Infinite limits: the data do not bound it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Kept:
    """A ratio per task, its mean and its minimum over the tasks where it is defined.

    ``left_out``: tasks where the ratio is undefined (it would divide by nothing, or by a loss). ``worst``: the task of
    the minimum. The interval of the minimum is that of a minimum of noisy numbers: it leans to the low side.
    """

    tasks: dict[str, Estimate]
    mean: Estimate
    least: Estimate
    worst: str
    left_out: tuple[str, ...]


UNDEFINED = Estimate(math.nan, math.nan, math.nan)


def retention(merged: ArrayLike, expert: ArrayLike, better: int = 1) -> Array:
    """merged / expert where more is better; expert / merged (of two losses) where less is. 1: as good as the expert.

    Works element by element on means as on draws. NaN where the divisor is not positive.
    """
    part, whole = (merged, expert) if better > 0 else (expert, merged)
    return _ratio(np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64))


def gain_kept(merged: ArrayLike, base: ArrayLike, expert: ArrayLike, better: int = 1) -> Array:
    """(merged − base) / (expert − base). Below 0: worse than the base; above 1: better than the expert.

    Works element by element on means as on draws. NaN where the expert is no better than the base: a ratio of two
    losses would be positive and look like success.
    """
    low = np.asarray(base, dtype=np.float64)
    gained = better * (np.asarray(merged, dtype=np.float64) - low)
    return _ratio(gained, better * (np.asarray(expert, dtype=np.float64) - low))


def forgetting(merged: ArrayLike, base: ArrayLike, better: int = 1) -> Array:
    """How much worse than the base, in the unit of the score: for tasks that are no expert's own. Below 0: better."""
    return better * (np.asarray(base, dtype=np.float64) - np.asarray(merged, dtype=np.float64))


def estimate(value: float, draws: ArrayLike) -> Estimate:
    """A number with the percentile interval of its draws."""
    if math.isnan(value):
        return UNDEFINED
    return Estimate(float(value), *percentile_interval(draws))


def kept(values: Mapping[str, float], draws: Mapping[str, ArrayLike]) -> Kept:
    """Mean and minimum over tasks of a ratio, with intervals.

    Args:
        values: task -> ratio (NaN: undefined).
        draws: task -> draws of the same ratio; draw number r of all tasks together are one draw of mean and minimum.
    """
    tasks = {task: estimate(value, draws[task]) for task, value in values.items()}
    defined = [task for task, value in values.items() if not math.isnan(value)]
    left_out = tuple(task for task in values if task not in defined)
    if not defined:
        return Kept(tasks, UNDEFINED, UNDEFINED, "", left_out)
    numbers = [float(values[task]) for task in defined]
    table = np.stack([np.asarray(draws[task], dtype=np.float64) for task in defined])
    mean = Estimate(math.fsum(numbers) / len(numbers), *percentile_interval(table.mean(axis=0)))
    least = Estimate(min(numbers), *percentile_interval(table.min(axis=0)))
    return Kept(tasks, mean, least, defined[numbers.index(least.value)], left_out)


@dataclass(frozen=True, slots=True)
class SignalToNoise:
    """Can a task tell the candidates apart? ``ratio`` = signal / noise, both relative to the mean score."""

    signal: float
    noise: float
    ratio: float

    LEAST_RATIO = 3.0

    @property
    def usable(self) -> bool:
        """At least 3; below that single scores hardly rank the candidates, though paired differences may."""
        return self.ratio >= self.LEAST_RATIO


def signal_to_noise(
    scores: Sequence[float], item_errors: Sequence[float] = (), repeats: Sequence[float] = ()
) -> SignalToNoise:
    """Range of the candidates' scores on a task against the noise of one score.

        signal = (max − min) / mean
        noise² = mean(item_errors²) / mean² + (sd(repeats) / mean(repeats))²

    Without item errors this is the definition of the source, where ``repeats`` are the scores of the last checkpoints
    of one training run. Here they can be scores of one merge with other prompts, seeds, or coefficients close by.
    The item errors are those of single scores; candidates that share their items differ by a little less than that.

    Args:
        scores: mean score of each candidate.
        item_errors: standard error of each of these means from the sampling of items.
        repeats: scores of the same candidate again and again.

    Returns:
        NaN where the mean score is 0 or there is neither range nor noise; a ratio of infinity without noise.
    Source: D. Heineman et al., "Signal and noise", arXiv 2508.13144; code allenai/signal-and-noise, snr/metrics.py.
    """
    values = checked(scores)
    mean = float(values.mean())
    variance = 0.0
    if len(item_errors):
        variance += float((checked(item_errors) ** 2).mean()) / mean**2 if mean else math.nan
    if len(repeats):
        again = checked(repeats)
        variance += float(again.std() / again.mean()) ** 2 if again.mean() else math.nan
    signal = float(values.max() - values.min()) / abs(mean) if mean else math.nan
    noise = math.sqrt(variance)
    if noise == 0:
        return SignalToNoise(signal, noise, math.inf if signal > 0 else math.nan)
    return SignalToNoise(signal, noise, signal / noise)


def _ratio(part: Array, whole: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), np.nan)
