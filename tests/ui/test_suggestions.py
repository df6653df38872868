"""Suggested settings: every method has some that it takes, and choosing a method starts with them."""

from __future__ import annotations

import pytest

from merging.methods import METHODS
from ui import draft as drafts
from ui import suggestions
from ui.draft import Draft


def somebody(experts: int) -> Draft:
    """A recipe of models that nothing is known about."""
    draft = drafts.set_base(drafts.empty(), "org/base")
    for number in range(experts):
        draft = drafts.add_expert(draft, f"org/expert-{number}")
    return draft


@pytest.mark.parametrize("method", METHODS)
def test_a_chosen_method_can_be_run_as_it_starts(method: str) -> None:
    experts = {"slerp": 1, "passthrough": 1, "nuslerp": 2}.get(method, 3)
    draft = suggestions.choose(somebody(experts), method)
    assert drafts.recipe_of(draft).method == method
    assert suggestions.is_as_suggested(draft)
    assert suggestions.SUGGESTED[method].source


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_what_trims_starts_with_a_density_that_trims(method: str) -> None:
    draft = suggestions.choose(somebody(2), method)
    assert [expert["parameters"]["density"] for expert in draft["recipe"]["experts"]] == [0.2, 0.2]


def test_the_demo_starts_with_what_was_chosen_for_it() -> None:
    draft = drafts.demo("pcb")
    assert suggestions.is_as_suggested(draft)
    assert suggestions.suggestion_for(draft, "pcb").source == suggestions.ON_DEMO
    chosen = suggestions.choose(draft, "task_arithmetic")
    assert chosen["recipe"]["experts"][0]["parameters"] == {"weight": 0.4}


def test_a_part_of_the_demo_is_not_the_demo() -> None:
    draft = drafts.enable(drafts.demo("pcb"), "sort", False)
    assert suggestions.suggestion_for(draft, "pcb").source != suggestions.ON_DEMO


def test_settings_of_a_method_come_back_with_it() -> None:
    draft = suggestions.choose(somebody(2), "ties")
    mine = drafts.set_parameter(draft, ("parameters", "lambda"), 0.7)
    assert not suggestions.is_as_suggested(mine)
    back = suggestions.choose(suggestions.choose(mine, "pcb"), "ties")
    assert back["recipe"]["parameters"]["lambda"] == 0.7


def test_however_it_is_written_what_holds_is_compared() -> None:
    draft = suggestions.choose(somebody(2), "ties")
    for expert in draft["recipe"]["experts"]:
        del expert["parameters"]["density"]
    draft["recipe"]["parameters"] = {"density": 0.2}  # λ 1 and weight 1 are defaults
    assert suggestions.is_as_suggested(draft)


def test_in_words() -> None:
    start = suggestions.Suggestion({"lambda": 1.2, "normalize": False}, {"density": 0.2})
    assert suggestions.in_words(start) == "λ 1.2, normalize off; each expert: density 0.2"
