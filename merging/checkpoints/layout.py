"""What a tensor is, told by its name: which block, and which kind of weight.

One table for everyone (filters, plots, defaults of methods). It covers the layouts of Llama, Qwen, Mistral,
Mixtral-like experts, Gemma, Phi, GPT-2, GPT-NeoX, BERT, ViT, CLIP and T5. Merging itself never depends on it:
a name that it does not know is ``other`` and is merged all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True, slots=True)
class Role:
    """``block``: number of the transformer block, None outside of blocks. ``kind``: one of KINDS."""

    block: int | None
    kind: str


KINDS = (
    "attn_q", "attn_k", "attn_v", "attn_o", "attn_qkv", "mlp_gate", "mlp_up", "mlp_down", "mlp_other",
    "norm", "bias", "embed", "head", "other",
)  # fmt: skip

# The list that holds the blocks is followed by their number: "model.layers.3.", "h.3.", "encoder.block.3.".
_BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|h|block|blocks|resblocks)\.(\d{1,6})(?=\.|$)")

_NUMBER = re.compile(r"\.\d+(?=\.|$)")

# Words of a name (the parts between dots, in lower case) and what they say, looked up from the right.
_WORDS: dict[str, str] = {
    word: kind
    for kind, words in {
        "embed": "wte wpe embed_tokens embed_in embed_positions tok_embeddings word_embeddings embeddings"
        " shared position_embeddings position_embedding token_type_embeddings token_embedding"
        " patch_embeddings patch_embedding patch_embed pos_embed class_embedding cls_token mask_token"
        " distillation_token",
        "attn_qkv": "c_attn qkv qkv_proj query_key_value in_proj in_proj_weight wqkv w_pack",
        "attn_q": "q_proj query wq q_lin q_a_proj q_b_proj",
        "attn_k": "k_proj key wk k_lin kv_a_proj_with_mqa kv_b_proj",
        "attn_v": "v_proj value wv v_lin",
        "attn_o": "o_proj out_lin out_proj",
        "mlp_gate": "gate_proj gate_up_proj w1 wi_0",
        "mlp_up": "up_proj w3 wi_1 wi fc1 c_fc lin1 fc_in dense_h_to_4h intermediate",
        "mlp_down": "down_proj w2 fc2 lin2 fc_out dense_4h_to_h",
        "mlp_other": "gate router shared_expert_gate mlp ffn feed_forward block_sparse_moe experts",
        "head": "lm_head embed_out score classifier pre_classifier qa_outputs classification_head cls head"
        " vocab_projector vocab_transform",
    }.items()
    for word in words.split()
}
# Words that mean one thing in the attention and another in the feed-forward part.
_OUTPUTS = {"c_proj", "proj", "dense", "wo"}
_T5 = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_o"}
_ATTENTION = re.compile(r"attn|attention")
_NORM = re.compile(r"norm\d*$|^norm|^ln(_\w+|\d*)$|_norm_|layernorm|layer_norm")

IGNORABLE = re.compile(
    r"(^|.*\.)(rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|rope\.freqs|position_ids|token_type_ids"
    r"|attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias|num_batches_tracked)"
)
"""Full match: buffers that a model computes by itself, not weights. They are never merged."""

_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "shared")
_HEADS = ("lm_head", "embed_out", "output", "cls.predictions.decoder")
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")


def role(name: str, shape: tuple[int, ...]) -> Role:
    """Block number and kind of the tensor ``name`` with ``shape``.

    Never raises: what is unknown is "other".
    """
    match = _BLOCK.search(name)
    kind = _kind(_NUMBER.sub("", name), len(shape), match is not None)
    return Role(int(match[1]) if match else None, kind)


@lru_cache(maxsize=1 << 12)  # without its numbers, a name stands for all blocks and experts
def _kind(name: str, rank: int, in_block: bool) -> str:
    parts = name.lower().split(".")
    last = parts[-1]
    owner = parts[:-1] if last in ("weight", "bias", "gamma", "beta") and len(parts) > 1 else parts
    if rank <= 1 and any(_NORM.search(part) for part in owner):
        return "norm"
    if last == "bias" or (last.endswith("_bias") and rank <= 2):
        return "bias"
    word = owner[-1]
    attention = any(_ATTENTION.search(part) for part in owner)
    if in_block and word in _T5 and attention:
        return _T5[word]
    if in_block and word in _OUTPUTS and "intermediate" not in owner:
        return "attn_o" if attention else "mlp_down"
    for part in reversed(owner):
        kind = _WORDS.get(part)
        if kind and not (in_block and kind in ("head", "embed")):
            return kind
    return "head" if owner == ["output"] else "other"


@lru_cache(maxsize=1 << 17)
def block_number(name: str) -> int | None:
    """The block that the tensor ``name`` is in; None outside of blocks."""
    match = _BLOCK.search(name)
    return int(match[1]) if match else None


def block_count(names: Iterable[str]) -> int:
    """Number of blocks: one more than the highest block number."""
    return max((number for number in map(block_number, names) if number is not None), default=-1) + 1


def rename_block(name: str, new_index: int) -> str:
    """``name`` moved to another block: model.layers.3.x -> model.layers.7.x. ValueError outside of blocks."""
    match = _BLOCK.search(name)
    if not match:
        raise ValueError(f"{name} is not in a block")
    return f"{name[: match.start(1)]}{new_index}{name[match.end(1) :]}"


def head_and_embedding(names: Iterable[str]) -> tuple[str | None, str | None]:
    """Names of the output head and of the token embedding (weights), each None if there is none."""
    outside = [name for name in names if name.endswith(".weight") and block_number(name) is None]
    return _first(outside, _HEADS), _first(outside, _EMBEDDINGS)


def _first(names: list[str], endings: tuple[str, ...]) -> str | None:
    # T5 has encoder.embed_tokens as a copy of shared; the name with the fewest parts is the original.
    found = [name for name in names if any(f".{name}".endswith(f".{ending}.weight") for ending in endings)]
    return min(found, key=lambda name: (name.count("."), name), default=None)


def is_tied(config: Mapping[str, Any] | None, names: Iterable[str]) -> bool:
    """Whether the output head is the token embedding itself.

    The tensors decide: a model with a head of its own is untied whatever its configuration says. One
    without is tied unless the configuration says ``tie_word_embeddings: false`` or names an architecture
    without head.
    """
    head, embedding = head_and_embedding(names)
    if head is not None or embedding is None or tie_flag(config) is False:
        return False
    architectures = (config or {}).get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return True
    return any(ending in str(name) for name in architectures for ending in _WITH_HEAD)


def tie_flag(config: Mapping[str, Any] | None) -> bool | None:
    """``tie_word_embeddings`` of a configuration or of its ``text_config``; None if it is not stated."""
    for part in (config or {}, (config or {}).get("text_config")):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None
