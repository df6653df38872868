"""Trimmed task vectors against a plain sort, and what a merge by TIES really keeps."""

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

from merging.analysis.models import open_models
from merging.analysis.trimmed import Trimmed, measure_trimmed
from merging.errors import Cancelled, NumbersError, RecipeError
from merging.methods.trimming import count_kept
from tests.analysis.plain_changes import plain_shares, plain_trim
from tests.small_checkpoints import State, family, llama_like, load, merge, recipe, save

ROOT = Path(__file__).resolve().parent.parent.parent


def trimmed(paths: list[Path], density: float, **options: Any) -> Trimmed:
    with open_models(str(paths[0]), [str(path) for path in paths[1:]]) as models:
        return measure_trimmed(models, density, **options)


def check(paths: list[Path], density: float, **options: Any) -> Trimmed:
    result = trimmed(paths, density, **options)
    base, *experts = [load(path) for path in paths]
    kept = {t.name: [plain_trim(base[t.name], e[t.name], density) for e in experts] for t in result.tensors}
    for t in result.tensors:
        assert t.kept == [np.count_nonzero(v) for v in kept[t.name]], t.name
        np.testing.assert_allclose(t.weight, [np.abs(v).sum() for v in kept[t.name]], rtol=1e-5)
        smallest = [np.abs(v[v != 0]).min(initial=np.inf) for v in kept[t.name]]
        for mine, plain, count in zip(t.threshold, smallest, t.kept, strict=True):
            places = count_kept(density, t.numel)
            assert mine == (0 if places in (t.numel, *range(count + 1, t.numel)) else pytest.approx(plain))
        same(result, [t.name], kept)
    same(result, [t.name for t in result.tensors], kept)
    return result


def same(result: Trimmed, names: list[str], kept: dict[str, list[np.ndarray]]) -> None:
    shares = result.shares([t for t in result.tensors if t.name in names])
    joined = [np.concatenate([kept[name][k] for name in names]) for k in range(len(result.names))]
    for share, (a, b) in zip(shares, result.pairs, strict=True):
        expected = plain_shares(joined[a], joined[b])
        for field, value in expected.items():
            exact = not field.endswith("weight")
            assert getattr(share, field) == pytest.approx(value, rel=1e-12 if exact else 1e-5, abs=1e-6), (names, field)
        assert share.overlap == pytest.approx(expected["agree"] + expected["conflict"])
        both = expected["agree_weight"] + expected["conflict_weight"]
        assert share.conflict_of_both == pytest.approx(expected["conflict_weight"] / both if both else 0, abs=1e-6)


def varied(dtype: Any) -> State:
    generator = torch.Generator().manual_seed(0)
    state = llama_like(2, 12, dtype=dtype)
    state["model.embed_tokens.weight"] = (torch.randn(700, 300, generator=generator) * 0.1).to(dtype)
    return state | {"one.weight": torch.tensor([0.25]).to(dtype), "odd.weight": torch.randn(7, 11).to(dtype)}


@pytest.mark.parametrize("density", [0.001, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_all_figures_are_those_of_a_plain_sort(tmp_path: Path, dtype: torch.dtype, density: float) -> None:
    # bfloat16 near the base: many equal |τ| at any threshold, and at density 0.7 more kept than changed
    check(family(tmp_path, varied(dtype), 3, scale=3e-4), density, threads=1)


def test_real_experts(tmp_path: Path) -> None:
    demo = ROOT / "assets" / "demo"
    result = check([demo / "base", *sorted((demo / "experts").iterdir())], 0.2)
    assert len(result.shares()) == 6 and result.blocks == [None, 0, 1, 2, 3]
    assert [t.kind for t in result.select(block=2)][:2] == ["attn_q", "attn_k"]


def test_a_merge_by_ties_of_one_expert_changes_exactly_what_is_kept(tmp_path: Path) -> None:
    base, expert = family(tmp_path, llama_like(2, dtype=torch.bfloat16), 1, scale=0.05)
    result = trimmed([base, expert], 0.3)
    out = merge(recipe("ties", [(expert, {"density": 0.3})], base), tmp_path / "merged").folder
    before, after = load(base), load(out)
    changed = {name: int((after[name] != before[name]).sum()) for name in before}
    assert {t.name: t.kept[0] for t in result.tensors} == changed


def test_the_same_and_the_opposite_and_the_untouched(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    change = torch.randint(-9, 10, (40, 40), generator=generator).float()
    states = {
        "base": torch.zeros(40, 40),
        "up": change,
        "more": 3 * change,
        "down": -change,
        "same": torch.zeros(40, 40),
    }
    result = trimmed([save(tmp_path / name, {"a.weight": t}) for name, t in states.items()], 0.5)
    pairs = dict(zip([(result.names[a], result.names[b]) for a, b in result.pairs], result.shares(), strict=True))
    assert asdict(pairs["up", "more"]) == {"agree": 1, "conflict": 0, "alone": 0,
                                           "agree_weight": 1, "conflict_weight": 0, "alone_weight": 0}  # fmt: skip
    assert (pairs["up", "down"].conflict, pairs["up", "down"].conflict_of_both) == (1, 1)
    assert (pairs["up", "same"].alone, pairs["up", "same"].alone_weight, pairs["up", "same"].overlap) == (1, 1, 0)


def test_experts_that_changed_nothing_share_nothing(tmp_path: Path) -> None:
    base = save(tmp_path / "base", llama_like(1))
    for share in trimmed([base, base, base], 0.5).shares():
        assert set(asdict(share).values()) == {0} and share.conflict_of_both == share.overlap == 0


def test_a_large_expert_does_not_drown_a_small_one(tmp_path: Path) -> None:
    base, small, large = torch.zeros(100), torch.zeros(100), torch.zeros(100)
    small[:20], large[10:30] = 1e-3, 1e3
    paths = [save(tmp_path / n, {"a.weight": t}) for n, t in {"b": base, "s": small, "l": large}.items()]
    (share,) = trimmed(paths, 0.2).shares()
    assert share.agree == pytest.approx(1 / 3) and share.agree_weight == pytest.approx(1 / 2)


def test_one_expert_has_no_pairs(tmp_path: Path) -> None:
    assert check(family(tmp_path, varied(torch.bfloat16), 1), 0.2).shares() == []


def test_results_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    paths = family(tmp_path, varied(torch.bfloat16), 2)
    assert trimmed(paths, 0.2, threads=1) == trimmed(paths, 0.2, threads=3)


def test_the_merged_model_is_not_looked_at(tmp_path: Path) -> None:
    paths = family(tmp_path, llama_like(1), 2)
    with open_models(str(paths[0]), [str(p) for p in paths[1:]], str(paths[1])) as models:
        assert measure_trimmed(models, 0.2) == trimmed(paths, 0.2)


def test_trimmed_survives_json(tmp_path: Path) -> None:
    result = trimmed(family(tmp_path, llama_like(1), 2), 0.2)
    assert Trimmed.from_dict(json.loads(json.dumps(result.as_dict(), allow_nan=False))) == result


@pytest.mark.parametrize("density", [0, -1, 1.5, float("nan")])
def test_a_density_that_makes_no_sense_is_refused(tmp_path: Path, density: float) -> None:
    with pytest.raises(RecipeError, match="density") as error:
        trimmed(family(tmp_path, llama_like(1), 1), density)
    assert error.value.code == "E_RECIPE_FIELD"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, threads: int) -> None:
    paths = family(tmp_path, varied(torch.bfloat16), 2)
    state = load(paths[1])
    state["model.embed_tokens.weight"][500, 7] = float("nan")
    save_file(state, paths[1] / "model.safetensors")
    with pytest.raises(NumbersError, match="embed_tokens.weight: element 150007 is nan in .*expert1") as error:
        trimmed(paths, 0.2, threads=threads)
    assert error.value.code == "E_NOT_FINITE" and "policies" not in str(error.value)


def test_progress_ends_and_stopping_stops(tmp_path: Path) -> None:
    paths = family(tmp_path, varied(torch.bfloat16), 2)
    seen: list[tuple[int, int, str]] = []
    trimmed(paths, 0.2, threads=1, progress=lambda *facts: seen.append(facts))
    assert seen[-1][0] == seen[-1][1] and seen[-1][2] == "density 0.2"
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        trimmed(paths, 0.2, stop=stop)
