"""Ranks of hidden states are those of a plain singular value decomposition, and collapse shows."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file

from merging.analysis.representations import measure_representation, spread_layers
from merging.checkpoints.checkpoint import open_checkpoint
from merging.errors import Cancelled, InputError, NumbersError
from merging.networks import Network, load_network
from tests import tiny_models


@dataclass
class Given:
    tensors: dict[str, torch.Tensor]
    where: str = "made up, line 1"

    def inputs(self) -> dict[str, torch.Tensor]:
        return self.tensors


def load(folder: Path) -> Network:
    with open_checkpoint(folder) as checkpoint:
        return load_network(checkpoint)


def examples(count: int = 8) -> list[Given]:
    generator = torch.Generator().manual_seed(5)
    return [Given({"input_ids": torch.randint(3, 99, (1, 4 + n), generator=generator)}) for n in range(count)]


def plain_rank(z: np.ndarray) -> float:
    values = scipy.linalg.svdvals(z)
    p = values / values.sum()
    p = p[p > 0]
    return math.exp(-float((p * np.log(p)).sum()))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_ranks_are_those_of_a_plain_decomposition(tmp_path: Path, kind: str) -> None:
    network = load(tiny_models.build(kind, tmp_path / "model"))
    seen: list[tuple[int, int, str]] = []
    found = measure_representation(network, examples(), of="me", progress=lambda *now: seen.append(now))
    states = []
    with torch.no_grad():
        for example in examples():
            states.append(network.module(**example.inputs(), output_hidden_states=True).hidden_states)
    assert (found.model, found.width, found.layers_in_all) == ("me", 32, 3)
    assert [one.layer for one in found.layers] == [0, 1, 2]
    for one in found.layers:
        z = torch.cat([state[one.layer][0] for state in states]).double().numpy()
        assert found.tokens == len(z) == sum(4 + n for n in range(8))
        assert one.rank == pytest.approx(plain_rank(z), rel=1e-5)
        assert one.centred == pytest.approx(plain_rank(z - z.mean(0)), rel=1e-5)
        assert 1 < one.centred <= 32
    assert seen[-1] == (8, 8, "representations")
    content = found.as_dict()
    assert "not a measure of quality" in content["caveat"] and json.loads(json.dumps(content)) == content


def test_few_tokens_bound_the_rank(tmp_path: Path) -> None:
    network = load(tiny_models.build("llama", tmp_path / "model"))
    found = measure_representation(network, examples(1))
    assert found.tokens == 4
    assert all(one.rank <= 4.0001 and one.centred <= 4.0001 for one in found.layers)


def test_a_collapsed_layer_shows(tmp_path: Path) -> None:
    """The second block's output is made to drown all else in one direction."""
    folder = tiny_models.build("llama", tmp_path / "model")
    healthy = measure_representation(load(folder), examples())
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = torch.outer(torch.ones(32), weights[name][0]) * 1e4
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    collapsed = measure_representation(load(folder), examples())
    assert collapsed.layers[0] == healthy.layers[0]
    assert collapsed.layers[1].centred < 0.5 * healthy.layers[1].centred


def test_layers_are_spread_when_memory_is_short(tmp_path: Path) -> None:
    network = load(tiny_models.build("llama", tmp_path / "model"))
    found = measure_representation(network, examples(2), memory=8 * 32 * 32 * 2)
    assert [one.layer for one in found.layers] == [0, 2] and found.layers_in_all == 3
    assert spread_layers(33, 5) == [0, 8, 16, 24, 32]
    assert spread_layers(33, 1) == [32]
    assert spread_layers(3, 9) == [0, 1, 2]


def test_what_can_go_wrong(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    network = load(folder)
    with pytest.raises(InputError, match="no text"):
        measure_representation(network, [])
    stop = threading.Event()
    with pytest.raises(Cancelled):
        measure_representation(network, examples(), progress=lambda *_: stop.set(), stop=stop)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumbersError, match="hidden state is NaN or infinite on made up"):
        measure_representation(load(folder), examples())
