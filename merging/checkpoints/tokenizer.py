"""Which row of an embedding belongs to which token, and how the rows of several models are matched.

An embedding is a table with one row per token number. Two models of one family may number tokens differently:
one fine-tune adds ``<|im_start|>``, another adds ``[PAD]`` at the same place. Averaging row 32,000 with row
32,000 then mixes two unrelated words, and the merged model speaks fluent nonsense. So rows are matched by the
*text* of their token: ``align`` says for each model which of its rows goes where, and what stands in where it
has none. Tables are often longer than the vocabulary (152,064 rows, 151,665 tokens); padding rows are kept.

The vocabularies themselves are read by ``vocabulary.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, repeat
from typing import NoReturn

import numpy as np

from merging.checkpoints.vocabulary import Vocabulary, token_flags
from merging.errors import InputError, RecipeError


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
    models = _Models(everyone, rows, names, first, same, source in ("auto", "union"), [])
    models.extra.extend(map(models.find_extra, range(len(rows))))
    ids, added = _output_tokens(models, rules)

    # Rows of tokens: found[k, t] is the row that model k has for token t.
    numbers = np.fromiter(ids.values(), np.int64, len(ids))
    found = np.full((len(rows), len(ids)), -1, np.int64)
    for k, vocabulary in enumerate(everyone):
        if same[k]:
            found[k, : len(vocabulary.tokens)] = numbers[: len(vocabulary.tokens)]
        else:
            found[k] = np.fromiter(map(vocabulary.tokens.get, ids, repeat(-1)), np.int64, len(ids))
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
    extra: list[list[str]]  # per model: tokens with a row that the numbering model does not list

    def find_extra(self, k: int) -> list[str]:
        if self.same[k]:
            return []
        mine = self.vocabularies[k].tokens
        fresh = mine.keys() - self.vocabularies[self.first].tokens.keys()
        return sorted((text for text in fresh if mine[text] < self.rows[k]), key=mine.__getitem__)


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
            vocabulary = vocabularies[like] or Vocabulary({}, {}, "", "", known=False)
        everyone.append(vocabulary)
    return first, everyone, notes


def _require_known(everyone: Sequence[Vocabulary], first: int, names: Sequence[str]) -> None:
    advice = (
        "Open it once with transformers.AutoTokenizer and save it, which writes tokenizer.json; or copy the "
    )
    for k, vocabulary in enumerate(everyone):
        if not vocabulary.known:
            _cannot(
                f"The tokens of {names[k]} are not known, so its rows cannot be matched by token.",
                f"Its tokenizer file is {vocabulary.file or 'missing'}. Only if all models had the same "
                "file could rows be merged by number.",
                f"{advice}tokenizer files of {names[first]}, if they are the same tokenizer.",
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
    ids, added = dict(reference.tokens), list[AddedToken]()
    gaps = set(ids.values()) != set(range(len(ids)))
    wanted = [(text, k) for k, texts in enumerate(models.extra) if models.union for text in texts]
    for text, k in (*wanted, *((text, models.first) for text in rules)):
        if text in ids:
            continue
        if gaps:
            _cannot(
                f"{text!r} cannot be appended to the tokenizer of {models.names[models.first]}.",
                "Its token numbers have gaps, so a new token's number would depend on the library's version.",
                "Set the tokenizer source to base: tokens that only other models have are then left out.",
            )
        ids[text] = len(ids)
        added.append(AddedToken(text, ids[text], models.vocabularies[k].added.get(text, token_flags())))
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
        if max(vocabulary.tokens.values(), default=-1) >= models.rows[k]:
            homeless = [text for text, row in vocabulary.tokens.items() if row >= models.rows[k]]
            notes.append(f"{me} lists {_some(homeless)} beyond its {models.rows[k]:,} embedding rows.")
        if vocabulary.renumbered:
            notes.append(
                f"{vocabulary.file} of {me} states other numbers for {_some(vocabulary.renumbered)} than "
                "transformers gives them; those of transformers are used."
            )
        extra, common = models.extra[k], found[k, :size] >= 0
        if extra:
            fate = "they are appended with its rows" if models.union else "they are left out"
            notes.append(f"{me} has {_some(extra)} that {first} lacks; {fate}.")
            plain = sum(text not in vocabulary.added for text in extra)
            if plain and models.union:
                notes.append(
                    f"{plain:,} of them are ordinary tokens; the tokenizer of {first} seldom makes them."
                )
        if not models.same[k] and not common.all():
            lacks = list(compress(models.vocabularies[models.first].tokens, ~common))
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


