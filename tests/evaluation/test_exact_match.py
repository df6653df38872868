"""Exact match agrees with a plain token-by-token decoder, repeats itself, and refuses what would score nonsense."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest

from merging.errors import NumbersError, TaskError
from merging.evaluation.exact_match import Score, evaluate, summary, wilson_interval
from merging.evaluation.models import Model, load_model
from merging.evaluation.records import Record
from merging.evaluation.tasks import Item, Task, read_task

DEMO = Path(__file__).parents[2] / "assets" / "demo"


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(DEMO / "experts" / "sort")


def task_of(*pairs: tuple[str, str]) -> Task:
    return Task("made up", tuple(Item(prompt, answer, line) for line, (prompt, answer) in enumerate(pairs, 1)), "0")


def first_items(skill: str, count: int) -> Task:
    return Task(skill, read_task(DEMO / "tasks" / f"{skill}.jsonl").items[:count], "0")


def plain_greedy(model: Model, prompt: str, most: int) -> str:
    """One prompt, no padding, no cache, no generate(): the most likely token, again and again."""
    tokens = model.tokenizer(prompt)["input_ids"]
    start = len(tokens)
    with torch.inference_mode():
        for _ in range(most):
            token = int(model.network(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
            if token == model.tokenizer.eos_token_id:
                break
            tokens.append(token)
    return model.tokenizer.decode(tokens[start:])


def test_agrees_with_decoding_one_by_one_whatever_the_lengths_and_batches(model: Model) -> None:
    whole = [item.prompt.split(" ")[1][:8] for item in first_items("sort", 24).items]
    words = [word[: 3 + number % 6] for number, word in enumerate(whole)]
    task = task_of(*((f"sort {word}=", "".join(sorted(word)) if len(word) % 2 else "a") for word in words))
    expected = [plain_greedy(model, item.prompt, most=9) for item in task.items]
    for batch_size in (24, 7, 1):
        score = evaluate(model, task, batch_size=batch_size)
        assert [record.answer for record in score.records] == expected
        assert [record.item for record in score.records] == [item.id for item in task.items]
        assert [record.length for record in score.records] == [len(prediction) for prediction in expected]
        assert [r.score for r in score.records] == [p == i.answer for p, i in zip(expected, task.items, strict=True)]
        assert {(r.model, r.task, r.metric) for r in score.records} == {(model.key, "made up", "exact_match")}
        assert len({record.prompt for record in score.records}) == 24
    assert 0 < score.correct < score.total  # both cases occurred
    assert score.accuracy == score.correct / 24
    assert score.interval == wilson_interval(score.correct, 24)


def test_a_response_that_goes_on_after_the_answer_is_wrong(model: Model) -> None:
    score = evaluate(model, task_of(("sort dbca=", "ab"), ("sort fe=", "e")))
    assert [record.score for record in score.records] == [0, 0]
    assert score.records[0].length == 3  # cut off one token after the longest answer


def test_white_space_at_the_ends_of_an_answer_does_not_matter(model: Model) -> None:
    right = plain_greedy(model, "sort hgfedcba=", 9)
    assert evaluate(model, task_of(("sort hgfedcba=", f" {right}\n"))).correct == 1


def test_reports_progress_and_leaves_the_number_of_threads_alone(model: Model) -> None:
    before, seen, threads = torch.get_num_threads(), [], set()
    torch.set_num_threads(2)
    hook = model.network.register_forward_pre_hook(lambda *_: threads.add(torch.get_num_threads()))
    try:
        task = first_items("sort", 5)
        evaluate(model, task, batch_size=2, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(2, 5), (4, 5), (5, 5)]
        assert threads == {1}
        assert torch.get_num_threads() == 2
    finally:
        hook.remove()
        torch.set_num_threads(before)


def test_a_task_that_the_model_cannot_write_or_hold_is_an_error(model: Model) -> None:
    with pytest.raises(TaskError, match="made up, line 2: .* lacks"):
        evaluate(model, task_of(("sort ab=", "ab"), ("sort ba=", "A")))
    with pytest.raises(TaskError, match="made up, line 2: it needs 67 tokens; .* room for 64"):
        evaluate(model, task_of(("sort ab=", "a"), ("sort " + "a" * 63 + "=", "a")))


def test_nan_in_the_logits_is_an_error_that_names_model_task_and_item(copy: Path) -> None:
    model = load_model(copy)
    with torch.no_grad():  # only the letter b is broken
        model.network.get_input_embeddings().weight[model.tokenizer.convert_tokens_to_ids("b")] = torch.nan
    task = task_of(("sort cda=", "acd"), ("sort ab=", "ab"))
    with pytest.raises(NumbersError) as caught:
        evaluate(model, task)
    assert caught.value.code == "E_LOGITS"
    assert all(part in caught.value.what for part in (str(copy), "made up, line 2", task.items[1].id))


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 400), (400, 400), (8, 10), (37, 250), (399, 400)])
def test_wilson_interval_is_that_of_scipy(correct: int, total: int) -> None:
    expected = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("correct", "total"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_interval_wants_a_share(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="share"):
        wilson_interval(correct, total)


def score_of(correct: int, total: int = 10, task: str = "t", sha256: str = "0") -> Score:
    records = (Record("m", task, str(i), "exact_match", float(i < correct), "p", 1, 0.0, "") for i in range(total))
    return Score(task, sha256, tuple(records))


def test_summary_divides_what_its_docstring_says() -> None:
    base = {"a": score_of(2), "b": score_of(5)}
    experts = {"a": score_of(10), "b": score_of(9)}
    found = summary(base, experts, {"a": score_of(8), "b": score_of(4)})
    assert found.accuracy == {"a": 0.8, "b": 0.4}
    assert found.mean == pytest.approx(0.6)
    assert found.gain_kept == pytest.approx({"a": 6 / 8, "b": -1 / 4})
    assert found.mean_gain_kept == pytest.approx(0.25)
    assert found.least_gain_kept == pytest.approx(-0.25)
    assert found.retention == pytest.approx({"a": 8 / 10, "b": 4 / 9})
    assert found.mean_retention == pytest.approx((0.8 + 4 / 9) / 2)
    assert found.least_retention == pytest.approx(4 / 9)


def test_summary_has_no_number_where_there_is_no_gain_to_keep() -> None:
    found = summary({"a": score_of(5)}, {"a": score_of(5)}, {"a": score_of(5)})
    assert math.isnan(found.mean_gain_kept) and math.isnan(found.least_gain_kept)
    assert found.mean_retention == 1


@pytest.mark.parametrize("other", [score_of(5, sha256="1"), score_of(5, total=9), None])
def test_summary_compares_only_the_same_items(other: Score | None) -> None:
    with pytest.raises(TaskError, match="same items"):
        summary({"a": score_of(5)}, {"a": score_of(5)}, {"a": other} if other else {})


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO / "base", tmp_path / "model"))


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_models_own_sampling_settings_do_not_matter(copy: Path) -> None:
    task = first_items("reverse", 40)
    expected = [record.answer for record in evaluate(load_model(DEMO / "base"), task).records]
    change_json(copy / "generation_config.json", do_sample=True, temperature=5.0, num_beams=3, repetition_penalty=9.0)
    assert [record.answer for record in evaluate(load_model(copy), task).records] == expected


def test_every_end_token_of_the_model_ends_a_response(copy: Path) -> None:
    change_json(copy / "generation_config.json", eos_token_id=[1, 10])  # 10: the letter b
    model = load_model(copy)
    assert model.tokenizer.convert_ids_to_tokens([10]) == ["b"]
    usual = evaluate(load_model(DEMO / "base"), first_items("unique", 40)).records
    found = evaluate(model, first_items("unique", 40)).records
    assert [record.answer for record in found] == [record.answer.split("b")[0] for record in usual]
    assert any("b" in record.answer for record in usual)


def test_a_tokenizer_without_padding_token_pads_with_the_end_token(copy: Path) -> None:
    expected = evaluate(load_model(copy), task_of(("sort ab=", "ab"), ("sort dcba=", "abcd")))
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    model = load_model(copy)
    assert model.tokenizer.pad_token == "<eos>"
    found = evaluate(model, task_of(("sort ab=", "ab"), ("sort dcba=", "abcd")))
    assert [record.answer for record in found.records] == [record.answer for record in expected.records]


def test_special_tokens_in_a_response_are_not_overlooked(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO / "experts" / "sort", tmp_path / "model"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    letter = dict(tokenizer["added_tokens"][0], id=tokenizer["model"]["vocab"]["a"], content="a")
    tokenizer["added_tokens"].append(letter)  # "a" is a special token now
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    usual = evaluate(load_model(DEMO / "experts" / "sort"), first_items("sort", 60))
    chosen = [
        item
        for item, record in zip(first_items("sort", 60).items, usual.records, strict=True)
        if record.score and item.answer.count("a") == 1
    ]
    pairs = [(item.prompt, item.answer.replace("a", "")) for item in chosen]
    records = evaluate(load_model(folder), task_of(*pairs)).records
    assert [record.answer for record in records] == [item.answer for item in chosen] != []
    assert not any(record.score for record in records)
