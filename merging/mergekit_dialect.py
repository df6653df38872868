"""mergekit's recipes (its YAML configuration, version 0.1.5), read as they are, and written.

The numbers are meant to be those that mergekit computes with ``dtype: float32``. Nothing is ignored in
silence: what mergekit itself ignores, and every intended difference, becomes a note; what is not supported
is an error. The facts about mergekit stand in ``tests/data/mergekit_parameters.json``, measured by running
it. Intended differences:

* ``dtype`` is taken as the output's type. The arithmetic is float32, or float64 for float32 inputs.
* DARE multiplies survivors by 1/density; mergekit by the L1 norm before over after, per tensor. The random
  numbers differ as well. (Write ``rescale: l1`` in the native form to have mergekit's rule.)
* TIES keeps the first ones among equal magnitudes; mergekit keeps an arbitrary choice of them.
* Slices without layers and weights that add up to zero are errors. mergekit writes a model without layers,
  or one of infinities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .mergekit_fields import FieldReader
from .mergekit_parameters import (
    BASE_IS_A_MODEL,
    OTHER_METHODS,
    PARAMETERS,
    RESCALE_NOTE,
    ParameterReader,
    always_set,
    fall_through,
)
from .mergekit_writer import to_mergekit_yaml
from .methods import METHODS
from .recipe import Recipe
from .recipe_checks import is_template
from .recipe_parameters import Path, RecipeProblem, quoted, suggestion
from .recipe_yaml import Document, LoadedRecipe

__all__ = ["from_mergekit", "to_mergekit_yaml"]

DTYPES = ("float16", "bfloat16", "float32", "float64")
TEMPLATES = {"alpaca", "chatml", "exaone", "llama3", "mistral"}


def from_mergekit(document: Document) -> LoadedRecipe:
    """The recipe that a mergekit configuration means. Errors: RecipeError, with line and column."""
    reader = _Reader(document.data)
    try:
        reader.read()
        return LoadedRecipe(Recipe.parse(reader.native), "mergekit", reader.notes)
    except RecipeProblem as problem:
        raise document.locate(problem, reader.origin(problem.path)) from None


class _Reader(FieldReader):
    """Turns mergekit's fields into the native ones, remembering where each came from."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__()
        self.data = data
        self.native: dict[str, Any] = {}
        self.method = ""
        self.parameters: ParameterReader
        self.base: str | None = None

    # -- the whole ------------------------------------------------------------------------------------

    def read(self) -> None:
        top = self.fields("recipe", self.data, ())
        self.method = self._method(top.get("merge_method"))
        self.parameters = ParameterReader(self.method, self.note)
        self.native = {
            "method": self.method,
            "include": dict.fromkeys(("embeddings", "head", "norms", "biases"), True),
        }
        if "base_model" in top:
            self.base = self.reference(top["base_model"], ("base_model",), ("base",))
        layout = [key for key in ("models", "slices", "modules") if top.get(key)]
        if len(layout) != 1:
            raise RecipeProblem((), "exactly one of models, slices and modules belongs here.")
        whole = self.parameters.read(top.get("parameters", {}), ("parameters",), "merge")
        body, path = top, ()
        if layout == ["modules"]:
            body, path = self._module(top["modules"])
            nearer = self.parameters.read(body.get("parameters", {}), (*path, "parameters"), "merge")
            whole = {
                **whole,
                **{name: fall_through(value, whole.get(name)) for name, value in nearer.items()},
            }
        self.native["parameters"] = whole
        self.origins["parameters",] = ("parameters",)
        self._models(body["models"], (*path, "models")) if "models" in body else self._slices(
            body["slices"], (*path, "slices")
        )
        self._weights_given()
        self._dtype(top)
        self._tokenizer(top)
        self._chat_template(top.get("chat_template"))

    def _method(self, name: Any) -> str:
        name = name if isinstance(name, str) else quoted(name)
        if name in PARAMETERS:
            return name
        supported = f"Supported here: {', '.join(PARAMETERS)}."
        if name in OTHER_METHODS:
            raise RecipeProblem(
                ("method",), f"mergekit's {name} is not supported.", fix=supported, code="E_RECIPE_METHOD"
            )
        if name in METHODS:
            raise RecipeProblem(
                ("method",),
                f"mergekit has no method {name}.",
                fix="Write the recipe in the native form (method: ...).",
                code="E_RECIPE_METHOD",
            )
        raise RecipeProblem(
            ("method",),
            f"There is no method {quoted(name)}.",
            fix=suggestion(str(name).replace("-", "_"), PARAMETERS),
            code="E_RECIPE_METHOD",
        )

    def _module(self, modules: Any) -> tuple[dict[str, Any], Path]:
        if not isinstance(modules, Mapping) or list(modules) != ["default"]:
            raise RecipeProblem(
                ("modules",),
                "only a single module called default is supported.",
                "Models of several modules are merged as one whole.",
                "Use models: or slices: instead.",
                code="E_RECIPE_UNSUPPORTED",
            )
        body = self.fields("module", modules["default"], ("modules", "default"))
        if ("models" in body) == ("slices" in body):
            raise RecipeProblem(("modules", "default"), "either models or slices belongs here.")
        return body, ("modules", "default")

    # -- models ---------------------------------------------------------------------------------------

    def _models(self, data: Any, path: Path) -> None:
        experts: list[dict[str, Any]] = []
        listed = False
        self.origins["experts",] = path
        for i, item in enumerate(self.items(data, path)):
            here = (*path, i)
            fields = self.fields("model", item, here)
            key = self.reference(fields.get("model"), (*here, "model"), ("experts", len(experts), "model"))
            listed |= key == self.base
            as_base = key == self.base and self.method not in BASE_IS_A_MODEL
            own = self.parameters.read(
                fields.get("parameters", {}), (*here, "parameters"), "base" if as_base else "model"
            )
            if not as_base:
                self.origins["experts", len(experts)] = here
                experts.append({**self.model(key), "parameters": own})
        if self.base is not None:
            self.native["base"] = self.model(self.base)
        if self.base is not None and not listed and self.method == "passthrough":
            raise RecipeProblem(
                ("base_model",),
                "mergekit counts the base as a second model here.",
                "passthrough takes one.",
                "Leave base_model out, or use slices.",
                code="E_RECIPE_INPUTS",
            )
        if self.base is not None and not listed and self.method == "linear":
            self.note(f"linear: base_model {self.base} is merged as one of the models, as mergekit does.")
            self.origins["experts", len(experts)] = ("base_model",)
            experts.append({**self.model(self.base), "parameters": {}})
        if not experts:
            raise RecipeProblem(path, "there is nothing to merge but the base.", code="E_RECIPE_INPUTS")
        self.native["experts"] = experts

    def _slices(self, data: Any, path: Path) -> None:
        slices: list[dict[str, Any]] = []
        experts: dict[str, None] = {}
        self.origins["slices",] = path
        for i, item in enumerate(self.items(data, path)):
            here = (*path, i)
            fields = self.fields("slice", item, here)
            if "residual_weight" in fields:
                self.note("residual_weight has no effect (in mergekit neither).")
            base = self.base
            if "base_model" in fields:
                base = self.reference(fields["base_model"], (*here, "base_model"), ("slices", i, "base"))
            if self.method in BASE_IS_A_MODEL and base != self.base:
                self.note(f"{self.method}: the base_model of a slice has no effect (in mergekit neither).")
                base = self.base
            native = {
                "sources": self._sources(fields.get("sources"), (*here, "sources"), i, base, experts),
                "parameters": self.parameters.read(
                    fields.get("parameters", {}), (*here, "parameters"), "slice"
                ),
                **({"base": self.model(base)} if base is not None and base != self.base else {}),
            }
            slices.append(native)
        if self.base is None and slices and all("base" in s for s in slices):
            self.native["base"] = slices[0]["base"]
            self.note("The base of the first slice also gives the configuration and the tokenizer.")
        elif self.base is not None:
            self.native["base"] = self.model(self.base)
        self.native["experts"] = [self.model(key) for key in experts]
        self.native["slices"] = slices

    def _sources(
        self, data: Any, path: Path, i: int, base: str | None, experts: dict[str, None]
    ) -> list[dict[str, Any]]:
        sources: list[dict[str, Any]] = []
        with_base = base is not None and self.method not in BASE_IS_A_MODEL
        for j, item in enumerate(self.items(data, path)):
            here = (*path, j)
            fields = self.fields("source", item, here)
            key = self.reference(fields.get("model"), (*here, "model"), ("slices", i, "sources", j, "model"))
            as_base = with_base and key == base
            layers = fields.get("layer_range")
            if not isinstance(layers, list):
                raise RecipeProblem((*here, "layer_range"), "layer_range: [first, end] is missing.")
            self.origins["slices", i, "sources", j, "layers"] = (*here, "layer_range")
            own = self.parameters.read(
                fields.get("parameters", {}), (*here, "parameters"), "base" if as_base else "model"
            )
            sources.append({"model": key, "layers": layers, "parameters": own})
            if not as_base:
                experts.setdefault(key)
        if with_base and all(s["model"] != base for s in sources):
            raise RecipeProblem(
                path,
                f"the base {quoted(base)} is not among the sources.",
                "mergekit wants to know which of its layers to compare with.",
                "Add it with its layer_range.",
                code="E_RECIPE_INPUTS",
            )
        return sources

    def _weights_given(self) -> None:
        """mergekit has no default for weight; where we have one, its absence is still an error there."""
        if self.method.startswith("dare") and "rescale" not in self.native["parameters"]:
            self.note(RESCALE_NOTE)
        if self.method != "ties":
            return
        whole = [self.native["parameters"]]
        chains: list[tuple[Path, list[dict[str, Any]]]] = []
        if "slices" not in self.native:
            chains = [
                (("experts", i), [e["parameters"], *whole]) for i, e in enumerate(self.native["experts"])
            ]
        for i, part in enumerate(self.native.get("slices", ())):
            base = _key(part.get("base") or self.native.get("base"))
            chains += [
                (("slices", i, "sources", j), [s["parameters"], part["parameters"], *whole])
                for j, s in enumerate(part["sources"])
                if s["model"] != base
            ]
        for path, levels in chains:
            found = [level["weight"] for level in levels if "weight" in level]
            if not found:
                raise RecipeProblem(path, "the weight is missing.", fix="Add weight: under parameters.")
            if not any(always_set(value) for value in found):
                self.note(
                    "Tensors for which no condition gives a weight have weight 1 (mergekit stops there)."
                )

    # -- the rest -------------------------------------------------------------------------------------

    def _dtype(self, top: dict[str, Any]) -> None:
        names = {}
        for key in ("dtype", "out_dtype"):
            if key in top:
                names[key] = str(top[key]).removeprefix("torch.")
                if names[key] not in DTYPES:
                    raise RecipeProblem(
                        (key,),
                        f"{quoted(top[key])} is not a type for weights.",
                        fix=suggestion(names[key], DTYPES),
                    )
        self.native["dtype"] = names.get("out_dtype", names.get("dtype"))
        if "dtype" in names and "out_dtype" in names:
            self.note(
                f"dtype: {names['dtype']} has no effect, out_dtype is the output's type. "
                "Arithmetic is float32 (float64 for float32 inputs)."
            )
        elif "dtype" in names:
            self.note(
                f"dtype: {names['dtype']} is taken as the output's type. "
                "Arithmetic is float32 (float64 for float32 inputs)."
            )
        elif not names:
            self.note(
                "Without dtype each tensor is written in the type that it has in the base, or first model "
                "(mergekit: the widest type among the inputs)."
            )

    def _tokenizer(self, top: dict[str, Any]) -> None:
        if "tokenizer_source" in top and "tokenizer" in top:
            raise RecipeProblem(("tokenizer",), "either tokenizer or tokenizer_source belongs here.")
        self.origins["tokenizer",] = ("tokenizer",)
        if "tokenizer_source" in top:
            self.native["tokenizer"] = {
                "source": self._tokenizer_source(top["tokenizer_source"], ("tokenizer_source",))
            }
        if "tokenizer" not in top:
            return
        fields = self.fields("tokenizer", top["tokenizer"], ("tokenizer",))
        native: dict[str, Any] = {
            "source": self._tokenizer_source(fields.get("source", "union"), ("tokenizer", "source"))
        }
        if "pad_to_multiple_of" in fields:
            native["pad_to_multiple_of"] = fields["pad_to_multiple_of"]
        tokens = fields.get("tokens", {})
        if not isinstance(tokens, Mapping):
            raise RecipeProblem(("tokenizer", "tokens"), "a mapping from tokens to rules belongs here.")
        native["tokens"] = {
            token: self._token(rule, ("tokenizer", "tokens", token)) for token, rule in tokens.items()
        }
        self.native["tokenizer"] = native

    def _tokenizer_source(self, data: Any, path: Path) -> str:
        if data == "base" and self.base is None:
            first = _key(self.native.get("base") or self.native["experts"][0])
            self.note(
                f"tokenizer source: there is no base_model, so base means {first} "
                "(mergekit takes any of the models)."
            )
            return first
        return data if data in ("base", "union") else self.reference(data, path, ("tokenizer", "source"))

    def _token(self, data: Any, path: Path) -> dict[str, Any]:
        fields = self.fields("token", data, path)
        source = fields.get("source")
        native = {key: value for key, value in fields.items() if key == "force"}
        if isinstance(source, Mapping) and "kind" in source:
            inner = self.fields("token source", source, (*path, "source"))
            if inner["kind"] == "zero":
                return {**native, "source": "zero"}
            if inner["kind"] != "model_token" or ("token" in inner) == ("token_id" in inner):
                raise RecipeProblem((*path, "source"), "kind is zero, or model_token with token or token_id.")
            key = self.reference(inner.get("model"), (*path, "source", "model"), (*path, "source", "model"))
            return {
                **native,
                "source": {"model": key, **{k: inner[k] for k in ("token", "token_id") if k in inner}},
            }
        if source is not None:
            native["source"] = self.reference(source, (*path, "source"), (*path, "source"))
        return native

    def _chat_template(self, text: Any) -> None:
        if text is None or text == "":  # mergekit leaves the template as the tokenizer has it
            source = self.native.get("tokenizer", {}).get("source", "auto")
            whole = "base" if "base" in self.native else "auto"
            self.native["chat_template"] = whole if source in ("auto", "base", "union") else source
            return
        path = ("chat_template",)
        if not isinstance(text, str):
            raise RecipeProblem(path, f"{quoted(text)} is not a template.")
        if text in TEMPLATES:
            what = f"mergekit's built-in template {text} is not supported."
            fix = "Write the template's text, or in the native form the name of a model that has it."
            raise RecipeProblem(path, what, fix=fix, code="E_RECIPE_UNSUPPORTED")
        if text == "auto":
            self.note(
                "chat_template: auto takes the base's template, or if it has none the one that all others "
                "agree on (mergekit: the most frequent one)."
            )
        elif not is_template(text):
            raise RecipeProblem(
                path, f"{quoted(text)} is not a template.", fix="Write auto, or the template's text."
            )
        self.native["chat_template"] = text


def _key(model: Mapping[str, Any] | None) -> str:
    return "" if model is None else "+".join(model[k] for k in ("model", "adapter") if k in model)
