"""Numbers beside a chart: a table that opens on demand, sorts by a click on its head, and can be saved as CSV.

The cells travel as JSON and become text in the browser (``assets/table.js``), so no name can become markup.
"""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import gradio as gr

from ..chart import Table
from ..context import ROOT
from .own import no_stub_file

MOST_BYTES = 400_000
"""Of a table in the page; rows beyond that are left out and said to be."""
HTML = (
    '<details class="numbers"><summary></summary><div class="numbers-tools"><span class="quiet"></span>'
    '<button type="button" data-csv>CSV</button></div><div class="numbers-scroll" tabindex="0" role="region"></div>'
    "</details>"
)
log = logging.getLogger("amalgam.ui")


with no_stub_file():

    class DataTable(gr.HTML):
        """Its value is a Table of ui/chart.py, or None. ``open``: shown without being asked for."""

        def __init__(
            self, value: Table | None = None, *, label: str = "The numbers", open: bool = False, **others: Any
        ) -> None:
            super().__init__(
                value=value,
                label=label,
                html_template=HTML.replace("<details ", "<details open ") if open else HTML,
                js_on_load=(ROOT / "assets" / "table.js").read_text("utf-8"),
                apply_default_css=False,
                padding=False,
                elem_classes=["data-table"],
                **others,
            )

        def postprocess(self, value: Table | str | None) -> str | None:
            return value if value is None or isinstance(value, str) else table_json(value)

        def get_block_name(self) -> str:
            return "html"

        def api_info(self) -> dict[str, Any]:
            return {"type": "string"}


def table_json(table: Table) -> str:
    """The table as JSON; as many rows as fit into ``MOST_BYTES``."""
    rows: list[str] = []
    size = 0
    for row in table.rows:
        text = json.dumps([_plain(value) for value in row], ensure_ascii=False, allow_nan=False)
        size += len(text)
        if size > MOST_BYTES:
            log.warning("a table of %d rows is cut to %d", len(table.rows), len(rows))
            break
        rows.append(text)
    columns = json.dumps(table.columns, ensure_ascii=False)
    return f'{{"columns":{columns},"total":{len(table.rows)},"rows":[{",".join(rows)}]}}'


def _plain(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value if isinstance(value, int | float) else str(value)
