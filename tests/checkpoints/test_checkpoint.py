"""Opening and reading models: what is read are the bytes on disk, or there is a typed error."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from merging.checkpoints import files, weight_file
from merging.checkpoints.checkpoint import (
    Checkpoint,
    FileSource,
    RowsSource,
    Source,
    open_checkpoint,
    renamed,
)
from merging.checkpoints.header import build_header, item_size
from merging.errors import InputError
from tests import tiny_models

SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8, "U8": 1, "BOOL": 1}


def read(source: Source, start: int = 0, stop: int | None = None) -> bytes:
    stop = source.numel if stop is None else stop
    raw = bytearray((stop - start) * item_size(source.dtype))
    source.read(start, stop, memoryview(raw))
    return bytes(raw)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_reads(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    """Whole tensors and some ranges of them are the bytes of ``tensors``."""
    rng = random.Random(1)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        source, raw = checkpoint.tensors[name], raw_bytes(tensor)
        size = tensor.element_size()
        assert (source.name, source.shape, source.numel) == (name, tuple(tensor.shape), tensor.numel())
        assert SIZES[source.dtype] == size and read(source) == raw
        for _ in range(3):
            start = rng.randint(0, source.numel)
            stop = rng.randint(start, source.numel)
            assert read(source, start, stop) == raw[start * size : stop * size]


def code_of(function: object, *arguments: object) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)  # type: ignore[operator]
    assert caught.value.fix
    return caught.value.code


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("models") / "llama", dtype="bfloat16")


def shard(source: Path, folder: Path, count: int) -> dict[str, torch.Tensor]:
    """The model of ``source`` in ``count`` shards, written as transformers writes them."""
    tensors = load_file(source / "model.safetensors")
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    names, table = list(tensors), {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, folder / file, metadata={"format": "pt"})
        table |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def test_folder_shards_and_single_file_hold_the_same_model(llama: Path, tmp_path: Path) -> None:
    tensors = shard(llama, tmp_path / "shards", 3)
    single = tmp_path / "any name.safetensors"
    shutil.copy(llama / "model.safetensors", single)
    with (
        open_checkpoint(llama, "me/llama@main") as folder,
        open_checkpoint(tmp_path / "shards") as shards,
        open_checkpoint(str(single)) as file,
    ):
        assert (folder.kind, shards.kind, file.kind) == ("folder", "folder", "file")
        assert (folder.reference, file.reference) == ("me/llama@main", str(single))
        assert (folder.path, file.path) == (llama, tmp_path)
        for checkpoint in (folder, shards, file):
            assert_reads(checkpoint, tensors)
        assert folder.config == shards.config == json.loads((llama / "config.json").read_text())
        assert file.config is None
        assert [entry["name"] for entry in shards.identity()["files"]] == [
            f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
        ]


def test_order_is_that_of_the_files_and_of_the_bytes(llama: Path, tmp_path: Path) -> None:
    shard(llama, tmp_path / "shards", 2)
    with open_checkpoint(tmp_path / "shards") as checkpoint:
        sources = [source for source in checkpoint.tensors.values() if isinstance(source, FileSource)]
        places = [(source.file.path.name, source.offset) for source in sources]
        assert places == sorted(places) and len(places) == 21


def test_every_kind_of_number(tmp_path: Path) -> None:
    tensors = {
        "f16": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.float16),
        "bf16": torch.tensor([[1.5, float("inf")]], dtype=torch.bfloat16),
        "f32": torch.arange(6.0).reshape(1, 2, 3),
        "f64": torch.tensor(3.25, dtype=torch.float64),
        "i64": torch.tensor([2**62, -1]),
        "u8": torch.tensor([255], dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "none": torch.zeros(0, 5),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert_reads(checkpoint, tensors)


def test_a_snapshot_of_the_hub_cache_is_made_of_links(llama: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, name in enumerate(["model.safetensors", "config.json"]):
        blob = f"{number}" * 64
        shutil.copy(llama / name, repository / "blobs" / blob)
        os.symlink(f"../../blobs/{blob}", snapshot / name)
    alias = tmp_path / "alias"
    os.symlink(snapshot, alias)  # a link to a folder that the user names is the user's own business
    for path in (snapshot, alias, snapshot / "model.safetensors"):
        with open_checkpoint(path) as checkpoint:
            assert_reads(checkpoint, load_file(llama / "model.safetensors"))
            assert checkpoint.config is not None
            assert checkpoint.identity()["files"][0]["name"] == "model.safetensors"
            checkpoint.check_unchanged()
    with open_checkpoint(snapshot) as checkpoint:  # the next download puts the link elsewhere
        shutil.copy(llama / "model.safetensors", repository / "blobs" / ("9" * 64))
        (snapshot / "model.safetensors").unlink()
        os.symlink("../../blobs/" + "9" * 64, snapshot / "model.safetensors")
        assert code_of(checkpoint.check_unchanged) == "E_INPUT_CHANGED"


def test_a_range_that_does_not_fit_the_buffer_is_our_own_mistake(llama: Path) -> None:
    with open_checkpoint(llama) as checkpoint:
        source = checkpoint.tensors["model.norm.weight"]
        for start, stop, size in ((0, 2, 3), (0, 2, 5), (2, 1, 0), (-1, 1, 4), (31, 33, 4)):
            with pytest.raises(ValueError, match="does not fit"):
                source.read(start, stop, memoryview(bytearray(size)))
        with pytest.raises(ValueError, match="does not fit"):
            source.read(0, 1, memoryview(b"ab"))
        source.read(7, 7, memoryview(bytearray()))
        array = np.zeros((4, 8), dtype=np.uint16)  # any contiguous buffer will do
        source.read(0, 32, memoryview(array))
        assert array.tobytes() == read(source)


def test_short_reads_are_continued(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGEST_READ", 7)  # as if the system gave at most 7 bytes
    with open_checkpoint(llama) as checkpoint:
        assert_reads(checkpoint, load_file(llama / "model.safetensors"))


# What happens when the files do not stay as they were.


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def replace(path: Path) -> None:
    status = path.stat()
    other = path.with_name("other")
    shutil.copy(path, other)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def swap_for_link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    os.symlink("moved", path)


@pytest.mark.parametrize("change", [touch, replace, cut, append, os.unlink, swap_for_link])
def test_every_change_of_the_file_is_noticed(change: object, copy: Path) -> None:
    path = copy / "model.safetensors"
    with open_checkpoint(copy) as checkpoint:
        before = checkpoint.identity()
        checkpoint.check_unchanged()
        change(path)  # type: ignore[operator]
        assert code_of(checkpoint.check_unchanged) in ("E_INPUT_CHANGED", "E_PATH")
        checkpoint.close()  # a file that is opened again must be the same file
        assert code_of(read, checkpoint.tensors["lm_head.weight"]) in (
            "E_INPUT_CHANGED",
            "E_PATH",
            "E_NOT_FOUND",
        )
        assert checkpoint.identity() == before


def test_bytes_that_disappear_are_an_error_and_not_the_end_of_the_process(copy: Path) -> None:
    """With a memory map this would be SIGBUS."""
    with open_checkpoint(copy) as checkpoint:
        source = list(checkpoint.tensors.values())[-1]
        whole = read(source)
        os.truncate(copy / "model.safetensors", 5000)
        assert code_of(read, source) == "E_INPUT_CHANGED"
        first = next(iter(checkpoint.tensors.values()))
        assert len(read(first, 0, 10)) == 20 and len(whole) == 64


def test_an_error_of_the_system_is_typed(copy: Path) -> None:
    with open_checkpoint(copy) as checkpoint:
        file = checkpoint.files[0]
        descriptor = weight_file._descriptors.open[file]
        spare = os.open(os.devnull, os.O_WRONLY)
        os.dup2(spare, descriptor)  # reading from something opened for writing: EBADF
        os.close(spare)
        assert code_of(read, checkpoint.tensors["lm_head.weight"]) == "E_READ"


def test_identity_depends_on_the_content_and_can_be_stored(llama: Path, copy: Path) -> None:
    def identity(folder: Path) -> str:
        with open_checkpoint(folder) as checkpoint:
            return json.dumps(checkpoint.identity(), sort_keys=True)

    first = identity(copy)
    assert identity(copy) == first
    shutil.copystat(llama / "model.safetensors", copy / "model.safetensors")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight2"] = tensors.pop("model.norm.weight")
    path = copy / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    assert identity(copy) != first


# Large models.


def many_shards(folder: Path, shards: int, each: int) -> None:
    """``shards`` files of ``each`` small tensors; the element k of tensor n is n + k."""
    folder.mkdir()
    table: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        names = [f"model.layers.{number}.experts.{n}.up_proj.weight" for n in range(each)]
        start, _ = build_header([(name, "F32", (2, 2)) for name in names], {"format": "pt"})
        first = number * each
        body = (np.arange(first, first + each, dtype="<f4")[:, None] + np.arange(4, dtype="<f4")).tobytes()
        (folder / file).write_bytes(start + body)
        table |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def shards_300(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "model"
    many_shards(folder, 300, 200)
    return folder


def test_300_shards_and_60_000_tensors_open_quickly_with_few_descriptors(shards_300: Path) -> None:
    before = open_descriptors()
    started = time.process_time()
    with open_checkpoint(shards_300) as checkpoint:
        seconds = time.process_time() - started
        assert len(checkpoint.tensors) == 60_000 and seconds < 4.0, seconds
        assert open_descriptors() - before <= weight_file.MOST_OPEN
        rng = random.Random(0)
        sources = list(checkpoint.tensors.values())

        def right(number: int) -> bool:
            values = np.frombuffer(read(sources[number], 1, 4), dtype="<f4")
            return values.tolist() == [number + 1.0, number + 2.0, number + 3.0]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(right, [rng.randrange(60_000) for _ in range(4_000)]))
        assert open_descriptors() - before <= weight_file.MOST_OPEN
        checkpoint.check_unchanged()
    assert open_descriptors() <= before


def test_a_shard_that_was_replaced_is_noticed_when_it_is_opened_again(tmp_path: Path) -> None:
    many_shards(tmp_path / "model", weight_file.MOST_OPEN + 5, 1)
    with open_checkpoint(tmp_path / "model") as checkpoint:
        first = checkpoint.files[0]
        assert first not in weight_file._descriptors.open  # the oldest had to make room
        replace(first.path)
        assert code_of(read, next(iter(checkpoint.tensors.values()))) == "E_INPUT_CHANGED"


def test_the_file_that_was_used_last_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_file, "MOST_OPEN", 3)
    many_shards(tmp_path / "model", 4, 1)
    with open_checkpoint(tmp_path / "model") as checkpoint:
        first, second, third, fourth = checkpoint.files
        assert list(weight_file._descriptors.open)[-3:] == [second, third, fourth]
        sources = list(checkpoint.tensors.values())
        read(sources[1])
        read(sources[0])  # takes the place of the third, which has not been used for longest
        assert list(weight_file._descriptors.open)[-3:] == [fourth, second, first]


def test_files_in_use_stay_open_however_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More threads than descriptors: each waits for nobody, and none reads from a closed or foreign file."""
    monkeypatch.setattr(weight_file, "MOST_OPEN", 2)
    many_shards(tmp_path / "model", 12, 3)
    with open_checkpoint(tmp_path / "model") as checkpoint:
        sources = list(checkpoint.tensors.values())
        barrier = threading.Barrier(12)

        def work(seed: int) -> bool:
            rng = random.Random(seed)
            barrier.wait()
            numbers = [rng.randrange(36) for _ in range(300)]
            return all(np.frombuffer(read(sources[n]), dtype="<f4")[0] == n for n in numbers)

        with ThreadPoolExecutor(12) as pool:
            assert all(pool.map(work, range(12)))
        assert len([file for file in checkpoint.files if file in weight_file._descriptors.open]) <= 2


def test_a_tensor_beyond_4_gib_is_read_where_it_is(tmp_path: Path) -> None:
    """A sparse file: 5 GiB of zeros with a mark at the end, read without memory of that size."""
    import resource

    rows = 5 << 18
    start, entries = build_header([("big", "F32", (rows, 1024)), ("after", "U8", (3,))], {})
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(start)
        file.seek(entries["after"].start - 4)
        file.write(np.array([7], dtype="<f4").tobytes() + b"abc")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open_checkpoint(tmp_path) as checkpoint:
        big = checkpoint.tensors["big"]
        assert np.frombuffer(read(big, big.numel - 2, big.numel), dtype="<f4").tolist() == [0.0, 7.0]
        assert read(checkpoint.tensors["after"]) == b"abc"
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 50_000 * (1 if sys.platform == "linux" else 1024)


# Rows in another order.


@given(
    st.data(), st.sampled_from(["F32", "BF16", "F64"]), st.integers(1, 5), st.sampled_from([(), (3,), (2, 2)])
)
def test_rows_source_is_fancy_indexing(
    data: st.DataObject, dtype: str, rows: int, rest: tuple[int, ...]
) -> None:
    size = item_size(dtype)
    own, other = ArraySource("own", dtype, (rows, *rest), 1), ArraySource("other", dtype, (4, *rest), 2)
    pick = np.array(data.draw(st.lists(st.integers(-1, rows - 1), max_size=12)), dtype=np.int64)
    fallback = np.array([data.draw(st.integers(0, 3)) for _ in pick], dtype=np.int64)
    source = RowsSource(own, pick, other, fallback)
    expected = [own.array[i] if i >= 0 else other.array[j] for i, j in zip(pick, fallback, strict=True)]
    raw = np.array(expected, dtype=own.array.dtype).tobytes()
    assert source.shape == (len(pick), *rest) and source.numel * size == len(raw)
    assert (source.name, source.dtype) == ("own", dtype)
    start = data.draw(st.integers(0, source.numel))
    stop = data.draw(st.integers(start, source.numel))
    assert read(source, start, stop) == raw[start * size : stop * size]
    assert read(source) == raw


class ArraySource:
    """A source in memory that counts how often it is read."""

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], seed: int):
        unsigned = {2: np.uint16, 4: np.uint32, 8: np.uint64}[item_size(dtype)]
        self.array = np.random.default_rng(seed).integers(0, 60_000, shape).astype(unsigned)
        self.name, self.dtype, self.shape, self.numel = name, dtype, shape, int(np.prod(shape))
        self.reads = 0

    def read(self, start: int, stop: int, out: memoryview) -> None:
        self.reads += 1
        out[:] = self.array.reshape(-1)[start:stop].tobytes()


def test_rows_that_follow_one_another_are_read_in_one_go() -> None:
    own, other = ArraySource("own", "F32", (1000, 4), 1), ArraySource("other", "F32", (10, 4), 2)
    rows = np.concatenate([np.arange(500, 1000), np.full(5, -1), np.arange(0, 500)])
    source = RowsSource(own, rows, other, np.arange(1005) - 500)
    read(source)
    assert (own.reads, other.reads) == (2, 1)


def test_rows_that_do_not_exist_are_refused() -> None:
    own, other = ArraySource("own", "F32", (3, 4), 1), ArraySource("other", "F32", (2, 4), 2)
    wrong = ArraySource("wrong", "F16", (2, 4), 2)
    for arguments in (
        (own, [0, 3]),
        (own, [0, -1]),
        (own, [-1], other, [2]),
        (own, [-1], other, [-1]),
        (own, [-1], wrong, [0]),
        (own, [-1], other, [0, 1]),
        (ArraySource("scalar", "F32", (), 1), [0]),
    ):
        source, rows, *more = arguments
        with pytest.raises(ValueError):
            RowsSource(source, np.array(rows), *[np.array(x) if isinstance(x, list) else x for x in more])


def test_a_renamed_tensor_is_the_same_tensor(llama: Path) -> None:
    with open_checkpoint(llama) as checkpoint:
        source = checkpoint.tensors["lm_head.weight"]
        other = renamed(source, "head")
        assert (other.name, source.name) == ("head", "lm_head.weight") and read(other) == read(source)
        assert renamed(source, "lm_head.weight") is source


@pytest.fixture(autouse=True)
def no_descriptor_is_left_open() -> Iterator[None]:
    before = set(weight_file._descriptors.open)
    yield
    assert not set(weight_file._descriptors.open) - before


def test_a_folder_that_fails_half_way_leaves_nothing_open(llama: Path, tmp_path: Path) -> None:
    shard(llama, tmp_path / "shards", 3)
    cut(tmp_path / "shards" / "model-00003-of-00003.safetensors")
    assert code_of(open_checkpoint, tmp_path / "shards") == "E_HEADER_LAYOUT"
