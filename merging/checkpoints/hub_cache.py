"""What of the Hub is on this computer already, without asking anybody and without reading a weight.

``hub.resolve`` checks every byte before a merge; a look at headers needs none of that. So ``find_here`` gives the
folder in which the files of a model lie, as far as they are here, and ``cached_models`` lists all of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HubError, InputError
from .download import RepositoryCache
from .hub import ADAPTER, INDEX, SINGLE, Resolved, parse_reference
from .strict_json import read_json


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One commit of a repository in the cache of Hugging Face."""

    repo_id: str
    commit: str
    branches: tuple[str, ...]
    bytes: int
    path: Path
    used: float
    """When one of its files was last read, as seconds since 1970."""
    is_adapter: bool

    @property
    def reference(self) -> str:
        """``org/name``, or with the revision where that is not main."""
        if "main" in self.branches:
            return self.repo_id
        return f"{self.repo_id}@{self.branches[0] if self.branches else self.commit}"


def find_here(text: str) -> Resolved:
    """Where a model lies on this computer; for headers and side files only, nothing is checked.

    Raises what ``parse_reference`` raises; HubError E_HUB_OFFLINE if it is not here.
    """
    reference = parse_reference(text)
    if reference.path is not None:
        return Resolved(reference.path, text)
    cache = RepositoryCache(reference.repo_id)
    commit = cache.commit_of(reference.revision)
    if commit is None or not _has_weights(cache.snapshot(commit)):
        raise HubError(
            "E_HUB_OFFLINE",
            f"{reference.repo_id}@{reference.revision} is not on this computer yet.",
            "It is a model of the Hugging Face Hub.",
            "Download it, or look at its headers on the Hub first.",
        )
    return Resolved(cache.snapshot(commit), f"{reference.repo_id}@{commit}", reference.repo_id, commit)


def cached_models() -> list[CachedModel]:
    """All models and adapters with safetensors weights in the cache, the last used first."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):
        return []
    found = [
        CachedModel(
            repository.repo_id,
            revision.commit_hash,
            tuple(sorted(revision.refs)),
            revision.size_on_disk,
            revision.snapshot_path,
            repository.last_accessed,
            _is_adapter(revision.snapshot_path),
        )
        for repository in repositories
        if repository.repo_type == "model"
        for revision in repository.revisions
        if _has_weights(revision.snapshot_path)
    ]
    return sorted(found, key=lambda model: (-model.used, model.repo_id, model.commit))


def _has_weights(folder: Path) -> bool:
    """All weight files of a model, or of an adapter, are there."""
    if os.path.exists(folder / SINGLE) or os.path.exists(folder / ADAPTER):
        return True
    try:
        table: Any = read_json(folder / INDEX, 64 << 20)["weight_map"]
        return all(os.path.exists(folder / str(name)) for name in set(table.values()))
    except (InputError, KeyError, TypeError, AttributeError):
        return False


def _is_adapter(folder: Path) -> bool:
    return os.path.exists(folder / ADAPTER) and not any(os.path.exists(folder / name) for name in (SINGLE, INDEX))
