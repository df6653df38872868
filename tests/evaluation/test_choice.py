"""Choices agree with a plain float64 loop over items, choices and tokens, whatever tokenizer and batches."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from merging.errors import NumbersError, TaskError
from merging.evaluation.choice import Choice
from merging.evaluation.likelihood import log_likelihoods
from merging.evaluation.models import Model, load_model
from merging.evaluation.scoring import Settings, make_scorer, score_batch
from merging.evaluation.tasks import ChoiceItem, Task
from tests.evaluation.small_models import LETTERS, Reference, language_model

DEMO = Path(__file__).parents[2] / "assets" / "demo"
FOLDERS = {
    "llama": {},
    "gpt2 without beginning token": {"kind": "gpt2", "begin": False},
    "end token added": {"adds_end": True},
}


def task_of(*items: tuple[str, tuple[str, ...], int]) -> Task:
    return Task("made up", tuple(ChoiceItem(*item, line) for line, item in enumerate(items, 1)), "0", "choice")


def random_task(count: int) -> Task:
    generator = random.Random(3)

    def word(longest: int) -> str:
        return "x" + "".join(generator.choices(LETTERS, k=generator.randint(1, longest)))

    items = ((word(12), tuple({word(8) for _ in range(4)}), 0) for _ in range(count))
    return task_of(*items)


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(tmp_path_factory.mktemp("model"), **FOLDERS[request.param])


def expected(folder: Path, task: Task) -> list[list[float]]:
    reference = Reference(folder)
    found = []
    for item in task.items:
        prompt = reference.tokenizer(item.prompt)["input_ids"]
        prompt = prompt[:-1] if prompt[-1] == reference.tokenizer.eos_token_id else prompt
        choices = [reference.tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in item.choices]
        found.append([reference.log_likelihood(prompt + choice, len(prompt)) for choice in choices])
    return found


def test_likelihoods_are_those_of_a_plain_loop_in_float64(folder: Path) -> None:
    task, model = random_task(12), load_model(folder)
    right = expected(folder, task)
    for batch_size in (5, 64):
        scorer = Choice(model, task, Settings(), batch_size)
        for item, values in zip(task.items, right, strict=True):
            with torch.inference_mode():
                found = log_likelihoods(model, scorer.sequences[item], batch_size)
            assert found == pytest.approx(values, abs=2e-5)
    for size in (12, 5):
        records = [
            record
            for start in range(0, 12, size)
            for record in score_batch(
                model, make_scorer(model, task, Settings(), size), task, task.items[start : start + size]
            )
        ]
        raw = [values.index(max(values)) for values in right]
        per_byte = []
        for item, values in zip(task.items, right, strict=True):
            shares = [value / len(c.strip().encode()) for value, c in zip(values, item.choices, strict=True)]
            per_byte.append(shares.index(max(shares)))
        by_metric = {m: [r for r in records if r.metric == m] for m in ("choice", "choice_normalized")}
        assert [r.score for r in by_metric["choice"]] == [float(place == 0) for place in raw]
        assert [r.score for r in by_metric["choice_normalized"]] == [float(place == 0) for place in per_byte]
        assert [r.answer for r in by_metric["choice"]] == [i.choices[p] for i, p in zip(task.items, raw, strict=True)]
        assert {r.length for r in records} == {0}
    assert raw != per_byte  # the normalisation mattered


def test_a_token_across_the_border_is_scored_as_a_whole_for_all_choices(tmp_path: Path) -> None:
    """Prompt "xa", choices "b" and "c": "ab" is one token, so what is compared is p(x, ab) and p(x, a, c)."""
    folder = language_model(tmp_path, merges=[("a", "b")])
    task, model, reference = task_of(("xa", ("b", "c"), 0)), load_model(folder), Reference(folder)
    (sequences,) = Choice(model, task, Settings(), 8).sequences.values()
    words = [reference.tokenizer.convert_ids_to_tokens(one.tokens[one.start :]) for one in sequences]
    assert words == [["ab"], ["a", "c"]]
    with torch.inference_mode():
        found = log_likelihoods(model, sequences, 8)
    assert found == pytest.approx([reference.log_likelihood(one.tokens, one.start) for one in sequences], abs=2e-5)


def test_choices_of_one_token_cost_one_row(tmp_path: Path) -> None:
    folder = language_model(tmp_path)
    model, task = load_model(folder), task_of(("one two = ", ("a", "b", "c", "d"), 2), ("other ", ("a", "b"), 0))
    shapes = []
    hook = model.network.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    score_batch(model, make_scorer(model, task, Settings()), task, task.items)
    hook.remove()
    assert shapes == [(2, 11)]


def test_the_demo_expert_knows_its_skill() -> None:
    items = [
        ("sort hgfedcba=", ("abcdefgh", "abcdefhg", "hgfedcba"), 0),
        ("sort dbcaaegf=", ("dbcaaegf", "aabcdefg"), 1),
    ]
    model, task = load_model(DEMO / "experts" / "sort"), task_of(*items)
    records = score_batch(model, make_scorer(model, task, Settings()), task, task.items)
    assert [(r.metric, r.score) for r in records] == [("choice", 1), ("choice_normalized", 1)] * 2
    assert {r.answer for r in records} == {"abcdefgh", "aabcdefg"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(language_model(tmp_path_factory.mktemp("model")))


def test_an_item_longer_than_the_context_names_its_line(small: Model) -> None:
    assert make_scorer(small, task_of(("x" * 45, ("abc", "b"), 0)), Settings())
    with pytest.raises(TaskError, match="made up, line 2: it needs 49 tokens; .* room for 48"):
        make_scorer(small, task_of(("x", ("a", "b"), 0), ("x" * 45, ("abcd", "b"), 0)), Settings())


def test_characters_that_the_tokenizer_lacks_name_their_line() -> None:
    model = load_model(DEMO / "base")
    with pytest.raises(TaskError, match="made up, line 1: choice 1 has a character .* lacks"):
        make_scorer(model, task_of(("sort ab=", ("ab", "BA"), 0)), Settings())


def test_nan_is_an_error_and_an_impossible_choice_is_not(tmp_path: Path) -> None:
    model = load_model(language_model(tmp_path))
    task = task_of(("x", ("a", "b"), 0), ("yz", ("a", "b"), 1))
    head = model.network.get_output_embeddings().weight
    scorer = make_scorer(model, task, Settings())

    def only(values: float) -> object:
        def change(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
            output[..., model.tokenizer.convert_tokens_to_ids("a")] = values
            return output

        return model.network.get_output_embeddings().register_forward_hook(change)

    hook = only(-torch.inf)
    assert [r.score for r in score_batch(model, scorer, task, task.items) if r.metric == "choice"] == [0, 1]
    hook.remove()  # type: ignore[attr-defined]
    with torch.no_grad():
        head[5] = torch.nan
    with pytest.raises(NumbersError) as caught:
        score_batch(model, scorer, task, task.items[1:])
    assert caught.value.code == "E_LOGITS" and "made up, line 2" in caught.value.what
