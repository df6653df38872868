"""The Experts page in a real browser: the demo by one click, cards by keyboard, models that do not fit, the Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..checkpoints.stand_in_hub import StandInHub
from .conftest import ROOT, Site

DEMO = ROOT / "assets" / "demo"
NAMES = "names => [...document.querySelectorAll('#expert-cards .model-head input[type=text]')].map(e => e.value).join() === names"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the base, and an expert with a layer too few."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(DEMO / "base", folder / "twin")
    shutil.copytree(DEMO / "experts" / "sort", folder / "short")
    state = load_file(folder / "short" / "model.safetensors")
    save_file({k: v for k, v in state.items() if ".layers.3." not in k}, folder / "short" / "model.safetensors")
    config = json.loads((folder / "short" / "config.json").read_text())
    (folder / "short" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    return folder


@pytest.fixture(scope="module")
def hub(models: Path) -> Iterator[StandInHub]:
    server = StandInHub()
    for name, folder in (("base", DEMO / "base"), ("sorter", DEMO / "experts" / "sort"), ("short", models / "short")):
        server.add(f"some-org/{name}", {file.name: file.read_bytes() for file in folder.iterdir()})
    yield server
    server.close()


@pytest.fixture(scope="module")
def fresh(start: Callable[..., Site], hub: StandInHub, tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("hub")
    return start(HF_ENDPOINT=hub.url, HF_HOME=str(folder / "hf"), AMALGAM_CACHE=str(folder / "cache"))


def findings(page: Any, part: str) -> None:
    page.wait_for_function("part => document.querySelector('#findings')?.textContent.includes(part)", arg=part)


def add_from_path(page: Any, path: Path, name: str) -> None:
    if not page.is_visible("#path-look"):
        page.click("#start-path")
    page.fill("#path input, #path textarea", str(path))
    page.click("#path-look")
    page.click(f'#path-found button[aria-label="Add as expert: {name}"]')
    page.wait_for_selector(f'#expert-cards input[aria-label="Name of {name}"]')


def test_the_demo_is_one_click_and_its_cards_obey_the_keyboard(window: Callable[..., Any], fresh: Site) -> None:
    page = window(fresh)
    page.click("#start-demo")
    page.wait_for_function(NAMES, arg="reverse,sort,unique,rotate")
    findings(page, "Nothing stands in the way")
    assert "862 k parameters" in page.inner_text("#expert-cards") and "Ready to merge" in page.inner_text(
        "#recipe-card"
    )
    assert "The demo is ready" in page.inner_text("#message")

    page.focus('button[aria-label="Move unique up"]')
    page.keyboard.press("Enter")
    page.wait_for_function(NAMES, arg="reverse,unique,sort,rotate")
    page.keyboard.press("Space")  # the focus went along
    page.wait_for_function(NAMES, arg="unique,reverse,sort,rotate")
    page.wait_for_function("document.activeElement.getAttribute('aria-label') === 'Move unique down'")

    page.focus('input[aria-label="Name of sort"]')
    page.keyboard.press("Control+A")
    page.keyboard.type("<i>sorter</i>")
    page.keyboard.press("Tab")
    page.wait_for_function(NAMES, arg="unique,reverse,<i>sorter</i>,rotate")
    page.wait_for_function("document.activeElement.getAttribute('aria-label') === 'Weight of <i>sorter</i>'")
    page.keyboard.type("0.25")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#recipe-card').textContent.includes('0.25')")
    page.focus('input[aria-label="rotate takes part"]')
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('#recipe-card').textContent.includes('Experts (3)')")

    page.fill('input[aria-label="Name of unique"]', "reverse")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#message').textContent.includes('Another expert is called')")
    page.wait_for_function(NAMES, arg="unique,reverse,<i>sorter</i>,rotate")
    page.fill("#bulk-weight input, #bulk-weight textarea", "0.4")
    page.click("#bulk-apply")
    page.wait_for_function("document.querySelectorAll('#expert-cards input[type=number][value=\"0.4\"]').length === 3")


def test_what_does_not_fit_is_told_from_headers_and_settled_by_a_click(
    window: Callable[..., Any], fresh: Site, models: Path
) -> None:
    page = window(fresh)
    page.click("#start-demo")
    page.wait_for_function(NAMES, arg="reverse,sort,unique,rotate")
    page.click("#start-path")
    page.fill("#path input, #path textarea", str(models) + "s")
    page.click("#path-look")
    page.wait_for_function("document.querySelector('#message').textContent.includes('Did you mean')")
    add_from_path(page, models / "short", "short")
    findings(page, "short does not fit the base")
    assert "It has 3 layers, the base has 4." in page.inner_text("#findings")
    page.click('#findings button:text-is("Remove short")')
    page.wait_for_function(NAMES, arg="reverse,sort,unique,rotate")
    findings(page, "Nothing stands in the way")
    add_from_path(page, models / "twin", "twin")
    findings(page, "twin equals the base")
    page.click('#findings button:text-is("Switch twin off")')
    findings(page, "Nothing stands in the way")
    page.click("#undo")
    findings(page, "twin equals the base")


def test_models_of_the_hub_are_checked_before_they_are_downloaded(
    window: Callable[..., Any], fresh: Site, hub: StandInHub
) -> None:
    page = window(fresh)
    page.click("#start-hub")
    page.wait_for_selector("#hub-cached .hint")
    asked = len(hub.log)
    assert asked == 0  # nobody was asked before the button was pressed
    page.fill("#hub-words input, #hub-words textarea", "s")
    page.click("#hub-search")
    page.click('#hub-found button[aria-label="Use as base: some-org/base"]')
    page.wait_for_selector("#expert-cards .base")
    for name in ("sorter", "short"):
        page.click(f'#hub-found button[aria-label="Add as expert: some-org/{name}"]')
        page.wait_for_selector(f'#expert-cards input[aria-label="Name of {name}"]')
    findings(page, "Not on this computer yet")
    page.click('#findings button:text-is("Look at the headers on the Hub")')
    findings(page, "short does not fit the base")
    assert sum(hub.sent.get(path, 0) for path in hub.sent if path.endswith("model.safetensors")) < 3_000_000
    page.click('#findings button:text-is("Remove short")')
    findings(page, "Still on the Hub: some-org/base, some-org/sorter.")
    page.click('#findings button:text-is("Download now")')
    page.wait_for_function("!document.querySelector('#findings').textContent.includes('Still on the Hub')")
    findings(page, "Nothing stands in the way")
