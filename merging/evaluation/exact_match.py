"""Exact match: what share of a task's answers does a model write, letter for letter?

The one idea: a record per item, and everything else derived from the records. Two models are then compared item by
item, a score never comes without its interval, and what a model really wrote can be read.

Decoding is greedy, offline and deterministic: the same folder, task, batch size and machine give the same records.
Prompts go in as they are written: no chat template, no examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merging.errors import TaskError
from merging.evaluation.models import Model, encode, has_unknown, load_model
from merging.evaluation.records import Record
from merging.evaluation.scoring import (
    Outcome,
    Settings,
    make_scorer,
    prompt_hash,
    refuse_long,
    refuse_not_finite,
    score_batch,
)
from merging.evaluation.statistics import wilson_interval
from merging.evaluation.tasks import Item, Task

__all__ = ["ExactMatch", "Model", "Record", "Score", "Summary", "evaluate", "load_model", "summary", "wilson_interval"]


class ExactMatch:
    """Greedy answers, compared with the right ones: right when equal apart from white space at the ends.

    Prompts of a batch are padded on the left; other batches can change the last bits of the numbers, and with them,
    rarely, a token. By default a response is cut off one token after the task's longest answer, which leaves room for
    the end token and lets longer responses count as wrong without writing them out.
    """

    def __init__(self, model: Model, task: Task, settings: Settings, batch_size: int):
        self.model, self.task = model, task
        answers = model.tokenizer([item.answer.strip() for item in task.items], add_special_tokens=False)["input_ids"]
        for item, tokens in zip(task.items, answers, strict=True):
            if has_unknown(model, tokens):
                what = f"{task.where(item)}: the answer has a character that the model's tokenizer lacks."
                raise TaskError(
                    "E_TASK", what, f"The model is {model.folder}.", "Use a task in the model's own letters."
                )
        self.limit = settings.most_tokens or max(map(len, answers)) + 1
        self.prompts = dict(zip(task.items, encode(model, [item.prompt for item in task.items]), strict=True))
        for item, tokens in self.prompts.items():
            if not tokens:
                raise TaskError("E_TASK", f"{task.where(item)}: the prompt has no tokens.")
            refuse_long(model, task, item, len(tokens) + self.limit)

    def score(self, items: Sequence[Item]) -> list[Outcome]:
        import torch

        model = self.model
        rows = [self.prompts[item] for item in items]
        width = max(map(len, rows))
        padding, device = model.tokenizer.pad_token_id, model.device
        inputs = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        watch = _Watch()
        responses = model.network.generate(
            input_ids=inputs, attention_mask=mask, generation_config=self._greedy(), logits_processor=[watch]
        )[:, width:].tolist()
        if watch.finite is not None:
            refuse_not_finite(model, self.task, items, watch.finite.tolist())
        outcomes = []
        for item, response in zip(items, responses, strict=True):
            response = _until_end(response, model.ends)
            # special tokens stay visible: left out, "ab<pad>c" would pass for "abc"
            answer = model.tokenizer.decode(response, skip_special_tokens=False)
            correct = answer.strip() == item.answer.strip()
            outcomes.append(Outcome({"exact_match": float(correct)}, prompt_hash(item.prompt), len(response), answer))
        return outcomes

    def _greedy(self) -> Any:
        import transformers

        return transformers.GenerationConfig(
            do_sample=False,
            use_cache=True,
            max_new_tokens=self.limit,
            eos_token_id=sorted(self.model.ends) or None,
            pad_token_id=self.model.tokenizer.pad_token_id,
        )


class _Watch:
    """Looks at the logits of every step: NaN would win the comparison, and infinity is no likelihood."""

    finite: Any = None

    def __call__(self, input_ids: Any, logits: Any) -> Any:
        good = logits.amax(dim=-1).isfinite()  # NaN and +infinity come through, masked tokens (-infinity) do not
        self.finite = good if self.finite is None else self.finite & good
        return logits


def _until_end(response: Sequence[int], ends: frozenset[int]) -> list[int]:
    for position, token in enumerate(response):
        if token in ends:
            return list(response[:position])
    return list(response)


# -- one model, one task, in this process -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Score:
    """One model on one task with right and wrong answers: a record per item."""

    task: str
    task_sha256: str
    records: tuple[Record, ...]

    @property
    def total(self) -> int:
        return len(self.records)

    @property
    def correct(self) -> int:
        return sum(record.score == 1 for record in self.records)

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson 95 % interval of the accuracy."""
        return wilson_interval(self.correct, self.total)


def evaluate(
    model: Model,
    task: Task,
    *,
    batch_size: int = 256,
    most_tokens: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Exact match of a loaded model on a whole task, in this process. (``runner.evaluate`` does more.)

    Args:
        batch_size: items that are generated together.
        most_tokens: where a response is cut off; 0: one token after the longest answer.
        progress: called with (items done, items in all) after each batch.

    Raises:
        TaskError: ``E_TASK`` when an answer has a character that the tokenizer cannot write, or a prompt with its
            answer is longer than the model's context.
        NumbersError: ``E_LOGITS`` when the model computes NaN or infinity.
    """
    scorer = make_scorer(model, task, Settings(most_tokens=most_tokens))
    records: list[Record] = []
    for start in range(0, len(task.items), batch_size):
        records += score_batch(model, scorer, task, task.items[start : start + batch_size])
        if progress:
            progress(len(records), len(task.items))
    return Score(task.name, task.sha256, tuple(records))


@dataclass(frozen=True, slots=True)
class Summary:
    """A merged model against its base and its experts. Tasks are in the order of the experts.

    ``gain_kept``: (merged − base) / (expert − base) per task, where the expert is the one of that task: the share of
    what fine-tuning brought that the merge keeps. ``retention``: merged / expert per task, as most papers print it.
    Either is NaN where it would divide by nothing. The means are NaN when a part is.
    """

    accuracy: dict[str, float]
    mean: float
    gain_kept: dict[str, float]
    mean_gain_kept: float
    least_gain_kept: float
    retention: dict[str, float]
    mean_retention: float
    least_retention: float


def summary(base: Mapping[str, Score], experts: Mapping[str, Score], merged: Mapping[str, Score]) -> Summary:
    """Accuracy, gain kept and retention of a merged model.

    Args:
        base, merged: task name -> score of that model.
        experts: task name -> score of *that task's own* expert.

    Raises:
        TaskError: ``E_TASK`` when the three were not scored on the same items.
    """
    accuracy, gains, shares = {}, {}, {}
    for task, expert in experts.items():
        three = [scores.get(task) for scores in (base, experts, merged)]
        if len({score and (score.task_sha256, score.total) for score in three}) != 1:
            raise TaskError("E_TASK", f"The models were not all scored on the same items of {task}.")
        low, mine = base[task].accuracy, merged[task].accuracy
        accuracy[task] = mine
        gains[task] = _ratio(mine - low, expert.accuracy - low)
        shares[task] = _ratio(mine, expert.accuracy)
    return Summary(
        accuracy=accuracy,
        mean=_mean(accuracy.values()),
        gain_kept=gains,
        mean_gain_kept=_mean(gains.values()),
        least_gain_kept=_least(gains.values()),
        retention=shares,
        mean_retention=_mean(shares.values()),
        least_retention=_least(shares.values()),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _mean(values: Any) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _least(values: Any) -> float:
    values = list(values)
    return math.nan if any(math.isnan(value) for value in values) else min(values)
