"""The real program and a real browser.

``page`` is a fresh browser window on the workbench with the demo experts. When the test is over it must have asked no
other computer for anything, and nothing must have failed in its scripts. ``start`` starts programs with other options,
``window`` opens more windows on them.

Chromium is taken from CHROMIUM, from the usual places, or from Playwright. Without one these tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALL = f"{sys.executable} -m playwright install --with-deps chromium"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
HARMLESS = ("AbortError", "net::ERR_ABORTED", "Connection errored out", "Failed to load resource: net::ERR_CONNECTION")
"""Said when a window is closed or loaded again while it waits for an answer."""


@dataclass
class Site:
    url: str
    data: Path
    log: Path
    process: subprocess.Popen
    seconds: float
    """From the start to the address."""


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-dev.txt")
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_api.sync_playwright() as playwright:
        try:
            running = playwright.chromium.launch(executable_path=found, args=FLAGS)
        except sync_api.Error as error:
            pytest.skip(f"NO BROWSER, so the workbench is not tested. Install one: {INSTALL}\n{str(error)[:300]}")
        yield running
        running.close()


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Site]]:
    """``start("--demo", program="app.py", data=folder)``: the program at work, with a folder of its own."""
    sites: list[Site] = []

    def begin(*options: str, program: str = "app.py", data: Path | None = None, **environment: str) -> Site:
        folder = tmp_path_factory.mktemp("workbench")
        data, log = data or folder / "data", folder / "log"
        more = ["--no-browser"] if program == "app.py" else []
        command = [sys.executable, program, *more, "--data-dir", str(data), *options]
        began = time.monotonic()
        with open(log, "w") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": ".", **environment}
            )
        while time.monotonic() < began + 120 and process.poll() is None:
            url = next((word for word in log.read_text().split() if word.startswith("http://")), "")
            if url:
                sites.append(Site(url, data, log, process, time.monotonic() - began))
                return sites[-1]
            time.sleep(0.05)
        process.kill()
        raise AssertionError(f"it did not start: {log.read_text()}")

    yield begin
    for site in sites:
        if site.process.poll() is None:
            site.process.terminate()
    for site in sites:
        site.process.wait(20)


@pytest.fixture(scope="module")
def site(start: Callable[..., Site]) -> Site:
    return start("--demo")


@pytest.fixture
def window(browser: Any) -> Iterator[Callable[..., Any]]:
    """``window(site, "/#merge", color_scheme="dark")``: a window of a browser that has never been here before; with
    ``beside=page`` another window of the same browser."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def opened(site: Site, place: str = "/", *, beside: Any = None, **how: Any) -> Any:
        context = (
            beside.context if beside else browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **how})
        )
        if not beside:
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)  # test machines are busy
        page.on("request", lambda request: outside(site, request.url))
        page.on("console", lambda message: message.type == "error" and complain(message.text))
        page.on("pageerror", lambda error: complain(str(error)))
        page.goto(site.url + place)
        if site.log.read_text().startswith("Amalgam"):
            ready(page)
        return page

    def outside(site: Site, url: str) -> None:
        if not url.startswith((site.url, "data:", "blob:")):
            wrong.append(f"asked for {url}")

    def complain(text: str) -> None:
        if not any(part in text for part in HARMLESS):
            wrong.append(text)

    yield opened
    for context in contexts:
        context.close()
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def page(window: Callable[..., Any], site: Site) -> Any:
    return window(site)


def ready(page: Any) -> None:
    """Wait until the draft is shown."""
    page.wait_for_selector("#recipe-card .card")
    page.wait_for_selector("#machine-card .card")
    page.wait_for_selector("#job-card .card")
