"""The form comes from the method's fields, and takes back only what fits them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from merging.errors import RecipeError
from merging.methods import METHODS, get_method
from merging.methods.pcb import Pcb
from merging.recipe_parameters import fields_of
from ui import draft as drafts
from ui.components.method_cards import cards_of, cost, misfit
from ui.components.method_form import bounds_of, changed, form_of
from ui.draft import Draft


def form(draft: Draft) -> dict[str, Any]:
    return json.loads(form_of(draft))


@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_every_method_has_a_control(method: str) -> None:
    data, kind = form(drafts.set_method(drafts.demo(), method)), get_method(method)
    assert [f["name"] for f in data["shared"]] == list(fields_of(kind.Shared))
    assert [f["name"] for f in data["own"]] == list(fields_of(kind.PerExpert))
    for shown in (*data["shared"], *data["own"]):
        assert shown["help"], f"{method}.{shown['name']} has no help"
        assert shown["kind"] != "choice" or len(shown["choices"]) > 1


def test_bounds_help_and_what_is_required_come_from_the_model() -> None:
    by_name = {f["name"]: f for f in form(drafts.demo("pcb"))["shared"]}
    ratio, clip = by_name["ratio"], by_name["clip"]
    assert (ratio["low"], ratio["above"], ratio["high"], ratio["below"]) == (0, True, 1, False)
    assert (clip["low"], clip["above"], clip["high"], clip["below"]) == (0, False, 0.5, True)
    assert ratio["help"] == Pcb.Shared.model_fields["ratio"].description
    assert bounds_of("ratio", Pcb.Shared) == {"gt": 0, "le": 1}
    weight = form(drafts.demo("task_arithmetic"))["own"][0]
    assert weight["required"] and weight["slider"] == [0, 2]
    assert not form(drafts.demo("ties"))["own"][0]["required"]


def test_a_tiny_number_has_no_slider() -> None:
    data = form(drafts.set_method(drafts.demo(), "multislerp"))
    assert next(f for f in data["shared"] if f["name"] == "eps")["slider"] is None


def test_rows_show_what_holds() -> None:
    draft = drafts.set_parameter(drafts.demo("ties"), ("parameters", "weight"), 0.7)
    draft = drafts.set_parameter(draft, ("experts", "sort", "parameters", "weight"), [0.1, 0.9])
    rows = {row["label"]: row["values"] for row in form(draft)["rows"]}
    assert rows["sort"] == {"weight": [0.1, 0.9], "density": 1.0}
    assert rows["rotate"] == {"weight": 0.7, "density": 1.0}


def test_a_density_that_keeps_all_says_so() -> None:
    density = next(f for f in form(drafts.demo("ties"))["own"] if f["name"] == "density")
    assert "nothing is trimmed" in density["hint"]


def test_changes_reach_the_recipe() -> None:
    draft = drafts.demo("ties")
    one = changed(draft, {"scope": "shared", "name": "lambda", "value": 1})
    assert one["recipe"]["parameters"]["lambda"] == 1.0
    two = changed(one, {"scope": "expert", "expert": "sort", "name": "density", "value": 0.3})
    assert [e["parameters"].get("density") for e in two["recipe"]["experts"]] == [1.0, 0.3, 1.0, 1.0]
    three = changed(two, {"scope": "all", "name": "density", "value": 0.5})
    assert [e["parameters"].get("density") for e in three["recipe"]["experts"]] == [0.5] * 4
    four = changed(three, {"scope": "all", "name": "density", "value": None})
    assert all("density" not in e["parameters"] for e in four["recipe"]["experts"])
    assert draft == drafts.demo("ties"), "drafts are never changed"
    assert drafts.recipe_of(three).resolve_parameters("x").experts[0]["density"] == 0.5


@pytest.mark.parametrize(
    "change",
    [
        None,
        "lambda",
        {"scope": "shared", "name": "density", "value": 1},
        {"scope": "shared", "name": "lambda", "value": "much"},
        {"scope": "shared", "name": "lambda", "value": float("nan")},
        {"scope": "all", "name": "density", "value": 1.5},
        {"scope": "expert", "expert": "nobody", "name": "density", "value": 0.5},
        {"scope": "everything", "name": "lambda", "value": 1},
        {"scope": "shared", "name": "scope", "value": "galaxy"},
    ],
)
def test_what_no_form_sends_is_refused(change: Any) -> None:
    with pytest.raises(RecipeError):
        changed(drafts.demo("ties"), change)


def test_without_a_method_there_is_no_form() -> None:
    assert form_of(drafts.empty()) == ""
    with pytest.raises(RecipeError):
        changed(drafts.empty(), {"scope": "shared", "name": "lambda", "value": 1})


def test_cards() -> None:
    page = cards_of(drafts.demo("pcb"))
    assert page.count('type="radio"') == len(METHODS) and page.count(" checked") == 1
    assert "arXiv 2306.01708" in page
    assert misfit("slerp", 4, True) == "The recipe has 4; this takes exactly 1 expert."
    assert misfit("ties", 2, False) == "The recipe has no base yet."
    assert misfit("linear", 2, False) == "" == misfit("pcb", 1, True)
    assert cost(get_method("linear")) == "low, 1 pass" and cost(get_method("pcb")) == "high, 3 passes"
