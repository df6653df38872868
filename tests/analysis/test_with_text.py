"""From models and text files to findings: the right texts for each expert, the right numbers, and nothing lost."""

from __future__ import annotations

import json
import math
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.analysis.models import open_models
from merging.analysis.sensitivity import measure_sensitivity
from merging.analysis.with_text import draw, measure_models, measure_with_text
from merging.calibration.samples import tokenize
from merging.calibration.texts import choose
from merging.checkpoints.checkpoint import open_checkpoint
from merging.errors import Cancelled, InputError, NumbersError, RecipeError
from merging.networks import load_network
from tests import tiny_models

DEMO = Path(__file__).parents[2] / "assets" / "demo"
VIT = Path(__file__).parents[2] / "assets" / "tiny_vit"
BASE, EXPERTS = str(DEMO / "base"), [str(DEMO / "experts" / name) for name in ("sort", "rotate")]


def test_the_demo_experts_on_their_own_prompts() -> None:
    seen: list[tuple[int, int, str]] = []
    findings = measure_with_text(
        BASE, EXPERTS, DEMO / "calibration", samples=16, progress=lambda *now: seen.append(now)
    )
    assert not findings.problems and [one.expert for one in findings.experts] == ["sort", "rotate"]
    for one in findings.experts:
        path = DEMO / "calibration" / f"{one.expert}.jsonl"
        chosen = choose([path], 16)
        assert one.texts["hashes"] == [text.hash for text in chosen.texts]
        with open_checkpoint(DEMO / "experts" / one.expert) as checkpoint:
            network = load_network(checkpoint)
        samples = tokenize(chosen, network.tokenizer, network.vocabulary)
        assert one.sensitivity == measure_sensitivity(network, samples.samples)["next_token"]
        assert one.entropy is not None and one.entropy.loss == "entropy"
        assert one.whitened is not None and len(one.whitened.spectra) == 4 * 7
        # the task vector's output changes at the block that reads its input first, computed here by hand
        name = "model.layers.0.self_attn.q_proj.weight"
        [spectrum] = [s.spectrum for s in one.whitened.spectra if s.spectrum.tensor == name]
        old, new = (
            load_file(folder / "model.safetensors")[name] for folder in (DEMO / "base", DEMO / "experts" / one.expert)
        )
        with torch.no_grad():
            block = network.module.model.layers[0]
            x = torch.cat([
                block.input_layernorm(network.module.model.embed_tokens(s.inputs()["input_ids"]))[0] for s in samples
            ])  # fmt: skip
        assert spectrum.frobenius == pytest.approx(float((x @ (new - old).T).norm()) / math.sqrt(len(x)), rel=1e-4)
        assert {s.tokens for s in one.whitened.spectra} == {len(x)} == {sum(len(s.tokens) for s in samples)}
    assert seen[0] == (1, 16, "sort: sensitivity") and seen[-1] == (16 + 28, 16 + 28, "rotate: whitened")
    content = findings.as_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    tensor = content["experts"][0]["whitened"]["tensors"][0]
    assert tensor["tensor"] == name and tensor["block"] == 0 and tensor["kind"] == "attn_q" and tensor["enough"] is True
    assert tensor["effective_rank_of_energy"] > 1
    assert content["problems"] == []


def test_again_is_the_same_to_the_last_bit() -> None:
    one, other = (
        measure_with_text(BASE, EXPERTS[:1], DEMO / "calibration" / "sort.jsonl", samples=3).as_dict() for _ in "ab"
    )
    assert one == other


def test_a_classifier_has_no_sens_score_but_everything_else(tmp_path: Path) -> None:
    base = tiny_models.build("bert", tmp_path / "base")
    expert = tiny_models.perturb(base, tmp_path / "expert", seed=1)
    text = tmp_path / "text.txt"
    text.write_text("ab\n\nba\n\nabab\n")
    tokenizer(99).save_pretrained(base)  # the expert has none of its own
    findings = measure_with_text(str(base), [str(expert)], text)
    [one] = findings.experts
    assert one.sensitivity is None and "without a label" in one.left_out["sensitivity"]
    assert one.entropy is not None and one.whitened is not None and len(one.whitened.spectra) == 14
    assert one.texts["notes"] == ["32 texts were asked for; there are only 3."]
    with pytest.raises(InputError) as caught:
        measure_with_text(str(base), [str(expert)], text, what=["sensitivity"])
    assert caught.value.code == "E_NO_LOSS"


def tokenizer(size: int):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({chr(ord("a") + n): size - 1 - n for n in range(size)}, unk_token="c"))
    inner.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_one_broken_expert_does_not_lose_the_others(tmp_path: Path) -> None:
    broken = Path(shutil.copytree(DEMO / "experts" / "rotate", tmp_path / "rotate"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    findings = measure_with_text(BASE, [str(broken), EXPERTS[0]], DEMO / "calibration", what=["entropy"], samples=2)
    assert [one.expert for one in findings.experts] == ["sort"]
    assert findings.experts[0].whitened is None and findings.experts[0].sensitivity is None
    [problem] = findings.as_dict()["problems"]
    assert (problem["expert"], problem["code"]) == ("rotate", "E_LOSS")
    assert "rotate.jsonl, line" in problem["what"]
    with pytest.raises(NumbersError):
        measure_with_text(BASE, [str(broken)], DEMO / "calibration", samples=2)


def test_mistakes_in_texts_come_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import merging.analysis.with_text as module

    def never(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(module, "load_network", never)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(InputError, match="bad.jsonl, line 2"):
        measure_with_text(BASE, EXPERTS, [DEMO / "calibration" / "sort.jsonl", bad])
    with pytest.raises(RecipeError, match="magic cannot be measured"):
        measure_with_text(BASE, EXPERTS, bad, what=["magic"])
    with pytest.raises(RecipeError, match="nothing cannot be measured"):
        measure_with_text(BASE, EXPERTS, bad, what=[])


def test_texts_and_models_that_do_not_fit(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("sort abc=")
    expert = Path(shutil.copytree(DEMO / "experts" / "sort", tmp_path / "sort"))
    base = Path(shutil.copytree(DEMO / "base", tmp_path / "base"))
    for folder in (expert, base):
        (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        measure_with_text(str(base), [str(expert)], text)
    tokenizer(60).save_pretrained(expert)
    with pytest.raises(InputError, match="text.txt, line 1: the tokenizer gives token") as caught:
        measure_with_text(str(base), [str(expert)], text)
    assert caught.value.code == "E_VOCABULARY"
    with pytest.raises(InputError, match="takes no text"):
        measure_with_text(str(VIT / "base"), [str(VIT / "experts" / "turned")], text)


def test_a_long_text_is_cut_to_the_context(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("sort " + "a" * 100)
    [one] = measure_with_text(BASE, EXPERTS[:1], text, what=["sensitivity"]).experts
    assert one.texts["longest"] == 64
    assert one.texts["notes"][-1] == "1 texts were cut to 64 tokens (37 of 101 tokens are not used)."


def test_stops_and_takes_opened_models() -> None:
    stop = threading.Event()
    with open_models(BASE, EXPERTS) as models, pytest.raises(Cancelled):
        measure_models(models, DEMO / "calibration", progress=lambda *_: stop.set(), stop=stop)


def test_a_failed_measurement_does_not_lose_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    import merging.analysis.with_text as module

    def failing(*_: object, **__: object) -> None:
        raise NumbersError("E_OVERFLOW", "Too large.")

    monkeypatch.setattr(module, "measure_whitened", failing)
    findings = measure_with_text(BASE, EXPERTS[:1], DEMO / "calibration", samples=2)
    assert findings.experts[0].sensitivity is not None and findings.problems["sort"].code == "E_OVERFLOW"


def test_hidden_states_of_all_models_on_the_same_tokens() -> None:
    findings = measure_with_text(BASE, EXPERTS, DEMO / "calibration", BASE, what=["representations"], samples=12)
    assert [one.model for one in findings.representations] == ["base", "sort", "rotate", "merged"]
    assert not findings.experts and not findings.problems
    base, sort, _, merged = findings.representations
    assert base.layers == merged.layers != sort.layers  # the "merged" model is the base
    assert {one.tokens for one in findings.representations} == {2 * 12 * 10}
    assert len(base.layers) == 5
    assert len(findings.as_dict()["representations"]) == 4


def test_the_key_of_the_drawn_texts_follows_the_texts(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one\n\ntwo")
    [first, same] = [one.key for one in draw(["a", "b"], text, 2)]
    text.write_text("one\n\nthree")
    assert first == same != draw(["a", "b"], text, 2)[0].key
