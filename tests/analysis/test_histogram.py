"""The histogram of one tensor's changes: every weight in its bin, kept, and never about other files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from merging.analysis import histogram as module
from merging.analysis.cache import Cache
from merging.analysis.histogram import BINS, RUN, histogram_of, runs
from merging.analysis.inspection import Inspection
from merging.analysis.inspection_run import inspect
from merging.errors import InputError
from tests.small_checkpoints import family, llama_like, load, save

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return family(tmp_path, llama_like(2, 16), 3, config={"model_type": "llama"})


def look(paths: list[Path]) -> Inspection:
    base, *experts = map(str, paths)
    return inspect(base, experts, parts=["doctor"], cache=False, threads=1)


def test_every_weight_is_in_its_bin(paths: list[Path], tmp_path: Path) -> None:
    found = histogram_of(look(paths), NAME, Cache(tmp_path / "cache"))
    base = load(paths[0])[NAME].double()
    taus = [(load(path)[NAME].double() - base).flatten().numpy() for path in paths[1:]]
    assert found.limit == max(np.abs(tau).max() for tau in taus) > 0
    assert found.exact and found.numel == taus[0].size
    for tau, counts in zip(taus, found.counts, strict=True):
        assert counts.sum() == tau.size
        np.testing.assert_array_equal(counts, np.histogram(tau, BINS, (-found.limit, found.limit))[0])
    assert found.centres[BINS // 2] == 0 and found.centres[-1] == pytest.approx(found.limit * (BINS - 1) / BINS)


def test_it_is_kept(paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, result = Cache(tmp_path / "cache"), look(paths)
    first = histogram_of(result, NAME, cache)
    monkeypatch.setattr(module, "open_models", None)  # a second look opens nothing
    again = histogram_of(result, NAME, cache)
    np.testing.assert_array_equal(first.counts, again.counts)
    assert (again.names, again.limit, again.read) == (first.names, first.limit, first.read)


def test_large_tensors_are_sampled_and_say_so(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RUN", 64)
    monkeypatch.setattr(module, "MOST", 128)
    monkeypatch.setattr(module.count, "__defaults__", (128,))
    found = histogram_of(look(paths), NAME, Cache(tmp_path / "cache"))
    assert not found.exact and found.read == 128 and found.counts.sum(axis=1).tolist() == [128] * len(found.names)


def test_runs_cover_everything_or_are_spread_evenly() -> None:
    assert list(runs(RUN + 5)) == [(0, RUN), (RUN, RUN + 5)]
    some = list(runs(100 * RUN, 4 * RUN))
    assert [start // RUN for start, _ in some] == [0, 25, 50, 75] and all(b - a == RUN for a, b in some)


def test_other_files_are_refused(paths: list[Path], tmp_path: Path) -> None:
    result = look(paths)
    state = {name: tensor + torch.ones_like(tensor) for name, tensor in load(paths[1]).items()}
    for file in paths[1].iterdir():
        file.unlink()
    paths[1].rmdir()
    save(paths[1], state, config={"model_type": "llama"})
    with pytest.raises(InputError) as caught:
        histogram_of(result, NAME, Cache(tmp_path / "cache"))
    assert caught.value.code == "E_INPUT_CHANGED"


def test_no_such_tensor(paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        histogram_of(look(paths), "nothing", Cache(tmp_path / "cache"))
    assert caught.value.code == "E_MISSING_TENSOR"
