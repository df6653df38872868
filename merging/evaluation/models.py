"""Models to be judged: what they can do, a key that stands for their content, and loading them.

The one idea: a result belongs to bytes, not to a path. A model's key is a hash of every file that its scores depend on,
so that nothing is evaluated twice, wherever a model lies and whatever it is called, and nothing old is taken for new.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.checkpoints.checkpoint import INDEX, Checkpoint, open_checkpoint
from merging.checkpoints.files import open_plain, read_whole, shown
from merging.checkpoints.manifest import NAME as MANIFEST
from merging.checkpoints.manifest import read_manifest
from merging.checkpoints.side_files import PROCESSOR_FILES, TOKENIZER_FILES
from merging.errors import InputError, VerificationError

if TYPE_CHECKING:
    from merging.networks import Network

CAUSAL, CLASSIFIER, IMAGE = "causal", "classifier", "image"
"""What a model is for: the next token, the class of a text, the class of an image."""
_ENDINGS = {
    "ForCausalLM": CAUSAL,
    "LMHeadModel": CAUSAL,
    "ForSequenceClassification": CLASSIFIER,
    "ForImageClassification": IMAGE,
}
_CONFIGS = ("config.json", "generation_config.json", INDEX)
_CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_LARGEST_SIDE_FILE = 1 << 28
_CHUNK = 1 << 20
_RACY = 2_000_000_000  # ns: a file younger than this could still change without its time changing


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded transformers model with its tokenizer. Load once, evaluate on many tasks.

    ``ends``: the tokens that end a response: the model's own list (chat models have several) and the tokenizer's.
    ``tokenizer``: None for image models. ``context``: the most tokens it can take, None if it does not say.
    """

    folder: Path
    network: Any
    tokenizer: Any
    ends: frozenset[int]
    device: str
    threads: int
    kind: str = CAUSAL
    key: str = ""
    context: int | None = None


# -- before loading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Described:
    """What is known about a model from its config and headers alone. ``context``: None if it does not say."""

    folder: Path
    kind: str
    context: int | None


def describe(folder: str | Path) -> Described:
    """Look at a model folder without loading it: is it readable, and what can it be judged on?

    Raises:
        InputError: ``E_NOT_FOUND``, ``E_NOT_A_MODEL`` and all that ``open_checkpoint`` finds wrong with the files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("E_NOT_FOUND", f"There is no model folder {shown(folder)}.", "", "Check the path.")
    with open_checkpoint_alone(folder) as checkpoint:
        return describe_opened(checkpoint)


def describe_opened(checkpoint: Checkpoint) -> Described:
    """``describe`` of a model that is open already. InputError ``E_NOT_A_MODEL``."""
    folder, config = checkpoint.path, checkpoint.config or {}
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""
    kind = next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), None)
    if kind is None:
        what = f"{shown(folder)} is of the architecture {name[:80] or '(none)'!a}, which cannot be evaluated here."
        why = f"Known are names that end in {', '.join(_ENDINGS)}."
        raise InputError("E_NOT_A_MODEL", what, why, 'See "architectures" in its config.json.')
    if kind != IMAGE and not (folder / "tokenizer.json").is_file():
        why = "To be evaluated, a folder needs config.json, safetensors weights and tokenizer.json."
        raise InputError("E_NOT_A_MODEL", f"{shown(folder)} has no tokenizer.json.", why, "Copy that of its base.")
    stated = [config[name] for name in _CONTEXTS if type(config.get(name)) is int and config[name] > 0]
    return Described(folder, kind, min(stated, default=None))


def open_checkpoint_alone(folder: Path) -> Checkpoint:
    """The model in a folder that is complete by itself: no adapter, with a config.json."""
    if (folder / "adapter_config.json").is_file():
        what = f"{shown(folder)} is an adapter, which is no model without its base."
        raise InputError("E_NOT_A_MODEL", what, "", "Merge it into its base first, and evaluate the result.")
    if not (folder / "config.json").is_file():
        why = "To be evaluated, a folder needs config.json and safetensors weights."
        fix = "Choose a transformers model folder."
        raise InputError("E_NOT_A_MODEL", f"{shown(folder)} has no config.json.", why, fix)
    return open_checkpoint(folder)


def model_key(folder: str | Path, cache: Path | None = None, told: Callable[[int], None] = lambda size: None) -> str:
    """The key of a model's content: SHA-256, as 64 hex digits, over name and SHA-256 of each file that matters.

    It covers the weights (all .safetensors files that the model consists of), config.json, generation_config.json, the
    shard index, tokenizer and chat template files, and image processor files. Not README, manifest or licence.

    The SHA-256 of a weight file is read off the folder's manifest where that is sound, lists the file with its present
    size, and the file was neither written, moved nor replaced since the manifest was (by its change time, which unlike
    the modification time no program can set). Else the file is read and hashed once, and remembered in ``cache`` by
    path, size, inode, modification and change time.

    Args:
        cache: folder for remembered hashes; None remembers nothing.
        told: called with a number of bytes after each piece that was read.

    Raises:
        InputError: what ``open_checkpoint`` finds wrong; ``E_READ``.
    """
    folder = Path(folder)
    with open_checkpoint_alone(folder) as checkpoint:
        weights = sorted(file.path.name for file in checkpoint.files)
    listed = _listed_in_manifest(folder)
    digests = {}
    for name in weights:
        size, digest = listed.get(name, (-1, ""))
        status = os.stat(folder / name)
        fresh = digest and size == status.st_size and status.st_ctime_ns <= os.stat(folder / MANIFEST).st_ctime_ns
        digests[name] = digest if fresh else _hash_of(folder / name, cache, told)
    for name in sorted({*_CONFIGS, *TOKENIZER_FILES, *PROCESSOR_FILES}):
        if (folder / name).is_file():
            digests[name] = hashlib.sha256(read_whole(folder / name, _LARGEST_SIDE_FILE)).hexdigest()
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _listed_in_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    if not (folder / MANIFEST).is_file():
        return {}
    try:
        files = read_manifest(folder)["files"]
    except VerificationError:
        return {}
    return {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}


def _hash_of(path: Path, cache: Path | None, told: Callable[[int], None]) -> str:
    """SHA-256 of a file, from the cache if nothing about the file has changed."""
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    kept = cache / "hashes" / f"{name}.json" if cache is not None else None
    descriptor = open_plain(path)
    with open(descriptor, "rb", buffering=0) as file:
        before = _stamp(descriptor)
        if kept is not None:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                found = json.loads(kept.read_bytes())
                if found["stamp"] == before and len(found["sha256"]) == 64:
                    return str(found["sha256"])
        digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
        try:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                told(count)
        except OSError as error:
            what = f"{shown(path)} cannot be read."
            raise InputError("E_READ", what, f"{error.strerror}.", "Check the disk.") from None
        unchanged = before == _stamp(descriptor) and time.time_ns() - before[-1] > _RACY
    if kept is not None and unchanged:
        with contextlib.suppress(OSError):  # a help, not a need
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps({"stamp": before, "sha256": digest.hexdigest()}))
            os.replace(partial, kept)
    return digest.hexdigest()


def _stamp(descriptor: int) -> list[int]:
    """Equal as long as a file is the same and has not been written to."""
    status = os.fstat(descriptor)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def names_of(paths: Sequence[str | Path]) -> list[str]:
    """A short name for each path: its last part, or as many of its last parts as make all names different."""
    parts = [Path(path).absolute().parts for path in paths]
    names = [Path(*one[-1:]).name or str(path) for one, path in zip(parts, paths, strict=True)]
    for length in range(2, max(map(len, parts), default=0) + 1):
        doubled = {name for name in names if names.count(name) > 1}
        if not doubled:
            break
        names = ["/".join(one[-length:]) if name in doubled else name for name, one in zip(names, parts, strict=True)]
    return names


# -- loading ------------------------------------------------------------------------------------------------------


def load_model(folder: str | Path, *, device: str = "cpu", threads: int = 1, key: str = "") -> Model:
    """Load a model from a local folder, in float32, without any code of its own and without network.

    Args:
        folder: a transformers model folder with safetensors weights and, but for image models, a tokenizer: a causal
            language model, or a classifier of texts or images.
        device: where to compute, as torch names it.
        threads: CPU threads of torch. Small models are fastest with one; many threads on busy cores can be 40 times
            slower than one.
        key: its key, if it is known already.

    Raises:
        InputError: ``E_NOT_FOUND`` no such folder; ``E_NOT_A_MODEL`` nothing that loads as such a model;
            ``E_MISSING_TENSOR``, ``E_EXTRA_TENSOR``, ``E_SHAPE`` when the weights are not those of the config, whose
            gaps would be filled with random numbers; and all that ``open_checkpoint`` finds wrong with the files.
    """
    described = describe(folder)

    from merging.networks import load_network

    with open_checkpoint_alone(described.folder) as checkpoint:
        network = load_network(checkpoint, device=device)
    return as_model(network, described, threads, key or model_key(folder))


def as_model(network: Network, described: Described, threads: int = 1, key: str = "") -> Model:
    """A network that is in memory, ready to be judged. Changes it: its own settings for generation are left out.

    Raises InputError ``E_NOT_A_MODEL`` for a tokenizer that has neither a padding token nor an end token.
    """
    folder, kind, device = described.folder, described.kind, network.device
    module: Any = network.module
    ends: set[int] = set()
    if kind == CAUSAL:
        import transformers

        named = module.generation_config.eos_token_id
        ends = {*(named if isinstance(named, list) else [named]), network.tokenizer.eos_token_id} - {None}
        # generate() fills what a call leaves open from the model's own settings (temperature, penalties, beams …):
        # leave nothing of them, so that decoding is greedy for every model
        module.generation_config = transformers.GenerationConfig()
    if kind != IMAGE and network.tokenizer.pad_token_id is None:
        if network.tokenizer.eos_token_id is None:
            what = f"The tokenizer in {shown(folder)} has neither a padding token nor an end token."
            raise InputError("E_NOT_A_MODEL", what, "", "Name one in tokenizer_config.json.")
        network.tokenizer.pad_token = network.tokenizer.eos_token
    context = network.context if kind == CLASSIFIER else described.context
    return Model(folder, module, network.tokenizer, frozenset(ends), device, threads, kind, key, context)


def encode(model: Model, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text as a causal model reads it: with the beginning token if the tokenizer adds one, without the
    end token that some tokenizers add, because the text is to go on."""
    rows = model.tokenizer(list(texts), return_attention_mask=False)["input_ids"]
    if _adds_end(model):
        rows = [row[:-1] for row in rows]
    return rows


def _adds_end(model: Model) -> bool:
    with_all, without = (model.tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    return bool(with_all) and with_all[-1] in model.ends and with_all[-1:] != without[-1:]


def has_unknown(model: Model, tokens: Sequence[int]) -> bool:
    """Is there a character that the tokenizer lacks?"""
    return model.tokenizer.unk_token_id is not None and model.tokenizer.unk_token_id in tokens
