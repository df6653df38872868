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
from merging.evaluation.tasks import LARGEST_FILE, check_names, read_task, read_tasks

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


# -- the other kinds ----------------------------------------------------------------------------------------------

CHOICE = {"prompt": "2+2=", "choices": ["3", "4"], "answer": 1}
LABEL = {"text": "win cash", "label": 3, "labels": [2, 3]}


def dump(folder: Path, *rows: object, name: str = "task.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def test_the_kind_follows_from_the_fields(tmp_path: Path) -> None:
    rows = {"exact_match": json.loads(GOOD), "choice": CHOICE, "text": {"text": "a"}, "text_label": LABEL}
    for kind, row in rows.items():
        (task,) = read_tasks(dump(tmp_path, row | {"cluster": "c"}, name=f"{kind}.jsonl"))
        assert (task.kind, task.name, task.items[0].cluster, task.items[0].line) == (kind, kind, "c", 1)
        assert task.info.items == 1 and task.info.sha256 == task.sha256
    items = [task.items[0] for task in read_tasks(tmp_path)]
    assert [type(item).__name__ for item in items] == ["ChoiceItem", "Item", "TextItem", "TextLabelItem"]
    assert (items[0].choices, items[0].answer) == (("3", "4"), 1)
    assert (items[3].label, items[3].labels) == (3, (2, 3))
    assert len({item.id for item in items}) == 4


def test_ids_do_not_depend_on_cluster_split_and_order_of_fields(tmp_path: Path) -> None:
    one = read_tasks(dump(tmp_path, CHOICE))[0].items[0].id
    other = (
        read_tasks(dump(tmp_path, {"split": "test", "cluster": "x", **dict(reversed(CHOICE.items()))}))[0].items[0].id
    )
    changed = read_tasks(dump(tmp_path, CHOICE | {"answer": 0}))[0].items[0].id
    assert one == other != changed


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (CHOICE | {"choices": ["3"]}, "list of 2 to"),
        (CHOICE | {"choices": "34"}, "list of 2 to"),
        (CHOICE | {"choices": ["3", ""]}, "choice 1 is not a text"),
        (CHOICE | {"choices": ["3", "3"]}, "equal"),
        (CHOICE | {"answer": 2}, "number from 0 to 1"),
        (CHOICE | {"answer": -1}, "number from 0 to 1"),
        (CHOICE | {"answer": True}, "number from 0 to 1"),
        (CHOICE | {"answer": "4"}, "number from 0 to 1"),
        ({"prompt": "a", "choices": ["3", "4"]}, "'answer' is missing"),
        (CHOICE, "before, on line 1"),
        (CHOICE | {"answer": 0}, "before, on line 1"),
        (json.loads(GOOD), "looks like an item of the kind exact_match, not choice"),
        ({"text": "a"}, "looks like an item of the kind text, not choice"),
        (CHOICE | {"prompt": "b", "split": "a b"}, "short word"),
        (CHOICE | {"prompt": "b", "cluster": 3}, "'cluster' is not a text"),
        (CHOICE | {"prompt": "b", "label": 3}, "'label' is unknown"),
    ],
    ids=str,
)
def test_a_wrong_choice_is_an_error_with_its_number(tmp_path: Path, row: dict, says: str) -> None:
    with pytest.raises(TaskError) as caught:
        read_tasks(dump(tmp_path, CHOICE, row))
    assert "task.jsonl, line 2" in caught.value.what and says in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label": -1}, "'label' is not"),
        ({"label": "3"}, "'label' is not"),
        ({"label": 4}, "among them the right one"),
        ({"labels": [3]}, "at least two"),
        ({"labels": []}, "at least two"),
        ({"labels": [3, 3]}, "different"),
        ({"labels": [3, "2"]}, "'labels' is not a list of numbers"),
    ],
    ids=str,
)
def test_a_wrong_label(tmp_path: Path, change: dict, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        read_tasks(dump(tmp_path, LABEL | change))


def test_splits_become_tasks_of_their_own(tmp_path: Path) -> None:
    rows = [{"text": text, "split": split} for text, split in [("a", "test"), ("b", "validation"), ("c", "test")]]
    report, validation = read_tasks(dump(tmp_path, *rows, name="news.jsonl"))
    assert (report.name, report.split, [item.line for item in report.items]) == ("news", "test", [1, 3])
    assert (validation.name, validation.split, [item.text for item in validation.items]) == (
        "news.validation",
        "validation",
        ["b"],
    )
    assert (
        len({report.sha256, validation.sha256, hashlib.sha256((tmp_path / "news.jsonl").read_bytes()).hexdigest()}) == 3
    )
    with pytest.raises(TaskError, match="before, on line 1"):  # a text that is in two splits is a leak
        read_tasks(dump(tmp_path, rows[0], rows[1] | {"text": "a"}))


def test_the_split_can_stand_in_the_name_of_the_file(tmp_path: Path) -> None:
    (named,) = read_tasks(dump(tmp_path, {"text": "a"}, name="news.validation.jsonl"))
    assert (named.name, named.split) == ("news.validation", "validation")
    (both,) = read_tasks(dump(tmp_path, {"text": "a", "split": "validation"}, name="news.validation.jsonl"))
    assert (both.name, both.split) == ("news.validation", "validation")
    (other,) = read_tasks(dump(tmp_path, {"text": "a"}, name="news.today.jsonl"))
    assert (other.name, other.split) == ("news.today", "")


def test_a_file_of_splits_is_no_single_task(tmp_path: Path) -> None:
    pair = json.loads(GOOD)
    path = dump(tmp_path, pair, pair | {"prompt": "b", "split": "validation"})
    with pytest.raises(TaskError, match="several splits"):
        read_task(path)
    with pytest.raises(TaskError, match="not exact_match"):
        read_task(dump(tmp_path, CHOICE))


def test_a_folder_holds_tasks_with_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no task")
    with pytest.raises(TaskError, match="holds no tasks"):
        read_tasks(tmp_path)
    dump(tmp_path, {"text": "a"}, name="b.jsonl")
    dump(tmp_path, json.loads(GOOD), name="a.jsonl")
    (tmp_path / "sub").mkdir()
    assert [task.name for task in read_tasks(tmp_path)] == ["a", "b"]
    with pytest.raises(TaskError, match="both called 'a'"):
        check_names([*read_tasks(tmp_path), *read_tasks(tmp_path / "a.jsonl")])
    dump(tmp_path, {"text": ""}, name="c.jsonl")
    with pytest.raises(TaskError, match="c.jsonl, line 1"):
        read_tasks(tmp_path)
