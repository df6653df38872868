"""Two to four runs beside each other: what their recipes and coefficients differ in, and whether their scores do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from merging.checkpoints.checkpoint import open_checkpoint
from merging.checkpoints.layout import block_number
from merging.errors import AmalgamError, TaskError
from merging.evaluation.comparison import PairedTest
from merging.evaluation.overview import Overview
from merging.evaluation.records import Record
from merging.evaluation.statistics import percentile_interval
from merging.recipe import Recipe

from .. import plots_evaluation as plots
from ..chart import Chart, Table
from ..components.layer_values import lines_of as layer_lines
from ..components.layer_values import parameters_of
from ..components.text_table import Markup, table
from ..draft import from_recipe
from ..plot_style import depth_axis, finish, label
from ..scored import read_scored
from . import evaluate_results as results
from .runs_view import Line, recipe_data

MOST_CELLS = 400


def names_of(lines: Sequence[Line]) -> list[str]:
    """Names that tell the runs apart."""
    names: list[str] = []
    for line in lines:
        name, number = line.name[:48], 2
        while name in names:
            name, number = f"{line.name[:44]} ({number})", number + 1
        names.append(name)
    return names


# -- recipes --------------------------------------------------------------------------------------------


def settings_of(line: Line) -> dict[str, Any]:
    """All settings as "experts.sort.weight" -> value. Of merges the recipe, else the arguments."""
    data = recipe_data(line.arguments) or line.arguments
    flat: dict[str, Any] = {}

    def add(place: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, part in value.items():
                add(f"{place}.{key}" if place else str(key), part)
        elif place == "experts" and isinstance(value, list):
            for number, one in enumerate(value):
                name = one.get("name") if isinstance(one, Mapping) else None
                add(f"experts.{name or number + 1}", {"model": one} if isinstance(one, str) else one)
        else:
            flat[place] = value

    add("", data)
    return flat


def settings_diff(lines: Sequence[Line]) -> str:
    """A table of the settings that are not the same in all runs."""
    settings = [settings_of(line) for line in lines]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    changed = [key for key in keys if len({json.dumps(one.get(key), sort_keys=True) for one in settings}) > 1]
    if not changed:
        return '<p class="reading">Their settings are the same.</p>'
    rows = [[key, *(_shown(one, key) for one in settings)] for key in changed]
    same = len(keys) - len(changed)
    caption = f"{len(changed)} of {len(keys)} settings differ; the other {same} are the same" if same else "All differ"
    return table(["Setting", *names_of(lines)], rows, caption)


def _shown(settings: Mapping[str, Any], key: str) -> Any:
    if key not in settings:
        return Markup('<span class="quiet">not set</span>')
    value = settings[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# -- coefficients ---------------------------------------------------------------------------------------


def coefficients_chart(lines: Sequence[Line]) -> Chart | str:
    """How the experts' numbers differ from those of the first run, layer by layer; or why that cannot be shown."""
    recipes = [recipe_data(line.arguments) for line in lines]
    if not all(recipes):
        return "Coefficients are compared between merges only."
    tables = []
    for line, data in zip(lines, recipes, strict=True):
        tensors = _first_tensors(line)
        if not tensors:
            return f"The model of “{line.name}” is not here any more: its number of layers is not known."
        tables.append(_values(data, tensors))
    shared = [name for name in tables[0] if all(name in one for one in tables)]
    if not shared:
        return "Their methods have no numbers per expert in common."
    chart = Chart(
        "coefficients",
        "How the coefficients differ",
        "Each cell is the number of one expert in one layer, minus that of the first run. Orange is more, violet less, "
        "white the same. Only experts and parameters that both recipes have are shown.",
        f"The first run is “{lines[0].name}”. Values as the recipes say them, before a method normalises them.",
        Table(["run", "parameter", "expert", "layer", "first run", "this run", "difference"], []),
    )
    names = names_of(lines)
    for name in shared:
        for run, found in list(zip(names, tables, strict=True))[1:]:
            first, second = tables[0][name], found[name]
            experts = [expert for expert in first if expert in second]
            depth = min((len(first[e]) for e in experts), default=0)
            rows: list[list[Any]] = [[name, expert, layer, first[expert][layer], second[expert][layer]]
                    for expert in experts for layer in range(depth)]  # fmt: skip
            known = [[run, *row, _minus(row[4], row[3])] for row in rows]
            if any(row[-1] for row in known):
                chart.table.rows.extend(known)
                chart.variants.append((f"{run}: {name}", _heat(name, experts, depth, known)))
    return chart if chart.variants else "Their coefficients are the same in every layer."


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _values(data: Mapping[str, Any], tensors: Sequence[str]) -> dict[str, dict[str, list[float | None]]]:
    """Parameter -> expert -> number per layer."""
    draft = from_recipe(Recipe.parse(data))
    found = {}
    for name in parameters_of(draft["recipe"]["method"]):
        found[name] = {one.label or "all experts": one.values for one in layer_lines(draft, name, tensors)}
    return found


def _first_tensors(line: Line) -> list[str]:
    """The name of one matrix per layer, from the headers of the merged model; [] if it is gone."""
    try:
        with open_checkpoint(str((line.state.result or {}).get("model", ""))) as checkpoint:
            shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    except (AmalgamError, OSError, ValueError):
        return []
    blocks: dict[int, str] = {}
    for name in sorted(shapes, key=lambda name: (len(shapes[name]) < 2, name)):
        number = block_number(name)
        if number is not None:
            blocks.setdefault(number, name)
    return [blocks[number] for number in sorted(blocks)]


def _heat(name: str, experts: Sequence[str], depth: int, rows: Sequence[Sequence[Any]]) -> go.Figure:
    cells = {(row[2], row[3]): row[-1] for row in rows}
    z = [[cells.get((expert, layer)) for expert in experts] for layer in range(depth)]
    top = max((abs(v) for row in z for v in row if v is not None), default=0) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=z, x=[label(expert.rstrip("/").rpartition("/")[2] or expert) for expert in experts],
            y=list(range(depth)), colorscale="PuOr_r", zmid=0, zmin=-top, zmax=top,
            texttemplate="%{z:+.2f}" if len(experts) * depth <= MOST_CELLS else None,
            colorbar={"title": {"text": f"Δ {name}"}},
            hovertemplate="layer %{y}, %{x}: %{z:+.3g}<extra></extra>",
        )
    )  # fmt: skip
    depth_axis(figure, list(range(depth)), title_text="layer")
    figure.update_xaxes(side="top", showgrid=False)
    return finish(figure, max(220, min(560, 100 + 26 * depth)))


# -- scores ---------------------------------------------------------------------------------------------


def common_overview(places: Mapping[str, tuple[Path, str]]) -> tuple[Overview, str]:
    """Scores of models from several runs. ``places``: name -> (folder of the run, the model's name in it).

    Only items that all of them were scored on count; the second value says what that leaves out. TaskError
    E_COMPARE if there are none.
    """
    keys: dict[str, str] = {}
    records: dict[tuple[Any, ...], Record] = {}
    for name, (folder, model) in places.items():
        scored = read_scored(folder)
        if scored is None:
            raise TaskError("E_COMPARE", f"The scores of {name} are gone.")
        keys[name] = scored.models[model]
        for split in scored.splits:
            for record in scored.records(split):
                if record.model == keys[name]:
                    records[record.model, record.task, record.item, record.metric, record.seed] = record
    by_task: dict[str, dict[str, set[str]]] = {}
    for record in records.values():
        by_task.setdefault(record.task, {}).setdefault(record.model, set()).add(record.item)
    wanted = set(keys.values())
    shared = {task: set.intersection(*own.values()) for task, own in by_task.items() if set(own) == wanted}
    shared = {task: items for task, items in shared.items() if items}
    if not shared:
        fix = "Choose them together on the Evaluate page; what was scored before is not scored again."
        raise TaskError("E_COMPARE", "These models were not scored on the same items.", "", fix)
    kept = [record for record in records.values() if record.item in shared.get(record.task, ())]
    left = [task for task in by_task if task not in shared]
    counts = ", ".join(f"{task} {len(items):,}" for task, items in shared.items())
    note = f"On the items that all of them were scored on: {counts}."
    if left:
        note += f" Left out, because not all have it: {', '.join(left)}."
    return Overview(kept, keys), note


def scores_chart(found: Overview, note: str) -> Chart:
    """Every run against the first one, on the same items."""
    tests: list[PairedTest] = found.differences(found.models[0])
    binary = {one.task for one in found.tables if one.metric.kind == "binary"}
    chart = results.differences_chart(tests, binary)
    chart.basis = f"{note} {chart.basis}"
    return chart


def pareto_chart(found: Overview, lines: Mapping[str, Line]) -> Chart | str:
    """Size against mean score; or why that cannot be drawn."""
    if not found.one_unit:
        return "The tasks have scores of different kinds: there is no mean to draw against the size."
    better = found.tables[0].metric.better
    if better < 0:
        return "Of these scores less is better; the front is drawn for scores of which more is better."
    rows, candidates = [], []
    for name, line in lines.items():
        if not line.bytes or name not in found.models:
            continue
        draws = sum(found.draws(one, name) for one in found.tables) / len(found.tables)
        mean = sum(float(one.column(name).mean()) for one in found.tables) / len(found.tables)
        low, high = percentile_interval(draws)
        candidates.append(plots.Candidate(name, line.method or line.kind, line.bytes / 1e6, mean, low, high))
        rows.append([name, line.method, line.bytes, mean, low, high])
    if len(candidates) < 2:
        return "The sizes of fewer than two of these models are known."
    chart = Chart(
        "pareto",
        "Size and score",
        "Left is smaller, up is better. The dotted steps join the models that no other beats in both; grey ones are "
        "beaten. Where the intervals overlap, the order may be luck.",
        "Mean over the tasks with a 95 % bootstrap interval, stratified by task.",
        Table(["run", "method", "bytes", "mean score", "95 % from", "to"], rows),
    )
    percent = found.tables[0].metric.kind == "binary"
    chart.variants = [("", plots.pareto(candidates, "MB on disk", "mean score", percent=percent))]
    return chart


def missing(names: Iterable[str], places: Mapping[str, Any]) -> str:
    """Who was not scored, in words."""
    left = [name for name in names if name not in places]
    return f"Not scored yet: {', '.join(left)}. Choose them on the Evaluate page." if left else ""
