"""Figures from numbers: the numbers arrive, the rules of the house hold, and no name can smuggle anything in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from ui import plots, plots_evaluation
from ui.plot_style import DARK, DASHES, LIGHT, OKABE_ITO, label, marker, style

LAYERS = 4
NASTY = "<script>alert(1)</script>%{x}</b>\u2028" + "n" * 80


def cells(seed: int = 0) -> plots.Grid:
    values = np.random.default_rng(seed).gamma(4, 2, (LAYERS, 3))
    values[2, 1] = np.nan
    return plots.Grid(list(range(LAYERS)), ["q", "v", "down"], values)


def curves(names: list[str]) -> list[plots.Curve]:
    found = []
    for number, name in enumerate(names):
        values = np.exp(-np.arange(300) / (20 + 5 * number))
        found.append(plots.Curve(name, values, float(np.linalg.norm(values)), k90=23.0, edge=0.1))
    return found


def matrix(count: int) -> np.ndarray:
    values = np.random.default_rng(1).uniform(-0.2, 0.5, (count, count))
    values = (values + values.T) / 2
    np.fill_diagonal(values, 1)
    return values


def score(model: str, task: str, value: float = 0.5, items: int = 200) -> plots_evaluation.Score:
    return plots_evaluation.Score(model, task, value, value - 0.1, value + 0.05, items)


def every_figure(names: list[str], dark: bool = False) -> dict[str, Callable[[], go.Figure]]:
    layers = list(range(LAYERS))
    lines = {name: (layers, [0.1 * k for k in layers]) for name in names}
    rows = [score(name, task) for name in names for task in ("a", "b")]
    points = [plots_evaluation.Candidate(n, n, 1.0 + k, 0.5 + k / 10, 0.4, 0.9) for k, n in enumerate(names)]
    shares = {name: cells(k) for k, name in enumerate(names)}
    kept = [(name, [0.9, -0.1]) for name in names]
    return {
        "spectra": lambda: plots.spectra(curves(names), dark=dark),
        "maps": lambda: plots.maps(shares, "effective rank", dark=dark),
        "importance": lambda: plots.importance(cells(), "‖τ‖/‖W‖", [1.0] * LAYERS, "‖τ‖", dark=dark),
        "by_layer": lambda: plots.by_layer(lines, "cosine", marks={"chance": 0.1}, dark=dark),
        "cosine": lambda: plots.cosine(names, matrix(len(names)), dark=dark),
        "overlap": lambda: plots.overlap(names, abs(matrix(len(names))), "overlap", dark=dark),
        "sign_split": lambda: plots.sign_split(layers, [0.5] * LAYERS, [0.2] * LAYERS, [0.3] * LAYERS, dark=dark),
        "bars": lambda: plots.bars(names, {"projection": [0.3] * len(names)}, "share", dark=dark),
        "scores": lambda: plots_evaluation.scores(rows, dark=dark),
        "retention": lambda: plots_evaluation.retention(["a", "b"], kept, dark=dark),
        "pareto": lambda: plots_evaluation.pareto(points, "bytes", "retention", dark=dark),
    }


FIGURES = list(every_figure([]))


def traces(figure: go.Figure, kind: str) -> list[Any]:
    return [trace for trace in figure.data if trace.type == kind]


# -- rules for all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_small_and_has_hover_text_and_both_looks(name: str) -> None:
    names = ["reverse", "sort", "unique", "rotate"]
    light, dark = every_figure(names)[name](), every_figure(names, dark=True)[name]()
    assert light.layout.template == LIGHT and dark.layout.template == DARK
    assert light.layout.height and len(light.to_json()) < 300_000
    for trace in light.data:
        assert trace.hovertemplate or trace.hoverinfo == "skip"
    assert json.loads(light.to_json())["layout"]["template"]["layout"]["paper_bgcolor"] == "#ffffff"
    without = [json.loads(f.to_json()) for f in (light, dark)]
    for one in without:
        one["layout"].pop("template")
    assert without[0] == without[1]  # a page can switch between the two by the template alone


@pytest.mark.parametrize("name", FIGURES)
def test_names_are_text_and_nothing_else(name: str) -> None:
    figure = every_figure([NASTY, "plain"])[name]()
    text = json.dumps(json.loads(figure.to_json()), ensure_ascii=False)
    assert "<script" not in text and "\u2028" not in text and "n" * 60 not in text
    for trace in figure.data:
        assert "alert" not in (trace.hovertemplate or "")


@pytest.mark.parametrize("name", FIGURES)
def test_one_expert_and_many_experts_can_be_drawn(name: str) -> None:
    for count in (1, 7):
        figure = every_figure([f"expert {k}" for k in range(count)])[name]()
        assert figure.to_json() and figure.data


@pytest.mark.parametrize("name", ["maps", "importance", "by_layer", "sign_split"])
def test_layer_0_is_on_top(name: str) -> None:
    axes = [axis for axis in every_figure(["x", "y"])[name]().select_yaxes() if axis.range]
    assert axes and all(axis.range[0] > axis.range[1] for axis in axes)


def test_lines_differ_in_more_than_colour() -> None:
    looks = [style(k) for k in range(24)]
    assert len({(look["color"], look["dash"]) for look in looks}) == 24
    assert len({style(k)["dash"] for k in range(6)}) == len(DASHES)
    assert len({marker(k)["symbol"] for k in range(8)}) == 8 and len(set(OKABE_ITO)) == 8


def test_labels() -> None:
    assert label("a<b>&c") == "a&lt;b&gt;&amp;c"
    assert label("tab\there\u202e") == "tab?here?"
    long = label("beginning" + "x" * 50 + "ending")
    assert long.startswith("beginning") and long.endswith("ending") and len(long) == 28 and "…" in long


# -- what each shows ----------------------------------------------------------------------------------------------


def test_spectra_are_normalised_and_their_energy_reaches_one() -> None:
    figure = plots.spectra(curves(["a", "b"]))
    values = [t for t in traces(figure, "scatter") if t.mode == "lines" and t.yaxis == "y" and len(t.x) > 2]
    energy = [t for t in traces(figure, "scatter") if t.mode == "lines" and t.yaxis == "y2"]
    assert len(values) == len(energy) == 2
    for line in values:
        assert line.y[0] == 1 and line.x[0] == 1 and line.x[-1] == 300 and len(line.x) <= plots.MOST_POINTS
        assert line.y[49] == pytest.approx(math.exp(-49 / (20 if line.name == "a" else 25)), rel=1e-6)
    for line in energy:
        assert line.y[-1] == pytest.approx(1) and (np.diff(line.y) >= 0).all()
    assert figure.layout.yaxis.type == "log"


def test_the_energy_of_a_preview_ends_below_one() -> None:
    values = np.ones(10)
    figure = plots.spectra([plots.Curve("a", values, math.sqrt(40))])
    energy = next(t for t in traces(figure, "scatter") if t.yaxis == "y2")
    assert energy.y[-1] == pytest.approx(0.25)


def test_an_expert_that_changed_nothing_has_no_spectrum() -> None:
    figure = plots.spectra([plots.Curve("none", np.zeros(5), 0.0), *curves(["b"])])
    assert {t.name for t in figure.data} == {"b"}
    assert plots.spectra([]).data == ()


def test_all_panels_share_one_range() -> None:
    grids = {"a": cells(0), "b": cells(1)}
    figure = plots.maps(grids, "rank", limits=(0, 9))
    heat = traces(figure, "heatmap")
    assert len(heat) == 2 and {t.coloraxis for t in heat} == {"coloraxis"}
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 9)
    assert list(heat[0].x) == ["q", "v", "down"] and np.isnan(heat[0].z[2][1])
    assert heat[1].z[3][2] == pytest.approx(grids["b"].values[3, 2])
    means = traces(figure, "scatter")
    assert means[0].x[2] == pytest.approx((grids["a"].values[2, 0] + grids["a"].values[2, 2]) / 2)


def test_cells_become_a_grid_in_the_order_of_computation() -> None:
    found = plots.grid(
        [(1, "mlp_down", 4.0), (0, "attn_q", 1.0), (0, "attn_q", 3.0), (None, "embed", 9.0), (3, "norm", 5.0)]
    )
    assert found.layers == [0, 1, 3] and found.modules == ["q", "down", "norm"]
    assert found.values[0, 0] == 2.0 and found.values[1, 1] == 4.0 and np.isnan(found.values[0, 1])
    assert plots.grid([]).layers == []


def test_signed_matrices_are_centred_and_shares_are_not() -> None:
    (heat,) = plots.cosine(["a", "b", "c"], matrix(3)).data
    assert (heat.zmin, heat.zmax, heat.zmid) == (-1, 1, 0)
    assert heat.text[0][0] == "1.00" and heat.text[1][0] == f"{matrix(3)[1, 0]:.2f}"
    (heat,) = plots.overlap(["a", "b", "c"], abs(matrix(3)), "overlap").data
    assert (heat.zmin, heat.zmax) == (0, 1) and list(heat.y) == ["b", "c"] and list(heat.x) == ["a", "b"]
    assert list(heat.text[0]) == [f"{abs(matrix(3))[1, 0]:.2f}", ""]  # the upper triangle is empty


def test_many_experts_stand_beside_those_they_resemble() -> None:
    values = np.full((8, 8), 0.1)
    values[np.ix_([0, 3, 6], [0, 3, 6])] = 0.9
    values[np.ix_([1, 7], [1, 7])] = 0.8
    np.fill_diagonal(values, 1)
    order = plots.likeness(values)
    places = sorted(order.index(k) for k in (0, 3, 6))
    assert sorted(order) == list(range(8)) and places[2] - places[0] == 2
    assert abs(order.index(1) - order.index(7)) == 1
    (heat,) = plots.cosine([str(k) for k in range(8)], values).data
    assert list(heat.y) == [str(k) for k in order] and heat.z[0][0] == 1


def test_shares_of_signs_are_stacked() -> None:
    figure = plots.sign_split([0, 1], [0.5, 0.6], [0.2, 0.1], [0.3, 0.3])
    assert figure.layout.barmode == "stack" and [t.name for t in figure.data][:2] == ["same sign", "opposite signs"]
    assert figure.data[1].marker.pattern.shape == "/"


# -- evaluation ---------------------------------------------------------------------------------------------------


def test_scores_have_their_intervals_and_a_word_on_few_items() -> None:
    figure = plots_evaluation.scores([score("m", "a"), score("m", "b", 0.7, items=40), score("n", "a", 0.2)])
    first = figure.data[0]
    assert list(first.x) == [0.5, 0.7]
    np.testing.assert_allclose(first.error_x.array, [0.05, 0.05])
    np.testing.assert_allclose(first.error_x.arrayminus, [0.1, 0.1])
    assert figure.layout.yaxis.ticktext == ("a<br>n = 200", "b<br>n = 40, few items")
    assert figure.data[1].y[0] > first.y[0]  # the same task, without hiding each other


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 0.5), (2, 0.6), (3, 0.55)], {0, 1}),
        ([(1, 0.5), (1, 0.5)], {0, 1}),
        ([(1, 0.5), (1, 0.6)], {1}),
        ([(2, 0.5), (1, 0.5)], {1}),
        ([], set()),
    ],
)
def test_the_front(points: list[tuple[float, float]], expected: set[int]) -> None:
    candidates = [plots_evaluation.Candidate(str(k), "m", cost, quality) for k, (cost, quality) in enumerate(points)]
    assert plots_evaluation.front(candidates) == expected


def test_those_that_are_beaten_are_grey() -> None:
    points = [plots_evaluation.Candidate(str(k), "m", c, q) for k, (c, q) in enumerate([(1, 0.5), (2, 0.4), (3, 0.9)])]
    figure = plots_evaluation.pareto(points, "MB", "retention")
    line, marks = figure.data
    assert list(line.x) == [1, 3] and marks.marker.color[1] == "#8a8a8a" and marks.marker.color[0] != "#8a8a8a"
    assert figure.layout.xaxis.type == "log"


def comparison() -> dict[str, Any]:
    cell = {"mean": 0.8, "low": 0.7, "high": 0.9, "correct": 80, "items": 100, "length": 3.0}
    kept = {"tasks": {"a": {"value": 0.9, "low": 0.8, "high": 1.0}}, "mean": {"value": 0.9, "low": 0.8, "high": 1.0}}
    rows = [
        {"name": "base", "role": "base", "bytes": None, "tasks": {"a": cell, "text": cell}, "gain_kept": None, "retention": None},
        {"name": "ties", "role": "candidate", "bytes": 5_000_000, "tasks": {"a": cell}, "gain_kept": kept, "retention": kept},
    ]  # fmt: skip
    tasks = [
        {"name": "a", "metric": "exact_match", "unit": "share", "kind": "binary"},
        {"name": "text", "metric": "nll_per_byte", "unit": "bits per byte", "kind": "real"},
    ]
    test = {
        "candidate": "ties",
        "baseline": "average",
        "task": "a",
        "advantage": 0.1,
        "low": None,
        "high": 0.2,
        "items": 100,
    }
    return {"tasks": tasks, "rows": rows, "tests": [test, test | {"task": None}]}


def test_figures_of_a_comparison() -> None:
    figures = plots_evaluation.comparison(comparison())
    assert list(figures) == [
        "Scores: exact_match", "Advantage over average: exact_match", "Scores: nll_per_byte", "Gain kept", "Size and retention",
    ]  # fmt: skip
    assert {t.name for t in figures["Scores: exact_match"].data} == {"base", "ties"}
    (advantage,) = figures["Advantage over average: exact_match"].data
    assert list(advantage.x) == [0.1] and advantage.error_x.arrayminus[0] == 0  # an undefined end is not drawn
    assert "bits per byte" in figures["Scores: nll_per_byte"].layout.xaxis.title.text
    assert [list(t.x) for t in figures["Size and retention"].data] == [[5.0], [5.0]]


@pytest.mark.parametrize("make", [plots.spectra, plots_evaluation.scores])
def test_nothing_gives_an_empty_figure(make: Callable[..., go.Figure]) -> None:
    assert make([]).to_json()
