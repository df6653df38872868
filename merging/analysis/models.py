"""The models that an analysis looks at: a base, its experts and perhaps a merge of them, tensor by tensor.

``open_models`` reads headers only and makes one table of ``Compared`` tensors, those that all models have in the same
shape. What cannot be compared is never dropped silently: it stands in ``Models.skipped`` with the reason, and what was
bent to fit (a padded vocabulary, a tied head) stands in ``Models.notes``.

Everything in this package speaks of *task vectors*: τ_k = W_k − W_0, what expert k changed in the base. A merged model
has one too. They are computed in float32 from 16-bit weights and in float64 otherwise (numeric rule N1).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from ..alignment import COPIED_AS_THEY_ARE, FLOATS, some_of
from ..checkpoints.checkpoint import Checkpoint, RowsSource, Source, open_checkpoint
from ..checkpoints.header import TORCH_NAMES
from ..checkpoints.hub import resolve
from ..checkpoints.layout import IGNORABLE, KINDS, head_and_embedding, is_tied, role
from ..errors import InputError, NumbersError
from ..layer_plan import place_of
from ..methods import Workspace
from ..methods.lazy_torch import torch
from ..methods.scan import TensorInputs, compute_dtype
from ..reading import SourceReader, refuse_non_finite

if TYPE_CHECKING:
    from torch import Tensor

BASE, MERGED = "base", "merged"
"""Keys of the base and of the merged model in ``Models.checkpoints``; the experts' are their names."""
SAMPLES, SAMPLE = 4, 4096
"""So many pieces of so many bytes of each file enter ``Models.key``."""


@dataclass(slots=True)
class Compared:
    """One tensor of floating-point numbers that base and all experts (and perhaps the merged model) have."""

    name: str
    shape: tuple[int, ...]
    block: int | None
    """Number of the transformer block; None outside of blocks."""
    kind: str
    """One of ``checkpoints.layout.KINDS``."""
    base: Source
    experts: list[Source]
    merged: Source | None = None

    @property
    def numel(self) -> int:
        return self.base.numel

    @property
    def changed(self) -> list[Source]:
        """The experts, and the merged model as the last one: what has a task vector."""
        return [*self.experts, *([self.merged] if self.merged is not None else [])]

    @property
    def dtype(self) -> Any:
        """Compute dtype: torch.float32 if all sources have 16 bits, else torch.float64."""
        return compute_dtype([getattr(torch, TORCH_NAMES[s.dtype]) for s in (self.base, *self.changed)])

    def inputs(self) -> TensorInputs:
        """Readers for ``methods.scan``: the base, then the experts, the merged model as the last expert.

        Readers keep a window of their file in the workspace: make new ones for each pass and worker.
        """
        readers = [SourceReader(source, slot) for slot, source in enumerate((self.base, *self.changed))]
        return TensorInputs(self.name, self.numel, self.dtype, readers[0], readers[1:])


@dataclass
class Models:
    """Opened models and the table of what can be compared. Use as a context manager, or call ``close``."""

    reference: dict[str, Any]
    """{"base": str, "experts": [str, …], "merged": str or None}: paths, or ``org/name@commit``."""
    names: list[str]
    """Short and different names of the experts."""
    tensors: list[Compared]
    """Embeddings first, then block after block (attention, feed-forward part, norms), then final norm and head."""
    skipped: list[tuple[str, str]]
    """(tensor, why it is not compared)."""
    notes: list[str]
    checkpoints: dict[str, Checkpoint]
    key: str
    """SHA-256 that stays equal as long as the files and their roles do: part of the key of cached results."""

    @property
    def parameters(self) -> int:
        """Compared weights per model."""
        return sum(tensor.numel for tensor in self.tensors)

    def check_unchanged(self) -> None:
        """InputError E_INPUT_CHANGED if a weight file was modified, replaced or removed since opening."""
        for checkpoint in self.checkpoints.values():
            checkpoint.check_unchanged()

    def close(self) -> None:
        for checkpoint in self.checkpoints.values():
            checkpoint.close()

    def __enter__(self) -> Models:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_models(
    base: str,
    experts: Sequence[str],
    merged: str | None = None,
    *,
    offline: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Models:
    """Open the models and line up their tensors; headers only.

    Each reference is a local folder or ``.safetensors`` file, ``org/name[@revision]``, or (not for the base) a LoRA
    adapter, which is read on top of the base. ``progress``: bytes done, bytes in all, file, while downloading.
    Raises what ``resolve`` and ``open_checkpoint`` raise; InputError E_NOT_A_MODEL without any expert,
    E_MISSING_TENSOR if the models have no tensor in common.
    """
    if not experts:
        raise InputError(
            "E_NOT_A_MODEL", "There is no expert to look at.", "", "Name at least one model besides the base."
        )
    opened: dict[str, Checkpoint] = {}
    found_at: dict[str, str] = {}
    paths: dict[str, str] = {}
    notes: list[str] = []
    try:
        for reference in (base, *experts, *([merged] if merged is not None else [])):
            if reference in opened:
                continue
            found = resolve(reference, offline=offline, progress=progress)
            opened[reference] = open_checkpoint(found.path, reference, base=opened.get(base))
            found_at[reference] = found.reference
            paths[reference] = found.repo_id or os.path.abspath(found.path)
            notes += found.warnings
        names = _short_names([paths[reference] for reference in experts])
        checkpoints = {BASE: opened[base]} | dict(zip(names, (opened[r] for r in experts), strict=True))
        if merged is not None:
            checkpoints[MERGED] = opened[merged]
        tensors, skipped, remarks = compare(checkpoints)
        where = {
            "base": found_at[base],
            "experts": [found_at[reference] for reference in experts],
            "merged": None if merged is None else found_at[merged],
        }
        identity = [[who if who in (BASE, MERGED) else "expert", _fingerprint(one)] for who, one in checkpoints.items()]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return Models(where, names, tensors, skipped, notes + remarks, checkpoints, key)
    except BaseException:
        for checkpoint in opened.values():
            checkpoint.close()
        raise


def task_vector(tensor: Compared, k: int, workspace: Workspace | None = None) -> Tensor:
    """τ_k = W_k − W_0 of a whole tensor, read block by block; k = number of experts means the merged model.

    2-D (leading 1s dropped, dimensions after the first joined) or 1-D; float32 from 16-bit weights, else float64. It
    holds one tensor in memory. Raises NumbersError E_NOT_FINITE, InputError E_READ, E_INPUT_CHANGED.
    """
    workspace = workspace or Workspace()
    inputs = TensorInputs(
        tensor.name, tensor.numel, tensor.dtype, SourceReader(tensor.base, 0), [SourceReader(tensor.changed[k], 1)]
    )
    tau = torch.empty(tensor.numel, dtype=tensor.dtype)
    for block in inputs.blocks(workspace, 0):
        stop = block.start + block.like.numel()
        assert block.base is not None
        torch.sub(block.like, block.base, out=tau[block.start : stop])
        if not torch.isfinite(tau[block.start : stop].sum(dtype=torch.float64)):
            refuse_block(tensor, block.start, stop)
    shape = tensor.shape
    while len(shape) > 2 and shape[0] == 1:  # a batch dimension of 1, as some position embeddings have
        shape = shape[1:]
    return tau.view(shape[0], -1) if len(shape) > 1 else tau


def refuse_block(tensor: Compared, start: int, stop: int) -> None:
    """Raise NumbersError E_NOT_FINITE, naming element and file, if a model has a NaN or an infinity among elements
    [start, stop), and E_OVERFLOW if a difference of two models has one."""
    values = []
    for source in (tensor.base, *tensor.changed):
        whole = torch.empty(stop - start, dtype=tensor.dtype)
        SourceReader(source, 0)(start, whole, Workspace())
        values.append(whole)
        try:
            refuse_non_finite(source, start, whole)
        except NumbersError as error:
            raise without_recipe(error) from None
    for other in values[1:]:
        if not torch.isfinite(other - values[0]).all():
            raise NumbersError(
                "E_OVERFLOW",
                f"{tensor.name}: an expert and the base differ by more than {tensor.dtype} can hold.",
                "Weights of this size belong to a broken model.",
                "Use another checkpoint.",
            )


def without_recipe(error: NumbersError) -> NumbersError:
    """The same error for somebody who has no recipe with policies."""
    if error.code != "E_NOT_FINITE":
        return error
    why = "NaN and infinity spread through every sum: no norm or angle could be told."
    return NumbersError(error.code, error.what, why, "Use another checkpoint.")


# ------------------------------------------------------------------------------------------- the table of tensors


def compare(checkpoints: Mapping[str, Checkpoint]) -> tuple[list[Compared], list[tuple[str, str]], list[str]]:
    """(tensors, skipped, notes) for models by key: BASE first, then the experts, then perhaps MERGED.

    A tensor that only the merged model lacks is compared without it. Raises InputError E_MISSING_TENSOR if nothing can
    be compared.
    """
    judged = [who for who in checkpoints if who != MERGED]
    ends = {who: head_and_embedding(model.tensors) for who, model in checkpoints.items()}
    lent = _lent_embeddings(checkpoints, ends, judged)
    tables = {name for pair in ends.values() for name in pair if name}
    tables |= {f"{name.removesuffix('weight')}bias" for name in tables}
    shapes = {name: source.shape for who in judged for name, source in checkpoints[who].tensors.items()}
    tensors, skipped, remarks = [], [], _Remarks()
    for name in sorted(shapes, key=lambda name: _order(name, shapes[name])):
        sources = {who: model.tensors.get(lent.get((who, name), name)) for who, model in checkpoints.items()}
        obstacle = _obstacle(name, {who: sources[who] for who in judged}, name in tables)
        if obstacle is not None:
            skipped.append((name, obstacle))
            continue
        if MERGED in sources:
            obstacle = _obstacle(name, {who: sources[who] for who in (BASE, MERGED)}, name in tables)
            if obstacle is not None:
                del sources[MERGED]
                remarks.add(name, f"compared without the merged model: {obstacle}")
        kept = {who: source for who, source in sources.items() if source is not None}
        for who in kept:
            if (who, name) in lent:
                remarks.add(name, f"{who} is tied, its embedding stands in for the head")
        kept = _on_common_rows(name, kept, remarks)
        place = role(name, kept[BASE].shape)
        experts = [kept[who] for who in judged[1:]]
        tensors.append(Compared(name, kept[BASE].shape, place.block, place.kind, kept[BASE], experts, kept.get(MERGED)))
    if not tensors:
        why = f"For example {skipped[0][0]}: {skipped[0][1]}." if skipped else "They have no tensors."
        raise InputError(
            "E_MISSING_TENSOR", "The models have no tensor in common.", why, "Check that they belong together."
        )
    if MERGED in checkpoints:
        theirs = checkpoints[MERGED].tensors
        skipped += [(name, "only the merged model has it") for name in theirs if name not in shapes]
    return tensors, skipped, remarks.lines()


def _lent_embeddings(
    checkpoints: Mapping[str, Checkpoint], ends: Mapping[str, tuple[str | None, str | None]], judged: Sequence[str]
) -> dict[tuple[str, str], str]:
    """(model, head of another model) -> the embedding that is also this tied model's head."""
    heads = {head for who in judged if (head := ends[who][0])}
    found: dict[tuple[str, str], str] = {}
    for who, model in checkpoints.items():
        embedding = ends[who][1]
        if embedding and heads and is_tied(model.config, model.tensors):
            found |= {(who, head): embedding for head in heads}
    return found


def _obstacle(name: str, sources: Mapping[str, Source | None], is_table: bool) -> str | None:
    """Why these tensors cannot be compared; None if they can."""
    if IGNORABLE.fullmatch(name):
        return "a buffer, not a weight"
    missing = [who for who, source in sources.items() if source is None]
    if missing:
        return f"missing in {some_of(missing)}"
    known = {who: source for who, source in sources.items() if source is not None}
    types = {source.dtype for source in known.values()}
    if not types <= FLOATS:
        what = "integers" if types <= COPIED_AS_THEY_ARE else "a type that cannot be compared"
        return f"{what} ({', '.join(sorted(types))})"
    shapes = {source.shape for source in known.values()}
    if len(shapes) > 1 and not (is_table and () not in shapes and len({shape[1:] for shape in shapes}) == 1):
        return "shapes differ: " + ", ".join(f"{who} {_shape(source)}" for who, source in known.items())
    return None if all(source.numel for source in known.values()) else "it has no elements"


def _on_common_rows(name: str, sources: dict[str, Source], remarks: _Remarks) -> dict[str, Source]:
    """Token tables of different length, cut to the rows that all have. (Shapes are the same otherwise.)"""
    if len({source.shape for source in sources.values()}) == 1:
        return sources
    rows = min(source.shape[0] for source in sources.values())
    counts = ", ".join(f"{who} {source.shape[0]}" for who, source in sources.items())
    remarks.add(name, f"compared on the first {rows} rows, each with the row of the same number ({counts})")
    return {
        who: source if source.shape[0] == rows else RowsSource(source, np.arange(rows))
        for who, source in sources.items()
    }


class _Remarks:
    """The same remark on many tensors is one line."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}

    def add(self, name: str, text: str) -> None:
        self.names.setdefault(text, []).append(name)

    def lines(self) -> list[str]:
        return [f"{some_of(names)}: {text}." for text, names in self.names.items()]


def _shape(source: Source) -> str:
    return " x ".join(map(str, source.shape)) or "a single number"


def _order(name: str, shape: tuple[int, ...]) -> tuple:
    """Embeddings, blocks, final norm, head; within a block in the order of KINDS, numbers in names as numbers."""
    what = role(name, shape)
    place = {"before": 0, "after": 2}[place_of(what.kind)] if what.block is None else 1
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
    return place, what.block or 0, KINDS.index(what.kind), parts


def _short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path or repository; more where that is not unique, and a number for the same again."""
    parts = {path: PurePath(path).parts for path in paths}
    parts = {path: own[:-1] if own[-1] == "model.safetensors" else own for path, own in parts.items()}
    short = {path: own[-1] for path, own in parts.items()}
    for length in range(2, max(map(len, parts.values())) + 1):
        taken = Counter([*short.values(), BASE, MERGED])
        short = {path: "/".join(parts[path][-length:]) if taken[name] > 1 else name for path, name in short.items()}
    seen: Counter[str] = Counter([BASE, MERGED])
    names = []
    for path in paths:
        seen[short[path]] += 1
        names.append(short[path] if seen[short[path]] == 1 else f"{short[path]} ({seen[short[path]]})")
    return names


def _fingerprint(checkpoint: Checkpoint) -> list[Any]:
    """What tells this model from others and from itself after a change, without reading it all: path, size, time and
    header of each file, and a few samples of its bytes, since copies from an archive may all have the same time."""
    facts: list[Any] = [checkpoint.identity()]
    for file in checkpoint.files:
        size, digest = file.identity()["size"], hashlib.sha256()
        for at in range(0, size, max(1, size // SAMPLES)):
            piece = memoryview(bytearray(min(SAMPLE, size - at)))
            file.read(at, piece)
            digest.update(piece)
        facts += [os.path.abspath(file.path), digest.hexdigest()]
    return [*facts, _fingerprint(checkpoint.base)] if checkpoint.base is not None else facts
