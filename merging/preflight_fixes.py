"""What could be done about a finding, as changes of the recipe that one click can make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .analysis.finding import Finding

Change = tuple[tuple[str | int, ...], Any]
"""(place in the recipe's data, new value)."""


@dataclass(frozen=True, slots=True)
class Fix:
    """``action``: "set" (with ``changes``), or "base" (take ``model`` as the base), "remove" or "rest" (the expert
    ``model`` sits out), "adapter" (its model is an adapter of the base), "download" or "headers" (``model``: references
    to the Hub, one a line, to bring or to look at)."""

    label: str
    action: str
    model: str = ""
    changes: tuple[Change, ...] = ()

    def holds(self, data: Mapping[str, Any]) -> bool:
        """Does the recipe say so already?"""
        return self.action == "set" and all(_at(data, place) == value for place, value in self.changes)


@dataclass(frozen=True, slots=True)
class Check:
    """A finding, the expert that it is about (or "base", or nobody), and what one click can do about it."""

    finding: Finding
    who: str = ""
    fixes: tuple[Fix, ...] = ()
    settled: str = ""
    """The fix that the recipe has already."""


def change(label: str, *changes: Change) -> Fix:
    return Fix(label, "set", changes=changes)


def take_out(label: str) -> tuple[Fix, Fix]:
    return Fix(f"Switch {label} off", "rest", label), Fix(f"Remove {label}", "remove", label)


def with_fixes(finding: Finding, data: Mapping[str, Any], templates: Sequence[str], adapters: Sequence[str]) -> Check:
    """A finding of the doctor with what can be done about it. ``templates``: who has a chat template; ``adapters``:
    the bases that the adapters name."""
    offered: tuple[Fix, ...] = ()
    if finding.severity != "ok":
        offered = _fixes(finding.code, templates, adapters)
    settled = next((fix.label for fix in offered if fix.holds(data)), "")
    return Check(finding, "", tuple(fix for fix in offered if not fix.holds(data)), settled)


def _fixes(code: str, templates: Sequence[str], adapters: Sequence[str]) -> tuple[Fix, ...]:
    match code:
        case "tokenizer" | "E_VOCABULARY":
            return (
                change("Keep the base's tokens", (("tokenizer", "source"), "base")),
                change("Keep everybody's tokens", (("tokenizer", "source"), "union")),
            )
        case "vocabulary_rows":
            places = ("include", "embeddings"), ("include", "head")
            return (change("Leave embedding and head as in the base", *((place, False) for place in places)),)
        case "tied_head":
            return (change("Keep the head out of the merge", (("include", "head"), False)),)
        case "dtype":
            return (change("Write float32", (("dtype",), "float32")),)
        case "chat_template":
            return tuple(change(f"Use the template of {who}", (("chat_template",), who)) for who in templates[:4])
        case "adapter_base":
            return tuple(Fix(f"Use {name} as the base", "base", name) for name in adapters[:3])
        case "E_MISSING_TENSOR":
            return (change("Take what is missing from the base", (("policies", "missing_tensors"), "base")),)
        case "E_EXTRA_TENSOR":
            return (
                change("Drop what only some have", (("policies", "extra_tensors"), "drop")),
                change("Copy what only some have", (("policies", "extra_tensors"), "copy")),
            )
    return ()


def _at(data: Any, place: Sequence[str | int]) -> Any:
    for step in place:
        data = data.get(step) if isinstance(data, Mapping) else None
    return data
