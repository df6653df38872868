"""How weights are combined: one file per method, and the table of them.

``get_method("ties")`` gives the class; a method's file is loaded when it is first asked for.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence

from ..errors import RecipeError
from .base import BLOCK, Block, Method, Parameters, Scan, Workspace

METHODS: dict[str, str] = {
    "linear": "linear:Linear",
    "slerp": "spherical:Slerp",
    "nuslerp": "spherical:NuSlerp",
    "multislerp": "spherical:MultiSlerp",
    "task_arithmetic": "task_arithmetic:TaskArithmetic",
    "ties": "ties:Ties",
    "dare_linear": "dare:DareLinear",
    "dare_ties": "dare:DareTies",
    "pcb": "pcb:Pcb",
    "passthrough": "passthrough:Passthrough",
}
"""Name -> module:class."""


def get_method(name: str) -> type[Method]:
    """The method called ``name``; RecipeError E_RECIPE_METHOD with the nearest names if there is none."""
    if name not in METHODS:
        near = difflib.get_close_matches(str(name).lower().replace("-", "_"), METHODS, n=2, cutoff=0.5)
        raise RecipeError(
            "E_RECIPE_METHOD",
            f"There is no method {name!r}.",
            f"Did you mean {' or '.join(near)}?" if near else "",
            f"Methods: {', '.join(METHODS)}.",
        )
    module, cls = METHODS[name].split(":")
    return getattr(importlib.import_module(f".{module}", __name__), cls)


def make(name: str, shared: dict | None = None, experts: Sequence[dict] = ()) -> Method:
    """The method ``name`` with parameters given as plain dicts: ``make("ties", {"lambda": 1}, [{"weight": .5}])``."""
    cls = get_method(name)
    return cls(cls.Shared(**(shared or {})), [cls.PerExpert(**e) for e in experts])


__all__ = ["BLOCK", "METHODS", "Block", "Method", "Parameters", "Scan", "Workspace", "get_method", "make"]
