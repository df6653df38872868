"""Where in the model the experts changed something: figures per layer and kind of module.

Everything here is arithmetic on a ``Changes``; nothing is read again. The tables answer where a budget (coefficients,
ranks, bits) should go: a flat table says that one coefficient for the whole model will do. Data-free importance is a
hint and no proof: a small change can matter much, which only text can tell (``sensitivity``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoints.layout import KINDS
from ..errors import RecipeError
from .changes import Changes, TensorChange

MEASURES = {
    "norm": "‖τ‖, Frobenius norm of the task vector",
    "l1": "‖τ‖₁, sum of |τ|",
    "relative": "‖τ‖ / ‖W‖, change relative to the base's weights",
    "spread": "‖τ‖₁ / n, mean |τ| of a weight",
    "largest": "max |τ|",
    "unchanged": "share of weights that did not change",
}
"""Name -> what it is. Those of several tensors are those of the tensors joined."""

NOT_IN_EXPERT_MERGING = frozenset({"embed", "head", "norm", "bias"})
"""Kinds that Expert Merging leaves at the base's values (regular expressions of its published code)."""


@dataclass
class Table:
    """One measure by block and kind of module, for each expert."""

    measure: str
    names: list[str]
    """Experts."""
    blocks: list[int | None]
    """Rows; None stands for what lies outside of blocks (embeddings, final norm, head)."""
    kinds: list[str]
    """Columns, in order of computation."""
    values: np.ndarray
    """[experts, rows, columns]; NaN where there is no such tensor (or, relative to the base, its weights are all 0)."""
    per_block: np.ndarray
    """[experts, rows]: all tensors of the row joined."""
    per_kind: np.ndarray
    """[experts, columns]: all tensors of the column joined."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values, None for NaN."""
        return {
            "measure": self.measure,
            "names": self.names,
            "blocks": self.blocks,
            "kinds": self.kinds,
            "values": _plain(self.values),
            "per_block": _plain(self.per_block),
            "per_kind": _plain(self.per_kind),
        }


def importance_table(changes: Changes, measure: str = "norm") -> Table:
    """One of ``MEASURES`` per expert, block and kind. Raises RecipeError E_RECIPE_FIELD for another."""
    if measure not in MEASURES:
        raise RecipeError(
            "E_RECIPE_FIELD", f"There is no measure {measure!r}.", "", f"Measures: {', '.join(MEASURES)}."
        )
    return _table(changes, measure, lambda tensors: _measured(changes.total(tensors), measure))


def expert_merging_importance(
    changes: Changes,
    coefficients: Sequence[float] | Sequence[Sequence[float]],
    without: Collection[str] = NOT_IN_EXPERT_MERGING,
) -> dict[str, float]:
    """Tensor -> I_l = Norm(Σ_k |α_k^l| ‖τ_k^l‖₁), normalised so that Σ_l I_l = 1 (all 0 if nothing changed).

    ``coefficients``: α_k, one per expert, or α_k^l as one list per expert with a value for each tensor that takes part,
    in the order of ``changes.tensors``. A layer l is one tensor, as in the published code; kinds in ``without`` do not
    take part. Source: Expert Merging++, arXiv 2509.25712: importance from coefficients, mean |τ| and number of weights,
    and mean times number is ‖τ‖₁. RecipeError E_RECIPE_INPUTS if the numbers do not fit.
    """
    tensors = [t for t in changes.tensors if t.kind not in without]
    alpha = np.abs(_per_tensor(coefficients, len(changes.names), len(tensors)))
    raw = [float(alpha[:, i] @ np.array(t.l1)) for i, t in enumerate(tensors)]
    whole = math.fsum(raw)
    return {t.name: value / whole if whole > 0 else 0.0 for t, value in zip(tensors, raw, strict=True)}


def expert_merging_table(
    changes: Changes,
    coefficients: Sequence[float] | Sequence[Sequence[float]],
    without: Collection[str] = NOT_IN_EXPERT_MERGING,
) -> Table:
    """``expert_merging_importance`` added up by block and kind; there is one value for all experts together."""
    importance = expert_merging_importance(changes, coefficients, without)
    part = Changes(["all experts"], [t for t in changes.tensors if t.name in importance])
    return _table(part, "expert_merging", lambda tensors: [math.fsum(importance[t.name] for t in tensors)])


def _measured(total: TensorChange, measure: str) -> list[float]:
    if measure == "relative":
        return [norm / total.base_norm if total.base_norm > 0 else float("nan") for norm in total.norm]
    if measure == "spread":
        return [l1 / total.numel for l1 in total.l1]
    return list(getattr(total, measure))


def _table(changes: Changes, measure: str, figures: Callable[[list[TensorChange]], list[float]]) -> Table:
    present = {t.kind for t in changes.tensors}
    kinds, blocks = [kind for kind in KINDS if kind in present], changes.blocks
    nothing = [float("nan")] * len(changes.names)

    def of(tensors: list[TensorChange]) -> list[float]:
        return figures(tensors) if tensors else nothing

    groups: dict[tuple[int | None | str, str], list[TensorChange]] = {}
    for t in changes.tensors:
        for key in ((t.block, t.kind), (t.block, ""), ("", t.kind)):
            groups.setdefault(key, []).append(t)
    cells = [[of(groups.get((block, kind), [])) for kind in kinds] for block in blocks]
    per_block = [of(groups[block, ""]) for block in blocks]
    per_kind = [of(groups["", kind]) for kind in kinds]
    count = len(changes.names)
    return Table(
        measure,
        list(changes.names),
        blocks,
        kinds,
        np.moveaxis(np.reshape(cells, (len(blocks), len(kinds), count)), 2, 0),
        np.reshape(per_block, (len(blocks), count)).T,
        np.reshape(per_kind, (len(kinds), count)).T,
    )


def _per_tensor(coefficients: Sequence[Any], experts: int, tensors: int) -> np.ndarray:
    """α as [experts, tensors]."""
    rows = [[value] * tensors if isinstance(value, int | float) else list(value) for value in coefficients]
    if len(rows) != experts or any(len(row) != tensors for row in rows):
        raise RecipeError(
            "E_RECIPE_INPUTS",
            "The coefficients do not fit the models.",
            f"There are {experts} experts and {tensors} tensors that take part.",
            "Give one number per expert, or per expert a list with one number per tensor.",
        )
    return np.array(rows, dtype=np.float64).reshape(experts, tensors)


def _plain(values: np.ndarray) -> Any:
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [None if math.isnan(value) else float(value) for value in values]
