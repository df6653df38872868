"""Parameter values that may change with depth and name, and how one value is found for one tensor.

A value in a recipe is one of three things:

* a scalar: ``0.5``, ``true``, or a word such as ``global`` for parameters that are a choice;
* a depth gradient: ``[0, 0.3, 1]``, piecewise linear over the layer fraction t, from 0 in the first
  block to 1 in the last;
* a list of conditions: ``[{filter: mlp, value: 0.5}, {value: [0, 1]}]``. The first one whose filter is a
  substring of the tensor's name wins; without a filter (or with ``*``) it always does.

A parameter can be set at several levels (an expert, a slice, the whole recipe). The nearest level that
yields a value wins; a list of conditions of which none holds yields nothing, so the next level is asked,
and finally the method's default. That is mergekit's rule, measured in
``tests/oracles/measure_mergekit_parameters.py``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from .errors import RecipeError

Path = tuple[Any, ...]
"""Where in the recipe: field names and list positions, such as ("experts", 1, "parameters")."""

NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]{0,63})(\.[0-9]{0,64})?|\.[0-9]{1,64})([eE][-+]?[0-9]{1,4})?")
"""Decimal numbers without leading zeros: 1, -0.5, .5, 1e-3. Not 010 (is it 8?), 1_000, 0x1F, 1:30."""


def path_text(path: Path) -> str:
    """("experts", 1, "model") -> "experts[1].model"."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{str(part)[:80]}"
    return text or "the recipe"


def quoted(value: Any) -> str:
    """A value for an error message: printable and short, whatever it is."""
    try:
        text = ascii(value[:100] if isinstance(value, str | list) else value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return "a number with very many digits"
    return text if len(text) <= 80 else text[:77] + "..."


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """'Did you mean "density"? Known: density, weight.'"""
    names = sorted(known)
    close = difflib.get_close_matches(str(wrong)[:64], names, 1, 0.6)
    guess = f'Did you mean "{close[0]}"? ' if close else ""
    return f"{guess}Known here: {', '.join(names)}." if names else f"{guess}Nothing can be set here."


class RecipeProblem(RecipeError):
    """A recipe error that knows its place, so that whoever has read the text can add line and column."""

    def __init__(
        self, path: Path, message: str, why: str = "", fix: str = "", code: str = "E_RECIPE_FIELD"
    ) -> None:
        super().__init__(code, f"{path_text(path)}: {message}", why, fix)
        self.path, self.message = path, message


@dataclass(frozen=True)
class ParameterField:
    """One parameter of a method, as read from its pydantic model."""

    name: str
    kind: str
    """"number", "switch" (true or false) or "choice" (one word of several)."""
    required: bool
    default: Any
    adapter: TypeAdapter[Any]

    def scalar(self, value: Any, path: Path) -> Any:
        """``value`` in the parameter's own type, within its bounds; RecipeError otherwise."""
        if self.kind == "number" and isinstance(value, str):
            value = number(value)
        try:
            if self.kind == "number" and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if value is None:  # a default may be None, but None cannot be asked for
                raise ValueError("leave the parameter out instead")
            return self.adapter.validate_python(value)
        except OverflowError:
            reason = "the number is too large"
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
        except ValueError as error:
            reason = str(error)
        fix = "Write true or false." if self.kind == "switch" else ""
        raise RecipeProblem(path, f"{quoted(value)} is not a value for {self.name}.", reason, fix)


def number(text: str) -> float | str:
    """The number that a text is (also "1e-3", which YAML 1.1 takes for text), or the text itself."""
    return float(text) if NUMBER.fullmatch(text) else text


def _kind(annotation: Any) -> str:
    options = [a for a in get_args(annotation) if a is not type(None)]
    if get_origin(annotation) is not Literal and len(options) == 1:  # Optional[...]
        annotation = options[0]
    return "switch" if annotation is bool else "number" if annotation in (int, float) else "choice"


@lru_cache(maxsize=256)
def fields_of(model: type[BaseModel]) -> dict[str, ParameterField]:
    """The parameters of ``Method.Shared`` or ``Method.PerExpert``, by the names that recipes use."""
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    result = {}
    for key, field in model.model_fields.items():
        name = field.alias or key
        annotation: Any = field.annotation
        if field.metadata:
            with_bounds = (annotation, *field.metadata)
            annotation = Annotated[with_bounds]
        result[name] = ParameterField(
            name,
            _kind(field.annotation),
            field.is_required(),
            None if field.is_required() else field.get_default(call_default_factory=True),
            TypeAdapter(annotation, config=strict),
        )
    return result


def check_setting(field: ParameterField, value: Any, path: Path) -> Any:
    """A setting in its normal form: every number a float, every scalar checked against type and bounds."""
    if not isinstance(value, list):
        if isinstance(value, Mapping):
            raise RecipeProblem(
                path, "a mapping is not a value.", fix="Conditions go in a list: [{filter: mlp, value: 1}]."
            )
        return field.scalar(value, path)
    if not value:
        raise RecipeProblem(path, "an empty list has no value.")
    if not any(isinstance(item, Mapping) for item in value):
        return _gradient(field, value, path)
    if field.kind == "choice":
        raise RecipeProblem(path, f"{field.name} is one choice for the whole merge, not a list.")
    return [_condition(field, item, (*path, i)) for i, item in enumerate(value)]


def _gradient(field: ParameterField, values: list[Any], path: Path) -> list[Any]:
    if field.kind != "number":
        raise RecipeProblem(
            path, f"{field.name} cannot change with depth.", "Only numbers can be interpolated."
        )
    return [field.scalar(v, (*path, i)) for i, v in enumerate(values)]


def _condition(field: ParameterField, item: Any, path: Path) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise RecipeProblem(
            path, f"{quoted(item)} stands among conditions.", "A list holds numbers or conditions, not both."
        )
    for key in item:
        if key not in ("filter", "value"):
            raise RecipeProblem(
                (*path, key), "unknown field of a condition.", fix=suggestion(key, ("filter", "value"))
            )
    if "value" not in item:
        raise RecipeProblem(path, "the condition has no value.")
    wanted = item.get("filter")
    if wanted is not None and not (isinstance(wanted, str) and 0 < len(wanted) <= 200):
        raise RecipeProblem((*path, "filter"), f"{quoted(wanted)} is not a part of a tensor's name.")
    value = item["value"]
    if isinstance(value, list) and any(isinstance(v, Mapping | list) for v in value):
        raise RecipeProblem((*path, "value"), "conditions cannot be nested.")
    checked = check_setting(field, value, (*path, "value"))
    return {"value": checked} if wanted in (None, "*") else {"filter": wanted, "value": checked}


def check_parameters(
    parameters: dict[str, Any], known: Mapping[str, ParameterField], path: Path, elsewhere: Mapping[str, str]
) -> None:
    """Bring all settings of one level into normal form, in place. ``elsewhere``: name -> where it belongs."""
    for name, value in parameters.items():
        if name not in known:
            raise RecipeProblem(
                (*path, name),
                f'unknown parameter "{str(name)[:80]}".',
                elsewhere.get(name, ""),
                suggestion(name, known),
            )
        parameters[name] = check_setting(known[name], value, (*path, name))


def at_depth(value: Any, t: float) -> Any:
    """A scalar as it is; a gradient at layer fraction t (0 to 1)."""
    if not isinstance(value, list):
        return value
    position = t * (len(value) - 1)
    left = int(position)
    right = min(len(value) - 1, left + 1)
    part = position - left
    return (1 - part) * value[left] + part * value[right]


class Resolved(NamedTuple):
    """The parameters of one tensor. Shared between tensors: do not change them."""

    shared: dict[str, Any]
    experts: list[dict[str, Any]]
    """One per expert that takes part, in order."""


@dataclass(frozen=True)
class Level:
    """What holds in one output slice (or in the whole model): settings, nearest level first."""

    shared: Sequence[Mapping[str, Any]]
    experts: Sequence[Sequence[Mapping[str, Any]]]
    labels: Sequence[str]


class Resolver:
    """Finds the parameters of tensors. Fast: names matter only through which filters match them.

    Tensors at the same depth whose names match the same filters share one result, so a model of 60,000
    tensors costs as many substring searches and dictionary look-ups, not evaluations.
    """

    def __init__(
        self,
        shared: Mapping[str, ParameterField],
        per_expert: Mapping[str, ParameterField],
        level: Callable[[int | None], Level],
        filters: Iterable[str],
    ) -> None:
        self._shared, self._per_expert, self._level = shared, per_expert, level
        self._filters = tuple(sorted(set(filters)))
        self._cache: dict[Any, Resolved] = {}

    def _matches(self, name: str) -> tuple[bool, ...]:
        return tuple([f in name for f in self._filters])

    def __call__(
        self,
        tensor: str,
        t: float | None = None,
        slice_index: int | None = None,
        inputs: Sequence[str] | None = None,
    ) -> Resolved:
        """Parameters of the output tensor ``tensor`` at layer fraction ``t`` (None, outside of blocks: 0).

        ``inputs`` are the names that the tensor has in each expert, if layers are stacked and the names
        differ: the experts' own parameters are looked up by those, the shared ones by the output's name.
        """
        if not self._filters:
            key: Any = (slice_index, t)
        elif inputs is None or all(name == tensor for name in inputs):
            key = (slice_index, t, self._matches(tensor))
        else:
            known = {name: self._matches(name) for name in {tensor, *inputs}}
            key = (slice_index, t, known[tensor], tuple([known[name] for name in inputs]))
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = self._find(tensor, t or 0.0, self._level(slice_index), inputs)
        return found

    def _find(self, tensor: str, t: float, level: Level, inputs: Sequence[str] | None) -> Resolved:
        names = inputs if inputs is not None else [tensor] * len(level.experts)
        if len(names) != len(level.experts):
            raise ValueError(f"{len(names)} input names for {len(level.experts)} experts")
        shared = {n: self._value(f, level.shared, tensor, t, "") for n, f in self._shared.items()}
        experts = [
            {n: self._value(f, settings, name, t, label) for n, f in self._per_expert.items()}
            for settings, name, label in zip(level.experts, names, level.labels, strict=True)
        ]
        return Resolved(shared, experts)

    def _value(
        self, field: ParameterField, levels: Sequence[Mapping[str, Any]], tensor: str, t: float, label: str
    ) -> Any:
        for settings in levels:
            if field.name not in settings:
                continue
            setting = settings[field.name]
            if not (isinstance(setting, list) and isinstance(setting[0], Mapping)):
                return at_depth(setting, t)
            for condition in setting:
                if condition.get("filter", "") in tensor:
                    return at_depth(condition["value"], t)
        if field.required:
            raise missing_parameter(field.name, label, tensor=tensor)
        return field.default


def missing_parameter(name: str, label: str, path: Path = ("parameters",), tensor: str = "") -> RecipeProblem:
    """The error for a parameter without a value, for one expert and perhaps only some tensors."""
    whom = f" of {quoted(label)}" if label else ""
    if tensor:
        why = "None of its conditions matches the name, and the method has no default."
        fix = "Add a last condition without a filter: {value: ...}."
        return RecipeProblem(path, f"{name}{whom} has no value for the tensor {tensor}.", why, fix)
    fix = f"Add {name} {'there, or under parameters of the recipe' if label else 'under parameters'}."
    return RecipeProblem(path, f"{name}{whom} has no value.", "The method has no default for it.", fix)


def filters_in(parameters: Mapping[str, Any]) -> list[str]:
    """All filter texts in one level's settings."""
    return [
        item["filter"]
        for setting in parameters.values()
        if isinstance(setting, list)
        for item in setting
        if isinstance(item, Mapping) and "filter" in item
    ]
