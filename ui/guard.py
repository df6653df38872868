"""Who may talk to the workbench: only its own page.

A page of somebody else in the same browser can send requests to 127.0.0.1, and by re-pointing its own name there
(DNS rebinding) even read the answers. Two checks stop both: the Host must be one of ours, and the Origin, which
browsers add to everything but plain reading, must be that same host. Whatever changes something must carry one.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response

READING = ("GET", "HEAD")
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'{parents}"
)
"""Even if a name with markup got through, it could call nobody. (Gradio's templates need 'unsafe-eval'.)"""


def allowed_hosts(host: str) -> set[str]:
    """Names by which this server may be addressed. ``AMALGAM_HOSTS`` adds some, for a proxy in front of it. "*ip":
    any address in digits, which no stranger's name can be."""
    names = {"localhost", "127.0.0.1", "::1", host}
    names |= {name.strip().lower() for name in os.environ.get("AMALGAM_HOSTS", "").split(",") if name.strip()}
    names |= {name.lower() for name in os.environ.get("SPACE_HOST", "").split(",") if name}
    if host in ("0.0.0.0", "::"):
        names |= {"*ip", socket.gethostname().lower()}
    return names - {"0.0.0.0", "::"}


class Guard:
    """An ASGI app around another one; it refuses with 403 what does not come from our own page."""

    def __init__(self, app: Any, hosts: set[str]) -> None:
        self.app, self.hosts = app, hosts
        parents = " https://huggingface.co" if os.environ.get("SPACE_ID") else ""
        self.headers = [
            (b"content-security-policy", POLICY.format(parents=parents).encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"same-origin"),
        ]

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        why = self.refusal(scope)
        if why:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await PlainTextResponse(f"Refused: {why}.", 403)(scope, receive, send)
            return

        async def with_headers(event: Any) -> None:
            if event["type"] == "http.response.start":
                event = {**event, "headers": [*event.get("headers", ()), *self.headers]}
            await send(event)

        await self.app(scope, receive, with_headers)

    def refusal(self, scope: Any) -> str:
        """Why this request is refused; "" if it is not."""
        headers: dict[bytes, list[str]] = {}
        for key, value in scope["headers"]:
            headers.setdefault(key.lower(), []).append(value.decode("latin-1").lower())
        host, origin = headers.get(b"host", []), headers.get(b"origin", [])
        if len(host) != 1 or not self.is_ours(host[0]):
            return "this server does not go by that name"
        if not origin:
            changes = scope["type"] == "websocket" or scope["method"] not in READING
            return "requests that change something must say where they come from" if changes else ""
        parts = urlsplit(origin[0]) if len(origin) == 1 else None
        if parts is None or parts.scheme not in ("http", "https") or not self.same(parts.netloc, host[0]):
            return "the request comes from another page"
        if headers.get(b"sec-fetch-site", ["same-origin"]) not in (["same-origin"], ["none"]):
            return "the request comes from another site"
        return ""

    def is_ours(self, netloc: str) -> bool:
        name = host_of(netloc)
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return "*ip" in self.hosts

    def same(self, origin: str, host: str) -> bool:
        """The very same host and port; behind the proxy of a Space, its public name."""
        space = {name.lower() for name in os.environ.get("SPACE_HOST", "").split(",") if name}
        return origin == host or (host_of(origin) in space and self.is_ours(host))


def guarded(hosts: set[str]) -> Callable[[Any], Any]:
    """A lifespan that puts the guard around everything else that the app does, before it answers the first request.
    (As a middleware of the app it would stand behind Gradio's own, which lets other pages read our refusals.)"""

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        app.middleware_stack = Guard(app.middleware_stack, hosts)
        yield

    return lifespan


def host_of(netloc: str) -> str:
    """ "[::1]:7860" → "::1"; "" for anything that is no host and port."""
    try:
        parts = urlsplit(f"//{netloc}")
        more = "@" in netloc or parts.path or parts.query or parts.fragment or parts.port == 0
        return "" if more else (parts.hostname or "")
    except ValueError:
        return ""


def script_route(file: Path) -> Callable[[Request], Awaitable[Response]]:
    """Hands out one fixed file of an installed package, whatever the address asks for."""

    async def answer(request: Request) -> Response:
        return FileResponse(file, media_type="text/javascript", headers={"cache-control": "public, max-age=86400"})

    return answer
