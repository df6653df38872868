"""Retention, gain kept, forgetting and signal to noise: worked examples and what must hold for all inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merging.evaluation.retention import estimate, forgetting, gain_kept, kept, retention, signal_to_noise
from merging.evaluation.statistics import resampled_means

SCORES = st.floats(0.01, 1.0)


def test_a_worked_example() -> None:
    """Base 40 %, expert 80 %, merge 70 %: 87.5 % of the expert's score, three quarters of its gain."""
    assert retention(0.7, 0.8) == pytest.approx(0.875)
    assert gain_kept(0.7, 0.4, 0.8) == pytest.approx(0.75)
    assert gain_kept(0.3, 0.4, 0.8) == pytest.approx(-0.25)
    assert forgetting(0.35, 0.4) == pytest.approx(0.05)


def test_losses_are_read_the_other_way_around() -> None:
    """Base 2.0 nats, expert 1.0, merge 1.25."""
    assert retention(1.25, 1.0, better=-1) == pytest.approx(0.8)
    assert gain_kept(1.25, 2.0, 1.0, better=-1) == pytest.approx(0.75)
    assert forgetting(1.25, 1.0, better=-1) == pytest.approx(0.25)


@given(SCORES, SCORES, st.sampled_from([-1, 1]))
def test_the_expert_itself_keeps_everything_and_the_base_nothing(base: float, expert: float, better: int) -> None:
    assert retention(expert, expert, better) == 1
    if better * (expert - base) > 0:
        assert gain_kept(expert, base, expert, better) == pytest.approx(1)
        assert gain_kept(base, base, expert, better) == 0


@pytest.mark.parametrize("expert", [0.5, 0.4])
def test_no_gain_to_keep(expert: float) -> None:
    """Expert equal to or below the base: a merge that fell as far would otherwise "keep 100 %"."""
    assert math.isnan(gain_kept(0.4, 0.5, expert))


def test_an_expert_that_gets_nothing_right_has_no_retention() -> None:
    assert math.isnan(retention(0.3, 0.0))


def test_mean_and_minimum_with_their_task() -> None:
    draws = {"a": [0.8, 0.9, 1.0], "b": [0.1, 0.5, 0.3], "c": [math.nan] * 3}
    found = kept({"a": 0.9, "b": 0.3, "c": math.nan}, draws)
    assert found.mean.value == pytest.approx(0.6)
    assert (found.mean.low, found.mean.high) == pytest.approx((0.45, 0.7))
    assert (found.least.value, found.worst) == (0.3, "b")
    assert (found.least.low, found.least.high) == (0.1, 0.5)
    assert found.left_out == ("c",)
    assert math.isnan(found.tasks["c"].value)


def test_nothing_defined_is_nan() -> None:
    found = kept({"a": math.nan}, {"a": [math.nan]})
    assert math.isnan(found.mean.value) and math.isnan(found.least.value) and found.worst == ""


def test_the_interval_of_a_ratio_covers_what_it_promises() -> None:
    """Merged and expert right on correlated items: the true ratio lies inside in about 95 of 100 samples."""
    generator = np.random.default_rng(0)
    inside, cases = 0, 300
    for case in range(cases):
        difficulty = generator.random(300)
        expert = (difficulty < 0.8).astype(float)
        merged = ((difficulty < 0.8) & (generator.random(300) < 0.75)).astype(float)
        draws = resampled_means(np.stack([merged, expert], axis=1), resamples=800, seed=case)
        found = estimate(float(retention(merged.mean(), expert.mean())), retention(draws[:, 0], draws[:, 1]))
        inside += found.low <= 0.75 <= found.high
    assert 0.91 <= inside / cases <= 0.98


def test_a_gain_that_may_be_nothing_gives_no_bounds() -> None:
    """40 items, expert one item better than the base: the share of that gain can be anything."""
    base = np.r_[np.ones(20), np.zeros(20)]
    expert, merged = base.copy(), base.copy()
    expert[[0, 20, 21]] = [0, 1, 1]
    merged[22] = 1
    draws = resampled_means(np.stack([base, expert, merged], axis=1), seed=1)
    found = estimate(1.0, gain_kept(draws[:, 2], draws[:, 0], draws[:, 1]))
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_signal_to_noise_is_that_of_the_source() -> None:
    """allenai/signal-and-noise, snr/metrics.py, written out: dispersion / mean over std / mean."""
    scores, checkpoints = np.array([0.5, 0.62, 0.7]), np.array([0.58, 0.6, 0.61, 0.63])
    dispersion = np.max([np.abs(mj - mk) for mj in scores for mk in scores])
    expected = (dispersion / np.mean(scores)) / (np.std(checkpoints) / np.mean(checkpoints))
    assert signal_to_noise(scores, repeats=checkpoints).ratio == pytest.approx(expected)


def test_noise_from_the_items_adds_up_with_other_noise() -> None:
    found = signal_to_noise([0.4, 0.6], item_errors=[0.03, 0.05], repeats=[0.49, 0.51])
    assert found.signal == pytest.approx(0.4)
    assert found.noise == pytest.approx(math.hypot(math.sqrt((0.03**2 + 0.05**2) / 2) / 0.5, 0.02))
    assert found.ratio == pytest.approx(found.signal / found.noise)


@pytest.mark.parametrize(("top", "usable"), [(0.6, False), (0.7, True)])
def test_a_task_below_three_is_grey(top: float, usable: bool) -> None:
    assert signal_to_noise([0.5, top], item_errors=[0.05, 0.05]).usable is usable


def test_signal_to_noise_of_degenerate_scores() -> None:
    assert signal_to_noise([0.5, 0.5], item_errors=[0.1, 0.1]).ratio == 0
    assert signal_to_noise([0.5, 0.6], item_errors=[0.0, 0.0]).ratio == math.inf
    assert math.isnan(signal_to_noise([0.5, 0.5], item_errors=[0.0, 0.0]).ratio)
    assert math.isnan(signal_to_noise([0.0, 0.0], item_errors=[0.1, 0.1]).ratio)
    assert not signal_to_noise([0.0, 0.0]).usable
    with pytest.raises(ValueError):
        signal_to_noise([])
    with pytest.raises(ValueError):
        signal_to_noise([0.5, math.nan])
