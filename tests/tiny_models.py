"""Tiny models of real architectures, made by transformers itself and saved the way it saves them.

``build(kind, folder)`` writes a model with random weights; ``perturb(base, folder, seed)`` writes an
expert: the same model with a little noise on every floating-point tensor. Both return the folder. Widths
are odd on purpose (heads share keys, the vocabulary is no power of two) so that a transposed or misplaced
tensor cannot go unseen.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

KINDS = ("llama", "qwen2", "mistral", "gpt2", "bert", "vit")


def build(kind: str, folder: Path, seed: int = 0, dtype: str = "float32") -> Path:
    """Write a tiny model of ``kind`` (one of KINDS) with random weights of ``dtype`` into ``folder``."""
    model = make(kind, seed).to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.save_pretrained(folder)
    return Path(folder)


def make(kind: str, seed: int = 0) -> torch.nn.Module:
    """The model itself, in evaluation mode and float32, with no weight left at its neutral initial value."""
    import transformers as t

    decoder = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    encoder = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    makers = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**decoder, tie_word_embeddings=False)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**decoder, tie_word_embeddings=True)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**decoder, tie_word_embeddings=False)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
            )
        ),
        "bert": lambda: t.BertForSequenceClassification(
            t.BertConfig(**encoder, vocab_size=99, max_position_embeddings=64, num_labels=3)
        ),
        "vit": lambda: t.ViTForImageClassification(
            t.ViTConfig(**encoder, image_size=16, patch_size=4, num_labels=5)
        ),
    }
    generator_state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = makers[kind]().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases start at 1 and 0, which hides mistakes
                parameter.add_(torch.randn_like(parameter) * 0.02)
    finally:
        torch.set_rng_state(generator_state)
    return model


def perturb(base_folder: Path, folder: Path, seed: int, scale: float = 1e-2) -> Path:
    """Copy a model and add normal noise of standard deviation ``scale`` to each floating-point tensor."""
    base_folder, folder = Path(base_folder), Path(folder)
    shutil.copytree(base_folder, folder)
    generator = torch.Generator().manual_seed(seed)
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name in sorted(tensors):
            tensor = tensors[name]
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale
                tensors[name] = (tensor.double() + noise).to(tensor.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def inputs(kind: str) -> dict[str, torch.Tensor]:
    """A small batch for a model of ``kind``: keyword arguments of its forward call."""
    generator = torch.Generator().manual_seed(7)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(3, 99, (2, 9), generator=generator)}


def logits(folder: Path, kind: str) -> torch.Tensor:
    """Load the folder with transformers, insist that every key fits, and return the logits in float32."""
    import transformers as t

    loader = {
        "bert": t.AutoModelForSequenceClassification,
        "vit": t.AutoModelForImageClassification,
    }.get(kind, t.AutoModelForCausalLM)
    model, info = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {key: value for key, value in info.items() if value and key != "error_msgs"}
    assert not problems and not info.get("error_msgs"), info
    with torch.no_grad():
        return model.eval()(**inputs(kind)).logits
