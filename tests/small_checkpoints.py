"""Made-up checkpoints of a few tensors, and short ways to plan, merge and read them.

``save`` and ``load`` go through the safetensors package, not through ours, so that what the tests see of a
file is what everybody else sees.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merging.engine import Result, run
from merging.plan import Plan, make_plan
from merging.recipe import Recipe

State = dict[str, Tensor]
INDEX = "model.safetensors.index.json"


def save(folder: Path, state: Mapping[str, Tensor], shards: int = 1, config: dict[str, Any] | None = None) -> Path:
    """Write a model folder with the tensors in one file, or dealt out to several with an index."""
    folder.mkdir(parents=True)
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        table = {}
        for i in range(shards):
            part = {name: state[name] for name in sorted(state)[i::shards]}
            name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            save_file(part, folder / name, metadata={"format": "pt"})
            table |= dict.fromkeys(part, name)
        total = sum(tensor.nbytes for tensor in state.values())
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": table}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path) -> State:
    """All tensors of a model folder."""
    found: State = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def raw(tensor: Tensor) -> bytes:
    """The tensor's bytes: equal only if every bit is, signs of zeros and payloads of NaNs included."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Same names, types, shapes and bits."""
    return one.keys() == other.keys() and all(
        (one[n].dtype, one[n].shape, raw(one[n])) == (other[n].dtype, other[n].shape, raw(other[n])) for n in one
    )


def recipe(method: str, experts: Sequence[Any], base: Path | None = None, **fields: Any) -> Recipe:
    """A recipe from paths. An expert is a path, or (path, its parameters)."""
    listed = [(e, {}) if isinstance(e, Path) else e for e in experts]
    data = {"method": method, "experts": [{"model": str(p), "parameters": own} for p, own in listed], **fields}
    return Recipe.parse(data | ({"base": str(base)} if base else {}))


def planned(what: Recipe, **options: Any) -> Plan:
    """The plan, with nothing in its way."""
    plan = make_plan(what, **options)
    assert plan.blockers == []
    return plan


def merge(what: Recipe, out: Path, shard_size: int = 5_000_000_000, **options: Any) -> Result:
    """Plan and run."""
    with planned(what, shard_size=shard_size) as plan:
        return run(plan, out, **{"device": "cpu", "threads": 1, **options})


def family(folder: Path, state: State, experts: int, scale: float = 0.01, seed: int = 1, **options: Any) -> list[Path]:
    """A base and ``experts`` models around it: the floating-point tensors plus normal noise."""
    paths = [save(folder / "base", state, **options)]
    for k in range(experts):
        generator = torch.Generator().manual_seed(seed * 1000 + k)
        changed = {
            name: tensor + (torch.randn(tensor.shape, generator=generator) * scale).to(tensor.dtype)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in state.items()
        }
        paths.append(save(folder / f"expert{k + 1}", changed, **options))
    return paths


def llama_like(blocks: int = 2, width: int = 8, dtype: Any = torch.float32, head: bool = True, seed: int = 0) -> State:
    """Tensors with the names and proportions of a small Llama."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.1).to(dtype)

    state = {"model.embed_tokens.weight": random(20, width), "model.norm.weight": random(width) + 1}
    for i in range(blocks):
        prefix = f"model.layers.{i}."
        state[f"{prefix}self_attn.q_proj.weight"] = random(width, width)
        state[f"{prefix}self_attn.o_proj.weight"] = random(width, width)
        state[f"{prefix}mlp.up_proj.weight"] = random(2 * width, width)
        state[f"{prefix}mlp.down_proj.weight"] = random(width, 2 * width)
        state[f"{prefix}input_layernorm.weight"] = random(width) + 1
    if head:
        state["lm_head.weight"] = random(20, width)
    return state
