"""Runs mergekit 0.1.5 on small random models and stores what came out. Not run by the tests.

    python tests/oracles/freeze_mergekit.py /path/to/a/python/that/has/mergekit

writes, next to this file:
    frozen/mergekit_vectors.npz   inputs, outputs and DARE masks, float32, keys "<case>/<what>"
    frozen/mergekit_vectors.json  settings of each case, and the versions used
    frozen/mergekit_values.json   what list-valued and filtered parameters become for each tensor of a model,
                                  read off a real `run_merge`: base 0, expert 1, so each output value *is* the
                                  weight that mergekit used

mergekit is only ever a separate program here: no line of it is used by this project.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

FROZEN = Path(__file__).parent / "frozen"
SHAPES = [(40,), (8, 6), (4, 3, 5), (1, 7), (9, 1), (64,), (16, 16), (5,)]


def list_cases() -> list[dict[str, Any]]:
    """Every case: method, number of models, where the base is (None: no base), parameters; shapes rotate.

    `kind` says how inputs relate: "delta" = base plus small differences, "free" = unrelated, others see
    `make_inputs`.
    """
    cases: list[dict[str, Any]] = []

    def add(
        method: str,
        models: int,
        base: int | None,
        parameters: dict[str, Any],
        kind: str = "delta",
        shape: tuple[int, ...] | None = None,
    ) -> None:
        number = len(cases)
        chosen = SHAPES[number % len(SHAPES)] if shape is None else shape
        cases.append(
            {
                "case": f"{number:03d}-{method}",
                "method": method,
                "models": models,
                "base": base,
                "parameters": parameters,
                "kind": kind,
                "shape": list(chosen),
                "seed": 1000 + number,
            }
        )

    # linear: the base is an ordinary model, wherever it is
    add("linear", 2, None, {"weight": [0.5, 0.5]}, "free")
    add("linear", 3, None, {"weight": [0.2, 0.3, 0.9]}, "free")
    add("linear", 3, None, {"weight": [0.2, 0.3, 0.9], "normalize": False}, "free")
    add("linear", 3, None, {"weight": [1.0, -0.4, 0.7]}, "free")
    add("linear", 3, None, {"weight": [1.0, 0.0, 2.0]}, "free")
    add("linear", 1, None, {"weight": [0.4], "normalize": False}, "free")
    add("linear", 4, 2, {"weight": [0.1, 0.2, 0.3, 0.5]})
    add("linear", 2, None, {"weight": [0.3, 0.6]}, "free", ())
    add("linear", 2, None, {"weight": [-1.0, -2.0], "normalize": False}, "free", (1,))
    # slerp: many t, both branches, base first and second
    for t in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0):
        add("slerp", 2, 0, {"t": t}, "free")
    add("slerp", 2, 1, {"t": 0.3}, "free")
    add("slerp", 2, 0, {"t": 0.4}, "delta")
    add("slerp", 2, 0, {"t": 0.4}, "near-parallel")
    add("slerp", 2, 0, {"t": 0.2}, "near-opposite")
    add("slerp", 2, 0, {"t": 1.3}, "free")
    add("slerp", 2, 0, {"t": 0.3}, "zero-first")
    # nuslerp
    add("nuslerp", 2, None, {"weight": [0.5, 0.5]}, "free")
    add("nuslerp", 2, None, {"weight": [1.0, 3.0]}, "free")
    add("nuslerp", 2, None, {"weight": [1.0, -1.0]}, "free")
    add("nuslerp", 2, None, {"weight": [1.5, -0.5]}, "free")
    add("nuslerp", 2, None, {"weight": [0.0, 2.0]}, "free")
    add("nuslerp", 3, 0, {"weight": [0.7, 0.4]})
    add("nuslerp", 3, 2, {"weight": [0.2, 0.8]})
    add("nuslerp", 2, None, {"weight": [0.6, 0.2], "nuslerp_flatten": False}, "free", (6, 7))
    add(
        "nuslerp",
        2,
        None,
        {"weight": [0.6, 0.2], "nuslerp_flatten": False, "nuslerp_row_wise": True},
        "free",
        (6, 7),
    )
    add("nuslerp", 3, 1, {"weight": [0.6, 0.2], "nuslerp_flatten": False}, "delta", (3, 4, 5))
    # multislerp
    add("multislerp", 2, None, {"weight": [0.5, 0.5]}, "free")
    add("multislerp", 3, None, {"weight": [0.2, 0.5, 0.9]}, "free")
    add("multislerp", 3, None, {"weight": [0.2, 0.5, 0.9], "normalize_weights": False}, "free")
    add("multislerp", 3, None, {"weight": [1.0, -0.3, 0.6]}, "free")
    add("multislerp", 4, 0, {"weight": [0.3, 0.3, 0.4]})
    add("multislerp", 4, 3, {"weight": [1.0, 0.0, 2.0], "eps": 1e-6})
    add("multislerp", 1, None, {"weight": [0.7]}, "free")
    # task arithmetic
    add("task_arithmetic", 2, 0, {"weight": [1.0]})
    add("task_arithmetic", 3, 0, {"weight": [0.4, 0.7]})
    add("task_arithmetic", 3, 0, {"weight": [0.4, 0.7], "normalize": True})
    add("task_arithmetic", 4, 1, {"weight": [0.5, -0.3, 0.8], "lambda": 0.3})
    add("task_arithmetic", 4, 3, {"weight": [0.5, 0.0, 0.8], "lambda": 1.7, "normalize": True})
    add("task_arithmetic", 3, 0, {"weight": [0.5, -0.5], "normalize": True})
    add("task_arithmetic", 3, 0, {"weight": [1.0, 1.0], "lambda": 0.0})
    # TIES
    add("ties", 3, 0, {"weight": [1.0, 1.0], "density": 1.0})
    add("ties", 3, 0, {"weight": [1.0, 1.0], "density": 0.5})
    add("ties", 4, 0, {"weight": [1.0, 1.0, 1.0], "density": 0.2})
    add("ties", 4, 0, {"weight": [0.2, 0.5, 1.1], "density": [0.5, 0.7, 0.2]})
    add("ties", 4, 0, {"weight": [0.2, 0.5, 1.1], "density": [0.5, 0.7, 0.2], "normalize": False})
    add("ties", 4, 2, {"weight": [0.6, -0.4, 0.9], "density": 0.5})
    add("ties", 4, 2, {"weight": [0.6, -0.4, 0.9], "density": 0.5, "normalize": False, "lambda": 0.7})
    add("ties", 4, 3, {"weight": [1.0, 0.0, 0.5], "density": 0.5, "lambda": 0.3})
    add("ties", 2, 0, {"weight": [0.4], "density": 0.2})
    add("ties", 2, 0, {"weight": [0.4], "density": 0.2, "normalize": False, "lambda": 1.5})
    add("ties", 3, 0, {"weight": [1.0, 1.0], "density": 0.01}, "delta", (9,))
    add("ties", 3, 0, {"weight": [1.0, 1.0], "density": 0.29}, "delta", (10, 10))
    add("ties", 3, 0, {"weight": [1.0, 1.0], "density": 0.0}, "delta", (12,))
    add("ties", 3, 0, {"weight": [0.3, 0.3], "density": 0.5}, "delta", (1,))
    add("ties", 3, 0, {"weight": [-1.0, -0.5], "density": 0.5})
    add(
        "ties",
        6,
        0,
        {"weight": [0.9, 0.1, 0.4, 0.3, 0.7], "density": [1.0, 0.5, 0.2, 0.35, 0.8]},
        "delta",
        (12, 11),
    )
    # TIES with many equal magnitudes, one expert: which of the equal ones stay is arbitrary in mergekit
    add("ties", 2, 0, {"weight": [1.0], "density": 0.5}, "eighths", (15, 4))
    add("ties", 2, 0, {"weight": [1.0], "density": 0.29}, "eighths", (100,))
    # DARE; the masks mergekit drew are stored
    for method in ("dare_linear", "dare_ties"):
        add(method, 3, 0, {"weight": [0.5, 0.5], "density": 0.5, "rescale": False})
        add(
            method,
            4,
            0,
            {"weight": [0.3, 0.6, 0.9], "density": [0.5, 0.2, 0.8], "rescale": False, "lambda": 0.6},
        )
        add(
            method,
            3,
            1,
            {"weight": [0.7, -0.4], "density": 0.6, "rescale": False, "normalize": True},
            "delta",
            (8, 9),
        )
        add(method, 3, 0, {"weight": [0.7, 0.4], "density": [1.0, 0.5], "rescale": True}, "delta", (10, 9))
        add(
            method,
            4,
            3,
            {"weight": [0.7, 0.4, 0.2], "density": 0.3, "rescale": True, "lambda": 1.4},
            "delta",
            (64,),
        )
        add(method, 3, 0, {"weight": [1.0, 1.0], "density": 0.0, "rescale": True})
    # passthrough
    add("passthrough", 1, None, {}, "free")
    add("passthrough", 1, None, {"scale": [0.5]}, "free")
    add("passthrough", 1, None, {"scale": [-1.25]}, "free")
    return cases


def make_inputs(case: dict[str, Any]) -> list[Any]:
    """float32 arrays from a fixed generator; continuous values unless `kind` is "eighths"."""
    import numpy as np

    draw = np.random.Generator(np.random.PCG64(case["seed"])).standard_normal
    shape, count, base = tuple(case["shape"]), case["models"], case["base"]
    if case["kind"] == "delta":
        start = draw(shape)
        arrays = [start + (0.0 if index == base else 0.3) * draw(shape) for index in range(count)]
    else:
        arrays = [draw(shape) for _ in range(count)]
        if case["kind"] == "eighths":  # sums and differences are exact, and magnitudes repeat
            arrays = [np.round(array * 4) / 8 for array in arrays]
            arrays[1] = arrays[0] + arrays[1]
        elif case["kind"] == "near-parallel":
            arrays[1] = 1.7 * arrays[0] + 0.01 * arrays[1]
        elif case["kind"] == "near-opposite":
            arrays[1] = -0.6 * arrays[0] + 0.003 * arrays[1]
        elif case["kind"] == "zero-first":
            arrays[0] = np.zeros(shape)
    return [np.asarray(array, dtype=np.float32) for array in arrays]


def run_cases() -> dict[str, Any]:
    import torch
    from mergekit.merge_methods.api import merge_tensors
    from mergekit.sparsify import bernoulli

    arrays: dict[str, Any] = {}
    for case in list_cases():
        inputs = make_inputs(case)
        tensors = [torch.from_numpy(array) for array in inputs]
        torch.manual_seed(case["seed"])
        output = merge_tensors(
            tensors,
            case["method"],
            parameters=case["parameters"],
            base_index=case["base"],
            dtype=torch.float32,
        )
        assert output.dtype == torch.float32 and bool(torch.isfinite(output).all()), case
        for index, array in enumerate(inputs):
            arrays[f"{case['case']}/model{index}"] = array
        arrays[f"{case['case']}/output"] = output.numpy()
        if case["method"].startswith("dare"):
            torch.manual_seed(case["seed"])  # the same draws again, on ones, show the masks
            experts = case["models"] - 1
            density = case["parameters"]["density"]
            densities = density if isinstance(density, list) else [density] * experts
            for index, share in enumerate(densities):
                mask = bernoulli(torch.ones(tuple(case["shape"])), share)
                arrays[f"{case['case']}/mask{index}"] = mask.numpy().astype(bool)
    return arrays


# What parameter values become. {tensor kind: setting}; "weight" of the single expert, base is 0, expert is 1.
VALUE_SETTINGS: dict[str, Any] = {
    "scalar": 0.25,
    "gradient of two": [0.0, 1.0],
    "gradient of three": [0.0, 1.0, 0.5],
    "gradient of four": [0.1, 0.5, 0.2, 0.8],
    "longer than the model": [0.0, 0.1, 0.3, 0.7, 0.2, 0.9, 0.4],
    "filters": [
        {"filter": "self_attn", "value": 0.3},
        {"filter": "mlp", "value": [0.2, 0.6]},
        {"value": 0.9},
    ],
    "first filter wins": [
        {"filter": "layers.1", "value": 0.7},
        {"filter": "q_proj", "value": 0.1},
        {"value": 0.4},
    ],
    "star": [{"filter": "norm", "value": 0.35}, {"filter": "*", "value": [1.0, 0.0]}],
}


def write_tiny_llama(folder: Path, value: float, layers: int) -> None:
    import torch
    from safetensors.torch import save_file

    width = 4
    shapes = {
        "model.embed_tokens.weight": (8, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (8, width),
    }
    for index in range(layers):
        block = f"model.layers.{index}."
        shapes.update({block + f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"})
        shapes.update({block + f"mlp.{name}_proj.weight": (width, width) for name in ("gate", "up", "down")})
        shapes.update(
            {block + f"{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
        )
    folder.mkdir()
    tensors = {name: torch.full(shape, value, dtype=torch.float32) for name, shape in shapes.items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": width,
                "intermediate_size": width,
                "num_attention_heads": 1,
                "num_key_value_heads": 1,
                "num_hidden_layers": layers,
                "vocab_size": 8,
                "tie_word_embeddings": False,
            }
        )
    )


def run_values() -> list[dict[str, Any]]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.numpy import load_file

    records = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for layers in (1, 5):
            base, expert = root / f"base{layers}", root / f"expert{layers}"
            write_tiny_llama(base, 0.0, layers)
            write_tiny_llama(expert, 1.0, layers)
            for base_listed in (False, True):
                for label, setting in VALUE_SETTINGS.items():
                    models = [{"model": str(expert), "parameters": {"weight": setting}}]
                    if base_listed:  # its weight must not matter
                        models.insert(0, {"model": str(base), "parameters": {"weight": 123.0}})
                    config = {
                        "merge_method": "task_arithmetic",
                        "base_model": str(base),
                        "models": models,
                        "dtype": "float32",
                    }
                    out = root / f"out-{layers}-{base_listed}-{label.replace(' ', '-')}"
                    run_merge(
                        MergeConfiguration.model_validate(config),
                        str(out),
                        MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True),
                    )
                    merged: dict[str, Any] = {}
                    for file in sorted(out.glob("*.safetensors")):
                        merged.update(load_file(str(file)))
                    values = {key: float(value.reshape(-1)[0]) for key, value in sorted(merged.items())}
                    records.append(
                        {
                            "setting": setting,
                            "label": label,
                            "layers": layers,
                            "base_listed": base_listed,
                            "values": values,
                        }
                    )
    return records


def inside() -> None:
    """Runs under the interpreter that has mergekit."""
    import importlib.metadata as metadata

    import numpy as np
    import torch

    version = metadata.version("mergekit")
    if version != "0.1.5":
        raise SystemExit(f"frozen vectors are made with mergekit 0.1.5; this python has {version}")
    torch.set_num_threads(1)
    FROZEN.mkdir(exist_ok=True)
    np.savez_compressed(FROZEN / "mergekit_vectors.npz", **run_cases())
    about = {"mergekit": version, "torch": torch.__version__, "numpy": np.__version__, "dtype": "float32"}
    cases = ",\n".join("  " + json.dumps(case) for case in list_cases())
    (FROZEN / "mergekit_vectors.json").write_text(
        '{"made_with": ' + json.dumps(about) + ',\n "cases": [\n' + cases + "\n]}\n"
    )
    values = ",\n".join("  " + json.dumps(record) for record in run_values())
    (FROZEN / "mergekit_values.json").write_text(
        '{"made_with": ' + json.dumps(about) + ',\n "records": [\n' + values + "\n]}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("python", help="a Python interpreter that has mergekit 0.1.5")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        inside()
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([arguments.python, __file__, arguments.python, "--inside"], check=True, env=environment)
    for file in sorted(FROZEN.iterdir()):
        print(f"{file.name}: {file.stat().st_size} bytes")
    print(f"{len(list_cases())} vectors")


if __name__ == "__main__":
    main()
