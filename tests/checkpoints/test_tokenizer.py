"""Vocabularies as the real tokenizer libraries number them, and rows that never move to another token."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.checkpoints.checkpoint import open_checkpoint
from merging.checkpoints.side_files import extend_tokenizer
from merging.checkpoints.tokenizer import Alignment, TokenRule, align
from merging.checkpoints.vocabulary import Vocabulary, read_vocabulary
from merging.checkpoints.vocabulary_rows import in_vocabulary
from merging.errors import InputError, RecipeError

WORDS = ["<unk>", "a", "b", "ab", "c"]
MODELS: dict[str, Any] = {
    "WordLevel": lambda words: {"vocab": words, "unk_token": next(iter(words))},
    "WordPiece": lambda words: {
        "vocab": words,
        "unk_token": next(iter(words)),
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    },
    "BPE": lambda words: {"vocab": words, "merges": [["a", "b"]] if "ab" in words else []},
    "Unigram": lambda words: {"vocab": [[word, -float(i)] for i, word in enumerate(words)], "unk_id": 0},
}


def tokenizer_json(
    words: Iterable[str] | dict[str, int], added: Iterable[Any] = (), kind: str = "BPE"
) -> str:
    """A tokenizer.json; ``added``: texts, or (text, stated number)."""
    vocab = words if isinstance(words, dict) else {word: i for i, word in enumerate(words)}
    tokens = [entry if isinstance(entry, tuple) else (entry, len(vocab) + i) for i, entry in enumerate(added)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": number, "content": text, **flags} for text, number in tokens],
            "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": kind, **MODELS[kind](vocab)},
        }
    )


def folder_with(folder: Path, **files: Any) -> Path:
    """``folder`` with files, _ for the dot in their names; text and bytes as they are, the rest as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / ".".join(name.rsplit("_", 1))
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def vocabulary(words: Iterable[str], added: Iterable[str] = ()) -> Vocabulary:
    words, added = list(words), list(added)
    tokens = {word: number for number, word in enumerate([*words, *added])}
    flags = {text: {"special": True} for text in added}
    return Vocabulary(tokens, flags, "\0".join(tokens), "tokenizer.json")


# Reading


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config_json": {"tokenizer_class": "PreTrainedTokenizerFast"}},
        {
            "tokenizer_config_json": {
                "added_tokens_decoder": {
                    "5": {"content": "<s>", "special": True},
                    "6": {"content": "<x>", "special": False},
                    "7": {"content": "<late>", "special": True},
                }
            },
            "added_tokens_json": {"<ignored>": 7},
        },
        {"added_tokens_json": {"<later>": 8, "<x>": 6, "<late>": 7}},
        {
            "tokenizer_config_json": {
                "pad_token": {"content": "[PAD]", "__type": "AddedToken"},
                "additional_special_tokens": ["<extra>", "a"],
            },
            "special_tokens_map_json": {"mask_token": "[MASK]", "eos_token": "<s>"},
        },
    ],
    ids=["alone", "class", "decoder", "added_tokens", "named"],
)
def test_numbers_are_those_of_transformers(tmp_path: Path, kind: str, files: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    folder = folder_with(tmp_path, tokenizer_json=tokenizer_json(WORDS, ["<s>", "<x>"], kind), **files)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **files.get("tokenizer_config_json", {})}
    folder_with(tmp_path, tokenizer_config_json=config)
    read = read_vocabulary(folder)
    assert read is not None and read.known
    assert read.tokens == AutoTokenizer.from_pretrained(folder).get_vocab()


texts = st.sampled_from(["a", "b", "ab", "<s>", "<x>", "é", "\u200b", "<|end|>", "", " "])


@settings(max_examples=300)
@given(
    words=st.dictionaries(texts.filter(bool), st.integers(0, 12), max_size=6),
    added=st.lists(st.tuples(texts, st.integers(0, 15)), max_size=6),
)
def test_any_numbering_is_that_of_the_tokenizers_library(
    tmp_path_factory: pytest.TempPathFactory, words: dict[str, int], added: list[tuple[str, int]]
) -> None:
    """Gaps, numbers that lie, tokens listed twice: the rows were trained as the library numbers them."""
    from tokenizers import Tokenizer

    text = tokenizer_json({"[UNK]": 0, **words}, added, "WordLevel")
    read = read_vocabulary(folder_with(tmp_path_factory.mktemp("v"), tokenizer_json=text))
    assert read is not None
    assert read.tokens == Tokenizer.from_str(text).get_vocab()
    wrong = {text for text, stated in added if text and read.tokens[text] != stated}
    assert set(read.renumbered) <= wrong


def message(*fields: tuple[int, bytes]) -> bytes:
    return b"".join(bytes([number << 3 | 2, len(value)]) + value for number, value in fields)


def test_sentencepiece_files(tmp_path: Path) -> None:
    pieces = [message((1, text.encode())) + b"\x15\x00\x00\x80\xbf\x18\x01" for text in ("<unk>", "▁a", "é")]
    model = message(*((1, piece) for piece in pieces), (2, b"trainer"))
    folder = folder_with(
        tmp_path / "known",
        tokenizer_model=model,
        tokenizer_config_json={"tokenizer_class": "LlamaTokenizer"},
        added_tokens_json={"<x>": 3},
    )
    read = read_vocabulary(folder)
    assert read is not None and read.tokens == {"<unk>": 0, "▁a": 1, "é": 2, "<x>": 3}

    other = read_vocabulary(folder_with(tmp_path / "other", tokenizer_model=model))
    assert other is not None and not other.known  # a class that may shift the numbers
    for length in range(len(model)):
        (folder / "tokenizer.model").write_bytes(model[:length])
        cut = read_vocabulary(folder)
        assert cut is not None
        assert not cut.known or len(cut.tokens) <= 4  # cut between two pieces it is still a list of pieces


@pytest.mark.parametrize(
    ("files", "tokens"),
    [
        ({"vocab_json": {"a": 0, "b": 1}, "merges_txt": "#version\n"}, {"a": 0, "b": 1}),
        ({"vocab_txt": "[PAD]\r\nä\n", "added_tokens_json": {"<x>": 2}}, {"[PAD]": 0, "ä": 1, "<x>": 2}),
    ],
)
def test_older_vocabulary_files(tmp_path: Path, files: dict[str, Any], tokens: dict[str, int]) -> None:
    read = read_vocabulary(folder_with(tmp_path, **files))
    assert read is not None and read.tokens == tokens


def test_no_tokenizer(tmp_path: Path) -> None:
    assert read_vocabulary(tmp_path) is None
    assert read_vocabulary(tmp_path / "absent") is None


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"model": {}}',
        '{"model": []}',
        '{"model": {"vocab": 3}}',
        '{"model": {"vocab": {"a": "0"}}}',
        '{"model": {"vocab": {"a": -1}}}',
        '{"model": {"vocab": {"a": 1.5}}}',
        '{"model": {"vocab": {"a": true}}}',
        '{"model": {"vocab": {"a": 99999999999}}}',
        '{"model": {"vocab": {"a": 0, "a": 1}}}',
        '{"model": {"vocab": ["a"]}}',
        '{"model": {"vocab": [[1, 0]]}}',
        '{"model": {"vocab": [[]]}}',
        '{"model": {"vocab": {}}, "added_tokens": 5}',
        '{"model": {"vocab": {}}, "added_tokens": {"a": 1}}',
        '{"model": {"vocab": {}}, "added_tokens": [3]}',
        '{"model": {"vocab": {}}, "added_tokens": [{"content": "a"}]}',
        '{"model": {"vocab": {}}, "added_tokens": [{"content": "a", "id": NaN}]}',
        '{"model": {"vocab": {"\\ud800": 0}}}',
        "[" * 100_000,
    ],
    ids=range(21),
)
def test_malformed_tokenizers_are_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError) as caught:
        read_vocabulary(folder_with(tmp_path, tokenizer_json=content))
    assert caught.value.code == "E_JSON"
    assert "tokenizer.json" in caught.value.what


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config_json": []},
        {"tokenizer_config_json": {"added_tokens_decoder": {"x": {"content": "a"}}}},
        {"tokenizer_config_json": {"added_tokens_decoder": {"1": "a"}}},
        {"tokenizer_config_json": {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}},
        {"added_tokens_json": {"a": "1"}},
        {"special_tokens_map_json": "[]"},
    ],
)
def test_malformed_companions_are_refused(tmp_path: Path, files: dict[str, Any]) -> None:
    folder = folder_with(tmp_path, tokenizer_json=tokenizer_json(WORDS), **files)
    with pytest.raises(InputError) as caught:
        read_vocabulary(folder)
    assert caught.value.code == "E_JSON"


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    secret = folder_with(tmp_path / "home", secret_json="{}") / "secret.json"
    model = folder_with(tmp_path / "model")
    (model / "tokenizer.json").symlink_to(secret)
    with pytest.raises(InputError) as caught:
        read_vocabulary(model)
    assert caught.value.code == "E_PATH"


# Matching

BASE = vocabulary(WORDS)  # 5 tokens


def rows_of(alignment: Alignment, model: int) -> list[int]:
    return alignment.row_of[model].tolist()


def suppliers(alignment: Alignment, row: int) -> dict[int, int]:
    return {model: int(own) for model, own in enumerate(alignment.default[:, row]) if own >= 0}


@pytest.mark.parametrize("source", ["auto", "union", "base", 1])
def test_equal_vocabularies_need_no_map(source: str | int) -> None:
    found = align([BASE, vocabulary(WORDS), BASE], [5, 5, 5], source)
    assert found.identical and found.rows == 5 and not found.added and not found.notes
    assert found.tokenizer == (1 if source == 1 else 0)


def test_padding_is_kept() -> None:
    """Qwen2.5: 152,064 rows for 151,665 tokens; others cut them off."""
    found = align([BASE, BASE], [8, 8])
    assert found.identical and found.rows == 8
    assert "3 of the 8 embedding rows" in found.notes[0]


@pytest.mark.parametrize(("expert_rows", "expected"), [(6, [0, 1, 2, 3, 4, 5, -1, -1]), (9, list(range(8)))])
def test_padding_of_different_length(expert_rows: int, expected: list[int]) -> None:
    found = align([BASE, BASE], [8, expert_rows])
    assert not found.identical and found.rows == 8
    assert rows_of(found, 0) == list(range(8)) and rows_of(found, 1) == expected
    assert all(suppliers(found, row) == {0: row} for row, own in enumerate(expected) if own < 0)
    assert any(f"has {expert_rows} embedding rows" in note for note in found.notes)


def test_an_expert_that_adds_tokens() -> None:
    expert = vocabulary(WORDS, ["<|im_start|>", "<|im_end|>"])
    found = align([BASE, expert], [5, 7], names=["base", "chat"])
    assert found.rows == 7 and [(token.text, token.id) for token in found.added] == [
        ("<|im_start|>", 5),
        ("<|im_end|>", 6),
    ]
    assert rows_of(found, 0) == [0, 1, 2, 3, 4, -1, -1] and rows_of(found, 1) == list(range(7))
    assert suppliers(found, 5) == {1: 5}  # the base takes the owner's row: its task vector is zero there
    assert found.notes[0] == (
        "chat has 2 tokens ('<|im_start|>', '<|im_end|>') that base lacks; they are appended with its rows."
    )


def test_new_tokens_move_into_the_padding() -> None:
    expert = vocabulary(WORDS, ["<x>"])
    found = align([BASE, expert], [8, 8])
    assert found.rows == 8 and found.added[0].id == 5
    assert rows_of(found, 0) == [0, 1, 2, 3, 4, -1, 6, 7]  # row 5 of the base was padding, and is <x> now
    assert rows_of(found, 1) == list(range(8))


def test_the_same_number_for_different_tokens() -> None:
    one, two = vocabulary(WORDS, ["<x>"]), vocabulary(WORDS, ["[PAD]"])
    found = align([BASE, one, two], [5, 6, 6])
    assert [token.text for token in found.added] == ["<x>", "[PAD]"]
    assert rows_of(found, 1) == [0, 1, 2, 3, 4, 5, -1] and rows_of(found, 2) == [0, 1, 2, 3, 4, -1, 5]
    assert suppliers(found, 5) == {1: 5} and suppliers(found, 6) == {2: 5}


def test_tokens_of_several_experts_are_averaged_for_those_without() -> None:
    one, two = vocabulary(WORDS, ["<x>"]), vocabulary(["c", *WORDS[:4]], ["<y>", "<x>"])
    found = align([BASE, one, two], [5, 6, 7])
    assert suppliers(found, 5) == {1: 5, 2: 6}
    assert rows_of(found, 2)[:5] == [1, 2, 3, 4, 0]
    assert any("gives other numbers to 5 tokens" in note for note in found.notes)


def test_a_token_that_an_expert_lacks_stays_as_in_the_base() -> None:
    found = align([BASE, vocabulary(WORDS[:3]), BASE], [5, 3, 5])
    assert not found.added and rows_of(found, 1) == [0, 1, 2, -1, -1]
    assert suppliers(found, 3) == {0: 3}


def test_without_a_base_the_owners_are_averaged() -> None:
    found = align([BASE, vocabulary(WORDS[:3]), BASE], [5, 3, 5], base_index=None)
    assert suppliers(found, 3) == {0: 3, 2: 3}


@pytest.mark.parametrize("source", ["base", 0])
def test_source_base_leaves_other_tokens_out(source: str | int) -> None:
    found = align([BASE, vocabulary(WORDS, ["<x>"])], [8, 6], source)
    assert found.rows == 8 and not found.added
    assert rows_of(found, 1) == [0, 1, 2, 3, 4, -1, -1, -1]  # <x> is not padding
    assert any("they are left out" in note for note in found.notes)


def test_source_model_has_that_models_numbers() -> None:
    chat = vocabulary(["c", *WORDS[:4]], ["<x>"])
    found = align([BASE, BASE, chat], [5, 5, 8], 2)
    assert found.tokenizer == 2 and found.rows == 8
    assert rows_of(found, 0) == [4, 0, 1, 2, 3, -1, -1, -1]
    assert suppliers(found, 0) == {} and suppliers(found, 5) == {2: 5} and suppliers(found, 7) == {2: 7}


def test_tokens_without_a_row() -> None:
    """A tokenizer that got [PAD] while the model was never resized is common."""
    lazy = vocabulary(WORDS, ["[PAD]"])
    found = align([lazy, lazy], [5, 5])
    assert found.identical and "beyond its 5 embedding rows" in found.notes[0]

    trained = align([lazy, lazy], [5, 6])  # one expert was resized: its row is not thrown away
    assert trained.rows == 6 and suppliers(trained, 5) == {1: 5}

    other = align([lazy, vocabulary(WORDS, ["<x>"])], [5, 6])  # row 5 must exist, and nobody has it
    assert [(token.text, token.id) for token in other.added] == [("<x>", 6)]
    assert other.average.tolist() == [False] * 5 + [True, False] and suppliers(other, 5) == {}


def test_pad_to_multiple_of() -> None:
    found = align([BASE, BASE], [5, 5], pad_to_multiple_of=4)
    assert found.rows == 8 and found.average.tolist() == [False] * 5 + [True] * 3
    assert align([BASE, BASE], [5, 5], pad_to_multiple_of=5).identical


def test_models_without_a_tokenizer() -> None:
    assert align([None, None], [5, 5]).identical
    assert align([None, None], [5, 5]).tokenizer is None
    found = align([BASE, None], [5, 5], names=["base", "expert"])
    assert found.identical and "expert has no tokenizer" in found.notes[0]
    found = align([None, BASE], [5, 5])
    assert found.identical and found.tokenizer == 1
    for vocabularies in ([None, None], [BASE, None], [None, BASE]):
        with pytest.raises(InputError) as caught:
            align(vocabularies, [5, 7])
        assert caught.value.code == "E_VOCABULARY" and "tokenizer files" in caught.value.fix


def unread(digest: str) -> Vocabulary:
    return Vocabulary({}, {}, digest, "spiece.model", known=False)


def test_unread_vocabularies_must_be_equal() -> None:
    assert align([unread("x"), unread("x")], [5, 5]).identical
    longer = align([unread("x"), unread("x")], [5, 8])  # only padding differs
    assert longer.rows == 5 and rows_of(longer, 1) == [0, 1, 2, 3, 4]
    for other in (unread("y"), BASE):
        for pair in ([unread("x"), other], [other, unread("x")]):
            with pytest.raises(InputError) as caught:
                align(pair, [5, 5])
            assert caught.value.code == "E_VOCABULARY" and "AutoTokenizer" in caught.value.fix


def test_rules_for_single_tokens() -> None:
    chat = vocabulary(WORDS, ["<x>", "<y>"])
    rules = {
        "<x>": TokenRule(0, "c"),  # the base lacks it: the base's row of "c"; the owner keeps its own
        "<y>": TokenRule(1, 2, force=True),  # everybody: row 2 of the expert
        "a": TokenRule(None, force=True),
        "b": TokenRule(None),  # nobody lacks it: nothing happens
        "<new>": TokenRule(1, "<x>"),
    }
    found = align([BASE, chat], [5, 7], "union", tokens=rules)
    assert [(t.text, t.id) for t in found.added] == [("<x>", 5), ("<y>", 6), ("<new>", 7)]
    assert rows_of(found, 0) == [0, -1, 2, 3, 4, -1, -1, -1]
    assert rows_of(found, 1) == [0, -1, 2, 3, 4, 5, -1, -1]
    assert suppliers(found, 5) == {0: 4} and suppliers(found, 6) == {1: 2}
    assert suppliers(found, 1) == {} and not found.average[1]
    assert suppliers(found, 7) == {1: 5}


@pytest.mark.parametrize("rule", [TokenRule(0), TokenRule(0, "nowhere"), TokenRule(1, 99), TokenRule(1, -1)])
def test_rules_that_name_no_row(rule: TokenRule) -> None:
    with pytest.raises(RecipeError) as caught:
        align([BASE, vocabulary(WORDS, ["<x>"])], [5, 6], "union", tokens={"<x>": rule})
    assert caught.value.code == "E_RECIPE_FIELD"


@pytest.mark.parametrize("source", [2, -1, "unoin"])
def test_sources_that_are_no_model(source: str | int) -> None:
    with pytest.raises(RecipeError):
        align([BASE, BASE], [5, 5], source)


def test_numbers_with_gaps_cannot_be_extended(tmp_path: Path) -> None:
    gaps = read_vocabulary(folder_with(tmp_path, tokenizer_json=tokenizer_json({"a": 0, "b": 2}, (), "BPE")))
    with pytest.raises(InputError) as caught:
        align([gaps, vocabulary(["a", "b", "c"])], [3, 3])
    assert caught.value.code == "E_VOCABULARY" and "tokenizer source to base" in caught.value.fix
    assert align([gaps, vocabulary(["a", "b", "c"])], [3, 3], "base").rows == 3


def test_very_different_tokenizers_are_pointed_out() -> None:
    found = align([vocabulary("abcdef"), vocabulary("uvwxyz")], [6, 6])
    assert found.rows == 12
    assert any("shares only 0 of 6 tokens" in note for note in found.notes)
    assert any("6 of them are ordinary tokens" in note for note in found.notes)


tokens = st.lists(st.sampled_from([f"t{i}" for i in range(9)]), unique=True, min_size=1, max_size=7)
models = st.lists(st.tuples(tokens, st.integers(-2, 3)), min_size=1, max_size=4)


@settings(max_examples=400)
@given(models=models, data=st.data())
def test_no_row_ever_moves_to_another_token(models: list[tuple[list[str], int]], data: st.DataObject) -> None:
    """The rule, said with dictionaries: every row is its token's row, padding, or told to be missing."""
    vocabularies = [vocabulary(words) for words, _ in models]
    rows = [max(1, len(words) + more) for words, more in models]
    base = data.draw(st.one_of(st.none(), st.integers(0, len(models) - 1)))
    source = data.draw(st.sampled_from(["auto", "union", "base", *range(len(models))]))
    found = align(vocabularies, rows, source, base)

    first = source if isinstance(source, int) else (base or 0)
    text_of = {number: text for text, number in vocabularies[first].tokens.items()}
    text_of |= {token.id: token.text for token in found.added}
    assert len(set(text_of.values())) == len(text_of)
    if source in ("auto", "union"):
        wanted = {
            t for v, n in zip(vocabularies, rows, strict=True) for t, row in v.tokens.items() if row < n
        }
        assert wanted <= set(text_of.values())
    assert found.rows >= rows[first]
    for row in range(found.rows):
        own = {}
        for model, vocab in enumerate(vocabularies):
            if row in text_of:
                number = vocab.tokens.get(text_of[row], -1)
            else:
                number = row if row < rows[first] and row not in vocab.tokens.values() else -1
            own[model] = number if number < rows[model] else -1
            assert found.row_of[model][row] == own[model]
        having = {model: number for model, number in own.items() if number >= 0}
        if len(having) < len(models):
            assert suppliers(found, row) == ({base: having[base]} if base in having else having)
        assert bool(found.average[row]) == (not having)
    assert found.identical == all(
        rows[m] == found.rows and rows_of(found, m) == list(range(found.rows)) for m in range(len(models))
    )


# The union, as transformers loads it


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("decoder", [False, True])
def test_transformers_gives_every_token_the_row_that_was_merged(
    tmp_path: Path, kind: str, decoder: bool
) -> None:
    from transformers import AutoTokenizer

    made = {
        "base": (WORDS, ["<s>", "</s>"]),
        "chat": (WORDS, ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]),
        "other": (["<unk>", "b", "a", "ab", "d"], ["[PAD]", "</s>", "ünï", "<|im_end|>"]),
    }
    folders = []
    for name, (words, added) in made.items():
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
        if decoder:
            numbered = enumerate([*added, "<late>"], len(words))
            config["added_tokens_decoder"] = {str(i): {"content": t, "special": True} for i, t in numbered}
        folders.append(
            folder_with(
                tmp_path / name,
                tokenizer_json=tokenizer_json(words, added, kind),
                tokenizer_config_json=config,
            )
        )
    vocabularies = [read_vocabulary(folder) for folder in folders]
    rows = [len(v.tokens) for v in vocabularies if v]
    found = align(vocabularies, rows)
    files = {name: (folders[0] / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    union = tmp_path / "union"
    union.mkdir()
    for name, content in extend_tokenizer(files, vocabularies[0], found.added, "base").items():
        (union / name).write_bytes(content)

    loaded = AutoTokenizer.from_pretrained(union)
    numbers = loaded.get_vocab()
    assert len(numbers) == found.rows == len(set().union(*(v.tokens for v in vocabularies if v)))
    for text, number in numbers.items():
        for model, vocab in enumerate(vocabularies):
            assert vocab is not None
            assert found.row_of[model][number] == vocab.tokens.get(text, -1), (text, model)
    assert loaded.encode("<|im_end|>", add_special_tokens=False) == [numbers["<|im_end|>"]]
    before = AutoTokenizer.from_pretrained(folders[0])
    assert loaded.encode("ab c </s>") == before.encode("ab c </s>")


@pytest.mark.parametrize(
    ("tokenizer_class", "kind", "special"),
    [
        ("GPT2Tokenizer", "BPE", ["<|endoftext|>"]),
        ("Qwen2Tokenizer", "BPE", ["<|endoftext|>"]),
        ("LlamaTokenizer", "BPE", ["<unk>", "<s>", "</s>"]),
        ("BertTokenizer", "WordPiece", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]),
    ],
)
def test_classes_that_rebuild_their_tokenizer_keep_the_numbers(
    tmp_path: Path, tokenizer_class: str, kind: str, special: list[str]
) -> None:
    """Some classes take only the vocabulary and the added tokens from the files, and make the rest anew."""
    from transformers import AutoTokenizer

    words, config = [*special, "a", "b", "ab"], {"tokenizer_class": tokenizer_class}
    base = folder_with(
        tmp_path / "base",
        tokenizer_json=tokenizer_json(words, [(text, words.index(text)) for text in special], kind),
        tokenizer_config_json=config,
    )
    read = read_vocabulary(base)
    assert read is not None and read.tokens == AutoTokenizer.from_pretrained(base).get_vocab()
    added = align(
        [read, vocabulary(words, ["<|im_start|>", "<|im_end|>"])], [len(words), len(words) + 2]
    ).added
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    union = tmp_path / "union"
    union.mkdir()
    for name, content in extend_tokenizer(files, read, added, "base").items():
        (union / name).write_bytes(content)
    numbers = AutoTokenizer.from_pretrained(union).get_vocab()
    assert numbers == read.tokens | {"<|im_start|>": len(words), "<|im_end|>": len(words) + 1}


def test_extending_needs_tokenizer_json() -> None:
    added = align([BASE, vocabulary(WORDS, ["<x>"])], [5, 6]).added
    with pytest.raises(InputError) as caught:
        extend_tokenizer({"tokenizer.model": b""}, BASE, added, "base")
    assert caught.value.code == "E_VOCABULARY"


def test_old_style_added_tokens_are_extended_too(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path, tokenizer_json=tokenizer_json(WORDS, ["<s>"]), added_tokens_json={"<s>": 5, "<late>": 6}
    )
    read = read_vocabulary(folder)
    added = align([read, vocabulary(WORDS, ["<x>"])], [7, 6]).added
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    extended = extend_tokenizer(files, read, added, "base")
    assert json.loads(extended["added_tokens.json"]) == {"<s>": 5, "<late>": 6, "<x>": 7}
    entries = json.loads(extended["tokenizer.json"])["added_tokens"]
    assert [entry["content"] for entry in entries] == ["<s>", "<late>", "<x>"]
    assert extended == extend_tokenizer(files, read, added, "base")


# Numbers: mergekit 0.1.5, `tokenizer_source: union`, dtype float32


def test_the_numbers_of_mergekit_for_union(tmp_path: Path) -> None:
    """Embeddings of 1 column: 100·model + row. What mergekit 0.1.5 made of them is written down below."""
    from safetensors.numpy import save_file

    made = [(WORDS, ["<s>"]), (WORDS, ["<s>", "<x>", "<z>"]), (WORDS[:4], ["<z>", "<y>", "<s>"])]
    sources, vocabularies = [], []
    for number, (words, added) in enumerate(made):
        folder = folder_with(tmp_path / str(number), tokenizer_json=tokenizer_json(words, added))
        table = 100 * (number + 1) + np.arange(len(words) + len(added), dtype=np.float32)[:, None]
        save_file({"model.embed_tokens.weight": table}, folder / "model.safetensors")
        sources.append(open_checkpoint(folder).tensors["model.embed_tokens.weight"])
        vocabularies.append(read_vocabulary(folder) or vocabulary([]))
    for base, frozen in MERGEKIT_UNION.items():
        found = align(vocabularies, [len(v.tokens) for v in vocabularies], "union", base)
        tables = [np.zeros(found.rows, np.float32) for _ in made]
        for model, table in enumerate(tables):
            source = in_vocabulary(sources, model, found)
            assert source.dtype in ("F32", "F64")
            raw = np.zeros(found.rows, {"F32": np.float32, "F64": np.float64}[source.dtype])
            source.read(0, found.rows, memoryview(raw).cast("B"))
            table[:] = raw
        order = [*WORDS, "<s>", "<x>", "<z>", "<y>"]
        ids = {token.text: token.id for token in found.added} | vocabularies[base or 0].tokens
        for model, expected in enumerate(frozen):
            assert [tables[model][ids[text]] for text in order] == pytest.approx(expected), (base, model)


MERGEKIT_UNION: dict[int | None, list[list[float]]] = {
    0: [
        [100, 101, 102, 103, 104, 105, 206, 255.5, 305],
        [200, 201, 202, 203, 204, 205, 206, 207, 305],
        [300, 301, 302, 303, 104, 306, 206, 304, 305],
    ],
    1: [
        [100, 101, 102, 103, 104, 105, 206, 207, 305],
        [200, 201, 202, 203, 204, 205, 206, 207, 305],
        [300, 301, 302, 303, 204, 306, 206, 304, 305],
    ],
    None: [
        [100, 101, 102, 103, 104, 105, 206, 255.5, 305],
        [200, 201, 202, 203, 204, 205, 206, 207, 305],
        [300, 301, 302, 303, 154, 306, 206, 304, 305],
    ],
}


# Speed


def test_large_vocabularies_are_matched_quickly() -> None:
    """4 models of 150,000 tokens, one of them numbered in another order."""
    words = [f"word{i}" for i in range(150_000)]
    vocabularies = [
        vocabulary(words),
        vocabulary(words, ["<x>"]),
        vocabulary(words[::-1], ["<y>"]),
        vocabulary(words[:-1], ["<z>"]),
    ]
    start = time.process_time()
    found = align(vocabularies, [152_064, 150_001, 150_001, 150_000])
    assert time.process_time() - start < 2
    assert found.rows == 152_064 and found.row_of[2][0] == 149_999
