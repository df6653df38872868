"""Which models may be named: at home any, on a Space (where strangers are) those of the Hub and the demo's."""

from __future__ import annotations

import os
import re
from pathlib import Path

from merging.checkpoints.hub import Resolved
from merging.checkpoints.hub_cache import find_here
from merging.checkpoints.hub_headers import find_headers
from merging.errors import HubError, InputError
from merging.job_download import headers_folder

from .context import App
from .draft import DEMO

_PATH = re.compile(r"[./~]|[A-Za-z]:(?!//)")


def check_permitted(app: App, reference: str) -> None:
    """InputError E_PATH for a path of this machine that strangers asked for, whether it exists or not."""
    if not app.on_space:
        return
    path_like = _PATH.match(reference) or "\\" in reference or reference.endswith(".safetensors")
    if (path_like or os.path.exists(reference)) and not is_demo(reference):
        raise InputError(
            "E_PATH",
            "Paths cannot be used here.",
            "This workbench runs on a server for everybody.",
            "Choose a model of the Hub, or run Amalgam on your own computer.",
        )


def is_demo(reference: str) -> bool:
    try:
        return Path(reference).resolve().is_relative_to(DEMO.resolve())
    except (OSError, ValueError, RuntimeError):
        return False


def find_permitted(app: App, reference: str) -> Resolved:
    """Where a model lies on this machine, if it may be used; or its headers, for a look at them."""
    check_permitted(app, reference)
    try:
        return find_here(reference)
    except HubError as error:
        headers = find_headers(reference, headers_folder()) if error.code == "E_HUB_OFFLINE" else None
        if headers is None:
            raise
        return headers
