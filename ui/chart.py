"""What a chart is: a question, figures that answer it, how to read them, and the same numbers as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import plotly.graph_objects as go

from merging.analysis.inspection import Inspection

from .chart_words import READINGS, TITLES

PANELS = 5
"""Maps beside each other in one figure."""
MOST_LINES = 15
"""Lines in one figure. Pairs beyond that are in the table only."""


@dataclass(frozen=True, slots=True)
class Table:
    """The numbers of a chart. Cells are texts, numbers, or None for what does not exist."""

    columns: list[str]
    rows: list[list[Any]]


@dataclass(slots=True)
class Chart:
    """One question. Of the variants (another matrix, pair or measure) the first is the one to print."""

    key: str
    title: str
    reading: str
    """What am I looking at, and what does it mean?"""
    basis: str
    """Exact, sampled or estimated, and from what."""
    table: Table
    variants: list[tuple[str, go.Figure]] = field(default_factory=list)


def chart(key: str, result: Inspection, part: str, table: Table, **values: object) -> Chart:
    """A chart with its texts, which ``values`` fill in, and the basis of the part that its numbers come from."""
    facts = result.parts[part]
    title, reading = TITLES[key].format(**values), READINGS[key].format(**values)
    return Chart(key, title, reading, f"{facts.basis}: {facts.how}", table)


def pairs_of(names: Sequence[str]) -> list[str]:
    """Titles of all pairs, in the order (0,1), (0,2), …, (1,2), …"""
    return [f"{a} and {b}" for i, a in enumerate(names) for b in names[i + 1 :]]


def grouped(names: Sequence[str], title: str) -> Iterable[tuple[str, list[str]]]:
    """(title, names) for groups of panels that fit beside each other."""
    for start in range(0, len(names), PANELS):
        group = list(names[start : start + PANELS])
        yield (title if len(names) <= PANELS else f"{title}: {', '.join(group)}"), group


def plain(values: Iterable[float]) -> list[float | None]:
    """Numbers of a row of a table; None for NaN."""
    return [float(v) if np.isfinite(v) else None for v in values]
