"""Analyse: what the experts changed, where, and where they get in each other's way.

A map of layers and modules is the master; the cell that is clicked is shown in full beside it. Everything comes from
the cache of inspections: the job only fills it, part by part, and each part is shown as soon as it is there. So a
second look at the same models is instant, and a stopped analysis keeps what it had.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from merging.errors import AmalgamError, HubError, RecipeError

from .. import downloads, report
from ..components import cards
from ..components.chart_view import ChartView
from ..components.choices import Choices
from ..components.plot import Plot
from ..components.table import DataTable
from ..context import App
from ..draft import Draft
from ..shell import Shell
from .access import allowed_path
from .analyse_cells import tensors_at
from .analyse_detail import words_of
from .analyse_drawing import choosers, detail_parts, filter_choices, map_parts, quiet
from .analyse_findings import findings_html, has_place, place_of
from .analyse_state import Answers, add_condition, arguments_of, is_about, models_of, question_of, weight_problem
from .analyse_status import merged_models, status_html

CHARTS = {
    "similarity": ("cosine", "subspaces"),
    "conflicts": ("signs", "kept"),
    "importance": ("importance", "principal"),
}
"""Sub-view -> charts of the report. At most four figures are mounted at once."""
SPECTRA = [
    ("All singular values (exact)", "gram"),
    ("The leading ones (a fast estimate, for large models)", "preview"),
    ("None: only sizes, angles and signs", "none"),
]


def build(app: App, shell: Shell) -> None:
    Page(app, shell)


class Page:
    def __init__(self, app: App, shell: Shell) -> None:
        self.app, self.shell, self.answers = app, shell, Answers()
        self.asked, self.token = gr.State(""), gr.State("")
        self.pulse, self.view = gr.State(""), gr.State("map")
        """``asked``: the question (JSON), or the reason why there is none. ``token``: the answer that is shown.
        ``pulse``: changes with the job. ``view``: the open sub-view."""
        self._head()
        with gr.Column(visible=False, elem_id="analyse-results") as self.results:
            self.findings = Choices(elem_id="analyse-findings")
            with gr.Tabs(selected="map", elem_id="analyse-views") as self.views:
                with gr.Tab("Map", id="map") as map_tab:
                    self._map_view()
                tabs = {"map": map_tab}
                self.charts: dict[str, list[ChartView]] = {}
                for view, keys in CHARTS.items():
                    with gr.Tab(view.capitalize(), id=view) as tabs[view]:
                        self.charts[view] = [self._chart(key) for key in keys]
            self._exports()
        self._connect(tabs)

    # -- what is on the page -----------------------------------------------------------------------------------

    def _head(self) -> None:
        gr.Markdown(
            "## Analyse\nWhat did each expert change in the base, where do they agree, and where do they get in each "
            "other's way? Nothing is judged here: the weights show evidence, a score on a task decides."
        )
        with gr.Row(elem_classes="tight action"):
            self.start = gr.Button("Analyse the experts", variant="primary", elem_id="analyse-start", scale=0,
                                   min_width=230, interactive=False)  # fmt: skip
            self.reason = gr.HTML(elem_id="analyse-reason", padding=False)
        with gr.Accordion("How thorough", open=False, elem_id="analyse-options"), gr.Row():
            self.spectra = gr.Radio(SPECTRA, value="gram", label="Singular values", interactive=True)
            self.density = gr.Slider(
                0.05, 1, value=0.2, step=0.05, label="Share of the largest changes whose signs are compared",
                interactive=True)  # fmt: skip
            self.merged = gr.Dropdown([("none", "")], value="", label="Also look at a merge", interactive=True)
        self.status = gr.HTML(elem_id="analyse-status", padding=False)

    def _map_view(self) -> None:
        with gr.Row():
            self.metric = gr.Dropdown([], label="Metric", interactive=True, elem_id="analyse-metric", min_width=220)
            self.whose = gr.Dropdown([], label="Whose", interactive=True, elem_id="analyse-whose", min_width=160)
            self.tensor = gr.Dropdown([], label="Tensor", interactive=True, elem_id="analyse-tensor", min_width=260)
        with gr.Row():
            with gr.Column(scale=5, min_width=380):
                self.map_words = gr.HTML(padding=False)
                self.map = Plot(label="Map of layers and modules", elem_id="analyse-map")
                self.map_table = DataTable(elem_id="analyse-map-table")
                self.numbers = DataTable(label="Numbers of each expert", elem_id="analyse-numbers", open=True)
                self.pairs = DataTable(label="Numbers of each pair", elem_id="analyse-pairs")
                self._filter()
            with gr.Column(scale=6, min_width=420, elem_id="analyse-detail"):
                self.head = gr.HTML(padding=False, elem_id="analyse-tensor-head")
                self.spectrum = Plot(label="Spectrum of the change", elem_id="analyse-spectrum")
                self.spectrum_words = gr.HTML(padding=False)
                self.histogram = Plot(label="Changes of single weights", elem_id="analyse-histogram")
                self.histogram_words = gr.HTML(padding=False)
                self.signs = Plot(label="Signs of the largest changes", elem_id="analyse-signs")
                self.signs_words = gr.HTML(padding=False)

    def _filter(self) -> None:
        with gr.Accordion("Use as filter in the recipe", open=False, elem_id="analyse-filter"):
            with gr.Row():
                self.wanted = gr.Dropdown([], label="Where", interactive=True, min_width=260, elem_id="filter-where")
                self.expert = gr.Dropdown([], label="Expert", interactive=True, min_width=140, elem_id="filter-expert")
                self.weight = gr.Number(0.0, label="Weight there", interactive=True, min_width=110, step=0.05)
            with gr.Row(elem_classes="tight action"):
                self.use = gr.Button("Use as filter", size="sm", scale=0, min_width=130, elem_id="filter-use")
                self.use_note = gr.HTML(padding=False, elem_id="filter-note")

    def _chart(self, key: str) -> ChartView:
        return ChartView(
            f"analyse-{key}", lambda token, asked: self.answers.chart(token, asked, key), [self.token, self.asked]
        )

    def _exports(self) -> None:
        with gr.Row(elem_classes="tight action"):
            self.json = gr.Button("Save all numbers (JSON)", size="sm", scale=0, min_width=190, elem_id="save-json")
            self.html = gr.Button("Save the report (HTML)", size="sm", scale=0, min_width=190, elem_id="save-report")
            self.saved = gr.HTML(padding=False, elem_id="analyse-saved")

    # -- what happens ------------------------------------------------------------------------------------------

    def _connect(self, tabs: dict[str, gr.Tab]) -> None:
        shell, options = self.shell, [self.spectra, self.density, self.merged]
        shell.on_draft(self._ask, [self.asked, self.use, self.use_note], options)
        for event in (self.spectra.input, self.density.input, self.merged.input):
            shell.act(event, self._ask, [shell.draft, *options], [self.asked, self.use, self.use_note],
                      trigger_mode="always_last")  # fmt: skip
        shell.on_job(self._pulse, [self.pulse], progress=True)
        shell.on_job(lambda state: gr.Dropdown(choices=merged_models(self.app)), [self.merged])
        shell.start_on(self.start.click, self._job, [self.asked])

        top = [self.token, self.results, self.status, self.reason, self.start, self.findings]
        for changed in (self.asked.change, self.pulse.change):
            shell.act(changed, self._look, [self.asked, shell.job, self.token], top, trigger_mode="always_last")
        self.choosers = [self.metric, self.whose, self.tensor]
        self.map_parts = [self.map_words, self.map, self.map_table]
        self.detail_parts = [self.head, self.spectrum, self.histogram, self.signs, self.numbers, self.pairs]
        self.words = [self.spectrum_words, self.histogram_words, self.signs_words]
        self.chart_parts = [o for views in self.charts.values() for view in views for o in view.outputs]
        known, chosen = [self.token, self.asked], [self.metric, self.whose, self.tensor]
        everything = [*self.choosers, *self.map_parts, *self.detail_parts, *self.words, *self.chart_parts]
        shell.act(self.token.change, self._show, [*known, self.view, *chosen], everything)
        for view, tab in tabs.items():
            shell.act(tab.select, self._opened(view), [*known, *chosen], [self.view, *everything])
        shell.act(self.metric.input, self._redrawn, [*known, *chosen], [self.whose, *self.map_parts])
        shell.act(self.whose.input, self._redrawn, [*known, *chosen], [self.whose, *self.map_parts])
        shell.act(self.tensor.input, self._chosen, [*known, *chosen], [*self.map_parts, *self.detail_parts],
                  trigger_mode="always_last")  # fmt: skip
        shell.act(self.map.plot_click, self._clicked, known, [self.tensor, *self.detail_parts],
                  trigger_mode="always_last")  # fmt: skip
        shell.act(self.findings.pick, self._picked, known,
                  [self.views, self.view, *self.choosers, *self.map_parts, *self.detail_parts])  # fmt: skip
        shell.act(self.tensor.change, self._filters, [*known, self.tensor], [self.wanted, self.expert],
                  trigger_mode="always_last")  # fmt: skip
        shell.edit(self.use.click, self._use, [*known, self.wanted, self.expert, self.weight], [self.use_note])
        for button, kind in ((self.json, "json"), (self.html, "html")):
            saving = shell.act(button.click, self._save(kind), known, [self.saved])
            saving.then(None, None, None, js="() => document.querySelector('#analyse-saved a[download]')?.click()")

    def _ask(self, draft: Draft, spectra: str, density: float, merged: str) -> Any:
        problem = weight_problem(draft)
        use = gr.Button(interactive=not problem), f'<p class="quiet">{cards.text(problem)}</p>'
        try:
            asked = question_of(draft, spectra, density, merged)
            for reference in models_of(asked):
                if Path(reference).exists() and not allowed_path(self.app, reference):
                    raise RecipeError("E_RECIPE_INPUTS", "Files of this computer cannot be analysed here.")
            return asked, *use
        except RecipeError as error:
            return f"!{error.what} {error.fix}", *use

    def _pulse(self, state: Any) -> str:
        if state is None or state.kind != "inspect":
            return ""
        done = [e for e in self.app.jobs.events(state.id)[0] if e["event"] == "part"]
        return f"{state.id} {state.status} {len(done)}"

    def _job(self, draft: Draft, asked: str) -> Any:
        if not asked or asked.startswith("!"):
            raise RecipeError("E_RECIPE_INPUTS", asked[1:] or "There is nothing to analyse yet.")
        names = json.loads(asked)["labels"]
        title = f"Analysis of {', '.join(names[:4])}{' and more' if len(names) > 4 else ''}"
        return "inspect", arguments_of(asked, self.app.offline), title

    def _running(self, asked: str, job: str) -> Any:
        """The job, if it is one about this question."""
        state = self.shell.job_state(job)
        if state is None or state.kind != "inspect" or not is_about(asked, self.app.jobs.arguments(job)):
            return None
        return state

    def _look(self, asked: str, job: str, before: str) -> Any:
        """Read what is known about the question, and say what is not."""
        if not asked or asked.startswith("!"):
            return "", gr.Column(visible=False), "", quiet(asked[1:]), gr.Button(interactive=False), ""
        problem, token = "", ""
        try:
            token = self.answers.look(asked)
        except HubError as error:
            problem = quiet(f"{error.what} The analysis downloads what is missing.")
        except AmalgamError as error:
            problem = cards.error_message(error)
        found = self.answers.get(token)
        status, reason, can_start = status_html(asked, found, self._running(asked, job))
        listed = findings_html(found.findings, [has_place(found, f) for f in found.findings]) if found else ""
        button = gr.Button(interactive=can_start)
        show = gr.Column(visible=found is not None)
        if token == before:
            return token, show, problem or status, quiet(reason), button, gr.skip()
        return token, show, problem or status, quiet(reason), button, listed

    # -- what is shown -----------------------------------------------------------------------------------------

    def _show(self, token: str, asked: str, view: str, key: str, whose: str, tensor: str) -> Any:
        """Everything of the sub-view that is open; the figures of the others are taken away."""
        found = self.answers.get(token, asked)
        charts = [part for name, views in self.charts.items() for chart, one in zip(CHARTS[name], views, strict=True)
                  for part in one.show(self.answers.chart(token, asked, chart) if name == view else None)]  # fmt: skip
        if found is None or view != "map":
            figures = (self.map, self.spectrum, self.histogram, self.signs)
            shown = [*self.choosers, *self.map_parts, *self.detail_parts, *self.words]
            return *(None if part in figures else gr.skip() for part in shown), *charts
        values, key, whose, tensor = choosers(self.answers, token, asked, key, whose, tensor)
        parts = map_parts(self.answers, token, asked, key, whose, tensor)
        words = words_of(found)
        words_parts = words.spectrum, words.histogram, words.signs
        return *values, *parts, *detail_parts(found, tensor), *words_parts, *charts

    def _opened(self, view: str) -> Any:
        def opened(token: str, asked: str, key: str, whose: str, tensor: str) -> Any:
            return view, *self._show(token, asked, view, key, whose, tensor)

        return opened

    def _redrawn(self, token: str, asked: str, key: str, whose: str, tensor: str) -> Any:
        """The map, for another metric or somebody else."""
        values, key, whose, tensor = choosers(self.answers, token, asked, key, whose, tensor)
        return values[1], *map_parts(self.answers, token, asked, key, whose, tensor)

    def _chosen(self, token: str, asked: str, key: str, whose: str, tensor: str) -> Any:
        found = self._found(token, asked)
        return *map_parts(self.answers, token, asked, key, whose, tensor), *detail_parts(found, tensor)

    def _clicked(self, event: gr.EventData, token: str, asked: str) -> Any:
        point = event.points[0]
        found = self._found(token, asked)
        tensors = tensors_at(found, point["y"], point["x"])
        if not tensors:
            return gr.skip()
        return gr.Dropdown(value=tensors[0]), *detail_parts(found, tensors[0])

    def _picked(self, event: gr.EventData, token: str, asked: str) -> Any:
        """A finding's place in the map."""
        found = self._found(token, asked)
        place = place_of(found, found.findings[int(event.pick)])
        if place is None:
            raise RecipeError("E_RECIPE_INPUTS", "There is no place in the map that shows this.")
        values, key, whose, tensor = choosers(self.answers, token, asked, place.metric, place.whose, place.tensor)
        parts = map_parts(self.answers, token, asked, key, whose, tensor)
        return gr.Tabs(selected="map"), "map", *values, *parts, *detail_parts(found, tensor)

    def _found(self, token: str, asked: str) -> Any:
        found = self.answers.get(token, asked)
        if found is None:
            raise RecipeError("E_RECIPE_INPUTS", "These results are gone.", "", "Analyse the experts again.")
        return found

    # -- what it is used for -----------------------------------------------------------------------------------

    def _filters(self, token: str, asked: str, tensor: str) -> Any:
        found = self.answers.get(token, asked)
        return filter_choices(found, asked, tensor) if found and tensor in found.places else (gr.skip(), gr.skip())

    def _use(self, draft: Draft, token: str, asked: str, wanted: str, expert: str, weight: float | None) -> Any:
        new = add_condition(draft, expert or "", wanted or "", float(weight or 0.0))
        whose = expert or "all experts"
        words = f"The recipe now has weight {weight or 0:g} for {whose} where the name contains “{wanted}”."
        return new, f'<p class="quiet" role="status">{cards.text(words)}</p>'

    def _save(self, kind: str) -> Any:
        def save(token: str, asked: str) -> Iterator[Any]:
            found = self._found(token, asked)
            yield quiet("Writing the file …")
            name = f"analysis-{'-'.join(found.names[:4])}.{kind}"
            text = json.dumps(found.as_dict(), indent=1) if kind == "json" else report.report(found)
            address = downloads.offer(self.app.data, name, text.encode())
            words = f"Save {downloads.safe_name(name)} ({cards.size(len(text.encode()))})"
            yield f'<a href="{address}" download class="quiet">{cards.text(words)}</a>'

        return save
