"""Asks mergekit itself which number it uses for which tensor, and writes the answers to a JSON file.

Run it with a Python that has mergekit 0.1.5 (the tests only read the file that it wrote):

    python tests/oracles/measure_mergekit_parameters.py tests/data/mergekit_parameters.json

The recipes stand in ``tests/data/recipes/measured_cases.yml``. A5 is a model with 5 blocks, Z5 one of zeros;
in A5n the one is multiplied by the number of the block, counted from 1, and by 100 outside of the blocks.

The trick: model k of a set holds a one at flat index k of every tensor and zeros elsewhere, and the base is
all zeros or a one at its own index. After a merge with ``normalize: false`` the output *is* the list of
effective coefficients. For slerp of orthogonal unit vectors, t = 2/pi * atan2(out[1], out[0]).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import logging
import math
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

HIDDEN = 8
CASES = Path(__file__).parent.parent / "data" / "recipes" / "measured_cases.yml"
KEPT = ("embed_tokens", "model.norm", "lm_head", "input_layernorm", "q_proj", "o_proj", "up_proj")
"""Tensors whose results are kept, one of each sort."""


def tensors(blocks: int, slot: int | None, by_block: bool = False) -> dict[str, torch.Tensor]:
    """A Llama-shaped state dict; each tensor is one-hot at ``slot`` (value block + 1 when ``by_block``)."""
    shapes = {"model.embed_tokens.weight": (4, HIDDEN)}
    for i in range(blocks):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            shapes[f"model.layers.{i}.{name}.weight"] = (HIDDEN, HIDDEN)
        for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            shapes[f"model.layers.{i}.{name}.weight"] = (HIDDEN, HIDDEN)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (HIDDEN,)
    shapes["model.norm.weight"] = (HIDDEN,)
    shapes["lm_head.weight"] = (4, HIDDEN)
    result = {}
    for name, shape in shapes.items():
        result[name] = torch.zeros(shape)
        if slot is not None:
            block = int(name.split(".")[2]) + 1 if ".layers." in name else 100
            result[name].view(-1)[slot] = float(block) if by_block else 1.0
    return result


def save_model(folder: Path, blocks: int, slot: int | None, by_block: bool = False) -> None:
    folder.mkdir(parents=True)
    save_file(tensors(blocks, slot, by_block), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN, "num_hidden_layers": blocks, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 4, "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def models(root: Path) -> None:
    for blocks in (1, 2, 3, 4, 5):
        for slot, letter in enumerate("ABCD"):
            save_model(root / f"{letter}{blocks}", blocks, slot)
            save_model(root / f"{letter}{blocks}n", blocks, slot, by_block=True)
        save_model(root / f"Z{blocks}", blocks, None)


def way_to_read(name: str) -> str:
    """What is read from the output of a case: the interpolation factor t, or the models' coefficients."""
    return "t" if name.startswith(("slerp", "nuslerp")) else "coefficients"


def run(recipe: str, read: str, root: Path, out: Path) -> dict:
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    LoaderCache().loaders.clear()
    data = yaml.safe_load(recipe)

    def absolute(node: object) -> object:
        if isinstance(node, dict):
            keys = ("model", "base_model")
            return {
                k: str(root / v) if k in keys and isinstance(v, str) else absolute(v) for k, v in node.items()
            }
        return [absolute(item) for item in node] if isinstance(node, list) else node

    try:
        config = MergeConfiguration.model_validate(absolute(data))
        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
        run_merge(config, str(out), options)
    except BaseException as error:  # what mergekit raises is the finding
        first = str(error).replace(str(root) + "/", "").strip().splitlines()
        return {"error": f"{type(error).__name__}: {first[0] if first else ''}"[:200]}
    merged = {}
    for file in sorted(out.glob("*.safetensors")):
        merged.update(load_file(file))
    found = {}
    for name, tensor in sorted(merged.items()):
        values = tensor.double().flatten()[:4].tolist()
        if read == "t":
            found[name] = round(2 / math.pi * math.atan2(values[1], values[0]), 6)
        else:  # float32 arithmetic has seven digits; infinities are not JSON
            found[name] = [float(f"{v:.7g}") if math.isfinite(v) else str(v) for v in values]
    return {read: {name: value for name, value in found.items() if any(kind in name for kind in KEPT)}}


def main(target: Path) -> None:
    logging.disable(logging.CRITICAL)
    results = {}
    cases = yaml.safe_load(CASES.read_text())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models(root)
        for number, (name, recipe) in enumerate(cases.items()):
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                result = run(recipe, way_to_read(name), root, root / f"out{number}")
            results[name] = result
            print(name, "->", result.get("error", "ok"))
    lines = [f"{json.dumps(name)}: {json.dumps(result, allow_nan=False)}" for name, result in results.items()]
    version = json.dumps(importlib.metadata.version("mergekit"))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f'{{"mergekit": {version},\n"cases": {{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
