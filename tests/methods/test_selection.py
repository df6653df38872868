"""Order statistics against sorting: with ties, skew, misleading samples and too little room."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.methods import selection
from merging.methods.base import BLOCK, Block, Workspace
from merging.methods.scan import BlockScan, TensorInputs, memory_reader
from merging.methods.selection import order_statistics


def scan_of(*tensors: np.ndarray) -> BlockScan:
    """A model whose only "expert" holds the numbers."""
    return BlockScan(
        [
            TensorInputs(f"t{i}", x.size, torch.from_numpy(x).dtype, None, [memory_reader(torch.from_numpy(x))])
            for i, x in enumerate(tensors)
        ],
        Workspace(),
    )


def check(tensors: list[np.ndarray], ranks: list[int], counting: Callable[[], None] = lambda: None) -> None:
    """One series as it is, one negated."""

    def keys(block: Block) -> list[torch.Tensor]:
        counting()
        return [block.experts[0], -block.experts[0]]

    found = order_statistics(scan_of(*tensors), keys, [ranks, ranks])
    everything = np.concatenate(tensors)
    for sign, group in zip((1, -1), found, strict=True):
        ordered = np.sort(sign * everything)
        assert len(group) == len(ranks)
        for rank, statistic in zip(ranks, group, strict=True):
            value = ordered[min(max(rank, 0), ordered.size - 1)]
            assert statistic.value == value
            assert statistic.below == np.count_nonzero(ordered < value)
            assert statistic.equal == np.count_nonzero(ordered == value)


SIZE = 6 * BLOCK + 1000


def in_bfloat16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().float().numpy()


rng = np.random.default_rng(5)
KINDS = {
    "continuous": rng.standard_normal(SIZE),
    "of few values": rng.integers(-2, 3, SIZE).astype(float),
    "half of them equal": np.where(rng.random(SIZE) < 0.5, 0.25, rng.standard_normal(SIZE)),
    "differences of 16-bit weights": in_bfloat16(0.02 * rng.standard_normal(SIZE) + 1e-4) - 0.015625,
    "all equal": np.full(SIZE, 3.0),
    "sorted": np.sort(rng.standard_normal(SIZE)),
    "one far away": np.concatenate([np.zeros(SIZE - 1), [1e30]]),
    "large in one block only": np.where(np.arange(SIZE) // BLOCK == 2, 1e3, 1.0) * rng.standard_normal(SIZE),
    "tiny numbers": 1e-42 * rng.integers(0, 9, SIZE),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_as_sorted(kind: str, dtype: type) -> None:
    x = KINDS[kind].astype(dtype)
    n = x.size
    check([x], [0, 1, n // 100, n // 5, n // 2, int(0.8 * n), n - 2, n - 1, n, -7])
    check([x[: n // 3], x[n // 3 : n // 2], x[:1], x[n // 2 :]], [n // 3, n - 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [100, 3000])
def test_with_too_little_room(kind: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "COLLECT", room)
    monkeypatch.setattr(selection, "SMALL_SAMPLE", 4096)
    check([KINDS[kind].astype(np.float32)], [SIZE // 2, 10, int(0.9 * SIZE)])


def test_a_misleading_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample sees nothing of the runs between its pieces."""
    x = np.ones(SIZE, np.float32)
    monkeypatch.setattr(selection, "SMALL_SAMPLE", 4096)
    x[2048 : SIZE // 3] = rng.standard_normal(SIZE // 3 - 2048)
    x[-(SIZE // 3) :] = 5 + rng.standard_normal(SIZE // 3)
    check([x], [SIZE // 10, SIZE // 2, int(0.95 * SIZE)])


def test_one_pass_is_usual() -> None:
    blocks = []
    check([KINDS["continuous"].astype(np.float32)], [SIZE // 100, SIZE // 2, SIZE - 1], lambda: blocks.append(1))
    sample = 2
    assert len(blocks) == sample + 7


@given(st.integers(0, 2**32), st.integers(1, 5000), st.integers(1, 40), st.floats(-0.1, 1.1))
@settings(max_examples=60)
def test_any_size(seed: int, size: int, values: int, share: float) -> None:
    x = np.random.default_rng(seed).integers(0, values, size).astype(np.float64)
    check([x], [int(share * size)])


def test_nothing_at_all() -> None:
    (group,) = order_statistics(scan_of(np.zeros(0, np.float32)), lambda block: block.experts, [[0, 5]])
    assert [(s.value, s.below, s.equal) for s in group] == [(0, 0, 0), (0, 0, 0)]


def test_no_rank_and_only_the_largest_of_much() -> None:
    """Nothing to guess: no sample is drawn."""
    x = KINDS["continuous"]
    check([x], [])
    check([x], [x.size - 1])
    assert order_statistics(scan_of(x), lambda block: [], []) == []
