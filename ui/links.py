"""Drafts from outside: in a link that somebody sent, or as a browser kept them. Nothing in them is believed unseen."""

from __future__ import annotations

import base64
import binascii
import copy
import json
import re
import zlib
from collections.abc import Mapping
from typing import Any, Literal, cast

from pydantic import ConfigDict, TypeAdapter

from merging.errors import RecipeError
from merging.methods import METHODS
from merging.recipe import Recipe
from merging.recipe_parts import MAX_MODELS, Expert, Model

from .draft import Draft, as_mapping, check, empty, labels

MAX_LINK, MAX_JSON = 16_000, 256_000
STRICT = ConfigDict(strict=True)
BESIDES: dict[str, Any] = {
    "off": list[str],
    "tasks": list[str],
    "kept": dict[str, dict[Literal["parameters", "experts"], dict[str, Any]]],
}
"""What a draft has besides the recipe."""


def link_of(draft: Draft) -> str:
    """The recipe as a word for a link (``?r=…``). It holds the models' names and paths, and no weights."""
    return encoded({"recipe": draft["recipe"], "off": draft["off"]})


def encoded(data: Any) -> str:
    packed = zlib.compress(json.dumps(data, separators=(",", ":"), allow_nan=False).encode(), 9)
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def from_link(text: str) -> Draft:
    """The draft in a link. RecipeError for anything that ``link_of`` could not have made."""

    def broken(why: str) -> RecipeError:
        return RecipeError("E_RECIPE_READ", "The link holds no recipe.", why, "Ask for it again, or for the file.")

    if len(text) > MAX_LINK or not re.fullmatch(r"[A-Za-z0-9_-]+", text):
        raise broken("It is too long, or not complete.")
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), MAX_JSON + 1)
        if len(raw) > MAX_JSON or not unpacker.eof or unpacker.unused_data:
            raise broken("It is too large, or not complete.")
        return checked(json.loads(raw.decode("utf-8"), parse_constant=_no_constant))
    except (zlib.error, binascii.Error, ValueError, RecursionError):
        raise broken("It was changed on its way.") from None


def checked(data: Any) -> Draft:
    """A draft from a link or the browser's memory, in its normal form. RecipeError if it is none."""

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise RecipeError("E_RECIPE_READ", f"This is not a recipe: {what}.")

    need(isinstance(data, Mapping) and set(data) <= {*empty()}, "it has other fields")
    draft: Draft = {**empty(), **copy.deepcopy(dict(data))}
    recipe = draft["recipe"]
    need(isinstance(recipe, dict) and set(recipe) <= {*Recipe.model_fields}, "it has unknown fields")
    experts = recipe.get("experts", [])
    need(isinstance(experts, list) and len(experts) <= MAX_MODELS, "its experts are not a list")
    recipe["experts"] = [as_mapping(expert) for expert in experts]
    for expert in recipe["experts"]:
        check(Expert.model_validate, expert)
    if recipe.get("base") is not None:
        check(Model.model_validate, recipe["base"])
    need(len(set(labels(draft))) == len(experts), "two experts have one name")
    for name in set(recipe) - {"experts", "base"}:
        kind = cast(Any, Recipe.model_fields[name].annotation)
        check(TypeAdapter(kind).validate_python, recipe[name], f"The field {name} is not usable")
    need(recipe.get("method", "ties") in METHODS, "its method is unknown")
    for key, shape in BESIDES.items():
        check(TypeAdapter(shape, config=STRICT).validate_python, draft[key], f"The field {key} is not usable")
    need(set(draft["kept"]) <= set(METHODS), "it keeps unknown methods")
    need(len(json.dumps(draft)) <= MAX_JSON, "it is too large")
    draft["off"] = [name for name in labels(draft) if name in draft["off"]]
    return draft


def _no_constant(word: str) -> None:
    raise ValueError(word)
