"""``python app.py evaluate``: models × tasks -> a table with intervals, and files of records to compare later."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.errors import Cancelled, TaskError
from merging.evaluation.models import names_of
from merging.evaluation.records import METRICS, Record, check_ending, check_place, write_records, write_whole
from merging.evaluation.statistics import wilson_interval
from merging.evaluation.tasks import check_names, read_task_file, task_files

if TYPE_CHECKING:
    from merging.evaluation.runner import Evaluation, Progress

FEW_ITEMS = 50
"""Below this many items counts are shown, because a share would look more exact than it is."""
CANDIDATE, BASELINE = "candidate", "baseline"


def run_evaluate(options: argparse.Namespace) -> int:
    """Run the command. A model or task that fails is told at the end; what could be scored is shown and written."""
    from merging.evaluation import lm_eval
    from merging.evaluation.runner import evaluate

    from .terminal import TERMINATED, _stopping, print_error, say

    if options.out:
        check_ending(options.out)
    for place in (options.out, options.json):
        if place and place != "-":
            check_place(place)
    files = [file for path in options.tasks for file in task_files(path)]
    for_harness = [file for file in files if lm_eval.is_harness_task(file)]
    if for_harness:
        lm_eval.check_installed()
    tasks = [task for file in files if file not in for_harness for task in read_task_file(file)]
    check_names(tasks)
    models, roles = _models(options)
    terminated = threading.Event()
    with _stopping(terminated) as stop, _bar() as show:
        how: dict[str, Any] = {
            "roles": roles,
            "limit": options.limit or 0,
            "batch_size": options.batch_size or 0,
            "threads": options.threads,
            "device": options.device,
            "progress": show,
            "stop": stop,
        }
        try:
            found = evaluate(models, tasks, cache=None if options.no_cache else "", **how)
            if for_harness:
                _add(found, lm_eval.evaluate_harness(models, for_harness, **how))
        except Cancelled as error:
            if not terminated.is_set():
                raise
            print_error(error)
            return TERMINATED
    rows, notes = results(found), notes_on(found, options.limit)
    text = json.dumps(as_json(found, rows, notes), indent=2, ensure_ascii=False) if options.json else ""
    if options.json == "-":
        say(text)
    else:
        _print(found, rows, notes)
    if options.out and found.records:
        write_records(options.out, found.records, found.models, found.tasks)
        say(f"Wrote {len(found.records):,} records to {options.out}.", sys.stderr if options.json == "-" else None)
    if options.json and options.json != "-":
        write_whole(Path(options.json), f"{text}\n".encode())
    for failure in found.failures:
        print_error(failure.error)
    return found.failures[0].error.exit_code if found.failures else 0


def _models(options: argparse.Namespace) -> tuple[dict[str, Path], dict[str, str]]:
    """Name -> local folder, and name -> role: baselines first."""
    from merging.checkpoints.hub import resolve

    from .terminal import _download_bar

    named: list[tuple[str, str, str]] = []
    for text in options.baseline or ():
        name, equals, path = text.partition("=")
        if not (equals and name.strip() and path):
            raise TaskError("E_TASK", f"--baseline {text[:100]!r} is not of the form NAME=PATH.")
        named.append((name, path, BASELINE))
    shown = [path.rstrip("/") or path for path in options.models]
    if twice := sorted({path for path in shown if shown.count(path) > 1}):
        raise TaskError("E_TASK", f"{twice[0]} is named more than once.", "", "Name each model once.")
    named += [(name, path, CANDIDATE) for name, path in zip(names_of(shown), shown, strict=True)]
    folders: dict[str, Path] = {}
    for name, path, _ in named:
        if name in folders:
            raise TaskError("E_TASK", f"Two models are called {name!r}.", "", "Give the baseline another name.")
        with _download_bar() as show:
            folders[name] = resolve(path, progress=show).path
    return folders, {name: role for name, _, role in named}


def _add(found: Evaluation, other: Evaluation) -> None:
    """Put the results of lm-evaluation-harness beside ours."""
    found.records += other.records
    found.tasks += other.tasks
    found.failures += other.failures
    found.notes += other.notes
    found.fresh += other.fresh
    found.seconds += other.seconds


# -- numbers ------------------------------------------------------------------------------------------------------


def results(found: Evaluation) -> list[dict[str, Any]]:
    """One row per task, metric and model.

    ``score``: mean over the items. ``low``, ``high``: 95 % Wilson interval of a share; None for quantities (their
    intervals need pairs: ``compare``). ``length``: mean length of the responses in tokens, None if none is generated.
    """
    by_cell: dict[tuple[str, str, str], list[Record]] = {}
    for record in found.records:
        by_cell.setdefault((record.task, record.metric, record.model), []).append(record)
    rows = []
    for task in found.tasks:
        for metric in METRICS.values():
            for model in found.models:
                if records := by_cell.get((task.name, metric.name, model.key)):
                    rows.append(_row(task.name, metric.name, model.name, records))
    return rows


def _row(task: str, metric: str, model: str, records: Sequence[Record]) -> dict[str, Any]:
    count, total = len(records), math.fsum(record.score for record in records)
    row: dict[str, Any] = {"task": task, "metric": metric, "unit": METRICS[metric].unit, "model": model}
    row |= {"score": total / count, "items": count, "low": None, "high": None, "right": None}
    if METRICS[metric].kind == "binary":
        right = sum(record.score == 1 for record in records)
        row["right"] = right
        row["low"], row["high"] = wilson_interval(right, count)
    generated = metric == "exact_match"
    row["length"] = math.fsum(record.length for record in records) / count if generated else None
    return row


def notes_on(found: Evaluation, limit: int | None) -> list[str]:
    """What must be said beside the numbers."""
    notes = list(found.notes)
    sizes = {task.name: min(task.items, limit or task.items) for task in found.tasks}
    if cut := [task.name for task in found.tasks if limit and task.items > limit]:
        notes.append(f"Only the first {limit} items of {', '.join(cut)} were used.")
    if small := [name for name, size in sizes.items() if size < FEW_ITEMS]:
        notes.append(
            f"Mini-scale: fewer than {FEW_ITEMS} items in {', '.join(small)}. Counts are shown, and only large "
            "differences mean anything."
        )
    same: dict[str, list[str]] = {}
    for model in found.models:
        same.setdefault(model.key, []).append(model.name)
    notes += [f"{' and '.join(names)} are the same model, byte for byte." for names in same.values() if len(names) > 1]
    return notes


def as_json(found: Evaluation, rows: list[dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    """Everything but the records (those are for --out): models, tasks, results, notes, failures."""
    from dataclasses import asdict

    return {
        "models": [asdict(model) for model in found.models],
        "tasks": [asdict(task) for task in found.tasks],
        "results": rows,
        "notes": notes,
        "failures": [
            {"model": f.model, "task": f.task, "code": f.error.code, "what": f.error.what, "why": f.error.why}
            for f in found.failures
        ],
        "items_scored_now": found.fresh,
        "items_known_before": found.kept,
        "seconds": round(found.seconds, 3),
    }


# -- the terminal -------------------------------------------------------------------------------------------------


def _print(found: Evaluation, rows: list[dict[str, Any]], notes: list[str]) -> None:
    from rich.table import Table

    from .console import stdout
    from .terminal import _plain

    console = stdout()
    if rows:
        table = Table(title="scores, with 95 % Wilson intervals of shares", title_justify="left")
        for name in ("task", "metric", "model"):
            table.add_column(name, overflow="fold")
        for name in ("score", "95 %", "items", "length"):
            table.add_column(name, justify="right", no_wrap=True)
        previous: tuple[str, str] | None = None
        for place, row in enumerate(rows):
            group = row["task"], row["metric"]
            following = rows[place + 1] if place + 1 < len(rows) else None
            table.add_row(
                _plain(row["task"]) if group != previous else "",
                row["metric"] if group != previous else "",
                _plain(row["model"]),
                *_cells(row),
                end_section=following is not None and (following["task"], following["metric"]) != group,
            )
            previous = group
        console.print(table)
        console.print(f"[dim]{_legend(rows)}[/]", highlight=False)
    for note in notes:
        console.print(f"note: {_plain(note)}", highlight=False)
    known = f" ({found.kept:,} more were known from before)" if found.kept else ""
    console.print(f"{found.fresh:,} items scored in {found.seconds:.1f} s{known}.", highlight=False)


def _cells(row: dict[str, Any]) -> list[str]:
    if row["right"] is None:
        score, interval = f"{row['score']:.4f}", ""
    else:
        share = f"{row['score']:.3f}" if row["items"] >= FEW_ITEMS else f"{row['right']} of {row['items']}"
        score, interval = share, f"{row['low']:.2f}–{row['high']:.2f}"
    return [score, interval, f"{row['items']:,}", "" if row["length"] is None else f"{row['length']:.1f}"]


def _legend(rows: Sequence[dict[str, Any]]) -> str:
    used = [metric for metric in METRICS.values() if any(row["metric"] == metric.name for row in rows)]
    words = [f"{metric.name}: {metric.unit}{' (less is better)' if metric.better < 0 else ''}" for metric in used]
    if any(row["length"] is not None for row in rows):
        words.append("length: mean response in tokens")
    return "; ".join(words) + "."


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """Items, rate and time left on stderr: a bar on a terminal, else a line now and then."""
    from .console import stderr

    console = stderr()
    if not console.is_terminal:
        yield _Lines().show
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    from .terminal import _plain

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}")
    with Bar(*columns, console=console, transient=True) as bar:
        line = bar.add_task("starting", total=None, speed="")

        def show(progress: Progress) -> None:
            total = progress.total or None
            bar.update(
                line, completed=progress.done, total=total, description=_plain(progress.doing), speed=_speed(progress)
            )

        yield show


class _Lines:
    """Progress for logs."""

    def __init__(self, every: float = 10.0) -> None:
        self.every, self.last = every, time.monotonic()

    def show(self, progress: Progress) -> None:
        from .terminal import say

        now = time.monotonic()
        if now - self.last >= self.every:
            self.last = now
            count = f"{progress.done:,} of {progress.total:,} items  " if progress.total else ""
            say(f"{count}{progress.doing}  {_speed(progress)}".rstrip(), sys.stderr)


def _speed(progress: Progress) -> str:
    left = progress.seconds_left
    return "" if progress.rate is None or left is None else f"{progress.rate:,.1f} items/s, {left:,.0f} s left"
