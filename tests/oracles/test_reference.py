"""Are the reference functions themselves right? Worked examples first, then laws every correct version obeys.

The worked examples were computed by another hand in float64 before any of this code existed; they are given
to six digits.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import reference
from tests.oracles.examples import BASE, EXPERTS, VARIANTS, close, random_models

# --- worked examples -------------------------------------------------------------------------------------


def test_ties_worked_example() -> None:
    close(reference.ties(BASE, EXPERTS, 1.0, 0.5) - BASE, [0.4, 0.3, -0.4, 0, 0.5, 0.6, -0.55, 0])


def test_slerp_worked_example() -> None:
    expected = [1.354323, -0.990105, 0.595413, -0.677162, 2.209488, -1.613345, -0.535927, 0.269897]
    close(reference.slerp(EXPERTS[0], EXPERTS[1], 0.3), expected, within=1e-6)


def test_kept_count_cuts_the_float_product_off() -> None:
    kept = {0.29: 28, 0.57: 56, 0.07: 7, 0.01: 1, 0.001: 1, 0.0: 0, 1.0: 100, 0.5: 50}
    assert {density: reference.kept_count(density, 100) for density in kept} == kept
    assert reference.kept_count(0.5, 0) == 0 and reference.kept_count(0.5, 1) == 1


def test_gradient_values() -> None:
    assert [reference.gradient([0, 0.5, 1, 0.2], t) for t in (0, 1 / 3, 0.5, 1)] == pytest.approx(
        [0, 0.5, 0.75, 0.2]
    )
    assert reference.gradient([0.7], 0.4) == pytest.approx(0.7)


# --- linear, slerp, nuslerp, multislerp ------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=4), st.integers(0, 1000), st.floats(0.1, 8))
def test_linear_is_a_mean(weights: list[float], seed: int, factor: float) -> None:
    models = random_models(seed, len(weights) - 1, (3, 4))
    result = reference.linear(models, weights)
    assert np.all(result >= np.min(models, axis=0) - 1e-12) and np.all(
        result <= np.max(models, axis=0) + 1e-12
    )
    close(reference.linear(models, [factor * w for w in weights]), result)
    close(reference.linear(models, weights, normalize=False), result * math.fsum(weights))
    close(reference.linear([models[0]] * 3, [0.2, 0.5, 0.3]), models[0])


def test_linear_refuses_weights_without_a_sum() -> None:
    with pytest.raises(ValueError, match="sum to 0"):
        reference.linear([np.ones(3), np.zeros(3)], [1.0, -1.0])
    close(reference.linear([np.ones(3), np.zeros(3)], [1.0, -1.0], normalize=False), np.ones(3))


def test_slerp_ends_symmetry_length_and_limits() -> None:
    a, b = random_models(1, 1, spread=2.0)
    close(reference.slerp(a, b, 0.0), a)
    close(reference.slerp(a, b, 1.0), b)
    close(reference.slerp(a, b, 0.3), reference.slerp(b, a, 0.7))
    unit_a, unit_b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    close(np.linalg.norm(reference.slerp(unit_a, unit_b, 0.4)), 1.0)
    close(reference.slerp(a, 2 * a, 0.25), 1.25 * a)  # parallel: a straight line
    close(reference.slerp(a, -a, 0.25), 0.5 * a)
    close(reference.slerp(np.zeros(4), np.ones(4), 0.3), np.full(4, math.sin(0.15 * math.pi)))
    close(reference.slerp(np.zeros(4), np.zeros(4), 0.3), np.zeros(4))
    tiny = np.full(4, 2e-9)  # norm 4e-9 counts as 1: as if at a right angle, although it is parallel
    close(reference.slerp(tiny, np.ones(4), 0.3), np.full(4, math.sin(0.15 * math.pi)), within=1e-8)


def test_slerp_length_stays_between_the_two_for_angles_up_to_90_degrees() -> None:
    first = np.array([1.0, 0.0])
    for degrees in (5, 45, 90):
        angle = math.radians(degrees)
        second = 3 * np.array([math.cos(angle), math.sin(angle)])
        lengths = [np.linalg.norm(reference.slerp(first, second, t)) for t in np.linspace(0, 1, 11)]
        assert min(lengths) >= 1 - 1e-12 and max(lengths) <= 3 + 1e-12
    angle = math.radians(160)  # not a law beyond 90 degrees: the walk can pass nearer to the origin
    second = 1.05 * np.array([math.cos(angle), math.sin(angle)])
    assert np.linalg.norm(reference.slerp(first, second, 0.1)) < 0.98


def test_nuslerp_is_slerp_of_task_vectors_and_has_no_parallel_band() -> None:
    base, a, b = random_models(2, 2)
    close(reference.nuslerp([a, b], [3.0, 1.0]), reference.slerp(a, b, 0.25))
    close(reference.nuslerp([a, b], [3.0, 1.0], base), base + reference.slerp(a - base, b - base, 0.25))
    close(reference.nuslerp([a, b], [1.0, -1.0]), reference.slerp(a, b, 0.5))
    close(reference.nuslerp([a, a], [1.0, 2.0]), a)
    close(reference.nuslerp([a, 2 * a], [1.0, 1.0]), 1.5 * a, within=1e-9)
    nearly = a + 0.01 * b  # cosine above 0.9995: slerp goes straight, nuslerp still follows the arc
    assert np.max(np.abs(reference.nuslerp([a, nearly], [1, 1]) - reference.slerp(a, nearly, 0.5))) > 1e-7
    rows = reference.nuslerp([a, b], [1.0, 1.0], flatten=False)
    close(rows[2], reference.slerp(a[2], b[2], 0.5))
    columns = reference.nuslerp([a, b], [1.0, 1.0], flatten=False, row_wise=True)
    close(columns[:, 3], reference.slerp(a[:, 3], b[:, 3], 0.5))


@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp_equals_its_short_form(normalize: bool) -> None:
    """The tangent step is zero: unit(sum w u) * sum w |v|."""
    base, *models = random_models(3, 3)
    weights = np.array([0.2, 0.5, 0.9])
    used = weights / weights.sum() if normalize else weights
    deltas = [model - base for model in models]
    raw = sum(w * d / np.linalg.norm(d) for w, d in zip(used, deltas, strict=True))
    length = sum(w * np.linalg.norm(d) for w, d in zip(used, deltas, strict=True))
    expected = base + raw / np.linalg.norm(raw) * length
    close(
        reference.multislerp(models, list(weights), base, normalize_weights=normalize), expected, within=1e-7
    )


def test_multislerp_special_cases() -> None:
    a, b = random_models(4, 1)
    close(reference.multislerp([a], [0.3]), a)
    close(reference.multislerp([a, a, a], [1, 2, 3]), a, within=1e-7)
    close(reference.multislerp([a, -a], [0.5, 0.5]), np.zeros_like(a))
    with pytest.raises(ValueError, match="zero"):
        reference.multislerp([a, -a, b, -b], [1, 1, 1, 1])


# --- task vectors ----------------------------------------------------------------------------------------


def every_task_vector_method(
    base: np.ndarray, experts: list[np.ndarray], weights: list[float], density: float, lambda_: float
) -> dict[str, np.ndarray]:
    masks = [np.random.default_rng(40 + index).random(base.shape) < density for index in range(len(experts))]
    results = {
        "task_arithmetic": reference.task_arithmetic(base, experts, weights, lambda_),
        "task_arithmetic mean": reference.task_arithmetic(base, experts, weights, lambda_, normalize=True),
        "ties": reference.ties(base, experts, weights, density, lambda_),
        "ties sum": reference.ties(base, experts, weights, density, lambda_, normalize=False),
        "dare": reference.dare(base, experts, weights, density, masks, lambda_),
        "dare ties": reference.dare(base, experts, weights, density, masks, lambda_, consensus=True),
    }
    for variant in VARIANTS:
        scaled = [lambda_ * weight for weight in weights]
        results[f"pcb {variant}"] = reference.pcb(base, experts, 0.4, scaled, 0.0, variant)
    return results


def test_no_change_gives_the_base() -> None:
    base, a, b = random_models(5, 2)
    for result in every_task_vector_method(base, [base, base], [0.7, 0.4], 0.5, 1.3).values():
        assert np.array_equal(result, base)
    for result in every_task_vector_method(base, [a, b], [0.0, 0.0], 0.5, 1.3).values():
        assert np.array_equal(result, base)
    for result in every_task_vector_method(base, [a, b], [0.7, 0.4], 0.5, 0.0).values():
        assert np.array_equal(result, base)


def test_one_whole_expert_gives_the_expert() -> None:
    base, a = random_models(6, 1)
    close(reference.task_arithmetic(base, [a], 1.0), a)
    close(reference.ties(base, [a], 1.0, 1.0), a)
    close(reference.dare(base, [a], 1.0, 1.0, [np.zeros_like(a, dtype=bool)]), a)


def test_order_of_the_experts_does_not_matter() -> None:
    base, a, b, c = random_models(7, 3)
    results = every_task_vector_method(base, [a, b, c], [0.5] * 3, 0.5, 0.8)
    turned = every_task_vector_method(base, [c, a, b], [0.5] * 3, 0.5, 0.8)
    for name, result in results.items():
        if "dare" not in name:  # the masks belong to positions there
            close(turned[name], result)


def test_doubling_all_task_vectors_doubles_the_change() -> None:
    _, *deltas = random_models(8, 3)
    zero = np.zeros_like(deltas[0])
    results = every_task_vector_method(zero, deltas, [0.5, 0.2, 0.9], 0.5, 0.8)
    doubled = every_task_vector_method(zero, [2 * d for d in deltas], [0.5, 0.2, 0.9], 0.5, 0.8)
    for name, result in results.items():
        if name in ("pcb A", "pcb B"):  # tanh of unnormalised values: not scale-free
            continue
        close(doubled[name], 2 * result, within=1e-11)


def test_turning_all_signs_turns_the_change() -> None:
    """Holds where no weighted sum is exactly zero (the election then gives +1 both ways)."""
    _, *deltas = random_models(9, 3)
    zero = np.zeros_like(deltas[0])
    results = every_task_vector_method(zero, deltas, [0.5, 0.2, 0.9], 0.5, 0.8)
    turned = every_task_vector_method(zero, [-d for d in deltas], [0.5, 0.2, 0.9], 0.5, 0.8)
    for name, result in results.items():
        close(turned[name], -result)


def test_task_arithmetic_is_linear_and_can_be_undone() -> None:
    base, a, b = random_models(10, 2)
    by_hand = base + 0.6 * (0.5 * (a - base) - 0.3 * (b - base))
    close(reference.task_arithmetic(base, [a, b], [0.5, -0.3], 0.6), by_hand)
    there = reference.task_arithmetic(base, [a], 1.0, 0.6)
    close(there - 0.6 * (a - base), base)
    close(reference.task_arithmetic(base, [a, b], [0.5, -0.5], normalize=True), base + 0.5 * (a - b))


# --- TIES ------------------------------------------------------------------------------------------------


def test_trim_keeps_exactly_k_and_takes_equal_ones_from_the_front() -> None:
    delta = np.array([1.0, -2, 1, 1, -1, 0, 3, 1])
    assert reference.kept_entries(delta, 0.5).tolist() == [True, True, True, False, False, False, True, False]
    assert reference.kept_entries(delta, 1.0).all()
    assert not reference.kept_entries(delta, 0.0).any()
    for seed, density in [(1, 0.2), (2, 0.5), (3, 0.77)]:
        values = np.round(np.random.default_rng(seed).standard_normal((9, 7)), 1)
        kept = reference.kept_entries(values, density)
        assert kept.sum() == reference.kept_count(density, 63)
        assert np.abs(values[kept]).min() >= np.abs(values[~kept]).max()
        assert np.all(reference.kept_entries(values, density + 0.2)[kept])  # supports are nested


def test_sign_election_and_zero_sums() -> None:
    base = np.zeros(4)
    first, second = np.array([1.0, -1, 2, 0]), np.array([-1.0, 1, -1, -3])
    close(reference.ties(base, [first, second], 1.0, 1.0), [1, 1, 2, -3])  # zero sums elect +1
    close(reference.ties(base, [first, second], [1.0, 3.0], 1.0), [-1, 1, -1, -3])  # weights vote
    close(reference.ties(base, [first, second], [1.0, 3.0], 1.0, normalize=False), [-3, 3, -3, -9])
    close(
        reference.ties(base, [first, second], [1.0, -1.0], 1.0), [2, -2, 3, -3]
    )  # agreeing weights 1 - 1: divisor 1


def test_ties_stays_in_the_hull_of_the_agreeing_values() -> None:
    base, *experts = random_models(11, 4)
    deltas = np.array(experts) - base
    change = reference.ties(base, experts, [0.2, 0.5, 0.9, 0.4], 1.0) - base
    assert np.all(np.where(change > 0, deltas, 0).max(axis=0) + 1e-12 >= change)
    assert np.all(np.where(change < 0, deltas, 0).min(axis=0) - 1e-12 <= change)
    positive = [np.abs(delta) + base for delta in deltas]  # no conflict: the mean
    close(reference.ties(base, positive, 1.0, 1.0), base + np.abs(deltas).mean(axis=0))


@pytest.mark.parametrize("method", ["ties", *VARIANTS])
def test_global_scope(method: str) -> None:
    """One tensor: equal to the tensor scope. Two of different scale: the trim prefers the large one."""

    def merge(base: object, experts: list[object], scope: str) -> object:
        if method == "ties":
            return reference.ties(base, experts, [0.5, 0.8], 0.3, 0.9, scope=scope)
        return reference.pcb(base, experts, 0.3, [0.5, 0.8], 0.01, method, scope)

    base, a, b = random_models(12, 2)
    alone = merge([base], [[a], [b]], "global")
    assert len(alone) == 1  # type: ignore[arg-type]
    close(alone[0], merge(base, [a, b], "tensor"))  # type: ignore[arg-type, index]
    small = [base + 1e-3 * (model - base) for model in (base, a, b)]
    both = merge([base, small[0]], [[a, small[1]], [b, small[2]]], "global")
    assert [part.shape for part in both] == [base.shape, base.shape]  # type: ignore[attr-defined]
    assert np.array_equal(both[1], small[0])  # type: ignore[index]
    assert np.count_nonzero(both[0] - base) > np.count_nonzero(merge(base, [a, b], "tensor") - base)  # type: ignore


# --- DARE ------------------------------------------------------------------------------------------------


def test_dare_keeps_scaled_entries_and_drops_the_rest() -> None:
    base, a = random_models(13, 1)
    mask = np.random.default_rng(0).random(a.shape) < 0.4
    close(reference.dare(base, [a], 1.0, 0.4, [mask]) - base, np.where(mask, (a - base) / 0.4, 0))
    close(reference.dare(base, [a], 1.0, 0.4, [mask], rescale="none") - base, np.where(mask, a - base, 0))
    same_length = reference.dare(base, [a], 1.0, 0.4, [mask], rescale="l1") - base
    close(np.abs(same_length).sum(), np.abs(a - base).sum(), within=1e-9)
    nothing = np.zeros_like(mask)
    for rescale in ("inverse", "l1", "none"):
        assert np.array_equal(reference.dare(base, [a], 1.0, 0.0, [nothing], rescale=rescale), base)
        assert np.array_equal(reference.dare(base, [a], 1.0, 0.4, [nothing], rescale=rescale), base)


def test_dare_is_unbiased_and_without_drops_is_task_arithmetic() -> None:
    base, a, b = random_models(14, 2, (4, 3))
    everything = [np.ones_like(a, dtype=bool)] * 2
    weights = [0.4, 0.7]
    close(
        reference.dare(base, [a, b], weights, 1.0, everything),
        reference.task_arithmetic(base, [a, b], weights),
    )
    close(
        reference.dare(base, [a, b], weights, 1.0, everything, consensus=True, normalize=True),
        reference.ties(base, [a, b], weights, 1.0),
    )
    generator = np.random.default_rng(1)
    draws = [reference.dare(base, [a], 1.0, 0.5, [generator.random(a.shape) < 0.5]) for _ in range(600)]
    standard_error = np.abs(a - base) / math.sqrt(600)  # of a value that is 0 or twice the task vector
    assert np.all(np.abs(np.mean(draws, axis=0) - a) <= 5 * standard_error)
