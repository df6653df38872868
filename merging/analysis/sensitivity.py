"""Sensitivity: how much would a model's loss on its texts move if a weight were set to zero?

To first order, taking the weight θ_j away changes the loss by −θ_j ∂L/∂θ_j. The sensitivity of a tensor is

    S = mean over texts x of  Σ_j |θ_j · ∂L(x)/∂θ_j|

summed over the tensor's weights, or over all tensors of a layer ℓ (a block, or the embedding, the final norm, the head
each by itself), and the layer's coefficient is α^ℓ = S^ℓ / ‖S‖₂ over the layers (Sens-Merging, ACL Findings 2025, arXiv
2502.12420; layers as the RCP-Merging code cuts them). θ is the weight of the model, not its difference from the base.
The absolute value is taken per weight and *per text*: in a batch texts would cancel each other.

Two losses:

- ``next_token``: −mean log p(next token), prompt included. With it S is the score of the paper. Only causal language
  models have it: for others the loss would need labels, or a choice of hidden tokens.
- ``entropy``: −Σ_v p_v log p_v of the model's own output, mean over positions. It needs no right answer and so works
  for classifiers too. The idea is that of the AMP criterion (github.com/visresearch/AMP); **it is not the published
  Sens score**. Where a model is almost sure, entropy and gradient are almost zero and the score says little.

The one idea of the code: a gradient is needed for one number only. As soon as autograd has finished a weight's
gradient, a hook turns it into its sum and frees it, so memory holds the model, what the backward pass keeps of one
text, and one gradient. (Of a tied embedding autograd holds up to three while it adds up its two parts.)

What to keep in mind: an embedding's rows that a text does not use have no gradient, so its score does not compare with
those of other layers; a tied head adds its gradient to the embedding's *before* the absolute value is taken.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..checkpoints.layout import role
from ..errors import Cancelled, InputError, NumbersError
from ..networks import CAUSAL, CLASSIFIER, ENCODER, IMAGE, MASKED, Network, run, threads_of_torch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NEXT_TOKEN, ENTROPY = "next_token", "entropy"
LOSSES = (NEXT_TOKEN, ENTROPY)
CHUNK = 1 << 17
"""Elements that are multiplied at a time: the products fit into the cache, and no second gradient is needed."""
SURE = 0.01
"""Mean entropy in nats below which the entropy score is said to be weak."""

Progress = Callable[[int, int, str], None]


class Example(Protocol):
    """One thing to show a model: ``inputs()`` are its keyword arguments, ``where`` names it in errors."""

    @property
    def where(self) -> str: ...

    def inputs(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Score:
    """S of one tensor or layer. ``error``: standard error of the mean over texts, None with one text.

    ``block``: number of the block, None outside of blocks; ``kind``: of ``checkpoints.layout`` ("layer" for a layer);
    ``weights``: how many are summed; ``coefficient``: α of a layer, None for a tensor.
    """

    name: str
    block: int | None
    kind: str
    weights: int
    score: float
    error: float | None
    coefficient: float | None = None


@dataclass(slots=True)
class Sensitivity:
    """The scores of one model under one loss. ``mean_loss`` in nats; ``positions``: predictions that the loss is of.

    ``tied``: other name of a weight -> the name that its score stands under; ``unreached``: weights without
    a gradient on any text.
    """

    loss: str
    samples: int
    positions: int
    mean_loss: float
    tensors: list[Score]
    layers: list[Score]
    tied: dict[str, str]
    unreached: list[str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values. All numbers are exact for these texts; as figures of the model they are samples."""
        return asdict(self) | {"published_sens_score": self.loss == NEXT_TOKEN}


def measure_sensitivity(
    network: Network,
    examples: Sequence[Example],
    losses: Sequence[str] = (NEXT_TOKEN,),
    *,
    threads: int = 1,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Sensitivity]:
    """The sensitivity of each weight of ``network`` on the examples: loss -> scores.

    Args:
        network: from ``merging.networks``; its weights are not changed.
        examples: texts (``calibration.samples``), or anything with inputs; each is one batch of size 1.
        losses: of ``LOSSES``. Two losses share the forward pass.
        threads: CPU threads of torch; another number can change the last bits.
        progress: called with (examples done, examples in all, "sensitivity").

    Memory: the network, the activations of one example, the largest gradient. Time: a forward and, per loss, a backward
    pass per example.

    Raises:
        InputError: ``E_NO_LOSS`` if the network has no such loss; ``E_TEXT`` without examples.
        NumbersError: ``E_LOSS``, naming the example, if a loss or gradient is NaN or infinite.
        Cancelled: soon after ``stop`` was set, also within a backward pass.
    """
    for wanted in losses:
        check_loss(network.kind, wanted)
    if not examples:
        raise InputError("E_TEXT", "There is no text to measure the sensitivity on.", "", "Give at least one.")
    parameters = [(name, parameter) for name, parameter in network.parameters() if parameter.is_floating_point()]
    sums = {loss: np.zeros((len(examples), len(parameters))) for loss in losses}
    values = {loss: np.zeros(len(examples)) for loss in losses}
    positions = dict.fromkeys(losses, 0)
    with threads_of_torch(threads), _Reducer(parameters, stop) as reducer:
        for number, example in enumerate(examples):
            if stop is not None and stop.is_set():
                raise Cancelled()
            inputs = example.inputs()
            logits = run(network, inputs, example.where).logits
            for later, loss in enumerate(losses, start=1):
                value, count = compute_loss(loss, logits, inputs)
                values[loss][number] = float(value.detach())
                positions[loss] += count
                if not math.isfinite(values[loss][number]):
                    raise _not_finite(example, network, f"The loss is {values[loss][number]}")
                reducer.into(sums[loss][number])
                value.backward(retain_graph=later < len(losses))
                wrong = np.flatnonzero(~np.isfinite(sums[loss][number]))
                if wrong.size:
                    raise _not_finite(example, network, f"The gradient of {parameters[wrong[0]][0]} is not finite")
                del value
            del logits
            if progress:
                progress(number + 1, len(examples), "sensitivity")
    results = {}
    for wanted in losses:
        results[wanted] = _result(
            network, wanted, parameters, sums[wanted], values[wanted], positions[wanted], reducer.reached
        )
    return results


def check_loss(kind: str, loss: str) -> None:
    """Raise InputError ``E_NO_LOSS`` unless a network of this kind has this loss. See the module."""
    if loss not in LOSSES:
        raise ValueError(f"{loss!r} is none of {LOSSES}")
    whose = {
        MASKED: "A masked language model",
        CLASSIFIER: "A classifier of texts",
        IMAGE: "A classifier of images",
        ENCODER: "A model without a head",
    }.get(kind, "")
    if kind == ENCODER:
        why = "It gives hidden states, no probabilities."
        raise InputError("E_NO_LOSS", f"{whose} has no loss.", why, "Measure a model with its head.")
    if loss == NEXT_TOKEN and kind != CAUSAL:
        why = "The published score takes the loss of the next token, which only causal language models predict."
        what = f"{whose} has no loss on a text without a label."
        raise InputError("E_NO_LOSS", what, why, "Measure the entropy sensitivity, which needs no label.")


def compute_loss(loss: str, logits: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """(loss in nats, number of predictions it is the mean of) for one example.

    Logits: (1, tokens, vocabulary), or (1, classes). The loss of the next token leaves out the last position.
    """
    import torch

    rows = logits.flatten(0, -2)
    if loss == ENTROPY:
        logs = torch.log_softmax(rows, dim=-1)
        return -(logs.exp() * logs).sum(dim=-1).mean(), rows.shape[0]
    tokens = inputs["input_ids"].flatten().to(rows.device)
    if len(tokens) < 2:
        raise InputError("E_TEXT", "A text of one token has no next token.", "", "Leave it out.")
    return torch.nn.functional.cross_entropy(rows[:-1], tokens[1:]), len(tokens) - 1


class _Reducer:
    """Hooks that turn each finished gradient into Σ|θ·g| and free it. A context manager: no hook stays behind."""

    def __init__(self, parameters: Sequence[tuple[str, torch.nn.Parameter]], stop: threading.Event | None):
        self.parameters, self.stop = parameters, stop
        self.reached = np.zeros(len(parameters), dtype=bool)
        self.row = np.zeros(0)

    def into(self, row: np.ndarray) -> None:
        """Write the sums of the next backward pass here, one per parameter."""
        self.row = row

    def __enter__(self) -> _Reducer:
        self.before = [parameter.requires_grad for _, parameter in self.parameters]
        self.handles = []
        for number, (_, parameter) in enumerate(self.parameters):
            parameter.requires_grad_(True)
            parameter.grad = None
            self.handles.append(parameter.register_post_accumulate_grad_hook(self._hook(number)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        for before, (_name, parameter) in zip(self.before, self.parameters, strict=True):
            parameter.grad = None  # only after an error is there one
            parameter.requires_grad_(before)

    def _hook(self, number: int) -> Callable[[Tensor], None]:
        def reduce(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            self.reached[number] = True
            self.row[number] = sum_of_products(parameter.detach(), gradient)
            if self.stop is not None and self.stop.is_set():
                raise Cancelled()

        return reduce


def sum_of_products(weights: Tensor, gradient: Tensor) -> float:
    """Σ|θ·g|: products in the weights' type, their sum in float64. The gradient is not written to: autograd may still
    need the memory it lies in."""
    import torch

    flat_weights, flat_gradient = weights.reshape(-1), gradient.reshape(-1)
    scratch = torch.empty(min(CHUNK, flat_weights.numel()), dtype=weights.dtype, device=weights.device)
    total = 0.0
    for start in range(0, flat_weights.numel(), CHUNK):
        part = flat_weights[start : start + CHUNK]
        products = torch.mul(part, flat_gradient[start : start + CHUNK], out=scratch[: part.numel()])
        total += float(torch.linalg.vector_norm(products, ord=1, dtype=torch.float64))
    return total


def _result(
    network: Network,
    loss: str,
    parameters: Sequence[tuple[str, torch.nn.Parameter]],
    sums: np.ndarray,
    values: np.ndarray,
    positions: int,
    reached: np.ndarray,
) -> Sensitivity:
    tensors: list[Score] = []
    members: dict[str, list[int]] = {}
    for number, (name, parameter) in enumerate(parameters):
        place = role(name, tuple(parameter.shape))
        tensors.append(Score(name, place.block, place.kind, parameter.numel(), *_mean(sums[:, number])))
        members.setdefault(layer_of(name, place.block), []).append(number)
    per_layer = {layer: _mean(sums[:, numbers].sum(axis=1)) for layer, numbers in members.items()}
    length = math.sqrt(math.fsum(score * score for score, _ in per_layer.values()))
    layers = [
        Score(
            layer,
            tensors[numbers[0]].block,
            "layer",
            sum(tensors[number].weights for number in numbers),
            *per_layer[layer],
            per_layer[layer][0] / length if length else 0.0,
        )
        for layer, numbers in members.items()
    ]
    mean_loss = float(values.mean())
    notes = _notes(network, loss, mean_loss, length)
    unreached = [name for (name, _), seen in zip(parameters, reached, strict=True) if not seen]
    tied = dict(network.tied)
    return Sensitivity(loss, len(values), positions, mean_loss, tensors, layers, tied, unreached, notes)


def layer_of(name: str, block: int | None) -> str:
    """The layer that a tensor's score is added to: its block, or outside of blocks its module."""
    return f"block {block}" if block is not None else name.removesuffix(".weight").removesuffix(".bias")


def _mean(values: np.ndarray) -> tuple[float, float | None]:
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error


def _notes(network: Network, loss: str, mean_loss: float, length: float) -> list[str]:
    notes = []
    if loss == ENTROPY:
        notes.append("Entropy sensitivity needs no labels and is not the published Sens score.")
        if mean_loss < SURE:
            notes.append(f"The model is almost sure (mean entropy {mean_loss:.2g} nats): the score says little.")
        if network.kind == MASKED:
            notes.append("No token was hidden: the entropy is that of tokens which the model sees.")
    if loss == NEXT_TOKEN and mean_loss > math.log(max(2, network.vocabulary)):
        why = "the model was not trained to predict such texts, and their sensitivity may not be that of its task"
        notes.append(f"The loss ({mean_loss:.3g} nats) is above that of a blind guess: {why}.")
    if network.tied:
        names = ", ".join(f"{name} in {first}" for name, first in network.tied.items())
        notes.append(f"Tied weights are scored once, with the sum of their gradients: {names}.")
    if not length:
        notes.append("All scores are zero: the loss does not depend on any weight.")
    return notes


def _not_finite(example: Example, network: Network, what: str) -> NumbersError:
    why = f"{network.path} gives no usable numbers on this text."
    return NumbersError("E_LOSS", f"{what} on {example.where}.", why, "Check the model, or leave the text out.")
