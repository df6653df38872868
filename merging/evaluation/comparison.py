"""The result of a comparison as values: what a table, a report or a web page draws from, and the JSON of ``--json``.

    {
      "format": 1, "split": "test", "resamples": 10000, "seed": 0, "level": 0.05,
      "tasks": [{"name", "metric", "unit", "better": 1 | -1, "kind": "binary" | "real", "owner": expert or null,
                 "items", "units", "visible": smallest visible difference or null,
                 "signal_to_noise": {"signal", "noise", "ratio", "usable"} or null}],
      "rows": [{"name", "role": "base" | "expert" | "average" | "tuned" | "candidate", "model", "setting",
                "evaluations": n or null, "bytes": n or null,
                "tasks": {task: {"mean", "low", "high", "correct": n or null, "items", "length"}},
                "mean": interval or null, "length": tokens or null,
                "retention": kept or null, "gain_kept": kept or null, "forgetting": {"tasks": {task: interval},
                "mean": interval or null} or null, "groups": [0, 1], "on_front": bool or null,
                "distance_to_utopia": number or null}],
      "tests": [{"candidate", "baseline", "task": name or null for the mean over tasks, "advantage", "low", "high",
                 "standard_error", "items", "units", "wins", "losses", "test", "p": number or null,
                 "p_holm": number or null, "verdict": "better" | "worse" | "tied" | "too few items"}],
      "fronts": [{"objectives": [name], "rows": [name]}],
      "hypervolumes": {"measure": "gain kept" | "retention", "baselines": volume, "all": volume} or null,
      "notes": [{"level": "note" | "warning", "text"}]
    }

    interval: {"value", "low", "high"}, low and high 95 %. kept: {"tasks": {task: interval}, "mean": interval, "least":
    interval, "worst": task, "left_out": [task]}. volume: {"value", "standard_error"}.

An *advantage* is candidate − baseline turned so that more is better, in the unit of the score, on the same items.
``groups``: rows that share a number cannot be told apart by their means. Scores and intervals of 0/1 metrics are shares
(Wilson), of others means (bootstrap). null stands for what is undefined, unbounded or was not recorded.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from merging.evaluation.pareto import Hypervolume
from merging.evaluation.retention import Estimate, Kept, SignalToNoise

FEW_ITEMS = 50
"""Below this many independent items only counts are shown: significance at such sizes invites misreading."""

Role = Literal["base", "expert", "average", "tuned", "candidate"]
Verdict = Literal["better", "worse", "tied", "too few items"]


@dataclass(frozen=True, slots=True)
class TaskFacts:
    name: str
    metric: str
    unit: str
    better: int
    kind: str
    owner: str | None
    items: int
    units: int
    visible: float
    """The smallest difference between two candidates that this many items show (5 %, power 80 %); NaN: unknown."""
    signal_to_noise: SignalToNoise | None


@dataclass(frozen=True, slots=True)
class Cell:
    """One model on one task. ``correct``: of 0/1 metrics without repeats."""

    mean: float
    low: float
    high: float
    correct: int | None
    items: int
    length: float


@dataclass(frozen=True, slots=True)
class Forgetting:
    """Base − model on the tasks that are nobody's own, turned so that more is worse."""

    tasks: dict[str, Estimate]
    mean: Estimate | None


@dataclass(slots=True)
class Row:
    name: str
    role: Role
    model: str
    setting: str
    evaluations: int | None
    bytes: int | None
    tasks: dict[str, Cell]
    mean: Estimate | None = None
    length: float | None = None
    retention: Kept | None = None
    gain_kept: Kept | None = None
    forgetting: Forgetting | None = None
    groups: list[int] = field(default_factory=list)
    on_front: bool | None = None
    distance_to_utopia: float | None = None

    @property
    def is_merged(self) -> bool:
        return self.role not in ("base", "expert")


@dataclass(slots=True)
class PairedTest:
    """A candidate against a baseline on one task, or (``task`` None) on the mean over all tasks."""

    candidate: str
    baseline: str
    task: str | None
    advantage: float
    low: float
    high: float
    standard_error: float
    items: int
    units: int
    wins: int | None
    losses: int | None
    test: str
    p: float | None
    p_holm: float | None = None
    verdict: Verdict = "too few items"


@dataclass(frozen=True, slots=True)
class Front:
    objectives: tuple[str, ...]
    rows: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Note:
    level: Literal["note", "warning"]
    text: str


@dataclass(slots=True)
class Comparison:
    """See the module. Made by ``compare.compare``."""

    split: str
    resamples: int
    seed: int
    level: float
    tasks: list[TaskFacts]
    rows: list[Row]
    tests: list[PairedTest]
    fronts: list[Front]
    hypervolumes: dict[str, Hypervolume]
    measure: str
    notes: list[Note]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps(…, allow_nan=False)``. The module describes it."""
        tasks = []
        for task in self.tasks:
            facts = asdict(task)
            if task.signal_to_noise is not None:
                facts["signal_to_noise"]["usable"] = task.signal_to_noise.usable
            tasks.append(facts)
        volumes = {name: asdict(volume) for name, volume in self.hypervolumes.items()}
        data = {
            "format": 1,
            "split": self.split,
            "resamples": self.resamples,
            "seed": self.seed,
            "level": self.level,
            "tasks": tasks,
            "rows": [asdict(row) for row in self.rows],
            "tests": [asdict(test) for test in self.tests],
            "fronts": [asdict(front) for front in self.fronts],
            "hypervolumes": {"measure": self.measure, **volumes} if volumes else None,
            "notes": [asdict(note) for note in self.notes],
        }
        return _plain(data)


def _plain(value: Any) -> Any:
    """NaN and infinity become null, tuples lists."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
