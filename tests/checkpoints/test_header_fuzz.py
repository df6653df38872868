"""100,000 damaged headers: each is refused with a typed error, or is sound for safetensors as well.

The mutants come from a seeded generator, so a failure can be run again; the message has the file in
hexadecimal.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import safetensors

from merging.checkpoints.header import Header, read_header
from merging.errors import InputError
from tests.checkpoints.hostile import entry, file_bytes

WORKERS, EACH = 8, 12_500


def seeds() -> list[bytes]:
    """Small sound files of every kind that the parser has an opinion about."""
    plain = {
        f"model.layers.{n}.mlp.up_proj.weight": entry(n * 16, n * 16 + 16, [2, 4], "BF16") for n in range(3)
    }
    mixed = {
        "a": entry(0, 1, [1], "U8"),
        "b": entry(1, 9, [], "F64"),
        "c": entry(9, 9, [0, 3], "I32"),
        "d": entry(9, 12, [6], "F4"),
        "e": entry(12, 13, [1, 1, 1, 1, 1, 1, 1, 1], "BOOL"),
    }
    escaped = b'{"\\u00e9\\ud83d\\ude42":{"shape":[ 2 ,1],"dtype":"F32","data_offsets":[0, 8]}}   '
    return [
        file_bytes(plain, bytes(48)),
        file_bytes({"__metadata__": {"format": "pt", "note": "é"}, **plain}, bytes(48)),
        file_bytes(mixed, bytes(13)),
        file_bytes(escaped, bytes(8)),
        file_bytes({"__metadata__": None}, b""),
        file_bytes({}, b""),
        file_bytes({"x" * 40: entry(0, 4, [1])}, bytes(4)),
    ]


NUMBERS = [
    -1,
    0,
    1,
    2,
    3,
    7,
    8,
    255,
    2**31,
    2**32,
    2**40,
    2**40 + 1,
    2**53,
    2**63,
    2**64 - 1,
    2**64,
    10**30,
    1.0,
    0.5,
]
OTHERS: list[Any] = [
    None,
    True,
    False,
    "",
    "F32",
    "0",
    [],
    [0],
    {},
    {"a": 1},
    float("nan"),
    float("inf"),
    "\ud800",
]
NAMES = ["", "a", "b", "__metadata__", "e\u0301", "é", "a\0", "\u202e", "dtype", "x" * 513, "../../x", "A"]
TEXTS = [
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\u0061",
    b"\\ud800",
    b"NaN",
    b"-0",
    b"1e0",
    b" ",
    b"\n",
    b"\0",
]
TEXTS += [
    b"\xff",
    b"\xc3\xa9",
    b"\xef\xbb\xbf",
    b"[" * 300,
    b'{"":' * 90,
    b"9" * 30,
    b"null",
    b"true",
    b"/**/",
    b"1.",
]


def bytewise(rng: random.Random, seed: bytes) -> bytes:
    """A few bytes flipped, put in, taken out, copied, cut off."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        place = rng.randrange(len(data) + 1) if rng.random() < 0.9 else rng.randrange(min(9, len(data) + 1))
        action = rng.randrange(7)
        if action == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif action == 1 and place < len(data):
            data[place] = rng.randrange(256)
        elif action == 2:
            data[place:place] = rng.choice(TEXTS)
        elif action == 3:
            del data[place : place + rng.choice((1, 1, 2, 8, 40))]
        elif action == 4:
            data[place:place] = data[place : place + rng.choice((1, 5, 30))]
        elif action == 5:
            del data[place:]
        else:
            digits = [n for n, code in enumerate(data) if 48 <= code <= 57]
            if digits:
                data[rng.choice(digits)] = rng.choice(b"0123456789.-e")
    return bytes(data)


def lengthwise(rng: random.Random, seed: bytes) -> bytes:
    """As ``bytewise``, with the length put right again, so that the damage reaches the JSON."""
    length = int.from_bytes(seed[:8], "little")
    raw = bytewise(rng, seed[8 : 8 + length])
    return file_bytes(raw, seed[8 + length :])


def structurally(rng: random.Random, seed: bytes) -> bytes:
    """The JSON values changed: numbers, fields, names, order, duplicates, nesting."""
    length = int.from_bytes(seed[:8], "little")
    pairs = list(json.loads(seed[8 : 8 + length]).items())
    body = bytearray(seed[8 + length :])
    for _ in range(rng.choice((1, 1, 2, 3))):
        action = rng.randrange(10)
        if not pairs or action == 0:
            pairs.append((rng.choice(NAMES), entry(len(body), len(body), [0])))
            continue
        place = rng.randrange(len(pairs))
        name, fields = pairs[place]
        fields = json.loads(json.dumps(fields))
        if action == 1:
            name = rng.choice(NAMES)
        elif action == 2:
            fields = rng.choice(OTHERS + NUMBERS)
        elif action == 3:
            pairs.insert(rng.randrange(len(pairs) + 1), rng.choice(pairs))
        elif action == 4:
            rng.shuffle(pairs)
            continue
        elif action == 5:
            body = bytearray(max(0, len(body) + rng.choice((-8, -1, 1, 8))))
        elif isinstance(fields, dict) and fields:
            field = rng.choice(sorted(fields))
            value = fields[field]
            if action == 6:
                fields[field] = rng.choice(OTHERS + NUMBERS)
            elif action == 7:
                del fields[field]
                fields[rng.choice(("dtype", "shape", "extra", "Dtype", ""))] = value
            elif isinstance(value, list) and value:
                value[rng.randrange(len(value))] = (
                    rng.choice(NUMBERS) if action == 8 else rng.choice(NUMBERS + OTHERS)
                )
            elif isinstance(value, list):
                value.append(rng.choice(NUMBERS))
            else:
                fields[field] = rng.choice(("F16", "BF16", "F64", "U8", "F4", "f32", "F8_E4M3", "I128", 7))
        pairs[place] = (name, fields)
    text = ",".join(f"{json.dumps(name)}:{json.dumps(fields)}" for name, fields in pairs)
    return file_bytes(("{" + text + "}" + " " * rng.choice((0, 0, 3))).encode(), bytes(body))


MUTATORS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    bytewise,
    lengthwise,
    structurally,
    structurally,
)


def assert_safetensors_agrees(content: bytes, header: Header) -> None:
    theirs = dict(safetensors.deserialize(content))
    assert {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in theirs.items()} == {
        e.name: (e.dtype, e.shape, content[e.start : e.start + e.nbytes]) for e in header.tensors.values()
    }


@pytest.mark.parametrize("seed", range(WORKERS))
def test_mutants_are_refused_or_sound(seed: int) -> None:
    rng = random.Random(seed)
    originals = seeds()
    refused = accepted = 0
    codes = set()
    with tempfile.TemporaryFile() as file:
        descriptor = file.fileno()
        for _ in range(EACH):
            content = rng.choice(MUTATORS)(rng, rng.choice(originals))
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))
            try:
                header = read_header(descriptor, "mutant")
            except InputError as error:
                refused += 1
                codes.add(error.code)
                continue
            except Exception as error:
                raise AssertionError(content.hex()) from error
            accepted += 1
            try:
                assert_safetensors_agrees(content, header)
            except (AssertionError, safetensors.SafetensorError) as error:
                raise AssertionError(content.hex()) from error
    assert accepted > EACH // 50 and refused > EACH // 2  # neither side of the fence is left untested
    assert {"E_HEADER_SIZE", "E_HEADER_JSON", "E_HEADER_TENSOR", "E_HEADER_NAME", "E_HEADER_LAYOUT"} <= codes
