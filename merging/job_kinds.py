"""The kinds of jobs: what each takes, how it is done, and what it leaves in the job's folder.

A kind is a function of plain data. It tells how far it is, looks at ``stop``, and may be done again with the same
arguments after it was interrupted: then it finds what it finished before. Its arguments are checked completely when
the job is started, so that a mistake is told at once and not after a wait.

    merge      recipe.yml, and the model in ``model/`` or where ``out`` says; with ``evaluate`` also records.jsonl
    evaluate   records.jsonl, and answers.json to ``prompts``
    inspect    one event per finished part; the results are in the cache of inspections
    compare    a run with baselines of its own; import: results of lm-evaluation-harness (see ``job_compare``)
    download   models of the Hub, in its ordinary cache (see ``job_download``)

Nothing heavy is imported before a kind runs.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from .checkpoints.disk import write_whole, writing
from .errors import Cancelled, RecipeError, VerificationError
from .job_compare import COMPARE, IMPORT
from .job_download import DOWNLOAD
from .job_files import JobProgress
from .job_kind import Arguments, Count, Event, Kind, NamedModel, parsed
from .job_pace import Pace, Tell, downloads

# -- arguments ----------------------------------------------------------------------------------------------------


class Scoring(Arguments):
    tasks: list[str] = Field(min_length=1)
    """Task files, or folders of them."""
    limit: Count = 0


class MergeArguments(Arguments):
    recipe: dict[str, Any]
    out: str | None = None
    """A folder that does not exist yet; None: ``model`` in the job's folder."""
    evaluate: Scoring | None = None
    models: list[NamedModel] = []
    """Also scored, beside the merged model."""
    device: str = "auto"
    threads: Count = 0
    offline: bool = False


class EvaluateArguments(Arguments):
    models: list[NamedModel] = Field(min_length=1)
    tasks: list[str] = []
    prompts: list[Annotated[str, Field(min_length=1, max_length=100_000)]] | None = None
    """Questions of one's own, which every model answers."""
    length: int = Field(default=64, ge=1, le=4096)
    """Tokens of an answer to a prompt, at most."""
    limit: Count = 0
    device: str = "cpu"
    threads: int = Field(default=1, ge=1)
    offline: bool = False


class InspectOptions(Arguments):
    """As ``analysis.inspection_run.inspect`` takes them; None: its default."""

    bases: list[str] | None = None
    parts: list[str] | None = None
    density: float | None = None
    spectra: Literal["gram", "exact", "preview", "none"] | None = None
    rank: int | None = None
    coefficients: list[float] | None = None
    texts: list[str] | None = None
    threads: Count | None = None
    offline: bool | None = None


class InspectArguments(Arguments):
    base: str
    experts: list[str] = Field(min_length=1)
    merged: str | None = None
    options: InspectOptions = InspectOptions()


# -- merge --------------------------------------------------------------------------------------------------------


def _check_merge(arguments: dict[str, Any]) -> None:
    from .checkpoints.output_rules import check_output_name, refuse_existing
    from .job_scoring import check_models, check_tasks
    from .recipe import Recipe

    wish = parsed(MergeArguments, arguments)
    Recipe.parse(wish.recipe)
    check_models(wish.models)
    if wish.evaluate is not None:
        check_tasks(wish.evaluate.tasks)
    if wish.out is not None:
        check_output_name(Path(wish.out))
        refuse_existing(Path(wish.out).absolute(), "")


def _merge(
    arguments: dict[str, Any], folder: Path, tell: Tell, event: Event, stop: threading.Event
) -> dict[str, Any]:  # fmt: skip
    """Result: {model, method, bytes, seconds, warnings, survival, resumed, tensors}; with ``evaluate`` also the merged
    model's ``name`` among the scored ones, ``seconds_scoring``, and what ``job_scoring.score`` gives. Event ``merged``
    with the first of these before the scoring."""
    from .engine import choose_device
    from .plan import make_plan
    from .recipe import Recipe
    from .recipe_yaml import to_yaml

    wish = parsed(MergeArguments, arguments)
    recipe = Recipe.parse(wish.recipe)
    write_whole(folder / "recipe.yml", to_yaml(recipe).encode())
    tell(JobProgress(0, 0, "bytes", "planning"))
    with make_plan(recipe, offline=wish.offline, progress=downloads(tell, stop)) as plan:
        if stop.is_set():
            raise Cancelled()
        out = Path(wish.out).absolute() if wish.out is not None else folder / "model"
        result = _finished_before(out, plan.resume_key(choose_device(wish.device)), tell)
        if result is None:
            result = _run(plan, out, wish, tell, stop)
        result = {"model": str(out), "method": recipe.method, "bytes": plan.bytes_written, **result}
    event({"event": "merged", **result})
    if wish.evaluate is not None:
        from .job_scoring import score

        names = [name for name, _, _ in wish.models]
        name = next(name for name in _names(recipe.method) if name not in names)
        models = [*wish.models, [name, str(out), "candidate"]]
        scored = score(
            models, wish.evaluate.tasks, wish.evaluate.limit, folder, tell, stop,
            device=wish.device, threads=wish.threads or 1, offline=wish.offline,
        )  # fmt: skip
        result |= {"name": name, **scored, "seconds": result["seconds"], "seconds_scoring": scored["seconds"]}
    return result


def _names(method: str) -> Any:
    yield method
    number = 2
    while True:
        yield f"{method} {number}"
        number += 1


def _run(plan: Any, out: Path, wish: MergeArguments, tell: Tell, stop: threading.Event) -> dict[str, Any]:
    from .engine import Progress, run

    pace, total = Pace(tell, "bytes"), plan.bytes_read + plan.bytes_written

    def on_progress(progress: Progress) -> None:
        share = progress.done / max(1, progress.total)
        doing = "checking what was written" if share == 1 else f"merging {progress.tensor}".rstrip()
        pace(round(share * total), total, doing)

    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    merged = run(plan, out, device=wish.device, threads=wish.threads, on_progress=on_progress, stop=stop)
    facts = {"resumed": merged.resumed, "tensors": len(plan.tensors)}
    return _facts(merged.manifest) | {"seconds": round(merged.seconds, 3)} | facts


def _finished_before(out: Path, key: str, tell: Tell) -> dict[str, Any] | None:
    """What is known of a model that an earlier run of this very plan has written; None if there is none."""
    from .checkpoints.manifest import read_manifest
    from .checkpoints.verify import verify

    if not os.path.lexists(out):
        return None
    try:
        manifest = read_manifest(out)
    except VerificationError:
        return None
    if manifest.get("plan_hash") != key:
        return None
    tell(JobProgress(0, 0, "bytes", "checking what an earlier run wrote"))
    report = verify(out)
    report.raise_if_bad()
    return _facts(manifest) | {"seconds": 0.0, "resumed": report.tensors, "tensors": report.tensors}


def _facts(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"warnings": manifest["warnings"], "survival": manifest["delta_survival"]}


# -- evaluate -----------------------------------------------------------------------------------------------------


def _check_evaluate(arguments: dict[str, Any]) -> None:
    from .job_scoring import check_models, check_tasks

    wish = parsed(EvaluateArguments, arguments)
    check_models(wish.models)
    if not wish.tasks and not wish.prompts:
        raise RecipeError("E_RECIPE_FIELD", "There is nothing to score.", "", "Choose a task, or write a prompt.")
    if wish.tasks:
        check_tasks(wish.tasks)


def _evaluate(
    arguments: dict[str, Any], folder: Path, tell: Tell, event: Event, stop: threading.Event
) -> dict[str, Any]:  # fmt: skip
    """Result: as ``job_scoring.score`` and ``job_scoring.ask`` say."""
    from .job_scoring import ask, score

    wish = parsed(EvaluateArguments, arguments)
    how = {"device": wish.device, "threads": wish.threads, "offline": wish.offline}
    result: dict[str, Any] = {"records": None, "failures": [], "notes": []}
    if wish.tasks:
        result = score(wish.models, wish.tasks, wish.limit, folder, tell, stop, **how)
        event({"event": "scored", **result})
    if wish.prompts:
        answered = ask(wish.models, wish.prompts, wish.length, folder, tell, stop, **how)
        result |= {"answers": answered["answers"], "failures": result["failures"] + answered["failures"]}
    return result


# -- inspect ------------------------------------------------------------------------------------------------------


def _check_inspect(arguments: dict[str, Any]) -> None:
    from .analysis.inspection_run import PARTS, RANK, check_options
    from .analysis.trimmed import DENSITY

    options = parsed(InspectArguments, arguments).options
    check_options(options.parts or PARTS, options.density or DENSITY, options.spectra or "gram", options.rank or RANK)


def _inspect(
    arguments: dict[str, Any], folder: Path, tell: Tell, event: Event, stop: threading.Event
) -> dict[str, Any]:  # fmt: skip
    """Event ``part`` {part, seconds, cached, basis} after each part. Result: {parts, findings, notes, seconds}."""
    from .analysis.inspection import Inspection
    from .analysis.inspection_run import Step, inspect

    wish, began = parsed(InspectArguments, arguments), time.monotonic()

    def progress(step: Step) -> None:
        doing = f"{step.part} ({step.number} of {step.of})"
        tell(JobProgress(round(step.share * step.of, 2), step.of, "parts", doing, None, step.seconds_left))

    def finished(part: str, found: Inspection) -> None:
        facts = found.parts[part]
        event({"event": "part", "part": part, "seconds": round(facts.seconds, 3), "cached": facts.cached,
               "basis": facts.basis})  # fmt: skip

    result = inspect(
        wish.base, wish.experts, wish.merged, **wish.options.model_dump(exclude_none=True),
        progress=progress, download=downloads(tell, stop), finished=finished, stop=stop,
    )  # fmt: skip
    counts: dict[str, int] = {}
    for finding in result.findings:
        counts[finding.severity] = counts.get(finding.severity, 0) + 1
    return {"parts": list(result.parts), "findings": counts, "notes": result.notes,
            "seconds": round(time.monotonic() - began, 3)}  # fmt: skip


KINDS: dict[str, Kind] = {
    "merge": Kind("Merge", _check_merge, _merge),
    "evaluate": Kind("Evaluation", _check_evaluate, _evaluate),
    "inspect": Kind("Inspection", _check_inspect, _inspect),
    "compare": COMPARE,
    "import": IMPORT,
    "download": DOWNLOAD,
}
