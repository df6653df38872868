"""Representations: over how many directions do a model's hidden states spread?

A merge can fold the hidden states of its experts onto a few directions. That shows when the same tokens are sent
through the base, the experts and the merged model. Each layer's hidden states Z (tokens x width) are compared by

    RankMe(Z) = exp(−Σ p_i ln p_i),  p_i = σ_i / Σσ          (Garrido et al. 2023, arXiv 2210.02885, without its ε)

and by the same of the centred Z, from which one large common direction, usual in language models, has been taken out.

**This is a diagnostic of collapse, not a measure of quality.** A merged model far below all its experts has lost
something; of two models with healthy numbers the higher one is not the better one. RankMe's authors call the rank
necessary and not sufficient, and compare runs of one method only. It is bounded by the number of tokens.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import Cancelled, InputError, NumbersError
from ..networks import Network, run, threads_of_torch
from .sensitivity import Example, Progress
from .spectra import measures_of

if TYPE_CHECKING:
    from torch import Tensor

MEMORY = 1 << 30
"""Bytes for the second moments of the layers that are looked at."""
CAVEAT = "A diagnostic of collapse on these texts, not a measure of quality."


@dataclass(frozen=True, slots=True)
class LayerRank:
    """``layer``: 0 is the embedding, i the state after block i, the last one after the final norm if there is one (as
    transformers counts). ``rank``: RankMe; ``centred``: the same without the mean of the tokens."""

    layer: int
    rank: float
    centred: float


@dataclass(frozen=True, slots=True)
class Representation:
    """One model. ``tokens``: rows of Z, the most that a rank could be; ``layers_in_all``: with the embedding."""

    model: str
    tokens: int
    width: int
    layers_in_all: int
    layers: list[LayerRank]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"caveat": CAVEAT}


def measure_representation(
    network: Network,
    examples: Sequence[Example],
    *,
    of: str = "",
    memory: int = MEMORY,
    threads: int = 1,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Representation:
    """The ranks of the hidden states of one network. To compare models, give all of them the same examples.

    Args:
        examples: texts; all their tokens count, also special ones.
        of: the model's name.
        memory: bytes for one width x width matrix in float64 per layer; if that is not enough for all layers, as many
            as fit are looked at, evenly spread, the last always.
        progress: called with (examples done, examples in all, "representations").

    Raises:
        InputError: ``E_TEXT`` without examples; ``E_NOT_A_MODEL`` if the network gives no hidden states.
        NumbersError: ``E_LOSS``, naming the example, if a hidden state is NaN or infinite.
        Cancelled: soon after ``stop`` was set.
    """
    import torch

    if not examples:
        raise InputError("E_TEXT", "There is no text to look at hidden states with.", "", "Give at least one.")
    chosen: list[int] = []
    moments: list[Tensor] = []
    sums: list[Tensor] = []
    tokens = width = count = 0
    with threads_of_torch(threads), torch.no_grad():
        for done, example in enumerate(examples, start=1):
            if stop is not None and stop.is_set():
                raise Cancelled()
            states = getattr(
                run(network, example.inputs(), example.where, output_hidden_states=True), "hidden_states", None
            )
            if not states:
                raise InputError("E_NOT_A_MODEL", f"{network.path} gives no hidden states.", "", "Leave it out.")
            if not chosen:
                width, count = states[-1].shape[-1], len(states)
                if any(state.shape[-1] != width for state in states):
                    why = "Its layers differ in width."
                    raise InputError("E_NOT_A_MODEL", f"{network.path} cannot be looked at.", why, "Leave it out.")
                chosen = spread_layers(count, max(1, memory // (8 * width * width)))
                moments = [torch.zeros(width, width, dtype=torch.float64, device=network.device) for _ in chosen]
                sums = [torch.zeros(width, dtype=torch.float64, device=network.device) for _ in chosen]
            for place, layer in enumerate(chosen):
                z = states[layer].reshape(-1, width).double()
                moments[place].addmm_(z.T, z)
                sums[place] += z.sum(dim=0)
            tokens += states[-1].reshape(-1, width).shape[0]
            if not math.isfinite(sum(float(total.sum()) for total in sums)):
                why = f"{network.path} gives no usable numbers on this text."
                what = f"A hidden state is NaN or infinite on {example.where}."
                raise NumbersError("E_LOSS", what, why, "Check the model, or leave the text out.")
            if progress:
                progress(done, len(examples), "representations")
        layers = [
            LayerRank(layer, _rank(moment, tokens), _rank(moment - torch.outer(total, total) / tokens, tokens))
            for layer, moment, total in zip(chosen, moments, sums, strict=True)
        ]
    return Representation(of, tokens, width, count, layers)


def spread_layers(count: int, most: int) -> list[int]:
    """At most ``most`` of the layers 0 … count − 1, evenly spread; the last one always."""
    if most >= count:
        return list(range(count))
    return sorted({count - 1 - round(i * (count - 1) / max(1, most - 1)) for i in range(most)})


def _rank(moment: Tensor, tokens: int) -> float:
    """RankMe from ZᵀZ: σ_i are the roots of its eigenvalues, of which at most ``tokens`` are more than rounding."""
    import torch

    values = torch.linalg.eigvalsh(moment).flip(0).clamp_min(0).sqrt().cpu().numpy().astype(np.float64)
    return measures_of(values[: min(len(values), tokens)], (tokens, len(values))).effective_rank_of_values
