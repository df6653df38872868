"""A Hugging Face Hub on 127.0.0.1 for the real client, which can also misbehave.

``StandInHub().add("org/name", {"config.json": b"{}", …})`` publishes a repository. As on the real Hub, large
formats are "LFS" files (sha256) and the others git blobs (sha1), and large files are redirected to a second
origin (here another port) with a signed address. ``hub.faults["org/name", "file"]`` makes one file's answers
go wrong; ``hub.log`` holds every request.

Also as on the real Hub: the *description* of a gated repository is public, only its files are closed; a
private repository is 401 for strangers and 404 for other users.
"""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

PIECE = 1 << 14
SIGNATURE = "canary-signature-0123456789"


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]]  # commit -> file name -> content
    revisions: dict[str, str]  # branch or tag -> commit
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)  # tokens


@dataclass
class Fault:
    """What goes wrong with a file. Lists are consumed, one entry per GET; an empty list is no fault."""

    cut_after: list[int] = field(default_factory=list)  # close the connection after so many bytes of the body
    flip: list[int] = field(default_factory=list)  # position in the file of a byte to damage on its way
    status: list[int] = field(default_factory=list)  # answer with this status instead
    headers: dict[str, str] = field(default_factory=dict)  # added to every answer, e.g. a hostile ETag
    ignore_range: bool = False
    pause: float = 0.0  # seconds before each piece of 16 KiB
    more: bytes = b""  # sent after the end of the file
    claim: dict[str, Any] = field(default_factory=dict)  # replaces size or checksum in the listing


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    range: str
    authorization: str
    origin: str  # "hub" or "cdn"
    status: int


class StandInHub:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: dict[tuple[str, str], Fault] = {}
        self.describe_status: dict[str, list[int]] = {}  # repository -> statuses instead of its description
        self.describe_body: dict[str, bytes] = {}  # repository -> what is sent instead of its description
        self.retry_after = "0"
        self.users: set[str] = set()  # tokens that exist
        self.log: list[Seen] = []
        self.sent: dict[str, int] = {}  # path -> bytes of file bodies
        sockets = [socket.socket() for _ in range(2)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        self.url, self.cdn = (f"http://127.0.0.1:{one.getsockname()[1]}" for one in sockets)
        config = uvicorn.Config(self._application(), log_level="critical", lifespan="off", access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=(sockets,), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def close(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)

    def add(self, repo_id: str, files: dict[str, bytes], revision: str = "main", **settings: Any) -> str:
        """Publish ``files`` as a commit (its id is returned) and let ``revision`` point to it."""
        digest = hashlib.sha1()
        for name in sorted(files):
            digest.update(name.encode() + hashlib.sha256(files[name]).digest())
        repository = self.repositories.setdefault(repo_id, Repository({}, {}))
        repository.commits[digest.hexdigest()] = dict(files)
        repository.revisions[revision] = digest.hexdigest()
        for name, value in settings.items():
            setattr(repository, name, value)
        self.users |= repository.readers
        return digest.hexdigest()

    def requests(self, repo_id: str) -> list[str]:
        """``["GET /api/models/…", …]`` of this repository so far, commits shortened to ``@``."""
        lines = [f"{seen.method} {seen.path}" for seen in self.log if f"/{repo_id}" in seen.path]
        for commit in self.repositories[repo_id].commits if repo_id in self.repositories else ():
            lines = [line.replace(commit, "@") for line in lines]
        return lines

    # ----------------------------------------------------------------------------------------------- server

    def _application(self) -> FastAPI:
        application = FastAPI(openapi_url=None)

        @application.middleware("http")
        async def note(request: Request, call: Any) -> Any:
            answer = await call(request)
            origin = "cdn" if str(request.base_url).rstrip("/") == self.cdn else "hub"
            headers = request.headers
            self.log.append(
                Seen(
                    request.method,
                    request.url.path,
                    headers.get("range", ""),
                    headers.get("authorization", ""),
                    origin,
                    answer.status_code,
                )
            )
            return answer

        # Plain functions: each runs in a thread of its own, so that slow answers do not hold up others.
        @application.get("/api/models")
        def search(author: str = "", search: str = "") -> Any:
            found = [name for name, repository in self.repositories.items() if not repository.private]
            return [{"id": name} for name in found if name.startswith(author) and search in name]

        @application.get("/api/models/{owner}/{name}/auth-check")
        def may_read(owner: str, name: str, request: Request) -> Any:
            return self._refusal(f"{owner}/{name}", request, files=True) or {}

        @application.get("/api/models/{owner}/{name}")
        @application.get("/api/models/{owner}/{name}/revision/{revision:path}")
        def describe(owner: str, name: str, request: Request, revision: str = "main") -> Any:
            repo_id = f"{owner}/{name}"
            if statuses := self.describe_status.get(repo_id):
                return Response(b"busy", statuses.pop(0), {"Retry-After": self.retry_after})
            if refusal := self._refusal(repo_id, request, files=False):
                return refusal
            if repo_id in self.describe_body:
                return Response(self.describe_body[repo_id])
            repository = self.repositories[repo_id]
            commit = repository.revisions.get(revision, revision)
            if commit not in repository.commits:
                return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return {
                "id": repo_id,
                "sha": commit,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "siblings": [self._describe(repo_id, *file) for file in repository.commits[commit].items()],
            }

        @application.api_route("/{owner}/{name}/resolve/{revision}/{file:path}", methods=["GET", "HEAD"])
        def resolve(owner: str, name: str, revision: str, file: str, request: Request) -> Any:
            repo_id = f"{owner}/{name}"
            if refusal := self._refusal(repo_id, request, files=True):
                return refusal
            repository = self.repositories[repo_id]
            commit = repository.revisions.get(revision, revision)
            content = repository.commits.get(commit, {}).get(file)
            if content is None:
                return _error(404, "EntryNotFound", "Entry not found")
            fault = self.faults.get((repo_id, file), Fault())
            checksum = _checksum(file, content)
            headers = {"X-Repo-Commit": commit, "ETag": f'"{checksum}"', **fault.headers}
            if request.method == "GET" and fault.status:
                return Response(b"", fault.status.pop(0), {**headers, "Retry-After": self.retry_after})
            if is_large(file):
                headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
                place = f"{self.cdn}/store/{repo_id}/{commit}/{quote(file)}"
                headers["Location"] = f"{place}?signature={SIGNATURE}"
                return Response(b"", 302, headers)
            return self._send(request, content, fault, headers)

        @application.api_route("/store/{owner}/{name}/{commit}/{file:path}", methods=["GET", "HEAD"])
        def store(owner: str, name: str, commit: str, file: str, request: Request, signature: str) -> Any:
            if signature != SIGNATURE:
                return Response(b"", 403)
            content = self.repositories[f"{owner}/{name}"].commits[commit][file]
            fault = self.faults.get((f"{owner}/{name}", file), Fault())
            return self._send(request, content, fault, {"ETag": '"another"', **fault.headers})

        return application

    def _refusal(self, repo_id: str, request: Request, files: bool) -> Response | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.users:
            return _error(401, "", "Invalid credentials in Authorization header")
        repository = self.repositories.get(repo_id)
        if repository is None or (repository.private and token not in repository.readers):
            return _error(404 if token else 401, "RepoNotFound", "Repository not found")
        if files and repository.gated and token not in repository.readers:
            return _error(403 if token else 401, "GatedRepo", "Access to model is restricted.")
        return None

    def _describe(self, repo_id: str, file: str, content: bytes) -> dict[str, Any]:
        claim = self.faults.get((repo_id, file), Fault()).claim
        size, checksum = claim.get("size", len(content)), claim.get("checksum", _checksum(file, content))
        entry: dict[str, Any] = {"rfilename": file, "size": size, "blobId": _git_sha1(content)}
        if is_large(file):
            entry["lfs"] = {"sha256": checksum, "size": size, "pointerSize": 130}
        else:
            entry["blobId"] = checksum
        return entry

    def _send(self, request: Request, content: bytes, fault: Fault, headers: dict[str, str]) -> Response:
        start, status = 0, 200
        wanted = request.headers.get("range", "")
        if wanted and not fault.ignore_range:
            start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
            if start >= len(content):
                return Response(b"", 416, {"Content-Range": f"bytes */{len(content)}"})
            headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} | headers
        headers = {"Content-Length": str(len(content) + len(fault.more) - start)} | headers
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers)
        body = bytearray(content + fault.more)
        if fault.flip:
            body[fault.flip.pop(0)] ^= 0x10
        end = start + fault.cut_after.pop(0) if fault.cut_after else len(body)
        path = request.url.path

        def pieces() -> Iterator[bytes]:
            for position in range(start, min(end, len(body)), PIECE):
                time.sleep(fault.pause)
                piece = bytes(body[position : min(position + PIECE, end)])
                self.sent[path] = self.sent.get(path, 0) + len(piece)
                yield piece
            if end < len(body):
                raise ConnectionAbortedError("cut on purpose")

        return StreamingResponse(pieces(), status, headers)


def is_large(file: str) -> bool:
    return file.endswith((".safetensors", ".bin", ".model", "tokenizer.json"))


def _checksum(file: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_large(file) else _git_sha1(content)


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _error(status: int, code: str, message: str) -> Response:
    headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return JSONResponse({"error": message}, status, headers)
