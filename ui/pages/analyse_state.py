"""What the Analyse page asks about, and the answers it holds: inspections, read from the cache of the disk.

A question is the draft's base and experts and the options of the analysis, as JSON text, so that a page can keep it and
see whether it is still the same. An answer is an ``Inspection`` with the parts that are known so far. It is held in
memory under a token that names models, options and parts; a token that was forgotten is looked up again.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from typing import Any

from merging.analysis.inspection import Inspection
from merging.analysis.inspection_run import PARTS, inspect
from merging.errors import AmalgamError, RecipeError
from merging.methods import METHODS, get_method
from merging.recipe_parameters import fields_of

from ..chart import Chart
from ..charts import charts_of
from ..draft import Draft, active, label_of, labels, set_parameter
from .analyse_cells import Map, map_of, metric

WORDS = {
    "doctor": "quick look",
    "changes": "sizes and angles",
    "trimmed": "signs",
    "spectra": "singular values",
    "subspaces": "shared directions",
    "principal": "principal weights",
}
HELD = 4
"""Answers in memory."""


def question_of(draft: Draft, spectra: str, density: float, merged: str | None) -> str:
    """What to ask about this draft. RecipeError, with what to do, if it has no base or no experts."""
    data = active(draft)
    if not data["experts"]:
        raise RecipeError(
            "E_RECIPE_INPUTS", "There is nothing to analyse yet.", "", "Choose experts on the Experts page."
        )
    base = data.get("base")
    if not base:
        why = "A change is the difference between an expert and the model it was made from."
        raise RecipeError("E_RECIPE_INPUTS", "No base is chosen.", why, "Choose it on the Experts page.")
    if isinstance(base, dict):
        what = "A base that is a model with an adapter cannot be analysed."
        raise RecipeError("E_RECIPE_INPUTS", what, "", "Choose a base without an adapter.")
    for expert in data["experts"]:
        if expert.get("adapter") and expert["model"] != base:
            what = f"{label_of(expert)} is an adapter on another model than the base."
            raise RecipeError("E_RECIPE_INPUTS", what, "", "Make the model that it belongs to the base.")
    return json.dumps(
        {
            "base": base,
            "experts": [expert.get("adapter") or expert["model"] for expert in data["experts"]],
            "labels": [label_of(expert) for expert in data["experts"]],
            "merged": merged or None,
            "options": {"spectra": spectra, "density": density},
        }
    )


def arguments_of(question: str, offline: bool = False) -> dict[str, Any]:
    """Of the job that computes the answer."""
    asked = json.loads(question)
    options = {**asked["options"], **({"offline": True} if offline else {})}
    return {"base": asked["base"], "experts": asked["experts"], "merged": asked["merged"], "options": options}


def models_of(question: str) -> list[str]:
    """References of all models that would be read."""
    asked = json.loads(question)
    return [asked["base"], *asked["experts"], *([asked["merged"]] if asked["merged"] else [])]


def is_about(question: str, arguments: dict[str, Any]) -> bool:
    """Whether a job with these arguments answers the question."""
    if not question:
        return False
    options = {k: v for k, v in arguments.get("options", {}).items() if k != "offline"}
    return {**arguments, "options": options} == arguments_of(question)


def wanted_parts(question: str) -> list[str]:
    none = json.loads(question)["options"]["spectra"] == "none"
    return [p for p in PARTS if p in WORDS and not (none and p in ("spectra", "subspaces", "principal"))]


class Answers:
    """Inspections by token, and what was drawn of them. Thread-safe; the oldest is forgotten."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, tuple[str, Inspection, dict[Any, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def look(self, question: str) -> str:
        """The token of what is known about the question, read from the disk; "" if that is nothing. Quick: only headers
        and kept results are read, and the Hub is not asked. AmalgamError if the models cannot be opened."""
        asked = json.loads(question)
        options = asked["options"]
        found = inspect(
            asked["base"], asked["experts"], asked["merged"], spectra=options["spectra"], density=options["density"],
            compute=False, offline=True,
        )  # fmt: skip
        if not found.parts:
            return ""
        marks = [[who, facts["fingerprint"]] for who, facts in found.models.items()]
        identity = json.dumps([question, marks, sorted(found.parts)])
        token = hashlib.sha256(identity.encode()).hexdigest()[:32]
        with self._lock:
            if token not in self._held:
                self._held[token] = question, found, {}
            self._held.move_to_end(token)
            while len(self._held) > HELD:
                self._held.popitem(last=False)
        return token

    def get(self, token: str, question: str = "") -> Inspection | None:
        with self._lock:
            entry = self._held.get(token)
        if entry is None and token and question:
            try:
                entry = self._held.get(self.look(question))
            except AmalgamError:
                return None
        return entry[1] if entry else None

    def chart(self, token: str, question: str, key: str) -> Chart | None:
        """One of the report's charts."""
        found = self.get(token, question)
        made = self._made(token)
        if found is not None and key not in made:
            made |= {chart.key: chart for chart in charts_of(found, key)}
            made.setdefault(key, None)
        return made.get(key)

    def map(self, token: str, question: str, key: str) -> Map | None:
        found, one, made = self.get(token, question), metric(key), self._made(token)
        if found is None or one is None or not getattr(found, one.part):
            return None
        if ("map", key) not in made:
            made["map", key] = map_of(found, one)
        return made["map", key]

    def _made(self, token: str) -> dict[Any, Any]:
        with self._lock:
            entry = self._held.get(token)
        return entry[2] if entry else {}


# -- a condition in the recipe ----------------------------------------------------------------------------------------


def filters_for(result: Inspection, tensor: str) -> list[tuple[str, str]]:
    """(words, filter) of the conditions that a tensor suggests: itself, its module in all layers, its whole layer. A
    filter is a part of the tensor's name."""
    block = result.places[tensor][0]
    found = [(f"this tensor: {tensor}", tensor)]
    if block is None:
        return found
    before, mark, after = tensor.partition(f".{block}.")
    if not mark:
        return found
    stem = before.rsplit(".", 1)[-1]
    layer, module = f"{stem}.{block}.", after.removesuffix(".weight").removesuffix(".bias")
    return [*found, (f"this module in all layers: {module}", module), (f"the whole layer: {layer}", layer)]


def matches(result: Inspection, wanted: str) -> int:
    return sum(wanted in tensor for tensor in result.places)


def weight_problem(draft: Draft) -> str:
    """Why a weight per expert cannot be set; "" if it can."""
    method = draft["recipe"].get("method")
    if method not in METHODS:
        return "Choose a method on the Merge page first: the condition becomes one of its settings."
    if "weight" not in fields_of(get_method(method).PerExpert):
        return f"{get_method(method).title} has no weight per expert."
    return ""


def add_condition(draft: Draft, whose: str, wanted: str, weight: float) -> Draft:
    """Weight ``weight`` for tensors whose name contains ``wanted``, for one expert, or for all (``whose`` ""). It comes
    before what was set, which holds for the other tensors."""
    problem = weight_problem(draft)
    if problem:
        raise RecipeError("E_RECIPE_FIELD", "This cannot become a part of the recipe.", problem)
    if not wanted:
        raise RecipeError("E_RECIPE_FIELD", "No tensor is chosen.", "", "Click on a cell of the map.")
    if not draft["recipe"].get("experts"):
        raise RecipeError("E_RECIPE_INPUTS", "The recipe has no experts.")
    for label in [whose] if whose else labels(draft):
        expert = next((e for e in draft["recipe"]["experts"] if label_of(e) == label), None)
        if expert is None:
            raise RecipeError("E_RECIPE_INPUTS", f"There is no expert {label[:80]!r} any more.")
        setting = expert.get("parameters", {}).get("weight", draft["recipe"].get("parameters", {}).get("weight"))
        draft = set_parameter(draft, ("experts", label, "parameters", "weight"), _with(setting, wanted, weight))
    return draft


def _with(setting: Any, wanted: str, weight: float) -> list[dict[str, Any]]:
    """The setting with a condition before it."""
    if isinstance(setting, list) and setting and isinstance(setting[0], dict):
        rest = [one for one in setting if one.get("filter") != wanted]
    else:
        rest = [] if setting is None else [{"value": setting}]
    return [{"filter": wanted, "value": weight}, *rest]
