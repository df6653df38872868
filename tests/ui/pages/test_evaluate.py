"""What the Evaluate page offers, starts and shows; without a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from merging.errors import AmalgamError, RecipeError, TaskError
from merging.job_kinds import KINDS
from tests.ui.pages.history import app_in, ended, evaluation, scores_in
from ui import draft as drafts
from ui.pages import access
from ui.pages import evaluate_items as items
from ui.pages import evaluate_results as results
from ui.pages import evaluate_view as view
from ui.scored import Scored, Who, comparison, keep_who, overview, read_scored

DEMO = drafts.DEMO
TASKS = [str(DEMO / "tasks" / f"{name}.jsonl") for name in ("sort", "rotate")]
HOW = {"device": "cpu", "threads": 1, "offline": True}
MODELS = {"base": "base", "sorter": "expert", "coder": "expert", "average": "candidate", "ties": "candidate"}
NASTY = "<img src=x onerror=alert(1)>"


def scored_in(folder: Path, **how: Any) -> Scored:
    scores_in(folder, MODELS, **how)
    keep_who(folder, Who("base", {"sort": "sorter", "code": "coder"}))
    found = read_scored(folder)
    assert found is not None
    return found


# -- tasks ----------------------------------------------------------------------------------------------


def test_tasks_say_how_many_items_of_which_kind_and_split() -> None:
    offered = {Path(file.path).name: file for file in view.offered_tasks(DEMO.parent.parent, drafts.empty())}
    assert offered["sort.jsonl"].label == "sort · 400 items · exact answer · test"
    assert offered["sort.validation.jsonl"].label == "sort.validation · 200 items · exact answer · validation"
    assert "class of an image" in offered["turned.yaml"].label
    shown = view.tasks_table([offered["sort.jsonl"], offered["sort.validation.jsonl"]])
    assert "test: for reporting" in shown and "validation: for choosing settings" in shown


def test_a_folder_of_tasks_is_added_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "answer": "a"}))
    draft, box = view.with_tasks(drafts.empty(), f" {tmp_path} ")
    again, _ = view.with_tasks(draft, str(tmp_path / "one.jsonl"))
    assert [Path(path).name for path in again["tasks"]] == ["one.jsonl", "two.jsonl"] and box == ""
    assert again["tasks"] == draft["tasks"]


@pytest.mark.parametrize(
    ("content", "says"), [("not json", "line 1"), ("", "no items"), (None, "There is no task file")]
)
def test_what_is_no_task_is_refused_with_the_place(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(TaskError, match=says):
        view.with_tasks(drafts.empty(), str(tmp_path / "x.jsonl"))


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n')
    assert view.read_file(str(file)).tasks[0].items == 1
    file.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "b"}\n')
    assert view.read_file(str(file)).tasks[0].items == 2
    file.unlink()
    assert view.read_file(str(file)).problem


# -- models ---------------------------------------------------------------------------------------------


def test_models_are_base_experts_and_the_newest_merges(tmp_path: Path) -> None:
    app = app_in(tmp_path)
    for number in range(5):
        folder = tmp_path / f"model{number}"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        ended(app.jobs, number, "merge", {"recipe": {}}, {"model": str(folder)}, "TIES")
    ended(app.jobs, 9, "merge", {"recipe": {}}, {"model": str(tmp_path / "gone")}, "gone")
    choices, left_out = view.offered_models(drafts.demo(), access.states_of(app, []))
    names = [choice.name for choice in choices]
    assert names[:5] == ["base", "reverse", "sort", "unique", "rotate"] and left_out == []
    assert names[5:] == ["TIES", "TIES (2)", "TIES (3)", "TIES (4)", "TIES (5)"]
    assert [choice.chosen for choice in choices[5:]] == [True, True, True, False, False]
    assert choices[5].reference == str(tmp_path / "model4")


def test_adapters_are_left_out_with_the_reason() -> None:
    draft = drafts.add_expert(drafts.demo(), "some/base", "lora", adapter="some/lora")
    choices, left_out = view.offered_models(draft, [])
    assert "lora" not in [choice.name for choice in choices] and "adapter" in left_out[0]


def test_experts_that_sit_out_are_not_offered() -> None:
    choices, _ = view.offered_models(drafts.enable(drafts.demo(), "sort", False), [])
    assert [choice.name for choice in choices] == ["base", "reverse", "unique", "rotate"]


def test_what_was_unticked_stays_so_when_the_list_changes() -> None:
    choices, _ = view.offered_models(drafts.demo(), [])
    wishes = view.new_wishes(choices, {}, ["base", "expert:sort"])
    more, _ = view.offered_models(drafts.add_expert(drafts.demo(), "some/more", "more"), [])
    assert view.picked(more, wishes) == ["base", "expert:sort", "expert:more"]
    back = view.new_wishes(choices, wishes, [choice.id for choice in choices])
    assert view.picked(choices, back) == [choice.id for choice in choices]


# -- jobs -----------------------------------------------------------------------------------------------


def order(**changes: Any) -> view.Order:
    choices, _ = view.offered_models(drafts.demo(), [])
    return view.Order(**{"models": choices, "tasks": [view.read_file(path) for path in TASKS], **changes})


def test_the_job_is_one_that_can_be_started() -> None:
    kind, arguments, title = view.job(order(limit=50), HOW)
    assert (kind, title, arguments["limit"]) == ("evaluate", "5 models on 2 tasks", 50)
    assert arguments["models"][0] == ["base", str(DEMO / "base"), "base"]
    KINDS[kind].check(arguments)


def test_fair_baselines_are_tuned_on_the_files_beside() -> None:
    kind, arguments, _ = view.job(order(fair=True, budget=3), HOW)
    assert kind == "compare" and arguments["owners"] == {"sort": ["sort"], "rotate": ["rotate"]}
    assert [Path(path).name for path in arguments["selection_tasks"]] == [
        "sort.validation.jsonl",
        "rotate.validation.jsonl",
    ]
    KINDS[kind].check(arguments)


def test_validation_tasks_are_not_reported_in_a_fair_comparison() -> None:
    files = [view.read_file(str(DEMO / "tasks" / name)) for name in ("sort.jsonl", "sort.validation.jsonl")]
    _, arguments, _ = view.job(order(tasks=files, fair=True), HOW)
    assert [Path(path).name for path in arguments["tasks"]] == ["sort.jsonl"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"models": []}, "Choose a model"),
        ({"tasks": []}, "Choose a task"),
        ({"tasks": [view.TaskFile("/x/y.jsonl", problem="broken")]}, "Leave y.jsonl out: broken"),
        ({"tasks": [view.read_file(TASKS[0]), view.read_file(TASKS[0])]}, "called sort"),
    ],
)
def test_why_nothing_can_be_scored(changes: dict, says: str) -> None:
    assert says in view.why_not(order(**changes))
    with pytest.raises(RecipeError) as error:
        view.job(order(**changes), HOW)
    assert says in error.value.fix


def test_why_there_can_be_no_fair_baselines(tmp_path: Path) -> None:
    alone = tmp_path / "alone.jsonl"
    alone.write_text('{"prompt": "a", "answer": "b"}\n')
    models = order().models
    assert "at least two experts" in view.why_not(order(fair=True, models=models[:2]))
    assert "alone.validation.jsonl" in view.why_not(order(fair=True, tasks=[view.read_file(str(alone))]))
    held = view.read_file(str(DEMO / "tasks" / "sort.validation.jsonl"))
    assert "test tasks" in view.why_not(order(fair=True, tasks=[held]))


@pytest.mark.parametrize(
    ("written", "prompts"),
    [("a\nb\n", ["a", "b"]), ("one\ntwo\n\nthree", ["one\ntwo", "three"]), ("\n\n a \n", [" a "]), (" \n\n", [])],
)
def test_prompts_are_lines_or_blocks(written: str, prompts: list[str]) -> None:
    assert view.prompts_of(written) == prompts


def test_prompts_go_to_the_chosen_models() -> None:
    kind, arguments, title = view.prompts_job(order().models[:2], "2+2=", 8, HOW)
    assert title == "1 prompt to 2 models" and arguments["length"] == 8
    KINDS[kind].check(arguments)
    with pytest.raises(RecipeError):
        view.prompts_job([], "2+2=", 8, HOW)


def test_answers_stand_side_by_side_and_do_nothing(tmp_path: Path) -> None:
    assert view.answers_table(tmp_path) == ""
    rows = [{"prompt": NASTY, "answers": {"base": NASTY, "b<b>": "4"}}]
    (tmp_path / "answers.json").write_text(json.dumps(rows))
    shown = view.answers_table(tmp_path)
    assert "<img" not in shown and shown.count("&lt;img") == 2 and "b&lt;b&gt;" in shown


def test_visitors_of_a_space_see_bundled_tasks_and_their_own_runs_only(tmp_path: Path) -> None:
    app = app_in(tmp_path, on_space=True)
    one, other = (evaluation(app.jobs, number, {"base": "base"}) for number in (1, 2))
    assert [state.id for state in access.states_of(app, [one, "nonsense", 3])] == [one]
    assert access.states_of(app, "x") == [] and access.states_of(app, None) == []
    assert access.allowed_path(app, TASKS[0]) and not access.allowed_path(app, "/etc/passwd")
    assert not access.allowed_path(app, str(DEMO / ".." / ".." / "README.md"))
    app.on_space = False
    assert [state.id for state in access.states_of(app, [])] == [other, one]


# -- results --------------------------------------------------------------------------------------------


def test_the_head_says_how_many_items_of_which_split(tmp_path: Path) -> None:
    scored = scored_in(tmp_path, validation=True)
    assert "5 models" in results.head(scored, "") and "test items" in results.head(scored, "")
    held = results.head(scored, "validation", [{"model": NASTY, "task": "sort", "what": "too large"}])
    assert "validation items" in held and "few items" in held
    assert "&lt;img src=x onerror=alert(1)&gt; on sort was not scored" in held and "<img" not in held


def test_scores_have_a_dot_per_model_and_task(tmp_path: Path) -> None:
    chart = results.scores_chart(scored_in(tmp_path), "")
    assert len(chart.table.rows) == 10 and {row[2] for row in chart.table.rows} == {
        "base",
        "own expert",
        "expert",
        "merge",
    }
    ((_, figure),) = chart.variants
    assert [trace.name for trace in figure.data] == list(MODELS) and all(len(trace.x) == 2 for trace in figure.data)


def test_retention_has_bars_for_mean_and_least(tmp_path: Path) -> None:
    scored = scored_in(tmp_path)
    found = comparison(scored, "")
    chart = results.retention_chart(found)
    assert chart is not None and [name for name, _ in chart.variants] == ["Retention", "Gain kept"]
    bars = chart.variants[0][1].data[0]
    assert list(bars.x) == ["sort", "code", "MEAN", "LEAST"] and bars.y[3] == min(bars.y[:2])
    assert bars.y[2] == pytest.approx(sum(bars.y[:2]) / 2)
    assert "Caution:" in results.comparison_notes(found)


def test_differences_say_what_is_proven(tmp_path: Path) -> None:
    scored = scored_in(tmp_path)
    tests = overview(scored, "").differences("base")
    chart = results.differences_chart(tests, results.binary_tasks(scored, ""))
    verdicts = {(row[0], row[2]): row[3] for row in chart.table.rows}
    assert verdicts["sorter", "sort"] == "▲ better" and verdicts["coder", "sort"] == "= not told apart"
    assert [name for name, _ in chart.variants] == ["against base"] and "base" in chart.title


def test_a_radar_needs_three_tasks(tmp_path: Path) -> None:
    assert "needs 3 to 8 tasks" in str(results.radar_chart(scored_in(tmp_path), ""))


# -- single answers -------------------------------------------------------------------------------------


def test_items_can_be_filtered(tmp_path: Path) -> None:
    scored = scored_in(tmp_path)
    models, metric, found = items.by_item(scored, "", "sort")
    assert metric == "exact_match" and models == list(MODELS) and len(found) == 120
    wrong = items.chosen_items(found, {}, "wrong by", "sorter", "")
    right = items.chosen_items(found, {}, "right by", "sorter", "")
    assert len(wrong) + len(right) == 120 and {found[item]["sorter"].score for item in wrong} == {0}
    apart = items.chosen_items(found, {}, "models disagree", "", "")
    assert all(len({record.score for record in found[item].values()}) == 2 for item in apart) and 0 < len(apart) < 120
    texts = {item: ("find me", "x") for item in list(found)[:3]}
    assert items.chosen_items(found, texts, "all items", "", "FIND") == list(texts)


def test_the_table_has_pages(tmp_path: Path) -> None:
    scored = scored_in(tmp_path)
    first, pages = items.items_table(scored, "", "sort", [], "all items", "", "", 1)
    last, _ = items.items_table(scored, "", "sort", [], "all items", "", "", 99)
    assert pages == 3 and "items 1 to 50 of 120" in first and "items 101 to 120 of 120" in last
    assert "questions are shown by their ids" in first
    none, _ = items.items_table(scored, "", "sort", [], "all items", "", "no such words", 1)
    assert "no item fits" in none


def test_questions_come_from_the_task_files_of_all_kinds(tmp_path: Path) -> None:
    lines = {
        "choice": {"prompt": "Sky:", "choices": [" blue", " red"], "answer": 0},
        "exact": {"prompt": "2+2=", "answer": "4"},
        "label": {"text": "win", "label": 1},
        "text": {"text": "Any text."},
    }
    for name, line in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line))
    found = items.texts_of([str(tmp_path / f"{name}.jsonl") for name in lines] + ["/nowhere.jsonl"])
    assert set(found.values()) == {("Sky:  [ blue |  red]", " blue"), ("2+2=", "4"), ("win", "1"), ("Any text.", "")}
    with pytest.raises(AmalgamError):
        view.with_tasks(drafts.empty(), "")
