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

from merging.checkpoints.files import read_whole
from merging.errors import InputError

DEPTH = 64
VALUES = 4_000_000

_STRUCTURE = b'"{}[],'
_REST = bytes(code for code in range(256) if code not in _STRUCTURE)
_STEP = np.zeros(256, dtype=np.int8)
_STEP[[ord("{"), ord("[")]] = 1
_STEP[[ord("}"), ord("]")]] = -1
_CHUNK = 1 << 20


def read_json(path: str | Path, limit: int, depth: int = DEPTH, values: int = VALUES) -> Any:
    """The content of a JSON side file of at most ``limit`` bytes.

    InputError E_JSON, E_NOT_FOUND, E_PATH, E_READ.
    """
    return parse_json(read_whole(path, limit, "E_JSON"), str(path), depth, values)


def parse_json(raw: bytes, where: str, depth: int = DEPTH, values: int = VALUES) -> Any:
    """``raw`` (UTF-8, a byte order mark is refused) as Python values; InputError E_JSON names ``where``."""
    deepest, count = structure(raw)
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


def structure(raw: bytes) -> tuple[int, int]:
    """(nesting depth, upper bound of the number of values) of JSON text, without parsing it.

    Right for valid JSON; for invalid JSON right up to the first error, which is as far as a parser goes.
    """
    if b"\\" in raw:
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    raw = raw.translate(None, _REST)
    if len(raw) <= 8:
        return raw.count(b"{") + raw.count(b"["), len(raw)
    level = deepest = count = 0
    inside = 0  # 1 within a string
    for start in range(0, len(raw), _CHUNK):
        codes = np.frombuffer(raw, dtype=np.uint8, count=min(_CHUNK, len(raw) - start), offset=start)
        quotes = (np.cumsum(codes == ord('"'), dtype=np.int32) + inside) & 1
        steps = _STEP[codes]
        steps[quotes == 1] = 0
        levels = np.cumsum(steps, dtype=np.int32) + level
        deepest = max(deepest, int(levels.max()))
        count += int(np.count_nonzero((codes == ord(",")) & (quotes == 0))) + int(
            np.count_nonzero(steps == 1)
        )
        inside, level = int(quotes[-1]), int(levels[-1])
    return deepest, count + 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"the key {first_duplicate(pairs)!r} appears twice in one object")
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
