"""Running a plan: read, combine, write, all at once and in bounded memory.

Each worker takes a tensor and goes through it block by block: positioned reads into its own buffers, the
method's arithmetic, a positioned write of the result. While one worker waits for the disk another computes,
and behind them the output folder hashes what is finished. No worker holds more than a block of each input, so
memory does not grow with the model; what a block gives depends on nothing but the plan, so neither threads nor
a resume change a bit.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import xxhash

from .checkpoints.header import ITEM_BITS, TORCH_NAMES
from .checkpoints.output import OutputFolder
from .cores import available_cores
from .errors import Cancelled, InputError, NumbersError, OutputError
from .methods import Method, Workspace
from .methods.lazy_torch import torch
from .methods.scan import BlockScan, TensorInputs, compute_dtype, round_into
from .plan import Plan
from .publishing import make_manifest, side_files
from .reading import SourceReader, place_of_source, refuse_non_finite
from .tensor_plan import TensorPlan
from .workers import can_fork, spread

if TYPE_CHECKING:
    from torch import Tensor

_NO_MEMORY = re.compile("out of memory|not enough memory|allocate memory|start new thread")
CHUNK = 1 << 20
"""Bytes per read when tensors are only copied or compared."""
SURVIVAL_EVERY = 8
"""Delta survival is measured on every eighth block of a tensor (and always on the first)."""


@dataclass(slots=True)
class Progress:
    """How far a merge is. ``done`` and ``total`` count elements times passes; ``moved`` counts bytes."""

    total: int
    done: int = 0
    moved: int = 0
    tensor: str = ""
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float | None:
        spent = time.monotonic() - self.started
        return spent * (self.total - self.done) / self.done if self.done and spent > 0.5 else None


@dataclass
class Result:
    """A finished merge."""

    folder: Path
    manifest: dict[str, Any]
    seconds: float
    resumed: int
    """Tensors that an earlier, interrupted run had finished."""

    @property
    def warnings(self) -> list[str]:
        return self.manifest["warnings"]


def run(
    plan: Plan,
    out: str | Path,
    *,
    device: str = "auto",
    threads: int = 0,
    memory: int | None = None,
    restart: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> Result:
    """Execute ``plan`` into the new folder ``out``.

    ``threads``: workers; 0 means one per available core. ``memory``: limit in bytes for the process's own
    (anonymous) memory. ``restart``: discard unfinished work of another plan. ``stop``: set it to cancel within
    a block. Raises the plan's first blocker; NumbersError, InputError, OutputError, VerificationError, Cancelled.
    Whatever is raised, finished tensors are kept, and the same call goes on from there.
    """
    if plan.blockers:
        raise plan.blockers[0]
    started = time.monotonic()
    device = choose_device(device)
    threads = threads_within(plan, threads, memory)
    progress = Progress(sum(_work(t) for t in plan.tensors))
    wish = stop or threading.Event()

    def check(*_: int) -> None:
        if wish.is_set():
            raise Cancelled()

    with (
        _one_torch_thread(),
        _memory_errors("the start of the work"),
        OutputFolder.open(Path(out), plan.files, plan.resume_key(device), discard=restart, progress=check) as folder,
    ):
        resumed = len(folder.done)
        merge = Merge(plan, folder, device, threads, progress, on_progress, wish)
        merge.run()
        for model in plan.models.values():
            model.check_unchanged()
        manifest = make_manifest(plan, device, merge.delta_survival())
        for name, content in side_files(plan, Path(out).name).items():
            folder.add(name, content)
        final = folder.finish(manifest, check)
    return Result(final, manifest, time.monotonic() - started, resumed)


def choose_device(wish: str) -> str:
    """``auto`` is CUDA if there is one, else the CPU. OutputError E_DEVICE if the wish cannot be met."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wish == "auto":
        return "cuda" if available["cuda"] else "cpu"
    kind = wish.split(":")[0]
    if not available.get(kind):
        have = ", ".join(k for k, there in available.items() if there)
        raise OutputError("E_DEVICE", f"The device {wish!r} is not available.", f"This machine has: {have}.",
                          "Use --device auto.")
    return wish


def threads_within(plan: Plan, threads: int, memory: int | None) -> int:
    """Number of workers: as wished (0: one per core, 16 at most), fewer if the memory limit asks for it."""
    threads = min(threads or min(available_cores(), 16), max(1, len(plan.tensors)))
    while memory is not None and plan.memory(threads) > memory:
        threads -= 1
        if threads == 0:
            raise OutputError(
                "E_MEMORY", f"{memory / 1e6:.0f} MB are too little for this merge.",
                f"One worker needs {plan.memory(1) / 1e6:.0f} MB.", "Raise --memory.")
    return threads


def _work(tensor: TensorPlan) -> int:
    return tensor.numel * (tensor.method.passes if tensor.method else 1)


@dataclass(slots=True)
class _Survival:
    changed: int = 0
    lost: int = 0


class Target(Protocol):
    """Where merged tensors go: the files of an ``OutputFolder``, or memory."""

    @property
    def done(self) -> Collection[str]:
        """Tensors that are there already."""

    def write(self, tensor: str, offset: int, data: memoryview) -> None: ...

    def complete(self, tensor: str, checksum: str) -> None: ...


class Merge:
    """One run of one plan into ``folder``."""

    def __init__(
        self, plan: Plan, folder: Target, device: str, threads: int, progress: Progress,
        on_progress: Callable[[Progress], None] | None, stop: threading.Event,
    ) -> None:  # fmt: skip
        self.plan, self.folder, self.device, self.threads = plan, folder, device, threads
        self.progress, self.on_progress, self.stop = progress, on_progress, stop
        self.survival = _Survival()
        self.lock = threading.Lock()
        self.local = threading.local()
        self.seed = plan.recipe.seed
        self.prepared: dict[str, Any] = {}

    # -- the run ---------------------------------------------------------------------------------------

    def run(self) -> None:
        todo = [t for t in self.plan.tensors if t.name not in self.folder.done]
        for tensor in self.plan.tensors:
            if tensor.name in self.folder.done:
                self.progress.done += _work(tensor)
        whole = [t for t in self.plan.tensors if t.method is not None and t.method.whole_model() is not None]
        if whole and any(t.method for t in todo):
            self.prepare_whole_model(whole)
        # The largest first, so that no worker is left alone with one at the end; the rest in file order.
        fair = sum(t.numel for t in todo) // (8 * self.threads) + 1
        todo.sort(key=lambda t: -t.numel if t.numel > fair else 0)
        self.spread(self.merge_tensor, todo, self.finish_tensor)
        self.pulse(self.progress.total)  # the passes were an estimate

    def prepare_whole_model(self, tensors: Sequence[TensorPlan]) -> None:
        """Exact global rules look at all tensors before the first is merged, in an order that no file decides."""
        tensors = sorted(tensors, key=lambda t: t.name)
        inputs = [self.inputs(t, scan=True) for t in tensors]
        method = tensors[0].method
        assert method is not None

        def on_workers(function: Callable[[TensorInputs, Workspace], Any], items: Sequence[TensorInputs]) -> list:
            return self.spread(lambda item: function(item, self.workspace()), items)

        with _memory_errors("the thresholds of the whole model"):
            scan = BlockScan(inputs, self.workspace(), self.seed, on_workers, self.pulse)
            for tensor, known in zip(tensors, method.prepare(scan), strict=True):
                self.prepared[tensor.name] = known

    def spread(
        self, work: Callable[[Any], Any], items: Sequence[Any],
        finished: Callable[[Any, Any], None] = lambda item, result: None,
    ) -> list:  # fmt: skip
        """``work`` of each item on the workers; see ``workers.spread``."""

        def told_work(item: Any, told: Callable[[int, int], None]) -> Any:
            self.local.told = told
            return work(item)

        return spread(told_work, items, self.threads, can_fork(self.device), self.count, self.stop, finished)

    def workspace(self) -> Workspace:
        if not hasattr(self.local, "workspace"):
            self.local.workspace = Workspace(self.device)
        return self.local.workspace

    def pulse(self, elements: int, moved: int = 0) -> None:
        """After each block, in the worker: say so, and see whether to stop."""
        if self.stop.is_set():
            raise Cancelled()
        told = getattr(self.local, "told", self.count)
        told(elements, moved)

    def count(self, elements: int, moved: int) -> None:
        """Progress, in the caller's process."""
        with self.lock:
            self.progress.done = min(self.progress.done + elements, self.progress.total)
            self.progress.moved += moved
            if self.on_progress is not None:
                self.on_progress(self.progress)

    # -- one tensor ------------------------------------------------------------------------------------

    def merge_tensor(self, tensor: TensorPlan) -> tuple[str, int, int]:
        """In a worker: checksum of the written bytes; changed entries counted, and how many of them were lost."""
        self.local.survival = _Survival()
        with _memory_errors(tensor.name):
            if tensor.method is None and all(s.dtype == tensor.dtype for s in tensor.sources):
                checksum = self.copy(tensor)
            elif tensor.method is None:
                checksum = self.convert(tensor)
            else:
                checksum = self.combine(tensor, tensor.method)
        return checksum, self.local.survival.changed, self.local.survival.lost

    def finish_tensor(self, tensor: TensorPlan, result: tuple[str, int, int]) -> None:
        checksum, changed, lost = result
        with self.lock:
            self.progress.tensor = tensor.name
            self.survival.changed += changed
            self.survival.lost += lost
            self.folder.complete(tensor.name, checksum)

    def copy(self, tensor: TensorPlan) -> str:
        """Bytes as they are; integers must be the same in all sources."""
        first, *others = tensor.sources
        size = ITEM_BITS[tensor.dtype] // 8
        room = min(CHUNK, tensor.nbytes)
        buffer, other = memoryview(bytearray(room)), memoryview(bytearray(room if others else 0))
        checksum = xxhash.xxh3_128()
        for start in range(0, tensor.numel, CHUNK // size):
            stop = min(tensor.numel, start + CHUNK // size)
            view = buffer[: (stop - start) * size]
            first.read(start, stop, view)
            for source in others:
                source.read(start, stop, other[: len(view)])
                if other[: len(view)] != view:
                    raise InputError(
                        "E_INTEGER_DIFFERS", f"{tensor.name} ({tensor.dtype}) is not the same in all models.",
                        f"Integers and bools cannot be averaged, and{place_of_source(first)} and"
                        f"{place_of_source(source)} differ.",
                        "Check that the models belong together.")
            self.check_copied(tensor, start, view)
            checksum.update(view)
            self.folder.write(tensor.name, start * size, view)
            self.pulse(stop - start, 2 * len(view))
        return checksum.hexdigest()

    def convert(self, tensor: TensorPlan) -> str:
        """One source in another dtype, rounded once."""
        inputs = self.inputs(tensor)
        return self.write_blocks(tensor, inputs, lambda block: block.experts[0])

    def combine(self, tensor: TensorPlan, method: Method) -> str:
        inputs = self.inputs(tensor)
        known = self.prepared[tensor.name] if tensor.name in self.prepared else self.prepare(tensor, method)
        return self.write_blocks(tensor, inputs, lambda block: method.combine(block, known))

    def prepare(self, tensor: TensorPlan, method: Method) -> Any:
        """What the method must know of this tensor beforehand."""
        scanned = [self.inputs(tensor, scan=True)]
        (known,) = method.prepare(BlockScan(scanned, self.workspace(), self.seed, pulse=self.pulse))
        return known

    def write_blocks(self, tensor: TensorPlan, inputs: TensorInputs, merged: Callable[[Any], Tensor]) -> str:
        workspace, checksum = self.workspace(), xxhash.xxh3_128()
        dtype, size = getattr(torch, TORCH_NAMES[tensor.dtype]), ITEM_BITS[tensor.dtype] // 8
        moved = sum(ITEM_BITS[s.dtype] // 8 for s in tensor.inputs()) + size
        for number, block in enumerate(inputs.blocks(workspace, self.seed)):
            result = merged(block)
            host = _on_host(workspace, result, dtype)
            self.check_numbers(tensor, block.start, result, host)
            if block.base is not None and size == 2 and number % SURVIVAL_EVERY == 0:
                self.count_survival(workspace, block.base, result, host)
            view = host.view(torch.uint8).numpy().data
            checksum.update(view)
            self.folder.write(tensor.name, block.start * size, view)
            self.pulse(result.numel(), result.numel() * moved)
        return checksum.hexdigest()

    # -- reading ---------------------------------------------------------------------------------------

    def inputs(self, tensor: TensorPlan, scan: bool = False) -> TensorInputs:
        """``scan``: for thresholds and norms, which must be finite. Where NaN and infinity may pass they are
        taken for 0 there, so that they stay in their place instead of spoiling the whole tensor."""
        sources = tensor.inputs()
        dtype = compute_dtype([getattr(torch, TORCH_NAMES[s.dtype]) for s in sources])
        refuse = self.plan.recipe.policies.non_finite == "refuse"
        check = refuse and tensor.method is not None and not tensor.method.spreads_nan
        blank = scan and not refuse
        return TensorInputs(
            tensor.name, tensor.numel, dtype,
            None if tensor.base is None else SourceReader(tensor.base, 0, check, blank),
            [SourceReader(s, k, check, blank)
             for k, s in enumerate(tensor.sources if tensor.method else tensor.sources[:1], 1)],
            tensor.method.coarse if tensor.method else 2)

    # -- numbers ---------------------------------------------------------------------------------------

    def check_copied(self, tensor: TensorPlan, start: int, view: memoryview) -> None:
        """A copy must not carry on what arithmetic would refuse."""
        dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
        if self.plan.recipe.policies.non_finite != "refuse" or not dtype.is_floating_point:
            return
        values = torch.frombuffer(view, dtype=dtype)
        values = values if dtype.itemsize > 1 else values.float()
        if math.isfinite(float(values.sum(dtype=torch.float64 if dtype == torch.float64 else torch.float32))):
            return
        broken = torch.nonzero(~torch.isfinite(values)).flatten()
        if broken.numel():
            refuse_non_finite(tensor.sources[0], start + int(broken[0]))

    def check_numbers(self, tensor: TensorPlan, start: int, result: Tensor, host: Tensor) -> None:
        """A sum shows any NaN or infinity; only then is looked closer."""
        if math.isfinite(float(host.sum(dtype=torch.float32 if host.dtype == torch.float16 else None))):
            return
        policies = self.plan.recipe.policies
        before, after = torch.isfinite(result).cpu(), torch.isfinite(host)
        broken, overflowed = torch.nonzero(~before).flatten(), torch.nonzero(before & ~after).flatten()
        if broken.numel() and policies.non_finite == "refuse":
            place = start + int(broken[0])
            for source in tensor.inputs():
                refuse_non_finite(source, place)
            raise NumbersError(
                "E_NOT_FINITE", f"{tensor.name}: element {place} is not a finite number.",
                "The arithmetic left the range of its type.", "Check weights and lambda.")
        if overflowed.numel() and policies.overflow == "refuse":
            place = int(overflowed[0])
            raise NumbersError(
                "E_OVERFLOW", f"{tensor.name}: element {start + place} is {float(result[place]):.6g}, too large "
                f"for {tensor.dtype}.", "It would be stored as infinity.",
                "Choose dtype: bfloat16 or float32, smaller weights, or policies.overflow: allow.")

    def count_survival(self, workspace: Workspace, base: Tensor, result: Tensor, host: Tensor) -> None:
        """How many entries the merge changed, and how many of those the output's rounding set back."""
        flags = workspace.buffer("flags", result.numel(), result.dtype)
        changed = int(torch.ne(result, base, out=flags).sum())
        before = workspace.buffer("before", result.numel(), host.dtype).copy_(base)
        stored = workspace.buffer("stored", result.numel(), result.dtype).copy_(host)
        kept = int(torch.ne(stored, base.copy_(before), out=flags).sum())
        self.local.survival.changed += changed
        self.local.survival.lost += max(0, changed - kept)

    def delta_survival(self) -> dict[str, Any] | None:
        """The share of changed entries that the output's dtype did not round back to the base; None if not measured."""
        if not self.survival.changed:
            return None
        return {
            "survived": 1 - self.survival.lost / self.survival.changed,
            "changed_entries_counted": self.survival.changed,
            "sampled": f"one block in {SURVIVAL_EVERY}, tensors merged in this run",
        }


def _on_host(workspace: Workspace, result: Tensor, dtype: Any) -> Tensor:
    """The block in the output's dtype, rounded to nearest even, in host memory."""
    out = workspace.buffer("output", result.numel(), dtype)
    round_into(out, result)
    return out if out.device.type == "cpu" else out.cpu()


@contextmanager
def _memory_errors(what: str) -> Iterator[None]:
    """When there is none left, Python raises MemoryError, and torch and threads RuntimeError or a subclass."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error)):
            raise
        raise OutputError(
            "E_MEMORY", f"Out of memory at {what}.", str(error).splitlines()[0] if str(error) else "",
            "Use fewer --threads, or close other programs.") from error


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The workers are the parallelism; torch's own threads would fight over the same cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
