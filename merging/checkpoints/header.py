"""The safetensors header, read by a suspicious reader.

A file is ``n`` (8 bytes, little-endian), ``n`` bytes of JSON, then the tensors' bytes. The JSON maps each
name to ``{"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}`` with offsets counted from the
end of the JSON; ``__metadata__`` maps strings to strings. Sorted by offset the tensors must follow one
another without hole or overlap and end with the file, so that no byte is unaccounted for and a small file
cannot claim large tensors.

This parser is stricter than the reference library (safetensors 0.8): it also refuses duplicate names, unknown
fields, a leading space, names that look alike or hide control characters, more than 8 dimensions, dimensions
above 2^40 and headers above 32 MB. Everything that it accepts, the library accepts too.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from merging.checkpoints.files import read_at, recognise
from merging.checkpoints.strict_json import first_duplicate, structure
from merging.errors import InputError

LARGEST_HEADER = 32_000_000  # bytes; a model of 60,000 tensors has about 6 MB
MOST_TENSORS = 200_000
LONGEST_NAME = 512
HIGHEST_RANK = 8
LARGEST_DIMENSION = 1 << 40
DEPTH = 8

ITEM_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
TORCH_NAMES: dict[str, str] = {
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
}  # fmt: skip

# Characters that make two names look alike or a message lie: controls, invisible ones, changes of direction.
_FORBIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_FIELDS = {"dtype", "shape", "data_offsets"}
_TOO_LARGE = 1 << 80


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: ``nbytes`` bytes from absolute offset ``start`` of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """All tensors of one file, in the order of their bytes."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int
    file_size: int
    digest: str  # sha256 of the JSON bytes


def item_size(dtype: str) -> int:
    """Bytes of one element. InputError E_DTYPE for data types that pack several elements into a byte."""
    bits = ITEM_BITS[dtype]
    if bits % 8:
        raise InputError(
            "E_DTYPE",
            f"Elements of type {dtype} are not whole bytes.",
            "",
            "Use a checkpoint in 16 or 32 bits.",
        )
    return bits // 8


def read_header(descriptor: int, where: str) -> Header:
    """Read and check the header of an open file; ``where`` names it in messages.

    Raises InputError: E_HEADER_SIZE, E_NOT_SAFETENSORS, and what ``parse_header`` raises.
    """
    size = os.fstat(descriptor).st_size
    first = bytearray(min(size, 512))
    read_at(descriptor, 0, memoryview(first), where)
    length = int.from_bytes(first[:8], "little")
    if size < 10 or length < 2 or length > LARGEST_HEADER or 8 + length > size:
        _explain_start(bytes(first), size, length, where)
    raw = bytearray(length)
    read_at(descriptor, 8, memoryview(raw), where)
    return parse_header(bytes(raw), size, where)


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Check the JSON bytes ``raw`` (without the 8 length bytes) of a file of ``file_size`` bytes.

    Raises InputError: E_HEADER_SIZE, E_HEADER_JSON, E_HEADER_TENSOR, E_HEADER_NAME, E_HEADER_LAYOUT.
    """
    with collector_paused():
        return _parse_header(raw, file_size, where)


@contextmanager
def collector_paused() -> Iterator[None]:
    """While a large table grows, the garbage collector would walk it again and again: twice the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _parse_header(raw: bytes, file_size: int, where: str) -> Header:
    data_start = 8 + len(raw)
    if len(raw) > LARGEST_HEADER:
        _refuse(
            "E_HEADER_SIZE", where, f"Its header has {len(raw):,} bytes; at most {LARGEST_HEADER:,} are read."
        )
    if data_start > file_size:
        _refuse("E_HEADER_SIZE", where, "The file ends inside its header: it was cut off.")
    table, plain = _parse(raw, where)
    metadata = _metadata(table.pop("__metadata__", None), where)
    _check_names(table, plain, where)
    entries = [_entry(name, fields, data_start, where) for name, fields in table.items()]
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    position = data_start
    for entry in entries:
        if entry.start != position:
            _layout(entry, position, data_start, where)
        position += entry.nbytes
    if position != file_size:
        word = "was cut off" if position > file_size else "has bytes that belong to no tensor"
        _refuse(
            "E_HEADER_LAYOUT",
            where,
            f"By its header the file ends at byte {position:,}, but it has {file_size:,}: it {word}.",
        )
    return Header(
        {entry.name: entry for entry in entries},
        metadata,
        data_start,
        file_size,
        hashlib.sha256(raw).hexdigest(),
    )


def build_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorEntry]]:
    """The first bytes of a file that holds ``tensors`` = (name, dtype, shape) in the given order.

    Returns the 8 length bytes with the JSON, padded with spaces to a multiple of 8, and where each tensor
    goes. Raises ValueError for duplicate names: what to write is decided by us, not by the input.
    """
    parts, places, position = [], [], 0
    if metadata:
        parts.append(f'"__metadata__":{json.dumps(dict(metadata), separators=(",", ":"))}')
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * item_size(dtype)
        places.append((name, dtype, tuple(shape), position, nbytes))
        dimensions = ",".join(map(str, shape))
        end = position + nbytes
        parts.append(
            f'{json.dumps(name)}:{{"dtype":"{dtype}","shape":[{dimensions}],"data_offsets":[{position},{end}]}}'
        )
        position = end
    text = ("{" + ",".join(parts) + "}").encode("ascii")
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)
    entries = {
        name: TensorEntry(name, dtype, shape, data_start + at, nbytes)
        for name, dtype, shape, at, nbytes in places
    }
    if len(entries) != len(places):
        raise ValueError("two tensors of the same name")
    return len(text).to_bytes(8, "little") + text, entries


class _Duplicate:
    """Stands for an object in which ``key`` appears twice; its place decides what the message says."""

    def __init__(self, key: str):
        self.key = key


def _parse(raw: bytes, where: str) -> tuple[dict[str, Any], bool]:
    """The top-level object, and whether all text is printable ASCII (then names need no closer look)."""
    if raw[:1] != b"{" or raw.rstrip(b" ")[-1:] != b"}":
        _refuse("E_HEADER_JSON", where, "Its header does not start with { and end with } and spaces.")
    deepest, values, objects = structure(raw, 16 * MOST_TENSORS)
    if deepest > DEPTH:
        _refuse("E_HEADER_JSON", where, "Its header is nested too deeply.")
    if objects > MOST_TENSORS + 2:  # one for the table, one for the metadata
        _refuse("E_HEADER_SIZE", where, f"It lists {objects:,} tensors; at most {MOST_TENSORS:,} are read.")
    if values > 16 * MOST_TENSORS:
        _refuse("E_HEADER_SIZE", where, f"Its header holds {values:,} values, too many for its tensors.")
    try:
        table = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_integer_parser(raw),
        )
    except (ValueError, RecursionError) as error:
        _refuse("E_HEADER_JSON", where, f"Its header is not JSON: {error}.")
    if isinstance(table, _Duplicate):
        code = "E_HEADER_JSON" if table.key == "__metadata__" else "E_HEADER_NAME"
        _refuse(code, where, f"Its header lists {_show(table.key)} twice.")
    return table, raw.isascii() and b"\\" not in raw and b"\x7f" not in raw


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Duplicate:
    result = dict(pairs)
    return result if len(result) == len(pairs) else _Duplicate(first_duplicate(pairs))


def _integer_parser(raw: bytes) -> Callable[[str], int]:
    """The built-in ``int`` where it is safe (a call into Python for each number would double the time)."""
    limited = getattr(
        sys, "get_int_max_str_digits", lambda: 0
    )()  # without a limit, long numbers take forever
    return int if limited and b"-0" not in raw else _integer


def _integer(text: str) -> int:
    # "-0" is not an unsigned integer, and nothing with 20 digits fits a file.
    return int(text) if text[0] != "-" and len(text) < 20 else (-1 if text[0] == "-" else _TOO_LARGE)


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON value")


def _metadata(value: Any, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, _Duplicate):
        _refuse("E_HEADER_JSON", where, f"Its __metadata__ has the key {_show(value.key)} twice.")
    if type(value) is not dict or not all(type(text) is str for text in value.values()):
        _refuse("E_HEADER_JSON", where, "Its __metadata__ is not a table from text to text.")
    if any(_SURROGATE.search(key) or _SURROGATE.search(text) for key, text in value.items()):
        _refuse("E_HEADER_JSON", where, "Its __metadata__ holds half of a surrogate pair.")
    return value


def _check_names(names: Mapping[str, Any], plain: bool, where: str) -> None:
    if not names:
        return
    if "" in names:
        _refuse("E_HEADER_NAME", where, "A tensor has an empty name.")
    if max(map(len, names)) > LONGEST_NAME:
        longest = max(names, key=len)
        _refuse("E_HEADER_NAME", where, f"A tensor name has {len(longest):,} characters: {_show(longest)}.")
    if plain:
        return
    seen: dict[str, str] = {}
    for name in names:
        if _FORBIDDEN.search(name):
            _refuse(
                "E_HEADER_NAME", where, f"The tensor name {_show(name)} has control or invisible characters."
            )
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            _refuse("E_HEADER_NAME", where, f"Two tensor names look alike: {_show(name)} and {_show(other)}.")


def _entry(name: str, fields: Any, data_start: int, where: str) -> TensorEntry:
    if type(fields) is not dict or fields.keys() != _FIELDS:
        _tensor(name, where, _wrong_fields(fields))
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    bits = ITEM_BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        _tensor(name, where, f"unknown data type {_show(dtype)}")
    if type(shape) is not list or len(shape) > HIGHEST_RANK:
        _tensor(name, where, f"its shape is not a list of at most {HIGHEST_RANK} numbers")
    for dimension in shape:
        if type(dimension) is not int or not 0 <= dimension <= LARGEST_DIMENSION:
            _tensor(name, where, f"the dimension {_show(dimension)} is not a whole number up to 2^40")
    if (
        type(offsets) is not list
        or len(offsets) != 2
        or type(offsets[0]) is not int
        or type(offsets[1]) is not int
    ):
        _tensor(name, where, "its data_offsets are not two whole numbers")
    begin, end = offsets
    if not 0 <= begin <= end < _TOO_LARGE:
        _tensor(name, where, f"its data_offsets [{begin}, {end}] are not in order")
    total = math.prod(shape) * bits
    if not total and math.prod(filter(None, shape)) >> 60:
        _tensor(name, where, "the product of its dimensions is too large")
    if total != 8 * (end - begin):
        _tensor(name, where, f"{dtype} {list(shape)} does not take {end - begin:,} bytes")
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, end - begin)


def _wrong_fields(fields: Any) -> str:
    if isinstance(fields, _Duplicate):
        return f"the field {_show(fields.key)} appears twice"
    if type(fields) is not dict:
        return "its entry is not an object"
    missing, unknown = sorted(_FIELDS - fields.keys()), sorted(fields.keys() - _FIELDS)
    return f"the field {_show(missing[0])} is missing" if missing else f"unknown field {_show(unknown[0])}"


def _layout(entry: TensorEntry, position: int, data_start: int, where: str) -> NoReturn:
    word = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
    begin, expected = entry.start - data_start, position - data_start
    _refuse(
        "E_HEADER_LAYOUT",
        where,
        f"Tensor {_show(entry.name)} starts at {begin:,} instead of {expected:,}: it {word}.",
    )


def _tensor(name: str, where: str, why: str) -> NoReturn:
    _refuse("E_HEADER_TENSOR", where, f"Tensor {_show(name)}: {why}.")


def _show(value: Any) -> str:
    """``value`` for a message: escaped, and never longer than a line."""
    text = ascii(value) if not isinstance(value, int) or value < _TOO_LARGE else "beyond 2^64"
    return text if len(text) <= 120 else text[:117] + "..."


def _explain_start(first: bytes, size: int, length: int, where: str) -> NoReturn:
    """Say what a file is whose first 8 bytes cannot be the length of a header."""
    known = recognise(first)
    if known:
        raise InputError("E_NOT_SAFETENSORS", f"{where} is {known[0]}.", "", known[1])
    if size == 0:
        _refuse("E_HEADER_SIZE", where, "The file is empty.")
    if size < 10:
        _refuse("E_HEADER_SIZE", where, f"The file has only {size} bytes.")
    if length < 2:
        _refuse("E_HEADER_SIZE", where, f"Its header claims {length} bytes, too few for JSON.")
    if length > LARGEST_HEADER:
        _refuse(
            "E_HEADER_SIZE",
            where,
            f"Its header claims {length:,} bytes; at most {LARGEST_HEADER:,} are read.",
        )
    _refuse(
        "E_HEADER_SIZE",
        where,
        f"Its header claims {length:,} bytes but the file has {size:,}: it was cut off.",
    )


def _refuse(code: str, where: str, why: str) -> NoReturn:
    raise InputError(
        code, f"{where} is not a sound safetensors file.", why, "Download or write it again."
    ) from None
