"""Looking at the models of a draft, each state of their files once: a weight that is typed must not open them again."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merging.checkpoints.hub import Resolved
from merging.errors import AmalgamError
from merging.model_facts import ModelFacts
from merging.preflight import Preflight, preflight

from ..draft import Draft, active, label_of

KEPT = 64
Find = Callable[[str], Resolved]


class Looks:
    """Results of ``preflight``, kept by recipe and files. Threads may share it."""

    def __init__(self, find: Find, out: Path | None = None) -> None:
        self.find, self.out = find, out
        self._done: OrderedDict[str, Preflight] = OrderedDict()
        self._facts: OrderedDict[str, tuple[ModelFacts, str]] = OrderedDict()
        self._lock = threading.Lock()

    def look(self, draft: Draft) -> Preflight:
        data = active(draft)
        key = json.dumps([_without_weights(data), [self._state(name) for name in names_of(data)]], sort_keys=True)
        with self._lock:
            found = self._done.get(key)
        if found is None:
            found = preflight(data, find=self.find, out=self.out)
        with self._lock:
            self._done[key] = found
            self._done.move_to_end(key)
            for model, who in ((data.get("base"), "base"), *((e, label_of(e)) for e in data["experts"])):
                if who in found.facts:
                    self._facts[reference_of(model)] = found.facts[who], found.where[who]
            for kept, most in ((self._done, KEPT), (self._facts, 1000)):
                while len(kept) > most:
                    kept.popitem(last=False)
        return found

    def known(self, model: Any) -> tuple[ModelFacts, str] | None:
        """What an earlier look found of a model, and where it lies; quick."""
        with self._lock:
            return self._facts.get(reference_of(model))

    def _state(self, reference: str) -> Any:
        try:
            path = self.find(reference).path
            entries = sorted(os.scandir(path), key=lambda e: e.name)[:5000] if path.is_dir() else []
            files = [(e.name, e.stat()) for e in entries] if entries else [(path.name, path.stat())]
            return [str(path), [(name, s.st_size, s.st_mtime_ns) for name, s in files]]
        except AmalgamError as error:
            return error.code
        except OSError as error:
            return error.errno


def names_of(data: dict[str, Any]) -> list[str]:
    """Every reference in a recipe's data, once."""
    parts = [
        part if isinstance(part, dict) else {"model": part} for part in (data.get("base"), *data["experts"]) if part
    ]
    return list(dict.fromkeys(part[key] for part in parts for key in ("model", "adapter") if part.get(key)))


def reference_of(model: Any) -> str:
    """A base or an expert as one text."""
    if model is None:
        return ""
    return label_of({**model, "name": None}) if isinstance(model, dict) else str(model)


def _without_weights(data: dict[str, Any]) -> dict[str, Any]:
    """Weights that are plain numbers change nothing that headers tell, except whether they are all 0."""
    weights = [expert.get("parameters", {}).get("weight") for expert in data["experts"]]
    if not any(weights) or not all(type(weight) in (int, float) for weight in weights):
        return data
    experts = [{**e, "parameters": {**e["parameters"], "weight": 1.0}} for e in data["experts"]]
    return {**data, "experts": experts}
