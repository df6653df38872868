"""Settings to start a method with: what its authors used, or what was chosen for the demo on validation items.

A method's own defaults are neutral: they keep every entry and change no length, so TIES or DARE with nothing but
defaults do not trim at all. Whoever picks a method wants it to do what it is known for. The table below says with which
numbers it was published, and where; they are a place to start from, and no promise for other models.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from merging.methods import get_method
from merging.recipe_parameters import fields_of

from .draft import DEMO, Draft, active, label_of, set_method


@dataclass(frozen=True, slots=True)
class Suggestion:
    """``shared``: of the merge as a whole. ``expert``: the same for each expert. ``source``: where this is from."""

    shared: dict[str, Any] = field(default_factory=dict)
    expert: dict[str, Any] = field(default_factory=dict)
    source: str = ""


SUGGESTED: dict[str, Suggestion] = {
    "linear": Suggestion({}, {"weight": 1.0}, "equal shares, as model soups do (arXiv 2203.05482)"),
    "task_arithmetic": Suggestion(
        {"lambda": 1.0}, {"weight": 0.4}, "MergeBench with 5 language experts; the paper has 0.3 for 8 image tasks"
    ),
    "ties": Suggestion(
        {"lambda": 1.0}, {"weight": 1.0, "density": 0.2}, "the paper: the largest 20 % stay (arXiv 2306.01708)"
    ),
    "dare_linear": Suggestion(
        {"lambda": 1.0}, {"weight": 0.4, "density": 0.2}, "MergeBench: 80 to 90 % are dropped; experts with large "
        "changes need a density of 0.6 to 0.7 (arXiv 2503.20641)"
    ),
    "dare_ties": Suggestion(
        {"lambda": 0.4, "normalize": False}, {"weight": 1.0, "density": 0.2},
        "MergeBench: 80 % dropped, sums of the agreeing changes times 0.4",
    ),
    "pcb": Suggestion(
        {"lambda": 1.2, "ratio": 0.1}, {"weight": 1.0}, "the authors' code: 5 to 20 % stay, λ = 1.2 for images and "
        "0.8 to 2.2 for T5"
    ),
    "slerp": Suggestion({"t": 0.5}, {}, "half way, as FusionBench does"),
    "nuslerp": Suggestion({}, {"weight": 1.0}, "half way between the two"),
    "multislerp": Suggestion({}, {"weight": 1.0}, "equal shares"),
    "passthrough": Suggestion({}, {}, "copies as it is"),
}  # fmt: skip
"""For models that nothing is known about."""

ON_DEMO = "chosen for these four experts on validation items, which are not the ones that scores are shown for"


def suggestion_for(draft: Draft, method: str) -> Suggestion:
    """For the bundled experts what was found for them, else what the literature says."""
    if _is_demo(draft):
        found = next((merge for merge in _demo_settings()["merges"] if merge["method"] == method), None)
        if found is not None:
            known = fields_of(get_method(method).PerExpert)
            own = {name: value for name, value in found["experts"].items() if name in known}
            return Suggestion(dict(found["parameters"]), own, ON_DEMO)
    return SUGGESTED[method]


def choose(draft: Draft, method: str) -> Draft:
    """Change the method. One that was set up before comes back as it was; a new one starts as suggested."""
    if draft["recipe"].get("method") == method:
        return draft
    before = method in draft["kept"]
    new = set_method(draft, method)
    return new if before else suggested(new)


def suggested(draft: Draft) -> Draft:
    """The draft with its method's suggested settings, all others at their defaults."""
    new = copy.deepcopy(draft)
    start = suggestion_for(draft, new["recipe"]["method"])
    new["recipe"]["parameters"] = dict(start.shared)
    for expert in new["recipe"]["experts"]:
        expert["parameters"] = dict(start.expert)
    return new


def is_as_suggested(draft: Draft) -> bool:
    """Do the settings mean what is suggested, however they are written down?"""
    other = suggested(draft)
    return _effective(draft) == _effective(other)


def in_words(start: Suggestion) -> str:
    """ "λ 1.2, ratio 0.1; each expert: density 0.2"."""
    shared = ", ".join(_setting(*pair) for pair in start.shared.items())
    own = ", ".join(_setting(*pair) for pair in start.expert.items())
    return "; ".join(filter(None, [shared, f"each expert: {own}" if own else ""])) or "nothing to set"


def _setting(name: str, value: Any) -> str:
    shown = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
    return f"{'λ' if name == 'lambda' else name} {f'{shown:g}' if isinstance(shown, float) else shown}"


def _effective(draft: Draft) -> Any:
    data = active(draft)
    kind, common = get_method(data["method"]), data.get("parameters", {})
    shared, own = fields_of(kind.Shared), fields_of(kind.PerExpert)
    return (
        {name: common.get(name, f.default) for name, f in shared.items()},
        {
            label_of(e): {n: e.get("parameters", {}).get(n, common.get(n, f.default)) for n, f in own.items()}
            for e in data["experts"]
        },
    )


def _is_demo(draft: Draft) -> bool:
    data = active(draft)
    if data.get("base") != str(DEMO / "base"):
        return False
    known = {str(DEMO / "experts" / name) for name in _demo_settings()["experts"]}
    return {e["model"] for e in data["experts"] if not e.get("adapter")} == known and len(data["experts"]) == len(known)


@lru_cache(maxsize=1)
def _demo_settings() -> dict[str, Any]:
    return json.loads(Path(DEMO / "settings.json").read_text("utf-8"))
