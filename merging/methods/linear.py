"""Linear merging: the weighted mean of models ("model soup", Wortsman et al., arXiv 2203.05482).

θ = Σ_k w_k θ_k / Σ_k w_k, or without the division if ``normalize`` is off. It needs no base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from ..errors import RecipeError
from .base import Block, Method, Parameters, Scan
from .consensus import sum_into
from .formula import Formula, per_expert, sum_of

if TYPE_CHECKING:
    from torch import Tensor


class Linear(Method):
    name = "linear"
    title = "Linear (model soup)"
    idea = "The weighted mean of the models."
    paper = "https://arxiv.org/abs/2203.05482"
    needs_base = False
    uses_base = False
    experts_range = (1, None)
    spreads_nan = True
    coarse = 2
    nanoseconds = 0.6

    class Shared(Parameters):
        normalize: bool = Field(True, description="Divide by the sum of the weights.")

    class PerExpert(Parameters):
        weight: float = Field(..., description="Share of this model. Negative weights are allowed.")

    def coefficients(self) -> list[float]:
        weights = [e.weight for e in self.experts]
        if not self.shared.normalize:
            return weights
        total = sum(weights)
        if abs(total) < 1e-8:
            raise RecipeError(
                "E_RECIPE_FIELD",
                f"linear: the weights {weights} add up to zero.",
                "With normalize on they are divided by their sum.",
                "Change the weights, or set normalize: false.",
            )
        return [w / total for w in weights]

    def copies(self) -> int | None:
        coefficients = self.coefficients()
        used = [k for k, c in enumerate(coefficients) if c]
        return used[0] if len(used) == 1 and coefficients[used[0]] == 1 else None

    def formula(self, names: Sequence[str], base: bool, size: int) -> Formula:
        coefficients = self.coefficients()
        terms = zip(coefficients, (f"W_{name}" for name in names), strict=True)
        return Formula(f"W = {sum_of(terms)}", values=per_expert("c", "share", names, coefficients))

    def prepare(self, scan: Scan) -> list[list[float]]:
        return [self.coefficients()] * len(scan.sizes)

    def combine(self, block: Block, prepared: list[float]) -> Tensor:
        return weighted_sum(block, block.experts, prepared)


def weighted_sum(block: Block, inputs: list[Tensor], coefficients: list[float]) -> Tensor:
    """Σ c_k x_k in the listed order; inputs with coefficient 0 are not touched (N2)."""
    used = [(x, c) for x, c in zip(inputs, coefficients, strict=True) if c]
    return sum_into(block.buffer("sum"), used) if used else block.buffer("sum").zero_()
