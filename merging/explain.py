"""What a recipe does to one tensor, as a formula with the numbers that really hold for it.

    with make_plan(recipe) as plan:
        print(explain(plan, "model.layers.0.mlp.up_proj.weight"))

    W = W₀ + 0.4·τ_sort + 0.4·τ_rotate
    τ_k = W_k − W₀: what expert k changed

The one idea: weights, gradients over depth, filters and slices meet in the plan, so the plan knows what is left of them
for a tensor; and each method knows how its formula is written (``Method.formula``). Headers are enough.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .alignment import COPIED_AS_THEY_ARE, Aligned
from .checkpoints.checkpoint import Source
from .checkpoints.header import ITEM_BITS
from .checkpoints.layout import IGNORABLE
from .errors import InputError
from .methods.formula import Formula, Value
from .plan import Plan
from .recipe import Recipe
from .tensor_plan import DTYPES, TensorPlan, is_included

_KINDS = {"embed": ("Embeddings", "embeddings"), "head": ("The output head", "head"), "norm": ("Norms", "norms"),
          "bias": ("Biases", "biases")}  # fmt: skip
_LONGEST_NAME = 24


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is done to ``tensor``. Plain text: names of models and tensors in it are as their authors chose them.

    ``text``: the formula. ``where``: what its symbols stand for, a line each. ``values``: (symbol, meaning, number).
    ``included``: does the method apply to it? ``note``: why not, where the inputs come from, and how it is rounded.
    """

    tensor: str
    shape: tuple[int, ...]
    text: str
    where: tuple[str, ...]
    values: tuple[Value, ...]
    included: bool
    note: str

    def __str__(self) -> str:
        return "\n".join([self.text, *self.where, *filter(None, [self.note])])


def explain(plan: Plan, tensor: str) -> Explanation:
    """The formula of one output tensor. InputError ``E_MISSING_TENSOR`` if there is none of that name."""
    pairs = zip(plan.alignment.tensors, plan.tensors, strict=True)
    found = next(((a, t) for a, t in pairs if t.name == tensor), None)
    if found is None:
        near = difflib.get_close_matches(tensor[:200], [t.name for t in plan.tensors], 1)
        why = f"Did you mean {near[0]!r}?" if near else ""
        raise InputError("E_MISSING_TENSOR", f"The merge has no tensor {tensor[:200]!r}.", why, "Check the name.")
    aligned, planned = found
    names = _names(plan.recipe, aligned)
    if planned.method is not None:
        formula = planned.method.formula(names, planned.base is not None, planned.numel)
        included, notes = True, [*_origins(plan, aligned, planned, names), _arithmetic(planned)]
    else:
        formula, included, reason = _copy(plan.recipe, aligned, planned, names)
        notes = [reason, *_conversion(planned)]
    return Explanation(
        tensor, planned.shape, formula.text, formula.where, formula.values, included, " ".join(filter(None, notes))
    )


def short_names(labels: Sequence[str]) -> list[str]:
    """The last part of each path, where that tells them apart; numbered where even the whole would not."""
    last = [label.rstrip("/").rpartition("/")[2] or label for label in labels]
    counts = Counter(name[:_LONGEST_NAME] for name in last)
    alone = [counts[name[:_LONGEST_NAME]] == 1 for name in last]
    return [
        name[:_LONGEST_NAME] if single else f"{name[: _LONGEST_NAME - 3]}#{number}"
        for number, (name, single) in enumerate(zip(last, alone, strict=True), 1)
    ]


def _names(recipe: Recipe, aligned: Aligned) -> list[str]:
    """A short name for each expert that takes part in this tensor."""
    every = short_names([expert.label for expert in recipe.experts])
    part = [every[i] for i, _ in recipe.slice_experts(aligned.slice_index)]
    if len(part) == len(aligned.experts):
        return part
    keys = [expert.key for expert in recipe.experts]  # of some only: those that have the tensor
    models = aligned.models[len(aligned.models) - len(aligned.experts) :]
    return [every[keys.index(key)] for key in models]


def _copy(
    recipe: Recipe, aligned: Aligned, planned: TensorPlan, names: Sequence[str]
) -> tuple[Formula, bool, str]:
    """Formula, whether the method applies, and why bytes are simply copied."""
    source = planned.sources[0]
    k = None if source is aligned.base else next(i for i, s in enumerate(aligned.experts) if s is source)
    origin = "the base" if k is None else names[k]
    formula = Formula("W = W₀" if k is None else f"W = W_{names[k]}")
    if aligned.keep:
        what = "A buffer, which models compute by themselves" if IGNORABLE.fullmatch(planned.name) else (
            "Not all models have this tensor")  # fmt: skip
        return formula, False, f"{what}: copied from {origin}."
    if aligned.template.dtype in COPIED_AS_THEY_ARE:
        return formula, False, f"Integers are not merged: they must be equal in all models. Copied from {origin}."
    if not is_included(recipe, aligned):
        kind, field = _KINDS.get(aligned.role.kind, ("Such tensors", ""))
        asked = getattr(recipe.include, field, None) is False
        why = f"include.{field} is false" if asked else f"{recipe.method_class.title} leaves them unless told otherwise"
        return formula, False, f"{kind} stay as they are in {origin}: {why}."
    cls = recipe.method_class
    shared, own = recipe.resolve_parameters(aligned.name, aligned.t, aligned.slice_index, aligned.names)
    method = cls(cls.Shared(**shared), [cls.PerExpert(**one) for one in own])
    values = method.formula(names, recipe.base is not None and cls.uses_base, planned.numel).values
    why = "with these numbers nothing is added to it" if k is None else "with these numbers it is the result"
    return Formula(formula.text, formula.where, values), True, f"Copied from {origin}: {why}."


def _origins(plan: Plan, aligned: Aligned, planned: TensorPlan, names: Sequence[str]) -> list[str]:
    """Which tensors of the models these are, where that is not obvious."""
    found = []
    if plan.recipe.slices is not None or any(s.name != planned.name for s in planned.inputs()):
        listed = [("W₀", planned.base)] if planned.base is not None else []
        listed += [(f"W_{name}", source) for name, source in zip(names, planned.sources, strict=True)]
        found.append("; ".join(f"{symbol} is {source.name}" for symbol, source in listed) + ".")
    lacking = [n for n, s in zip(names, planned.sources, strict=True) if planned.base is not None and s is planned.base]
    if lacking:
        found.append(f"{', '.join(lacking)}: no such tensor, so it counts as unchanged.")
    if plan.vocabulary.digest is not None and aligned.role.kind in ("embed", "head"):
        found.append("Rows are matched by token, since the vocabularies differ.")
    return found


def _arithmetic(planned: TensorPlan) -> str:
    wide = any(ITEM_BITS[source.dtype] > 16 for source in planned.inputs())
    return f"Computed in {'float64' if wide else 'float32'}, then rounded once to {_dtype(planned.dtype)}."


def _conversion(planned: TensorPlan) -> list[str]:
    source: Source = planned.sources[0]
    if source.dtype == planned.dtype:
        return []
    return [f"Converted from {_dtype(source.dtype)} to {_dtype(planned.dtype)}."]


def _dtype(code: str) -> str:
    return next((name for name, known in DTYPES.items() if known == code), code)
