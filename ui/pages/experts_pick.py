"""Where models come from: the cache of the Hub, a search on the Hub, and paths of this computer."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

from merging.checkpoints.hub import parse_reference
from merging.checkpoints.hub_cache import CachedModel, cached_models
from merging.checkpoints.hub_search import FoundModel, search_models
from merging.errors import AmalgamError, InputError
from merging.model_facts import RECIPES, describe, models_in
from merging.recipe_yaml import load_recipe

from ..components.cards import text
from ..components.model_picker import Entry, entry_of_cache, entry_of_facts, entry_of_hub, picker
from ..context import App
from ..draft import Draft, from_recipe, label_of, with_absolute_paths
from ..permits import check_permitted, find_permitted
from .experts_edit import choose_base, choose_expert, restored

MOST_SHOWN = 30


class Sources:
    """What was found so far, so that a choice need not be looked up again."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.found: OrderedDict[str, FoundModel] = OrderedDict()

    # -- the Hub ------------------------------------------------------------------------------------------

    def cached(self, words: str) -> str:
        """The models in the cache whose names hold ``words``. Strangers on a Space do not see what others fetched."""
        models = [] if self.app.on_space else [m for m in cached_models() if words.strip().lower() in m.repo_id.lower()]
        return picker([*self._named(words, models), *map(entry_of_cache, models[:MOST_SHOWN])], self._none(words),
                      "Models of the Hub on this computer")  # fmt: skip

    def _named(self, words: str, models: list[CachedModel]) -> list[Entry]:
        """What was typed, if it is the whole name of a model that is not listed anyway."""
        name = words.strip()
        if name.count("/") != 1 or any(name in (m.repo_id, m.reference) for m in models):
            return []
        try:
            known = parse_reference(name).kind == "hub"
        except AmalgamError:
            return []
        return [Entry(name, name, ("by its name; a download is offered after",))] if known else []

    def _none(self, words: str) -> str:
        if self.app.on_space:
            return "Type a part of a model's name and press “Search the Hub”, or type the whole name, as org/name."
        there = f"No model here has “{words.strip()[:60]}” in its name." if words.strip() else ""
        there = there or "No model of the Hub is on this computer yet."
        return f"{there} Press “Search the Hub”, or type a whole name, as org/name."

    def search(self, words: str, adapters: bool) -> str:
        """Ask the Hub. Raises what ``search_models`` raises."""
        models = search_models(words, adapters)
        for model in models:
            self.found[model.repo_id] = model
        while len(self.found) > 2000:
            self.found.popitem(last=False)
        what = "adapter" if adapters else "model"
        empty = f"The Hub has no {what} with safetensors weights of this name. Try fewer words."
        return picker([entry_of_hub(model) for model in models], empty, "Found on the Hub")

    # -- paths --------------------------------------------------------------------------------------------

    def at_path(self, typed: str) -> str:
        """What lies at a path: a model, an adapter, a recipe, or a folder of these. Raises InputError, RecipeError."""
        path = self.path_of(typed)
        if path.suffix.lower() in RECIPES and path.is_file():
            return picker([_entry_of_recipe(path)], "", "Recipe")
        try:
            return picker([entry_of_facts(str(path), path.name, describe(path))], "", "Model")
        except InputError as error:
            inside = models_in(path) if path.is_dir() and error.code == "E_NOT_A_MODEL" else []
            if not inside:
                raise
        entries = [_entry_of(one) for one in inside]
        several = [entry for entry in entries if ("expert", "Add as expert") in entry.actions]
        if len(several) > 1:
            every = Entry(str(path), f"{path.name}: {len(several)} models", (), (), (("all", "Add all as experts"),))
            entries = [every, *entries]
        return picker(entries, "", "Models in this folder")

    def path_of(self, typed: str) -> Path:
        """The absolute path that was typed; InputError with what to do if there is nothing."""
        typed = typed.strip().strip("'\"")
        if not typed:
            raise InputError("E_NOT_FOUND", "No path was typed.", "", "Type the path of a folder or file.")
        check_permitted(self.app, typed)
        path = Path(os.path.expanduser(typed))
        if not path.is_absolute():
            fix = "Type the whole path, from / or ~. A model of the Hub is chosen with “Choose from the Hub”."
            raise InputError("E_NOT_FOUND", f"{typed[:120]!r} is no whole path.", "", fix)
        parse_reference(str(path))  # says what may have been meant
        return path

    # -- choosing -----------------------------------------------------------------------------------------

    def choose(self, draft: Draft, act: str, reference: str) -> tuple[Draft, str]:
        """The draft with what was chosen, and a sentence about it (plain text)."""
        check_permitted(self.app, reference)
        short = reference.rstrip("/").split("/")[-1]
        if act == "base":
            return choose_base(draft, reference), f"{short} is the base."
        if act == "expert":
            new = choose_expert(draft, reference, self.adapter_bases(reference))
            return new, f"{label_of(new['recipe']['experts'][-1])} is an expert."
        if act == "all":
            for path in models_in(self.path_of(reference)):
                if ("expert", "Add as expert") in _entry_of(path).actions:
                    draft = choose_expert(draft, str(path), self.adapter_bases(str(path)))
            return draft, f"All models of {short} are experts."
        if act == "recipe":
            recipe = describe(self.path_of(reference)).recipe
            if recipe is None:
                raise InputError("E_NOT_FOUND", f"{short} does not hold its recipe any more.", "", "Look at it again.")
            return restored(recipe, draft), f"The recipe of {short} is open. Undo brings the former one back."
        if act == "open":
            path = self.path_of(reference)
            loaded = load_recipe(path)
            new = with_absolute_paths(from_recipe(loaded.recipe), path.parent)
            notes = " ".join(loaded.notes)
            return {**new, "tasks": list(draft["tasks"])}, f"{short} is open. Undo brings the former one back. {notes}"
        raise InputError("E_NOT_FOUND", "This button is unknown.", "", "Load the page again.")

    def adapter_bases(self, reference: str) -> tuple[str, ...] | None:
        """The bases that an adapter names; None if it is a model, or nothing is known yet."""
        try:
            facts = describe(find_permitted(self.app, reference).path)
        except AmalgamError:
            model = self.found.get(reference)
            return model.bases if model is not None and model.is_adapter else None
        return facts.bases if facts.kind == "adapter" else None


def _entry_of(path: Path) -> Entry:
    if path.suffix.lower() in RECIPES and path.is_file():
        try:
            return _entry_of_recipe(path)
        except AmalgamError as error:
            return Entry(str(path), path.name, (text(error.what),), (), ())
    try:
        return entry_of_facts(str(path), path.name, describe(path))
    except AmalgamError as error:
        return Entry(str(path), path.name, (text(f"{error.what} {error.fix}"),), (), ())


def _entry_of_recipe(path: Path) -> Entry:
    recipe = load_recipe(path).recipe
    count = len(recipe.experts)
    facts = (f"{text(recipe.method_class.title)}, {count} expert{'s' if count > 1 else ''}",)
    return Entry(str(path), path.name, facts, ("recipe",), (("open", "Open this recipe"),))
