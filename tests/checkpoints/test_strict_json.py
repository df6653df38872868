"""Strict JSON: sound text gives what ``json`` gives; what two readers could see differently is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merging.checkpoints.strict_json import parse_json, read_json, structure
from merging.errors import InputError

text = st.text(st.characters(codec="utf-8") | st.sampled_from('"\\[]{},:'), max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=30,
)


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


def walk(value: Any) -> list[Any]:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value, *(other for item in inner for other in walk(item))]


@given(values, st.booleans(), st.sampled_from([None, 1]))
def test_sound_json_is_read_as_json_reads_it(value: Any, ascii_only: bool, indent: int | None) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    assert parse_json(raw, "x") == json.loads(raw)
    deepest, count, objects = structure(raw, 10**9)
    everything = walk(value)
    assert deepest == depth(value)
    assert objects == sum(isinstance(item, dict) for item in everything)
    assert len(everything) <= count <= 2 * len(everything)


@pytest.mark.parametrize("size", [(1 << 20) - 3, 1 << 20, (1 << 20) + 1, (3 << 20) + 7])
def test_depth_and_number_are_counted_over_any_length(size: int) -> None:
    """The text is looked at in pieces; a string or a level may go from one piece into the next."""
    raw = b"[" + b"[]," * size + b'"[[[' + b"," * size + b'\\"",[[1]]]'
    assert structure(raw, 10**9)[0] == 3
    assert structure(raw, 10**9)[1] >= 2 * size
    assert structure(raw.replace(b"[]", b"{}"), 10**9)[2] == size


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"a":1,"a":1}', "twice"),
        (b'[{"b":{"a":1,"\\u0061":2}}]', "twice"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "Infinity"),
        (b"[1e309]", "too large"),
        (b"[-1e309]", "too large"),
        (b"[" + b"1" * 41 + b"]", "too long"),
        (b'["\\ud800"]', "surrogates"),
        (b'{"\\uDfff":1}', "surrogates"),
        (b'["\xff"]', "utf-8"),
        (b"\xef\xbb\xbf[]", "BOM"),
        (b"[" * 65 + b"]" * 65, "64 levels"),
        (b"", "Expecting value"),
        (b"[1] 2", "Extra data"),
    ],
)
def test_what_two_readers_could_see_differently_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_json(raw, "config.json")
    assert caught.value.code == "E_JSON" and words in str(caught.value) and "config.json" in str(caught.value)


def test_limits_are_inclusive(tmp_path: Path) -> None:
    assert parse_json(b"[" * 64 + b"]" * 64, "x") is not None
    assert parse_json(b"[1,2,3]", "x", values=4) == [1, 2, 3]
    with pytest.raises(InputError, match="more than 3 values"):
        parse_json(b"[1,2,3]", "x", values=3)
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": 1.5}')
    assert read_json(path, 10) == {"a": 1.5}
    with pytest.raises(InputError, match="has 10 bytes") as caught:
        read_json(path, 9)
    assert caught.value.code == "E_JSON"
