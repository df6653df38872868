"""The table of methods that every invariant runs over. A new method is one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from merging.methods import Method, make
from tests.oracles import reference


@dataclass(frozen=True)
class Case:
    """One method with settings. ``own`` gives one expert's parameters from a random generator."""

    id: str
    method: str
    shared: dict[str, Any] = field(default_factory=dict)
    own: Callable[[np.random.Generator], dict[str, Any]] = lambda rng: {}
    experts: tuple[int, int] = (1, 4)
    base: bool = True
    off: dict[str, Any] | None = None
    """Parameters of an expert that switch it off; None if the method knows no such thing."""
    alone: dict[str, Any] | None = None
    """Parameters of an expert that, all others being off, make it the result."""
    mean: bool = False
    """Do equal weights with sum 1 give back an expert that all copies agree on?"""
    scales: bool = True
    """Is the merged task vector proportional to the experts' (base 0)?"""
    exact_sums: bool = False
    """Does the result depend on norms, so that it may differ in a last bit between equal inputs?"""
    oracle: Callable[..., Any] | None = None

    def build(self, parameters: list[dict[str, Any]], **shared: Any) -> Method:
        return make(self.method, self.shared | shared, parameters)

    def draw(self, rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
        return [self.own(rng) for _ in range(count)]


def _weight(rng: np.random.Generator) -> dict[str, Any]:
    return {"weight": float(rng.choice([0.3, 0.5, 1.0, 1.7, -0.4]))}


def _sparse(rng: np.random.Generator) -> dict[str, Any]:
    return {"weight": float(rng.choice([0.3, 0.5, 1.0, 2.0])), "density": float(rng.choice([0.1, 0.29, 0.5, 1.0]))}


def _ties(base: Any, experts: list[Any], shared: dict[str, Any], own: list[dict[str, Any]]) -> Any:
    return reference.ties(
        base,
        experts,
        [e["weight"] for e in own],
        [e["density"] for e in own],
        shared.get("lambda", 1.0),
        shared.get("normalize", True),
    )


def _slerp(base: Any, experts: list[Any], shared: dict[str, Any], own: list[dict[str, Any]]) -> Any:
    return reference.slerp(base, experts[0], shared["t"])


def _nuslerp(base: Any, experts: list[Any], shared: dict[str, Any], own: list[dict[str, Any]]) -> Any:
    return reference.nuslerp(experts, [e["weight"] for e in own], base)


def _multislerp(base: Any, experts: list[Any], shared: dict[str, Any], own: list[dict[str, Any]]) -> Any:
    return reference.multislerp(experts, [e["weight"] for e in own], base)


def _passthrough(base: Any, experts: list[Any], shared: dict[str, Any], own: list[dict[str, Any]]) -> Any:
    return reference.passthrough(experts[0], own[0]["scale"])


def _task_arithmetic(base: Any, experts: list[Any], shared: dict[str, Any], own: list[dict[str, Any]]) -> Any:
    return reference.task_arithmetic(
        base, experts, [e["weight"] for e in own], shared.get("lambda", 1.0), shared.get("normalize", False)
    )


def _linear(base: Any, experts: list[Any], shared: dict[str, Any], own: list[dict[str, Any]]) -> Any:
    return reference.linear(experts, [e["weight"] for e in own], shared.get("normalize", True))


def _pcb(base: Any, experts: list[Any], shared: dict[str, Any], own: list[dict[str, Any]]) -> Any:
    variant = shared.get("variant", "C")
    clip = 0.0 if variant == "paper" else shared.get("clip", 0.01)  # the printed formula does not clip
    return reference.pcb(
        base,
        experts,
        shared.get("ratio", 0.2),
        [e.get("weight", 1.0) * shared.get("lambda", 1.0) for e in own],
        clip,
        variant,
    )


CASES = [
    Case(
        "linear",
        "linear",
        {"normalize": True},
        lambda rng: {"weight": float(rng.uniform(0.1, 2))},
        base=False,
        off={"weight": 0.0},
        alone={"weight": 1.0},
        mean=True,
        oracle=_linear,
    ),
    Case(
        "linear-sum",
        "linear",
        {"normalize": False},
        _weight,
        base=False,
        off={"weight": 0.0},
        alone={"weight": 1.0},
        mean=True,
        oracle=_linear,
    ),
    Case("task_arithmetic", "task_arithmetic", {"lambda": 0.7}, _weight, off={"weight": 0.0}, oracle=_task_arithmetic),
    Case(
        "task_arithmetic-mean",
        "task_arithmetic",
        {"normalize": True},
        lambda rng: {"weight": float(rng.uniform(0.1, 2))},
        off={"weight": 0.0},
        alone={"weight": 1.0},
        mean=True,
        oracle=_task_arithmetic,
    ),
    Case(
        "ties", "ties", {}, _sparse, off={"weight": 0.0}, alone={"weight": 0.5, "density": 1.0}, mean=True, oracle=_ties
    ),
    Case("ties-sum", "ties", {"normalize": False, "lambda": 1.3}, _sparse, off={"density": 0.0}, oracle=_ties),
    Case(
        "ties-global",
        "ties",
        {"scope": "global"},
        lambda rng: {"weight": 0.5, "density": 0.29},
        off={"weight": 0.0, "density": 0.0},
        oracle=_ties,
    ),
    Case("dare_linear", "dare_linear", {}, _sparse, off={"weight": 0.0}, alone={"weight": 1.0, "density": 1.0}),
    Case(
        "dare_linear-l1",
        "dare_linear",
        {"rescale": "l1"},
        _sparse,
        off={"density": 0.0, "weight": 1.0},
        exact_sums=True,
        scales=False,
    ),
    Case(
        "dare_ties",
        "dare_ties",
        {"normalize": True},
        _sparse,
        off={"weight": 0.0},
        alone={"weight": 2.0, "density": 1.0},
    ),
    Case("slerp", "slerp", {"t": 0.3}, experts=(1, 1), exact_sums=True, scales=False, oracle=_slerp),
    Case(
        "nuslerp",
        "nuslerp",
        {},
        lambda rng: {"weight": float(rng.uniform(0.1, 2))},
        experts=(2, 2),
        off={"weight": 0.0},
        alone={"weight": 1.0},
        mean=True,
        exact_sums=True,
        oracle=_nuslerp,
    ),
    Case(
        "nuslerp-free",
        "nuslerp",
        {},
        lambda rng: {"weight": float(rng.uniform(0.1, 2))},
        experts=(2, 2),
        base=False,
        off={"weight": 0.0},
        alone={"weight": 1.0},
        mean=True,
        exact_sums=True,
        oracle=_nuslerp,
    ),
    Case(
        "multislerp",
        "multislerp",
        {},
        lambda rng: {"weight": float(rng.uniform(0.1, 2))},
        experts=(2, 4),
        mean=True,
        exact_sums=True,
        scales=False,
        oracle=_multislerp,
    ),
    Case(
        "passthrough",
        "passthrough",
        {},
        lambda rng: {"scale": float(rng.choice([0.5, 2.0]))},
        experts=(1, 1),
        base=False,
        alone={},
        oracle=_passthrough,
    ),
    Case(
        "pcb",
        "pcb",
        {"ratio": 0.3, "clip": 0.0},
        lambda rng: {"weight": float(rng.uniform(0.5, 2))},
        off={"weight": 0.0},
        oracle=_pcb,
    ),
    Case("pcb-clipped", "pcb", {"ratio": 0.5, "clip": 0.05, "lambda": 1.2}, off={"weight": 0.0}, oracle=_pcb),
    Case("pcb-A", "pcb", {"variant": "A"}, off={"weight": 0.0}, scales=False, oracle=_pcb),
    Case("pcb-B", "pcb", {"variant": "B"}, off={"weight": 0.0}, scales=False, oracle=_pcb),
    Case("pcb-paper", "pcb", {"variant": "paper"}, off={"weight": 0.0}, oracle=_pcb),
    Case("pcb-global", "pcb", {"scope": "global", "ratio": 0.3}, off={"weight": 0.0}, oracle=_pcb),
]
BY_ID = {case.id: case for case in CASES}
