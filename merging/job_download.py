"""The kind of job that brings models of the Hub to this computer, so that a look at them or a merge need not wait.

What was received before a stop or a kill is kept, and each file is checked against the Hub's checksum.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from pydantic import Field

from .errors import Cancelled, RecipeError
from .job_files import JobProgress
from .job_kind import Arguments, Event, Kind, parsed
from .job_pace import Tell, downloads
from .user_folders import cache_folder


class DownloadArguments(Arguments):
    models: list[str] = Field(min_length=1, max_length=256)
    """``org/name`` or ``org/name@revision``."""
    headers: bool = False
    """Bring no weights, only what tells whether the models fit (see ``checkpoints.hub_headers``)."""


def _check_download(arguments: dict[str, Any]) -> None:
    from .checkpoints.hub import parse_reference

    for model in parsed(DownloadArguments, arguments).models:
        if parse_reference(model).path is not None:
            what = f"{model[:200]!r} is on this computer already."
            raise RecipeError("E_RECIPE_FIELD", what, "Only models of the Hub are downloaded.", "Use it as it is.")


def _download(
    arguments: dict[str, Any], folder: Path, tell: Tell, event: Event, stop: threading.Event
) -> dict[str, Any]:  # fmt: skip
    """Event ``downloaded`` {model, reference, path} after each model. Result: {models: [the same], warnings}."""
    from .checkpoints.hub import resolve
    from .checkpoints.hub_headers import bring_headers

    wish = parsed(DownloadArguments, arguments)
    done: list[dict[str, str]] = []
    warnings: list[str] = []

    def looked_at(files: int, total: int, name: str) -> None:
        if stop.is_set():
            raise Cancelled()
        tell(JobProgress(files, total, "items", f"header of {name}"))

    for model in wish.models:
        if stop.is_set():
            raise Cancelled()
        if wish.headers:
            found = bring_headers(model, headers_folder(), looked_at)
        else:
            found = resolve(model, progress=downloads(tell, stop))
            warnings += found.warnings
        done.append({"model": model, "reference": found.reference, "path": str(found.path)})
        event({"event": "downloaded", **done[-1]})
    return {"models": done, "warnings": warnings}


def headers_folder() -> Path:
    return cache_folder("headers")


DOWNLOAD = Kind("Download", _check_download, _download)
