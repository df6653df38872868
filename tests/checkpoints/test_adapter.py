"""LoRA adapters on their base, compared with PEFT's own merge of real PEFT adapters."""

from __future__ import annotations

import json
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
    """Save a PEFT adapter with random A and B on ``base``; PEFT's own merge, as it saves it, comes back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = wrap(base, kind, dtype, **settings)
        model.save_pretrained(folder)
        model.merge_and_unload().save_pretrained(folder.with_name("merged"))
    return load_file(folder.with_name("merged") / "model.safetensors")


def wrap(base: Path, kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """The PEFT model, with noise on everything that can be trained."""
    import peft
    import transformers as t

    loader = {
        "bert": t.AutoModelForSequenceClassification,
        "vit": t.AutoModelForImageClassification,
    }.get(kind, t.AutoModelForCausalLM)
    model = peft.get_peft_model(loader.from_pretrained(base, dtype=dtype), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.copy_(noise if "lora_" in name else parameter + noise)
    return model.eval()


def assert_same(ours: Checkpoint, theirs: dict[str, torch.Tensor], atol: float = 1e-6) -> set[str]:
    """All tensors of ``ours`` equal those of PEFT up to rounding; the names of the LoRA weights come back."""
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
    "biases of LoRA layers": (
        "qwen2",
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
        4,
    ),
    "Conv1D": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, 8),
    "classifier": ("bert", {"r": 4, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}, 8),
    "convolution": ("vit", {"r": 4, "target_modules": ["projection"], "modules_to_save": ["classifier"]}, 1),
    "orthogonal start": (
        "llama",
        {"r": 4, "init_lora_weights": "orthogonal", "target_modules": ["q_proj"]},
        2,
    ),
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


TIED: dict[str, dict[str, Any]] = {
    "LoRA on the head": {"target_modules": ["lm_head", "q_proj"]},
    "LoRA on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "LoRA on both": {"target_modules": ["embed_tokens", "lm_head"]},
    "new head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "new embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both new": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_base_becomes_untied_where_training_parted_the_two(
    case: str, tied: Path, tmp_path: Path
) -> None:
    """PEFT's merge would change the head with the embedding; what counts is the model that was trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = wrap(tied, "qwen2", r=4, **TIED[case])
        model.save_pretrained(tmp_path / "adapter")
        with torch.no_grad():
            expected = model(**tiny_models.inputs("qwen2")).logits
    with open_checkpoint(tied) as base, open_checkpoint(tmp_path / "adapter", base=base) as ours:
        assert list(ours.tensors) == [*base.tensors, "lm_head.weight"]
        assert ours.config is not None and base.config is not None
        assert ours.config["tie_word_embeddings"] is False and base.config["tie_word_embeddings"] is True
        assert not is_tied(ours.config, ours.tensors)
        write(ours, tmp_path / "full")
    torch.testing.assert_close(tiny_models.logits(tmp_path / "full", "qwen2"), expected, atol=2e-5, rtol=1e-4)


def write(checkpoint: Checkpoint, folder: Path) -> None:
    folder.mkdir()
    save_file(
        {name: read(source).float() for name, source in checkpoint.tensors.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(checkpoint.config))


def test_a_tied_base_stays_tied_where_head_and_embedding_are_equal(tied: Path, tmp_path: Path) -> None:
    adapter = by_hand(tied, tmp_path / "adapter", {"r": 2})
    table = torch.randn(99, 32)
    add(adapter, {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()})
    with open_checkpoint(tied) as base, open_checkpoint(adapter, base=base) as ours:
        assert list(ours.tensors) == list(base.tensors) and is_tied(ours.config, ours.tensors)
        assert torch.equal(read(ours.tensors["model.embed_tokens.weight"]), table)


def test_tokens_can_be_added(tied: Path, tmp_path: Path) -> None:
    """PEFT saves both tables of a resized model. Equal, they stay one; without the head nobody can know."""
    table = torch.randn(101, 32)
    both = by_hand(tied, tmp_path / "both", {"r": 2})
    add(both, {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()})
    with open_checkpoint(tied) as base, open_checkpoint(both, base=base) as ours:
        assert ours.tensors["model.embed_tokens.weight"].shape == (101, 32)
        assert ours.config is not None and ours.config["vocab_size"] == 101
    one = by_hand(tied, tmp_path / "one", {"r": 2})
    add(one, {"model.embed_tokens.weight": table})
    refused(one, tied, "does not bring the head")
    kept = by_hand(tied, tmp_path / "kept", {"r": 2, "ensure_weight_tying": True})
    add(kept, {"model.embed_tokens.weight": table})
    with open_checkpoint(tied) as base, open_checkpoint(kept, base=base) as ours:
        assert is_tied(ours.config, ours.tensors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_one_rounding_whatever_the_base(dtype: str, stored: torch.dtype, tmp_path: Path) -> None:
    base = tiny_models.build("llama", tmp_path / "base", dtype=dtype)
    adapter = by_hand(base, tmp_path / "adapter", {"r": 4, "lora_alpha": 5}, stored)
    pairs = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    a, b = (pairs[f"{PREFIX}{name}.lora_{part}.weight"].double() for part in "AB")
    weight = load_file(base / "model.safetensors")[f"{name}.weight"]
    exact = weight.double() + (b @ a) * (5 / 4)
    with open_checkpoint(base) as below, open_checkpoint(adapter, base=below) as ours:
        source = ours.tensors[f"{name}.weight"]
        assert source.dtype == ("F32" if weight.element_size() == 2 else "F64")
        if (
            source.dtype == "F32"
        ):  # half a unit in the last place, as float64 sums differ in the last of 53 bits
            assert (read(source).double() - exact).abs().max() <= 0.501 * np.spacing(
                np.float32(exact.abs().max())
            )
        else:
            torch.testing.assert_close(read(source), exact, atol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_block_size_never_changes_a_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merging.checkpoints import low_rank

    base = tiny_models.build(kind, tmp_path / "base")
    module = {"llama": "model.layers.0.mlp.up_proj", "gpt2": "transformer.h.0.mlp.c_fc"}[kind]
    settings = {"r": 3, "fan_in_fan_out": kind == "gpt2"}
    adapter = by_hand(base, tmp_path / "adapter", settings, modules=[module])
    monkeypatch.setattr(low_rank, "TILE", 320)  # several tiles, the last one shorter
    results = []
    for block in (0, 1, 7, 64, 321, 1000):
        with open_checkpoint(base) as below, open_checkpoint(adapter, base=below) as ours:
            results.append(read(ours.tensors[f"{module}.weight"], block))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_large_adapter_is_read_in_tiles_by_several_threads(tmp_path: Path) -> None:
    """Many threads, random ranges, a cache that must evict: the bits are those of one read of everything."""
    from concurrent.futures import ThreadPoolExecutor

    rows, columns, rank = 1500, 700, 16
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    base = tmp_path / "base"
    base.mkdir()
    save_file({"model.w.weight": weight}, base / "model.safetensors")
    pairs = {
        "model.w.lora_A.weight": torch.randn(rank, columns, generator=generator),
        "model.w.lora_B.weight": torch.randn(rows, rank, generator=generator),
    }
    adapter = by_hand(base, tmp_path / "adapter", {"r": rank}, modules=[])
    add(adapter, pairs)
    with open_checkpoint(base) as below, open_checkpoint(adapter, base=below) as ours:
        source = ours.tensors["model.w.weight"]
        whole = read(source).reshape(-1)
        exact = (
            weight.double()
            + pairs["model.w.lora_B.weight"].double() @ pairs["model.w.lora_A.weight"].double() / 2
        )
        torch.testing.assert_close(whole.reshape(rows, columns).double(), exact, atol=1e-6, rtol=1e-7)

        def part(seed: int) -> bool:
            start, stop = sorted(np.random.default_rng(seed).integers(0, rows * columns + 1, size=2))
            raw = bytearray(int(stop - start) * 4)
            source.read(int(start), int(stop), memoryview(raw))
            return bytes(raw) == whole[start:stop].numpy().tobytes()

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(part, range(60)))


def test_names_may_differ_by_the_outermost_part(tmp_path: Path) -> None:
    """The GPT-2 on the Hub calls its weights h.0..., PEFT calls them transformer.h.0..."""
    base = tiny_models.build("gpt2", tmp_path / "base")
    theirs = train(base, tmp_path / "adapter", "gpt2", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    tensors = load_file(base / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensors[name] for name in tensors}, base / "model.safetensors"
    )
    with open_checkpoint(base) as below, open_checkpoint(tmp_path / "adapter", base=below) as ours:
        assert "h.0.attn.c_attn.weight" in ours.tensors
        changed = assert_same(ours, {name.removeprefix("transformer."): theirs[name] for name in theirs})
        assert len(changed) == 2


def by_hand(
    base: Path,
    folder: Path,
    settings: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    modules: list[str] | None = None,
) -> Path:
    """An adapter written without PEFT, with random A and B for ``modules``."""
    shapes = {name: tensor.shape for name, tensor in load_file(base / "model.safetensors").items()}
    rank = settings.get("r", 8)
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for module in ["model.layers.0.mlp.down_proj"] if modules is None else modules:
        out, into = shapes[f"{module}.weight"][:: -1 if settings.get("fan_in_fan_out") else 1]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, into, generator=generator).to(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator).to(dtype)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "lora_alpha": rank / 2, **settings})
    )
    return folder


def add(adapter: Path, tensors: dict[str, torch.Tensor], remove: str = "") -> None:
    """Put more keys into an adapter, or take one away."""
    path = adapter / "adapter_model.safetensors"
    old = load_file(path)
    old.pop(PREFIX + remove, None)
    save_file({**old, **{PREFIX + name: tensor for name, tensor in tensors.items()}}, path)


def refused(adapter: Path, base: Path | None, words: str, code: str = "E_ADAPTER") -> None:
    below = None if base is None else open_checkpoint(base)
    with pytest.raises(InputError) as caught:
        open_checkpoint(adapter, base=below)
    assert caught.value.code == code and words in str(caught.value), str(caught.value)
    assert caught.value.fix


DOWN = "model.layers.0.mlp.down_proj"
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "bias inside LoRA": ({"lora_bias": True}, "lora_bias"),
    "parameters": ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    "single tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "from the future": ({"quantum_rank": 3}, "quantum_rank"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    "OLoRA": ({"init_lora_weights": "olora"}, "olora"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "loftq"),
    "other method": ({"peft_type": "IA3"}, "IA3"),
    "no method": ({"peft_type": None}, "None"),
    "wrong rank": ({"r": 3}, "rank 3"),
    "rank 0": ({"r": 0}, "above 0"),
    "rank as text": ({"r": "4"}, "above 0"),
    "alpha as text": ({"lora_alpha": "4"}, "alphas numbers"),
    "rank of a pattern": ({"rank_pattern": {"down_proj": 5}}, "rank 5"),
    "pattern that is no number": ({"alpha_pattern": {"down_proj": True}}, "alphas numbers"),
    "malformed pattern": ({"rank_pattern": {"down[": 4}}, "malformed"),
    "endless pattern": ({"rank_pattern": {"(m|m.)*x": 4}}, "too complicated"),
    "slow pattern": ({"alpha_pattern": {".*.*.*.*.*x": 4}}, "too complicated"),
    "switch as text": ({"use_rslora": "no"}, "switches"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_is_not_understood_is_refused(case: str, llama: Path, tmp_path: Path) -> None:
    changes, words = CONFIGS[case]
    adapter = by_hand(llama, tmp_path / "adapter", {"r": 4})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
    refused(adapter, llama, words)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


KEYS: dict[str, tuple[Callable[[], dict[str, torch.Tensor]], str, str]] = {
    "B without A": (dict, f"{DOWN}.lora_A.weight", "counterpart"),
    "magnitudes": (lambda: {f"{DOWN}.lora_magnitude_vector.weight": ones(32)}, "", "not supported"),
    "bias of B": (lambda: {f"{DOWN}.lora_B.bias": ones(32)}, "", "not supported"),
    "named adapter": (lambda: {f"{DOWN}.lora_A.default.weight": ones(4, 48)}, "", "not supported"),
    "layer that the base lacks": (
        lambda: {"model.layers.9.mlp.down_proj.lora_A.weight": ones(4, 48)}
        | {"model.layers.9.mlp.down_proj.lora_B.weight": ones(32, 4)},
        "",
        "no tensor 'model.layers.9",
    ),
    "tensor that the base lacks": (lambda: {"score.weight": ones(2, 32)}, "", "no tensor 'score.weight'"),
    "replacement of a LoRA weight": (lambda: {f"{DOWN}.weight": ones(32, 48)}, "", "Two keys"),
    "two names for one weight": (
        lambda: {"model.model.norm.weight": ones(32), "model.norm.weight": ones(32)}, "", "Two keys"
    ),
    "replacement of another shape": (lambda: {"model.norm.weight": ones(31)}, "", "shape"),
    "wrong width": (
        lambda: {"model.layers.1.mlp.up_proj.lora_A.weight": ones(4, 31)}
        | {"model.layers.1.mlp.up_proj.lora_B.weight": ones(48, 4)},
        "",
        "do not make",
    ),
    "ranks that differ": (
        lambda: {"model.layers.1.mlp.up_proj.lora_A.weight": ones(4, 32)}
        | {"model.layers.1.mlp.up_proj.lora_B.weight": ones(48, 3)},
        "",
        "do not make",
    ),
    "LoRA on a vector": (
        lambda: {"model.norm.lora_A.weight": ones(4, 32), "model.norm.lora_B.weight": ones(32, 4)},
        "",
        "do not make",
    ),
    "whole numbers": (
        lambda: {"model.norm.weight": torch.ones(32, dtype=torch.int64)}, "", "data type I64"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KEYS)
def test_every_key_is_used_once_or_refused(case: str, llama: Path, tmp_path: Path) -> None:
    more, less, words = KEYS[case]
    adapter = by_hand(llama, tmp_path / "adapter", {"r": 4})
    add(adapter, more(), less)
    refused(adapter, llama, words)


def test_foreign_prefix_empty_and_missing_files(llama: Path, tmp_path: Path) -> None:
    adapter = by_hand(llama, tmp_path / "a", {"r": 4})
    refused(adapter, None, "none was given")
    with open_checkpoint(llama) as base, open_checkpoint(adapter, base=base) as first:
        failure = pytest.raises(InputError, open_checkpoint, adapter, base=first)
        assert failure.match("none was given")
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({f"lora.{name}": tensor for name, tensor in tensors.items()}, weights)
    refused(adapter, llama, "does not start with")
    save_file({}, weights)
    refused(adapter, llama, "no tensors")
    shutil.copy(llama / "model.safetensors", adapter)
    refused(adapter, llama, "an adapter and a full model", "E_AMBIGUOUS")
    (adapter / "model.safetensors").unlink()
    weights.rename(adapter / "adapter_model.bin")
    refused(adapter, llama, "pickle", "E_NOT_SAFETENSORS")
    (adapter / "adapter_model.bin").unlink()
    refused(adapter, llama, "is missing")


def test_square_weights_need_a_setting_that_agrees_with_the_others(tmp_path: Path) -> None:
    base = tiny_models.build("gpt2", tmp_path / "base")
    modules = ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_fc"]  # 32 x 32 and 32 x 128
    adapter = by_hand(base, tmp_path / "adapter", {"r": 4, "fan_in_fan_out": True}, modules=modules)
    config = json.loads((adapter / "adapter_config.json").read_text())
    with open_checkpoint(base) as below, open_checkpoint(adapter, base=below) as ours:
        turned = read(ours.tensors["transformer.h.0.attn.c_proj.weight"])
        pairs = load_file(adapter / "adapter_model.safetensors")
        a, b = (pairs[f"{PREFIX}{modules[0]}.lora_{part}.weight"].double() for part in "AB")
        weight = read(below.tensors["transformer.h.0.attn.c_proj.weight"]).double()
        torch.testing.assert_close(turned, weight + (b @ a).T / 2)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": False}))
    refused(adapter, base, "fan_in_fan_out")


def test_a_square_table_is_still_a_table(tmp_path: Path) -> None:
    """As many tokens as dimensions: the shapes fit both ways round, but PEFT always turns a table."""
    base = tmp_path / "base"
    base.mkdir()
    save_file(
        {"model.embed_tokens.weight": torch.zeros(6, 6), "lm_head.weight": torch.zeros(6, 6)},
        base / "model.safetensors",
    )
    a, b = torch.randn(2, 6), torch.randn(6, 2)
    adapter = by_hand(base, tmp_path / "adapter", {"r": 2}, modules=[])
    add(adapter, {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b})
    with open_checkpoint(base) as below, open_checkpoint(adapter, base=below) as ours:
        expected = (b.double() @ a.double()).T / 2
        torch.testing.assert_close(read(ours.tensors["model.embed_tokens.weight"]), expected)


def test_identity_covers_settings_weights_and_base(llama: Path, tmp_path: Path) -> None:
    adapter = by_hand(llama, tmp_path / "adapter", {"r": 4})
    with open_checkpoint(llama) as base:
        seen = []
        for alpha in (1, 2, 1):
            config = json.loads((adapter / "adapter_config.json").read_text())
            (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha}))
            with open_checkpoint(adapter, base=base) as ours:
                seen.append(json.dumps(ours.identity(), sort_keys=True))
                assert ours.identity()["base"] == base.identity()
        assert seen[0] == seen[2] != seen[1]


def test_a_change_of_the_base_or_of_the_adapter_is_noticed(llama: Path, tmp_path: Path) -> None:
    base_folder = tmp_path / "base"
    shutil.copytree(llama, base_folder)
    adapter = by_hand(base_folder, tmp_path / "adapter", {"r": 4})
    for path in (base_folder / "model.safetensors", adapter / "adapter_model.safetensors"):
        with open_checkpoint(base_folder) as base, open_checkpoint(adapter, base=base) as ours:
            ours.check_unchanged()
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - 1)
            with pytest.raises(InputError) as caught:
                ours.check_unchanged()
            assert caught.value.code == "E_INPUT_CHANGED"
        shutil.copy(llama / "model.safetensors", base_folder / "model.safetensors")


def test_an_empty_scale_leaves_the_values_alone(llama: Path, tmp_path: Path) -> None:
    adapter = by_hand(llama, tmp_path / "adapter", {"r": 4, "lora_alpha": 0})
    with open_checkpoint(llama) as base, open_checkpoint(adapter, base=base) as ours:
        assert torch.equal(
            read(ours.tensors[f"{DOWN}.weight"]), read(base.tensors[f"{DOWN}.weight"]).double()
        )
