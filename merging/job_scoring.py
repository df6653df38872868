"""Scoring in a job: models on tasks, and models on questions of one's own.

What was scored before is taken from the store of results, so a job that was stopped goes on where it was. A model or a
task that fails does not end the others: it is listed in the result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoints.disk import write_whole
from .checkpoints.hub import resolve
from .errors import AmalgamError, Cancelled, RecipeError
from .evaluation import lm_eval
from .evaluation.items import Item
from .evaluation.models import describe
from .evaluation.records import write_records
from .evaluation.runner import Evaluation, Failure, Progress, evaluate
from .evaluation.scoring import Settings
from .evaluation.tasks import Task, check_names, read_task_file, task_files
from .job_files import JobProgress, error_facts
from .job_pace import downloads

Tell = Callable[[JobProgress], None]
RECORDS, ANSWERS = "records.jsonl", "answers.json"


def check_models(models: Sequence[Sequence[str]]) -> None:
    """RecipeError E_RECIPE_FIELD unless every model has a name of its own."""
    names = [name for name, _, _ in models]
    if doubled := next((name for name in names if names.count(name) > 1 or not name.strip()), None):
        what = f"Two models are called {doubled!r}." if doubled.strip() else "A model has no name."
        raise RecipeError("E_RECIPE_FIELD", what, "", "Give each a name of its own.")


def check_tasks(paths: Sequence[str]) -> None:
    """Read all tasks: what is wrong with them is raised as TaskError E_TASK, E_HARNESS."""
    _read(paths)


def _read(paths: Sequence[str]) -> tuple[list[Task], list[Path]]:
    """Our tasks, and the files of those for lm-evaluation-harness."""
    files = [file for path in paths for file in task_files(path)]
    for_harness = [file for file in files if lm_eval.is_harness_task(file)]
    if for_harness:
        lm_eval.check_installed()
    tasks = [task for file in files if file not in for_harness for task in read_task_file(file)]
    check_names(tasks)
    return tasks, for_harness


def score(
    models: Sequence[Sequence[str]], paths: Sequence[str], limit: int, folder: Path, tell: Tell, stop: threading.Event,
    *, device: str, threads: int, offline: bool,
) -> dict[str, Any]:  # fmt: skip
    """Score ``models`` ([name, reference, role]) on tasks and write records.jsonl.

    Result: {records: path, models: {name: key}, failures: [{model, task, code, what, why, fix}], notes, fresh, kept,
    seconds}. Raises the first failure if there is no record at all.
    """
    tasks, for_harness = _read(paths)
    places, failures = _resolved(models, tell, stop, offline)
    how: dict[str, Any] = {
        "roles": {name: role for name, _, role in models}, "limit": limit, "threads": threads, "device": device,
        "progress": _items(tell), "stop": stop,
    }  # fmt: skip
    found = Evaluation(failures=failures)
    if places and tasks:
        _add(found, evaluate(places, tasks, **how))
    if places and for_harness:
        _add(found, lm_eval.evaluate_harness(places, for_harness, **how))
    if not found.records:
        found.raise_if_bad()
    write_records(folder / RECORDS, found.records, found.models, found.tasks)
    return {
        "records": str(folder / RECORDS), "models": {model.name: model.key for model in found.models},
        "failures": _listed(found.failures), "notes": found.notes, "fresh": found.fresh, "kept": found.kept,
        "seconds": round(found.seconds, 3),
    }  # fmt: skip


def ask(
    models: Sequence[Sequence[str]], prompts: Sequence[str], length: int, folder: Path, tell: Tell,
    stop: threading.Event, *, device: str, threads: int, offline: bool,
) -> dict[str, Any]:  # fmt: skip
    """What each model writes after each prompt, greedily, at most ``length`` tokens: answers.json, a list of
    {prompt, answers: {name of the model: text}}. Nothing of it is kept elsewhere.

    Result: {answers: path, failures}. Raises the first failure if no model answered.
    """
    places, failures = _resolved(models, tell, stop, offline)
    different = list(dict.fromkeys(prompts))
    items = tuple(Item(prompt, "", line) for line, prompt in enumerate(different, 1))
    task = Task("prompts", items, hashlib.sha256(json.dumps(different).encode()).hexdigest())
    found = Evaluation(failures=failures)
    if places:
        how: dict[str, Any] = {"threads": threads, "device": device, "progress": _items(tell), "stop": stop}
        settings = Settings(most_tokens=_room(places, different, length))
        _add(found, evaluate(places, [task], cache=None, settings=settings, **how))
    if not found.records:
        found.raise_if_bad()
    texts = {(record.model, record.item): record.answer for record in found.records}
    answers = [
        {"prompt": item.prompt, "answers": {m.name: texts[m.key, item.id] for m in found.models
                                            if (m.key, item.id) in texts}}
        for item in items
    ]  # fmt: skip
    write_whole(folder / ANSWERS, json.dumps(answers, ensure_ascii=False, indent=1).encode("utf-8", "replace"))
    return {"answers": str(folder / ANSWERS), "failures": _listed(found.failures)}


def _room(places: Mapping[str, Path], prompts: Sequence[str], length: int) -> int:
    """Tokens for an answer: ``length``, or less if a model has a short context. The same for all, to be comparable."""
    contexts = []
    for place in places.values():
        with contextlib.suppress(AmalgamError):  # told when it is evaluated
            contexts.append(describe(place).context)
    shortest = min((context for context in contexts if context), default=length * 100)
    longest = max(len(prompt.encode("utf-8", "replace")) for prompt in prompts) + 2  # a token has a byte at least
    return max(1, min(length, shortest - longest))


def _resolved(
    models: Sequence[Sequence[str]], tell: Tell, stop: threading.Event, offline: bool
) -> tuple[dict[str, Path], list[Failure]]:
    """Name -> local folder. Models that cannot be had are failures."""
    places: dict[str, Path] = {}
    failures = []
    for name, reference, _ in models:
        try:
            places[name] = resolve(reference, offline=offline, progress=downloads(tell, stop)).path
        except Cancelled:
            raise
        except AmalgamError as error:
            failures.append(Failure(name, "", error))
    return places, failures


def _items(tell: Tell) -> Callable[[Progress], None]:
    def progress(known: Progress) -> None:
        tell(JobProgress(known.done, known.total, "items", known.doing, known.rate, known.seconds_left))

    return progress


def _add(found: Evaluation, other: Evaluation) -> None:
    keys = {(model.name, model.key) for model in found.models}
    found.models += [model for model in other.models if (model.name, model.key) not in keys]
    found.records += other.records
    found.tasks += other.tasks
    found.failures += other.failures
    found.notes += other.notes
    found.fresh += other.fresh
    found.kept += other.kept
    found.seconds += other.seconds


def _listed(failures: Sequence[Failure]) -> list[Mapping[str, str]]:
    return [{"model": one.model, "task": one.task, **error_facts(one.error)} for one in failures]
