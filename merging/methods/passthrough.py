"""Passthrough: take one model's tensors as they are, or scaled. The way to stack layers of several models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from .base import Block, Method, Parameters
from .formula import Formula, sum_of
from .linear import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


class Passthrough(Method):
    name = "passthrough"
    title = "Passthrough (layer stacking)"
    idea = "Copy layers of one or several models into one."
    needs_base = False
    uses_base = False
    experts_range = (1, 1)
    spreads_nan = True
    coarse = 2
    nanoseconds = 0.3

    class PerExpert(Parameters):
        scale: float | None = Field(None, description="Factor on the weights; leave out to copy bytes.")

    def coefficients(self) -> list[float]:
        scale = self.experts[0].scale
        return [1.0 if scale is None else scale]

    def copies(self) -> int | None:
        return 0 if self.coefficients() == [1.0] else None

    def formula(self, names: Sequence[str], base: bool, size: int) -> Formula:
        (scale,) = self.coefficients()
        return Formula(f"W = {sum_of([(scale, f'W_{names[0]}')])}", values=(("s", "scale", scale),))

    def combine(self, block: Block, prepared: Any) -> Tensor:
        return weighted_sum(block, block.experts, self.coefficients())
