"""The workbench: one page with tabs, and beside them a sidebar with what must always be in sight."""

from __future__ import annotations

import html
import importlib
import importlib.util
import json

import gradio as gr

from .context import ROOT, App
from .keys import KEYS
from .shell import Shell

PAGES = (
    ("experts", "Experts"),
    ("analyse", "Analyse"),
    ("merge", "Merge"),
    ("evaluate", "Evaluate"),
    ("runs", "Runs"),
    ("settings", "Settings"),
)
"""(id of the tab and name of the module in ui/pages, title), in the order in which a merge is made."""


def theme() -> gr.themes.Base:
    """Soft, with the colours that keep enough contrast in light and dark, and the system's own fonts."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
    return gr.themes.Soft(
        primary_hue="indigo",
        neutral_hue="slate",
        font=fonts,
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
        spacing_size="sm",
        radius_size="md",
        text_size="md",
    ).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_600",
        button_primary_text_color="white",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        button_border_width="1px",
        block_title_background_fill="none",
        block_title_background_fill_dark="none",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        block_title_text_weight="500",
        block_title_padding="0",
        block_label_text_color="*primary_700",
        checkbox_label_background_fill_selected="*primary_700",
        checkbox_background_color_selected="*primary_700",
        checkbox_border_width="1px",
        checkbox_border_color="*neutral_400",
        checkbox_border_color_dark="*neutral_500",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_700",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        shadow_drop="none",
        shadow_drop_lg="none",
    )


def head() -> str:
    """What the page's head needs besides Gradio's: looks, keys, theme and tabs. (Styles that are given to Gradio as
    such are rewritten by it, and then those for the whole page no longer hold.)"""
    assets = ROOT / "assets"
    styles = [assets / "workbench.css", *(assets / "pages" / f"{name}.css" for name, _ in PAGES)]
    style = "\n".join(file.read_text("utf-8") for file in styles if file.exists())
    script = (assets / "workbench.js").read_text("utf-8")
    keys = json.dumps(KEYS).replace("<", "\\u003c")
    return (
        f'<meta name="color-scheme" content="light dark"><style>{style}</style>'
        f"<script>window.amalgamKeys = {keys};\n{script}</script>"
    )


def build(app: App) -> gr.Blocks:
    with gr.Blocks(title="Amalgam", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as demo:
        shell = Shell(app)
        with gr.Row(elem_id="frame", equal_height=False):
            with gr.Column(elem_id="side", min_width=0):
                gr.HTML(_brand(app), padding=False, elem_id="brand")
                shell.sidebar()
            with gr.Column(elem_id="center", min_width=0):
                shell.message = gr.HTML(elem_id="message", padding=False)
                with gr.Tabs(elem_id="pages") as shell.tabs:
                    _build_pages(app, shell)
            with gr.Column(elem_id="text-panel", min_width=0):
                shell.yaml_panel()
        shell.connect(demo)
        _quiet(demo, shell)
    return demo


def _quiet(demo: gr.Blocks, shell: Shell) -> None:
    """Every event tells each of its outputs, and all that ever were one, that it is pending and then done: with a few
    hundred components that takes the browser longer than the event. Nothing shows it, so only one of them is told."""
    for function in demo.fns.values():
        if function.show_progress == "hidden":
            function.show_progress_on = [shell.message]


def _build_pages(app: App, shell: Shell) -> None:
    for name, title in PAGES:
        if importlib.util.find_spec(f"ui.pages.{name}") is not None:
            page = importlib.import_module(f"ui.pages.{name}")
            with gr.Tab(title, id=name, elem_id=f"page-{name}") as shell.pages[name]:
                page.build(app, shell)


def _brand(app: App) -> str:
    place = "Space" if app.on_space else "offline" if app.offline else "on this computer"
    return f'<h1 class="brand"><b>Amalgam</b> <span class="badge">{html.escape(place)}</span></h1>'
