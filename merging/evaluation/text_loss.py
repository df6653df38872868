"""How well a model predicts a text: bits per byte, and nats per token.

    nll_per_token = −(1/T) Σ_t log p(token_t | tokens before it)             nats
    nll_per_byte  = −(1/(B·ln 2)) Σ_t log p(token_t | tokens before it)      bits, over the B bytes of the text in UTF-8

Bits per byte compare models with different tokenizers, nats per token only those with the same one. The first token is
predicted too, from the beginning token (or the end token, where there is none), so that all bytes are paid for.

A text longer than the window is read in steps. Each step reads as many tokens as fit, and the first ``overlap`` of them
are there as context only, so every token but the first few is predicted from at least ``overlap`` tokens. By default
the window is 1,024 tokens, or the context of the model if that is smaller, and the overlap half of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from merging.errors import TaskError
from merging.evaluation.choice import first_token
from merging.evaluation.likelihood import Stretch, log_likelihoods
from merging.evaluation.models import Model, encode, has_unknown
from merging.evaluation.scoring import Outcome, Settings, prompt_hash, refuse_not_finite
from merging.evaluation.tasks import Task, TextItem

WINDOW = 1024


class TextLoss:
    """Scores ``nll_per_byte`` (bits) and ``nll_per_token`` (nats)."""

    def __init__(self, model: Model, task: Task, settings: Settings, batch_size: int):
        self.model, self.task, self.batch_size = model, task, batch_size
        self.window = settings.window or min(WINDOW, model.context or WINDOW)
        self.overlap = settings.overlap or max(1, self.window // 2)
        if model.context is not None and self.window > model.context:
            what = (
                f"A window of {self.window} tokens does not fit into {model.folder}: it has room for {model.context}."
            )
            raise TaskError("E_TASK", what, "", "Choose a smaller window.")
        if not 1 <= self.overlap < max(2, self.window):
            raise TaskError(
                "E_TASK", f"An overlap of {self.overlap} tokens is not less than the window, {self.window}."
            )
        self.tokens: dict[TextItem, list[int]] = {}
        for item, tokens in zip(task.items, encode(model, [item.text for item in task.items]), strict=True):
            if not tokens or tokens[0] != model.tokenizer.bos_token_id:
                tokens = [first_token(model, task.where(item)), *tokens]
            if len(tokens) < 2:
                raise TaskError("E_TASK", f"{task.where(item)}: the text has no tokens.")
            if has_unknown(model, tokens):
                what = f"{task.where(item)}: the text has a character that the model's tokenizer lacks."
                raise TaskError(
                    "E_TASK", what, f"The model is {model.folder}.", "Use texts in the model's own letters."
                )
            self.tokens[item] = tokens

    def score(self, items: Sequence[TextItem]) -> list[Outcome]:
        pieces = [windows(self.tokens[item], self.window, self.overlap) for item in items]
        values = iter(log_likelihoods(self.model, [piece for one in pieces for piece in one], self.batch_size))
        totals = [-math.fsum(next(values) for _ in one) for one in pieces]
        refuse_not_finite(self.model, self.task, items, map(math.isfinite, totals))
        outcomes = []
        for item, total in zip(items, totals, strict=True):
            scores = {
                "nll_per_byte": total / len(item.text.encode()) / math.log(2),
                "nll_per_token": total / (len(self.tokens[item]) - 1),
            }
            outcomes.append(Outcome(scores, prompt_hash(item.text, self.window, self.overlap)))
        return outcomes


def windows(tokens: Sequence[int], window: int, overlap: int) -> list[Stretch]:
    """Pieces of ``tokens`` in which each token but the first is scored exactly once.

    A piece reads at most ``window`` tokens and is scored from its start on, to the token after the last one it reads.
    """
    pieces, first = [], 1  # the first token that is not scored yet
    while first < len(tokens):
        begin = 0 if first == 1 else first - overlap
        end = min(len(tokens), begin + window + 1)
        pieces.append(Stretch(tuple(tokens[begin:end]), first - begin))
        first = end
    return pieces
