"""The header parser against files that safetensors writes, against its own limits, and against the clock."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from merging.checkpoints import header as module
from merging.checkpoints.header import (
    ITEM_BITS,
    TORCH_NAMES,
    TensorEntry,
    build_header,
    item_size,
    parse_header,
    read_header,
)
from merging.errors import InputError


@contextmanager
def opened(content: bytes, folder: Path) -> Iterator[int]:
    path = folder / "x.safetensors"
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


TENSORS = {
    "weight": torch.arange(12.0).reshape(3, 4),
    "half": torch.ones(5, dtype=torch.float16),
    "brain": torch.ones(2, 3, 1, dtype=torch.bfloat16),
    "double": torch.zeros(2, dtype=torch.float64),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 7),
    "flags": torch.tensor([True, False, True]),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "é.🙂": torch.ones(1),
}


def test_a_file_of_safetensors_is_read_as_it_was_written(tmp_path: Path) -> None:
    content = save(TENSORS, metadata={"format": "pt", "note": 'with "quotes" and \\ and é'})
    with opened(content, tmp_path) as descriptor:
        header = read_header(descriptor, "x")
    assert header.metadata == {"format": "pt", "note": 'with "quotes" and \\ and é'}
    assert header.file_size == len(content) and header.tensors.keys() == TENSORS.keys()
    assert header.digest == hashlib.sha256(content[8 : header.data_start]).hexdigest()
    starts = [entry.start for entry in header.tensors.values()]
    assert starts == sorted(starts)
    for name, entry in header.tensors.items():
        tensor = TENSORS[name]
        assert (entry.name, entry.shape, entry.numel) == (name, tuple(tensor.shape), tensor.numel())
        assert getattr(torch, TORCH_NAMES[entry.dtype]) == tensor.dtype
        assert entry.nbytes == tensor.numel() * item_size(entry.dtype)
        raw = content[entry.start : entry.start + entry.nbytes]
        assert raw == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_data_type_has_the_size_that_safetensors_gives_it() -> None:
    for dtype, bits in ITEM_BITS.items():
        count = 8 if bits % 8 else 3
        size = count * bits // 8
        text, wrong = (
            json.dumps({"a": {"dtype": dtype, "shape": [count], "data_offsets": [0, end]}}).encode()
            for end in (size, size + 1)
        )
        assert parse_header(text, 8 + len(text) + size, "x").tensors["a"].dtype == dtype
        safetensors.deserialize(len(text).to_bytes(8, "little") + text + bytes(size))
        with pytest.raises(InputError, match="does not take"):
            parse_header(wrong, 8 + len(wrong) + size + 1, "x")
        if bits % 8:
            with pytest.raises(InputError, match="whole bytes"):
                item_size(dtype)


names = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cf", "Zl", "Zp"]), min_size=1, max_size=20
)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
whole = st.sampled_from([dtype for dtype, bits in ITEM_BITS.items() if bits % 8 == 0])


@given(
    st.lists(
        st.tuples(st.one_of(names, st.from_regex(r"[a-z.\"\\]{1,9}", fullmatch=True)), whole, shapes),
        max_size=9,
    ),
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=9), st.text(st.characters(codec="utf-8"), max_size=9)
    ),
)
def test_what_is_built_is_read_back_and_safetensors_agrees(
    tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    import unicodedata

    tensors = list(
        {unicodedata.normalize("NFC", t[0]): t for t in tensors if t[0] != "__metadata__"}.values()
    )
    start, entries = build_header(tensors, metadata)
    assert len(start) % 8 == 0 and start[8:9] == b"{"
    size = len(start) + sum(entry.nbytes for entry in entries.values())
    header = parse_header(start[8:], size, "x")
    assert header.tensors == entries and header.metadata == metadata and header.data_start == len(start)
    place = len(start)
    for name, dtype, shape in tensors:  # laid out in the given order, nothing between
        assert entries[name] == TensorEntry(name, dtype, shape, place, entries[name].nbytes)
        place += entries[name].nbytes
    theirs = dict(safetensors.deserialize(start + bytes(size - len(start))))
    assert {name: (t["dtype"], tuple(t["shape"])) for name, t in theirs.items()} == {
        name: (dtype, shape) for name, dtype, shape in tensors
    }


def test_two_tensors_of_one_name_are_never_built() -> None:
    with pytest.raises(ValueError, match="same name"):
        build_header([("a", "F32", (1,)), ("a", "F32", (2,))], {})


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    content = save({"a": torch.arange(6.0), "b": torch.ones(3, dtype=torch.uint8)}, metadata={"format": "pt"})
    with opened(content, tmp_path) as descriptor:
        read_header(descriptor, "x")
    for size in range(len(content)):
        with opened(content[:size], tmp_path) as descriptor, pytest.raises(InputError) as caught:
            read_header(descriptor, "x")
        assert caught.value.code in ("E_HEADER_SIZE", "E_HEADER_LAYOUT", "E_HEADER_JSON")
    with (
        opened(content + b"\0", tmp_path) as descriptor,
        pytest.raises(InputError, match="belong to no tensor"),
    ):
        read_header(descriptor, "x")


def test_a_file_that_shrinks_while_it_is_read_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not simulated: the file is cut between the look at its size and the read of its header."""
    path = tmp_path / "x.safetensors"
    save_file({f"tensor.{number}": torch.ones(1) for number in range(50)}, path)
    with path.open("r+b") as file:
        sizes = os.fstat(file.fileno())
        file.truncate(100)
        monkeypatch.setattr(module.os, "fstat", lambda descriptor: sizes)
        with pytest.raises(InputError) as caught:
            read_header(file.fileno(), "x")
    assert caught.value.code == "E_INPUT_CHANGED"


def test_messages_name_file_and_tensor_and_say_what_to_do() -> None:
    text = json.dumps({"model.w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}}).encode()
    with pytest.raises(InputError) as caught:
        parse_header(text, len(text) + 20, "folder/model.safetensors")
    assert str(caught.value).splitlines() == [
        "folder/model.safetensors is not a sound safetensors file. [E_HEADER_TENSOR]",
        "Tensor 'model.w': F32 [2, 2] does not take 12 bytes.",
        "Download or write it again.",
    ]


def large(count: int) -> tuple[bytes, dict[str, TensorEntry], int]:
    tensors = [
        (f"model.layers.{n // 7}.block_sparse_moe.experts.{n % 7}.w1.weight", "BF16", (4096, 14336))
        for n in range(count)
    ]
    start, entries = build_header(tensors, {"format": "pt"})
    return start, entries, len(start) + sum(entry.nbytes for entry in entries.values())


def test_60_000_tensors_take_less_than_a_second() -> None:
    start, entries, size = large(60_000)
    seconds = []
    for _ in range(2):
        began = time.process_time()
        header = parse_header(start[8:], size, "x")
        seconds.append(time.process_time() - began)
    assert header.tensors == entries
    assert min(seconds) < 1.0, seconds


def test_the_cost_grows_with_the_number_of_tensors_and_no_faster() -> None:
    def cost(count: int) -> float:
        start, _, size = large(count)
        times = []
        for _ in range(3):
            began = time.process_time()
            parse_header(start[8:], size, "x")
            times.append(time.process_time() - began)
        return min(times)

    assert cost(24_000) < 16 * cost(3_000)  # 8 times as many; a quadratic parser would take 64 times as long


@pytest.mark.parametrize("on", [True, False])
def test_the_garbage_collector_is_left_as_it_was(on: bool) -> None:
    start, _, size = large(3)
    before = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        parse_header(start[8:], size, "x")
        assert gc.isenabled() is on
        with pytest.raises(InputError):
            parse_header(start[8:], size + 1, "x")
        assert gc.isenabled() is on
    finally:
        (gc.enable if before else gc.disable)()


def test_order_in_the_file_and_in_the_json_may_differ() -> None:
    rng = random.Random(0)
    tensors = [(f"t{n}", "F32", (n,)) for n in range(40)]
    _, entries = build_header(tensors, {})
    base = entries["t0"].start
    table = {
        name: {
            "data_offsets": [e.start - base, e.start - base + e.nbytes],
            "shape": list(e.shape),
            "dtype": e.dtype,
        }
        for name, e in rng.sample(sorted(entries.items()), 40)
    }
    text = json.dumps(table).encode()
    header = parse_header(text, 8 + len(text) + sum(e.nbytes for e in entries.values()), "x")
    assert list(header.tensors) == [f"t{n}" for n in range(40)]


def test_numbers_without_a_limit_on_their_digits_are_still_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Python 3.10.7, and with PYTHONINTMAXSTRDIGITS=0, int() of a million digits takes seconds."""
    monkeypatch.setattr(module.sys, "get_int_max_str_digits", lambda: 0, raising=False)
    text = b'{"a":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,8]}}'
    began = time.process_time()
    with pytest.raises(InputError, match="dimension beyond"):
        parse_header(text, len(text) + 16, "x")
    assert time.process_time() - began < 1.0
    start, entries, size = large(10)
    assert parse_header(start[8:], size, "x").tensors == entries
