"""Baselines on equal terms: merges whose settings are chosen on a validation split, each method with the same budget.

The one idea: a tuned candidate against an untuned baseline measures the tuning. So plain average and task arithmetic
are made and tuned here by the same engine, with the same number of evaluations as any other method, on items that are
not reported on; and how many that were is written beside the scores.

A *budget* is a number of merged models that are scored on the validation split. Base, experts and reported scores are
not part of it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.checkpoints.manifest import read_manifest
from merging.engine import choose_device, run
from merging.errors import RecipeError, VerificationError
from merging.evaluation.records import METRICS, Record
from merging.evaluation.runner import Progress
from merging.methods import METHODS, get_method
from merging.plan import make_plan
from merging.recipe import Recipe
from merging.recipe_parameters import fields_of, suggestion

TRIALS_ON_DISK = 4_000_000_000  # bytes

FACTORS = (1.0, 0.8, 1.2, 0.6, 1.5)  # of the sum of the task vectors, where a method normalises it
SHARES = (0.2, 0.5, 1.0)  # of the weights that a method keeps
RANGES: dict[str, dict[str, Sequence[float]]] = {
    "ties": {"density": SHARES, "lambda": FACTORS},
    "pcb": {"ratio": (0.2, 0.1, 0.5), "lambda": FACTORS},
    "dare_linear": {"density": (0.5,)},
    "dare_ties": {"density": (0.5,)},
}
"""What is tried for a method, the likelier values first. The weight of task arithmetic and DARE follows the budget."""
WEIGHTED = ("task_arithmetic", "dare_linear", "dare_ties")


@dataclass(frozen=True, slots=True)
class Setting:
    """A method with numbers. ``experts``: parameters that are the same for every expert."""

    method: str
    experts: Mapping[str, float]
    parameters: Mapping[str, float]

    @property
    def text(self) -> str:
        """The numbers: density 0.2, lambda 1."""
        return ", ".join(f"{name} {value:g}" for name, value in {**self.experts, **self.parameters}.items())

    @property
    def name(self) -> str:
        return f"{self.method} ({self.text})" if self.text else self.method


@dataclass(frozen=True, slots=True)
class Work:
    """How to work: where, with how many threads for merging, when to stop, and whom to tell."""

    device: str = "auto"
    threads: int = 0
    stop: threading.Event | None = None
    tell: Callable[[str], None] = lambda text: None
    limit: int = 0
    """Score only the first items of each task; 0: all."""
    progress: Callable[[Progress], None] = lambda progress: None


@dataclass(frozen=True, slots=True)
class Sources:
    """The models that are merged: a base and its experts, as local folders. Experts may be LoRA adapters."""

    base: Path
    experts: Mapping[str, Path]

    def recipe(self, setting: Setting) -> Recipe:
        """The recipe of a merge of all experts."""
        experts = [
            {**self._reference(path), "name": name, "parameters": dict(setting.experts)}
            for name, path in self.experts.items()
        ]
        data = {"experts": experts, "method": setting.method, "parameters": dict(setting.parameters)}
        return Recipe.parse({"base": str(self.base), **data} if get_method(setting.method).uses_base else data)

    def whole(self, name: str) -> Recipe | None:
        """A recipe that makes a model of its own of an adapter; None where the expert is one already."""
        reference = self._reference(self.experts[name])
        if "adapter" not in reference:
            return None
        return Recipe.parse({"experts": [reference], "method": "passthrough"})

    def _reference(self, path: Path) -> dict[str, str]:
        if (path / "adapter_config.json").is_file():
            return {"model": str(self.base), "adapter": str(path)}
        return {"model": str(path)}


# -- settings -----------------------------------------------------------------------------------------------------


def settings_for(method: str, budget: int, ranges: Mapping[str, Sequence[float]] | None = None) -> list[Setting]:
    """At most ``budget`` settings of a method, evenly taken from the grid of its ranges.

    Task arithmetic gets the weights 1/budget, 2/budget, …, 1; DARE the same. A method without ranges has one setting,
    its defaults.

    Raises:
        RecipeError: ``E_RECIPE_METHOD``, ``E_RECIPE_FIELD`` for a method or parameter that does not exist.
    """
    if method not in METHODS:
        get_method(method)  # raises, with a suggestion
    shared, per_expert = (fields_of(part) for part in (get_method(method).Shared, get_method(method).PerExpert))
    axes = dict(RANGES.get(method, {})) if ranges is None else dict(ranges)
    for name in axes:
        if name not in shared and name not in per_expert:
            what = f"{method} has no parameter {name!r}."
            raise RecipeError("E_RECIPE_FIELD", what, "", suggestion(name, {*shared, *per_expert}))
    if method in WEIGHTED and "weight" not in axes:
        count = max(1, budget // math.prod(map(len, axes.values())))
        axes["weight"] = [round((k + 1) / count, 4) for k in range(count)]
    elif "weight" in per_expert and per_expert["weight"].default is None and "weight" not in axes:
        axes["weight"] = [1.0]  # of methods that divide by the sum of the weights
    grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [
        Setting(
            method,
            {name: value for name, value in point.items() if name in per_expert},
            {name: value for name, value in point.items() if name not in per_expert},
        )
        for point in _evenly(grid, budget)
    ]


def average_of(experts: int) -> Setting:
    """The plain average, for which nothing is chosen."""
    return Setting("linear", {"weight": 1 / experts}, {})


def _evenly(grid: Sequence[Any], count: int) -> list[Any]:
    """``count`` points of a list, spread over all of it."""
    if len(grid) <= count:
        return list(grid)
    return [grid[(2 * k + 1) * len(grid) // (2 * count)] for k in range(count)]


# -- choosing -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tuned:
    """The best setting of a method on the validation split. ``tried``: all settings with their scores."""

    setting: Setting
    folder: Path
    tried: list[tuple[Setting, float]]


def merge_into(recipe: Recipe, folder: Path, work: Work) -> Path:
    """Make a merge, unless an earlier run of the same plan has finished it in this folder."""
    with make_plan(recipe) as plan:
        if folder.is_dir():
            with contextlib.suppress(VerificationError):  # not ours: the engine will say what is in the way
                if read_manifest(folder).get("plan_hash") == plan.resume_key(choose_device(work.device)):
                    return folder
        return run(plan, folder, device=work.device, threads=work.threads, stop=work.stop).folder


def tune(
    sources: Sources,
    settings: Sequence[Setting],
    score: Callable[[Mapping[str, Path]], Mapping[str, float]],
    folder: Path,
    work: Work | None = None,
) -> Tuned:
    """Merge with every setting, score the merges, keep the best one as ``folder``. Of equals the first.

    Merges are scored together (loading libraries takes longer than scoring a small model), as many at a time as fit
    into ``TRIALS_ON_DISK`` bytes, but one at least.

    Args:
        score: name -> folder of merged models; gives name -> how good it is on the validation split, more is better.
    """
    work = work or Work()
    place = folder.parent / f".{folder.name}"
    best = place / "best" / folder.name  # the last part of a path becomes the title in the model card
    shutil.rmtree(place, ignore_errors=True)
    best.parent.mkdir(parents=True)
    tried: list[tuple[Setting, float]] = []
    for group in _groups(sources, settings):
        trials = {setting.name: place / f"{number}" / folder.name for number, setting in enumerate(group)}
        for setting in group:
            trials[setting.name].parent.mkdir(exist_ok=True)
            merge_into(sources.recipe(setting), trials[setting.name], work)
        points = score(trials)
        for setting in group:
            work.tell(f"  {points[setting.name]:.4f}  {setting.name}")
            if not tried or points[setting.name] > max(found for _, found in tried):
                shutil.rmtree(best, ignore_errors=True)
                trials[setting.name].rename(best)
            else:
                shutil.rmtree(trials[setting.name])
            tried.append((setting, points[setting.name]))
    shutil.rmtree(folder, ignore_errors=True)
    best.rename(folder)
    shutil.rmtree(place)
    return Tuned(max(tried, key=lambda one: one[1])[0], folder, tried)  # max takes the first of equals


def _groups(sources: Sources, settings: Sequence[Setting]) -> Iterator[Sequence[Setting]]:
    with make_plan(sources.recipe(settings[0])) as plan:
        size = max(1, TRIALS_ON_DISK // max(1, plan.bytes_written))
    for start in range(0, len(settings), size):
        yield settings[start : start + size]


def validation_score(records: Sequence[Record], base: Sequence[Record]) -> float:
    """How good a model is on the validation tasks: the mean over tasks of its score, more is better.

    Where tasks have scores of different kinds: of the score relative to that of the base.
    """
    mine, bases = _means(records), _means(base)
    metrics = {metric for _, metric in mine}
    if len({METRICS[m].unit if METRICS[m].kind == "real" else "share" for m in metrics}) == 1:
        return math.fsum(METRICS[metric].better * value for (_, metric), value in mine.items()) / len(mine)
    relative = [
        METRICS[metric].better * (value - bases[task, metric]) / (abs(bases[task, metric]) or 1.0)
        for (task, metric), value in mine.items()
    ]
    return math.fsum(relative) / len(relative)


def _means(records: Sequence[Record]) -> dict[tuple[str, str], float]:
    """Mean score per task, by the first metric of ``METRICS`` that the task has."""
    order = list(METRICS)
    by_task: dict[str, dict[str, list[float]]] = {}
    for record in records:
        by_task.setdefault(record.task, {}).setdefault(record.metric, []).append(record.score)
    return {
        (task, metric): math.fsum(found[metric]) / len(found[metric])
        for task, found in by_task.items()
        for metric in [min(found, key=order.index)]
    }
