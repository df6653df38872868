"""Fronts and volumes against brute force: all pairs, inclusion and exclusion, and known shapes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.evaluation.pareto import distance_to_utopia, hypervolume, pareto_front


def clouds(most_objectives: int, most_points: int) -> st.SearchStrategy[list[list[float]]]:
    """Points on a coarse grid, so that ties and equal points occur."""
    return st.integers(1, most_objectives).flatmap(
        lambda width: st.lists(
            st.lists(st.integers(-2, 6).map(lambda i: i / 4), min_size=width, max_size=width),
            min_size=1,
            max_size=most_points,
        )
    )


def volume_by_inclusion_and_exclusion(points: np.ndarray) -> float:
    """Of the union of the boxes from 0 to each point: sum over all subsets, with signs."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for subset in itertools.combinations(points, size):
            total -= (-1) ** size * float(np.prod(np.maximum(np.min(subset, axis=0), 0)))
    return total


@given(clouds(4, 12))
def test_the_front_is_who_nobody_beats(points: list[list[float]]) -> None:
    def beats(a: list[float], b: list[float]) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and a != b

    assert pareto_front(points) == [not any(beats(other, point) for other in points) for point in points]


def test_equal_points_share_the_front() -> None:
    assert pareto_front([[1, 2], [1, 2], [0, 2], [2, 0]]) == [True, True, False, True]


@settings(max_examples=80)
@given(clouds(3, 7))
def test_the_exact_volume_agrees_with_inclusion_and_exclusion(points: list[list[float]]) -> None:
    found = hypervolume(points)
    assert found.value == pytest.approx(volume_by_inclusion_and_exclusion(np.array(points)), abs=1e-9)
    assert found.standard_error == 0


def test_known_volumes() -> None:
    assert hypervolume([[0.5]]).value == 0.5
    assert hypervolume([[3, 1], [2, 2], [1, 3]]).value == 6
    assert hypervolume([[2, 1, 1], [1, 2, 1], [1, 1, 2]]).value == 4
    assert hypervolume([[3, 3]], reference=[1, 2]).value == 2
    assert hypervolume([[1, -1], [0, 5]]).value == 0


def test_many_objectives_are_sampled_with_a_stated_error() -> None:
    generator = np.random.default_rng(0)
    points = generator.random((6, 5))
    found, exact = hypervolume(points, seed=3), volume_by_inclusion_and_exclusion(points)
    assert 0 < found.standard_error < 0.01 * exact
    assert abs(found.value - exact) < 4 * found.standard_error
    assert found == hypervolume(points, seed=3)
    assert found != hypervolume(points, seed=4)


def test_one_point_with_many_objectives_fills_its_box() -> None:
    assert hypervolume([[0.5] * 4]).value == pytest.approx(0.5**4)


def test_distance_to_utopia_counts_shortfalls_only() -> None:
    assert distance_to_utopia([[1, 1], [0.7, 0.6], [1.4, 1.0], [1.4, 0.5]]) == pytest.approx([0, 0.5, 0, 0.5])
    assert distance_to_utopia([[1, 2]], utopia=[4, 6]) == pytest.approx([5])


@pytest.mark.parametrize("points", [[], [[]], [1.0, 2.0], [[math.nan, 1]], [[math.inf, 1]]])
def test_what_is_no_cloud_of_points_is_refused(points: list) -> None:
    for function in (pareto_front, distance_to_utopia, hypervolume):
        with pytest.raises(ValueError):
            function(points)
