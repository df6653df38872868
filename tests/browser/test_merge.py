"""The Merge page in a real browser: methods, settings, layers, preview and saving, by mouse and by keyboard."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from .conftest import Site

LAMBDA = '[aria-label="λ (lambda)"]'
DONE = """() => { const t = document.querySelector('#preview-state').textContent;
  return t.includes('items scored in') && !t.includes('…'); }"""


@pytest.fixture
def merge(window: Callable[..., Any], site: Site) -> Any:
    page = window(site, "/#merge")
    page.wait_for_selector(".method-card.chosen")
    page.wait_for_selector("#preview:not([disabled])")
    return page


def until(page: Any, selector: str, part: str) -> None:
    page.wait_for_function(
        "([s, p]) => (document.querySelector(s)?.textContent ?? '').includes(p)", arg=[selector, part]
    )


def test_methods_and_settings_by_keyboard(merge: Any) -> None:
    merge.focus("#method input[value=pcb]")
    merge.keyboard.press("ArrowUp")
    until(merge, "#suggestion", "DARE + TIES has the suggested settings")
    until(merge, "#recipe-card", "DARE + TIES")
    merge.wait_for_function("document.activeElement.value === 'dare_ties'")
    assert "arXiv 2311.03099" in merge.inner_text(".method-card.chosen")

    slider = '[aria-label="λ (lambda), slider"]'
    merge.focus(slider)
    merge.keyboard.press("ArrowRight")
    until(merge, "#recipe-card", "lambda 0.45")
    assert merge.input_value(LAMBDA) == "0.45"
    until(merge, "#formula", "0.45·")
    until(merge, "#suggestion", "settings of your own")
    merge.click("#undo")
    until(merge, "#recipe-card", "lambda 0.4")
    merge.wait_for_function("s => document.querySelector(s).value === '0.4'", arg=LAMBDA)

    merge.fill('[aria-label="density of all experts"]', "1")
    until(merge, "#method-form", "1 keeps every entry")
    merge.fill('[aria-label="density of sort"]', "7")
    until(merge, "#method-form", "at least 0 and at most 1")


def test_a_method_that_does_not_fit_says_why(merge: Any) -> None:
    merge.check("#method input[value=slerp]")
    merge.wait_for_selector("#preview[disabled]")
    merge.wait_for_selector("#merge-save[disabled]")
    assert "exactly 1 expert" in merge.inner_text("#preview-why")
    assert "exactly 1 expert" in merge.inner_text("#merge-why")
    assert "this takes exactly 1 expert" in merge.inner_text(".method-card.chosen")


def test_settings_by_layer(merge: Any) -> None:
    merge.click("#by-layer button")
    stop = merge.wait_for_selector('#curves circle[aria-label="weight of sort, layer 0"]')
    stop.focus()
    for key in ("ArrowRight", "ArrowDown", "PageDown"):
        merge.keyboard.press(key)
    until(merge, "#curves", "sort, layer 1: weight 0.75")
    until(merge, "#recipe-card", "by layer")
    point = "document.activeElement"
    assert merge.evaluate(f"{point}.getAttribute('role') + {point}.getAttribute('aria-valuenow')") == "slider0.75"

    merge.fill("#range-first input", "2")
    merge.fill("#range-last input", "3")
    merge.fill("#range-value input", "0.5")
    merge.click("#range-apply")
    until(merge, "#method-form", "by layer…")
    merge.wait_for_function("document.querySelectorAll('#method-form tbody button').length === 4")
    merge.click("#by-layer summary")
    until(merge, "#by-layer table", "0.75")
    rows = merge.eval_on_selector_all(
        "#by-layer tbody tr", "rows => rows.map(r => r.innerText.split(/\\s+/).join(' '))"
    )
    assert rows == ["0 1 1 1 1", "1 1 0.75 1 1", "2 0.5 0.5 0.5 0.5", "3 0.5 0.5 0.5 0.5"]

    merge.focus("#layer-heat .plot-area")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Enter"):
        merge.keyboard.press(key)
    merge.wait_for_function("document.querySelector('#range-value input').value === '0.75'")
    assert merge.input_value("#range-first input") == "1" == merge.input_value("#range-last input")


def test_the_preview_follows_the_slider_and_writes_nothing(merge: Any, site: Site) -> None:
    before = {path.name for path in site.data.rglob("*.safetensors")}
    merge.click("#preview")
    merge.wait_for_function(DONE)
    scores = merge.inner_text("#preview-scores table")
    assert re.search(r"reverse\s+60\.0 % 30/50\s+100\.0 % 50/50", scores), scores
    assert merge.locator("#preview-answers .right").count() > 8
    assert merge.locator("#preview-plot svg .errorbar, #preview-plot .errorbars").count() > 0

    merge.fill(LAMBDA, "0.1")
    merge.wait_for_function(
        "old => { const t = document.querySelector('#preview-scores table'); return t && t.innerText !== old; }",
        arg=scores,
    )
    merge.wait_for_function(DONE)
    mean = merge.inner_text("#preview-scores tr.mean")
    assert float(re.findall(r"([\d.]+) %", mean)[2]) < 70, "with λ = 0.1 it is little more than the base"
    assert {path.name for path in site.data.rglob("*.safetensors")} == before

    merge.uncheck("#preview-follow input")
    merge.fill(LAMBDA, "0.2")
    until(merge, "#preview-state", "earlier setting")
    merge.click("#preview-end")
    until(merge, "#preview-state", "Press Preview")


def test_merge_and_save(merge: Any, site: Site) -> None:
    merge.check("#method input[value=task_arithmetic]")
    until(merge, "#recipe-card", "Task arithmetic")
    merge.click("#merge-name textarea, #merge-name input")
    merge.keyboard.type("mine")
    until(merge, "#merge-where", "models/mine")
    merge.fill("#merge-limit input", "20")
    merge.wait_for_selector("#merge-save:not([disabled])")
    merge.click("#merge-save")
    merge.wait_for_selector("#merge-result .card.finished")
    card = merge.inner_text("#merge-result")
    place = site.data / "models" / "mine"
    manifest = json.loads((place / "manifest.json").read_text())
    assert str(place) in card and manifest["plan_hash"][:16] in card
    assert re.search(r"rotate\s+[\d.]+ % \d+/20\s+100\.0 % 20/20", card), card
    assert merge.is_visible("#merge-evaluate")
