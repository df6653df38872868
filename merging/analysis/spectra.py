"""Spectra: how many directions does a task vector really use?

The singular values σ_1 ≥ σ_2 ≥ … of a task vector say how strongly it acts along each of its directions. A LoRA update
of rank 16 has 16 of them and then nothing; noise has a plateau that ends at a sharp edge; a fully fine-tuned matrix has
a few strong directions and a long tail. There is no one "rank" of such a thing, so there are several measures, each
under its own name: the two effective ranks, both found in the literature as "the" effective rank, differ by a factor of
two on noise and by more than twenty on σ_i = 1/i.

All measures are invariant under scaling and rotation, except those that are sizes (nuclear and Frobenius norm, edge).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, NumbersError, RecipeError
from ..methods import Workspace
from .matrices import METHODS, PREVIEW_PASSES, Decomposition, Method, decompose, decompose_panels, one_blas_thread
from .models import MERGED, Compared, Models
from .panels import PANEL, is_matrix
from .passes import Progress, Pulse, over_tensors

if TYPE_CHECKING:
    from torch import Tensor

OF = ("experts", "merged", "pairs")
"""Whose spectra: each expert's task vector, that of the merged model, and the sums τ_a + τ_b."""


@dataclass(frozen=True, slots=True)
class Measures:
    """What a spectrum says in a few numbers. A zero matrix has 0 everywhere."""

    effective_rank_of_values: float
    """erank1 = exp(−Σ p_i ln p_i), p_i = σ_i / Σσ (Roy and Vetterli 2007, EUSIPCO; also RankMe). In [1, n]."""
    effective_rank_of_energy: float
    """erank2 = exp(−Σ p_i ln p_i), p_i = σ_i² / Σσ² (D-Rank, arXiv 2509.25622, eq. 1-2). In [1, erank1]."""
    stable_rank: float
    """‖τ‖_F² / σ_1²."""
    participation: float
    """(Σσ²)² / Σσ⁴: so many equal values would have the same spread of energy."""
    k90: int
    """Least k with σ_1² + … + σ_k² ≥ 0.90 ‖τ‖_F²."""
    k95: int
    k99: int
    nuclear: float
    """Σσ."""
    frobenius: float
    """‖τ‖_F = √Σσ²."""
    relative: float | None
    """‖τ‖_F / ‖W_0‖_F; None if the base is unknown or zero."""
    marchenko_pastur_edge: float
    """s (√m + √n) with s² = ‖τ‖_F² / (m n): where the singular values of a large m x n matrix would end if its energy
    were spread over independent entries of equal variance (Marchenko and Pastur 1967). Values above it are structure.
    Strong directions raise s, so noise beside them ends below it."""
    above_edge: int
    """Number of values above that edge."""


@dataclass(slots=True)
class Spectrum:
    """The singular values of one matrix."""

    tensor: str
    of: str
    """An expert's name, "merged", or "a + b"."""
    method: Method
    values: np.ndarray
    """min(m, n) values, descending, float64."""
    computed: int
    """The first so many are computed, the others estimated (method "preview")."""
    frobenius: float
    shape: tuple[int, int]
    base_frobenius: float | None = None
    """‖W_0‖_F."""

    @property
    def estimated_tail(self) -> bool:
        return self.computed < len(self.values)

    def measures(self) -> Measures:
        """The measures of this spectrum; estimates wherever ``estimated_tail`` says so (not ‖τ‖_F)."""
        return measures_of(self.values, self.shape, self.frobenius, self.base_frobenius)

    def as_dict(self) -> dict[str, Any]:
        """JSON values: the fields without the values, and the measures."""
        return {
            "tensor": self.tensor,
            "of": self.of,
            "method": self.method,
            "shape": list(self.shape),
            "computed": self.computed,
            "estimated_tail": self.estimated_tail,
            **asdict(self.measures()),
        }


def measures_of(
    values: np.ndarray, shape: tuple[int, int], frobenius: float | None = None, base_frobenius: float | None = None
) -> Measures:
    """The measures of descending singular values of an m x n matrix; ``frobenius`` is ‖τ‖_F if known better."""
    sigma = np.asarray(values, dtype=np.float64)
    largest = float(sigma[0]) if sigma.size else 0.0
    p = sigma / largest if largest > 0 else np.zeros_like(sigma)  # squares of huge and tiny numbers stay finite
    energy = p * p
    total, of_energy = float(p.sum()), float(energy.sum())
    size = largest * math.sqrt(of_energy) if frobenius is None else frobenius
    edge = size * (math.sqrt(shape[0]) + math.sqrt(shape[1])) / math.sqrt(max(1, shape[0] * shape[1]))
    return Measures(
        effective_rank_of_values=_exponential_entropy(p),
        effective_rank_of_energy=_exponential_entropy(energy),
        stable_rank=of_energy,
        participation=of_energy**2 / float((energy * energy).sum()) if largest > 0 else 0.0,
        k90=energy_rank(sigma, 0.90),
        k95=energy_rank(sigma, 0.95),
        k99=energy_rank(sigma, 0.99),
        nuclear=largest * total,
        frobenius=size,
        relative=size / base_frobenius if base_frobenius else None,
        marchenko_pastur_edge=edge,
        above_edge=int((sigma > edge).sum()),
    )


def energy_rank(values: np.ndarray, share: float) -> int:
    """Least k with σ_1² + … + σ_k² ≥ share · Σσ²; 0 if all are zero."""
    if not values.size or values[0] <= 0:
        return 0
    energy = np.cumsum((values / values[0]) ** 2)
    return min(len(values), int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12))) + 1)


def _exponential_entropy(weights: np.ndarray) -> float:
    """exp(−Σ p ln p), p = weights / Σ weights; 0 ln 0 = 0."""
    p = weights[weights > 0]
    if not p.size:
        return 0.0
    p = p / p.sum()
    return math.exp(-float(p @ np.log(p)))


def spectrum_of(matrix: Tensor | np.ndarray, method: Method = "gram", k: int = 64, seed: int = 0) -> Spectrum:
    """The spectrum of a matrix in memory: m x n, floating point (or anything 2-D that numpy can widen to float64).

    ``method``: see ``matrices``; ``k`` and ``seed`` are for "preview". Raises InputError E_SHAPE unless it
    is 2-D and not empty, NumbersError E_NOT_FINITE, RecipeError E_RECIPE_FIELD for another method.
    """
    import torch

    check_method(method)
    given = torch.as_tensor(matrix).detach().cpu()
    single = given.dtype in (torch.float32, torch.bfloat16, torch.float16)
    whole = given.to(torch.float32 if single else torch.float64)
    if whole.dim() != 2 or not whole.numel():
        raise InputError(
            "E_SHAPE", f"A tensor with the shape {list(whole.shape)} has no spectrum.", "It is not a matrix.",
            "Give two dimensions, both at least 1.")  # fmt: skip
    if not torch.isfinite(whole).all():
        raise NumbersError("E_NOT_FINITE", "The matrix holds a NaN or an infinity.", "It has no singular values.")
    small = whole.T if whole.shape[0] < whole.shape[1] else whole
    step = max(1, PANEL // small.shape[1])

    def panels(which: Sequence[int]) -> Any:
        for start in range(0, len(small), step):
            yield [small[start : start + step].clone(memory_format=torch.preserve_format)]

    with one_blas_thread():
        found = decompose_panels(panels, 1, small.shape[1], method=method, k=k, seed=seed, single=single)[0]
    return _spectrum("", "", method, found, (whole.shape[0], whole.shape[1]), None)


def measure_spectra(
    models: Models,
    *,
    of: Sequence[str] = OF,
    method: Method = "gram",
    k: int = 64,
    seed: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> list[Spectrum]:
    """The spectra of all matrices, tensor by tensor in the order of ``models.tensors``, within a tensor: experts,
    merged model, pairs. What is not a matrix (``left_out``) has none.

    ``of``: some of OF; ``k``: how many values a preview computes. Memory: per worker about 150 MB, or two n x n
    matrices of float64 if these are larger. The numbers do not depend on ``threads``. Raises NumbersError
    E_NOT_FINITE, E_OVERFLOW; InputError E_READ, E_INPUT_CHANGED; RecipeError E_RECIPE_FIELD for another method or
    ``of``; Cancelled.
    """
    check_method(method)

    def work(tensor: Compared, workspace: Workspace, pulse: Pulse) -> list[Spectrum]:
        wanted = wanted_sums(tensor, models.names, of)
        found, base = decompose(
            tensor, list(wanted.values()), method=method, k=k, seed=seed, workspace=workspace, pulse=pulse
        )
        return spectra_of(tensor, list(wanted), method, found, base)

    with one_blas_thread():
        each = over_tensors(
            work, matrices_of(models), threads=threads, progress=progress, stop=stop, what="singular values",
            passes=PREVIEW_PASSES if method == "preview" else 1,
        )  # fmt: skip
    models.check_unchanged()
    return [spectrum for spectra in each for spectrum in spectra]


def matrices_of(models: Models) -> list[Compared]:
    """The tensors that have a spectrum."""
    return [tensor for tensor in models.tensors if is_matrix(tensor)]


def left_out(models: Models) -> list[str]:
    """Names of the compared tensors that are not one matrix: vectors, convolution kernels, stacks of matrices."""
    return [tensor.name for tensor in models.tensors if not is_matrix(tensor)]


def wanted_sums(tensor: Compared, names: Sequence[str], of: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Name of a sum of task vectors -> its terms, as places in ``tensor.changed``. RecipeError E_RECIPE_FIELD if
    ``of`` has other words than OF."""
    for word in of:
        _check(word, OF)
    count = len(tensor.experts)
    found: dict[str, tuple[int, ...]] = {}
    if "experts" in of:
        found |= {names[a]: (a,) for a in range(count)}
    if "merged" in of and tensor.merged is not None:
        found[MERGED] = (count,)
    if "pairs" in of:
        found |= {f"{names[a]} + {names[b]}": (a, b) for a in range(count) for b in range(a + 1, count)}
    return found


def spectra_of(
    tensor: Compared, labels: Sequence[str], method: Method, found: Sequence[Decomposition], base: float
) -> list[Spectrum]:
    """Decompositions of one tensor's matrices, as spectra."""
    shape = (tensor.shape[0], tensor.shape[1])
    return [_spectrum(tensor.name, of, method, one, shape, base) for of, one in zip(labels, found, strict=True)]


def check_method(method: str) -> None:
    """RecipeError E_RECIPE_FIELD unless there is such a method."""
    _check(method, METHODS)


def _check(word: str, known: Sequence[str]) -> None:
    if word not in known:
        raise RecipeError("E_RECIPE_FIELD", f"There are no spectra {word!r}.", "", f"Choose of {', '.join(known)}.")


def _spectrum(
    tensor: str, of: str, method: Method, found: Decomposition, shape: tuple[int, int], base: float | None
) -> Spectrum:
    return Spectrum(tensor, of, method, found.values, found.computed, found.frobenius, shape, base)
