"""The Analyse page in a real browser: a job fills it part by part, cells answer to mouse and keyboard, findings lead to
their cells, a cell becomes a condition of the recipe, and everything can be saved."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import Site

MAP, HEAD = "#analyse-map .js-plotly-plot", "#analyse-tensor-head h3"
FIGURES = ".js-plotly-plot .svg-container"


@pytest.fixture
def done(page: Any) -> Any:
    """The demo experts, analysed."""
    page.get_by_role("tab", name="Analyse", exact=True).click()
    page.wait_for_function(
        "!document.querySelector('#analyse-start')?.disabled || !!document.querySelector('#analyse-map .heatmaplayer')"
    )
    if page.locator("#analyse-start").is_enabled():
        page.click("#analyse-start")
        page.wait_for_function("document.querySelector('#analyse-reason').textContent.includes('see the sidebar')")
        assert page.locator("#stop").is_visible() and page.locator("#analyse-start").is_disabled()
    page.wait_for_function("document.querySelector('#analyse-reason').textContent.includes('Everything is computed')")
    page.wait_for_selector("#analyse-signs .svg-container")
    return page


def test_from_the_button_to_a_condition(done: Any, site: Site, tmp_path: Path) -> None:
    page = done
    page.wait_for_function(f"document.querySelectorAll('{FIGURES}').length === 4")  # and never more at a time
    assert page.locator(".part.known").count() == 6

    # A cell, by mouse.
    page.locator("#analyse-map").scroll_into_view_if_needed()
    box = page.locator(f"{MAP} .nsewdrag").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.01, box["y"] + box["height"] * 0.1)
    page.wait_for_function(f"document.querySelector('{HEAD}').textContent === 'layer 0, q'")
    assert "128 × 128" in page.inner_text("#analyse-tensor-head")
    rows = page.locator("#analyse-numbers tbody tr")
    assert rows.first.locator("td").first.inner_text() == "‖τ‖/‖W₀‖"

    # Another one, by keyboard.
    page.locator("#analyse-map .plot-area").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_function(f"document.querySelector('{HEAD}').textContent === 'layer 0, k'")

    # A finding, and the cell that shows it.
    page.locator("#analyse-findings button[data-pick]").nth(1).click()
    page.wait_for_function("document.querySelector('#analyse-metric input').value.startsWith('Sign conflict')")
    page.wait_for_function("document.querySelector('#analyse-whose input').value === 'sort and unique'")
    assert page.locator(f"{MAP} .shapelayer path").count() == 1, "the cell is marked"

    # The chosen tensor becomes a condition; undo takes it back.
    page.get_by_role("button", name="Use as filter in the recipe").click()
    page.wait_for_function("document.querySelector('#filter-where input').value.includes('this tensor')")
    page.click("#filter-use")
    page.wait_for_selector("#filter-note:has-text('The recipe now has weight 0')")
    page.click("#undo")

    # The other views take the map's figures away.
    for view, figures in (("Similarity", 2), ("Conflicts", 1), ("Importance", 2)):
        page.get_by_role("tab", name=view, exact=True).click()
        page.wait_for_function(f"document.querySelectorAll('{FIGURES}').length === {figures}")
    page.locator("#table-analyse-importance summary").click()
    with page.expect_download() as saved:
        page.locator("#table-analyse-importance [data-csv]").click()
    table = list(csv.reader(Path(saved.value.path()).read_text("utf-8-sig").splitlines()))
    assert table[0][0] == "layer" and len(table) == 5

    with page.expect_download() as saved:
        page.click("#save-json")
    numbers = json.loads(Path(saved.value.path()).read_text("utf-8"))
    assert numbers["names"] == ["reverse", "sort", "unique", "rotate"] and numbers["principal"]
    with page.expect_download() as saved:
        page.click("#save-report")
    assert saved.value.suggested_filename == "analysis-reverse-sort-unique-rotate.html"
    assert "<h2>" in Path(saved.value.path()).read_text("utf-8")


def test_a_second_look_is_instant(done: Any, window: Any, site: Site) -> None:
    """Another window finds everything without a job."""
    page = window(site)
    page.get_by_role("tab", name="Analyse", exact=True).click()
    page.wait_for_selector("#analyse-map .heatmaplayer")
    assert "Everything is computed" in page.inner_text("#analyse-reason")
    assert page.locator("#analyse-start").is_disabled()
