"""``python app.py compare``: base, experts, baselines and candidates side by side, with what is proven and what not.

Three ways to it: a run that exists; records that exist, with options that say who is who; or base, experts and tasks,
from which the baselines are made and tuned, everything is evaluated, and a run is written.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merging.errors import Cancelled, TaskError
from merging.evaluation.records import check_place, write_whole
from merging.evaluation.run_file import NAME, Loaded, apart, load_runs, parse_run, with_keys

from .evaluate import _bar
from .terminal import TERMINATED, _download_bar, _stopping, print_error, say

RECORDS = (".jsonl", ".parquet")


def compare(options: argparse.Namespace) -> int:
    """Run the command."""
    from merging.evaluation import compare as module
    from merging.evaluation.comparison import Note

    from .compare_tables import print_comparison
    from .console import stdout

    remarks: list[str] = []
    if options.json and options.json != "-":
        check_place(options.json)
    if options.runs:
        files = [path for path in options.runs if _holds_records(Path(path))]
        if files and len(files) < len(options.runs):
            raise TaskError("E_RUN", "Runs and files of records cannot be mixed.", "", "Name one kind.")
        loaded = _from_records(options, files, remarks) if files else _from_runs(options)
    else:
        terminated = threading.Event()
        try:
            loaded = load_runs([_produced(options, terminated)])
        except Cancelled as cancelled:
            if terminated.is_set():
                print_error(cancelled)
                return TERMINATED
            raise
    comparison = module.compare(loaded.records, loaded.run, selected_on=loaded.selected_on)
    comparison.notes += [Note("note", text) for text in remarks]
    text = json.dumps(comparison.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if options.json == "-":
        sys.stdout.write(text)
        return 0
    if options.json:
        write_whole(Path(options.json), text.encode("utf-8", "surrogatepass"))
    print_comparison(stdout(), comparison)
    return 0


def _from_runs(options: argparse.Namespace) -> Loaded:
    if given := _given(options, ("base", "expert", "candidate", "average", "tuned", "tune", "tasks", "out")):
        fix = "A run file says who is who; these options are for files of records, or for a new run."
        raise TaskError("E_RUN", f"--{given[0]} does not go with a run.", "", fix)
    return load_runs(options.runs)


def _holds_records(path: Path) -> bool:
    """A file of records, or what lm-evaluation-harness wrote; a folder with a run file is a run."""
    from merging.evaluation.lm_eval import is_results

    return path.suffix in RECORDS or (not (path / NAME).exists() and is_results(path))


def _from_records(options: argparse.Namespace, files: Sequence[str], remarks: list[str]) -> Loaded:
    """Records, and roles from the options. Models are named as in the records (name in the header, or key)."""
    from merging.evaluation.lm_eval import is_results, read_results
    from merging.evaluation.records import read_records_file

    if given := _given(options, ("tune", "tasks", "selection_tasks", "out")):
        raise TaskError("E_RUN", f"--{given[0].replace('_', '-')} does not go with files of records.")
    _needs(options, ("base", "expert"))
    data: dict[str, Any] = {"amalgam_run": 1, "base": {"model": options.base}}
    data["experts"] = {name: {"model": model, "tasks": tasks} for name, model, tasks in _experts(options.expert)}
    data |= {name: {"model": getattr(options, name)} for name in ("average", "tuned") if getattr(options, name)}
    data["candidates"] = {name: {"model": model} for name, model in _pairs(options.candidate, "candidate").items()}
    if data.get("average"):
        data["average"]["evaluations"] = 0
    contents = []
    for file in files:
        if is_results(Path(file)):
            content, notes = read_results(file)
            remarks += [note for note in notes if note not in remarks]
        else:
            content = read_records_file(file)
        contents.append(content)
    run = with_keys(parse_run(data, "the options"), contents, ", ".join(files))
    return Loaded(run, *apart(run, [record for content in contents for record in content.records]))


def _produced(options: argparse.Namespace, terminated: threading.Event) -> Path:
    """Make a run: merges, evaluations, run file."""
    from merging.checkpoints.hub import resolve
    from merging.evaluation import baselines, selection
    from merging.evaluation.tasks import read_tasks

    if not _given(options, ("base", "expert", "tasks", "out")):
        what = "Nothing to compare."
        raise TaskError("E_RUN", what, "", "Name a run, or --base, --expert, --tasks and --out to make one.")
    _needs(options, ("base", "expert", "tasks", "out"))
    if given := _given(options, ("average", "tuned")):
        fix = "Add merges of your own with --candidate."
        raise TaskError("E_RUN", f"--{given[0]} is for files of records: a new run makes its own.", "", fix)
    experts = _experts(options.expert)
    tasks, held = baselines.apart(read_tasks(options.tasks))
    if options.selection_tasks:
        held = read_tasks(options.selection_tasks)
        if baselines.apart(held)[1]:  # a folder with both splits
            held = baselines.apart(held)[1]
    if not held:
        what = f"{options.tasks} has no validation split to choose settings on."
        raise TaskError("E_SELECTION", what, "", "Add files named ….validation.jsonl, or name --selection-tasks.")
    candidates = _pairs(options.candidate, "candidate")
    methods = [_method(text, options.budget) for text in options.tune or ()]
    with _download_bar() as show:
        base = resolve(options.base, progress=show).path
        paths = {name: resolve(model, progress=show).path for name, model, _ in experts}
        ready = {name: resolve(model, progress=show).path for name, model in candidates.items()}
    order = baselines.Order(
        sources=selection.Sources(base, paths),
        owners={name: own for name, _, own in experts},
        tasks=tasks,
        selection_tasks=held,
        budget=options.budget,
        candidates=ready,
        methods=dict(methods),
    )
    with _stopping(terminated) as stop, _bar() as progress:
        work = selection.Work(options.device, options.threads, stop, _tell, options.limit or 0, progress)
        return baselines.produce(order, Path(options.out), work)


def _tell(text: str) -> None:
    say(text, sys.stderr)


# -- options ------------------------------------------------------------------------------------------------------


def _given(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    return [name for name in names if getattr(options, name)]


def _needs(options: argparse.Namespace, names: Sequence[str]) -> None:
    if missing := [name for name in names if not getattr(options, name)]:
        raise TaskError("E_RUN", f"--{missing[0]} is missing.", "", "See python app.py compare --help.")


def _pairs(texts: Sequence[str] | None, option: str) -> Mapping[str, str]:
    """NAME=MODEL, several times."""
    found: dict[str, str] = {}
    for text in texts or ():
        name, equals, model = text.partition("=")
        if not equals or not name or not model:
            raise TaskError("E_RUN", f"--{option} {text[:100]!r} is not of the form NAME=MODEL.")
        if found.setdefault(name, model) != model:
            raise TaskError("E_RUN", f"Two models are called {name!r}.", "", "Rename one of them.")
    return found


def _experts(texts: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """NAME=MODEL, NAME=MODEL:TASK or NAME=MODEL:TASK,TASK; without a task, the one that is called as the expert."""
    found = []
    for name, model in _pairs(texts, "expert").items():
        path, colon, tasks = model.rpartition(":")
        found.append((name, path, tasks.split(",")) if colon and path and tasks else (name, model, [name]))
    return found


def _method(text: str, budget: int) -> tuple[str, list[Any]]:
    """METHOD or METHOD:PARAMETER=VALUE,VALUE:…"""
    from merging.evaluation.selection import settings_for

    method, *axes = text.split(":")
    ranges: dict[str, list[float]] = {}
    for axis in axes:
        name, values = next(iter(_pairs([axis], "tune").items()))
        try:
            ranges[name] = [float(value) for value in values.split(",")]
        except ValueError:
            raise TaskError("E_RUN", f"--tune {text[:100]!r}: {values[:60]!r} are not numbers.") from None
    return method, settings_for(method, budget, ranges or None)
