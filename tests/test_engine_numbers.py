"""Numbers in a merge: copies to the bit, one rounding, and nothing that is no number without being asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merging.errors import InputError, NumbersError
from merging.methods import BLOCK
from merging.recipe import Recipe
from tests.engine_cases import Case, each_case, in_memory, recipe_for
from tests.small_checkpoints import family, load, merge, raw, recipe, same_bits, save

# -- copies: bit for bit ------------------------------------------------------------------------------


def strange(dtype: Any) -> Tensor:
    """Zeros of both signs, subnormals, extremes, infinities, and NaNs of both signs with payloads."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    top = 1 << (8 * dtype.itemsize - 1)
    info = torch.finfo(dtype)
    nan = int(torch.tensor(float("nan"), dtype=dtype).view(bits))
    patterns = [0, -top, 1, 1 - top, nan, nan | 5, (nan | 9) - top, nan - top]
    numbers = torch.tensor(
        [info.max, info.min, info.tiny, info.eps, float("inf"), -float("inf"), 1.0, -1.0], dtype=dtype
    )
    return torch.cat([torch.tensor(patterns, dtype=bits).view(dtype), numbers]).view(2, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("method", "shared", "own", "chosen"),
    [
        ("task_arithmetic", {}, [{"weight": 0}, {"weight": 0}], 0),
        ("task_arithmetic", {"lambda": 0}, [{"weight": 3}, {"weight": 1}], 0),
        ("task_arithmetic", {}, [{"weight": 0}, {"weight": 1}], 2),
        ("task_arithmetic", {"lambda": 0.5}, [{"weight": 2}, {"weight": 0}], 1),
        ("ties", {}, [{"density": 0}, {"weight": 0}], 0),
        ("ties", {}, [{"weight": 0.3}, {"weight": 0}], 1),
        ("ties", {"normalize": False, "scope": "global"}, [{"weight": 0}, {"weight": 1}], 2),
        ("dare_linear", {}, [{"weight": 1, "density": 0}, {"weight": 0}], 0),
        ("dare_ties", {"normalize": True}, [{"weight": 0}, {"weight": 0.4}], 2),
        ("pcb", {}, [{"weight": 0}, {"weight": 0}], 0),
        ("pcb", {"lambda": 0, "scope": "global"}, [{}, {}], 0),
        ("slerp", {"t": 0}, [{}], 0),
        ("slerp", {"t": 1}, [{}], 1),
        ("linear", {}, [{"weight": 0}, {"weight": 0.7}], 2),
        ("linear", {"normalize": False}, [{"weight": 1}, {"weight": 0}], 1),
        ("nuslerp", {}, [{"weight": 1}, {"weight": 0}], 1),
        ("passthrough", {}, [{}], 1),
        ("passthrough", {}, [{"scale": 1}], 1),
    ],
)
def test_nothing_added_is_nothing_changed(
    tmp_path: Path, method: str, shared: dict[str, Any], own: list[dict[str, Any]], chosen: int, dtype: Any
) -> None:
    """Coefficient 0 leaves the base, a lone expert with weight 1 is the expert: every bit, also of NaNs if they may be."""
    values = [strange(dtype), strange(dtype).flip(0), strange(dtype).flip(1)]
    paths = [save(tmp_path / str(k), {"w": v, "v": v[0], "scalar": v[0, 1]}) for k, v in enumerate(values)]
    experts = list(zip(paths[1:], own, strict=False))
    base = None if method in ("linear", "passthrough", "nuslerp") else paths[0]
    merge(recipe(method, experts, base, parameters=shared, policies={"non_finite": "propagate"}), tmp_path / "out")
    assert same_bits(load(tmp_path / "out"), load(paths[chosen]))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "pcb"])
def test_where_the_task_vectors_are_zero_the_base_keeps_its_bits(tmp_path: Path, method: str) -> None:
    """Experts that changed one tensor only. −0.0 + 0.0 would be +0.0."""
    state = {"a": torch.tensor([0.0, -0.0, 1e-45, -1.0, 3e38]), "b": torch.linspace(-1, 1, 50)}
    paths = [save(tmp_path / str(k), state | {"b": state["b"] * (1 + k)}) for k in range(3)]
    merge(recipe(method, [(p, {"weight": 0.4}) for p in paths[1:]], paths[0]), tmp_path / "out")
    result = load(tmp_path / "out")
    assert raw(result["a"]) == raw(state["a"]) and not torch.equal(result["b"], state["b"])


# -- integers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_equal_integers_are_copied_and_others_refused(tmp_path: Path, dtype: Any) -> None:
    many = torch.arange(700_000) % 2  # several chunks
    first = {"w": torch.ones(4), "count": many.to(dtype)}
    paths = [save(tmp_path / name, first | {"w": torch.ones(4) * k}) for k, name in enumerate("abc")]
    what = recipe("ties", [(p, {"weight": 1.0}) for p in paths[1:]], paths[0])
    merge(what, tmp_path / "out")
    assert raw(load(tmp_path / "out")["count"]) == raw(first["count"])
    first["count"][-1] = 1 - many[-1]
    save_file(first, paths[2] / "model.safetensors")
    with pytest.raises(InputError) as raised:
        merge(what, tmp_path / "other")
    assert raised.value.code == "E_INTEGER_DIFFERS" and not (tmp_path / "other").exists()
    assert "count" in str(raised.value) and str(paths[2]) in str(raised.value)


# -- numbers that are none ----------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize(("value", "threads"), [(float("nan"), 1), (-float("inf"), 3)])
def test_a_number_that_is_none_is_found_and_named(tmp_path: Path, case: Case, value: float, threads: int) -> None:
    where = BLOCK + 4321
    paths = family(tmp_path, {"model.layers.0.mlp.up_proj.weight": torch.randn(250, 300), "z": torch.ones(9)}, 2)
    model = 1 if threads == 1 or not case.base else 0
    state = load(paths[model])
    state["model.layers.0.mlp.up_proj.weight"].view(-1)[where] = value
    save_file(state, paths[model] / "model.safetensors")
    with pytest.raises(NumbersError) as raised:
        merge(recipe_for(case, paths), tmp_path / "out", threads=threads)
    text = str(raised.value)
    assert raised.value.code == "E_NOT_FINITE" and not (tmp_path / "out").exists()
    assert f"element {where} is {value}" in text and str(paths[model]) in text
    assert "model.layers.0.mlp.up_proj.weight" in text


@each_case
def test_where_it_is_wished_it_stays_in_its_place(tmp_path: Path, case: Case) -> None:
    """One NaN, and a tensor of nothing else: the rest of the model must not notice."""
    paths = family(tmp_path, {"a": torch.randn(300, 300), "b": torch.randn(8), "c": torch.randn(50)}, 2)
    state = load(paths[1])
    state["a"][2, 3] = float("nan")
    state["b"][:] = float("nan")
    save_file(state, paths[1] / "model.safetensors")
    merge(recipe_for(case, paths, policies={"non_finite": "propagate"}), tmp_path / "out")
    found = load(tmp_path / "out")
    wrong = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in found.items()}
    dropped = case.method.startswith("dare")  # a dropped NaN may be gone
    assert wrong["c"] == 0 and wrong["a"] <= 1
    assert dropped or (wrong["a"], wrong["b"]) == (1, 8)
    assert dropped or not torch.isfinite(found["a"][2, 3])


def test_float16_is_not_the_arithmetic(tmp_path: Path) -> None:
    """40000 · 2 − 40000 · 0.5: infinite in float16, 60000 in the arithmetic."""
    paths = [save(tmp_path / str(k), {"w": torch.full((4,), 40000.0).half()}) for k in range(2)]
    weights = {"parameters": {"normalize": False}}
    merge(recipe("linear", [(paths[0], {"weight": 2}), (paths[1], {"weight": -0.5})], **weights), tmp_path / "out")
    assert load(tmp_path / "out")["w"].tolist() == [60000.0] * 4


@pytest.mark.parametrize(
    ("dtype", "largest"), [("float16", 65504.0), ("bfloat16", 3.3895e38), ("float32", 3.4028234e38)]
)
def test_what_does_not_fit_the_type_is_refused_or_allowed(tmp_path: Path, dtype: str, largest: float) -> None:
    size = BLOCK + 10
    values = torch.ones(size, dtype=torch.float64)
    values[BLOCK + 7] = largest
    paths = [save(tmp_path / str(k), {"small": torch.ones(3).double(), "w": values}) for k in range(2)]
    parameters = {"normalize": False, "weight": 0.75}
    what = recipe("linear", paths, parameters=parameters, dtype=dtype)
    with pytest.raises(NumbersError) as raised:
        merge(what, tmp_path / "out")
    assert raised.value.code == "E_OVERFLOW" and f"w: element {BLOCK + 7} is " in str(raised.value)
    merge(
        recipe("linear", paths, parameters=parameters, dtype=dtype, policies={"overflow": "allow"}),
        tmp_path / "allowed",
    )
    result = load(tmp_path / "allowed")["w"]
    assert result[BLOCK + 7] == float("inf") and int(torch.isinf(result).sum()) == 1


def test_overflow_and_nan_in_one_tensor_are_told_apart(tmp_path: Path) -> None:
    one = save(tmp_path / "one", {"w": torch.tensor([6e4, 1.0, float("nan")]).half()})
    two = save(tmp_path / "two", {"w": torch.tensor([6e4, 1.0, 1.0]).half()})
    parameters = {"weight": 1, "normalize": False}

    def code(**policies: str) -> str:
        with pytest.raises(NumbersError) as raised:
            merge(recipe("linear", [one, two], parameters=parameters, policies=policies), tmp_path / "out")
        return raised.value.code + str(raised.value)

    assert "E_NOT_FINITE" in (text := code(overflow="allow")) and "element 2 is nan" in text
    assert "E_OVERFLOW" in (text := code(non_finite="propagate")) and "element 0 is 120000" in text


# -- types --------------------------------------------------------------------------------------------


def test_a_result_is_rounded_once(tmp_path: Path) -> None:
    """The mean of float32 inputs lies just above the middle between two bfloat16 numbers. By way of float32 it
    would first be rounded onto the middle, and then to the even neighbour, which is the wrong one."""
    above = torch.tensor([1 + 2**-8 + 2**-23, -1 - 2**-8 - 2**-23, 1 + 2**-11 + 2**-23])
    middle = torch.tensor([1 + 2**-8, -1 - 2**-8, 1 + 2**-11])
    paths = [save(tmp_path / "a", {"w": above}), save(tmp_path / "b", {"w": middle})]
    for dtype, places, expected in (("bfloat16", [0, 1], [1 + 2**-7, -1 - 2**-7]), ("float16", [2], [1 + 2**-10])):
        merge(recipe("linear", paths, parameters={"weight": 1}, dtype=dtype), tmp_path / dtype)
        assert load(tmp_path / dtype)["w"][places].tolist() == expected
    save(tmp_path / "c", {"w": above.double() - 2**-24})
    what = recipe("passthrough", [tmp_path / "c"], dtype="bfloat16")
    merge(what, tmp_path / "converted")
    assert load(tmp_path / "converted")["w"][0] == 1 + 2**-7


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("wanted", ["float16", "bfloat16", "float32", "float64"])
def test_conversion(tmp_path: Path, given: Any, wanted: str) -> None:
    values = (torch.randn(3, 50, dtype=torch.float64) * 3).to(given)
    path = save(tmp_path / "m", {"w": values, "count": torch.arange(3)})
    merge(recipe("passthrough", [path], dtype=wanted), tmp_path / "out")
    result = load(tmp_path / "out")
    dtype = getattr(torch, wanted)
    exact = values.double()
    assert result["w"].dtype == dtype and torch.equal(result["count"], torch.arange(3))
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32 if dtype.itemsize == 4 else torch.int64
    error = (result["w"].double() - exact).abs()
    for step in (-1, 1):  # none of the neighbours is nearer
        neighbour = (result["w"].view(bits) + step).view(dtype).double()
        assert bool((error <= (neighbour - exact).abs()).all())


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float64),
        (torch.float16, torch.bfloat16, torch.float16),
        (torch.float64, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_mixed_types_are_computed_in_the_widest_and_written_as_the_base(
    tmp_path: Path, dtypes: tuple[Any, ...]
) -> None:
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(40, dtype=torch.float64, generator=generator).to(dtype) for dtype in dtypes]
    paths = [save(tmp_path / str(k), {"w": v}) for k, v in enumerate(values)]
    merge(recipe("task_arithmetic", [(p, {"weight": 0.25}) for p in paths[1:]], paths[0]), tmp_path / "out")
    base, one, two = (v.double() for v in values)
    exact = base + 0.25 * (one - base) + 0.25 * (two - base)
    result = load(tmp_path / "out")["w"]
    assert result.dtype == dtypes[0]
    arithmetic = torch.float32 if set(dtypes) <= {torch.float16, torch.bfloat16} else torch.float64
    limit = torch.finfo(dtypes[0]).eps / 2 * exact.abs()  # one rounding to the output's type, and then almost nothing
    limit += 3 * torch.finfo(arithmetic).eps * (base.abs() + one.abs() + two.abs())
    assert bool(((result.double() - exact).abs() <= limit).all())


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_tensors_of_no_and_one_element(tmp_path: Path, case: Case, dtype: Any) -> None:
    state = {
        "scalar": torch.tensor(0.5),
        "one": torch.tensor([[1.5]]),
        "empty": torch.zeros(0),
        "hollow": torch.zeros(3, 0, 2),
    }
    paths = family(tmp_path, {name: tensor.to(dtype) for name, tensor in state.items()}, 2)
    merge(recipe_for(case, paths), tmp_path / "out")
    result = load(tmp_path / "out")
    assert same_bits(result, in_memory(case, paths))
    assert {n: t.shape for n, t in result.items()} == {n: t.shape for n, t in state.items()}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in result.values())


@each_case
def test_nothing_but_empty_tensors(tmp_path: Path, case: Case) -> None:
    paths = family(tmp_path, {"a": torch.zeros(0), "b": torch.zeros(0, 3)}, 2)
    merge(recipe_for(case, paths), tmp_path / "out")
    assert same_bits(load(tmp_path / "out"), load(paths[0]))


# -- a LoRA adapter as an expert ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "dtype"),
    [(m, d) for m in ("ties", "linear") for d in (torch.float32, torch.bfloat16)] + [("pcb", torch.float32)],
    ids=str,
)
def test_an_adapter_is_worth_its_merged_model(tmp_path: Path, method: str, dtype: Any) -> None:
    """Small whole numbers over powers of two, so that base + α/r · B·A is exact in every type.

    (An adapter is read in a wider type than its base has, so that pcb's transcendental functions differ in last
    bits where the base has 16.)
    """
    generator = torch.Generator().manual_seed(1)

    def eighths(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator).to(dtype) / 8

    module = "model.layers.0.self_attn.q_proj"
    base = {
        f"{module}.weight": eighths(24, 16),
        "model.norm.weight": eighths(16),
        "model.embed_tokens.weight": eighths(10, 16),
    }
    a, b = eighths(2, 16), eighths(24, 2)
    paths = [save(tmp_path / "base", base)]
    paths.append(save(tmp_path / "other", {name: tensor + eighths(*tensor.shape) for name, tensor in base.items()}))
    full = dict(base) | {
        f"{module}.weight": (base[f"{module}.weight"].double() + 2 * (b.double() @ a.double())).to(dtype)
    }
    assert torch.equal(
        full[f"{module}.weight"].double(), base[f"{module}.weight"].double() + 2 * (b.double() @ a.double())
    )
    merged = save(tmp_path / "merged", full)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    prefix = f"base_model.model.{module}"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for expert, name in (({"model": str(paths[0]), "adapter": str(adapter)}, "a"), ({"model": str(merged)}, "m")):
        what = {"method": method, "experts": [expert, str(paths[1])], "parameters": {"weight": 0.5}}
        merge(Recipe.parse(what | ({} if method == "linear" else {"base": str(paths[0])})), tmp_path / name)
    assert same_bits(load(tmp_path / "a"), load(tmp_path / "m"))
    assert not same_bits(load(tmp_path / "a"), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("method", "weights"), [("task_arithmetic", [1.0]), ("linear", [1.0, 0.0])])
def test_what_is_copied_is_looked_at_too(tmp_path: Path, dtype: torch.dtype, method: str, weights: list[float]) -> None:
    paths = family(tmp_path, {"w": torch.randn(300, 300).to(dtype), "n": torch.arange(9)}, 2)
    state = load(paths[1])
    state["w"][7, 5] = float("nan")
    save_file(state, paths[1] / "model.safetensors")
    own = [(path, {"weight": weight}) for path, weight in zip(paths[1:], weights, strict=False)]
    base = paths[0] if method == "task_arithmetic" else None
    with pytest.raises(NumbersError) as raised:
        merge(recipe(method, own, base), tmp_path / "out")
    assert raised.value.code == "E_NOT_FINITE" and "element 2105 is nan" in str(raised.value)
    assert str(paths[1]) in str(raised.value) and not (tmp_path / "out").exists()
    merge(recipe(method, own, base, policies={"non_finite": "propagate"}), tmp_path / "copied")
    assert bool(torch.isnan(load(tmp_path / "copied")["w"][7, 5]))
