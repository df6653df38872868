"""The lower half of Evaluate: the results of one run, as scores, retention, differences, shapes and single answers."""

from __future__ import annotations

import time
from typing import Any

import gradio as gr

from merging.errors import AmalgamError

from ..chart import Chart
from ..components import cards
from ..components.chart_view import ChartView
from ..context import App
from ..scored import Scored, Who, comparison, keep_who, overview, read_scored, why_no_comparison
from ..shell import Shell
from . import evaluate_items as items
from . import evaluate_results as results
from . import evaluate_view as view
from .access import states_of

EMPTY = "Nothing has been scored yet. Choose tasks and models above and press Evaluate; the results will stand here."
FAIR = "plain average and tuned task arithmetic"
NO_ANSWERS = (
    '<p class="reading">This run asked no prompts of your own. They are above, under “Ask them something yourself”.</p>'
)
NOBODY = "(not scored here)"
HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


class ResultsPart:
    def __init__(self, app: App, shell: Shell) -> None:
        self.app, self.shell = app, shell
        gr.Markdown("### Results")
        with gr.Row(elem_classes="tight"):
            self.run = gr.Dropdown([], label="Results of", interactive=True, elem_id="results-of", scale=3)
            self.split = gr.Radio([], label="Items", interactive=True, elem_id="split", visible=False, scale=1)
        self.head = gr.HTML(f'<p class="reading">{EMPTY}</p>', padding=False, elem_id="results-head")
        with gr.Column(visible=False, elem_id="results") as self.box, gr.Tabs():
            with gr.Tab("Scores", id="scores"):
                self.scores = ChartView("scores", self._scores, [self.run, self.split])
            with gr.Tab("Retention", id="retention"):
                self.retention_note = gr.HTML(padding=False)
                self.retention = ChartView("retention", self._retention, [self.run, self.split])
                self.notes = gr.HTML(padding=False, elem_id="comparison-notes")
                self._who_part()
            with gr.Tab("Differences", id="differences"):
                self.against = gr.Dropdown(
                    [], label="Against", interactive=True, elem_id="against", filterable=False,
                    info="The other model of each pair",
                )  # fmt: skip
                self.differences = ChartView("differences", self._differences, [self.run, self.split, self.against])
            with gr.Tab("Radar", id="radar"):
                self.radar_note = gr.HTML(padding=False)
                self.radar = ChartView("radar")
            with gr.Tab("Single answers", id="items"):
                self._items_part()
            with gr.Tab("Own prompts", id="answers"):
                self.answers = gr.HTML(padding=False, elem_id="answers")
        self._connect()

    # -- building -----------------------------------------------------------------------------------------

    def _who_part(self) -> None:
        with gr.Accordion("Which model is what", open=False, elem_id="who"):
            self.base = gr.Dropdown([], label="The base", interactive=True, elem_id="who-base")
            self.owners = gr.Dropdown(
                [], label="Each task's own expert", multiselect=True, interactive=True, elem_id="who-owners",
                info="The model that was trained for the task: what a merge keeps is measured against it",
            )  # fmt: skip
            self.keep = gr.Button("Use this", size="sm", elem_id="who-keep")

    def _items_part(self) -> None:
        with gr.Row(elem_classes="tight"):
            self.task = gr.Dropdown([], label="Task", interactive=True, elem_id="item-task", min_width=140)
            self.show = gr.Dropdown(
                list(items.FILTERS), value=items.FILTERS[0], label="Show", interactive=True, elem_id="item-show",
                filterable=False, min_width=130,
            )  # fmt: skip
            self.model = gr.Dropdown([], label="Model", interactive=True, elem_id="item-model", min_width=130)
            self.words = gr.Textbox(label="Search", elem_id="item-words", min_width=130)
            self.page = gr.Number(1, label="Page", precision=0, minimum=1, interactive=True, min_width=80)
        self.items = gr.HTML(padding=False, elem_id="items-table")

    def _connect(self) -> None:
        shell, drawn = self.shell, self._drawn()
        opened = [self.split, self.against, self.base, self.owners, self.task, self.model, self.page]
        shell.on_job(self._offer, self.run, [self.run, shell.my_runs])
        shell.act(shell.results.change, self._asked_for, [shell.results, self.run, shell.my_runs], self.run)
        event = shell.act(self.run.change, self._open, self.run, [*opened, self.box])
        for start in (event.then, self.split.input):
            shell.act(start, self._draw, [self.run, self.split, self.against], drawn)
        shell.act(self.against.input, self._draw_differences, [self.run, self.split, self.against],
                  self.differences.outputs)  # fmt: skip
        shell.act(self.keep.click, self._keep_who, [self.run, self.split, self.against, self.base, self.owners], drawn)
        filters = [self.run, self.split, self.task, self.show, self.model, self.words, self.page]
        for change in (self.task.input, self.show.input, self.model.input, self.words.change):
            shell.act(change, self._filter, filters, [self.items, self.page], trigger_mode="always_last")
        shell.act(self.page.input, self._turn, filters, self.items, trigger_mode="always_last")
        for start in (event.then, self.split.input):
            shell.act(start, self._first_items, [self.run, self.split], [self.task, self.model, self.items])

    def _drawn(self) -> list[Any]:
        return [
            self.head, *self.scores.outputs, self.retention_note, *self.retention.outputs, self.notes,
            *self.differences.outputs, self.radar_note, *self.radar.outputs, self.answers,
        ]  # fmt: skip

    # -- which run ----------------------------------------------------------------------------------------

    def _offer(self, state: Any, chosen: str | None, mine: Any) -> Any:
        """The runs with results, newest first. One that has just finished is opened."""
        return self._choices(state.id if state is not None else None, chosen, mine)

    def offer_again(self, chosen: str | None, mine: Any) -> Any:
        return self._choices(None, chosen, mine)

    def _asked_for(self, wanted: str, chosen: str | None, mine: Any) -> Any:
        return self._choices(wanted, chosen, mine)

    def _choices(self, wanted: str | None, chosen: str | None, mine: Any) -> Any:
        done = [s for s in states_of(self.app, mine) if s.status == "finished" and self._has_results(s)]
        ids = [s.id for s in done]
        value = next((id for id in (wanted, chosen) if id in ids), ids[0] if ids else None)
        return gr.Dropdown(choices=[(run_label(s), s.id) for s in done], value=value)

    def _has_results(self, state: Any) -> bool:
        return bool(state.result) and bool(state.result.get("records") or state.result.get("answers"))

    def scored(self, run: str | None) -> Scored | None:
        state = self.shell.job_state(run or "")
        return None if state is None else read_scored(self.app.jobs.folder(state.id), state.title)

    def _open(self, run: str | None) -> Any:
        scored = self.scored(run)
        if scored is None:
            none = gr.Dropdown(choices=[], value=None)
            has = bool(run)
            return gr.Radio(visible=False), none, none, none, none, none, 1, gr.Column(visible=has)
        splits = [(split or "test", split) for split in scored.splits]
        split = scored.splits[0]
        models = list(scored.models)
        against = [*([FAIR] if scored.run is not None else []), *overview(scored, split).models]
        tasks = list(dict.fromkeys(record.task for record in scored.file.records))
        pairs = [(f"{task}: {name}", f"{task}\n{name}") for task in tasks for name in models if name != scored.who.base]
        owned = [f"{task}\n{name}" for task, name in scored.who.owners.items()]
        fixed = scored.run is not None
        return (
            gr.Radio(choices=splits, value=split, visible=len(splits) > 1),
            gr.Dropdown(choices=against, value=against[0] if against else None),
            gr.Dropdown(
                choices=[NOBODY, *models], value=scored.who.base or NOBODY, interactive=not fixed
            ),
            gr.Dropdown(choices=pairs, value=owned, interactive=not fixed),
            gr.Dropdown(choices=scored.tasks(split), value=next(iter(scored.tasks(split)), None)),
            gr.Dropdown(choices=models, value=next(iter(scored.merged), models[0] if models else None)),
            1,
            gr.Column(visible=True),
        )  # fmt: skip

    # -- what it says -------------------------------------------------------------------------------------

    def _draw(self, run: str | None, split: str | None, against: str | None) -> Any:
        state = self.shell.job_state(run or "")
        scored = self.scored(run)
        folder = self.app.jobs.folder(state.id) if state is not None else None
        answers = view.answers_table(folder) if folder is not None else ""
        answers = (
            answers
            or '<p class="reading">This run asked no prompts of your own: open “Ask them something yourself”.</p>'
        )
        hidden = self.scores.show(None)
        if state is None or scored is None:
            if state is None:
                head = f'<p class="reading">{EMPTY}</p>'
            else:
                head = '<p class="reading">This run has scored no task: its answers are under “Own prompts”.</p>'
            return head, *hidden, "", *hidden, "", *hidden, "", *hidden, answers
        split = split if split in scored.splits else scored.splits[0]
        facts = state.result or {}
        head = results.head(scored, split, facts.get("failures", ()), facts.get("notes", ()))
        radar = results.radar_chart(scored, split)
        why, kept, notes = self._kept(scored, split)
        return (
            head,
            *self.scores.show(results.scores_chart(scored, split)),
            view.reason(why),
            *self.retention.show(kept),
            notes,
            *self._draw_differences(run, split, against),
            radar if isinstance(radar, str) else "",
            *self.radar.show(None if isinstance(radar, str) else radar),
            answers,
        )

    def _kept(self, scored: Scored, split: str) -> tuple[str, Chart | None, str]:
        """Why there is no retention, its chart, and the notes of the comparison."""
        if why := why_no_comparison(scored, split):
            return why, None, ""
        try:
            found = comparison(scored, split)
        except AmalgamError as error:
            return f"{error.what} {error.why} {error.fix}".strip(), None, ""
        return "", results.retention_chart(found), results.comparison_notes(found)

    def _draw_differences(self, run: str | None, split: str | None, against: str | None) -> Any:
        return self.differences.show(self._differences(run, split, against))

    def _differences(self, run: str | None, split: str | None, against: str | None) -> Chart | None:
        scored = self.scored(run)
        if scored is None or not against:
            return None
        split = split if split in scored.splits else scored.splits[0]
        if against == FAIR and scored.run is not None and split == "":
            tests = comparison(scored, split).tests
        else:
            tests = overview(scored, split).differences(against)
        return results.differences_chart(tests, results.binary_tasks(scored, split)) if tests else None

    def _scores(self, run: str | None, split: str) -> Chart | None:
        scored = self.scored(run)
        return None if scored is None else results.scores_chart(scored, split)

    def _retention(self, run: str | None, split: str) -> Chart | None:
        scored = self.scored(run)
        return None if scored is None else self._kept(scored, split)[1]

    # -- who is who -----------------------------------------------------------------------------------------

    def _keep_who(self, run: str, split: str, against: str, base: str, pairs: list[str]) -> Any:
        folder = self.app.jobs.folder(run)
        owners = dict(pair.split("\n", 1) for pair in pairs)
        keep_who(folder, Who("" if base == NOBODY else base, owners))
        return self._draw(run, split, against)

    # -- single answers ---------------------------------------------------------------------------------------

    def _table(self, run: Any, split: Any, task: Any, show: Any, model: Any, words: Any, page: Any) -> str:
        scored = self.scored(run)
        if scored is None or not task:
            return ""
        paths = self._task_files(run)
        return items.items_table(scored, split or "", task, paths, show, model or "", words or "", int(page or 1))[0]

    def _task_files(self, run: str) -> list[str]:
        arguments = self.app.jobs.arguments(run)
        asked = arguments.get("tasks") or (arguments.get("evaluate") or {}).get("tasks") or []
        return [*asked, *arguments.get("selection_tasks", [])]

    def _filter(self, *values: Any) -> Any:
        return self._table(*[*values[:-1], 1]), 1

    def _turn(self, *values: Any) -> Any:
        return self._table(*values)

    def _first_items(self, run: str | None, split: str | None) -> Any:
        scored = self.scored(run)
        if scored is None:
            return gr.skip(), gr.skip(), ""
        split = split if split in scored.splits else scored.splits[0]
        tasks = scored.tasks(split)
        model = next(iter(scored.merged), next(iter(scored.models)))
        shown = self._table(run, split, tasks[0], items.FILTERS[0], model, "", 1)
        return gr.Dropdown(choices=tasks, value=tasks[0]), gr.Dropdown(value=model), shown


def run_label(state: Any) -> str:
    """ "PCB, ratio 0.5 · 22 Nov 10:37"."""
    return f"{state.title or cards.STATUS_WORDS.get(state.kind, state.kind)} · {when(state.created)}"


def when(seconds: float) -> str:
    return time.strftime("%-d %b %H:%M", time.localtime(seconds))
