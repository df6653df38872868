"""Principal weights, against a plain computation with numpy's SVD and sorting."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from merging.analysis import panels
from merging.analysis.models import Models, open_models
from merging.analysis.principal import Principal, measure_principal
from merging.errors import NumbersError, RecipeError
from tests.small_checkpoints import State, save

SHAPES = {"layers.0.mlp.up_proj.weight": (150, 64), "layers.0.mlp.down_proj.weight": (64, 150),
          "layers.1.self_attn.q_proj.weight": (260, 260)}  # fmt: skip
LEFT_OUT = {"embed_tokens.weight": (50, 8), "lm_head.weight": (50, 8), "layers.0.input_layernorm.weight": (64,)}


def made(tmp_path: Path, dtype: torch.dtype, merged: bool = False) -> tuple[Models, list[State]]:
    states: list[State] = [{n: torch.randn(shape).to(dtype) for n, shape in (SHAPES | LEFT_OUT).items()}]
    for _ in range(2 + merged):
        states.append({n: (t.float() + 0.05 * torch.randn(t.shape)).to(dtype) for n, t in states[0].items()})
    paths = [str(save(tmp_path / f"m{i}", state)) for i, state in enumerate(states)]
    return open_models(paths[0], paths[1:3], paths[3] if merged else None), states


def top(values: np.ndarray, count: int) -> np.ndarray:
    """Mask of the ``count`` largest sizes, ties in order of index, zeros never."""
    order = np.argsort(-np.abs(values).ravel(), kind="stable")[:count]
    mask = np.zeros(values.size, bool)
    mask[order] = True
    return mask & (values.ravel() != 0)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_figures_are_those_of_a_plain_computation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, merged: bool
) -> None:
    monkeypatch.setattr(panels, "PANEL", 1 << 12)
    monkeypatch.setattr(panels, "NARROWEST", 8)
    models, states = made(tmp_path, dtype, merged)
    rank, density = 6, 0.1
    with models:
        found = measure_principal(models, rank=rank, density=density, threads=2)
        assert found == measure_principal(models, rank=rank, density=density, threads=1)
    assert found.names == ["m1", "m2", *(["merged"] if merged else [])]
    assert sorted(t.name for t in found.tensors) == sorted(SHAPES)
    sums = np.zeros((len(found.names), 2))
    for tensor in found.tensors:
        base, *others = [state[tensor.name].double().numpy() for state in states]
        u, s, v = np.linalg.svd(base, full_matrices=False)
        count = int(density * base.size)
        mask = top((u[:, :rank] * s[:rank]) @ v[:rank], count)
        assert (tensor.inside, tensor.numel) == (count, base.size)
        assert tensor.captured == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum())
        taus = [other - base for other in others]
        kept = [top(tau, count) for tau in taus]
        for k, tau in enumerate(taus):
            inside = float((tau.ravel()[mask] ** 2).sum())
            assert tensor.energy[k] == pytest.approx(float((tau**2).sum()), rel=1e-6)
            # An entry on the edge of the mask may fall to the other side by rounding.
            assert tensor.energy_inside[k] == pytest.approx(inside, rel=1e-3)
            assert found.ratios([tensor])[k] == pytest.approx(inside / (tau**2).sum() * base.size / count, rel=1e-3)
            sums[k] += inside, (tau**2).sum() * count / base.size
        for i, (a, b) in enumerate(combinations(range(len(taus)), 2)):
            both, either = kept[a] & kept[b], kept[a] | kept[b]
            assert (tensor.both[i], tensor.either[i]) == (both.sum(), either.sum())
            assert tensor.both_inside[i] == pytest.approx((both & mask).sum(), abs=1)
            assert tensor.either_inside[i] == pytest.approx((either & mask).sum(), abs=1)
            inner, outer = found.overlaps([tensor])[i]
            assert inner == tensor.both_inside[i] / tensor.either_inside[i]
            assert outer == pytest.approx((both & ~mask).sum() / (either & ~mask).sum(), rel=0.02)
    assert found.ratios() == pytest.approx((sums[:, 0] / sums[:, 1]).tolist(), rel=1e-3)


def one_matrix(tmp_path: Path, base: np.ndarray, changes: list[np.ndarray], density: float, rank: int = 1) -> Principal:
    name = "layers.0.mlp.up_proj.weight"
    paths = [str(save(tmp_path / f"m{i}", {name: torch.from_numpy(w).float()}))
             for i, w in enumerate([base, *(base + c for c in changes)])]  # fmt: skip
    with open_models(paths[0], paths[1:]) as models:
        return measure_principal(models, rank=rank, density=density, threads=1)


def test_changes_inside_and_outside_of_the_mask(tmp_path: Path) -> None:
    # A base of rank 1 that is large in its first 5 x 4 corner: 20 of 200 entries are principal.
    base = np.outer(np.r_[np.full(5, 4.0), np.ones(15)], np.r_[np.full(4, 4.0), np.ones(6)])
    inside, outside, everywhere = np.zeros((20, 10)), np.zeros((20, 10)), np.ones((20, 10))
    inside[:5, :4], outside[10:, 5:] = 1, 1
    found = one_matrix(tmp_path, base, [inside, outside, everywhere], 0.1)
    assert found.tensors[0].inside == 20 and found.tensors[0].captured == pytest.approx(1)
    assert found.ratios() == pytest.approx([10, 0, 1])
    # Of equal changes the first 20 entries are kept: "everywhere" keeps rows 0 and 1, 8 of them in the mask.
    assert found.overlaps()[0] == (0, 0)
    assert found.overlaps()[1] == (pytest.approx(8 / 20), 0)


def test_a_random_choice_has_ratio_one_and_the_expected_overlap(tmp_path: Path) -> None:
    base = torch.randn(300, 200).double().numpy()
    found = one_matrix(tmp_path, base, [torch.randn(300, 200).double().numpy() for _ in range(2)], 0.2, rank=20)
    assert found.ratios() == pytest.approx([1, 1], rel=0.05)
    for part in found.overlaps()[0]:
        assert part == pytest.approx(0.2 / 1.8, rel=0.1)
    assert found.as_dict()["expected_overlap"] == pytest.approx(0.2 / 1.8)


def test_nothing_changed_or_nothing_there(tmp_path: Path) -> None:
    base = torch.randn(12, 9).double().numpy()
    found = one_matrix(tmp_path / "unchanged", base, [0 * base, 0 * base], 0.3)
    assert (found.ratios(), found.overlaps()) == ([None, None], [(None, None)])
    found = one_matrix(tmp_path / "empty", 0 * base, [base], 0.3)
    assert found.tensors[0].inside == 0 and found.tensors[0].captured == 0 and found.ratios() == [None]
    everything = one_matrix(tmp_path / "all", base, [base], 1.0, rank=100)
    assert everything.ratios() == pytest.approx([1.0]) and everything.tensors[0].captured == pytest.approx(1)


def test_bad_wishes_and_bad_weights(tmp_path: Path) -> None:
    base = torch.randn(12, 9).double().numpy()
    for density in (0.0, 1.5, math.nan):
        with pytest.raises(RecipeError, match="density"):
            one_matrix(tmp_path / str(density), base, [base], density)
    with pytest.raises(RecipeError, match="rank"):
        one_matrix(tmp_path / "rank", base, [base], 0.1, rank=0)
    for i in range(2):
        bad = [base.copy(), base.copy()]
        bad[i][3, 4] = np.inf
        with pytest.raises(NumbersError, match="up_proj"):
            one_matrix(tmp_path / f"bad{i}", bad[0], [bad[1]], 0.1)
