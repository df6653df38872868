"""The draft: the recipe while it is being written, as plain data that can be kept, undone, sent and read back.

A draft may be incomplete where a ``Recipe`` may not (no method yet, one expert too few), and knows a little more: which
experts are switched off, which tasks to score on, and the parameters of methods that were left for another one. It is a
JSON value and never changed: every function here takes a draft and returns a new one. Experts are named by their label
(their name, or else their reference), which is unique in a draft.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from merging.errors import RecipeError
from merging.methods import get_method
from merging.recipe import Recipe
from merging.recipe_parameters import check_setting, fields_of
from merging.recipe_parts import MAX_MODELS, RESERVED, check_reference
from merging.recipe_yaml import load_recipe, to_yaml, write_yaml

Draft = dict[str, Any]
"""``recipe`` (the fields of a Recipe; experts always as mappings), ``off`` (labels of the experts that sit out),
``tasks`` (task files to score on), ``kept`` (parameters of other methods, to come back to)."""


DEMO = Path(__file__).resolve().parent.parent / "assets" / "demo"


def empty() -> Draft:
    return {"recipe": {"experts": []}, "off": [], "tasks": [], "kept": {}}


def from_recipe(recipe: Recipe) -> Draft:
    data = recipe.to_data()
    data.pop("amalgam", None)
    return {**empty(), "recipe": {**data, "experts": [as_mapping(expert) for expert in data["experts"]]}}


def demo(method: str = "pcb") -> Draft:
    """The bundled experts with the settings that were chosen for them on validation items."""
    settings = json.loads((DEMO / "settings.json").read_text("utf-8"))
    merge = next(m for m in settings["merges"] if m["method"] == method)
    experts = [
        {"model": str(DEMO / "experts" / name), "name": name, "parameters": dict(merge["experts"])}
        for name in settings["experts"]
    ]
    recipe = {
        "base": str(DEMO / "base"),
        "experts": experts,
        "method": method,
        "parameters": dict(merge["parameters"]),
    }
    tasks = [str(DEMO / "tasks" / f"{name}.jsonl") for name in settings["experts"]]
    return {**empty(), "recipe": recipe, "tasks": tasks}


# -- reading a draft ----------------------------------------------------------------------------------


def active(draft: Draft) -> dict[str, Any]:
    """The recipe's data without the experts that sit out."""
    experts = [e for e in draft["recipe"].get("experts", []) if label_of(e) not in draft["off"]]
    return {**copy.deepcopy(draft["recipe"]), "experts": copy.deepcopy(experts)}


def recipe_of(draft: Draft) -> Recipe:
    """The recipe to run. RecipeError, in words for somebody in front of the workbench, while something is missing."""
    data = active(draft)
    if not data["experts"]:
        why = "All of them are switched off." if draft["recipe"].get("experts") else ""
        raise RecipeError("E_RECIPE_INPUTS", "No expert is chosen yet.", why, "Choose models on the Experts page.")
    if not data.get("method"):
        raise RecipeError("E_RECIPE_METHOD", "No method is chosen yet.", "", "Choose one on the Merge page.")
    return Recipe.parse(data)


def problem_of(draft: Draft) -> RecipeError | None:
    """What keeps this draft from being a recipe."""
    try:
        recipe_of(draft)
    except RecipeError as error:
        return error
    return None


def label_of(expert: Mapping[str, Any]) -> str:
    adapter = expert.get("adapter")
    return expert.get("name") or expert["model"] + (f"+{adapter}" if adapter else "")


def labels(draft: Draft) -> list[str]:
    """Of all experts, also those that sit out, in order."""
    return [label_of(expert) for expert in draft["recipe"].get("experts", [])]


def is_on(draft: Draft, label: str) -> bool:
    return label not in draft["off"]


def yaml_of(draft: Draft) -> str:
    """The active recipe as text; incomplete ones too."""
    try:
        return to_yaml(recipe_of(draft))
    except RecipeError:
        data = active(draft)
        return write_yaml({"amalgam": 1, **{k: v for k, v in data.items() if v not in (None, {}, [])}})


def from_yaml(text: str, keep: Draft | None = None) -> Draft:
    """The draft that a recipe's text means; RecipeError with line and column. Of ``keep`` stay the tasks and the
    experts that sit out."""
    return read_text(text, keep)[0]


def read_text(text: str, keep: Draft | None = None) -> tuple[Draft, list[str]]:
    """``from_yaml``, and what was understood differently from how mergekit would."""
    loaded = load_recipe(text + "\n")  # with a line break it is text for sure, and never the name of a file
    draft = from_recipe(loaded.recipe)
    if keep is not None:
        resting = [e for e in keep["recipe"].get("experts", []) if label_of(e) in keep["off"]]
        new = [copy.deepcopy(e) for e in resting if label_of(e) not in labels(draft)]
        draft["recipe"]["experts"] += new
        draft.update(off=[label_of(e) for e in new], tasks=list(keep["tasks"]), kept=copy.deepcopy(keep["kept"]))
    return draft, loaded.notes


# -- changing it --------------------------------------------------------------------------------------


def set_base(draft: Draft, model: str | None, adapter: str | None = None) -> Draft:
    return set_parameter(draft, ("base",), {"model": model, "adapter": adapter} if adapter else model)


def set_parameter(draft: Draft, path: Sequence[str | int], value: Any) -> Draft:
    """Set one field of the recipe: ("parameters", "lambda"), ("experts", "sort", "parameters", "weight"), ("dtype",).
    Experts by label or position. None takes the field out, which means its default."""
    new = copy.deepcopy(draft)
    place: Any = new["recipe"]
    for step in path[:-1]:
        place = place[_position(new, step)] if isinstance(place, list) else place.setdefault(step, {})
    if value is None:
        place.pop(path[-1], None)
    else:
        place[path[-1]] = value
    return new


def set_method(draft: Draft, method: str) -> Draft:
    """Change the method. Parameters that the new one has too stay if they fit; those of the old one are kept aside
    and come back with it."""
    new = copy.deepcopy(draft)
    recipe, before = new["recipe"], new["recipe"].get("method")
    kind = get_method(method)
    shared, own = fields_of(kind.Shared), fields_of(kind.PerExpert)
    if before and before != method:
        new["kept"][before] = {
            "parameters": recipe.get("parameters", {}),
            "experts": {label_of(e): e.get("parameters", {}) for e in recipe["experts"]},
        }
    kept = new["kept"].pop(method, {"parameters": {}, "experts": {}}) if before != method else {}
    both = {**shared, **own}  # what every expert may have, the recipe may state for all of them
    recipe["method"] = method
    recipe["parameters"] = {**_fitting(recipe.get("parameters", {}), both), **kept.get("parameters", {})}
    for expert in recipe["experts"]:
        mine = kept.get("experts", {}).get(label_of(expert), {})
        expert["parameters"] = {**_fitting(expert.get("parameters", {}), own), **mine}
    return new


def add_expert(
    draft: Draft,
    model: str,
    name: str | None = None,
    adapter: str | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Draft:
    """One more expert, last. Without a name it gets the last part of its path, made unique."""
    new = copy.deepcopy(draft)
    experts = new["recipe"].setdefault("experts", [])
    if len(experts) >= MAX_MODELS:
        raise RecipeError("E_RECIPE_INPUTS", f"A recipe has at most {MAX_MODELS} experts.")
    for text in filter(None, (model, adapter)):
        check(check_reference, text)
    wanted = name or re.sub(r"[^\w.-]+", "-", Path((adapter or model).split("@")[0]).name)[:60].strip("-") or "expert"
    taken = {*labels(draft), *RESERVED}
    unique = next(n for n in (wanted, *(f"{wanted}-{i}" for i in range(2, MAX_MODELS + 3))) if n not in taken)
    entry = {"model": model, "adapter": adapter, "name": unique, "parameters": dict(parameters or {})}
    experts.append({k: v for k, v in entry.items() if v is not None})
    return new


def remove_expert(draft: Draft, label: str) -> Draft:
    new = copy.deepcopy(draft)
    del new["recipe"]["experts"][_position(new, label)]
    new["off"] = [name for name in new["off"] if name != label]
    return new


def move_expert(draft: Draft, label: str, by: int) -> Draft:
    """``by`` places down (or, negative, up), as far as there are places."""
    new = copy.deepcopy(draft)
    experts = new["recipe"]["experts"]
    place = _position(new, label)
    experts.insert(max(0, min(len(experts) - 1, place + by)), experts.pop(place))
    return new


def enable(draft: Draft, label: str, on: bool) -> Draft:
    """Let an expert take part, or sit out with all its settings."""
    _position(draft, label)
    rest = [name for name in draft["off"] if name != label]
    return {**copy.deepcopy(draft), "off": rest if on else [*rest, label]}


def set_tasks(draft: Draft, tasks: Sequence[str]) -> Draft:
    return {**copy.deepcopy(draft), "tasks": list(tasks)}


def with_absolute_paths(draft: Draft, folder: Path) -> Draft:
    """References that are files or folders seen from ``folder``, as absolute paths: the workbench works elsewhere."""

    def absolute(reference: str) -> str:
        path = folder / Path(reference).expanduser()
        return str(path.absolute()) if path.exists() else reference

    new = copy.deepcopy(draft)
    recipe, renamed = new["recipe"], {}
    for part in [p for p in [*recipe["experts"], recipe.get("base")] if isinstance(p, dict)]:
        before = label_of({**part, "name": None})
        part.update({key: absolute(part[key]) for key in ("model", "adapter") if part.get(key)})
        renamed[before] = label_of({**part, "name": None})
    if isinstance(recipe.get("base"), str):
        renamed[recipe["base"]] = recipe["base"] = absolute(recipe["base"])
    names = {expert.get("name") for expert in recipe["experts"]}
    for part in recipe.get("slices") or []:
        for source in part["sources"]:
            if source["model"] not in names:
                source["model"] = renamed.get(source["model"], source["model"])
    return new


# -- helpers ------------------------------------------------------------------------------------------


def as_mapping(expert: Any) -> dict[str, Any]:
    if isinstance(expert, str):
        return {"model": expert}
    if not isinstance(expert, Mapping) or not isinstance(expert.get("model"), str):
        raise RecipeError("E_RECIPE_READ", "This is not a recipe: an expert has no model.")
    return dict(expert)


def _position(draft: Draft, label: str | int) -> int:
    names = labels(draft)
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    if label not in names:
        raise RecipeError("E_RECIPE_INPUTS", f"There is no expert {str(label)[:80]!r} any more.")
    return names.index(str(label))


def _fitting(settings: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that the fields allow."""
    fit = {}
    for name, value in settings.items():
        if name in fields:
            try:
                check_setting(fields[name], value, (name,))
            except RecipeError:
                continue
            fit[name] = value
    return fit


def check(action: Callable[[Any], Any], value: Any, what: str = "A model cannot be named like that") -> None:
    """``action(value)``, with its complaint as a RecipeError."""
    try:
        action(value)
    except ValueError as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise RecipeError("E_RECIPE_FIELD", f"{what}.", f"{why[:200]}.") from None
