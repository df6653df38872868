"""Tasks, read strictly from JSON lines.

The one idea: a task file is evidence, so a line that is not exactly what it should be is an error with its number,
never skipped. A skipped or doubled line would change the score without anybody seeing it.

What is measured follows from the fields of the lines, which must be the same kind throughout a file::

    {"prompt": "reverse abcdefgh=", "answer": "hgfedcba"}              exact_match   what a model writes
    {"prompt": "Sky:", "choices": [" blue", " red"], "answer": 0}      choice        which it finds most likely
    {"text": "It was a bright cold day in April."}                     text          how well it predicts it
    {"text": "win cash now", "label": 1, "labels": [0, 1]}             text_label    its class (labels: among these)

Images are the fifth kind (``image_tasks.py``). Any line may also have a ``cluster`` (items with the same label, such as
a document, are not independent) and a ``split``: a file with several splits is several tasks, ``sort`` for the split
``test`` or none and ``sort.validation`` for another. A file named ``sort.validation.jsonl`` is the same thing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from merging.errors import TaskError
from merging.evaluation.items import ChoiceItem, Item, TextItem, TextLabelItem
from merging.evaluation.records import TaskInfo, no_constant, no_doubles

if TYPE_CHECKING:
    from merging.evaluation.image_tasks import Images

LARGEST_FILE = 64 * 2**20  # bytes; a task that somebody waits for has a few thousand short lines
MOST_ITEMS = 1_000_000
MOST_CHOICES = 1000
EXAMPLES = {
    "exact_match": 'A line looks like this: {"prompt": "2+2=", "answer": "4"}',
    "choice": 'A line looks like this: {"prompt": "2+2=", "choices": ["3", "4"], "answer": 1} (0: the first)',
    "text": 'A line looks like this: {"text": "Some text."}',
    "text_label": 'A line looks like this: {"text": "Some text.", "label": 1}',
}
ENDINGS = (".jsonl", ".yaml", ".yml", ".json")
SPLITS = {"train", "validation", "valid", "dev", "test"}
_SPLIT = re.compile("[A-Za-z0-9_-]{1,40}")


@dataclass(frozen=True, slots=True)
class Task:
    """Items in file order, and the SHA-256 of the file's bytes: two scores compare only when it is equal.

    Of a file with several splits it is a SHA-256 of that and of the split's name. ``images``: of an image task.
    """

    name: str
    items: tuple[Any, ...]
    sha256: str
    kind: str = "exact_match"
    path: str = ""
    split: str = ""
    images: Images | None = None

    def where(self, item: Any) -> str:
        """For messages: file and line."""
        return f"{self.path or self.name}, {'image' if self.kind == 'image_label' else 'line'} {item.line}"

    @property
    def info(self) -> TaskInfo:
        return TaskInfo(self.name, self.sha256, self.kind, len(self.items), self.split)


def read_task(path: str | Path, name: str | None = None) -> Task:
    """Read a file of questions with exact answers.

    Args:
        path: UTF-8 text, one JSON object with ``prompt`` and ``answer`` per line, both text that is not empty.
        name: what to call the task; by default the file name without ``.jsonl``.

    Raises:
        TaskError: ``E_TASK``, with the line's number, for anything else: a missing, empty or too large file, a blank
            line, broken JSON, a missing, unknown or doubled field, a prompt that occurs twice, several splits.
    """
    tasks = _read_lines(Path(path), name, "exact_match")
    if len(tasks) > 1:
        what = f"{path} holds several splits: {', '.join(task.split or '(none)' for task in tasks)}."
        raise TaskError("E_TASK", what, "", "Put each into a file of its own.")
    return tasks[0]


def read_tasks(path: str | Path) -> list[Task]:
    """Read a task file of any kind, or all task files in a folder (see ``task_files``).

    Raises:
        TaskError: ``E_TASK``, with file and line, as ``read_task``; a folder without tasks; two tasks of one name.
    """
    tasks = [task for file in task_files(path) for task in read_task_file(file)]
    check_names(tasks)
    return tasks


def task_files(path: str | Path) -> list[Path]:
    """A file itself; of a folder the files in it that end in .jsonl, .yaml, .yml or .json, by name. E_TASK if none."""
    if not str(path):
        raise TaskError("E_TASK", "The path of the tasks is empty.", "", "Name a file or a folder.")
    path = Path(path)
    if not path.is_dir():
        return [path]
    try:
        files = sorted(one for one in path.iterdir() if one.suffix in ENDINGS and not one.name.startswith("."))
    except OSError as error:
        raise TaskError("E_TASK", f"{path} cannot be read.", f"The system says: {error.strerror}.") from None
    if not files:
        what = f"The folder {path} holds no tasks."
        raise TaskError("E_TASK", what, f"Tasks are files that end in {', '.join(ENDINGS)}.", "Check the path.")
    return files


def read_task_file(file: Path) -> list[Task]:
    """The tasks of one file: several if it has several splits."""
    if file.suffix in (".yaml", ".yml", ".json"):
        from merging.evaluation.image_tasks import read_image_task

        return [read_image_task(file)]
    return _read_lines(file, None, None)


def check_names(tasks: Sequence[Task]) -> None:
    """E_TASK for two tasks of one name: their records could not be told apart."""
    seen: dict[str, Task] = {}
    for task in tasks:
        if (other := seen.setdefault(task.name, task)) is not task:
            what = f"{other.path} and {task.path} are both called {task.name!r}."
            raise TaskError("E_TASK", what, "", "Rename one of the files.")


def split_of(name: str) -> str:
    """``validation`` of the name ``sort.validation``; "" where the name ends in no usual split."""
    last = name.rpartition(".")[2]
    return last if last in SPLITS and last != name else ""


def name_with_split(name: str, split: str) -> str:
    """``sort.validation`` of ``sort`` and ``validation``; the test split, or none, is not named."""
    return name if split in ("", "test", split_of(name)) else f"{name}.{split}"


# -- the file -----------------------------------------------------------------------------------------------------


def read_bytes(path: Path, most: int = LARGEST_FILE, what_it_is: str = "task file") -> bytes:
    """All bytes of a plain file, or TaskError E_TASK."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # never hang on a named pipe
    except FileNotFoundError:
        raise TaskError("E_TASK", f"There is no {what_it_is} {path}.", "", "Check the path.") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise TaskError("E_TASK", f"{path} cannot be read.", f"The system says: {reason}.") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise TaskError("E_TASK", f"{path} is not a file.", "", f"Name a {what_it_is}.")
        if status.st_size > most:
            what = f"{path} has {status.st_size:,} bytes; a {what_it_is} may have {most:,}."
            raise TaskError("E_TASK", what, "", "Use a sample of it.")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(most + 1)  # a limit again: the file may be growing
    except OSError as error:
        raise TaskError("E_TASK", f"{path} cannot be read.", f"The system says: {error.strerror}.") from None
    finally:
        os.close(descriptor)
    if len(content) > most:
        raise TaskError("E_TASK", f"{path} grew while it was read.", "", "Wait until it is complete.")
    return content


def _read_lines(path: Path, name: str | None, kind: str | None) -> list[Task]:
    """The tasks of a file, one per split; ``kind`` None: that of the first line."""
    content = read_bytes(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        _problem(path, number, "the file is not UTF-8 text", "Save it as UTF-8.")
    lines = text.split("\n")  # not splitlines(): that would also split at separators inside of JSON strings
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise TaskError("E_TASK", f"{path} holds no items.", "", EXAMPLES[kind or "exact_match"])
    if len(lines) > MOST_ITEMS:
        raise TaskError("E_TASK", f"{path} has more than {MOST_ITEMS:,} lines.", "", "Use a sample of it.")
    splits: dict[str, list[Any]] = {}
    seen: dict[Any, int] = {}
    for number, line in enumerate(lines, start=1):
        found = _object(path, number, line, EXAMPLES[kind or "exact_match"])
        mine = kind_of(found)
        kind = kind or mine
        if mine != kind:
            _problem(path, number, f"this looks like an item of the kind {mine}, not {kind}", EXAMPLES[kind])
        item, split = _item(path, number, found, kind)
        if item.question in seen:
            what = "text" if kind.startswith("text") else "prompt"
            _problem(path, number, f"its {what} was there before, on line {seen[item.question]}", "Remove one of them.")
        seen[item.question] = number
        splits.setdefault(split, []).append(item)
    assert kind is not None
    base, digest = name or path.name.removesuffix(".jsonl"), hashlib.sha256(content).hexdigest()
    if len(splits) == 1:
        (split, items), *_ = splits.items()
        split = split or split_of(base)
        return [Task(name_with_split(base, split), tuple(items), digest, kind, str(path), split)]
    return [
        Task(name_with_split(base, split), tuple(items), _hash_of_split(digest, split), kind, str(path), split)
        for split, items in splits.items()
    ]


def _hash_of_split(digest: str, split: str) -> str:
    return hashlib.sha256(f"{digest} {split}".encode()).hexdigest()


# -- one line -----------------------------------------------------------------------------------------------------


def kind_of(found: dict[str, Any]) -> str:
    """The kind of an item, by its fields."""
    if "text" in found:
        return "text_label" if "label" in found else "text"
    return "choice" if "choices" in found else "exact_match"


_FIELDS = {
    "exact_match": ("prompt", "answer"),
    "choice": ("prompt", "choices", "answer"),
    "text": ("text",),
    "text_label": ("text", "label"),
}
_OPTIONAL = {"text_label": ("labels", "cluster", "split")}


def _item(path: Path, number: int, found: dict[str, Any], kind: str) -> tuple[Any, str]:
    """The item of a line, and its split."""
    required, optional = _FIELDS[kind], _OPTIONAL.get(kind, ("cluster", "split"))
    if unknown := sorted(found.keys() - {*required, *optional}):
        fix = f"Only {', '.join(required)} may stand there, and {' and '.join(optional)}."
        _problem(path, number, f"the field {unknown[0]!r} is unknown", fix)
    fix = EXAMPLES[kind]
    for field in required:
        if field not in found:
            _problem(path, number, f"the field {field!r} is missing", fix)
    texts = {f: found[f] for f in (*required, *optional) if f in found and (f, kind) not in _NUMBERS}
    for field, value in texts.items():
        if (wrong := _no_text(value)) is not None:
            _problem(path, number, f"the field {field!r} {wrong}", fix)
    split, cluster = found.get("split", ""), found.get("cluster", "")
    if split and not _SPLIT.fullmatch(split):
        _problem(path, number, "the field 'split' is no short word")
    make: Callable[[Any], NoReturn] = lambda why: _problem(path, number, why, fix)  # noqa: E731
    if kind == "exact_match":
        return Item(found["prompt"], found["answer"], number, cluster), split
    if kind == "choice":
        choices = _choices(found, make)
        return ChoiceItem(found["prompt"], choices, found["answer"], number, cluster), split
    if kind == "text":
        return TextItem(found["text"], number, cluster), split
    return TextLabelItem(found["text"], found["label"], _labels(found, make), number, cluster), split


_NUMBERS = {("choices", "choice"), ("answer", "choice"), ("label", "text_label"), ("labels", "text_label")}


def _no_text(value: Any) -> str | None:
    if not isinstance(value, str) or not value.strip():
        return "is not a text with something in it"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return "holds half of a character (a lone surrogate)"
    return None


def _choices(found: dict[str, Any], refuse: Callable[[str], NoReturn]) -> tuple[str, ...]:
    choices, answer = found["choices"], found["answer"]
    if not isinstance(choices, list) or not 2 <= len(choices) <= MOST_CHOICES:
        refuse(f"the field 'choices' is not a list of 2 to {MOST_CHOICES} texts")
    for place, choice in enumerate(choices):
        if (wrong := _no_text(choice)) is not None:
            refuse(f"choice {place} {wrong}")
    if len(set(choices)) < len(choices):
        refuse("two of its choices are equal")
    if type(answer) is not int or not 0 <= answer < len(choices):
        refuse(f"the field 'answer' is not the index of a choice: a number from 0 to {len(choices) - 1}")
    return tuple(choices)


def _labels(found: dict[str, Any], refuse: Callable[[str], NoReturn]) -> tuple[int, ...]:
    label, labels = found["label"], found.get("labels", [])
    if type(label) is not int or label < 0:
        refuse("the field 'label' is not a number of 0 or more")
    if not isinstance(labels, list) or any(type(one) is not int or one < 0 for one in labels):
        refuse("the field 'labels' is not a list of numbers of 0 or more")
    if "labels" in found and (len(set(labels)) != len(labels) or len(labels) < 2 or label not in labels):
        refuse("the field 'labels' must list at least two different labels, among them the right one")
    return tuple(labels)


def _object(path: Path, number: int, line: str, fix: str) -> dict[str, Any]:
    if not line.strip():
        _problem(path, number, "the line is blank", "Remove it.")
    try:
        found = json.loads(line, object_pairs_hook=no_doubles, parse_constant=no_constant)
    except RecursionError:
        _problem(path, number, "the JSON is nested too deeply")
    except ValueError as error:
        place = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        _problem(path, number, f"this is not the JSON asked for{place}: {reason}", fix)
    if not isinstance(found, dict):
        _problem(path, number, "the line is not a JSON object", fix)
    return found


def _problem(path: Path, number: int, why: str, fix: str = EXAMPLES["exact_match"]) -> NoReturn:
    raise TaskError("E_TASK", f"{path}, line {number}: {why}.", "", fix) from None
