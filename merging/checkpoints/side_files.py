"""The files of a merged model that are not weights: configuration, tokenizer, chat template.

Each file has one declared origin and is copied byte for byte, with three exceptions: config.json has to
describe the weights as they *are* (data type, tied or not, rows, blocks), a tokenizer may get tokens
appended, and a chat template may come from another model than the tokenizer around it.

Python files are never copied, and no template is ever rendered. A link that leads out of a model's folder is
refused, because otherwise somebody else's folder could have your files published.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.checkpoints.files import read_whole
from merging.checkpoints.strict_json import parse_json
from merging.checkpoints.tokenizer import AddedToken
from merging.checkpoints.vocabulary import LARGEST_TOKENIZER, Vocabulary, read_vocabulary
from merging.errors import InputError, RecipeError

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_VOCABULARY_FILES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "spm.model"),
    *("sentencepiece.bpe.model", "tiktoken.model", "tekken.json", "qwen.tiktoken"),
)
TOKENIZER_FILES = (
    *_VOCABULARY_FILES,
    *(TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "merges.txt", "bpe.codes"),
    *("source.spm", "target.spm", *TEMPLATE_FILES),
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
_BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_BLOCK_NUMBERS = ("mlp_only_layers", "moe_layers", "cross_attention_layers")  # lists of block numbers
_NOT_PER_BLOCK = ("architectures", "depths", "hidden_sizes", "pruned_heads")
_PERIODS = (  # that count blocks
    *("max_window_layers", "sliding_window_pattern", "full_attention_interval", "first_k_dense_replace"),
    *("decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step", "attn_layer_period"),
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".gguf", ".onnx", ".index.json")


@dataclass(frozen=True)
class OutputFacts:
    """What config.json has to say about the merged weights."""

    dtype: str  # "bfloat16", "float32" …
    tied: bool | None = None  # embedding and head are one tensor; None: there is no such pair
    rows: int | None = None  # of the token embedding
    blocks: Sequence[int] | None = None  # the donor's block behind each block; None: all, in order


@dataclass(frozen=True)
class SideFiles:
    """Content by file name, whose file it is (the model's name), and what the plan should tell."""

    files: dict[str, bytes]
    origins: dict[str, str]
    notes: list[str]

    def add(self, name: str, content: bytes, origin: str) -> None:
        self.files[name], self.origins[name] = content, origin


def collect(
    folders: Sequence[Path],
    names: Sequence[str],
    facts: OutputFacts,
    donor: int = 0,
    tokenizer: int | None = None,
    added: Sequence[AddedToken] = (),
    chat_template: str | int | None = "auto",
) -> SideFiles:
    """All side files of the merged model.

    ``donor``: the model whose configuration is used, normally the base. ``tokenizer``: whose tokenizer is
    copied (None: the donor's, or the first one if it has none), with the tokens ``added`` appended.
    ``chat_template``: ``auto`` (the donor's; if it has none, the one that all other templates agree on),
    ``most`` (the most frequent one), ``base`` (the donor's), ``none``, a model's index, the text of a Jinja
    template; None: the one that stands with the tokenizer.

    Raises InputError E_JSON, E_PATH, E_READ, E_QUANTIZED, E_VOCABULARY; RecipeError E_RECIPE_FIELD.
    """
    result = SideFiles({}, {}, [])
    if tokenizer is None:
        candidates = (donor, *range(len(folders)))
        tokenizer = next((k for k in candidates if set(_listed(folders[k])) & set(_VOCABULARY_FILES)), donor)

    config = _json(folders[donor], CONFIG)
    if config is None:
        result.notes.append(f"{names[donor]} has no config.json, so the output has none either.")
    else:
        if tokenizer != donor:
            _take_token_ids(config, _json(folders[tokenizer], CONFIG) or {}, names[tokenizer], result.notes)
        result.add(CONFIG, _dump(edit_config(config, facts, result.notes)), names[donor])
    for name, content in _present(folders[donor], PROCESSOR_FILES).items():
        result.add(name, content, names[donor])

    files = _present(folders[tokenizer], TOKENIZER_FILES)
    if added:
        files = extend_tokenizer(files, read_vocabulary(folders[tokenizer]), added, names[tokenizer])
    for name, content in files.items():
        result.add(name, content, names[tokenizer])
    _place_template(result, folders, names, chat_template, donor, tokenizer)
    _place_generation_config(result, folders, names, donor, tokenizer)

    left = sorted(n for n in _listed(folders[donor]) if not _expected(n) and n not in result.files)
    if config is not None and left:
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        result.notes.append(f"Not copied from {names[donor]}: {', '.join(map(repr, left[:8]))}{more}.")
    return result


def edit_config(config: Mapping[str, Any], facts: OutputFacts, notes: list[str]) -> dict[str, Any]:
    """A copy of ``config`` that describes the merged weights; adds to ``notes``. InputError E_QUANTIZED."""
    if config.get("quantization_config"):
        raise InputError(
            "E_QUANTIZED",
            "The configuration says that the weights are quantised.",
            "config.json has a quantization_config, and merged weights are not packed in that way.",
            "Merge the original 16- or 32-bit checkpoints and quantise the result.",
        )
    result: dict[str, Any] = json.loads(json.dumps(config))  # a copy that shares nothing
    if not any("dtype" in part or "torch_dtype" in part for part in _parts(result)):
        result["torch_dtype"] = facts.dtype
    for part in _parts(result):
        for key in ("_name_or_path", "_commit_hash", "quantization_config"):
            part.pop(key, None)
        part.update({key: facts.dtype for key in ("dtype", "torch_dtype") if key in part})
    texts = list(_parts(result, _TEXT_CONFIGS))
    if facts.tied is not None:
        for part in texts:
            part["tie_word_embeddings"] = facts.tied
    if facts.rows is not None:
        owners = [part for part in texts if "vocab_size" in part] or texts[-1:]
        for part in owners:
            part["vocab_size"] = facts.rows
    if facts.blocks is not None:
        _restack(texts, list(facts.blocks), notes)
    if config.get("auto_map"):
        notes.append("config.json asks for Python files of its own (auto_map); such files are not copied.")
    return result


def extend_tokenizer(
    files: Mapping[str, bytes], vocabulary: Vocabulary | None, added: Sequence[AddedToken], where: str
) -> dict[str, bytes]:
    """Tokenizer files with ``added`` appended, so that transformers gives these tokens exactly these numbers.

    Edits tokenizer.json and, where they list added tokens, tokenizer_config.json and added_tokens.json.
    InputError E_VOCABULARY without a tokenizer.json.
    """
    if "tokenizer.json" not in files or vocabulary is None:
        raise InputError(
            "E_VOCABULARY",
            f"{where} has no tokenizer.json, so no tokens can be appended.",
            f"The other models have {len(added):,} more tokens, such as {added[0].text!r}.",
            "Open it once with transformers.AutoTokenizer and save it; or set the tokenizer source to base.",
        )
    contents = {
        name: parse_json(files[name], f"{name} of {where}")
        for name in ("tokenizer.json", TOKENIZER_CONFIG, "added_tokens.json")
        if name in files
    }
    # The library numbers by order, so tokens that only the other files list have to come before the new ones.
    listed = [AddedToken(text, vocabulary.tokens[text], flags) for text, flags in vocabulary.added.items()]
    entries = contents["tokenizer.json"].get("added_tokens") or []
    known = {entry["content"] for entry in entries}
    contents["tokenizer.json"]["added_tokens"] = entries + [
        {"id": token.id, "content": token.text, **token.flags} for token in (*listed, *added) if token.text not in known
    ]
    decoder = contents.get(TOKENIZER_CONFIG, {}).get("added_tokens_decoder")
    if isinstance(decoder, dict):
        decoder |= {str(token.id): {"content": token.text, **token.flags} for token in (*listed, *added)}
    else:
        contents.pop(TOKENIZER_CONFIG, None)
    if "added_tokens.json" in contents:
        contents["added_tokens.json"] |= {token.text: token.id for token in added}
    return dict(files) | {
        name: json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        for name, content in contents.items()
    }


# config.json


def _parts(config: dict[str, Any], names: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """``config`` and the configurations nested in it, of any name or of ``names``."""
    yield config
    for key, part in config.items():
        wanted = key in names if names else key.endswith("_config") and key != "quantization_config"
        if wanted and isinstance(part, dict):
            yield from _parts(part, names)


def _restack(texts: list[dict[str, Any]], blocks: list[int], notes: list[str]) -> None:
    """Make the configuration describe the blocks ``blocks`` of the donor, in that order."""
    holders = [(part, key) for part in texts for key in _BLOCK_COUNTS if isinstance(part.get(key), int)]
    if not holders:
        notes.append(f"config.json does not state the number of blocks; the output has {len(blocks)}.")
    for part, key in holders:
        before, part[key] = part[key], len(blocks)
        if blocks == list(range(before)):
            continue
        for name, value in list(part.items()):
            if not isinstance(value, list) or name in _NOT_PER_BLOCK or name.endswith(("_id", "_ids")):
                continue
            if name in _BLOCK_NUMBERS:
                part[name] = [new for new, old in enumerate(blocks) if old in value]
            elif len(value) == before:
                if max(blocks, default=0) >= before:
                    raise RecipeError(
                        "E_RECIPE_UNSUPPORTED",
                        f"config.json lists {name!r} for {before} blocks.",
                        f"The recipe takes block {max(blocks)} of another model, which is not among them.",
                        "Use the model with more blocks as the base.",
                    )
                part[name] = [value[old] for old in blocks]
                notes.append(f"{name!r} in config.json was put into the order of the output's blocks.")
        periods = [name for name in _PERIODS if part.get(name) is not None]
        if periods and blocks != list(range(len(blocks))):
            notes.append(f"Check {', '.join(periods)} in config.json: they count blocks, which were moved.")


def _take_token_ids(config: dict[str, Any], other: Mapping[str, Any], origin: str, notes: list[str]) -> None:
    """Token numbers belong to the tokenizer, so they come from the model whose tokenizer is used."""
    taken = []
    for key in config:
        if key.endswith(("_token_id", "_token_index")) and key in other and config[key] != other[key]:
            config[key] = other[key]
            taken.append(key)
    if taken:
        notes.append(f"{', '.join(taken)} in config.json are those of {origin}, whose tokenizer is used.")


# Chat template and generation settings


def _place_template(
    result: SideFiles,
    folders: Sequence[Path],
    names: Sequence[str],
    choice: str | int | None,
    donor: int,
    tokenizer: int,
) -> None:
    """Leave exactly the chosen chat template in ``result``."""
    templates = [_template(folder) for folder in folders]
    if isinstance(choice, str) and ("{{" in choice or "{%" in choice):
        new: dict[str, Any] = {TEMPLATE_FILES[0]: choice.encode()}
        origin = "the recipe"
    else:
        chosen = _choose(templates, names, choice, donor, tokenizer, result.notes)
        if chosen == tokenizer:
            return
        new = {} if chosen is None else templates[chosen]
        origin = "" if chosen is None else names[chosen]
    if TOKENIZER_CONFIG in result.files:
        settings = parse_json(result.files[TOKENIZER_CONFIG], TOKENIZER_CONFIG)
        if settings.get("chat_template") != new.get(TOKENIZER_CONFIG):
            settings.pop("chat_template", None)
            if TOKENIZER_CONFIG in new:
                settings["chat_template"] = new[TOKENIZER_CONFIG]
            result.files[TOKENIZER_CONFIG] = _dump(settings)
    elif isinstance(new.get(TOKENIZER_CONFIG), str):
        new = {TEMPLATE_FILES[0]: new[TOKENIZER_CONFIG].encode(), **new}
    for name in TEMPLATE_FILES:
        result.files.pop(name, None)
        result.origins.pop(name, None)
        if name in new:
            result.add(name, new[name], origin)


def _choose(
    templates: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    choice: str | int | None,
    donor: int,
    tokenizer: int,
    notes: list[str],
) -> int | None:
    """The model whose template is used; None for no template."""
    having = [k for k, template in enumerate(templates) if template]
    texts = [json.dumps(templates[k]["text"]) for k in having]
    if choice is None:
        return tokenizer
    if choice == "base" or (choice == "auto" and templates[donor]):
        return donor
    if choice == "most" and having:
        return having[texts.index(max(texts, key=texts.count))]
    if choice == "auto" and len(set(texts)) == 1:
        notes.append(f"The chat template is that of {names[having[0]]}; {names[donor]} has none.")
        return having[0]
    if choice == "auto" and having:
        who = ", ".join(names[k] for k in having)
        notes.append(f"The chat templates of {who} differ, so none is written; choose one of these models.")
    if choice in ("auto", "most", "none"):
        return None
    if isinstance(choice, int) and 0 <= choice < len(names) and templates[choice]:
        return choice
    who = names[choice] if isinstance(choice, int) and 0 <= choice < len(names) else repr(str(choice)[:80])
    raise RecipeError(
        "E_RECIPE_FIELD",
        f"There is no chat template in {who}.",
        "chat_template is auto, most, base, none, one of the models, or the text of a Jinja template.",
        "Choose a model that has a chat template.",
    )


def _template(folder: Path) -> dict[str, Any]:
    """The chat template of a folder: where it stands -> content, and ``text``; empty if it has none."""
    found: dict[str, Any] = {}
    if inside := (_json(folder, TOKENIZER_CONFIG) or {}).get("chat_template"):
        found |= {"text": inside, TOKENIZER_CONFIG: inside}
    if content := _present(folder, ["chat_template.json"]):
        found |= {"text": (_json(folder, "chat_template.json") or {}).get("chat_template"), **content}
    if content := _present(folder, ["chat_template.jinja"]):  # counts before the others
        found |= {"text": content["chat_template.jinja"].decode("utf-8", "replace"), **content}
    return found


def _place_generation_config(
    result: SideFiles, folders: Sequence[Path], names: Sequence[str], donor: int, tokenizer: int
) -> None:
    """Take generation_config.json from the tokenizer's model (it holds token numbers), else from the donor,
    else the one that the others agree on; and tell if another model stops at a token that it does not list.
    """
    contents = {k: c for k, folder in enumerate(folders) for c in _present(folder, [GENERATION]).values()}
    origin = next((k for k in (tokenizer, donor) if k in contents), None)
    if origin is None and len(set(contents.values())) == 1:
        origin = min(contents)
        result.notes.append(f"{GENERATION} is that of {names[origin]}; {names[donor]} has none.")
    if origin is None:
        if contents:
            result.notes.append(f"{GENERATION} is not written: {names[donor]} has none, the others' differ.")
        return
    result.add(GENERATION, contents[origin], names[origin])
    ends = {k: _end_tokens(content, str(folders[k] / GENERATION)) for k, content in contents.items()}
    for k in contents:
        if not ends[k] <= ends[origin]:
            extra = _texts(folders[k], ends[k]) - _texts(folders[origin], ends[origin])
            if extra:
                result.notes.append(
                    f"{names[k]} also stops at {', '.join(sorted(extra))}, which is not in {GENERATION} of "
                    f"{names[origin]}; if the merged model does not stop, add it to eos_token_id."
                )


def _texts(folder: Path, numbers: set[int]) -> set[str]:
    """The tokens with these numbers, or the numbers themselves if the tokens are not known."""
    vocabulary = read_vocabulary(folder)
    texts = {number: repr(text) for text, number in vocabulary.tokens.items()} if vocabulary else {}
    return {texts.get(number, str(number)) for number in numbers}


def _end_tokens(content: bytes, where: str) -> set[int]:
    settings = parse_json(content, where)
    ends = settings.get("eos_token_id") if isinstance(settings, dict) else None
    return {end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)}


# Files


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _listed(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _expected(name: str) -> bool:
    """Nobody wonders where this file is: the merged model has its own."""
    return name.startswith(".") or name.endswith(_WEIGHTS) or name in ("README.md", "manifest.json")


def _present(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Those of the files that exist, with their bytes."""
    paths = {name: folder / name for name in names}
    return {n: read_whole(p, LARGEST_TOKENIZER, "E_JSON") for n, p in paths.items() if os.path.lexists(p)}


def _json(folder: Path, name: str) -> dict[str, Any] | None:
    for content in _present(folder, [name]).values():
        value = parse_json(content, str(folder / name))
        if isinstance(value, dict):
            return value
        raise InputError("E_JSON", f"{folder / name} is no JSON object.", "", "Restore it from its source.")
    return None
