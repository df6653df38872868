"""Which row of an embedding belongs to which token, and how the rows of several models are matched.

An embedding is a table with one row per token number. Two models of one family may number tokens differently:
one fine-tune adds ``<|im_start|>``, another adds ``[PAD]`` at the same place. Averaging row 32,000 with row
32,000 then mixes two unrelated words, and the merged model speaks fluent nonsense. So rows are matched by the
*text* of their token: ``align`` says for each model which of its rows goes where, and what stands in where it
has none; ``aligned`` reads the tensors that way. Tables are often longer than the vocabulary (152,064 rows for
151,665 tokens); such padding rows are kept.

Tokenizer files are read as data, with the numbering rule of the ``tokenizers`` library; nothing is executed.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from merging.checkpoints.checkpoint import RowsSource, Source
from merging.checkpoints.files import read_whole
from merging.checkpoints.header import item_size
from merging.checkpoints.strict_json import parse_json, read_json
from merging.errors import InputError, RecipeError

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
    added: dict[str, dict[str, bool]]  # tokens outside of the model's own list, with their FLAGS
    model_size: int  # number of tokens in the model's own list
    highest_added: int  # highest number of an added token, -1 without any
    digest: str
    file: str
    known: bool = True
    renumbered: tuple[str, ...] = ()  # added tokens that get another number than the file states

    def same(self, other: Vocabulary) -> bool:
        """Whether every token has the same number in both."""
        if self.known and other.known:
            return self.digest == other.digest or self.tokens == other.tokens
        return self.digest == other.digest


@dataclass(frozen=True)
class AddedToken:
    """A token to append to the output's tokenizer."""

    text: str
    id: int
    flags: dict[str, bool]


@dataclass(frozen=True)
class TokenRule:
    """What a recipe wants for one token: the row for models that lack it or, with ``force``, for all of them.

    ``model`` None is a row of zeros. ``row`` picks a row of that model, by number or by its token; None is
    the token's own row there.
    """

    model: int | None
    row: int | str | None = None
    force: bool = False


@dataclass(frozen=True, eq=False)
class Alignment:
    """How the vocabulary tensors of all models (embedding, head, bias of the head) fit together.

    Row r of the output is merged from row ``row_of[i][r]`` of each model i. Where that is -1 the model has no
    such row and takes the *default*: the mean, over all models m with ``default[m, r] >= 0``, of their rows
    ``default[m, r]``. Without any such m it is the average of all rows of the model itself if ``average[r]``,
    else zeros.
    """

    rows: int
    row_of: list[np.ndarray]  # per model: int64 (rows,)
    default: np.ndarray  # int64 (models, rows)
    average: np.ndarray  # bool (rows,)
    tokenizer: int | None  # whose tokenizer files the output gets
    added: list[AddedToken]
    identical: bool  # the tensors can be merged as they lie, without any map
    notes: list[str]


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary of a model folder; None if it has no tokenizer. InputError E_JSON, E_PATH, E_READ."""
    settings: dict[str, Any] = {}
    if os.path.lexists(folder / "tokenizer_config.json"):
        settings = _object(
            read_json(folder / "tokenizer_config.json", LARGEST_CONFIG), folder / "tokenizer_config.json"
        )
    opaque = [n for n in os.listdir(folder) if n.endswith(".tiktoken")] if folder.is_dir() else []
    readers = dict.fromkeys((*_OPAQUE, *sorted(opaque)), _nothing)
    readers = {
        "tokenizer.json": _tokenizer_json,
        "vocab.json": _vocab_json,
        "vocab.txt": _vocab_txt,
        "tokenizer.model": _sentencepiece,
    } | readers
    name = next((name for name in readers if os.path.lexists(folder / name)), None)
    if name is None:
        return None
    raw = read_whole(folder / name, LARGEST_TOKENIZER, "E_JSON")
    tokens, added = readers[name](raw, folder / name, settings)
    added += _more_added(folder, settings)
    digest = sha256(raw + json.dumps([(text, number) for text, number, _ in added]).encode()).hexdigest()
    if tokens is None:
        return Vocabulary({}, {}, 0, -1, digest, name, known=False)
    size, highest, flags_of, renumbered = len(tokens), -1, dict[str, dict[str, bool]](), []
    for text, stated, flags in added:
        if text and text not in flags_of:
            number = tokens.setdefault(text, next_number(size, highest))
            highest = max(highest, number)
            flags_of[text] = flags
            if stated not in (number, -1):
                renumbered.append(text)
    return Vocabulary(tokens, flags_of, size, highest, digest, name, renumbered=tuple(renumbered))


def next_number(model_size: int, highest_added: int) -> int:
    """The number that the ``tokenizers`` library gives the next added token, whatever its file says."""
    return max(highest_added + 1, model_size)


def align(
    vocabularies: Sequence[Vocabulary | None],
    rows: Sequence[int],
    source: str | int = "auto",
    base_index: int | None = 0,
    tokens: Mapping[str, TokenRule] | None = None,
    pad_to_multiple_of: int | None = None,
    names: Sequence[str] | None = None,
) -> Alignment:
    """Match the embedding rows of models by token text.

    ``rows[i]``: rows of model i's embedding. ``source``: whose token numbers the output has.
    ``auto`` and ``union``: the base's (without a base, the first model's), then the tokens that only others
    have, in the order of the models. ``base`` or a model's index: exactly that vocabulary.
    A model that lacks a token takes the base's row for it, else the mean of the models that have it, so its
    task vector is zero there. Padding rows are kept, and merged with others' padding rows of the same number.

    InputError E_VOCABULARY if rows cannot be matched, RecipeError E_RECIPE_FIELD for an impossible rule.
    """
    names = list(names) if names else [f"model {index}" for index in range(len(rows))]
    rules = dict(tokens or {})
    first, everyone, notes = _assume(vocabularies, rows, source, base_index, names)
    same = [vocabulary.same(everyone[first]) for vocabulary in everyone]
    if rules or not all(same):
        _require_known(everyone, first, names)
    models = _Models(everyone, rows, names, first, same, union=source in ("auto", "union"))
    ids, added = _output_tokens(models, rules)

    # Rows of tokens: found[k, t] is the row that model k has for token t.
    numbers = np.fromiter(ids.values(), np.int64, len(ids))
    found = np.full((len(rows), len(ids)), -1, np.int64)
    for k, vocabulary in enumerate(everyone):
        if same[k]:
            found[k, : len(vocabulary.tokens)] = numbers[: len(vocabulary.tokens)]
        else:
            found[k] = np.fromiter((vocabulary.tokens.get(text, -1) for text in ids), np.int64, len(ids))
        found[k, found[k] >= rows[k]] = -1
    owned = int(numbers[(found >= 0).any(axis=0)].max(initial=-1))
    asked = max((ids[text] for text in (*rules, *(token.text for token in added))), default=-1)
    total = max(rows[first], owned + 1, asked + 1)
    total += -total % (pad_to_multiple_of or 1)
    row_of = np.full((len(rows), total), -1, np.int64)
    for k in range(len(rows)):
        row_of[k, numbers[found[k] >= 0]] = found[k, found[k] >= 0]

    # Rows without a token: padding, matched by number.
    free = _unlisted(numbers, rows[first])
    for k, vocabulary in enumerate(everyone):
        taken = np.fromiter(vocabulary.tokens.values(), np.int64, len(vocabulary.tokens))
        common = np.intersect1d(free, _unlisted(taken, rows[k]), assume_unique=True)
        row_of[k, common] = common

    # What stands in for a row that a model lacks.
    default, average = np.full_like(row_of, -1), np.zeros(total, bool)
    lacking = np.flatnonzero((row_of < 0).any(axis=0))
    default[:, lacking] = row_of[:, lacking]
    average[lacking] = (row_of[:, lacking] < 0).all(axis=0)
    if base_index is not None:
        in_base = lacking[row_of[base_index, lacking] >= 0]
        default[:, in_base] = -1
        default[base_index, in_base] = row_of[base_index, in_base]
    for text, rule in rules.items():
        number = ids[text]
        average[number], default[:, number] = False, -1
        if rule.model is not None:
            default[rule.model, number] = _row_of_rule(rule, text, row_of[:, number], models)
        if rule.force:
            row_of[:, number] = -1

    identical = all(count == total for count in rows) and bool((row_of == np.arange(total)).all())
    notes += _token_notes(models, found, numbers) + _row_notes(models, free, average)
    tokenizer = first if vocabularies[first] is not None else None
    return Alignment(total, list(row_of), default, average, tokenizer, added, identical, notes)


@dataclass(frozen=True)
class _Models:
    vocabularies: list[Vocabulary]
    rows: Sequence[int]
    names: Sequence[str]
    first: int  # the model that numbers the output
    same: list[bool]  # whose vocabulary equals that model's
    union: bool

    def extra(self, k: int) -> list[str]:
        """Tokens with a row in model k that the numbering model does not list."""
        if self.same[k]:
            return []
        mine, known = self.vocabularies[k].tokens, self.vocabularies[self.first].tokens
        return sorted(
            (t for t, row in mine.items() if row < self.rows[k] and t not in known), key=mine.__getitem__
        )


def _assume(
    vocabularies: Sequence[Vocabulary | None],
    rows: Sequence[int],
    source: str | int,
    base_index: int | None,
    names: Sequence[str],
) -> tuple[int, list[Vocabulary], list[str]]:
    """(the model that numbers the output, a vocabulary for every model, notes about models without one)"""
    base = base_index or 0
    first = base if source in ("auto", "base", "union") else source
    if not isinstance(first, int) or not 0 <= first < len(rows):
        raise RecipeError("E_RECIPE_FIELD", f"The tokenizer source {source!r} is not one of the models.")
    notes = []
    if vocabularies[first] is None:
        if isinstance(source, int):
            _cannot(
                f"{names[first]} has no tokenizer.",
                "It is named as the tokenizer source.",
                "Name another model, or put the tokenizer files into its folder.",
            )
        readable = [k for k, vocabulary in enumerate(vocabularies) if vocabulary and rows[k] == rows[first]]
        if readable:
            notes.append(f"{names[first]} has no tokenizer; that of {names[readable[0]]} is used.")
            first = readable[0]
    everyone = []
    for k, vocabulary in enumerate(vocabularies):
        if vocabulary is None:
            like = base if vocabularies[base] and rows[base] == rows[k] else first
            if rows[k] != rows[like]:
                _cannot(
                    f"{names[k]} has no tokenizer and {rows[k]:,} embedding rows.",
                    f"{names[like]} has {rows[like]:,}, and nobody can tell which of them belong together.",
                    f"Put the tokenizer files of {names[k]} into its folder.",
                )
            if vocabularies[like] and k != base:
                notes.append(f"{names[k]} has no tokenizer; it is taken to use that of {names[like]}.")
            vocabulary = vocabularies[like] or Vocabulary({}, {}, 0, -1, "", "", known=False)
        everyone.append(vocabulary)
    return first, everyone, notes


def _require_known(everyone: Sequence[Vocabulary], first: int, names: Sequence[str]) -> None:
    for k, vocabulary in enumerate(everyone):
        if not vocabulary.known:
            _cannot(
                f"The tokens of {names[k]} are not known, so its rows cannot be matched by token.",
                f"Its tokenizer file is {vocabulary.file or 'missing'}. Only if the tokenizer files of all models "
                "were equal could rows be merged by number.",
                "Open it once with transformers.AutoTokenizer and save it, which writes tokenizer.json; or, if "
                f"it is the tokenizer of {names[first]}, copy that model's tokenizer files.",
            )


def _unlisted(numbers: np.ndarray, rows: int) -> np.ndarray:
    """The row numbers below ``rows`` that no token has."""
    unlisted = np.ones(rows, bool)
    unlisted[numbers[numbers < rows]] = False
    return np.flatnonzero(unlisted)


def _output_tokens(
    models: _Models, rules: Mapping[str, TokenRule]
) -> tuple[dict[str, int], list[AddedToken]]:
    """(token -> number in the output, tokens to append to the numbering model's tokenizer)"""
    reference = models.vocabularies[models.first]
    ids, used, added = dict(reference.tokens), set(reference.tokens.values()), list[AddedToken]()
    wanted = [(text, k) for k in range(len(models.rows)) if models.union for text in models.extra(k)]
    for text, k in (*wanted, *((text, models.first) for text in rules)):
        if text in ids:
            continue
        number = next_number(reference.model_size, added[-1].id if added else reference.highest_added)
        if number in used:
            _cannot(
                f"{text!r} cannot be appended to the tokenizer of {models.names[models.first]}.",
                f"Its numbers have gaps: the tokenizers library would give number {number}, which is taken.",
                "Set the tokenizer source to base: tokens that only other models have are then left out.",
            )
        ids[text] = number
        used.add(number)
        added.append(AddedToken(text, number, models.vocabularies[k].added.get(text, _flags({}))))
    return ids, added


def _row_of_rule(rule: TokenRule, text: str, own: np.ndarray, models: _Models) -> int:
    assert rule.model is not None
    row = rule.row
    if row is None:
        row = int(own[rule.model])
    elif isinstance(row, str):
        row = models.vocabularies[rule.model].tokens.get(row, -1)
    if not 0 <= row < models.rows[rule.model]:
        raise RecipeError(
            "E_RECIPE_FIELD",
            f"The row for token {text!r} does not exist.",
            f"{models.names[rule.model]} has no row for {text if rule.row is None else rule.row!r}.",
            "Name a token or a number that this model has.",
        )
    return row


def _token_notes(models: _Models, found: np.ndarray, numbers: np.ndarray) -> list[str]:
    notes: list[str] = []
    first = models.names[models.first]
    size = len(models.vocabularies[models.first].tokens)
    for k, (vocabulary, me) in enumerate(zip(models.vocabularies, models.names, strict=True)):
        homeless = [text for text, row in vocabulary.tokens.items() if row >= models.rows[k]]
        if homeless:
            notes.append(f"{me} lists {_some(homeless)} beyond its {models.rows[k]:,} embedding rows.")
        if vocabulary.renumbered:
            notes.append(
                f"{vocabulary.file} of {me} states other numbers for {_some(vocabulary.renumbered)} than "
                "transformers gives them; those of transformers are used."
            )
        extra, common = models.extra(k), found[k, :size] >= 0
        if extra:
            fate = "they are appended with its rows" if models.union else "they are left out"
            notes.append(f"{me} has {_some(extra)} that {first} lacks; {fate}.")
            plain = sum(text not in vocabulary.added for text in extra)
            if plain and models.union:
                notes.append(
                    f"{plain:,} of them are ordinary tokens; the tokenizer of {first} seldom makes them."
                )
        if not models.same[k] and not common.all():
            lacks = [text for text, row in zip(models.vocabularies[models.first].tokens, found[k]) if row < 0]  # noqa: B905
            notes.append(f"{me} lacks {_some(lacks)} of {first}; it takes others' rows for them.")
        moved = int((common & (found[k, :size] != numbers[:size])).sum())
        if moved:
            notes.append(
                f"{me} gives other numbers to {moved:,} tokens of {first}; rows are matched by token."
            )
        if common.sum() < 0.9 * size:
            notes.append(
                f"{me} shares only {common.sum():,} of {size:,} tokens with {first}; merging models with so "
                "different tokenizers seldom works."
            )
    return notes


def _row_notes(models: _Models, free: np.ndarray, average: np.ndarray) -> list[str]:
    notes: list[str] = []
    first, rows = models.names[models.first], models.rows[models.first]
    if 0 < len(free) < rows:
        notes.append(
            f"{len(free):,} of the {rows:,} embedding rows of {first} belong to no token; they are kept."
        )
    for name, count in zip(models.names, models.rows, strict=True):
        if count != rows:
            notes.append(
                f"{name} has {count:,} embedding rows, {first} {rows:,}; the output has {len(average):,}."
            )
    if average.any():
        notes.append(f"{average.sum():,} new rows that no model has become the average of each model's rows.")
    return notes


def _some(texts: Sequence[str]) -> str:
    shown = ", ".join(repr(text[:40]) for text in texts[:4]) + (", …" if len(texts) > 4 else "")
    return f"{len(texts):,} token{'s' * (len(texts) > 1)} ({shown})"


def _cannot(what: str, why: str, fix: str) -> NoReturn:
    raise InputError("E_VOCABULARY", what, why, fix)


# Tensors whose rows are rearranged.


def aligned(sources: Sequence[Source], alignment: Alignment) -> list[Source]:
    """The models' versions of one vocabulary tensor, each with the output's rows.

    Bytes are passed on as they are. Only where rows must be averaged, or the models' data types differ, all
    become F32 (F64 if one is not 16-bit), so that nothing is rounded before the merge.
    """
    if alignment.identical:
        return list(sources)
    columns = np.flatnonzero(np.min(alignment.row_of, axis=0) < 0)
    default, average = alignment.default[:, columns], alignment.average[columns]
    types = {source.dtype for source in sources}
    if len(types) > 1 or average.any() or ((default >= 0).sum(axis=0) > 1).any():
        wide = "F32" if types <= {"F16", "BF16"} else "F64"
        sources = [Widened(source, wide) for source in sources]
    place = np.full(alignment.rows, -1, np.int64)
    place[columns] = np.arange(len(columns))
    return [
        RowsSource(source, rows, DefaultRows(sources, k, default, average), place)
        for k, (source, rows) in enumerate(zip(sources, alignment.row_of, strict=True))
    ]


class Widened:
    """A floating-point source as F32 or F64."""

    def __init__(self, source: Source, dtype: str):
        self.source, self.name, self.dtype = source, source.name, dtype
        self.shape, self.numel = source.shape, source.numel

    def read(self, start: int, stop: int, out: memoryview) -> None:
        raw = bytearray((stop - start) * item_size(self.source.dtype))
        self.source.read(start, stop, memoryview(raw))
        np.frombuffer(out, _NUMPY[self.dtype])[:] = _numbers(raw, self.source.dtype)


class DefaultRows:
    """The rows that ``Alignment`` calls default, of model ``own``: column c of ``default`` is row c."""

    def __init__(self, sources: Sequence[Source], own: int, default: np.ndarray, average: np.ndarray):
        self.sources, self.own, self.default, self.average = sources, own, default, average
        source = sources[own]
        self.name, self.dtype, self.shape = source.name, source.dtype, (len(average), *source.shape[1:])
        self.width = source.numel // source.shape[0]
        self.numel = len(average) * self.width
        self.lock = threading.Lock()
        self.mean: bytes | None = None

    def read(self, start: int, stop: int, out: memoryview) -> None:
        size = item_size(self.dtype)
        position = start
        while position < stop:
            row, column = divmod(position, self.width)
            end = min(stop, (row + 1) * self.width)
            part = self._row(row)[column * size : (column + end - position) * size]
            out[(position - start) * size : (end - start) * size] = part
            position = end

    def _row(self, row: int) -> bytes:
        rows = [self._of(m, int(other)) for m, other in enumerate(self.default[:, row]) if other >= 0]
        if len(rows) == 1:
            return rows[0]
        if rows:
            mean = np.mean([_numbers(raw, self.dtype) for raw in rows], axis=0, dtype=np.float64)
            return mean.astype(_NUMPY[self.dtype]).tobytes()
        return self._average() if self.average[row] else bytes(self.width * item_size(self.dtype))

    def _of(self, model: int, row: int) -> bytes:
        raw = bytearray(self.width * item_size(self.dtype))
        self.sources[model].read(row * self.width, (row + 1) * self.width, memoryview(raw))
        return bytes(raw)

    def _average(self) -> bytes:
        with self.lock:  # read the tensor once, not once per thread
            if self.mean is None:
                total = np.zeros(self.width)
                count = self.sources[self.own].shape[0]
                for row in range(count):
                    total += _numbers(self._of(self.own, row), self.dtype)
                self.mean = (total / count).astype(_NUMPY[self.dtype]).tobytes()
            return self.mean


_NUMPY = {"F32": "<f4", "F64": "<f8"}


def _numbers(raw: bytes | bytearray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, {"F16": "<f2", **_NUMPY}[dtype])


# Reading the formats.

_Added = list[tuple[str, int, dict[str, bool]]]  # text, stated number, flags


def _tokenizer_json(raw: bytes, path: Path, settings: dict[str, Any]) -> tuple[dict[str, int] | None, _Added]:
    content = _object(parse_json(raw, str(path)), path)
    added = []
    for entry in content.get("added_tokens") or []:
        if not (
            isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int
        ):
            _malformed(path, "An added token lacks its content or its id.")
        added.append((entry["content"], entry["id"], _flags(entry)))
    vocabulary = _object(content.get("model"), path).get("vocab")
    if isinstance(vocabulary, list):  # Unigram: [text, score], numbered by position
        if not all(isinstance(pair, list) and pair and isinstance(pair[0], str) for pair in vocabulary):
            _malformed(path, "An entry of the vocabulary is not a pair of text and score.")
        return {pair[0]: number for number, pair in enumerate(vocabulary)}, added
    return _numbered(vocabulary, path), added


def _vocab_json(raw: bytes, path: Path, settings: dict[str, Any]) -> tuple[dict[str, int] | None, _Added]:
    return _numbered(parse_json(raw, str(path)), path), []


def _vocab_txt(raw: bytes, path: Path, settings: dict[str, Any]) -> tuple[dict[str, int] | None, _Added]:
    try:
        lines = raw.decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        _malformed(path, str(error))
    return {line.removesuffix("\r"): number for number, line in enumerate(lines)}, []


def _sentencepiece(raw: bytes, path: Path, settings: dict[str, Any]) -> tuple[dict[str, int] | None, _Added]:
    """The pieces of a protobuf ModelProto (field 1), by their text (field 1); None if it is something else."""
    if str(settings.get("tokenizer_class")).removesuffix("Fast") not in _PLAIN_SENTENCEPIECE:
        return None, []
    try:
        pieces = [
            next(v for n, v in _fields(value) if n == 1) for number, value in _fields(raw) if number == 1
        ]
        tokens = {piece.decode("utf-8"): number for number, piece in enumerate(pieces)}
    except (IndexError, ValueError, StopIteration, RuntimeError):
        return None, []
    return (tokens if tokens and len(tokens) == len(pieces) else None), []


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


def _nothing(raw: bytes, path: Path, settings: dict[str, Any]) -> tuple[dict[str, int] | None, _Added]:
    return None, []


def _more_added(folder: Path, settings: dict[str, Any]) -> _Added:
    """Tokens that stand beside the vocabulary, in the order in which transformers appends those it lacks."""
    more: _Added = []
    decoder, named = settings.get("added_tokens_decoder"), dict(settings)
    if isinstance(decoder, dict):
        for number, entry in decoder.items():
            if not (number.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str)):
                _malformed(folder / "tokenizer_config.json", "added_tokens_decoder is not a table of tokens.")
            more.append((entry["content"], int(number), _flags(entry)))
    else:  # as tokenizers were saved before that field existed
        for name in ("special_tokens_map.json", "added_tokens.json"):
            if os.path.lexists(folder / name):
                content = _object(read_json(folder / name, LARGEST_CONFIG), folder / name)
                if name == "added_tokens.json":
                    numbers = _numbered(content, folder / name)
                    more += [(text, number, _flags({})) for text, number in numbers.items()]
                named.update(content if name != "added_tokens.json" else {})
    more.sort(key=lambda token: token[1])
    extra = [named.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    for token in (
        *(named.get(key) for key in _NAMED),
        *(t for part in extra if isinstance(part, list) for t in part),
    ):
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            more.append((text, -1, _flags({"special": True, **(token if isinstance(token, dict) else {})})))
    return more


def _numbered(content: Any, path: Path) -> dict[str, int]:
    tokens = _object(content, path)
    if not all(type(number) is int and 0 <= number < 1 << 31 for number in tokens.values()):
        _malformed(path, "A token's number is not a small positive integer.")
    return tokens


def _flags(entry: Mapping[str, Any]) -> dict[str, bool]:
    """FLAGS of an added token, and what the library assumes where one is not stated."""
    flags = {flag: bool(entry.get(flag, False)) for flag in FLAGS}
    return flags | {"normalized": bool(entry.get("normalized", not flags["special"]))}


def _object(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        _malformed(path, "Not an object, or it lacks the vocabulary.")
    return content


def _malformed(path: Path, why: str) -> NoReturn:
    raise InputError("E_JSON", f"{path} is malformed.", why, "Restore the file from its source.") from None
