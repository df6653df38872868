"""The recipe as a value: what it accepts, whom its words name, which numbers hold where."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest

from merging.errors import RecipeError
from merging.layer_plan import BlockSource, OutputBlock, layer_fraction, layer_plan, place_of
from merging.methods import METHODS, get_method
from merging.recipe import Recipe
from merging.recipe_parameters import fields_of


def ties(**fields: Any) -> dict[str, Any]:
    return {"base": "o/base", "experts": ["o/math", "o/code"], "method": "ties", **fields}


def problem(data: Any) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(data)
    return caught.value


def test_the_smallest_recipe_has_all_defaults() -> None:
    recipe = Recipe.parse(ties())
    assert recipe.resolve_parameters("any") == (
        {"lambda": 1.0, "normalize": True, "scope": "tensor"},
        [{"weight": 1.0, "density": 1.0}] * 2,
    )
    assert recipe.dtype is None and recipe.seed == 0 and recipe.slices is None
    assert recipe.tokenizer.source == recipe.chat_template == "auto"
    assert set(recipe.policies.model_dump().values()) == {"refuse"}
    assert set(recipe.include.model_dump().values()) == {None}
    assert recipe.to_data() == {"amalgam": 1, **ties()}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_asked_for_and_its_parameter_names_are_unambiguous(name: str) -> None:
    method = get_method(name)
    shared, own = fields_of(method.Shared), fields_of(method.PerExpert)
    assert not set(shared) & set(own)
    assert not {"lambda_"} & {*shared, *own}
    needed = {n: 0.5 for n, field in {**shared, **own}.items() if field.required}
    experts = [f"o/{i}" for i in range(method.experts_range[0])]
    recipe = Recipe.parse({"base": "o/b", "experts": experts, "method": name, "parameters": needed})
    found = recipe.resolve_parameters("x", 0.5)
    made = method(method.Shared(**found.shared), [method.PerExpert(**e) for e in found.experts])
    assert len(made.experts) == len(experts)
    without_needed = {"base": "o/b", "experts": experts, "method": name}
    if needed:
        assert f"{next(iter(needed))}" in str(problem(without_needed))
    if method.needs_base:
        assert problem({k: v for k, v in without_needed.items() if k != "base"}).code == "E_RECIPE_INPUTS"


@pytest.mark.parametrize(
    ("data", "code", "place", "hint"),
    [
        ([], "E_RECIPE_READ", "the recipe", ""),
        (ties(denisty=1), "E_RECIPE_FIELD", "denisty", ""),
        (ties(parameters={"denisty": 1}), "E_RECIPE_FIELD", "parameters.denisty", 'Did you mean "density"'),
        (ties(parameters={"lamda": 1}), "E_RECIPE_FIELD", "parameters.lamda", 'Did you mean "lambda"'),
        (ties(parameters={"lambda_": 1}), "E_RECIPE_FIELD", "parameters.lambda_", 'Did you mean "lambda"'),
        (ties(parameters={"t": 1}), "E_RECIPE_FIELD", "parameters.t", "Known here: density"),
        (ties(parameters={"density": 1.01}), "E_RECIPE_FIELD", "parameters.density",
         "less than or equal to 1"),
        (ties(parameters={"density": [0.1, -0.1]}), "E_RECIPE_FIELD", "parameters.density[1]", "greater"),
        (ties(parameters={"density": [{"value": [0, 2]}]}), "E_RECIPE_FIELD",
         "parameters.density[0].value[1]", ""),
        (ties(parameters={"density": True}), "E_RECIPE_FIELD", "parameters.density", "number"),
        (ties(parameters={"density": None}), "E_RECIPE_FIELD", "parameters.density", "leave"),
        (ties(parameters={"density": "half"}), "E_RECIPE_FIELD", "parameters.density", "'half'"),
        (ties(parameters={"density": float("nan")}), "E_RECIPE_FIELD", "parameters.density", "finite"),
        (ties(parameters={"lambda": 10**400}), "E_RECIPE_FIELD", "parameters.lambda", "too large"),
        (ties(parameters={"lambda": 10**5000}), "E_RECIPE_FIELD", "parameters.lambda", "too large"),
        (ties(parameters={"density": []}), "E_RECIPE_FIELD", "parameters.density", "empty"),
        (ties(parameters={"density": {"value": 1}}), "E_RECIPE_FIELD", "parameters.density", "list"),
        (ties(parameters={"density": [0.5, {"value": 1}]}), "E_RECIPE_FIELD", "parameters.density[0]",
         "not both"),
        (ties(parameters={"density": [{"filter": "a"}]}), "E_RECIPE_FIELD", "parameters.density[0]",
         "no value"),
        (ties(parameters={"density": [{"filter": "", "value": 1}]}), "E_RECIPE_FIELD", "[0].filter", "name"),
        (ties(parameters={"density": [{"filer": "a", "value": 1}]}), "E_RECIPE_FIELD", "[0].filer",
         '"filter"'),
        (ties(parameters={"density": [{"value": [{"value": 1}]}]}), "E_RECIPE_FIELD", "[0].value", "nested"),
        (ties(parameters={"normalize": 1}), "E_RECIPE_FIELD", "parameters.normalize", "true or false"),
        (ties(parameters={"normalize": [True, False]}), "E_RECIPE_FIELD", "parameters.normalize", "depth"),
        (ties(parameters={"scope": "world"}), "E_RECIPE_FIELD", "parameters.scope", "'global'"),
        (ties(parameters={"scope": [{"value": "global"}]}), "E_RECIPE_FIELD", "parameters.scope",
         "one choice"),
        (ties(experts=[]), "E_RECIPE_FIELD", "experts", "at least 1"),
        (ties(experts=["a"] * 2), "E_RECIPE_INPUTS", "experts[1]", "twice"),
        (ties(experts=["o/base"]), "E_RECIPE_INPUTS", "experts[0]", "the base itself"),
        (ties(experts=["a", {"model": "b", "parameters": {"lambda": 1}}]), "E_RECIPE_FIELD",
         "experts[1].parameters.lambda", "the merge as a whole"),
        (ties(experts=[{"model": "a", "name": "x"}, {"model": "b", "name": "x"}]), "E_RECIPE_INPUTS",
         "experts[1].name", "taken"),
        (ties(experts=[{"model": "a"}, {"model": "b", "name": "a"}]), "E_RECIPE_INPUTS", "experts[1].name",
         ""),
        (ties(experts=[{"model": "a", "name": "union"}]), "E_RECIPE_FIELD", "experts[0].name", "none of"),
        (ties(experts=[" a"]), "E_RECIPE_FIELD", "experts[0].model", "without spaces"),
        (ties(experts=["a\nb"]), "E_RECIPE_FIELD", "experts[0].model", "one line"),
        (ties(experts=[{"modle": "a"}]), "E_RECIPE_FIELD", "experts[0].modle", 'Did you mean "model"'),
        (ties(experts=[f"m/{i}" for i in range(257)]), "E_RECIPE_FIELD", "experts", "256"),
        (ties(method="slerp"), "E_RECIPE_INPUTS", "experts", "exactly 1 expert"),
        (ties(method="tise"), "E_RECIPE_METHOD", "method", "Did you mean ties"),
        (ties(tokenizer={"source": "auto", "tokens": {"a": {}}}), "E_RECIPE_FIELD", "tokenizer.tokens",
         "source"),
        (ties(tokenizer={"source": "base", "tokens": {"a": {"source": "o/x"}}}), "E_RECIPE_INPUTS",
         "tokenizer.tokens.a.source", "not one of the models"),
        (ties(tokenizer={"source": "base", "tokens": {"a": {"source": {"model": "o/math"}}}}),
         "E_RECIPE_FIELD",
         "tokenizer.tokens.a.source", "either token or token_id"),
        (ties(tokenizer={"source": "base", "tokens": {"a": {"source": {"modell": "o/math"}}}}),
         "E_RECIPE_FIELD",
         "tokenizer.tokens.a.source.modell", 'Did you mean "model"'),
        (ties(tokenizer={"source": "base", "tokens": {"a": {"force": True}}}), "E_RECIPE_FIELD",
         "tokenizer.tokens.a", "force needs a source"),
        (ties(chat_template="bsae"), "E_RECIPE_INPUTS", "chat_template", 'Did you mean "base"'),
        ({"method": "linear", "experts": ["a"], "parameters": {"weight": 1}, "chat_template": "base"},
         "E_RECIPE_FIELD", "chat_template", "no base model"),
        (ties(seed=True), "E_RECIPE_FIELD", "seed", "integer"),
        (ties(seed=2**63), "E_RECIPE_FIELD", "seed", "less than"),
        (ties(dtype="float8"), "E_RECIPE_FIELD", "dtype", "bfloat16"),
        (ties(policies={"extra_tensor": "drop"}), "E_RECIPE_FIELD", "policies.extra_tensor",
         '"extra_tensors"'),
        (ties(include={"norms": "yes"}), "E_RECIPE_FIELD", "include.norms", "boolean"),
        (ties(slices=[]), "E_RECIPE_FIELD", "slices", "at least 1"),
    ],
)  # fmt: skip
def test_wrong_recipes_name_the_place_and_the_way_out(data: Any, code: str, place: str, hint: str) -> None:
    error = problem(data)
    assert error.code == code
    assert place in error.what
    assert hint in str(error)
    assert error.exit_code == 2


def slices(*parts: Any, **fields: Any) -> dict[str, Any]:
    listed = [
        p if isinstance(p, dict) else {"sources": [{"model": m, "layers": [a, b]} for m, a, b in p]}
        for p in parts
    ]
    return ties(slices=listed, **fields)


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (slices([("o/math", 0, 2), ("o/code", 0, 3)]), "[2, 3] layers"),
        (slices([("o/math", 2, 2), ("o/code", 2, 2)]), "first < end"),
        (slices([("o/math", 0, 2), ("o/math", 0, 2)], [("o/code", 0, 2)]), "listed twice"),
        (slices([("o/math", 0, 2), ("o/maht", 0, 2)]), 'Did you mean "o/math"'),
        (slices([("o/math", 0, 2)]), "in none of the slices"),
        (slices([("o/base", 0, 2)], [("o/math", 0, 2), ("o/code", 0, 2)]), "not 0"),
        (slices([("o/math", 0, 2), ("o/code", 0, 2), ("o/base", 0, 2), ("o/base", 0, 2)]), "listed twice"),
        (slices({"sources": [{"model": "o/math", "layers": [0, 1]}, {"model": "o/code", "layers": [0, 1]},
                             {"model": "o/base", "layers": [0, 1],
                                 "parameters": {"weight": 1}}]}), "no parameters"),
        (slices({"sources": [{"model": "o/math", "layers": [0, 1]}, {"model": "o/code", "layers": [0, 1]}],
                 "base": "o-base"}, base="o_base"), 'Did you mean "o_base"'),
        (slices({"sources": [{"model": "o/math", "layers": [0, 1.5]}]}), "integer"),
        (slices({"sources": [{"model": "o/math", "layers": [0]}]}), "at least 2"),
    ],
)  # fmt: skip
def test_wrong_slices(data: Any, hint: str) -> None:
    error = problem(data)
    assert hint in str(error) and "slices" in str(error)


def test_models_are_listed_once_in_a_fixed_order() -> None:
    data = slices(
        {"sources": [{"model": "m2", "layers": [0, 1]}], "base": "o/third"},
        {"sources": [{"model": "m1", "layers": [0, 1]}]},
        experts=[
            {"model": "o/math", "name": "m1"},
            {"model": "o/math", "name": "m2", "parameters": {"weight": 2}},
            {"model": "o/base", "adapter": "./lora"},
        ],
    )
    data["slices"][1]["sources"].append({"model": "o/base+./lora", "layers": [0, 1]})
    recipe = Recipe.parse(data)
    assert [m.key for m in recipe.model_list] == ["o/base", "o/math", "o/base+./lora", "o/third"]
    assert recipe.model_list[2].adapter == "./lora" and recipe.model_list[2].model == "o/base"
    named = recipe.model_named("m2")
    assert named is not None and named.key == "o/math"
    assert recipe.model_named("nobody") is None


def test_numbers_are_brought_into_one_form() -> None:
    first = Recipe.parse(
        ties(parameters={"lambda": 1, "density": "1e-1", "weight": [{"filter": "*", "value": "2"}]})
    )
    second = Recipe.parse(ties(parameters={"weight": [{"value": 2.0}], "density": 0.1, "lambda": 1.0}))
    assert first == second
    assert first.canonical_json() == second.canonical_json()
    assert first.parameters == {"lambda": 1.0, "density": 0.1, "weight": [{"value": 2.0}]}
    assert first.canonical_json() != Recipe.parse(ties()).canonical_json()
    assert json.loads(first.canonical_json())["policies"]["overflow"] == "refuse"


def test_the_callers_data_are_left_alone_and_copies_are_checked() -> None:
    data = ties(parameters={"lambda": 1, "weight": [1, 2]})
    kept = json.loads(json.dumps(data))
    recipe = Recipe.parse(data)
    recipe.resolve_parameters("x")
    assert data == kept
    changed = recipe.model_copy(update={"parameters": {"lambda": 3}, "seed": 7})
    assert changed.resolve_parameters("x").shared["lambda"] == 3.0 and changed.seed == 7
    assert recipe.resolve_parameters("x").shared["lambda"] == 1.0
    with pytest.raises(RecipeError, match="E_RECIPE_FIELD"):
        recipe.model_copy(update={"parameters": {"lamda": 3}})


def test_gradients_filters_and_levels() -> None:
    recipe = Recipe.parse(slices(
        {"sources": [
            {"model": "o/math", "layers": [0, 4],
                "parameters": {"weight": [{"filter": "q_proj", "value": 9}]}},
            {"model": "o/code", "layers": [0, 4]}],
         "parameters": {"density": 0.5, "lambda": [0, 1]}},
        {"sources": [{"model": "o/math", "layers": [4, 5]}, {"model": "o/code", "layers": [4, 5]}]},
        experts=[{"model": "o/math", "parameters": {"weight": [{"filter": "mlp", "value": [1, 3]}]}},
            "o/code"],
        parameters={"weight": 0.25, "lambda": 5},
    ))  # fmt: skip

    def found(tensor: str, t: float, index: int) -> tuple[float, list[float], list[float]]:
        shared, experts = recipe.resolve_parameters(tensor, t, index)
        return shared["lambda"], [e["weight"] for e in experts], [e["density"] for e in experts]

    assert found("q_proj.mlp", 0.0, 0) == (0.0, [9.0, 0.25], [0.5, 0.5])  # the slice's source goes first,
    assert found("mlp.up", 0.5, 0) == (0.5, [2.0, 0.25], [0.5, 0.5])  # then the expert,
    assert found("norm", 0.75, 0) == (0.75, [0.25, 0.25], [0.5, 0.5])  # then the slice, then the recipe
    assert found("q_proj", 1.0, 1) == (5.0, [0.25, 0.25], [1.0, 1.0])  # then the method's default


def test_own_parameters_go_by_the_experts_tensor_name_and_shared_ones_by_the_outputs() -> None:
    weight = [{"filter": "layers.7.", "value": 7}, {"value": 1}]
    recipe = Recipe.parse(
        ties(parameters={"weight": weight, "lambda": [{"filter": "layers.0.", "value": 3}]})
    )
    shared, experts = recipe.resolve_parameters("layers.0.x", 0.0, None, ["layers.7.x", "layers.0.x"])
    assert shared["lambda"] == 3.0 and [e["weight"] for e in experts] == [7.0, 1.0]
    with pytest.raises(ValueError, match="1 input names for 2"):
        recipe.resolve_parameters("layers.0.x", 0.0, None, ["layers.7.x"])


def test_a_condition_that_leaves_tensors_without_a_value_is_found_when_planning() -> None:
    data = ties(method="task_arithmetic", parameters={"weight": [{"filter": "mlp", "value": 1}]})
    recipe = Recipe.parse(data)
    assert recipe.resolve_parameters("mlp.x").experts[0]["weight"] == 1.0
    with pytest.raises(RecipeError, match="model.norm"):
        recipe.resolve_parameters("model.norm.weight")


def test_resolving_is_fast_for_large_models() -> None:
    weight = [{"filter": "mlp", "value": [0, 1]}, {"filter": "self_attn", "value": 0.5}, {"value": 1}]
    experts = [{"model": f"o/{i}", "parameters": {"weight": weight, "density": [0.1, 0.9]}} for i in range(8)]
    recipe = Recipe.parse(
        ties(experts=experts, parameters={"lambda": [{"filter": "experts.7.", "value": 2}]})
    )
    names = [[f"layers.{b}.mlp.experts.{j}.up.weight" for j in range(1000)] for b in range(60)]
    start = time.process_time()
    for block, tensors in enumerate(names):
        for tensor in tensors:
            recipe.resolve_parameters(tensor, layer_fraction(block, 60), None, [tensor] * 8)
    assert time.process_time() - start < 3
    start = time.process_time()
    for block, tensors in enumerate(names):
        for tensor in tensors:
            recipe.resolve_parameters(tensor, layer_fraction(block, 60), None, [tensor + "x"] * 8)
    assert time.process_time() - start < 3


def test_blocks_of_whole_models() -> None:
    plan = layer_plan(Recipe.parse(ties()), {"o/base": 3, "o/math": 3, "o/code": 3})
    assert [(b.place, b.block, b.t) for b in plan] == [
        ("before", None, 0.0),
        ("block", 0, 0.0),
        ("block", 1, 0.5),
        ("block", 2, 1.0),
        ("after", None, 0.0),
    ]
    assert plan[2] == OutputBlock(
        "block", 1, 0.5, None, BlockSource("o/base", 1, None),
        (BlockSource("o/math", 1, 0), BlockSource("o/code", 1, 1)))  # fmt: skip
    assert plan[0].sources == (BlockSource("o/math", None, 0), BlockSource("o/code", None, 1))
    assert plan[0].base == BlockSource("o/base", None, None)
    assert [place_of(kind) for kind in ("embed", "norm", "head", "other")] == [
        "before",
        "after",
        "after",
        "after",
    ]
    assert [b.place for b in layer_plan(Recipe.parse(ties()), {"o/base": 0, "o/math": 0, "o/code": 0})] == [
        "before",
        "after",
    ]
    with pytest.raises(RecipeError, match="o/code: 4") as caught:
        layer_plan(Recipe.parse(ties()), {"o/base": 3, "o/math": 3, "o/code": 4})
    assert caught.value.code == "E_RECIPE_INPUTS"


def test_blocks_of_slices() -> None:
    recipe = Recipe.parse(slices(
        [("o/base", 5, 8), ("o/math", 0, 3)],  # the base with layers of its own,
        [("o/code", 1, 2)],  # with those of the first source,
        {"sources": [{"model": "o/code", "layers": [0, 2]}], "base": "o/math"},  # and another base
    ))  # fmt: skip
    counts = {"o/base": 8, "o/math": 3, "o/code": 2}
    plan = layer_plan(recipe, counts)
    rows = [(b.block, b.t, b.base and (b.base.model, b.base.block), [(s.model, s.block) for s in b.sources])
            for b in plan]  # fmt: skip
    assert rows == [
        (None, 0.0, ("o/base", None), [("o/math", None)]),
        (0, 0.0, ("o/base", 5), [("o/math", 0)]),
        (1, 0.5, ("o/base", 6), [("o/math", 1)]),
        (2, 1.0, ("o/base", 7), [("o/math", 2)]),
        (3, 1.0, ("o/base", 1), [("o/code", 1)]),
        (4, 0.0, ("o/math", 0), [("o/code", 0)]),
        (5, 1.0, ("o/math", 1), [("o/code", 1)]),
        (None, 0.0, ("o/math", None), [("o/code", None)]),
    ]
    assert [b.slice_index for b in plan] == [0, 0, 0, 0, 1, 2, 2, 2]
    for key in counts:
        with pytest.raises(RecipeError, match=f"of {key} do not exist"):
            layer_plan(recipe, {**counts, key: counts[key] - 1})


def test_stacking_needs_no_base_and_asks_nothing_of_one() -> None:
    stack = {
        "method": "passthrough",
        "experts": ["o/a", "o/b"],
        "slices": [
            {"sources": [{"model": "o/a", "layers": [0, 2]}]},
            {"sources": [{"model": "o/b", "layers": [0, 2]}]},
        ],
    }
    plan = layer_plan(Recipe.parse({**stack, "base": "o/b"}), {"o/a": 2, "o/b": 2})
    assert [b.base for b in plan[1:-1]] == [None] * 4
    assert [b.sources[0].model for b in plan] == ["o/a"] * 3 + ["o/b"] * 3
    many = {"experts": ["o/a"], "slices": [{"sources": [{"model": "o/a", "layers": [0, 90_000]}]}]}
    with pytest.raises(RecipeError, match="more than 10000 blocks"):
        layer_plan(Recipe.parse({**stack, **many}), {"o/a": 100_000})


def test_reading_a_recipe_does_not_load_torch() -> None:
    code = """import sys
from merging.recipe_yaml import load_recipe
load_recipe("method: pcb\\nbase: a\\nexperts: [b, c]\\n")
sys.exit("torch" in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
