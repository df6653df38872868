"""mergekit's parameters: which there are, where they count, and what they are called here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .recipe_parameters import Path, RecipeProblem, quoted, suggestion

_CONSENSUS = ({"int8_mask", "normalize", "rescale", "lambda"}, {"weight", "density"})
PARAMETERS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"normalize"}, {"weight"}),
    "slerp": ({"t"}, set()),
    "nuslerp": ({"nuslerp_row_wise", "nuslerp_flatten"}, {"weight"}),
    "multislerp": ({"normalize_weights", "eps"}, {"weight"}),
    "task_arithmetic": _CONSENSUS,
    "ties": _CONSENSUS,
    "dare_linear": _CONSENSUS,
    "dare_ties": _CONSENSUS,
    "passthrough": (set(), {"scale"}),
}
"""mergekit's parameters of the methods that both have: those of the merge, and those of each model."""
ELSEWHERE = {"gamma", "epsilon", "select_topk", "filter_wise", "max_iter", "tol", "r", "alpha"}
"""Parameters of mergekit's other methods; a recipe may hold them as leftovers."""
BASE_IS_A_MODEL = {"linear", "passthrough"}
"""Methods without a base: in the ``models`` form mergekit adds ``base_model`` to the models."""
OTHER_METHODS = {
    "karcher",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "sce",
    "model_stock",
    "arcee_fusion",
    "nearswap",
    "ram",
    "ramplus_tl",
}
KNOWN = {name for names in PARAMETERS.values() for level in names for name in level} | ELSEWHERE

RESCALE_NOTE = (
    "DARE: survivors are multiplied by 1/density; mergekit multiplies by the ratio of L1 norms (native form: "
    "rescale: l1). The random numbers differ too."
)
SWITCHES = {"normalize", "normalize_weights", "rescale", "nuslerp_row_wise", "nuslerp_flatten"}


class ParameterReader:
    """Native settings from mergekit's. ``note`` takes a line for everything that has no effect."""

    def __init__(self, method: str, note: Callable[[str], None]) -> None:
        self.method, self.note = method, note
        self.shared, self.own = PARAMETERS[method]

    def read(self, data: Any, path: Path, level: str) -> dict[str, Any]:
        """One level: "merge", "slice", "model", or "base" (a model that is the base)."""
        if not isinstance(data, Mapping):
            raise RecipeProblem(path, f"{quoted(data)} is not a mapping of parameters.")
        result: dict[str, Any] = {}
        for name, value in data.items():
            here = (*path, name)
            if name not in KNOWN:
                raise RecipeProblem(
                    here,
                    f"unknown parameter {quoted(name)}.",
                    "mergekit would ignore it.",
                    suggestion(name, self.shared | self.own),
                )
            if name not in self.shared | self.own:
                self.note(f"{name} has no effect in {self.method} (in mergekit neither).")
            elif level == "base":
                self.note(
                    f"Parameters of the base have no effect in {self.method} (in mergekit neither): {name}."
                )
            elif level == "model" and name in self.shared:
                self.note(f"{name} has no effect under a model, only under parameters (as in mergekit).")
            else:
                result.update(self._translated(name, [value] if isinstance(value, Mapping) else value, here))
        return result

    def _translated(self, name: str, value: Any, path: Path) -> dict[str, Any]:
        if name == "int8_mask":
            self.note("int8_mask saves memory in mergekit and changes no number; it has no effect here.")
            return {}
        if name in ("density", "rescale") and self.method == "task_arithmetic":
            self.note(f"{name} has no effect in task_arithmetic (in mergekit neither).")
            return {}
        if name in SWITCHES:
            value = self._switch(value, path)
        if name == "rescale":
            return self._rescale(value, path)
        if name.startswith("nuslerp_"):
            if value is not (name == "nuslerp_flatten"):
                raise RecipeProblem(
                    path,
                    "only whole tensors are supported, not rows or columns.",
                    fix="Leave it out.",
                    code="E_RECIPE_UNSUPPORTED",
                )
            return {}
        return {name: value}

    def _switch(self, value: Any, path: Path) -> Any:
        """true or false in all the ways that mergekit's reader takes for it (YAML 1.1, 0 and 1)."""
        words = {"yes": True, "on": True, "1": True, "no": False, "off": False, "0": False}
        if not isinstance(value, list):
            return words.get(str(value).lower(), value) if isinstance(value, str | int) else value
        if any(not isinstance(v, Mapping) for v in value):
            raise RecipeProblem(path, "a switch cannot change with depth.", code="E_RECIPE_UNSUPPORTED")
        return [
            {**v, "value": self._switch(v["value"], (*path, i, "value"))} if "value" in v else v
            for i, v in enumerate(value)
        ]

    def _rescale(self, value: Any, path: Path) -> dict[str, Any]:
        if not isinstance(value, bool):
            raise RecipeProblem(
                path, f"rescale is true or false, not {quoted(value)}.", code="E_RECIPE_UNSUPPORTED"
            )
        if self.method == "ties":
            if value:
                raise RecipeProblem(
                    path,
                    "ties with rescale is not supported.",
                    fix="Leave it out, or use dare_ties.",
                    code="E_RECIPE_UNSUPPORTED",
                )
            return {}
        if value:
            self.note(RESCALE_NOTE)
        return {"rescale": "inverse" if value else "none"}


def always_set(setting: Any) -> bool:
    """Does the setting have a value for every tensor?"""
    conditions = isinstance(setting, list) and any(isinstance(v, Mapping) for v in setting)
    return not conditions or any(isinstance(v, Mapping) and v.get("filter") in (None, "*") for v in setting)


def fall_through(nearer: Any, farther: Any) -> Any:
    """One setting that acts like two levels: ``nearer`` where it has a value, else ``farther``."""
    if farther is None or always_set(nearer):
        return nearer
    conditions = isinstance(farther, list) and any(isinstance(v, Mapping) for v in farther)
    return [*nearer, *(farther if conditions else [{"value": farther}])]
