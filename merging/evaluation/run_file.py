"""The run file: who is who in a comparison. Small, strict JSON that stands beside the records it speaks of.

The one idea: records say what a model did with an item, not what the model is *for*. Which of them is the base, which
expert owns which task, which merge is the plain average, and how many evaluations were spent to find a candidate:
that is said here, once, so that ``python app.py compare RUN`` can print the same table again anywhere.

    {
      "amalgam_run": 1,
      "records": ["records.jsonl"],                          files beside this one
      "split": "test",                                       what the records were taken on
      "base": {"model": "9f2c…"},                            its key or name in the records
      "experts": {"code": {"model": "77ab…", "tasks": ["python"]}},
      "average": {"model": "03d1…"},
      "tuned": {"model": "be20…", "setting": "weight 0.4", "evaluations": 8},
      "candidates": {"ties": {"model": "5c3e…", "setting": "density 0.2", "evaluations": 8}},
      "selection": {"split": "validation", "records": ["selection.jsonl"]},
      "parameters": 862080
    }

``evaluations``: how many models were scored on the selection split to choose this one. 0: nothing was chosen. Left
out: unknown, and the comparison says so loudly. ``tasks`` (of the run): only these, of the tasks in the records.
``metrics``: task -> metric, where a task has several. Tasks that no expert owns measure forgetting. Tasks named
``….validation`` (or ``….train``, ``….dev``) are not reported: their items count as used for choosing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from merging.errors import TaskError
from merging.evaluation.records import Record, RecordsFile, read_records_file
from merging.evaluation.tasks import split_of

LARGEST_FILE = 2**20
NAME = "run.json"
TAKEN = ("base", "average", "tuned")


class Part(BaseModel):
    """Unknown fields are errors, values are not converted, objects do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Entry(Part):
    """One model of the comparison. ``model``: its key in the records, or its name in their header."""

    model: str = Field(min_length=1, max_length=1024)
    tasks: list[str] = Field(default_factory=list)
    """An expert's own tasks."""
    setting: str = Field(default="", max_length=200)
    """What was chosen, for people: "weight 0.4"."""
    evaluations: int | None = Field(default=None, ge=0)
    bytes: int | None = Field(default=None, ge=1)
    """Size of the weights on disk."""

    @field_validator("setting")
    @classmethod
    def _printable(cls, text: str) -> str:
        if not text.isprintable():
            raise ValueError("it must be one printable line")
        return text


class Selection(Part):
    """Where settings were chosen. ``records``: files with what was evaluated there, the proof that it is elsewhere."""

    split: str = Field(min_length=1, max_length=64)
    records: list[str] = Field(default_factory=list)


class Run(Part):
    """See the module."""

    amalgam_run: Literal[1]
    records: list[str] = Field(default_factory=lambda: ["records.jsonl"], min_length=1)
    split: str = Field(default="", max_length=64)
    tasks: list[str] | None = Field(default=None, min_length=1)
    metrics: dict[str, str] = Field(default_factory=dict)
    base: Entry
    experts: dict[str, Entry] = Field(min_length=1)
    average: Entry | None = None
    tuned: Entry | None = None
    """Task arithmetic, its coefficient chosen with as many evaluations as the candidates had."""
    candidates: dict[str, Entry] = Field(default_factory=dict)
    selection: Selection | None = None
    parameters: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _names(self) -> Run:
        for name in (*self.experts, *self.candidates):
            if not name.strip() or not name.isprintable() or len(name) > 64:
                raise ValueError("a model's name is one printable line of at most 64 characters")
        for name in self.candidates:
            if name in TAKEN or name.startswith("expert "):
                raise ValueError(f"a candidate cannot be called {name!r}: that is another row of the table")
        owners: dict[str, str] = {}
        for name, expert in self.experts.items():
            for task in expert.tasks:
                if owners.setdefault(task, name) != name:
                    raise ValueError(f"the task {task!r} has two experts, {owners[task]} and {name}")
        return self

    @property
    def owners(self) -> dict[str, str]:
        """Task -> name of its own expert."""
        return {task: name for name, expert in self.experts.items() for task in expert.tasks}

    @property
    def entries(self) -> dict[str, tuple[str, Entry]]:
        """Row name -> (role, entry), in the order of the table."""
        found = {"base": ("base", self.base)}
        found |= {f"expert {name}": ("expert", entry) for name, entry in self.experts.items()}
        for name, one in (("average", self.average), ("tuned", self.tuned)):
            if one is not None:
                found[name] = (name, one)
        return found | {name: ("candidate", entry) for name, entry in self.candidates.items()}

    def as_json(self) -> str:
        """The text of a run file."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True), indent=2, ensure_ascii=False) + "\n"


def read_run(path: str | Path) -> tuple[Run, Path]:
    """A run file, or the ``run.json`` in a folder, and the folder that its records are relative to.

    Raises:
        TaskError: ``E_RUN``, with the place in the file, for anything that is not a run file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / NAME
    fix = "docs/evaluation.md describes the format."
    try:
        if path.exists() and not path.is_file():  # opening a named pipe would wait for its other end
            raise OSError(0, "it is not a plain file")
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise TaskError("E_RUN", f"The run file {path} cannot be read.", f"The system says: {reason}.", fix) from None
    if not content or len(content) > LARGEST_FILE:
        raise TaskError("E_RUN", f"{path} is no run file.", "It is empty or too large.", fix)
    try:
        data = json.loads(content.decode("utf-8"), object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError) as error:
        raise TaskError("E_RUN", f"{path} is not the JSON of a run file.", f"{error}.", fix) from None
    return parse_run(data, str(path)), path.parent


def parse_run(data: Any, name: str = "the run") -> Run:
    """A run from plain data."""
    try:
        return Run.model_validate(data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
        place = ".".join(map(str, first["loc"])) or "as a whole"
        message = first["msg"].removeprefix("Value error, ")
        raise TaskError(
            "E_RUN", f"{name}: {place}: {message}.", "", "docs/evaluation.md describes the format."
        ) from None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A run with the records that belong to it: those to report, and those that settings were chosen on."""

    run: Run
    records: list[Record]
    selected_on: list[Record]


def load_runs(paths: Sequence[str | Path]) -> Loaded:
    """Run files (or folders with one) and their records, as one comparison.

    Raises:
        TaskError: ``E_RUN`` for a bad run file, ``E_RECORDS`` for a bad file of records.
    """
    runs: list[Run] = []
    reported: dict[Path, RecordsFile] = {}
    chosen: dict[Path, RecordsFile] = {}
    for path in paths:
        run, folder = read_run(path)
        mine = [folder / name for name in run.records]
        for file in mine:
            reported[file] = reported.get(file) or read_records_file(file)
        runs.append(with_keys(run, [reported[file] for file in mine], str(path)))
        for name in run.selection.records if run.selection else ():
            chosen[folder / name] = chosen.get(folder / name) or read_records_file(folder / name)
    run = join_runs(runs)
    records, selected_on = apart(run, [record for file in reported.values() for record in file.records])
    return Loaded(run, records, selected_on + [record for file in chosen.values() for record in file.records])


def apart(run: Run, records: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """Records of the tasks to report, and those of other splits."""
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        held = split_of(record.task) not in ("", "test") and record.task not in (run.tasks or ())
        sides[held].append(record)
    return sides


def with_keys(run: Run, files: Sequence[RecordsFile], place: str) -> Run:
    """The run with keys for the names of models: a name is looked up in the headers of the records.

    Raises:
        TaskError: ``E_RUN`` for a model that the records do not have, or a name that two of them have.
    """
    known = {record.model for file in files for record in file.records}
    named: dict[str, set[str]] = {}
    for info in (info for file in files for info in file.models):
        named.setdefault(info.name, set()).add(info.key)

    def key(entry: Entry | None) -> Entry | None:
        if entry is None or entry.model in known:
            return entry
        keys = named.get(entry.model, set())
        if len(keys) != 1:
            problem = "has several models of this name" if keys else "has no records of this model"
            what = f"{place}: {entry.model[:80]!r}: the records file {problem}."
            raise TaskError("E_RUN", what, f"Its models: {', '.join(sorted(named)) or 'not named'}.", "Give its key.")
        return entry.model_copy(update={"model": next(iter(keys))})

    changed = {name: key(getattr(run, name)) for name in ("base", "average", "tuned")}
    groups = {part: {name: key(e) for name, e in getattr(run, part).items()} for part in ("experts", "candidates")}
    return run.model_copy(update={**changed, **groups})


def join_runs(runs: Sequence[Run]) -> Run:
    """One comparison out of several runs on the same base, experts and split: all their candidates together.

    Raises:
        TaskError: ``E_RUN`` when they contradict each other, for example two models under one name.
    """
    first = runs[0]
    joined: dict[str, Any] = first.model_dump()
    for run in runs[1:]:
        for field in ("base", "split", "selection", "parameters", "tasks", "average", "tuned"):
            mine, other = joined[field], run.model_dump()[field]
            if field == "selection" and mine and other and mine["split"] == other["split"]:
                joined[field] = {**mine, "records": [*mine["records"], *other["records"]]}
            elif mine is None or mine == "":
                joined[field] = other
            elif other not in (None, "", mine):
                fix = "Compare runs on the same base, experts, baselines and split only."
                raise TaskError("E_RUN", f"The runs have different entries for {field}.", "", fix)
        for field in ("experts", "candidates", "metrics"):
            for name, entry in run.model_dump()[field].items():
                if joined[field].setdefault(name, entry) != entry:
                    raise TaskError("E_RUN", f"The runs mean different models by {name!r}.", "", "Rename one of them.")
        joined["records"] = [*joined["records"], *run.records]
    return parse_run(joined)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field occurs twice")
    return found
