"""Task arithmetic: add scaled task vectors to the base (Ilharco et al., arXiv 2212.04089).

θ = θ_0 + λ Σ_k w_k τ_k with τ_k = θ_k − θ_0; with ``normalize`` the sum is divided by Σ_k w_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from .base import Block, Method, Parameters, Scan, lone_expert
from .formula import CHANGES, Formula, on_base, per_expert, sum_of
from .linear import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


def divisor(weights: list[float], normalize: bool) -> float:
    """Σ w_k if it is to divide; 1 where that sum is practically zero (as mergekit 0.1.5 does)."""
    total = sum(weights)
    return total if normalize and abs(total) >= 1e-8 else 1.0


class TaskArithmetic(Method):
    name = "task_arithmetic"
    title = "Task arithmetic"
    idea = "Add each expert's change to the base, scaled."
    paper = "https://arxiv.org/abs/2212.04089"
    needs_base = True
    experts_range = (1, None)
    spreads_nan = True
    coarse = 2
    nanoseconds = 0.8

    class Shared(Parameters):
        lambda_: float = Field(1.0, alias="lambda", description="Factor on the sum of all task vectors.")
        normalize: bool = Field(False, description="Divide by the sum of the weights.")

    class PerExpert(Parameters):
        weight: float = Field(..., description="Factor on this expert's task vector.")

    def coefficients(self) -> list[float]:
        weights = [e.weight for e in self.experts]
        scale = self.shared.lambda_ / divisor(weights, self.shared.normalize)
        return [w * scale for w in weights]

    def copies(self) -> int | None:
        return lone_expert(self.coefficients())

    def formula(self, names: Sequence[str], base: bool, size: int) -> Formula:
        coefficients = self.coefficients()
        terms = zip(coefficients, (f"τ_{name}" for name in names), strict=True)
        return Formula(
            f"W = {on_base(sum_of(terms))}", (CHANGES,), per_expert("c", "effective coefficient", names, coefficients)
        )

    def prepare(self, scan: Scan) -> list[list[float]]:
        return [self.coefficients()] * len(scan.sizes)

    def combine(self, block: Block, prepared: list[float]) -> Tensor:
        return block.add_to_base(weighted_sum(block, block.task_vectors(), prepared))
