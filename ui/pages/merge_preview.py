"""The preview on the Merge page: scores and answers of the merge as it is set now, without a file being written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import gradio as gr
import plotly.graph_objects as go

from merging.errors import AmalgamError, Cancelled

from ..components.cards import text
from ..components.plain import plain
from ..components.plot import Plot
from ..context import App
from ..draft import Draft, problem_of
from ..plots_evaluation import Score, scores
from ..previews import BASE, MERGE, Previews, Shown
from ..shell import Shell, explained
from .merge_plan import check_draft

READING = (
    "Each dot is the share of right answers on the task's first items, the bar its 95 % interval. "
    "Where bars overlap, the difference may be chance. The merge keeps a skill where its dot is near its own expert's."
)
EMPTY = (
    '<p class="empty">Press Preview: the models are merged in memory, scored on the first items of the tasks and '
    "asked some of their questions. Nothing is written to the disk. After that, scores follow every change.</p>"
)
BEST = "Own expert"
STALE = (
    '<p class="reading stale" role="status">These numbers are of an earlier setting: press Preview for new ones.</p>'
)


def build(app: App, shell: Shell) -> dict[str, Any]:
    """The section. Gives its button and the place for the reason why it is disabled."""
    previews = Previews("cpu" if app.on_space else app.device, app.threads)
    gr.Markdown("### Preview")
    with gr.Row(elem_classes="tight wrap"):
        run = gr.Button("Preview", variant="primary", elem_id="preview", elem_classes="run", interactive=False)
        end = gr.Button("End preview", elem_id="preview-end", visible=False)
        keep = gr.Checkbox(True, label="Follow every change", interactive=True, elem_id="preview-follow", min_width=150)
    why = plain(elem_id="preview-why")
    state = plain(EMPTY, elem_id="preview-state")
    table = plain(elem_id="preview-scores")
    plot = Plot(None, label="Scores of the preview", elem_id="preview-plot")
    answers = plain(elem_id="preview-answers")
    with gr.Accordion("What is asked", open=False):
        limit = gr.Number(
            50, label="Items of each task", minimum=1, maximum=10_000, precision=0, interactive=True,
            elem_id="preview-limit",
        )  # fmt: skip
        own = gr.Textbox(
            label="Questions of your own, one per line", lines=2, max_lines=6, interactive=True, elem_id="preview-own"
        )
    opened = gr.State(False)
    # Strangers on a Space take turns; at home the newest change goes before older ones.
    turns: dict[str, Any] = (
        {"concurrency_id": "preview", "concurrency_limit": 1, "trigger_mode": "always_last"}
        if app.on_space
        else {"concurrency_limit": None, "trigger_mode": "multiple"}
    )
    shown = [state, table, plot, answers, end, opened, shell.message]
    asked = [shell.draft, limit, own]
    shell.act(run.click, partial(_run, app, previews), asked, shown, **turns)
    shell.act(shell.revision.change, partial(_follow, app, previews), [opened, keep, *asked], shown, **turns)
    shell.act(end.click, partial(_end, previews), [], shown, concurrency_limit=None)
    if not app.on_space:
        shell.act(shell.pages["merge"].select, partial(_warm, previews), shell.draft, shell.message)
    return {"button": run, "why": why}


def _warm(previews: Previews, draft: Draft) -> Any:
    previews.warm(draft)
    return gr.skip()


def _run(app: App, previews: Previews, draft: Draft, limit: Any, own: str | None) -> Iterator[Any]:
    skip = gr.skip()
    try:
        check_draft(app, draft)
        for found in previews.look(draft, max(1, int(limit or 50)), (own or "").splitlines()):
            if found.scores:
                figure = figure_of(found)
                yield state_of(found), table_of(found), figure, answers_of(found), gr.Button(visible=True), True, ""
            else:
                yield state_of(found), skip, skip, skip, gr.Button(visible=True), True, skip
    except Cancelled:
        yield (skip,) * 7
    except AmalgamError as error:
        line = f'<p class="state problem">The preview could not be made: {text(error.what)}</p>'
        yield line, "", None, "", skip, skip, explained(error)


def _follow(
    app: App, previews: Previews, opened: bool, keep: bool, draft: Draft, limit: Any, own: str | None
) -> Iterator[Any]:
    if not opened:
        yield (gr.skip(),) * 7
    elif not keep or problem_of(draft) is not None:
        yield STALE, *(gr.skip(),) * 6
    else:
        yield from _run(app, previews, draft, limit, own)


def _end(previews: Previews) -> Any:
    previews.close()
    return EMPTY, "", None, "", gr.Button(visible=False), False, gr.skip()


# -- words and figures --------------------------------------------------------------------------------------------


def state_of(found: Shown) -> str:
    """One line: what is going on, or how long it took."""
    if found.merged is None or MERGE not in found.scores:
        return f'<p class="state busy" role="status">{text(found.doing)} …</p>'
    items = sum(row["items"] for row in found.scores[MERGE])
    done = f"{found.merged['changed_tensors']} tensors merged, {items} items scored in {found.seconds:.1f} s."
    going = f" {text(found.doing)} …" if found.doing else ""
    return f'<p class="state" role="status">{done} Nothing was written.{going}</p>'


def own_rows(found: Shown) -> dict[tuple[str, str], tuple[str, dict[str, Any]]]:
    """(task, metric) -> the expert it belongs to and its row: by name, else the one that scores best."""
    result: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
    for name, rows in found.scores.items():
        if name in (MERGE, BASE):
            continue
        for row in rows:
            key, owner = (row["task"], row["metric"]), found.owners.get(row["task"])
            best = result.get(key)
            if name == owner or (owner is None and (best is None or _better(row, best[1]))):
                result[key] = (name, row)
    return result


def table_of(found: Shown) -> str:
    """Tasks as rows: the base, the task's own expert, the merge, and how far that is from the two."""
    merge, base, own = found.scores[MERGE], {}, own_rows(found)
    for row in found.scores.get(BASE, []):
        base[row["task"], row["metric"]] = row
    if not merge:
        return "<p class='empty'>No tasks are chosen, so there are no scores: choose some on the Evaluate page.</p>"
    lines = []
    for row in merge:
        key = (row["task"], row["metric"])
        expert, score = own.get(key, ("", None))
        lines.append(
            f'<tr><th scope="row">{text(row["task"])}</th><td>{_cell(base.get(key))}</td>'
            f"<td>{_cell(score)}{f'<br><small>{text(_short(expert))}</small>' if expert else ''}</td>"
            f"<td><b>{_cell(row)}</b></td><td>{_change(row, base.get(key))}</td><td>{_change(row, score)}</td></tr>"
        )
    mean = _mean_row(merge, base, own)
    heads = ("Task", BASE, BEST, MERGE, "over base", "over expert")
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    return (
        f'<div class="scroll"><table class="scores"><caption>Scores of the preview</caption><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(lines)}{mean}</tbody></table></div><p class='reading'>{READING}</p>"
    )


def _mean_row(merge: Sequence[dict[str, Any]], base: Any, own: Any) -> str:
    """The mean over tasks, if all of them are shares of right answers."""
    if len(merge) < 2 or any(row["right"] is None for row in merge):
        return ""
    keys = [(row["task"], row["metric"]) for row in merge]
    means = [
        _mean([base.get(key) for key in keys]),
        _mean([own.get(key, ("", None))[1] for key in keys]),
        _mean(list(merge)),
    ]
    shown = ["…" if math.isnan(m) else f"{100 * m:.1f} %" for m in means]
    differences = ["" if math.isnan(m) else f"{100 * (means[2] - m):+.1f}" for m in means[:2]]
    cells = "".join(f"<td>{cell}</td>" for cell in (*shown[:2], f"<b>{shown[2]}</b>", *differences))
    return f'<tr class="mean"><th scope="row">Mean</th>{cells}</tr>'


def figure_of(found: Shown) -> go.Figure | None:
    """Dots with intervals of the tasks that are counted in right answers."""
    own = own_rows(found)
    rows = []
    for model, source in (
        (BASE, found.scores.get(BASE, [])),
        (BEST, [r for _, r in own.values()]),
        (MERGE, found.scores[MERGE]),
    ):
        rows += [
            Score(model, row["task"], row["mean"], row["low"], row["high"], row["items"])
            for row in source
            if row["right"] is not None
        ]
    return scores(rows, "share of right answers") if rows else None


def answers_of(found: Shown) -> str:
    """The questions, what was expected, and what the base, the task's own expert and the merge wrote."""
    if not found.questions or MERGE not in found.answers:
        return ""
    lines = []
    for number, question in enumerate(found.questions):
        owner = found.owners.get(question.task, "")
        cells = []
        for model in (BASE, owner, MERGE):
            answer = found.answers.get(model, [])
            cells.append(_answer(answer[number] if number < len(answer) else None, question.expected))
        expected = "" if question.expected is None else f"<code>{text(question.expected)}</code>"
        lines.append(
            f'<tr><th scope="row"><small>{text(question.task)}</small><br><code>{text(question.prompt)}</code></th>'
            f"<td>{expected}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
    head = "".join(f'<th scope="col">{h}</th>' for h in ("Question", "Right answer", BASE, BEST, MERGE))
    return (
        f'<div class="scroll"><table class="answers"><caption>What it writes</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _answer(answer: str | None, expected: str | None) -> str:
    if answer is None:
        return ""
    if expected is None:
        return f"<code>{text(answer)}</code>"
    right = answer.strip() == expected.strip()
    mark = '<span class="right">right</span>' if right else '<span class="wrong">wrong</span>'
    return f"<code>{text(answer)}</code> {mark}"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "…"
    if row["right"] is None:
        return f"{row['mean']:.4g}"
    return f"{100 * row['mean']:.1f} % <small>{row['right']}/{row['items']}</small>"


def _change(row: dict[str, Any], other: dict[str, Any] | None) -> str:
    if other is None:
        return ""
    difference = row["mean"] - other["mean"]
    return f"{100 * difference:+.1f}" if row["right"] is not None else f"{difference:+.3g}"


def _better(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return (row["mean"] > other["mean"]) == (row["right"] is not None)


def _mean(rows: Sequence[dict[str, Any] | None]) -> float:
    return math.nan if not rows or None in rows else sum(r["mean"] for r in rows if r) / len(rows)


def _short(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]
