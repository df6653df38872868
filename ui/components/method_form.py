"""The settings of a method as controls, made from the method's own parameter fields.

Nothing here knows a method: names, kinds, bounds, help and what is required come from its two pydantic models, so a new
method has its controls at once. The form is one component: Python says what there is to set and what holds now, the
script draws it, and each change comes back as (scope, expert, name, value) and is checked against the same fields.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import annotated_types
import gradio as gr
from pydantic import BaseModel

from merging.errors import RecipeError
from merging.methods import METHODS, get_method
from merging.recipe_parameters import ParameterField, check_setting, fields_of

from ..context import ROOT
from ..draft import Draft, is_on, label_of, set_parameter
from .own import no_stub_file

TEMPLATE = '<div class="method-form"></div>'
USUAL = (0.0, 2.0)
"""Where sliders of numbers without bounds end; the box beside them takes any number."""

with no_stub_file():

    class MethodForm(gr.HTML):
        """Its value is ``form_of(draft)``. ``form.set(fn)``: ``event.change`` is what ``changed`` takes;
        ``form.by_layer(fn)``: ``event.name`` is a setting to be opened in the editor of layers."""

        def __init__(self, value: str = "", **others: Any) -> None:
            script = (ROOT / "assets" / "method_form.js").read_text("utf-8")
            super().__init__(
                value=value, html_template=TEMPLATE, js_on_load=script, apply_default_css=False, padding=False, **others
            )

        def get_block_name(self) -> str:
            return "html"


def form_of(draft: Draft) -> str:
    """What the script draws, as JSON: {shared: [field with value], own: [field], rows: [{label, on, values}]}."""
    method = draft["recipe"].get("method")
    if method not in METHODS:
        return ""
    kind, common = get_method(method), draft["recipe"].get("parameters", {})
    shared, own = fields_of(kind.Shared), fields_of(kind.PerExpert)
    experts = draft["recipe"]["experts"]
    data = {
        "method": kind.title,
        "shared": [_described(f, kind.Shared) | {"value": common.get(name, f.default)} for name, f in shared.items()],
        "own": [_described(f, kind.PerExpert) for f in own.values()],
        "rows": [
            {
                "label": label_of(e),
                "name": _short(e),
                "on": is_on(draft, label_of(e)),
                "values": values_of(e, common, own),
            }
            for e in experts
        ],
    }
    return json.dumps(data)


def values_of(expert: dict[str, Any], common: dict[str, Any], own: dict[str, ParameterField]) -> dict[str, Any]:
    """What holds for an expert: its own setting, else the recipe's, else the default."""
    mine = expert.get("parameters", {})
    return {name: mine.get(name, common.get(name, f.default)) for name, f in own.items()}


def changed(draft: Draft, change: Any) -> Draft:
    """The draft after a change that the script told: {scope: "shared", "all" or "expert", expert, name, value}. A value
    of None means the default. RecipeError for anything that the form could not have sent."""
    if not isinstance(change, dict) or draft["recipe"].get("method") not in METHODS:
        raise RecipeError("E_RECIPE_FIELD", "There is no such setting.")
    scope, name, value = change.get("scope"), change.get("name"), change.get("value")
    kind = get_method(draft["recipe"]["method"])
    field = fields_of(kind.Shared if scope == "shared" else kind.PerExpert).get(str(name))
    if field is None or scope not in ("shared", "all", "expert"):
        raise RecipeError("E_RECIPE_FIELD", f"{kind.title} has no setting {str(name)[:80]!r} any more.")
    if value is not None:
        value = check_setting(field, value, (field.name,))
    if scope == "shared":
        return set_parameter(draft, ("parameters", field.name), value)
    if scope == "expert":
        return set_parameter(draft, ("experts", str(change.get("expert")), "parameters", field.name), value)
    return for_all(draft, field.name, value)


def for_all(draft: Draft, name: str, value: Any) -> Draft:
    """Give every expert the same setting of its own (None: the default)."""
    new = copy.deepcopy(draft)
    new["recipe"].get("parameters", {}).pop(name, None)
    for expert in new["recipe"]["experts"]:
        expert.setdefault("parameters", {}).pop(name, None)
        if value is not None:
            expert["parameters"][name] = copy.deepcopy(value)
    return new


def bounds_of(name: str, model: type[BaseModel]) -> dict[str, float]:
    """The hard bounds of a number: {"ge": 0, "lt": 0.5}."""
    info = next(f for key, f in model.model_fields.items() if (f.alias or key) == name)
    found: dict[str, float] = {}
    for part in info.metadata:
        for kind in ("ge", "gt", "le", "lt"):
            if isinstance(part, getattr(annotated_types, kind.capitalize())):
                found[kind] = float(getattr(part, kind))
    return found


def _described(field: ParameterField, model: type[BaseModel]) -> dict[str, Any]:
    info = next(f for key, f in model.model_fields.items() if (f.alias or key) == field.name)
    shown = {
        "name": field.name,
        "label": "λ (lambda)" if field.name == "lambda" else field.name,
        "kind": field.kind,
        "help": info.description or "",
        "required": field.required,
        "default": field.default,
    }
    if field.kind == "choice":
        shown["choices"] = _choices(field)
    if field.kind == "number":
        bounds = bounds_of(field.name, model)
        low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
        tiny = isinstance(field.default, float) and 0 < field.default < 1e-3
        ends = None if tiny else [USUAL[0] if low is None else low, USUAL[1] if high is None else high]
        step = 0.05 if ends is None or ends[1] - ends[0] > 1 else 0.01 if ends[1] - ends[0] > 0.5 else 0.005
        shown |= {"low": low, "high": high, "above": "gt" in bounds, "below": "lt" in bounds, "slider": ends}
        shown |= {"step": step, "hint": HINTS.get((field.name, _plain(high)), "")}
    return shown


HINTS = {("density", "1"): "1 keeps every entry: nothing is trimmed or dropped."}
"""(name, value) -> what that value means although nothing looks wrong. Shown while the value is chosen."""


def _choices(field: ParameterField) -> list[str]:
    schema = field.adapter.json_schema()
    return [str(word) for word in schema.get("enum", [schema.get("const")])]


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _short(expert: dict[str, Any]) -> str:
    name = expert.get("name")
    return str(name) if name else label_of(expert).rstrip("/").rsplit("/", 1)[-1]
