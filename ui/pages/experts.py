"""Experts: which models are merged, and whether they fit, told from their headers before any weight is read."""

from __future__ import annotations

import hashlib
import html
import importlib.util
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from functools import partial
from typing import Any

import gradio as gr

from merging.errors import AmalgamError, RecipeError
from merging.preflight_fixes import Fix

from ..components.actions import Act, ActionList, act_of
from ..components.cards import error_message, message
from ..context import App
from ..draft import Draft, active, demo, enable, move_expert, remove_expert, set_base
from ..permits import check_permitted, find_permitted
from ..shell import Shell
from .experts_edit import apply_fix, rename, set_all_weights, set_weight, takes_weight
from .experts_look import Looks, names_of
from .experts_pick import Sources
from .experts_view import doctor, fix_key, model_cards

PATIENCE = 0.5
"""Seconds of looking after which the page says so."""
START = {
    "demo": "A tiny language model and four experts trained from it, with their tasks. Nothing is downloaded.",
    "hub": "Models and adapters of the Hugging Face Hub: those on this computer first, others by a search.",
    "path": "A model folder, a .safetensors file, an adapter, a recipe (.yml), or a merged model with its recipe.",
}


def build(app: App, shell: Shell) -> None:
    page = Experts(app, shell)
    page.start()
    page.hub_panel()
    if not app.on_space:
        page.path_panel()
    page.connect_start()
    page.models()
    page.doctor()
    page.next_steps()


class Experts:
    def __init__(self, app: App, shell: Shell) -> None:
        self.app, self.shell = app, shell
        self.sources = Sources(app)
        self.looks = Looks(partial(find_permitted, app), app.data)
        self.pool = ThreadPoolExecutor(2, thread_name_prefix="look")
        self.open = gr.State("")
        self.panels: dict[str, gr.Column] = {}
        self.buttons: dict[str, gr.Button] = {}

    # -- choosing -----------------------------------------------------------------------------------------

    def start(self) -> None:
        labels = {"demo": "Try the demo experts", "hub": "Choose from the Hub", "path": "Open folder or recipe"}
        gr.HTML("<h2>Experts</h2>", padding=False)
        self.hints = []
        with gr.Row(elem_classes="start-row"):
            for name, label in labels.items():
                if name == "path" and self.app.on_space:
                    continue
                with gr.Column(min_width=200, elem_classes="start-card"):
                    self.buttons[name] = gr.Button(
                        label, variant="primary" if name == "demo" else "secondary", elem_id=f"start-{name}"
                    )
                    self.hints.append(gr.HTML(f'<p class="hint">{html.escape(START[name])}</p>', padding=False))

    def connect_start(self) -> None:
        def try_demo(draft: Draft) -> tuple[Draft, str]:
            new = demo()
            again = " Undo brings your former recipe back." if draft["recipe"]["experts"] else ""
            return new, message("ok", f"The demo is ready: a base, four experts and a method.{again}")

        def toggle(name: str, before: str) -> Any:
            now = "" if name == before else name
            return (now, *(gr.Column(visible=panel == now) for panel in self.panels))

        self.shell.edit(self.buttons["demo"].click, try_demo, outputs=[self.shell.message])
        for name in self.panels:
            outputs = [self.open, *self.panels.values()]
            opened = self.shell.act(self.buttons[name].click, partial(toggle, name), [self.open], outputs)
            if name == "hub":
                opened.then(self.sources.cached, [self.words], [self.cached], show_progress="hidden",
                            api_visibility="private")  # fmt: skip
        self.shell.on_draft(self._hints, self.hints)

    def _hints(self, draft: Draft) -> Any:
        new = not draft["recipe"]["experts"] and not draft["recipe"].get("base")
        return tuple(gr.HTML(visible=new) for _ in self.hints)

    def hub_panel(self) -> None:
        offline = self.app.offline
        with gr.Column(visible=False, elem_id="hub-panel", elem_classes="pick-panel") as self.panels["hub"]:
            with gr.Row(elem_classes="line"):
                self.words = gr.Textbox(label="Name of a model, or a part of it", elem_id="hub-words", max_lines=1,
                                        placeholder="for example qwen2.5 math, or org/name", scale=3)  # fmt: skip
                kinds = [("Models", "models"), ("Adapters", "adapters")]
                kind = gr.Radio(kinds, value="models", label="Search for", elem_id="hub-kind", scale=0, min_width=230)
                search = gr.Button(
                    "Search the Hub", interactive=not offline, elem_id="hub-search", min_width=190, scale=0
                )
            if offline:
                why = (
                    "Offline mode is on: only what is on this computer can be chosen. It is turned off in the settings."
                )
                gr.HTML(f'<p class="hint">{why}</p>', padding=False)
            gr.HTML("<h3>On this computer</h3>", padding=False, visible=not self.app.on_space)
            self.cached = ActionList(label="On this computer", elem_id="hub-cached")
            found_title = gr.HTML("<h3>On the Hub</h3>", padding=False, visible=False)
            found = ActionList(label="On the Hub", elem_id="hub-found")
        self.shell.act(self.words.input, self.sources.cached, [self.words], [self.cached], trigger_mode="always_last")

        def look_up(words: str, kind: str) -> Any:
            return gr.HTML(visible=True), self.sources.search(words, kind == "adapters")

        if not offline:
            for event in (search.click, self.words.submit):
                self.shell.act(event, look_up, [self.words, kind], [found_title, found], show_progress="minimal",
                               show_progress_on=[found], trigger_mode="once")  # fmt: skip
        self._connect_picker(self.cached)
        self._connect_picker(found)

    def path_panel(self) -> None:
        with gr.Column(visible=False, elem_id="path-panel", elem_classes="pick-panel") as self.panels["path"]:
            with gr.Row(elem_classes="line"):
                typed = gr.Textbox(label="Path on this computer", elem_id="path", max_lines=1, scale=4,
                                   placeholder="/models/my-expert, ~/recipes/merge.yml, …")  # fmt: skip
                look = gr.Button("Look", elem_id="path-look", min_width=90, scale=0)
            found = ActionList(label="At this path", elem_id="path-found")
        for event in (look.click, typed.submit):
            self.shell.act(event, self._at_path, [typed], [found, self.shell.message], trigger_mode="once")
        self._connect_picker(found)

    def _at_path(self, typed: str) -> tuple[str, str]:
        """What is there; or nothing, and why."""
        try:
            return self.sources.at_path(typed), ""
        except AmalgamError as error:
            return "", error_message(error)

    def _connect_picker(self, picker: ActionList) -> None:
        def choose(draft: Draft, event: gr.EventData) -> tuple[Draft, str]:
            act = act_of(event)
            new, said = self.sources.choose(draft, act.act, act.of)
            return new, message("ok", said)

        self.shell.edit(picker.act, choose, outputs=[self.shell.message], trigger_mode="multiple")

    # -- the models ---------------------------------------------------------------------------------------

    def models(self) -> None:
        self.cards = ActionList(label="Base and experts", elem_id="expert-cards")
        with gr.Row(visible=False, elem_id="bulk", elem_classes="line") as bulk:
            weight = gr.Textbox(label="Weight of all experts that are on", elem_id="bulk-weight", max_lines=1,
                                placeholder="0.4", min_width=270, scale=0)  # fmt: skip
            apply = gr.Button("Set for all", size="sm", elem_id="bulk-apply", min_width=100, scale=0)
        self.shell.edit(self.cards.act, self._edit, outputs=[self.cards, self.shell.message], trigger_mode="multiple")
        for event in (apply.click, weight.submit):
            self.shell.edit(event, set_all_weights, [weight])
        self.shell.on_draft(self._shown, [self.cards, bulk])

    def _shown(self, draft: Draft) -> Any:
        several = len(draft["recipe"]["experts"]) > 1 and takes_weight(draft)
        return model_cards(self.app, draft, self.looks), gr.Row(visible=several)

    def _edit(self, draft: Draft, event: gr.EventData) -> tuple[Draft, str, str]:
        try:
            new, said = edited(draft, act_of(event)), ""
        except AmalgamError as error:
            new, said = draft, error_message(error)
        # The number makes it another text, so that what was typed in vain is drawn over.
        return new, f"{model_cards(self.app, new, self.looks)}<!-- {time.monotonic_ns()} -->", said

    # -- the doctor ---------------------------------------------------------------------------------------

    def doctor(self) -> None:
        with gr.Row(visible=False, elem_classes="tight") as head:
            gr.HTML("<h2>Do they fit?</h2>", padding=False)
            again = gr.Button("Check again", size="sm", elem_id="check-again", min_width=110, scale=0)
        self.findings = ActionList(label="Findings", elem_id="findings")
        # Changes whenever there is something new to look at; the look itself is an event of its own.
        self.wanted = gr.State("")
        times = gr.State(0)
        self.shell.on_draft(_wanted, [self.wanted, head])
        self.shell.on_job(_after_download, times, [times])
        self.shell.act(again.click, _one_more, [times], [times])
        for event in (self.wanted.change, times.change):
            self.shell.act(event, self._look, [self.shell.draft], [self.findings, self.cards, self.shell.message],
                           trigger_mode="always_last")  # fmt: skip
        outputs = [self.shell.job, self.shell.message]
        self.shell.edit(self.findings.act, self._fix, outputs=outputs, trigger_mode="once")

    def _look(self, draft: Draft) -> Iterator[Any]:
        """The findings, and the cards with the facts that were found on the way."""
        if not names_of(draft["recipe"]):
            yield "", gr.skip(), gr.skip()
            return
        look = self.pool.submit(self.looks.look, draft)
        try:
            found = look.result(PATIENCE)
        except NotYet:
            yield doctor(None), gr.skip(), gr.skip()
            found = look.result()
        yield doctor(found), model_cards(self.app, draft, self.looks), gr.skip()

    def _fix(self, draft: Draft, event: gr.EventData) -> tuple[Draft, Any, str]:
        wanted = act_of(event).of
        checks = self.looks.look(draft).checks
        fix = next((fix for check in checks for fix in check.fixes if fix_key(check, fix) == wanted), None)
        if fix is None:
            raise RecipeError("E_RECIPE_FIELD", "The recipe has changed meanwhile.", "", "Look at the findings again.")
        if fix.action in ("download", "headers"):
            return draft, self._download(fix), message("note", "The Hub is being asked: see the side panel.")
        if fix.model and fix.action == "base":
            check_permitted(self.app, fix.model)
        return apply_fix(draft, fix), gr.skip(), message("ok", f"{fix.label}: done. Undo takes it back.")

    def _download(self, fix: Fix) -> str:
        names = fix.model.split("\n")
        if self.app.offline:
            what, remedy = (
                "Offline mode is on: the Hub was not asked.",
                "Turn it off in the settings, or use local models.",
            )
            raise RecipeError("E_RECIPE_INPUTS", what, "", remedy)
        what = "Headers" if fix.action == "headers" else "Download"
        title = f"{what}: {', '.join(name.split('/')[-1] for name in names)}"
        return self.shell.start("download", {"models": names, "headers": fix.action == "headers"}, title)

    def next_steps(self) -> None:
        labels = {"analyse": "See what they changed", "merge": "Set up the merge"}
        pages = [name for name in labels if importlib.util.find_spec(f"ui.pages.{name}") is not None]
        with gr.Row(visible=False, elem_classes="tight next") as row:
            for name in pages:
                go = gr.Button(labels[name], size="sm", elem_id=f"go-{name}", scale=0, min_width=210)
                self.shell.act(go.click, partial(self.shell.goto, name), outputs=[self.shell.tabs])
        self.shell.on_draft(_has_experts, row)


def edited(draft: Draft, act: Act) -> Draft:
    """The draft after a button or field of a card was used."""
    match act.act:
        case "on":
            return enable(draft, act.of, act.value is True)
        case "rename":
            return rename(draft, act.of, str(act.value))
        case "weight":
            return set_weight(draft, act.of, str(act.value))
        case "up" | "down":
            return move_expert(draft, act.of, -1 if act.act == "up" else 1)
        case "remove":
            return remove_expert(draft, act.of)
        case "remove-base":
            return set_base(draft, None)
    raise RecipeError("E_RECIPE_FIELD", "This button is unknown.", "", "Load the page again.")


def _has_experts(draft: Draft) -> Any:
    return gr.Row(visible=bool(draft["recipe"]["experts"]))


def _wanted(draft: Draft) -> Any:
    data = active(draft)
    key = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    return key, gr.Row(visible=bool(names_of(draft["recipe"])))


def _after_download(state: Any, times: int) -> Any:
    return times + 1 if state is not None and state.kind == "download" and state.status == "finished" else gr.skip()


def _one_more(times: int) -> int:
    return times + 1
