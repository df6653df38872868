"""Llama-shaped checkpoints to measure with: a base and three experts, made of seeded random numbers.

An expert differs from the base as fine-tuned models do: a low-rank change with a decaying spectrum, a
sparse one, and faint noise everywhere, each expert strongest at another depth. So thresholds, signs and
per-layer figures are not trivial. Nothing is downloaded and transformers is not needed.

    python -m benchmarks.models --size 0.47b       base and experts for merge_speed: 4 x 0.94 GB
    python -m benchmarks.models --size 8b          to plan with: real headers over holes in place of data
    python -m benchmarks.models --tensors 60000    the same with very many tiny tensors (a mixture of experts)
    python -m benchmarks.models --clean            removes what was built
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
EXPERTS = 3
MEMBERS = ["base", *(f"expert{n}" for n in range(1, EXPERTS + 1))]
VERSION = 1  # raise it when the recipe below changes: sets of another version are built anew

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Size:
    """Dimensions of a Llama model. ``header_only``: no data, only holes (which read as zeros)."""

    hidden: int
    layers: int
    mlp: int
    heads: int
    vocabulary: int
    key_value_heads: int = 0
    shard_bytes: int = 1 << 30
    header_only: bool = False


SIZES = {
    "tiny": Size(64, 4, 128, 4, 512),
    "0.47b": Size(1024, 24, 4096, 16, 32000),
    "1.9b": Size(2048, 26, 8192, 16, 32000),
    "8b": Size(4096, 32, 14336, 32, 128256, key_value_heads=8, shard_bytes=5 << 30, header_only=True),
}


def default_folder() -> Path:
    """Where sets are kept between runs: the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "amalgam" / "benchmarks"


def llama_shapes(size: Size) -> Shapes:
    """Tensor names and shapes of a Llama model with an untied head."""
    hidden, key_value = size.hidden, size.hidden // size.heads * (size.key_value_heads or size.heads)
    shapes: Shapes = {"model.embed_tokens.weight": (size.vocabulary, hidden)}
    for layer in range(size.layers):
        for name, shape in {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (key_value, hidden),
            "self_attn.v_proj": (key_value, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (size.mlp, hidden),
            "mlp.up_proj": (size.mlp, hidden),
            "mlp.down_proj": (hidden, size.mlp),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (size.vocabulary, hidden)}


def llama_config(size: Size) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads or size.heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


LAYERS_OF_MANY = 32


def many_shapes(count: int) -> Shapes:
    """Exactly ``count`` tiny tensors, named as in a Mixtral model with very many experts per layer."""
    hidden, mlp = 8, 4
    shapes: Shapes = {"model.embed_tokens.weight": (64, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (64, hidden)
    rows: dict[str, tuple[int, ...]] = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    rows |= {f"self_attn.{letter}_proj": (hidden, hidden) for letter in "qkvo"}
    for layer in range(LAYERS_OF_MANY):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in rows.items()}
    kinds = {"w1": (mlp, hidden), "w2": (hidden, mlp), "w3": (mlp, hidden)}
    expert = 0
    while True:
        for layer in range(LAYERS_OF_MANY):
            for kind, shape in kinds.items():
                if len(shapes) >= count:
                    return dict(list(shapes.items())[:count])
                shapes[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{kind}.weight"] = shape
        expert += 1


def many_config() -> dict[str, Any]:
    size = Size(8, LAYERS_OF_MANY, 4, 1, 64)
    return llama_config(size) | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}


def shards(shapes: Shapes, limit: int) -> list[list[str]]:
    """Names grouped in order, each group below ``limit`` bytes of bfloat16 if its tensors allow."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = 2 * elements(shape)
        if groups[-1] and filled + nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    return groups


def elements(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


class Recipe:
    """The numbers of one tensor in the base and in each expert, the same in every run."""

    def __init__(self, shapes: Shapes, layers: int) -> None:
        self.index = {name: number for number, name in enumerate(shapes)}
        self.layers = layers

    def random(self, member: int, name: str) -> np.random.Generator:
        import numpy as np

        return np.random.Generator(np.random.SFC64([VERSION, member, self.index[name]]))

    def tensors(self, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """The tensor in bfloat16: of the base, then of expert 1, 2, 3."""
        import numpy as np
        import torch

        base = self.random(0, name).standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            base = 1 + 0.05 * base
        else:
            base *= 0.02
        yield torch.from_numpy(base).bfloat16()
        depth = int(name.split(".")[2]) / self.layers if ".layers." in name else 0.0
        for expert in range(EXPERTS):
            strength = 1 + 0.8 * float(np.cos(np.pi * (depth - expert / EXPERTS)))
            change = self.change(self.random(expert + 1, name), shape)
            yield torch.from_numpy(base).add(torch.from_numpy(change), alpha=strength).bfloat16()

    def change(self, random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Low rank (16, singular values falling 30-fold) + 2 % of the entries + faint noise."""
        import numpy as np

        if len(shape) == 1:
            return 0.002 * random.standard_normal(shape, dtype=np.float32)
        rank = min(16, *shape)
        left = random.standard_normal((shape[0], rank), dtype=np.float32)
        left *= np.logspace(0, -1.5, rank, dtype=np.float32) * 6e-4 / rank**0.5
        change = random.standard_normal(shape, dtype=np.float32)
        change *= 5e-5
        change += left @ random.standard_normal((rank, shape[1]), dtype=np.float32)
        chosen = random.integers(0, change.size, change.size // 50)
        change.reshape(-1)[chosen] += 2e-3 * random.standard_normal(len(chosen), dtype=np.float32)
        return change


def write_weights(folder: Path, shapes: Shapes, layers: int, shard_bytes: int) -> None:
    """All members shard by shard, so that memory holds one shard of each and not whole models."""
    from safetensors.torch import save_file

    recipe = Recipe(shapes, layers)
    groups = shards(shapes, shard_bytes)
    for number, names in enumerate(groups, 1):
        content: list[dict[str, Tensor]] = [{} for _ in MEMBERS]
        for name in names:
            for of_member, tensor in zip(content, recipe.tensors(name, shapes[name]), strict=True):
                of_member[name] = tensor
        for member, of_member in zip(MEMBERS, content, strict=True):
            path = folder / member / file_name(number, len(groups))
            save_file(of_member, path, metadata={"format": "pt"})


def write_headers(folder: Path, shapes: Shapes, shard_bytes: int) -> None:
    """Sparse files: full length and real header, but no data."""
    groups = shards(shapes, shard_bytes)
    for number, names in enumerate(groups, 1):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + 2 * elements(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for member in MEMBERS:
            with open(folder / member / file_name(number, len(groups)), "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(8 + len(text) + end)


def file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def write_side_files(folder: Path, config: dict[str, Any], shapes: Shapes, shard_bytes: int) -> None:
    write_json(folder / "config.json", config)
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = special + [f"t{n}" for n in range(len(special), config["vocab_size"])]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": n, "content": token} | added for n, token in enumerate(special)],
            "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "WordLevel",
                "vocab": {token: n for n, token in enumerate(vocabulary)},
                "unk_token": special[0],
            },
        },
    )
    names = dict(zip(["unk_token", "bos_token", "eos_token"], special, strict=True))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | names)
    groups = shards(shapes, shard_bytes)
    if len(groups) > 1:
        placed = {n: file_name(number, len(groups)) for number, names in enumerate(groups, 1) for n in names}
        total = sum(2 * elements(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def build(parent: Path, size: str | int) -> Path:
    """The folder of a set (``base``, ``expert1`` … inside), built if it is not there yet.

    ``size`` is a name in SIZES, or a number of tensors. The folder appears only when it is complete.
    """
    if isinstance(size, str):
        name, limit, header_only = size, SIZES[size].shard_bytes, SIZES[size].header_only
        shapes, config = llama_shapes(SIZES[size]), llama_config(SIZES[size])
    else:
        name, limit, header_only = f"tensors-{size}", 1 << 30, True
        shapes, config = many_shapes(size), many_config()
    folder = parent / f"{name}-v{VERSION}"
    if folder.is_dir():
        return folder
    unfinished = parent / f".{folder.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    for member in MEMBERS:
        (unfinished / member).mkdir(parents=True)
        write_side_files(unfinished / member, config, shapes, limit)
    if header_only:
        write_headers(unfinished, shapes, limit)
    else:
        write_weights(unfinished, shapes, config["num_hidden_layers"], limit)
    unfinished.rename(folder)
    return folder


def build_apart(parent: Path, size: str | int) -> Path:
    """``build`` in a process of its own, so that the caller's memory stays small."""
    which = ["--size", size] if isinstance(size, str) else ["--tensors", str(size)]
    command = [sys.executable, "-m", "benchmarks.models", *which, "--models", str(parent.resolve())]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.strip())


def clean(parent: Path) -> None:
    """Removes the sets, and only them, from ``parent``."""
    for pattern in (f"{name}-v*" for name in [*SIZES, "tensors-*", ".*"]):
        for folder in parent.glob(pattern):
            if (folder / "base" / "config.json").exists():
                shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build checkpoints to measure with.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--size", choices=SIZES, default="tiny")
    which.add_argument("--tensors", type=int, help="this many tiny tensors instead")
    which.add_argument("--clean", action="store_true", help="remove all sets from the folder")
    parser.add_argument("--models", type=Path, default=default_folder(), help="folder (default: %(default)s)")
    options = parser.parse_args()
    if options.clean:
        clean(options.models)
    else:
        print(build(options.models, options.tensors or options.size))


if __name__ == "__main__":
    main()
