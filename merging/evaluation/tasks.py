"""Tasks with exact answers, read strictly from JSON lines.

The one idea: a task file is evidence, so a line that is not exactly what it should be is an error with its number,
never skipped. A skipped or doubled line would change the score without anybody seeing it.

    {"prompt": "reverse abcdefgh=", "answer": "hgfedcba"}
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.errors import TaskError

LARGEST_FILE = 64 * 2**20  # bytes; a task that somebody waits for has a few thousand short lines
MOST_ITEMS = 1_000_000
FIELDS = {"prompt", "answer"}
EXAMPLE = 'A line looks like this: {"prompt": "2+2=", "answer": "4"}'


@dataclass(frozen=True, slots=True)
class Item:
    """One question with its one right answer.

    ``id`` is a hash of both, so that records of different runs, models and file versions can be paired.
    """

    prompt: str
    answer: str
    line: int

    @property
    def id(self) -> str:
        return hashlib.sha256(json.dumps([self.prompt, self.answer]).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Task:
    """Items in file order, and the SHA-256 of the file's bytes: two scores compare only when it is equal."""

    name: str
    items: tuple[Item, ...]
    sha256: str


def read_task(path: str | Path, name: str | None = None) -> Task:
    """Read a task file.

    Args:
        path: UTF-8 text, one JSON object with ``prompt`` and ``answer`` per line, both text that is not empty.
        name: what to call the task; by default the file name without ``.jsonl``.

    Raises:
        TaskError: ``E_TASK``, with the line's number, for anything else: a missing, empty or too large file, a blank
            line, broken JSON, a missing, unknown or doubled field, a prompt that occurs twice.
    """
    path = Path(path)
    content = _read_bytes(path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise _problem(path, number, "the file is not UTF-8 text", "Save it as UTF-8.") from None
    lines = text.split("\n")  # not splitlines(): that would also split at separators inside of JSON strings
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise TaskError("E_TASK", f"{path} holds no items.", "", EXAMPLE)
    if len(lines) > MOST_ITEMS:
        raise TaskError("E_TASK", f"{path} has more than {MOST_ITEMS:,} lines.", "", "Use a sample of it.")
    items: list[Item] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        item = _read_item(path, number, line)
        if item.prompt in seen:
            raise _problem(
                path, number, f"its prompt was there before, on line {seen[item.prompt]}", "Remove one of them."
            )
        seen[item.prompt] = number
        items.append(item)
    return Task(name or path.name.removesuffix(".jsonl"), tuple(items), hashlib.sha256(content).hexdigest())


def _read_bytes(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # never hang on a named pipe
    except FileNotFoundError:
        raise TaskError("E_TASK", f"There is no task file {path}.", "", "Check the path.") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise TaskError("E_TASK", f"{path} cannot be read.", f"The system says: {reason}.") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise TaskError("E_TASK", f"{path} is not a file.", "", "Name a .jsonl file.")
        if status.st_size > LARGEST_FILE:
            what = f"{path} has {status.st_size:,} bytes; a task file may have {LARGEST_FILE:,}."
            raise TaskError("E_TASK", what, "", "Use a sample of it.")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(LARGEST_FILE + 1)  # a limit again: the file may be growing
    except OSError as error:
        raise TaskError("E_TASK", f"{path} cannot be read.", f"The system says: {error.strerror}.") from None
    finally:
        os.close(descriptor)
    if len(content) > LARGEST_FILE:
        raise TaskError("E_TASK", f"{path} grew while it was read.", "", "Wait until it is complete.")
    return content


def _read_item(path: Path, number: int, line: str) -> Item:
    if not line.strip():
        raise _problem(path, number, "the line is blank", "Remove it.")
    try:
        found = json.loads(line, object_pairs_hook=_no_doubles, parse_constant=_no_constant)
    except RecursionError:
        raise _problem(path, number, "the JSON is nested too deeply") from None
    except ValueError as error:
        raise _problem(path, number, f"this is not the JSON asked for: {error}") from None
    if not isinstance(found, dict):
        raise _problem(path, number, "the line is not a JSON object")
    if unknown := sorted(found.keys() - FIELDS):
        raise _problem(path, number, f"the field {unknown[0]!r} is unknown", "Only prompt and answer may stand there.")
    for field in ("prompt", "answer"):
        value = found.get(field)
        if field not in found:
            raise _problem(path, number, f"the field {field!r} is missing")
        if not isinstance(value, str) or not value.strip():
            raise _problem(path, number, f"the field {field!r} is not a text with something in it")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise _problem(path, number, f"the field {field!r} holds half of a character (a lone surrogate)")
    return Item(found["prompt"], found["answer"], number)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field occurs twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _problem(path: Path, number: int, why: str, fix: str = EXAMPLE) -> TaskError:
    return TaskError("E_TASK", f"{path}, line {number}: {why}.", "", fix)
