"""DARE: drop task-vector entries at random and rescale the rest (Yu et al., arXiv 2311.03099).

Each entry of τ_k stays with probability ``density`` = p, independently, and survivors are multiplied by
1/p, so that the expected task vector is unchanged. ``rescale: l1`` multiplies instead by the measured
‖τ‖₁ / ‖kept‖₁ of the tensor, which is what mergekit 0.1.5 does (its random numbers differ from ours, so
the results are equal in law only). Then the task vectors are added (``dare_linear``) or merged by sign
consensus (``dare_ties``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from .base import Block, Method, Parameters, Scan, lone_expert
from .consensus import agreeing_formula, agreeing_sum
from .formula import CHANGES, Formula, on_base, per_expert, sum_of
from .lazy_torch import torch
from .linear import weighted_sum
from .randomness import keep_mask
from .task_arithmetic import divisor

if TYPE_CHECKING:
    from torch import Tensor


class DareLinear(Method):
    name = "dare_linear"
    title = "DARE"
    idea = "Drop most of each expert's changes at random, scale up the rest, add them."
    paper = "https://arxiv.org/abs/2311.03099"
    needs_base = True
    experts_range = (1, None)
    random = True
    symmetric = False
    nanoseconds = 4.0

    class Shared(Parameters):
        lambda_: float = Field(1.0, alias="lambda", description="Factor on the merged task vector.")
        normalize: bool = Field(False, description="Divide by the sum of the weights.")
        rescale: Literal["inverse", "l1", "none"] = Field(
            "inverse", description="Survivors times 1/density, times the measured L1 ratio, or as they are."
        )

    class PerExpert(Parameters):
        weight: float = Field(..., description="Factor on this expert's task vector.")
        density: float = Field(1.0, ge=0, le=1, description="Probability that an entry stays.")

    def coefficients(self) -> list[float] | None:
        weights = [e.weight for e in self.experts]
        scale = self.shared.lambda_ / divisor(weights, self.shared.normalize)
        return [w * scale if e.density > 0 else 0.0 for w, e in zip(weights, self.experts, strict=True)]

    def copies(self) -> int | None:
        lone = lone_expert(self.coefficients() or [])
        return None if lone is not None and lone >= 0 and self.experts[lone].density < 1 else lone

    def formula(self, names: Sequence[str], base: bool, size: int) -> Formula:
        coefficients = self.coefficients() or []
        terms = zip(coefficients, (f"τ̂_{name}" for name in names), strict=True)
        values = per_expert("c", "effective coefficient", names, coefficients)
        return Formula(
            f"W = {on_base(sum_of(terms))}", (CHANGES, *self._dropped_words(names)), values + self._densities(names)
        )

    def _densities(self, names: Sequence[str]) -> tuple:
        return per_expert("p", "share that stays", names, [e.density for e in self.experts])

    def _dropped_words(self, names: Sequence[str]) -> list[str]:
        words = []
        for name, p in zip(names, (e.density for e in self.experts), strict=True):
            if p <= 0 or p >= 1:
                words.append(f"τ̂_{name} = {f'τ_{name}' if p > 0 else '0'} (density {p:.4g})")
                continue
            kept = f"m_{name}·τ_{name}"
            by = {"inverse": f"{kept} / {p:.4g}", "l1": f"{kept}·‖τ_{name}‖₁ / ‖{kept}‖₁", "none": kept}
            words.append(f"τ̂_{name} = {by[self.shared.rescale]}, m_{name} = 1 with probability {p:.4g}, else 0")
        return words

    def preparation(self) -> tuple:
        return (self.shared.rescale, *(e.density for e in self.experts))

    def prepare(self, scan: Scan) -> list[list[float]]:
        """The factor on the survivors, per tensor and expert."""
        if self.shared.rescale == "l1":
            return [self._l1_factors(parts) for parts in scan.map(self._l1_norms)]
        factors = [1 / e.density if self.shared.rescale == "inverse" and e.density > 0 else 1.0 for e in self.experts]
        return [factors for _ in scan.sizes]

    def _l1_norms(self, block: Block) -> list[tuple[float, float]]:
        norms = []
        for k, tau in enumerate(block.task_vectors()):
            magnitude = torch.abs(tau, out=block.buffer("magnitude"))
            whole = float(magnitude.sum(dtype=torch.float64))
            self._drop(block, k, magnitude)
            norms.append((whole, float(magnitude.sum(dtype=torch.float64))))
        return norms

    def _l1_factors(self, parts: list[list[tuple[float, float]]]) -> list[float]:
        sums = [[sum(block[k][i] for block in parts) for i in (0, 1)] for k in range(len(self.experts))]
        return [whole / kept if whole >= 1e-7 and kept >= 1e-7 else 1.0 for whole, kept in sums]

    def _drop(self, block: Block, expert: int, tau: Tensor) -> Tensor:
        density = self.experts[expert].density
        if density <= 0:
            return tau.zero_()
        return tau if density >= 1 else tau.mul_(keep_mask(block, expert, density))

    def sparse_vectors(self, block: Block) -> list[Tensor]:
        """The task vectors after dropping, not yet rescaled."""
        return [self._drop(block, k, tau) for k, tau in enumerate(block.task_vectors())]

    def combine(self, block: Block, prepared: Any) -> Tensor:
        factors = [c * f for c, f in zip(self.coefficients() or [], prepared, strict=True)]
        return block.add_to_base(weighted_sum(block, self.sparse_vectors(block), factors))


class DareTies(DareLinear):
    name = "dare_ties"
    title = "DARE + TIES"
    idea = "Drop changes at random, scale up the rest, let the experts vote on the sign."
    nanoseconds = 6.0

    def coefficients(self) -> None:
        return None

    def copies(self) -> int | None:
        weights = [e.weight if e.density > 0 else 0.0 for e in self.experts]
        lone = lone_expert([float(w != 0) if self.shared.normalize else w for w in weights], self.shared.lambda_)
        return None if lone is not None and lone >= 0 and self.experts[lone].density < 1 else lone

    def formula(self, names: Sequence[str], base: bool, size: int) -> Formula:
        weights, shared = [e.weight for e in self.experts], self.shared
        text, vote = agreeing_formula(names, weights, weights if shared.normalize else None, shared.lambda_)
        values = (("λ", "factor on the merged change", shared.lambda_), *per_expert("w", "weight", names, weights))
        return Formula(text, (CHANGES, *self._dropped_words(names), *vote), values + self._densities(names))

    def combine(self, block: Block, prepared: Any) -> Tensor:
        weights = [e.weight for e in self.experts]
        factors = [w * f for w, f in zip(weights, prepared, strict=True)]
        merged = agreeing_sum(block, self.sparse_vectors(block), factors, weights if self.shared.normalize else None)
        return block.add_to_base(merged if self.shared.lambda_ == 1 else merged.mul_(self.shared.lambda_))
