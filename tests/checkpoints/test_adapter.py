"""LoRA adapters on their base, compared with PEFT's own merge of real PEFT adapters."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.checkpoints.checkpoint import Checkpoint, Source, open_checkpoint
from merging.checkpoints.layout import is_tied
from merging.errors import InputError
from tests import tiny_models

PREFIX = "base_model.model."


def read(source: Source, block: int = 0) -> torch.Tensor:
    """The whole tensor, in blocks of ``block`` elements."""
    raw = bytearray(source.numel * {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}[source.dtype])
    size = len(raw) // max(1, source.numel)
    step = block or max(1, source.numel)
    for start in range(0, source.numel, step):
        stop = min(source.numel, start + step)
        source.read(start, stop, memoryview(raw)[start * size : stop * size])
    kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    return torch.frombuffer(raw, dtype=kinds[source.dtype]).reshape(source.shape)


def train(
    base: Path, folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any
) -> dict[str, torch.Tensor]:
    """Save a PEFT adapter with random A and B on ``base``; the state dict of PEFT's own merge comes back."""
    import peft
    import transformers as t

    loader = {
        "bert": t.AutoModelForSequenceClassification,
        "vit": t.AutoModelForImageClassification,
    }.get(kind, t.AutoModelForCausalLM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = loader.from_pretrained(base, dtype=dtype)
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name or parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator) * 0.1
                    parameter.copy_(noise if "lora_" in name else parameter + noise)
        model.save_pretrained(folder)
        return dict(model.merge_and_unload().state_dict())


def assert_same(ours: Checkpoint, theirs: dict[str, torch.Tensor], atol: float = 1e-6) -> set[str]:
    """All tensors of ``ours`` equal those of PEFT within a few roundings; the names of the changed ones come back."""
    changed = set()
    for name, source in ours.tensors.items():
        torch.testing.assert_close(read(source).float(), theirs[name].float(), atol=atol, rtol=1e-6, msg=name)
        if source.dtype == "F64":
            changed.add(name)
    return changed


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen2", tmp_path_factory.mktemp("models") / "qwen2")


CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]}, 4),
    "all linear": ("llama", {"r": 3, "lora_alpha": 16, "target_modules": "all-linear"}, 14),
    "rsLoRA": ("llama", {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": ["v_proj"]}, 2),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "^model.layers.1.mlp.*": 5, "k_proj": 6},
            "alpha_pattern": {r"model\.layers\.1\.self_attn\..*": 3, "up_proj": 20.5},
        },
        6,
    ),
    "patterns and rsLoRA": (
        "llama",
        {
            "r": 4,
            "use_rslora": True,
            "target_modules": ["q_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 9},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 5},
        },
        2,
    ),
    "head and embedding": ("llama", {"r": 4, "target_modules": ["embed_tokens", "lm_head", "o_proj"]}, 4),
    "modules to save": (
        "llama",
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
        2,
    ),
    "biases": ("qwen2", {"r": 4, "target_modules": ["q_proj"], "bias": "all"}, 2),
    "biases of LoRA layers": ("qwen2", {"r": 4, "target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}, 4),
    "Conv1D": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, 8),
    "classifier": ("bert", {"r": 4, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}, 8),
    "convolution": ("vit", {"r": 4, "target_modules": ["projection", "value"], "modules_to_save": ["classifier"]}, 3),
    "orthogonal start": ("llama", {"r": 4, "init_lora_weights": "orthogonal", "target_modules": ["q_proj"]}, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_merge_of_peft(case: str, tmp_path: Path) -> None:
    kind, settings, count = CASES[case]
    base = tiny_models.build(kind, tmp_path / "base")
    theirs = train(base, tmp_path / "adapter", kind, **settings)
    with open_checkpoint(base) as below, open_checkpoint(tmp_path / "adapter", base=below) as ours:
        assert ours.kind == "adapter" and ours.path == tmp_path / "adapter"
        assert list(ours.tensors) == list(below.tensors)
        changed = assert_same(ours, theirs)
        replaced = {name for name in ours.tensors if ours.tensors[name] is not below.tensors[name]} - changed
        assert len(changed) >= count and changed | replaced
        for name in below.tensors.keys() - changed - replaced:
            assert ours.tensors[name] is below.tensors[name]
        for name in changed:  # the adapter really did something
            assert (read(ours.tensors[name]) - read(below.tensors[name]).double()).abs().max() > 1e-3
