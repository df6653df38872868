"""Asks mergekit itself which number it uses for which tensor, and writes the answers to a JSON file.

Run it with a Python that has mergekit 0.1.5 (the tests only read the file that it wrote):

    python tests/oracles/measure_mergekit_parameters.py tests/data/mergekit_parameters.json

The trick: model k of a set holds a one at flat index k of every tensor and zeros elsewhere, and the base is
all zeros or a one at its own index. After a merge with ``normalize: false`` the output *is* the list of
effective coefficients. For slerp of orthogonal unit vectors, t = 2/pi * atan2(out[1], out[0]).
"""

from __future__ import annotations

import contextlib
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


# Each case: how to read the output, and the recipe. Names in capitals are the models above: A5 has 5 blocks.
CASES: dict[str, tuple[str, str]] = {}


def case(name: str, recipe: str, read: str = "coefficients") -> None:
    CASES[name] = (read, recipe)


LINEAR = "merge_method: linear\nparameters: {normalize: false}\n"
for count in (1, 2, 3, 4, 5):
    case(
        f"gradient over {count} blocks",
        LINEAR + f"models:\n- {{model: A{count}, parameters: {{weight: [0, 1]}}}}\n"
        f"- {{model: B{count}, parameters: {{weight: [1, 0, 0.5]}}}}\n",
    )
case(
    "gradient restarts in every slice",
    LINEAR + """slices:
- sources:
  - {model: A5, layer_range: [0, 3], parameters: {weight: [0, 1]}}
  - {model: B5, layer_range: [1, 4], parameters: {weight: 1}}
- sources:
  - {model: C5, layer_range: [3, 5], parameters: {weight: [0.25, 0.75]}}
  - {model: D5, layer_range: [0, 2], parameters: {weight: [2, 4]}}
""",
)
case(
    "a slice of one block has t = 1",
    LINEAR + """slices:
- sources:
  - {model: A5, layer_range: [0, 4], parameters: {weight: [0, 1]}}
- sources:
  - {model: B5, layer_range: [4, 5], parameters: {weight: [0.25, 0.75]}}
""",
)
case("scientific notation is a number", LINEAR + "models:\n- {model: A2, parameters: {weight: 1e-3}}\n")
case("a gradient of one value", LINEAR + "models:\n- {model: A3, parameters: {weight: [0.5]}}\n")
case(
    "filters: the first match wins, the rest falls through to the global value",
    """merge_method: linear
models:
- model: A3
  parameters:
    weight: [{filter: self_attn, value: [0, 1]}, {filter: attn.q, value: 9}, {filter: layers.1., value: 3}]
- model: B3
  parameters:
    weight: [{filter: mlp, value: 0.5}, {value: 0.125}]
parameters: {normalize: false, weight: [{filter: norm, value: 7}, {value: [10, 20]}]}
""",
)
case(
    "filters: a single condition without a list",
    LINEAR + "models:\n- {model: A2, parameters: {weight: {value: 2}}}\n",
)
case(
    "filters: a star matches all",
    LINEAR + 'models:\n- {model: A2, parameters: {weight: [{filter: "*", value: 2}, {value: 3}]}}\n',
)
case(
    "filters: no match anywhere",
    LINEAR + "models:\n- {model: A2, parameters: {weight: [{filter: mlp, value: 2}]}}\n",
)
case(
    "filters: shared parameters see the output name, others the input name",
    """merge_method: linear
slices:
- sources: [{model: A5, layer_range: [2, 4], parameters: {weight: [{filter: layers.2., value: 2}, {value: 1}]}}]
- sources: [{model: A5, layer_range: [0, 1], parameters: {weight: [{filter: layers.2., value: 5}, {filter: layers.0., value: 6}, {value: 1}]}}]
parameters: {normalize: [{filter: layers.2., value: true}, {value: false}]}
""",
)
case(
    "precedence: source > slice > global",
    """merge_method: linear
slices:
- sources:
  - {model: A2, layer_range: [0, 1], parameters: {weight: 1}}
  - {model: B2, layer_range: [0, 1]}
  parameters: {weight: 2}
- sources:
  - {model: A2, layer_range: [1, 2]}
  - {model: B2, layer_range: [1, 2], parameters: {weight: 4}}
parameters: {weight: 3, normalize: false}
""",
)
case(
    "precedence: slice > module > global",
    """merge_method: linear
modules:
  default:
    slices:
    - sources: [{model: A2, layer_range: [0, 1]}, {model: B2, layer_range: [0, 1]}]
      parameters: {weight: [{filter: mlp, value: 2}]}
    - sources: [{model: A2, layer_range: [1, 2]}, {model: B2, layer_range: [1, 2], parameters: {weight: 5}}]
    parameters: {weight: [{filter: self_attn, value: 3}], normalize: false}
parameters: {weight: 4, normalize: true}
""",
)
case(
    "modules: the models form",
    "merge_method: linear\nmodules:\n  default:\n    models: [{model: A2, parameters: {weight: 2}}, {model: B2}]\n"
    "    parameters: {weight: 3, normalize: false}\n",
)
case("modules: another name", LINEAR + "modules: {text: {models: [{model: A2, parameters: {weight: 2}}]}}\n")

TASK = "merge_method: task_arithmetic\nbase_model: Z3\n"
case("base not listed", TASK + "models: [{model: A3, parameters: {weight: 2}}, {model: B3, parameters: {weight: 3}}]\n")
case("base listed first", TASK + "models: [{model: Z3}, {model: B3, parameters: {weight: 3}}]\n")
case(
    "base listed with parameters: they are ignored",
    TASK + "models: [{model: B3, parameters: {weight: 3}}, {model: Z3, parameters: {weight: 5}}]\n",
)
case("task arithmetic: weight missing", TASK + "models: [{model: A3}]\n")
case("task arithmetic: global weight", TASK + "models: [{model: A3}, {model: B3}]\nparameters: {weight: 0.5}\n")
case("task arithmetic: lambda", TASK + "models: [{model: A3}]\nparameters: {weight: 0.5, lambda: [1, 3]}\n")
case(
    "task arithmetic: lambda under a model is ignored",
    TASK + "models: [{model: A3, parameters: {lambda: 4, weight: 1}}]\n",
)
case(
    "task arithmetic: normalize",
    TASK + "models: [{model: A3, parameters: {weight: 1}}, {model: B3, parameters: {weight: 3}}]\n"
    "parameters: {normalize: true}\n",
)
case(
    "task arithmetic: density has no effect",
    TASK + "models: [{model: A3, parameters: {weight: 1, density: 0.001}}]\n",
)
case("an unknown parameter is ignored", TASK + "models: [{model: A3, parameters: {weight: 1, wieght: 5}}]\n")
case("task arithmetic without a base", "merge_method: task_arithmetic\nmodels: [{model: A3, parameters: {weight: 1}}]\n")
case("the same model twice", TASK + "models: [{model: A3, parameters: {weight: 1}}, {model: A3, parameters: {weight: 2}}]\n")
case("only the base", TASK + "models: [{model: Z3}]\n")
case("different block counts", TASK + "models: [{model: A4, parameters: {weight: 1}}]\n")
case(
    "slices: the base must be listed as a source",
    TASK + "slices: [{sources: [{model: A3, layer_range: [0, 3], parameters: {weight: 1}}]}]\n",
)
case(
    "slices: the base among the sources, with its own range",
    """merge_method: task_arithmetic
base_model: A5n
slices:
- sources:
  - {model: A5n, layer_range: [2, 4]}
  - {model: B5n, layer_range: [0, 2], parameters: {weight: 0.5}}
""",
)
case(
    "slices: a base of the slice",
    """merge_method: task_arithmetic
base_model: A5n
slices:
- sources: [{model: A5n, layer_range: [0, 1]}, {model: B5n, layer_range: [0, 1], parameters: {weight: 0.5}}]
- base_model: C5n
  sources: [{model: C5n, layer_range: [0, 1]}, {model: B5n, layer_range: [1, 2], parameters: {weight: 0.5}}]
""",
)
case(
    "slices: ranges of different length",
    TASK + "slices: [{sources: [{model: A3, layer_range: [0, 2], parameters: {weight: 1}}, {model: Z3, layer_range: [0, 3]}]}]\n",
)
case("slices: a range beyond the end", LINEAR + "slices: [{sources: [{model: A3, layer_range: [2, 5], parameters: {weight: 1}}]}]\n")
case("slices: an empty range", LINEAR + "slices: [{sources: [{model: A3, layer_range: [2, 2], parameters: {weight: 1}}]}]\n")
case("slices: a reversed range", LINEAR + "slices: [{sources: [{model: A3, layer_range: [2, 1], parameters: {weight: 1}}]}]\n")

case(
    "linear: the base is appended as an ordinary model",
    "merge_method: linear\nbase_model: C3\nmodels: [{model: A3, parameters: {weight: 2}}]\n"
    "parameters: {normalize: false, weight: 7}\n",
)
case("linear: the base is appended and has no weight", LINEAR + "base_model: C3\nmodels: [{model: A3, parameters: {weight: 2}}]\n")
case(
    "linear: the base among the models",
    LINEAR + "base_model: A3\nmodels: [{model: A3, parameters: {weight: 2}}, {model: B3, parameters: {weight: 3}}]\n",
)
case(
    "linear: slices leave the base out",
    LINEAR + "base_model: C3\nslices: [{sources: [{model: A3, layer_range: [0, 3], parameters: {weight: 2}}]}]\n",
)
case("linear: normalize by default", "merge_method: linear\nmodels: [{model: A3, parameters: {weight: 1}}, {model: B3, parameters: {weight: 3}}]\n")
case("linear: normalize under a model is ignored", "merge_method: linear\nmodels: [{model: A3, parameters: {weight: 4, normalize: false}}]\n")
case("linear: a gradient of booleans", "merge_method: linear\nmodels: [{model: A4, parameters: {weight: 4}}]\nparameters: {normalize: [true, false]}\n")
case("linear: normalize as 0", "merge_method: linear\nmodels: [{model: A3, parameters: {weight: 4}}]\nparameters: {normalize: 0}\n")
case("linear: weights that sum to 0", "merge_method: linear\nmodels: [{model: A3, parameters: {weight: 1}}, {model: B3, parameters: {weight: -1}}]\n")

SLERP = "merge_method: slerp\nbase_model: A3\n"
PAIR = "models: [{model: A3}, {model: B3}]\n"
case("slerp: t = 0 is the base", SLERP + PAIR + "parameters: {t: 0}\n", "t")
case("slerp: base listed last", SLERP + "models: [{model: B3}, {model: A3}]\nparameters: {t: 0.25}\n", "t")
case("slerp: base not listed", SLERP + "models: [{model: B3}]\nparameters: {t: 0.25}\n", "t")
case(
    "slerp: t by filter and gradient",
    SLERP + PAIR
    + "parameters: {t: [{filter: self_attn, value: [0, 0.5, 0.3]}, {filter: mlp, value: [1, 0.5, 0.7]}, {value: 0.5}]}\n",
    "t",
)
case("slerp: t under a model is ignored", SLERP + "models: [{model: A3}, {model: B3, parameters: {t: 0.5}}]\n", "t")
case("slerp: t of a slice", """merge_method: slerp
base_model: A5
slices:
- sources: [{model: A5, layer_range: [0, 3]}, {model: B5, layer_range: [0, 3]}]
  parameters: {t: [0.1, 0.2]}
- sources: [{model: B5, layer_range: [3, 5]}, {model: A5, layer_range: [3, 5]}]
parameters: {t: [0.3, 0.9]}
""", "t")  # fmt: skip
case("slerp: three models", SLERP + "models: [{model: B3}, {model: C3}]\nparameters: {t: 0.5}\n", "t")
case("slerp: no base", "merge_method: slerp\n" + PAIR + "parameters: {t: 0.5}\n", "t")
case("slerp: weight is ignored", SLERP + "models: [{model: A3, parameters: {weight: 1}}, {model: B3}]\nparameters: {t: 0.5}\n", "t")

case("nuslerp: the second weight over the sum", "merge_method: nuslerp\nmodels: [{model: A3, parameters: {weight: 1}}, {model: B3, parameters: {weight: 3}}]\n", "t")
case("nuslerp: the base among two models", "merge_method: nuslerp\nbase_model: A3\nmodels: [{model: A3, parameters: {weight: 1}}, {model: B3, parameters: {weight: 3}}]\n", "t")
case("nuslerp: with a base", "merge_method: nuslerp\nbase_model: Z3\nmodels: [{model: A3, parameters: {weight: 1}}, {model: B3, parameters: {weight: 3}}]\n", "t")
case("nuslerp: three models", "merge_method: nuslerp\nmodels: [{model: A3, parameters: {weight: 1}}, {model: B3, parameters: {weight: 3}}, {model: C3, parameters: {weight: 3}}]\n", "t")
case("multislerp: one model", "merge_method: multislerp\nmodels: [{model: A3, parameters: {weight: 4}}]\n")

case("passthrough", "merge_method: passthrough\nmodels: [{model: A3n}]\n")
case("passthrough: scale", "merge_method: passthrough\nmodels: [{model: A3n, parameters: {scale: [{filter: o_proj, value: [0, 0.5]}, {value: 2}]}}]\n")
case("passthrough: global scale", "merge_method: passthrough\nmodels: [{model: A3n}]\nparameters: {scale: 3}\n")
case("passthrough: a base that is not listed", "merge_method: passthrough\nbase_model: Z3\nmodels: [{model: A3n}]\n")
case("passthrough: the base itself", "merge_method: passthrough\nbase_model: A3n\nmodels: [{model: A3n}]\n")
case("passthrough: stacking", """merge_method: passthrough
slices:
- sources: [{model: A5n, layer_range: [0, 3]}]
- sources: [{model: B5n, layer_range: [1, 4], parameters: {scale: [0, 1]}}]
- sources: [{model: C4n, layer_range: [3, 4]}]
""")  # fmt: skip
case("passthrough: stacking with a base", """merge_method: passthrough
base_model: D5n
slices:
- sources: [{model: A5n, layer_range: [0, 2]}]
- sources: [{model: B5n, layer_range: [1, 3]}]
""")  # fmt: skip
case("dtype is checked", LINEAR + "dtype: float8\nmodels: [{model: A2, parameters: {weight: 1}}]\n")
case("residual_weight is ignored", LINEAR + "slices: [{residual_weight: 0.5, sources: [{model: A2, layer_range: [0, 2], parameters: {weight: 1}}]}]\n")
case("an unknown key is ignored", LINEAR + "modles: 3\nmodels: [{model: A2, parameters: {weight: 1}}]\n")
case("models and slices together", LINEAR + "models: [{model: A2, parameters: {weight: 1}}]\nslices: [{sources: [{model: A2, layer_range: [0, 2]}]}]\n")


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
            return {k: str(root / v) if k in keys and isinstance(v, str) else absolute(v) for k, v in node.items()}
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
    if read == "t":
        return {
            "t": {
                name: round(2 / math.pi * math.atan2(*tensor.double().flatten()[[1, 0]].tolist()), 6)
                for name, tensor in sorted(merged.items())
            }
        }
    return {
        "coefficients": {
            # float32 arithmetic: nine digits are more than it has
            name: [float(f"{v:.7g}") for v in tensor.double().flatten()[:4].tolist()]
            for name, tensor in sorted(merged.items())
        }
    }


def main(target: Path) -> None:
    logging.disable(logging.CRITICAL)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models(root)
        for number, (name, (read, recipe)) in enumerate(CASES.items()):
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                result = run(recipe, read, root, root / f"out{number}")
            results[name] = {"recipe": recipe, **result}
            print(name, "->", result.get("error", "ok"))
    import importlib.metadata

    document = {"mergekit": importlib.metadata.version("mergekit"), "cases": results}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
