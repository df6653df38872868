"""Tokens: what is cut, left out or unknown is said; padding never reaches a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from merging.calibration.samples import batches, tokenize
from merging.calibration.texts import Chosen, Text, choose
from merging.checkpoints.checkpoint import open_checkpoint
from merging.errors import InputError
from merging.networks import Network, load_network

DEMO = Path(__file__).parents[2] / "assets" / "demo"


@pytest.fixture(scope="module")
def network() -> Network:
    with open_checkpoint(DEMO / "experts" / "sort") as checkpoint:
        return load_network(checkpoint)


def chosen(*texts: str) -> Chosen:
    return Chosen(tuple(Text(text, "made up", n) for n, text in enumerate(texts, 1)), {"made up": len(texts)}, 0, ())


def test_tokens_are_those_of_the_tokenizer_and_are_accounted_for(network: Network) -> None:
    path = DEMO / "calibration" / "sort.jsonl"
    drawn = choose([path], 8)
    samples = tokenize(drawn, network.tokenizer, network.vocabulary)
    assert [list(s.tokens) for s in samples] == [network.tokenizer(t.text)["input_ids"] for t in drawn.texts]
    account = samples.as_dict()
    assert json.loads(json.dumps(account)) == account
    assert (account["samples"], account["tokens"], account["longest"]) == (8, 80, 10)
    assert account["vocabulary_share"] == len({t for s in samples for t in s.tokens}) / 35
    assert account["sources"] == [{"file": str(path), "texts": 128, "used": 8}]
    assert account["hashes"] == [text.hash for text in drawn.texts] and len(set(account["hashes"])) == 8
    assert account["notes"] == []


def test_what_is_cut_left_out_or_unknown_is_said(network: Network) -> None:
    samples = tokenize(chosen("sort abc=", "sort abcdefgh=", "a", "sort A!="), network.tokenizer, 35, length=6, least=2)
    assert [len(s.tokens) for s in samples] == [5, 6, 4]
    assert [s.cut for s in samples] == [0, 4, 0]
    assert samples.tokens == 15
    assert samples.notes == (
        "1 texts were cut to 6 tokens (4 of 19 tokens are not used).",
        "1 texts have fewer than 2 tokens and were left out.",
        "2 of 19 tokens are unknown to the tokenizer.",
    )
    assert samples.as_dict()["sources"][0]["used"] == 3


def test_a_cut_keeps_the_tokens_that_the_tokenizer_puts_at_the_ends() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({"[CLS]": 0, "[SEP]": 1, "a": 2, "b": 3, "c": 4}, unk_token="a"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)])
    samples = tokenize(chosen("a b c", "a"), PreTrainedTokenizerFast(tokenizer_object=inner), 5, length=4)
    assert [s.tokens for s in samples] == [(0, 2, 3, 1), (0, 2, 1)]
    assert [s.cut for s in samples] == [1, 0]


def test_a_text_that_does_not_fit_the_model_is_named(network: Network) -> None:
    with pytest.raises(InputError, match="made up, line 2: the tokenizer gives token 34, the model knows 34") as caught:
        tokenize(chosen("sort a=", "sort z="), network.tokenizer, 34)
    assert caught.value.code == "E_VOCABULARY"
    with pytest.raises(InputError, match="None of the 2 calibration texts has 2 tokens"):
        tokenize(chosen("a", "b"), network.tokenizer, 35, least=2)
    with pytest.raises(InputError, match="too short"):
        tokenize(chosen("ab"), network.tokenizer, 35, length=1, least=2)

    def failing(text: str, **_: Any) -> Any:
        raise RuntimeError("no idea")

    with pytest.raises(InputError, match="made up, line 1: the tokenizer fails .RuntimeError: no idea"):
        tokenize(chosen("ab"), failing, 35)


def test_padding_changes_no_prediction(network: Network) -> None:
    texts = ["sort " + "hgfedcba"[:n] + "=" for n in (8, 2, 5, 2, 7)]
    samples = tokenize(chosen(*texts), network.tokenizer, network.vocabulary).samples
    seen = []
    with torch.no_grad():
        for numbers, batch in batches(samples, 2, padding=network.tokenizer.pad_token_id):
            seen += numbers
            together = network.module(**batch).logits
            for row, number in enumerate(numbers):
                alone = network.module(**samples[number].inputs()).logits[0]
                length = len(samples[number].tokens)
                assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (together.shape[1] - length)
                torch.testing.assert_close(together[row, :length], alone, rtol=1e-4, atol=1e-4)
    assert seen == [1, 3, 2, 4, 0]  # the shortest first, equal ones in their order
