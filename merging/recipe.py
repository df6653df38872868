"""The recipe: what the user asked for, and the single source of truth of a merge.

A recipe names a base model, its experts, a method and parameters. It is a strict value: an unknown field
or parameter is an error with a suggestion, never ignored. It knows nothing of files: whether the models
exist, how many blocks they have and whether their tensors fit is found out by the plan, which asks

* ``model_list`` for the models to open,
* ``layer_plan(recipe, block_counts)`` (in layer_plan.py) for the output's blocks and where each comes from,
* ``resolve_parameters`` for the numbers that hold for one tensor.

``recipe_yaml`` reads and writes recipes as text; ``mergekit_dialect`` translates mergekit's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from .errors import RecipeError
from .methods import METHODS, Method, get_method
from .recipe_checks import check_recipe
from .recipe_parameters import (
    Level,
    ParameterField,
    Path,
    RecipeProblem,
    Resolved,
    Resolver,
    fields_of,
    filters_in,
    quoted,
    suggestion,
)
from .recipe_parts import (
    MAX_MODELS,
    Expert,
    Include,
    Model,
    Part,
    Policies,
    Slice,
    Source,
    Tokenizer,
    TokenRule,
    TokenSource,
)

FORMAT = 1
MAX_SLICES = 10_000


class Recipe(Part):
    """See the module's text. ``Recipe.parse`` makes one from plain data, with errors for people."""

    amalgam: int = FORMAT
    base: Model | None = None
    experts: list[Expert] = Field(min_length=1, max_length=MAX_MODELS)
    method: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    slices: list[Slice] | None = Field(default=None, min_length=1, max_length=MAX_SLICES)
    include: Include = Field(default_factory=Include)
    dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None
    """Type of the output's weights; None: of each tensor as in the base (first expert)."""
    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    chat_template: str = "auto"
    """``auto``: the base's (first expert's), or if it has none the one that the others agree on. ``base``,
    ``none``, one of the models, or the text of a Jinja template."""
    policies: Policies = Field(default_factory=Policies)
    seed: int = Field(default=0, ge=0, lt=1 << 63)

    @field_validator("amalgam")
    @classmethod
    def _known_format(cls, version: int) -> int:
        if version != FORMAT:
            raise ValueError(f"this program reads recipes of format {FORMAT}")
        return version

    @classmethod
    def parse(cls, data: Any) -> Recipe:
        """A recipe from plain data (dicts, lists, strings, numbers). Errors: RecipeError, with the place."""
        if not isinstance(data, Mapping):
            raise RecipeProblem(
                (), "it is not a mapping of fields.", fix="Start with: method: ties", code="E_RECIPE_READ"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _first_problem(error) from None

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        check_recipe(self)
        return self

    @cached_property
    def method_class(self) -> type[Method]:
        """The method's class: what it needs, and its parameters."""
        if self.method not in METHODS:
            try:
                get_method(self.method[:64])
            except RecipeError as error:
                raise RecipeProblem(("method",), error.what, error.why, error.fix, code=error.code) from None
        return get_method(self.method)

    # -- models ---------------------------------------------------------------------------------------

    @cached_property
    def parameter_fields(self) -> tuple[dict[str, ParameterField], dict[str, ParameterField]]:
        """The method's shared parameters, and those of each expert."""
        return fields_of(self.method_class.Shared), fields_of(self.method_class.PerExpert)

    @cached_property
    def _by_name(self) -> dict[str, int]:
        """Index of an expert by its name and by its reference (a name goes before a reference)."""
        keys = {e.key: i for i, e in reversed(list(enumerate(self.experts)))}
        return {**keys, **{e.name: i for i, e in enumerate(self.experts) if e.name}}

    @cached_property
    def _models(self) -> list[Model]:
        return [Model(model=e.model, adapter=e.adapter) for e in self.experts]

    def names(self) -> list[str]:
        """Everything that names a model in this recipe."""
        return sorted({*self._by_name, *([self.base.key] if self.base else [])})

    def expert_named(self, text: str) -> int | None:
        """Index of the expert called ``text``, by its name or reference."""
        return self._by_name.get(text)

    def model_named(self, text: str) -> Model | None:
        """The base or expert that ``text`` names: an expert's name, or a reference. None: neither."""
        index = self._by_name.get(text)
        if index is not None:
            return self._models[index]
        return self.base if self.base is not None and text == self.base.key else None

    def slice_base(self, part: Slice | None) -> Model | None:
        """The base that holds in a slice (or, for None, in the whole recipe)."""
        return (
            self.base if part is None or part.base is None else self.model_named(part.base.key) or part.base
        )

    def slice_experts(self, slice_index: int | None) -> list[tuple[int, Source | None]]:
        """The experts that take part: (index in ``experts``, the source that says which layers)."""
        if slice_index is None or self.slices is None:
            return [(i, None) for i in range(len(self.experts))]
        part = self.slices[slice_index]
        found: list[tuple[int, Source | None]] = []
        for source in part.sources:
            expert = self.expert_named(source.model)
            if expert is not None and not self.is_base(source, part):
                found.append((expert, source))
        return found

    def is_base(self, source: Source, part: Slice) -> bool:
        """Does this source only say which layers the base takes part with? (Not if the method uses none.)"""
        base, model = self.slice_base(part), self.model_named(source.model)
        return (
            self.method_class.uses_base
            and base is not None
            and (model.key if model else source.model) == base.key
        )

    @property
    def model_list(self) -> list[Model]:
        """All distinct models: the base first, then the experts, then bases that only some slices have."""
        models: dict[str, Model] = {self.base.key: self.base} if self.base else {}
        for model in self._models:
            models.setdefault(model.key, model)
        for base in map(self.slice_base, self.slices or ()):
            if base is not None:
                models.setdefault(base.key, base)
        return list(models.values())

    # -- parameters -----------------------------------------------------------------------------------

    def level(self, slice_index: int | None) -> Level:
        """Settings by precedence: slice source > expert > slice > recipe."""
        part = self.slices[slice_index] if self.slices and slice_index is not None else None
        common = ([part.parameters] if part else []) + [self.parameters]
        chosen = self.slice_experts(slice_index)
        experts = [
            ([source.parameters] if source else []) + [self.experts[i].parameters, *common]
            for i, source in chosen
        ]
        return Level(common, experts, [self.experts[i].label for i, _ in chosen])

    @cached_property
    def _resolver(self) -> Resolver:
        levels: list[Mapping[str, Any]] = [self.parameters, *(e.parameters for e in self.experts)]
        for part in self.slices or ():
            levels += [part.parameters, *(s.parameters for s in part.sources)]
        return Resolver(
            *self.parameter_fields, self.level, (f for level in levels for f in filters_in(level))
        )

    def resolve_parameters(
        self,
        tensor: str,
        t: float | None = None,
        slice_index: int | None = None,
        inputs: Sequence[str] | None = None,
    ) -> Resolved:
        """The method's parameters for one output tensor: ``(shared, experts)`` of plain dicts.

        ``t`` and ``slice_index`` come from ``layer_plan``; ``inputs`` are the tensor's names in the experts
        that take part, if they differ from ``tensor`` (stacked layers). Do not change the results: tensors
        share them.
        RecipeError E_RECIPE_FIELD if a parameter without a default has no value for this tensor.
        """
        return self._resolver(tensor, t, slice_index, inputs)

    # -- as data --------------------------------------------------------------------------------------

    def to_data(self) -> dict[str, Any]:
        """Plain data without what is at its default; ``Recipe.parse`` gives an equal recipe back."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        first: dict[str, Any] = {k: data[k] for k in ("base", "experts", "method") if k in data}
        return {"amalgam": self.amalgam, **first, **data}

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Recipe:
        """A changed recipe, checked like any other (pydantic's own would keep stale answers)."""
        return self.parse({**self.model_dump(mode="json"), **(update or {})})

    def canonical_json(self) -> str:
        """One text per meaning: all fields, sorted, without spaces. Enters the plan's hash."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False
        )


def _fields_at(path: Path) -> list[str]:
    """Names of the fields of the part of a recipe at ``path``, for suggestions."""
    where = tuple(p for p in path if not isinstance(p, int))
    if where[:2] == ("tokenizer", "tokens"):
        return list((TokenSource if len(where) > 3 else TokenRule).model_fields)
    parts: dict[tuple[str, ...], type[Part]] = {
        (): Recipe,
        ("base",): Model,
        ("experts",): Expert,
        ("slices",): Slice,
        ("slices", "sources"): Source,
        ("include",): Include,
        ("tokenizer",): Tokenizer,
        ("policies",): Policies,
    }
    return list(parts[where].model_fields) if where in parts else []


def _first_problem(error: ValidationError) -> RecipeProblem:
    """pydantic's complaint in our words; an unknown field first, since it explains a missing one."""
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path = tuple(first["loc"])
    if path[:2] == ("tokenizer", "tokens"):
        path = path[:4] + path[5:]  # without the name of the kind of source
    message, fix = first["msg"].removeprefix("Value error, "), ""
    if first["type"] == "extra_forbidden":
        message, fix = f"unknown field {quoted(path[-1])}.", suggestion(str(path[-1]), _fields_at(path[:-1]))
    elif first["type"] == "missing":
        message = "this field is missing."
    else:
        message = f"{quoted(first['input'])} does not fit: {message[:1].lower()}{message[1:]}."
    return RecipeProblem(path, message, fix=fix)
