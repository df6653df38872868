"""Whitened spectra are those of a plain float64 computation with one matrix per layer, on every kind of model."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file

from merging.analysis.whitened import JITTER, factor, find_inputs, measure_whitened
from merging.checkpoints.checkpoint import open_checkpoint
from merging.errors import Cancelled, InputError, NumbersError, RecipeError
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


def examples_for(kind: str, count: int = 9) -> list[Given]:
    generator = torch.Generator().manual_seed(5)
    if kind == "vit":
        return [Given({"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}) for _ in range(count)]
    return [
        Given({"input_ids": torch.randint(3, 99, (1, 5 + n), generator=generator)}, f"made up, line {n + 1}")
        for n in range(count)
    ]


def two(kind: str, tmp_path: Path) -> tuple[Network, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The expert as a network, the base's weights, the task vectors."""
    base = tiny_models.build(kind, tmp_path / "base")
    expert = tiny_models.perturb(base, tmp_path / "expert", seed=1)
    old, new = (load_file(folder / "model.safetensors") for folder in (base, expert))
    return load(expert), old, {name: new[name] - old[name] for name in old}


def plain(network: Network, examples: list[Given]) -> dict[str, tuple[np.ndarray, int]]:
    """Name of a layer's weight -> (C, n): every layer by itself, all its inputs kept, float64 at the end."""
    names = {id(parameter): name for name, parameter in network.parameters()}
    inputs: dict[str, list[np.ndarray]] = {}

    def keep(module: Any, given: tuple) -> None:
        x = given[0].detach().double().numpy()
        inputs.setdefault(names[id(module.weight)], []).append(x.reshape(-1, x.shape[-1]))

    handles = [
        module.register_forward_pre_hook(keep)
        for module in network.module.modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    ]
    with torch.no_grad():
        for example in examples:
            network.module(**example.inputs())
    for handle in handles:
        handle.remove()
    stacked = {name: np.concatenate(parts) for name, parts in inputs.items()}
    return {name: (x.T @ x / len(x), len(x)) for name, x in stacked.items()}


@pytest.mark.parametrize(
    ("kind", "layers", "distinct", "transposed"),
    [("llama", 14, 8, False), ("gpt2", 8, 8, True), ("bert", 14, 10, False), ("vit", 13, 9, False)],
)
def test_spectra_are_those_of_a_plain_computation(
    tmp_path: Path, kind: str, layers: int, distinct: int, transposed: bool
) -> None:
    network, base, task_vectors = two(kind, tmp_path)
    examples = examples_for(kind)
    expected = plain(network, examples)
    inputs, _ = find_inputs(network, examples[0])
    assert len(inputs) == distinct
    found = measure_whitened(network, examples, lambda name: task_vectors[name], of="me", method="exact")
    assert len(found.spectra) == layers
    head = {"llama": ["lm_head.weight"], "gpt2": ["transformer.wte.weight"]}.get(kind, [])
    assert [name for name, _ in found.skipped] == head
    assert {s.spectrum.tensor for s in found.spectra} == expected.keys() - set(head)
    for one in found.spectra:
        name = one.spectrum.tensor
        matrix, tokens = expected[name]
        assert (one.tokens, one.enough) == (tokens, tokens >= len(matrix))
        matrix = matrix + JITTER * np.diag(matrix).mean() * np.eye(len(matrix))
        root = scipy.linalg.cholesky(matrix, lower=True)
        tau = task_vectors[name].double().numpy()
        weight = base[name].double().numpy()
        if transposed:
            tau, weight = tau.T, weight.T
        values = scipy.linalg.svdvals(tau @ root)
        assert one.spectrum.shape == tau.shape and one.spectrum.of == "me"
        np.testing.assert_allclose(one.spectrum.values, values, rtol=1e-3, atol=1e-4 * values[0])
        measures = one.spectrum.measures()
        assert measures.relative == pytest.approx(np.linalg.norm(tau @ root) / np.linalg.norm(weight @ root), rel=1e-4)
        assert measures.frobenius == pytest.approx(np.linalg.norm(values), rel=1e-4)


def test_the_energy_is_the_change_of_the_output(tmp_path: Path) -> None:
    """What the module promises: ‖τL‖²_F = mean ‖τx‖² over the tokens, up to the jitter."""
    network, base, task_vectors = two("llama", tmp_path)
    examples = examples_for("llama")
    name = "model.layers.1.self_attn.o_proj.weight"
    outputs: list[torch.Tensor] = []
    layer = network.module.get_submodule(name.removesuffix(".weight"))
    handle = layer.register_forward_pre_hook(lambda _, given: outputs.append(given[0][0] @ task_vectors[name].T))
    found = measure_whitened(network, examples, lambda name: task_vectors[name])
    handle.remove()
    changes = torch.cat(outputs[1:])  # the first pass only finds out who reads what
    [one] = [s for s in found.spectra if s.spectrum.tensor == name]
    assert len(changes) == one.tokens
    assert one.spectrum.frobenius**2 == pytest.approx(float((changes**2).sum(1).mean()), rel=1e-4)


def test_a_direction_that_is_never_excited_does_not_count(tmp_path: Path) -> None:
    """A task vector that reacts only to what does not occur is large, and its whitened spectrum is not."""
    network, base, task_vectors = two("llama", tmp_path)
    examples = examples_for("llama")
    name = "model.layers.0.mlp.gate_proj.weight"
    matrix, _ = plain(network, examples)[name]
    values, vectors = np.linalg.eigh(matrix)
    quiet, loud = (torch.tensor(np.outer(np.ones(48), vectors[:, which])).float() for which in (0, -1))
    sizes = {}
    for which, tau in (("quiet", quiet), ("loud", loud)):
        found = measure_whitened(network, examples, lambda n, tau=tau: tau if n == name else None)  # type: ignore[misc]
        [one] = found.spectra
        sizes[which] = one.spectrum.frobenius
        assert one.spectrum.measures().k99 == 1
        assert len([why for _, why in found.skipped if why == "no task vector of this shape"]) == 13
    assert sizes["loud"] / sizes["quiet"] == pytest.approx(math.sqrt(values[-1] / values[0]), rel=0.05)


def test_a_little_memory_means_more_passes_and_the_same_numbers(tmp_path: Path) -> None:
    network, _, task_vectors = two("llama", tmp_path)
    examples = examples_for("llama", 4)
    seen: list[tuple[int, int]] = []
    whole = measure_whitened(network, examples, lambda name: task_vectors[name])
    small = measure_whitened(
        network,
        examples,
        lambda name: task_vectors[name],
        memory=4 * 3 * 32 * 32,
        progress=lambda done, total, what: seen.append((done, total)),
    )
    # per block: 3 inputs of width 32 and one of 48, which fits alone and with nothing else
    assert (whole.passes, small.passes) == (1, 4)
    assert seen == [(n, 4 * 4 + 14) for n in range(1, 4 * 4 + 14 + 1)]
    for a, b in zip(whole.spectra, small.spectra, strict=True):
        assert a.spectrum.tensor == b.spectrum.tensor and a.tokens == b.tokens
        assert np.array_equal(a.spectrum.values, b.spectrum.values)
    assert [s.block for s in whole.spectra] == [0] * 7 + [1] * 7
    assert not any(module._forward_pre_hooks for module in network.module.modules())


def test_few_tokens_limit_the_rank_and_that_is_said(tmp_path: Path) -> None:
    network, _, task_vectors = two("llama", tmp_path)
    found = measure_whitened(network, examples_for("llama", 1), lambda name: task_vectors[name], method="exact")
    for one in found.spectra:
        assert (one.tokens, one.enough) == (5, False)
        assert one.spectrum.measures().k99 <= 5
        assert one.spectrum.values[5] < 0.03 * one.spectrum.values[0]


def test_the_factor_of_what_rounding_has_damaged() -> None:
    """One direction with almost all the energy, as in large models: float32 leaves negative eigenvalues."""
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(200, generator=generator)
    x = torch.outer(torch.randn(300, generator=generator) * 3e4, direction) + torch.randn(300, 200, generator=generator)
    gram = x.T @ x / 300
    assert int(torch.linalg.cholesky_ex(gram.double())[1])  # no Cholesky factor
    root = factor(gram)
    assert root is not None and root.dtype == torch.float64
    exact = x.double().T @ x.double() / 300
    assert float((root @ root.T - exact).norm() / exact.norm()) < 1e-5
    healthy = torch.randn(40, 40, generator=generator)
    healthy = healthy @ healthy.T
    root = factor(healthy)
    expected = healthy.double() + JITTER * float(healthy.diagonal().mean()) * torch.eye(40)
    assert root is not None and torch.equal(root, root.tril())
    torch.testing.assert_close(root @ root.T, expected, rtol=1e-6, atol=1e-6)
    assert factor(torch.zeros(3, 3)) is None


def test_a_shared_layer_counts_all_its_calls(tmp_path: Path) -> None:
    """ALBERT uses one block several times."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(vocab_size=99, embedding_size=16, hidden_size=32, intermediate_size=48,
                          num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    torch.manual_seed(0)
    AlbertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    network = load(tmp_path / "model")
    examples = examples_for("bert", 3)
    expected = plain(network, examples)
    found = measure_whitened(network, examples, lambda name: torch.ones_like(dict(network.parameters())[name]))
    assert {one.spectrum.tensor: one.tokens for one in found.spectra} == {k: n for k, (_, n) in expected.items()}
    assert max(n for _, n in expected.values()) == 3 * (5 + 6 + 7)


def test_what_can_go_wrong(tmp_path: Path) -> None:
    network, _, task_vectors = two("llama", tmp_path)
    with pytest.raises(InputError, match="no text to whiten"):
        measure_whitened(network, [], lambda name: None)
    with pytest.raises(RecipeError, match="fast"):
        measure_whitened(network, examples_for("llama"), lambda name: None, method="fast")  # type: ignore[arg-type]
    stop = threading.Event()
    seen = []

    def watch(done: int, total: int, what: str) -> None:
        seen.append(done)
        if done == 3:
            stop.set()

    with pytest.raises(Cancelled):
        measure_whitened(network, examples_for("llama"), lambda name: None, progress=watch, stop=stop)
    assert seen == [1, 2, 3]
    weights = load_file(tmp_path / "expert" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3] = math.nan
    save_file(weights, tmp_path / "expert" / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumbersError, match="NaN or infinite on made up, line 1") as caught:
        measure_whitened(load(tmp_path / "expert"), examples_for("llama"), lambda name: task_vectors[name])
    assert caught.value.code == "E_LOSS"
