"""PCB-Merging, slowly and from the formulas. See `reference.py` for the idea and the conventions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tests.oracles.plain_arrays import (
    flat_list,
    join,
    one_per_model,
    shaped_like,
    sign_of,
    split_like,
    task_vectors,
)


def _minmax(values: list[float]) -> list[float]:
    """(v - min) / (max - min); all zeros for a constant vector, where the authors' code gives nan."""
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def _log_softmax(values: list[float]) -> list[float]:
    high = max(values)
    log_total = high + math.log(math.fsum(math.exp(v - high) for v in values))
    return [v - log_total for v in values]


def _clip_magnitudes(delta: list[float], clip: float) -> list[float]:
    n = len(delta)
    ordered = sorted(abs(d) for d in delta)
    lower, upper = ordered[int(n * clip)], ordered[int(n * (1 - clip) - 1)]
    return [min(max(abs(d), lower), upper) for d in delta]


def pcb_scores(
    deltas: Sequence[Any], clip: float, variant: str
) -> tuple[list[list[float]], list[list[float]]]:
    """Clipped task vectors C and balancing scores beta of PCB-Merging, both [experts][entries].

    A_i = |tau_i| clipped to [sorted[int(D q)], sorted[int(D (1 - q) - 1)]], order statistics of |tau_i|,
    q = clip;
    C_i = sign(tau_i) A_i; n_i = minmax(A_i); s_i = sign(tau_i) n_i; N experts, D entries, elementwise:
      variants A, B, C: beta_i = exp(N n_i^2) * inter_i with
        A: inter_i = tanh(tau_i * sum_j tau_j)          [PCB pcb-merging.py, nlp merging.py]
        B: inter_i = tanh(tau_i * sum_j s_j)            [PCB vision_source_code/pcb.py]
        C: inter_i = sum_j tanh(s_i * s_j)              [PCB vision_source_code/pcb_ES.py]
        (tau unclipped in A and B);
      variant paper: beta_i = softmax(N minmax(tau_i^2)) * sum_j softmax(minmax(tau_i tau_j)), softmax over
        the D entries, j runs over all experts including i, tau unclipped [paper 2410.02396; "Norm" read as
        min-max, as in the authors' code]. Computed by logarithms and divided by the largest score of all
        experts, which changes no result (a plain float32 softmax over millions of entries underflows).
    """
    taus = [flat_list(delta) for delta in deltas]
    count, n = len(taus), len(taus[0])
    magnitudes = [_clip_magnitudes(tau, clip) for tau in taus]
    clipped = [
        [sign_of(t) * a for t, a in zip(tau, mag, strict=True)]
        for tau, mag in zip(taus, magnitudes, strict=True)
    ]
    if variant == "paper":
        logs = []
        for i in range(count):
            intra = _log_softmax([count * v for v in _minmax([t * t for t in taus[i]])])
            pairs = [
                _log_softmax(_minmax([x * y for x, y in zip(taus[i], taus[j], strict=True)]))
                for j in range(count)
            ]
            logs.append(
                [intra[d] + math.log(math.fsum(math.exp(pair[d]) for pair in pairs)) for d in range(n)]
            )
        highest = max(max(row) for row in logs)
        return clipped, [[math.exp(value - highest) for value in row] for row in logs]
    normal = [_minmax(mag) for mag in magnitudes]
    signed = [
        [sign_of(t) * v for t, v in zip(tau, row, strict=True)] for tau, row in zip(taus, normal, strict=True)
    ]
    scores = []
    for i in range(count):
        row = []
        for d in range(n):
            if variant == "A":
                inter = math.tanh(taus[i][d] * math.fsum(tau[d] for tau in taus))
            elif variant == "B":
                inter = math.tanh(taus[i][d] * math.fsum(s[d] for s in signed))
            elif variant == "C":
                inter = math.fsum(math.tanh(signed[i][d] * s[d]) for s in signed)
            else:
                raise ValueError(f"variant {variant!r}")
            row.append(math.exp(count * normal[i][d] ** 2) * inter)
        scores.append(row)
    return clipped, scores


def pcb_scale(score: Sequence[float], ratio: float, keep: str = "minmax") -> list[float]:
    """Weight of each entry of one expert from its scores: 0 for the dropped ones.

    threshold = sorted(score)[int(D (1 - r))]; entries at or below it get 0.
      keep "minmax": (score - threshold) / (max - threshold), so the largest gets 1   [PCB code]
      keep "mask":   the score itself                                                  [paper, literally]
    So at most D - 1 - int(D (1 - r)) entries are kept, one less than the top-r share; with r = 1 all but the
    smallest. The float64 product D * (1 - r) is cut off by int(): 10 entries at r = 0.9 have index 0, not 1.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio {ratio} is not in (0, 1]")
    threshold = sorted(score)[int(len(score) * (1 - ratio))]
    highest = max(score)
    result = []
    for value in score:
        if value <= threshold:
            result.append(0.0)
        else:
            result.append((value - threshold) / (highest - threshold) if keep == "minmax" else value)
    return result


def pcb(
    base: Any,
    experts: Sequence[Any],
    ratio: float,
    lambdas: float | Sequence[float],
    clip: float,
    variant: str = "C",
    scope: str = "tensor",
    keep: str = "minmax",
) -> Any:
    """PCB-Merging: entries compete within and between task vectors; winners are averaged by their score.

    tau_m = sum_i lambda_i C_i scale_i / max(sum_i scale_i, 1e-12); result = base + tau_m, with C from
    `pcb_scores` and scale from `pcb_scale`. Where one expert alone survives, tau_m is lambda_i C_i whatever
    its score. ratio = r, clip = q (0.0001 in the authors' pcb-merging.py, 0.01 in their vision code).
    scope "tensor" / "global": as in `ties` (the authors' code is global: thresholds over the whole model).
    [paper 2410.02396; PCB files as named in pcb_scores; methods.md 2.1]
    """
    if scope == "global":
        joined = pcb(join(base), [join(e) for e in experts], ratio, lambdas, clip, variant, "tensor", keep)
        return split_like(joined, base)
    if scope != "tensor":
        raise ValueError(f"scope {scope!r}")
    flat_base, deltas = task_vectors(base, experts)
    if not flat_base:
        return shaped_like([], base)
    factors = one_per_model(lambdas, len(deltas), "lambdas")
    clipped, scores = pcb_scores(deltas, clip, variant)
    scales = [pcb_scale(score, ratio, keep) for score in scores]
    result = []
    for index, start in enumerate(flat_base):
        weight = math.fsum(scale[index] for scale in scales)
        total = math.fsum(
            factor * c[index] * scale[index]
            for factor, c, scale in zip(factors, clipped, scales, strict=True)
        )
        result.append(start + total / max(weight, 1e-12))
    return shaped_like(result, base)
