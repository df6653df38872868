"""What the Merge page says about a recipe, its preview and its result; without a browser."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from merging.errors import AmalgamError
from merging.job_kinds import KINDS
from ui import draft as drafts
from ui.context import App
from ui.pages import merge, merge_layers, merge_options, merge_plan, merge_preview, merge_save
from ui.previews import BASE, MERGE, Question, Shown, owners, questions_of

SORT = str(drafts.DEMO / "tasks" / "sort.jsonl")


@pytest.fixture
def app(tmp_path: Path) -> App:
    return App(data=tmp_path, jobs=None, executor=None, threads=2, device="cpu")


# -- plan ---------------------------------------------------------------------------------------------------------


def test_a_plan_in_words(app: App) -> None:
    found = merge_plan.look(app, drafts.demo("ties"))
    card = merge_plan.estimate_card(app, found)
    assert "39 merged" in card and "862,080" in card and "2 cores" in card
    assert "one set for all tensors" in card and "density 1" in card
    assert merge.reason_not_to(app, found) == ""
    assert len(found.layers) == 4 and all("norm" not in name for name in found.firsts)


def test_gradients_are_worked_out_in_the_plan(app: App) -> None:
    draft = drafts.set_parameter(
        drafts.demo("task_arithmetic"), ("experts", "sort", "parameters", "weight"), [0.2, 0.8]
    )
    found = merge_plan.look(app, draft)
    assert "4 different sets" in merge_plan.estimate_card(app, found)
    card = merge_plan.formula_card(found, "model.layers.3.mlp.up_proj.weight")
    assert "0.8·τ_sort" in card and "0.4·τ_reverse" in card


def test_what_keeps_a_merge_from_being_made(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No expert is chosen yet" in merge.reason_not_to(app, merge_plan.look(app, drafts.empty()))
    wrong = drafts.set_base(drafts.demo(), "/nowhere/at/all")
    reason = merge.reason_not_to(app, merge_plan.look(app, wrong))
    assert "/nowhere/at/all" in reason
    assert merge_plan.formula_card(merge_plan.look(app, wrong), "x").count("Shown as soon as") == 1
    found = merge_plan.look(app, drafts.demo())
    monkeypatch.setattr(merge_plan, "free_bytes", lambda _: 1000)
    assert "room" in merge.reason_not_to(app, found) or "space" in merge.reason_not_to(app, found)


def test_strangers_name_no_paths(app: App, tmp_path: Path) -> None:
    app.on_space = True
    assert merge_plan.look(app, drafts.demo()).plan is not None
    stranger = drafts.set_base(drafts.demo(), str(tmp_path))
    assert "Paths cannot be used here" in merge.reason_not_to(app, merge_plan.look(app, stranger))
    with pytest.raises(AmalgamError):
        merge_save.job_of(app, drafts.set_tasks(drafts.demo(), ["/etc/passwd"]), "", True, 0)


def test_names_in_the_plan_are_escaped(app: App) -> None:
    draft = drafts.demo("ties")
    draft["recipe"]["experts"][0]["name"] = "<img src=x>"
    found = merge_plan.look(app, draft)
    pages = merge_plan.estimate_card(app, found) + merge_plan.formula_card(found, found.firsts[0])
    assert "<img" not in pages and "&lt;img" in pages


def test_the_list_of_tensors_follows_the_layer(app: App) -> None:
    found = merge_plan.look(app, drafts.demo())
    assert merge_plan.layer_choices(found)[0] == ("layer 0", "0") and len(merge_plan.layer_choices(found)) == 5
    assert all(".2." in name for name in merge_plan.tensors_in(found, "2"))
    assert "lm_head.weight" in merge_plan.tensors_in(found, "")
    assert merge_plan.tensors_in(found, "99") == found.layers[0]


def test_why_there_are_no_layers_to_edit(app: App) -> None:
    names = ["weight"]
    assert "method" in merge_layers.why_not(drafts.empty(), merge_plan.Look(), [])
    assert "planned" in merge_layers.why_not(drafts.empty(), merge_plan.Look(), names)
    found = merge_plan.look(app, drafts.demo())
    assert merge_layers.why_not(drafts.demo(), found, names) == ""


# -- options ------------------------------------------------------------------------------------------------------


def test_options_are_written_and_leave_nothing_behind() -> None:
    draft = drafts.demo()
    set_ = merge_options._set
    norms = set_(("include", "norms"), merge_options._yes, draft, "no")
    assert drafts.recipe_of(norms).include.norms is False
    assert merge_options._choice_of(("include", "norms"), norms) == "no"
    assert set_(("include", "norms"), merge_options._yes, norms, "") == draft
    allowed = set_(("policies", "overflow"), merge_options._unless_refuse, draft, "allow")
    assert drafts.recipe_of(allowed).policies.overflow == "allow"
    assert set_(("policies", "overflow"), merge_options._unless_refuse, allowed, "refuse") == draft
    assert drafts.recipe_of(set_(("seed",), merge_options._seed, draft, 7)).seed == 7
    assert set_(("seed",), merge_options._seed, draft, 0) == draft
    union = set_(("tokenizer", "source"), merge_options._text, draft, "union")
    assert drafts.recipe_of(union).tokenizer.source == "union"


# -- preview ------------------------------------------------------------------------------------------------------


def row(task: str, right: int, items: int = 50) -> dict[str, Any]:
    return {"task": task, "metric": "exact_match", "right": right, "items": items, "mean": right / items,
            "low": 0.1, "high": 0.9}  # fmt: skip


def preview() -> Shown:
    return Shown(
        "",
        {
            MERGE: [row("sort", 40), row("maths", 10)],
            BASE: [row("sort", 20), row("maths", 5)],
            "sort": [row("sort", 45), row("maths", 6)],
            "x/other": [row("sort", 48), row("maths", 30)],
        },
        {MERGE: ["abc"], BASE: ["<b>"], "sort": ["abc"]},
        (Question("sort", "sort cba=", "abc"),),
        {"sort": "sort"},
        {"changed_tensors": 39},
        0.84,
        True,
    )


def test_a_task_belongs_to_the_expert_of_its_name_or_to_the_best() -> None:
    own = merge_preview.own_rows(preview())
    assert own["sort", "exact_match"][0] == "sort" and own["maths", "exact_match"][0] == "x/other"
    tasks: Any = [SimpleNamespace(name="sort.validation"), SimpleNamespace(name="code")]
    assert owners(tasks, ["models/Sort", "rotate"]) == {"sort.validation": "models/Sort"}


def test_scores_in_a_table_and_a_figure() -> None:
    table = merge_preview.table_of(preview())
    assert "80.0 %" in table and "+40.0" in table and "-10.0" in table
    assert "Mean" in table and "50.0 %" in table
    figure = merge_preview.figure_of(preview())
    assert figure is not None and [trace.name for trace in figure.data] == ["Base", "Own expert", "This merge"]
    assert "39 tensors merged, 100 items scored in 0.8 s" in merge_preview.state_of(preview())


def test_answers_are_compared_and_escaped() -> None:
    answers = merge_preview.answers_of(preview())
    assert answers.count("right</span>") == 2 and answers.count("wrong</span>") == 1
    assert "<b>" not in answers and "&lt;b&gt;" in answers


def test_quantities_have_no_percent() -> None:
    loss = {"task": "text", "metric": "loss", "right": None, "items": 9, "mean": 2.5, "low": None, "high": None}
    shown = Shown("", {MERGE: [loss], BASE: [loss | {"mean": 3.0}]}, merged={"changed_tensors": 1})
    assert "2.5" in merge_preview.table_of(shown) and "-0.5" in merge_preview.table_of(shown)
    assert merge_preview.figure_of(shown) is None


def test_questions_are_the_first_of_each_task_and_ones_own() -> None:
    from merging.evaluation.tasks import read_tasks

    found = questions_of(read_tasks(SORT), ["  ", "why?"])
    assert [q.expected for q in found] == ["gklmoxyz", "abghjlpr", None] and found[2].prompt == "why?"


# -- save ---------------------------------------------------------------------------------------------------------


def test_the_job_is_one_that_the_kind_takes(app: App) -> None:
    kind, arguments, title = merge_save.job_of(app, drafts.demo("ties"), " mine ", True, 20)
    KINDS[kind].check(arguments)
    assert arguments["out"] == str(app.data / "models" / "mine") and title == "mine: TIES of 4"
    assert arguments["evaluate"]["limit"] == 20 and len(arguments["models"]) == 5
    _, plain, _ = merge_save.job_of(app, drafts.demo("ties"), "", False, 0)
    assert "out" not in plain and "evaluate" not in plain
    KINDS[kind].check(plain)


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", ".hidden", "x\n", "y" * 300])
def test_names_that_lead_elsewhere(app: App, name: str) -> None:
    with pytest.raises(AmalgamError):
        merge_save.place_of(app, name)


def test_a_name_that_is_taken(app: App) -> None:
    (app.data / "models" / "mine").mkdir(parents=True)
    assert "choose another name" in merge_save.place_words(app, "mine")
    assert str(app.data / "models" / "new") in merge_save.place_words(app, "new")


def test_the_card_of_a_result(tmp_path: Path) -> None:
    result = {"model": str(tmp_path / "<m>"), "bytes": 3_500_000, "seconds": 1.2, "warnings": ["mind <this>"],
              "survival": {"survived": 0.75}, "failures": []}  # fmt: skip
    card = merge_save.result_card(SimpleNamespace(result=result, title="TIES of 4"))
    assert "3.5 MB" in card and "75.0 %" in card and "mind &lt;this&gt;" in card and "<m>" not in card
    assert "moved or changed" in card
    assert json.dumps(result)
