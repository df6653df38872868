"""HTML of our own making, without Gradio's style for prose (which centres captions and draws boxes around cells)."""

from __future__ import annotations

from typing import Any

import gradio as gr


def plain(value: str = "", **others: Any) -> gr.HTML:
    return gr.HTML(value, padding=False, apply_default_css=False, **others)
