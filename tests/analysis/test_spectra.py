"""Singular values and what is read from them, against numpy's SVD in float64, scipy's entropy and worked examples."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from merging.analysis import matrices, panels
from merging.analysis.matrices import METHODS, estimated_tail
from merging.analysis.models import Models, open_models, task_vector
from merging.analysis.spectra import (
    Spectrum,
    energy_rank,
    left_out,
    measure_spectra,
    measures_of,
    spectrum_of,
)
from merging.errors import Cancelled, InputError, NumbersError, RecipeError
from tests.small_checkpoints import State, save

RANDOM = np.random.default_rng(7)
TRUE = ("gram", "exact")
DEMO = Path(__file__).parents[2] / "assets" / "demo"


def svd(matrix: np.ndarray | torch.Tensor) -> np.ndarray:
    return np.linalg.svd(np.asarray(torch.as_tensor(matrix).double()), compute_uv=False)


def orthogonal(n: int) -> np.ndarray:
    return np.linalg.qr(RANDOM.standard_normal((n, n)))[0]


def with_values(values: np.ndarray, rows: int) -> np.ndarray:
    n = len(values)
    return orthogonal(rows)[:, :n] * values @ orthogonal(n)


# ------------------------------------------------------------------------------------------------ singular values


@pytest.mark.parametrize("method", TRUE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(90, 40), (40, 90), (64, 64), (1, 77), (77, 1), (1, 1), (2, 3), (9000, 3)])
def test_values_are_those_of_the_svd(shape: tuple[int, int], dtype: torch.dtype, method: str) -> None:
    matrix = torch.from_numpy(RANDOM.standard_normal(shape)).to(dtype)
    found, true = spectrum_of(matrix, method), svd(matrix)
    assert found.values.dtype == np.float64
    np.testing.assert_allclose(found.values, true, rtol=0, atol=1e-13 * true[0])
    assert found.frobenius == pytest.approx(np.linalg.norm(true), rel=1e-12)
    assert (found.computed, found.estimated_tail, found.shape) == (min(shape), False, shape)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matrices_whose_values_are_known(dtype: torch.dtype, method: str) -> None:
    # Below √ε σ_1 a Gram matrix in float64 knows nothing.
    a, b = RANDOM.standard_normal(500), RANDOM.standard_normal(20)
    cases = {
        "identity": (np.eye(30), np.ones(30)),
        "orthogonal": (3 * orthogonal(30), np.full(30, 3.0)),
        "zero": (np.zeros((30, 20)), np.zeros(20)),
        "one direction": (np.outer(a, b), np.r_[np.linalg.norm(a) * np.linalg.norm(b), np.zeros(19)]),
        "diagonal": (np.diag([5.0, -7.0, 0.0, 1.0]), np.array([7.0, 5.0, 1.0, 0.0])),
        "rank 5 of 30": (with_values(np.r_[np.arange(5, 0, -1.0), np.zeros(25)], 60), np.r_[5:0:-1, np.zeros(25)]),
    }
    for name, (matrix, true) in cases.items():
        found = spectrum_of(torch.from_numpy(matrix).to(dtype), method).values
        atol = max(true[0], 1e-300) * (1e-14 if dtype == torch.float64 and method == "exact" else 1e-6)
        np.testing.assert_allclose(found, true, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("scale", "dtype"), [(1e-30, torch.float32), (1e30, torch.float32), (1e-200, torch.float64),
                                              (1e200, torch.float64), (1e-42, torch.float32)])  # fmt: skip
def test_squares_of_huge_and_tiny_numbers_do_no_harm(scale: float, dtype: torch.dtype, method: str) -> None:
    matrix = torch.from_numpy(RANDOM.standard_normal((50, 8)) * scale).to(dtype)
    found, true = spectrum_of(matrix, method), svd(matrix)
    np.testing.assert_allclose(found.values / scale, true / scale, rtol=1e-5)
    assert found.measures().effective_rank_of_energy == pytest.approx(
        measures_of(true, (50, 8)).effective_rank_of_energy
    )
    assert found.measures().nuclear == pytest.approx(true.sum(), rel=1e-5, abs=0)


def spiked(rows: int, columns: int) -> torch.Tensor:
    """As a fine-tuned matrix: a few strong directions over noise."""
    strong = RANDOM.standard_normal((rows, 8)) * np.logspace(0, -1, 8) @ RANDOM.standard_normal((8, columns))
    return torch.from_numpy(strong / 100 + 0.02 * RANDOM.standard_normal((rows, columns))).float() * 1e-3


@pytest.mark.parametrize("shape", [(300, 300), (1100, 300), (260, 4500)])
@pytest.mark.parametrize("kind", ["noise", "spiked"])
def test_large_matrices_of_float32_are_as_accurate_as_stated(shape: tuple[int, int], kind: str) -> None:
    matrix = spiked(*shape) if kind == "spiked" else torch.from_numpy(RANDOM.standard_normal(shape)).float()
    found, true = spectrum_of(matrix).values, svd(matrix)
    error = np.abs(found - true) / true[0]
    assert error[true >= 0.003 * true[0]].max() < 1e-5
    assert error.max() < 1e-4
    assert error.max() > 1e-11, "this was meant to test arithmetic in float32"
    rank = measures_of(true, shape).effective_rank_of_values
    assert spectrum_of(matrix).measures().effective_rank_of_values == pytest.approx(rank, rel=1e-5)


def test_large_matrices_with_many_small_values_are_done_in_float64() -> None:
    low = torch.from_numpy(RANDOM.standard_normal((400, 12)) @ RANDOM.standard_normal((12, 300))).float()
    found = spectrum_of(low)
    assert found.values[12] < 1e-6 * found.values[0]  # of the rounding to float32; the short way would leave 1e-4
    assert found.measures().k99 <= 12
    np.testing.assert_allclose(found.values[:12], svd(low)[:12], rtol=1e-12)


def test_a_matrix_and_its_transpose_have_the_same_values() -> None:
    matrix = torch.from_numpy(RANDOM.standard_normal((70, 300)))
    for method in METHODS:
        one, other = spectrum_of(matrix, method), spectrum_of(matrix.T, method)
        np.testing.assert_allclose(one.values, other.values, rtol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    matrix = torch.ones(5, 4)
    matrix[2, 3] = bad
    for method in METHODS:
        with pytest.raises(NumbersError, match="NaN or an infinity"):
            spectrum_of(matrix, method)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 3), ()])
def test_what_is_not_a_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as caught:
        spectrum_of(torch.ones(shape))
    assert caught.value.code == "E_SHAPE"


def test_unknown_words_are_refused() -> None:
    with pytest.raises(RecipeError, match="'svd'"):
        spectrum_of(torch.ones(2, 2), "svd")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ previews


def test_a_preview_knows_the_leading_values_and_all_of_the_energy() -> None:
    true = 1 / np.arange(1, 161.0)
    matrix = with_values(true, 500)
    found = spectrum_of(matrix, "preview", k=20)
    assert (found.computed, found.estimated_tail, len(found.values)) == (20, True, 160)
    np.testing.assert_allclose(found.values[:20], true[:20], rtol=0.02)
    assert (found.values[:20] <= true[:20] * (1 + 1e-12)).all()
    assert found.frobenius == pytest.approx(np.linalg.norm(true), rel=1e-12)
    assert np.linalg.norm(found.values) == pytest.approx(found.frobenius, rel=1e-9)
    assert (np.diff(found.values) <= 0).all()
    same, other = (spectrum_of(matrix, "preview", k=20, seed=seed) for seed in (0, 1))
    assert (same.values == found.values).all() and (other.values[:20] != found.values[:20]).any()


def test_a_preview_of_all_values_estimates_nothing() -> None:
    matrix = RANDOM.standard_normal((80, 30))
    found = spectrum_of(matrix, "preview", k=25)
    assert not found.estimated_tail
    np.testing.assert_allclose(found.values, svd(matrix), rtol=1e-9)


@pytest.mark.parametrize("share", [0.0, 1e-6, 0.1, 0.33, 0.9, 1.0, 1.5])
def test_an_estimated_tail_falls_and_has_the_energy_that_is_missing(share: float) -> None:
    head, count = np.array([5.0, 2.0, 1.0]), 50
    tail = estimated_tail(head, 30 + share * count, count)
    assert tail.shape == (count,) and (np.diff(tail) <= 0).all() and (tail <= 1).all() and (tail >= 0).all()
    assert float(tail @ tail) == pytest.approx(min(share, 1) * count, rel=1e-6)


def test_the_tail_of_noise_is_estimated_well() -> None:
    true = svd(RANDOM.standard_normal((600, 300)))
    found = measures_of(np.r_[true[:30], estimated_tail(true[:30], float(true @ true), 270)], (600, 300))
    real = measures_of(true, (600, 300))
    assert found.effective_rank_of_values == pytest.approx(real.effective_rank_of_values, rel=0.06)
    assert found.k90 == pytest.approx(real.k90, rel=0.12)


# ------------------------------------------------------------------------------------------------ measures


def test_measures_agree_with_their_formulas() -> None:
    s = np.sort(RANDOM.random(40))[::-1]
    found = measures_of(s, (60, 40), base_frobenius=2.0)
    assert found.effective_rank_of_values == pytest.approx(math.exp(entropy(s)))
    assert found.effective_rank_of_energy == pytest.approx(math.exp(entropy(s**2)))
    assert found.stable_rank == pytest.approx(float((s**2).sum() / s[0] ** 2))
    assert found.participation == pytest.approx(float((s**2).sum() ** 2 / (s**4).sum()))
    assert (found.nuclear, found.frobenius) == pytest.approx((s.sum(), np.linalg.norm(s)))
    assert found.relative == pytest.approx(np.linalg.norm(s) / 2)
    # s (√m + √n) with entries of variance s² = ‖τ‖² / mn
    variance = float((s**2).sum()) / (60 * 40)
    assert found.marchenko_pastur_edge == pytest.approx(math.sqrt(variance) * (math.sqrt(60) + math.sqrt(40)))
    assert found.above_edge == sum(x > found.marchenko_pastur_edge for x in s)


def test_energy_ranks_of_a_worked_example() -> None:
    s = np.array([3.0, 2.0, 1.0])  # energies 9, 4, 1 of 14: 0.643, 0.929, 1
    assert [energy_rank(s, f) for f in (0.5, 0.64, 0.65, 0.90, 0.928, 0.95, 1.0)] == [1, 1, 2, 2, 2, 3, 3]
    assert measures_of(s, (3, 3)).k90 == 2
    assert energy_rank(np.ones(10), 0.9) == 9  # 0.1 + … nine times is just below 0.9 in floating point


def test_equal_values_count_as_so_many_in_every_measure() -> None:
    found = measures_of(np.array([4.0] * 7 + [0.0] * 5), (12, 12))
    for rank in (
        found.effective_rank_of_values,
        found.effective_rank_of_energy,
        found.stable_rank,
        found.participation,
    ):
        assert rank == pytest.approx(7)
    assert (found.k90, found.k99) == (7, 7)


def test_the_two_effective_ranks_differ_as_in_the_literature() -> None:
    slow = measures_of(1 / np.arange(1, 513.0), (512, 512))
    assert (round(slow.effective_rank_of_values), round(slow.effective_rank_of_energy)) == (117, 5)
    noise = spectrum_of(RANDOM.standard_normal((512, 512))).measures()
    assert noise.effective_rank_of_values == pytest.approx(412, rel=0.01)
    assert noise.effective_rank_of_energy == pytest.approx(310, rel=0.01)


def test_a_zero_matrix_has_no_rank() -> None:
    found = spectrum_of(torch.zeros(6, 4)).measures()
    assert set(vars_of(found).values()) == {0, None}
    assert measures_of(np.zeros(4), (6, 4), base_frobenius=0.0).relative is None


def vars_of(measures: object) -> dict:
    return {name: getattr(measures, name) for name in measures.__slots__}  # type: ignore[attr-defined]


def test_noise_ends_at_the_edge_and_structure_lies_above_it() -> None:
    noise = RANDOM.standard_normal((800, 200)) * 0.01
    found = spectrum_of(noise)
    edge = found.measures().marchenko_pastur_edge
    assert edge == pytest.approx(0.01 * (math.sqrt(800) + math.sqrt(200)), rel=0.01)
    assert found.values[0] == pytest.approx(edge, rel=0.02)
    structure = noise + with_values(np.array([1.5, 1.2, 1.0] + [0.0] * 197), 800)
    assert spectrum_of(structure).measures().above_edge == 3


# ------------------------------------------------------------------------------------------------ models


def made(tmp_path: Path, dtype: torch.dtype = torch.bfloat16, merged: bool = True) -> tuple[Models, list[State]]:
    """A base, three experts, perhaps a merged model, of matrices of all proportions and tensors that are none."""
    shapes = {
        "model.embed_tokens.weight": (700, 24),
        "model.layers.0.self_attn.q_proj.weight": (40, 40),
        "model.layers.0.mlp.up_proj.weight": (90, 40),
        "model.layers.0.mlp.down_proj.weight": (40, 90),
        "model.layers.0.input_layernorm.weight": (40,),
        "model.layers.0.experts.weight": (3, 5, 6),
        "model.layers.0.gate.weight": (1, 40),
        "lm_head.weight": (5, 1300),
    }
    states: list[State] = [{name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}]
    for _ in range(3 + merged):
        states.append({name: (t.float() + 0.05 * torch.randn(t.shape)).to(dtype) for name, t in states[0].items()})
    paths = [str(save(tmp_path / f"model{i}", state)) for i, state in enumerate(states)]
    return open_models(paths[0], paths[1:4], paths[4] if merged else None), states


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", TRUE)
def test_spectra_of_models_are_those_of_their_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, dtype: torch.dtype
) -> None:
    for name, value in {"PANEL": 1 << 10, "NARROWEST": 16, "WINDOW_BYTES": 1 << 13}.items():
        monkeypatch.setattr(panels, name, value)  # many panels and windows also of small matrices
    models, states = made(tmp_path, dtype)
    with models:
        found = measure_spectra(models, method=method, threads=2)
        names = [t.name for t in models.tensors if len(t.shape) == 2]
        assert left_out(models) == [t.name for t in models.tensors if len(t.shape) != 2]
    base, *others = [{name: t.double() for name, t in state.items()} for state in states]
    terms = {"model1": [0], "model2": [1], "model3": [2], "merged": [3], "model1 + model2": [0, 1],
             "model1 + model3": [0, 2], "model2 + model3": [1, 2]}  # fmt: skip
    assert [(s.tensor, s.of) for s in found] == [(name, of) for name in names for of in terms]
    for spectrum in found:
        name = spectrum.tensor
        true = svd(sum(others[k][name] - base[name] for k in terms[spectrum.of]))
        np.testing.assert_allclose(spectrum.values, true, rtol=0, atol=2e-7 * true[0])
        relative = np.linalg.norm(true) / float(base[name].norm())
        assert spectrum.measures().relative == pytest.approx(relative, rel=1e-6)
        assert spectrum.shape == tuple(base[name].shape)


def test_numbers_do_not_depend_on_workers_rounds_or_company(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, _ = made(tmp_path)
    with models:
        for method in METHODS:
            first = measure_spectra(models, method=method, threads=1, k=5)
            assert same(first, measure_spectra(models, method=method, threads=3, k=5))
            alone = measure_spectra(models, of=["merged"], method=method, threads=1, k=5)
            assert same([s for s in first if s.of == "merged"], alone)
        first = measure_spectra(models)
        monkeypatch.setattr(matrices, "GRAM_BYTES", 1)  # one matrix at a time
        assert same(first, measure_spectra(models))


def same(one: list[Spectrum], other: list[Spectrum]) -> bool:
    facts = [[(s.tensor, s.of, s.computed, s.frobenius, s.base_frobenius) for s in each] for each in (one, other)]
    return facts[0] == facts[1] and all((a.values == b.values).all() for a, b in zip(one, other, strict=True))


def test_the_bundled_experts() -> None:
    experts = sorted(str(path) for path in (DEMO / "experts").iterdir() if path.is_dir())[:2]
    with open_models(str(DEMO / "base"), experts) as models:
        found = {(s.tensor, s.of): s for s in measure_spectra(models, of=["experts"], threads=2)}
        preview = {(s.tensor, s.of): s for s in measure_spectra(models, of=["experts"], method="preview", k=16)}
        tensors = [t for t in models.tensors if len(t.shape) == 2]
        assert len(found) == 2 * len(tensors) > 20
        for tensor in tensors[:9]:
            for k, name in enumerate(models.names):
                true = svd(task_vector(tensor, k))
                np.testing.assert_allclose(found[tensor.name, name].values, true, rtol=0, atol=1e-5 * true[0])
        for key, spectrum in preview.items():
            real = found[key]
            assert spectrum.frobenius == pytest.approx(real.frobenius, rel=1e-6)
            np.testing.assert_allclose(spectrum.values[:4], real.values[:4], rtol=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, method: str) -> None:
    state = {"layers.0.a.weight": torch.randn(6, 4), "layers.1.b.weight": torch.randn(4, 6)}
    bad = {name: tensor.clone() for name, tensor in state.items()}
    bad["layers.1.b.weight"][2, 1] = math.nan
    paths = [str(save(tmp_path / name, s)) for name, s in (("base", state), ("expert", bad))]
    with open_models(paths[0], paths[1:]) as models, pytest.raises(NumbersError) as caught:
        measure_spectra(models, method=method, threads=1)
    assert caught.value.code == "E_NOT_FINITE"
    assert "layers.1.b.weight" in caught.value.what and "element 13" in caught.value.what


def test_an_unchanged_expert_has_an_empty_spectrum(tmp_path: Path) -> None:
    state = {"layers.0.a.weight": torch.randn(6, 4)}
    paths = [str(save(tmp_path / name, state)) for name in ("base", "expert")]
    with open_models(paths[0], paths[1:]) as models:
        for method in METHODS:
            (found,) = measure_spectra(models, method=method)
            assert (found.values == 0).all() and found.measures().k90 == 0 and found.measures().relative == 0


def test_progress_is_told_and_a_wish_to_stop_is_heard(tmp_path: Path) -> None:
    models, _ = made(tmp_path)
    seen: list[tuple[int, int, str]] = []
    stop = threading.Event()
    with models:
        measure_spectra(models, threads=2, progress=lambda *step: seen.append(step))
        assert seen[-1][0] == seen[-1][1] and all(0 <= done <= total for done, total, _ in seen)
        stop.set()
        with pytest.raises(Cancelled):
            measure_spectra(models, threads=2, stop=stop)
        with pytest.raises(RecipeError, match="'pair'"):
            measure_spectra(models, of=["pair"], threads=1)


def test_a_spectrum_as_json(tmp_path: Path) -> None:
    found = spectrum_of(np.diag([3.0, 4.0])).as_dict()
    assert found["shape"] == [2, 2] and found["frobenius"] == 5 and found["estimated_tail"] is False
    assert found["k90"] == 2 and found["method"] == "gram"
