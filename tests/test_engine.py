"""Running a plan: the same bytes whatever happens on the way, and a record of how they came to be."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from merging.checkpoints.output_rules import work_folder
from merging.checkpoints.verify import verify
from merging.engine import Progress
from merging.errors import Cancelled, OutputError
from merging.recipe import Recipe
from tests.engine_cases import CASES, Case, Zoo, each_case, in_memory, make_zoo, recipe_for
from tests.oracles import reference
from tests.small_checkpoints import INDEX, family, llama_like, load, merge, planned, raw, recipe, same_bits, save


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


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
    what, out = recipe_for(case, zoo.paths), tmp_path / "out"
    for finished, blocks in ((0, 1), (0, 7), (1, 1), (2, 3)):
        stop, names, countdown = threading.Event(), set[str](), [blocks]

        def look(
            progress: Progress, stop: threading.Event = stop, names: set[str] = names, countdown: list[int] = countdown,
            finished: int = finished,
        ) -> None:  # fmt: skip
            names.update({progress.tensor} - {""})
            countdown[0] -= len(names) >= finished
            if countdown[0] == 0:
                stop.set()

        with pytest.raises(Cancelled):
            merge(what, out, stop=stop, on_progress=look)
        assert not out.exists()
    result = merge(what, out, threads=2)
    assert result.resumed >= 3
    assert same_bits(load(out), zoo.expected(case)) and verify(out).ok
    assert not work_folder(out).exists()


def test_torch_has_as_many_threads_as_before(zoo: Zoo, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        merge(recipe_for(CASES[1], zoo.paths), tmp_path / "out")
        with pytest.raises(OutputError):
            merge(recipe_for(CASES[1], zoo.paths), tmp_path / "out")
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


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
            changed = [
                int((found[n] != torch.as_tensor(m).view(sizes[n])).sum())
                for n, m in zip(sorted(sizes), models[0], strict=True)
            ]
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


@each_case
def test_progress_only_grows_and_ends_at_the_total(zoo: Zoo, case: Case, tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []

    def note(progress: Progress) -> None:
        seen.append((progress.done, progress.moved, progress.total))

    merge(recipe_for(case, zoo.paths), tmp_path / "out", threads=2, on_progress=note)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_delta_survival_is_what_a_direct_count_gives(tmp_path: Path, dtype: Any) -> None:
    """No tensor longer than a block, so that everything is counted. Lost is what ends where the base itself would:
    a wider base is rounded too."""
    paths = family(tmp_path, llama_like(2, 48, dtype=dtype), 2, scale=2e-3)
    experts = [(path, {"weight": 0.15}) for path in paths[1:]]
    what = recipe("task_arithmetic", experts, paths[0], dtype="bfloat16")
    result = merge(what, tmp_path / "out")
    base, one, two, out = (load(path) for path in (*paths, tmp_path / "out"))
    changed = lost = 0
    for name, before in base.items():
        exact = before.double() + 0.15 * (one[name].double() - before.double() + two[name].double() - before.double())
        moved = (exact - before.double()).abs() > 1e-12
        changed += int(moved.sum())
        lost += int((moved & (out[name] == before.bfloat16())).sum())
    survival = result.manifest["delta_survival"]
    assert survival["changed_entries_counted"] == pytest.approx(changed, rel=1e-3)
    assert survival["survived"] == pytest.approx(1 - lost / changed, abs=1e-3)
    assert 0.05 < lost / changed < 0.95
    assert any("rounded" in warning for warning in result.warnings) == (survival["survived"] < 0.9)
    wide = merge(what.model_copy(update={"dtype": "float32"}), tmp_path / "wide")
    assert wide.manifest["delta_survival"] is None
