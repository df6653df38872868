"""Evaluate: models × tasks in one go, and what the scores say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from ..context import App
from ..draft import Draft, set_tasks
from ..permits import check_permitted
from ..shell import Shell
from . import evaluate_view as view
from .access import allowed_path, how_to_work, states_of
from .results_part import ResultsPart

INTRO = (
    "Score base, experts and merges on the same items. Choose settings on **validation** items, report scores of "
    "**test** items: what was chosen on some items looks better on them than it is."
)
FAIR = (
    "Also makes the plain average and task arithmetic, its coefficient tuned on the validation items. That is what a "
    "reviewer asks for."
)
IMPORT = "What `lm_eval --log_samples --output_path FOLDER` has written can be looked at here like any run."


def build(app: App, shell: Shell) -> None:
    gr.Markdown(f"## Evaluate\n{INTRO}")
    Setup(app, shell)
    results = ResultsPart(app, shell)
    shell.act(shell.page("evaluate").select, results.offer_again, [results.run, shell.my_runs], results.run)


class Setup:
    """The upper half: what to score on what."""

    def __init__(self, app: App, shell: Shell) -> None:
        self.app, self.shell = app, shell
        self.wishes = gr.State({})
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=320):
                self._tasks_part()
            with gr.Column(scale=1, min_width=320):
                self._models_part()
        self._ask_part()
        if not app.on_space:
            self._import_part()
        self._connect()

    def _tasks_part(self) -> None:
        self.tasks = gr.Dropdown([], multiselect=True, label="Tasks", interactive=True, elem_id="tasks")
        self.tasks_info = gr.HTML(padding=False, elem_id="tasks-info")
        if self.app.on_space:
            return
        with gr.Row(elem_classes="tight end"):
            path = gr.Textbox(
                label="Add a task file, or a folder of them", placeholder="/home/me/tasks/sort.jsonl",
                elem_id="task-path", scale=4,
            )  # fmt: skip
            add = gr.Button("Add", size="sm", elem_id="task-add", scale=0, min_width=70)
        for event in (add.click, path.submit):
            self.shell.edit(event, view.with_tasks, path, path)

    def _models_part(self) -> None:
        self.models = gr.CheckboxGroup([], label="Models", interactive=True, elem_id="models")
        self.models_info = gr.HTML(padding=False)
        self.fair = gr.Checkbox(False, label="With fair baselines", interactive=True, elem_id="fair", info=FAIR)
        with gr.Row(elem_classes="tight"):
            self.limit = gr.Dropdown(
                list(view.LIMITS), value=list(view.LIMITS)[1], label="How many items", interactive=True,
                filterable=False, elem_id="limit", min_width=150,
            )  # fmt: skip
            self.budget = gr.Dropdown(
                [3, 5, 8, 12], value=5, label="Settings to try", interactive=True, filterable=False,
                elem_id="budget", visible=False, min_width=110,
            )  # fmt: skip
        self.start = gr.Button("Evaluate", variant="primary", elem_classes="run", elem_id="evaluate")
        self.why = gr.HTML(padding=False, elem_id="evaluate-why")

    def _ask_part(self) -> None:
        with gr.Accordion("Ask them something yourself", open=False, elem_id="ask-box"):
            self.prompts = gr.Textbox(
                label="Prompts", lines=3, max_lines=12, elem_id="prompts",
                info="One prompt per line; or several lines each, and an empty line between them.",
            )  # fmt: skip
            with gr.Row(elem_classes="tight"):
                self.length = gr.Slider(
                    1, 512, value=32, step=1, label="Longest answer, in tokens", interactive=True, elem_id="ask-length"
                )
                self.ask = gr.Button("Ask the chosen models", elem_id="ask", min_width=160)

    def _import_part(self) -> None:
        with gr.Accordion("Results of lm-evaluation-harness", open=False, elem_id="import-box"):
            gr.Markdown(IMPORT)
            with gr.Row(elem_classes="tight end"):
                folder = gr.Textbox(label="Folder", placeholder="/home/me/lm_eval_results", elem_id="import-path")
                bring = gr.Button("Import", elem_id="import", min_width=80, scale=0)
            self.shell.start_on(bring.click, lambda draft, path: view.import_job(path), [folder])

    def _connect(self) -> None:
        shell, mine = self.shell, self.shell.my_runs
        shell.edit(self.tasks.input, self._set_tasks, self.tasks)
        outputs = [self.tasks, self.tasks_info, self.models, self.models_info, self.start, self.why]
        shell.on_draft(self._shown, outputs, [self.wishes, self.fair, mine])
        ready = [self.start, self.why]
        chosen = [shell.draft, self.models, self.fair, mine]
        last = {"trigger_mode": "always_last"}  # of quick clicks none may be lost
        shell.act(self.models.input, self._wish, [*chosen, self.wishes], [self.wishes, *ready], **last)
        shell.act(self.fair.input, self._toggle, chosen, [self.budget, *ready], **last)
        shell.on_job(self._after_job, [self.models, self.models_info], [shell.draft, self.wishes, mine])
        shell.start_on(self.start.click, self._job, [self.models, self.limit, self.fair, self.budget, mine])
        shell.start_on(self.ask.click, self._asking, [self.models, self.prompts, self.length, mine])

    # -- what is shown ----------------------------------------------------------------------------------

    def _shown(self, draft: Draft, wishes: Mapping[str, bool], fair: bool, mine: Any) -> Any:
        files = [f for f in view.offered_tasks(self.app.root, draft) if allowed_path(self.app, f.path)]
        chosen = [file for file in files if file.path in draft["tasks"]]
        tasks = gr.Dropdown(choices=[(f.label, f.path) for f in files], value=[f.path for f in chosen])
        box, note, ids = self._models(draft, wishes, mine)
        return tasks, view.tasks_table(chosen), box, note, *self._ready(draft, ids, fair, mine)

    def _models(self, draft: Draft, wishes: Mapping[str, bool], mine: Any) -> tuple[Any, str, list[str]]:
        choices, left_out = view.offered_models(draft, states_of(self.app, mine))
        note = view.reason("Not offered: " + "; ".join(left_out) + ".") if left_out else ""
        if not choices:
            note = view.reason("No models yet. Choose base and experts on the Experts page.")
        ids = view.picked(choices, wishes)
        return gr.CheckboxGroup(choices=[(c.label, c.id) for c in choices], value=ids), note, ids

    def _ready(self, draft: Draft, ids: list[str], fair: bool, mine: Any) -> Any:
        reason = view.why_not(self._order(draft, ids, 0, fair, 5, mine))
        return gr.Button(interactive=not reason), view.reason(reason)

    def _wish(self, draft: Draft, ids: list[str], fair: bool, mine: Any, wishes: Mapping[str, bool]) -> Any:
        choices, _ = view.offered_models(draft, states_of(self.app, mine))
        return view.new_wishes(choices, wishes, ids), *self._ready(draft, ids, fair, mine)

    def _toggle(self, draft: Draft, ids: list[str], fair: bool, mine: Any) -> Any:
        return gr.Dropdown(visible=fair), *self._ready(draft, ids, fair, mine)

    def _after_job(self, state: Any, draft: Draft, wishes: Mapping[str, bool], mine: Any) -> Any:
        if state is None or state.alive:
            return gr.skip(), gr.skip()
        return self._models(draft, wishes, mine)[:2]

    # -- what is done -----------------------------------------------------------------------------------

    def _set_tasks(self, draft: Draft, paths: list[str]) -> Draft:
        return set_tasks(draft, [path for path in paths if allowed_path(self.app, path)])

    def _chosen(self, draft: Draft, ids: list[str], mine: Any) -> list[view.ModelChoice]:
        choices, _ = view.offered_models(draft, states_of(self.app, mine))
        return [choice for choice in choices if choice.id in ids]

    def _order(self, draft: Draft, ids: list[str], limit: int, fair: bool, budget: int, mine: Any) -> view.Order:
        files = [view.read_file(path) for path in draft["tasks"] if allowed_path(self.app, path)]
        return view.Order(self._chosen(draft, ids, mine), files, limit, fair, budget)

    def _job(self, draft: Draft, ids: list[str], size: str, fair: bool, budget: int, mine: Any) -> Any:
        order = self._order(draft, ids, view.LIMITS[size], fair, int(budget), mine)
        self._check(order.models)
        return view.job(order, how_to_work(self.app))

    def _asking(self, draft: Draft, ids: list[str], written: str, length: float, mine: Any) -> Any:
        models = self._chosen(draft, ids, mine)
        self._check(models)
        return view.prompts_job(models, written, int(length), how_to_work(self.app))

    def _check(self, models: Any) -> None:
        """Merges are named by their run, whose folder is ours; all else is what a visitor has written."""
        for choice in models:
            if choice.role != "candidate":
                check_permitted(self.app, choice.reference)
