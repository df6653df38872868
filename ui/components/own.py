"""For component classes of our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from gradio import component_meta


@contextmanager
def no_stub_file() -> Iterator[None]:
    """Gradio writes a .pyi file beside the source of each class that is derived from a component: not of these, which
    may lie where nobody can or should write. ``with no_stub_file(): class Mine(gr.HTML): …``"""
    write, component_meta.create_or_modify_pyi = component_meta.create_or_modify_pyi, cast(Any, _nothing)
    try:
        yield
    finally:
        component_meta.create_or_modify_pyi = write


def _nothing(*_: object) -> None:
    pass
