"""``python app.py demo``: the whole loop on the bundled experts, with real models and real scores.

Plan → merge → verify with four methods, then base, experts and merges on the held-out items of every task. The
settings were chosen on validation items that are not used here (``assets/demo/settings.json`` says which, and
``python -m assets.demo.table`` how they were found).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from merging.checkpoints.verify import verify
from merging.engine import run
from merging.errors import InputError
from merging.evaluation.exact_match import Score, evaluate, load_model, summary
from merging.evaluation.tasks import Item, Task, read_task
from merging.plan import make_plan
from merging.recipe import Recipe

from .console import stdout

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "demo"


def run_demo(keep: str | None = None, limit: int | None = None) -> int:
    """Run it and print the table. ``keep``: a new folder for the merged models; ``limit``: items per task."""
    console, started = stdout(), time.monotonic()
    settings = json.loads((FOLDER / "settings.json").read_text("utf-8"))
    experts: list[str] = settings["experts"]
    tasks = [_first(read_task(FOLDER / "tasks" / f"{name}.jsonl"), limit) for name in experts]
    models = {"base": FOLDER / "base"} | {f"expert {name}": FOLDER / "experts" / name for name in experts}
    console.print(
        f"A tiny language model ({settings['parameters']:,} parameters) and {len(experts)} experts trained from "
        f"it, one per skill. Four ways to fold them into one model:\n",
        highlight=False,
    )
    with _output(keep) as out:
        for merge in settings["merges"]:
            folder = out / merge["method"]
            _merge(console, Recipe.parse(_recipe(merge, experts)), merge["method"], folder)
            models[merge["method"]] = folder
        scores: dict[str, dict[str, Score]] = {}
        for name, folder in models.items():
            model = load_model(folder)
            scores[name] = {task.name: evaluate(model, task) for task in tasks}
        _print_table(console, scores, experts, settings["merges"])
        console.print(
            f"\n{len(models)} models × {len(tasks)} tasks in {time.monotonic() - started:.0f} s, all on this "
            "machine. Mini-scale: figures of a toy language, to compare methods by, not to quote for large models.",
            highlight=False,
        )
        if keep:
            console.print(f"The merged models are in {out}.", highlight=False)
    return 0


def _recipe(merge: dict[str, Any], experts: list[str]) -> dict[str, Any]:
    return {
        "base": str(FOLDER / "base"),
        "experts": [
            {"model": str(FOLDER / "experts" / name), "name": name, "parameters": merge["experts"]} for name in experts
        ],
        "method": merge["method"],
        "parameters": merge["parameters"],
    }


def _merge(console: Any, recipe: Recipe, name: str, folder: Path) -> None:
    with make_plan(recipe) as plan:
        result = run(plan, folder)
    report = verify(folder)
    report.raise_if_bad()
    console.print(
        f"  {recipe.method_class.title:<18} {len(plan.tensors)} tensors merged in {result.seconds:.1f} s, "
        f"{report.files} files verified",
        highlight=False,
    )


def _first(task: Task, limit: int | None) -> Task:
    items: tuple[Item, ...] = task.items[:limit]
    return Task(task.name, items, task.sha256)


@contextlib.contextmanager
def _output(keep: str | None) -> Iterator[Path]:
    if keep is None:
        folder = Path(tempfile.mkdtemp(prefix="amalgam-demo-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    folder = Path(keep)
    if folder.exists():
        raise InputError("E_OUTPUT_EXISTS", f"{folder} exists already.", "", "Give --keep a new folder.")
    folder.mkdir(parents=True)
    yield folder


def _print_table(
    console: Any, scores: dict[str, dict[str, Score]], experts: list[str], merges: list[dict[str, Any]]
) -> None:
    from rich.table import Table

    base, own = scores["base"], {name: scores[f"expert {name}"][name] for name in experts}
    items = next(iter(base.values())).total
    table = Table(
        title=f"\nexact match on {items} held-out items per task (± half of the 95 % Wilson interval)",
        title_justify="left",
    )
    table.add_column("model")
    for name in [*experts, "mean", "gain kept: mean", "least"]:
        table.add_column(name, justify="right")
    for model, by_task in scores.items():
        facts = summary(base, own, by_task)
        cells = [_cell(by_task[name], model == f"expert {name}") for name in experts]
        kept = (
            ["", ""]
            if model == "base" or model.startswith("expert")
            else [f"{facts.mean_gain_kept:.0%}", f"{facts.least_gain_kept:.0%}"]
        )
        table.add_row(
            _label(model, merges),
            *cells,
            f"{facts.mean:.3f}",
            *kept,
            end_section=model in ("base", f"expert {experts[-1]}"),
        )
    console.print(table)
    console.print(
        "gain kept = (merge − base) / (expert − base), each task against its own expert. Negative: worse than "
        "the base.",
        highlight=False,
    )


def _cell(score: Score, is_own: bool) -> str:
    low, high = score.interval
    text = f"{score.accuracy:.3f} ±{(high - low) / 2:.3f}"
    return f"[bold]{text}[/]" if is_own else text


def _label(model: str, merges: list[dict[str, Any]]) -> str:
    for merge in merges:
        if merge["method"] == model:
            values = merge["experts"] | merge["parameters"]
            return f"{model} ({', '.join(f'{name} {value:g}' for name, value in values.items())})"
    return model
