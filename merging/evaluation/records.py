"""Records: what one model did with one item, as measured. Every figure and every test is computed from these alone.

The one idea: a score without its items cannot be checked, paired or extended. So the unit of everything is a
``Record``, one per (model, task, item, metric), and a file of records carries all that a later comparison needs: the
hash of the item, the hash of what the model was really shown, the response and its length.

A records file is JSON lines (``.jsonl``) or Parquet (``.parquet``). JSON lines may begin with a header that says which
model a key stands for and what the tasks were (in Parquet it is metadata of the file)::

    {"amalgam_records": 1, "models": [{"key": "…", "name": "ties", "path": "…", "role": "candidate"}], "tasks": […]}
    {"model": "…", "task": "sort", "item": "0f3a…", "metric": "exact_match", "score": 1.0, "prompt": "77c1…", …}

Names of tasks: ``sort`` is what one reports on; ``sort.validation`` is the same task's validation split, on which
settings may be chosen.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

from merging.checkpoints.disk import write_whole as write_whole
from merging.checkpoints.files import read_whole, shown
from merging.checkpoints.strict_json import parse_json
from merging.errors import InputError, OutputError, TaskError

VERSION = 1
HEADER = "amalgam_records"
LARGEST_FILE = 1 << 30


@dataclass(frozen=True, slots=True)
class Record:
    """What one model did with one item, by one metric."""

    model: str
    """Key of the model: a hash of its files (``models.model_key`` says of which)."""
    task: str
    item: str
    """Hash of the item's content: the same question in two files has the same one."""
    metric: str
    """One of ``METRICS``."""
    score: float
    """In [0, 1] for right/wrong metrics; nats or bits else. Never NaN."""
    prompt: str
    """Hash of what the model was really shown. Scores of one item compare only when it is equal."""
    length: int
    """Of the response, in tokens; 0 where nothing is generated."""
    seconds: float
    """Share of the time of the batch it was part of."""
    answer: str
    """What was generated or chosen; may be empty."""
    cluster: str = ""
    """Items with the same label (document, template) are not independent of each other."""
    seed: int = 0
    shots: int = 0


def as_dict(record: Record) -> dict[str, Any]:
    """Field -> value. (``dataclasses.asdict`` copies everything and takes twenty times as long.)"""
    return {name: getattr(record, name) for name in _NAMES}


_NAMES = tuple(one.name for one in fields(Record))


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    better: Literal[1, -1]
    """+1: more is better; -1: less is."""
    kind: Literal["binary", "real"]
    """binary: right or wrong, so the mean is a share; real: a quantity."""
    unit: str


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", 1, "binary", "share of answers that are right, letter for letter"),
        Metric("choice", 1, "binary", "share of items whose right choice is the most likely one"),
        Metric("choice_normalized", 1, "binary", "the same by log-likelihood per byte of the choice"),
        Metric("choice_per_character", 1, "binary", "the same per character (acc_norm of lm-evaluation-harness)"),
        Metric("accuracy", 1, "binary", "share of items whose class is right"),
        Metric("nll_per_byte", -1, "real", "bits per byte"),
        Metric("nll_per_token", -1, "real", "nats per token"),
    )
}


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which model a key stands for. ``role``: "candidate", "baseline", or what the producer calls it."""

    key: str
    name: str
    path: str = ""
    role: str = ""


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """``sha256``: of the task file; ``items``: how many it has (not how many were scored); ``split``: "" if unnamed."""

    name: str
    sha256: str = ""
    kind: str = ""
    items: int = 0
    split: str = ""


@dataclass
class RecordsFile:
    """All that a records file says."""

    records: list[Record] = field(default_factory=list)
    models: list[ModelInfo] = field(default_factory=list)
    tasks: list[TaskInfo] = field(default_factory=list)


# -- writing ------------------------------------------------------------------------------------------------------


def write_records(
    path: str | Path, records: Iterable[Record], models: Sequence[ModelInfo] = (), tasks: Sequence[TaskInfo] = ()
) -> None:
    """Write a records file, by its ending as JSON lines or Parquet. A file of that name is replaced, in one step.

    Raises:
        TaskError: ``E_RECORDS`` for another ending, or for records that could not be read back.
        OutputError: ``E_OUTPUT_WRITE``, ``E_NO_SPACE``.
    """
    path = Path(path)
    check_ending(path)
    content = RecordsFile(list(records), list(models), list(tasks))
    _check_all(((number, as_dict(record)) for number, record in enumerate(content.records, 1)), path, "record")
    header = {HEADER: VERSION, "models": [asdict(m) for m in models], "tasks": [asdict(t) for t in tasks]}
    write_whole(path, _parquet(content, header) if path.suffix == ".parquet" else _lines(content, header))


def check_ending(path: str | Path) -> None:
    """E_RECORDS unless the name ends in .jsonl or .parquet: before hours are spent on computing what goes in."""
    if Path(path).suffix not in (".jsonl", ".parquet"):
        what = f"{shown(path)} is no name for a file of records."
        raise TaskError("E_RECORDS", what, "", "Choose one that ends in .jsonl or .parquet.")


def check_place(path: str | Path) -> None:
    """Say before the work, not after it, that its result cannot be written there: OutputError E_OUTPUT_WRITE."""
    path = Path(path)
    why = "It is a folder." if path.is_dir() else ""
    if not path.parent.is_dir():
        why = f"There is no folder {path.parent}."
    elif not os.access(path.parent, os.W_OK):
        why = f"Nothing can be written in {path.parent}."
    if why:
        raise OutputError("E_OUTPUT_WRITE", f"{path} cannot be written.", why, "Name a file in a folder that exists.")


def _lines(content: RecordsFile, header: dict[str, Any]) -> bytes:
    objects = [header, *map(as_dict, content.records)]
    return "".join(json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n" for one in objects).encode()


def _schema() -> Any:
    import pyarrow

    types = {"str": pyarrow.string(), "float": pyarrow.float64(), "int": pyarrow.int64()}
    return pyarrow.schema([pyarrow.field(one.name, types[str(one.type)], nullable=False) for one in fields(Record)])


def _parquet(content: RecordsFile, header: dict[str, Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    schema = _schema().with_metadata({HEADER: json.dumps(header)})
    table = pyarrow.Table.from_pylist([*map(as_dict, content.records)], schema=schema)
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


# -- reading ------------------------------------------------------------------------------------------------------


def read_records(path: str | Path) -> list[Record]:
    """The records of a file. See ``read_records_file``."""
    return read_records_file(path).records


def read_records_file(path: str | Path) -> RecordsFile:
    """Read a records file strictly.

    Raises:
        TaskError: ``E_RECORDS``, with file and line (row, in Parquet), for anything that is not as ``Record`` says: an
            unknown, missing or doubled field, a wrong type, NaN, an unknown metric, a score outside of [0, 1] for a
            right/wrong metric, a record that was there before, or an item that two models were shown differently.
    """
    path = Path(path)
    check_ending(path)
    try:
        raw = read_whole(path, LARGEST_FILE, "E_READ")
    except InputError as error:
        raise TaskError("E_RECORDS", error.what, error.why, error.fix) from None
    header, rows, unit = _rows_of_parquet(path, raw) if path.suffix == ".parquet" else _rows_of_lines(path, raw)
    records = _check_all(rows, path, unit)
    if not records:
        raise TaskError("E_RECORDS", f"{shown(path)} holds no records.")
    found = RecordsFile(records)
    if header is not None:
        if header.keys() != {HEADER, "models", "tasks"} or header[HEADER] != VERSION:
            _refuse(path, f"{unit} 1", f"this is not the header of version {VERSION}: {{{HEADER}, models, tasks}}")
        found.models = [_info(ModelInfo, one, path, unit) for one in _list(header["models"], path, unit)]
        found.tasks = [_info(TaskInfo, one, path, unit) for one in _list(header["tasks"], path, unit)]
    return found


def _rows_of_lines(path: Path, raw: bytes) -> tuple[dict[str, Any] | None, list[tuple[int, Any]], str]:
    lines = raw.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    header = None
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"line {number}"
        if not line.strip():
            _refuse(path, where, "the line is blank")
        try:
            row = json.loads(line, object_pairs_hook=no_doubles, parse_constant=no_constant)
        except (ValueError, RecursionError) as error:
            _refuse(path, where, f"this is not the JSON of a record: {error}")
        if number == 1 and isinstance(row, dict) and HEADER in row:
            header = row
        else:
            rows.append((number, row))
    return header, rows, "line"


def _rows_of_parquet(path: Path, raw: bytes) -> tuple[dict[str, Any] | None, list[tuple[int, Any]], str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(raw))
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, UnicodeDecodeError) as error:
        first = str(error).split("\n")[0][:200]
        raise TaskError("E_RECORDS", f"{shown(path)} is not a Parquet file of records.", f"{first}.") from None
    header = (table.schema.metadata or {}).get(HEADER.encode())
    try:
        found = None if header is None else parse_json(header, str(path))
    except InputError as error:
        raise TaskError("E_RECORDS", f"{shown(path)}: its header is damaged.", error.why) from None
    if found is not None and not isinstance(found, dict):
        raise TaskError("E_RECORDS", f"{shown(path)}: its header is damaged.")
    return found, list(enumerate(rows, 1)), "row"


def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads``, which would take the last of several fields of one name."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field occurs twice")
    return found


def no_constant(name: str) -> NoReturn:
    """For ``json.loads``, which would take NaN and Infinity."""
    raise ValueError(f"{name} is no JSON")


_TYPES: dict[str, type | tuple[type, ...]] = {"str": str, "float": (int, float), "int": int}
_FIELDS = {one.name: (_TYPES[str(one.type)], one.default is MISSING) for one in fields(Record)}
_NOT_EMPTY = ("model", "task", "item", "metric", "prompt")


def _check_all(rows: Iterable[tuple[int, Any]], path: Path, unit: str) -> list[Record]:
    """Records from plain values, each and all together checked."""
    records: list[Record] = []
    seen: dict[tuple, int] = {}
    prompts: dict[tuple, tuple[str, int]] = {}
    for number, row in rows:
        where = f"{unit} {number}"
        if problem := _problem(row):
            _refuse(path, where, problem)
        record = Record(**row)
        key = (record.model, record.task, record.item, record.metric, record.seed, record.shots)
        if (before := seen.setdefault(key, number)) != number:
            why = f"model, task, item and metric were there before, on {unit} {before}"
            _refuse(path, where, why, "Keep one of them.")
        shown_as = (record.task, record.item, record.seed, record.shots)
        prompt, before = prompts.setdefault(shown_as, (record.prompt, number))
        if prompt != record.prompt:
            why = (
                f"item {record.item} of {record.task} was shown differently than on {unit} {before}: other prompt hash"
            )
            fix = "Such scores cannot be compared: evaluate the models in the same way, or keep them in separate files."
            _refuse(path, where, why, fix)
        records.append(record)
    return records


def _problem(row: Any) -> str | None:
    """Why these values are no record, or None."""
    if not isinstance(row, dict):
        return "this is not a JSON object"
    if unknown := sorted(row.keys() - _FIELDS.keys()):
        return f"the field {unknown[0]!a} is unknown"
    for name, (kind, required) in _FIELDS.items():
        if name not in row:
            if required:
                return f"the field {name!r} is missing"
            continue
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            return f"the field {name!r} is not a {'text' if kind is str else 'number'}"
        if kind is str and not row[name].isascii() and any("\ud800" <= c <= "\udfff" for c in row[name]):
            return f"the field {name!r} holds half of a character (a lone surrogate)"
    if empty := [name for name in _NOT_EMPTY if not row[name]]:
        return f"the field {empty[0]!r} is empty"
    if row["metric"] not in METRICS:
        return f"the metric {row['metric'][:80]!a} is unknown (known: {', '.join(METRICS)})"
    for name in ("score", "seconds"):
        if isinstance(row[name], int) and abs(row[name]) > 1 << 53 or not math.isfinite(row[name]):
            return f"the field {name!r} is not a finite number"
    if METRICS[row["metric"]].kind == "binary" and not 0 <= row["score"] <= 1:
        return f"the score {row['score']!r} of {row['metric']} is not in [0, 1]"
    if negative := [name for name in ("length", "seconds", "seed", "shots") if row.get(name, 0) < 0]:
        return f"the field {negative[0]!r} is negative"
    return None


def _list(value: Any, path: Path, unit: str) -> list[Any]:
    if not isinstance(value, list):
        _refuse(path, f"{unit} 1", "models and tasks of the header must be lists")
    return value


def _info(kind: Any, value: Any, path: Path, unit: str) -> Any:
    known = {one.name: _TYPES[str(one.type)] for one in fields(kind)}
    wrong = not isinstance(value, dict) or any(
        name not in known or not isinstance(part, known[name]) or isinstance(part, bool) for name, part in value.items()
    )
    if wrong or kind.__match_args__[0] not in value or (kind is ModelInfo and "name" not in value):
        _refuse(path, f"{unit} 1", f"an entry of the header is not of the form {', '.join(known)}")
    return kind(**value)


def _refuse(path: Path, where: str, why: str, fix: str = "") -> NoReturn:
    raise TaskError("E_RECORDS", f"{shown(path)}, {where}: {why}.", "", fix) from None
