"""Runs: the history of everything that was done, to find, compare, repeat, keep and remove."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from merging.errors import AmalgamError, InputError
from merging.recipe import Recipe

from .. import downloads
from ..components import cards
from ..components.chart_view import ChartView
from ..components.run_list import RunList
from ..context import App
from ..draft import Draft, from_recipe
from ..shell import Shell
from . import runs_compare as compare
from . import runs_details as details
from . import runs_view as view
from .access import state_of, states_of

HINT = (
    "Choose one run to see what it did, or two to four to compare them. Runs that failed or were stopped stay here "
    "too, with the reason."
)
IN_ORDER: dict[str, Any] = {"concurrency_id": "runs", "concurrency_limit": 1}
"""For events that draw the list: an older one must not end after a newer one."""
log = logging.getLogger("amalgam.ui")


def build(app: App, shell: Shell) -> None:
    Runs(app, shell)


class Runs:
    def __init__(self, app: App, shell: Shell) -> None:
        self.app, self.shell = app, shell
        gr.Markdown(f"## Runs\n{HINT}")
        self.chosen = gr.State([])
        self.last_removed = gr.State([])
        self.moved = gr.State("")
        """Changes when a job does."""
        with gr.Row(elem_classes="tight"):
            self.words = gr.Textbox(
                label="Search", placeholder="name, method, expert, tag, status …", elem_id="run-words", scale=3
            )
            self.kind = gr.Dropdown(
                [view.ANY_KIND], value=view.ANY_KIND, label="Kind", interactive=True, filterable=False,
                elem_id="run-kind", min_width=120,
            )  # fmt: skip
            self.order = gr.Dropdown(
                list(view.SORTS), value=view.SORTS[0], label="Order", interactive=True, filterable=False,
                elem_id="run-order", min_width=150,
            )  # fmt: skip
            self.removed = gr.Checkbox(False, label="Show removed ones", interactive=True, elem_id="run-removed")
        self.list = RunList(elem_id="run-list", label="Runs")
        self.later = gr.Timer(1, active=False)
        """Ticks while scores of the list are not known yet."""
        self._actions_part()
        self._details_part()
        self._compare_part()
        self._connect()

    # -- building -----------------------------------------------------------------------------------------

    def _actions_part(self) -> None:
        with gr.Row(elem_classes="tight", visible=False, elem_id="undo-removal") as self.undo_row:
            self.undo_words = gr.HTML(padding=False)
            self.undo = gr.Button("Undo the removal", size="sm", elem_id="undo-remove", scale=0, min_width=150)
        with gr.Row(elem_classes="tight", visible=False) as self.purge_row:
            self.purge = gr.Button("Delete all removed runs for good …", size="sm", elem_id="purge", scale=0)
        with gr.Row(elem_classes="tight", visible=False, elem_id="purge-sure") as self.sure_row:
            self.sure_words = gr.HTML(padding=False)
            self.sure = gr.Button("Delete for good", variant="stop", size="sm", elem_id="purge-yes", scale=0)
            self.keep = gr.Button("Keep them", size="sm", elem_id="purge-no", scale=0)

    def _details_part(self) -> None:
        with gr.Column(visible=False, elem_id="run-details") as self.one:
            self.title = gr.HTML(padding=False)
            with gr.Row(elem_classes="tight wrap"):
                small: dict[str, Any] = {"size": "sm", "scale": 0, "min_width": 110, "visible": False}
                self.scores = gr.Button("Show scores", elem_id="run-scores", **small)
                self.as_draft = gr.Button("Open as draft", elem_id="run-draft", **small)
                self.again = gr.Button("Run again", elem_id="run-again", **small)
                self.resume = gr.Button("Resume", variant="primary", elem_id="run-resume", **small)
                self.stop = gr.Button("Stop", variant="stop", elem_id="run-stop", **small)
                self.yaml = gr.Button("Export YAML", elem_id="run-yaml", **small)
                self.json = gr.Button("Export JSON", elem_id="run-json", **small)
                self.remove = gr.Button("Remove", elem_id="run-remove", **small)
                self.restore = gr.Button("Restore", elem_id="run-restore", **small)
            self.saved = gr.HTML(padding=False, elem_id="run-export")
            with gr.Row(equal_height=False):
                with gr.Column(scale=1, min_width=320):
                    self.facts = gr.HTML(padding=False, elem_id="run-facts")
                with gr.Column(scale=1, min_width=320):
                    self.recipe = gr.Code(language="yaml", label="Recipe", interactive=False, elem_id="run-recipe",
                                          visible=False, max_lines=24)  # fmt: skip
            self.events = gr.HTML(padding=False, elem_id="run-events")
            with gr.Accordion("Name, tags and note", open=False, elem_id="run-names"):
                with gr.Row(elem_classes="tight"):
                    self.name = gr.Textbox(label="Name", elem_id="run-name", max_lines=1)
                    self.tags = gr.Textbox(label="Tags, with commas between them", elem_id="run-tags", max_lines=1)
                self.note = gr.Textbox(label="Note", lines=2, max_lines=8, elem_id="run-note")
                self.rename = gr.Button("Save", size="sm", elem_id="run-rename")

    def _compare_part(self) -> None:
        with gr.Column(visible=False, elem_id="run-compare") as self.many:
            gr.Markdown("### What differs")
            self.diff = gr.HTML(padding=False, elem_id="run-diff")
            self.compare_note = gr.HTML(padding=False, elem_id="compare-note")
            self.paired = ChartView("paired")
            self.front = ChartView("front")
            self.coefficients = ChartView("run-coefficients", self._coefficients, [self.chosen])

    def _connect(self) -> None:
        shell, mine = self.shell, self.shell.my_runs
        controls = [self.words, self.kind, self.order, self.removed, self.chosen, mine]
        listed = [self.list, self.kind, self.chosen, self.purge_row, self.sure_row, self.later]
        shell.on_job(lambda state: f"{state.id} {state.status}" if state else "", self.moved)
        for event in (shell.page("runs").select, self.later.tick, self.moved.change):
            shell.act(event, self._listed, controls, listed, **IN_ORDER)
        # Nobody but the user writes the words; the others are drawn anew with the list.
        for event in (self.words.change, self.kind.input, self.order.input, self.removed.input):
            shell.act(event, self._listed, controls, listed, trigger_mode="always_last", **IN_ORDER)
        shell.act(self.list.choose, self._choose, mine, self.chosen, trigger_mode="always_last")
        looked = [self.list, *self._parts()]
        shell.act(self.chosen.change, self._look, controls, looked, trigger_mode="always_last", **IN_ORDER)

        def after(event: Any, fn: Any, inputs: Any, outputs: Any) -> None:
            done = shell.act(event, fn, inputs, outputs)
            done = shell.act(done.then, self._listed, controls, listed, **IN_ORDER)
            shell.act(done.then, self._look, controls, looked, **IN_ORDER)

        mine_and_chosen = [self.chosen, mine]
        after(self.rename.click, self._rename, [*mine_and_chosen, self.name, self.tags, self.note], [])
        undo = [self.last_removed, self.undo_row, self.undo_words]
        after(self.remove.click, self._remove, mine_and_chosen, undo)
        after(self.restore.click, self._restore, mine_and_chosen, undo)
        after(self.undo.click, self._undo, [self.last_removed], undo)
        after(self.resume.click, self._resume, mine_and_chosen, shell.job)
        after(self.stop.click, self._stop, mine_and_chosen, [])
        after(self.again.click, self._again, mine_and_chosen, shell.job)
        after(self.sure.click, self._purge, [], [self.sure_row, *undo])
        shell.act(self.purge.click, self._ask_purge, [], [self.sure_row, self.sure_words])
        shell.act(self.keep.click, lambda: gr.Row(visible=False), [], self.sure_row)
        shell.act(self.scores.click, self._show_scores, mine_and_chosen, [shell.results, shell.tabs])
        shell.edit(self.as_draft.click, self._as_draft, mine_and_chosen, shell.tabs)
        shell.act(self.yaml.click, self._export_yaml, mine_and_chosen, self.saved)
        shell.act(self.json.click, self._export_json, mine_and_chosen, self.saved)

    def _parts(self) -> list[Any]:
        return [
            self.one, self.title, self.scores, self.as_draft, self.again, self.resume, self.stop, self.yaml, self.json,
            self.remove, self.restore, self.saved, self.facts, self.recipe, self.events, self.name, self.tags,
            self.note, self.many, self.diff, self.compare_note, *self.paired.outputs, *self.front.outputs,
            *self.coefficients.outputs,
        ]  # fmt: skip

    # -- the list -----------------------------------------------------------------------------------------

    def _lines(self, mine: Any, removed: bool = False) -> list[view.Line]:
        return view.lines_of(self.app.jobs, states_of(self.app, mine, removed))

    def _listed(self, words: str, kind: str, order: str, removed: bool, chosen: list[str], mine: Any) -> Any:
        lines = self._lines(mine, removed)
        kinds = view.kinds_of(lines)
        kind = kind if kind in kinds else view.ANY_KIND
        found = view.found_lines(lines, words or "", kind, order)
        there = {line.state.id for line in lines}
        kept = [id for id in chosen if id in there]
        return (
            view.list_html(found, kept, len(lines), removed),
            gr.Dropdown(choices=kinds, value=kind),
            kept if kept != chosen else gr.skip(),
            gr.Row(visible=removed and bool(lines) and not self.app.on_space),
            gr.Row(visible=False),
            gr.Timer(active=any(line.pending for line in lines)),
        )

    def _choose(self, mine: Any, event: gr.EventData) -> Any:
        asked = [id for id in event.runs if isinstance(id, str)] if isinstance(event.runs, list) else []
        known = {state.id for removed in (False, True) for state in states_of(self.app, mine, removed)}
        return [id for id in asked if id in known][: view.MOST_CHOSEN]

    # -- what is chosen -------------------------------------------------------------------------------------

    def _look(self, words: str, kind: str, order: str, removed: bool, chosen: list[str], mine: Any) -> Any:
        lines = self._lines(mine, removed)
        shown = view.list_html(view.found_lines(lines, words or "", kind, order), chosen, len(lines), removed)
        picked = [line for id in chosen for line in lines if line.state.id == id]
        one = self._one(picked[0]) if len(picked) == 1 else self._no_one()
        many = self._many(picked) if len(picked) > 1 else self._no_many()
        return shown, *one, *many

    def _no_one(self) -> list[Any]:
        return [gr.Column(visible=False), "", *[gr.Button(visible=False)] * 9, "", "", gr.Code(visible=False), "",
                "", "", ""]  # fmt: skip

    def _one(self, line: view.Line) -> list[Any]:
        state, folder = line.state, self.app.jobs.path / line.state.id
        recipe = details.recipe_text(line.arguments)
        result, gone = state.result or {}, state.removed is not None
        ended = not state.alive and not gone
        events = self.app.jobs.events(state.id)[0] if state.kind else []
        shown = {
            "scores": ended and bool(result.get("records") or result.get("answers")),
            "as_draft": bool(recipe) and not gone,
            "again": ended and bool(line.arguments),
            "resume": state.resumable,
            "stop": state.alive,
            "yaml": bool(recipe),
            "json": True,
            "remove": ended,
            "restore": gone,
        }
        return [
            gr.Column(visible=True), f"<h3>{cards.text(line.name)}</h3>",
            *(gr.Button(visible=on) for on in shown.values()), "",
            details.details_html(line, folder), gr.Code(value=recipe, visible=bool(recipe)),
            details.events_html(events, details.log_tail(folder)), state.title, ", ".join(state.tags), state.note,
        ]  # fmt: skip

    def _no_many(self) -> list[Any]:
        none = self.paired.show(None)
        return [gr.Column(visible=False), "", "", *none, *none, *none]

    def _many(self, lines: Sequence[view.Line]) -> list[Any]:
        names = compare.names_of(lines)
        places = self._places(lines, names)
        notes = [compare.missing(names, places)]
        paired = front = None
        if len(places) > 1:
            try:
                found, note = compare.common_overview(places)
                paired = compare.scores_chart(found, note)
                drawn = compare.pareto_chart(found, dict(zip(names, lines, strict=True)))
                front, why = (None, drawn) if isinstance(drawn, str) else (drawn, "")
                notes.append(why)
            except AmalgamError as error:
                notes.append(f"{error.what} {error.why} {error.fix}".strip())
        coefficients = compare.coefficients_chart(lines)
        if isinstance(coefficients, str):
            notes.append(coefficients)
        words = "".join(f'<p class="why">{cards.text(note)}</p>' for note in notes if note)
        return [
            gr.Column(visible=True), compare.settings_diff(lines), words, *self.paired.show(paired),
            *self.front.show(front),
            *self.coefficients.show(None if isinstance(coefficients, str) else coefficients),
        ]  # fmt: skip

    def _places(self, lines: Sequence[view.Line], names: Sequence[str]) -> dict[str, tuple[Path, str]]:
        """Where the scores of the runs' models are; of a run with several merges its best one."""
        places = {}
        for name, line in zip(names, lines, strict=True):
            model = str((line.state.result or {}).get("name", "")) if not line.scored_in else ""
            if line.kept is not None:
                model = line.kept.model
            if model:
                places[name] = self.app.jobs.path / (line.scored_in or line.state.id), model
        return places

    def _coefficients(self, chosen: list[str]) -> Any:
        found = [self.app.jobs.state(id) for id in chosen]
        lines = view.lines_of(self.app.jobs, found)
        chart = compare.coefficients_chart(lines)
        return None if isinstance(chart, str) else chart

    # -- actions ------------------------------------------------------------------------------------------

    def _only(self, chosen: list[str], mine: Any) -> view.Line:
        """The one chosen run, if this visitor may see it."""
        state = state_of(self.app, chosen[0]) if len(chosen) == 1 else None
        if state is None or (self.app.on_space and state.id not in (mine or [])):
            raise InputError("E_NOT_FOUND", "This run is not there any more.", "", "Choose one from the list.")
        return view.lines_of(self.app.jobs, [state])[0]

    def _rename(self, chosen: list[str], mine: Any, name: str, tags: str, note: str) -> Any:
        line = self._only(chosen, mine)
        self.app.jobs.change(line.state.id, title=name, tags=tags.split(","), note=note)

    def _remove(self, chosen: list[str], mine: Any) -> Any:
        line = self._only(chosen, mine)
        self.app.jobs.remove(line.state.id)
        words = f"“{line.name}” is removed. Nothing is deleted yet."
        return [line.state.id], gr.Row(visible=True), f'<p class="reading" role="status">{cards.text(words)}</p>'

    def _restore(self, chosen: list[str], mine: Any) -> Any:
        self.app.jobs.restore(self._only(chosen, mine).state.id)
        return [], gr.Row(visible=False), ""

    def _undo(self, removed: list[str]) -> Any:
        for id in removed:
            self.app.jobs.restore(id)
        return [], gr.Row(visible=False), ""

    def _ask_purge(self) -> Any:
        states = self.app.jobs.states(removed=True)
        names = ", ".join(state.title or state.kind for state in states[:5])
        more = f" and {len(states) - 5} more" if len(states) > 5 else ""
        words = f"{len(states)} removed runs, with the models in their folders, cannot be brought back: {names}{more}."
        return gr.Row(visible=True), f'<p class="state problem">{cards.text(words)}</p>'

    def _purge(self) -> Any:
        if self.app.on_space:
            raise InputError("E_PATH", "Runs of others cannot be deleted here.")
        gone = self.app.jobs.purge()
        log.info("purged %d runs", len(gone))
        return gr.Row(visible=False), [], gr.Row(visible=False), ""

    def _resume(self, chosen: list[str], mine: Any) -> Any:
        line = self._only(chosen, mine)
        self.app.executor.resume(line.state.id)
        return line.state.id

    def _stop(self, chosen: list[str], mine: Any) -> Any:
        self.app.executor.stop(self._only(chosen, mine).state.id)

    def _again(self, chosen: list[str], mine: Any) -> Any:
        return self.shell.start(*details.repeated(self._only(chosen, mine)))

    def _as_draft(self, draft: Draft, chosen: list[str], mine: Any) -> Any:
        return draft_of(self._only(chosen, mine), draft), self.shell.goto("merge")

    def _show_scores(self, chosen: list[str], mine: Any) -> Any:
        return self._only(chosen, mine).state.id, self.shell.goto("evaluate")

    def _export_yaml(self, chosen: list[str], mine: Any) -> str:
        line = self._only(chosen, mine)
        return self._offer(f"{line.name}.yml", details.recipe_text(line.arguments))

    def _export_json(self, chosen: list[str], mine: Any) -> str:
        line = self._only(chosen, mine)
        return self._offer(f"{line.name}.json", details.as_json(line))

    def _offer(self, name: str, content: str) -> str:
        data = content.encode("utf-8", "replace")
        address = downloads.offer(self.app.data, name, data)
        words = f"Save {downloads.safe_name(name)} ({cards.size(len(data))})"
        return f'<a href="{address}" download class="save">{cards.text(words)}</a>'


def draft_of(line: view.Line, draft: Draft) -> Draft:
    """A new draft with exactly the run's recipe, and the tasks it was scored on (else those of the old draft)."""
    tasks = (line.arguments.get("evaluate") or {}).get("tasks") or draft["tasks"]
    return {**from_recipe(Recipe.parse(view.recipe_data(line.arguments))), "tasks": list(tasks)}
