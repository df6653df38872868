"""The draft: what it keeps, what it refuses, and that it comes back from every place as it was."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.errors import RecipeError
from merging.recipe import Recipe
from ui import draft as d
from ui import history, links

EXPERTS = ["reverse", "sort", "unique", "rotate"]


@pytest.fixture
def demo() -> d.Draft:
    return d.demo("task_arithmetic")


def test_the_demo_is_a_recipe_that_can_run(demo: d.Draft) -> None:
    recipe = d.recipe_of(demo)
    assert [e.name for e in recipe.experts] == EXPERTS and recipe.method == "task_arithmetic"
    assert len(demo["tasks"]) == 4 and d.problem_of(demo) is None


def test_an_empty_draft_says_what_to_do_first() -> None:
    with pytest.raises(RecipeError, match="No expert") as caught:
        d.recipe_of(d.empty())
    assert "Experts page" in caught.value.fix
    with pytest.raises(RecipeError, match="No method"):
        d.recipe_of(d.add_expert(d.empty(), "org/one"))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "pcb"])
def test_recipe_text_and_link_give_the_same_recipe_back(method: str) -> None:
    draft = d.demo(method)
    recipe = d.recipe_of(draft)
    assert d.recipe_of(d.from_recipe(recipe)) == recipe
    assert d.recipe_of(d.from_yaml(d.yaml_of(draft))) == recipe
    assert d.recipe_of(links.from_link(links.link_of(draft))) == recipe
    assert d.yaml_of(links.from_link(links.link_of(draft))) == d.yaml_of(draft), "also in the same order"
    assert links.checked(json.loads(json.dumps(draft))) == draft


def test_no_function_changes_the_draft_it_is_given(demo: d.Draft) -> None:
    before = copy.deepcopy(demo)
    d.set_method(demo, "ties")
    d.set_parameter(demo, ("experts", "sort", "parameters", "weight"), 0.7)
    d.add_expert(demo, "org/new")
    d.remove_expert(demo, "sort")
    d.move_expert(demo, "sort", 2)
    d.enable(demo, "sort", False)
    d.set_tasks(demo, [])
    d.active(demo)["experts"][0]["parameters"]["weight"] = 9
    assert demo == before


def test_set_parameter_finds_experts_by_label_and_by_position(demo: d.Draft) -> None:
    for place in ("sort", 1):
        new = d.set_parameter(demo, ("experts", place, "parameters", "weight"), 0.7)
        assert [e.parameters["weight"] for e in d.recipe_of(new).experts] == [0.4, 0.7, 0.4, 0.4]
    assert d.recipe_of(d.set_parameter(demo, ("include", "norms"), True)).include.norms is True
    assert "dtype" not in d.set_parameter(d.set_parameter(demo, ("dtype",), "float16"), ("dtype",), None)["recipe"]
    with pytest.raises(RecipeError, match="no expert 'gone'"):
        d.set_parameter(demo, ("experts", "gone", "parameters", "weight"), 1.0)


def test_a_method_that_is_left_and_chosen_again_has_its_parameters_back() -> None:
    ties = d.set_parameter(d.demo("ties"), ("experts", "sort", "parameters", "density"), 0.3)
    pcb = d.set_method(ties, "pcb")
    assert d.recipe_of(pcb).method == "pcb" and all("density" not in e["parameters"] for e in pcb["recipe"]["experts"])
    again = d.set_method(pcb, "ties")
    assert d.recipe_of(again) == d.recipe_of(ties)
    assert "ties" not in again["kept"]


def test_parameters_that_the_new_method_does_not_allow_stay_behind() -> None:
    draft = d.set_parameter(d.demo("pcb"), ("parameters", "lambda"), [0.5, 1.0])
    assert d.set_method(draft, "ties")["recipe"]["parameters"]["lambda"] == [0.5, 1.0]
    assert "ratio" not in d.set_method(draft, "ties")["recipe"]["parameters"]


def test_experts_get_names_of_their_own() -> None:
    draft = d.empty()
    for model in ("org/chat", "other/chat", "/models/base", "/models/base@main"):
        draft = d.add_expert(draft, model)
    assert d.labels(draft) == ["chat", "chat-2", "base-2", "base-3"]  # "base" has a meaning of its own in recipes


def test_an_expert_that_sits_out_keeps_its_place_and_settings(demo: d.Draft) -> None:
    off = d.enable(demo, "sort", False)
    assert [e.name for e in d.recipe_of(off).experts] == ["reverse", "unique", "rotate"]
    assert "sort" not in d.yaml_of(off)
    assert d.recipe_of(d.enable(off, "sort", True)) == d.recipe_of(demo)
    applied = d.from_yaml(d.yaml_of(off), keep=off)  # an edit of the text does not lose it
    assert applied["off"] == ["sort"] and d.recipe_of(applied) == d.recipe_of(off)
    everyone = off
    for name in EXPERTS:
        everyone = d.enable(everyone, name, False)
    with pytest.raises(RecipeError, match="No expert") as caught:
        d.recipe_of(everyone)
    assert "switched off" in caught.value.why


def test_experts_move_as_far_as_there_are_places(demo: d.Draft) -> None:
    assert d.labels(d.move_expert(demo, "reverse", 1)) == ["sort", "reverse", "unique", "rotate"]
    assert d.labels(d.move_expert(demo, "reverse", -5)) == EXPERTS
    assert d.labels(d.move_expert(demo, "reverse", 99))[-1] == "reverse"


def test_text_errors_tell_the_line(demo: d.Draft) -> None:
    text = d.yaml_of(demo).replace("method:", "methd:")
    with pytest.raises(RecipeError, match="line 20, column 1: methd"):
        d.from_yaml(text)


@pytest.mark.parametrize("text", ["/etc/passwd", "recipe.yml", "", "~/recipe.yml"])
def test_text_is_never_taken_for_a_file(text: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yml").write_text(d.yaml_of(d.demo()))
    with pytest.raises(RecipeError):
        d.from_yaml(text)


def test_relative_paths_of_a_file_become_absolute(tmp_path) -> None:
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
    recipe = Recipe.parse(
        {"base": "base", "experts": ["a", "org/b"], "method": "task_arithmetic", "parameters": {"weight": 0.5}}
    )
    draft = d.with_absolute_paths(d.from_recipe(recipe), tmp_path)
    assert draft["recipe"]["base"] == str(tmp_path / "base")
    assert [e["model"] for e in draft["recipe"]["experts"]] == [str(tmp_path / "a"), "org/b"]


# -- what comes from outside --------------------------------------------------------------------------


def packed(data: object) -> str:
    return base64.urlsafe_b64encode(zlib.compress(json.dumps(data).encode())).decode().rstrip("=")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "!!!",
        "eJx",
        "A" * 20_000,
        packed([1, 2]),
        packed({"recipe": {"experts": []}, "evil": 1}),
        packed({"recipe": {"experts": [], "unknown": 1}}),
        packed({"recipe": {"experts": [{"name": "no model"}]}}),
        packed({"recipe": {"experts": ["a\nb"]}}),
        packed({"recipe": {"experts": ["a", "a"]}}),
        packed({"recipe": {"experts": [], "method": "nonsense"}}),
        packed({"recipe": {"experts": [], "method": ["ties"]}}),
        packed({"recipe": {"experts": "abc"}}),
        packed({"recipe": {"experts": [], "parameters": 3}}),
        packed({"recipe": {"experts": []}, "tasks": [1]}),
        packed({"recipe": None}),
        packed({}) + "AAAA",
        base64.urlsafe_b64encode(zlib.compress(b'{"recipe":{"experts":[],"seed":NaN}}')).decode(),
        base64.urlsafe_b64encode(zlib.compress(b" " * 50_000_000, 9)).decode()[:15_000],
        base64.urlsafe_b64encode(zlib.compress(b"[" * 200_000)).decode(),
    ],
)  # fmt: skip
def test_links_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        links.from_link(text)
    assert caught.value.code in ("E_RECIPE_READ", "E_RECIPE_FIELD")


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_", max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_word_as_a_link_is_an_error_of_ours_or_a_draft(text: str) -> None:
    with contextlib.suppress(RecipeError):
        links.checked(links.from_link(text))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["recipe", "off", "tasks", "kept", "experts", "model", "name", "method", "base", "parameters"]), inner, max_size=4
    ),
    max_leaves=12,
)  # fmt: skip


@given(json_values)
@settings(max_examples=400, deadline=None)
def test_whatever_the_browser_kept_is_a_draft_or_an_error_of_ours(data: object) -> None:
    try:
        draft = links.checked(data)
    except RecipeError:
        return
    d.yaml_of(draft)
    d.problem_of(draft)
    assert links.checked(draft) == draft


# -- undo ---------------------------------------------------------------------------------------------


def test_a_hundred_steps_back_and_forth() -> None:
    draft, past, seen = d.demo(), history.start(), []
    for step in range(100):
        seen.append(draft)
        past = history.push(past, draft, "slider", step * 10.0)
        draft = d.set_parameter(draft, ("parameters", "lambda"), step / 100)
    last = draft
    for expected in reversed(seen):
        past, draft = history.undo(past, draft)  # type: ignore[misc]
        assert draft == expected
    assert history.undo(past, draft) is None
    for _ in range(100):
        past, draft = history.redo(past, draft)  # type: ignore[misc]
    assert draft == last and history.redo(past, draft) is None


def test_a_dragged_slider_is_one_step_and_two_controls_are_two() -> None:
    first, past = d.demo(), history.start()
    past = history.push(past, first, "[1]", 0.0)
    past = history.push(past, d.empty(), "[1]", 0.4)
    assert len(past["past"]) == 1 and history.undo(past, d.empty())[1] == first  # type: ignore[index]
    assert len(history.push(past, first, "[2]", 0.5)["past"]) == 2
    assert len(history.push(past, first, "[1]", 9.0)["past"]) == 2


def test_a_new_edit_forgets_what_was_undone() -> None:
    past = history.push(history.start(), d.empty(), "", 0.0)
    past, _ = history.undo(past, d.demo())  # type: ignore[misc]
    assert past["future"] and not history.push(past, d.empty(), "", 5.0)["future"]
