"""The frame of the workbench in a real browser: what stays after a reload, undo, the recipe as text, links, keys, looks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from merging.jobs import Jobs

from .conftest import ROOT, Site, ready


def choose_type(page: Any, name: str) -> None:
    page.click("#dtype input")
    page.click(f"#dtype [role=option]:text-is('{name}')")


def wait_value(page: Any, selector: str, value: str) -> None:
    page.wait_for_function("([s, v]) => document.querySelector(s)?.value === v", arg=[selector, value])


def text_of(page: Any) -> str:
    return "\n".join(page.eval_on_selector_all("#yaml .cm-line", "lines => lines.map(line => line.textContent)"))


def wait_text(page: Any, part: str) -> None:
    page.wait_for_function("part => document.querySelector('#yaml .cm-content')?.textContent.includes(part)", arg=part)


@pytest.fixture
def settings(window: Callable[..., Any], site: Site) -> Any:
    page = window(site, "/#settings")
    page.wait_for_selector("#page-settings-button[aria-selected=true]")
    page.wait_for_selector("#dtype input", state="visible")
    return page


# -- what stays -----------------------------------------------------------------------------------------


def test_the_sidebar_says_what_is_there(page: Any) -> None:
    card = page.inner_text("#recipe-card")
    assert all(word in card for word in ("reverse", "sort", "unique", "rotate", "PCB", "Ready to merge"))
    assert "Nothing is running" in page.inner_text("#job-card")
    assert "cores" in page.inner_text("#machine-card") and "Disk free" in page.inner_text("#machine-card")


def test_a_reload_keeps_recipe_and_page(settings: Any) -> None:
    choose_type(settings, "bfloat16")
    settings.wait_for_selector("#undo:not([disabled])")
    settings.reload()
    ready(settings)
    settings.wait_for_selector("#page-settings-button[aria-selected=true]")
    wait_value(settings, "#dtype input", "bfloat16")
    wait_text(settings, "bfloat16")  # --demo does not open the demo over it again


def test_undo_and_redo_by_button_and_key(settings: Any) -> None:
    assert settings.is_disabled("#undo") and settings.is_disabled("#redo")
    for name in ("float16", "float32"):
        choose_type(settings, name)
        wait_text(settings, f"dtype: {name}")
    settings.focus("#page-settings-button")
    settings.keyboard.press("Control+z")
    wait_value(settings, "#dtype input", "float16")
    settings.click("#undo")
    wait_value(settings, "#dtype input", "As in the base")
    settings.wait_for_selector("#undo[disabled]")
    settings.click("#redo")
    wait_value(settings, "#dtype input", "float16")
    settings.focus("#page-settings-button")
    settings.keyboard.press("Control+Shift+Z")
    wait_value(settings, "#dtype input", "float32")
    settings.wait_for_selector("#redo[disabled]")


def test_a_link_brings_the_recipe_to_another_browser(settings: Any, window: Callable[..., Any], site: Site) -> None:
    choose_type(settings, "float16")
    wait_text(settings, "dtype: float16")
    settings.click("#share")
    settings.wait_for_function("document.querySelector('#link input, #link textarea')?.value.startsWith('http')")
    link = settings.input_value("#link input, #link textarea")
    assert link.startswith(f"{site.url}/?r=")
    other = window(site, link.removeprefix(site.url))
    wait_text(other, "dtype: float16")
    assert text_of(other) == text_of(settings)
    broken = window(site, "/?r=" + link[-40:])
    broken.wait_for_selector("#message .problem")
    assert "The link holds no recipe" in broken.inner_text("#message")
    assert "Ready to merge" in broken.inner_text("#recipe-card")


# -- the recipe as text ---------------------------------------------------------------------------------


def test_the_text_is_checked_with_line_numbers_and_used_when_applied(settings: Any) -> None:
    assert not settings.is_visible("#text-panel")
    settings.click("#as-text")
    settings.wait_for_selector("#text-panel", state="visible")
    lines = len(text_of(settings).rstrip("\n").split("\n"))
    settings.click("#yaml .cm-content")
    settings.keyboard.press("Control+End")
    settings.keyboard.type("\nnonsense: 3")
    settings.wait_for_selector("#yaml-state .problem")
    said = settings.inner_text("#yaml-state")
    assert f"line {lines + 1}, column 1" in said and "nonsense" in said
    settings.keyboard.press("Control+Enter")  # does not apply it: the error comes to the message panel
    settings.wait_for_selector("#message .problem")
    assert "nonsense" in text_of(settings), "what was typed is kept"
    for _ in "nonsense: 3":
        settings.keyboard.press("Backspace")
    settings.keyboard.type("seed: 7")
    settings.wait_for_selector("#yaml-state .note")
    settings.keyboard.press("Control+Enter")
    settings.wait_for_selector("#undo:not([disabled])")
    settings.wait_for_function("!document.querySelector('#yaml-state .message')")
    assert "seed: 7" in text_of(settings) and settings.inner_text("#message").strip() == ""


def test_text_that_was_not_applied_survives_a_change_elsewhere(settings: Any) -> None:
    settings.click("#as-text")
    settings.click("#yaml .cm-content")
    settings.keyboard.press("Control+End")
    settings.keyboard.type("\nseed: 9")
    settings.wait_for_selector("#yaml-state .note")
    choose_type(settings, "float16")
    settings.wait_for_function("document.querySelector('#yaml-state')?.textContent.includes('changed elsewhere')")
    assert "seed: 9" in text_of(settings)
    settings.click("#yaml-reset")
    wait_text(settings, "float16")
    assert "seed: 9" not in text_of(settings)


# -- keys -----------------------------------------------------------------------------------------------


def test_keys_open_pages_and_the_list_of_keys(page: Any) -> None:
    names = page.eval_on_selector_all(
        "#pages [role=tablist] [role=tab]", "tabs => tabs.map(tab => tab.textContent.trim())"
    )
    assert names[-1] == "Settings"
    for number, name in enumerate(names, 1):
        page.keyboard.press(str(number))
        page.wait_for_selector(f"#page-{name.lower()}-button[aria-selected=true]")
        assert page.url.endswith(f"#{name.lower()}")
    page.keyboard.press("?")
    page.wait_for_selector("#keys-dialog[open]")
    assert "Ctrl+Enter" in page.inner_text("#keys-dialog")
    page.keyboard.press("Escape")
    page.wait_for_selector("#keys-dialog", state="hidden")


def test_keys_are_letters_while_somebody_types(settings: Any) -> None:
    settings.click("#as-text")
    settings.click("#yaml .cm-content")
    settings.keyboard.press("Control+End")
    settings.keyboard.type("\n# 1?")
    wait_text(settings, "# 1?")
    assert settings.is_visible("#dtype") and settings.query_selector("#keys-dialog") is None


# -- looks ----------------------------------------------------------------------------------------------


def test_the_theme_is_the_systems_until_it_is_chosen(window: Callable[..., Any], site: Site) -> None:
    page = window(site, "/#settings", color_scheme="dark")
    page.wait_for_function("document.body.classList.contains('dark')")
    page.click("#theme label:has-text('Light')")
    page.wait_for_function("!document.body.classList.contains('dark')")
    page.reload()
    ready(page)
    page.wait_for_timeout(500)
    assert not page.evaluate("document.body.classList.contains('dark')")
    page.wait_for_function("document.querySelector('#theme input[value=light]')?.checked")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768])
def test_nothing_overlaps_or_sticks_out(window: Callable[..., Any], site: Site, width: int, scheme: str) -> None:
    page = window(site, "/#settings", viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.wait_for_selector("#dtype input", state="visible")
    page.click("#as-text")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate(
        """() => ['#side', '#center', '#text-panel'].map(s => { const r = document.querySelector(s).getBoundingClientRect();
        return [r.left, r.top, r.right, r.bottom]; })"""
    )
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            across = min(a[2], b[2]) - max(a[0], b[0])
            down = min(a[3], b[3]) - max(a[1], b[1])
            assert across <= 1 or down <= 1, (width, boxes)


def test_first_paint_is_soon(window: Callable[..., Any], site: Site) -> None:
    page = window(site)
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    print(f"address after {site.seconds:.1f} s, first paint after {paint:.0f} ms")
    assert paint < 15_000  # under 1.5 s on an idle machine; test machines are not idle


# -- charts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plots(start: Callable[..., Site]) -> Site:
    return start(program="tests/browser/plot_app.py")


def told(page: Any, part: str) -> dict[str, Any]:
    page.wait_for_function("part => document.querySelector('#told textarea').value.includes(part)", arg=part)
    return json.loads(page.input_value("#told textarea"))[0]


def click_cell(page: Any, row: int, column: int) -> None:
    box = page.locator("#heat .nsewdrag").bounding_box()
    page.mouse.click(box["x"] + box["width"] * (column + 0.5) / 3, box["y"] + box["height"] * (row + 0.5) / 4)


def test_a_click_on_a_cell_reaches_python_after_every_redraw(window: Callable[..., Any], plots: Site) -> None:
    page = window(plots)
    page.wait_for_selector("#heat .nsewdrag", state="attached")
    for shift in (0, 100, 200):
        page.wait_for_function(
            "shift => document.querySelector('#heat .plot-area').data[0].z[0][0] === shift", arg=shift
        )
        click_cell(page, 2, 1)
        point = told(page, f'"z": {7 + shift}')
        assert (point["index"], point["x"], point["y"]) == ([2, 1], "k_proj", 2)
        page.click("#again")


def test_arrow_keys_move_through_a_heat_map_and_are_spoken(window: Callable[..., Any], plots: Site) -> None:
    page = window(plots)
    page.wait_for_selector("#heat .nsewdrag", state="attached")
    page.focus("#heat .plot-area")
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowUp", "ArrowDown"):
        page.keyboard.press(key)
    assert page.inner_text("#heat .plot-spoken") == "1, v_proj: 5"
    page.keyboard.press("Enter")
    assert told(page, '"z": 5')["index"] == [1, 2]


def test_arrow_keys_move_along_a_line(window: Callable[..., Any], plots: Site) -> None:
    page = window(plots)
    page.wait_for_selector("#scatter .main-svg")
    page.focus("#scatter .plot-area")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    assert told(page, "customdata")["customdata"] == "c"


def test_charts_follow_the_theme_and_have_no_cloud_button(window: Callable[..., Any], plots: Site) -> None:
    page = window(plots, color_scheme="light")
    page.wait_for_selector("#heat .main-svg")
    colour = "getComputedStyle(document.querySelector('#heat .xtick text')).fill"
    light = page.evaluate(colour)
    page.evaluate("document.body.classList.add('dark')")
    page.wait_for_function(f"light => {colour} !== light", arg=light)
    buttons = page.eval_on_selector_all("#heat .modebar-btn", "all => all.map(b => b.dataset.title)")
    assert buttons and not any("loud" in (b or "") or "hare" in (b or "") for b in buttons)


@pytest.mark.parametrize("kind", ["png", "svg", "json"])
def test_charts_can_be_saved(window: Callable[..., Any], plots: Site, kind: str) -> None:
    page = window(plots)
    page.wait_for_selector("#heat .main-svg")
    with page.expect_download() as download:
        page.click(f"#heat [data-save={kind}]")
    assert download.value.suggested_filename == f"change-per-layer.{kind}"
    content = download.value.path().read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<svg", "json": b'{"data"'}[kind])


# -- jobs -----------------------------------------------------------------------------------------------


def test_a_job_of_another_window_is_shown_stopped_and_resumed(window: Callable[..., Any], site: Site) -> None:
    demo = ROOT / "assets" / "demo"
    tasks = [str(demo / "tasks" / f"{name}.jsonl") for name in ("sort", "rotate", "unique", "reverse")]
    models = [[name, str(demo / "experts" / name), "expert"] for name in ("sort", "rotate", "unique", "reverse")]
    jobs = Jobs(site.data / "runs")
    job = jobs.start("evaluate", {"models": models, "tasks": tasks}, "Scores <b>of</b> experts")
    first = window(site)
    first.wait_for_selector("#job-card .job.running, #job-card .job.waiting")
    assert "Scores <b>of</b> experts" in first.inner_text("#job-card"), "a title is text"
    second = window(site)
    second.wait_for_selector("#stop", state="visible")
    began = time.monotonic()
    second.click("#stop")
    while jobs.state(job).alive:
        assert time.monotonic() < began + 20  # 2 s on an idle machine
        time.sleep(0.05)
    for page in (first, second):
        page.wait_for_selector("#job-card .job.cancelled")
        page.wait_for_selector("#resume", state="visible")
    first.click("#resume")
    first.wait_for_selector("#job-card .job.running, #job-card .job.waiting, #job-card .job.finished")
    first.wait_for_selector("#job-card .job.finished")
    assert not first.is_visible("#stop") and not first.is_visible("#resume")
    kept = json.loads((site.data / "runs" / job / "job.json").read_text())
    assert kept["kind"] == "evaluate"
