"""The mergekit dialect against what mergekit 0.1.5 itself did with the same recipes.

``data/mergekit_parameters.json`` was written by ``oracles/measure_mergekit_parameters.py``, which describes
the models: model k is one-hot at index k, so a merged tensor is the list of effective coefficients.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merging.errors import RecipeError
from merging.layer_plan import OutputBlock, layer_plan, place_of
from merging.mergekit_dialect import to_mergekit_yaml
from merging.recipe import Recipe
from merging.recipe_yaml import load_recipe, read_yaml, to_yaml

DATA = Path(__file__).parent / "data"
RECIPES = DATA / "recipes"
CASES: dict[str, str] = read_yaml((RECIPES / "measured_cases.yml").read_text()).data
MEASURED = json.loads((DATA / "mergekit_parameters.json").read_text())["cases"]

LENIENT = {
    "an unknown parameter is ignored": "E_RECIPE_FIELD",
    "only the base": "E_RECIPE_INPUTS",
    "slices: an empty range": "E_RECIPE_FIELD",
    "slices: a reversed range": "E_RECIPE_FIELD",
    "linear: a gradient of booleans": "E_RECIPE_UNSUPPORTED",
    "multislerp: one model": "E_RECIPE_INPUTS",
    "an unknown key is ignored": "E_RECIPE_FIELD",
}
"""What mergekit lets pass and we refuse: all such cases, with our code."""
ZERO_SUM = "linear: weights that sum to 0"


def tensor_names(block: OutputBlock, index: int | None) -> list[str]:
    if block.place == "block":
        parts = ("input_layernorm", "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
        return [f"model.layers.{index}.{part}.weight" for part in parts]
    kinds = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
    return [name for kind, name in kinds.items() if place_of(kind) == block.place]


def one_hot(model: str, block: int | None) -> list[float]:
    """The four values that tell the test models apart (see the measuring script)."""
    size = 1.0 if not model.endswith("n") else 100.0 if block is None else block + 1.0
    return [size * (letter == model[0]) for letter in "ABCD"]


def merged(recipe: Recipe, block: OutputBlock, shared: dict, experts: list[dict]) -> list[float] | float:
    """The four values (or for spheres t) by the textbook formula of the method."""
    inputs = [one_hot(s.model, s.block) for s in block.sources]
    weights = [e.get("weight", e.get("scale")) for e in experts]
    weights = [1.0 if w is None else w for w in weights]
    if recipe.method == "slerp":
        return shared["t"]
    if recipe.method == "nuslerp":
        return weights[1] / sum(weights)
    base = [0.0] * 4
    if recipe.method_class.uses_base and block.base:
        base = one_hot(block.base.model, block.base.block)
    factor = shared.get("lambda", 1.0)
    if shared.get("normalize") and recipe.method != "ties":
        factor /= sum(weights)
    elif shared.get("normalize"):  # at most one expert differs from the base at each place
        factor /= weights[0]
    kept = [w * (e.get("density", 1.0) > 0) for w, e in zip(weights, experts, strict=True)]
    return [
        base[i] + factor * sum(w * (x[i] - base[i]) for w, x in zip(kept, inputs, strict=True))
        for i in range(4)
    ]


def effective(recipe: Recipe) -> dict[str, list[float] | float]:
    counts = {model.key: int(model.key.strip("n")[1:]) for model in recipe.model_list}
    result = {}
    for block in layer_plan(recipe, counts):
        for name in tensor_names(block, block.block):
            inputs = [name.replace(f"layers.{block.block}.", f"layers.{s.block}.") for s in block.sources]
            shared, experts = recipe.resolve_parameters(name, block.t, block.slice_index, inputs)
            result[name] = merged(recipe, block, shared, experts)
    return result


@pytest.mark.parametrize("name", sorted(set(CASES) - {ZERO_SUM}))
def test_same_numbers_as_mergekit(name: str) -> None:
    measured = MEASURED[name]
    if "error" in measured or name in LENIENT:
        with pytest.raises(RecipeError) as caught:
            effective(load_recipe(CASES[name]).recipe)
        assert caught.value.code == LENIENT.get(name, caught.value.code)
        return
    recipe = load_recipe(CASES[name]).recipe
    expected = measured.get("coefficients") or measured["t"]
    found = effective(recipe)
    assert set(found) == set(expected)
    for tensor, values in expected.items():
        assert found[tensor] == pytest.approx(values, abs=1e-5, rel=1e-5), tensor


def test_every_case_was_measured() -> None:
    assert set(CASES) == set(MEASURED)
    assert set(LENIENT) <= {name for name, result in MEASURED.items() if "error" not in result}


def test_weights_that_add_up_to_zero_are_an_error_and_not_infinities() -> None:
    assert "inf" in MEASURED[ZERO_SUM]["coefficients"]["lm_head.weight"]
    recipe = load_recipe(CASES[ZERO_SUM]).recipe
    shared, experts = recipe.resolve_parameters("lm_head.weight")
    cls = recipe.method_class
    with pytest.raises(RecipeError, match="add up to zero"):
        cls(cls.Shared(**shared), [cls.PerExpert(**e) for e in experts]).coefficients()


def read(text: str) -> Recipe:
    return load_recipe(text).recipe


def notes(text: str) -> str:
    return "\n".join(load_recipe(text).notes)


def problem(text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(text)
    return caught.value


TASK = "merge_method: task_arithmetic\nbase_model: o/b\nparameters: {weight: 1}\n"
MODELS = "models: [{model: o/x}]\n"


@pytest.mark.parametrize("file", sorted(RECIPES.glob("mergekit_*.yml")), ids=lambda f: f.stem)
def test_examples_survive_both_round_trips(file: Path) -> None:
    recipe = load_recipe(file).recipe
    assert load_recipe(to_yaml(recipe)).recipe == recipe
    again = load_recipe(to_mergekit_yaml(recipe))
    assert again.dialect == "mergekit"
    counts = {model.key: 40 for model in recipe.model_list}
    assert layer_plan(again.recipe, counts) == layer_plan(recipe, counts)
    for block in layer_plan(recipe, counts):
        for name in tensor_names(block, block.block):
            at = (name, block.t, block.slice_index)
            assert again.recipe.resolve_parameters(*at) == recipe.resolve_parameters(*at)
    kept = ("base", "method", "slices", "include", "dtype", "tokenizer", "policies", "chat_template")
    assert {k: getattr(again.recipe, k) for k in kept} == {k: getattr(recipe, k) for k in kept}


def test_a_recipe_with_everything_people_write() -> None:
    loaded = load_recipe(RECIPES / "mergekit_ties.yml")
    recipe = loaded.recipe
    assert [e.key for e in recipe.experts] == ["org/chat-13b", "org/code-13b", "org/math-13b@v2"]
    assert recipe.base and recipe.base.key == "org/base-13b"
    assert recipe.dtype == "float16"
    assert recipe.include.model_dump() == dict.fromkeys(("embeddings", "head", "norms", "biases"), True)
    shared, experts = recipe.resolve_parameters("model.layers.39.mlp.up_proj.weight", 1.0)
    assert shared == {"lambda": 1.0, "normalize": True, "scope": "tensor"}
    assert experts == [
        {"weight": 1.0, "density": 0.1},
        {"weight": 1.0, "density": 0.5},
        {"weight": 0.5, "density": 0.33},
    ]
    assert "int8_mask" in " ".join(loaded.notes) and "dtype: float16" in " ".join(loaded.notes)


def test_references_adapters_and_token_rows() -> None:
    recipe = load_recipe(RECIPES / "mergekit_dare.yml").recipe
    assert [m.key for m in recipe.model_list] == [
        "org/base@abc123",
        "org/base@abc123+org/lora@r1",
        "org/base@abc123+org/other-lora",
    ]
    assert recipe.experts[0].adapter == "org/lora@r1"
    assert recipe.parameters["rescale"] == "none" and recipe.parameters["lambda"] == 0.1
    tokens = recipe.tokenizer.tokens
    assert tokens["<|im_start|>"].source == "org/base@abc123" and tokens["<|im_start|>"].force
    assert tokens["<|im_end|>"].source == "zero"
    assert tokens["<tool2>"].source.model_dump() == {  # type: ignore[union-attr]
        "model": "org/base@abc123",
        "token": None,
        "token_id": 0,
    }
    assert recipe.tokenizer.pad_to_multiple_of == 8


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (TASK + MODELS + "dtype: bfloat16", "dtype: bfloat16 is taken as the output's type"),
        (TASK + MODELS + "dtype: float32\nout_dtype: bfloat16", "out_dtype is the output's type"),
        (TASK + MODELS, "Without dtype"),
        (TASK + MODELS + "chat_template: auto", "chat_template: auto"),
        (TASK.replace("task_arithmetic", "dare_linear") + MODELS, "1/density"),
        (TASK + "models: [{model: o/x, parameters: {density: 0.5}}]", "density has no effect"),
        (TASK + "models: [{model: o/x, parameters: {lambda: 0.5}}]", "lambda has no effect under a model"),
        (TASK + "models: [{model: o/x}, {model: o/b, parameters: {weight: 2}}]", "Parameters of the base"),
        (TASK.replace("weight: 1", "weight: 1, gamma: 2") + MODELS, "gamma has no effect"),
        (
            "merge_method: linear\ntokenizer_source: base\nparameters: {weight: 1}\n" + MODELS,
            "base means o/x",
        ),
        (
            "merge_method: linear\nbase_model: o/b\nparameters: {weight: 1}\n" + MODELS,
            "merged as one of the models",
        ),
        (
            "merge_method: ties\nbase_model: o/b\n"
            "models: [{model: o/x, parameters: {weight: [{filter: mlp, value: 2}]}}]",
            "have weight 1",
        ),
    ],
)
def test_every_difference_is_told(text: str, word: str) -> None:
    assert word in notes(text)


@pytest.mark.parametrize(
    ("text", "code", "word"),
    [
        ("merge_method: della\n" + MODELS, "E_RECIPE_METHOD", "Supported here: linear"),
        ("merge_method: pcb\n" + MODELS, "E_RECIPE_METHOD", "native form"),
        ("merge_method: dare-ties\n" + MODELS, "E_RECIPE_METHOD", "dare_ties"),
        ("merge_method: [ties]\n" + MODELS, "E_RECIPE_METHOD", "method"),
        (TASK + "models: []", "E_RECIPE_FIELD", "exactly one"),
        (TASK + "models: o/x", "E_RECIPE_FIELD", "list"),
        (TASK + "models: [o/x]", "E_RECIPE_FIELD", "models[0]"),
        (TASK + "models: [{modle: o/x}]", "E_RECIPE_FIELD", 'Did you mean "model"'),
        (TASK + "models: [{model: a+b+c}]", "E_RECIPE_FIELD", "models[0].model"),
        (TASK + "models: [{model: a@1@2}]", "E_RECIPE_FIELD", "models[0].model"),
        (TASK + "models: [{model: {model: {path: o/x}, override_architecture: L}}]", "E_RECIPE_UNSUPPORTED",
         "override"),
        (TASK + "models: [{model: o/x, parameters: {denisty: 1}}]", "E_RECIPE_FIELD",
         'Did you mean "density"'),
        (TASK + "models: [{model: o/x, parameters: {weight: []}}]", "E_RECIPE_FIELD",
         "models[0].parameters.weight"),
        (TASK + "models: [{model: o/x, parameters: {weight: [1, {value: 2}]}}]", "E_RECIPE_FIELD",
         "not both"),
        (TASK + "models: [{model: o/x, parameters: {weight: heavy}}]", "E_RECIPE_FIELD", "'heavy'"),
        (TASK + MODELS + "tokenizer_source: o/other", "E_RECIPE_INPUTS", "tokenizer_source"),
        (TASK + MODELS + "tokenizer_source: base\ntokenizer: {}", "E_RECIPE_FIELD", "either"),
        (TASK + MODELS + "tokenizer: {tokens: {a: {source: o/y}}}", "E_RECIPE_INPUTS",
         "tokenizer.tokens.a.source"),
        (TASK + MODELS + "tokenizer: {tokens: {a: {source: {kind: model_token, model: o/x}}}}",
         "E_RECIPE_FIELD", "token_id"),
        (TASK + MODELS + "chat_template: chatml", "E_RECIPE_UNSUPPORTED", "chatml"),
        (TASK + MODELS + "chat_template: hello", "E_RECIPE_FIELD", "not a template"),
        (TASK + MODELS + "dtype: int64", "E_RECIPE_FIELD", "dtype"),
        (TASK.replace("task_arithmetic", "ties").replace("weight: 1", "weight: 1, rescale: true") + MODELS,
         "E_RECIPE_UNSUPPORTED", "rescale"),
        ("merge_method: nuslerp\nparameters: {weight: 1, nuslerp_row_wise: true}\n"
         "models: [{model: a}, {model: b}]",
         "E_RECIPE_UNSUPPORTED", "rows"),
        ("merge_method: slerp\nbase_model: b\nmodels: [{model: a}]\n"
         "parameters: {t: {value: [0, {value: 1}]}}",
         "E_RECIPE_FIELD", "nested"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_a_typed_error(text: str, code: str, word: str) -> None:
    error = problem(text)
    assert error.code == code
    assert word in str(error)
    assert "line" in error.what


def test_errors_point_to_the_line_of_the_mergekit_text() -> None:
    text = (
        TASK + "models:\n  - model: o/b\n  - model: o/x\n    parameters:\n      weight: 1\n      density: x\n"
    )
    assert "E_RECIPE" in str(problem(text.replace("task_arithmetic", "ties")))
    error = problem(text.replace("task_arithmetic", "ties"))
    assert "line 9, column 7: models[1].parameters.density" in error.what


def test_what_mergekit_cannot_say_is_not_written() -> None:
    base = {"base": "o/b", "experts": ["o/x", "o/y"]}
    for change in (
        {"method": "pcb"},
        {"method": "ties", "parameters": {"scope": "global"}},
        {"method": "ties", "include": {"norms": False}},
        {"method": "ties", "policies": {"extra_tensors": "drop"}},
        {"method": "ties", "chat_template": "none"},
        {"method": "ties", "tokenizer": {"pad_to_multiple_of": 8}},
        {"method": "linear", "parameters": {"weight": 1}},
        {"method": "ties", "experts": ["a+b"]},
        {"method": "ties", "experts": [{"model": "a", "name": "one"}, {"model": "a", "name": "two"}]},
    ):
        with pytest.raises(RecipeError) as caught:
            to_mergekit_yaml(Recipe.parse({**base, **change}))
        assert caught.value.code == "E_RECIPE_UNSUPPORTED", change


def test_native_levels_are_folded_for_mergekit() -> None:
    recipe = Recipe.parse({
        "base": "o/b", "method": "ties", "dtype": "bfloat16", "seed": 1,
        "experts": [{"model": "o/x", "name": "x", "parameters": {"weight": 0.5, "density": 0.3}}],
        "slices": [{"sources": [{"model": "x", "layers": [0, 2], "parameters": {
            "weight": [{"filter": "mlp", "value": [1, 2]}]}}]}],
    })  # fmt: skip
    text = to_mergekit_yaml(recipe)
    again = read(text)
    assert "layer_range: [0, 2]" in text and "out_dtype: bfloat16" in text
    for tensor in ("model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        assert again.resolve_parameters(tensor, 1.0, 0) == recipe.resolve_parameters(tensor, 1.0, 0)
    assert layer_plan(again, {"o/b": 2, "o/x": 2}) == layer_plan(recipe, {"o/b": 2, "o/x": 2})
