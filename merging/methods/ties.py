"""TIES-Merging: trim, elect sign, merge (Yadav et al., arXiv 2306.01708).

1. Trim: of each task vector keep the k = ⌊density · n⌋ entries that are largest in magnitude, n being the
   size of the tensor (``scope: tensor``, as mergekit does) or of all merged tensors together
   (``scope: global``, as the authors do). Exactly k; see ``trimming``.
2. Elect: the sign of Σ_k w_k τ_k at each entry.
3. Merge: the weighted mean of the entries that agree with it; θ = θ_0 + λ · that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from .base import Block, Method, Parameters, Scan, lone_expert
from .consensus import agreeing_formula, agreeing_sum
from .formula import CHANGES, Formula, per_expert
from .trimming import Threshold, thresholds, trimmed_words

if TYPE_CHECKING:
    from torch import Tensor


class Ties(Method):
    name = "ties"
    title = "TIES"
    idea = "Keep each expert's largest changes, let the experts vote on the sign, average those that agree."
    paper = "https://arxiv.org/abs/2306.01708"
    needs_base = True
    experts_range = (1, None)
    passes = 2
    nanoseconds = 5.0

    class Shared(Parameters):
        lambda_: float = Field(1.0, alias="lambda", description="Factor on the merged task vector.")
        normalize: bool = Field(True, description="Divide by the sum of the agreeing weights (a mean).")
        scope: Literal["tensor", "global"] = Field(
            "tensor", description="Trim each tensor by itself, or all of them against one threshold."
        )

    class PerExpert(Parameters):
        weight: float = Field(1.0, description="Voice of this expert in the vote and in the mean.")
        density: float = Field(1.0, ge=0, le=1, description="Share of the entries to keep, by magnitude.")

    def copies(self) -> int | None:
        weights = [e.weight if e.density > 0 else 0.0 for e in self.experts]
        lone = lone_expert([float(w != 0) if self.shared.normalize else w for w in weights], self.shared.lambda_)
        trimmed = lone is not None and lone >= 0 and self.experts[lone].density < 1
        return None if trimmed else lone

    def whole_model(self) -> tuple | None:
        return tuple(e.density for e in self.experts) if self.shared.scope == "global" else None

    def formula(self, names: Sequence[str], base: bool, size: int) -> Formula:
        weights, shared = [e.weight for e in self.experts], self.shared
        text, vote = agreeing_formula(names, weights, weights if shared.normalize else None, shared.lambda_)
        ranked = size if shared.scope == "tensor" else None
        trimmed = [trimmed_words(name, e.density, ranked) for name, e in zip(names, self.experts, strict=True)]
        values = (
            ("λ", "factor on the merged change", shared.lambda_),
            *per_expert("w", "weight", names, weights),
            *per_expert("d", "density", names, [e.density for e in self.experts]),
        )
        return Formula(text, (CHANGES, *trimmed, *vote), values)

    def preparation(self) -> tuple:
        return (self.shared.scope, *(e.density for e in self.experts))

    def prepare(self, scan: Scan) -> list[list[Threshold]]:
        return thresholds(scan, [e.density for e in self.experts])

    def combine(self, block: Block, prepared: Any) -> Tensor:
        scratch = block.buffer("votes")
        trimmed = [t.trim(tau, scratch) for tau, t in zip(block.task_vectors(), prepared, strict=True)]
        weights = [e.weight for e in self.experts]
        merged = agreeing_sum(block, trimmed, weights, weights if self.shared.normalize else None)
        return block.add_to_base(merged if self.shared.lambda_ == 1 else merged.mul_(self.shared.lambda_))
