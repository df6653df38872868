"""Statistics against scipy, statsmodels, published worked examples and plain simulation."""

from __future__ import annotations

import itertools
import math

import networkx
import numpy as np
import pytest
import scipy.stats
import statsmodels.api
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar as other_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from merging.evaluation.statistics import (
    Difference,
    bootstrap_p,
    holm,
    mcnemar,
    needed_items,
    newcombe_interval,
    paired_difference,
    percentile_interval,
    resampled_means,
    smallest_visible_difference,
    standard_error,
    tied_groups,
    wilson_interval,
)

COUNTS = st.integers(0, 60)


# -- single scores ------------------------------------------------------------------------------------------------


@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_agrees_with_statsmodels(case: tuple[int, int]) -> None:
    correct, total = case
    assert wilson_interval(correct, total) == pytest.approx(
        proportion_confint(correct, total, method="wilson"), abs=1e-12
    )


def test_wilson_agrees_with_the_published_example() -> None:
    """81 of 263: R. G. Newcombe, Statistics in Medicine 17 (1998) 857, table I."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@pytest.mark.parametrize("case", [(0, 0), (-1, 4), (5, 4)])
def test_wilson_refuses_what_is_no_share(case: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(*case)


def test_standard_error_is_the_textbook_one_without_clusters() -> None:
    values = np.random.default_rng(1).normal(size=57)
    assert standard_error(values) == pytest.approx(scipy.stats.sem(values), rel=1e-12)


def test_clustered_standard_error_agrees_with_statsmodels() -> None:
    generator = np.random.default_rng(2)
    clusters = generator.integers(12, size=200)
    values = generator.normal(size=200) + generator.normal(size=12)[clusters]
    model = statsmodels.api.OLS(values, np.ones(200)).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    assert standard_error(values, clusters.tolist()) == pytest.approx(float(model.bse[0]), rel=1e-10)
    assert standard_error(values, clusters.tolist()) > 2 * standard_error(values)  # that is the point of it


def test_a_spread_that_nothing_is_known_about_is_not_zero() -> None:
    assert math.isnan(standard_error([0.5]))
    assert math.isnan(standard_error([0.1, 0.2, 0.9], ["one", "one", "one"]))
    assert standard_error([0.5, 0.5, 0.5]) == 0


# -- resampling ---------------------------------------------------------------------------------------------------


def test_the_bootstrap_agrees_with_scipy() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=80)
    reference = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(4)
    )
    draws = resampled_means(values, resamples=20_000, seed=5)[:, 0]
    assert percentile_interval(draws) == pytest.approx(tuple(reference.confidence_interval), abs=0.01)
    assert draws.std() == pytest.approx(reference.standard_error, rel=0.03)


def test_columns_are_drawn_together() -> None:
    """The same items in every column: what is constant item by item stays constant in every draw."""
    values = np.random.default_rng(6).normal(size=300)
    draws = resampled_means(np.stack([values, values + 0.25, 2 * values], axis=1), resamples=500)
    assert draws[:, 1] - draws[:, 0] == pytest.approx(0.25)
    assert draws[:, 2] == pytest.approx(2 * draws[:, 0])


def test_whole_clusters_are_drawn() -> None:
    """Two clusters of unequal size with one value each: a draw has both of one, both of the other, or one of each."""
    draws = resampled_means([0, 0, 0, 1], clusters=["a", "a", "a", "b"], resamples=4_000, seed=7)[:, 0]
    values, counts = np.unique(draws, return_counts=True)
    assert values.tolist() == [0, 0.25, 1]
    assert counts / 4_000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def test_clustered_draws_spread_like_the_clustered_error() -> None:
    generator = np.random.default_rng(8)
    clusters = np.repeat(np.arange(40), 5)
    values = generator.normal(size=200) + 2 * generator.normal(size=40)[clusters]
    draws = resampled_means(values, clusters=clusters.tolist(), seed=9)[:, 0]
    assert draws.std() == pytest.approx(standard_error(values, clusters.tolist()), rel=0.05)


def test_the_seed_decides_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(10).normal(size=(50, 2))
    first = resampled_means(values, resamples=300, seed=[1, 2])
    assert (first == resampled_means(values, resamples=300, seed=[1, 2])).all()
    assert (first != resampled_means(values, resamples=300, seed=[1, 3])).any()
    monkeypatch.setattr("merging.evaluation.statistics.CHUNK", 200)  # four draws at a time
    assert resampled_means(values, resamples=300, seed=[1, 2]) == pytest.approx(first, abs=1e-12)


def test_a_draw_that_could_be_anything_counts_on_both_sides() -> None:
    draws = np.linspace(0, 1, 1_001)
    assert percentile_interval(draws) == pytest.approx((0.025, 0.975))
    draws[:10] = np.nan  # 1 %: within the tails
    low, high = percentile_interval(draws)
    assert low < 0.03 and high > 0.98 and math.isfinite(high)
    draws[:30] = np.nan
    assert percentile_interval(draws) == (-math.inf, math.inf)


@given(st.integers(0, 10_000), st.floats(-3, 3))
def test_the_p_value_goes_with_the_interval(seed: int, middle: float) -> None:
    draws = np.random.default_rng(seed).normal(middle, size=400)
    low, high = percentile_interval(draws)
    if low > 0 or high < 0:
        assert bootstrap_p(draws) <= 0.05 + 2 / len(draws)
    if bootstrap_p(draws) < 0.05 - 2 / len(draws):
        assert low > 0 or high < 0


# -- two models on the same items ---------------------------------------------------------------------------------


@given(COUNTS, COUNTS)
def test_mcnemar_agrees_with_scipy_and_statsmodels(b: int, c: int) -> None:
    if b + c:
        assert mcnemar(b, c) == pytest.approx(scipy.stats.binomtest(b, b + c).pvalue, rel=1e-9)
    if b + c and b != c:  # statsmodels forgets the 1 in min(1, 2p)
        assert mcnemar(b, c) == pytest.approx(other_mcnemar([[5, b], [c, 5]], exact=True).pvalue, rel=1e-9)


def test_mcnemar_at_its_ends() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 4) == 2 / 16
    assert mcnemar(0, 60) == 2.0**-59
    assert mcnemar(0, 2_000) == 0  # smaller than any float, and no overflow
    assert mcnemar(5_100, 4_900) == pytest.approx(scipy.stats.binomtest(5_100, 10_000).pvalue, rel=1e-9)
    with pytest.raises(ValueError, match="negative"):
        mcnemar(-1, 3)


@pytest.mark.parametrize(
    ("cells", "limits"),
    [
        ((36, 12, 2, 0), (0.0569, 0.3404)),
        ((18, 12, 2, 18), (0.0562, 0.3290)),
        ((53, 0, 0, 1), (-0.0729, 0.0729)),
        ((0, 30, 0, 0), (0.8395, 1.0)),
    ],
)
def test_newcombe_agrees_with_the_published_examples(cells: tuple[int, ...], limits: tuple[float, float]) -> None:
    """R. G. Newcombe, Statistics in Medicine 17 (1998) 2635: his examples, method 10."""
    assert newcombe_interval(*cells) == pytest.approx(limits, abs=1e-4)


@given(COUNTS, COUNTS, COUNTS, COUNTS)
def test_newcombe_is_an_interval_and_turns_around(both: int, b: int, c: int, neither: int) -> None:
    if not both + b + c + neither:
        return
    total = both + b + c + neither
    low, high = newcombe_interval(both, b, c, neither)
    assert -1 <= low <= (b - c) / total <= high <= 1
    assert low < high
    assert newcombe_interval(both, c, b, neither) == pytest.approx((-high, -low), abs=1e-12)


def test_newcombe_covers_what_it_promises() -> None:
    """200 items on which two models agree on 85 %: the true difference lies inside in about 95 of 100 cases."""
    cells = np.array([0.6, 0.1, 0.05, 0.25])
    samples = np.random.default_rng(11).multinomial(200, cells, size=3_000)
    inside = sum(low <= 0.05 <= high for low, high in (newcombe_interval(*map(int, row)) for row in samples))
    assert 0.94 <= inside / 3_000 <= 0.97


def test_right_and_wrong_answers_are_compared_exactly() -> None:
    first = [1] * 30 + [1] * 12 + [0] * 2 + [0] * 16
    second = [1] * 30 + [0] * 12 + [1] * 2 + [0] * 16
    found = paired_difference(first, second)
    assert (found.items, found.units, found.wins, found.losses, found.test) == (60, 60, 12, 2, "exact McNemar")
    assert found.mean == pytest.approx(10 / 60)
    assert found.mean_square == pytest.approx(14 / 60)
    assert found.p == mcnemar(12, 2)
    assert (found.low, found.high) == newcombe_interval(30, 12, 2, 16)
    assert found.standard_error == pytest.approx(scipy.stats.sem(np.subtract(first, second)))


def test_other_scores_are_resampled() -> None:
    generator = np.random.default_rng(12)
    second = generator.normal(3, 1, size=400)
    first = second + generator.normal(0.1, 0.5, size=400)
    found = paired_difference(first, second, seed=1)
    expected = scipy.stats.ttest_rel(first, second)
    assert found.test == "paired bootstrap"
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()), abs=0.01)
    assert found.p == pytest.approx(expected.pvalue, abs=0.002)
    assert found == paired_difference(first, second, seed=1)


def test_pairing_sees_what_two_separate_scores_do_not() -> None:
    generator = np.random.default_rng(13)
    second = generator.normal(3, 1, size=400)
    first = second + generator.normal(0.1, 0.5, size=400)
    assert scipy.stats.ttest_ind(first, second).pvalue > 0.05 > paired_difference(first, second).p


def test_clusters_make_the_same_answers_say_less() -> None:
    """60 items of 6 documents, all wins in one document: item by item impressive, document by document nothing."""
    first, second = [1] * 10 + [0] * 50, [0] * 60
    clusters = [f"document {index // 10}" for index in range(60)]
    assert paired_difference(first, second).p < 0.01
    found = paired_difference(first, second, clusters=clusters)
    assert found.p > 0.2 and found.units == 6 and found.test == "paired bootstrap over clusters"


def test_equal_models_are_equal_and_one_unit_says_nothing() -> None:
    same = paired_difference([1, 0, 1, 1], [1, 0, 1, 1])
    assert (same.mean, same.p, same.wins, same.losses) == (0, 1, 0, 0)
    assert same.low < 0 < same.high  # not a point: four items cannot show that two models are equal
    same = paired_difference([0.2, 0.4, 0.6], [0.2, 0.4, 0.6])
    assert (same.mean, same.p, same.low, same.high) == (0, 1, 0, 0)
    single = paired_difference([0.2, 0.4], [0.1, 0.1], clusters=["a", "a"])
    assert isinstance(single, Difference) and single.mean == pytest.approx(0.2)
    assert all(math.isnan(x) for x in (single.p, single.low, single.high, single.standard_error))


@pytest.mark.parametrize(
    ("first", "second"), [([], []), ([1.0], [1.0, 2.0]), ([math.nan], [1.0]), ([1.0], [math.inf]), ([[1.0]], [[1.0]])]
)
def test_what_cannot_be_compared_is_refused(first: list, second: list) -> None:
    with pytest.raises(ValueError):
        paired_difference(first, second)


# -- many comparisons ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 60])
def test_holm_agrees_with_statsmodels(size: int) -> None:
    p_values = np.round(np.random.default_rng(size).random(size) ** 4, 2)  # with ties, zeros and ones
    assert holm(p_values.tolist()) == pytest.approx(multipletests(p_values, method="holm")[1], abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_never_lowers(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, corrected, strict=True))
    assert min(corrected) == min(1.0, len(p_values) * min(p_values))
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    assert [corrected[index] for index in order] == sorted(corrected)


def test_holm_at_its_ends() -> None:
    assert holm([]) == []
    with pytest.raises(ValueError):
        holm([0.1, math.nan])


@settings(max_examples=60)
@given(
    st.integers(1, 9).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.booleans(), min_size=n * (n - 1) // 2, max_size=n * (n - 1) // 2))
    )
)
def test_tied_groups_are_the_maximal_cliques(case: tuple[int, list[bool]]) -> None:
    count, bits = case
    graph = networkx.Graph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from(pair for pair, bit in zip(itertools.combinations(range(count), 2), bits, strict=True) if bit)
    expected = sorted(sorted(clique) for clique in networkx.find_cliques(graph))
    assert tied_groups(networkx.to_numpy_array(graph, dtype=bool)) == expected


def test_groups_overlap_where_ties_do_not_carry_over() -> None:
    tied = np.eye(4, dtype=bool)
    tied[0, 1] = tied[1, 0] = tied[1, 2] = tied[2, 1] = True
    assert tied_groups(tied) == [[0, 1], [1, 2], [3]]
    assert tied_groups(np.zeros((0, 0))) == []
    with pytest.raises(ValueError, match="symmetric"):
        tied_groups([[False, True], [False, False]])


# -- how many items? ----------------------------------------------------------------------------------------------


def test_needed_items_agrees_with_the_worked_example() -> None:
    """Discordance 15 %, two points apart: about 2,900 items. 120 items show differences from about 10 points."""
    assert needed_items(0.02, 0.15) == pytest.approx(2_936, abs=2)
    assert smallest_visible_difference(120, 0.15) == pytest.approx(0.096, abs=0.001)


@given(st.floats(0.005, 0.4), st.floats(0.17, 1.0))
def test_needed_items_and_smallest_difference_undo_each_other(difference: float, mean_square: float) -> None:
    items = needed_items(difference, mean_square)
    assert smallest_visible_difference(items, mean_square) <= difference * (1 + 1e-9)
    if items > 1:
        assert smallest_visible_difference(items - 1, mean_square) > difference * (1 - 1e-9)


def test_the_promised_power_is_there() -> None:
    """Simulated: at the needed number of items a z test on the paired differences finds it in 80 of 100 cases."""
    difference, discordance = 0.06, 0.2
    items = needed_items(difference, discordance)
    shares = [(discordance + difference) / 2, (discordance - difference) / 2]
    wins, losses, _ = np.random.default_rng(14).multinomial(items, [*shares, 1 - discordance], size=4_000).T
    mean = (wins - losses) / items
    error = np.sqrt(((wins + losses) / items - mean**2) / items)
    assert float((mean / error > 1.96).mean()) == pytest.approx(0.8, abs=0.03)


def test_models_that_never_differ_say_nothing_about_what_is_visible() -> None:
    assert smallest_visible_difference(100, 0.0) == 0
    for bad in (lambda: needed_items(0.0, 0.1), lambda: needed_items(0.5, 0.1), lambda: needed_items(math.nan, 0.1),
                lambda: smallest_visible_difference(0, 0.1), lambda: smallest_visible_difference(9, math.nan)):  # fmt: skip
        with pytest.raises(ValueError):
            bad()
