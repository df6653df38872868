"""Evaluate: models × tasks in one go, and what the scores say."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..context import App
from ..draft import Draft, set_tasks
from ..shell import Shell
from . import evaluate_view as view
from .access import allowed_path, how_to_work, states_of
from .results_part import ResultsPart

INTRO = (
    "Score base, experts and merges on the same items. Choose settings on **validation** items, report scores of "
    "**test** items: what was chosen on some items looks better on them than it is."
)
PROMPTS = "One prompt per line, or several lines each and an empty line between them."
HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def build(app: App, shell: Shell) -> None:
    gr.Markdown(f"## Evaluate\n{INTRO}")
    wishes = gr.State({})
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=320):
            tasks = gr.Dropdown(
                [], multiselect=True, label="Tasks", interactive=True, elem_id="tasks", info="As many as you like"
            )
            tasks_info = gr.HTML(padding=False, elem_id="tasks-info")
            if not app.on_space:
                with gr.Row(elem_classes="tight"):
                    path = gr.Textbox(
                        label="Add a task file or a folder of them", placeholder="/home/me/tasks/sort.jsonl",
                        elem_id="task-path", scale=4,
                    )  # fmt: skip
                    add = gr.Button("Add", size="sm", elem_id="task-add", scale=1, min_width=60)
                shell.edit(add.click, lambda draft, text: _added(draft, text), path, path)
                shell.edit(path.submit, lambda draft, text: _added(draft, text), path, path)
        with gr.Column(scale=1, min_width=320):
            models = gr.CheckboxGroup([], label="Models", interactive=True, elem_id="models")
            models_info = gr.HTML(padding=False)
            with gr.Row(elem_classes="tight"):
                limit = gr.Dropdown(
                    list(view.LIMITS), value=list(view.LIMITS)[1], label="How many items", interactive=True,
                    filterable=False, elem_id="limit", min_width=150,
                )  # fmt: skip
                budget = gr.Dropdown(
                    [3, 5, 8, 12], value=5, label="Settings to try", interactive=True, filterable=False,
                    elem_id="budget", visible=False, min_width=110,
                )  # fmt: skip
            fair = gr.Checkbox(
                False, label="With fair baselines", interactive=True, elem_id="fair",
                info="Also makes the plain average and task arithmetic, its coefficient tuned on validation items. "
                "That is what a reviewer asks for.",
            )  # fmt: skip
            start = gr.Button("Evaluate", variant="primary", elem_classes="run", elem_id="evaluate")
            why = gr.HTML(padding=False, elem_id="evaluate-why")

    shell.edit(tasks.input, lambda draft, paths: set_tasks(draft, [p for p in paths if allowed_path(app, p)]), tasks)

    def choices_of(draft: Draft) -> tuple[list[view.ModelChoice], list[str]]:
        return view.offered_models(draft, states_of(app))

    def order(draft: Draft, ids: list[str], size: str, with_fair: bool, settings: int) -> view.Order:
        chosen = [choice for choice in choices_of(draft)[0] if choice.id in ids]
        files = [view.read_file(path) for path in draft["tasks"] if allowed_path(app, path)]
        return view.Order(chosen, files, view.LIMITS[size], with_fair, int(settings))

    def readiness(draft: Draft, ids: list[str], with_fair: bool) -> Any:
        reason = view.why_not(order(draft, ids, next(iter(view.LIMITS)), with_fair, 5))
        return gr.Button(interactive=not reason), view.reason(reason)

    def show_models(draft: Draft, wanted: dict[str, bool]) -> Any:
        choices, left_out = choices_of(draft)
        note = view.reason("Not offered: " + "; ".join(left_out) + ".") if left_out else ""
        if not choices:
            note = view.reason("No models yet. Choose base and experts on the Experts page.")
        ids = view.picked(choices, wanted)
        return gr.CheckboxGroup(choices=[(c.label, c.id) for c in choices], value=ids), note

    def show_setup(draft: Draft, wanted: dict[str, bool], with_fair: bool) -> Any:
        files = [f for f in view.offered_tasks(app.root, draft) if allowed_path(app, f.path)]
        chosen = [file for file in files if file.path in draft["tasks"]]
        box, note = show_models(draft, wanted)
        paths = gr.Dropdown(choices=[(f.label, f.path) for f in files], value=[f.path for f in chosen])
        ids = view.picked(choices_of(draft)[0], wanted)
        return paths, view.tasks_table(chosen), box, note, *readiness(draft, ids, with_fair)

    shell.on_draft(show_setup, [tasks, tasks_info, models, models_info, start, why], [wishes, fair])

    def wish(draft: Draft, ids: list[str], wanted: dict[str, bool], with_fair: bool) -> Any:
        return view.new_wishes(choices_of(draft)[0], wanted, ids), *readiness(draft, ids, with_fair)

    shell.act(models.input, wish, [shell.draft, models, wishes, fair], [wishes, start, why])

    def toggle(draft: Draft, ids: list[str], with_fair: bool) -> Any:
        return gr.Dropdown(visible=with_fair), *readiness(draft, ids, with_fair)

    shell.act(fair.input, toggle, [shell.draft, models, fair], [budget, start, why])

    def begin(draft: Draft, ids: list[str], size: str, with_fair: bool, settings: int) -> Any:
        return view.job(order(draft, ids, size, with_fair, settings), how_to_work(app))

    shell.start_on(start.click, begin, [models, limit, fair, budget])

    def after_job(state: Any, draft: Draft, wanted: dict[str, bool]) -> Any:
        return show_models(draft, wanted)[0] if state is not None and not state.alive else gr.skip()

    shell.on_job(after_job, models, [shell.draft, wishes])

    with gr.Accordion("Ask them something yourself", open=False, elem_id="ask-box"):
        prompts = gr.Textbox(label="Prompts", info=PROMPTS, lines=3, max_lines=12, elem_id="prompts")
        with gr.Row(elem_classes="tight"):
            length = gr.Slider(1, 512, value=32, step=1, label="Longest answer, in tokens", interactive=True)
            ask = gr.Button("Ask the chosen models", elem_id="ask", min_width=160)

        def begin_asking(draft: Draft, ids: list[str], written: str, tokens: float) -> Any:
            chosen = [choice for choice in choices_of(draft)[0] if choice.id in ids]
            return view.prompts_job(chosen, written, int(tokens), how_to_work(app))

        shell.start_on(ask.click, begin_asking, [models, prompts, length])
    if not app.on_space:
        with gr.Accordion("Results of lm-evaluation-harness", open=False, elem_id="import-box"):
            gr.Markdown(
                "What `lm_eval --log_samples --output_path FOLDER` has written can be looked at here like any run."
            )
            with gr.Row(elem_classes="tight"):
                folder = gr.Textbox(label="Folder", placeholder="/home/me/lm_eval_results", elem_id="import-path")
                bring = gr.Button("Import", elem_id="import", min_width=80, scale=0)
            shell.start_on(bring.click, lambda draft, path: _import(path), [folder])
    ResultsPart(app, shell)


def _added(draft: Draft, path: str) -> Any:
    return set_tasks(draft, view.added_tasks(draft, path)), ""


def _import(path: str) -> Any:
    return "import", {"path": path.strip()}, f"lm-eval results of {path.strip().rstrip('/').rpartition('/')[2]}"
