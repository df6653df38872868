"""Merge & save: the merge as a job, scored afterwards, and what came of it."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from merging.checkpoints.manifest import read_manifest
from merging.checkpoints.output_rules import check_output_name
from merging.errors import AmalgamError, OutputError
from merging.evaluation.overview import Overview
from merging.evaluation.records import read_records_file
from merging.methods import get_method

from ..components.cards import duration, size, text
from ..components.plain import plain
from ..context import App
from ..draft import Draft, active, label_of, recipe_of
from ..shell import Shell
from .merge_plan import check_draft

MODELS = "models"
EMPTY = '<p class="empty">What a finished merge gave is shown here, and kept on the Runs page.</p>'


def build(app: App, shell: Shell) -> dict[str, Any]:
    """The section. Gives its button and the place for the reason why it is disabled."""
    gr.Markdown("### Merge & save")
    save = gr.Button("Merge & save", variant="primary", elem_id="merge-save", interactive=False)
    why = plain(elem_id="merge-why")
    with gr.Row(elem_classes="tight wrap"):
        name = gr.Textbox(
            label="Name of the result", placeholder="none: in the folder of its run", max_length=100,
            interactive=True, elem_id="merge-name", visible=not app.on_space, min_width=180,
        )  # fmt: skip
        limit = gr.Number(
            0, label="Items of each task (0: all)", minimum=0, precision=0, interactive=True, elem_id="merge-limit",
            min_width=120,
        )  # fmt: skip
        score = gr.Checkbox(True, label="Score it afterwards", interactive=True, elem_id="merge-score", min_width=150)
    where = plain(elem_id="merge-where")
    tasks = plain(elem_id="merge-tasks")
    result = plain(EMPTY, elem_id="merge-result")
    show = gr.Button("Show on the Evaluate page", visible=False, elem_id="merge-evaluate")
    shell.start_on(save.click, partial(job_of, app), [name, score, limit])
    shell.act(name.input, partial(place_words, app), name, where, trigger_mode="always_last")
    shell.on_draft(tasks_words, tasks)
    shell.on_job(partial(_result, app), [result, show])
    shell.act(show.click, partial(shell.goto, "evaluate"), [], shell.tabs)
    return {"button": save, "why": why}


def job_of(app: App, draft: Draft, name: str | None, score: bool, limit: Any) -> tuple[str, dict[str, Any], str]:
    """The job for ``shell.start_on``. The base and the experts are scored too, to compare with; adapters are not,
    since they cannot be run by themselves."""
    recipe, data, name = recipe_of(draft), active(draft), (name or "").strip()
    check_draft(app, draft)
    arguments: dict[str, Any] = {
        "recipe": recipe.to_data(), "device": app.device, "threads": app.threads, "offline": app.offline,
    }  # fmt: skip
    if name and not app.on_space:
        arguments["out"] = str(place_of(app, name))
    if score and draft["tasks"]:
        models = [["base", recipe.base.model, "base"]] if recipe.base and recipe.base.adapter is None else []
        for expert in data["experts"]:
            if not expert.get("adapter"):
                label = label_of(expert)
                models.append([label if label != "base" else "expert base", expert["model"], "expert"])
        arguments |= {"evaluate": {"tasks": list(draft["tasks"]), "limit": max(0, int(limit or 0))}, "models": models}
    title = f"{get_method(recipe.method).title} of {len(recipe.experts)}"
    return "merge", arguments, f"{name}: {title}" if name else title


def place_of(app: App, name: str) -> Path:
    """The folder for a model of that name. OutputError E_OUTPUT_NAME for names that lead elsewhere."""
    if "/" in name or "\\" in name or name.startswith("."):
        why = "It is the name of one folder, and no path."
        raise OutputError("E_OUTPUT_NAME", f"{name[:100]!r} cannot name the result.", why, "Choose another name.")
    place = app.data / MODELS / name
    check_output_name(place)
    return place


def place_words(app: App, name: str | None) -> str:
    """Where it will lie."""
    name = (name or "").strip()
    if not name:
        return ""
    place = place_of(app, name)
    if place.exists():
        return '<p class="state problem">A model of that name is there already; choose another name.</p>'
    return f'<p class="reading">Will be written to {text(place)}</p>'


def tasks_words(draft: Draft) -> str:
    if not draft["tasks"]:
        return (
            '<p class="reading">No tasks are chosen, so nothing will be scored: choose some on the Evaluate page.</p>'
        )
    names = ", ".join(Path(task).name.split(".")[0] for task in draft["tasks"])
    return f'<p class="reading">On {text(names)}; the base and the experts too, where that was not done before.</p>'


# -- what came of it ----------------------------------------------------------------------------------------------


def _result(app: App, state: Any) -> Any:
    hidden = gr.Button(visible=False)
    if state is None or state.kind != "merge":
        return (gr.skip(), gr.skip()) if state is not None else (EMPTY, hidden)
    if state.status != "finished" or not state.result:
        words = {"failed": "It failed.", "cancelled": "It was stopped."}.get(state.status, "It is being made.")
        error = state.error or {}
        lines = "".join(f"<p>{text(error[key])}</p>" for key in ("what", "why", "fix") if error.get(key))
        return f'<section class="card" aria-label="Result"><p>{words}</p>{lines}</section>', hidden
    there = importlib.util.find_spec("ui.pages.evaluate") is not None
    return result_card(state), gr.Button(visible=bool(state.result.get("records")) and there)


def result_card(state: Any) -> str:
    """Where the model lies, its hash, what to mind, how much of the changes survived rounding, and its scores."""
    result = state.result
    try:
        known = read_manifest(Path(result["model"]))["plan_hash"]
    except (AmalgamError, KeyError):
        known = None
    rows = [
        ("Model", f"<code>{text(result['model'])}</code>"),
        ("Size", f"{size(result.get('bytes'))}, made in {duration(result.get('seconds') or 0)}"),
        ("Plan's hash", f"<code>{text(known[:16])}…</code>" if known else "the model has been moved or changed"),
        ("Changes kept", survival_words(result.get("survival"))),
    ]
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    warnings = "".join(f'<p class="warning">{text(w)}</p>' for w in result.get("warnings") or [])
    failures = "".join(
        f'<p class="warning">Not scored: {text(f["model"])} {text(f["task"])}: {text(f["what"])}</p>'
        for f in result.get("failures") or []
    )
    return (
        f'<section class="card job finished" aria-label="Result"><p class="job-title"><b>{text(state.title)}</b> '
        f'<span class="badge">Finished</span></p><dl>{items}</dl>{warnings}{failures}{scores_table(result)}</section>'
    )


def survival_words(survival: Any) -> str:
    """How much of what was changed is still there after rounding to the output's number type."""
    if not isinstance(survival, dict) or "survived" not in survival:
        return "not measured: that is only done for 16-bit results of methods with a base"
    share = survival["survived"]
    loss = "" if share > 0.9 else " (a wider number type would keep more: see Advanced)"
    return f"{100 * share:.1f} % of the changed weights are still different from the base after rounding{loss}"


def scores_table(result: dict[str, Any]) -> str:
    """Tasks as rows: the base, the expert that the task belongs to (by name, else the best), and the merge."""
    path = result.get("records")
    if not path:
        return ""
    try:
        file = read_records_file(path)
        scores = {(s.model, s.task): s for s in Overview(file.records, {m.name: m.key for m in file.models}).scores()}
    except AmalgamError as error:
        return f'<p class="warning">The scores cannot be shown: {text(error.what)}</p>'
    roles = {model.name: model.role for model in file.models}
    base = next((name for name, role in roles.items() if role == "base"), "")
    lines = []
    for task in dict.fromkeys(task for _, task in scores):
        experts = [scores[name, task] for name, role in roles.items() if role == "expert" and (name, task) in scores]
        named = [s for s in experts if short(s.model).lower() == task.split(".")[0].lower()]
        own = named[0] if named else max(experts, key=_goodness, default=None)
        cells = [_cell(scores.get((base, task))), _cell(own, short(own.model) if own else ""),
                 f"<b>{_cell(scores.get((str(result.get('name')), task)))}</b>"]  # fmt: skip
        lines.append(f'<tr><th scope="row">{text(task)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    head = "".join(f'<th scope="col">{word}</th>' for word in ("Task", "Base", "Own expert", "This merge"))
    return (
        f'<div class="scroll"><table class="scores"><caption>Scores</caption><thead><tr>{head}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _goodness(score: Any) -> float:
    return score.mean if score.correct is not None else -score.mean


def short(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]


def _cell(score: Any, who: str = "") -> str:
    if score is None:
        return "–"
    name = f"<br><small>{text(who)}</small>" if who else ""
    if score.correct is None:
        return f"{score.mean:.4g}{name}"
    return f"{100 * score.mean:.1f} % <small>{score.correct}/{score.items}</small>{name}"
