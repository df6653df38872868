"""A recipe as a mergekit configuration, if there is one that means the same."""

from __future__ import annotations

from typing import Any, NoReturn

from .errors import RecipeError
from .mergekit_parameters import BASE_IS_A_MODEL, PARAMETERS, fall_through
from .recipe import Recipe
from .recipe_checks import is_template
from .recipe_parts import Model, TokenSource
from .recipe_yaml import write_yaml

Parameters = dict[str, Any]


def to_mergekit_yaml(recipe: Recipe) -> str:
    """The recipe as a configuration for mergekit 0.1.5 that gives the same numbers (DARE: the same up to its
    own random numbers and scaling). RecipeError E_RECIPE_UNSUPPORTED, naming the field, if there is none.
    What only concerns this program (the seed) is told in comments.
    """
    return _Writer(recipe).text()


def _refuse(field: str, why: str) -> NoReturn:
    raise RecipeError("E_RECIPE_UNSUPPORTED", f"{field} cannot be written as a mergekit recipe.", why)


class _Writer:
    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.comments: list[str] = []

    def text(self) -> str:
        recipe = self.recipe
        if recipe.method not in PARAMETERS:
            _refuse("method", f"mergekit has no method {recipe.method}.")
        if False in recipe.include.model_dump().values() or recipe.method_class.excluded_kinds:
            _refuse("include", "mergekit applies the method to all tensors.")
        if recipe.policies.model_dump(exclude_defaults=True):
            _refuse("policies", "mergekit has no choice there.")
        if recipe.seed and recipe.method.startswith("dare"):
            self.comments.append(
                f"Run mergekit with --random-seed {recipe.seed} or another: its random numbers differ."
            )
        data: dict[str, Any] = {"merge_method": recipe.method}
        if recipe.base is not None:
            data["base_model"] = self.reference(recipe.base)
        if recipe.slices is None:
            data["models"] = self.models()
        else:
            data["slices"] = [self.slice(i) for i in range(len(recipe.slices))]
        data["parameters"] = self.whole()
        data.update(self.dtype())
        data.update(self.tokenizer())
        text = write_yaml({key: value for key, value in data.items() if value})
        return "".join(f"# {comment}\n" for comment in self.comments) + text

    def reference(self, model: Model | None, text: str = "") -> str:
        parts = [text] if model is None else [model.model, *([model.adapter] if model.adapter else [])]
        if any("+" in part or part.count("@") > 1 for part in parts):
            _refuse(
                repr(parts[0]),
                'mergekit gives "+" and a second "@" in a model\'s name a meaning of their own.',
            )
        return "+".join(parts)

    def models(self) -> list[dict[str, Any]]:
        recipe = self.recipe
        keys = [e.key for e in recipe.experts]
        if len(set(keys)) < len(keys):
            _refuse("experts", "mergekit refuses a model that is listed twice.")
        if recipe.base and recipe.method in BASE_IS_A_MODEL and recipe.base.key not in keys:
            _refuse("base", f"With {recipe.method}, mergekit would merge the base as one more model.")
        return [self.entry(self.reference(e), e.parameters) for e in recipe.experts]

    def entry(self, model: str, parameters: Parameters, **fields: Any) -> dict[str, Any]:
        return {"model": model, **fields, **({"parameters": self.native(parameters)} if parameters else {})}

    def slice(self, index: int) -> dict[str, Any]:
        assert self.recipe.slices is not None
        part = self.recipe.slices[index]
        base = self.recipe.slice_base(part) if self.recipe.method_class.uses_base else None
        sources, listed = [], False
        for source in part.sources:
            expert = self.recipe.expert_named(source.model)
            if base is not None and self.recipe.is_base(source, part):
                listed = True
                sources.append({"model": self.reference(base), "layer_range": source.layers})
            elif expert is not None:
                own = self.recipe.experts[expert]
                merged = dict(own.parameters)
                merged.update({n: fall_through(v, merged.get(n)) for n, v in source.parameters.items()})
                sources.append(self.entry(self.reference(own), merged, layer_range=source.layers))
        if base is not None and not listed:
            sources.append({"model": self.reference(base), "layer_range": part.sources[0].layers})
        result: dict[str, Any] = {"sources": sources}
        if part.base is not None and base is not None:
            result["base_model"] = self.reference(base)
        return {**result, **({"parameters": self.native(part.parameters)} if part.parameters else {})}

    def whole(self) -> Parameters:
        parameters = self.native(self.recipe.parameters)
        shared, own = PARAMETERS[self.recipe.method]
        # mergekit has no default for weight; the last level to be asked is the place for ours
        field = self.recipe.method_class.PerExpert.model_fields.get("weight")
        if field is not None and not field.is_required():
            parameters["weight"] = (
                fall_through(parameters["weight"], field.default) if "weight" in parameters else field.default
            )
        if "rescale" in shared and self.recipe.method.startswith("dare") and "rescale" not in parameters:
            parameters.update(self.native({"rescale": "inverse"}))
        return parameters

    def native(self, parameters: Parameters) -> Parameters:
        """One level's settings in mergekit's names."""
        result = dict(parameters)
        if result.pop("scope", "tensor") != "tensor":
            _refuse("scope: global", "mergekit trims each tensor by itself.")
        if "rescale" in result:
            if result["rescale"] == "inverse":
                self.comments.append(
                    "mergekit scales what is left by the ratio of L1 norms instead of 1/density."
                )
            result["rescale"] = result["rescale"] != "none"
        return result

    def dtype(self) -> dict[str, str]:
        if self.recipe.dtype is None:
            self.comments.append(
                "Without dtype, mergekit computes in the inputs' own type; dtype: float32 is more exact."
            )
            return {}
        if self.recipe.dtype == "float64":
            return {"dtype": "float64"}
        return {"dtype": "float32", "out_dtype": self.recipe.dtype}

    def tokenizer(self) -> dict[str, Any]:
        recipe = self.recipe
        result: dict[str, Any] = {}
        template = recipe.chat_template
        if is_template(template):
            result["chat_template"] = template
        elif template not in ("auto", "base", recipe.tokenizer.source):
            _refuse("chat_template", "mergekit takes it only from the model that gives the tokenizer.")
        tokenizer = recipe.tokenizer
        if tokenizer.source == "auto":
            if tokenizer.pad_to_multiple_of:
                _refuse("tokenizer", "mergekit pads only with a tokenizer source.")
            return result
        source = self.named(tokenizer.source)
        if not tokenizer.tokens and tokenizer.pad_to_multiple_of is None:
            return {**result, "tokenizer_source": source}
        tokens: dict[str, Any] = {}
        for token, rule in tokenizer.tokens.items():
            entry: dict[str, Any] = {"force": True} if rule.force else {}
            if rule.source is not None:
                entry["source"] = self.token_source(rule.source)
            tokens[token] = entry
        padding = {"pad_to_multiple_of": tokenizer.pad_to_multiple_of} if tokenizer.pad_to_multiple_of else {}
        return {
            **result,
            "tokenizer": {"source": source, **({"tokens": tokens} if tokens else {}), **padding},
        }

    def token_source(self, source: str | TokenSource) -> Any:
        if isinstance(source, str):
            return {"kind": "zero"} if source == "zero" else self.named(source)
        fields = source.model_dump(exclude_none=True)
        return {"kind": "model_token", **fields, "model": self.named(source.model)}

    def named(self, text: str) -> str:
        return text if text in ("base", "union") else self.reference(self.recipe.model_named(text), text)
