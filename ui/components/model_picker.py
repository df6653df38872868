"""A list of models to choose from: what each is, and what it can be taken for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from merging.checkpoints.hub_cache import CachedModel
from merging.checkpoints.hub_search import FoundModel
from merging.model_facts import ModelFacts

from .actions import button
from .cards import size, text

HUB = "https://huggingface.co/"


@dataclass(frozen=True, slots=True)
class Entry:
    """``facts`` are HTML; ``actions``: (act, label)."""

    reference: str
    title: str
    facts: tuple[str, ...] = ()
    badges: tuple[str, ...] = ()
    actions: tuple[tuple[str, str], ...] = (("expert", "Add as expert"), ("base", "Use as base"))


def picker(entries: Sequence[Entry], empty: str, label: str) -> str:
    """``empty``: what to do when there is nothing (plain text)."""
    if not entries:
        return f'<p class="hint">{text(empty)}</p>'
    items = "".join(_item(entry) for entry in entries)
    return f'<ul class="picker" aria-label="{text(label)}">{items}</ul>'


def _item(entry: Entry) -> str:
    badges = "".join(f' <span class="badge">{text(badge)}</span>' for badge in entry.badges)
    facts = " · ".join(fact for fact in entry.facts if fact)
    buttons = "".join(
        button(act, entry.reference, label, name=f"{label}: {entry.title}") for act, label in entry.actions
    )
    return (
        f'<li class="item"><div><p><b>{text(entry.title)}</b>{badges}</p><p class="quiet">{facts}</p></div>'
        f'<div class="item-actions">{buttons}</div></li>'
    )


def entry_of_cache(model: CachedModel) -> Entry:
    at = "" if "main" in model.branches else f"@{model.commit[:12]}"
    return Entry(
        model.reference,
        model.repo_id + at,
        (size(model.bytes), f"commit {model.commit[:12]}", hub_link(model.repo_id, "card")),
        ("adapter",) if model.is_adapter else (),
        _roles(model.is_adapter),
    )


def entry_of_hub(model: FoundModel) -> Entry:
    bases = ", ".join(hub_link(name, name) for name in model.bases)
    return Entry(
        model.repo_id,
        model.repo_id,
        (
            _count(model.downloads, "downloads last month"),
            _count(model.likes, "likes"),
            f"licence {text(model.licence)}" if model.licence else "licence not stated",
            f"{number(model.parameters)} parameters" if model.parameters else "",
            size(model.bytes) if model.bytes else "",
            f"changed {text(model.changed)}" if model.changed else "",
            f"made from {bases}" if bases else "",
            hub_link(model.repo_id, "card"),
        ),
        tuple(word for word, here in (("adapter", model.is_adapter), ("gated", model.gated)) if here),
        _roles(model.is_adapter),
    )


def entry_of_facts(reference: str, title: str, facts: ModelFacts) -> Entry:
    more = (("recipe", "Restore its recipe"),) if facts.recipe is not None else ()
    badges = ("merged here",) if facts.recipe is not None else ()
    kind = ("adapter",) if facts.kind == "adapter" else ()
    return Entry(reference, title, facts_line(facts), (*kind, *badges), (*_roles(bool(kind)), *more))


def facts_line(facts: ModelFacts) -> tuple[str, ...]:
    """What a card says of a model, as HTML."""
    shape = f", {facts.blocks} layers × {facts.width}" if facts.blocks and facts.width else ""
    return (
        f"{number(facts.parameters)} parameters",
        text(facts.dtype),
        size(facts.bytes),
        f"{text(facts.model_type)}{shape}",
        f"licence {text(facts.licence)}" if facts.licence else "licence not stated",
    )


def hub_link(repo_id: str, label: str) -> str:
    return (
        f'<a href="{HUB}{text(quote(repo_id.split("@")[0]))}" target="_blank" rel="noopener noreferrer">'
        f"{text(label)}</a>"
    )


def number(count: int | None) -> str:
    """862,080 -> "862 k"; 7,241,732,096 -> "7.24 B"."""
    if count is None:
        return "unknown"
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return str(count)


def _count(value: int | None, what: str) -> str:
    return f"{value:,} {what}" if value is not None else ""


def _roles(is_adapter: bool) -> tuple[tuple[str, str], ...]:
    return (("expert", "Add as expert"),) if is_adapter else (("expert", "Add as expert"), ("base", "Use as base"))
