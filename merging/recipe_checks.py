"""What must hold across the fields of a recipe: numbers of models, names, slices, parameters."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from .recipe_parameters import Path, RecipeProblem, check_parameters, missing_parameter, quoted, suggestion
from .recipe_parts import Slice

if TYPE_CHECKING:
    from .recipe import Recipe


def check_recipe(recipe: Recipe) -> None:
    """Raise RecipeProblem at the first contradiction; bring all parameters into their normal form."""
    _check_models(recipe)
    for i, part in enumerate(recipe.slices or ()):
        _check_slice(recipe, part, ("slices", i))
    if recipe.slices:
        used = {i for index in range(len(recipe.slices)) for i, _ in recipe.slice_experts(index)}
        for i, expert in enumerate(recipe.experts):
            if i not in used:
                what = f"{quoted(expert.label)} is in none of the slices."
                raise RecipeProblem(("experts", i), what, fix="Leave it out.", code="E_RECIPE_INPUTS")
    _check_parameters(recipe)
    _check_words(recipe)


def _check_models(recipe: Recipe) -> None:
    method = recipe.method_class
    if method.needs_base and recipe.base is None:
        raise RecipeProblem(
            ("base",),
            f"{recipe.method} needs a base model.",
            "It merges what the experts changed against it.",
            "Add base: the model that the experts were made from.",
            code="E_RECIPE_INPUTS",
        )
    taken: dict[str, int] = {}
    keys = [e.key for e in recipe.experts]
    for i, expert in enumerate(recipe.experts):
        if expert.key in keys[:i] and expert.name is None:
            raise RecipeProblem(
                ("experts", i),
                f"{quoted(expert.key)} is listed twice.",
                fix="Keep it once, or give each entry a name of its own if you mean it.",
                code="E_RECIPE_INPUTS",
            )
        if expert.name is not None and (expert.name in taken or expert.name in keys):
            raise RecipeProblem(
                ("experts", i, "name"), f"{quoted(expert.name)} is taken.", code="E_RECIPE_INPUTS"
            )
        if expert.name is not None:
            taken[expert.name] = i
        if method.uses_base and recipe.slices is None and recipe.base and expert.key == recipe.base.key:
            raise RecipeProblem(
                ("experts", i),
                f"{quoted(expert.key)} is the base itself.",
                "It changed nothing against itself.",
                "Leave it out of the experts.",
                code="E_RECIPE_INPUTS",
            )
    if recipe.slices is None:
        _check_count(recipe, len(recipe.experts), ("experts",))


def _check_count(recipe: Recipe, count: int, path: Path) -> None:
    least, most = recipe.method_class.experts_range
    if least <= count and (most is None or count <= most):
        return
    wanted = (
        f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
    )
    besides = " besides the base" if recipe.method_class.needs_base else ""
    raise RecipeProblem(
        path, f"{recipe.method} takes {wanted} expert(s){besides}, not {count}.", code="E_RECIPE_INPUTS"
    )


def _check_slice(recipe: Recipe, part: Slice, path: Path) -> None:
    lengths = [s.layers[1] - s.layers[0] for s in part.sources]
    if len(set(lengths)) > 1:
        raise RecipeProblem(
            (*path, "sources"),
            f"the sources have {lengths} layers.",
            "Layers are merged one to one.",
            "Make the ranges equally long.",
        )
    if part.base is not None and not recipe.method_class.uses_base:
        raise RecipeProblem(
            (*path, "base"), f"{recipe.method} has no use for a base.", code="E_RECIPE_INPUTS"
        )
    used: list[int | None] = []
    for i, source in enumerate(part.sources):
        expert = None if recipe.is_base(source, part) else recipe.expert_named(source.model)
        if recipe.is_base(source, part) and source.parameters:
            raise RecipeProblem(
                (*path, "sources", i, "parameters"),
                "the base has no parameters.",
                "It is what the experts are compared with.",
                "Leave them out.",
                code="E_RECIPE_INPUTS",
            )
        elif expert is None and not recipe.is_base(source, part):
            raise RecipeProblem(
                (*path, "sources", i, "model"),
                f"{quoted(source.model)} is not one of the experts.",
                fix=suggestion(source.model, recipe.names()),
                code="E_RECIPE_INPUTS",
            )
        if expert in used:
            raise RecipeProblem(
                (*path, "sources", i, "model"),
                "it is listed twice in this slice.",
                code="E_RECIPE_INPUTS",
            )
        used.append(expert)
    _check_count(recipe, len(used) - used.count(None), (*path, "sources"))


def _check_parameters(recipe: Recipe) -> None:
    shared, own = recipe.parameter_fields
    everywhere = {**shared, **own}
    whose = {n: "It is a parameter of each expert." for n in own}
    common = {
        n: "It holds for the merge as a whole: it belongs under the recipe's own parameters." for n in shared
    }
    check_parameters(recipe.parameters, everywhere, ("parameters",), whose)
    for i, expert in enumerate(recipe.experts):
        check_parameters(expert.parameters, own, ("experts", i, "parameters"), common)
    for i, part in enumerate(recipe.slices or ()):
        check_parameters(part.parameters, everywhere, ("slices", i, "parameters"), whose)
        for j, source in enumerate(part.sources):
            check_parameters(source.parameters, own, ("slices", i, "sources", j, "parameters"), common)
    for index in range(len(recipe.slices)) if recipe.slices else [None]:
        level = recipe.level(index)
        for name, field in shared.items():
            if field.required and not any(name in settings for settings in level.shared):
                raise missing_parameter(name, "")
        for settings, label in zip(level.experts, level.labels, strict=True):
            for name, field in own.items():
                if field.required and not any(name in s for s in settings):
                    position = next(i for i, e in enumerate(recipe.experts) if e.label == label)
                    raise missing_parameter(name, label, ("experts", position))


def _check_words(recipe: Recipe) -> None:
    """Wherever a model is named outside of the list of experts, it must be one of the models."""
    tokenizer, template = recipe.tokenizer, recipe.chat_template
    _check_word(recipe, ("tokenizer", "source"), tokenizer.source, ["auto", "base", "union"])
    if tokenizer.tokens and tokenizer.source == "auto":
        fix = "Set tokenizer.source to base, union or a model."
        raise RecipeProblem(("tokenizer", "tokens"), "rules for tokens need a tokenizer source.", fix=fix)
    for token, rule in tokenizer.tokens.items():
        path: Path = ("tokenizer", "tokens", token, "source")
        if isinstance(rule.source, str):
            _check_word(recipe, path, rule.source, ["zero"])
        elif rule.source is not None:
            _check_word(recipe, (*path, "model"), rule.source.model, [])
    if not is_template(template):
        _check_word(recipe, ("chat_template",), template, ["auto", "base", "none"])
    for i, part in enumerate(recipe.slices or ()):
        key = part.base.key if part.base else ""
        near = difflib.get_close_matches(key[:64], recipe.names(), 1, 0.75)
        if near and key not in recipe.names() and "/" not in key:
            what = f"{quoted(key)} is not one of the models."
            raise RecipeProblem(("slices", i, "base"), what, fix=suggestion(key, recipe.names()))


def _check_word(recipe: Recipe, path: Path, text: str, words: list[str]) -> None:
    if text == "base" and text in words and recipe.base is None:
        raise RecipeProblem(path, "there is no base model.", fix="Name one of the models.")
    if text not in words and recipe.model_named(text) is None:
        what = f"{quoted(text)} is not one of the models."
        fix = suggestion(text, [*words, *recipe.names()])
        raise RecipeProblem(path, what, fix=fix, code="E_RECIPE_INPUTS")


def is_template(text: str) -> bool:
    """Is this the text of a chat template, rather than a word or a model's name?"""
    return "{{" in text or "{%" in text
