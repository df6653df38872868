"""Evaluate models on tasks: all that is asked for, nothing twice, in a child process, and nothing lost on the way.

    evaluation = evaluate({"base": "models/base", "ties": "merged"}, read_tasks("tasks"))
    evaluation.raise_if_bad()
    write_records("run.jsonl", evaluation.records, evaluation.models, evaluation.tasks)

What was scored before is taken from the store (``store.py``) without loading anything. The rest is done by one child
process (``child.py``), model after model: starting one per model would spend more time on imports than small models
need for a task. If it dies, the model it had in hand has failed, and a new child goes on with the next one. Finished
batches are on disk before they are counted, so whatever ends the run, the next one goes on from there.
"""

from __future__ import annotations

import gc
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merging.errors import AmalgamError, Cancelled, OutputError, TaskError
from merging.evaluation.child import Child, Send
from merging.evaluation.models import CAUSAL, Described, describe, load_model, model_key
from merging.evaluation.records import ModelInfo, Record, TaskInfo
from merging.evaluation.scoring import KIND_NAMES, KINDS, Settings, make_scorer, score_batch
from merging.evaluation.store import Results
from merging.evaluation.tasks import Task, check_names
from merging.evaluation.text_loss import WINDOW
from merging.user_folders import cache_folder


@dataclass(frozen=True, slots=True)
class Progress:
    """Items of all models and tasks together. ``rate``: items per second, of those that are really scored now."""

    done: int
    total: int
    doing: str
    rate: float | None = None

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.done) / self.rate if self.rate else None


@dataclass(frozen=True, slots=True)
class Failure:
    """A model that could not be scored on a task ("": on any)."""

    model: str
    task: str
    error: AmalgamError


@dataclass
class Evaluation:
    """Records of all (model, task) that were scored completely, by model, task and item.

    ``fresh`` and ``kept``: how many items were scored now, and how many were known from earlier runs.
    """

    records: list[Record] = field(default_factory=list)
    models: list[ModelInfo] = field(default_factory=list)
    tasks: list[TaskInfo] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fresh: int = 0
    kept: int = 0
    seconds: float = 0.0

    def raise_if_bad(self) -> None:
        """Raise the first failure, if there is one."""
        if self.failures:
            raise self.failures[0].error


@dataclass(frozen=True, slots=True)
class _Job:
    """What is missing of one model: number of the task -> batches of positions of its items."""

    name: str
    folder: Path
    key: str
    batches: dict[int, list[list[int]]]


def evaluate(
    models: Mapping[str, str | Path],
    tasks: Sequence[Task],
    *,
    roles: Mapping[str, str] | None = None,
    limit: int = 0,
    batch_size: int = 0,
    threads: int = 1,
    device: str = "cpu",
    settings: Settings | None = None,
    cache: Path | str | None = "",
    progress: Callable[[Progress], None] = lambda progress: None,
    stop: threading.Event | None = None,
) -> Evaluation:
    """Score each model on each task that it can do.

    Args:
        models: name -> local folder of a transformers model.
        roles: name -> what the model is there for; goes into the models' table.
        limit: score the first items only; 0: all.
        batch_size: items at a time; 0: what is usual for the kind of task. With another one the last bits of the
            numbers, and with them, rarely, a token can be different.
        threads: CPU threads of the child.
        device: where to compute: auto, cpu, cuda, cuda:1, mps.
        cache: folder of kept results; "": ``AMALGAM_CACHE`` or the user's cache; None: keep and use none.
        progress: called often, in this process.
        stop: when it is set, the child is ended and Cancelled raised, within a fraction of a second.

    Returns:
        Failures of a model, or of a model on a task, are in ``failures``; all else goes on.

    Raises:
        TaskError: ``E_TASK`` for a task that none of the models can do, and two tasks of one name.
        Cancelled: after ``stop``. Finished batches are kept.
        OutputError: ``E_DEVICE``; ``E_WORKER`` if a child process cannot be started.
    """
    started, stop = time.monotonic(), stop or threading.Event()
    folder = cache_folder("evaluation") if cache == "" else None if cache is None else Path(cache)
    check_names(tasks)
    result = Evaluation(tasks=[task.info for task in tasks])
    known = _look_at(models, roles or {}, folder, result, progress, stop)
    able = _who_can_do_what(known, tasks, result)
    settings = _resolved(settings or Settings(), known)

    wanted = [task.items[: limit or None] for task in tasks]
    results: dict[tuple[str, int], Results] = {}  # by key: two names for the same model are scored once
    jobs: dict[str, _Job] = {}
    for name, (info, described) in known.items():
        job = _Job(name, described.folder, info.key, {})
        for number, task in enumerate(tasks):
            if number not in able[name] or (info.key, number) in results:
                continue
            kept = results[info.key, number] = Results(folder, info.key, task, settings)
            result.notes += kept.notes
            kept.notes.clear()
            missing = kept.missing(wanted[number])
            result.kept += len(wanted[number]) - len(missing)
            if missing:
                job.batches[number] = _batches(missing, batch_size or KINDS[task.kind].batch_size)
        if job.batches:
            jobs.setdefault(info.key, job)

    counted = _Counter(result.kept, sum(len(wanted[number]) for _, number in results), progress)
    todo = list(jobs.values())
    while todo:
        todo = _run(todo, tasks, results, settings, batch_size, threads, device, counted, result, stop)
    result.fresh = counted.fresh
    failed = {(failure.model, failure.task) for failure in result.failures}
    for (key, number), kept in results.items():
        result.notes += kept.notes
        if not kept.missing(wanted[number]):
            result.records += kept.records(wanted[number])
        else:
            assert any((name, task) in failed for name, (info, _) in known.items() if info.key == key
                       for task in ("", tasks[number].name))  # fmt: skip
    result.seconds = time.monotonic() - started
    return result


# -- before anything is computed ----------------------------------------------------------------------------------


def _look_at(
    models: Mapping[str, str | Path],
    roles: Mapping[str, str],
    folder: Path | None,
    result: Evaluation,
    progress: Callable[[Progress], None],
    stop: threading.Event,
) -> dict[str, tuple[ModelInfo, Described]]:
    """Describe and identify each model; those that cannot be read are failures."""

    def look_up(size: int) -> None:
        if stop.is_set():
            raise Cancelled()

    known: dict[str, tuple[ModelInfo, Described]] = {}
    for name, path in models.items():
        look_up(0)
        progress(Progress(0, 0, f"reading {name}"))
        try:
            described = describe(path)
            info = ModelInfo(model_key(path, folder, look_up), name, str(path), roles.get(name, ""))
        except Cancelled:
            raise
        except AmalgamError as error:
            result.failures.append(Failure(name, "", error))
            continue
        known[name] = info, described
        result.models.append(info)
    return known


def _who_can_do_what(
    known: Mapping[str, tuple[ModelInfo, Described]], tasks: Sequence[Task], result: Evaluation
) -> dict[str, set[int]]:
    """Name of a model -> numbers of the tasks that it can do."""
    able: dict[str, set[int]] = {name: set() for name in known}
    for number, task in enumerate(tasks):
        needed = KINDS[task.kind].model
        unable = [name for name, (_, described) in known.items() if described.kind != needed]
        for name in known.keys() - set(unable):
            able[name].add(number)
        if len(unable) == len(known):
            result.raise_if_bad()  # perhaps the one that cannot be read could have done it
            what = f"None of the models can do the task {task.name} ({task.path})."
            raise TaskError("E_TASK", what, f"It needs {KIND_NAMES[needed]}.", "Leave the task out, or add a model.")
        if unable:
            result.notes.append(f"{task.name} needs {KIND_NAMES[needed]}: not scored on {', '.join(unable)}.")
    return able


def _resolved(settings: Settings, known: Mapping[str, tuple[ModelInfo, Described]]) -> Settings:
    """The same window for all models, so that all are shown the same."""
    contexts = [described.context for _, described in known.values() if described.kind == CAUSAL]
    window = settings.window or min([WINDOW, *(context for context in contexts if context)])
    return replace(settings, window=window, overlap=settings.overlap or max(1, window // 2))


def _batches(missing: Sequence[int], size: int) -> list[list[int]]:
    """Positions in batches that begin at multiples of ``size``: the same batches whatever was scored before."""
    batches: dict[int, list[int]] = {}
    for position in missing:
        batches.setdefault(position // size, []).append(position)
    return list(batches.values())


# -- the work -----------------------------------------------------------------------------------------------------


class _Counter:
    """Items done, and how fast."""

    def __init__(self, done: int, total: int, progress: Callable[[Progress], None]):
        self.done, self.total, self.progress = done, total, progress
        self.fresh, self.seconds = 0, 0.0

    def tell(self, doing: str, items: int = 0, seconds: float = 0.0) -> None:
        self.done, self.fresh, self.seconds = self.done + items, self.fresh + items, self.seconds + seconds
        rate = self.fresh / self.seconds if self.seconds else None
        self.progress(Progress(self.done, self.total, doing, rate))


def _run(
    todo: list[_Job],
    tasks: Sequence[Task],
    results: Mapping[tuple[str, int], Results],
    settings: Settings,
    batch_size: int,
    threads: int,
    device: str,
    counted: _Counter,
    result: Evaluation,
    stop: threading.Event,
) -> list[_Job]:
    """Have a child do the jobs; those that are left when it died."""
    current: tuple[int, int | None] = -1, None  # job, task
    used = {number: tasks[number] for job in todo for number in job.batches}
    with Child(_work, todo, used, settings, batch_size, threads, device, threads=threads) as child:
        counted.tell("starting")
        try:
            for message in child.messages():
                if stop.is_set():
                    if all(one.path is None for one in results.values()):
                        raise Cancelled("Stopped. Without a cache nothing is kept.", "Run it again to start over.")
                    raise Cancelled("Stopped. What was scored is kept.")
                if message is None:
                    continue
                kind, number, task, *content = message
                job, name = todo[number], "" if task is None else tasks[task].name
                if kind == "begin":
                    current = number, task
                    counted.tell(f"{job.name}: {name}" if name else f"loading {job.name}")
                elif kind == "batch":
                    records, items = content
                    results[job.key, task].add(records)
                    seconds = sum(record.seconds for record in records) * items / len(records)
                    counted.tell(f"{job.name}: {name}", items, seconds)
                else:
                    (error,) = content
                    result.failures.append(Failure(job.name, name, error))
            return []
        except OutputError as error:
            number, task = current
            if error.code != "E_WORKER" or number < 0:
                raise
            job, name = todo[number], "" if task is None else tasks[task].name
            on = f" while it scored {job.name} on {name}" if name else f" while it loaded {job.name}"
            what = error.what.removesuffix(".")
            result.failures.append(Failure(job.name, "", OutputError("E_WORKER", f"{what}{on}.", error.why, error.fix)))
            return todo[number + 1 :]


def _work(
    send: Send,
    jobs: Sequence[_Job],
    tasks: Mapping[int, Task],
    settings: Settings,
    batch_size: int,
    threads: int,
    device: str,
) -> None:
    """In the child: model after model, task after task, batch after batch."""
    import transformers

    from merging.engine import choose_device

    transformers.utils.logging.set_verbosity_error()  # what matters of it becomes an error of ours
    device = choose_device(device)
    for number, job in enumerate(jobs):
        send("begin", number, None)
        model: Any = None
        try:
            model = load_model(job.folder, device=device, threads=threads, key=job.key)
        except Exception as error:
            send("failed", number, None, _typed(error, f"{job.folder} cannot be loaded."))
            continue
        for place, batches in job.batches.items():
            task = tasks[place]
            send("begin", number, place)
            try:
                scorer = make_scorer(model, task, settings, batch_size)
                for batch in batches:
                    records = score_batch(model, scorer, task, [task.items[position] for position in batch])
                    send("batch", number, place, records, len(batch))
            except Exception as error:
                send("failed", number, place, _typed(error, f"{job.folder} cannot be scored on {task.name}."))
        del model
        gc.collect()


def _typed(error: Exception, what: str) -> AmalgamError:
    """Whatever a foreign model makes the libraries do, as an error that says what and where."""
    if isinstance(error, AmalgamError):
        return error
    first = str(error).strip().split("\n")[0][:300]
    last = traceback.extract_tb(error.__traceback__)[-1]
    why = f"{type(error).__name__}: {first} ({Path(last.filename).name}, line {last.lineno})."
    if isinstance(error, MemoryError) or "out of memory" in first:
        return OutputError("E_MEMORY", what, why, "Use a smaller --batch-size.")
    return OutputError("E_WORKER", what, why, "Check that the model works with transformers.")
