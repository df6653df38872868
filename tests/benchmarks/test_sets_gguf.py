"""A Llama model in a GGUF file becomes the same tensors that transformers makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from merging.errors import InputError

HIDDEN, HEADS, KEY_HEADS, LAYERS, MLP, VOCABULARY = 64, 4, 2, 2, 96, 40


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter writes query and key rows (convert_hf_to_gguf.py, ``permute``)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, quantised: bool) -> dict[str, np.ndarray]:
    """A tiny Llama written by the gguf package; returns the tensors by their transformers names."""
    gguf = pytest.importorskip("gguf")
    kinds = gguf.GGMLQuantizationType
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(1)
    found = {}

    def add(name: str, target: str, shape: tuple[int, ...], heads: int = 0) -> None:
        value = draw.standard_normal(shape).astype(np.float32)
        found[target] = value
        stored = interleaved(value, heads) if heads else value
        kind = kinds.Q8_0 if "embd" in name else kinds.Q4_1
        if quantised and len(shape) == 2:
            writer.add_tensor(name, gguf.quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, stored)

    narrow = HIDDEN // HEADS * KEY_HEADS
    add("token_embd.weight", "model.embed_tokens.weight", (VOCABULARY, HIDDEN))
    for layer in range(LAYERS):
        old, new = f"blk.{layer}.", f"model.layers.{layer}."
        add(f"{old}attn_norm.weight", f"{new}input_layernorm.weight", (HIDDEN,))
        add(f"{old}attn_q.weight", f"{new}self_attn.q_proj.weight", (HIDDEN, HIDDEN), HEADS)
        add(f"{old}attn_k.weight", f"{new}self_attn.k_proj.weight", (narrow, HIDDEN), KEY_HEADS)
        add(f"{old}attn_v.weight", f"{new}self_attn.v_proj.weight", (narrow, HIDDEN))
        add(f"{old}attn_output.weight", f"{new}self_attn.o_proj.weight", (HIDDEN, HIDDEN))
        add(f"{old}ffn_norm.weight", f"{new}post_attention_layernorm.weight", (HIDDEN,))
        add(f"{old}ffn_gate.weight", f"{new}mlp.gate_proj.weight", (MLP, HIDDEN))
        add(f"{old}ffn_up.weight", f"{new}mlp.up_proj.weight", (MLP, HIDDEN))
        add(f"{old}ffn_down.weight", f"{new}mlp.down_proj.weight", (HIDDEN, MLP))
    add("output_norm.weight", "model.norm.weight", (HIDDEN,))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def test_float_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    wanted = write_gguf(tmp_path / "tiny.gguf", quantised=False)
    from benchmarks.sets.gguf_llama import read_llama

    config, found = read_llama(tmp_path / "tiny.gguf")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.array_equal(found[name].numpy(), value), name
    assert config["rms_norm_eps"] == 1e-5 and config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["num_key_value_heads"] == KEY_HEADS and config["tie_word_embeddings"]


def test_quantised_tensors_are_bit_equal_to_those_of_transformers(tmp_path: Path) -> None:
    originals = write_gguf(tmp_path / "tiny.gguf", quantised=True)
    import torch
    import transformers

    from benchmarks.sets.gguf_llama import read_llama

    config, found = read_llama(tmp_path / "tiny.gguf")
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="tiny.gguf",
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    theirs = {name: value for name, value in other.state_dict().items() if name != "lm_head.weight"}
    assert theirs.keys() == found.keys()
    for name, value in theirs.items():
        assert torch.equal(value, found[name]), name
    assert not np.array_equal(
        found["model.layers.1.mlp.up_proj.weight"], originals["model.layers.1.mlp.up_proj.weight"]
    )
    ours = transformers.LlamaConfig(**config)
    for field in ("vocab_size", "hidden_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, field) == pytest.approx(getattr(other.config, field)), field
    assert ours.rope_parameters["rope_theta"] == other.config.rope_parameters["rope_theta"]


def test_what_is_no_llama_is_refused(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from benchmarks.sets.gguf_llama import read_llama, transformers_name

    (tmp_path / "text.gguf").write_text("no such thing, but long enough to be read as a header")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2")
    writer.add_tensor("x", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in ("text", "other"):
        with pytest.raises(InputError) as caught:
            read_llama(tmp_path / f"{name}.gguf")
        assert caught.value.code == "E_NOT_A_MODEL"
    with pytest.raises(InputError):
        transformers_name("blk.0.attn_q_norm.weight")
