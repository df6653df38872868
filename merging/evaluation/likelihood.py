"""Log-likelihoods of tokens in many sequences at once, the common part of choices and texts.

    log p(sequence from position s on) = Σ_{j ≥ s} log softmax(logits_{j−1})[token_j]

Sequences are padded on the right, where a causal model cannot see it, so each position is computed from exactly the
tokens before it. Sequences that differ in the last token only (the one-letter choices of one question) share a row.
Logits are float32, as the model gives them; sums are float64.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merging.evaluation.models import Model

MOST_LOGITS = 1 << 26  # numbers in memory at a time: 256 MB
MOST_TOKENS = 1 << 14  # of a batch, padding included


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens, of which those from ``start`` (1 or more) on are scored."""

    tokens: tuple[int, ...]
    start: int


def log_likelihoods(model: Model, sequences: Sequence[Stretch], batch_size: int) -> list[float]:
    """The log-likelihood (nats) of each sequence from its ``start`` on; NaN where a logit is NaN or +infinity.

    ``batch_size``: rows at a time, at most.
    """
    rows: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for number, one in enumerate(sequences):
        rows.setdefault((one.tokens[:-1], one.start), []).append(number)
    order = sorted(rows, key=lambda row: len(row[0]), reverse=True)  # alike lengths together: little padding
    result = [math.nan] * len(sequences)
    vocabulary = getattr(model.network.config.get_text_config(), "vocab_size", 1)
    start = 0
    while start < len(order):
        stop = start + _count(order[start : start + batch_size], vocabulary)
        for row, values in zip(order[start:stop], _batch(model, order[start:stop], rows, sequences), strict=True):
            for number, value in zip(rows[row], values, strict=True):
                result[number] = value
        start = stop
    return result


def _count(rows: Sequence[tuple[tuple[int, ...], int]], vocabulary: int) -> int:
    """How many of these rows, the longest first, fit into one batch; at least one."""
    width, first = len(rows[0][0]), width_start(rows[0])
    for count, row in enumerate(rows, 1):
        first = min(first, width_start(row))
        if count * width > MOST_TOKENS or count * (width - first) * vocabulary > MOST_LOGITS:
            return max(1, count - 1)
    return len(rows)


def width_start(row: tuple[tuple[int, ...], int]) -> int:
    """First position whose logits are needed: they predict the token after it."""
    return row[1] - 1


def _batch(
    model: Model,
    batch: Sequence[tuple[tuple[int, ...], int]],
    rows: dict[tuple[tuple[int, ...], int], list[int]],
    sequences: Sequence[Stretch],
) -> list[list[float]]:
    import torch

    width, first = max(len(inputs) for inputs, _ in batch), min(map(width_start, batch))
    padding = model.tokenizer.pad_token_id
    filled = torch.tensor([[*inputs, *[padding] * (width - len(inputs))] for inputs, _ in batch], device=model.device)
    mask = torch.tensor([[1] * len(inputs) + [0] * (width - len(inputs)) for inputs, _ in batch], device=model.device)
    arguments: dict[str, Any] = {"input_ids": filled, "attention_mask": mask, "use_cache": False}
    if first and "logits_to_keep" in inspect.signature(model.network.forward).parameters:
        arguments["logits_to_keep"] = width - first  # the last ones
    logits = model.network(**arguments).logits.float()
    first = width - logits.shape[1]  # position of the first row of logits
    totals = logits.logsumexp(dim=-1)
    found = []
    for place, (inputs, start) in enumerate(batch):
        above, below = logits[place], totals[place]
        inner = torch.tensor(inputs[start:], dtype=torch.long, device=model.device)
        places = torch.arange(start - 1, len(inputs) - 1, device=model.device) - first
        common = (above[places, inner] - below[places]).double()
        end = len(inputs) - 1 - first
        needed = below[start - 1 - first : end + 1]
        if not bool(torch.isfinite(needed).all()):
            found.append([math.nan] * len(rows[inputs, start]))
            continue
        last = torch.tensor([sequences[number].tokens[-1] for number in rows[inputs, start]], device=model.device)
        found.append((common.sum() + (above[end, last] - below[end]).double()).tolist())
    return found
