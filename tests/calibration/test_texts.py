"""Calibration texts are read strictly, drawn the same way everywhere, and counted right."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merging.calibration.texts import LONGEST_LINE, choose, equal_shares, find_texts, read_texts
from merging.errors import InputError

DEMO = Path(__file__).parents[2] / "assets" / "demo"


def write(path: Path, *texts: str, field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_reads_texts_prompts_and_paragraphs_with_their_lines(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_bytes('{"text": "é\\u2028\u2029 x"}\r\n{"prompt": " two "}'.encode())
    found = list(read_texts(lines))
    assert [(t.text, t.line, t.where) for t in found] == [
        ("é\u2028\u2029 x", 1, f"{lines}, line 1"),
        (" two ", 2, f"{lines}, line 2"),
    ]
    plain = tmp_path / "a.TXT"
    plain.write_bytes(b"\n \nfirst\r\n  second\n\n\t\nthird")
    assert [(t.text, t.line) for t in read_texts(plain)] == [("first\n  second", 3), ("third", 7)]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"text": "a"}\n\n', "line 2: it is blank"),
        (b'{"text": "a"}\n{"text": "b"\n', "line 2: it is not the JSON"),
        (b'{"text": "a", "text": "b"}', "line 1: it is not the JSON asked for .*twice"),
        (b'{"text": NaN}', "line 1: it is not the JSON asked for .*NaN"),
        (b'{"text": "\\ud800"}', "line 1: it is not the JSON"),
        (b'{"text": "a"}\n["b"]', "line 2: it is not a JSON object"),
        (b'{"text": "a"}\n{"text": 3}', "line 2: the field 'text' is not a text"),
        (b'{"prompt": "  "}', "line 1: the field 'prompt' is not a text"),
        (b'{"txt": "a"}', 'line 1: it must have one field, "text" or "prompt"'),
        (b"{}", "line 1: it must have one field"),
        (b'{"text": "a", "prompt": "b"}', "line 1: it must have one field"),
        (b'{"prompt": "1+1=", "answer": "2"}', "line 1: it has an answer"),
        (b'{"text": "a"}\n\xff', "line 2: it is not UTF-8"),
        (b'{"text": "' + b"[" * 100_000, "line 1: it is not the JSON"),
        (b"[" * 100_000, "line 1: it is not the JSON"),
        (b" " * (LONGEST_LINE + 1), "line 1: it is longer"),
        (b"", "holds no text"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_everything_else_is_an_error_with_file_and_line(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=complaint) as caught:
        list(read_texts(path))
    assert caught.value.code == "E_TEXT"
    assert str(path) in caught.value.what


def test_a_plain_text_without_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n \n\n")
    with pytest.raises(InputError, match="holds no text"):
        list(read_texts(path))
    path.write_bytes(b"fine\n\n\xc3(\n")
    with pytest.raises(InputError, match="line 3: it is not UTF-8"):
        list(read_texts(path))


def test_what_is_no_file_is_an_error_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for name in ("pipe.txt", ".", "missing.jsonl", "a\0b"):
        with pytest.raises(InputError) as caught:
            list(read_texts(tmp_path / name))
        assert caught.value.code == "E_TEXT"


def test_a_long_file_is_read_in_a_little_memory(tmp_path: Path) -> None:
    """Only what is drawn is kept: the generator gives the first text before it has seen the last line."""
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "fine"}\n' * 3 + "broken")
    reader = read_texts(path)
    assert next(reader).text == "fine"
    with pytest.raises(InputError, match="line 4"):
        list(reader)


def test_the_draw_does_not_depend_on_the_order_of_the_lines_and_grows(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(50)]
    one = write(tmp_path / "one.jsonl", *texts)
    other = write(tmp_path / "other.jsonl", *reversed(texts))
    drawn = [t.text for t in choose([one], 10, seed=3).texts]
    assert len(set(drawn)) == 10
    assert sorted(drawn, key=texts.index) == drawn  # in the order of the file
    assert {t.text for t in choose([other], 10, seed=3).texts} == set(drawn)
    assert set(drawn) < {t.text for t in choose([one], 20, seed=3).texts}
    assert set(drawn) != {t.text for t in choose([one], 10, seed=4).texts}
    assert choose([one], 10, seed=3).key == choose([one], 10, seed=3).key != choose([one], 10, seed=4).key


def test_the_draw_is_the_documented_one_and_uniform(tmp_path: Path) -> None:
    import hashlib

    path = write(tmp_path / "a.jsonl", *"abcdefgh")
    expected = sorted("abcdefgh", key=lambda t: hashlib.sha256(f"5\0{t}".encode()).digest())[:3]
    assert {t.text for t in choose([path], 3, seed=5).texts} == set(expected)
    counts = Counter(t.text for seed in range(400) for t in choose([path], 2, seed).texts)
    # each letter is drawn with probability 1/4: 100 ± 8.7 in 400 draws; 5 standard deviations
    assert all(abs(counts[letter] - 100) < 44 for letter in "abcdefgh")


def test_files_share_equally_and_doubles_count_once(tmp_path: Path) -> None:
    many = write(tmp_path / "many.jsonl", *(f"m{n}" for n in range(30)), "m0", "m1")
    few = write(tmp_path / "few.jsonl", "f0", "f1", "m2", field="prompt")
    chosen = choose([many, few], 10)
    assert chosen.available == {str(many): 30, str(few): 2}
    assert Counter(t.source for t in chosen.texts) == {str(many): 8, str(few): 2}
    assert len({t.text for t in chosen.texts}) == 10
    assert chosen.notes == ("3 texts occur again; each counts once.",)
    everything = choose([few], 10)
    assert [t.line for t in everything.texts] == [1, 2, 3]
    assert everything.notes == ("10 texts were asked for; there are only 3.",)


@given(st.integers(0, 60), st.lists(st.integers(0, 20), max_size=6))
def test_shares_are_as_equal_as_can_be(count: int, available: list[int]) -> None:
    shares = equal_shares(count, available)
    assert sum(shares) == min(count, sum(available))
    assert all(0 <= share <= have for share, have in zip(shares, available, strict=True))
    # who still has texts got at most one less than anybody else
    unfinished = [share for share, have in zip(shares, available, strict=True) if share < have]
    assert not unfinished or max(shares) - min(unfinished) <= 1


@pytest.mark.parametrize("count", [0, -1])
def test_a_draw_of_nothing_is_an_error(tmp_path: Path, count: int) -> None:
    with pytest.raises(InputError, match="at least 1"):
        choose([write(tmp_path / "a.jsonl", "a")], count)


def test_no_file_or_the_same_file_twice_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "a")
    with pytest.raises(InputError, match="No calibration text"):
        choose([], 1)
    with pytest.raises(InputError, match="twice"):
        choose([path, path], 1)


def test_texts_find_their_experts(tmp_path: Path) -> None:
    names = ["reverse", "sort"]
    folder = DEMO / "calibration"
    assert find_texts(folder, names) == [[folder / "reverse.jsonl"], [folder / "sort.jsonl"]]
    assert find_texts("a.txt", names) == [[Path("a.txt")]] * 2
    assert find_texts(["a.txt", "b.txt"], names) == [[Path("a.txt")], [Path("b.txt")]]
    with pytest.raises(InputError, match="3 calibration files for 2 experts"):
        find_texts(["a", "b", "c"], names)
    with pytest.raises(InputError, match="neither other.jsonl nor other.txt"):
        find_texts(folder, ["sort", "other"])
    (tmp_path / "x.txt").touch()
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(InputError, match="both"):
        find_texts([tmp_path], ["deep/x"])
