"""A LoRA adapter on its base, read as if it were a full model.

An adapter stores, for some weights W, two thin matrices A (rank x in) and B (out x rank). The model that was
trained has

    W' = W + s * B A,      s = alpha / rank,   or alpha / sqrt(rank) with rank-stabilised LoRA (rsLoRA)

(Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732). Here W' is computed when it is
read, in float64, and rounded once: to F32 if W has 16 bits, to F64 if it has more. It is never rounded to
16 bits before the merge.

Every key of the adapter must find its place, exactly once. Whatever changes the result and is not
understood (DoRA, biases inside LoRA, PiSSA, ...) is an error, because an adapter that is applied in part
looks healthy and is wrong.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from merging.checkpoints.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    LARGEST_CONFIG,
    WEIGHTS,
    Checkpoint,
    Source,
    open_weights,
    renamed,
)
from merging.checkpoints.files import read_whole, shown
from merging.checkpoints.layout import head_and_embedding, is_tied
from merging.checkpoints.low_rank import FLOATS, LowRankSource, same_bytes
from merging.checkpoints.strict_json import parse_json
from merging.errors import InputError

# Fields of adapter_config.json that tell how the adapter was trained, not what it computes ...
_HISTORY = {
    "task_type", "auto_mapping", "peft_type", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "modules_to_save", "lora_dropout", "bias",
    "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "eva_config",
    "runtime_config",
}  # fmt: skip
# ... and those that are understood here. Every other field must be empty.
_UNDERSTOOD = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "init_lora_weights",
    "ensure_weight_tying",
}  # fmt: skip
# Starting points that leave the base as it is. The others (pissa, olora, loftq, corda, lora_ga) change it.
_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")

_PREFIX = "base_model.model."
_PARTS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
_LORA_KEY = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _PARTS))})")
_DEFAULT_HEAD = "lm_head.weight"
_PATTERN = re.compile(r"[\w\-.\\^$|()\[\]*+?]{1,512}")
_MATCHING_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Settings:
    """What ``adapter_config.json`` says about the arithmetic."""

    rank: int
    alpha: float
    ranks: dict[str, Any]
    alphas: dict[str, Any]
    stabilised: bool
    transposed: bool
    stay_tied: bool


@dataclass(frozen=True, slots=True)
class _Pair:
    """A and B of one module; ``embedding`` if they were trained on a lookup table."""

    a: Source
    b: Source
    embedding: bool


def open_adapter(folder: Path, names: Collection[str], reference: str, base: Checkpoint | None) -> Checkpoint:
    """Open the adapter in ``folder`` (file names ``names``) on ``base``.

    Raises as ``open_checkpoint`` does.
    """
    raw = read_whole(folder / ADAPTER_CONFIG, LARGEST_CONFIG, "E_JSON")
    config = parse_json(raw, shown(folder / ADAPTER_CONFIG))
    settings = _settings(folder, config)
    _check_files(folder, names)
    if base is None or base.kind == "adapter":
        wanted = config.get("base_model_name_or_path") or "the model that it was trained on"
        _refuse(folder, "It changes a base model, and none was given.", f"Name its base: {wanted!s:.200}.")
    stored, files = open_weights(folder, {ADAPTER_WEIGHTS: None})
    try:
        pairs, replaced, below = _sort_keys(folder, stored)
        config, tensors = _combine(folder, base, settings, pairs, replaced, below)
    except BaseException:
        for file in files:
            file.close()
        raise
    identity = {"adapter_config": hashlib.sha256(raw).hexdigest()}
    return Checkpoint(reference, folder, "adapter", tensors, config, files, base, identity)


def _settings(folder: Path, config: Any) -> _Settings:
    if type(config) is not dict or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if type(config) is dict else None
        _refuse(folder, f"It is of type {kind!a:.80}; only LoRA is a change of weights that can be merged.")
    for field, value in config.items():
        if field not in _HISTORY | _UNDERSTOOD and value not in (None, False, 0, "", [], {}):
            _refuse(folder, f"It uses {field!a:.80}, which is not supported.")
    if config.get("init_lora_weights", True) not in _HARMLESS_STARTS:
        start = config["init_lora_weights"]
        _refuse(
            folder,
            f"It was started with {start!a:.80}, which changes the base before training.",
            "Convert it with PEFT (path_initial_model_for_weight_conversion) and use the result.",
        )
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    flags = [config.get(name) or False for name in ("use_rslora", "fan_in_fan_out", "ensure_weight_tying")]
    sound = (
        type(rank) is int and rank >= 1 and _is_number(alpha) and all(type(flag) is bool for flag in flags)
    )
    sound = (
        sound and type(ranks) is dict and all(type(value) is int and value >= 1 for value in ranks.values())
    )
    if not sound or type(alphas) is not dict or not all(map(_is_number, alphas.values())):
        _refuse(folder, "Ranks must be whole numbers above 0, alphas numbers, and switches true or false.")
    return _Settings(rank, alpha, ranks, alphas, *flags)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _check_files(folder: Path, names: Collection[str]) -> None:
    if WEIGHTS in names or INDEX in names:
        raise InputError(
            "E_AMBIGUOUS",
            f"{shown(folder)} holds an adapter and a full model.",
            "Which of the two is meant cannot be known.",
            "Put the adapter into a folder of its own.",
        )
    if ADAPTER_WEIGHTS not in names:
        if "adapter_model.bin" in names:
            raise InputError(
                "E_NOT_SAFETENSORS",
                f"{shown(folder)} has the adapter only as a Python pickle (adapter_model.bin).",
                "Pickles can run code when they are opened, so they never are.",
                "Load it with PEFT where you trust it, and save it again (safetensors is the default).",
            )
        _refuse(folder, f"{ADAPTER_WEIGHTS} is missing.")


def _sort_keys(
    folder: Path, stored: Mapping[str, Source]
) -> tuple[dict[str, _Pair], dict[str, Source], dict[str, Source]]:
    """The keys, sorted: module -> A and B; tensor -> full replacement; tensor -> what lies under a LoRA."""
    parts: dict[str, dict[str, Source]] = {}
    replaced: dict[str, Source] = {}
    below: dict[str, Source] = {}
    for key, source in stored.items():
        if source.dtype not in FLOATS:
            _refuse(folder, f"{key!a:.200} has the data type {source.dtype}.")
        if not key.startswith(_PREFIX):
            _refuse(folder, f"The key {key!a:.200} does not start with {_PREFIX!r}: PEFT did not write it.")
        name = key[len(_PREFIX) :]
        match = _LORA_KEY.fullmatch(name)
        if match:
            parts.setdefault(match[1], {})[match[2]] = source
        elif ".lora_" in name or ".modules_to_save." in name or ".original_module." in name:
            _refuse(folder, f"The key {key!a:.200} belongs to a kind of LoRA that is not supported.")
        elif ".base_layer." in name:
            below[name.replace(".base_layer.", ".")] = source
        else:
            replaced[name] = source
    pairs: dict[str, _Pair] = {}
    for module, found in parts.items():
        if found.keys() == set(_PARTS[:2]):
            pairs[module] = _Pair(found[_PARTS[0]], found[_PARTS[1]], False)
        elif found.keys() == set(_PARTS[2:]):
            pairs[module] = _Pair(found[_PARTS[2]], found[_PARTS[3]], True)
        else:
            _refuse(folder, f"{module!a:.200} has {', '.join(sorted(found))} but not its counterpart.")
    if not pairs and not replaced:
        _refuse(folder, "It holds no tensors.")
    return pairs, replaced, below


def _combine(
    folder: Path,
    base: Checkpoint,
    settings: _Settings,
    pairs: Mapping[str, _Pair],
    replaced: Mapping[str, Source],
    below: Mapping[str, Source],
) -> tuple[dict[str, Any] | None, dict[str, Source]]:
    """(configuration, tensors) of the base with the adapter applied."""
    head, embedding = head_and_embedding(base.tensors)
    tied = is_tied(base.config, base.tensors)
    targets = [*(f"{module}.weight" for module in pairs), *replaced]
    if tied and embedding:
        head = head_and_embedding(targets)[0] or _DEFAULT_HEAD
    fresh = {head} if tied and head else set()
    places = _places(folder, targets, base.tensors, fresh) | _places(folder, [*below], base.tensors, fresh)
    ground: dict[str, Source] = dict(base.tensors)
    if tied and head and embedding:
        ground[head] = ground[embedding]  # for now; it goes again if nothing parts the two
    for key, source in below.items():
        ground[places[key]] = _fit(folder, source, places[key], ground, {head, embedding})
    if tied and head and embedding and head not in {places[key] for key in below}:
        ground[head] = renamed(ground[embedding], head)
    touched: dict[str, Source] = {}
    for key, source in replaced.items():
        touched[places[key]] = _fit(folder, source, places[key], ground, {head, embedding})
    scales = _scales(folder, pairs, settings)
    turned = _orientations(folder, pairs, places, ground, settings)
    for module, pair in pairs.items():
        name = places[f"{module}.weight"]
        touched[name] = LowRankSource(name, ground[name], pair.a, pair.b, scales[module], turned[module])
    config = dict(base.config) if base.config is not None else None
    tensors = {**ground, **touched}
    if tied and head and embedding and _still_tied(folder, settings, touched, head, embedding, ground):
        del tensors[head]
    elif tied:
        config = _untied(config)
    if config and embedding and config.get("vocab_size") == base.tensors[embedding].shape[0]:
        config["vocab_size"] = tensors[embedding].shape[0]
    return config, tensors


def _places(
    folder: Path, keys: Collection[str], known: Mapping[str, Source], extra: Collection[str]
) -> dict[str, str]:
    """Key of the adapter -> tensor of the base. The two may differ by one leading part ("transformer.h.0",
    "h.0"),
    because PEFT names modules of the model in memory and a base may be saved without its outermost part."""
    heads = sorted({name.split(".", 1)[0] for name in known})
    shifts = [lambda key: key.split(".", 1)[-1], *(lambda key, part=part: f"{part}.{key}" for part in heads)]
    missing = [key for key in keys if key not in known and key not in extra]
    shift = next((shift for shift in shifts if all(shift(key) in known for key in missing)), None)
    if shift is None:
        _refuse(
            folder,
            f"The base has no tensor {missing[0]!a:.200} ({len(missing):,} of {len(keys):,} do not fit).",
            "Check that the base is the model that the adapter was trained on.",
        )
    places = {key: key if key in known or key in extra else shift(key) for key in keys}
    if len(set(names := sorted(places[key] for key in keys))) < len(names):
        twice = next(name for name, following in zip(names, names[1:], strict=False) if name == following)
        _refuse(folder, f"Two keys change {twice!a:.200}.")
    return places


def _fit(
    folder: Path, source: Source, name: str, ground: Mapping[str, Source], tables: Collection[str | None]
) -> Source:
    """``source`` under the name of the tensor that it replaces. Only vocabularies may grow or shrink."""
    old, new = ground[name].shape, source.shape
    if old != new and not (name in tables and len(old) == len(new) == 2 and old[1] == new[1]):
        _refuse(
            folder, f"{name!a:.200} has the shape {list(new)} in the adapter and {list(old)} in the base."
        )
    return renamed(source, name)


def _orientations(
    folder: Path,
    pairs: Mapping[str, _Pair],
    places: Mapping[str, str],
    ground: Mapping[str, Source],
    settings: _Settings,
) -> dict[str, bool]:
    """Module -> whether its weight is stored as (in, out).

    Shapes decide; a square weight follows the setting.
    """
    turned: dict[str, bool] = {}
    square: list[str] = []
    for module, pair in pairs.items():
        below = ground[places[f"{module}.weight"]]
        a, b, w = pair.a.shape, pair.b.shape, below.shape
        if below.dtype not in FLOATS:
            _refuse(folder, f"{below.name!a:.200} has the data type {below.dtype} in the base.")
        if not (len(a) == len(b) == len(w) >= 2 and a[0] == b[1] >= 1 and set(b[2:]) <= {1}):
            _refuse(folder, f"{module!a:.200}: A {list(a)} and B {list(b)} do not make a {list(w)}.")
        plain = not pair.embedding and w == (b[0], *a[1:])
        transposed = w == (a[1], b[0]) and len(w) == 2
        if not plain and not transposed:
            _refuse(folder, f"{module!a:.200}: A {list(a)} and B {list(b)} do not make a {list(w)}.")
        turned[module] = settings.transposed if plain and transposed else transposed
        if plain and transposed:
            square.append(module)
    told = {turned[module] for module, pair in pairs.items() if module not in square and not pair.embedding}
    if square and told and settings.transposed not in told:
        _refuse(
            folder,
            f"fan_in_fan_out is {settings.transposed}, but the shapes of its other weights say otherwise.",
        )
    return turned


def _scales(folder: Path, pairs: Mapping[str, _Pair], settings: _Settings) -> dict[str, float]:
    """Module -> s of W + s * B A."""
    ranks = _matched(folder, settings.ranks, pairs)
    alphas = _matched(folder, settings.alphas, pairs)
    scales: dict[str, float] = {}
    for module, pair in pairs.items():
        rank, alpha = ranks.get(module, settings.rank), alphas.get(module, settings.alpha)
        if pair.a.shape[:1] != (rank,):
            _refuse(
                folder, f"{module!a:.200} has A {list(pair.a.shape)}, but its configuration says rank {rank}."
            )
        scales[module] = alpha / math.sqrt(rank) if settings.stabilised else alpha / rank
    return scales


def _matched(folder: Path, patterns: Mapping[str, Any], modules: Collection[str]) -> dict[str, Any]:
    """Module -> value of the first pattern that matches its end, by PEFT's rule: (.*\\.)?(pattern)$.

    The patterns are regular expressions from a stranger, and some of those run for ever. At most two
    repetitions, none of them of a group, leaves those that people write.
    """
    compiled = []
    for pattern, value in patterns.items():
        repetitions = len(re.findall(r"[*+?{]", pattern))
        if not _PATTERN.fullmatch(pattern) or repetitions > 2 or re.search(r"\)[*+?{]|\(\?|\\[1-9]", pattern):
            _refuse(folder, f"The pattern {pattern!a:.200} is too complicated.")
        try:
            compiled.append((re.compile(rf"(.*\.)?({pattern})$"), value))
        except re.error as error:
            _refuse(folder, f"The pattern {pattern!a:.200} is malformed: {error}.")
    result: dict[str, Any] = {}
    started = time.thread_time()
    for module in modules:
        for expression, value in compiled:
            if expression.match(module):
                result[module] = value
                break
            if time.thread_time() - started > _MATCHING_SECONDS:
                _refuse(folder, "Its rank_pattern or alpha_pattern takes too long to match.")
    return result


def _still_tied(
    folder: Path,
    settings: _Settings,
    touched: Mapping[str, Source],
    head: str,
    embedding: str,
    ground: Mapping[str, Source],
) -> bool:
    """Whether head and embedding of a tied base are still one tensor afterwards.

    PEFT trains an adapter of the embedding apart from the head that shares its weight. What was trained is
    then an untied model, and merging it into the shared tensor would change the head as well (PEFT issue
    2018).
    """
    one, other = touched.get(embedding), touched.get(head)
    if one is None and other is None:
        return True
    if one is not None and other is not None and same_bytes(one, other):
        return True
    if settings.stay_tied:
        if one is None or other is not None or isinstance(one, LowRankSource):
            _refuse(
                folder,
                "It ties its changes of head and embedding (ensure_weight_tying) in an unsupported way.",
            )
        return True
    if other is None and one is not None and one.shape != ground[head].shape:
        _refuse(
            folder,
            f"It resizes {embedding!a:.200} of a tied model but does not bring the head {head!a:.200}.",
        )
    return False


def _untied(config: dict[str, Any] | None) -> dict[str, Any]:
    config = {**(config or {}), "tie_word_embeddings": False}
    if type(config.get("text_config")) is dict:
        config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return config


def _refuse(
    folder: Path, why: str, fix: str = "Merge it into its base with PEFT, and use the result."
) -> NoReturn:
    raise InputError("E_ADAPTER", f"The adapter {shown(folder)} cannot be used.", why, fix) from None
