"""The workbench: one page with tabs, and beside them a sidebar with what must always be in sight."""

from __future__ import annotations

import html
import importlib
import importlib.util
import json

import gradio as gr

from .context import ROOT, App
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

KEYS = (
    ("1 … 6", "Open a page"),
    ("Ctrl+Enter", "Do the main thing of the page; in the recipe's text: apply it"),
    ("Ctrl+Z", "Undo the last change of the recipe"),
    ("Ctrl+Shift+Z", "Redo it"),
    ("Arrow keys", "Move in a chart; Enter chooses"),
    ("Esc", "Stop the job that is running, after a question"),
    ("?", "This list"),
)


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
        block_title_text_color="*primary_700",
        block_label_text_color="*primary_700",
    )


def css() -> str:
    return (ROOT / "assets" / "workbench.css").read_text("utf-8")


def head() -> str:
    """What the page's head needs besides Gradio's: keys, theme and tabs."""
    script = (ROOT / "assets" / "workbench.js").read_text("utf-8")
    keys = json.dumps(KEYS).replace("<", "\\u003c")
    return f'<meta name="color-scheme" content="light dark"><script>window.amalgamKeys = {keys};\n{script}</script>'


def build(app: App) -> gr.Blocks:
    with gr.Blocks(title="Amalgam", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as demo:
        shell = Shell(app)
        with gr.Sidebar(width=310, elem_id="side"):
            gr.HTML(_brand(app), padding=False)
            shell.sidebar()
        with gr.Sidebar(position="right", open=False, width=460, elem_id="text-side"):
            shell.yaml_panel()
        shell.message = gr.HTML(elem_id="message", padding=False)
        with gr.Tabs(elem_id="pages") as shell.tabs:
            for name, title in PAGES:
                if importlib.util.find_spec(f"ui.pages.{name}") is not None:
                    page = importlib.import_module(f"ui.pages.{name}")
                    with gr.Tab(title, id=name, elem_id=f"page-{name}"):
                        page.build(app, shell)
        shell.connect(demo)
    return demo


def _brand(app: App) -> str:
    place = "Space" if app.on_space else "offline" if app.offline else "on this computer"
    return f'<h1 class="brand"><b>Amalgam</b> <span class="badge">{html.escape(place)}</span></h1>'
