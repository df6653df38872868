"""The hostile corpus: files and folders that a stranger could prepare, each with what must happen.

``CASES`` maps a name to a ``Case``: ``make(folder)`` writes it and returns the path to open; ``code`` is the
error that must come, or None where the model is sound and ``tensors`` says how many it has. The headers are
those that safetensors 0.8 refuses, those that it takes and we refuse, and some that are merely odd.
"""

from __future__ import annotations

import json
import struct
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MORE = 1 << 40


@dataclass(frozen=True)
class Case:
    make: Callable[[Path], Path]
    code: str | None
    tensors: int = 1
    words: str = ""


CASES: dict[str, Case] = {}


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_bytes(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of a JSON value, or of header bytes as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def add(
    name: str, content: bytes | Callable[[], bytes], code: str | None, tensors: int = 1, words: str = ""
) -> None:
    """A folder with ``content`` as model.safetensors."""

    def make(folder: Path) -> Path:
        (folder / "model.safetensors").write_bytes(content if isinstance(content, bytes) else content())
        return folder

    assert name not in CASES
    CASES[name] = Case(make, code, tensors, words)


def header(
    name: str, value: object, code: str | None, body: int = 8, tensors: int = 1, words: str = ""
) -> None:
    add(name, lambda: file_bytes(value, bytes(body)), code, tensors, words)


def text(
    name: str, raw: str | bytes, code: str | None, body: int = 8, tensors: int = 1, words: str = ""
) -> None:
    """A header written out by hand, because json.dumps would not write it."""
    header(name, raw.encode() if isinstance(raw, str) else raw, code, body, tensors, words)


# 1. The frame: eight bytes of length, and something behind them.
GOOD = {"a": entry(0, 8)}
header("sound", GOOD, None)
add("empty file", b"", "E_HEADER_SIZE", words="empty")
add("7 bytes", bytes(7), "E_HEADER_SIZE")
add("8 bytes", bytes(8), "E_HEADER_SIZE")
add("length 0", file_bytes(GOOD, bytes(8), length=0), "E_HEADER_SIZE")
add("length 1", file_bytes(GOOD, bytes(8), length=1), "E_HEADER_SIZE")
add("length beyond the file", file_bytes(GOOD, bytes(8), length=100_000), "E_HEADER_SIZE", words="cut off")
add("length 2^64 - 1", file_bytes(GOOD, bytes(8), length=2**64 - 1), "E_HEADER_SIZE")
add("length 100,000,001", file_bytes(GOOD, bytes(8), length=100_000_001), "E_HEADER_SIZE", words="at most")
add("length that ends inside the JSON", file_bytes(GOOD, bytes(8), length=20), "E_HEADER_JSON")
add("length that reaches into the weights", file_bytes(GOOD, bytes(8), length=60), "E_HEADER_JSON")


def sparse(size: int, name: str = "model.safetensors") -> Callable[[Path], Path]:
    """A header of many megabytes that is all zeros and takes no room on the disk."""

    def make(folder: Path) -> Path:
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", size))
            file.truncate(size + 8)
        return folder

    return make


CASES["header of 31 MB of zeros"] = Case(sparse(31_000_000), "E_HEADER_JSON")
CASES["header of 900 MB of zeros"] = Case(sparse(900_000_000), "E_HEADER_SIZE")
CASES["header of 33 MB of zeros"] = Case(sparse(33_000_000), "E_HEADER_SIZE")

# 2. Where the bytes lie.
header("hole in the middle", {"a": entry(0, 4), "b": entry(8, 12)}, "E_HEADER_LAYOUT", 12, words="hole")
header("hole at the start", {"a": entry(4, 8)}, "E_HEADER_LAYOUT", words="hole")
header("one byte too many", GOOD, "E_HEADER_LAYOUT", 9, words="belong to no tensor")
header("half of the weights", GOOD, "E_HEADER_LAYOUT", 4, words="cut off")
header("no weights", GOOD, "E_HEADER_LAYOUT", 0, words="cut off")
header("full overlap", {"a": entry(0, 8), "b": entry(0, 8)}, "E_HEADER_LAYOUT", words="overlap")
header("partial overlap", {"a": entry(0, 8), "b": entry(4, 12)}, "E_HEADER_LAYOUT", 12, words="overlap")
header("begin after end", {"a": entry(8, 0, [0])}, "E_HEADER_TENSOR")
header("negative offset", {"a": entry(-8, 0, [2])}, "E_HEADER_TENSOR")
header("offset of 30 digits", {"a": entry(0, 10**30, [2])}, "E_HEADER_TENSOR")
header("offset 2^63", {"a": entry(0, 2**63, [2])}, "E_HEADER_TENSOR")
header("three offsets", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, "E_HEADER_TENSOR")
header(
    "offsets as text", {"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}, "E_HEADER_TENSOR"
)
header(
    "offsets as true",
    {"a": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}},
    "E_HEADER_TENSOR",
    1,
)
header(
    "first offset as false",
    {"a": {"dtype": "U8", "shape": [1], "data_offsets": [False, 1]}},
    "E_HEADER_TENSOR",
    1,
)
header(
    "last offset as true",
    {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, True]}},
    "E_HEADER_TENSOR",
    1,
)
header("unsorted offsets", {"b": entry(4, 12), "a": entry(0, 4)}, None, 12, 2)
header(
    "odd place of a 16-bit tensor", {"a": entry(0, 1, [1], "U8"), "b": entry(1, 5, [2], "F16")}, None, 5, 2
)
text("odd length of the header", json.dumps(GOOD) + " " * (1 - len(json.dumps(GOOD)) % 2), None)

# 3. Shapes and data types.
header("negative dimension", {"a": entry(0, 8, [-2])}, "E_HEADER_TENSOR")
header("two negative dimensions", {"a": entry(0, 8, [-2, -1])}, "E_HEADER_TENSOR")
text("minus zero", '{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', "E_HEADER_TENSOR", 0)
header("dimension 2.0", {"a": entry(0, 8, [2.0])}, "E_HEADER_TENSOR")
text("dimension 2e0", '{"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}', "E_HEADER_TENSOR")
text("dimension 02", '{"a":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}}', "E_HEADER_JSON")
text(
    "dimension of 5,000 digits",
    '{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % ("9" * 5000),
    "E_HEADER_JSON",
)
header("dimension true", {"a": entry(0, 4, [True])}, "E_HEADER_TENSOR", 4)
header("dimension null", {"a": entry(0, 4, [None])}, "E_HEADER_TENSOR", 4)
header("shape as a number", {"a": entry(0, 8, 2)}, "E_HEADER_TENSOR")
header("shape in a list", {"a": entry(0, 8, [[2]])}, "E_HEADER_TENSOR")
header("product that overflows", {"a": entry(0, 8, [2**62, 2**62])}, "E_HEADER_TENSOR")
header("dimension 2^60", {"a": entry(0, 8, [2**60])}, "E_HEADER_TENSOR")
header("zero times 2^40", {"a": entry(0, 0, [0, 2**40])}, None, 0)
header("zero times 2^40 + 1", {"a": entry(0, 0, [0, 2**40 + 1])}, "E_HEADER_TENSOR", 0)
header("zero times 2^60", {"a": entry(0, 0, [0, 2**60])}, "E_HEADER_TENSOR", 0)
header("zero times 2^63", {"a": entry(0, 0, [0, 2**63])}, "E_HEADER_TENSOR", 0)
header("zero times 2^64 - 1", {"a": entry(0, 0, [0, 2**64 - 1])}, "E_HEADER_TENSOR", 0)
header("overflow before zero", {"a": entry(0, 0, [2**60, 2**60, 0])}, "E_HEADER_TENSOR", 0)
header(
    "overflow of allowed dimensions before zero", {"a": entry(0, 0, [2**40, 2**40, 0])}, "E_HEADER_TENSOR", 0
)
header("rank 9", {"a": entry(0, 4, [1] * 9)}, "E_HEADER_TENSOR", 4)
header("rank 10,000", {"a": entry(0, 4, [1] * 10_000)}, "E_HEADER_TENSOR", 4)
header("rank 8", {"a": entry(0, 4, [1] * 8)}, None, 4)
header("scalar", {"a": entry(0, 4, [])}, None, 4)
header("empty tensor", {"a": entry(0, 0, [0, 7]), "b": entry(0, 8)}, None, 8, 2)
header("data type F99", {"a": entry(0, 8, [2], "F99")}, "E_HEADER_TENSOR", words="F99")
header("data type f32", {"a": entry(0, 8, [2], "f32")}, "E_HEADER_TENSOR", words="f32")
header("data type 32", {"a": entry(0, 8, [2], 32)}, "E_HEADER_TENSOR")
header("data type in a list", {"a": entry(0, 8, [2], ["F32"])}, "E_HEADER_TENSOR")
header("F64 over 4 bytes", {"a": entry(0, 4, [1], "F64")}, "E_HEADER_TENSOR", 4)
header("odd number of F4", {"a": entry(0, 1, [3], "F4")}, "E_HEADER_TENSOR", 1)
header("even number of F4", {"a": entry(0, 8, [16], "F4")}, "E_QUANTIZED")
header("F6_E2M3", {"a": entry(0, 6, [8], "F6_E2M3")}, "E_QUANTIZED", 6)
header("F8_E4M3", {"a": entry(0, 8, [8], "F8_E4M3")}, "E_QUANTIZED")
header("F8 scales", {"a": entry(0, 8, [8], "F8_E8M0")}, "E_QUANTIZED")
add("bool that is 2", file_bytes({"a": entry(0, 1, [1], "BOOL")}, b"\x02"), None)
add("weights that are NaN", file_bytes(GOOD, b"\xff" * 8), None)

# 4. The fields of an entry.
header(
    "missing shape",
    {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "E_HEADER_TENSOR",
    words="'shape' is missing",
)
header("missing data type", {"a": {"shape": [2], "data_offsets": [0, 8]}}, "E_HEADER_TENSOR", words="missing")
header("unknown field", {"a": {**entry(0, 8), "codec": "zip"}}, "E_HEADER_TENSOR", words="codec")
header("empty entry", {"a": {}}, "E_HEADER_TENSOR", 0)
header("entry that is a list", {"a": [1]}, "E_HEADER_TENSOR", 0)
header("entry that is null", {"a": None}, "E_HEADER_TENSOR", 0)
header("entry that is text", {"a": "F32"}, "E_HEADER_TENSOR", 0)

# 5. Duplicates, each of which two readers may see differently.
A, B = json.dumps(entry(0, 8)), json.dumps(entry(0, 16, [3, 9]))
text("duplicate name", f'{{"a":{A},"a":{A}}}', "E_HEADER_NAME", words="twice")
text("duplicate name that hides another entry", f'{{"a":{B},"a":{A}}}', "E_HEADER_NAME", words="twice")
text("duplicate name in disguise", f'{{"a":{A},"\\u0061":{A}}}', "E_HEADER_NAME", words="twice")
text(
    "duplicate metadata",
    f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{A}}}',
    "E_HEADER_JSON",
    words="twice",
)
text(
    "duplicate key in the metadata",
    f'{{"__metadata__":{{"k":"1","k":"2"}},"a":{A}}}',
    "E_HEADER_JSON",
    words="twice",
)
text("duplicate field", f'{{"a":{{"dtype":"F16",{A[1:]}}}', "E_HEADER_TENSOR", words="twice")

# 6. Metadata.
header("metadata", {"__metadata__": {"format": "pt"}, **GOOD}, None)
header("metadata null", {"__metadata__": None, **GOOD}, None)
header("metadata as a number", {"__metadata__": 7, **GOOD}, "E_HEADER_JSON")
header("metadata as a list", {"__metadata__": ["a"], **GOOD}, "E_HEADER_JSON")
header("metadata with a number", {"__metadata__": {"step": 7}, **GOOD}, "E_HEADER_JSON")
header("metadata with an object", {"__metadata__": {"a": {"b": "c"}}, **GOOD}, "E_HEADER_JSON")
header("metadata with null", {"__metadata__": {"a": None}, **GOOD}, "E_HEADER_JSON")
add(
    "metadata of 10 MB", lambda: file_bytes({"__metadata__": {"a": "x" * 10_000_000}, **GOOD}, bytes(8)), None
)
text("metadata with half a surrogate pair", f'{{"__metadata__":{{"k":"\\ud800"}},"a":{A}}}', "E_HEADER_JSON")

# 7. JSON that is not what it seems.
text("space before the brace", " " + json.dumps(GOOD), "E_HEADER_JSON")
text("byte order mark", b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "E_HEADER_JSON")
text("spaces behind", json.dumps(GOOD) + " " * 13, None)
text("newlines behind", json.dumps(GOOD) + "\n\n", "E_HEADER_JSON")
text("garbage behind", json.dumps(GOOD) + "x", "E_HEADER_JSON")
text("second object behind", json.dumps(GOOD) + "{}", "E_HEADER_JSON")
text("NULs behind", json.dumps(GOOD) + "\0\0\0", "E_HEADER_JSON")
text("not UTF-8", b'{"\xff":' + A.encode() + b"}", "E_HEADER_JSON")
text("surrogate as bytes", b'{"\xed\xa0\x80":' + A.encode() + b"}", "E_HEADER_JSON")
text("UTF-16", json.dumps(GOOD).encode("utf-16-le"), "E_HEADER_JSON")
text("single quotes", json.dumps(GOOD).replace('"', "'"), "E_HEADER_JSON")
text("comma at the end", json.dumps(GOOD)[:-1] + ",}", "E_HEADER_JSON")
text("comment", "{/* no */" + json.dumps(GOOD)[1:], "E_HEADER_JSON")
text("control character in a string", f'{{"a\nb":{A}}}', "E_HEADER_JSON")
text("list", "[]", "E_HEADER_JSON", 0)
text("null", "null", "E_HEADER_JSON", 0)
text("no tensors", "{}", None, 0, 0)
text("NaN as a dimension", '{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', "E_HEADER_JSON")
text(
    "Infinity as an offset", '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}', "E_HEADER_JSON"
)
text("100,000 brackets", "{" + "[" * 100_000 + "}", "E_HEADER_JSON")
text("100,000 nested lists", '{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "E_HEADER_JSON", words="deep")
text("30,000 nested objects", '{"a":' * 30_000 + "1" + "}" * 30_000, "E_HEADER_JSON", words="deep")
text(
    "escaped quotes before brackets",
    '{"a\\"b\\\\":' + "[" * 5_000 + "]" * 5_000 + "}",
    "E_HEADER_JSON",
    words="deep",
)
add(
    "31 MB of dimensions",
    lambda: file_bytes(b'{"a":{"shape":[' + b"1," * 15_000_000 + b"1]}}"),
    "E_HEADER_SIZE",
)
add("31 MB of empty lists", lambda: file_bytes(b'{"a":[' + b"[]," * 10_000_000 + b"[]]}"), "E_HEADER_SIZE")
add("31 MB of backslashes", lambda: file_bytes(b'{"' + b"\\\\" * 15_000_000 + b'":1}'), "E_HEADER_NAME")
add("31 MB of quotes", lambda: file_bytes(b"{" + b'"' * 30_000_000 + b"}"), "E_HEADER_JSON")
add("31 MB of digits", lambda: file_bytes(b'{"a":' + b"9" * 30_000_000 + b"}"), "E_HEADER_JSON")
add("31 MB of spaces", lambda: file_bytes(b"{" + b" " * 30_000_000 + b"}"), None, 0)


def many(count: int) -> Callable[[], bytes]:
    return lambda: file_bytes({f"tensor.{number}": entry(0, 0, [0]) for number in range(count)})


add("20,000 empty tensors", many(20_000), None, 20_000)
add("300,000 empty tensors", many(300_000), "E_HEADER_SIZE")

# 8. Names.
ACCENT = unicodedata.normalize("NFC", "é")
header("name with slashes", {"../../etc/passwd": entry(0, 8)}, None)
header("name with HTML", {"<img src=x onerror=alert(1)>": entry(0, 8)}, None)
header("name with an emoji", {"layers.🙂.weight": entry(0, 8)}, None)
header("name of 512 characters", {"x" * 512: entry(0, 8)}, None)
header("name of 513 characters", {"x" * 513: entry(0, 8)}, "E_HEADER_NAME")
header("name of a million characters", {"x" * 1_000_000: entry(0, 8)}, "E_HEADER_NAME")
header("empty name", {"": entry(0, 8)}, "E_HEADER_NAME")
header("name with NUL", {"a\0b": entry(0, 8)}, "E_HEADER_NAME")
header("name with a newline", {"a\nb": entry(0, 8)}, "E_HEADER_NAME")
header("name with an escape sequence", {"\x1b[2Ja": entry(0, 8)}, "E_HEADER_NAME")
header("name with delete", {"a\x7fb": entry(0, 8)}, "E_HEADER_NAME")
text("name with a bare delete", f'{{"a\x7fb":{A}}}', "E_HEADER_NAME")
header("name that runs from right to left", {"a\u202eb": entry(0, 8)}, "E_HEADER_NAME")
header("name with an isolate", {"a\u2066b": entry(0, 8)}, "E_HEADER_NAME")
header("name with a space of no width", {"a\u200bb": entry(0, 8)}, "E_HEADER_NAME")
header("names that look alike", {ACCENT: entry(0, 4), "e\u0301": entry(4, 8)}, "E_HEADER_NAME", words="alike")
text("name with half a surrogate pair", f'{{"\\ud800":{A}}}', "E_HEADER_NAME")
text("name with a whole surrogate pair", f'{{"\\ud83d\\ude42":{A}}}', None)

# 9. Files that are something else.
HTML = b"\n<!DOCTYPE html><html><head><title>401</title></head></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4976698672\n"
add("Git-LFS pointer", LFS, "E_NOT_SAFETENSORS", words="Git-LFS")
add("HTML page", HTML, "E_NOT_SAFETENSORS", words="HTML")
add("zip archive", b"PK\x03\x04" + bytes(60), "E_NOT_SAFETENSORS", words="zip")
add(
    "pickle of protocol 2",
    b"\x80\x02cposix\nsystem\nq\x00X\x02\x00\x00\x00idq\x01\x85q\x02Rq\x03.",
    "E_NOT_SAFETENSORS",
    words="pickle",
)
add("pickle of protocol 4", b"\x80\x04\x95" + bytes(range(1, 60)), "E_NOT_SAFETENSORS", words="pickle")
add("GGUF", b"GGUF\x03" + bytes(60), "E_NOT_SAFETENSORS", words="GGUF")
add("HDF5", b"\x89HDF\r\n\x1a\n" + bytes(60), "E_NOT_SAFETENSORS", words="HDF5")
add("bare JSON", json.dumps(GOOD).encode(), "E_HEADER_SIZE")
add("random text", b"These are not the weights you are looking for.", "E_HEADER_SIZE")
