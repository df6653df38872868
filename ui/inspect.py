"""``python app.py inspect``: what the experts changed, in a terminal, as JSON, and as a report.

On the screen stands what a newcomer can use: findings first, then how alike the experts are, how large and where their
changes, how they conflict, how many directions they use, and what to do next. All numbers are in ``--json`` and
``--html``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from merging.analysis.finding import Finding
from merging.analysis.inspection import Inspection
from merging.analysis.inspection_run import PARTS, Step, inspect
from merging.analysis.models import MERGED
from merging.errors import AmalgamError, RecipeError
from merging.evaluation.records import check_place, write_whole

from .console import stderr, stdout

WORDS = {"problem": ("✗", "problem", "red"), "warning": ("!", "warning", "yellow"), "note": ("i", "note", "cyan"),
         "ok": ("✓", "fine", "green")}  # fmt: skip
PLAIN = {"✗": "x", "✓": "+", "→": "->", "‖": "||", "τ": "tau", "₀": "0", "₁": "1", "σ": "sigma", "…": "..."}
"""Signs for terminals that know no Unicode."""
BARS = "▁▂▃▄▅▆▇█"
MOST_EXPERTS, MOST_PAIRS, MOST_FINDINGS = 8, 6, 7
"""Rows that are printed; the rest is in the JSON."""


def run_inspect(options: argparse.Namespace) -> int:
    """Run the command: inspect, print, write the files that were asked for."""
    from .terminal import TERMINATED, _download_bar, _stopping, say

    for name in (options.json, options.html):
        if name and name != "-":
            check_place(name)
    parts = [part.strip() for part in options.parts.split(",") if part.strip()] if options.parts else PARTS
    terminated = threading.Event()
    with _stopping(terminated) as stop, _download_bar() as download, _bar() as show:
        try:
            result = inspect(
                options.base,
                options.experts,
                options.merged,
                bases=options.also_base or (),
                parts=parts,
                density=options.density,
                spectra=options.spectra,
                rank=options.rank,
                coefficients=_numbers(options.coefficients),
                texts=options.texts or (),
                cache=not options.no_cache,
                offline=options.offline,
                threads=options.threads,
                progress=show,
                download=download,
                stop=stop,
            )
        except AmalgamError as error:
            if error.code == "E_CANCELLED" and terminated.is_set():
                say(f"error: {error}", sys.stderr)
                return TERMINATED
            raise
    if options.json:
        text = json.dumps(result.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        if options.json == "-":
            say(text)
        else:
            write_whole(Path(options.json), f"{text}\n".encode())
    if options.html:
        from .report import write_report

        write_report(result, Path(options.html))
    if options.json != "-":
        print_inspection(result, options.json, options.html)
    return 0


def _numbers(text: str | None) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")] if text else []
        if not all(map(math.isfinite, numbers)):
            raise ValueError
        return numbers
    except ValueError:
        what = f"--coefficients {text[:60] if text else ''!r} are not numbers."
        raise RecipeError("E_RECIPE_FIELD", what, "", "Give one per expert, such as 0.3,0.5.") from None


# -- on the screen ------------------------------------------------------------------------------------------------


def print_inspection(result: Inspection, json_file: str | None = None, html_file: str | None = None) -> None:
    """At most about 60 lines."""
    screen = _Screen()
    merged = f" and the merge {result.reference['merged']}" if result.reference["merged"] is not None else ""
    experts = f"{len(result.names)} expert{'s' * (len(result.names) != 1)}"
    screen.line(f"[bold]{experts}{_plain(merged)} against {_plain(result.reference['base'])}[/]: "
                f"{result.parameters:,} weights in {len(result.places):,} tensors")  # fmt: skip
    for note in result.notes[:3]:
        screen.line(f"note: {_plain(note)}")
    print_findings(screen, result.findings)
    if result.changes is not None:
        _print_sizes(screen, result)
        _print_cosines(screen, result)
    if result.trimmed is not None:
        _print_conflicts(screen, result)
    if result.spectra:
        _print_ranks(screen, result)
    _print_texts(screen, result)
    _print_next(screen, result, json_file, html_file)


class _Screen:
    """The console, with signs that it can show."""

    def __init__(self) -> None:
        self.console = stdout()
        self.unicode = (self.console.encoding or "").lower().startswith("utf")

    def line(self, text: str, indent: int = 0, hang: int = 0) -> None:
        """Print marked up text; what does not fit goes on in the next line, ``hang`` further in."""
        if not text:
            self.console.print()
            return
        words = Text.from_markup(self.shown(text))
        width = max(20, self.console.width - indent)
        first, *rest = words.wrap(self.console, width) or [words]
        if rest and hang:
            rest = Text(" ").join(rest).wrap(self.console, width - hang)  # type: ignore[assignment]
        self.console.print(Padding(first, (0, 0, 0, indent), expand=False), highlight=False)
        for one in rest:
            self.console.print(Padding(one, (0, 0, 0, indent + hang), expand=False), highlight=False)

    def table(self, title: str, table: Table) -> None:
        self.line("")
        self.line(f"[bold]{title}[/]")
        for column in table.columns:
            column.header = self.shown(str(column.header))
        self.console.print(table)

    def shown(self, text: str) -> str:
        if not self.unicode:
            for sign, plain in PLAIN.items():
                text = text.replace(sign, plain)
        return text

    def bars(self, values: Sequence[float], top: float) -> str:
        """A row of bars, one per value, the highest at ``top``; digits where bars cannot be shown."""
        signs = BARS if self.unicode else "01234567"
        return "".join(signs[round(min(1.0, v / top) * 7) if top > 0 and np.isfinite(v) else 0] for v in values)


def print_findings(screen: _Screen, findings: Sequence[Finding]) -> None:
    if not findings:
        return
    worth = [f for f in findings if f.severity != "ok"]
    screen.line("")
    screen.line("[bold]Findings[/]")
    for one in worth[:MOST_FINDINGS]:
        sign, word, colour = WORDS[one.severity]
        screen.line(f" [{colour}]{sign} {word:<8}[/] [bold]{_plain(one.title)}[/]", hang=12)
        screen.line(_plain(one.evidence), indent=12)
        if one.remedy:
            screen.line(f"→ {_plain(one.remedy)}", indent=12, hang=2)
    if len(worth) > MOST_FINDINGS:
        screen.line(f"   and {len(worth) - MOST_FINDINGS} more (see --json or --html)")
    fine = [f.code.replace("_", " ") for f in findings if f.severity == "ok"]
    if fine:
        sign, word, colour = WORDS["ok"]
        text = f"{len(fine)} checks found nothing wrong: {', '.join(fine)}"
        screen.line(f" [{colour}]{sign} {word:<8}[/] {text}", hang=12)


def _print_sizes(screen: _Screen, result: Inspection) -> None:
    changes = result.changes
    assert changes is not None
    whole = changes.total()
    blocks = [block for block in changes.blocks if block is not None]
    shown = _spread(blocks, 40)
    by_block = {block: changes.total(changes.select(block)) for block in shown}
    sizes = {b: [n / t.base_norm if t.base_norm else 0.0 for n in t.norm] for b, t in by_block.items()}
    top = max((max(values) for values in sizes.values()), default=0.0)
    table = _table()
    depth = f"by layer, {blocks[0]} to {blocks[-1]} (full bar: {top:.2%})" if blocks else ""
    for column in ("expert", "‖τ‖/‖W₀‖", "untouched", depth):
        table.add_column(column, justify="right" if column in ("‖τ‖/‖W₀‖", "untouched") else "left")
    for k, name in enumerate(result.names[:MOST_EXPERTS]):
        relative = whole.norm[k] / whole.base_norm if whole.base_norm else 0.0
        table.add_row(_name(name), f"{relative:.2%}", f"{whole.unchanged[k]:.1%}",
                      screen.bars([sizes[b][k] for b in shown], top))  # fmt: skip
    screen.table(f"Size of the changes ({result.parts['changes'].basis})", table)
    _more(screen, len(result.names), MOST_EXPERTS, "experts")
    if whole.merged is not None:
        kept = ", ".join(
            f"{_plain(n)} {p:.2f}" for n, p in list(zip(result.names, whole.merged.projection, strict=True))[:8]
        )
        screen.line(f"The merge holds, along each expert's own change (1 = all): {kept}")


def _print_cosines(screen: _Screen, result: Inspection) -> None:
    assert result.changes is not None
    if len(result.names) < 2:
        return
    matrix, names = result.changes.cosine(), result.names[:MOST_EXPERTS]
    table = _table()
    table.add_column("")
    for name in names:
        table.add_column(_name(name, 12), justify="right")
    for a, name in enumerate(names):
        table.add_row(_name(name), *(f"{matrix[a, b]:.2f}" if b != a else "1" for b in range(len(names))))
    screen.table("Cosine of the task vectors: 1 the same change, 0 unrelated, -1 opposite (exact)", table)


def _print_conflicts(screen: _Screen, result: Inspection) -> None:
    trimmed, names = result.trimmed, result.names
    assert trimmed is not None
    if len(names) < 2:
        return
    shares = sorted(zip(trimmed.pairs, trimmed.shares(), strict=True), key=lambda one: -one[1].conflict_of_both)
    table = _table()
    for column, side in (("pair", "left"), ("both keep", "right"), ("of that, opposite signs", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for (a, b), share in shares[:MOST_PAIRS]:
        table.add_row(
            f"{_name(names[a])}, {_name(names[b])}", f"{share.overlap_weight:.0%}", f"{share.conflict_of_both:.0%}"
        )
    screen.table(f"Signs, when each keeps its largest {trimmed.density:.0%} (exact, weighted by size)", table)
    _more(screen, len(shares), MOST_PAIRS, "pairs with less")


def _print_ranks(screen: _Screen, result: Inspection) -> None:
    assert result.spectra is not None
    table = _table()
    columns = ("", "of", "effective rank of values", "of energy", "stable rank", "90 % of the energy")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name in [*result.names[:MOST_EXPERTS], MERGED]:
        own = [(min(s.shape), s.measures()) for s in result.spectra if s.of == name]
        if not own:
            continue
        values = [
            median(n for n, _ in own),
            *(median(getattr(m, f) for _, m in own) for f in ("effective_rank_of_values", "effective_rank_of_energy")),
            median(m.stable_rank for _, m in own),
            median(m.k90 for _, m in own),
        ]
        table.add_row(_name(name), *(f"{value:.1f}" if i == 3 else f"{value:.0f}" for i, value in enumerate(values)))
    basis = result.parts["spectra"].basis
    screen.table(f"Directions that the changes use, median of all matrices ({basis})", table)
    found = result.subspaces
    pairs = [p for t in found.tensors for p in t.pairs if p.b != MERGED and p.rank] if found else []
    if found and pairs:
        mean, chance = np.mean([p.overlap_left for p in pairs]), np.mean([p.expected_left for p in pairs])
        text = (
            f"Their {found.rank} strongest output directions coincide to {mean:.0%} on average (chance: {chance:.0%})."
        )
        screen.line(text)


def _print_texts(screen: _Screen, result: Inspection) -> None:
    if result.texts is None:
        return
    for expert in result.texts["experts"]:
        own = expert["sensitivity"] or expert["entropy"]
        layers = [layer for layer in own["layers"] if layer["block"] is not None] if own else []
        if layers:
            values = [layer["coefficient"] or 0.0 for layer in _spread(layers, 40)]
            bars = screen.bars(values, max(values))
            screen.line(
                f"Sensitivity by layer on {expert['texts']['samples']} texts, {_name(expert['expert'])}: {bars}"
            )
    for problem in result.texts["problems"]:
        screen.line(f"[yellow]! {_plain(problem['expert'])}: {_plain(problem['what'])} \\[{problem['code']}][/]")


def _print_next(screen: _Screen, result: Inspection, json_file: str | None, html_file: str | None) -> None:
    written = [name for name in (json_file, html_file) if name]
    if written:
        screen.line("")
        screen.line(f"Wrote {_plain(' and '.join(written))}.")
    screen.line("")
    screen.line("[bold]Next[/]")
    if any(f.severity == "problem" for f in result.findings):
        screen.line("  Solve the problems above first: a merge of these models would not be worth its time.")
    if not html_file:
        screen.line("  --html report.html     everything with charts, in one file that works offline")
    screen.line("  app.py plan RECIPE     what a merge would do and cost")
    screen.line(
        "  app.py compare         which merge is better, on tasks; weights alone cannot tell, nor whether the base"
    )
    screen.line("                         is at chance on a task")


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 1))


def _more(screen: _Screen, count: int, shown: int, what: str) -> None:
    if count > shown:
        screen.line(f"  and {count - shown} more {what} (see --json or --html)")


def _spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the values, evenly chosen, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[i * (len(values) - 1) // (most - 1)] for i in range(most)]


def _name(name: str, most: int = 24) -> str:
    return _plain(name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most - most // 2) :]}")


def _plain(text: str) -> str:
    from .terminal import _plain as plain

    return plain(text)


# -- progress -----------------------------------------------------------------------------------------------------


@contextmanager
def _bar() -> Iterator[Callable[[Step], None]]:
    """One bar for all parts, with the time left; on something that is no terminal a line every ten seconds."""
    if not sys.stderr.isatty():
        yield _Lines().show
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[left]}"),
    )
    with Progress(*columns, console=stderr(), transient=True) as bar:
        task = bar.add_task("looking", total=1.0, left="")

        def show(step: Step) -> None:
            text = f"{step.part} ({step.number} of {step.of})"
            bar.update(task, completed=step.share, description=text, left=_left(step))

        yield show


class _Lines:
    """Progress for logs."""

    def __init__(self, every: float = 10.0) -> None:
        self.every, self.last = every, time.monotonic()

    def show(self, step: Step) -> None:
        if time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            print(
                f"{step.share:4.0%}  {step.part} ({step.number} of {step.of})  {_left(step)}",
                file=sys.stderr,
                flush=True,
            )


def _left(step: Step) -> str:
    if step.seconds_left is None:
        return ""
    minutes, seconds = divmod(round(step.seconds_left), 60)
    return f"about {minutes}:{seconds:02} left" if minutes else f"about {seconds} s left"
