"""The frame around the pages: the draft that all of them show, undo, messages, and the job that is running.

The draft is the single source of truth. A control changes it only through ``edit``, and shows it only through
``on_draft``; both run on the server, one edit after the other. All ``on_draft`` functions are called in one event per
change, so that the pages cannot disagree. The control that the user is holding is left alone, so nothing jumps under
the finger. What the browser keeps (``BrowserState``) is a mirror of the draft: it is read once, when the page loads.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from merging.errors import AmalgamError, RecipeError
from merging.jobs import JobState

from . import history as undo_stack
from .components import cards
from .components.text_panel import TextPanel
from .context import App
from .draft import Draft, empty
from .events import HIDDEN, as_tuple, explained, listed, wire, with_event_data
from .links import checked, from_link, link_of
from .machine import machine

# The browser's copy is no secret: the key only keeps its format from being mistaken for another program's.
KEY, SECRET = "amalgam-draft-1", "amalgam-keeps-this"
COPY_LINK = """(query) => { const url = new URL(location.href.split(/[?#]/)[0]); url.searchParams.set('r', query);
  if (navigator.clipboard) navigator.clipboard.writeText(url.href).catch(() => {}); return url.href; }"""

SHOW_TEXT = "() => { window.amalgamText(); }"


@dataclass
class Listener:
    fn: Callable[..., Any]
    outputs: list[Any]
    inputs: list[Any]


class Shell:
    """What the pages share. Made inside of ``gr.Blocks``; ``sidebar``, then the pages, then ``connect``."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.draft, self.history = gr.State(empty()), gr.State(undo_stack.start())
        self.revision = gr.State({"n": 0, "by": []})
        """Counts the changes of the draft, and knows the controls that made the last one."""
        self.job, self.job_status, self.job_progress = gr.State(""), gr.State(""), gr.State("")
        self.saved_draft = gr.BrowserState(None, storage_key=KEY, secret=SECRET)
        self.saved_place = gr.BrowserState(None, storage_key=KEY + "-place", secret=SECRET)
        self.my_runs = gr.BrowserState([], storage_key=KEY + "-runs", secret=SECRET)
        """Ids of the jobs that this browser has started: all that a visitor of a Space gets to see."""
        self.results = gr.State("")
        """The run whose scores the Evaluate page is asked to show."""
        self.timer = gr.Timer(1, active=False)
        self.message: gr.HTML
        self.tabs: gr.Tabs
        self.pages: dict[str, gr.Tab] = {}
        self._on_draft: list[Listener] = []
        self._on_job: list[Listener] = []
        self._on_progress: list[Listener] = []

    # -- for pages --------------------------------------------------------------------------------------

    def edit(self, event: Any, fn: Callable[..., Any], inputs: Any = (), outputs: Any = (), **how: Any) -> Any:
        """On this event of the user's (``slider.input``, ``button.click``) change the draft.

        ``fn(draft, *values)`` gives the new draft, or with ``outputs`` a tuple: the draft and their values. The old
        draft goes on the undo stack; an AmalgamError becomes a message and the controls show the draft again.
        """
        inputs, outputs = listed(inputs), listed(outputs)
        by = [event.__self__._id] if getattr(event, "__self__", None) is not None else []

        def change(draft: Draft, past: Any, revision: Any, *values: Any) -> Any:
            result = fn(draft, *values)
            new, more = (result[0], result[1:]) if isinstance(result, tuple) else (result, ())
            if new == draft:
                return (gr.skip(), gr.skip(), gr.skip(), *more)
            past = undo_stack.push(past, draft, str(by), time.time())
            return (new, past, _next(revision, by), *more)

        return self._wire(
            event,
            with_event_data(change, fn, 3),
            [self.draft, self.history, self.revision, *inputs],
            [self.draft, self.history, self.revision, *outputs],
            on_error=lambda values: {2: _next(values[2], [])},
            **{"trigger_mode": "always_last", "concurrency_id": "draft", "concurrency_limit": 1, **how},
        )

    def act(self, event: Any, fn: Callable[..., Any], inputs: Any = (), outputs: Any = (), **how: Any) -> Any:
        """On this event call ``fn(*values)``, which gives the outputs' values (a generator: again and again). An
        AmalgamError becomes a message. ``self.message`` may be among the outputs."""
        return self._wire(event, fn, listed(inputs), listed(outputs), **how)

    def start_on(self, event: Any, fn: Callable[..., Any], inputs: Any = (), **how: Any) -> Any:
        """On this event start a job: ``fn(draft, *values)`` gives (kind, arguments, title)."""

        def begin(draft: Draft, *values: Any) -> Any:
            return self.start(*fn(draft, *values))

        wired = with_event_data(begin, fn, 1)
        return self._wire(event, wired, [self.draft, *listed(inputs)], [self.job], **{"trigger_mode": "once", **how})

    def start(self, kind: str, arguments: dict[str, Any], title: str = "") -> str:
        """Start a job and give its id: the value for ``shell.job``, with which the sidebar shows it."""
        return self.app.executor.start(kind, arguments, title)

    def on_draft(self, fn: Callable[..., Any], outputs: Any, inputs: Any = ()) -> None:
        """``fn(draft, *values of inputs)`` gives the outputs' values, after every change and when the page loads. It
        must be quick: all of them are waited for."""
        taken = {o._id for listener in self._on_draft for o in listener.outputs}
        twice = [o for o in listed(outputs) if o._id in taken]
        assert not twice, f"two on_draft functions for {twice}"
        self._on_draft.append(Listener(fn, listed(outputs), listed(inputs)))

    def on_job(self, fn: Callable[..., Any], outputs: Any, inputs: Any = (), progress: bool = False) -> None:
        """``fn(JobState or None, *values)`` when the job in the sidebar or its status changes, and when the page loads;
        with ``progress`` also every second that it has moved."""
        (self._on_progress if progress else self._on_job).append(Listener(fn, listed(outputs), listed(inputs)))

    def page(self, name: str) -> gr.Tab:
        """The tab of a page: ``shell.page("runs").select`` is the event of its being opened."""
        return self.pages[name]

    def goto(self, tab_id: str) -> Any:
        """The value for ``shell.tabs`` that opens a page."""
        return gr.Tabs(selected=tab_id)

    def job_state(self, job_id: str) -> JobState | None:
        """The state of a job; None if there is no such job any more."""
        try:
            return self.app.jobs.state(job_id) if job_id else None
        except AmalgamError:
            return None

    # -- building ---------------------------------------------------------------------------------------

    def sidebar(self) -> None:
        """What is always in sight: recipe, undo, job, machine."""
        with gr.Column(elem_classes="side-group", min_width=0):
            self.recipe_card = gr.HTML(elem_id="recipe-card", padding=False)
            with gr.Row(elem_classes="tight"):
                self.undo = gr.Button("Undo", size="sm", elem_id="undo", interactive=False, min_width=50)
                self.redo = gr.Button("Redo", size="sm", elem_id="redo", interactive=False, min_width=50)
                self.share = gr.Button("Copy link", size="sm", elem_id="share", min_width=70)
                as_text = gr.Button("As text", size="sm", elem_id="as-text", min_width=60)
            as_text.click(None, js=SHOW_TEXT, api_visibility="private")
            self.link = gr.Textbox(
                label="Link to this recipe", visible=False, interactive=False, elem_id="link", lines=1, max_lines=1
            )
        with gr.Column(elem_classes="side-group", min_width=0):
            self.job_card = gr.HTML(elem_id="job-card", padding=False)
            with gr.Row(elem_classes="tight"):
                self.stop = gr.Button("Stop", size="sm", variant="stop", visible=False, elem_id="stop", min_width=60)
                self.resume = gr.Button("Resume", size="sm", visible=False, elem_id="resume", min_width=60)
            self.machine_card = gr.HTML(elem_id="machine-card", padding=False)

    def yaml_panel(self) -> None:
        """The recipe as text, to read and to write."""
        self.text_panel = TextPanel()

    def connect(self, demo: gr.Blocks) -> None:
        """Wire what the pages have asked for. The last thing that is built."""
        self.text_panel.connect(self)
        self.on_draft(cards.recipe_card, self.recipe_card)
        self._connect_undo()
        self._connect_draft(demo)
        self._connect_job(demo)

    def _connect_undo(self) -> None:
        for button, turn in ((self.undo, undo_stack.undo), (self.redo, undo_stack.redo)):
            self._wire(
                button.click,
                functools.partial(_turn, turn),
                [self.draft, self.history, self.revision],
                [self.draft, self.history, self.revision],
                concurrency_id="draft",
                concurrency_limit=1,
                trigger_mode="multiple",
            )
        shared = self._wire(self.share.click, _link, [self.draft], [self.link])
        shared.then(None, [self.link], [self.link], js=COPY_LINK, **HIDDEN)

    def _connect_draft(self, demo: gr.Blocks) -> None:
        outputs = [output for listener in self._on_draft for output in listener.outputs]
        inputs = [value for listener in self._on_draft for value in listener.inputs]

        def show(draft: Draft, past: Any, revision: Any, *values: Any) -> Any:
            results, problem = self._ask(self._on_draft, draft, values, set(revision["by"]))
            undo, redo = (gr.Button(interactive=bool(past[key])) for key in ("past", "future"))
            facts = cards.machine_card(machine(self.app.data), self.app.offline)
            return (draft, undo, redo, facts, problem or gr.skip(), gr.Textbox(visible=False), *results)

        gr.on(
            [self.revision.change],
            show,
            [self.draft, self.history, self.revision, *inputs],
            [self.saved_draft, self.undo, self.redo, self.machine_card, self.message, self.link, *outputs],
            trigger_mode="always_last",
            **HIDDEN,
        )
        demo.load(
            self._load,
            [self.saved_draft, self.saved_place, self.revision],
            [self.draft, self.history, self.revision, self.job, self.saved_place, self.message],
            **HIDDEN,
        )

    def _load(self, saved: Any, place: Any, revision: Any, request: gr.Request) -> Any:
        """The draft of a fresh page: from the link, from the command line, or as the browser kept it."""
        problem, place = "", place if isinstance(place, dict) else {}
        try:
            draft = checked(saved) if saved else empty()
        except RecipeError:
            draft = empty()
        past, wanted = undo_stack.start(), None
        link = request.query_params.get("r")
        if link and place.get("link") != link:
            try:
                wanted = from_link(link)
            except RecipeError as error:
                problem = cards.error_message(error)
            place = {**place, "link": link}
        elif self.app.start_recipe is not None and place.get("start") != self.app.start_id:
            wanted = self.app.start_recipe
        if wanted is not None and wanted != draft:
            past = undo_stack.push(past, draft, "", 0.0) if draft != empty() else past
            draft = wanted
        place = {**place, "start": self.app.start_id}
        job = str(place.get("job") or "")
        state = self.job_state(job)
        if state is None or not state.alive:
            job = self._newest_alive() or (job if state is not None else "")
        return draft, past, _next(revision, []), job, place, problem

    # -- jobs -------------------------------------------------------------------------------------------

    def _connect_job(self, demo: gr.Blocks) -> None:
        shown = [self.job_card, self.stop, self.resume, self.timer, self.job_status, self.job_progress]
        # Through the queue, whose answers name the states that changed: without it, no listener would hear of them.
        quick: dict[str, Any] = {"concurrency_limit": None, **HIDDEN}
        gr.on([self.timer.tick, self.job.change], self._look, [self.job], shown, trigger_mode="always_last", **quick)
        demo.load(self._look, [self.job], shown, **quick)
        self.job.change(_remember_job, [self.job, self.saved_place], [self.saved_place], **quick)
        if self.app.on_space:
            self.job.change(_remember_run, [self.job, self.my_runs], [self.my_runs], **quick)
        self._wire(self.stop.click, self._stop, [self.job], [self.job_card])
        self._wire(self.resume.click, self._resume, [self.job], [self.timer])
        for listeners, state in ((self._on_job, self.job_status), (self._on_progress, self.job_progress)):
            if listeners:
                self._connect_listeners(listeners, state)

    def _connect_listeners(self, listeners: list[Listener], state: gr.State) -> None:
        def tell(job_id: str, *values: Any) -> Any:
            results, problem = self._ask(listeners, self.job_state(job_id), values, set())
            return (problem or gr.skip(), *results)

        inputs = [value for listener in listeners for value in listener.inputs]
        outputs = [output for listener in listeners for output in listener.outputs]
        gr.on(
            [state.change],
            tell,
            [self.job, *inputs],
            [self.message, *outputs],
            trigger_mode="always_last",
            **HIDDEN,
        )

    def _look(self, job_id: str) -> Any:
        """The job as it is on the disk now."""
        state = self.job_state(job_id)
        going, again = state is not None and state.alive, state is not None and state.resumable
        status = f"{state.id} {state.status}" if state else "none"
        moved = f"{status} {state.progress}" if state else "none"
        buttons = gr.Button(visible=going), gr.Button(visible=again)
        return cards.job_card(state), *buttons, gr.Timer(active=going), status, moved

    def _stop(self, job_id: str) -> Any:
        self.app.executor.stop(job_id)
        return cards.job_card(self.job_state(job_id))

    def _resume(self, job_id: str) -> Any:
        self.app.executor.resume(job_id)
        return gr.Timer(active=True)

    def _newest_alive(self) -> str:
        """The job that another tab or an earlier start has begun. Not on a Space, where it may be a stranger's."""
        if self.app.on_space:
            return ""
        return next((state.id for state in self.app.jobs.states() if state.alive), "")

    # -- calling ----------------------------------------------------------------------------------------

    def _wire(self, event: Any, fn: Callable[..., Any], inputs: Any, outputs: Any, **how: Any) -> Any:
        return wire(self.message, event, fn, inputs, outputs, **how)

    def _ask(
        self, listeners: list[Listener], subject: Any, values: Sequence[Any], held: set[int]
    ) -> tuple[list[Any], str]:
        """What all listeners answer, and the message of the first that could not."""
        results: list[Any] = []
        problem, place = "", 0
        for listener in listeners:
            mine = values[place : place + len(listener.inputs)]
            place += len(listener.inputs)
            try:
                answer = as_tuple(listener.fn(subject, *mine), len(listener.outputs))
            except Exception as error:  # one page's mistake must not blind the others
                answer, problem = (gr.skip(),) * len(listener.outputs), problem or explained(error)
            results += [gr.skip() if o._id in held else a for o, a in zip(listener.outputs, answer, strict=True)]
        return results, problem


def _turn(turn: Callable[..., Any], draft: Draft, past: Any, revision: Any) -> Any:
    turned = turn(past, draft)
    if turned is None:
        return gr.skip(), gr.skip(), gr.skip()
    return turned[1], turned[0], _next(revision, [])


def _link(draft: Draft) -> Any:
    return gr.Textbox(value=link_of(draft), visible=True)


def _remember_job(job_id: str, place: Any) -> Any:
    return {**(place if isinstance(place, dict) else {}), "job": job_id}


def _remember_run(job_id: str, runs: Any) -> Any:
    known = [run for run in runs if isinstance(run, str)] if isinstance(runs, list) else []
    return gr.skip() if not job_id or job_id in known else [*known, job_id][-200:]


def _next(revision: Any, by: list[int]) -> Any:
    return {"n": revision["n"] + 1, "by": by}
