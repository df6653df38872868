"""What the bits of a tensor depend on, as values to compare.

The one idea: a tensor need not be computed again if nothing that it depends on has changed, and what that is can be
said exactly: the bytes of its inputs (by the identity of the files that they stand in), the method with the parameters
that hold for this tensor, and a few settings. Two equal keys, the same bits.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..checkpoints.checkpoint import Source
from ..plan import Plan
from ..tensor_plan import TensorPlan


class Keys:
    """Keys of each input, of what is prepared, and of each merged tensor of a plan.

    To be made before the plan's sources are replaced by others.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self._together: str | None = None
        self._own: dict[int, tuple] = {}  # an opened model's tensors
        facts = []
        for key, model in plan.models.items():
            identity = json.dumps(model.instance(), sort_keys=True)
            facts.append((key, identity))
            digest = hashlib.sha256(identity.encode()).hexdigest()
            for name, source in model.tensors.items():
                self._own.setdefault(id(source), (digest, name, source.dtype))
        # Rows that were moved into another vocabulary: by all that can decide about them.
        recipe = _without_parameters(plan.recipe.model_dump(mode="json"))
        everything = json.dumps([recipe, facts, plan.vocabulary.digest], sort_keys=True)
        self._rest = hashlib.sha256(everything.encode()).hexdigest()
        self._inputs = {t.name: tuple(self._input(t, k, s) for k, s in enumerate(slots(t))) for t in plan.tensors}

    def _input(self, tensor: TensorPlan, slot: int, source: Source | None) -> tuple | None:
        if source is None:
            return None
        return self._own.get(id(source)) or (self._rest, tensor.name, slot)

    def inputs(self, tensor: TensorPlan) -> tuple:
        """One for the base (None without one) and each further source, in the order of ``slots``."""
        return self._inputs[tensor.name]

    def prepared(self, tensor: TensorPlan) -> tuple:
        """Of what the tensor's method prepares (for rules that look at the whole model: this tensor's share in it)."""
        method, recipe = tensor.method, self.plan.recipe
        assert method is not None
        seed = recipe.seed if method.random else None
        return (self.inputs(tensor), type(method), method.preparation(), seed, recipe.policies.non_finite)

    def result(self, tensor: TensorPlan) -> tuple:
        """Of the merged tensor."""
        method, policies = tensor.method, self.plan.recipe.policies
        what = self.inputs(tensor), tensor.action, tensor.dtype, tensor.shape
        if method is None:
            return (*what, policies.non_finite)
        seed = self.plan.recipe.seed if method.random else None
        rule = type(method), method.shared, tuple(method.experts), seed
        together = self._ranked_together() if method.whole_model() is not None else None
        return (*what, rule, policies.non_finite, policies.overflow, together)

    def _ranked_together(self) -> str:
        """For rules that look at the whole model: all that is ranked together, in short."""
        if self._together is None:
            whole = [(t.name, self.prepared(t)) for t in self.plan.tensors if t.method is not None]
            self._together = hashlib.sha256(repr(whole).encode()).hexdigest()
        return self._together


def slots(tensor: TensorPlan) -> list[Source | None]:
    """The base (None without one) and the other sources."""
    return [tensor.base, *tensor.sources]


def _without_parameters(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_parameters(value) for key, value in data.items() if key != "parameters"}
    return [_without_parameters(value) for value in data] if isinstance(data, list) else data
