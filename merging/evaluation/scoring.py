"""Scorers: one per kind of task, all with the same face, and the table that says which model can do which task.

The one idea: a scorer knows a model and a task, takes a batch of items and says what happened to each, as ``Outcome``.
Who asks, how far the work is, and where results are kept is not its business; that is the runner's. A scorer checks the
whole task when it is made, so that what cannot be scored fails before anything is computed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from merging.errors import NumbersError, TaskError
from merging.evaluation.models import CAUSAL, CLASSIFIER, IMAGE, Model
from merging.evaluation.records import Record
from merging.evaluation.tasks import Task


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a model did with one item. ``scores``: metric -> score. The rest is as in ``Record``."""

    scores: dict[str, float]
    prompt: str
    length: int = 0
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a score depends on besides model and items. 0 is the kind's default."""

    most_tokens: int = 0
    """exact_match: where a response is cut off; by default one token more than the task's longest answer."""
    window: int = 0
    """text: tokens that the model sees at a time."""
    overlap: int = 0
    """text: tokens of the window that are there as context only, for texts longer than the window."""


class Scorer(Protocol):
    def score(self, items: Sequence[Any]) -> list[Outcome]:
        """Score a batch. Raises NumbersError E_LOGITS, naming the item."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of task.

    ``model``: the kind of model that can do it. ``batch_size``: items at a time. ``version``: raised whenever the same
    model and items would give other scores, so that kept results are not used any more. ``uses``: the settings that
    its scores depend on.
    """

    model: str
    metrics: tuple[str, ...]
    batch_size: int
    scorer: str
    version: int = 1
    uses: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "exact_match": Kind(CAUSAL, ("exact_match",), 256, "exact_match:ExactMatch", uses=("most_tokens",)),
    "choice": Kind(CAUSAL, ("choice", "choice_normalized"), 64, "choice:Choice"),
    "text": Kind(CAUSAL, ("nll_per_byte", "nll_per_token"), 16, "text_loss:TextLoss", uses=("window", "overlap")),
    "text_label": Kind(CLASSIFIER, ("accuracy",), 64, "text_labels:TextLabels"),
    "image_label": Kind(IMAGE, ("accuracy",), 256, "images:ImageLabels"),
}
KIND_NAMES = {CAUSAL: "a causal language model", CLASSIFIER: "a text classifier", IMAGE: "an image classifier"}


def make_scorer(model: Model, task: Task, settings: Settings, batch_size: int = 0) -> Scorer:
    """The scorer of a task for a model. ``batch_size``: what ``score`` will be called with, at most.

    Raises:
        TaskError: ``E_TASK``, with file and line, when the model cannot do the task: it is of another kind, an item
            does not fit into its context, has a character its tokenizer lacks, a label it has no output for …
    """
    kind = KINDS[task.kind]
    if model.kind != kind.model:
        what = f"{model.folder} is {KIND_NAMES[model.kind]}; {task.name} needs {KIND_NAMES[kind.model]}."
        raise TaskError("E_TASK", what)
    module, _, name = kind.scorer.partition(":")
    scorer: Scorer = getattr(importlib.import_module(f"merging.evaluation.{module}"), name)(
        model, task, settings, batch_size or kind.batch_size
    )
    return scorer


def score_batch(model: Model, scorer: Scorer, task: Task, items: Sequence[Any]) -> list[Record]:
    """Score some items and make records of it: one per item and metric, in that order."""
    import torch

    from merging.networks import threads_of_torch

    started = time.perf_counter()
    with threads_of_torch(model.threads), torch.inference_mode():
        outcomes = scorer.score(items)
    seconds = (time.perf_counter() - started) / len(items)
    return [
        Record(
            model=model.key,
            task=task.name,
            item=item.id,
            metric=metric,
            score=score,
            prompt=outcome.prompt,
            length=outcome.length,
            seconds=seconds,
            answer=outcome.answer,
            cluster=item.cluster,
        )
        for item, outcome in zip(items, outcomes, strict=True)
        for metric, score in outcome.scores.items()
    ]


def prompt_hash(*parts: Any) -> str:
    """16 hex digits for what a model was shown. Bytes count as they are, the rest as JSON."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part).encode())
    return digest.hexdigest()[:16]


def refuse_not_finite(model: Model, task: Task, items: Sequence[Any], finite: Iterable[bool]) -> None:
    """NumbersError E_LOGITS for the first item whose flag is false."""
    for item, good in zip(items, finite, strict=True):
        if not good:
            raise NumbersError(
                "E_LOGITS",
                f"{model.folder} computed NaN or infinity on {task.where(item)} (item {item.id} of {task.name}).",
                "A weight is NaN or infinite, or weights are far too large.",
                "Look at the model: python app.py inspect.",
            )


def refuse_long(model: Model, task: Task, item: Any, needed: int) -> None:
    """TaskError E_TASK if the item needs more tokens than the model can take."""
    if model.context is not None and needed > model.context:
        what = f"{task.where(item)}: it needs {needed} tokens; {model.folder} has room for {model.context}."
        raise TaskError("E_TASK", what, "Cut off, it would be another question.", "Shorten or remove it.")
