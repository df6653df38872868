"""A merge in memory: the same arithmetic as a merge into files, kept between one change of a slider and the next.

The one idea: nothing is computed that a change does not touch. The engine itself merges, into memory instead of a
folder, so the bits are those of the written model. Each tensor is remembered with everything that its bits depend on
(``keys.py``); as long as that stays the same, so does the tensor. What a method prepared (thresholds, norms) is
remembered with what *that* depends on, which is less: another weight or λ finds the thresholds ready.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..checkpoints.checkpoint import Source, check_range
from ..checkpoints.header import ITEM_BITS
from ..engine import Merge, Progress
from ..errors import AmalgamError, Cancelled, InputError, OutputError
from ..methods import Method
from ..networks import threads_of_torch
from ..plan import Plan, make_plan
from ..recipe import Recipe
from ..tensor_plan import TensorPlan
from .keys import Keys, slots
from .room import cost_of, private_memory

FORK_FROM = 1 << 25
"""Elements to merge from which several worker processes are worth starting."""
PIECE = 1 << 22
"""Elements of a model's tensor that are read at a time, so that a stop is seen."""


class MemorySource:
    """A tensor in memory with the face of one in a file. ``like``: what it is a copy of."""

    def __init__(self, like: Source | TensorPlan, data: np.ndarray):
        self.name, self.dtype, self.shape, self.numel = like.name, like.dtype, like.shape, like.numel
        self.data = data
        self.file = getattr(like, "file", None)  # errors name it

    def read(self, start: int, stop: int, out: memoryview) -> None:
        out = check_range(self, start, stop, out)
        size = ITEM_BITS[self.dtype] // 8
        out[:] = self.data[start * size : stop * size].data


class KeptMerge:
    """A merge in memory that can be changed again and again. ``stop``: set it to cancel within a block."""

    def __init__(self, threads: int = 1, device: str = "cpu", stop: threading.Event | None = None):
        self.threads, self.device, self.stop = threads, device, stop or threading.Event()
        self.inputs: dict[tuple, MemorySource] = {}
        self.prepared: dict[str, tuple] = {}
        self.whole: tuple | None = None
        self.results: dict[str, tuple[tuple, MemorySource]] = {}
        self.reused = 0
        self.plan: Plan | None = None
        """Of the last merge, if every tensor of it is there."""

    def merge(self, recipe: Any, tensors: Sequence[str] | None = None) -> dict[str, Any]:
        """Bring all tensors (or those named) to what ``recipe``, as plain data, makes of them.

        Returns seconds; ``changed_tensors``, how many were computed; ``reused``, for how many of them what was prepared
        could be used again; ``complete``, whether all tensors are now those of this recipe.
        Raises what planning and running the merge would; ``E_MEMORY``; Cancelled.
        """
        started, self.plan, self.reused = time.monotonic(), None, 0
        with make_plan(Recipe.parse(recipe), offline=True) as plan:
            if plan.blockers:
                raise plan.blockers[0]
            keys = Keys(plan)
            names = {t.name for t in plan.tensors}
            if unknown := sorted(set(tensors or ()) - names):
                raise InputError("E_MISSING_TENSOR", f"The merge has no tensor {unknown[0]!r}.", "", "Check the name.")
            self.results = {name: result for name, result in self.results.items() if name in names}
            done = {t.name for t in plan.tensors if self.is_current(t, keys)}
            left_out = names - set(tensors) if tensors is not None else set()
            todo = [t for t in plan.tensors if t.name not in done | left_out]
            if todo:
                self.load(plan, keys)
                with threads_of_torch(1):
                    threads = self.threads if sum(t.numel for t in todo) >= FORK_FROM else 1
                    MemoryMerge(self, plan, keys, done | left_out, threads, self.stop).run()
                self.check_unchanged(plan)
            if all(self.is_current(t, keys) for t in plan.tensors):
                self.plan = plan
        return {
            "seconds": time.monotonic() - started, "changed_tensors": len(todo), "reused": self.reused,
            "complete": self.plan is not None,
        }  # fmt: skip

    def is_current(self, tensor: TensorPlan, keys: Keys) -> bool:
        known = self.results.get(tensor.name)
        return known is not None and known[0] == keys.result(tensor)

    def keep(self, tensor: TensorPlan, key: tuple, data: np.ndarray) -> None:
        self.results[tensor.name] = key, MemorySource(tensor, data)

    def load(self, plan: Plan, keys: Keys) -> None:
        """Read the models into memory, if there is room, and have the plan read them there."""
        wanted = {key: source for t in plan.tensors for key, source in zip(keys.inputs(t), slots(t), strict=True)
                  if key is not None and source is not None}  # fmt: skip
        self.inputs = {key: source for key, source in self.inputs.items() if key in wanted}
        if len(self.inputs) < len(wanted):
            cost = cost_of(plan, self.threads, self.device, private_memory(os.getpid()))
            if not cost.possible:
                fix = "Close other programs, or merge into a folder, which needs little memory."
                raise OutputError("E_MEMORY", "There is not enough memory for a preview.", cost.why, fix)
            if not cost.keep_inputs:
                self.inputs.clear()
                return
        for key, source in wanted.items():
            if key not in self.inputs:
                self.inputs[key] = MemorySource(source, self.read(source))
        self.check_unchanged(plan)
        for tensor in plan.tensors:
            base, *sources = (None if key is None else self.inputs[key] for key in keys.inputs(tensor))
            tensor.base, tensor.sources = base, [source for source in sources if source is not None]

    def read(self, source: Source) -> np.ndarray:
        """All bytes of a tensor."""
        size = ITEM_BITS[source.dtype] // 8
        data = np.empty(source.numel * size, np.uint8)
        for start in range(0, source.numel, PIECE):
            if self.stop.is_set():
                raise Cancelled()
            stop = min(source.numel, start + PIECE)
            source.read(start, stop, data[start * size : stop * size].data)
        return data

    def check_unchanged(self, plan: Plan) -> None:
        """If a file was changed while it was being read, nobody knows what is in memory."""
        try:
            for model in plan.models.values():
                model.check_unchanged()
        except AmalgamError:
            self.inputs.clear()
            self.results.clear()
            raise


# -- the engine, in memory ----------------------------------------------------------------------------------------


class _Memory:
    """Where the engine writes, instead of a folder's files."""

    def __init__(self, plan: Plan, done: set[str]):
        self.sizes = {t.name: t.nbytes for t in plan.tensors}
        self.done = done
        self.tensors: dict[str, np.ndarray] = {}

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        whole = self.tensors.get(tensor)
        if whole is None:
            whole = self.tensors[tensor] = np.empty(self.sizes[tensor], np.uint8)
        whole[offset : offset + len(data)] = data

    def complete(self, tensor: str, checksum: str) -> None:
        pass  # finish_tensor knows more


class MemoryMerge(Merge):
    """The engine's merge, which asks ``Kept`` for what was prepared before and tells it what is new."""

    def __init__(self, kept: KeptMerge, plan: Plan, keys: Keys, done: set[str], threads: int, stop: threading.Event):
        self.memory = _Memory(plan, done)
        super().__init__(plan, self.memory, kept.device, threads, Progress(1), None, stop)
        self.kept, self.keys, self.process = kept, keys, os.getpid()

    def prepare_whole_model(self, tensors: Sequence[TensorPlan]) -> None:
        key = [self.keys.prepared(t) for t in sorted(tensors, key=lambda t: t.name)]
        if self.kept.whole is None or self.kept.whole[0] != key:
            super().prepare_whole_model(tensors)
            self.kept.whole = key, copy.deepcopy(self.prepared)
        else:
            self.prepared = copy.deepcopy(self.kept.whole[1])  # merging uses thresholds up
            self.kept.reused += len(key)

    def prepare(self, tensor: TensorPlan, method: Method) -> Any:
        key = self.keys.prepared(tensor)
        before = self.kept.prepared.get(tensor.name)
        if before is not None and before[0] == key:
            self.local.prepared = None
            return copy.deepcopy(before[1])
        known = super().prepare(tensor, method)
        self.local.prepared = key, copy.deepcopy(known)
        return known

    def merge_tensor(self, tensor: TensorPlan) -> Any:
        """Beside the engine's result: what was prepared and, from another process, the tensor itself."""
        self.local.prepared = None
        result = super().merge_tensor(tensor)
        here = os.getpid() == self.process
        return result, self.local.prepared, None if here else self.memory.tensors.pop(tensor.name, None)

    def finish_tensor(self, tensor: TensorPlan, result: Any) -> None:
        merged, prepared, data = result
        if data is None:
            data = self.memory.tensors.pop(tensor.name, None)
        if prepared is not None:
            self.kept.prepared[tensor.name] = prepared
        elif tensor.method is not None and tensor.name not in self.prepared:
            self.kept.reused += 1
        self.kept.keep(tensor, self.keys.result(tensor), np.empty(0, np.uint8) if data is None else data)
        super().finish_tensor(tensor, merged)
