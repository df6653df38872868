"""Settings: how the workbench looks and works here, what it keeps on the disk, and what it never does."""

from __future__ import annotations

import html
import os
import platform
from importlib import metadata
from typing import Any

import gradio as gr

from merging.cores import available_cores
from merging.version import VERSION

from .. import storage
from ..components import cards
from ..context import App
from ..draft import Draft, set_parameter
from ..keys import KEYS
from ..machine import devices
from ..shell import Shell

PRIVACY = """
- Nothing leaves this computer unless you ask for it: a search on the Hub, a download, an upload. There are no usage
  statistics, no fonts, scripts or pictures from elsewhere, and no check for new versions.
- Models are read as data. Code that comes with a model is never run, and pickle files are never opened.
- A Hub token stays where `hf auth login` put it. It is never asked for here, and never written into a recipe, a run, a
  log, a link or the browser.
- The browser keeps a copy of the recipe that you are writing, the theme, and which run you looked at. *Copy link* puts
  the recipe with the names and paths of its models into the link, and no weights.
"""
TYPES = ("float16", "bfloat16", "float32", "float64")
LOCKED = "Everybody who uses this Space shares these settings, so they cannot be changed here."
SHOW_THEME = "() => window.amalgamTheme()"
SET_THEME = "(choice) => window.amalgamTheme(choice)"


def build(app: App, shell: Shell) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            _appearance(shell)
            _computing(app, shell)
        with gr.Column(min_width=320):
            _kept(app, shell)
            gr.Markdown("### Privacy\n" + PRIVACY)
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            gr.HTML(f'<h3>Keys</h3><div class="keys"><dl>{_pairs(KEYS)}</dl></div>', padding=False)
        with gr.Column(min_width=320):
            gr.HTML(f'<h3>Versions</h3><div class="keys"><dl>{_pairs(versions())}</dl></div>', padding=False)


def _appearance(shell: Shell) -> None:
    gr.Markdown("### Appearance")
    choices = [("As the system", "system"), ("Light", "light"), ("Dark", "dark")]
    theme = gr.Radio(choices, value="system", label="Theme", interactive=True, elem_id="theme")
    theme.input(None, [theme], [theme], js=SET_THEME, api_visibility="private")
    shell.page("settings").select(None, None, [theme], js=SHOW_THEME, api_visibility="private")


def _computing(app: App, shell: Shell) -> None:
    gr.Markdown("### Computing")
    locked: dict[str, Any] = {"interactive": not app.on_space, "info": LOCKED if app.on_space else None}
    device = gr.Dropdown(devices(), value=app.device, label="Device", elem_id="device", filterable=False, **locked)
    threads = gr.Slider(
        0, available_cores(), app.threads, step=1, label="Threads (0: one per core)", elem_id="threads", **locked
    )
    dtype = gr.Dropdown(
        [("As in the base", ""), *((name, name) for name in TYPES)],
        value="",
        label="Number type of the merged weights (part of the recipe)",
        interactive=True,
        filterable=False,
        elem_id="dtype",
    )
    offline = gr.Checkbox(app.offline, label="Work offline: never ask the Hub", elem_id="offline", **locked)
    shell.edit(dtype.input, set_dtype, dtype)
    shell.on_draft(shown_dtype, dtype)
    if not app.on_space:
        shell.act(device.input, _Keep(app, "device"), device)
        shell.act(threads.input, _Keep(app, "threads"), threads, trigger_mode="always_last")
        shell.act(offline.input, _Keep(app, "offline"), offline)


class _Keep:
    """Sets one setting of the app and remembers it for the next start."""

    def __init__(self, app: App, name: str) -> None:
        self.app, self.name, self.__name__ = app, name, f"keep_{name}"

    def __call__(self, value: Any) -> None:
        setattr(self.app, self.name, value)
        if self.name == "offline":
            go_offline(value)
        self.app.remember(**{self.name: value})


def go_offline(on: bool) -> None:
    """For everything that is started from now on; what runs already asks nobody new."""
    if on:
        os.environ["HF_HUB_OFFLINE"] = "1"
    else:
        os.environ.pop("HF_HUB_OFFLINE", None)


def _kept(app: App, shell: Shell) -> None:
    gr.Markdown("### On this disk")
    table = gr.HTML(elem_id="kept", padding=False)
    if app.on_space:
        shell.act(shell.page("settings").select, given(table_of, app), (), table)
        return
    with gr.Row(elem_classes="tight"):
        part = gr.Dropdown([], label="Kept results to delete", interactive=True, filterable=False, elem_id="cache-part")
        with gr.Column(min_width=120, scale=0):
            ask = gr.Button("Delete…", size="sm", elem_id="cache-delete")
            yes = gr.Button("Yes, delete", size="sm", variant="stop", visible=False, elem_id="cache-yes")
            no = gr.Button("Keep", size="sm", visible=False, elem_id="cache-no")
    buttons = [ask, yes, no]

    def shown() -> Any:
        parts = storage.cache_parts()
        chosen = gr.Dropdown(choices=parts, value=parts[0] if parts else None)
        return table_of(app), chosen, *_asking(False, bool(parts))

    def delete(name: str | None) -> Any:
        freed = storage.purge(name or "")
        return cards.message("ok", f"{cards.size(freed)} were freed."), *shown()

    shell.act(shell.page("settings").select, shown, (), [table, part, *buttons])
    shell.act(ask.click, given(_asking, True, True), (), buttons)
    shell.act(no.click, given(_asking, False, True), (), buttons)
    shell.act(yes.click, delete, part, [shell.message, table, part, *buttons])


def _asking(asking: bool, possible: bool) -> Any:
    return (
        gr.Button("Delete…" if possible else "Nothing to delete", visible=not asking, interactive=possible),
        gr.Button(visible=asking),
        gr.Button(visible=asking),
    )


def given(fn: Any, *values: Any) -> Any:
    """``fn`` with its first values given."""

    def call(*more: Any) -> Any:
        return fn(*values, *more)

    return call


def table_of(app: App) -> str:
    """What is kept, where, and how much of it, as a table."""
    rows = [("Runs and settings", app.data)]
    rows += [(f"Kept results: {part}", storage.cache_root() / part) for part in storage.cache_parts()]
    lines = []
    for name, folder in rows:
        use = storage.use_of(folder)
        amount = f"{cards.size(use.bytes)}{'' if use.complete else ' or more'} in {use.files:,} files"
        place = "" if app.on_space else f"<br><small>{html.escape(str(folder))}</small>"
        lines.append(f"<tr><td>{html.escape(name)}{place}</td><td>{amount}</td></tr>")
    note = (
        "History is lost when this Space restarts, unless AMALGAM_DATA names a volume that stays."
        if app.on_space
        else "Kept results only save time: what is deleted is computed again when it is needed. The data folder is "
        "chosen at the start, with --data-dir or AMALGAM_DATA."
    )
    return f'<table class="plain"><tbody>{"".join(lines)}</tbody></table><p class="hint">{note}</p>'


def set_dtype(draft: Draft, name: str) -> Draft:
    return set_parameter(draft, ("dtype",), name or None)


def shown_dtype(draft: Draft) -> Any:
    return draft["recipe"].get("dtype") or ""


def versions() -> list[tuple[str, str]]:
    """Of this program and of what it stands on, without importing it."""
    found = [("Amalgam", VERSION), ("Python", platform.python_version()), ("System", platform.platform(terse=True))]
    for name in ("torch", "transformers", "safetensors", "huggingface_hub", "gradio", "plotly"):
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append((name, "not installed"))
    return found


def _pairs(pairs: Any) -> str:
    return "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in pairs)
