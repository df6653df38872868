"""Multiple choice: which continuation of a prompt does a model find most likely?

    choice            = argmax_i  log p(choice_i | prompt)
    choice_normalized = argmax_i  log p(choice_i | prompt) / bytes(choice_i)

Prompt and choice are joined as they are written, so a choice after "Answer:" begins with its space. Bytes are those of
the choice in UTF-8 without white space at its ends: the raw score prefers short choices, the normalised one does not.
Of equally likely choices the first counts.

A tokenizer may join the end of the prompt and the beginning of a choice in one token. So what is scored begins at the
first token in which prompt alone and prompt + choice differ for any choice of the item: the same for all, so that they
stay comparable, and equal to the usual split of lm-evaluation-harness wherever no token is joined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from merging.errors import TaskError
from merging.evaluation.likelihood import Stretch, log_likelihoods
from merging.evaluation.models import Model, encode, has_unknown
from merging.evaluation.scoring import Outcome, Settings, prompt_hash, refuse_long, refuse_not_finite
from merging.evaluation.tasks import ChoiceItem, Task


class Choice:
    """Scores ``choice`` and ``choice_normalized``; the answer of the record is the choice of the former."""

    def __init__(self, model: Model, task: Task, settings: Settings, batch_size: int):
        self.model, self.task, self.batch_size = model, task, batch_size
        prompts = encode(model, [item.prompt for item in task.items])
        joined = encode(model, [item.prompt + choice for item in task.items for choice in item.choices])
        self.sequences: dict[ChoiceItem, list[Stretch]] = {}
        place = 0
        for item, prompt in zip(task.items, prompts, strict=True):
            self.sequences[item] = self._sequences(item, prompt, joined[place : place + len(item.choices)])
            place += len(item.choices)

    def _sequences(self, item: ChoiceItem, prompt: list[int], joined: list[list[int]]) -> list[Stretch]:
        where, model = self.task.where(item), self.model
        start = min(_common(prompt, tokens) for tokens in joined)
        for number, tokens in enumerate(joined):
            if len(tokens) <= start:
                raise TaskError("E_TASK", f"{where}: choice {number} adds no token to the prompt.")
            if has_unknown(model, tokens[start:]):
                what = f"{where}: choice {number} has a character that the model's tokenizer lacks."
                raise TaskError(
                    "E_TASK", what, f"The model is {model.folder}.", "Use a task in the model's own letters."
                )
            refuse_long(model, self.task, item, len(tokens) - 1 + (start == 0))  # the last token is not read
        if start == 0:  # not even a beginning token before the choice
            begin = first_token(model, where)
            return [Stretch((begin, *tokens), 1) for tokens in joined]
        return [Stretch(tuple(tokens), start) for tokens in joined]

    def score(self, items: Sequence[ChoiceItem]) -> list[Outcome]:
        flat = [sequence for item in items for sequence in self.sequences[item]]
        values = log_likelihoods(self.model, flat, self.batch_size)
        outcomes, place = [], 0
        found = []
        for item in items:
            found.append(values[place : place + len(item.choices)])
            place += len(item.choices)
        # a choice may be impossible (-infinity), but one of them must be possible
        good = [not any(map(math.isnan, one)) and max(one) > -math.inf for one in found]
        refuse_not_finite(self.model, self.task, items, good)
        for item, likelihoods in zip(items, found, strict=True):
            raw = _best(likelihoods)
            per_byte = _best(
                [value / len(c.strip().encode()) for value, c in zip(likelihoods, item.choices, strict=True)]
            )
            scores = {"choice": float(raw == item.answer), "choice_normalized": float(per_byte == item.answer)}
            outcomes.append(Outcome(scores, prompt_hash(item.prompt, item.choices), 0, item.choices[raw]))
        return outcomes


def first_token(model: Model, where: str) -> int:
    """What stands before the first token of a text, so that it too can be predicted: the beginning token, else the end
    token (as in lm-evaluation-harness). TaskError E_TASK if the tokenizer has neither."""
    for token in (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise TaskError("E_TASK", f"{where}: {model.folder} has no token that could stand before the first one.")


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
