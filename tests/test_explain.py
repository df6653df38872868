"""Formulas are right: they are worked out as they are written, and compared with what the merge made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from merging.errors import InputError
from merging.explain import Explanation, explain, short_names
from merging.methods import METHODS, get_method, make
from merging.plan import make_plan
from merging.recipe import Recipe
from tests.small_checkpoints import State, family, llama_like, load, merge, save

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    state = llama_like(3, 16) | {"counter": torch.arange(5)}
    return family(tmp_path_factory.mktemp("models"), state, 2, scale=0.05)


def recipe(models: list[Path], method: str, own: list[dict[str, Any]], base: bool = True, **fields: Any) -> Recipe:
    experts = [
        {"model": str(path), "name": name, "parameters": parameters}
        for path, name, parameters in zip(models[1:], ("sort", "rotate"), own, strict=False)
    ]
    return Recipe.parse({"experts": experts, "method": method, **fields} | ({"base": str(models[0])} if base else {}))


def explained(what: Recipe, tensor: str = UP) -> Explanation:
    with make_plan(what) as plan:
        return explain(plan, tensor)


def worked_out(text: str, known: dict[str, Any]) -> torch.Tensor:
    """The value of a formula, every symbol looked up in ``known``."""
    left, _, right = text.partition(" = ")
    assert left == "W"
    python = right.replace("·", "*").replace("−", "-").replace("W₀", "W0").replace("sin φ", "sin(φ)")
    python = re.sub(r"\|([^|]*)\|", r"length(\1)", python)
    return eval(python, {"__builtins__": {}, "sin": torch.sin, "length": torch.linalg.norm}, known)


def symbols(models: list[Path], tensor: str) -> dict[str, Any]:
    base, *experts = [load(path)[tensor].double() for path in models]
    known: dict[str, Any] = {"W0": base}
    for name, expert in zip(("sort", "rotate"), experts, strict=True):
        known[f"W_{name}"], known[f"τ_{name}"] = expert, expert - base
    return known


def trimmed(known: dict[str, Any], kept: dict[str, int], weights: dict[str, float]) -> dict[str, Any]:
    """τ̂ and a, by the words of ``where``."""
    known = dict(known)
    for name, k in kept.items():
        tau = known[f"τ_{name}"].flatten()
        order = tau.abs().argsort(descending=True)
        known[f"τ̂_{name}"] = torch.zeros_like(tau).index_copy(0, order[:k], tau[order[:k]]).view_as(known["W0"])
    vote = sum(weights[name] * known[f"τ̂_{name}"] for name in kept)
    up = torch.where(vote >= 0, 1.0, -1.0)
    for name in kept:
        known[f"a_{name}"] = (weights[name] * known[f"τ̂_{name}"] * up > 0).double()
    return known


def merged(what: Recipe, folder: Path) -> State:
    merge(what, folder / "out")
    return load(folder / "out")


@pytest.mark.parametrize(
    ("method", "own", "shared", "base"),
    [
        ("linear", [{"weight": 1}, {"weight": 3}], {}, False),
        ("linear", [{"weight": -0.5}, {"weight": 0.25}], {"normalize": False}, False),
        ("task_arithmetic", [{"weight": 0.5}, {"weight": -0.25}], {"lambda": 0.5}, True),
        ("task_arithmetic", [{"weight": -2}, {"weight": 1}], {}, True),
        ("dare_linear", [{"weight": 0.5}, {"weight": -0.25}], {"lambda": 0.5}, True),
        ("passthrough", [{"scale": -1.5}], {}, False),
        ("slerp", [{}], {"t": 0.25}, True),
        ("nuslerp", [{"weight": 1}, {"weight": 3}], {}, True),
        ("nuslerp", [{"weight": 1}, {"weight": 3}], {}, False),
    ],
)
def test_the_formula_gives_what_the_merge_gives(
    models: list[Path], tmp_path: Path, method: str, own: list[dict], shared: dict, base: bool
) -> None:
    what = recipe(models, method, own, base, parameters=shared)
    found, known = explained(what), symbols(models, UP)
    letters = ["W0", "W_sort"] if method == "slerp" else ["τ_sort", "τ_rotate"] if base else ["W_sort", "W_rotate"]
    a, b = (known[letter].flatten() for letter in letters)
    known |= {"φ": torch.arccos(a @ b / a.norm() / b.norm()), "τ̂_sort": known["τ_sort"], "τ̂_rotate": known["τ_rotate"]}
    assert found.included
    result = worked_out(found.text, known)
    torch.testing.assert_close(result, merged(what, tmp_path)[UP].double(), atol=1e-4, rtol=1e-3)
    assert (result - known["W0"]).abs().max() > 1e-3  # it is not the base that was compared


@pytest.mark.parametrize("shared", [{}, {"lambda": 0.5}, {"normalize": False}, {"normalize": False, "lambda": -0.5}])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -0.25)])
def test_the_vote_in_words_is_the_vote_of_the_merge(
    models: list[Path], tmp_path: Path, shared: dict, weights: tuple[float, float]
) -> None:
    own = [{"weight": weights[0], "density": 0.25}, {"weight": weights[1]}]
    what = recipe(models, "ties", own, parameters=shared)
    found = explained(what)
    size = load(models[0])[UP].numel()
    assert f"τ̂_sort: the {size // 4:,} largest of the {size:,} entries of τ_sort, else 0" in found.where
    known = trimmed(symbols(models, UP), {"sort": size // 4, "rotate": size}, dict(zip(("sort", "rotate"), weights, strict=True)))
    result = worked_out(found.text, known)
    result = torch.where(result.isnan(), known["W0"], result)  # "0 / 0 counts as 0"
    torch.testing.assert_close(result, merged(what, tmp_path)[UP].double(), atol=1e-4, rtol=1e-3)


def test_a_mean_of_directions(models: list[Path], tmp_path: Path) -> None:
    what = recipe(models, "multislerp", [{"weight": 1}, {"weight": 3}])
    found, known = explained(what), symbols(models, UP)
    (direction,) = (line.removeprefix("u = ").partition(":")[0] for line in found.where if line.startswith("u = "))
    known["u"] = worked_out(f"W = {direction}", known)
    torch.testing.assert_close(
        worked_out(found.text, known), merged(what, tmp_path)[UP].double(), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_formula_with_numbers_for_each_expert(name: str) -> None:
    cls = get_method(name)
    names = ["sort", "rotate"][: cls.experts_range[1] or 2]
    given = {"weight": 0.7, "density": 0.3}
    own = {field: given[field] for field in cls.PerExpert.model_fields if field in given}
    shared = {"t": 0.3} if "t" in cls.Shared.model_fields else {}
    formula = make(name, shared, [own] * len(names)).formula(names, cls.needs_base or cls.uses_base, 1000)
    whole = "\n".join([formula.text, *formula.where])
    assert formula.text.startswith("W = ") and all(each in whole for each in names)
    assert formula.values and all(isinstance(value, float) for _, _, value in formula.values)
    assert "\n" not in formula.text


def test_numbers_are_those_of_this_tensor(models: list[Path]) -> None:
    by_depth = [{"filter": "mlp", "value": [0, 1]}, {"value": 0.1}]
    what = recipe(models, "task_arithmetic", [{"weight": by_depth}, {"weight": 1}], parameters={"lambda": 0.5})
    texts = {name: explained(what, name).text for name in (
        UP, UP.replace(".0.", ".1."), UP.replace(".0.", ".2."), "model.layers.0.self_attn.q_proj.weight")}  # fmt: skip
    assert list(texts.values()) == [
        "W = W₀ + 0.5·τ_rotate", "W = W₀ + 0.25·τ_sort + 0.5·τ_rotate", "W = W₀ + 0.5·τ_sort + 0.5·τ_rotate",
        "W = W₀ + 0.05·τ_sort + 0.5·τ_rotate"]  # fmt: skip
    assert explained(what).values == (
        ("c_sort", "effective coefficient of sort", 0.0), ("c_rotate", "effective coefficient of rotate", 0.5))  # fmt: skip


def test_what_is_copied_says_why(models: list[Path], tmp_path: Path) -> None:
    plain = recipe(models, "task_arithmetic", [{"weight": 1}, {"weight": 0}], include={"norms": False}, dtype="bfloat16")
    norm = explained(plain, "model.norm.weight")
    assert (norm.text, norm.included) == ("W = W₀", False)
    assert norm.note == ("Norms stay as they are in the base: include.norms is false. "
                         "Converted from float32 to bfloat16.")  # fmt: skip
    lone = explained(plain)
    assert (lone.text, lone.included) == ("W = W_sort", True) and lone.note.startswith("Copied from sort:")
    assert lone.values[0] == ("c_sort", "effective coefficient of sort", 1.0)
    nothing = explained(recipe(models, "task_arithmetic", [{"weight": 0}, {"weight": 0}]))
    assert nothing.text == "W = W₀" and nothing.included and "nothing is added" in nothing.note
    counter = explained(plain, "counter")
    assert (counter.text, counter.included) == ("W = W₀", False) and "Integers" in counter.note


def test_slices_name_the_tensors_that_they_take(models: list[Path]) -> None:
    slices = [{"sources": [{"model": "sort", "layers": [0, 2]}]}, {"sources": [{"model": "rotate", "layers": [1, 3]}]}]
    own = [{}, {"scale": 2.0}]
    what = recipe(models, "passthrough", own, base=False, slices=slices)
    second = explained(what, UP.replace(".0.", ".3."))
    assert second.text == "W = 2·W_rotate"
    assert "W_rotate is model.layers.2.mlp.up_proj.weight" in second.note
    first = explained(what, UP.replace(".0.", ".1."))
    assert first.text == "W = W_sort" and first.included


def test_a_tensor_that_an_expert_lacks_counts_as_unchanged(models: list[Path], tmp_path: Path) -> None:
    state = load(models[2])
    del state[UP]
    lacking = [models[0], models[1], save(tmp_path / "lacking", state)]
    what = recipe(lacking, "task_arithmetic", [{"weight": 1}, {"weight": 1}], policies={"missing_tensors": "base"})
    assert "rotate: no such tensor, so it counts as unchanged." in explained(what).note


def test_rounding_is_told(models: list[Path]) -> None:
    assert explained(recipe(models, "task_arithmetic", [{"weight": 1}, {"weight": 1}], dtype="bfloat16")).note == (
        "Computed in float64, then rounded once to bfloat16."
    )


def test_an_unknown_name_is_refused_with_the_nearest(models: list[Path]) -> None:
    with pytest.raises(InputError, match="E_MISSING_TENSOR") as caught:
        explained(recipe(models, "linear", [{"weight": 1}, {"weight": 1}]), "model.norms.weight")
    assert caught.value.why == "Did you mean 'model.norm.weight'?"


def test_names_are_short_and_different() -> None:
    assert short_names(["experts/sort", "org/rotate"]) == ["sort", "rotate"]
    assert short_names(["a/final", "b/final", "c"]) == ["final#1", "final#2", "c"]
    long = short_names(["x" * 100, "x" * 99])
    assert len(set(long)) == 2 and max(map(len, long)) < 30
