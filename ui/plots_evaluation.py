"""Figures of evaluations: scores with intervals, retention, and what a model costs against what it can do.

Pure functions on plain values, like ``plots``. Intervals are the message: where they overlap, the ranking is open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from .plot_style import GREY, bar_look, finish, label, marker, style

FEW_ITEMS = 100
"""Below this a task is marked: its interval is wider than most differences between methods."""


@dataclass(frozen=True, slots=True)
class Score:
    """One model on one task."""

    model: str
    task: str
    value: float
    low: float
    high: float
    """Ends of the 95 % interval."""
    items: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model as a point between cost and quality."""

    name: str
    method: str
    cost: float
    """Bytes relative to one full model, or any other positive cost."""
    quality: float
    low: float | None = None
    high: float | None = None


def scores(
    rows: Sequence[Score], axis: str = "score", *, percent: bool = True, zero: bool = False, dark: bool = False
) -> go.Figure:
    """A dot per model and task with its 95 % interval; tasks are rows. Two models whose intervals do not overlap
    differ; where they overlap, only a paired test can tell. Tasks of fewer than 100 items are marked "few items".
    ``zero``: a line at 0, for differences."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    models = list(dict.fromkeys(row.model for row in rows))
    names = {task: _task(task, [row.items for row in rows if row.task == task]) for task in tasks}
    figure, form = go.Figure(), ".1%" if percent else ".3g"
    for number, model in enumerate(models):
        own = [row for row in rows if row.model == model]
        # Each model has its own height within the task's row, so that intervals do not hide each other.
        shift = (number - (len(models) - 1) / 2) * 0.7 / max(1, len(models))
        figure.add_scatter(
            x=[row.value for row in own],
            y=[tasks.index(row.task) + shift for row in own],
            mode="markers",
            name=label(model),
            marker=marker(number) | {"size": 9},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [max(0.0, row.high - row.value) for row in own],
                "arrayminus": [max(0.0, row.value - row.low) for row in own],
                "thickness": 1.5,
                "width": 3,
            },
            customdata=[[row.low, row.high, row.items, label(row.task)] for row in own],
            hovertemplate=f"%{{fullData.name}}<br>%{{customdata[3]}}: %{{x:{form}}} [%{{customdata[0]:{form}}}, "
            f"%{{customdata[1]:{form}}}], %{{customdata[2]}} items<extra></extra>",
        )
    figure.update_yaxes(
        tickvals=list(range(len(tasks))),
        ticktext=[names[t] for t in tasks],
        range=[len(tasks) - 0.5, -0.5],
        zeroline=False,
    )
    figure.update_xaxes(title_text=f"{axis} (95 % interval)", tickformat=".0%" if percent else None)
    if zero:
        figure.add_vline(x=0, line={"dash": "dot", "color": GREY, "width": 1})
    return finish(figure, 170 + len(tasks) * max(56, 20 * len(models)), dark=dark)


def comparison(data: Mapping[str, Any], *, dark: bool = False) -> dict[str, go.Figure]:
    """The figures of a comparison (``merging.evaluation.Comparison.as_dict``) by title: scores per metric, paired
    advantages over each baseline per metric, gain kept, and the front of size and retention where both are known."""
    figures: dict[str, go.Figure] = {}
    facts = {task["name"]: task for task in data["tasks"]}
    metrics = list(dict.fromkeys((task["metric"], task["unit"], task["kind"] == "binary") for task in data["tasks"]))
    for metric, unit, percent in metrics:
        mine = [name for name, task in facts.items() if task["metric"] == metric]
        axis = metric if percent else f"{metric} ({unit})"
        cells = [
            (row["name"], task, row["tasks"][task]) for task in mine for row in data["rows"] if task in row["tasks"]
        ]
        rows = [
            _score(model, task, cell["mean"], cell["low"], cell["high"], cell["items"]) for model, task, cell in cells
        ]
        figures[f"Scores: {metric}"] = scores(rows, axis, percent=percent, dark=dark)
        for baseline in dict.fromkeys(test["baseline"] for test in data["tests"]):
            tests = [t for t in data["tests"] if t["baseline"] == baseline and t["task"] in mine]
            rows = [_score(t["candidate"], t["task"], t["advantage"], t["low"], t["high"], t["items"]) for t in tests]
            if rows:
                title = f"Advantage over {baseline}: {metric}"
                figures[title] = scores(rows, "same items, right of 0 is better", percent=percent, zero=True, dark=dark)
    kept = [(row["name"], row["gain_kept"]["tasks"]) for row in data["rows"] if row["gain_kept"]]
    tasks = list(dict.fromkeys(task for _, by_task in kept for task in by_task))
    if tasks:
        bars = [(name, [(by_task.get(task) or {}).get("value") for task in tasks]) for name, by_task in kept]
        figures["Gain kept"] = retention(tasks, bars, dark=dark)
    candidates = [
        Candidate(row["name"], row["role"], row["bytes"] / 1e6, row["retention"]["mean"]["value"],
                  row["retention"]["mean"]["low"], row["retention"]["mean"]["high"])
        for row in data["rows"]
        if row["bytes"] and ((row["retention"] or {}).get("mean") or {}).get("value") is not None
    ]  # fmt: skip
    if candidates:
        figures["Size and retention"] = pareto(candidates, "MB on disk", "mean retention", dark=dark)
    return figures


def _score(model: str, task: str, value: float | None, low: float | None, high: float | None, items: int) -> Score:
    """What is undefined in the JSON (null) is drawn as nothing."""
    middle = math.nan if value is None else value
    return Score(model, task, middle, middle if low is None else low, middle if high is None else high, items)


def _task(task: str, counts: Sequence[int]) -> str:
    items = min(counts)
    return f"{label(task)}<br>n = {items:,}" + (", few items" if items < FEW_ITEMS else "")


def retention(
    tasks: Sequence[str], values: Sequence[tuple[str, Sequence[float | None]]],
    axis: str = "(merge − base) / (expert − base)", *, dark: bool = False,
) -> go.Figure:  # fmt: skip
    """Bars per task and merged model: the share of the expert's gain that the merge kept. The line at 100 % is the
    expert, 0 the base. The worst task matters more than the mean."""
    figure = go.Figure()
    for number, (model, kept) in enumerate(values):
        figure.add_bar(
            x=[label(task) for task in tasks], y=list(kept), name=label(model),
            marker=bar_look(number),
            hovertemplate="%{fullData.name}<br>%{x}: %{y:.1%}<extra></extra>")  # fmt: skip
    figure.add_hline(y=1, line={"dash": "dot", "color": GREY, "width": 1}, annotation_text="expert")
    figure.update_yaxes(tickformat=".0%", title_text=axis)
    return finish(figure, 400, dark=dark, barmode="group")


def pareto(
    candidates: Sequence[Candidate], cost: str, quality: str, *, percent: bool = True, dark: bool = False
) -> go.Figure:
    """Cost (logarithmic) against quality; the stepped line joins the models that no other beats in both. Look for the
    knee. Models that are beaten are grey."""
    best = front(candidates)
    figure, form = go.Figure(), ".1%" if percent else ".3g"
    methods = list(dict.fromkeys(c.method for c in candidates))
    on_front = sorted((candidates[i] for i in best), key=lambda c: c.cost)
    figure.add_scatter(
        x=[c.cost for c in on_front], y=[c.quality for c in on_front], mode="lines", name="front", hoverinfo="skip",
        line={"shape": "hv", "color": GREY, "dash": "dot", "width": 1.5})  # fmt: skip
    for number, method in enumerate(methods):
        own = [(i, c) for i, c in enumerate(candidates) if c.method == method]
        look = marker(number)
        figure.add_scatter(
            x=[c.cost for _, c in own], y=[c.quality for _, c in own], mode="markers+text", name=label(method),
            text=[label(c.name, 18) for _, c in own], textposition="top center",
            marker=look | {"size": 11, "color": [look["color"] if i in best else GREY for i, _ in own]},
            error_y={"type": "data", "symmetric": False, "color": GREY, "thickness": 1, "width": 3,
                     "array": [max(0.0, (c.high if c.high is not None else c.quality) - c.quality) for _, c in own],
                     "arrayminus": [max(0.0, c.quality - (c.low if c.low is not None else c.quality)) for _, c in own]},
            hovertemplate=f"%{{text}}<br>{cost}: %{{x:.3g}}<br>{quality}: %{{y:{form}}}<extra></extra>")  # fmt: skip
    figure.update_xaxes(type="log", dtick="D2", title_text=cost)
    figure.update_yaxes(title_text=quality, tickformat=".0%" if percent else None)
    return finish(figure, 440, dark=dark)


def front(candidates: Sequence[Candidate]) -> set[int]:
    """Indices of the candidates that no other one beats: none is as cheap and as good, and better in one of the two."""
    return {
        i
        for i, one in enumerate(candidates)
        if not any(
            other.cost <= one.cost and other.quality >= one.quality
            and (other.cost < one.cost or other.quality > one.quality)
            for other in candidates
        )
    }  # fmt: skip


RADAR_TASKS = (3, 8)
"""With fewer axes there is no shape, with more it cannot be read."""


def radar(
    tasks: Sequence[str], values: Sequence[tuple[str, Sequence[float | None]]], *, dark: bool = False
) -> go.Figure:
    """Scores from 0 to 1 on an axis per task; an overview of shapes, without intervals. Areas mean nothing: they depend
    on the order of the tasks."""
    figure = go.Figure()
    names = [label(task, 20) for task in tasks]
    for number, (model, scored) in enumerate(values):
        figure.add_scatterpolar(
            r=[*scored, scored[0]], theta=[*names, names[0]], name=label(model), mode="lines+markers",
            line=style(number), marker=marker(number),
            hovertemplate="%{fullData.name}<br>%{theta}: %{r:.1%}<extra></extra>")  # fmt: skip
    figure.update_polars(radialaxis={"range": [0, 1], "tickformat": ".0%"}, bgcolor="rgba(0,0,0,0)")
    return finish(figure, 460, dark=dark)
