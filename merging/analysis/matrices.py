"""Task vectors as matrices: how to get the singular values of a matrix that is never held as a whole.

Let τ be m x n with n the smaller side (of a wide matrix we look at the transpose; singular values do not care). All
that the large side contributes is its *Gram matrix*

    G = τᵀτ  (n x n),     G v_i = σ_i² v_i,

a sum over *panels*, groups of rows of τ, which are read one after the other. So memory holds n² numbers whatever m is,
and three ways lead to σ and to the first vectors v (orthonormal on the small side):

* ``gram``: the eigenvalues of G by LAPACK. Squaring costs small values their digits: with arithmetic of precision ε,
  σ_i is off by about ε σ_1² / 2σ_i, at most √ε σ_1. In float64 that is 10⁻¹⁵ σ_1 at the top, and values below
  10⁻⁷ σ_1 mean "0". Float32 is faster and serves well where few values are small: it is used for large
  matrices of 16-bit weights of which no more than 5 % of the values lie below 0.003 σ_1. Those are then off by up to
  10⁻⁴ σ_1 and the others by up to 10⁻⁵ σ_1. Whoever asks for vectors gets float64.
* ``exact``: panels are rotated into one triangular factor, R ← qr([R; panel]), and R has the singular values of τ;
  the error is about 10⁻¹⁵ σ_1 for all of them. (A tall-skinny QR: Demmel et al. 2012, SIAM J. Sci. Comput. 34.)
* ``preview``: the leading k by two rounds of randomised subspace iteration (Halko, Martinsson and Tropp 2011, SIAM
  Review 53, algorithm 4.4), never above the truth; the rest is estimated from ‖τ‖_F, which is known exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import NumbersError
from ..methods import Workspace
from ..methods.lazy_torch import torch
from .models import Compared
from .panels import refuse, task_vector_panels
from .passes import Pulse

if TYPE_CHECKING:
    from torch import Tensor

GRAM_BYTES = 96 << 20
"""Gram matrices that a worker holds at a time (at least one)."""
SINGLE_FROM, UNSURE, MOST_UNSURE = 256, 0.003, 0.05
"""Float32 serves from this n on, if at most 5 % of the values lie below 0.003 σ_1 (else float64 is used)."""
FOLD = 4096
"""Rows whose Gram matrix is summed up in float32, before it is added to the total in float64."""
HARMLESS = 40
"""Powers of two that need no scaling."""
OVERSAMPLING, ROUNDS = 16, 2
"""Of the preview: vectors beside the wanted ones, and multiplications by G."""
PREVIEW_PASSES = ROUNDS + 1

Method = Literal["gram", "exact", "preview"]
METHODS: tuple[Method, ...] = ("gram", "exact", "preview")
Panels = Callable[[Sequence[int]], Iterator["list[Tensor]"]]
"""``panels(which)``: one pass over those of several matrices of one shape: their panels (rows x n, compute dtype), one
per matrix. They may be overwritten by the receiver and are by the next step."""


@dataclass(slots=True)
class Decomposition:
    """What is known of one matrix."""

    values: np.ndarray
    """n singular values, float64, descending."""
    computed: int
    """So many of them are computed; the others are estimated."""
    frobenius: float
    """‖τ‖_F."""
    vectors: np.ndarray | None = None
    """n x k: the singular vectors of the small side that belong to the first k values, if asked for."""


def decompose(
    tensor: Compared,
    wanted: Sequence[tuple[int, ...]],
    *,
    method: Method = "gram",
    vectors: int = 0,
    k: int = 64,
    seed: int = 0,
    workspace: Workspace | None = None,
    pulse: Pulse = lambda elements: None,
) -> tuple[list[Decomposition], float]:
    """The decompositions of sums of task vectors of one tensor, and ‖W_0‖_F.

    ``wanted``: of each sum the numbers of its terms, places in ``tensor.changed``: (0,) is the first task vector,
    (0, 1) the sum of the first two. ``vectors``: how many singular vectors to keep; ``k``: how many values a preview
    computes. What is found for one sum does not depend on the others. Usually goes over the weights once, a preview
    ``PREVIEW_PASSES`` times. Raises NumbersError E_NOT_FINITE, E_OVERFLOW; InputError E_READ, E_INPUT_CHANGED.
    """
    workspace = workspace or Workspace()
    n = min(tensor.shape)
    held = {"gram": 1, "exact": 3, "preview": 0}[method] * 8 * n * n
    at_once = max(1, GRAM_BYTES // held if held else len(wanted))
    rounds = [wanted[start : start + at_once] for start in range(0, len(wanted), at_once)]
    squares: list[float] = []
    found: list[Decomposition] = []
    for number, sums in enumerate(rounds):

        def panels(
            which: Sequence[int], sums: Sequence[tuple[int, ...]] = sums, first: bool = number == 0
        ) -> Iterator[list[Tensor]]:
            counting = first and not squares
            for base, parts in task_vector_panels(tensor, [sums[i] for i in which], workspace):
                if counting:
                    squares.append(float(torch.linalg.vector_norm(base, dtype=torch.float64)) ** 2)
                pulse(base.numel())
                yield parts

        found += decompose_panels(
            panels, len(sums), n, method=method, vectors=vectors, k=k, seed=seed,
            single=tensor.dtype == torch.float32, refuse=lambda: refuse(tensor),
        )  # fmt: skip
    return found, sum(squares) ** 0.5


def decompose_panels(
    panels: Panels,
    count: int,
    n: int,
    *,
    method: Method,
    vectors: int = 0,
    k: int = 64,
    seed: int = 0,
    single: bool = False,
    refuse: Callable[[], Any] = lambda: None,
) -> list[Decomposition]:
    """The decompositions of ``count`` matrices with n columns.

    ``single``: the panels are float32, and so may the arithmetic be. ``refuse`` is called if numbers are not finite.
    """
    exponents: list[int | None] = [None] * count

    def scaled(which: Sequence[int]) -> Iterator[list[Tensor]]:
        for parts in panels(which):
            for i, part in zip(which, parts, strict=True):
                exponents[i] = _scale(part, exponents[i])
            yield parts

    if method == "preview":
        found = _by_sampling(scaled, count, n, max(vectors, k), vectors, seed)
    elif method == "exact":
        found = _by_rotation(scaled, count, n, vectors)
    else:
        found = _by_gram(scaled, count, n, vectors, single and not vectors and n >= SINGLE_FROM)
    for i, one in enumerate(found):
        with np.errstate(over="ignore"):
            one.values, one.frobenius = (
                np.ldexp(one.values, exponents[i] or 0),
                float(np.ldexp(one.frobenius, exponents[i] or 0)),
            )
        if not (np.isfinite(one.frobenius) and np.isfinite(one.values).all()):
            refuse()
            raise NumbersError(
                "E_OVERFLOW", "A matrix is too large for its singular values to be told.",
                "They exceed what a 64-bit number can hold.", "Use another checkpoint.")  # fmt: skip
    return found


def _scale(part: Tensor, exponent: int | None) -> int | None:
    """Divide by 2^exponent, so that squares neither overflow nor vanish; None: not known yet, found from this panel."""
    if exponent is None:
        largest = float(part.abs().max())
        if largest == 0 or not math.isfinite(largest):
            return None
        exponent = math.frexp(largest)[1]
        most = 120 if part.dtype == torch.float32 else 1000
        exponent = 0 if abs(exponent) < HARMLESS else max(-most, min(most, exponent))
    if exponent:
        part.mul_(2.0**-exponent)
    return exponent


# ------------------------------------------------------------------------------------------------ three ways


def _by_gram(panels: Panels, count: int, n: int, vectors: int, single: bool) -> list[Decomposition]:
    found: dict[int, Decomposition] = {}
    for dtype in (np.float32, np.float64) if single else (np.float64,):
        left = [i for i in range(count) if i not in found]
        grams = _grams(panels, left, n, dtype) if left else []
        for i in left:
            gram = grams.pop(0)
            energy = float(np.trace(gram, dtype=np.float64))
            if not math.isfinite(energy):
                found[i] = Decomposition(np.full(n, np.nan), n, energy)
                continue
            squares, basis = eigen(gram, vectors)
            del gram
            values = np.sqrt(np.maximum(squares, 0))
            if dtype is np.float64 or (values < UNSURE * values[0]).sum() <= MOST_UNSURE * n:
                found[i] = Decomposition(values, n, math.sqrt(energy), basis)
    return [found[i] for i in range(count)]


def _grams(panels: Panels, which: Sequence[int], n: int, dtype: Any) -> list[np.ndarray]:
    """The Gram matrices of some of the matrices: lower triangles, Fortran order, float32 or float64."""
    grams = [np.zeros((n, n), dtype, order="F") for _ in which]
    totals: list[np.ndarray] = []
    rows = 0
    for parts in panels(which):
        if rows + len(parts[0]) > FOLD and dtype is np.float32:
            totals = totals or [np.zeros((n, n), order="F") for _ in which]
            for total, gram in zip(totals, grams, strict=True):
                total += gram
                gram.fill(0)
            rows = 0
        rows += len(parts[0])
        for i, part in enumerate(parts):
            grams[i] = add_gram(grams[i], part)
    for i, total in enumerate(totals):
        grams[i] = (total + grams[i]).astype(dtype, order="F")
    return grams


def add_gram(gram: np.ndarray, panel: Tensor) -> np.ndarray:
    """gram + panelᵀ panel in the lower triangle of ``gram`` (n x n, Fortran order), whose memory is reused; its type,
    float32 or float64, is that of the arithmetic."""
    from scipy.linalg import blas

    single = gram.dtype == np.float32
    rows = panel.to(torch.float32 if single else torch.float64)
    # BLAS counts columns first: a panel in row order is its transpose, the one that was turned is itself.
    values, turned = (rows.numpy().T, 0) if rows.is_contiguous() else (rows.numpy(), 1)
    multiply = blas.ssyrk if single else blas.dsyrk
    return multiply(1.0, values, beta=1.0, c=gram, trans=turned, lower=1, overwrite_c=1)


def eigen(gram: np.ndarray, vectors: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """(all eigenvalues, descending; eigenvectors of the first ``vectors`` as columns) of the symmetric matrix in the
    lower triangle of ``gram`` (float32 or float64, Fortran order, destroyed).

    One reduction to a tridiagonal matrix serves both: G = Q T Qᵀ, the eigenvalues of T are cheap, and so are a few of
    its eigenvectors z (relatively robust representations), of which Q z are those of G.
    """
    from scipy.linalg import eigh_tridiagonal, lapack

    n, vectors = len(gram), min(vectors, len(gram))
    if n == 1:
        return gram[0].astype(np.float64), np.ones((1, 1)) if vectors else None
    reduce, needed = lapack.get_lapack_funcs(("sytrd", "sytrd_lwork"), (gram,))
    work, _ = needed(n, lower=1)
    reflectors, diagonal, beside, factors, _ = reduce(gram, lower=1, lwork=int(work), overwrite_a=1)
    diagonal, beside = diagonal.astype(np.float64), beside.astype(np.float64)
    values, failed = lapack.dsterf(diagonal, beside)
    if failed:
        raise np.linalg.LinAlgError(f"{failed} eigenvalues did not converge")
    if not vectors:
        return values[::-1].copy(), None
    _, small = eigh_tridiagonal(diagonal, beside, select="i", select_range=(n - vectors, n - 1))
    basis = small[:, ::-1].copy(order="F")
    turn, factors = np.asfortranarray(reflectors[1:, :-1], np.float64), factors.astype(np.float64)
    _, work, _ = lapack.dormqr("L", "N", turn, factors, basis[1:], -1)
    basis[1:], _, _ = lapack.dormqr("L", "N", turn, factors, basis[1:], int(work[0]))
    return values[::-1].copy(), np.ascontiguousarray(basis)


def _by_rotation(panels: Panels, count: int, n: int, vectors: int) -> list[Decomposition]:
    stacks = [torch.empty((3 * n, n), dtype=torch.float64) for _ in range(count)]
    filled = [0] * count
    squares = [0.0] * count
    for parts in panels(range(count)):
        for i, part in enumerate(parts):
            squares[i] += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
            for rows in part.split(2 * n):
                if filled[i] + len(rows) > 3 * n:
                    stacks[i][:n] = torch.linalg.qr(stacks[i][: filled[i]], mode="r").R
                    filled[i] = n
                stacks[i][filled[i] : filled[i] + len(rows)] = rows
                filled[i] += len(rows)
    found = []
    for i in range(count):
        factor, basis = stacks[i][: filled[i]], None
        stacks[i] = torch.empty(0)
        if not math.isfinite(squares[i]):
            values = torch.full((n,), math.nan)
        elif vectors:
            _, values, turned = torch.linalg.svd(factor, full_matrices=False)
            basis = turned[:vectors].T.contiguous().numpy()
        else:
            values = torch.linalg.svdvals(factor)
        found.append(Decomposition(values.numpy(), n, math.sqrt(squares[i]), basis))
    return found


def _by_sampling(panels: Panels, count: int, n: int, k: int, vectors: int, seed: int) -> list[Decomposition]:
    width = min(n, k + OVERSAMPLING)
    start = torch.randn((n, width), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bases = [torch.linalg.qr(start).Q for _ in range(count)]
    squares = [0.0] * count
    for _ in range(ROUNDS):  # Q ← an orthonormal basis of G Q
        products = [torch.zeros((n, width), dtype=torch.float64) for _ in range(count)]
        for parts in panels(range(count)):
            for i, part in enumerate(parts):
                products[i] += part.T @ (part @ bases[i].to(part.dtype))
        if all(bool(torch.isfinite(product).all()) for product in products):
            bases = [torch.linalg.qr(product).Q for product in products]
    small = [torch.zeros((width, width), dtype=torch.float64) for _ in range(count)]
    for parts in panels(range(count)):  # Qᵀ G Q, whose eigenvalues are the best that can be said from within Q
        for i, part in enumerate(parts):
            squares[i] += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
            image = (part @ bases[i].to(part.dtype)).double()
            small[i] += image.T @ image
    found = []
    for basis, inner, energy in zip(bases, small, squares, strict=True):
        if not math.isfinite(energy):
            found.append(Decomposition(np.full(n, np.nan), n, energy))
            continue
        eigenvalues, turn = torch.linalg.eigh(inner)
        head = eigenvalues.clamp(min=0).sqrt().flip(0).numpy()
        head = head if width == n else head[:k]
        leading = (basis @ turn.flip(1)[:, :vectors]).numpy() if vectors else None
        values = np.concatenate([head, estimated_tail(head, energy, n - len(head))])
        found.append(Decomposition(values, len(head), math.sqrt(energy), leading))
    return found


def estimated_tail(head: np.ndarray, energy: float, count: int) -> np.ndarray:
    """``count`` values that follow ``head`` and bring Σ σ² to ``energy``: σ_k (1 − i / (count + 1))^p, i = 1, 2, …

    p is chosen to fit the energy: 0 is a plateau, 1/2 … 1 the shape of noise, and large p a steep fall. (Should the
    head be so far below the truth that even a plateau has too little energy, the plateau is taken.)
    """
    if count <= 0:
        return np.zeros(0)
    last = float(head[-1]) if len(head) else math.sqrt(energy / count)
    rest = max(0.0, energy - float(head @ head))
    if last == 0 or rest <= 0:
        return np.zeros(count)
    if rest >= count * last**2:
        return np.full(count, last)
    ramp = np.log1p(-np.arange(1, count + 1) / (count + 1))
    low, high = 0.0, 1e6
    for _ in range(100):
        p = (low + high) / 2
        low, high = (p, high) if float(np.exp(2 * p * ramp).sum()) * last**2 > rest else (low, p)
    return last * np.exp(high * ramp)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """The workers are the parallelism, and one thread always adds in the same order. Forked workers inherit this."""
    import scipy.linalg  # noqa: F401 - its BLAS must be there to be limited
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield
