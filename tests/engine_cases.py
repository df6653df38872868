"""What the tests of the engine share: methods with settings, and one family of models for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from merging.methods import BLOCK, make
from merging.methods.scan import merge_tensors
from merging.recipe import Recipe
from tests.small_checkpoints import State, family, llama_like, load, recipe

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    id: str
    method: str
    shared: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    experts: int = 2
    base: bool = True


CASES = [
    Case("linear", "linear", own={"weight": 0.7}, base=False),
    Case("task_arithmetic", "task_arithmetic", {"lambda": 0.6}, {"weight": 0.7}),
    Case("ties", "ties", own={"weight": 0.7, "density": 0.3}),
    Case("ties-global", "ties", {"scope": "global"}, {"weight": 0.7, "density": 0.3}),
    Case("dare_ties", "dare_ties", own={"weight": 0.7, "density": 0.4}),
    Case("dare-l1", "dare_linear", {"rescale": "l1"}, {"weight": 0.7, "density": 0.4}),
    Case("slerp", "slerp", {"t": 0.3}, experts=1),
    Case("nuslerp", "nuslerp", own={"weight": 0.7}),
    Case("multislerp", "multislerp", own={"weight": 0.7}),
    Case("passthrough", "passthrough", own={"scale": 1.5}, experts=1, base=False),
    Case("pcb", "pcb"),
    Case("pcb-paper", "pcb", {"variant": "paper"}),
    Case("pcb-global", "pcb", {"scope": "global"}),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
ONE_OF_EACH_KIND = [c for c in CASES if c.id in ("ties", "pcb-global")]


def recipe_for(case: Case, paths: list[Path], **fields: Any) -> Recipe:
    experts = [(path, case.own) for path in paths[1 : case.experts + 1]]
    return recipe(case.method, experts, paths[0] if case.base else None, parameters=case.shared, seed=5, **fields)


def in_memory(case: Case, paths: list[Path]) -> State:
    """The same merge without engine and files."""
    base, *experts = [load(path) for path in paths[: case.experts + 1]]
    method = make(case.method, case.shared, [case.own] * case.experts)
    floats = {name for name, tensor in base.items() if tensor.is_floating_point()}
    models = [{n: t for n, t in m.items() if n in floats} for m in (base, *experts)]
    merged = merge_tensors(method, models[0] if case.base else None, models[1:], seed=5)
    first = base if case.base else experts[0]
    return {name: merged.get(name, tensor) for name, tensor in first.items()}


@dataclass
class Zoo:
    """One family of models in two layouts: a file each, and three shards each."""

    paths: list[Path]
    sharded: list[Path]
    results: dict[str, State] = field(default_factory=dict)

    def expected(self, case: Case) -> State:
        if case.id not in self.results:
            self.results[case.id] = in_memory(case, self.paths)
        return self.results[case.id]


def make_zoo(folder: Path) -> Zoo:
    """Tensors of many blocks and of none, bfloat16 close to the base: full of entries of equal magnitude."""
    generator = torch.Generator().manual_seed(0)
    state = llama_like(3, 24, dtype=torch.bfloat16)
    state["model.embed_tokens.weight"] = (torch.randn(1000, 280, generator=generator) * 0.02).bfloat16()
    state["lm_head.weight"] = (torch.randn(1000, 280, generator=generator) * 0.02).bfloat16()
    state |= {"scalar": torch.tensor(0.5).bfloat16(), "one": torch.tensor([0.25]).bfloat16(),
              "empty": torch.zeros(0, 4).bfloat16(), "counter": torch.arange(7)}  # fmt: skip
    assert state["lm_head.weight"].numel() > 4 * BLOCK
    return Zoo(family(folder / "1", state, 2, scale=1e-3), family(folder / "3", state, 2, scale=1e-3, shards=3))
