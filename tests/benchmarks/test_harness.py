"""The instruments themselves: what they build and what they measure."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks import models
from benchmarks.measure import measure
from benchmarks.merge_speed import CASES, Race
from benchmarks.plan_speed import judge
from merging.recipe_yaml import load_recipe


def run(code: str, folder: Path, limit: float = 60):
    return measure([sys.executable, "-c", code], os.environ, folder, folder / "log.txt", limit)


def test_memory_and_time_of_the_whole_tree_are_counted(tmp_path: Path) -> None:
    grandchild = "b = bytearray(150_000_000); import time; time.sleep(0.3); sum(range(20_000_000))"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}]); print('done')"
    result = run(code, tmp_path)
    assert result.exit_code == 0 and result.output == "done\n"
    assert 150e6 < result.anonymous <= result.resident < 300e6
    assert result.wall > 0.3 and result.cpu > 0.1


def test_mapped_files_count_as_resident_but_not_as_anonymous(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(100_000_000))
    code = "import mmap; f = open('data', 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n"
    result = run(code + "for _ in range(3): sum(m[::4096])\nimport time; time.sleep(0.2)", tmp_path)
    assert result.resident > 100e6 and result.anonymous < 50e6


def test_failure_and_overrun_are_reported(tmp_path: Path) -> None:
    failed = run("import sys; sys.exit('no such thing')", tmp_path)
    assert (failed.exit_code, failed.output) == (1, "no such thing\n")
    killed = run("import time; time.sleep(60)", tmp_path, limit=0.3)
    assert killed.exit_code == -9 and killed.wall < 10


def test_a_set_is_built_once_and_always_the_same(tmp_path: Path) -> None:
    first, second = (models.build(tmp_path / name, "tiny") for name in "ab")
    before = [path.stat().st_mtime_ns for path in first.rglob("*")]
    assert models.build(tmp_path / "a", "tiny") == first
    assert [path.stat().st_mtime_ns for path in first.rglob("*")] == before
    for member in models.MEMBERS:
        ours, again = ((folder / member / "model.safetensors").read_bytes() for folder in (first, second))
        assert ours == again
    models.clean(tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == [] and second.exists()


def test_experts_differ_from_the_base_and_from_each_other(tmp_path: Path) -> None:
    folder = models.build(tmp_path, "tiny")
    base, *experts = (load_file(folder / member / "model.safetensors") for member in models.MEMBERS)
    assert {name: tuple(tensor.shape) for name, tensor in base.items()} == models.llama_shapes(
        models.SIZES["tiny"]
    )
    name = "model.layers.2.mlp.up_proj.weight"
    deltas = [expert[name].float() - base[name].float() for expert in experts]
    relative = [float(delta.norm() / base[name].float().norm()) for delta in deltas]
    assert all(0.003 < size < 0.1 for size in relative) and len(set(relative)) == len(deltas)


def test_sizes_are_what_their_names_say() -> None:
    count = {
        name: sum(map(models.elements, models.llama_shapes(size).values()))
        for name, size in models.SIZES.items()
    }
    assert count["0.47b"] == 468_239_360
    assert count["8b"] == 8_030_261_248  # Llama 3 8B
    assert 1.85e9 < count["1.9b"] < 1.95e9


def test_shards_hold_everything_in_order_and_stay_below_the_limit(tmp_path: Path) -> None:
    shapes = models.llama_shapes(models.SIZES["8b"])
    groups = models.shards(shapes, 5 << 30)
    assert [name for group in groups for name in group] == list(shapes)
    assert len(groups) > 1
    assert all(sum(2 * models.elements(shapes[name]) for name in group) <= 5 << 30 for group in groups)


@pytest.mark.parametrize("count", [200, 1000])
def test_many_tensors_are_exactly_that_many(tmp_path: Path, count: int) -> None:
    folder = models.build(tmp_path, count)
    tensors = load_file(folder / "expert3" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == models.many_shapes(count)
    assert len(tensors) == count


@pytest.mark.parametrize("contestant", ["plain copy", "verified copy"])
def test_the_floor_copies_one_model_and_reads_the_others(tmp_path: Path, contestant: str) -> None:
    folder = models.build(tmp_path, "tiny")
    race = Race(folder, tmp_path, None)
    race.run_folder.mkdir()
    command = race.command(contestant, "slerp")
    assert command[-2:] == [str(folder / "base"), str(folder / "expert1")]
    assert measure(command, race.environment, models.ROOT, race.log).exit_code == 0
    copied = (race.out / "model.safetensors").read_bytes()
    assert copied == (folder / "base" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_the_engine_reads_the_models_that_the_floor_reads(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(Race(tmp_path, tmp_path, None).recipe(name)).recipe
    assert {model.key for model in recipe.model_list} == {str(tmp_path / m) for m in CASES[name].inputs()}


def test_missed_targets_are_named() -> None:
    good = {"tiny": 0.5, "8b": 1.0, 15_000: 1.5, 30_000: 2.5, 60_000: 4.5}
    assert judge(good, good) == []
    assert len(judge(good | {"8b": 2.5, 60_000: 12.0}, good)) == 2
    assert len(judge(good, good | {60_000: 16.5})) == 1  # quadratic
