"""Slow, plain second versions of the merging methods, written from the formulas alone.

The one idea: two programs that share no code, and were written by different hands, rarely make the same
mistake. Each function below says its formula and where the formula comes from, and then follows it one
element at a time in float64, with exactly rounded sums (`math.fsum`). Nothing here is fast, and nothing here
is imported by the product. `tests/oracles/test_frozen_mergekit.py` holds these functions against outputs
that mergekit 0.1.5 produced, `test_reference.py` against worked examples.

Conventions: a *model* is an array of any shape; all models of one call have the same shape; results are
float64 arrays of that shape. "task vector" = expert - base, called `delta` here. `flat index` = position in
row-major order. Sources in brackets: [MK file] = read in mergekit 0.1.5, [paper id] = arXiv,
[PCB file] = the authors' repository duguodong7/pcb-merging (used in `reference_pcb.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.oracles.plain_arrays import (
    Array,
    dot,
    flat_list,
    flat_lists,
    join,
    norm_of,
    one_per_model,
    shaped_like,
    sign_of,
    split_like,
    task_vectors,
)
from tests.oracles.reference_pcb import pcb, pcb_scale, pcb_scores

__all__ = [
    "dare",
    "gradient",
    "kept_count",
    "kept_entries",
    "linear",
    "multislerp",
    "nuslerp",
    "passthrough",
    "pcb",
    "pcb_scale",
    "pcb_scores",
    "slerp",
    "task_arithmetic",
    "ties",
]


def gradient(values: Sequence[float], position: float) -> float:
    """Value of a list-valued parameter at a relative depth `position` in [0, 1]: piecewise linear.

    Formula: s = position * (m - 1), i = int(s), (1 - (s - i)) * v[i] + (s - i) * v[i + 1].   [MK config.py]
    Positions in mergekit: block i of L is at i / (L - 1), or at 1 when L = 1; every tensor outside the blocks
    (embeddings, but also the final norm and the head) is at 0.   [MK plan.py; frozen from a real run]
    """
    scaled = position * (len(values) - 1)
    left = int(scaled)
    right = min(left + 1, len(values) - 1)
    share = scaled - left
    return (1 - share) * values[left] + share * values[right]


# ---------------------------------------------------------------------------------------------------------
# averages and rotations: linear, passthrough, slerp, nuslerp, multislerp


def passthrough(model: Any, scale: float | None = None) -> Array:
    """The model itself, times `scale` when one is given.   [MK passthrough.py]"""
    return shaped_like([value if scale is None else value * scale for value in flat_list(model)], model)


def linear(models: Sequence[Any], weights: Sequence[float], normalize: bool = True) -> Array:
    """Weighted mean: sum_i w_i x_i, divided by sum_i w_i when `normalize`.   [paper 2203.05482; MK linear.py]

    A base model plays no special part. Weights that sum to exactly 0 cannot be normalised: ValueError
    (mergekit returns inf or nan).
    """
    flat = flat_lists(models)
    factors = one_per_model(weights, len(flat), "weights")
    total = math.fsum(factors)
    if normalize and total == 0:
        raise ValueError("weights sum to 0 and cannot be normalised")
    result = [
        math.fsum(w * x for w, x in zip(factors, column, strict=True)) for column in zip(*flat, strict=True)
    ]
    return shaped_like([value / total if normalize else value for value in result], models[0])


def slerp(a: Any, b: Any, t: float) -> Array:
    """Walk along the arc from `a` (t = 0) to `b` (t = 1); the tensor counts as one long vector.

    c = <a/|a|, b/|b|> clipped to [-1, 1]; phi = arccos c;
    result = sin((1 - t) phi) / sin phi * a + sin(t phi) / sin phi * b    (a and b NOT normalised).
    |c| > 0.9995 (parallel or opposite): (1 - t) a + t b. A norm <= 1e-8 is replaced by 1, so a zero vector
    has c = 0. t outside [0, 1] extrapolates.   [MK slerp.py; methods.md 6]
    """
    flat_a, flat_b = flat_lists([a, b])
    norm_a, norm_b = norm_of(flat_a), norm_of(flat_b)
    norm_a = norm_a if norm_a > 1e-8 else 1.0
    norm_b = norm_b if norm_b > 1e-8 else 1.0
    cosine = math.fsum((x / norm_a) * (y / norm_b) for x, y in zip(flat_a, flat_b, strict=True))
    cosine = min(1.0, max(-1.0, cosine))
    if abs(cosine) > 0.9995:
        from_a, from_b = 1 - t, t
    else:
        angle = math.acos(cosine)
        from_a, from_b = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return shaped_like([from_a * x + from_b * y for x, y in zip(flat_a, flat_b, strict=True)], a)


def _nuslerp_vector(a: list[float], b: list[float], t: float) -> list[float]:
    norm_a, norm_b = max(norm_of(a), 1e-7), max(norm_of(b), 1e-7)
    cosine = math.fsum((x / norm_a) * (y / norm_b) for x, y in zip(a, b, strict=True))
    cosine = min(1.0, max(-1.0, cosine))
    if 1 - cosine * cosine <= 1e-16:
        return [(1 - t) * x + t * y for x, y in zip(a, b, strict=True)]
    angle = math.acos(cosine)
    return [
        (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)
        for x, y in zip(a, b, strict=True)
    ]


def nuslerp(
    models: Sequence[Any],
    weights: Sequence[float],
    base: Any | None = None,
    flatten: bool = True,
    row_wise: bool = False,
) -> Array:
    """Spherical interpolation of two models by weights; with a base, of their two task vectors.

    t = w1 / (w0 + w1), or 0.5 when |w0 + w1| < 1e-6. Interpolation as in `slerp`, but unit vectors are
    v / max(|v|, 1e-7) and the straight line is used only when 1 - c^2 <= 1e-16 (eps = 1e-8, squared), so
    there is no 0.9995 threshold. flatten=True: the tensor is one vector. flatten=False: one vector per
    last-axis line (the rows of a matrix), or, with row_wise=True, per first-axis line (its columns).
    [MK nuslerp.py]

    Opposite vectors (c close to -1 but not equal) divide by sin(phi) ~ 0: the result is undefined there.
    """
    if len(models) != 2:
        raise ValueError("nuslerp takes exactly two models")
    first, second = (np.asarray(model, dtype=np.float64) for model in models)
    offset = np.zeros_like(first) if base is None else np.asarray(base, dtype=np.float64)
    first, second = first - offset, second - offset
    w0, w1 = one_per_model(weights, 2, "weights")
    t = 0.5 if abs(w0 + w1) < 1e-6 else w1 / (w0 + w1)
    if flatten or first.ndim == 0:
        return offset + shaped_like(_nuslerp_vector(flat_list(first), flat_list(second), t), first)
    axis = 0 if row_wise else -1
    lines_a, lines_b = np.moveaxis(first, axis, -1), np.moveaxis(second, axis, -1)
    lines = np.empty_like(lines_a)
    for index in np.ndindex(lines_a.shape[:-1]):
        lines[index] = _nuslerp_vector(flat_list(lines_a[index]), flat_list(lines_b[index]), t)
    return offset + np.moveaxis(lines, -1, axis)


def multislerp(
    models: Sequence[Any],
    weights: Sequence[float],
    base: Any | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Array:
    """Barycentre of several models on a hypersphere (of their task vectors when there is a base).

    v_i = x_i - base; n_i = |v_i|; u_i = v_i / (n_i + eps); raw = sum w_i u_i; m = raw / |raw|;
    tangent T = sum w_i (u_i - <u_i, m> m); s = |T| + eps; r = m cos s + T sin(s) / s;
    result = base + r * sum w_i n_i. Weights are divided by their sum when `normalize_weights`.
    One model: returned as it is. |raw| < eps: with two models the straight line sum w_i v_i, else ValueError.
    [MK multislerp.py]

    Note: T = raw - m <raw, m> = 0 for every input, so the tangent step only adds rounding noise, and the
    result is unit(sum w_i u_i) * sum w_i n_i. `test_reference.py` checks that.
    """
    if len(models) == 1:
        return passthrough(models[0])
    offset = [0.0] * np.size(models[0]) if base is None else flat_list(base)
    vectors = [[x - o for x, o in zip(model, offset, strict=True)] for model in flat_lists(models)]
    factors = one_per_model(weights, len(vectors), "weights")
    if normalize_weights:
        total = math.fsum(factors)
        if total == 0:
            raise ValueError("weights sum to 0 and cannot be normalised")
        factors = [w / total for w in factors]
    norms = [norm_of(vector) for vector in vectors]
    units = [[x / (norm + eps) for x in vector] for vector, norm in zip(vectors, norms, strict=True)]
    raw = [
        math.fsum(w * u for w, u in zip(factors, column, strict=True)) for column in zip(*units, strict=True)
    ]
    if norm_of(raw) < eps:
        if len(vectors) != 2:
            raise ValueError("the weighted sum of the unit vectors is zero")
        straight = [factors[0] * x + factors[1] * y for x, y in zip(*vectors, strict=True)]
        return shaped_like([x + o for x, o in zip(straight, offset, strict=True)], models[0])
    mean = [x / norm_of(raw) for x in raw]
    tangent = [0.0] * len(mean)
    for weight, unit in zip(factors, units, strict=True):
        along = dot(unit, mean)
        tangent = [t + weight * (u - along * m) for t, u, m in zip(tangent, unit, mean, strict=True)]
    step = norm_of(tangent) + eps
    length = dot(norms, factors)
    return shaped_like(
        [
            o + length * (m * math.cos(step) + t * math.sin(step) / step)
            for o, m, t in zip(offset, mean, tangent, strict=True)
        ],
        models[0],
    )


# ---------------------------------------------------------------------------------------------------------
# task vectors: task arithmetic, TIES, DARE


def kept_count(density: float, n: int) -> int:
    """How many of `n` entries a density keeps: n from 1 on, none up to 0, else max(1, int(density * n)).

    The product is the float64 product and int() cuts it off, so 0.29 of 100 keeps 28 (0.29 * 100 =
    28.999999999999996). [MK sparsify.py, probed: .29 -> 28, .57 -> 56, .07 -> 7, .01 -> 1 of 100]
    peft has the same product without the minimum of 1.
    """
    if density >= 1:
        return n
    if density <= 0 or n == 0:
        return 0
    return max(1, int(density * n))


def kept_entries(delta: Any, density: float) -> NDArray[np.bool_]:
    """True for the `kept_count` entries of largest |delta|; equal ones are taken in flat-index order.

    So all entries above the threshold are kept, and entries equal to it fill up from the lowest flat index
    (rule N4 of reliability.md). mergekit sorts with an unstable sort, which of the equal ones it takes is
    arbitrary there.
    """
    values = flat_list(delta)
    order = sorted(range(len(values)), key=lambda index: (-abs(values[index]), index))
    keep = np.zeros(len(values), dtype=np.bool_)
    for index in order[: kept_count(density, len(values))]:
        keep[index] = True
    return keep.reshape(np.shape(delta))


def _combine(
    base: list[float],
    deltas: list[list[float]],
    weights: list[float],
    lambda_: float,
    normalize: bool,
    consensus: bool,
) -> list[float]:
    """base + lambda * (weighted sum of the deltas), with or without the TIES sign election.  See `ties`."""
    result = []
    for index, start in enumerate(base):
        parts = [w * delta[index] for w, delta in zip(weights, deltas, strict=True)]
        if consensus:
            elected = 1.0 if math.fsum(parts) >= 0 else -1.0
            agreeing = [i for i, part in enumerate(parts) if sign_of(part) == elected]
            divisor = math.fsum(weights[i] for i in agreeing)
            divisor = 1.0 if divisor == 0 else divisor
        else:
            agreeing = list(range(len(parts)))
            divisor = math.fsum(weights)
            divisor = 1.0 if abs(divisor) < 1e-8 else divisor
        total = math.fsum(parts[i] for i in agreeing)
        result.append(start + lambda_ * (total / divisor if normalize else total))
    return result


def task_arithmetic(
    base: Any,
    experts: Sequence[Any],
    weights: float | Sequence[float],
    lambda_: float = 1.0,
    normalize: bool = False,
) -> Array:
    """base + lambda * sum_i w_i (x_i - base), the sum divided by sum_i w_i when `normalize`.

    A weight sum of |.| < 1e-8 counts as 1 in the division.
    [paper 2212.04089; MK generalized_task_arithmetic.py]
    """
    flat_base, deltas = task_vectors(base, experts)
    factors = one_per_model(weights, len(deltas), "weights")
    return shaped_like(_combine(flat_base, deltas, factors, lambda_, normalize, consensus=False), base)


def ties(
    base: Any,
    experts: Sequence[Any],
    weights: float | Sequence[float],
    densities: float | Sequence[float],
    lambda_: float = 1.0,
    normalize: bool = True,
    scope: str = "tensor",
) -> Any:
    """TIES: trim each task vector, elect a sign per entry, average the entries that agree.

    1. trim: keep the `kept_count` largest |delta_i| (see `kept_entries`), the others become 0;
    2. weight: p_i = w_i delta_i; 3. elect: s = +1 if sum_i p_i >= 0 else -1 (so a zero sum elects +1);
    4. merge: sum of the p_i whose sign is s (zeros have no sign and never agree), divided, when `normalize`,
       by the sum of the agreeing w_i (by 1 where that is exactly 0); 5. base + lambda * that.
    scope "tensor": base and experts are arrays, the trim counts within the array (mergekit).
    scope "global": base is a list of arrays and each expert a list of arrays; the trim counts over all of
    them in list order (the authors' code); the result is a list of arrays.
    [paper 2306.01708; MK generalized_task_arithmetic.py, sparsify.py: weights before the vote, sign of zero]
    Elsewhere it differs: peft votes with unweighted task vectors and divides by the number of agreeing
    models; the authors give zero sums the sign of the majority of the whole model.
    """
    if scope == "global":
        joined_base, joined_experts = join(base), [join(expert) for expert in experts]
        merged = ties(joined_base, joined_experts, weights, densities, lambda_, normalize)
        return split_like(merged, base)
    if scope != "tensor":
        raise ValueError(f"scope {scope!r}")
    flat_base, deltas = task_vectors(base, experts)
    factors = one_per_model(weights, len(deltas), "weights")
    trimmed = []
    for delta, density in zip(deltas, one_per_model(densities, len(deltas), "densities"), strict=True):
        keep = kept_entries(delta, density)
        trimmed.append([value if kept else 0.0 for value, kept in zip(delta, keep, strict=True)])
    return shaped_like(_combine(flat_base, trimmed, factors, lambda_, normalize, consensus=True), base)


def dare(
    base: Any,
    experts: Sequence[Any],
    weights: float | Sequence[float],
    densities: float | Sequence[float],
    masks: Sequence[Any],
    lambda_: float = 1.0,
    rescale: str = "inverse",
    consensus: bool = False,
    normalize: bool = False,
) -> Array:
    """DARE: drop random entries of each task vector, rescale the others, then combine.

    d_i = (x_i - base) where masks[i] is True, else 0, times a factor:
      rescale "inverse": 1 / density_i = 1 / (1 - drop rate), the paper's, unbiased in expectation;
      rescale "l1":      sum |x_i - base| / sum |d_i|, mergekit's `rescale: true` (1 if either sum is < 1e-7);
      rescale "none":    1.
    density >= 1 keeps every entry and does not look at the mask; density <= 0 keeps none.
    consensus False: weighted sum (`dare_linear`); True: TIES sign election without a trim (`dare_ties`).
    [paper 2311.03099; MK sparsify.py (keep probability = density, L1 rescaling happens before the weights)]
    """
    flat_base, deltas = task_vectors(base, experts)
    factors = one_per_model(weights, len(deltas), "weights")
    kept = []
    all_densities = one_per_model(densities, len(deltas), "densities")
    for delta, density, mask in zip(deltas, all_densities, masks, strict=True):
        if density >= 1:
            kept.append(list(delta))
            continue
        flat_mask = [bool(flag) for flag in np.asarray(mask).reshape(-1)]
        survivors = [d if flag and density > 0 else 0.0 for d, flag in zip(delta, flat_mask, strict=True)]
        factor = 1.0
        if rescale == "inverse" and density > 0:
            factor = 1.0 / density
        elif rescale == "l1":
            before, after = math.fsum(map(abs, delta)), math.fsum(map(abs, survivors))
            factor = before / after if before >= 1e-7 and after >= 1e-7 else 1.0
        elif rescale not in ("inverse", "none"):
            raise ValueError(f"rescale {rescale!r}")
        kept.append([factor * d for d in survivors])
    return shaped_like(_combine(flat_base, kept, factors, lambda_, normalize, consensus), base)
