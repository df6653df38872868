"""Image classification: the output with the largest logit, compared with the label.

Of equally large outputs the first counts. Arrays go in as the task file says (``image_tasks.py``); nothing is resized,
so that the prompt hash, which is one of the pixels, is the same for all models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merging.errors import TaskError
from merging.evaluation.image_tasks import ImageItem
from merging.evaluation.models import Model
from merging.evaluation.scoring import Outcome, Settings, prompt_hash, refuse_not_finite
from merging.evaluation.tasks import Task


class ImageLabels:
    """Scores ``accuracy``; the answer of the record is the number of the chosen output."""

    def __init__(self, model: Model, task: Task, settings: Settings, batch_size: int):
        assert task.images is not None
        self.model, self.task, self.images = model, task, task.images
        config, shape = model.network.config, task.images.stored.shape[1:]
        size = getattr(config, "image_size", None)
        wanted = (
            getattr(config, "num_channels", shape[0]),
            *((size, size) if isinstance(size, int) else size or shape[1:]),
        )
        if tuple(wanted) != shape:
            what = f"{task.path}: its images are {_size(shape)}; {model.folder} takes {_size(wanted)}."
            raise TaskError("E_TASK", what, "Nothing is resized here.", "Store the images in the size of the model.")
        refuse_labels(model, task, task.items)

    def score(self, items: Sequence[ImageItem]) -> list[Outcome]:
        import torch

        pixels = self.images.pixels(items)
        logits = self.model.network(pixel_values=torch.from_numpy(pixels).to(self.model.device)).logits.float()
        refuse_not_finite(self.model, self.task, items, logits.isfinite().all(dim=-1).tolist())
        chosen = logits.argmax(dim=-1).tolist()
        return [
            Outcome({"accuracy": float(choice == item.label)}, prompt_hash(image.tobytes()), 0, str(choice))
            for item, image, choice in zip(items, pixels, chosen, strict=True)
        ]


def refuse_labels(model: Model, task: Task, items: Sequence[Any]) -> None:
    """TaskError E_TASK if an item's label is not the number of one of the model's outputs."""
    outputs = model.network.config.num_labels
    for item in items:
        largest = max([item.label, *getattr(item, "labels", ())])
        if largest >= outputs:
            what = f"{task.where(item)}: there is no label {largest}; {model.folder} has {outputs}, from 0."
            raise TaskError("E_TASK", what, "", "Check that task and model belong together.")


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} × {shape[2]} with {shape[0]} channel(s)"
