"""Results on disk: the same values come back, damage is as good as nothing, and different models never share an entry."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merging.analysis import cache as module
from merging.analysis.cache import Cache, fingerprint, key_of
from merging.checkpoints.checkpoint import open_checkpoint
from tests.small_checkpoints import family, llama_like, save

KEY = "0" * 64


@dataclass
class Inner:
    name: str
    values: np.ndarray


@dataclass
class Outer:
    inner: list[Inner]
    pair: tuple[int, float]
    table: dict[str, float | None] = field(default_factory=dict)


def example() -> Outer:
    arrays = [np.arange(5.0), np.zeros((2, 3), np.float32), np.array([], np.int64), np.array([[True]])]
    inner = [Inner(f"naïve \x00 {i}", values) for i, values in enumerate(arrays)]
    return Outer(inner, (3, 0.1), {"a": float("nan"), "b": None, "c": float("-inf"), "d": 1e-320})


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_what_was_kept_comes_back_bit_by_bit(tmp_path: Path) -> None:
    cache, value = Cache(tmp_path / "new" / "folder"), example()
    assert cache.read(KEY, (Outer, Inner)) is None
    cache.write(KEY, value)
    back = Cache(tmp_path / "new" / "folder").read(KEY, (Outer, Inner))
    assert type(back) is Outer and back.pair == (3, 0.1) and type(back.pair) is tuple
    assert repr(back.table) == repr(value.table)
    for one, other in zip(back.inner, value.inner, strict=True):
        assert (one.name, one.values.dtype, one.values.shape) == (other.name, other.values.dtype, other.values.shape)
        assert one.values.tobytes() == other.values.tobytes()
    assert stat.S_IMODE((tmp_path / "new" / "folder").stat().st_mode) == 0o700


def test_a_result_is_made_of_what_is_expected_only(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.write(KEY, example())
    assert cache.read(KEY, (Outer,)) is None  # Inner is not expected
    with pytest.raises(TypeError):
        cache.write(KEY, {"path": tmp_path})
    with pytest.raises(TypeError):
        cache.write(KEY, {1: "x"})
    with pytest.raises(TypeError):
        cache.write(KEY, np.array([object()]))


def test_every_damage_is_as_good_as_no_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.write(KEY, {"values": np.arange(16.0), "text": "x"})
    path = only_file(tmp_path)
    good = path.read_bytes()
    for length in [0, 1, 10, len(good) // 2, len(good) - 30, len(good) - 1]:
        path.write_bytes(good[:length])
        assert cache.read(KEY) is None
    noticed = 0
    for position in range(0, len(good), 3):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        found = cache.read(KEY)
        noticed += found is None
        if found is not None:  # a bit that carries no meaning, such as a time stamp
            assert found["text"] == "x" and found["values"].tolist() == list(range(16))
    assert noticed > len(good) / 6
    path.write_bytes(good)
    assert cache.read(KEY)["text"] == "x"


@given(st.binary(max_size=300))
def test_any_file_may_lie_there(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"{KEY}.npz").write_bytes(content)
        assert Cache(Path(folder)).read(KEY) is None


def test_an_entry_under_another_name_is_not_used(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.write(KEY, "of the first")
    only_file(tmp_path).rename(tmp_path / f"{'1' * 64}.npz")
    assert cache.read("1" * 64) is None


def test_without_a_folder_nothing_is_kept() -> None:
    cache = Cache(None)
    cache.write(KEY, 1)
    assert cache.read(KEY) is None and cache.problem == ""


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file" / "cache")
    cache.write(KEY, 1)
    assert cache.read(KEY) is None and str(tmp_path / "file") in cache.problem


def test_nothing_half_written_is_left_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    cache = Cache(tmp_path)
    monkeypatch.setattr(module.np, "savez", full)
    cache.write(KEY, 1)
    assert "No space left" in cache.problem and list(tmp_path.iterdir()) == []


def write_often(folder: Path, value: int) -> None:
    cache = Cache(folder)
    for _ in range(20):
        cache.write(KEY, {"value": value, "array": np.full(1000, value)})


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_two_processes_may_write_the_same_entry(tmp_path: Path) -> None:
    processes = [get_context("fork").Process(target=write_often, args=(tmp_path, k)) for k in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # "fork with threads"
        for process in processes:
            process.start()
    cache, seen = Cache(tmp_path), 0
    while any(process.is_alive() for process in processes):
        if (found := cache.read(KEY)) is not None:
            assert (found["array"] == found["value"]).all()
            seen += 1
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert seen and [path.name for path in tmp_path.iterdir()] == [f"{KEY}.npz"]


def test_the_longest_unused_entries_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    keys = [str(k) * 64 for k in range(4)]
    for age, key in enumerate(keys):
        cache.write(key, np.zeros(1000))
        os.utime(tmp_path / f"{key}.npz", (1000 + age, 1000 + age))
    assert cache.read(keys[0]) is not None  # now it was used last
    monkeypatch.setattr(module, "LARGEST_FOLDER", 2 * only_size(tmp_path))
    cache.write("5" * 64, np.zeros(1000))
    assert {path.stem for path in tmp_path.iterdir()} == {keys[0], "5" * 64}


def only_size(folder: Path) -> int:
    (size,) = {path.stat().st_size for path in folder.iterdir()}
    return size


def test_keys_depend_on_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"part": "changes", "density": 0.2}
    assert key_of(facts) == key_of(dict(reversed(facts.items()))) and len(key_of(facts)) == 64
    assert len({key_of(facts), key_of(facts | {"density": 0.3}), key_of(facts | {"rank": 1})}) == 3
    before = key_of(facts)
    monkeypatch.setattr(module, "NUMERICS", module.NUMERICS + 1)
    assert key_of(facts) != before


def test_fingerprints_tell_models_apart_that_agree_in_size_time_and_header(tmp_path: Path) -> None:
    paths = family(tmp_path, llama_like(2, 16), 2)
    for path in paths:
        os.utime(path / "model.safetensors", ns=(1_000_000_000, 1_000_000_000))
    models = [open_checkpoint(path) for path in paths]
    assert models[1].identity() == models[2].identity()  # as if unpacked from an archive
    assert len({fingerprint(model) for model in models}) == 3
    again = open_checkpoint(paths[1])
    assert fingerprint(again) == fingerprint(models[1])
    os.utime(paths[1] / "model.safetensors", ns=(2_000_000_000, 2_000_000_000))
    assert fingerprint(open_checkpoint(paths[1])) != fingerprint(models[1])


def test_fingerprints_of_shards_and_of_tiny_files(tmp_path: Path) -> None:
    state = {f"model.layers.{i}.mlp.up_proj.weight": torch.full((2, 2), float(i)) for i in range(5)}
    one = open_checkpoint(save(tmp_path / "a", state, shards=5))
    state["model.layers.4.mlp.up_proj.weight"][1, 1] = 7
    two = open_checkpoint(save(tmp_path / "b", state, shards=5))
    assert fingerprint(one) != fingerprint(two)
