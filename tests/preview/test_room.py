"""Room is counted as the machine has it, and what a preview is said to need is what it takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from merging.plan import make_plan
from merging.preview import Preview, room
from merging.preview.room import cost_of, free_memory, private_memory
from merging.recipe import Recipe
from tests.engine_cases import CASES, Zoo, make_zoo, recipe_for

DEMO = Path(__file__).parents[2] / "assets" / "demo"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def group(folder: Path, limit: str, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 1\n")


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("0::/outer/inner\n")
    group(tmp_path / "root", "max", 10)
    group(tmp_path / "root" / "outer", "5000", 1000, 99)
    group(tmp_path / "root" / "outer" / "inner", "9000", 1000)
    group(tmp_path / "root" / "other", "10", 1)
    assert sorted(room._limits(tmp_path / "root", tmp_path / "mine")) == [4100, 8001]


def test_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("0::/\n")
    group(tmp_path / "root", "5000", 1000)
    assert list(room._limits(tmp_path / "root", tmp_path / "mine")) == [4001]


def test_groups_of_version_1(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("4:memory:/job\n3:cpuset:/\n0::/\n")
    folder = tmp_path / "root" / "memory" / "job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("7000\n")
    (folder / "memory.usage_in_bytes").write_text("3000\n")
    (folder.parent / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # no limit
    (folder.parent / "memory.usage_in_bytes").write_text("3000\n")
    assert list(room._limits(tmp_path / "root", tmp_path / "mine")) == [4000]


def test_no_groups_at_all(tmp_path: Path) -> None:
    assert list(room._limits(tmp_path, tmp_path / "nothing")) == []


def test_this_machine() -> None:
    assert 0 < free_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert private_memory(os.getpid()) > 10_000_000
    assert private_memory(2**30) == 0


def test_three_outcomes(zoo: Zoo) -> None:
    with make_plan(recipe_for(CASES[2], zoo.paths)) as plan:
        inputs = 3 * sum(t.nbytes for t in plan.tensors if t.action == "merge")
        plenty = cost_of(plan, 1, free=10**12)
        assert plenty.possible and plenty.keep_inputs and "disk" not in plenty.why
        tight = cost_of(plan, 1, free=plenty.bytes_needed - 1)
        assert tight.possible and not tight.keep_inputs and "from disk" in tight.why
        assert plenty.bytes_needed - tight.bytes_needed == pytest.approx(inputs * room.SPARE, rel=0.01)
        none = cost_of(plan, 1, free=tight.bytes_needed - 1)
        assert not none.possible and none.bytes_needed == tight.bytes_needed and "only" in none.why
        assert cost_of(plan, 1, held=1, free=tight.bytes_needed - 1).possible
        assert cost_of(plan, 1, "cuda", free=10**12).bytes_needed < plenty.bytes_needed


def test_the_estimate_covers_what_a_preview_takes_and_not_much_more() -> None:
    experts = [str(path) for path in sorted((DEMO / "experts").iterdir())]
    data = {"base": str(DEMO / "base"), "experts": experts, "method": "ties"}
    with Preview() as preview:
        needed = preview.open(data).bytes_needed
        preview.merge(data)
        preview.score([str(DEMO / "tasks" / "sort.jsonl")], 50)
        taken = private_memory(preview._child.pid)
        assert 0.5 * needed < taken < needed
        # what a running preview would give back counts as free
        assert preview.open(Recipe.parse(data).to_data()).bytes_free > free_memory()
