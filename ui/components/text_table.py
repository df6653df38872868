"""A small table as HTML, for texts side by side. Every cell is escaped, unless it was made by ``Markup``.

(For numbers beside a chart there is ``table.DataTable``, which sorts and saves.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .cards import text


class Markup(str):
    """HTML of our own making, in which everything from outside is escaped."""


def table(
    columns: Sequence[Any],
    rows: Sequence[Sequence[Any]],
    caption: str = "",
    *,
    numbers: Sequence[int] = (),
    wide: bool = False,
) -> str:
    """``numbers``: columns that are set to the right. ``wide``: cells hold texts of several lines."""

    def cell(value: Any, tag: str, place: int, scope: str = "") -> str:
        shown = value if isinstance(value, Markup) else text("–" if value is None else value)
        kind = ' class="number"' if place in numbers else ""
        return f"<{tag}{scope}{kind}>{shown}</{tag}>"

    head = "".join(cell(column, "th", place, ' scope="col"') for place, column in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(
            cell(value, "th" if i == 0 else "td", i, ' scope="row"' if i == 0 else "") for i, value in enumerate(row)
        ) + "</tr>"
        for row in rows
    )  # fmt: skip
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    return (
        f'<div class="text-table{" wide" if wide else ""}" tabindex="0" role="region" '
        f'aria-label="{text(caption or "Table")}"><table>{title}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
