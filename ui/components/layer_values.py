"""A setting seen layer by layer: what a number, a curve over depth or a list of conditions comes to in each layer.

A curve of as many points as there are layers says exactly one number per layer, and a curve whose points are all equal
is a number. So whatever is edited by layer goes back into the recipe as the shortest of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merging.errors import RecipeError
from merging.layer_plan import layer_fraction
from merging.methods import METHODS, get_method
from merging.recipe_parameters import ParameterField, at_depth, check_setting, fields_of

from ..draft import Draft, active, label_of, set_parameter

SHARED = ""
"""Stands for the merge as a whole where the label of an expert could stand."""


@dataclass(frozen=True, slots=True)
class Line:
    """One expert's values (or, ``label`` SHARED, those of the whole merge), from layer 0 on."""

    label: str
    values: list[float | None]
    written: str
    """How the recipe says it: "default", "number", "curve" or "conditions"."""


def parameters_of(method: str | None) -> dict[str, ParameterField]:
    """The numbers of a method that may change with depth: those of the experts, then the shared ones."""
    if method not in METHODS:
        return {}
    kind = get_method(method)
    both = {**fields_of(kind.PerExpert), **{n: f for n, f in fields_of(kind.Shared).items()}}
    return {name: f for name, f in both.items() if f.kind == "number"}


def is_shared(method: str, name: str) -> bool:
    return name not in fields_of(get_method(method).PerExpert)


def lines_of(draft: Draft, name: str, tensors: Sequence[str]) -> list[Line]:
    """``tensors``: of each layer the name of one tensor, by which conditions are looked up."""
    data = active(draft)
    field, common = parameters_of(data.get("method"))[name], data.get("parameters", {})
    if is_shared(data["method"], name):
        return [_line(SHARED, [common], field, tensors)]
    return [_line(label_of(e), [e.get("parameters", {}), common], field, tensors) for e in data["experts"]]


def _line(label: str, levels: Sequence[Mapping[str, Any]], field: ParameterField, tensors: Sequence[str]) -> Line:
    """The nearest level that says something wins, as in the recipe itself."""
    stated = [level[field.name] for level in levels if field.name in level]
    values = []
    for i, tensor in enumerate(tensors):
        t = layer_fraction(i, len(tensors))
        found = next((v for v in (value_at(setting, tensor, t) for setting in stated) if v is not None), field.default)
        values.append(None if found is None else float(found))
    written = "default" if not stated else _written(stated[0])
    return Line(label, values, written)


def value_at(setting: Any, tensor: str, t: float) -> Any:
    """None if it is a list of conditions of which none holds."""
    if not _has_conditions(setting):
        return at_depth(setting, t)
    for condition in setting:
        if condition.get("filter", "") in tensor:
            return at_depth(condition["value"], t)
    return None


def set_line(draft: Draft, name: str, label: str, values: Sequence[float]) -> Draft:
    """Write one number per layer: as a curve, or as a number where all are equal."""
    method = draft["recipe"].get("method")
    field = parameters_of(method).get(name)
    if field is None or not values:
        raise RecipeError("E_RECIPE_FIELD", f"There is no setting {str(name)[:80]!r} to change by layer.")
    rounded = [round(float(v), 6) for v in values]
    setting = check_setting(field, rounded[0] if len(set(rounded)) == 1 else rounded, (name,))
    place = ("parameters", name) if is_shared(str(method), name) else ("experts", label, "parameters", name)
    return set_parameter(draft, place, setting)


def set_range(
    draft: Draft, name: str, labels: Sequence[str], first: int, last: int, value: float, tensors: Sequence[str]
) -> Draft:
    """Give layers ``first`` to ``last`` (both included) of these experts one value; their other layers stay."""
    if not 0 <= first <= last < len(tensors):
        raise RecipeError(
            "E_RECIPE_FIELD",
            f"There are no layers {first} to {last}.",
            f"The model has layers 0 to {len(tensors) - 1}.",
            "Correct the range.",
        )  # fmt: skip
    for line in lines_of(draft, name, tensors):
        if line.label in labels or line.label == SHARED:
            values = list(line.values)
            values[first : last + 1] = [value] * (last + 1 - first)
            if None in values:
                why = "It has no default, and only some of its layers would have a value."
                raise RecipeError("E_RECIPE_FIELD", f"{name} must be set for all layers first.", why)
            draft = set_line(draft, name, line.label, [v for v in values if v is not None])
    return draft


def _has_conditions(setting: Any) -> bool:
    return isinstance(setting, list) and isinstance(setting[0], Mapping)


def _written(setting: Any) -> str:
    return "conditions" if _has_conditions(setting) else "curve" if isinstance(setting, list) else "number"
