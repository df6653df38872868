"""One HTML file that holds an inspection: findings, charts, tables, and what everything was made from.

It opens in any browser, now and in ten years: Plotly's script is inlined once, and a content security policy forbids
the page to ask any host for anything. Charts follow the reader's light or dark setting, and turn light for the printer.
Every chart has its numbers as a table, which is all that is left without JavaScript.

Texts from files and users pass through ``html.escape``; figures are embedded as JSON in which no ``<`` is left, so that
nothing can end the script that holds them.
"""

from __future__ import annotations

import html
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from merging.analysis.finding import Finding
from merging.analysis.inspection import Inspection, PartFacts
from merging.evaluation.records import write_whole

from .chart import Chart, Table
from .charts import charts_of
from .plot_style import DARK, LIGHT
from .report_page import LIMITS, PAGE, SCRIPT, STYLE

SIGNS = {"problem": "✗", "warning": "!", "note": "i", "ok": "✓"}
WORDS = {"problem": "Problem", "warning": "Warning", "note": "Note", "ok": "Fine"}
MOST_ROWS = 3000
"""Rows of a table in the page; what is beyond them is in the JSON."""


def write_report(result: Inspection, path: Path) -> None:
    """Write the page to ``path``, replacing what is there. OutputError E_OUTPUT_WRITE, E_NO_SPACE."""
    write_whole(path, report(result).encode())


def report(result: Inspection) -> str:
    """The page as text."""
    charts = charts_of(result)
    figures = {f"{c.key}-{i}": _figure(figure) for c in charts for i, (_, figure) in enumerate(c.variants)}
    sections = [_models(result), _findings(result.findings), *map(_chart, charts)]
    sections += [_left_out(result), LIMITS, _made(result)]
    title = f"What {_and(result.names)} changed"
    return PAGE.format(
        title=_text(title),
        style=STYLE,
        heading=_text(title),
        subtitle=_text(_subtitle(result)),
        contents=_contents(charts),
        sections="\n".join(filter(None, sections)),
        figures=_json(figures),
        templates=_json({"light": _plain(LIGHT.to_plotly_json()), "dark": _plain(DARK.to_plotly_json())}),
        plotly=_plotly(),
        script=SCRIPT,
    )


def _plotly() -> str:
    """plotly.js as the plotly package ships it, safe inside a script element."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("</script", "<\\/script")


def _figure(figure: go.Figure) -> dict[str, Any]:
    """Data and layout; the look is added by the page."""
    parts = json.loads(figure.to_json())
    parts["layout"].pop("template", None)
    return {"data": parts["data"], "layout": parts["layout"]}


def _json(value: Any) -> str:
    """JSON for a script element: no character with a meaning for HTML is left."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plain(value: Any) -> Any:
    """Lists for tuples, so that JSON can hold it."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _text(text: object) -> str:
    """Escaped, and without characters that cannot be seen or that turn the direction of writing."""
    return html.escape("".join(c if c.isprintable() or c in "\n " else "\ufffd" for c in str(text)))


def _and(names: Sequence[str]) -> str:
    if len(names) > 4:
        return f"{len(names)} experts"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _subtitle(result: Inspection) -> str:
    whose = "and what a merge kept of it, " if result.reference["merged"] is not None else ""
    size = f"{result.parameters:,} weights in {len(result.places):,} tensors"
    return f"{whose}against the base {result.reference['base']}: {size}"


# -- sections -----------------------------------------------------------------------------------------------------


def _contents(charts: Sequence[Chart]) -> str:
    links = [("models", "What was compared"), ("findings", "Findings"), *((c.key, c.title) for c in charts)]
    links += [("limits", "How to read this, and its limits"), ("made", "How it was made")]
    return "".join(f'<li><a href="#{_text(key)}">{_text(title)}</a></li>' for key, title in links)


def _models(result: Inspection) -> str:
    rows = [
        [who if who in ("base", "merged") else f"expert {who}", m["reference"], m["kind"], m["tensors"],
         m["bytes"] / 1e6, m["fingerprint"][:16]]
        for who, m in result.models.items()
    ]  # fmt: skip
    table = _table(Table(["role", "reference", "opened as", "tensors", "MB", "fingerprint"], rows))
    text = "A fingerprint is the start of a SHA-256 over names, sizes, headers, times and samples of a model's files."
    return (
        f'<section id="models"><h2>What was compared</h2><div class="scroll">{table}</div>'
        f'<p class="small">{text}</p></section>'
    )


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    worth = [f for f in findings if f.severity != "ok"]
    fine = [f for f in findings if f.severity == "ok"]
    items = "".join(map(_finding, worth)) or "<p>Nothing stands out.</p>"
    more = ""
    if fine:
        count = f"{len(fine)} checks found nothing wrong"
        more = f"<details{'' if worth else ' open'}><summary>{count}</summary>{''.join(map(_finding, fine))}</details>"
    return f'<section id="findings"><h2>Findings</h2>{items}{more}</section>'


def _finding(one: Finding) -> str:
    remedy = f'<p class="remedy">{_code(one.remedy)}</p>' if one.remedy else ""
    return (
        f'<article class="finding {one.severity}"><p class="badge">'
        f'<span aria-hidden="true">{SIGNS[one.severity]}</span> '
        f"{WORDS[one.severity]}</p><div><h3>{_text(one.title)}</h3><p>{_code(one.evidence)} "
        f'<span class="basis">{_text(one.basis)}</span></p>{remedy}</div></article>'
    )


def _code(text: str) -> str:
    """Escaped; what stands between backticks as code."""
    parts = _text(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _chart(chart: Chart) -> str:
    options = "".join(f'<option value="{i}">{_text(label)}</option>' for i, (label, _) in enumerate(chart.variants))
    choose = ""
    if len(chart.variants) > 1:
        choose = f'<label class="choose">Show <select data-chart="{chart.key}">{options}</select></label>'
    plot = ""
    if chart.variants:
        height = chart.variants[0][1].layout.height
        plot = (
            f'<div class="scroll"><div class="plot" id="plot-{chart.key}" data-figure="{chart.key}-0" role="img" '
            f'aria-label="{_text(chart.title)} The same numbers are in the table below." style="height:{height}px">'
            "</div></div>"
        )
    rows = f"{len(chart.table.rows):,} row{'s' * (len(chart.table.rows) != 1)}"
    return (
        f'<section id="{chart.key}"><h2>{_text(chart.title)}</h2><p class="reading">{_text(chart.reading)}</p>'
        f'{choose}{plot}<p class="small">{_text(chart.basis)}</p><details><summary>The numbers ({rows})</summary>'
        f'<div class="scroll">{_table(chart.table)}</div></details></section>'
    )


def _table(table: Table) -> str:
    numeric = [any(isinstance(row[i], int | float) for row in table.rows) for i in range(len(table.columns))]
    marks = [' class="number"' if one else "" for one in numeric]
    heads = zip(marks, table.columns, strict=True)
    head = "".join(f'<th scope="col"{mark}>{_text(name)}</th>' for mark, name in heads)
    rows = []
    for row in table.rows[:MOST_ROWS]:
        cells = zip(marks, row, strict=True)
        rows.append(f"<tr>{''.join(f'<td{mark}>{_cell(value)}</td>' for mark, value in cells)}</tr>")
    if len(table.rows) > MOST_ROWS:
        more = len(table.rows) - MOST_ROWS
        rows.append(f'<tr><td colspan="{len(table.columns)}">… and {more:,} more rows, which --json holds</td></tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else _text(value)


def _left_out(result: Inspection) -> str:
    if not (result.skipped or result.notes):
        return ""
    items = "".join(f"<li>{_text(note)}</li>" for note in result.notes)
    table = _table(Table(["tensor", "why it is not compared"], [list(row) for row in result.skipped]))
    more = f"<details><summary>{len(result.skipped):,} tensors were not compared</summary>{table}</details>"
    more = more if result.skipped else ""
    return f'<section id="left-out"><h2>What was left out or bent to fit</h2><ul>{items}</ul>{more}</section>'


def _made(result: Inspection) -> str:
    parts = [[name, p.basis, p.how, _time(p)] for name, p in result.parts.items()]
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    table = _table(Table(["part", "numbers are", "how", "time"], parts))
    return (
        f'<section id="made"><h2>How it was made</h2><p>{_text(result.made)}; {_text(versions)}.</p>'
        f"<pre><code>{_text(command(result))}</code></pre>"
        f'<div class="scroll">{table}</div></section>'
    )


def _time(part: PartFacts) -> str:
    if part.seconds < 1e-3:
        return "with the part before"
    return f"{part.seconds:.1f} s{', kept' if part.cached else ''}"


def command(result: Inspection) -> str:
    """The command that makes this inspection again."""
    options, reference = result.options, result.reference
    words = ["python", "app.py", "inspect", "--base", reference["base"], *reference["experts"]]
    if reference["merged"] is not None:
        words += ["--merged", reference["merged"]]
    words += [word for base in options["bases"] for word in ("--also-base", base)]
    words += ["--parts", ",".join(options["parts"]), "--density", f"{options['density']:g}"]
    words += ["--spectra", options["spectra"], "--rank", str(options["rank"])]
    words += [word for text in options["texts"] for word in ("--texts", text)]
    if options["coefficients"]:
        words += ["--coefficients", ",".join(f"{c:g}" for c in options["coefficients"])]
    return shlex.join(words)
