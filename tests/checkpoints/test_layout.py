"""One table of names for everyone, held against models that transformers builds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merging.checkpoints.checkpoint import open_checkpoint
from merging.checkpoints.layout import (
    IGNORABLE,
    KINDS,
    Role,
    block_count,
    head_and_embedding,
    is_tied,
    rename_block,
    role,
    tie_flag,
)
from tests import tiny_models

LLAMA_BLOCK = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_o", "mlp.gate_proj": "mlp_gate", "mlp.up_proj": "mlp_up",
    "mlp.down_proj": "mlp_down", "input_layernorm": "norm", "post_attention_layernorm": "norm",
}  # fmt: skip

# kind of model -> words at the end of a tensor name in block 1, with what they are
BLOCKS: dict[str, dict[str, str]] = {
    "llama": {f"{name}.weight": kind for name, kind in LLAMA_BLOCK.items()},
    "mistral": {f"{name}.weight": kind for name, kind in LLAMA_BLOCK.items()},
    "qwen2": {
        **{f"{name}.weight": kind for name, kind in LLAMA_BLOCK.items()},
        **{f"self_attn.{name}_proj.bias": "bias" for name in "qkv"},
    },
    "gpt2": {
        "attn.c_attn.weight": "attn_qkv", "attn.c_attn.bias": "bias", "attn.c_proj.weight": "attn_o",
        "attn.c_proj.bias": "bias", "mlp.c_fc.weight": "mlp_up", "mlp.c_fc.bias": "bias",
        "mlp.c_proj.weight": "mlp_down", "mlp.c_proj.bias": "bias",
        "ln_1.weight": "norm", "ln_1.bias": "norm", "ln_2.weight": "norm", "ln_2.bias": "norm",
    },
    "bert": {
        **{f"attention.self.{name}.bias": "bias" for name in ("query", "key", "value")},
        "attention.self.query.weight": "attn_q", "attention.self.key.weight": "attn_k",
        "attention.self.value.weight": "attn_v", "attention.output.dense.weight": "attn_o",
        "attention.output.dense.bias": "bias", "attention.output.LayerNorm.weight": "norm",
        "attention.output.LayerNorm.bias": "norm", "intermediate.dense.weight": "mlp_up",
        "intermediate.dense.bias": "bias", "output.dense.weight": "mlp_down", "output.dense.bias": "bias",
        "output.LayerNorm.weight": "norm", "output.LayerNorm.bias": "norm",
    },
    "vit": {
        **{f"attention.attention.{name}.bias": "bias" for name in ("query", "key", "value")},
        "attention.attention.query.weight": "attn_q", "attention.attention.key.weight": "attn_k",
        "attention.attention.value.weight": "attn_v", "attention.output.dense.weight": "attn_o",
        "attention.output.dense.bias": "bias", "intermediate.dense.weight": "mlp_up",
        "intermediate.dense.bias": "bias", "output.dense.weight": "mlp_down", "output.dense.bias": "bias",
        "layernorm_before.weight": "norm", "layernorm_before.bias": "norm",
        "layernorm_after.weight": "norm", "layernorm_after.bias": "norm",
    },
}  # fmt: skip

OUTSIDE: dict[str, dict[str, str]] = {
    "llama": {"model.embed_tokens.weight": "embed", "model.norm.weight": "norm", "lm_head.weight": "head"},
    "mistral": {"model.embed_tokens.weight": "embed", "model.norm.weight": "norm", "lm_head.weight": "head"},
    "qwen2": {"model.embed_tokens.weight": "embed", "model.norm.weight": "norm"},
    "gpt2": {
        "transformer.wte.weight": "embed", "transformer.wpe.weight": "embed",
        "transformer.ln_f.weight": "norm", "transformer.ln_f.bias": "norm",
    },
    "bert": {
        "bert.embeddings.word_embeddings.weight": "embed",
        "bert.embeddings.position_embeddings.weight": "embed",
        "bert.embeddings.token_type_embeddings.weight": "embed", "bert.embeddings.LayerNorm.weight": "norm",
        "bert.embeddings.LayerNorm.bias": "norm", "bert.pooler.dense.weight": "other",
        "bert.pooler.dense.bias": "bias", "classifier.weight": "head", "classifier.bias": "bias",
    },
    "vit": {
        "vit.embeddings.cls_token": "embed", "vit.embeddings.position_embeddings": "embed",
        "vit.embeddings.patch_embeddings.projection.weight": "embed",
        "vit.embeddings.patch_embeddings.projection.bias": "bias", "vit.layernorm.weight": "norm",
        "vit.layernorm.bias": "norm", "classifier.weight": "head", "classifier.bias": "bias",
    },
}  # fmt: skip

HEADS: dict[str, tuple[str | None, str | None]] = {
    "llama": ("lm_head.weight", "model.embed_tokens.weight"),
    "mistral": ("lm_head.weight", "model.embed_tokens.weight"),
    "qwen2": (None, "model.embed_tokens.weight"),
    "gpt2": (None, "transformer.wte.weight"),
    "bert": (None, "bert.embeddings.word_embeddings.weight"),
    "vit": (None, None),
}


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_every_tensor_of_a_saved_model_has_its_role(kind: str, tmp_path: Path) -> None:
    with open_checkpoint(tiny_models.build(kind, tmp_path / kind)) as checkpoint:
        left = dict(BLOCKS[kind])
        for name, source in checkpoint.tensors.items():
            found = role(name, source.shape)
            if found.block is None:
                assert found.kind == OUTSIDE[kind][name], name
            elif found.block == 1:
                ending = next(ending for ending in left if name.endswith(f".1.{ending}"))
                assert found.kind == left.pop(ending), name
        assert not left and block_count(checkpoint.tensors) == 2
        assert head_and_embedding(checkpoint.tensors) == HEADS[kind]
        assert is_tied(checkpoint.config, checkpoint.tensors) is (kind in ("qwen2", "gpt2"))


SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "vocab_size": 50,
}  # fmt: skip


def other_models() -> dict[str, tuple[Callable[[], torch.nn.Module], dict[str, str]]]:
    """More architectures: how to make one, and what some of its tensors are."""
    import transformers as t

    def causal(config: object) -> Callable[[], torch.nn.Module]:
        return lambda: t.AutoModelForCausalLM.from_config(config)

    rows = {"num_key_value_heads": 2}
    t5 = t.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=50, feed_forward_proj="gated-gelu"
    )
    clip = t.CLIPVisionConfig(**{**SMALL, "image_size": 16, "patch_size": 4})
    distil = t.DistilBertConfig(dim=32, hidden_dim=48, n_layers=1, n_heads=4, vocab_size=50)
    return {
        "mixtral": (
            causal(t.MixtralConfig(**SMALL, **rows, num_local_experts=2)),
            {
                "model.layers.0.mlp.gate.weight": "mlp_other",
                "model.layers.0.mlp.experts.gate_up_proj": "mlp_gate",
                "model.layers.0.mlp.experts.down_proj": "mlp_down",
            },
        ),
        "qwen3": (
            causal(t.Qwen3Config(**SMALL, **rows, head_dim=8)),
            {
                "model.layers.0.self_attn.q_norm.weight": "norm",
                "model.layers.0.self_attn.q_proj.weight": "attn_q",
            },
        ),
        "gemma2": (
            causal(t.Gemma2Config(**SMALL, **rows, head_dim=8)),
            {
                "model.layers.0.pre_feedforward_layernorm.weight": "norm",
                "model.layers.0.mlp.gate_proj.weight": "mlp_gate",
            },
        ),
        "phi3": (
            causal(t.Phi3Config(**SMALL, **rows, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
            {
                "model.layers.0.self_attn.qkv_proj.weight": "attn_qkv",
                "model.layers.0.mlp.gate_up_proj.weight": "mlp_gate",
            },
        ),
        "gpt_neox": (
            causal(t.GPTNeoXConfig(**SMALL)),
            {
                "gpt_neox.embed_in.weight": "embed",
                "gpt_neox.layers.0.attention.query_key_value.weight": "attn_qkv",
                "gpt_neox.layers.0.attention.dense.weight": "attn_o",
                "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": "mlp_up",
                "gpt_neox.layers.0.mlp.dense_4h_to_h.weight": "mlp_down",
            },
        ),
        "t5": (
            lambda: t.T5ForConditionalGeneration(t5),
            {
                "shared.weight": "embed",
                "encoder.block.0.layer.0.SelfAttention.q.weight": "attn_q",
                "encoder.block.0.layer.0.SelfAttention.o.weight": "attn_o",
                "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": "mlp_gate",
                "encoder.block.0.layer.1.DenseReluDense.wo.weight": "mlp_down",
                "decoder.block.0.layer.1.EncDecAttention.k.weight": "attn_k",
                "decoder.final_layer_norm.weight": "norm",
                "lm_head.weight": "head",
            },
        ),
        "clip": (
            lambda: t.CLIPVisionModelWithProjection(clip),
            {
                "vision_model.embeddings.class_embedding": "embed",
                "vision_model.pre_layrnorm.weight": "norm",
                "vision_model.encoder.layers.0.mlp.fc1.weight": "mlp_up",
                "vision_model.encoder.layers.0.self_attn.out_proj.weight": "attn_o",
                "visual_projection.weight": "other",
            },
        ),
        "distilbert": (
            lambda: t.DistilBertForMaskedLM(distil),
            {
                "distilbert.transformer.layer.0.attention.q_lin.weight": "attn_q",
                "distilbert.transformer.layer.0.attention.out_lin.weight": "attn_o",
                "distilbert.transformer.layer.0.ffn.lin2.weight": "mlp_down",
                "distilbert.transformer.layer.0.sa_layer_norm.bias": "norm",
            },
        ),
    }


def test_other_architectures() -> None:
    for name, (make, expected) in other_models().items():
        with torch.device("meta"):
            tensors = make().state_dict()
        for tensor, kind in expected.items():
            assert role(tensor, tuple(tensors[tensor].shape)).kind == kind, (name, tensor)
        inside = {
            t: role(t, tuple(v.shape))
            for t, v in tensors.items()
            if role(t, tuple(v.shape)).block is not None
        }
        assert inside and all(found.block == 0 for found in inside.values())
        unknown = [t for t, found in inside.items() if found.kind in ("other", "embed", "head")]
        assert unknown in ([], [t for t in tensors if "relative_attention_bias" in t]), (name, unknown)


NAMES: dict[str, tuple[tuple[int, ...], Role]] = {
    "model.layers.12.block_sparse_moe.experts.7.w1.weight": ((8, 4), Role(12, "mlp_gate")),
    "model.layers.12.block_sparse_moe.experts.7.w2.weight": ((4, 8), Role(12, "mlp_down")),
    "model.layers.12.block_sparse_moe.experts.7.w3.weight": ((8, 4), Role(12, "mlp_up")),
    "model.layers.12.block_sparse_moe.gate.weight": ((8, 4), Role(12, "mlp_other")),
    "model.layers.3.mlp.shared_expert.down_proj.weight": ((4, 8), Role(3, "mlp_down")),
    "model.layers.3.mlp.shared_expert_gate.weight": ((1, 8), Role(3, "mlp_other")),
    "model.layers.3.mlp.experts.gate_up_proj_bias": ((2, 8), Role(3, "bias")),
    "model.language_model.layers.5.self_attn.q_proj.weight": ((8, 8), Role(5, "attn_q")),
    "visual.blocks.4.attn.qkv.weight": ((24, 8), Role(4, "attn_qkv")),
    "visual.blocks.4.attn.proj.weight": ((8, 8), Role(4, "attn_o")),
    "visual.transformer.resblocks.9.attn.in_proj_weight": ((24, 8), Role(9, "attn_qkv")),
    "visual.transformer.resblocks.9.attn.in_proj_bias": ((24,), Role(9, "bias")),
    "h.0.attn.c_attn.weight": ((8, 24), Role(0, "attn_qkv")),
    "transformer.h.31.self_attention.dense.weight": ((8, 8), Role(31, "attn_o")),
    "layers.0.attention.wo.weight": ((8, 8), Role(0, "attn_o")),
    "layers.0.feed_forward.w2.weight": ((8, 8), Role(0, "mlp_down")),
    "layers.0.attention_norm.weight": ((8,), Role(0, "norm")),
    "tok_embeddings.weight": ((9, 8), Role(None, "embed")),
    "output.weight": ((9, 8), Role(None, "head")),
    "norm.weight": ((8,), Role(None, "norm")),
    "blocks.0.norm1.weight": ((8,), Role(0, "norm")),
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": ((8, 8), Role(0, "attn_k")),
    "logit_scale": ((), Role(None, "other")),
    "layers.0.classifier.weight": ((8, 8), Role(0, "other")),
    "layers.0.mlp.norm_proj.weight": ((8, 8), Role(0, "mlp_other")),
    "weight": ((3, 3), Role(None, "other")),
    "bias": ((3,), Role(None, "bias")),
    "": ((3,), Role(None, "other")),
    "layers.9999999.w.weight": ((3, 3), Role(None, "other")),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_from_the_wild(name: str) -> None:
    shape, expected = NAMES[name]
    assert role(name, shape) == expected


@given(st.text(max_size=40), st.lists(st.integers(0, 9), max_size=4).map(tuple))
def test_any_name_has_a_role(name: str, shape: tuple[int, ...]) -> None:
    assert role(name, shape).kind in KINDS


@given(
    st.integers(0, 999),
    st.integers(0, 999),
    st.sampled_from(["model.layers.{}.x", "h.{}.attn.w", "a.block.{}.layer.1.o"]),
)
def test_a_block_moves_and_keeps_its_kind(old: int, new: int, form: str) -> None:
    assert rename_block(form.format(old), new) == form.format(new)
    assert role(form.format(new), (2, 2)) == Role(new, role(form.format(old), (2, 2)).kind)


def test_only_blocks_can_move() -> None:
    with pytest.raises(ValueError, match="not in a block"):
        rename_block("model.norm.weight", 3)


def test_block_count_is_one_more_than_the_highest() -> None:
    assert block_count([]) == block_count(["lm_head.weight"]) == 0
    assert block_count(["model.layers.0.x", "model.layers.31.x", "lm_head.weight"]) == 32


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq", "h.3.attn.bias",
        "h.3.attn.masked_bias",
        "transformer.h.3.attn.bias", "gpt_neox.layers.0.attention.bias", "bert.embeddings.position_ids",
        "embeddings.token_type_ids", "model.rotary_emb.cos_cached",
    ],
)  # fmt: skip
def test_buffers_are_known(name: str) -> None:
    assert IGNORABLE.fullmatch(name)


def test_no_weight_is_taken_for_a_buffer(tmp_path: Path) -> None:
    for kind in tiny_models.KINDS:
        names = [*BLOCKS[kind], *OUTSIDE[kind]]
        assert not [name for name in names if IGNORABLE.fullmatch(name)]
    for name in ("model.layers.0.self_attn.q_proj.bias", "blocks.0.attn.qkv.bias", "blocks.0.attn.proj.bias"):
        assert not IGNORABLE.fullmatch(name)


TIES: list[tuple[dict[str, Any] | None, list[str], bool]] = [
    (None, ["model.embed_tokens.weight"], True),
    ({}, ["model.embed_tokens.weight", "lm_head.weight"], False),
    ({"tie_word_embeddings": True}, ["model.embed_tokens.weight", "lm_head.weight"], False),
    ({"tie_word_embeddings": False}, ["model.embed_tokens.weight"], False),
    ({"text_config": {"tie_word_embeddings": False}}, ["model.language_model.embed_tokens.weight"], False),
    ({"architectures": ["Qwen2ForCausalLM"]}, ["model.embed_tokens.weight"], True),
    ({"architectures": ["GPT2LMHeadModel"]}, ["wte.weight"], True),
    ({"architectures": ["T5ForConditionalGeneration"]}, ["shared.weight"], True),
    ({"architectures": ["BertForSequenceClassification"]}, ["bert.embeddings.word_embeddings.weight"], False),
    ({"architectures": ["LlamaModel"]}, ["embed_tokens.weight"], False),
    ({"architectures": []}, ["wte.weight"], True),
    ({"architectures": "nonsense", "tie_word_embeddings": 7, "text_config": []}, ["wte.weight"], True),
    (None, ["model.norm.weight"], False),
    (None, ["lm_head.weight"], False),
    (None, [], False),
]


@pytest.mark.parametrize("case", range(len(TIES)))
def test_tied_or_not(case: int) -> None:
    config, names, expected = TIES[case]
    assert is_tied(config, names) is expected


def test_the_flag_is_also_found_in_the_text_part() -> None:
    assert tie_flag(None) is tie_flag({}) is tie_flag({"tie_word_embeddings": "yes"}) is None
    assert tie_flag({"text_config": {"tie_word_embeddings": True}}) is True
    assert tie_flag({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}) is False


def test_heads_and_embeddings_inside_blocks_or_with_other_endings_do_not_count() -> None:
    assert head_and_embedding(["layers.0.embed_tokens.weight", "lm_head.bias", "my_lm_head.weight"]) == (
        None,
        None,
    )
    assert head_and_embedding(["encoder.embed_tokens.weight", "shared.weight"]) == (None, "shared.weight")


def test_60_000_names_take_moments() -> None:
    names = [f"model.layers.{n // 700}.mlp.experts.{n % 700}.gate_proj.weight" for n in range(60_000)]
    started = time.process_time()
    roles = [role(name, (8, 8)) for name in names]
    assert block_count(names) == 86 and head_and_embedding(names) == (None, None)
    assert time.process_time() - started < 3.0  # half a second on a quiet core
    assert set(roles) == {Role(block, "mlp_gate") for block in range(86)}
