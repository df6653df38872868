"""What can be scored on what, and the job that does it: pure functions from draft, run history and files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from merging.errors import AmalgamError, RecipeError, TaskError
from merging.evaluation.lm_eval import is_harness_task
from merging.evaluation.records import TaskInfo
from merging.evaluation.tasks import read_task_file, split_of, task_files

from ..components.cards import text
from ..components.text_table import table
from ..draft import Draft, is_on, label_of, set_tasks
from ..scored import suggested

KIND_WORDS = {
    "exact_match": "exact answer",
    "choice": "multiple choice",
    "text": "text, bits per byte",
    "text_label": "class of a text",
    "image_label": "class of an image",
    "harness": "lm-evaluation-harness",
}
LIMITS = {"50 items of each task (quick)": 50, "200 items": 200, "All items": 0}
OFFERED_MERGES, CHOSEN_MERGES = 12, 3
NAME_LENGTH = 40


# -- tasks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskFile:
    """A task file and what is in it; ``problem`` if it cannot be read."""

    path: str
    tasks: tuple[TaskInfo, ...] = ()
    problem: str = ""

    @property
    def label(self) -> str:
        if self.problem:
            return f"{Path(self.path).name} (cannot be read)"
        names = ", ".join(task.name for task in self.tasks)
        items = sum(task.items for task in self.tasks)
        count = f"{items:,} items · " if items else ""
        return f"{names} · {count}{KIND_WORDS[self.tasks[0].kind]} · {self.split or 'test'}"

    @property
    def split(self) -> str:
        """ "" where everything in it is for reporting."""
        return ", ".join(dict.fromkeys(filter(None, (_held(task) for task in self.tasks))))


def _held(task: TaskInfo) -> str:
    split = task.split or split_of(task.name)
    return "" if split == "test" else split


def read_file(path: str) -> TaskFile:
    """Read once as long as the file does not change."""
    try:
        status = os.stat(path)
        return _read_file(path, status.st_mtime_ns, status.st_size)
    except OSError:
        return TaskFile(path, problem=f"There is no task file {path}.")


@lru_cache(maxsize=128)
def _read_file(path: str, changed: int, size: int) -> TaskFile:
    try:
        if is_harness_task(Path(path)):
            return TaskFile(path, (TaskInfo(Path(path).stem, kind="harness"),))
        return TaskFile(path, tuple(task.info for task in read_task_file(Path(path))))
    except AmalgamError as error:
        return TaskFile(path, problem=f"{error.what} {error.why} {error.fix}".strip())


def bundled(root: Path) -> list[str]:
    """Task files that come with the program: of the demo experts, then of the small image models."""
    folders = (root / "assets" / "demo" / "tasks", root / "assets" / "tiny_vit" / "tasks")
    return [str(file) for folder in folders if folder.is_dir() for file in task_files(folder)]


def offered_tasks(root: Path, draft: Draft) -> list[TaskFile]:
    """Bundled ones, and before them those of the draft that are not."""
    ours = bundled(root)
    return [read_file(path) for path in [*(p for p in draft["tasks"] if p not in ours), *ours]]


def with_tasks(draft: Draft, path: str) -> tuple[Draft, str]:
    """The draft with one more task file, or all those of a folder, and an empty text box. TaskError E_TASK for what is
    none."""
    files = [
        str(file) for file in task_files(os.path.abspath(os.path.expanduser(path.strip())) if path.strip() else "")
    ]
    for file in files:
        if problem := read_file(file).problem:
            raise TaskError("E_TASK", problem)
    return set_tasks(draft, list(dict.fromkeys([*draft["tasks"], *files]))), ""


def tasks_table(files: Sequence[TaskFile]) -> str:
    """The chosen tasks in detail."""
    if not files:
        return '<p class="reading">No task is chosen yet. Choose one above, or add a file of your own.</p>'
    rows: list[list[Any]] = []
    for file in files:
        if file.problem:
            rows.append([Path(file.path).name, None, f"cannot be read: {file.problem}", None])
        for task in file.tasks:
            use = f"{_held(task)}: for choosing settings" if _held(task) else "test: for reporting"
            rows.append([task.name, f"{task.items:,}" if task.items else None, KIND_WORDS[task.kind], use])
    return table(["Task", "Items", "Kind", "Split"], rows, numbers=(1,))


def validation_of(paths: Iterable[str]) -> list[str]:
    """The validation files that lie beside these task files."""
    found = []
    for path in paths:
        place = Path(path)
        beside = place.with_name(f"{place.stem}.validation{place.suffix}")
        if not split_of(place.stem) and beside.is_file():
            found.append(str(beside))
    return found


# -- models ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelChoice:
    """``id``: "base", "expert:…" or "run:…"; ``name``: in the results; ``chosen``: without the user's doing."""

    id: str
    label: str
    name: str
    reference: str
    role: str
    chosen: bool = True


def offered_models(draft: Draft, states: Iterable[Any]) -> tuple[list[ModelChoice], list[str]]:
    """What can be scored: base and experts of the draft, and merged models of the run history, newest first. And what
    cannot, with the reason."""
    choices: list[ModelChoice] = []
    left_out = []
    taken: set[str] = set()
    base = draft["recipe"].get("base")
    reference = base.get("model") if isinstance(base, dict) else base
    if isinstance(base, dict) and base.get("adapter"):
        left_out.append("the base, because it has an adapter: merge it first (method passthrough)")
    elif reference:
        choices.append(ModelChoice("base", f"Base · {_short(reference)}", _unique("base", taken), reference, "base"))
    for expert in draft["recipe"].get("experts", []):
        label = label_of(expert)
        if not is_on(draft, label):
            continue
        name = _short(expert.get("name") or label)
        if expert.get("adapter") or (Path(expert["model"]) / "adapter_config.json").is_file():
            left_out.append(f"{name}, because it is an adapter: only with fair baselines, which make a model of it")
            continue
        choices.append(
            ModelChoice(f"expert:{label}", f"Expert · {name}", _unique(name, taken), expert["model"], "expert")
        )
    merges = [s for s in states if s.kind == "merge" and s.status == "finished" and s.result]
    merges = [s for s in merges if os.path.isfile(os.path.join(str(s.result.get("model", "")), "config.json"))]
    for number, state in enumerate(merges[:OFFERED_MERGES]):
        folder = str(state.result["model"])
        title = state.title or str(state.result.get("method", "merge"))
        choices.append(
            ModelChoice(
                f"run:{state.id}", f"Merge · {_short(title)}", _unique(_short(title), taken), folder, "candidate",
                number < CHOSEN_MERGES,
            )
        )  # fmt: skip
    return choices, left_out


def _short(name: str) -> str:
    """The last part of a path, at most ``NAME_LENGTH`` printable characters."""
    last = name.rstrip("/").rpartition("/")[2] or name
    text = "".join(c if c.isprintable() else "?" for c in last).strip() or "model"
    return text if len(text) <= NAME_LENGTH else f"{text[: NAME_LENGTH - 1]}…"


def _unique(name: str, taken: set[str]) -> str:
    if name.startswith("expert ") or (taken and name in ("base", "average", "tuned")):
        name = f"the {name}"
    wanted, number = name, 2
    while wanted in taken:
        wanted, number = f"{name} ({number})", number + 1
    taken.add(wanted)
    return wanted


def picked(choices: Sequence[ModelChoice], wishes: Mapping[str, bool]) -> list[str]:
    """Ids of the models to score: what the user said, else what is usual."""
    return [choice.id for choice in choices if wishes.get(choice.id, choice.chosen)]


def new_wishes(choices: Sequence[ModelChoice], wishes: Mapping[str, bool], ids: Sequence[str]) -> dict[str, bool]:
    """The user's choice, remembered where it differs from the usual one."""
    now = {choice.id: choice.id in ids for choice in choices}
    return {**wishes, **{id: on for id, on in now.items() if on != next(c.chosen for c in choices if c.id == id)}} | {
        id: on for id, on in now.items() if id in wishes
    }


# -- the job --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """Everything that the page's controls say."""

    models: Sequence[ModelChoice]
    tasks: Sequence[TaskFile]
    limit: int = 0
    fair: bool = False
    budget: int = 5


def why_not(order: Order) -> str:
    """Why the evaluation cannot start; "" if it can."""
    if not order.models:
        return "Choose a model to score. Base and experts come from the Experts page."
    if not order.tasks:
        return "Choose a task to score on."
    if bad := [file for file in order.tasks if file.problem]:
        return f"Leave {Path(bad[0].path).name} out: {bad[0].problem}"
    names = [task.name for file in order.tasks for task in file.tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        return f"Two task files are called {twice}: leave one out."
    return why_not_fair(order) if order.fair else ""


def why_not_fair(order: Order) -> str:
    """Why fair baselines cannot be made."""
    roles = [choice.role for choice in order.models]
    if "base" not in roles or roles.count("expert") < 2:
        return "Fair baselines merge the experts anew: choose the base and at least two experts."
    if any(task.kind == "harness" for file in order.tasks for task in file.tasks):
        return "Fair baselines cannot be tuned on tasks of lm-evaluation-harness: leave them out."
    report = [file for file in order.tasks if not file.split]
    if not report:
        return "Choose test tasks to report on. Validation tasks are found by their names."
    if missing := [file for file in report if not validation_of([file.path])]:
        return f"There is no validation file beside {Path(missing[0].path).name} ({_validation_name(missing[0].path)})."
    return ""


def _validation_name(path: str) -> str:
    return f"{Path(path).stem}.validation{Path(path).suffix}"


def job(order: Order, how: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """(kind, arguments, title) of the evaluation. ``how``: device, threads, offline. RecipeError for what
    ``why_not`` says."""
    if reason := why_not(order):
        raise RecipeError("E_RECIPE_INPUTS", "This cannot be scored yet.", "", reason)
    how = {**how, "limit": order.limit}
    if order.fair:
        return fair_job(order, how)
    models = [[choice.name, choice.reference, choice.role] for choice in order.models]
    title = f"{_count(len(models), 'model')} on {_count(sum(len(f.tasks) for f in order.tasks), 'task')}"
    return "evaluate", {"models": models, "tasks": [file.path for file in order.tasks], **how}, title


def fair_job(order: Order, how: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """Validation files are what the baselines are tuned on, and no longer tasks to report."""
    report = [file for file in order.tasks if not file.split]
    roles = {choice.name: choice.role for choice in order.models}
    owners: dict[str, list[str]] = {}
    for task, expert in suggested(roles, [task.name for file in report for task in file.tasks]).owners.items():
        owners.setdefault(expert, []).append(task)
    if not owners:
        fix = "Give an expert the name of the task that it was trained for."
        raise RecipeError("E_RECIPE_INPUTS", "It is not clear which expert was trained for which task.", "", fix)
    by_role = {
        role: [[choice.name, choice.reference] for choice in order.models if choice.role == role]
        for role in ("base", "expert", "candidate")
    }  # fmt: skip
    arguments = {
        "base": by_role["base"][0][1], "experts": by_role["expert"], "owners": owners,
        "candidates": by_role["candidate"], "tasks": [file.path for file in report],
        "selection_tasks": validation_of(file.path for file in report), "budget": order.budget, **how,
    }  # fmt: skip
    return "compare", arguments, f"Fair comparison on {_count(len(report), 'task')}"


def prompts_of(written: str) -> list[str]:
    """Prompts are separated by an empty line; a single block of lines is one prompt per line."""
    blocks = [block.strip("\n") for block in written.replace("\r\n", "\n").split("\n\n")]
    blocks = [block for block in blocks if block.strip()]
    return [line for line in blocks[0].split("\n") if line.strip()] if len(blocks) == 1 else blocks


def prompts_job(
    models: Sequence[ModelChoice], written: str, length: int, how: Mapping[str, Any]
) -> tuple[str, dict[str, Any], str]:
    prompts = prompts_of(written)
    if not prompts or not models:
        fix = "Write a prompt." if models else "Choose models above."
        raise RecipeError("E_RECIPE_INPUTS", "There is nothing to ask yet.", "", fix)
    named = [[choice.name, choice.reference, choice.role] for choice in models]
    title = f"{_count(len(prompts), 'prompt')} to {_count(len(named), 'model')}"
    return "evaluate", {"models": named, "prompts": prompts, "length": int(length), **how}, title


def import_job(path: str) -> tuple[str, dict[str, Any], str]:
    """To look at what lm-evaluation-harness has written."""
    path = path.strip()
    if not path:
        raise RecipeError("E_RECIPE_INPUTS", "No folder is named.", "", "Name the one given to lm_eval --output_path.")
    return "import", {"path": os.path.abspath(os.path.expanduser(path))}, f"lm-eval: {Path(path).name}"


def answers_table(folder: Path) -> str:
    """Answers of all models to one's own prompts, side by side; "" if the run has none."""
    try:
        rows = json.loads((folder / "answers.json").read_text("utf-8"))
        names = list(dict.fromkeys(name for row in rows for name in row["answers"]))
        cells = [[row["prompt"], *(row["answers"].get(name) for name in names)] for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return table(["Prompt", *names], cells, "Answers, decoded greedily", wide=True)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def reason(words: str) -> str:
    """Why a button cannot be pressed, for the line beside it."""
    return f'<p class="why">{text(words)}</p>' if words else ""
