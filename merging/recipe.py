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
from .recipe_parameters import (
    Level,
    ParameterField,
    Path,
    RecipeProblem,
    Resolved,
    Resolver,
    check_parameters,
    fields_of,
    filters_in,
    missing_parameter,
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
    check_reference,
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
    slices: list[Slice] | None = Field(None, min_length=1, max_length=MAX_SLICES)
    include: Include = Field(default_factory=Include)
    dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None
    """Type of the output's weights; None: of each tensor as in the base (first expert)."""
    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    chat_template: str | None = None
    """None: the one that comes with the tokenizer. ``auto``: the one that most inputs have. ``base``,
    ``none``, an expert's name, a model reference, or the text of a template."""
    policies: Policies = Field(default_factory=Policies)
    seed: int = Field(0, ge=0, lt=1 << 63)

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
            raise RecipeProblem("E_RECIPE_READ", (), "it is not a mapping of fields.", "", "Start with: method: ties")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _first_problem(error) from None

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        self._check_models()
        for i, part in enumerate(self.slices or ()):
            self._check_slice(part, ("slices", i))
        self._check_parameters()
        self._check_words()
        return self

    # -- checks across fields -------------------------------------------------------------------------

    @cached_property
    def method_class(self) -> type[Method]:
        """The method's class: what it needs, and its parameters."""
        if self.method not in METHODS:
            try:
                get_method(self.method)
            except RecipeError as error:
                raise RecipeProblem(error.code, ("method",), error.what, error.why, error.fix) from None
        return get_method(self.method)

    def _check_models(self) -> None:
        method = self.method_class
        if method.needs_base and self.base is None:
            raise RecipeProblem(
                "E_RECIPE_INPUTS", ("base",), f"{self.method} needs a base model.",
                "It merges what the experts changed against it.", "Add base: the model that the experts were made from.")
        taken: dict[str, int] = {}
        keys = [e.key for e in self.experts]
        for i, expert in enumerate(self.experts):
            if expert.key in keys[:i] and expert.name is None:
                raise RecipeProblem(
                    "E_RECIPE_INPUTS", ("experts", i), f"{quoted(expert.key)} is listed twice.", "",
                    "Keep it once, or give each entry a name of its own if you mean it.")
            if expert.name is not None and (expert.name in taken or expert.name in keys):
                raise RecipeProblem("E_RECIPE_INPUTS", ("experts", i, "name"), f"{quoted(expert.name)} is taken.")
            if expert.name is not None:
                taken[expert.name] = i
            if method.uses_base and self.slices is None and self.base and expert.key == self.base.key:
                raise RecipeProblem(
                    "E_RECIPE_INPUTS", ("experts", i), f"{quoted(expert.key)} is the base itself.",
                    "It changed nothing against itself.", "Leave it out of the experts.")
        if self.slices is None:
            self._check_count(len(self.experts), ("experts",))

    def _check_count(self, count: int, path: Path) -> None:
        least, most = self.method_class.experts_range
        if least <= count and (most is None or count <= most):
            return
        wanted = f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        besides = " besides the base" if self.method_class.needs_base else ""
        raise RecipeProblem("E_RECIPE_INPUTS", path, f"{self.method} takes {wanted} expert(s){besides}, not {count}.")

    def _check_slice(self, part: Slice, path: Path) -> None:
        lengths = [s.layers[1] - s.layers[0] for s in part.sources]
        if len(set(lengths)) > 1:
            raise RecipeProblem(
                "E_RECIPE_FIELD", (*path, "sources"), f"the sources have {lengths} layers.",
                "Layers are merged one to one.", "Make the ranges equally long.")
        if part.base is not None and not self.method_class.uses_base:
            raise RecipeProblem("E_RECIPE_INPUTS", (*path, "base"), f"{self.method} has no use for a base.")
        used: list[int | None] = []
        for i, source in enumerate(part.sources):
            expert = None if self.is_base(source, part) else self._find(source.model)
            if self.is_base(source, part) and source.parameters:
                raise RecipeProblem(
                    "E_RECIPE_INPUTS", (*path, "sources", i, "parameters"), "the base has no parameters.",
                    "It is what the experts are compared with.", "Leave them out.")
            elif expert is None and not self.is_base(source, part):
                raise RecipeProblem(
                    "E_RECIPE_INPUTS", (*path, "sources", i, "model"), f"{quoted(source.model)} is not one of the experts.",
                    "", suggestion(source.model, self._names()))
            if expert in used:
                raise RecipeProblem("E_RECIPE_INPUTS", (*path, "sources", i, "model"), "it is listed twice in this slice.")
            used.append(expert)
        self._check_count(len(used) - used.count(None), (*path, "sources"))

    def _check_parameters(self) -> None:
        shared, own = self._fields
        everywhere = {**shared, **own}
        whose = {n: "It is a parameter of each expert." for n in own}
        common = {n: "It holds for the merge as a whole: it belongs under the recipe's own parameters." for n in shared}
        check_parameters(self.parameters, everywhere, ("parameters",), whose)
        for i, expert in enumerate(self.experts):
            check_parameters(expert.parameters, own, ("experts", i, "parameters"), common)
        for i, part in enumerate(self.slices or ()):
            check_parameters(part.parameters, everywhere, ("slices", i, "parameters"), whose)
            for j, source in enumerate(part.sources):
                check_parameters(source.parameters, own, ("slices", i, "sources", j, "parameters"), common)
        for index in range(len(self.slices)) if self.slices else [None]:
            level = self._level(index)
            for name, field in shared.items():
                if field.required and not any(name in settings for settings in level.shared):
                    raise missing_parameter(name, "")
            for settings, label in zip(level.experts, level.labels, strict=True):
                for name, field in own.items():
                    if field.required and not any(name in s for s in settings):
                        raise missing_parameter(name, label)

    def _check_words(self) -> None:
        """References outside of the list of experts: a word that is nearly a known one is a typing error."""
        texts: list[tuple[Path, str]] = [(("tokenizer", "source"), self.tokenizer.source)]
        texts += [(("slices", i, "base"), s.base.key) for i, s in enumerate(self.slices or ()) if s.base]
        for token, rule in self.tokenizer.tokens.items():
            path: Path = ("tokenizer", "tokens", token, "source")
            name = rule.source.model if rule.source else None
            if name == "zero" and rule.source and (rule.source.token or rule.source.token_id is not None):
                raise RecipeProblem("E_RECIPE_FIELD", path, "zero has no tokens.")
            if name is not None and name != "zero" and self.model_named(name) is None:
                raise RecipeProblem(
                    "E_RECIPE_INPUTS", path, f"{quoted(name)} is not one of the models.", "",
                    suggestion(name, [*self._names(), "zero"]))
        if self.tokenizer.tokens and self.tokenizer.source == "auto":
            raise RecipeProblem(
                "E_RECIPE_FIELD", ("tokenizer", "tokens"), "rules for tokens need a tokenizer source.", "",
                "Set tokenizer.source to base, union or a model.")
        if self.chat_template is not None and "{" not in self.chat_template:
            texts.append((("chat_template",), self.chat_template))
        for path, text in texts:
            words = {"tokenizer": {"auto", "base", "union"}, "slices": set()}.get(path[0], {"auto", "base", "none"})
            if text in words and text == "base" and self.base is None:
                raise RecipeProblem("E_RECIPE_FIELD", path, "there is no base model.", "", "Name one of the models.")
            if text in words or self.model_named(text) is not None:
                continue
            try:
                check_reference(text)
            except ValueError as error:
                raise RecipeProblem("E_RECIPE_FIELD", path, f"{quoted(text)} names nothing.", str(error)) from None
            if "/" not in text:
                raise RecipeProblem(
                    "E_RECIPE_FIELD", path, f"{quoted(text)} names nothing here.", "",
                    suggestion(text, [*words, *self._names()]) + " A model from elsewhere is written org/name or ./path.")

    # -- models ---------------------------------------------------------------------------------------

    @cached_property
    def _fields(self) -> tuple[dict[str, ParameterField], dict[str, ParameterField]]:
        return fields_of(self.method_class.Shared), fields_of(self.method_class.PerExpert)

    def _names(self) -> list[str]:
        keys = [e.key for e in self.experts] + ([self.base.key] if self.base else [])
        return sorted({*keys, *(e.name for e in self.experts if e.name)})

    def _find(self, text: str | None) -> int | None:
        """Index of the expert called ``text`` (by name first, then by reference)."""
        for attribute in ("name", "key"):
            for i, expert in enumerate(self.experts):
                if getattr(expert, attribute) == text:
                    return i
        return None

    def model_named(self, text: str) -> Model | None:
        """The base or expert that ``text`` names: an expert's name, or a reference. None: neither."""
        index = self._find(text)
        if index is not None:
            return Model(model=self.experts[index].model, adapter=self.experts[index].adapter)
        return self.base if self.base is not None and text == self.base.key else None

    def slice_base(self, part: Slice | None) -> Model | None:
        """The base that holds in a slice (or, for None, in the whole recipe)."""
        return self.base if part is None or part.base is None else self.model_named(part.base.key) or part.base

    def slice_experts(self, slice_index: int | None) -> list[tuple[int, Source | None]]:
        """The experts that take part: (index in ``experts``, the source that says which layers)."""
        if slice_index is None or self.slices is None:
            return [(i, None) for i in range(len(self.experts))]
        part = self.slices[slice_index]
        found: list[tuple[int, Source | None]] = []
        for source in part.sources:
            expert = self._find(source.model)
            if expert is not None and not self.is_base(source, part):
                found.append((expert, source))
        return found

    def is_base(self, source: Source, part: Slice) -> bool:
        """Does this source only say which layers the base takes part with? (Not if the method uses none.)"""
        base, model = self.slice_base(part), self.model_named(source.model)
        return self.method_class.uses_base and base is not None and (model.key if model else source.model) == base.key

    @property
    def model_list(self) -> list[Model]:
        """All distinct models: the base first, then the experts, then bases that only some slices have."""
        models: dict[str, Model] = {self.base.key: self.base} if self.base else {}
        for expert in self.experts:
            models.setdefault(expert.key, Model(model=expert.model, adapter=expert.adapter))
        for base in map(self.slice_base, self.slices or ()):
            if base is not None:
                models.setdefault(base.key, base)
        return list(models.values())

    # -- parameters -----------------------------------------------------------------------------------

    def _level(self, slice_index: int | None) -> Level:
        """Settings by precedence: slice source > expert > slice > recipe."""
        part = self.slices[slice_index] if self.slices and slice_index is not None else None
        common = ([part.parameters] if part else []) + [self.parameters]
        chosen = self.slice_experts(slice_index)
        experts = [
            ([source.parameters] if source else []) + [self.experts[i].parameters, *common] for i, source in chosen]
        return Level(common, experts, [self.experts[i].label for i, _ in chosen])

    @cached_property
    def _resolver(self) -> Resolver:
        levels: list[Mapping[str, Any]] = [self.parameters, *(e.parameters for e in self.experts)]
        for part in self.slices or ():
            levels += [part.parameters, *(s.parameters for s in part.sources)]
        return Resolver(*self._fields, self._level, (f for level in levels for f in filters_in(level)))

    def resolve_parameters(
        self, tensor: str, t: float | None = None, slice_index: int | None = None, inputs: Sequence[str] | None = None
    ) -> Resolved:
        """The method's parameters for one output tensor: ``(shared, experts)`` of plain dicts.

        ``t`` and ``slice_index`` come from ``layer_plan``; ``inputs`` are the tensor's names in the experts
        that take part, if they differ from ``tensor`` (stacked layers). Results are shared: do not change them.
        RecipeError E_RECIPE_FIELD if a parameter without a default has no value for this tensor.
        """
        return self._resolver(tensor, t, slice_index, inputs)

    # -- as data --------------------------------------------------------------------------------------

    def to_data(self) -> dict[str, Any]:
        """Plain data without what is at its default; ``Recipe.parse`` gives an equal recipe back."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        first = {k: data[k] for k in ("base", "experts", "method") if k in data}
        return {"amalgam": self.amalgam, **first, **data}

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Recipe:
        """A changed recipe, checked like any other (pydantic's own would keep stale answers)."""
        return self.parse({**self.model_dump(mode="json"), **(update or {})})

    def canonical_json(self) -> str:
        """One text per meaning: all fields, sorted, without spaces. Enters the plan's hash."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _fields_at(path: Path) -> list[str]:
    """Names of the fields of the part of a recipe at ``path``, for suggestions."""
    where = tuple(p for p in path if not isinstance(p, int))
    if where[:2] == ("tokenizer", "tokens"):
        return list((TokenSource if len(where) > 3 else TokenRule).model_fields)
    parts: dict[tuple[str, ...], type[Part]] = {
        (): Recipe, ("base",): Model, ("experts",): Expert, ("slices",): Slice, ("slices", "sources"): Source,
        ("include",): Include, ("tokenizer",): Tokenizer, ("policies",): Policies,
    }  # fmt: skip
    return list(parts[where].model_fields) if where in parts else []


def _first_problem(error: ValidationError) -> RecipeProblem:
    """pydantic's complaint in our words; an unknown field first, since it explains a missing one."""
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path = tuple(first["loc"])
    message, fix = first["msg"].removeprefix("Value error, "), ""
    if first["type"] == "extra_forbidden":
        message, fix = f"unknown field {quoted(path[-1])}.", suggestion(str(path[-1]), _fields_at(path[:-1]))
    elif first["type"] == "missing":
        message = "this field is missing."
    else:
        message = f"{quoted(first['input'])} does not fit: {message[:1].lower()}{message[1:]}."
    return RecipeProblem("E_RECIPE_FIELD", path, message, "", fix)
