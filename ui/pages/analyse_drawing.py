"""What the parts of the map's view show: values for their components, from an inspection and what is chosen."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from merging.analysis.histogram import histogram_of
from merging.analysis.inspection import Inspection
from merging.errors import AmalgamError

from .. import plots_tensor
from ..components import cards
from .analyse_cells import cell_of, extreme, map_table, metrics_of, tensors_at
from .analyse_detail import detail_of
from .analyse_state import Answers, filters_for, matches

MOST_TENSORS = 2000
"""In the list of tensors; of larger models those of the chosen layer, and what lies outside of layers."""


def quiet(words: str) -> str:
    return f'<p class="quiet">{cards.text(words)}</p>' if words else ""


def choosers(
    answers: Answers, token: str, asked: str, key: str, whose: str, tensor: str
) -> tuple[tuple[Any, Any, Any], str, str, str]:
    """The choices of metric, whose and tensor, and what is chosen: what was, if there is such a thing; else the first,
    and the tensor where it is largest."""
    found = answers.get(token, asked)
    if found is None:
        return (gr.skip(), gr.skip(), gr.skip()), key, whose, tensor
    metrics = metrics_of(found)
    keys = [m.key for m in metrics]
    key = key if key in keys else (keys[0] if keys else "")
    drawn = answers.map(token, asked, key)
    choices = list(drawn.grids) if drawn else []
    whose = whose if whose in choices else (choices[0] if choices else "")
    if tensor not in found.places:
        cell = extreme(drawn, whose) if drawn else None
        tensor = (tensors_at(found, *cell) if cell else list(found.places))[0]
    values = (
        gr.Dropdown(choices=[(m.title, m.key) for m in metrics], value=key or None),
        gr.Dropdown(choices=choices, value=whose or None),
        gr.Dropdown(choices=_tensors(found, tensor), value=tensor),
    )
    return values, key, whose, tensor


def _tensors(found: Inspection, tensor: str) -> list[tuple[str, str]]:
    """(short name, name)"""
    names = list(found.places)
    if len(names) > MOST_TENSORS:
        near = (None, found.places[tensor][0])
        names = [name for name in names if found.places[name][0] in near][:MOST_TENSORS]
    return [(name.removeprefix("model.").removesuffix(".weight"), name) for name in names]


def map_parts(answers: Answers, token: str, asked: str, key: str, whose: str, tensor: str) -> tuple[Any, Any, Any]:
    """Words, figure and table of the map."""
    found, drawn = answers.get(token, asked), answers.map(token, asked, key)
    if found is None or drawn is None or whose not in drawn.grids:
        return quiet("Nothing of this is known yet."), None, None
    one, grid = drawn.metric, drawn.grids[whose]
    figure = None
    if grid.layers:
        selected = cell_of(found, tensor)
        figure = plots_tensor.cell_map(
            grid, whose, form=one.form, limits=drawn.limits, scale=one.scale, selected=selected
        )
    facts = found.parts[one.part]
    how = (
        "All of “Whose” share one scale. Click on a cell, or use the arrow keys and Enter; what lies outside of layers "
        "is in the list of tensors."
    )
    words = (
        f'<h3>{cards.text(one.title)}</h3><p class="reading">{cards.text(one.reading)} {how}</p>'
        f'<p class="basis">{cards.text(facts.basis)}: {cards.text(facts.how)}</p>'
    )
    return words, figure, gr.update(value=map_table(drawn), name=one.title)


def detail_parts(found: Inspection, tensor: str) -> tuple[Any, ...]:
    """Head, spectrum, histogram, signs, numbers of experts, numbers of pairs."""
    try:
        histogram: Any = histogram_of(found, tensor)
    except AmalgamError as error:
        histogram = f"There is no histogram: {error.what} {error.fix}"
    one = detail_of(found, tensor, histogram)
    return one.head, one.spectrum, one.histogram, one.signs, one.numbers, one.pairs


def filter_choices(found: Inspection, asked: str, tensor: str) -> tuple[Any, Any]:
    """Where a condition may hold, and for whom."""
    places = [(f"{words} ({matches(found, value)} tensors)", value) for words, value in filters_for(found, tensor)]
    experts = [("all experts", ""), *((name, name) for name in json.loads(asked)["labels"])]
    return gr.Dropdown(choices=places, value=tensor), gr.Dropdown(choices=experts)
