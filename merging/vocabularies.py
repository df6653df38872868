"""Whose vocabulary the output has, and embeddings and heads brought into it.

If all models have the same tokenizer files and tables of the same length, nothing happens here. Otherwise the
rows are matched by token text (``checkpoints/tokenizer.py``), and the sources of the token tables in the
alignment are replaced by sources that read each model's rows in the output's order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path

from .alignment import Aligned, Alignment
from .checkpoints.checkpoint import Checkpoint, Source
from .checkpoints.layout import head_and_embedding
from .checkpoints.tokenizer import AddedToken, TokenRule, align
from .checkpoints.vocabulary import Vocabulary, read_vocabulary
from .checkpoints.vocabulary_rows import in_vocabulary
from .recipe import Recipe

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
          "added_tokens.json", "tokenizer_config.json")  # fmt: skip


@dataclass(slots=True)
class VocabularyPlan:
    """The output's vocabulary."""

    tokenizer: str | None = None
    """``Model.key`` of the model whose tokenizer files are copied; None: the first model's."""
    added: list[AddedToken] = field(default_factory=list)
    """Tokens to append to those files."""
    rows: int | None = None
    """Rows of the output's embedding; None if it has none."""
    digest: str | None = None
    """Identifies the row maps; None if no rows are moved."""


def align_vocabularies(
    recipe: Recipe, models: Mapping[str, Checkpoint], alignment: Alignment, included: AbstractSet[str]
) -> VocabularyPlan:
    """Match the token tables; changes their sources in ``alignment`` and adds notes to it.

    Tables that the method leaves alone (not in ``included``) stay as they are in the base, unless the recipe names a
    tokenizer. Raises InputError E_VOCABULARY, RecipeError E_RECIPE_FIELD.
    """
    tables = _token_tables(alignment)
    wish = recipe.tokenizer
    if not tables:
        return VocabularyPlan()
    first = tables[0]
    rows = {key: source.shape[0] for key, source in _by_model(first).items() if source.shape}
    asked = wish.source != "auto" or bool(wish.tokens) or wish.pad_to_multiple_of is not None
    if not asked and not any(t.name in included for t in tables):
        return VocabularyPlan(rows=first.template.shape[0])
    keys = list(rows)
    if not asked and len(set(rows.values())) == 1 and _same_files([models[k].path for k in keys]):
        return VocabularyPlan(rows=rows[keys[0]])
    found = align(
        _read([models[k].path for k in keys]), [rows[k] for k in keys], _source(recipe, keys),
        keys.index(recipe.base.key) if recipe.base and recipe.base.key in keys else None,
        _rules(recipe, keys), wish.pad_to_multiple_of, keys,
    )  # fmt: skip
    alignment.notes += found.notes
    plan = VocabularyPlan(keys[found.tokenizer] if found.tokenizer is not None else None, found.added, found.rows)
    if found.identical:
        return plan
    digest = hashlib.sha256()
    for array in (*found.row_of, found.default, found.average):
        digest.update(array.tobytes())
    plan.digest = digest.hexdigest()
    for table in tables:
        by_model = _by_model(table)
        sources = [by_model[k] for k in keys if k in by_model]
        if len(sources) != len(keys) or any(by_model[k].shape[:1] != (rows[k],) for k in keys):
            continue  # not a table over this vocabulary in all models: shapes will be compared as they are
        moved = {k: in_vocabulary(sources, i, found) for i, k in enumerate(keys)}
        if table.base is not None:
            table.base = moved[table.models[0]]
        table.experts = [moved[k] for k in table.models[len(table.models) - len(table.experts) :]]
    return plan


def _token_tables(alignment: Alignment) -> list[Aligned]:
    """The output's embedding, head and head's bias, the embedding first."""
    head, embedding = head_and_embedding([t.name for t in alignment.tensors])
    bias = head.removesuffix("weight") + "bias" if head else None
    by_name = {t.name: t for t in alignment.tensors}
    return [by_name[name] for name in (embedding, head, bias) if name is not None and name in by_name]


def _by_model(tensor: Aligned) -> dict[str, Source]:
    sources = [*([tensor.base] if tensor.base is not None else []), *tensor.experts]
    return dict(zip(tensor.models, sources, strict=True))


def _same_files(folders: Sequence[Path]) -> bool:
    """Are all tokenizer files byte for byte the same?"""

    def content(folder: Path) -> list[bytes | None]:
        return [(folder / name).read_bytes() if (folder / name).is_file() else None for name in _FILES]

    distinct = list(dict.fromkeys(folders))
    if len(distinct) < 2:
        return True
    expected = content(distinct[0])
    return all(content(folder) == expected for folder in distinct[1:])


def _read(folders: Sequence[Path]) -> list[Vocabulary | None]:
    known: dict[Path, Vocabulary | None] = {}
    for folder in folders:
        if folder not in known:
            known[folder] = read_vocabulary(folder)
    return [known[folder] for folder in folders]


def _source(recipe: Recipe, keys: list[str]) -> str | int:
    wish = recipe.tokenizer.source
    if wish in ("auto", "union", "base"):
        return wish
    model = recipe.model_named(wish)
    return keys.index(model.key) if model is not None and model.key in keys else "auto"


def _rules(recipe: Recipe, keys: list[str]) -> dict[str, TokenRule]:
    rules: dict[str, TokenRule] = {}
    for token, rule in recipe.tokenizer.tokens.items():
        if rule.source is None:
            continue
        if rule.source == "zero":
            rules[token] = TokenRule(None, force=rule.force)
            continue
        name = rule.source if isinstance(rule.source, str) else rule.source.model
        row = (
            None
            if isinstance(rule.source, str)
            else (rule.source.token if rule.source.token is not None else rule.source.token_id)
        )
        model = recipe.model_named(name)
        if model is not None and model.key in keys:
            rules[token] = TokenRule(keys.index(model.key), row, rule.force)
    return rules
