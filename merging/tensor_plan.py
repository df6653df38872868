"""What is done to one tensor, and to which inputs: merged, copied, converted, or left alone.

Here the recipe meets the tensor: which kinds of tensors a method applies to, with which parameters, and when its
result is simply one of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .alignment import COPIED_AS_THEY_ARE, Aligned, Alignment, some_of
from .checkpoints.checkpoint import Source
from .checkpoints.header import ITEM_BITS
from .errors import AmalgamError, InputError, RecipeError
from .methods import Method
from .reading import place_of_source
from .recipe import Recipe
from .recipe_parameters import Resolved

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
LARGEST_NUMBER = 1e30


@dataclass(slots=True)
class TensorPlan:
    """One output tensor: what is done, to what, and where it goes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    block: int | None
    action: str
    """``merge``; ``copy`` (bytes of ``sources[0]``, converted if the dtypes differ); ``equal`` (integers: copied,
    and all sources must be the same)."""
    sources: list[Source]
    """The experts' (for ``copy`` and ``equal`` the first is what is written)."""
    base: Source | None = None
    method: Method | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_BITS[self.dtype] // 8

    def inputs(self) -> list[Source]:
        return ([self.base] if self.base is not None else []) + self.sources

    def bytes_read(self) -> int:
        passes = self.method.passes if self.method else 1
        return passes * sum(s.numel * ITEM_BITS[s.dtype] // 8 for s in self.inputs())


def plan_tensor(recipe: Recipe, tensor: Aligned, included: bool) -> TensorPlan:
    template = tensor.template
    plain = TensorPlan(
        tensor.name,
        _output_dtype(recipe, tensor),
        template.shape,
        tensor.role.kind,
        tensor.role.block,
        "copy",
        [template],
    )
    if template.dtype in COPIED_AS_THEY_ARE:
        if not tensor.keep:
            others = [s for s in (tensor.base, *tensor.experts) if s is not None and s is not template]
            plain.action, plain.sources = "equal", [template, *others]
        return plain
    if not included:
        return plain
    method = _method(recipe, tensor)
    copied = method.copies()
    if copied is not None:
        assert copied >= 0 or tensor.base is not None
        plain.sources = [tensor.experts[copied] if copied >= 0 else template]
        return plain
    plain.action, plain.method = "merge", method
    plain.sources = tensor.experts
    plain.base = tensor.base if recipe.method_class.uses_base else None
    return plain


def _output_dtype(recipe: Recipe, tensor: Aligned) -> str:
    if tensor.dtype in COPIED_AS_THEY_ARE or recipe.dtype is None:
        return tensor.dtype
    return DTYPES[recipe.dtype]


def is_included(recipe: Recipe, tensor: Aligned) -> bool:
    """Does the recipe apply its method to this kind of tensor?"""
    include = recipe.include
    choice = {"embed": include.embeddings, "head": include.head, "norm": include.norms, "bias": include.biases}.get(
        tensor.role.kind
    )
    return tensor.role.kind not in recipe.method_class.excluded_kinds if choice is None else choice


def _method(recipe: Recipe, tensor: Aligned) -> Method:
    """The method with the parameters of this tensor; one object for all tensors that share them."""
    resolved = recipe.resolve_parameters(tensor.name, tensor.t, tensor.slice_index, tensor.names)
    cls = recipe.method_class
    cache: dict[int, tuple[Any, Method]] = recipe.__dict__.setdefault("_methods", {})
    known = cache.get(id(resolved))
    if known is None or known[0] is not resolved:
        _check_size(resolved, tensor.name)
        known = cache[id(resolved)] = (
            resolved,
            cls(cls.Shared(**resolved.shared), [cls.PerExpert(**e) for e in resolved.experts]),
        )
        for value in known[1].coefficients() or ():
            _check_number("The effective coefficient", value, tensor.name)
    return known[1]


def _check_size(resolved: Resolved, tensor: str) -> None:
    for values in (resolved.shared, *resolved.experts):
        for name, value in values.items():
            if isinstance(value, float):
                _check_number(name, value, tensor)


def _check_number(what: str, value: float, tensor: str) -> None:
    """Products and sums of what passes here stay in float32's range."""
    if not abs(value) <= LARGEST_NUMBER:
        raise RecipeError(
            "E_RECIPE_FIELD",
            f"{what} of {tensor} is {value:.6g}, which is too large to compute with.",
            f"Numbers up to {LARGEST_NUMBER:g} are.",
            "Check weights and lambda.",
        )


def shape_problems(alignment: Alignment, included: set[str]) -> list[AmalgamError]:
    """Tensors that the method is applied to have one shape in all models, also in those with weight 0; if not,
    one error that lists them."""
    different = []
    for tensor in alignment.tensors:
        integers = tensor.template.dtype in COPIED_AS_THEY_ARE and not tensor.keep
        shapes = {s.shape for s in (tensor.template, *tensor.experts)}
        if len(shapes) > 1 and (tensor.name in included or integers):
            different.append(tensor)
    if not different:
        return []
    first = different[0]
    listed = "; ".join(f"{list(s.shape)} in{place_of_source(s)}" for s in (first.base, *first.experts) if s is not None)
    return [
        InputError(
            "E_SHAPE",
            f"Shapes differ: {some_of([t.name for t in different])}.",
            f"{first.name} is {listed}.",
            "Only models of one architecture and size can be merged.",
        )
    ]


def check_whole_model(alignment: Alignment, tensors: Sequence[TensorPlan]) -> None:
    """A global rule ranks all tensors together: neither its parameters nor its models may differ between them."""
    pairs = [
        (t.method.whole_model(), tuple(a.models))
        for a, t in zip(alignment.tensors, tensors, strict=True)
        if t.method is not None
    ]
    rules = {rule for rule, _ in pairs}
    if len(rules) == 1 and None not in rules and len(set(pairs)) > 1:
        raise RecipeError(
            "E_RECIPE_FIELD",
            "scope: global needs the same experts in all slices.",
            "All entries of an expert are ranked together, against one threshold.",
            "Set scope: tensor.",
        )
    if len(rules) > 1:
        raise RecipeError(
            "E_RECIPE_FIELD",
            "scope: global needs the same density (ratio, clip) for all tensors.",
            "All entries of the model are ranked together, against one threshold.",
            "Give one number instead of a gradient or filter list, or set scope: tensor.",
        )
