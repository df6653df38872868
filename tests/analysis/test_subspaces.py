"""Subspaces of task vectors, against scipy's principal angles, numpy's SVD and worked examples."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from merging.analysis import panels
from merging.analysis.models import Models, open_models
from merging.analysis.spectra import measure_spectra
from merging.analysis.subspaces import (
    Overlap,
    Subspaces,
    grassmann_distance,
    measure_both,
    measure_subspaces,
    overlap,
    principal_angles,
    singular_task_interference,
)
from merging.errors import NumbersError, RecipeError
from tests.small_checkpoints import State, save

RANDOM = np.random.default_rng(11)


def orthonormal(m: int, k: int) -> np.ndarray:
    return np.linalg.qr(RANDOM.standard_normal((m, k)))[0]


# ------------------------------------------------------------------------------------------------ pure functions


@pytest.mark.parametrize(("m", "k"), [(30, 5), (8, 8), (6, 1), (9, 6)])
def test_angles_are_scipys(m: int, k: int) -> None:
    a, b = orthonormal(m, k), orthonormal(m, k)
    angles = principal_angles(a.T @ b)
    np.testing.assert_allclose(angles, np.sort(subspace_angles(a, b)), atol=1e-7)
    assert overlap(angles) == pytest.approx(np.linalg.norm(a.T @ b) ** 2 / k)
    assert grassmann_distance(angles) == pytest.approx(math.sqrt(sum(x * x for x in subspace_angles(a, b))), abs=1e-6)


def test_same_and_orthogonal_subspaces() -> None:
    a = orthonormal(12, 8)
    turned = a[:, :4] @ orthonormal(4, 4)
    assert overlap(principal_angles(a[:, :4].T @ turned)) == pytest.approx(1)
    assert grassmann_distance(principal_angles(a[:, :4].T @ turned)) == pytest.approx(0, abs=1e-7)
    assert overlap(principal_angles(a[:, :4].T @ a[:, 4:])) == pytest.approx(0, abs=1e-15)
    assert grassmann_distance(principal_angles(a[:, :4].T @ a[:, 4:])) == pytest.approx(math.sqrt(4) * math.pi / 2)
    assert overlap(np.zeros(0)) is None and grassmann_distance(np.zeros(0)) is None


def test_random_subspaces_overlap_by_k_over_m() -> None:
    found = [overlap(principal_angles(orthonormal(60, 6).T @ orthonormal(60, 6))) for _ in range(200)]
    assert np.mean([x for x in found if x is not None]) == pytest.approx(6 / 60, rel=0.05)


def test_interference_of_two_planes_by_hand() -> None:
    # u_a = e1, u_b = (cos α, sin α); v_a = e1, v_b = (cos β, sin β): (UᵀU − I) Σ (VᵀV − I) is diagonal with
    # cos α σ_b cos β and cos α σ_a cos β.
    alpha, beta, sigma = 0.3, 1.1, (5.0, 2.0)
    left = np.array([[1, math.cos(alpha)], [math.cos(alpha), 1]])
    right = np.array([[1, math.cos(beta)], [math.cos(beta), 1]])
    total, relative = singular_task_interference(left, [np.array([s]) for s in sigma], right)
    assert total == pytest.approx(math.cos(alpha) * math.cos(beta) * 7)
    assert relative == pytest.approx(math.cos(alpha) * math.cos(beta))
    assert singular_task_interference(np.eye(2), [np.ones(1), np.ones(1)], right)[0] == 0
    assert singular_task_interference(np.eye(2), [np.zeros(1), np.zeros(1)], right) == (0, None)


# ------------------------------------------------------------------------------------------------ models


def made(tmp_path: Path, changes: list[dict[str, np.ndarray]], merged: bool, dtype: torch.dtype) -> Models:
    """Experts with these changes on a random base, the last one as the merged model."""
    base = {name: torch.randn(change.shape).to(dtype) for name, change in changes[0].items()}
    states: list[State] = [base]
    states += [{n: (base[n].double() + torch.from_numpy(c)).to(dtype) for n, c in change.items()} for change in changes]
    paths = [str(save(tmp_path / f"m{i}", state)) for i, state in enumerate(states)]
    return open_models(paths[0], paths[1:-1] if merged else paths[1:], paths[-1] if merged else None)


SHAPES = {"layers.0.mlp.up_proj.weight": (70, 30), "layers.0.mlp.down_proj.weight": (30, 70),
          "layers.0.self_attn.q_proj.weight": (32, 32)}  # fmt: skip


def decaying(shape: tuple[int, int]) -> np.ndarray:
    n = min(shape)
    return orthonormal(shape[0], n) * np.logspace(0, -2, n) @ orthonormal(shape[1], n).T


def naive(tau: dict[str, np.ndarray], a: str, b: str, k: int) -> Overlap:
    (ua, sa, va), (ub, sb, vb) = (np.linalg.svd(tau[x], full_matrices=False) for x in (a, b))
    ua, sa, va, ub, sb, vb = ua[:, :k], sa[:k], va[:k].T, ub[:, :k], sb[:k], vb[:k].T
    u, v, sigma = np.c_[ua, ub], np.c_[va, vb], np.diag(np.r_[sa, sb])
    interference = np.abs((u.T @ u - np.eye(2 * k)) @ sigma @ (v.T @ v - np.eye(2 * k))).sum()
    ta, tb = (ua * sa) @ va.T, (ub * sb) @ vb.T
    return Overlap(
        a, b, k, np.sort(subspace_angles(ua, ub)), np.sort(subspace_angles(va, vb)), k / len(ua), k / len(va),
        float((ta * tb).sum() / np.linalg.norm(ta) / np.linalg.norm(tb)), float(interference),
        float(interference / np.trace(sigma)),
        float(np.linalg.norm(ub @ (ub.T @ tau[a])) / np.linalg.norm(tau[a])) if b == "merged" else None,
        float(np.linalg.norm(tau[a] @ vb @ vb.T) / np.linalg.norm(tau[a])) if b == "merged" else None,
    )  # fmt: skip


def assert_close(found: Overlap, true: Overlap, tolerance: float = 1e-7) -> None:
    for name in Overlap.__slots__:
        one, other = getattr(found, name), getattr(true, name)
        if isinstance(other, float | np.ndarray):
            accuracy = max(tolerance, 1e-5) if name.startswith("angles") else tolerance
            np.testing.assert_allclose(one, other, atol=accuracy, err_msg=name)
        else:
            assert one == other, name


@pytest.mark.parametrize("method", ["gram", "exact"])
@pytest.mark.parametrize("rank", [1, 5, 30])
def test_all_figures_are_those_of_numpys_svd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, rank: int
) -> None:
    monkeypatch.setattr(panels, "PANEL", 1 << 9)
    monkeypatch.setattr(panels, "NARROWEST", 8)
    changes = [{name: decaying(shape) for name, shape in SHAPES.items()} for _ in range(3)]
    shared = {name: changes[0][name] - 0.5 * changes[1][name] for name in SHAPES}  # what "merged" should show
    with made(tmp_path, [*changes, shared], True, torch.float64) as models:
        found = measure_subspaces(models, rank=rank, method=method, threads=2)  # type: ignore[arg-type]
        names = [*models.names, "merged"]
        order = [t.name for t in models.tensors]
    assert (found.names, found.rank, found.method) == (names[:-1], rank, method)
    assert [t.name for t in found.tensors] == order
    for tensor in found.tensors:
        tau = {who: change[tensor.name] for who, change in zip(names, [*changes, shared], strict=True)}
        expected = [*combinations(names[:-1], 2), *((who, "merged") for who in names[:-1])]
        assert [(p.a, p.b) for p in tensor.pairs] == expected
        for pair in tensor.pairs:
            assert_close(pair, naive(tau, pair.a, pair.b, rank))
            assert pair.overlap_left == pytest.approx(np.mean(np.cos(pair.angles_left) ** 2))
        parts = [np.linalg.svd(tau[who], full_matrices=False) for who in names[:-1]]
        u, v = np.hstack([u[:, :rank] for u, _, _ in parts]), np.hstack([v[:rank].T for _, _, v in parts])
        sigma, one = np.concatenate([s[:rank] for _, s, _ in parts]), np.eye(3 * rank)
        total = np.abs((u.T @ u - one) @ np.diag(sigma) @ (v.T @ v - one)).sum()
        assert tensor.interference == pytest.approx(total, abs=1e-6)
        assert tensor.interference_relative == pytest.approx(total / sigma.sum(), abs=1e-6)


def test_opposite_changes_share_all_directions_and_cancel(tmp_path: Path) -> None:
    name = "layers.0.mlp.up_proj.weight"
    change = decaying((70, 30))
    with made(tmp_path, [{name: change}, {name: -2 * change}], False, torch.float64) as models:
        ((pair,),) = [tensor.pairs for tensor in measure_subspaces(models, rank=4).tensors]
    assert pair.overlap_left == pytest.approx(1) and pair.overlap_right == pytest.approx(1)
    assert pair.cosine == pytest.approx(-1)
    assert pair.distance_left == pytest.approx(0, abs=1e-5)
    assert (pair.expected_left, pair.expected_right) == (4 / 70, 4 / 30)
    assert pair.interference_relative == pytest.approx(1, abs=1e-5)  # each direction meets its own twin
    assert pair.kept_left is None


def test_changes_in_other_rows_and_columns_do_not_meet(tmp_path: Path) -> None:
    name, one, other = "layers.0.mlp.up_proj.weight", np.zeros((40, 20)), np.zeros((40, 20))
    one[:20, :10], other[20:, 10:] = RANDOM.standard_normal((20, 10)), RANDOM.standard_normal((20, 10))
    with made(tmp_path, [{name: one}, {name: other}], False, torch.float64) as models:
        tensor = measure_subspaces(models, rank=6).tensors[0]
    (pair,) = tensor.pairs
    for value in (pair.overlap_left, pair.overlap_right, pair.cosine, pair.interference, tensor.interference):
        assert value == pytest.approx(0, abs=1e-7)


def test_fewer_directions_than_wanted_are_not_made_up(tmp_path: Path) -> None:
    name = "layers.0.mlp.up_proj.weight"
    changes = [RANDOM.standard_normal((70, r)) @ RANDOM.standard_normal((r, 30)) for r in (3, 7)]
    with made(tmp_path, [{name: c} for c in [*changes, np.zeros((70, 30))]], False, torch.float64) as models:
        tensor = measure_subspaces(models, rank=16).tensors[0]
    first, *zeros = tensor.pairs
    assert first.rank == 3 and len(first.angles_left) == 3
    assert_close(first, naive({"m1": changes[0], "m2": changes[1]}, "m1", "m2", 3))
    for pair in zeros:
        assert (pair.rank, pair.overlap_left, pair.cosine, pair.interference) == (0, None, None, None)
    assert tensor.interference is not None and tensor.interference > 0


@pytest.mark.parametrize("method", ["gram", "preview"])
def test_weights_of_16_bits(tmp_path: Path, method: str) -> None:
    """The experts' real differences after rounding, at a rank where the directions are well separated."""
    changes = [{name: decaying(shape) for name, shape in SHAPES.items()} for _ in range(2)]
    with made(tmp_path, changes, False, torch.bfloat16) as models:
        found = measure_subspaces(models, rank=3, method=method)  # type: ignore[arg-type]
        again = measure_subspaces(models, rank=3, method=method, threads=1)  # type: ignore[arg-type]
        states = {who: c.tensors for who, c in models.checkpoints.items()}
        for tensor in found.tensors:
            values = {who: read(table[tensor.name]) for who, table in states.items()}
            tau = {who: values[who] - values["base"] for who in models.names}
            assert_close(tensor.pairs[0], naive(tau, *models.names, 3), 1e-6 if method == "gram" else 0.1)
    assert found.as_dict() == again.as_dict()


def read(source: object) -> np.ndarray:
    from merging.checkpoints.low_rank import read_float64

    return read_float64(source, 0, source.numel).reshape(source.shape)  # type: ignore[attr-defined, arg-type]


def test_spectra_come_along_for_nothing(tmp_path: Path) -> None:
    changes = [{name: decaying(shape) for name, shape in SHAPES.items()} for _ in range(3)]
    with made(tmp_path, changes, True, torch.bfloat16) as models:
        spectra, subspaces = measure_both(models, rank=4)
        alone = measure_spectra(models)
        assert subspaces.as_dict() == measure_subspaces(models, rank=4).as_dict()
    assert [(s.tensor, s.of) for s in spectra] == [(s.tensor, s.of) for s in alone]
    for one, other in zip(spectra, alone, strict=True):
        np.testing.assert_allclose(one.values, other.values, rtol=0, atol=1e-12 * one.values[0])
        assert one.base_frobenius == other.base_frobenius


def test_as_json(tmp_path: Path) -> None:
    with made(tmp_path, [{"layers.0.a.weight": decaying((9, 5))}] * 2, False, torch.float32) as models:
        found: Subspaces = measure_subspaces(models, rank=2)
    (tensor,) = found.as_dict()["tensors"]
    assert tensor["block"] == 0 and tensor["pairs"][0]["overlap_left"] == pytest.approx(1)
    assert len(tensor["pairs"][0]["angles_right"]) == 2


def test_bad_wishes_and_bad_weights(tmp_path: Path) -> None:
    change = decaying((9, 5))
    with made(
        tmp_path, [{"layers.0.a.weight": change}, {"layers.0.a.weight": change * np.nan}], False, torch.float32
    ) as models:
        with pytest.raises(RecipeError, match="rank 0"):
            measure_subspaces(models, rank=0)
        with pytest.raises(NumbersError, match="layers.0.a.weight"):
            measure_subspaces(models, threads=1)
