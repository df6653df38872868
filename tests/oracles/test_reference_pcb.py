"""Is the PCB-Merging reference itself right? Worked examples, then laws. See `test_reference.py`."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracles import reference
from tests.oracles.examples import BASE, DELTA_1, DELTA_2, EXPERTS, VARIANTS, close, random_models


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("C", [0.39217, 0, 0, 0, 0.5, 0.6, -0.550588, 0]),
        ("A", [0.38934, 0, 0, 0, 0.5, 0.6, -0.554599, 0]),
        ("B", [0.389616, 0, 0, 0, 0.5, 0.6, -0.557105, 0]),
    ],
)
def test_pcb_worked_example(variant: str, expected: list[float]) -> None:
    close(reference.pcb(BASE, EXPERTS, 0.5, 1.0, 0.0, variant) - BASE, expected, within=1e-6)


def test_pcb_intermediate_values_of_the_worked_example() -> None:
    clipped, scores = reference.pcb_scores([DELTA_1, DELTA_2], 0.0, "C")
    close(clipped, np.array([DELTA_1, DELTA_2]))
    close(scores[0], [1.445521, -0.050558, -0.127148, 0.173769, 0.045851, 5.127275, 5.012123, 0], within=1e-6)
    close(reference.pcb_scale(scores[0], 0.5), [0.256738, 0, 0, 0, 0, 1, 0.976753, 0], within=1e-6)
    close(reference.pcb_scale(scores[1], 0.5), [0.010461, 0, 0, 0, 0.218978, 0, 1, 0], within=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pcb_keeps_the_stated_number_and_averages_what_it_keeps(variant: str) -> None:
    base, *experts = random_models(15, 3)
    deltas = [expert - base for expert in experts]
    clipped, scores = reference.pcb_scores(deltas, 0.05, variant)
    scales = np.array([reference.pcb_scale(score, 0.4) for score in scores])
    assert (np.count_nonzero(scales, axis=1) == 30 - 1 - int(30 * (1 - 0.4))).all()
    assert scales.max(axis=1).tolist() == [1.0] * 3 and scales.min() == 0.0
    shares = scales / np.maximum(scales.sum(axis=0), 1e-12)
    close(shares.sum(axis=0), scales.any(axis=0).astype(float))
    expected = base.reshape(-1) + (shares * np.array(clipped)).sum(axis=0)
    close(reference.pcb(base, experts, 0.4, 1.0, 0.05, variant).reshape(-1), expected)
    for score, scale in zip(scores, scales, strict=True):  # higher score, higher weight
        order = np.argsort(score)
        assert np.all(np.diff(scale[order]) >= 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pcb_of_identical_experts_is_the_expert_where_it_keeps(variant: str) -> None:
    base, a = random_models(16, 1)
    change = reference.pcb(base, [a, a, a], 0.5, 1.0, 0.0, variant) - base
    kept = change != 0
    assert np.count_nonzero(kept) == 30 - 1 - 15
    close(change[kept], (a - base)[kept])


def test_pcb_clip_uses_order_statistics() -> None:
    delta = np.array([-1.0, 0, 2, -3, 4, 5, -6, 7, 8, 9])
    clipped, _ = reference.pcb_scores(
        [delta], 0.2, "C"
    )  # sorted[int(10 * .2)] = 2, sorted[int(10 * .8 - 1)] = 7
    close(clipped[0], [-2, 0, 2, -3, 4, 5, -6, 7, 7, 7])
    clipped, _ = reference.pcb_scores(
        [delta], 0.01, "C"
    )  # sorted[0] = 0, sorted[int(9.9 - 1)] = sorted[8] = 8
    close(clipped[0], [-1, 0, 2, -3, 4, 5, -6, 7, 8, 8])


def test_pcb_variants_a_and_b_compare_the_unclipped_task_vectors() -> None:
    """exp(N n^2) tanh(tau_i sum_j ...) at one entry, by hand: 5.0 is clipped to 2.0, its tanh is not."""
    first, second = np.array([5.0, 2.0, 0.5, 0.1]), np.array([0.3, 0.2, -0.4, 0.1])
    clip = 0.1  # sorted[0] .. sorted[int(4 * 0.9 - 1)] = sorted[2]: 0.1 .. 2.0 and 0.1 .. 0.3
    clipped, scores = reference.pcb_scores([first, second], clip, "A")
    close(clipped, [[2.0, 2.0, 0.5, 0.1], [0.3, 0.2, -0.3, 0.1]])
    close(scores[1][0], np.exp(2 * 1.0**2) * np.tanh(0.3 * 5.3))
    close(scores[0][2], np.exp(2 * (0.4 / 1.9) ** 2) * np.tanh(0.5 * 0.1))
    _, scores = reference.pcb_scores([first, second], clip, "B")
    close(scores[1][2], np.exp(2 * 1.0**2) * np.tanh(-0.4 * (0.4 / 1.9 - 1.0)))


def test_pcb_lambdas_scale_each_expert() -> None:
    base, a, b = random_models(17, 2)
    both = reference.pcb(base, [a, b], 0.4, [1.3, 0.6], 0.0) - base
    parts = [reference.pcb(base, [a, b], 0.4, pair, 0.0) - base for pair in ([1.3, 0.0], [0.0, 0.6])]
    close(both, parts[0] + parts[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_pcb_of_constant_or_tiny_task_vectors_is_finite(variant: str) -> None:
    for shape in [(), (1,), (2,), (5,)]:
        base = np.ones(shape)
        for change in (0.0, 0.5):
            result = reference.pcb(base, [base + change, base], 0.5, 1.0, 0.01, variant)
            assert result.shape == shape and np.all(np.isfinite(result))
    assert reference.pcb(np.zeros((0, 3)), [np.zeros((0, 3))], 0.5, 1.0, 0.01, variant).shape == (0, 3)
    with pytest.raises(ValueError, match="ratio"):
        reference.pcb(np.ones(3), [np.zeros(3)], 0.0, 1.0, 0.0, variant)


def test_pcb_paper_scores_equal_the_plain_softmax() -> None:
    """The logarithm form against the formula typed in directly, which float64 can hold at this size."""

    def softmax(values: np.ndarray) -> np.ndarray:
        return np.exp(values) / np.exp(values).sum()

    def norm(values: np.ndarray) -> np.ndarray:
        return (values - values.min()) / (values.max() - values.min())

    taus = [DELTA_1, DELTA_2, DELTA_1[::-1].copy()]
    plain = np.array(
        [softmax(3 * norm(t * t)) * sum(softmax(norm(t * other)) for other in taus) for t in taus]
    )
    _, scores = reference.pcb_scores(taus, 0.0, "paper")
    close(scores, plain / plain.max(), within=1e-12)
    kept = np.array([reference.pcb_scale(score, 0.5, keep="mask") for score in plain.tolist()])
    expected = sum(k * t for k, t in zip(kept, taus, strict=True)) / np.where(
        kept.any(axis=0), kept.sum(axis=0), 1
    )
    close(reference.pcb(BASE, [BASE + t for t in taus], 0.5, 1.0, 0.0, "paper", keep="mask"), BASE + expected)


def test_pcb_paper_scores_do_not_depend_on_the_scale_and_survive_many_entries() -> None:
    generator = np.random.default_rng(5)
    taus = list(generator.standard_normal((2, 3000)) * 1e-4)
    _, scores = reference.pcb_scores(taus, 0.0, "paper")
    _, scaled = reference.pcb_scores([8 * tau for tau in taus], 0.0, "paper")
    close(scores, scaled)
    assert np.max(scores) == 1.0 and np.min(scores) > 0
