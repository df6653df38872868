"""How the changes of one tensor are distributed: a histogram of τ for every expert, read from the files when asked for.

All experts share one range, from −max |τ| to max |τ|, so that their shapes compare. A normal bell says that everything
moved a little; heavy tails say that few weights moved far, and that trimming loses little. Nothing but counts is kept.
Of tensors with more than ``MOST`` elements evenly spaced runs are read, so that an answer takes well under a second;
the histogram then says that it is sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..checkpoints.checkpoint import Source
from ..checkpoints.low_rank import read_float64
from ..errors import InputError
from ..user_folders import cache_folder
from .cache import Cache, fingerprint, key_of
from .inspection import Inspection
from .models import MERGED, open_models

BINS = 121
"""Odd, so that one bin lies around 0."""
RUN, MOST = 1 << 16, 1 << 22
"""Elements that are read at a time, and of each model in all."""


@dataclass(slots=True)
class Histogram:
    """τ of one tensor, for each model."""

    tensor: str
    names: list[str]
    """Experts, then the merged model, if it has the tensor."""
    limit: float
    """The bins divide [−limit, limit] evenly; limit is the largest |τ| that was read."""
    counts: np.ndarray
    """[models, BINS]"""
    read: int
    """Elements that were read of each model."""
    numel: int

    @property
    def exact(self) -> bool:
        return self.read == self.numel

    @property
    def centres(self) -> np.ndarray:
        return (np.arange(BINS) - BINS // 2) * (2 * self.limit / BINS)


def histogram_of(result: Inspection, tensor: str, cache: Cache | None = None) -> Histogram:
    """The histogram of a compared tensor of the models that ``result`` is about; kept in the cache of inspections.

    Raises InputError E_MISSING_TENSOR if there is no such tensor, E_INPUT_CHANGED if the files are no longer those that
    were inspected, and what ``open_models`` raises.
    """
    kept = Cache(cache_folder("analysis")) if cache is None else cache
    identity = [[who, facts["fingerprint"]] for who, facts in result.models.items()]
    key = key_of({"part": "histogram", "models": identity, "tensor": tensor, "bins": BINS, "run": RUN, "most": MOST})
    found = kept.read(key, (Histogram,))
    if isinstance(found, Histogram):
        return found
    reference = result.reference
    with open_models(reference["base"], reference["experts"], reference["merged"], offline=True) as models:
        if identity != [[who, fingerprint(model)] for who, model in models.checkpoints.items()]:
            what, fix = "The models have changed since they were analysed.", "Analyse them again."
            raise InputError("E_INPUT_CHANGED", what, "", fix)
        compared = next((one for one in models.tensors if one.name == tensor), None)
        if compared is None:
            raise InputError("E_MISSING_TENSOR", f"There is no compared tensor {tensor[:200]!r}.")
        names = [*models.names, *([MERGED] if compared.merged is not None else [])]
        limit, counts, read = count(compared.base, compared.changed)
    histogram = Histogram(tensor, names, limit, counts, read, compared.numel)
    kept.write(key, histogram)
    return histogram


def count(base: Source, changed: list[Source], most: int = MOST) -> tuple[float, np.ndarray, int]:
    """(limit, counts [models, BINS], elements read of each) of W_k − W_0. Not finite differences are not counted."""
    limit, read = 0.0, 0
    for start, stop in runs(base.numel, most):
        read += stop - start
        for tau in _task_vectors(base, changed, start, stop):
            limit = max(limit, float(np.abs(tau[np.isfinite(tau)]).max(initial=0.0)))
    counts = np.zeros((len(changed), BINS), np.int64)
    for start, stop in runs(base.numel, most):
        for own, tau in zip(counts, _task_vectors(base, changed, start, stop), strict=True):
            own += np.histogram(tau[np.isfinite(tau)], BINS, (-limit or -1.0, limit or 1.0))[0]
    return limit, counts, read


def runs(numel: int, most: int = MOST) -> Iterator[tuple[int, int]]:
    """Ranges of elements: all, or so many evenly spaced ones that ``most`` elements are in them."""
    whole, wanted = -(-numel // RUN), max(1, most // RUN)
    for i in range(min(whole, wanted)):
        number = i * whole // min(whole, wanted)
        yield number * RUN, min(numel, (number + 1) * RUN)


def _task_vectors(base: Source, changed: list[Source], start: int, stop: int) -> Iterator[np.ndarray]:
    below = read_float64(base, start, stop)
    for source in changed:
        yield read_float64(source, start, stop) - below
