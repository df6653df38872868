"""Amalgam's engine: merge models that were fine-tuned from one base.

    from merging import load_recipe, make_plan, run, verify

    with make_plan(load_recipe("recipe.yml").recipe) as plan:
        print(plan.as_dict())          # what it would do and cost; no weight was read
        result = run(plan, "merged")   # reads, merges, writes, verifies
    assert verify(result.folder).ok

Names are loaded when they are first used, so importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints.checkpoint import Checkpoint, open_checkpoint
    from .checkpoints.verify import VerifyReport, verify
    from .engine import Progress, Result, run
    from .errors import AmalgamError
    from .methods import METHODS, get_method, make
    from .methods.scan import merge_tensors
    from .plan import Plan, make_plan
    from .recipe import Recipe
    from .recipe_yaml import load_recipe, to_yaml

_HOME = {
    "AmalgamError": "errors", "Checkpoint": "checkpoints.checkpoint", "METHODS": "methods", "Plan": "plan",
    "Progress": "engine", "Recipe": "recipe", "Result": "engine", "VerifyReport": "checkpoints.verify",
    "get_method": "methods", "load_recipe": "recipe_yaml", "make": "methods", "make_plan": "plan",
    "merge_tensors": "methods.scan", "open_checkpoint": "checkpoints.checkpoint", "run": "engine",
    "to_yaml": "recipe_yaml", "verify": "checkpoints.verify",
}  # fmt: skip

__all__ = [
    "METHODS", "AmalgamError", "Checkpoint", "Plan", "Progress", "Recipe", "Result", "VerifyReport", "get_method",
    "load_recipe", "make", "make_plan", "merge_tensors", "open_checkpoint", "run", "to_yaml", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
