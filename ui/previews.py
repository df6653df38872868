"""The preview that sliders move: the merge in memory beside its base and its experts, on the same items.

One child process does the work (``merging.preview``). The base and the experts are scored in it too, each once, as a
merge that copies one model: so all numbers beside each other come from the same program, items and batches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merging.cores import available_cores
from merging.errors import AmalgamError, OutputError
from merging.evaluation.tasks import Task, read_tasks
from merging.plan import make_plan
from merging.preview import Preview

from .draft import Draft, active, label_of, recipe_of

PROMPTS, TOKENS = 2, 32
"""Prompts shown of each task, and how long an answer may be."""
SMALL = 500_000_000
"""Bytes of a merge whose preview is got ready before it is asked for."""
MERGE, BASE = "This merge", "Base"


@dataclass(frozen=True, slots=True)
class Question:
    """``expected`` is None for a question of the user's own."""

    task: str
    prompt: str
    expected: str | None


@dataclass(frozen=True)
class Shown:
    """What is known so far. ``scores``: model -> rows as ``Preview.score`` gives them; ``answers``: model -> texts."""

    doing: str
    scores: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)
    questions: tuple[Question, ...] = ()
    owners: dict[str, str] = field(default_factory=dict)
    """Task -> the expert that was made for it, as far as names tell."""
    merged: dict[str, Any] | None = None
    """What ``Preview.merge`` told of this merge."""
    seconds: float = 0.0
    """From the request to the merge's scores and answers."""
    complete: bool = False


class Previews:
    """The one preview of this program. ``device``, ``threads``: as the workbench has them."""

    def __init__(self, device: str = "auto", threads: int = 0) -> None:
        self.device, self.threads = device, threads or available_cores()
        self._lock = threading.Lock()
        self._preview: Preview | None = None
        self._known: dict[tuple, Any] = {}

    def preview(self) -> Preview:
        with self._lock:
            if self._preview is None:
                self._preview = Preview(threads=self.threads, device=self.device)
            return self._preview

    def warm(self, draft: Draft) -> None:
        """Start the child process ahead of the first look, which would wait some seconds for its imports. Not where a
        preview would take much memory, or cannot be."""
        try:
            recipe = recipe_of(draft).to_data()
            with make_plan(recipe_of(draft), offline=True) as plan:
                if plan.bytes_written > SMALL:
                    return
            self.preview().open(recipe)
        except AmalgamError:
            pass  # the look will say it

    def close(self) -> None:
        """End the child process and give its memory back. The next look starts another."""
        with self._lock:
            preview, self._preview = self._preview, None
        if preview is not None:
            preview.close()

    def look(self, draft: Draft, limit: int, own_prompts: Sequence[str] = ()) -> Iterator[Shown]:
        """Merge, score, ask; then the same of the base and the experts as far as it is not known yet.

        Raises what planning, merging and scoring raise; Cancelled when a newer look took over; ``E_MEMORY``.
        """
        started, preview = time.monotonic(), self.preview()
        recipe, tasks = recipe_of(draft), list(draft["tasks"])
        read = [task for path in tasks for task in _tasks(path)]
        questions = tuple(questions_of(read, own_prompts))
        experts = {label_of(e): e for e in active(draft)["experts"]}
        shown = Shown("Merging in memory", questions=questions, owners=owners(read, list(experts)))
        yield shown
        data = recipe.to_data()
        cost = preview.open(data)
        if not cost.possible:
            fix = "Close other programs, or use Merge & save, which needs little memory."
            raise OutputError("E_MEMORY", "There is not enough memory for a preview.", cost.why, fix)
        merged = preview.merge(data)
        shown = replace(shown, doing="Scoring", merged=merged)
        yield shown
        rows = preview.score(tasks, limit, of=merged["number"]) if tasks else []
        shown = replace(shown, doing="Asking", scores={MERGE: rows}, seconds=time.monotonic() - started)
        yield shown
        answers = _ask(preview, questions, merged["number"])
        shown = replace(shown, answers={MERGE: answers}, seconds=time.monotonic() - started)
        others = {BASE: data.get("base"), **experts}
        for name, model in others.items():
            if model is None:
                continue
            key = self._key(model, tasks, limit, questions)
            if key not in self._known:
                yield replace(shown, doing=f"Scoring {name} for comparison, once")
                self._known[key] = self._of(preview, model, tasks, limit, questions)
            rows, answers = self._known[key]
            shown = replace(shown, scores={**shown.scores, name: rows}, answers={**shown.answers, name: answers})
        yield replace(shown, doing="", complete=True)

    def _of(self, preview: Preview, model: Any, tasks: list[str], limit: int, questions: Sequence[Question]) -> Any:
        """Scores and answers of one model as it is."""
        parts = (
            {"model": model} if isinstance(model, str) else {k: model[k] for k in ("model", "adapter") if k in model}
        )
        base = {"base": parts["model"]} if "adapter" in parts else {}
        copied = preview.merge({"experts": [parts], "method": "passthrough", **base})
        rows = preview.score(tasks, limit, of=copied["number"]) if tasks else []
        return rows, _ask(preview, questions, copied["number"])

    def _key(self, model: Any, tasks: Sequence[str], limit: int, questions: Sequence[Question]) -> tuple:
        """Everything that those scores depend on, with the time at which files were last changed."""
        names = [model] if isinstance(model, str) else [model["model"], model.get("adapter") or ""]
        prompts = tuple(question.prompt for question in questions)
        return (*((name, _changed(name)) for name in names), *((t, _changed(t)) for t in tasks), limit, prompts)


def questions_of(tasks: Sequence[Task], own: Sequence[str]) -> list[Question]:
    """The first prompts of each task that has some, then the user's own."""
    found = [
        Question(task.name, item.prompt, item.answer)
        for task in tasks
        if task.kind == "exact_match"
        for item in task.items[:PROMPTS]
    ]
    return found + [Question("your own", prompt, None) for prompt in own if prompt.strip()]


def owners(tasks: Sequence[Task], experts: Sequence[str]) -> dict[str, str]:
    """Task -> the expert that has its name: ``sort`` and ``sort.validation`` belong to an expert ``sort``."""
    short = {expert.rstrip("/").rsplit("/", 1)[-1].lower(): expert for expert in experts}
    pairs = ((task.name, short.get(task.name.split(".")[0].lower())) for task in tasks)
    return {task: expert for task, expert in pairs if expert is not None}


def _ask(preview: Preview, questions: Sequence[Question], number: int) -> list[str]:
    return preview.generate([q.prompt for q in questions], TOKENS, of=number) if questions else []


def _changed(name: str) -> int:
    """When a local file, or the newest in a folder, was changed; 0 for all else."""
    path = Path(name)
    try:
        return max((p.stat().st_mtime_ns for p in (path, *(path.iterdir() if path.is_dir() else ()))), default=0)
    except (OSError, ValueError):
        return 0


_read: dict[tuple[str, int], list[Task]] = {}


def _tasks(path: str) -> list[Task]:
    key = (path, _changed(path))
    if key not in _read:
        if len(_read) > 32:
            _read.clear()
        _read[key] = read_tasks(path)
    return _read[key]
