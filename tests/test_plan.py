"""What a plan says before a single weight is read: coefficients, files, costs, blockers, and the hash."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from merging.engine import run, threads_within
from merging.errors import AmalgamError, InputError, OutputError, RecipeError
from merging.plan import Plan, index_file, make_plan
from merging.recipe import Recipe
from merging.recipe_yaml import load_recipe, to_yaml
from tests.small_checkpoints import family, llama_like, planned, recipe, save

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two experts with five blocks."""
    return family(tmp_path_factory.mktemp("models"), llama_like(5), 2)


def weights(plan: Plan, parameter: str = "weight", expert: int = 0) -> dict[str, float]:
    """Tensor -> the value that holds for it, from the methods that the engine will use."""
    return {t.name: getattr(t.method.experts[expert], parameter) for t in plan.tensors if t.method}


def up(block: int) -> str:
    return f"model.layers.{block}.mlp.up_proj.weight"


# -- coefficients -------------------------------------------------------------------------------------


def test_effective_coefficients_are_what_stands_before_each_expert(models: list[Path]) -> None:
    what = recipe("linear", [(models[1], {"weight": 0.1}), (models[2], {"weight": 1.0})])
    (group,) = planned(what).coefficients()
    assert group["effective"] == pytest.approx([0.1 / 1.1, 1 / 1.1])
    assert group["tensors"] == len(llama_like(5)) and group["shared"] == {"normalize": True}
    what = recipe(
        "task_arithmetic",
        [(models[1], {"weight": 0.5}), (models[2], {"weight": -1.0})],
        models[0],
        parameters={"lambda": 0.4},
    )
    assert planned(what).coefficients()[0]["effective"] == pytest.approx([0.2, -0.4])
    assert planned(recipe("ties", models[1:], models[0])).coefficients()[0]["effective"] is None


def test_gradients_run_over_the_depth(models: list[Path]) -> None:
    plan = planned(recipe("task_arithmetic", [(models[1], {"weight": [0, 1, 0.5]})], models[0]))
    given = weights(plan)
    assert up(0) not in given, "weight 0 is a copy of the base"
    assert {b: given[up(b)] for b in (1, 2, 3, 4) if up(b) in given} == {1: 0.5, 3: 0.75, 4: 0.5}
    assert up(2) not in given, "weight 1 of a lone expert is a copy of it"
    actions = {t.name: (t.action, t.sources[0]) for t in plan.tensors}
    assert actions[up(0)] == ("copy", plan.models[str(models[0])].tensors[up(0)])
    assert actions[up(2)] == ("copy", plan.models[str(models[1])].tensors[up(2)])
    groups = plan.coefficients()
    assert sorted(g["effective"][0] for g in groups) == [0.5, 0.75]
    assert sum(g["tensors"] for g in groups) == len(given)


def test_filters_choose_by_name_and_the_nearest_level_wins(models: list[Path]) -> None:
    own = {"density": [{"filter": "mlp", "value": [0.2, 0.6]}, {"filter": "layers.1.", "value": 0.9}]}
    plan = planned(recipe("ties", [(models[1], own), models[2]], models[0], parameters={"density": 0.4}))
    first, second = weights(plan, "density"), weights(plan, "density", 1)
    assert first[up(0)] == pytest.approx(0.2) and first[up(4)] == pytest.approx(0.6)
    assert first[up(1)] == pytest.approx(0.3), "the first condition that holds"
    assert first["model.layers.1.self_attn.q_proj.weight"] == 0.9
    assert first["model.layers.2.self_attn.q_proj.weight"] == 0.4, "no condition holds: the recipe's own"
    assert set(second.values()) == {0.4}


def test_slices_are_runs_of_their_own(models: list[Path]) -> None:
    def part(first: int, end: int, **parameters: Any) -> dict[str, Any]:
        layers = [{"model": str(m), "layers": [first, end]} for m in models[:2]]
        return {"sources": layers, "parameters": parameters}

    what = Recipe.parse({
        "method": "slerp", "base": str(models[0]), "experts": [str(models[1])], "parameters": {"t": [0.25, 0.75]},
        "slices": [part(0, 3), part(3, 5, t=0.125)]})  # fmt: skip
    plan = planned(what)
    t = {tensor.name: tensor.method.shared.t for tensor in plan.tensors if tensor.method}
    assert [t[up(b)] for b in range(5)] == [0.25, 0.5, 0.75, 0.125, 0.125]
    assert t["model.embed_tokens.weight"] == 0.25, "as the first slice, at t = 0"
    assert t["lm_head.weight"] == 0.125, "as the last slice"


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("embeddings", ["model.embed_tokens.weight"]),
        ("head", ["lm_head.weight"]),
        ("norms", ["model.norm.weight", *(f"model.layers.{i}.input_layernorm.weight" for i in range(5))]),
        ("biases", []),
    ],
)
def test_what_is_not_included_stays_as_in_the_base(models: list[Path], kind: str, names: list[str]) -> None:
    plan = planned(recipe("ties", models[1:], models[0], include={kind: False}))
    assert {t.name for t in plan.tensors if t.action == "copy"} == set(names)
    base = plan.models[str(models[0])]
    assert all(t.sources == [base.tensors[t.name]] for t in plan.tensors if t.action == "copy")
    assert not [t for t in planned(recipe("ties", models[1:], models[0])).tensors if t.action == "copy"]


def test_without_a_base_the_first_expert_supplies_what_is_not_included(models: list[Path]) -> None:
    plan = planned(recipe("linear", models[1:], parameters={"weight": 1}, include={"head": False}))
    (head,) = [t for t in plan.tensors if t.action == "copy"]
    assert head.name == "lm_head.weight" and head.sources == [plan.models[str(models[1])].tensors[head.name]]


@pytest.mark.parametrize(
    ("method", "shared", "own"),
    [
        ("task_arithmetic", {}, {"weight": 1e39}),
        ("task_arithmetic", {"lambda": 1e20}, {"weight": 1e20}),
        ("linear", {}, {"weight": 1e308}),
        ("ties", {"lambda": 1e39}, {"weight": 1.0}),
        ("ties", {"scope": "global"}, {"weight": -1e39}),
        ("pcb", {}, {"weight": 1e31}),
        ("slerp", {"t": 1e39}, {}),
    ],
)
def test_numbers_that_no_arithmetic_survives(
    models: list[Path], method: str, shared: dict[str, Any], own: dict[str, Any]
) -> None:
    experts = [(m, own) for m in models[1 : 2 if method == "slerp" else 3]]
    with pytest.raises(RecipeError, match="too large"):
        make_plan(recipe(method, experts, models[0], parameters=shared))


@pytest.mark.parametrize("parameters", [{"density": [0.2, 0.8]}, {"density": [{"filter": "mlp", "value": 0.3}]}])
def test_a_global_rule_needs_one_rule_for_all(models: list[Path], parameters: dict[str, Any]) -> None:
    what = recipe("ties", models[1:], models[0], parameters={"scope": "global", **parameters})
    with pytest.raises(RecipeError, match="scope: global"):
        make_plan(what)


def test_a_global_rule_needs_the_same_experts_everywhere(models: list[Path]) -> None:
    one, two = str(models[1]), str(models[2])

    def part(first: int, *names: str) -> dict[str, Any]:
        return {"sources": [{"model": name, "layers": [first, first + 1]} for name in names]}

    what = {"method": "pcb", "base": str(models[0]), "experts": [one, two]}
    for slices in ([part(0, one, two), part(1, one)], [part(0, one, two), part(1, two, one)]):
        with pytest.raises(RecipeError, match="same experts"):
            make_plan(Recipe.parse({**what, "parameters": {"scope": "global"}, "slices": slices}))
        make_plan(Recipe.parse({**what, "slices": slices})).close()


# -- files --------------------------------------------------------------------------------------------


def test_shards_hold_whole_tensors_up_to_their_size(tmp_path: Path) -> None:
    state = {f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(100, 1000) for i in range(7)}  # 400 kB each
    state["model.embed_tokens.weight"] = torch.zeros(3000, 1000, dtype=torch.bfloat16)  # 6 MB
    paths = [save(tmp_path / name, state) for name in "ab"]
    plan = planned(recipe("linear", paths, parameters={"weight": 1}), shard_size=1_000_000)
    assert [f.name for f in plan.files] == [
        f"model-{i:05d}-of-{len(plan.files):05d}.safetensors" for i in range(1, len(plan.files) + 1)
    ]
    sizes = [sum(e.nbytes for e in f.entries.values()) for f in plan.files]
    assert sorted(sizes) == [400_000, 800_000, 800_000, 800_000, 6_000_000]
    content = index_file(plan.files)
    assert content is not None
    index = json.loads(content)
    assert index["metadata"]["total_size"] == sum(sizes) == sum(t.nbytes for t in plan.tensors)
    assert index["weight_map"] == {name: f.name for f in plan.files for name in f.entries}
    assert index["weight_map"].keys() == state.keys()
    assert index_file(planned(recipe("linear", paths, parameters={"weight": 1})).files) is None
    with pytest.raises(OutputError, match="shard size"):
        make_plan(recipe("linear", paths, parameters={"weight": 1}), shard_size=999_999)


@pytest.mark.parametrize(
    ("dtype", "code"), [(None, "F32"), ("bfloat16", "BF16"), ("float16", "F16"), ("float64", "F64")]
)
def test_the_output_has_the_type_that_the_recipe_asks_for(models: list[Path], dtype: str | None, code: str) -> None:
    plan = planned(recipe("ties", models[1:], models[0], **({"dtype": dtype} if dtype else {})))
    assert {t.dtype for t in plan.tensors} == {code}
    assert plan.bytes_written == sum(t.nbytes for t in plan.tensors) + sum(len(f.header) for f in plan.files)


def test_integers_keep_their_type(tmp_path: Path) -> None:
    paths = [save(tmp_path / n, {"w": torch.ones(4), "count": torch.arange(3)}) for n in "ab"]
    plan = planned(recipe("linear", paths, parameters={"weight": 1}, dtype="bfloat16"))
    assert {t.name: (t.dtype, t.action) for t in plan.tensors} == {"w": ("BF16", "merge"), "count": ("I64", "equal")}


# -- costs --------------------------------------------------------------------------------------------


def test_bytes_are_counted_for_every_pass(models: list[Path]) -> None:
    size = sum(t.nbytes for t in llama_like(5).values())
    assert planned(recipe("linear", models[1:], parameters={"weight": 1})).bytes_read == 2 * size
    ties = planned(recipe("ties", models[1:], models[0]))
    assert ties.bytes_read == 3 * size * ties.recipe.method_class.passes
    copies = planned(recipe("task_arithmetic", [(models[1], {"weight": 0})], models[0]))
    assert copies.bytes_read == size


def test_threads_fit_into_the_memory_that_is_allowed(models: list[Path]) -> None:
    plan = planned(recipe("ties", models[1:], models[0]))
    needs = [plan.memory(threads) for threads in (1, 2, 3)]
    assert needs[0] < needs[1] < needs[2]
    assert threads_within(plan, 8, needs[2]) == 3
    assert threads_within(plan, 2, needs[2]) == 2
    with pytest.raises(OutputError, match="memory") as raised:
        threads_within(plan, 8, needs[0] - 1)
    assert raised.value.code == "E_MEMORY"


def test_planning_reads_headers_and_not_weights(tmp_path: Path) -> None:
    """Three models of 200 GB each, all of it holes in the file."""
    paths = []
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name)
        side, rows = 100_000, 1_000_000
        header = json.dumps({"model.embed_tokens.weight": {
            "dtype": "BF16", "shape": [rows, side], "data_offsets": [0, 2 * rows * side]}}).encode()  # fmt: skip
        with open(paths[-1] / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + 2 * rows * side)
    began = time.process_time()
    plan = planned(recipe("ties", paths[1:], paths[0]))
    assert time.process_time() - began < 2
    assert plan.bytes_written > 200e9 and plan.as_dict()["parameters"] == 10**11
    with pytest.raises(OutputError) as raised:
        run(plan, tmp_path / "out", device="cpu")
    assert raised.value.code == "E_NO_SPACE" and not (tmp_path / "out").exists()


def test_planning_needs_no_torch(models: list[Path]) -> None:
    """Importing torch costs more than planning a large merge."""
    what = recipe("pcb", models[1:], models[0], parameters={"ratio": [0.1, 0.3]}, dtype="bfloat16")
    code = (
        "import sys; from merging.recipe_yaml import load_recipe; from merging.plan import make_plan\n"
        "plan = make_plan(load_recipe(sys.argv[1]).recipe); plan.as_dict()\n"
        "print([name for name in ('torch', 'transformers', 'safetensors') if name in sys.modules], plan.hash)"
    )
    hashes = set()
    for seed in "01":  # of Python's own hashes: a set's order must not get into ours
        child = subprocess.run(
            [sys.executable, "-c", code, to_yaml(what)],
            cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": seed})  # fmt: skip
        assert child.stderr == ""
        loaded, _, found = child.stdout.strip().rpartition(" ")
        assert loaded == "[]"
        hashes.add(found)
    assert hashes == {planned(what).hash}


# -- the hash -----------------------------------------------------------------------------------------

TEXT = """
method: ties
base: {base}
experts:
  - {{model: {one}, parameters: {{weight: 0.5}}}}
  - {two}
parameters: {{density: 0.5, lambda: 1, weight: 1}}
"""


def text_for(models: list[Path]) -> str:
    return TEXT.format(base=models[0], one=models[1], two=models[2])


def hash_of(text: str, **options: Any) -> str:
    with make_plan(load_recipe(text).recipe, **options) as plan:
        return plan.hash


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("method: ties", "method: dare_ties"),
        ("weight: 0.5", "weight: 0.25"),
        ("weight: 0.5", "weight: [0.5, 0.5, 0.25]"),
        ("weight: 0.5", "weight: 0.5, density: 0.1"),
        ("density: 0.5", "density: 0.500001"),
        ("lambda: 1", "lambda: 1.1"),
        ("lambda: 1", "lambda: 1, normalize: false"),
        ("lambda: 1", "lambda: 1, scope: global"),
        ("", "seed: 1\n"),
        ("", "dtype: bfloat16\n"),
        ("", "include: {norms: false}\n"),
        ("", "include: {embeddings: false}\n"),
        ("", "policies: {overflow: allow}\n"),
        ("", "policies: {extra_tensors: drop}\n"),
        ("", "tokenizer: {source: base}\n"),
        ("", "chat_template: none\n"),
    ],
)
def test_every_field_that_counts_is_in_the_hash(models: list[Path], old: str, new: str) -> None:
    text = text_for(models)
    changed = text.replace(old, new, 1) if old else text + new
    assert changed != text
    assert hash_of(changed) != hash_of(text)


def test_the_order_of_experts_and_the_shard_size_count(models: list[Path]) -> None:
    text = text_for(models)
    one = f"  - {{model: {models[1]}, parameters: {{weight: 0.5}}}}\n"
    swapped = text.replace(one, "").replace(f"  - {models[2]}\n", f"  - {models[2]}\n{one}")
    assert hash_of(swapped) != hash_of(text)
    assert hash_of(text, shard_size=1_000_000) == hash_of(text), "one file either way: the same bytes"


def test_how_a_recipe_is_written_is_not_in_the_hash(models: list[Path]) -> None:
    text = text_for(models)
    other = f"""
# the same, written by somebody else
"amalgam": 1
parameters:
  weight: 1
  lambda: 1.0
  density: 5e-1
experts:
- model: "{models[1]}"
  parameters:
    weight: .5
- {{"model": "{models[2]}"}}
base: {{model: {models[0]}}}
seed: 0
method: "ties"
"""
    assert hash_of(other) == hash_of(text)
    assert hash_of(to_yaml(load_recipe(text).recipe)) == hash_of(text)


def _touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def _rewrite(path: Path) -> None:
    """Same bytes, another header, same time: a tensor under another place in the file."""
    status, state = path.stat(), {}
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    from safetensors.torch import save_file

    save_file(state, path, metadata={"format": "pt", "more": "1"})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [_touch, _flip, _rewrite])
@pytest.mark.parametrize("which", [0, 1])
def test_every_input_is_in_the_hash(tmp_path: Path, change: Callable[[Path], None], which: int) -> None:
    paths = family(tmp_path, llama_like(1), 1)
    what = recipe("ties", paths[1:], paths[0])
    before, again = planned(what).hash, planned(what).hash
    assert before == again
    change(paths[which] / "model.safetensors")
    assert planned(what).hash != before


def test_a_changed_configuration_is_in_the_hash(tmp_path: Path) -> None:
    paths = family(tmp_path, llama_like(1), 1, config={"model_type": "llama", "vocab_size": 20, "rope_theta": 1e4})
    what = recipe("ties", paths[1:], paths[0])
    before = planned(what).hash
    (paths[0] / "config.json").write_text('{"model_type": "llama", "vocab_size": 20, "rope_theta": 1e6}')
    assert planned(what).hash != before


# -- what stands in the way ---------------------------------------------------------------------------


def test_all_blockers_are_listed_at_once(tmp_path: Path) -> None:
    state = llama_like(2)
    name = "model.layers.0.mlp.up_proj.weight"
    broken = {n: t for n, t in state.items() if n != "model.norm.weight"} | {
        name: torch.ones(3, 3), "more.weight": torch.ones(2), "model.layers.1.mlp.up_proj.weight": torch.ones(16, 8).int()}  # fmt: skip
    paths = [save(tmp_path / "base", state), save(tmp_path / "expert", broken)]
    plan = make_plan(recipe("ties", [paths[1]], paths[0]))
    codes = [b.code for b in plan.blockers]
    assert sorted(codes) == ["E_DTYPE", "E_EXTRA_TENSOR", "E_MISSING_TENSOR", "E_SHAPE"]
    assert all(b.what and b.fix for b in plan.blockers)
    assert [b["code"] for b in plan.as_dict()["blockers"]] == codes
    with pytest.raises(AmalgamError) as raised:
        run(plan, tmp_path / "out", device="cpu")
    assert raised.value is plan.blockers[0] and not (tmp_path / "out").exists()


def test_nothing_to_merge(tmp_path: Path) -> None:
    paths = [save(tmp_path / n, {}) for n in "ab"]
    (problem,) = make_plan(recipe("linear", paths, parameters={"weight": 1})).blockers
    assert problem.code == "E_RECIPE_INPUTS"


def test_a_model_is_not_an_adapter(models: list[Path]) -> None:
    what = Recipe.parse({
        "method": "linear", "parameters": {"weight": 1},
        "experts": [{"model": str(models[0]), "adapter": str(models[1])}]})  # fmt: skip
    with pytest.raises(InputError) as raised:
        make_plan(what)
    assert raised.value.code == "E_ADAPTER" and str(models[1]) in str(raised.value)


def open_below(folder: Path) -> list[str]:
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return [link for link in links if link.startswith(str(folder))]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="NOT TESTED: no /proc")
def test_nothing_stays_open(tmp_path: Path) -> None:
    paths = family(tmp_path, llama_like(1), 2)
    with make_plan(recipe("ties", paths[1:], paths[0])):
        assert len(open_below(tmp_path)) == 3
    assert open_below(tmp_path) == []
    for what in (
        recipe("ties", [paths[1], tmp_path / "absent"], paths[0]),
        recipe("linear", [(paths[1], {"weight": 1}), (paths[2], {"weight": -1})]),
    ):
        with pytest.raises(AmalgamError):
            make_plan(what)
        assert open_below(tmp_path) == []


def test_warnings(tmp_path: Path) -> None:
    half = save(tmp_path / "half", llama_like(1, dtype=torch.float16))
    brain = save(tmp_path / "brain", llama_like(1, dtype=torch.bfloat16))
    single = save(tmp_path / "single", llama_like(1))

    def text(*paths: Path) -> str:
        return " ".join(planned(recipe("linear", paths, parameters={"weight": 1})).warnings)

    assert "float32" in text(half, brain) and "BF16, F16" in text(half, brain)
    assert "float64" in text(brain, single)
    assert text(single, save(tmp_path / "other", llama_like(1, seed=1))) == ""
    twice = Recipe.parse({"method": "linear", "parameters": {"weight": 1}, "experts": [
        str(single), {"model": f"{single}/../single"}]})  # fmt: skip
    assert "same files" in " ".join(planned(twice).warnings)
    nothing = recipe("task_arithmetic", [(single, {"weight": 1.0})], half, parameters={"lambda": 0})
    assert "Nothing is merged" in " ".join(planned(nothing).warnings)


def test_another_kind_of_device_does_not_go_on_with_the_work(models: list[Path]) -> None:
    plan = planned(recipe("task_arithmetic", [(models[1], {"weight": 1.0})], models[0]))
    assert plan.resume_key("cpu") == plan.hash
    assert plan.resume_key("cuda:0") == plan.resume_key("cuda:1") not in (plan.hash, plan.resume_key("mps"))


def test_the_plan_as_json(models: list[Path], tmp_path: Path) -> None:
    plan = planned(recipe("ties", models[1:], models[0]))
    facts = json.loads(json.dumps(plan.as_dict(tmp_path / "not" / "there" / "yet", 2), allow_nan=False))
    assert facts["hash"] == plan.hash and facts["disk_free"] > 0 and facts["threads"] == 2
    assert facts["tensors"] == {"merge": len(plan.tensors)} and facts["dtypes"] == {"F32": len(plan.tensors)}
    assert facts["files"] == {"model.safetensors": plan.bytes_written}
    assert list(facts["models"]) == [str(m) for m in models]
    assert facts["parameters"] == sum(t.numel() for t in llama_like(5).values())


def test_a_disk_that_is_too_small_stands_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = family(tmp_path, llama_like(1), 2)
    monkeypatch.setattr("merging.plan.free_bytes", lambda path: 1000)
    monkeypatch.setattr("merging.checkpoints.disk.free_bytes", lambda path: 1000)
    with make_plan(recipe("linear", [(path, {"weight": 0.5}) for path in paths[1:]])) as plan:
        assert [one["code"] for one in plan.as_dict(tmp_path / "out")["blockers"]] == ["E_NO_SPACE"]
        assert plan.as_dict()["blockers"] == []
