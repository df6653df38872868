"""The task reader takes exactly what it should, and names the line of everything else."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from merging.errors import TaskError
from merging.evaluation.tasks import LARGEST_FILE, read_task

GOOD = '{"prompt": "2+2=", "answer": "4"}'


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "sums.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_reads_items_in_order_with_the_hash_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + '\n{"answer": "ö\\n", "prompt": "b"}\n')
    task = read_task(path)
    assert task.name == "sums"
    assert [(item.prompt, item.answer, item.line) for item in task.items] == [("2+2=", "4", 1), ("b", "ö\n", 2)]
    assert task.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_task(path, name="arithmetic").name == "arithmetic"


@pytest.mark.parametrize("content", [GOOD, GOOD + "\n", GOOD + "\r\n", " " + GOOD + "\t\n"])
def test_line_ends_do_not_matter(tmp_path: Path, content: str) -> None:
    assert [item.prompt for item in read_task(write(tmp_path, content)).items] == ["2+2="]


def test_unicode_line_separators_inside_a_text_are_text(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "a\u2028b\x85c", "answer": "d"}, ensure_ascii=False)
    assert read_task(write(tmp_path, line + "\n")).items[0].prompt == "a\u2028b\x85c"


def test_item_ids_depend_on_prompt_and_answer_only(tmp_path: Path) -> None:
    first = read_task(write(tmp_path, GOOD)).items[0].id
    moved = read_task(write(tmp_path, '{"prompt": "x", "answer": "y"}\n{"answer":"4","prompt":"2+2="}')).items[1].id
    other = read_task(write(tmp_path, '{"prompt": "2+2=", "answer": "5"}')).items[0].id
    assert first == moved != other


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "blank"),
        ("   ", "blank"),
        ("{", "JSON"),
        ("[1]", "object"),
        ("4", "object"),
        ('{"prompt": "a"}', "'answer' is missing"),
        ('{"answer": "a"}', "'prompt' is missing"),
        ('{"prompt": "a", "answer": 4}', "not a text"),
        ('{"prompt": "a", "answer": ""}', "not a text"),
        ('{"prompt": " ", "answer": "b"}', "not a text"),
        ('{"prompt": "a", "answer": null}', "not a text"),
        ('{"prompt": "a", "answer": "b", "anwser": "c"}', "'anwser' is unknown"),
        ('{"prompt": "a", "prompt": "b", "answer": "c"}', "twice"),
        ('{"prompt": "a", "answer": NaN}', "NaN"),
        ('{"prompt": "a", "answer": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "JSON"),
        (GOOD, "line 1"),
        (GOOD + GOOD, "JSON"),
        ("\ufeff" + GOOD, "JSON"),
    ],
)
def test_a_wrong_line_is_an_error_with_its_number(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(TaskError) as caught:
        read_task(write(tmp_path, f"{GOOD}\n{line}\n" + '{"prompt": "c", "answer": "d"}\n'))
    assert caught.value.code == "E_TASK"
    assert "line 2" in caught.value.what
    assert says in str(caught.value)


def test_bytes_that_are_not_utf8_are_an_error_with_the_line(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="line 2"):
        read_task(write(tmp_path, GOOD.encode() + b'\n{"prompt": "\xff", "answer": "b"}'))


def test_what_is_no_readable_file_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "large.jsonl").touch()
    os.truncate(tmp_path / "large.jsonl", LARGEST_FILE + 1)
    write(tmp_path, "")
    for name, says in [
        ("absent.jsonl", "no task file"),
        ("", "not a file"),
        ("pipe.jsonl", "not a file"),
        ("large.jsonl", "bytes"),
        ("sums.jsonl", "no items"),
        ("a\0b", "cannot be read"),
    ]:
        with pytest.raises(TaskError, match=says):
            read_task(tmp_path / name)


TEXT = some.text(min_size=1).filter(lambda text: text.strip() and not any("\ud800" <= c <= "\udfff" for c in text))


@given(some.lists(some.tuples(TEXT, TEXT), min_size=1, unique_by=lambda pair: pair[0]), some.booleans())
def test_whatever_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, pairs: list, ascii_only: bool) -> None:
    lines = [json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=ascii_only) for prompt, answer in pairs]
    path = write(tmp_path_factory.mktemp("task"), "\n".join(lines))
    assert [(item.prompt, item.answer) for item in read_task(path).items] == pairs
