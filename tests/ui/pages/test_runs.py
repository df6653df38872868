"""The run history: found, shown, compared, repeated and removed; without a browser."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from merging.errors import InputError, TaskError
from merging.job_kinds import KINDS
from merging.jobs import Jobs
from tests.ui.pages.history import app_in, ended, evaluation
from ui import downloads
from ui import draft as drafts
from ui.context import App
from ui.pages import runs, runs_compare, runs_details
from ui.pages import runs_view as view

NASTY = "<script>alert(1)</script>"
ERROR = {"code": "E_NO_SPACE", "what": "The disk is full.", "why": "12 GB are needed.", "fix": "Choose another disk."}
MODELS = {"base": "base", "sorter": "expert", "coder": "expert", "average": "candidate", "ties": "candidate"}


@pytest.fixture
def app(tmp_path: Path) -> App:
    return app_in(tmp_path)


def recipe(method: str = "pcb", **parameters: Any) -> dict[str, Any]:
    draft = drafts.demo(method)
    for name, value in parameters.items():
        draft = drafts.set_parameter(draft, ("parameters", name), value)
    return drafts.recipe_of(draft).to_data()


def merge(jobs: Jobs, number: int, title: str = "", model: str = "", data: dict | None = None, **how: Any) -> str:
    result = {"model": model, "bytes": 3_000_000 * (number + 1), "method": "pcb", "warnings": [NASTY], "seconds": 1.0}
    return ended(jobs, number, "merge", {"recipe": data or recipe()}, result, title, **how)


def lines(app: App) -> list[view.Line]:
    return view.lines_of(app.jobs, app.jobs.states())


# -- the list -------------------------------------------------------------------------------------------


def test_a_line_says_what_was_merged_and_how(app: App) -> None:
    merge(app.jobs, 1, "mine", tags=["try"])
    (line,) = lines(app)
    assert (line.kind, line.name, line.method) == ("Merge", "mine", "PCB-Merging")
    assert line.experts == ["reverse", "sort", "unique", "rotate"] and line.bytes == 6_000_000
    shown = view.list_html([line], [], 1, False)
    assert "6.0 MB" in shown and "✓ Finished" in shown and "try" in shown


def test_scores_come_from_the_run_that_scored_the_model(app: App) -> None:
    job = merge(app.jobs, 1, "mine", "/models/ties")
    scored = evaluation(app.jobs, 2, MODELS)
    found = {line.state.id: line for line in lines(app)}
    assert found[job].scored_in == scored and found[job].kept is not None
    assert found[job].kept.model == "ties" and found[job].kept == found[scored].kept
    shown = view.list_html([found[job], found[scored]], [], 2, False)
    assert "scored in another run" in shown and "best of 2: ties" in shown


def test_scores_that_take_long_come_later(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation(app.jobs, 1, MODELS)
    monkeypatch.setattr(view, "BUDGET", -1.0)
    view._known.clear()
    (line,) = lines(app)
    assert line.pending and line.kept is None
    monkeypatch.setattr(view, "BUDGET", 5.0)
    (line,) = lines(app)
    assert not line.pending and line.kept is not None


def test_failed_runs_stay_with_their_reason(app: App) -> None:
    ended(app.jobs, 1, "merge", {"recipe": recipe()}, None, "too big", error=ERROR)
    (line,) = lines(app)
    assert "The disk is full." in view.list_html([line], [], 1, False)
    shown = runs_details.details_html(line, Path("/x"))
    assert all(ERROR[key] in shown for key in ERROR)


def test_a_damaged_run_is_listed_and_can_be_looked_at(app: App) -> None:
    job = merge(app.jobs, 1)
    (app.jobs.path / job / "job.json").write_text("{")
    (line,) = lines(app)
    assert line.state.status == "failed" and line.kind == "damaged"
    assert runs_details.repeated(line)[1] == {}


@pytest.mark.parametrize(
    ("words", "found"),
    [("", 3), ("pcb", 2), ("MINE", 1), ("try", 1), ("failed disk", 1), ("no_space", 1), ("sort", 2), ("nothing", 0)],
)
def test_search(app: App, words: str, found: int) -> None:
    merge(app.jobs, 1, "mine", tags=["try"])
    ended(app.jobs, 2, "merge", {"recipe": recipe()}, None, "too big", error=ERROR)
    ended(app.jobs, 3, "inspect", {"base": "b", "experts": ["/x/coder"]}, {"parts": []})
    assert len(view.found_lines(lines(app), words, view.ANY_KIND, view.SORTS[0])) == found


def test_order_and_kinds(app: App) -> None:
    for number, title in ((1, "b"), (2, "a")):
        merge(app.jobs, number, title)
    evaluation(app.jobs, 3, MODELS, "c")
    found = lines(app)
    assert view.kinds_of(found) == [view.ANY_KIND, "Evaluation", "Merge"]
    assert [line.name for line in view.found_lines(found, "", "Merge", "newest first")] == ["a", "b"]
    assert [line.name for line in view.found_lines(found, "", view.ANY_KIND, "smallest")] == ["b", "a", "c"]
    assert [line.name for line in view.found_lines(found, "", view.ANY_KIND, "name")] == ["a", "b", "c"]
    assert view.found_lines(found, "", view.ANY_KIND, "best least retention")[0].name == "c"


def test_names_do_nothing(app: App) -> None:
    data = recipe()
    data["experts"][0]["name"] = "<b>bold"
    merge(app.jobs, 1, NASTY, data=data, tags=[NASTY])
    app.jobs.change(app.jobs.states()[0].id, note=NASTY)
    (line,) = lines(app)
    events = [{"event": NASTY, "time": 1.0, "text": NASTY}]
    for shown in (
        view.list_html([line], [], 1, False),
        runs_details.details_html(line, Path(f"/x/{NASTY}")),
        runs_details.events_html(events, NASTY),
        runs_compare.settings_diff([line, view.Line(line.state, {"recipe": {"base": NASTY}})]),
    ):
        assert "<script" not in shown and "<b>bold" not in shown and "&lt;script" in shown


def test_empty_lists_say_what_to_do() -> None:
    assert "Nothing was run yet" in view.list_html([], [], 0, False)
    assert "No run fits" in view.list_html([], [], 3, False)
    assert "No run was removed" in view.list_html([], [], 0, True)


def test_when_it_was() -> None:
    assert len(view.when(time.time())) == 5 and view.when(0).endswith("1970")


# -- one run --------------------------------------------------------------------------------------------


def test_a_run_becomes_a_draft_with_exactly_its_recipe(app: App) -> None:
    data = recipe("ties", **{"lambda": 1.3})
    data["experts"][1]["parameters"] = {"density": [0.1, 0.9]}
    merge(app.jobs, 1, data=data)
    (line,) = lines(app)
    draft = runs.draft_of(line, drafts.set_tasks(drafts.empty(), ["kept.jsonl"]))
    assert drafts.recipe_of(draft).to_data() == data and draft["tasks"] == ["kept.jsonl"]
    assert drafts.recipe_of(drafts.from_yaml(runs_details.recipe_text(line.arguments))).to_data() == data


def test_a_run_can_be_repeated(app: App) -> None:
    arguments = {"recipe": recipe(), "out": "/there/already"}
    ended(app.jobs, 1, "merge", arguments, {}, "mine")
    (line,) = lines(app)
    kind, again, title = runs_details.repeated(line)
    assert (kind, title) == ("merge", "mine (again)") and "out" not in again
    KINDS[kind].check(again)


def test_the_export_has_everything(app: App) -> None:
    merge(app.jobs, 1, "mine", tags=["a"])
    (line,) = lines(app)
    data = json.loads(runs_details.as_json(line))
    assert data["arguments"]["recipe"] == recipe() and data["result"]["bytes"] == 6_000_000 and data["tags"] == ["a"]


def test_the_end_of_the_log_is_shown(tmp_path: Path) -> None:
    assert runs_details.log_tail(tmp_path) == ""
    (tmp_path / "log.txt").write_bytes(b"x" * 9000 + b"\xff the end")
    assert runs_details.log_tail(tmp_path).endswith("the end") and len(runs_details.log_tail(tmp_path)) < 4100


# -- comparing --------------------------------------------------------------------------------------------


def test_only_settings_that_differ_are_listed(app: App) -> None:
    merge(app.jobs, 1, "one", data=recipe(ratio=0.1))
    merge(app.jobs, 2, "two", data=recipe(ratio=0.3))
    shown = runs_compare.settings_diff(lines(app))
    assert "parameters.ratio" in shown and "0.1" in shown and "0.3" in shown and "base" not in shown
    assert "1 of " in shown
    assert "are the same" in runs_compare.settings_diff(lines(app)[:1] * 2)


def test_experts_are_compared_by_name(app: App) -> None:
    data = recipe()
    data["experts"] = data["experts"][1:]
    merge(app.jobs, 1, "all")
    merge(app.jobs, 2, "three", data=data)
    shown = runs_compare.settings_diff(lines(app))
    assert "experts.reverse.model" in shown and "not set" in shown and "experts.sort" not in shown


def test_coefficients_by_layer(app: App) -> None:
    model = str(drafts.DEMO / "base")
    one, two = recipe("task_arithmetic"), recipe("task_arithmetic")
    for data, weight in ((one, 0.4), (two, [0.4, 1.0])):
        for expert in data["experts"]:
            expert["parameters"] = {"weight": weight if expert["name"] == "sort" else 0.4}
    merge(app.jobs, 1, "curve", model, two)
    merge(app.jobs, 2, "flat", model, one)
    chart = runs_compare.coefficients_chart(lines(app))
    assert not isinstance(chart, str) and [name for name, _ in chart.variants] == ["curve: weight"]
    by_cell = {(row[2], row[3]): row[-1] for row in chart.table.rows}
    assert by_cell["sort", 0] == pytest.approx(0) and by_cell["sort", 3] == pytest.approx(0.6)
    assert by_cell["rotate", 3] == 0
    assert "the same in every layer" in runs_compare.coefficients_chart(lines(app)[:1] * 2)


def test_coefficients_of_a_model_that_is_gone(app: App) -> None:
    merge(app.jobs, 1, "a", "/nowhere")
    assert "not here any more" in str(runs_compare.coefficients_chart(lines(app) * 2))
    evaluation(app.jobs, 2, MODELS)
    assert "between merges only" in str(runs_compare.coefficients_chart(lines(app)))


def test_scores_are_compared_on_the_items_that_all_have(app: App) -> None:
    first = evaluation(app.jobs, 1, MODELS, items=120)
    second = evaluation(app.jobs, 2, {"base": "base", "ties": "candidate"}, items=60, validation=True)
    places = {"A": (app.jobs.path / first, "average"), "B": (app.jobs.path / second, "ties")}
    found, note = runs_compare.common_overview(places)
    assert {len(table.items) for table in found.tables} == {60} and "sort 60" in note and "sort.validation" in note
    chart = runs_compare.scores_chart(found, note)
    assert [row[0] for row in chart.table.rows] == ["B"] * 3 and note in chart.basis


def test_models_that_share_no_items_are_not_compared(app: App) -> None:
    first = evaluation(app.jobs, 1, MODELS)
    second = evaluation(app.jobs, 2, MODELS)
    records = app.jobs.path / second / "records.jsonl"
    records.write_text(records.read_text().replace("sort-", "other-").replace("code-", "more-"))
    places = {"A": (app.jobs.path / first, "average"), "B": (app.jobs.path / second, "ties")}
    with pytest.raises(TaskError, match="not scored on the same items"):
        runs_compare.common_overview(places)


def test_size_against_score(app: App) -> None:
    for number, name in ((1, "average"), (2, "ties")):
        merge(app.jobs, number, name, f"/models/{name}")
    run = evaluation(app.jobs, 3, MODELS)
    places = {name: (app.jobs.path / run, name) for name in ("average", "ties")}
    found, _ = runs_compare.common_overview(places)
    by_name = {line.name: line for line in lines(app) if line.name in places}
    chart = runs_compare.pareto_chart(found, by_name)
    assert not isinstance(chart, str)
    sizes = {row[0]: row[2] for row in chart.table.rows}
    assert sizes == {"average": 6_000_000, "ties": 9_000_000}
    assert "fewer than two" in str(runs_compare.pareto_chart(found, {"ties": by_name["ties"]}))


# -- actions --------------------------------------------------------------------------------------------


@pytest.fixture
def page(app: App) -> runs.Runs:
    """Its actions, without its controls."""
    made = object.__new__(runs.Runs)
    made.app, made.shell = app, SimpleNamespace(goto=lambda name: name)  # type: ignore[assignment]
    return made


def test_removing_restoring_and_deleting_for_good(app: App, page: runs.Runs) -> None:
    job = merge(app.jobs, 1, "mine")
    removed, _, words = page._remove([job], [])
    assert removed == [job] and "Nothing is deleted yet" in words and app.jobs.states() == []
    page._undo(removed)
    assert [state.id for state in app.jobs.states()] == [job]
    page._remove([job], [])
    assert "mine" in page._ask_purge()[1]
    page._purge()
    assert not (app.jobs.path / job).exists()


def test_name_tags_and_note_are_kept(app: App, page: runs.Runs) -> None:
    job = merge(app.jobs, 1, "mine")
    page._rename([job], [], "new name", "a, b ,a", "why")
    state = app.jobs.state(job)
    assert (state.title, state.tags, state.note) == ("new name", ["a", "b"], "why")


def test_exports_lie_behind_a_name_that_nobody_can_guess(app: App, page: runs.Runs) -> None:
    job = merge(app.jobs, 1, f"../{NASTY}")
    link = page._export_yaml([job], [])
    token = link.split("/amalgam/download/")[1].split('"')[0]
    file = downloads.find(app.data, token)
    assert file is not None and file.name.endswith(".yml") and "method: pcb" in file.read_text()
    assert "<script" not in link


def test_only_one_run_of_ones_own_can_be_acted_on(app: App, page: runs.Runs) -> None:
    one, other = merge(app.jobs, 1), merge(app.jobs, 2)
    for chosen in ([], [one, other], ["nonsense"], ["../.."]):
        with pytest.raises(InputError):
            page._remove(chosen, [])
    app.on_space = True
    with pytest.raises(InputError):
        page._remove([one], [other])
    assert page._choose([other], SimpleNamespace(runs=[one, other, 3])) == [other]  # type: ignore[arg-type]
    with pytest.raises(InputError):
        page._purge()
    assert len(app.jobs.states()) == 2
