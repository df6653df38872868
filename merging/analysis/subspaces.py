"""Subspaces: do two task vectors use the same directions?

The k strongest directions of a task vector τ = U Σ Vᵀ span one subspace among its outputs (left, U) and one among its
inputs (right, V). Two experts whose subspaces are orthogonal can be added without disturbing each other; where they
overlap, their changes add up or cancel. How much they overlap is told by the singular values of U_aᵀU_b, the cosines of
the *principal angles* between the subspaces (Björck and Golub 1973).

    overlap   ‖U_aᵀU_b‖_F² / k = mean of cos² θ_i: 1 for the same subspace, 0 for orthogonal ones; two random ones in m
              dimensions have k / m, which is given beside it;
    distance  √Σ θ_i², the length of the shortest path between the two on the Grassmann manifold;
    cosine    ⟨τ_a, τ_b⟩ of the rank-k parts: its sign tells adding up from cancelling.

*Singular task interference* (Gargiulo et al. 2025, "Task Singular Vectors", arXiv 2412.00081) asks for both sides at
once: with U = [U_1 … U_T], V = [V_1 … V_T] and Σ on the diagonal, it is ‖(UᵀU − I) Σ (VᵀV − I)‖₁, the sum of all
entries' sizes. It grows with the task vectors; divided by Σσ it has no unit.

Only k x k matrices are needed for all this. With v the singular vectors of the smaller side (see ``matrices``), a
second pass over the weights gives the other side as τ v = σ u.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ..errors import RecipeError
from ..methods import Workspace
from ..methods.lazy_torch import torch
from .matrices import PREVIEW_PASSES, Decomposition, Method, decompose, one_blas_thread
from .models import MERGED, Compared, Models
from .panels import task_vector_panels
from .passes import Progress, Pulse, over_tensors
from .spectra import OF, Spectrum, check_method, matrices_of, spectra_of, wanted_sums

NUMERICALLY_ZERO = 1e-5
"""Directions with σ below this times σ_1 are not counted: they would be rounding errors."""


@dataclass(slots=True)
class Overlap:
    """Two task vectors of one tensor, at one rank. Left: outputs (rows); right: inputs (columns)."""

    a: str
    b: str
    rank: int
    """k: the wanted rank, or less if one of the two has fewer directions. 0 (a task vector is zero): all else is empty
    or None."""
    angles_left: np.ndarray
    """Principal angles in radians, ascending, k of them. (Below 10⁻⁵ means 0.)"""
    angles_right: np.ndarray
    expected_left: float
    """Overlap of two random subspaces: k / rows."""
    expected_right: float
    cosine: float | None
    """Of the two rank-k parts."""
    interference: float | None
    """Singular task interference of the two."""
    interference_relative: float | None
    """The same divided by the sum of all 2 k singular values."""
    kept_left: float | None = None
    """If b is the merged model: subspace alignment ratio ‖U_b U_bᵀ τ_a‖_F / ‖τ_a‖_F (Marczak et al. 2025, arXiv
    2502.04959, eq. 5, there with a k of its own), of the whole τ_a and the rank-k subspace of b."""
    kept_right: float | None = None
    """The same for inputs: ‖τ_a V_b V_bᵀ‖_F / ‖τ_a‖_F."""

    @property
    def overlap_left(self) -> float | None:
        return overlap(self.angles_left)

    @property
    def overlap_right(self) -> float | None:
        return overlap(self.angles_right)

    @property
    def distance_left(self) -> float | None:
        return grassmann_distance(self.angles_left)

    @property
    def distance_right(self) -> float | None:
        return grassmann_distance(self.angles_right)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        names = ("overlap_left", "overlap_right", "distance_left", "distance_right")
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in (fields | {name: getattr(self, name) for name in names}).items()
        }


@dataclass(slots=True)
class TensorSubspaces:
    """All pairs of one tensor."""

    name: str
    block: int | None
    kind: str
    pairs: list[Overlap]
    """Experts (0,1), (0,2), …, (1,2), …, then each expert with the merged model, if it has the tensor."""
    interference: float | None
    """Singular task interference of all experts together; None for one expert."""
    interference_relative: float | None
    """The same divided by the sum of all singular values that took part."""


@dataclass(slots=True)
class Subspaces:
    """What ``measure_subspaces`` found."""

    names: list[str]
    rank: int
    """The wanted k."""
    method: Method
    """How the vectors were found: "gram" and "exact" agree, "preview" is an estimate."""
    tensors: list[TensorSubspaces]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        tensors = [
            {
                "name": one.name,
                "block": one.block,
                "kind": one.kind,
                "pairs": [pair.as_dict() for pair in one.pairs],
                "interference": one.interference,
                "interference_relative": one.interference_relative,
            }
            for one in self.tensors
        ]
        return {"names": self.names, "rank": self.rank, "method": self.method, "tensors": tensors}


# ------------------------------------------------------------------------------------------------ on small matrices


def principal_angles(cross: np.ndarray) -> np.ndarray:
    """Angles between two subspaces in radians, ascending, from ``cross`` = U_aᵀU_b of orthonormal bases."""
    return np.arccos(np.clip(np.linalg.svd(cross, compute_uv=False), 0.0, 1.0))


def overlap(angles: np.ndarray) -> float | None:
    """Mean of cos² θ, that is ‖U_aᵀU_b‖_F² / k; None for no angles."""
    return float(np.mean(np.cos(angles) ** 2)) if angles.size else None


def grassmann_distance(angles: np.ndarray) -> float | None:
    """√Σ θ², radians; at most √k π/2. None for no angles."""
    return float(np.sqrt(np.sum(angles**2))) if angles.size else None


def singular_task_interference(
    left: np.ndarray, values: Sequence[np.ndarray], right: np.ndarray
) -> tuple[float, float | None]:
    """(‖(UᵀU − I) Σ (VᵀV − I)‖₁, the same divided by Σσ or None if that is 0).

    ``left`` = UᵀU and ``right`` = VᵀV for bases side by side, U = [U_1 … U_T]; ``values``: σ of each task.
    """
    sigma = np.concatenate(list(values))
    identity = np.eye(len(sigma))
    total = float(np.abs((left - identity) @ (sigma[:, None] * (right - identity))).sum())
    return total, total / float(sigma.sum()) if sigma.sum() > 0 else None


# ------------------------------------------------------------------------------------------------ on models


def measure_subspaces(
    models: Models,
    *,
    rank: int = 16,
    method: Method = "gram",
    seed: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Subspaces:
    """The subspaces of all matrices at one rank; see ``measure_both``."""
    return measure_both(
        models, of=(), rank=rank, method=method, seed=seed, threads=threads, progress=progress, stop=stop
    )[1]


def measure_both(
    models: Models,
    *,
    of: Sequence[str] = OF,
    rank: int = 16,
    method: Method = "gram",
    k: int = 64,
    seed: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> tuple[list[Spectrum], Subspaces]:
    """What ``measure_spectra`` and ``measure_subspaces`` give, with the decompositions that both need made once.

    ``rank``: directions per task vector, at least 1. Raises RecipeError E_RECIPE_FIELD for another rank, method or
    ``of``; NumbersError E_NOT_FINITE, E_OVERFLOW; InputError E_READ, E_INPUT_CHANGED; Cancelled.
    """
    check_method(method)
    check_rank(rank)

    def work(tensor: Compared, workspace: Workspace, pulse: Pulse) -> tuple[list[Spectrum], TensorSubspaces]:
        asked = wanted_sums(tensor, models.names, of)
        single = wanted_sums(tensor, models.names, ("experts", "merged"))
        sums = {name: terms for name, terms in asked.items() if len(terms) > 1}
        found, base = decompose(
            tensor, list(single.values()), method=method, vectors=rank, k=k, seed=seed, workspace=workspace,
            pulse=pulse,
        )  # fmt: skip
        summed, _ = decompose(
            tensor, list(sums.values()), method=method, k=k, seed=seed, workspace=workspace, pulse=pulse
        )
        known = dict(zip([*single, *sums], [*found, *summed], strict=True))
        spectra = spectra_of(tensor, list(asked), method, [known[name] for name in asked], base)
        return spectra, _subspaces(tensor, dict(zip(single, found, strict=True)), rank, workspace, pulse)

    each_pass = PREVIEW_PASSES if method == "preview" else 1
    with one_blas_thread():
        each = over_tensors(
            work, matrices_of(models), threads=threads, progress=progress, stop=stop, what="subspaces",
            passes=1 + each_pass * (2 if "pairs" in of else 1),
        )  # fmt: skip
    models.check_unchanged()
    spectra = [spectrum for several, _ in each for spectrum in several]
    return spectra, Subspaces(list(models.names), rank, method, [one for _, one in each])


def _subspaces(
    tensor: Compared, found: Mapping[str, Decomposition], rank: int, workspace: Workspace, pulse: Pulse
) -> TensorSubspaces:
    names = list(found)
    ranks = [min(rank, numerical_rank(one.values[: one.computed])) for one in found.values()]
    bases = [one.vectors[:, :r] for one, r in zip(found.values(), ranks, strict=True) if one.vectors is not None]
    sizes = [one.frobenius for one in found.values()]
    large, kept_large, kept_small = _other_side(tensor, bases, sizes, workspace, pulse)
    small = {(a, b): bases[a].T @ bases[b] for a in range(len(bases)) for b in range(len(bases))}
    is_tall = tensor.shape[0] >= tensor.shape[1]
    left, right = (large, small) if is_tall else (small, large)
    kept_left, kept_right = (kept_large, kept_small) if is_tall else (kept_small, kept_large)
    values = [one.values[:r] for one, r in zip(found.values(), ranks, strict=True)]

    def pair(a: int, b: int) -> Overlap:
        k = min(ranks[a], ranks[b])
        one, other = left[a, b][:k, :k], right[a, b][:k, :k]
        expected = k / tensor.shape[0], k / tensor.shape[1]
        if k == 0:
            nothing = np.zeros(0)
            return Overlap(names[a], names[b], 0, nothing, nothing, *expected, None, None, None)
        # ⟨U_a Σ_a V_aᵀ, U_b Σ_b V_bᵀ⟩ = Σ_ij σ_ai σ_bj (u_ai·u_bj)(v_ai·v_bj)
        product = float(values[a][:k] @ (one * other) @ values[b][:k])
        norms = float(np.linalg.norm(values[a][:k]) * np.linalg.norm(values[b][:k]))
        result = Overlap(
            names[a], names[b], k, principal_angles(one), principal_angles(other), *expected, product / norms,
            *_interference(left, right, values, [(a, k), (b, k)]),
        )  # fmt: skip
        if names[b] == MERGED:
            result.kept_left, result.kept_right = kept_left[a], kept_right[a]
        return result

    experts = [i for i, name in enumerate(names) if name != MERGED]
    pairs = [pair(a, b) for a, b in combinations(experts, 2)]
    if MERGED in names:
        pairs += [pair(a, names.index(MERGED)) for a in experts]
    together: tuple[float | None, float | None] = (None, None)
    if len(experts) > 1:
        together = _interference(left, right, values, [(i, ranks[i]) for i in experts])
    return TensorSubspaces(tensor.name, tensor.block, tensor.kind, pairs, *together)


Crosses = Mapping[tuple[int, int], np.ndarray]
"""(a, b) -> U_aᵀU_b."""


def _interference(
    left: Crosses, right: Crosses, values: Sequence[np.ndarray], who: Sequence[tuple[int, int]]
) -> tuple[float, float | None]:
    """``singular_task_interference`` of some task vectors, each with its first so many directions."""

    def side_by_side(cross: Crosses) -> np.ndarray:
        return np.block(
            [[np.eye(k) if a == b else cross[a, b][:k, :m] for b, m in who] for a, k in who],
        )

    return singular_task_interference(side_by_side(left), [values[a][:k] for a, k in who], side_by_side(right))


def _other_side(
    tensor: Compared, bases: Sequence[np.ndarray], sizes: Sequence[float], workspace: Workspace, pulse: Pulse
) -> tuple[Crosses, list[float], list[float]]:
    """From orthonormal bases v of the smaller side: products U_aᵀU_b of the larger side, u = τ v / ‖τ v‖, and, if the
    last basis is the merged model's, ‖U_mᵀτ_a‖_F and ‖τ_a V_m‖_F, both divided by ‖τ_a‖_F, of each (else zeros)."""
    count, n = len(bases), min(tensor.shape)
    vectors = [torch.from_numpy(np.ascontiguousarray(basis)) for basis in bases]
    products = {(a, b): np.zeros((bases[a].shape[1], bases[b].shape[1])) for a in range(count) for b in range(count)}
    with_merged = tensor.merged is not None
    images = [torch.zeros((n, bases[-1].shape[1]), dtype=torch.float64) for _ in range(count if with_merged else 0)]
    small = np.zeros(count)
    for base, parts in task_vector_panels(tensor, [(a,) for a in range(count)], workspace):
        wide = [part.double().mul_(1 / size if size else 1.0) for part, size in zip(parts, sizes, strict=True)]
        turned = [(part @ v).numpy() for part, v in zip(wide, vectors, strict=True)]
        for a, b in products:
            products[a, b] += turned[a].T @ turned[b]
        if with_merged:
            of_merged = torch.from_numpy(turned[-1])
            for a, part in enumerate(wide):
                images[a] += part.T @ of_merged
                small[a] += float(torch.linalg.vector_norm(part @ vectors[-1])) ** 2
        pulse(base.numel())
    norms = [np.sqrt(np.diag(products[a, a])) for a in range(count)]
    crosses = {(a, b): product / np.outer(norms[a], norms[b]) for (a, b), product in products.items()}
    large = [float(np.linalg.norm(image.numpy() / norms[-1])) for image in images] or [0.0] * count
    return crosses, large, np.sqrt(small).tolist()


def check_rank(rank: int) -> None:
    """RecipeError E_RECIPE_FIELD unless there can be so many directions."""
    if rank < 1:
        what, why = f"The rank {rank} makes no sense.", "It is a number of directions."
        raise RecipeError("E_RECIPE_FIELD", what, why, "Give a whole number from 1 on, for example 16.")


def numerical_rank(values: np.ndarray) -> int:
    """Number of singular values above 10⁻⁵ σ_1."""
    return int((values > NUMERICALLY_ZERO * values[0]).sum()) if values.size else 0
