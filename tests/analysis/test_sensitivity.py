"""Sensitivities are those of a plain autograd loop, on every kind of model, in the memory of one gradient."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from assets.tiny_vit.build import pixels
from merging.analysis.sensitivity import CHUNK, LOSSES, layer_of, measure_sensitivity, sum_of_products
from merging.calibration.samples import tokenize
from merging.calibration.texts import choose
from merging.checkpoints.checkpoint import open_checkpoint
from merging.errors import Cancelled, InputError, NumbersError
from merging.networks import Network, load_network
from tests import tiny_models

DEMO = Path(__file__).parents[2] / "assets" / "demo"
VIT = Path(__file__).parents[2] / "assets" / "tiny_vit"


@dataclass
class Given:
    """An example made of ready inputs."""

    tensors: dict[str, torch.Tensor]
    where: str = "made up, line 1"

    def inputs(self) -> dict[str, torch.Tensor]:
        return self.tensors


def load(folder: Path) -> Network:
    with open_checkpoint(folder) as checkpoint:
        return load_network(checkpoint)


def token_examples(count: int = 3) -> list[Given]:
    generator = torch.Generator().manual_seed(5)
    return [
        Given({"input_ids": torch.randint(3, 99, (1, 4 + 3 * n), generator=generator)}, f"made up, line {n + 1}")
        for n in range(count)
    ]


def plain(folder: Path, examples: list[Given], loss: str, auto: str) -> tuple[np.ndarray, list[str], float]:
    """The naive way: transformers' own loss where it has one, all gradients kept, float64 throughout."""
    import transformers

    model: Any = getattr(transformers, auto).from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    names = [name for name, _ in model.named_parameters()]
    rows, losses = [], []
    for example in examples:
        model.zero_grad()
        inputs = example.inputs()
        if loss == "next_token":
            value = model(**inputs, labels=inputs["input_ids"]).loss
        else:
            p = torch.softmax(model(**inputs).logits.double(), dim=-1)
            value = -(p * torch.log(p)).sum(-1).mean()
        value.backward()
        losses.append(value.item())
        rows.append(
            [float((p.detach() * p.grad).abs().sum()) if p.grad is not None else 0.0 for p in model.parameters()]
        )
    return np.array(rows), names, float(np.mean(losses))


@pytest.mark.parametrize(
    ("kind", "loss", "auto"),
    [
        ("llama", "next_token", "AutoModelForCausalLM"),
        ("llama", "entropy", "AutoModelForCausalLM"),
        ("gpt2", "next_token", "AutoModelForCausalLM"),
        ("qwen2", "next_token", "AutoModelForCausalLM"),
        ("bert", "entropy", "AutoModelForSequenceClassification"),
        ("vit", "entropy", "AutoModelForImageClassification"),
    ],
)
def test_scores_are_those_of_a_plain_loop(tmp_path: Path, kind: str, loss: str, auto: str) -> None:
    folder = tiny_models.build(kind, tmp_path / "model")
    examples = token_examples()
    if kind == "vit":
        images = torch.randn(3, 1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
        examples = [Given({"pixel_values": image}) for image in images]
    rows, _, mean_loss = plain(folder, examples, loss, auto)
    network = load(folder)
    found = measure_sensitivity(network, examples, [loss])[loss]
    assert found.mean_loss == pytest.approx(mean_loss, rel=1e-5)
    assert [score.name for score in found.tensors] == [name for name, _ in network.parameters()]
    assert {score.name for score in found.tensors} == load_file(folder / "model.safetensors").keys()
    np.testing.assert_allclose([s.score for s in found.tensors], rows.mean(0), rtol=2e-4, atol=1e-7)
    errors = rows.std(0, ddof=1) / math.sqrt(len(rows))
    np.testing.assert_allclose([s.error for s in found.tensors], errors, rtol=5e-3, atol=1e-6)
    assert found.unreached == []

    layers: dict[str, np.ndarray] = {}
    for score, column in zip(found.tensors, rows.T, strict=True):
        layers[layer_of(score.name, score.block)] = layers.get(layer_of(score.name, score.block), 0) + column
    assert [layer.name for layer in found.layers] == list(layers)
    assert {"block 0", "block 1"} < layers.keys()
    expected = np.array([column.mean() for column in layers.values()])
    np.testing.assert_allclose([layer.score for layer in found.layers], expected, rtol=2e-4)
    np.testing.assert_allclose(
        [layer.coefficient for layer in found.layers], expected / np.linalg.norm(expected), rtol=2e-4
    )
    assert math.fsum(layer.coefficient**2 for layer in found.layers if layer.coefficient) == pytest.approx(1)
    assert sum(layer.weights for layer in found.layers) == sum(p.numel() for p in network.module.parameters())


def test_the_sum_is_per_text_and_per_weight(tmp_path: Path) -> None:
    """What a batch would give is different: texts cancel each other there."""
    folder = tiny_models.build("llama", tmp_path / "model")
    network = load(folder)
    pair = [Given({"input_ids": row[None]}) for row in tiny_models.inputs("llama")["input_ids"]]
    together = measure_sensitivity(network, [Given(tiny_models.inputs("llama"))], ["entropy"])["entropy"]
    apart = measure_sensitivity(network, pair, ["entropy"])["entropy"]
    assert together.mean_loss == pytest.approx(apart.mean_loss, rel=1e-5)
    assert sum(s.score for s in together.layers) < 0.9 * sum(s.score for s in apart.layers)


def test_two_losses_in_one_go_are_those_of_two_and_nothing_is_left_behind(tmp_path: Path) -> None:
    network = load(tiny_models.build("qwen2", tmp_path / "model"))
    before = {name: parameter.detach().clone() for name, parameter in network.parameters()}
    both = measure_sensitivity(network, token_examples(), LOSSES)
    for loss in LOSSES:
        alone = measure_sensitivity(network, token_examples(), [loss])[loss]
        assert both[loss] == alone  # every bit
    for name, parameter in network.parameters():
        assert parameter.grad is None and parameter.requires_grad
        assert not parameter._post_accumulate_grad_hooks  # type: ignore[attr-defined]
        assert torch.equal(parameter, before[name])
    assert both["entropy"].positions == 4 + 7 + 10
    assert both["next_token"].positions == 3 + 6 + 9


def test_a_tied_head_is_scored_with_the_embedding_and_said(tmp_path: Path) -> None:
    found = measure_sensitivity(load(tiny_models.build("qwen2", tmp_path / "model")), token_examples())["next_token"]
    assert found.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in {score.name for score in found.tensors}
    assert "Tied weights are scored once, with the sum of their gradients: lm_head.weight in" in found.notes[-1]


def test_weights_without_a_gradient_are_named(tmp_path: Path) -> None:
    network = load(tiny_models.build("llama", tmp_path / "model"))
    network.module.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    found = measure_sensitivity(network, token_examples())["next_token"]
    assert found.unreached == ["unused"]
    assert next(score.score for score in found.tensors if score.name == "unused") == 0


def test_the_demo_expert_on_its_prompts() -> None:
    network = load(DEMO / "experts" / "sort")
    samples = tokenize(choose([DEMO / "calibration" / "sort.jsonl"], 8), network.tokenizer, network.vocabulary, least=2)
    seen: list[tuple[int, int, str]] = []
    found = measure_sensitivity(network, samples.samples, LOSSES, progress=lambda *now: seen.append(now))
    assert seen == [(n, 8, "sensitivity") for n in range(1, 9)]
    rows, names, mean_loss = plain(DEMO / "experts" / "sort", samples.samples, "next_token", "AutoModelForCausalLM")  # type: ignore[arg-type]
    assert [score.name for score in found["next_token"].tensors] == names
    np.testing.assert_allclose([s.score for s in found["next_token"].tensors], rows.mean(0), rtol=1e-4)
    assert found["next_token"].mean_loss == pytest.approx(mean_loss, rel=1e-5)
    # the demo's prompts are random letters, which nobody can predict: that is said
    assert mean_loss > math.log(35)
    assert any("blind guess" in note for note in found["next_token"].notes)
    assert not any("blind guess" in note for note in found["entropy"].notes)
    assert any("not the published Sens score" in note for note in found["entropy"].notes)
    content = found["entropy"].as_dict()
    assert content["published_sens_score"] is False and found["next_token"].as_dict()["published_sens_score"] is True
    assert json.loads(json.dumps(content, allow_nan=False)) == content


def test_the_image_experts_by_entropy() -> None:
    images = load_file(VIT / "test.safetensors")["images"][:4]
    network = load(VIT / "experts" / "turned")
    examples = [Given({"pixel_values": image[None]}) for image in pixels(images)]
    rows, _, mean_loss = plain(VIT / "experts" / "turned", examples, "entropy", "AutoModelForImageClassification")
    found = measure_sensitivity(network, examples, ["entropy"])["entropy"]
    assert found.mean_loss == pytest.approx(mean_loss, rel=1e-4)
    np.testing.assert_allclose([s.score for s in found.tensors], rows.mean(0), rtol=1e-3, atol=1e-8)
    assert found.as_dict()["layers"][0]["kind"] == "layer"


# ------------------------------------------------------------------------------------------------------ memory


def test_there_is_never_more_than_one_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import merging.analysis.sensitivity as module

    network = load(tiny_models.build("llama", tmp_path / "model"))
    waiting: list[int] = []

    def watched(weights: torch.Tensor, gradient: torch.Tensor) -> float:
        waiting.append(sum(parameter.grad is not None for _, parameter in network.parameters()))
        return sum_of_products(weights, gradient)

    monkeypatch.setattr(module, "sum_of_products", watched)
    measure_sensitivity(network, token_examples())
    assert waiting == [0] * 21 * 3  # the one at hand is already in nobody else's hands


MEASURE = """
import json
from pathlib import Path
from types import SimpleNamespace
import torch
from merging.analysis.sensitivity import measure_sensitivity
from merging.networks import Network

class Deep(torch.nn.Module):  # 24 layers of 4 MB
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(99, 1024)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(1024, 1024, bias=False) for _ in range(24))
        self.head = torch.nn.Linear(1024, 99)
    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return SimpleNamespace(logits=self.head(x))

network = Network(Deep(), "causal", None, Path("made up"), 64, 99, "cpu")

class Given:
    where = "made up"
    def inputs(self):
        return {"input_ids": torch.arange(10)[None]}

def keep_all():
    network.module(**Given().inputs()).logits.logsumexp(-1).sum().backward()

def resident(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def growth(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before

with torch.no_grad():
    network.module(**Given().inputs())  # what torch sets up once
print(json.dumps({
    "model": 4 * sum(parameter.numel() for parameter in network.module.parameters()),
    "one": growth(lambda: measure_sensitivity(network, [Given(), Given()])),
    "all": growth(keep_all),
}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is measured on Linux")
def test_peak_memory_is_one_gradient_and_not_all() -> None:
    """All gradients together take as much as the model, one at a time a small part of it."""
    root = Path(__file__).parents[2]
    child = subprocess.run([sys.executable, "-c", MEASURE], cwd=root, capture_output=True, text=True, check=True)
    bytes_of = json.loads(child.stdout)
    print(bytes_of)
    assert bytes_of["all"] > 0.85 * bytes_of["model"]
    assert bytes_of["one"] < 0.3 * bytes_of["model"]


def test_the_sum_of_products_is_exact_enough_and_leaves_the_gradient_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((CHUNK * 2 + 17,), (300, 700), (0, 5)):
        weights, gradient = torch.randn(2, *shape, generator=generator)
        before = gradient.clone()
        expected = float((weights.double() * gradient.double()).abs().sum())
        assert sum_of_products(weights, gradient) == pytest.approx(expected, rel=1e-7)
        assert torch.equal(gradient, before)
    weights, gradient = torch.randn(2, 30, 70, generator=generator)
    expected = float((weights.T.double() * gradient.T.double()).abs().sum())
    assert sum_of_products(weights.T, gradient.T) == pytest.approx(expected, rel=1e-7)


# ------------------------------------------------------------------------------------------------- what can go wrong


def test_losses_that_a_model_does_not_have(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    bert = load(tiny_models.build("bert", tmp_path / "bert"))
    with pytest.raises(InputError, match="classifier of texts has no loss .*without a label") as caught:
        measure_sensitivity(bert, token_examples())
    assert caught.value.code == "E_NO_LOSS"
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    BertModel(BertConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path / "encoder")
    for loss in LOSSES:
        with pytest.raises(InputError, match="without a head has no loss"):
            measure_sensitivity(load(tmp_path / "encoder"), token_examples(), [loss])
    BertForMaskedLM(BertConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path / "masked")
    masked = load(tmp_path / "masked")
    with pytest.raises(InputError, match="masked language model has no loss"):
        measure_sensitivity(masked, token_examples())
    assert "No token was hidden" in " ".join(
        measure_sensitivity(masked, token_examples(), ["entropy"])["entropy"].notes
    )


def test_no_text_or_one_token_is_an_error(tmp_path: Path) -> None:
    network = load(tiny_models.build("llama", tmp_path / "model"))
    with pytest.raises(InputError, match="no text to measure"):
        measure_sensitivity(network, [])
    with pytest.raises(InputError, match="one token"):
        measure_sensitivity(network, [Given({"input_ids": torch.tensor([[5]])})])
    with pytest.raises(ValueError, match="none of"):
        measure_sensitivity(network, token_examples(), ["perplexity"])


@pytest.mark.parametrize(
    ("tensor", "value", "complaint"),
    [
        ("model.layers.1.mlp.up_proj.weight", math.nan, "The loss is nan"),
        ("lm_head.weight", 3e37, "The gradient of .* is not finite"),
    ],
)
def test_numbers_that_are_not_finite_name_the_text(tmp_path: Path, tensor: str, value: float, complaint: str) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights[tensor][3] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumbersError, match=f"{complaint} on made up, line 1") as caught:
        measure_sensitivity(load(folder), token_examples())
    assert caught.value.code == "E_LOSS"


def test_stops_between_texts_and_within_a_backward_pass(tmp_path: Path) -> None:
    network = load(tiny_models.build("llama", tmp_path / "model"))
    stop = threading.Event()
    seen = []

    def watch(done: int, total: int, what: str) -> None:
        seen.append(done)
        if done == 2:
            stop.set()

    with pytest.raises(Cancelled):
        measure_sensitivity(network, token_examples(3), progress=watch, stop=stop)
    assert seen == [1, 2]
    reached: list[int] = []
    handle = network.module.model.layers[1].mlp.up_proj.weight.register_post_accumulate_grad_hook(lambda p: stop.set())
    earlier = network.module.model.layers[0].mlp.up_proj.weight.register_post_accumulate_grad_hook(
        lambda p: reached.append(1)
    )
    stop.clear()
    with pytest.raises(Cancelled):
        measure_sensitivity(network, token_examples(1), stop=stop)
    handle.remove()
    earlier.remove()
    assert reached == []  # the backward pass did not get to the first block
    assert all(parameter.grad is None for _, parameter in network.parameters())
