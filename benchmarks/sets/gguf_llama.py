"""A Llama model in a GGUF file, as the float32 tensors and the config of transformers.

The one idea: GGUF stores the same matrices under other names, quantised in blocks, and with the rows of the query and
key projections in another order: llama.cpp rotates neighbouring rows of a head (2i, 2i + 1), transformers rotates rows
i and i + d/2. So a head's d rows, seen as d/2 pairs, are transposed to two halves.

The ``gguf`` package reads the file and de-quantises. Source of the formats: github.com/ggml-org/ggml, docs/gguf.md.
The result is bit-equal to what transformers loads with ``GgufConfig(dequantize=True)``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.sets.packages import unpacked
from merging.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch

IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def provide_gguf(cache: Path) -> None:
    """Make ``import gguf`` work: the installed package, or else the one in the cache. Call it before transformers
    is imported, which looks for it once."""
    if importlib.util.find_spec("gguf") is None:
        sys.path.append(str(unpacked("gguf", cache)))


def transformers_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` for ``blk.3.ffn_up.weight``.

    Raises:
        InputError: ``E_NOT_A_MODEL`` a tensor that a Llama model does not have.
    """
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in OUTSIDE:
        return f"{OUTSIDE[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in IN_LAYER:
        return f"model.layers.{parts[1]}.{IN_LAYER[parts[2]]}.{parts[3]}"
    what = f"The GGUF file has a tensor {name!r}, which no plain Llama model has."
    raise InputError("E_NOT_A_MODEL", what, "", "Only plain Llama models can be converted.")


def in_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection, (heads · d, width): pairs 2i, 2i + 1 of each head become i, i + d/2."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def read_llama(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Arguments for ``LlamaConfig``, and all tensors by their transformers name, float32.

    Raises:
        InputError: ``E_NOT_A_MODEL`` not a plain Llama model in GGUF.
    """
    import gguf
    import numpy as np
    import torch

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError) as error:
        raise InputError("E_NOT_A_MODEL", f"{path} is no GGUF file.", str(error), "Check the path.") from None

    def field(key: str, default: Any = None) -> Any:
        found = reader.fields.get(key)
        return default if found is None else found.contents()

    if (kind := field("general.architecture")) != "llama":
        what = f"{path} holds a model of the kind {kind!r}."
        raise InputError("E_NOT_A_MODEL", what, "", "Only plain Llama models can be converted.")
    heads = int(field("llama.attention.head_count"))
    key_heads = int(field("llama.attention.head_count_kv", heads))
    tensors = {}
    for stored in reader.tensors:
        value = gguf.dequantize(stored.data, stored.tensor_type).astype(np.float32)
        if stored.name.endswith(("attn_q.weight", "attn_k.weight")):
            value = in_halves(value, heads if "attn_q" in stored.name else key_heads)
        tensors[transformers_name(stored.name)] = torch.from_numpy(np.array(value, order="C"))
    config = {
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": int(field("llama.embedding_length")),
        "intermediate_size": int(field("llama.feed_forward_length")),
        "num_hidden_layers": int(field("llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": int(field("llama.context_length")),
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5 was stored in 32 bits
        "rope_parameters": {"rope_theta": float(field("llama.rope.freq_base", 10000.0)), "rope_type": "default"},
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }
    return config, tensors
