"""What the Experts page does to the draft: choosing models, renaming and weighing them, and the doctor's remedies."""

from __future__ import annotations

import copy
import math
from typing import Any

from merging.errors import InputError, RecipeError
from merging.methods import METHODS, get_method
from merging.preflight_fixes import Fix
from merging.recipe import Recipe
from merging.recipe_parameters import fields_of
from merging.recipe_parts import Expert

from ..draft import (
    Draft,
    add_expert,
    enable,
    from_recipe,
    label_of,
    labels,
    remove_expert,
    set_base,
    set_parameter,
)


def choose_expert(draft: Draft, reference: str, adapter_bases: tuple[str, ...] | None = None) -> Draft:
    """One more expert. ``adapter_bases``: it is an adapter, and names these as its base; None: it is a model."""
    parameters = _like_the_others(draft)
    if adapter_bases is None:
        return add_expert(draft, reference, parameters=parameters)
    base = draft["recipe"].get("base")
    on = base["model"] if isinstance(base, dict) else base
    if on is None and adapter_bases:
        on = adapter_bases[0]
        draft = set_base(draft, on)
    if on is None:
        raise InputError(
            "E_ADAPTER",
            "This is an adapter, and it does not say of which model.",
            "An adapter changes a base model, and the recipe has none yet.",
            "Choose the base first, then add the adapter.",
        )
    return add_expert(draft, on, adapter=reference, parameters=parameters)


def choose_base(draft: Draft, reference: str) -> Draft:
    """Another base; experts that are adapters move to it."""
    before = draft["recipe"].get("base")
    old = before["model"] if isinstance(before, dict) else before
    new = set_base(draft, reference)
    moved = {}
    for expert in new["recipe"]["experts"]:
        if expert.get("adapter") and expert["model"] == old:
            label = label_of(expert)
            expert["model"] = reference
            moved[label] = label_of(expert)
    new["off"] = [moved.get(label, label) for label in new["off"]]
    return new


def as_adapter(draft: Draft, label: str) -> Draft:
    """The expert's model turned out to be an adapter: put it on the base."""
    base = draft["recipe"].get("base")
    on = base["model"] if isinstance(base, dict) else base
    if on is None:
        raise InputError("E_ADAPTER", "There is no base to put the adapter on.", "", "Choose the base first.")
    new = copy.deepcopy(draft)
    expert = next((e for e in new["recipe"]["experts"] if label_of(e) == label), None)
    if expert is not None:
        expert.update(model=on, adapter=expert["model"])
        new["off"] = [label_of(expert) if off == label else off for off in new["off"]]
    return new


def restored(data: dict[str, Any], draft: Draft) -> Draft:
    """The recipe of a merged model; the tasks stay."""
    return {**from_recipe(Recipe.parse(data)), "tasks": list(draft["tasks"]), "kept": copy.deepcopy(draft["kept"])}


def rename(draft: Draft, label: str, name: str) -> Draft:
    """Give an expert another name, here and wherever the recipe speaks of it. "": its reference names it."""
    name = " ".join(name.split())
    if name == label:
        return draft
    place = labels(draft).index(label) if label in labels(draft) else None
    if place is None:
        raise RecipeError("E_RECIPE_INPUTS", f"There is no expert {label[:80]!r} any more.")
    new = copy.deepcopy(draft)
    expert = new["recipe"]["experts"][place]
    expert.pop("name", None)
    if name:
        expert["name"] = name
    called = label_of(expert)
    if labels(new).count(called) > 1:
        raise RecipeError("E_RECIPE_FIELD", f"Another expert is called {called[:80]!r}.", "", "Choose another name.")
    try:
        Expert.model_validate(expert)
    except ValueError:
        why = "A name has at most 64 characters on one line, and is not auto, base, none, union or zero."
        raise RecipeError("E_RECIPE_FIELD", f"{name[:80]!r} cannot be a name.", why, "Choose another name.") from None
    new["off"] = [called if off == label else off for off in new["off"]]
    for kept in new["kept"].values():
        if label in kept.get("experts", {}):
            kept["experts"][called] = kept["experts"].pop(label)
    _rename_in_recipe(new["recipe"], label, called)
    return new


def _rename_in_recipe(recipe: dict[str, Any], old: str, new: str) -> None:
    if recipe.get("chat_template") == old:
        recipe["chat_template"] = new
    tokenizer = recipe.get("tokenizer") or {}
    if tokenizer.get("source") == old:
        tokenizer["source"] = new
    for rule in (tokenizer.get("tokens") or {}).values():
        source = rule.get("source") if isinstance(rule, dict) else None
        if source == old:
            rule["source"] = new
        elif isinstance(source, dict) and source.get("model") == old:
            source["model"] = new
    for part in recipe.get("slices") or []:
        for source in part.get("sources", []):
            if source.get("model") == old:
                source["model"] = new


def takes_weight(draft: Draft) -> bool:
    """Does the method have a weight for each expert? Without a method yet: most have."""
    method = draft["recipe"].get("method")
    return method not in METHODS or "weight" in fields_of(get_method(method).PerExpert)


def weight_of(expert: dict[str, Any]) -> Any:
    """A number, None if it is not stated, or what stands for several numbers."""
    return expert.get("parameters", {}).get("weight")


def usual_weight(draft: Draft) -> float | None:
    """What holds for an expert without a weight of its own: the recipe's, else the method's default, if it has one."""
    method, stated = draft["recipe"].get("method"), draft["recipe"].get("parameters", {}).get("weight")
    if stated is None and method in METHODS and takes_weight(draft):
        stated = fields_of(get_method(method).PerExpert)["weight"].default
    return float(stated) if isinstance(stated, int | float) else None


def set_weight(draft: Draft, label: str, typed: str) -> Draft:
    return set_parameter(draft, ("experts", label, "parameters", "weight"), weight_from(typed))


def set_all_weights(draft: Draft, typed: str) -> Draft:
    """The same weight for all experts that take part."""
    value = weight_from(typed)
    for label in labels(draft):
        if label not in draft["off"]:
            draft = set_parameter(draft, ("experts", label, "parameters", "weight"), value)
    return draft


def weight_from(typed: str) -> float | None:
    """A number; None for nothing, which means the method's or the recipe's own."""
    if not typed.strip():
        return None
    try:
        value = float(typed.replace(",", "."))
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or abs(value) > 1e6:
        raise RecipeError("E_RECIPE_FIELD", f"{typed[:40]!r} is not a weight.", "", "Type a number, such as 0.4.")
    return value


def apply_fix(draft: Draft, fix: Fix) -> Draft:
    """What the doctor offers. Raises as the functions of ui.draft do, if the draft has changed meanwhile."""
    if fix.action == "base":
        return choose_base(draft, fix.model)
    if fix.action == "remove":
        return remove_expert(draft, fix.model)
    if fix.action == "rest":
        return enable(draft, fix.model, False)
    if fix.action == "adapter":
        return as_adapter(draft, fix.model)
    for place, value in fix.changes if fix.action == "set" else ():
        draft = set_parameter(draft, place, value)
    return draft


def _like_the_others(draft: Draft) -> dict[str, Any]:
    """The parameters of a new expert: those of the last one, or the method's need for a weight."""
    experts = draft["recipe"]["experts"]
    if experts:
        return copy.deepcopy(experts[-1].get("parameters", {}))
    method = draft["recipe"].get("method")
    if method not in METHODS or "weight" in draft["recipe"].get("parameters", {}):
        return {}
    field = fields_of(get_method(method).PerExpert).get("weight")
    return {"weight": 1.0} if field is not None and takes_weight(draft) else {}
