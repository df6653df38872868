"""Text classification: the output with the largest logit, compared with the label.

Several tasks can share one model whose outputs are those of all of them (so that every tensor can be merged). A line's
``labels`` then says among which outputs is chosen. Of equally large outputs the first listed counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from merging.evaluation.images import refuse_labels
from merging.evaluation.models import Model
from merging.evaluation.scoring import Outcome, Settings, prompt_hash, refuse_long, refuse_not_finite
from merging.evaluation.tasks import Task, TextLabelItem


class TextLabels:
    """Scores ``accuracy``; the answer of the record is the number of the chosen output."""

    def __init__(self, model: Model, task: Task, settings: Settings, batch_size: int):
        self.model, self.task = model, task
        refuse_labels(model, task, task.items)
        tokens = model.tokenizer([item.text for item in task.items], return_attention_mask=False)["input_ids"]
        self.tokens = dict(zip(task.items, tokens, strict=True))
        for item, row in self.tokens.items():
            refuse_long(model, task, item, len(row))

    def score(self, items: Sequence[TextLabelItem]) -> list[Outcome]:
        import torch

        rows = [self.tokens[item] for item in items]
        width, padding, device = max(map(len, rows)), self.model.tokenizer.pad_token_id, self.model.device
        inputs = torch.tensor([row + [padding] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        logits = self.model.network(input_ids=inputs, attention_mask=mask).logits.float()
        refuse_not_finite(self.model, self.task, items, logits.isfinite().all(dim=-1).tolist())
        outcomes = []
        for item, values in zip(items, logits.tolist(), strict=True):
            choice = max(item.labels or range(len(values)), key=values.__getitem__)
            prompt = prompt_hash(item.text, item.labels)
            outcomes.append(Outcome({"accuracy": float(choice == item.label)}, prompt, 0, str(choice)))
        return outcomes
