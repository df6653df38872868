"""Networks have exactly the weights of their files, and every parameter knows its tensor's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.checkpoints.checkpoint import open_checkpoint
from merging.errors import InputError
from merging.networks import Network, load_network, run, threads_of_torch
from tests import tiny_models

DEMO = Path(__file__).parents[1] / "assets" / "demo"
VIT = Path(__file__).parents[1] / "assets" / "tiny_vit"


def load(path: Path, **options: object) -> Network:
    with open_checkpoint(path) as checkpoint:
        return load_network(checkpoint, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "purpose", "tied"),
    [
        ("llama", "causal", {}),
        ("qwen2", "causal", {"lm_head.weight": "model.embed_tokens.weight"}),
        ("gpt2", "causal", {"lm_head.weight": "transformer.wte.weight"}),
        ("bert", "classifier", {}),
        ("vit", "image", {}),
    ],
)
def test_parameters_are_the_tensors_of_the_files(tmp_path: Path, kind: str, purpose: str, tied: dict) -> None:
    folder = tiny_models.build(kind, tmp_path / "model")
    network = load(folder)
    assert (network.kind, network.tied, network.tokenizer) == (purpose, tied, None)
    assert (network.context, network.vocabulary) == ((None, 0) if kind == "vit" else (64, 99))
    weights = load_file(folder / "model.safetensors")
    parameters = dict(network.parameters())
    assert parameters.keys() == weights.keys()
    assert all(torch.equal(parameters[name], weights[name]) for name in weights)
    with torch.no_grad():
        found = run(network, tiny_models.inputs(kind), "").logits
    torch.testing.assert_close(found, tiny_models.logits(folder, kind), rtol=1e-5, atol=1e-6)


def test_16_bits_become_32_and_a_single_file_is_as_good_as_its_folder(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model", dtype="bfloat16")
    one, other = load(folder), load(folder / "model.safetensors")
    weights = load_file(folder / "model.safetensors")
    for (name, a), (same, b) in zip(one.parameters(), other.parameters(), strict=True):
        assert name == same and a.dtype == torch.float32
        assert torch.equal(a, b) and torch.equal(a, weights[name].float())


def test_files_of_another_prefix_keep_their_names(tmp_path: Path) -> None:
    """As the original GPT-2 has them: h.0… instead of transformer.h.0…"""
    folder = tiny_models.build("gpt2", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    plain = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    network = load(folder)
    assert dict(network.parameters()).keys() == plain.keys()
    assert network.tied == {"lm_head.weight": "wte.weight"}


def test_an_adapter_is_loaded_on_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(DEMO / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.merge_and_unload().state_dict()
    with (
        open_checkpoint(DEMO / "base") as checkpoint,
        open_checkpoint(tmp_path / "adapter", base=checkpoint) as adapter,
    ):
        network = load_network(adapter)
    for name, parameter in network.parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-7)
    assert network.tokenizer("sort ab=")["input_ids"]  # the base's


def change_weights(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("E_MISSING_TENSOR", lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight")),
        ("E_EXTRA_TENSOR", lambda weights: weights.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2)})),
        ("E_SHAPE", lambda weights: weights.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(2, 2)})),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path: Path, code: str, change: object) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    change_weights(folder, change)
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(InputError) as caught:
            load(path)
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (None, "has no config.json"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "'T5ForConditionalGeneration' cannot be run"),
        ({"architectures": None}, "cannot be run"),
        ({"model_type": "never_heard_of"}, "cannot be loaded"),
        ({"hidden_size": "wide"}, "cannot be loaded"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "model_type": "unknown_here"}, "cannot be loaded"),
    ],
)
def test_what_is_no_network_is_refused(tmp_path: Path, change: dict | None, complaint: str) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    config = folder / "config.json"
    if change is None:
        config.unlink()
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(InputError, match=complaint) as caught:
        load(folder)
    assert caught.value.code == "E_NOT_A_MODEL"


def test_a_broken_tokenizer_and_an_impossible_input_are_typed_errors(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO / "base", tmp_path / "model"))
    network = load(folder)
    with pytest.raises(InputError, match="cannot be run on line 3"):
        run(network, {"input_ids": torch.tensor([[99]])}, "line 3")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer in .* cannot be loaded"):
        load(folder)


def test_a_tokenizer_may_come_from_elsewhere(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO / "base", tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert load(folder).tokenizer is None
    assert load(folder, tokenizer_from=[DEMO / "base"]).tokenizer("ab")["input_ids"]


def test_an_encoder_has_no_head(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    BertModel(BertConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path / "encoder")
    assert load(tmp_path / "encoder").kind == "encoder"


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with threads_of_torch(3):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before
