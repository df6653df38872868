"""Classes of images and of texts: the same as item by item in plain transformers, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from assets.tiny_vit.build import accuracy
from merging.errors import NumbersError, TaskError
from merging.evaluation.models import Model, load_model
from merging.evaluation.scoring import Settings, make_scorer, score_batch
from merging.evaluation.tasks import Task, TextLabelItem, read_tasks
from tests import tiny_models

SET = Path(__file__).parents[2] / "assets" / "tiny_vit"


# -- images -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """The first 120 test images of the bundled set, a quarter turned."""
    folder, found = tmp_path_factory.mktemp("task"), load_file(SET / "test.safetensors")
    np.savez(folder / "turned.npz", images=np.rot90(found["images"][:120], 1, (1, 2)), labels=found["labels"][:120])
    (folder / "turned.yaml").write_text("kind: image\narrays: turned.npz\nrescale_factor: 0.125\nimage_mean: 1\n")
    return read_tasks(folder / "turned.yaml")[0]


@pytest.fixture(scope="module")
def vision() -> Model:
    return load_model(SET / "experts" / "turned")


def test_images_score_as_in_the_script_that_made_the_set(turned: Task, vision: Model) -> None:
    found = load_file(SET / "test.safetensors")
    split = torch.from_numpy(found["images"][:120]), torch.from_numpy(found["labels"][:120])
    expected = accuracy(vision.network, "turned", split)
    scorer = make_scorer(vision, turned, Settings())
    records = [
        r for start in (0, 50, 100) for r in score_batch(vision, scorer, turned, turned.items[start : start + 50])
    ]
    assert [r.item for r in records] == [item.id for item in turned.items]
    assert np.mean([r.score for r in records]) == pytest.approx(expected) and 0.8 < expected < 1
    assert [r.score == 1 for r in records] == [
        r.answer == str(item.label) for r, item in zip(records, turned.items, strict=True)
    ]
    assert len({r.prompt for r in records}) == 120 and {r.metric for r in records} == {"accuracy"}


def test_images_that_do_not_fit_the_model(turned: Task, vision: Model) -> None:
    assert turned.images is not None
    wrong = replace(turned, images=replace(turned.images, stored=turned.images.stored.repeat(2, axis=2)))
    with pytest.raises(TaskError, match="16 × 8 with 1 channel.* takes 8 × 8"):
        make_scorer(vision, wrong, Settings())
    items = (*turned.items[:5], replace(turned.items[5], label=10))
    with pytest.raises(TaskError, match="turned.npz, image 6: there is no label 10; .* has 10"):
        make_scorer(vision, replace(turned, items=items), Settings())


def test_a_broken_image_model_names_the_image(turned: Task) -> None:
    model = load_model(SET / "base")
    scorer = make_scorer(model, turned, Settings())
    with torch.no_grad():
        model.network.classifier.bias[3] = torch.nan
    with pytest.raises(NumbersError, match="turned.npz, image 8"):
        score_batch(model, scorer, turned, turned.items[7:9])


# -- texts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with three outputs and a tokenizer of letters."""
    import tokenizers as t
    import transformers

    folder = tiny_models.build("bert", tmp_path_factory.mktemp("bert") / "model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij"]
    tokenizer = t.Tokenizer(t.models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = t.pre_tokenizers.Split("", "isolated")
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = t.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    return folder


def texts(*items: tuple[str, int, tuple[int, ...]]) -> Task:
    return Task("made up", tuple(TextLabelItem(*item, line) for line, item in enumerate(items, 1)), "0", "text_label")


def test_texts_score_as_one_by_one_without_padding(classifier: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefghij"), size=generator.integers(1, 40))) for _ in range(30)]
    task = texts(
        *(
            (word, place % 3, (place % 3, 1 if place % 3 != 1 else 2) if place % 2 else ())
            for place, word in enumerate(words)
        )
    )
    model = load_model(classifier)
    scorer = make_scorer(model, task, Settings())
    records = [r for start in (0, 20) for r in score_batch(model, scorer, task, task.items[start : start + 20])]
    plain = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    for item, record in zip(task.items, records, strict=True):
        with torch.no_grad():
            logits = plain(**tokenizer(item.text, return_tensors="pt")).logits[0].tolist()
        chosen = max(item.labels or (0, 1, 2), key=lambda label: logits[label])
        assert (record.answer, record.score, record.metric) == (str(chosen), float(chosen == item.label), "accuracy")
    assert 0 < sum(record.score for record in records) < 30


def test_texts_that_do_not_fit_the_model(classifier: Path) -> None:
    model = load_model(classifier)
    assert model.context == 64
    with pytest.raises(TaskError, match="made up, line 2: it needs 65 tokens; .* room for 64"):
        make_scorer(model, texts(("a" * 62, 0, ()), ("a" * 63, 0, ())), Settings())
    with pytest.raises(TaskError, match="line 1: there is no label 3; .* has 3"):
        make_scorer(model, texts(("a", 0, (0, 3))), Settings())
    with pytest.raises(TaskError, match="is a text classifier; made up needs a causal language model"):
        make_scorer(model, replace(texts(("a", 0, ())), kind="text"), Settings())
