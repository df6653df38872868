"""mergekit's recipes (its YAML configuration, version 0.1.5), read as they are, and written.

The numbers are meant to be those that mergekit computes with ``dtype: float32``. Nothing is ignored in
silence: what mergekit itself ignores, and every intended difference, becomes a note; what is not supported
is an error. The facts about mergekit stand in ``tests/data/mergekit_parameters.json``, measured by running
it. Intended differences:

* ``dtype`` is taken as the output's type. The arithmetic is float32, or float64 for float32 inputs.
* DARE multiplies survivors by 1/density; mergekit by the L1 norm before over after, per tensor. The random
  numbers differ as well. (Write ``rescale: l1`` in the native form to have mergekit's rule.)
* TIES keeps exactly floor(density * n) entries, ties in index order; mergekit keeps at least one, and an
  arbitrary choice among equal magnitudes.
* Slices without layers and weights that add up to zero are errors. mergekit writes a model without layers,
  or one of infinities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .mergekit_parameters import (
    BASE_IS_A_MODEL,
    OTHER_METHODS,
    PARAMETERS,
    ParameterReader,
    fall_through,
)
from .mergekit_writer import to_mergekit_yaml
from .methods import METHODS
from .recipe import Recipe
from .recipe_parameters import Path, RecipeProblem, quoted, suggestion
from .recipe_yaml import Document, LoadedRecipe

__all__ = ["from_mergekit", "to_mergekit_yaml"]

DTYPES = ("float16", "bfloat16", "float32", "float64")
TEMPLATES = {"alpaca", "chatml", "exaone", "llama3", "mistral"}

FIELDS = {
    "recipe": {"models", "slices", "modules", "merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source",
               "tokenizer", "chat_template", "parameters"},
    "module": {"models", "slices", "parameters"},
    "model": {"model", "parameters"},
    "slice": {"sources", "base_model", "residual_weight", "parameters"},
    "source": {"model", "layer_range", "parameters"},
    "reference": {"model", "lora", "override_architecture"},
    "location": {"path", "revision"},
    "tokenizer": {"source", "tokens", "pad_to_multiple_of"},
    "token": {"source", "force"},
    "token source": {"kind", "model", "token", "token_id"},
}  # fmt: skip


def from_mergekit(document: Document) -> LoadedRecipe:
    """The recipe that a mergekit configuration means. Errors: RecipeError, with line and column."""
    reader = _Reader(document.data)
    try:
        reader.read()
        return LoadedRecipe(Recipe.parse(reader.native), "mergekit", reader.notes)
    except RecipeProblem as problem:
        raise document.locate(problem, reader.origin(problem.path)) from None


class _Reader:
    """Turns mergekit's fields into the native ones, remembering where each came from."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.native: dict[str, Any] = {}
        self.notes: list[str] = []
        self.origins: dict[Path, Path] = {("method",): ("merge_method",), ("base",): ("base_model",)}
        self.method = ""
        self.parameters: ParameterReader
        self.base: str | None = None

    def origin(self, path: Path) -> Path:
        """Where in mergekit's text the native ``path`` comes from."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]] + path[length:]
        return path

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def fields(self, kind: str, data: Any, path: Path) -> dict[str, Any]:
        """``data`` as a mapping of the fields that ``kind`` has, without those that are null."""
        if not isinstance(data, Mapping):
            raise RecipeProblem("E_RECIPE_FIELD", path, f"{quoted(data)} is not a mapping of fields.")
        for key in data:
            if key not in FIELDS[kind]:
                raise RecipeProblem(
                    "E_RECIPE_FIELD", (*path, key), f"unknown field {quoted(key)}.",
                    "mergekit would ignore it.", suggestion(key, FIELDS[kind]))
        return {key: value for key, value in data.items() if value is not None}

    def items(self, data: Any, path: Path) -> list[Any]:
        if not isinstance(data, list) or not data:
            raise RecipeProblem("E_RECIPE_FIELD", path, "a list with at least one entry belongs here.")
        return data

    # -- the whole ------------------------------------------------------------------------------------

    def read(self) -> None:
        top = self.fields("recipe", self.data, ())
        self.method = self._method(top.get("merge_method"))
        self.parameters = ParameterReader(self.method, self.note)
        self.native = {"method": self.method, "include": dict.fromkeys(("embeddings", "head", "norms", "biases"), True)}
        if "base_model" in top:
            self.base = self.reference(top["base_model"], ("base_model",), ("base",))
        layout = [key for key in ("models", "slices", "modules") if top.get(key)]
        if len(layout) != 1:
            raise RecipeProblem("E_RECIPE_FIELD", (), "exactly one of models, slices and modules belongs here.")
        whole = self.parameters.read(top.get("parameters", {}), ("parameters",), "merge")
        body, path = top, ()
        if layout == ["modules"]:
            body, path = self._module(top["modules"])
            nearer = self.parameters.read(body.get("parameters", {}), (*path, "parameters"), "merge")
            whole = {**whole, **{name: fall_through(value, whole.get(name)) for name, value in nearer.items()}}
        self.native["parameters"] = whole
        self.origins["parameters",] = ("parameters",)
        self._models(body["models"], (*path, "models")) if "models" in body else self._slices(
            body["slices"], (*path, "slices"))
        self._weights_given()
        self._dtype(top)
        self._tokenizer(top)
        self._chat_template(top.get("chat_template"))

    def _method(self, name: Any) -> str:
        if isinstance(name, str) and name in PARAMETERS:
            return name
        supported = f"Supported here: {', '.join(PARAMETERS)}."
        if name in OTHER_METHODS:
            raise RecipeProblem("E_RECIPE_METHOD", ("method",), f"mergekit's {name} is not supported.", "", supported)
        if name in METHODS:
            raise RecipeProblem(
                "E_RECIPE_METHOD", ("method",), f"mergekit has no method {name}.", "", "Write the recipe in the native form (method: ...).")
        raise RecipeProblem(
            "E_RECIPE_METHOD", ("method",), f"There is no method {quoted(name)}.", "",
            suggestion(str(name).replace("-", "_"), PARAMETERS))

    def _module(self, modules: Any) -> tuple[dict[str, Any], Path]:
        if not isinstance(modules, Mapping) or list(modules) != ["default"]:
            raise RecipeProblem(
                "E_RECIPE_UNSUPPORTED", ("modules",), "only a single module called default is supported.",
                "Models of several modules are merged as one whole.", "Use models: or slices: instead.")
        body = self.fields("module", modules["default"], ("modules", "default"))
        if ("models" in body) == ("slices" in body):
            raise RecipeProblem("E_RECIPE_FIELD", ("modules", "default"), "either models or slices belongs here.")
        return body, ("modules", "default")

    # -- models ---------------------------------------------------------------------------------------

    def reference(self, data: Any, path: Path, native: Path) -> str:
        """The key of a model reference (``path[@revision][+lora[@revision]]`` or its mapping form)."""
        self.origins[native] = path
        if isinstance(data, Mapping):
            fields = self.fields("reference", data, path)
            if "override_architecture" in fields:
                raise RecipeProblem(
                    "E_RECIPE_UNSUPPORTED", (*path, "override_architecture"), "this field is not supported.",
                    "The structure is read from the tensors' names.", "Leave it out.")
            parts = [self._location(fields.get("model"), (*path, "model"))]
            parts += [self._location(fields["lora"], (*path, "lora"))] if "lora" in fields else []
            return "+".join(parts)
        if not isinstance(data, str) or not data or data.count("+") > 1 or "" in data.split("+"):
            raise RecipeProblem(
                "E_RECIPE_FIELD", path, f"{quoted(data)} is not a model.", "", "Write path_or_repo[@revision][+lora[@revision]].")
        return "+".join(self._location(part, path) for part in data.split("+"))

    def _location(self, data: Any, path: Path) -> str:
        if isinstance(data, Mapping):
            fields = self.fields("location", data, path)
            data = fields.get("path")
            data = f"{data}@{fields['revision']}" if "revision" in fields and isinstance(data, str) else data
        if not isinstance(data, str) or data.count("@") > 1 or not data:
            raise RecipeProblem("E_RECIPE_FIELD", path, f"{quoted(data)} is not a model.", "", "Write path_or_repo[@revision].")
        return data

    @staticmethod
    def model(key: str) -> dict[str, Any]:
        """The native form of a reference's key."""
        name, _, adapter = key.partition("+")
        return {"model": name, "adapter": adapter} if adapter else {"model": name}

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
            own = self.parameters.read(fields.get("parameters", {}), (*here, "parameters"), "base" if as_base else "model")
            if not as_base:
                self.origins["experts", len(experts)] = here
                experts.append({**self.model(key), "parameters": own})
        if self.base is not None:
            self.native["base"] = self.model(self.base)
        if self.base is not None and not listed and self.method == "passthrough":
            raise RecipeProblem(
                "E_RECIPE_INPUTS", ("base_model",), "mergekit counts the base as a second model here.", "passthrough takes one.",
                "Leave base_model out, or use slices.")
        if self.base is not None and not listed and self.method == "linear":
            self.note(f"linear: base_model {self.base} is merged as one of the models, as mergekit does.")
            self.origins["experts", len(experts)] = ("base_model",)
            experts.append({**self.model(self.base), "parameters": {}})
        if not experts:
            raise RecipeProblem("E_RECIPE_INPUTS", path, "there is nothing to merge but the base.")
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
                "parameters": self.parameters.read(fields.get("parameters", {}), (*here, "parameters"), "slice"),
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

    def _sources(self, data: Any, path: Path, i: int, base: str | None, experts: dict[str, None]) -> list[dict[str, Any]]:
        sources: list[dict[str, Any]] = []
        with_base = base is not None and self.method not in BASE_IS_A_MODEL
        for j, item in enumerate(self.items(data, path)):
            here = (*path, j)
            fields = self.fields("source", item, here)
            key = self.reference(fields.get("model"), (*here, "model"), ("slices", i, "sources", j, "model"))
            as_base = with_base and key == base
            layers = fields.get("layer_range")
            if not isinstance(layers, list):
                raise RecipeProblem("E_RECIPE_FIELD", (*here, "layer_range"), "layer_range: [first, end] is missing.")
            self.origins["slices", i, "sources", j, "layers"] = (*here, "layer_range")
            own = self.parameters.read(fields.get("parameters", {}), (*here, "parameters"), "base" if as_base else "model")
            sources.append({"model": key, "layers": layers, "parameters": own})
            if not as_base:
                experts.setdefault(key)
        if with_base and all(s["model"] != base for s in sources):
            raise RecipeProblem(
                "E_RECIPE_INPUTS", path, f"the base {quoted(base)} is not among the sources.",
                "mergekit wants to know which of its layers to compare with.", "Add it with its layer_range.")
        return sources

    # -- the rest -------------------------------------------------------------------------------------

    def _dtype(self, top: dict[str, Any]) -> None:
        names = {}
        for key in ("dtype", "out_dtype"):
            if key in top:
                names[key] = str(top[key]).removeprefix("torch.")
                if names[key] not in DTYPES:
                    raise RecipeProblem(
                        "E_RECIPE_FIELD", (key,), f"{quoted(top[key])} is not a type for weights.", "", suggestion(names[key], DTYPES))
        self.native["dtype"] = names.get("out_dtype", names.get("dtype"))
        if "dtype" in names and "out_dtype" in names:
            self.note(f"dtype: {names['dtype']} has no effect, out_dtype is the output's type. "
                      "Arithmetic is float32 (float64 for float32 inputs).")  # fmt: skip
        elif "dtype" in names:
            self.note(f"dtype: {names['dtype']} is taken as the output's type. Arithmetic is float32 (float64 for float32 inputs).")
        elif not names:
            self.note("Without dtype each tensor is written in the type that it has in the base, or first model "
                      "(mergekit: the widest type among the inputs).")  # fmt: skip

    def _tokenizer(self, top: dict[str, Any]) -> None:
        if "tokenizer_source" in top and "tokenizer" in top:
            raise RecipeProblem("E_RECIPE_FIELD", ("tokenizer",), "either tokenizer or tokenizer_source belongs here.")
        self.origins["tokenizer",] = ("tokenizer",)
        if "tokenizer_source" in top:
            self.native["tokenizer"] = {"source": self._tokenizer_source(top["tokenizer_source"], ("tokenizer_source",))}
        if "tokenizer" not in top:
            return
        fields = self.fields("tokenizer", top["tokenizer"], ("tokenizer",))
        native: dict[str, Any] = {"source": self._tokenizer_source(fields.get("source", "union"), ("tokenizer", "source"))}
        if "pad_to_multiple_of" in fields:
            native["pad_to_multiple_of"] = fields["pad_to_multiple_of"]
        tokens = fields.get("tokens", {})
        if not isinstance(tokens, Mapping):
            raise RecipeProblem("E_RECIPE_FIELD", ("tokenizer", "tokens"), "a mapping from tokens to rules belongs here.")
        native["tokens"] = {token: self._token(rule, ("tokenizer", "tokens", token)) for token, rule in tokens.items()}
        self.native["tokenizer"] = native

    def _tokenizer_source(self, data: Any, path: Path) -> str:
        if data == "base" and self.base is None:
            first = _key(self.native.get("base") or self.native["experts"][0])
            self.note(f"tokenizer source: there is no base_model, so base means {first} (mergekit takes any of the models).")
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
                raise RecipeProblem(
                    "E_RECIPE_FIELD", (*path, "source"), "kind is zero, or model_token with token or token_id.")
            key = self.reference(inner.get("model"), (*path, "source", "model"), (*path, "source", "model"))
            return {**native, "source": {"model": key, **{k: inner[k] for k in ("token", "token_id") if k in inner}}}
        if source is not None:
            native["source"] = self.reference(source, (*path, "source"), (*path, "source"))
        return native

    def _chat_template(self, text: Any) -> None:
        if text is None or text == "":
            return
        if not isinstance(text, str):
            raise RecipeProblem("E_RECIPE_FIELD", ("chat_template",), f"{quoted(text)} is not a template.")
        if text in TEMPLATES:
            raise RecipeProblem(
                "E_RECIPE_UNSUPPORTED", ("chat_template",), f"mergekit's built-in template {text} is not supported.", "",
                "Write the template's text, or in the native form the name of a model that has it.")
        if text != "auto" and (len(text) < 20 or "{" not in text):
            raise RecipeProblem(
                "E_RECIPE_FIELD", ("chat_template",), f"{quoted(text)} is not a template.", "", "Write auto, or the template's text.")
        self.native["chat_template"] = text


def _key(model: Mapping[str, Any] | None) -> str:
    return "" if model is None else "+".join(model[k] for k in ("model", "adapter") if k in model)
