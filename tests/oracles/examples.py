"""The worked example, and random models, for the tests of the reference functions."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

BASE = np.array([1, -1, 0.5, -0.5, 2, -2, 0, 0.25])
DELTA_1 = np.array([0.4, -0.1, 0.3, -0.2, 0.05, 0.6, -0.5, 0.02])
DELTA_2 = np.array([0.2, 0.3, -0.4, -0.1, 0.5, -0.05, -0.6, 0.01])
EXPERTS = [BASE + DELTA_1, BASE + DELTA_2]
VARIANTS = ["A", "B", "C", "paper"]


def random_models(
    seed: int, count: int, shape: tuple[int, ...] = (6, 5), spread: float = 0.3
) -> list[np.ndarray]:
    """A base and `count` experts around it."""
    generator = np.random.default_rng(seed)
    base = generator.standard_normal(shape)
    return [base, *(base + spread * generator.standard_normal(shape) for _ in range(count))]


def close(result: ArrayLike, expected: ArrayLike, within: float = 1e-12) -> None:
    np.testing.assert_allclose(np.asarray(result), np.asarray(expected), rtol=0, atol=within)
