"""A second outside opinion, live: peft's merging helpers, for TIES and DARE with equal weights.

Only the one file `peft/utils/merge_utils.py` is loaded (importing all of peft takes seconds). It works on
lists of task vectors, without a base. With equal weights its rules and ours coincide; with unequal ones they
do not, on purpose: peft votes with unweighted task vectors and divides by the number of agreeing models,
ours (as mergekit) votes with weighted ones and divides by the sum of the agreeing weights.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.oracles import reference

torch = pytest.importorskip("torch", reason="the peft comparison needs torch")
TOLERANCE = 5e-7  # peft works in float32 on values of a few units; measured 1.2e-7 (TIES), 8e-7 (DARE at 0.3)


@pytest.fixture(scope="module")
def merge_utils() -> Any:
    found = importlib.util.find_spec("peft")
    if found is None or found.origin is None:
        pytest.skip("peft is not installed: the live comparison of TIES and DARE with peft did not run")
    path = Path(found.origin).parent / "utils" / "merge_utils.py"
    spec = importlib.util.spec_from_file_location("peft_merge_utils", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def task_vectors(seed: int, count: int, shape: tuple[int, ...]) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape).astype(np.float32) for _ in range(count)]


def difference(ours: np.ndarray, theirs: Any) -> float:
    return float(np.max(np.abs(ours - theirs.double().numpy())))


@pytest.mark.parametrize("density", [0.9, 0.5, 0.2])
@pytest.mark.parametrize(("count", "shape"), [(2, (8, 9)), (3, (50,)), (5, (4, 5, 6))])
def test_ties(merge_utils: Any, density: float, count: int, shape: tuple[int, ...]) -> None:
    deltas = task_vectors(count, count, shape)
    theirs = merge_utils.ties([torch.from_numpy(d) for d in deltas], torch.ones(count), density)
    ours = reference.ties(np.zeros(shape), deltas, 1.0, density)
    assert difference(ours, theirs) <= TOLERANCE
    assert np.array_equal(ours != 0, theirs.numpy() != 0)


@pytest.mark.parametrize("density", [0.8, 0.5, 0.3])
@pytest.mark.parametrize("consensus", [False, True])
def test_dare(merge_utils: Any, density: float, consensus: bool) -> None:
    count, shape = 3, (12, 10)
    deltas = task_vectors(7, count, shape)
    merge = merge_utils.dare_ties if consensus else merge_utils.dare_linear
    torch.manual_seed(11)
    theirs = merge([torch.from_numpy(d) for d in deltas], torch.ones(count), density)
    torch.manual_seed(11)  # the same draws again, on ones, show which entries were kept
    masks = [
        merge_utils.random_pruning(torch.ones(shape), density, rescale=False).numpy() != 0 for _ in deltas
    ]
    ours = reference.dare(
        np.zeros(shape), deltas, 1.0, density, masks, consensus=consensus, normalize=consensus
    )
    assert difference(ours, theirs) <= TOLERANCE / density
    assert 0 < sum(mask.sum() for mask in masks) < count * ours.size


def test_unequal_weights_differ_as_documented(merge_utils: Any) -> None:
    deltas = task_vectors(3, 3, (30,))
    weights = [0.2, 0.5, 1.1]
    theirs = merge_utils.ties([torch.from_numpy(d) for d in deltas], torch.tensor(weights), 0.5)
    assert difference(reference.ties(np.zeros(30), deltas, weights, 0.5), theirs) > 0.1
