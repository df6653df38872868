"""Evaluate and Runs in a real browser: score something, look at it, find it again in the history, compare, remove."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merging.jobs import Jobs
from tests.browser.conftest import Site
from tests.ui.pages.history import ended, evaluation
from ui import draft as drafts

NASTY = "<img src=x onerror=\"document.title='done'\">"
MODELS = {"base": "base", "sorter": "expert", "coder": "expert", "average": "candidate", "ties": "candidate"}
ERROR = {"code": "E_NO_SPACE", "what": f"The disk {NASTY} is full.", "why": "", "fix": "Choose another."}


@pytest.fixture(scope="module")
def history(start: Callable[..., Site], tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A workbench with a history: an evaluation, two merges that it scored, and one that failed."""
    data: Path = tmp_path_factory.mktemp("history")
    jobs = Jobs(data / "runs")
    for number, (name, method) in enumerate((("average", "linear"), ("ties", "ties"))):
        recipe = drafts.recipe_of(drafts.demo(method)).to_data()
        result = {"model": f"/models/{name}", "bytes": 3_000_000, "method": method, "warnings": []}
        ended(jobs, number, "merge", {"recipe": recipe}, result, f"run {name}")
    ended(jobs, 2, "merge", {"recipe": recipe}, None, f"bad {NASTY}", error=ERROR, tags=[NASTY])
    evaluation(jobs, 3, MODELS, "made-up scores")
    return start("--demo", data=data)


@pytest.fixture
def runs(window: Callable[..., Any], history: Site) -> Any:
    page = window(history, "/#runs")
    page.wait_for_selector("#run-list tbody tr")
    return page


def row(page: Any, name: str) -> Any:
    return page.locator("#run-list tbody tr", has=page.locator("th", has_text=name)).first


def wait_rows(page: Any, count: int) -> None:
    page.wait_for_function("n => document.querySelectorAll('#run-list tbody tr').length === n", arg=count)


def test_a_run_is_found_looked_at_named_and_removed(runs: Any) -> None:
    runs.fill("#run-words textarea, #run-words input", "disk full")
    wait_rows(runs, 1)
    assert runs.locator("#run-list input:checked").count() == 0
    row(runs, "bad").click()
    runs.wait_for_selector("#run-facts .message.problem")
    assert "is full." in runs.inner_text("#run-facts") and runs.is_visible("#run-resume")
    assert runs.title() != "done" and runs.locator("#run-list img, #run-details img").count() == 0
    runs.click("#run-names button")
    runs.fill("#run-name textarea, #run-name input", "renamed, disk full")
    runs.click("#run-rename")
    row(runs, "renamed").wait_for()
    runs.click("#run-remove")
    wait_rows(runs, 0)
    runs.click("#undo-remove")
    wait_rows(runs, 1)


def test_two_runs_are_compared(runs: Any) -> None:
    row(runs, "run ties").click()
    runs.wait_for_selector("#run-recipe")
    row(runs, "run average").locator("input").check()
    runs.wait_for_selector("#plot-paired .main-svg")
    diff = runs.inner_text("#run-diff")
    assert "method" in diff and "linear" in diff and "ties" in diff and "experts.sort.model" not in diff
    assert runs.locator("#run-list input:checked").count() == 2


def test_a_recipe_of_yesterday_is_opened_again(runs: Any) -> None:
    row(runs, "run average").click()
    runs.wait_for_selector("#run-draft:visible")
    runs.click("#run-draft")
    runs.wait_for_selector("#page-merge-button[aria-selected=true]")
    runs.wait_for_function("document.querySelector('#recipe-card').innerText.includes('Linear')")


def test_scores_are_shown_in_every_way(runs: Any) -> None:
    row(runs, "made-up scores").click()
    runs.wait_for_selector("#run-scores:visible")
    runs.click("#run-scores")
    runs.wait_for_selector("#plot-scores .main-svg")
    assert "5 models" in runs.inner_text("#results-head")
    for name, shown in (("Retention", "#plot-retention"), ("Differences", "#plot-differences")):
        runs.locator("#results button[role=tab]", has_text=name).first.click()
        runs.wait_for_selector(f"{shown} .main-svg")
    runs.locator("#results button[role=tab]", has_text="Single answers").first.click()
    runs.wait_for_selector("#items-table tbody tr")
    assert "items 1 to 50 of 120" in runs.inner_text("#items-table")


def test_an_evaluation_from_the_choice_to_the_scores(window: Callable[..., Any], history: Site) -> None:
    page = window(history, "/#evaluate")
    page.wait_for_selector("#models label")
    for label in ("Expert · reverse", "Expert · unique", "Expert · rotate"):
        page.locator("#models label", has_text=label).locator("input").uncheck()
    for name in ("reverse", "rotate", "unique"):
        page.locator("#tasks .token", has_text=name).locator(".token-remove").click()
        page.wait_for_function("n => !document.querySelector('#tasks-info').innerText.includes(n)", arg=name)
    page.click("#limit input")
    page.locator("[role=option]", has_text="quick").click()
    page.click("#evaluate")
    page.wait_for_function(
        "document.querySelector('#results-head').innerText.includes('2 models on 1 task, 50 items')", timeout=90_000
    )
    page.wait_for_selector("#plot-scores .main-svg")
    assert "few items" in page.inner_text("#results-head")
