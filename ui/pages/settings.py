"""Settings: how the workbench looks and works here, what it keeps, and what it never does."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..context import App
from ..draft import Draft, set_parameter
from ..shell import Shell


def build(app: App, shell: Shell) -> None:
    gr.Markdown("## Settings")
    types = [("as in the base", ""), *((name, name) for name in ("float16", "bfloat16", "float32", "float64"))]
    dtype = gr.Dropdown(types, value="", label="Number type of the merged weights", interactive=True, elem_id="dtype")
    shell.edit(dtype.input, set_dtype, dtype)
    shell.on_draft(shown_dtype, dtype)


def set_dtype(draft: Draft, name: str) -> Draft:
    return set_parameter(draft, ("dtype",), name or None)


def shown_dtype(draft: Draft) -> Any:
    return draft["recipe"].get("dtype") or ""
