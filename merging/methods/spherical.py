"""Spherical merging: walk along the arc between models instead of the chord.

All three rules treat a tensor as one long vector and end in a linear combination of the inputs whose
coefficients come from their norms and inner products. So one pass collects the Gram matrix
G_ij = ⟨x_i, x_j⟩ (float64, in block order), and the merge itself is a weighted sum.

With φ = arccos(⟨a, b⟩ / |a||b|), slerp is (sin((1−t)φ)·a + sin(tφ)·b) / sin φ, on the vectors as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from .base import Block, Method, Parameters, Scan
from .formula import CHANGES, Formula, number, per_expert, sum_of
from .lazy_torch import torch
from .linear import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


def gram_matrices(scan: Scan, task_vectors: bool, with_base: bool = False) -> list[np.ndarray]:
    """G_ij = ⟨x_i, x_j⟩ per tensor, of the experts, or of their task vectors, or of base and experts."""

    def products(block: Block) -> np.ndarray:
        inputs = block.task_vectors() if task_vectors else block.experts
        if with_base and block.base is not None:
            inputs = [block.base, *inputs]
        wide = [block.buffer(f"wide{i}", torch.float64).copy_(x) for i, x in enumerate(inputs)]
        gram = np.empty((len(wide), len(wide)))
        for i, x in enumerate(wide):
            for j in range(i + 1):
                gram[i, j] = gram[j, i] = float(torch.dot(x, wide[j]))
        return gram

    size = 0
    grams = scan.map(products)
    for blocks in grams:
        size = max(size, blocks[0].shape[0]) if blocks else size
    return [sum(blocks, np.zeros((size, size))) for blocks in grams]


def slerp_coefficients(
    gram: np.ndarray, t: float, straight: Callable[[float], bool], norm: Callable[[float], float]
) -> list[float]:
    """The factors of a and b in slerp(a, b, t); (1−t, t) where ``straight(cos φ)``.

    ``norm`` says what a vector's length counts as, to guard against zero.
    """
    norms = [norm(math.sqrt(max(gram[i, i], 0.0))) for i in (0, 1)]
    cosine = min(1.0, max(-1.0, gram[0, 1] / (norms[0] * norms[1])))
    if straight(cosine):
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


class Slerp(Method):
    """slerp between the base (t = 0) and one expert (t = 1); a chord where |cos φ| > 0.9995."""

    name = "slerp"
    title = "SLERP"
    idea = "Go from the base to the expert along the sphere."
    paper = "https://doi.org/10.1145/325334.325242"
    needs_base = True
    experts_range = (1, 1)
    coarse = 2
    passes = 2
    nanoseconds = 2.0

    class Shared(Parameters):
        t: float = Field(..., description="0 is the base, 1 the expert.")

    def copies(self) -> int | None:
        return {0.0: -1, 1.0: 0}.get(float(self.shared.t))

    def formula(self, names: Sequence[str], base: bool, size: int) -> Formula:
        return Formula(
            f"W = {_arc(self.shared.t, 'W₀', f'W_{names[0]}')}",
            (f"φ: the angle between W₀ and W_{names[0]}, measured when merging; a straight line if it is tiny",),
            (("t", "way from the base (0) to the expert (1)", self.shared.t),),
        )

    def preparation(self) -> tuple:
        return ()

    def prepare(self, scan: Scan) -> list[np.ndarray]:
        return gram_matrices(scan, task_vectors=False, with_base=True)

    def combine(self, block: Block, prepared: np.ndarray) -> Tensor:
        assert block.base is not None
        coefficients = slerp_coefficients(
            prepared, self.shared.t, lambda c: abs(c) > 0.9995, lambda n: n if n > 1e-8 else 1.0
        )
        return weighted_sum(block, [block.base, *block.experts], coefficients)


class NuSlerp(Method):
    """slerp between two models, or between two task vectors if there is a base; t = w_2 / (w_1 + w_2)."""

    name = "nuslerp"
    title = "NuSLERP"
    idea = "SLERP between two experts, or between their changes if a base is given."
    needs_base = False
    experts_range = (2, 2)
    coarse = 2
    passes = 2
    nanoseconds = 2.0

    class PerExpert(Parameters):
        weight: float = Field(..., description="Share of this model on the way between the two.")

    @property
    def t(self) -> float:
        first, second = (e.weight for e in self.experts)
        return 0.5 if abs(first + second) < 1e-6 else second / (first + second)

    def copies(self) -> int | None:
        return {0.0: 0, 1.0: 1}.get(self.t)

    def formula(self, names: Sequence[str], base: bool, size: int) -> Formula:
        letter = "τ" if base else "W"
        first, second = (f"{letter}_{name}" for name in names)
        angle = f"φ: the angle between {first} and {second}, measured when merging; a straight line if it is 0"
        return Formula(
            f"W = {'W₀ + ' if base else ''}{_arc(self.t, first, second)}",
            (CHANGES, angle) if base else (angle,),
            (("t", f"way from {names[0]} (0) to {names[1]} (1)", self.t),),
        )

    def preparation(self) -> tuple:
        return ()

    def prepare(self, scan: Scan) -> list[np.ndarray]:
        return gram_matrices(scan, task_vectors=scan.has_base)

    def combine(self, block: Block, prepared: np.ndarray) -> Tensor:
        def straight(cosine: float) -> bool:
            return 1 - cosine * cosine <= 1e-16  # sin² φ, as in mergekit 0.1.5

        return _sum_on_base(block, slerp_coefficients(prepared, self.t, straight, lambda n: max(n, 1e-7)))


class MultiSlerp(Method):
    """The weighted mean direction times the weighted mean norm.

    With u_k = x_k / |x_k|: θ = (Σ w_k u_k / |Σ w_k u_k|) · Σ w_k |x_k|, of the models, or of the task vectors if
    there is a base. Where the directions cancel out (Σ w_k u_k = 0), the weighted sum of the x_k. The step through
    the tangent space that mergekit 0.1.5 takes adds nothing: the weighted mean of the tangents at the mean direction
    is zero.
    """

    name = "multislerp"
    title = "Spherical mean"
    idea = "Average directions and lengths of several experts apart from each other."
    needs_base = False
    experts_range = (2, None)
    coarse = 2
    passes = 2
    nanoseconds = 2.0

    class Shared(Parameters):
        normalize_weights: bool = Field(True, description="Divide the weights by their sum.")
        eps: float = Field(1e-8, gt=0, description="Added to the norms, against division by zero.")

    class PerExpert(Parameters):
        weight: float = Field(..., description="Share of this model.")

    def weights(self) -> list[float]:
        weights = [e.weight for e in self.experts]
        total = sum(weights)
        return [w / total for w in weights] if self.shared.normalize_weights and total else weights

    def formula(self, names: Sequence[str], base: bool, size: int) -> Formula:
        weights, letter = self.weights(), "τ" if base else "W"
        lengths = sum_of(zip(weights, (f"|{letter}_{n}|" for n in names), strict=True))
        units = sum_of(zip(weights, (f"{letter}_{n}/|{letter}_{n}|" for n in names), strict=True))
        mean = f"u = {units}: the mean direction; lengths |…| are measured when merging"
        return Formula(
            f"W = {'W₀ + ' if base else ''}({lengths}) · u/|u|",
            (CHANGES, mean) if base else (mean,),
            per_expert("w", "share", names, weights),
        )

    def preparation(self) -> tuple:
        return ()

    def prepare(self, scan: Scan) -> list[np.ndarray]:
        return gram_matrices(scan, task_vectors=scan.has_base)

    def _factors(self, gram: np.ndarray) -> list[float]:
        weights = np.array(self.weights())
        norms = np.sqrt(np.maximum(np.diag(gram), 0))
        on_units = weights / (norms + self.shared.eps)
        length = math.sqrt(max(float(on_units @ gram @ on_units), 0.0))
        if length < self.shared.eps:  # opposite or zero vectors have no mean direction
            return [float(w) for w in weights]
        return [float(f) for f in on_units / length * float(weights @ norms)]

    def combine(self, block: Block, prepared: np.ndarray) -> Tensor:
        return _sum_on_base(block, self._factors(prepared))


def _arc(t: float, first: str, second: str) -> str:
    """Formula of the point at ``t`` on the arc from one to the other."""
    return f"sin({number(1 - t)}·φ)/sin φ · {first} + sin({number(t)}·φ)/sin φ · {second}"


def _sum_on_base(block: Block, coefficients: list[float]) -> Tensor:
    if block.base is None:
        return weighted_sum(block, block.experts, coefficients)
    return block.add_to_base(weighted_sum(block, block.task_vectors(), coefficients))
