"""Files to be saved: under names that nobody can guess, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from ui.downloads import KEPT, ROUTE, download_route, find, forget_old, offer, safe_name


def client(data: Path) -> TestClient:
    return TestClient(Starlette(routes=[Route(ROUTE, download_route(data))]))


def test_what_is_offered_can_be_saved(tmp_path: Path) -> None:
    address = offer(tmp_path, "analysis of <a>.html", b"<h1>hello</h1>")
    answer = client(tmp_path).get(address)
    assert answer.status_code == 200 and answer.content == b"<h1>hello</h1>"
    assert answer.headers["content-disposition"].startswith("attachment") and "text/html" not in str(answer.headers)


def test_nothing_else_can(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    token = offer(tmp_path, "a", b"1").rsplit("/", 1)[-1]
    other = "0" * 32
    (tmp_path / "downloads" / other).symlink_to(tmp_path)
    linked = "1" * 32
    (tmp_path / "downloads" / linked).mkdir()
    (tmp_path / "downloads" / linked / "a").symlink_to(tmp_path / "secret")
    for wrong in ("..", "../..", "%2e%2e%2fsecret", token[:-1], token.upper() + "x", other, linked, "f" * 32, "secret"):
        assert client(tmp_path).get(f"/amalgam/download/{wrong}").status_code == 404, wrong
        assert find(tmp_path, wrong) is None
    assert find(tmp_path, token) is not None


def test_names_are_made_safe() -> None:
    assert safe_name("../../etc/passwd") == "etc-passwd"
    assert safe_name("...") == "file" and safe_name("a b<script>.json") == "a-b-script-.json"


def test_yesterdays_files_are_forgotten(tmp_path: Path) -> None:
    token = offer(tmp_path, "a", b"1").rsplit("/", 1)[-1]
    folder = tmp_path / "downloads"
    forget_old(folder)
    assert find(tmp_path, token) is not None
    os.utime(folder / token, (0, 0))
    (folder / "not ours").mkdir()
    os.utime(folder / "not ours", (0, 0))
    forget_old(folder, KEPT + 1)
    assert find(tmp_path, token) is None and (folder / "not ours").is_dir()
