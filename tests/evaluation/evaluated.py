"""Records of made-up models, for tests of what is computed from records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from merging.evaluation.records import Record
from merging.evaluation.run_file import Run, parse_run


def records_of(
    scores: Mapping[str, Mapping[str, Iterable[float]]],
    *,
    metric: str = "exact_match",
    clusters: Sequence[str] | None = None,
    lengths: Mapping[str, int] | None = None,
    seed: int = 0,
) -> list[Record]:
    """{model: {task: scores of its items}} as records; item k of a task is the same for all models."""
    return [
        Record(
            model=model,
            task=task,
            item=f"{task}-{number:04}",
            metric=metric,
            score=float(score),
            prompt=f"prompt of {task}-{number}",
            length=(lengths or {}).get(model, 4),
            seconds=0.01,
            answer="",
            cluster=clusters[number] if clusters else "",
            seed=seed,
        )
        for model, tasks in scores.items()
        for task, values in tasks.items()
        for number, score in enumerate(values)
    ]


def answers(items: int, **correct: float) -> dict[str, np.ndarray]:
    """{model: 0/1 answers}: each model is right on about its share of items, and all find the same items hard."""
    generator = np.random.default_rng(sum(map(ord, "".join(correct))) + items)
    difficulty = generator.random(items)
    return {
        name: (difficulty + generator.normal(0, 0.1, items) < share).astype(float) for name, share in correct.items()
    }


def by_task(items: int, shares: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, np.ndarray]]:
    """{task: {model: share}} as {model: {task: 0/1 answers}}."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for task, models in shares.items():
        for model, values in answers(items, **models).items():
            found.setdefault(model, {})[task] = values
    return found


def run_of(**changes: Any) -> Run:
    """A run with two experts, both baselines and one candidate; models are called as in ``SHARES``."""
    data: dict[str, Any] = {
        "amalgam_run": 1,
        "split": "test",
        "base": {"model": "base"},
        "experts": {"sort": {"model": "sorter", "tasks": ["sort"]}, "code": {"model": "coder", "tasks": ["code"]}},
        "average": {"model": "average", "evaluations": 0},
        "tuned": {"model": "tuned", "setting": "weight 0.4", "evaluations": 8},
        "candidates": {"ties": {"model": "ties", "evaluations": 8}},
        "selection": {"split": "validation"},
    }
    return parse_run({name: value for name, value in (data | changes).items() if value is not None})


SHARES = {
    "sort": {"base": 0.4, "sorter": 0.9, "coder": 0.35, "average": 0.6, "tuned": 0.65, "ties": 0.8},
    "code": {"base": 0.5, "sorter": 0.45, "coder": 0.8, "average": 0.7, "tuned": 0.75, "ties": 0.74},
}
