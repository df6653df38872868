"""From what a recipe calls a model (``./folder``, ``file.safetensors``, ``org/name@revision``) to its files.

``parse_reference`` only reads the text and looks whether a path exists. ``resolve`` returns a local path; for
a model on the Hugging Face Hub it asks the Hub, downloads the few files that a merge needs and checks each of
them (see ``download.py``). What was used is pinned: ``Resolved.reference`` is ``org/name@<commit>``, even if
the user asked for a branch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HubError, InputError
from .download import Download, Progress, RepositoryCache
from .hub_client import Listing, NoSuchModel, list_files, similar_names
from .strict_json import read_json

SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"

# All that a merge reads or copies, besides weights. Not: other formats, optimizer state, code.
SIDE_FILES = frozenset(
    [
        "README.md",  # states the licence
        *["config.json", "generation_config.json", "adapter_config.json"],
        *["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"],
        *["tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "tekken.json"],
        *["vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"],
        *["preprocessor_config.json", "processor_config.json"],
    ]
)
_TEMPLATE = re.compile(r"additional_chat_templates/[A-Za-z0-9_][A-Za-z0-9_.-]{0,90}\.jinja")
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
_INDEX_LIMIT = 64 << 20

_OWNER_AND_NAME = re.compile(r"\b[\w.-]+\b/\b[\w.-]+\b", re.ASCII)  # as huggingface_hub's validate_repo_id
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9][A-Za-z0-9._+-]*)*")
_WEB_ADDRESS = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)|hf:/)/(?:models/)?([\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve)/([^/?#]+))?(?:[/?#].*)?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Reference:
    """Either ``path`` (something on this machine) or ``repo_id`` and ``revision`` (a model on the Hub)."""

    path: Path | None = None
    repo_id: str = ""
    revision: str = "main"

    @property
    def kind(self) -> str:
        return "hub" if self.path is None else "local"


@dataclass(frozen=True, slots=True)
class Resolved:
    """Where a model lies.

    ``path``: the folder or file on this machine. ``reference``: text for the record, ``org/name@<commit>`` or
    the path as the user wrote it. ``warnings``: what the user should know before trusting the result.
    """

    path: Path
    reference: str
    repo_id: str = ""
    commit: str = ""
    warnings: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------- reading the text


def parse_reference(text: str) -> Reference:
    """``org/name[@revision]`` or the path of something that exists.

    What exists on this machine wins. What looks like a path (``./x``, ``/x``, ``~/x``, ``C:x``, a backslash,
    a ``.safetensors`` file) never goes to the Hub. Raises InputError E_NOT_FOUND for a path to nothing,
    HubError E_HUB_REFERENCE for text that can be neither.
    """
    if text.strip() and _exists(text):
        return Reference(Path(text).expanduser())
    if not text.strip() or not text.isprintable() or len(text) > 4096:
        raise HubError(
            "E_HUB_REFERENCE",
            f"{_show(text)} names no model.",
            "It is empty, too long, or holds characters that cannot be seen.",
            "Write a path or org/name.",
        )
    if re.match(r"[./~]|[A-Za-z]:(?!//)", text) or "\\" in text or text.endswith(".safetensors"):
        fix = _nearby(text) or "Check the path."
        raise InputError("E_NOT_FOUND", f"There is nothing at {_show(text)}.", "", fix)
    if "://" in text or _WEB_ADDRESS.fullmatch(text):
        raise HubError(
            "E_HUB_REFERENCE",
            f"{_show(text)} is a web address.",
            "Models are named, not addressed; nothing is downloaded from elsewhere.",
            _without_address(text),
        )
    repo_id, at, revision = text.partition("@")
    if not _OWNER_AND_NAME.fullmatch(repo_id):
        raise InputError(
            "E_NOT_FOUND",
            f"There is nothing at {_show(text)}, and it is not the name of a model on the Hub either.",
            "Models on the Hub are named org/name or org/name@revision.",
            _nearby(text) or "Check the path, or write org/name.",
        )
    if len(repo_id) > 96 or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise HubError(
            "E_HUB_REFERENCE",
            f"{_show(repo_id)} cannot be the name of a model on the Hub.",
            "Names have at most 96 characters, no '--', no '..' and do not end with '.git'.",
            _nearby(text) or "Check the name.",
        )
    unusable = len(revision) > 200 or ".." in revision or ".lock" in revision
    if at and (unusable or not _REVISION.fullmatch(revision)):
        raise HubError(
            "E_HUB_REFERENCE",
            f"{_show(revision)} cannot be a revision of {repo_id}.",
            "After @ comes a branch, a tag or a commit.",
            f"Write {repo_id}@main, for example.",
        )
    return Reference(repo_id=repo_id, revision=revision or "main")


def split_adapter(text: str) -> tuple[str, str | None]:
    """``"model+lora"`` -> (``"model"``, ``"lora"``), each with its own ``@revision``; no plus: (text, None).

    A path that exists as it stands is never split. Raises HubError E_HUB_REFERENCE.
    """
    if "+" not in text or _exists(text):
        return text, None
    base, _, adapter = text.partition("+")
    if not base.strip() or not adapter.strip() or "+" in adapter:
        raise HubError(
            "E_HUB_REFERENCE",
            f"{_show(text)} is not of the form model+adapter.",
            "One model and one adapter, with one plus sign between them.",
            "If a folder's name holds a plus sign, rename the folder.",
        )
    return base.strip(), adapter.strip()


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, forbidden, NUL, no such user
        return False


def _show(text: str) -> str:
    """User text for a message: in quotes, one line, nothing invisible."""
    return repr(text if len(text) <= 120 else text[:119] + "…")


def _nearby(text: str) -> str:
    """``Did you mean ./experts/math?`` when something of a similar name exists, else an empty text."""
    try:
        path = Path(text).expanduser()
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError, RuntimeError):
        return ""
    lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(path.name.lower(), lower, n=1)
    if not close:
        return ""
    found = str(path.parent / lower[close[0]])
    return f"Did you mean {found if path.is_absolute() else './' + found}?"


def _without_address(text: str) -> str:
    found = _WEB_ADDRESS.fullmatch(text)
    if not found:
        return "Write org/name, or download the model yourself and give its folder."
    return f"Write {found.group(1)}{'@' + found.group(2) if found.group(2) else ''}."


# ----------------------------------------------------------------------------------------- fetching the files


def resolve(text: str, *, offline: bool = False, progress: Progress | None = None) -> Resolved:
    """The local folder (or file) of a model; what came from the Hub has been checked byte for byte.

    ``progress(done_bytes, total_bytes, file_name)`` is called while files are received or checked; an
    exception from it stops the work, and what was received is kept for the next time. ``offline`` (or
    HF_HUB_OFFLINE=1): only the cache is looked at, and nobody asks whether this user may still read a private
    model, so do not offer it to users who share a cache.

    Raises HubError (exit 4): E_HUB_REFERENCE, E_HUB_NOT_FOUND, E_HUB_GATED, E_HUB_OFFLINE, E_HUB_CHECKSUM,
    E_HUB_NETWORK; InputError: E_NOT_FOUND, E_NOT_SAFETENSORS, E_NOT_A_MODEL, E_INDEX, E_PATH; OutputError:
    E_NO_SPACE, E_OUTPUT_WRITE (the cache).
    """
    reference = parse_reference(text)
    if reference.path is not None:
        return Resolved(reference.path, text)
    from huggingface_hub import constants

    repo_id, revision = reference.repo_id, reference.revision
    cache = RepositoryCache(repo_id)
    offline = offline or constants.HF_HUB_OFFLINE
    listing = cache.listing(revision) if offline else _ask(repo_id, revision, cache)
    download = Download(listing, cache, offline)
    shards: set[str] | None = None
    if INDEX in listing.files and SINGLE not in listing.files:
        shards = _shards(download.bring([INDEX]) / INDEX, f"{repo_id}@{listing.commit}")
    needed = _needed(listing, shards, offline)
    path = download.bring(needed, progress)
    if not offline:
        cache.remember_listing(listing, needed)
    return Resolved(path, f"{repo_id}@{listing.commit}", repo_id, listing.commit, _warnings(listing, offline))


def _ask(repo_id: str, revision: str, cache: RepositoryCache) -> Listing:
    try:
        return list_files(repo_id, revision)
    except HubError as error:
        hints = []
        if isinstance(error, NoSuchModel) and (similar := similar_names(repo_id)):
            hints = [f"Did you mean {' or '.join(similar)}?"]
        if error.code == "E_HUB_OFFLINE" and cache.commit_of(revision):
            hints = ["Or use the copy in the cache: set HF_HUB_OFFLINE=1."]
        hints += [hint for hint in [_nearby(repo_id)] if hint]
        raise HubError(error.code, error.what, error.why, " ".join([error.fix, *hints])) from None


def _needed(listing: Listing, shards: set[str] | None, offline: bool) -> list[str]:
    """Names of the files to bring, out of all that the commit holds."""
    names, where = listing.files.keys(), f"{listing.repo_id}@{listing.commit}"
    needed = [name for name in names if name in SIDE_FILES or _TEMPLATE.fullmatch(name)]
    if ADAPTER in names:
        needed.append(ADAPTER)
    if SINGLE in names:
        needed.append(SINGLE)
    elif shards is not None:
        if missing := sorted(shards - names):
            raise _missing_shards(missing, where, offline)
        needed += [INDEX, *sorted(shards)]
    elif ADAPTER not in names:
        raise _no_weights(names, where, offline)
    return needed


def _shards(index: Path, where: str) -> set[str]:
    """The weight files that an index names; each must be a plain name in the same folder."""
    try:
        content: Any = read_json(index, _INDEX_LIMIT)
    except InputError as error:
        raise InputError("E_INDEX", f"{INDEX} of {where} is unusable.", error.why, _TELL_OWNER) from None
    mapping = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(x, str) for x in mapping.values()):
        raise InputError("E_INDEX", f"{INDEX} of {where} names no weight files.", "", _TELL_OWNER)
    shards = set(mapping.values())
    for name in sorted(shards):
        if not _SHARD.fullmatch(name) or ".." in name:
            raise InputError(
                "E_PATH",
                f"{INDEX} of {where} names the weight file {_show(name)}.",
                "Only plain names of .safetensors files in the same folder are followed.",
                _TELL_OWNER,
            )
    return shards


_TELL_OWNER = "Choose another revision, or tell the owner of the repository."


def _missing_shards(missing: list[str], where: str, offline: bool) -> HubError | InputError:
    some = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
    if offline:
        what = f"The cache lacks {len(missing)} weight files of {where}."
        return HubError("E_HUB_OFFLINE", what, f"Missing: {some}.", "Go online once (unset HF_HUB_OFFLINE).")
    what = f"{INDEX} of {where} names {len(missing)} files that the repository lacks."
    return InputError("E_INDEX", what, f"Missing: {some}.", _TELL_OWNER)


def _no_weights(names: Collection[str], where: str, offline: bool) -> HubError | InputError:
    if offline:
        what = f"The cache holds no weights of {where}."
        return HubError("E_HUB_OFFLINE", what, "", "Go online once (unset HF_HUB_OFFLINE).")
    others = sorted(name for name in names if name.endswith(_OTHER_WEIGHTS))
    if others:
        return InputError(
            "E_NOT_SAFETENSORS",
            f"{where} has no safetensors weights.",
            f"It holds {others[0]}{' and others' if len(others) > 1 else ''}. Formats that can run code when "
            "they are loaded, or hold quantised weights, are not read.",
            "Look for a revision or a copy of the model with model.safetensors, or convert it: "
            "https://huggingface.co/spaces/safetensors/convert.",
        )
    return InputError(
        "E_NOT_A_MODEL",
        f"{where} has neither model.safetensors nor {INDEX} nor {ADAPTER} at its top.",
        "",
        "Check that this is the repository of a language or vision model in the transformers layout.",
    )


def _warnings(listing: Listing, offline: bool) -> tuple[str, ...]:
    where, warnings = f"{listing.repo_id}@{listing.commit[:12]}", []
    if SINGLE in listing.files and INDEX in listing.files:
        warnings.append(f"{where} holds {SINGLE} and {INDEX}; the former is used, as transformers does.")
    if offline:
        warnings.append(f"{where} comes from the cache; the Hub was not asked whether you may still use it.")
    if not listing.complete:
        warnings.append(f"{where} was brought by another tool; side files may be missing from the cache.")
    return tuple(warnings)
