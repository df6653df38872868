"""Losses of texts agree with a plain float64 loop over tokens, and every byte is paid for once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from merging.errors import NumbersError, TaskError
from merging.evaluation.models import Model, load_model
from merging.evaluation.scoring import Settings, make_scorer, score_batch
from merging.evaluation.tasks import Task, TextItem
from merging.evaluation.text_loss import windows
from tests.evaluation.small_models import Reference, language_model

TEXTS = ["a", "Ähnlich wär es.", "this is the end of the line and this is the end of the path", "x" * 48, "y" * 49]
FOLDERS = {"llama": {"merges": [("t", "h")]}, "gpt2": {"kind": "gpt2", "begin": False}, "end": {"adds_end": True}}
CASES = [
    ("llama", Settings()),
    ("gpt2", Settings()),
    ("llama", Settings(window=10, overlap=3)),
    ("end", Settings(window=7, overlap=1)),
]


def task_of(*texts: str) -> Task:
    return Task("made up", tuple(TextItem(text, line) for line, text in enumerate(texts, 1)), "0", "text")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: language_model(tmp_path_factory.mktemp(name), **how) for name, how in FOLDERS.items()}


@pytest.fixture(scope="module")
def small(folders: dict[str, Path]) -> Model:
    return load_model(folders["llama"])


def expected(reference: Reference, text: str, window: int, overlap: int) -> tuple[float, float]:
    """Bits per byte and nats per token, each token on its own from the tokens that the definition lets it see."""
    ids = reference.tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = reference.tokenizer.bos_token_id
    tokens = [reference.tokenizer.eos_token_id if begin is None else begin, *ids]
    total = 0.0
    for place in range(1, len(tokens)):
        step = window + 1 - overlap
        first = 0 if place <= window else window + 1 + (place - window - 1) // step * step - overlap
        seen = tokens[first : place + 1]
        assert len(seen) > min(place, overlap)
        total -= reference.log_likelihood(seen, len(seen) - 1)
    return total / math.log(2) / len(text.encode()), total / len(ids)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_agrees_with_a_plain_loop_in_float64(folders: dict[str, Path], name: str, settings: Settings) -> None:
    model, reference, task = load_model(folders[name]), Reference(folders[name]), task_of(*TEXTS)
    assert model.context == 48
    records = score_batch(model, make_scorer(model, task, settings, 3), task, task.items)
    assert [r.metric for r in records] == ["nll_per_byte", "nll_per_token"] * len(TEXTS)
    window = settings.window or 48
    for text, bits, nats in zip(TEXTS, records[::2], records[1::2], strict=True):
        right = expected(reference, text, window, settings.overlap or window // 2)
        assert (bits.score, nats.score) == pytest.approx(right, rel=1e-5)
        assert (bits.prompt, bits.answer, bits.length) == (nats.prompt, "", 0)


def test_the_prompt_hash_tells_windows_apart(small: Model) -> None:
    model, task = small, task_of(TEXTS[2])
    kinds = [Settings(), Settings(window=10, overlap=3), Settings(window=10, overlap=4)]
    prompts = {score_batch(model, make_scorer(model, task, one), task, task.items)[0].prompt for one in kinds}
    assert len(prompts) == 3


@given(some.integers(2, 200), some.integers(1, 40), some.data())
def test_windows_score_every_token_once_from_enough_context(count: int, window: int, data: some.DataObject) -> None:
    overlap = data.draw(some.integers(1, max(1, window - 1)))
    tokens, scored = list(range(count)), []
    for piece in windows(tokens, window, overlap):
        assert len(piece.tokens) - 1 <= window
        for place in range(piece.start, len(piece.tokens)):
            scored.append(piece.tokens[place])
            assert place >= min(piece.tokens[place], overlap)
            assert piece.tokens[place - 1] == piece.tokens[place] - 1
    assert scored == tokens[1:]


@pytest.mark.parametrize("settings", [Settings(window=49), Settings(window=8, overlap=8)])
def test_windows_that_make_no_sense(small: Model, settings: Settings) -> None:
    with pytest.raises(TaskError, match="window"):
        make_scorer(small, task_of("a"), settings)


def test_characters_that_the_tokenizer_lacks_name_their_line() -> None:
    model = load_model(Path(__file__).parents[2] / "assets" / "demo" / "base")
    with pytest.raises(TaskError, match="made up, line 2: the text has a character .* lacks"):
        make_scorer(model, task_of("sort ab=ab", "Sort"), Settings())


def test_nan_names_model_and_line(tmp_path: Path) -> None:
    model, task = load_model(language_model(tmp_path)), task_of("good", "bad")
    with torch.no_grad():
        model.network.get_input_embeddings().weight[model.tokenizer.convert_tokens_to_ids("b")] = torch.inf
    with pytest.raises(NumbersError) as caught:
        score_batch(model, make_scorer(model, task, Settings()), task, task.items)
    assert caught.value.code == "E_LOGITS"
    assert str(tmp_path) in caught.value.what and "made up, line 2" in caught.value.what
