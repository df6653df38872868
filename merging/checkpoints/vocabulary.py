"""The vocabulary of a model folder: which text has which token number.

Tokenizer files are read as data, with the numbering rule of the ``tokenizers`` library; nothing is executed. Forms
that cannot be read here are known by their digest alone: equal bytes still mean equal vocabularies.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from merging.checkpoints.files import read_whole
from merging.checkpoints.strict_json import parse_json, read_json
from merging.errors import InputError

LARGEST_TOKENIZER = 128_000_000
LARGEST_CONFIG = 8_000_000
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# Vocabularies in a form that is not read here. Equal bytes still mean equal vocabularies.
_OPAQUE = ("spiece.model", "sentencepiece.bpe.model", "spm.model", "tiktoken.model", "tekken.json")
# Whose token number is the position in the SentencePiece file; other classes shift it by some special tokens.
_PLAIN_SENTENCEPIECE = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Token text -> row number, as transformers numbers them. If not ``known``, there is only the digest."""

    tokens: dict[str, int]
    added: dict[str, dict[str, bool]]  # tokens that are matched before the text is cut up, with their FLAGS
    digest: str
    file: str
    known: bool = True
    renumbered: tuple[str, ...] = ()  # added tokens that get another number than the file states

    def same(self, other: Vocabulary) -> bool:
        """Whether every token has the same number in both."""
        if self.known and other.known:
            return self.digest == other.digest or self.tokens == other.tokens
        return self.digest == other.digest


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary of a model folder; None if it has no tokenizer. InputError E_JSON, E_PATH, E_READ.

    Added tokens are numbered on from the end in the order in which they are listed, as the ``tokenizers``
    library does; it does not heed the numbers in the file.
    """
    settings = _read_object(folder / "tokenizer_config.json")
    tiktoken = sorted(n for n in os.listdir(folder) if n.endswith(".tiktoken")) if folder.is_dir() else []
    readers = {
        "tokenizer.json": _tokenizer_json,
        "vocab.json": _vocab_json,
        "vocab.txt": _vocab_txt,
        "tokenizer.model": _sentencepiece,
        **dict.fromkeys((*_OPAQUE, *tiktoken), _unread),
    }
    name = next((name for name in readers if os.path.lexists(folder / name)), None)
    if name is None:
        return None
    raw = read_whole(folder / name, LARGEST_TOKENIZER, "E_JSON")
    tokens, added = readers[name](raw, folder / name, settings)
    own = len(added)
    added += _more_added(folder, settings)
    digest = sha256(raw + json.dumps([(text, number) for text, number, _ in added]).encode()).hexdigest()
    if tokens is None:
        return Vocabulary({}, {}, digest, name, known=False)
    flags_of: dict[str, dict[str, bool]] = {}
    renumbered, number, highest = [], len(tokens), -1
    for position, (text, stated, flags) in enumerate(added):
        if position == own:  # transformers adds the rest when the tokenizer file has been loaded
            number = max(number, highest + 1)
        if not text or text in flags_of:
            continue
        if text not in tokens:
            tokens[text], number = number, number + 1
        highest, flags_of[text] = max(highest, tokens[text]), flags
        if stated not in (tokens[text], _ANY):
            renumbered.append(text)
    return Vocabulary(tokens, flags_of, digest, name, renumbered=tuple(renumbered))


# Reading the formats.

_Added = list[tuple[str, int, dict[str, bool]]]  # text, stated number, flags
_ANY = -1  # a number that is not stated


def _tokenizer_json(raw: bytes, path: Path, settings: dict[str, Any]) -> tuple[dict[str, int] | None, _Added]:
    content = _object(parse_json(raw, str(path)), path)
    added = []
    entries = content.get("added_tokens") or []
    for entry in entries if isinstance(entries, list) else [None]:
        if not (isinstance(entry, dict) and isinstance(_text(entry), str) and type(entry.get("id")) is int):
            _malformed(path, "added_tokens is not a list of tokens with content and id.")
        added.append((entry["content"], entry["id"], token_flags(entry)))
    vocabulary = _object(content.get("model"), path).get("vocab")
    if isinstance(vocabulary, list):  # Unigram: [text, score], numbered by position
        if not all(isinstance(pair, list) and pair and isinstance(pair[0], str) for pair in vocabulary):
            _malformed(path, "An entry of the vocabulary is not a pair of text and score.")
        return _positions([pair[0] for pair in vocabulary]), added
    return _numbered(vocabulary, path), added


def _vocab_json(raw: bytes, path: Path, settings: dict[str, Any]) -> tuple[dict[str, int] | None, _Added]:
    return _numbered(parse_json(raw, str(path)), path), []


def _vocab_txt(raw: bytes, path: Path, settings: dict[str, Any]) -> tuple[dict[str, int] | None, _Added]:
    try:
        lines = raw.decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        _malformed(path, str(error))
    return _positions([line.removesuffix("\r") for line in lines]), []


def _sentencepiece(raw: bytes, path: Path, settings: dict[str, Any]) -> tuple[dict[str, int] | None, _Added]:
    """The pieces of a protobuf ModelProto (field 1) by text (field 1); None if it is something else."""
    if str(settings.get("tokenizer_class")).removesuffix("Fast") not in _PLAIN_SENTENCEPIECE:
        return None, []
    try:
        pieces = [
            next(v for n, v in _fields(value) if n == 1) for number, value in _fields(raw) if number == 1
        ]
        return _positions([piece.decode("utf-8") for piece in pieces]), []
    except (IndexError, ValueError, StopIteration):
        return None, []


def _positions(texts: list[str]) -> dict[str, int] | None:
    """Tokens numbered by their position; None if that is ambiguous."""
    tokens = {text: number for number, text in enumerate(texts)}
    return tokens if tokens and len(tokens) == len(texts) else None


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(field number, bytes) of a protobuf message, numbers as empty bytes. ValueError if it is not one."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while shift < 64:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("not protobuf")

    while position < len(message):
        key = varint()
        length = {0: 0, 1: 8, 5: 4}.get(key & 7, -1)
        if key & 7 == 0:
            varint()
        elif key & 7 == 2:
            length = varint()
        if length < 0 or position + length > len(message):
            raise ValueError("not protobuf")
        yield key >> 3, message[position : position + length]
        position += length


def _unread(raw: bytes, path: Path, settings: dict[str, Any]) -> tuple[dict[str, int] | None, _Added]:
    return None, []


def _more_added(folder: Path, settings: dict[str, Any]) -> _Added:
    """Tokens that stand beside the vocabulary, in the order in which transformers appends those it lacks."""
    more: _Added = []
    decoder, named = settings.get("added_tokens_decoder"), dict(settings)
    if isinstance(decoder, dict):
        for number, entry in decoder.items():
            good = re.fullmatch("[0-9]{1,9}", number) and isinstance(entry, dict) and _text(entry)
            if not good:
                _malformed(folder / "tokenizer_config.json", "added_tokens_decoder is not a table of tokens.")
            more.append((_text(entry), int(number), token_flags(entry)))
    else:  # as tokenizers were saved before that field existed
        named |= _read_object(folder / "special_tokens_map.json")
        numbers = _numbered(_read_object(folder / "added_tokens.json"), folder / "added_tokens.json")
        more += [(text, number, token_flags()) for text, number in numbers.items()]
    more.sort(key=lambda token: token[1])
    special = [named.get(key) for key in _NAMED]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        special += named[key] if isinstance(named.get(key), list) else []
    more += [(_text(token), _ANY, token_flags(token, special=True)) for token in special if _text(token)]
    return more


def _text(token: Any) -> Any:
    """The text of a token that is stated as text or as an object; None if it is neither."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _numbered(content: Any, path: Path) -> dict[str, int]:
    tokens = _object(content, path)
    numbers = tokens.values()
    if tokens and not (set(map(type, numbers)) == {int} and min(numbers) >= 0 and max(numbers) < 1 << 31):
        _malformed(path, "A token's number is not a small positive integer.")
    return tokens


def token_flags(token: Any = None, special: bool = False) -> dict[str, bool]:
    """FLAGS of an added token, and what the library assumes where one is not stated."""
    stated = token if isinstance(token, dict) else {}
    special = bool(stated.get("special", special))
    assumed = dict.fromkeys(FLAGS, False) | {"normalized": not special, "special": special}
    return {flag: bool(stated.get(flag, value)) for flag, value in assumed.items()}


def _read_object(path: Path) -> dict[str, Any]:
    return _object(read_json(path, LARGEST_CONFIG), path) if os.path.lexists(path) else {}


def _object(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        _malformed(path, "Not an object, or it lacks the vocabulary.")
    return content


def _malformed(path: Path, why: str) -> NoReturn:
    raise InputError("E_JSON", f"{path} is malformed.", why, "Restore the file from its source.") from None
