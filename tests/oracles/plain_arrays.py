"""Small tools of the reference functions: arrays as lists of Python floats, with exactly rounded sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def flat_list(model: Any) -> list[float]:
    return [float(value) for value in np.asarray(model, dtype=np.float64).reshape(-1)]


def flat_lists(models: Sequence[Any]) -> list[list[float]]:
    shapes = {np.shape(model) for model in models}
    if len(shapes) != 1:
        raise ValueError(f"models have different shapes: {sorted(shapes)}")
    return [flat_list(model) for model in models]


def shaped_like(values: Sequence[float], like: Any) -> Array:
    return np.array(values, dtype=np.float64).reshape(np.shape(like))


def one_per_model(value: float | Sequence[float], count: int, name: str) -> list[float]:
    values = [float(value)] * count if np.ndim(value) == 0 else [float(v) for v in value]  # type: ignore
    if len(values) != count:
        raise ValueError(f"{name}: {len(values)} values for {count} models")
    return values


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def norm_of(a: Sequence[float]) -> float:
    return math.sqrt(dot(a, a))


def sign_of(value: float) -> float:
    return 0.0 if value == 0 else math.copysign(1.0, value)


def task_vectors(base: Any, experts: Sequence[Any]) -> tuple[list[float], list[list[float]]]:
    flat_base, *flat_experts = flat_lists([base, *experts])
    return flat_base, [[x - b for x, b in zip(expert, flat_base, strict=True)] for expert in flat_experts]


def join(tensors: Sequence[Any]) -> Array:
    return np.array([value for tensor in tensors for value in flat_list(tensor)], dtype=np.float64)


def split_like(joined: Array, like: Sequence[Any]) -> list[Array]:
    parts, start = [], 0
    for tensor in like:
        size = int(np.size(tensor))
        parts.append(joined[start : start + size].reshape(np.shape(tensor)))
        start += size
    return parts
