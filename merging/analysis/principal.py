"""Principal weights: do the experts change the entries that carry the base's main directions?

LIFT (Liu et al. 2025, "LIFT the veil for the truth", arXiv 2506.00772) fine-tunes only *principal weights*: of the
rank-r truncation W' of a base matrix W_0 (its r strongest directions), the entries that are largest in |W'|. It reports
that reasoning is learned there. For a finished expert the question turns round: how much of its change lies there?

    ratio = (share of ‖τ‖_F² inside the mask) / (share of entries inside the mask)

is 1 for a change that does not care, above 1 for one that prefers principal weights. And for two experts that each
keep their largest |τ|: the intersection over union of what they keep, inside the mask and outside, tells where they
compete; two random choices of density d have d / (2 − d). (That use of LIFT's mask is ours, not the paper's.)

Nothing as large as the matrix is held: W' = L R is made again from its thin factors wherever a block of it is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RecipeError
from ..methods import Workspace
from ..methods.lazy_torch import torch
from ..methods.scan import BlockScan, TensorInputs
from ..methods.trimming import KEEP_ALL, Threshold, count_kept, thresholds
from ..reading import SourceReader
from .matrices import add_gram, eigen, one_blas_thread
from .models import MERGED, Compared, Models
from .panels import is_matrix, refuse, source_panels
from .passes import Progress, Pulse, over_tensors
from .subspaces import check_rank

if TYPE_CHECKING:
    from torch import Tensor

RANK, DENSITY = 128, 0.05
"""The authors' recommended rank, and the share of weights that their abstract speaks of."""
LEFT_OUT = frozenset({"embed", "head"})
"""Kinds of tensors that LIFT does not touch."""


@dataclass(slots=True)
class PrincipalTensor:
    """One matrix. Lists hold one value per model (experts, then the merged one, if it has the tensor) or per pair of
    them, in the order (0,1), (0,2), …, (1,2), …"""

    name: str
    block: int | None
    kind: str
    numel: int
    captured: float
    """Share of ‖W_0‖_F² that the truncation keeps; 0 for a zero matrix."""
    inside: int
    """Entries in the mask."""
    energy: list[float]
    """‖τ‖_F²."""
    energy_inside: list[float]
    """Σ τ² over the mask."""
    both: list[int]
    """Entries that both of the pair keep: ⌊density · n⌋ of largest |τ|, those that are 0 not counted."""
    either: list[int]
    both_inside: list[int]
    """The same within the mask."""
    either_inside: list[int]


@dataclass(slots=True)
class Principal:
    """What ``measure_principal`` found, and the figures of any choice of tensors joined."""

    names: list[str]
    """Experts, then the merged model, if there is one."""
    rank: int
    density: float
    tensors: list[PrincipalTensor]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(combinations(range(len(self.names)), 2))

    def ratios(self, tensors: Iterable[PrincipalTensor] | None = None) -> list[float | None]:
        """The ratio of each model: energy found in the masks over the energy that would be there if each tensor's were
        spread evenly. None where nothing changed."""
        chosen = self._complete(tensors)
        found: list[float | None] = []
        for k in range(len(self.names)):
            having = [t for t in chosen if k < len(t.energy)]
            expected = sum(t.energy[k] * t.inside / t.numel for t in having)
            found.append(sum(t.energy_inside[k] for t in having) / expected if expected > 0 else None)
        return found

    def overlaps(self, tensors: Iterable[PrincipalTensor] | None = None) -> list[tuple[float | None, float | None]]:
        """For each pair: intersection over union of the kept entries (inside the mask, outside); None for an empty
        union."""
        chosen = self._complete(tensors)
        found = []
        for pair in self.pairs:
            both = either = both_inside = either_inside = 0
            for t in chosen:
                if max(pair) < len(t.energy):
                    i = list(combinations(range(len(t.energy)), 2)).index(pair)
                    both, either = both + t.both[i], either + t.either[i]
                    both_inside, either_inside = both_inside + t.both_inside[i], either_inside + t.either_inside[i]
            found.append((_ratio(both_inside, either_inside), _ratio(both - both_inside, either - either_inside)))
        return found

    def as_dict(self) -> dict[str, Any]:
        """JSON values: of each tensor its ratios and overlaps, and those of all joined."""
        return {
            "names": self.names,
            "rank": self.rank,
            "density": self.density,
            "pairs": [[self.names[a], self.names[b]] for a, b in self.pairs],
            "ratios": self.ratios(),
            "overlaps": self.overlaps(),
            "expected_overlap": self.density / (2 - self.density),
            "tensors": [
                {
                    "name": t.name,
                    "block": t.block,
                    "kind": t.kind,
                    "captured": t.captured,
                    "ratios": self.ratios([t]),
                    "overlaps": self.overlaps([t]),
                }
                for t in self.tensors
            ],
        }

    def _complete(self, tensors: Iterable[PrincipalTensor] | None) -> list[PrincipalTensor]:
        return list(self.tensors if tensors is None else tensors)


def measure_principal(
    models: Models,
    *,
    rank: int = RANK,
    density: float = DENSITY,
    threads: int = 0,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Principal:
    """Principal weights of all matrices in blocks (embeddings and heads are left out, as in LIFT).

    ``rank``: of the truncation (or the matrix' smaller side, if that is less); ``density`` in (0, 1]: share of entries
    in the mask, and of those that each model keeps of its τ. About six passes over the files. Raises
    RecipeError E_RECIPE_FIELD for another rank or density, NumbersError E_NOT_FINITE, InputError E_READ or
    E_INPUT_CHANGED, Cancelled.
    """
    check_rank(rank)
    if not 0 < density <= 1:
        raise RecipeError(
            "E_RECIPE_FIELD", f"The density {density} makes no sense.", "It is the share of entries that is kept.",
            "Give a number above 0, up to 1, for example 0.05.")  # fmt: skip

    def work(tensor: Compared, workspace: Workspace, pulse: Pulse) -> PrincipalTensor:
        return principal_tensor(tensor, rank, density, workspace, pulse)

    chosen = [tensor for tensor in models.tensors if is_matrix(tensor) and tensor.kind not in LEFT_OUT]
    with one_blas_thread():
        tensors = over_tensors(
            work, chosen, threads=threads, progress=progress, stop=stop, what="principal weights", passes=6
        )
    models.check_unchanged()
    names = [*models.names, *([MERGED] if MERGED in models.checkpoints else [])]
    return Principal(names, rank, density, tensors)


def principal_tensor(
    tensor: Compared, rank: int, density: float, workspace: Workspace, pulse: Pulse
) -> PrincipalTensor:
    """One matrix."""
    left, right, captured = truncation(tensor, rank, workspace, pulse)
    count = len(tensor.changed)
    readers = [SourceReader(source, slot, check=True) for slot, source in enumerate((tensor.base, *tensor.changed))]
    changes = TensorInputs(tensor.name, tensor.numel, tensor.dtype, readers[0], readers[1:])
    product = TensorInputs(tensor.name, tensor.numel, tensor.dtype, _zeros, [_ProductReader(left, right)])
    own = Workspace()  # both inputs are read side by side, so their buffers must be two
    limits, (mask,) = [Threshold(KEEP_ALL, 0)] * count, [Threshold(KEEP_ALL, 0)]
    if count_kept(density, tensor.numel) < tensor.numel:
        (limits,) = thresholds(BlockScan([changes], workspace, pulse=pulse), [density] * count)
        ((mask,),) = thresholds(BlockScan([product], own, pulse=pulse), [density])
    inside, energy, energy_inside = 0, np.zeros(count), np.zeros(count)
    common, common_inside = np.zeros((count, count), np.int64), np.zeros((count, count), np.int64)
    for block, other in zip(changes.blocks(workspace, 0), product.blocks(own, 0), strict=True):
        principal = mask.trim(other.task_vectors()[0], other.buffer("scratch")).ne(0).to(block.like.dtype)
        inside += int(principal.sum(dtype=torch.float64))
        kept = workspace.buffer("kept", count * block.like.numel(), block.like.dtype).view(count, -1)
        for k, (tau, limit) in enumerate(zip(block.task_vectors(), limits, strict=True)):
            squares = tau.double().square()
            energy[k] += float(squares.sum())
            energy_inside[k] += float(squares @ principal.double())
            kept[k] = limit.trim(tau, block.buffer("scratch")).ne(0)
        # Sums of at most BLOCK ones: exact also in float32.
        common += (kept @ kept.T).numpy().astype(np.int64)
        common_inside += ((kept * principal) @ kept.T).numpy().astype(np.int64)
        pulse(block.like.numel())
    pairs = list(combinations(range(count), 2))
    return PrincipalTensor(
        tensor.name, tensor.block, tensor.kind, tensor.numel, captured, inside, energy.tolist(),
        energy_inside.tolist(), *_both_and_either(common, pairs), *_both_and_either(common_inside, pairs),
    )  # fmt: skip


def truncation(tensor: Compared, rank: int, workspace: Workspace, pulse: Pulse) -> tuple[Tensor, Tensor, float]:
    """(L, R, share of ‖W_0‖_F² kept) with L R the best approximation of W_0 of that rank (Eckart and Young 1936);
    L: m x r, R: r x n, compute dtype."""
    n = min(tensor.shape)
    gram = np.zeros((n, n), order="F")
    for (panel,) in source_panels([tensor.base], tensor.shape, tensor.dtype, workspace):
        gram = add_gram(gram, panel)
        pulse(panel.numel())
    energy = float(np.trace(gram))
    if not np.isfinite(energy):
        refuse(tensor)
    values, basis = eigen(gram, rank)
    del gram
    assert basis is not None
    captured = min(1.0, float(values[: basis.shape[1]].sum()) / energy) if energy else 0.0
    directions = torch.from_numpy(basis).to(tensor.dtype)
    images = torch.empty((max(tensor.shape), basis.shape[1]), dtype=tensor.dtype)
    start = 0
    for (panel,) in source_panels([tensor.base], tensor.shape, tensor.dtype, workspace):
        torch.mm(panel, directions, out=images[start : start + len(panel)])
        start += len(panel)
        pulse(panel.numel())
    if tensor.shape[0] >= tensor.shape[1]:  # W_0 V Vᵀ
        return images, directions.T.contiguous(), captured
    return directions, images.T.contiguous(), captured  # U (W_0ᵀ U)ᵀ


class _ProductReader:
    """Elements of L R in row order, computed when they are read (see ``methods.scan.Reader``)."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right, self.columns = left, right, right.shape[1]

    def __call__(self, start: int, out: Tensor, workspace: Workspace, stride: int = 1) -> None:
        last = start + (out.numel() - 1) * stride
        first_row, last_row = start // self.columns, last // self.columns
        rows = (self.left[first_row : last_row + 1] @ self.right).view(-1)
        offset = first_row * self.columns
        out.copy_(rows[start - offset : last - offset + 1 : stride])


def _zeros(start: int, out: Tensor, workspace: Workspace, stride: int = 1) -> None:
    out.zero_()


def _both_and_either(common: np.ndarray, pairs: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Sizes of intersections and unions, from the sizes of all intersections (a set with itself: its own size)."""
    both = [int(common[a, b]) for a, b in pairs]
    return both, [int(common[a, a] + common[b, b]) - size for (a, b), size in zip(pairs, both, strict=True)]


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
