"""The merged model as a network that stays loaded: scored and asked, while its weights change under it.

The one idea: loading a network costs seconds, writing other numbers into its weights costs milliseconds. So it is
loaded once, from the merged tensors and the same side files as the written model would have, and later merges are
copied into place. That is done only where it is seen to be right: after loading, each merged tensor must be found,
number for number, in the weights of its name, and no weight may be left over. If not (a library that joins or splits
weights while loading), the network is made anew for every merge.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.checkpoint import Checkpoint, Source
from ..checkpoints.header import TORCH_NAMES
from ..checkpoints.layout import IGNORABLE
from ..errors import InputError
from ..evaluation.items import Item
from ..evaluation.models import CAUSAL, Described, Model, as_model, describe_opened, encode
from ..evaluation.records import METRICS, Record
from ..evaluation.scoring import KINDS, Scorer, Settings, make_scorer, score_batch
from ..evaluation.statistics import wilson_interval
from ..evaluation.tasks import Task, read_tasks
from ..networks import load_network

if TYPE_CHECKING:
    from torch import Tensor

NAME = Path("the merge in memory")
"""What errors call the model."""
PROMPTS = 16
"""Prompts that are answered at a time."""

Merged = Mapping[str, tuple[Any, Any]]
"""Tensor name -> (what its bits depend on, a ``MemorySource`` of it)."""


class RunningNetwork:
    """A network in ``folder`` (for its side files). ``check`` is called before each step of it and may raise."""

    def __init__(self, folder: Path, threads: int, device: str, check: Callable[[], None]):
        self.folder, self.threads, self.device, self.check = folder, threads, device, check
        self.model: Model | None = None
        self.made_of: str = ""
        self.holds: dict[str, Any] = {}  # tensor -> key of the numbers that are in the network
        self.places: dict[str, list[Tensor]] | None = None  # where to write a tensor; None: load anew
        self.scorers: dict[tuple, Scorer] = {}

    def bring_up(self, merged: Merged, side_files: Mapping[str, bytes]) -> Model:
        """The network with the numbers of ``merged``."""
        form = [[name, source.dtype, source.shape] for name, (_, source) in merged.items()]
        files = [[name, hashlib.sha256(content).hexdigest()] for name, content in sorted(side_files.items())]
        made_of = hashlib.sha256(json.dumps([form, files]).encode()).hexdigest()
        changed = [name for name, (key, _) in merged.items() if self.holds.get(name) != key]
        if self.model is None or made_of != self.made_of or (changed and self.places is None):
            self.load(merged, side_files)
            self.made_of = made_of
        else:
            import torch

            with torch.no_grad():
                for name in changed:
                    for place in (self.places or {}).get(name, ()):
                        place.copy_(_values(merged[name][1]).view(place.shape))
        self.holds = {name: key for name, (key, _) in merged.items()}
        assert self.model is not None
        return self.model

    def load(self, merged: Merged, side_files: Mapping[str, bytes]) -> None:
        self.model, self.places, self.holds = None, None, {}
        self.scorers.clear()
        for old in self.folder.iterdir():
            old.unlink()
        for name, content in side_files.items():
            (self.folder / name).write_bytes(content)
        self.check()
        if "config.json" not in side_files:
            why = "Without its base's config.json nobody knows what to compute with the weights."
            raise InputError("E_NOT_A_MODEL", "The merge cannot be run.", why, "Choose a base in a model folder.")
        tensors: dict[str, Source] = {name: source for name, (_, source) in merged.items()}
        config = json.loads(side_files["config.json"])
        opened = Checkpoint(str(NAME), self.folder, "folder", tensors, config, [])
        described = describe_opened(opened)
        network = load_network(opened, device=self.device)
        network.module.register_forward_pre_hook(lambda module, inputs: self.check())
        self.places = _places(network.module, network.stored, tensors)
        self.model = as_model(network, Described(NAME, described.kind, described.context), self.threads, "preview")

    # -- asking ----------------------------------------------------------------------------------------

    def score(self, paths: Sequence[str], limit: int) -> list[dict[str, Any]]:
        """One row per task and metric, as ``merging.evaluation`` has them."""
        tasks = [task for path in paths for task in read_tasks(path)]
        return [row for task in tasks for row in rows_of(task.name, self.records(task, limit))]

    def records(self, task: Task, limit: int = 0) -> list[Record]:
        """What the runner would record of the first ``limit`` items (0: all), in the same batches."""
        assert self.model is not None
        scorer = self.scorer(task, Settings())
        items, size = task.items[: limit or None], KINDS[task.kind].batch_size
        found: list[Record] = []
        for start in range(0, len(items), size):
            self.check()
            found += score_batch(self.model, scorer, task, items[start : start + size])
        return found

    def scorer(self, task: Task, settings: Settings) -> Scorer:
        """A scorer reads (tokenises) the whole task once."""
        assert self.model is not None
        key = (task.name, task.sha256, task.path)
        if key not in self.scorers:
            self.scorers[key] = make_scorer(self.model, task, settings)
        return self.scorers[key]

    def generate(self, prompts: Sequence[str], most: int) -> list[str]:
        """Greedy answers, by the scorer of exact answers, at most as long as the model has room for."""
        assert self.model is not None
        if self.model.kind != CAUSAL:
            raise InputError("E_NOT_A_MODEL", "This model writes no text.", "", "Score it on a task instead.")
        answers: list[str] = []
        for start in range(0, len(prompts), PROMPTS):
            part = prompts[start : start + PROMPTS]
            items = tuple(Item(prompt, "", start + number) for number, prompt in enumerate(part, 1))
            longest = max(map(len, encode(self.model, part)))
            room = most if self.model.context is None else max(1, min(most, self.model.context - longest))
            task = Task("prompts", items, "")
            scorer = make_scorer(self.model, task, Settings(most_tokens=room))
            answers += [record.answer for record in score_batch(self.model, scorer, task, items)]
        return answers


def rows_of(task: str, records: Sequence[Record]) -> list[dict[str, Any]]:
    """{task, metric, right, items, mean, low, high} per metric: low and high are the 95 % Wilson interval of a share;
    they and ``right`` are None for quantities."""
    by_metric: dict[str, list[float]] = {}
    for record in records:
        by_metric.setdefault(record.metric, []).append(record.score)
    rows = []
    for metric, scores in by_metric.items():
        mean = math.fsum(scores) / len(scores)
        row: dict[str, Any] = {"task": task, "metric": metric, "items": len(scores), "mean": mean}
        row |= {"right": None, "low": None, "high": None}
        if METRICS[metric].kind == "binary":
            row["right"] = sum(score == 1 for score in scores)
            row["low"], row["high"] = wilson_interval(row["right"], len(scores))
        rows.append(row)
    return rows


def _values(source: Any) -> Tensor:
    """A tensor in memory, as the network has it: floating-point numbers in float32."""
    import torch

    tensor = torch.from_numpy(source.data).view(getattr(torch, TORCH_NAMES[source.dtype])).view(source.shape)
    return tensor.float() if tensor.is_floating_point() else tensor


def _places(module: Any, stored: Mapping[str, str], tensors: Mapping[str, Any]) -> dict[str, list[Tensor]] | None:
    """For each merged tensor the weights and buffers of the network that hold its numbers. None unless every weight and
    every tensor is accounted for and equal, number for number."""
    import torch

    places: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        places.setdefault(stored.get(name, name), []).append(parameter)
    persistent = set(module.state_dict())
    for name, buffer in module.named_buffers():
        if name in persistent and name in tensors:
            places.setdefault(name, []).append(buffer)
    needed = {name for name in tensors if not IGNORABLE.fullmatch(name)}
    if not needed <= places.keys() or not places.keys() <= tensors.keys():
        return None
    for name, found in places.items():
        values = _values(tensors[name])
        if not all(torch.equal(place.detach().cpu(), values) for place in found):
            return None
    return places
