"""Running a plan: the same bytes whatever happens on the way, and a typed error where there can be none.

Everything here is real: files, threads, kills, full and read-only disks. Where that needs root and there is
none, the test is skipped and says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merging.checkpoints.output_rules import work_folder
from merging.checkpoints.verify import verify
from merging.engine import Progress, run
from merging.errors import AmalgamError, Cancelled, InputError, NumbersError, OutputError
from merging.methods import BLOCK, make
from merging.methods.scan import merge_tensors
from merging.plan import make_plan
from merging.recipe import Recipe
from merging.recipe_yaml import to_yaml
from tests.oracles import reference
from tests.small_checkpoints import INDEX, State, family, llama_like, load, merge, planned, raw, recipe, same_bits, save

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    id: str
    method: str
    shared: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    experts: int = 2
    base: bool = True


CASES = [
    Case("linear", "linear", own={"weight": 0.7}, base=False),
    Case("task_arithmetic", "task_arithmetic", {"lambda": 0.6}, {"weight": 0.7}),
    Case("ties", "ties", own={"weight": 0.7, "density": 0.3}),
    Case("ties-global", "ties", {"scope": "global"}, {"weight": 0.7, "density": 0.3}),
    Case("dare_ties", "dare_ties", own={"weight": 0.7, "density": 0.4}),
    Case("dare-l1", "dare_linear", {"rescale": "l1"}, {"weight": 0.7, "density": 0.4}),
    Case("slerp", "slerp", {"t": 0.3}, experts=1),
    Case("nuslerp", "nuslerp", own={"weight": 0.7}),
    Case("multislerp", "multislerp", own={"weight": 0.7}),
    Case("passthrough", "passthrough", own={"scale": 1.5}, experts=1, base=False),
    Case("pcb", "pcb"),
    Case("pcb-paper", "pcb", {"variant": "paper"}),
    Case("pcb-global", "pcb", {"scope": "global"}),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
ONE_OF_EACH_KIND = [c for c in CASES if c.id in ("ties", "pcb-global")]


def recipe_for(case: Case, paths: list[Path], **fields: Any) -> Recipe:
    experts = [(path, case.own) for path in paths[1 : case.experts + 1]]
    return recipe(case.method, experts, paths[0] if case.base else None, parameters=case.shared, seed=5, **fields)


def in_memory(case: Case, paths: list[Path]) -> State:
    """The same merge without engine and files."""
    base, *experts = [load(path) for path in paths[: case.experts + 1]]
    method = make(case.method, case.shared, [case.own] * case.experts)
    floats = {name for name, tensor in base.items() if tensor.is_floating_point()}
    models = [{n: t for n, t in m.items() if n in floats} for m in (base, *experts)]
    merged = merge_tensors(method, models[0] if case.base else None, models[1:], seed=5)
    first = base if case.base else experts[0]
    return {name: merged.get(name, tensor) for name, tensor in first.items()}


@dataclass
class Zoo:
    """One family of models in two layouts: a file each, and three shards each."""

    paths: list[Path]
    sharded: list[Path]
    results: dict[str, State] = field(default_factory=dict)

    def expected(self, case: Case) -> State:
        if case.id not in self.results:
            self.results[case.id] = in_memory(case, self.paths)
        return self.results[case.id]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Tensors of many blocks and of none, bfloat16 close to the base: full of entries of equal magnitude."""
    folder = tmp_path_factory.mktemp("zoo")
    generator = torch.Generator().manual_seed(0)
    state = llama_like(3, 24, dtype=torch.bfloat16)
    state["model.embed_tokens.weight"] = (torch.randn(1000, 280, generator=generator) * 0.02).bfloat16()
    state["lm_head.weight"] = (torch.randn(1000, 280, generator=generator) * 0.02).bfloat16()
    state |= {"scalar": torch.tensor(0.5).bfloat16(), "one": torch.tensor([0.25]).bfloat16(),
              "empty": torch.zeros(0, 4).bfloat16(), "counter": torch.arange(7)}  # fmt: skip
    assert state["lm_head.weight"].numel() > 4 * BLOCK
    return Zoo(family(folder / "1", state, 2, scale=1e-3), family(folder / "3", state, 2, scale=1e-3, shards=3))


# -- the same bytes whatever happens on the way -------------------------------------------------------


@each_case
def test_files_give_what_memory_gives(zoo: Zoo, case: Case, tmp_path: Path) -> None:
    result = merge(recipe_for(case, zoo.paths), tmp_path / "out")
    assert same_bits(load(result.folder), zoo.expected(case))
    assert verify(result.folder).ok


@each_case
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_matter(zoo: Zoo, case: Case, threads: int, tmp_path: Path) -> None:
    result = merge(recipe_for(case, zoo.paths), tmp_path / "out", threads=threads)
    assert same_bits(load(result.folder), zoo.expected(case))


@each_case
def test_neither_shards_nor_the_order_of_tensors_matter(zoo: Zoo, case: Case, tmp_path: Path) -> None:
    """Inputs in three shards, so in another order; output in two."""
    result = merge(recipe_for(case, zoo.sharded), tmp_path / "out", shard_size=1_000_000)
    assert len(list(result.folder.glob("*.safetensors"))) >= 2
    assert same_bits(load(result.folder), zoo.expected(case))


@each_case
def test_a_merge_that_was_stopped_goes_on(zoo: Zoo, case: Case, tmp_path: Path) -> None:
    """Stopped again and again, each time after a few blocks more, by the event that the user interface has."""
    what, out, kept = recipe_for(case, zoo.paths), tmp_path / "out", -1
    for blocks in range(1, 200, 8):
        stop, seen = threading.Event(), [0]

        def count(_: Progress, stop: threading.Event = stop, seen: list[int] = seen, blocks: int = blocks) -> None:
            seen[0] += 1
            if seen[0] == blocks:
                stop.set()

        try:
            result = merge(what, out, stop=stop, on_progress=count, threads=1 + blocks % 2)
        except Cancelled:
            assert not out.exists()
            continue
        kept = result.resumed
        break
    assert kept > 0
    assert same_bits(load(out), zoo.expected(case)) and verify(out).ok
    assert not work_folder(out).exists()


@pytest.mark.parametrize("case", ONE_OF_EACH_KIND, ids=lambda case: case.id)
def test_kill_9_then_the_same_merge_again(zoo: Zoo, case: Case, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe_for(case, zoo.paths)))
    command = [sys.executable, "app.py", "merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "--threads", "2"]
    chance = random.Random(case.id)
    journal = work_folder(tmp_path / "out") / "journal"
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not journal.exists():
        time.sleep(0.001)
    time.sleep(chance.uniform(0.05, 0.4))
    child.kill()
    child.communicate()
    if child.returncode == -signal.SIGKILL:
        assert not (tmp_path / "out").exists() or verify(tmp_path / "out").ok
    if not (tmp_path / "out").exists():
        merge(recipe_for(case, zoo.paths), tmp_path / "out")
    assert same_bits(load(tmp_path / "out"), zoo.expected(case)) and verify(tmp_path / "out").ok


def test_another_recipe_does_not_take_over_unfinished_work(zoo: Zoo, tmp_path: Path) -> None:
    one, two = (recipe_for(case, zoo.paths) for case in CASES[1:3])
    stop, seen = threading.Event(), []

    def stop_when_something_is_kept(progress: Progress) -> None:
        seen.append(progress.tensor)
        if len(set(seen)) == 4:
            stop.set()

    with pytest.raises(Cancelled):
        merge(one, tmp_path / "out", stop=stop, on_progress=stop_when_something_is_kept)
    with pytest.raises(OutputError) as raised:
        merge(two, tmp_path / "out")
    assert raised.value.code == "E_RESUME"
    result = merge(two, tmp_path / "out", restart=True)
    assert result.resumed == 0 and same_bits(load(result.folder), zoo.expected(CASES[2]))


def test_the_seed_decides_about_random_methods_only(zoo: Zoo, tmp_path: Path) -> None:
    dare, ties = (next(c for c in CASES if c.id == name) for name in ("dare_ties", "ties"))
    for case, same in ((dare, False), (ties, True)):
        merge(recipe_for(case, zoo.paths).model_copy(update={"seed": 6}), tmp_path / case.id)
        assert same_bits(load(tmp_path / case.id), zoo.expected(case)) is same


def test_a_tensor_does_not_depend_on_the_others(zoo: Zoo, tmp_path: Path) -> None:
    """But for global rules, where that is the point."""
    other = load(zoo.paths[1])
    other["lm_head.weight"] = other["lm_head.weight"] * 3
    changed = [zoo.paths[0], save(tmp_path / "changed", other), zoo.paths[2]]
    for case in CASES[:6] + CASES[10:]:
        before, after = zoo.expected(case), in_memory(case, changed)
        different = {name for name in before if raw(before[name]) != raw(after[name])}
        assert (different > {"lm_head.weight"}) if "global" in case.id else (different == {"lm_head.weight"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_global_rule_ranks_the_whole_model(tmp_path: Path, seed: int, dtype: Any) -> None:
    """Against the naive references over all tensors at once, in the order of their names, which is not the order of
    the file; in bfloat16 with many entries exactly on the threshold."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": (30,), "b": (4, 5), "c": (0,), "d": (), "e": (40,)}
    state = {n: (torch.randn(s, generator=generator) * 0.5).to(dtype) for n, s in sizes.items()}
    paths = family(tmp_path, state, 2, scale=0.004 if dtype == torch.bfloat16 else 0.1, seed=seed, shards=3)
    models = [[load(path)[name].double().numpy() for name in sorted(sizes)] for path in paths]
    kept = int(0.3 * sum(tensor.size for tensor in models[0]))
    for count in (1, 2):
        own = [{"weight": w, "density": 0.3} for w in (0.7, 1.1)[:count]]
        experts = list(zip(paths[1:], own, strict=False))
        merge(recipe("ties", experts, paths[0], parameters={"scope": "global"}, dtype="float64"), tmp_path / str(count))
        found = load(tmp_path / str(count))
        weights = [e["weight"] for e in own]
        expected = reference.ties(models[0], models[1 : count + 1], weights, 0.3, scope="global")
        for name, array in zip(sorted(sizes), expected, strict=True):
            assert torch.allclose(found[name], torch.as_tensor(array).double().view(sizes[name]), rtol=1e-6, atol=1e-7)
        if count == 1:
            changed = [int((found[n] != torch.as_tensor(m).view(sizes[n])).sum()) for n, m in zip(sorted(sizes), models[0], strict=True)]
            assert sum(changed) == kept
    merge(recipe("pcb", paths[1:], paths[0], parameters={"scope": "global"}, dtype="float64"), tmp_path / "pcb")
    expected = reference.pcb(models[0], models[1:], 0.2, 1.0, 0.01, scope="global")
    found = load(tmp_path / "pcb")
    for name, array in zip(sorted(sizes), expected, strict=True):
        assert torch.allclose(found[name], torch.as_tensor(array).double().view(sizes[name]), rtol=1e-5, atol=1e-6)


def test_inputs_are_not_touched(zoo: Zoo, tmp_path: Path) -> None:
    def state() -> dict[str, tuple[str, int]]:
        files = [f for path in zoo.paths for f in path.iterdir()]
        return {str(f): (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns) for f in files}

    before = state()
    merge(recipe_for(CASES[2], zoo.paths), tmp_path / "out", threads=2)
    assert state() == before


def test_progress_only_grows_and_ends_at_the_total(zoo: Zoo, tmp_path: Path) -> None:
    for case in CASES:
        seen: list[tuple[int, int, int]] = []
        merge(recipe_for(case, zoo.paths), tmp_path / case.id, threads=2,
              on_progress=lambda p: seen.append((p.done, p.moved, p.total)))  # fmt: skip
        assert seen == sorted(seen) and len({total for _, _, total in seen}) == 1
        assert seen[-1][0] == seen[-1][2] and seen[-1][1] > 0


# -- the manifest and the other files -----------------------------------------------------------------


def test_the_manifest_reproduces_the_merge(zoo: Zoo, tmp_path: Path) -> None:
    case = CASES[2]
    what = recipe_for(case, zoo.paths)
    result = merge(what, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert Recipe.parse(manifest["recipe"]) == what
    with planned(what) as plan:
        assert manifest["plan_hash"] == plan.hash
        assert manifest["coefficients"] == json.loads(json.dumps(plan.coefficients()))
    assert manifest["inputs"].keys() == {str(p) for p in zoo.paths}
    assert {"amalgam", "torch", "python", "numpy"} <= manifest["versions"].keys()
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert manifest["files"]["model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()
    tensors = load(tmp_path / "out")
    for name, entry in manifest["tensors"].items():
        assert entry["sha256"] == hashlib.sha256(raw(tensors[name])).hexdigest()
    assert result.manifest["delta_survival"] == manifest["delta_survival"]


def test_a_sharded_model_has_a_right_index(zoo: Zoo, tmp_path: Path) -> None:
    merge(recipe_for(CASES[0], zoo.paths), tmp_path / "out", shard_size=1_000_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    seen, total = {}, 0
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        raw_bytes = path.read_bytes()
        size = int.from_bytes(raw_bytes[:8], "little")
        header = json.loads(raw_bytes[8 : 8 + size])
        assert header.pop("__metadata__") == {"format": "pt"}
        here = sum(end - begin for begin, end in (entry["data_offsets"] for entry in header.values()))
        assert here <= 1_000_000 and 8 + size + here == len(raw_bytes)
        seen |= dict.fromkeys(header, path.name)
        total += here
    assert index == {"metadata": {"total_size": total}, "weight_map": seen}


def test_delta_survival_is_what_a_direct_count_gives(tmp_path: Path) -> None:
    """No tensor longer than a block, so that everything is counted."""
    paths = family(tmp_path, llama_like(2, 48, dtype=torch.bfloat16), 2, scale=2e-3)
    what = recipe("task_arithmetic", [(path, {"weight": 0.15}) for path in paths[1:]], paths[0])
    result = merge(what, tmp_path / "out")
    base, one, two, out = (load(path) for path in (*paths, tmp_path / "out"))
    changed = lost = 0
    for name, before in base.items():
        exact = before.double() + 0.15 * (one[name].double() - before.double() + two[name].double() - before.double())
        moved = (exact - before.double()).abs() > 1e-12
        changed += int(moved.sum())
        lost += int((moved & (out[name] == before)).sum())
    survival = result.manifest["delta_survival"]
    assert survival["changed_entries_counted"] == pytest.approx(changed, rel=1e-3)
    assert survival["survived"] == pytest.approx(1 - lost / changed, abs=1e-3)
    assert 0.05 < lost / changed < 0.95
    assert any("rounded" in warning for warning in result.warnings) == (survival["survived"] < 0.9)
    wide = merge(what.model_copy(update={"dtype": "float32"}), tmp_path / "wide")
    assert wide.manifest["delta_survival"] is None


# -- copies: bit for bit ------------------------------------------------------------------------------


def strange(dtype: Any) -> Tensor:
    """Zeros of both signs, subnormals, extremes, infinities, and NaNs of both signs with payloads."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    top = 1 << (8 * dtype.itemsize - 1)
    info = torch.finfo(dtype)
    nan = int(torch.tensor(float("nan"), dtype=dtype).view(bits))
    patterns = [0, -top, 1, 1 - top, nan, nan | 5, (nan | 9) - top, nan - top]
    numbers = torch.tensor([info.max, info.min, info.tiny, info.eps, float("inf"), -float("inf"), 1.0, -1.0], dtype=dtype)
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
    """Coefficient 0 leaves the base, a lone expert with weight 1 is the expert: every bit, also of NaNs."""
    values = [strange(dtype), strange(dtype).flip(0), strange(dtype).flip(1)]
    paths = [save(tmp_path / str(k), {"w": v, "v": v[0], "scalar": v[0, 1]}) for k, v in enumerate(values)]
    experts = list(zip(paths[1:], own, strict=False))
    base = None if method in ("linear", "passthrough", "nuslerp") else paths[0]
    merge(recipe(method, experts, base, parameters=shared), tmp_path / "out")
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
def test_a_number_that_is_none_is_found_and_named(
    tmp_path: Path, case: Case, value: float, threads: int
) -> None:
    where = BLOCK + 4321
    paths = family(tmp_path, {"model.layers.0.mlp.up_proj.weight": torch.randn(300, 300), "z": torch.ones(9)}, 2)
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
    merge(recipe("linear", paths, parameters=parameters, dtype=dtype, policies={"overflow": "allow"}), tmp_path / "allowed")
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
def test_mixed_types_are_computed_in_the_widest_and_written_as_the_base(tmp_path: Path, dtypes: tuple[Any, ...]) -> None:
    values = [torch.randn(40, dtype=torch.float64).to(dtype) for dtype in dtypes]
    paths = [save(tmp_path / str(k), {"w": v}) for k, v in enumerate(values)]
    merge(recipe("task_arithmetic", [(p, {"weight": 0.25}) for p in paths[1:]], paths[0]), tmp_path / "out")
    base, one, two = (v.double() for v in values)
    exact = base + 0.25 * (one - base) + 0.25 * (two - base)
    result = load(tmp_path / "out")["w"]
    assert result.dtype == dtypes[0]
    limit = torch.finfo(dtypes[0]).eps / 2 * exact.abs() * (1.001 if dtypes[0] != torch.float64 else 4)
    narrow = {torch.float16, torch.bfloat16}
    if set(dtypes) <= narrow:  # then the arithmetic is float32
        limit = limit + 3 * torch.finfo(torch.float32).eps * (base.abs() + one.abs() + two.abs())
    assert bool(((result.double() - exact).abs() <= limit).all())


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_tensors_of_no_and_one_element(tmp_path: Path, case: Case, dtype: Any) -> None:
    state = {"scalar": torch.tensor(0.5), "one": torch.tensor([[1.5]]), "empty": torch.zeros(0), "hollow": torch.zeros(3, 0, 2)}
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
    base = {f"{module}.weight": eighths(24, 16), "model.norm.weight": eighths(16), "model.embed_tokens.weight": eighths(10, 16)}
    a, b = eighths(2, 16), eighths(24, 2)
    paths = [save(tmp_path / "base", base)]
    paths.append(save(tmp_path / "other", {name: tensor + eighths(*tensor.shape) for name, tensor in base.items()}))
    full = dict(base) | {f"{module}.weight": (base[f"{module}.weight"].double() + 2 * (b.double() @ a.double())).to(dtype)}
    assert torch.equal(full[f"{module}.weight"].double(), base[f"{module}.weight"].double() + 2 * (b.double() @ a.double()))
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


# -- a world that does not keep still -----------------------------------------------------------------


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def _replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def _overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"12345")


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [_cut, _replace, _overwrite, _remove])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_input_that_changes_during_the_run(
    zoo: Zoo, tmp_path: Path, change: Callable[[Path], None], threads: int
) -> None:
    case = CASES[2]
    paths = [save(tmp_path / str(k), load(path)) for k, path in enumerate(zoo.paths)]
    changed: list[bool] = []

    def once(_: Progress) -> None:
        if not changed:
            changed.append(True)
            change(paths[2] / "model.safetensors")

    with pytest.raises(InputError) as raised:
        merge(recipe_for(case, paths), tmp_path / "out", on_progress=once, threads=threads)
    assert raised.value.code == "E_INPUT_CHANGED" and str(paths[2]) in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_an_input_that_changed_since_the_plan(zoo: Zoo, tmp_path: Path) -> None:
    paths = [save(tmp_path / str(k), load(path)) for k, path in enumerate(zoo.paths)]
    with planned(recipe_for(CASES[1], paths)) as plan:
        _overwrite(paths[1] / "model.safetensors")
        with pytest.raises(InputError) as raised:
            run(plan, tmp_path / "out", device="cpu")
    assert raised.value.code == "E_INPUT_CHANGED" and not (tmp_path / "out").exists()


def test_two_merges_into_one_name(zoo: Zoo, tmp_path: Path) -> None:
    started, finish, errors = threading.Event(), threading.Event(), []

    def wait(_: Progress) -> None:
        started.set()
        finish.wait(60)

    first = threading.Thread(target=lambda: merge(recipe_for(CASES[2], zoo.paths), tmp_path / "out", on_progress=wait))
    first.start()
    try:
        assert started.wait(60)
        for case in (CASES[2], CASES[1]):
            with pytest.raises(OutputError) as raised:
                merge(recipe_for(case, zoo.paths), tmp_path / "out", restart=True)
            errors.append(raised.value.code)
    finally:
        finish.set()
        first.join()
    assert errors == ["E_BUSY", "E_BUSY"]
    assert same_bits(load(tmp_path / "out"), zoo.expected(CASES[2]))
    with pytest.raises(OutputError) as raised:
        merge(recipe_for(CASES[2], zoo.paths), tmp_path / "out")
    assert raised.value.code == "E_OUTPUT_EXISTS"


@pytest.mark.parametrize("case", ONE_OF_EACH_KIND, ids=lambda case: case.id)
@pytest.mark.parametrize("moment", ["first block", "all computed"])
def test_cancelling_takes_less_than_two_seconds(zoo: Zoo, tmp_path: Path, case: Case, moment: str) -> None:
    stop, asked = threading.Event(), []

    def ask(progress: Progress) -> None:
        if not asked and (moment == "first block" or progress.done == progress.total):
            asked.append(time.monotonic())
            stop.set()

    with pytest.raises(Cancelled):
        merge(recipe_for(case, zoo.paths), tmp_path / "out", stop=stop, on_progress=ask, threads=2)
    assert time.monotonic() - asked[0] < 2
    assert not (tmp_path / "out").exists()
    stop.clear()
    merge(recipe_for(case, zoo.paths), tmp_path / "out", stop=stop)
    assert same_bits(load(tmp_path / "out"), zoo.expected(case))


def test_an_error_is_not_taken_for_the_users_wish_to_stop(tmp_path: Path) -> None:
    paths = family(tmp_path, llama_like(4), 1)
    state = load(paths[1])
    state["lm_head.weight"][0] = float("nan")
    save_file(state, paths[1] / "model.safetensors")
    stop = threading.Event()
    with pytest.raises(NumbersError):
        merge(recipe("linear", paths, parameters={"weight": 1}), tmp_path / "out", threads=3, stop=stop)
    assert not stop.is_set()


# -- the machine --------------------------------------------------------------------------------------


def test_too_little_memory(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as raised:
        merge(recipe_for(CASES[2], zoo.paths), tmp_path / "out", memory=10_000_000)
    assert raised.value.code == "E_MEMORY" and "--memory" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_system_that_gives_no_more_memory(tmp_path: Path) -> None:
    """In a process of its own that may not grow by more than a megabyte once everything is loaded."""
    code = """if True:
        import resource, sys
        from pathlib import Path
        import torch, merging.engine, merging.methods.pcb
        from merging.errors import AmalgamError
        from tests.small_checkpoints import family, planned, recipe
        folder = Path(sys.argv[1])
        paths = family(folder, {"w": torch.randn(1000, 700)}, 2)
        with planned(recipe("pcb", paths[1:], paths[0])) as plan:
            limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (1 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            try:
                merging.engine.run(plan, folder / "out", device="cpu", threads=3)
            except AmalgamError as error:
                print(error.code)
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("NOT TESTED: no /proc")
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (child.stdout, child.stderr) == ("E_MEMORY\n", "")


def test_a_device_that_is_not_there(zoo: Zoo, tmp_path: Path) -> None:
    for device in ("mps", "cuda:99", "abacus", ""):
        if device == "cuda:99" and torch.cuda.is_available():
            continue
        with pytest.raises(OutputError) as raised:
            merge(recipe_for(CASES[2], zoo.paths), tmp_path / "out", device=device)
        assert raised.value.code == "E_DEVICE"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts (or mounts again) a disk in memory with the given options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        remount = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", remount + options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"NOT TESTED: mount cannot be run: {error}")
        if done.returncode:
            pytest.skip(f"NOT TESTED: mounting is not permitted here: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_noticed_before_the_work(zoo: Zoo, small_disk: Callable[[str], Path]) -> None:
    disk, asked = small_disk("size=600k"), []
    with pytest.raises(OutputError) as raised:
        merge(recipe_for(CASES[2], zoo.paths), disk / "out", on_progress=asked.append)
    assert raised.value.code == "E_NO_SPACE" and asked == [] and not (disk / "out").exists()


def test_a_disk_that_fills_up_at_the_end(zoo: Zoo, small_disk: Callable[[str], Path]) -> None:
    """The weights find room, the manifest does not. With more room the same command ends well."""
    what = recipe_for(CASES[2], zoo.paths)
    with planned(what) as plan:
        room = plan.bytes_written // 4096 * 4 + 8
    disk = small_disk(f"size={room}k")
    for _ in range(2):
        with pytest.raises(OutputError) as raised:
            merge(what, disk / "out")
        assert raised.value.code == "E_NO_SPACE" and not (disk / "out").exists()
    result = merge(what, small_disk("size=20m") / "out")
    assert same_bits(load(result.folder), zoo.expected(CASES[2])) and verify(result.folder).ok


def test_a_read_only_disk(zoo: Zoo, small_disk: Callable[[str], Path]) -> None:
    small_disk("size=20m")
    disk, asked = small_disk("ro"), []
    with pytest.raises(OutputError) as raised:
        merge(recipe_for(CASES[2], zoo.paths), disk / "out", on_progress=asked.append)
    assert raised.value.code == "E_OUTPUT_WRITE" and asked == [] and list(disk.iterdir()) == []


def test_an_output_inside_of_an_input_is_an_ordinary_folder(tmp_path: Path) -> None:
    """But an input is never overwritten."""
    paths = family(tmp_path, llama_like(1), 1)
    what = recipe("ties", paths[1:], paths[0])
    with pytest.raises(AmalgamError) as raised:
        merge(what, paths[0])
    assert raised.value.code == "E_OUTPUT_EXISTS"
    merge(what, paths[0] / "merged")
    with make_plan(what) as plan:
        assert plan.blockers == []
