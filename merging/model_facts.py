"""What a folder or file is, told from headers and side files: the facts that a person chooses models by.

No weight is read. ``describe`` answers for whatever a path leads to: a model, an adapter, a recipe, a merged model that
knows its recipe, or a folder with several of these.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoints.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LARGEST_CONFIG, open_checkpoint, open_weights
from .checkpoints.files import open_plain, read_whole, shown
from .checkpoints.header import ITEM_BITS
from .checkpoints.layout import block_count
from .checkpoints.manifest import NAME as MANIFEST
from .checkpoints.manifest import read_manifest
from .checkpoints.strict_json import parse_json, read_json
from .errors import AmalgamError, InputError
from .model_card import common_license

RECIPES = (".yml", ".yaml", ".json")
MOST_FOUND = 100
"""Models listed of a folder with several."""
_README = 65_536
_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.MULTILINE | re.DOTALL)
_BASE = re.compile(r"^base_model[ \t]*:[ \t]*(\S.*?)?[ \t]*\r?\n((?:[ \t]*-[ \t]+\S.*\n)*)", re.MULTILINE)
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """``kind``: "folder", "file" (one .safetensors) or "adapter"."""

    path: str
    kind: str
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtype: str = ""
    """Of most weights, as config.json calls it."""
    model_type: str = ""
    """Of config.json: llama, qwen2 …; of an adapter: LoRA."""
    blocks: int = 0
    width: int = 0
    licence: str = ""
    bases: tuple[str, ...] = ()
    """What card or configuration name as the model that it was made from."""
    recipe: dict[str, Any] | None = None
    """Of a model that was merged here: how."""


def describe(path: Path) -> ModelFacts:
    """The facts of one model or adapter. Raises what ``open_checkpoint`` raises."""
    path = path.expanduser()
    if path.is_dir() and os.path.lexists(path / ADAPTER_CONFIG):
        return _adapter(path)
    with open_checkpoint(path) as model:
        config, kind, tensors = model.config or {}, model.kind, dict(model.tensors)
    folder = path if kind == "folder" else path.parent
    settings = {**config, **(config["text_config"] if isinstance(config.get("text_config"), dict) else {})}
    facts = _sizes(ModelFacts(str(path), kind), tensors)
    return replace(
        facts,
        model_type=str(config.get("model_type") or "")[:60],
        blocks=block_count(tensors),
        width=_whole(settings.get("hidden_size") or settings.get("n_embd") or settings.get("d_model")),
        licence=_licence(folder) if kind == "folder" else "",
        bases=(*card_bases(folder), *_origin(config)) if kind == "folder" else (),
        recipe=recipe_of_folder(folder) if kind == "folder" else None,
    )


def recipe_of_folder(folder: Path) -> dict[str, Any] | None:
    """The recipe in the manifest of a merged model; None if there is no sound one."""
    if not os.path.lexists(folder / MANIFEST):
        return None
    try:
        recipe = read_manifest(folder).get("recipe")
    except AmalgamError:
        return None
    return recipe if isinstance(recipe, dict) else None


def models_in(folder: Path) -> list[Path]:
    """Folders and files right below ``folder`` that look like models, adapters or recipes, by name."""
    found = []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError("E_READ", f"{shown(folder)} cannot be listed.", f"{error.strerror}.", "") from None
    for entry in entries[:10_000]:
        try:
            names = set(os.listdir(entry.path)) if entry.is_dir() else set()
        except OSError:
            continue
        weights = ADAPTER_CONFIG in names or any(n == "model.safetensors" or n.endswith(".index.json") for n in names)
        if weights or (entry.is_file() and entry.name.endswith((".safetensors", ".yml", ".yaml"))):
            found.append(Path(entry.path))
    return found[:MOST_FOUND]


def card_bases(folder: Path) -> tuple[str, ...]:
    """``base_model`` at the head of a README: names of repositories. (A README is data: a few lines are matched.)"""
    try:
        descriptor = open_plain(folder / "README.md")
    except InputError:
        return ()
    try:
        head = os.pread(descriptor, _README, 0).decode("utf-8", "replace").removeprefix("\ufeff")
    finally:
        os.close(descriptor)
    matter = _MATTER.match(head)
    field = _BASE.search(matter[1] + "\n") if matter else None
    if field is None:
        return ()
    items = [field[1] or "", *re.findall(r"-[ \t]+(\S.*)", field[2] or "")]
    names = [name.strip().strip("'\"") for item in items for name in item.strip("[] \t").split(",")]
    return tuple(dict.fromkeys(name for name in names if _NAME.fullmatch(name)))[:8]


def _adapter(path: Path) -> ModelFacts:
    config = parse_json(read_whole(path / ADAPTER_CONFIG, LARGEST_CONFIG, "E_JSON"), shown(path / ADAPTER_CONFIG))
    config = config if isinstance(config, dict) else {}
    tensors, files = open_weights(path, {ADAPTER_WEIGHTS: None})
    for file in files:
        file.close()
    stated = config.get("base_model_name_or_path")
    named = [stated] if isinstance(stated, str) and stated and len(stated) <= 300 and stated.isprintable() else []
    kind = str(config.get("peft_type") or "adapter")[:30].replace("LORA", "LoRA")
    rank = f", rank {config['r']}" if isinstance(config.get("r"), int) else ""
    return replace(
        _sizes(ModelFacts(str(path), "adapter"), tensors),
        model_type=f"{kind}{rank}",
        licence=_licence(path),
        bases=tuple(dict.fromkeys([*named, *card_bases(path)])),
    )


def _sizes(facts: ModelFacts, tensors: Any) -> ModelFacts:
    kinds: Counter[str] = Counter()
    for source in tensors.values():
        kinds[source.dtype] += source.numel
    main = kinds.most_common(1)[0][0] if kinds else ""
    return replace(
        facts,
        tensors=len(tensors),
        parameters=kinds.total(),
        bytes=sum(count * ITEM_BITS[kind] // 8 for kind, count in kinds.items()),
        dtype=_NAMES.get(main, main),
    )


def _licence(folder: Path) -> str:
    stated = common_license([folder])
    return stated.get("license_name") or stated.get("license", "")


def _origin(config: dict[str, Any]) -> tuple[str, ...]:
    """``_name_or_path``: where the weights were loaded from when training began. Only a name says something."""
    name = config.get("_name_or_path")
    return (name,) if isinstance(name, str) and "/" in name and _NAME.fullmatch(name) else ()


def _whole(value: Any) -> int:
    return value if type(value) is int else 0


def settings_of(folder: Path) -> dict[str, Any]:
    """config.json of a folder, or nothing."""
    try:
        config = read_json(folder / "config.json", LARGEST_CONFIG)
    except InputError:
        return {}
    return config if isinstance(config, dict) else {}
