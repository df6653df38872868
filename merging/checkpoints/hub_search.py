"""Looking for models on the Hugging Face Hub: one request, and only when somebody asks.

What comes back was written by strangers: every field is checked for its form, and whatever has another one is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import HubError
from .header import ITEM_BITS
from .hub_client import _check_token, _get, _nonsense, explain, request_failures

MOST = 40
_FIELDS = ("downloads", "likes", "tags", "safetensors", "gated", "lastModified")
_REPOSITORY = re.compile(r"(?!.*(--|\.\.))[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_WORD = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A repository as the Hub describes it. Numbers are None where it says nothing."""

    repo_id: str
    is_adapter: bool
    downloads: int | None
    likes: int | None
    licence: str
    parameters: int | None
    bytes: int | None
    bases: tuple[str, ...]
    gated: bool
    changed: str
    """The day of its last change, as 2025-03-31."""


def search_models(words: str, adapters: bool = False) -> list[FoundModel]:
    """The models (or adapters) with safetensors weights whose names hold ``words``, most downloaded first.

    Raises HubError E_HUB_OFFLINE, E_HUB_NETWORK, E_HUB_GATED, E_HUB_REFERENCE (nothing to search for).
    """
    from huggingface_hub import constants

    words = " ".join(words.split())
    if not words or len(words) > 200 or not words.isprintable():
        raise HubError("E_HUB_REFERENCE", "There is nothing to search for.", "", "Type a part of the model's name.")
    if constants.HF_HUB_OFFLINE:
        what, fix = "Offline mode is on: the Hub was not asked.", "Turn it off in the settings, or use local models."
        raise HubError("E_HUB_OFFLINE", what, "", fix)
    _check_token()
    parameters: dict[str, Any] = {
        "search": words, "filter": ["safetensors", "peft"] if adapters else ["safetensors"], "sort": "downloads",
        "limit": str(MOST), "expand": list(_FIELDS),
    }  # fmt: skip
    try:
        answer = _get("/api/models", **parameters).json()
    except request_failures() as error:
        problem = explain(error, "the list of models", "main")
        fix = f"{problem.fix} What is on this computer can be used without the Hub."
        raise HubError(problem.code, problem.what, problem.why, fix) from None
    except ValueError:
        raise _nonsense("a search", "It is no list of models.") from None
    if not isinstance(answer, list):
        raise _nonsense("a search", "It is no list of models.")
    found = [_model(entry) for entry in answer[:MOST] if isinstance(entry, dict)]
    return [model for model in found if model is not None and model.is_adapter == adapters]


def _model(entry: dict[str, Any]) -> FoundModel | None:
    name = entry.get("id")
    if not isinstance(name, str) or not _REPOSITORY.fullmatch(name):
        return None
    tags = [tag for tag in entry.get("tags") or [] if isinstance(tag, str)]
    types = entry["safetensors"].get("parameters") if isinstance(entry.get("safetensors"), dict) else None
    counts = {k: n for k, n in types.items() if k in ITEM_BITS and _count(n)} if isinstance(types, dict) else {}
    licences = [tag[8:] for tag in tags if tag.startswith("license:") and _WORD.fullmatch(tag[8:])]
    changed = str(entry.get("lastModified") or "")[:10]
    return FoundModel(
        name,
        "peft" in tags,
        _count(entry.get("downloads")),
        _count(entry.get("likes")),
        licences[0] if licences else "",
        sum(counts.values()) or None,
        sum(n * ITEM_BITS[k] // 8 for k, n in counts.items()) or None,
        _bases(tags),
        bool(entry.get("gated")),
        changed if re.fullmatch(r"\d{4}-\d\d-\d\d", changed) else "",
    )


def _bases(tags: list[str]) -> tuple[str, ...]:
    """From tags as base_model:org/name and base_model:finetune:org/name."""
    named = [tag.split(":")[-1] for tag in tags if tag.startswith("base_model:")]
    return tuple(dict.fromkeys(name for name in named if _REPOSITORY.fullmatch(name)))[:8]


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
