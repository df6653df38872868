"""Every figure against whole-tensor float64 arithmetic (``plain_changes``), on real files."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merging.analysis.changes import STEP, SURVIVAL_EVERY, Changes, cosines, measure_changes
from merging.analysis.models import open_models
from merging.errors import Cancelled, InputError, NumbersError
from tests.analysis.plain_changes import plain_change, tensors
from tests.analysis.test_models import low_rank, noisy
from tests.small_checkpoints import State, family, llama_like, load, merge, recipe, save

ROOT = Path(__file__).resolve().parent.parent.parent
EXACT = {"unchanged", "both", "conflict", "survival"}


def measured(paths: list[Path], merged: Path | None = None, **options: Any) -> Changes:
    with open_models(str(paths[0]), [str(p) for p in paths[1:]], str(merged) if merged else None) as models:
        return measure_changes(models, **options)


def agrees(found: dict[str, Any], expected: dict[str, Any], what: str = "", without: str = "") -> None:
    """Counts are exact, the rest is as accurate as ``changes.ACCURACY`` promises: sums relative to what was added."""
    for field in expected.keys() - {"merged", without}:
        mine, close = np.array(found[field], float), np.array(expected[field], float)
        assert mine.shape == close.shape, (what, field)
        relative = 1e-12 if field in EXACT else 1e-5
        added = {
            "dots": np.max(expected.get("products", [0]), initial=0),
            "residual": 300,
            "coefficients": 1,
            "kept": 1,
            "projection": 1,
        }.get(field, 1e-30)
        if field == "dots" and "products" not in expected:
            added = expected["norm"] * max(found["experts"])
        np.testing.assert_allclose(mine, close, relative, relative * added, err_msg=f"{what} {field}")
    if "merged" in expected:
        agrees(found["merged"] | {"experts": found["norm"]}, expected["merged"], f"{what} merged")


def check(paths: list[Path], merged: Path | None = None, **options: Any) -> Changes:
    """Measure, and compare each tensor and the whole with the plain formulas."""
    changes = measured(paths, merged, **options)
    base, *experts = [load(path) for path in paths]
    last = load(merged) if merged else None
    for t in changes.tensors:
        merged_one = last[t.name] if last else None
        expected = plain_change(base[t.name], [e[t.name] for e in experts], merged_one, STEP, SURVIVAL_EVERY)
        agrees(asdict(t), expected, t.name)
    names = [t.name for t in changes.tensors]
    whole = plain_change(
        *(tensors(base, names), [tensors(e, names) for e in experts]), tensors(last, names) if last else None
    )
    agrees(asdict(changes.total()), whole, "all", without="survival" if changes.sampled else "")
    return changes


def varied(dtype: Any, seed: int = 0) -> State:
    """Llama's tensors and some of awkward sizes: several blocks and a rest, a single number, no multiple of 8 or 64."""
    generator = torch.Generator().manual_seed(seed)
    state = llama_like(2, 12, dtype=dtype)
    state["model.embed_tokens.weight"] = (torch.randn(1150, 300, generator=generator) * 0.1).to(dtype)
    assert state["model.embed_tokens.weight"].numel() % STEP and state["model.embed_tokens.weight"].numel() > 5 * STEP
    return state | {"one.weight": torch.tensor([0.25]).to(dtype), "odd.weight": torch.randn(7, 11).to(dtype)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("experts", [1, 3])
def test_all_figures_are_those_of_the_plain_formulas(tmp_path: Path, dtype: torch.dtype, experts: int) -> None:
    # Small changes, so that in bfloat16 many entries stay as they were and rounding to bfloat16 loses some.
    paths = family(tmp_path, varied(dtype), experts, scale=3e-4)
    changes = check(paths, threads=1)
    whole = changes.total()
    if dtype == torch.bfloat16:
        assert all(0.05 < share < 0.95 for share in whole.unchanged)
        assert set(whole.survival) == {1.0} and changes.sampled == {}
    else:
        assert all(0.1 < share < 0.9 for share in whole.survival) and list(changes.sampled) == ["survival"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_merge_is_taken_apart_into_its_experts(tmp_path: Path, dtype: torch.dtype) -> None:
    paths = family(tmp_path, varied(dtype), 2, scale=0.02)
    own = [(path, {"weight": weight}) for path, weight in zip(paths[1:], (0.7, -0.3), strict=True)]
    out = merge(recipe("task_arithmetic", own, paths[0], dtype="float32"), tmp_path / "merged").folder
    changes = check(paths, out, threads=1)
    merged = changes.total().merged
    assert merged is not None
    np.testing.assert_allclose(merged.coefficients, [0.7, -0.3], atol=1e-3)
    assert merged.residual < 3e-3
    np.testing.assert_allclose(merged.projection, [0.7, -0.3], atol=0.05)  # the experts are nearly orthogonal


def test_a_merged_model_that_is_something_else_has_a_large_residual(tmp_path: Path) -> None:
    paths = family(tmp_path, llama_like(1, dtype=torch.bfloat16), 3, scale=0.02)
    merged = measured(paths[:3], paths[3]).total().merged
    assert merged is not None and merged.residual > 0.9


def test_a_merge_of_the_same_expert_twice_has_shared_coefficients(tmp_path: Path) -> None:
    base, expert = family(tmp_path, llama_like(1), 1)
    merged = measured([base, expert, expert], expert).total().merged
    assert merged is not None
    np.testing.assert_allclose(merged.coefficients, [0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose([*merged.projection, *merged.kept], 1)
    assert merged.residual < 3e-3


def test_experts_that_changed_nothing(tmp_path: Path) -> None:
    base, other = family(tmp_path, varied(torch.bfloat16), 1)
    changes = check([base, base, other], base, threads=1)
    whole = changes.total()
    assert whole.norm[0] == whole.largest[0] == whole.both[0] == 0
    assert (whole.unchanged[0], whole.survival[0]) == (1, 1)
    assert (changes.cosine() == np.diag([0.0, 1.0])).all()
    assert whole.merged is not None and (whole.merged.norm, whole.merged.residual) == (0, 0)


def test_opposite_experts_are_in_full_conflict(tmp_path: Path) -> None:
    state = llama_like(1)
    shift = {n: torch.full_like(t, 0.125) for n, t in state.items()}
    quarters = {n: torch.round(t * 64) / 64 for n, t in state.items()}
    up = {n: t + shift[n] for n, t in quarters.items()}
    down = {n: t - shift[n] for n, t in quarters.items()}
    paths = [save(tmp_path / name, s) for name, s in {"base": quarters, "up": up, "down": down, "again": up}.items()]
    changes = check(paths)
    whole = changes.total()
    assert (whole.conflict, whole.conflict_weighted) == ([1, 0, 1], [1, 0, 1])
    np.testing.assert_allclose(changes.cosine(), [[1, -1, 1], [-1, 1, -1], [1, -1, 1]])


def test_negative_zero_is_no_change_and_no_sign(tmp_path: Path) -> None:
    base, expert = torch.zeros(100, dtype=torch.bfloat16), -torch.zeros(100, dtype=torch.bfloat16)
    expert[:10], base[10:20] = 1, -0.0
    other = torch.ones(100, dtype=torch.bfloat16)
    paths = [save(tmp_path / name, {"a.weight": t}) for name, t in {"b": base, "e": expert, "o": other}.items()]
    (tensor,) = check(paths).tensors
    assert (tensor.unchanged[0], tensor.both, tensor.conflict) == (0.9, [10], [0])


def test_an_adapter_and_shards_and_mixed_types(tmp_path: Path) -> None:
    state = varied(torch.bfloat16)
    target = "model.layers.1.mlp.up_proj"
    base = save(tmp_path / "base", state, shards=3, config={"architectures": ["LlamaForCausalLM"]})
    adapter, change = low_rank(tmp_path / "adapter", state, target)
    other = {n: t.float() for n, t in noisy(state, 5).items()}
    changes = measured([base, adapter, save(tmp_path / "other", other, shards=2)])
    full = {n: t.double() for n, t in state.items()}
    full[f"{target}.weight"] = full[f"{target}.weight"] + change
    for t in changes.tensors:
        expected = plain_change(state[t.name], [full[t.name], other[t.name]])
        if t.name == f"{target}.weight":  # the adapter's sum is rounded to float32 when it is read
            np.testing.assert_allclose(t.norm[0], expected["norm"][0], rtol=1e-6)
            np.testing.assert_allclose(t.dots, expected["dots"], atol=1e-6 * expected["products"][0])
            np.testing.assert_allclose(t.survival, expected["survival"], atol=0.01)
        else:
            agrees(asdict(t), expected, t.name, without="survival")
    assert [t.name for t in changes.tensors if t.norm[0] > 0] == [f"{target}.weight"]


def test_survival_is_sampled_on_every_eighth_block_and_says_so(tmp_path: Path) -> None:
    size = STEP * (SURVIVAL_EVERY + 2)
    base = torch.ones(size)
    expert = base + 1e-5  # lost in bfloat16
    expert[STEP * SURVIVAL_EVERY : STEP * (SURVIVAL_EVERY + 1)] = 2  # the second block that is looked at
    expert[STEP : 2 * STEP] = 3  # not looked at
    paths = [save(tmp_path / name, {"a.weight": t}) for name, t in {"base": base, "expert": expert}.items()]
    changes = measured(paths)
    assert changes.tensors[0].survival == [0.5] and "one block of" in changes.sampled["survival"]


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_sizes_at_which_squares_leave_the_range_of_float32(tmp_path: Path, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [{"a.weight": (torch.randn(300, generator=generator) * size).bfloat16()} for _ in range(3)]
    check([save(tmp_path / str(i), state) for i, state in enumerate(states)])


def test_results_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    paths = family(tmp_path, varied(torch.float16), 3)
    results = [measured(paths, paths[1], threads=threads) for threads in (1, 2, 3)]
    assert results[0] == results[1] == results[2]


def test_real_experts(tmp_path: Path) -> None:
    demo = ROOT / "assets" / "demo"
    changes = check([demo / "base", *sorted((demo / "experts").iterdir())], demo / "experts" / "sort")
    assert changes.names == ["reverse", "rotate", "sort", "unique"]
    assert len(changes.pairs) == 6 and changes.blocks == [None, 0, 1, 2, 3]
    merged = changes.total().merged
    assert merged is not None
    np.testing.assert_allclose(merged.coefficients, [0, 0, 1, 0], atol=1e-4)


def test_sums_over_a_choice_of_tensors(tmp_path: Path) -> None:
    paths = family(tmp_path, llama_like(3), 2)
    changes = measured(paths)
    base, *experts = [load(path) for path in paths]
    for block, matrix in changes.cosine_by_block().items():
        names = [t.name for t in changes.select(block)]
        expected = plain_change(tensors(base, names), [tensors(e, names) for e in experts])
        np.testing.assert_allclose(matrix[0, 1], expected["dots"][0] / np.prod(expected["norm"]), atol=1e-5)
        assert len(names) == (3 if block is None else 5)
    norms = changes.select(kind="norm")
    assert [t.block for t in norms] == [0, 1, 2, None]
    agrees(
        asdict(changes.total(norms)),
        plain_change(tensors(base, [t.name for t in norms]), [tensors(e, [t.name for t in norms]) for e in experts]),
    )


def test_nothing_adds_up_to_nothing() -> None:
    whole = Changes(["a", "b"], []).total()
    assert (whole.numel, whole.norm, whole.unchanged, whole.merged) == (0, [0, 0], [1, 1], None)


def test_cosines_of_plain_vectors() -> None:
    np.testing.assert_allclose(cosines([5, 2, 0], [6, 0, 0]), [[1, 0.6, 0], [0.6, 1, 0], [0, 0, 0]])
    assert cosines([1, 1], [1 + 1e-9])[0, 1] == 1


def test_changes_survive_json(tmp_path: Path) -> None:
    paths = family(tmp_path, llama_like(1), 2)
    changes = measured(paths, paths[1])
    assert Changes.from_dict(json.loads(json.dumps(changes.as_dict(), allow_nan=False))) == changes


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, threads: int, value: float) -> None:
    paths = family(tmp_path, varied(torch.bfloat16), 2)
    state = load(paths[2])
    state["model.embed_tokens.weight"][500, 7] = value
    save_file(state, paths[2] / "model.safetensors")
    with pytest.raises(NumbersError, match=f"embed_tokens.weight: element 150007 is {value} in .*expert2") as error:
        measured(paths, threads=threads)
    assert error.value.code == "E_NOT_FINITE"


def test_progress_counts_every_element_and_stopping_stops(tmp_path: Path) -> None:
    paths = family(tmp_path, varied(torch.bfloat16), 2)
    seen: list[tuple[int, int, str]] = []
    changes = measured(paths, threads=1, progress=lambda *facts: seen.append(facts))
    total = sum(t.numel for t in changes.tensors)
    assert seen[-1] == (total, total, "changes") and [done for done, *_ in seen] == sorted(done for done, *_ in seen)
    stop = threading.Event()
    stop.set()
    for threads in (1, 2):
        with pytest.raises(Cancelled):
            measured(paths, threads=threads, stop=stop)


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    paths = family(tmp_path, llama_like(1), 2)

    def meddle(done: int, total: int, what: str) -> None:
        if done == total:
            save_file({"a": torch.ones(1)}, paths[1] / "model.safetensors")

    with pytest.raises(InputError) as error:
        measured(paths, threads=1, progress=meddle)
    assert error.value.code == "E_INPUT_CHANGED"


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    from merging.analysis.changes import measure_tensor
    from merging.methods import Workspace

    def held(rows: int) -> int:
        state = {"a.weight": torch.randn(rows, 1000).bfloat16()}
        base = save(tmp_path / f"base{rows}", state)
        expert = save(tmp_path / f"expert{rows}", noisy(state, 1))
        workspace = Workspace()
        with open_models(str(base), [str(expert)]) as models:
            measure_tensor(models.tensors[0], workspace, lambda elements: None)
        return sum(buffer.nbytes for buffer in workspace._buffers.values())

    assert held(200) == held(2000) < 4_000_000
