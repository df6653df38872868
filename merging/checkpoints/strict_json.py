"""JSON without its traps.

Python's ``json`` takes duplicate keys (the last wins), NaN and Infinity, half a surrogate pair, integers of a
million digits, and nesting that runs into the recursion limit. Each of these lets two readers see two
different files, or stops the program. Here they are errors, and size, depth and the number of values are
known *before* anything is parsed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from merging.checkpoints.files import read_whole, shown
from merging.errors import InputError

DEPTH = 64
VALUES = 4_000_000

_STRUCTURE = b'"{}[],'
_REST = bytes(code for code in range(256) if code not in _STRUCTURE)
_STEP = np.zeros(256, dtype=np.int8)
_STEP[[ord("{"), ord("[")]] = 1
_STEP[[ord("}"), ord("]")]] = -1
_STARTS = np.zeros(256, dtype=bool)  # each of these may be followed by one more value
_STARTS[[ord("{"), ord("["), ord(",")]] = True
_CHUNK = 1 << 20


def read_json(path: str | Path, limit: int, depth: int = DEPTH, values: int = VALUES) -> Any:
    """The content of a JSON side file of at most ``limit`` bytes.

    InputError E_JSON, E_NOT_FOUND, E_PATH, E_READ.
    """
    return parse_json(read_whole(path, limit, "E_JSON"), shown(path), depth, values)


def parse_json(raw: bytes, where: str, depth: int = DEPTH, values: int = VALUES) -> Any:
    """``raw`` (UTF-8, a byte order mark is refused) as Python values; InputError E_JSON names ``where``."""
    deepest, count, _ = structure(raw, values)
    if deepest > depth:
        _refuse(where, f"It is nested more than {depth} levels deep.")
    if count > values:
        _refuse(where, f"It holds more than {values:,} values.")
    try:
        text = raw.decode("utf-8")
        result = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_integer,
            parse_float=_float,
        )
        if b"\\ud" in raw or b"\\uD" in raw:  # half of a surrogate pair cannot be written as UTF-8 again
            json.dumps(result, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        _refuse(where, f"{error}.")
    return result


def structure(raw: bytes, most: int) -> tuple[int, int, int]:
    """(nesting depth, upper bound of the number of values, number of objects) of JSON text, unparsed.

    Counting stops where there are more than ``most`` values. Right for valid JSON; for invalid JSON right up
    to the first error, which is as far as a parser goes.
    """
    if b"\\" in raw:
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    raw = raw.translate(None, _REST).replace(b'""', b"")  # most strings vanish; two quotes cancel out anyway
    level = deepest = values = objects = 0
    inside = 0  # 1 within a string
    for start in range(0, len(raw), _CHUNK):
        codes = np.frombuffer(raw, dtype=np.uint8, count=min(_CHUNK, len(raw) - start), offset=start)
        quotes = (np.cumsum(codes == ord('"'), dtype=np.int32) + inside) & 1
        inside = int(quotes[-1])
        codes = codes[quotes == 0]
        if len(codes):
            levels = np.cumsum(_STEP[codes], dtype=np.int32) + level
            deepest, level = max(deepest, int(levels.max())), int(levels[-1])
            values += int(np.count_nonzero(_STARTS[codes]))
            objects += int(np.count_nonzero(codes == ord("{")))
        if values > most:
            break
    return deepest, values + 1, objects


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"the key {first_duplicate(pairs)!a} appears twice in one object")
    return result


def first_duplicate(pairs: list[tuple[str, Any]]) -> str:
    """The first key of ``pairs`` that was there before."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key[:200]
        seen.add(key)
    raise AssertionError("no duplicate")


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _integer(text: str) -> int:
    if len(text) > 40:
        raise ValueError(f"the number {text[:40]}… is too long")
    return int(text)


def _float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _refuse(where: str, why: str) -> NoReturn:
    raise InputError(
        "E_JSON", f"{where} is not usable JSON.", why, "Restore the file from its source."
    ) from None
