"""Files made to be saved: written into the data folder, handed out under a name that nobody can guess.

A file lies in ``downloads/<token>/<name>``. An address names a token and never a path: what is handed out is the one
regular file in that token's folder, as an attachment. Files of yesterday are removed.
"""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response

from merging.checkpoints.disk import write_whole, writing

ROUTE = "/amalgam/download/{token}"
TOKEN = re.compile(r"[0-9a-f]{32}")
KEPT = 24 * 3600
"""Seconds."""


def offer(data: Path, name: str, content: bytes) -> str:
    """Keep ``content`` to be saved as ``name``; the address to save it from. OutputError E_NO_SPACE, E_OUTPUT_WRITE."""
    folder = data / "downloads"
    forget_old(folder)
    token = secrets.token_hex(16)
    with writing(folder):
        (folder / token).mkdir(parents=True, mode=0o700)
    write_whole(folder / token / safe_name(name), content)
    return ROUTE.format(token=token)


def safe_name(name: str) -> str:
    """A file name from any text: letters, digits, dots and dashes, not starting with a dot."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-")[-80:] or "file"


def forget_old(folder: Path, now: float | None = None) -> None:
    if folder.is_dir():
        for one in folder.iterdir():
            if TOKEN.fullmatch(one.name) and one.lstat().st_mtime < (now or time.time()) - KEPT:
                shutil.rmtree(one, ignore_errors=True)


def download_route(data: Path) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        file = find(data, request.path_params["token"])
        if file is None:
            return PlainTextResponse("This file is gone. Make it again.", 404)
        headers = {
            "content-disposition": f"attachment; filename*=utf-8''{quote(file.name)}",
            "cache-control": "no-store",
        }
        return FileResponse(file, media_type="application/octet-stream", headers=headers)

    return answer


def find(data: Path, token: str) -> Path | None:
    """The file of a token; None if there is none."""
    folder = data / "downloads" / token
    if not TOKEN.fullmatch(token) or folder.is_symlink() or not folder.is_dir():
        return None
    files = [one for one in folder.iterdir() if one.is_file() and not one.is_symlink()]
    return files[0] if len(files) == 1 else None
