"""The Experts page without a browser: what its buttons do to a draft, and what it shows of one."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from merging.analysis.finding import Finding
from merging.checkpoints.hub_search import FoundModel
from merging.errors import AmalgamError, InputError, RecipeError
from merging.preflight import Preflight
from merging.preflight_fixes import Check, Fix, change
from ui import draft as drafts
from ui.components.actions import Act
from ui.components.model_picker import entry_of_hub, number, picker
from ui.context import App
from ui.draft import DEMO, Draft, labels
from ui.pages import experts_edit as edit
from ui.pages.experts import edited
from ui.pages.experts_look import Looks
from ui.pages.experts_pick import Sources
from ui.pages.experts_view import doctor, fix_key, model_cards
from ui.permits import check_permitted, find_permitted

HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", "<b>bold</b>",
    "javascript:alert(1)", "&lt;b&gt;", "a<!--b", "`${alert(1)}`",
)  # fmt: skip


def app(tmp_path: Path, **more: Any) -> App:
    return App(data=tmp_path, jobs=None, executor=None, **more)


def looks(one: App) -> Looks:
    return Looks(lambda name: find_permitted(one, name))


# -- what buttons do ----------------------------------------------------------------------------------------------


def test_cards_change_the_draft() -> None:
    demo = drafts.demo()
    assert labels(edited(demo, Act("down", "reverse", ""))) == ["sort", "reverse", "unique", "rotate"]
    assert labels(edited(demo, Act("up", "rotate", ""))) == ["reverse", "sort", "rotate", "unique"]
    assert edited(demo, Act("on", "sort", False))["off"] == ["sort"]
    assert labels(edited(demo, Act("remove", "sort", ""))) == ["reverse", "unique", "rotate"]
    assert "base" not in edited(demo, Act("remove-base", "base", ""))["recipe"]
    weighed = edited(demo, Act("weight", "sort", "0,25"))
    assert edit.weight_of(weighed["recipe"]["experts"][1]) == 0.25
    assert edit.weight_of(edited(weighed, Act("weight", "sort", " "))["recipe"]["experts"][1]) is None


@pytest.mark.parametrize("act", [Act("remove", "nobody", ""), Act("weight", "sort", "much"), Act("launch", "", "")])
def test_what_makes_no_sense_is_refused(act: Act) -> None:
    with pytest.raises(RecipeError):
        edited(drafts.demo(), act)


def test_one_weight_for_all_that_are_on() -> None:
    draft = edit.set_all_weights(drafts.enable(drafts.demo(), "sort", False), "0.4")
    assert [edit.weight_of(e) for e in draft["recipe"]["experts"]] == [0.4, None, 0.4, 0.4]


def test_a_new_name_holds_wherever_the_recipe_speaks_of_the_expert() -> None:
    draft = drafts.enable(drafts.demo(), "sort", False)
    draft["recipe"] |= {
        "chat_template": "sort",
        "tokenizer": {"source": "sort", "tokens": {"<a>": {"source": "sort"}, "<b>": {"source": {"model": "sort", "token": "x"}}}},
        "slices": [{"sources": [{"model": "sort", "layers": [0, 2]}]}],
    }  # fmt: skip
    draft["kept"] = {"ties": {"parameters": {}, "experts": {"sort": {"weight": 2.0}}}}
    before = copy.deepcopy(draft)
    new = edit.rename(draft, "sort", "  sorter ")
    text = json.dumps({k: v for k, v in new.items() if k != "tasks"})
    assert '"sort"' not in text and text.count('"sorter"') == json.dumps(draft).count('"sort"')
    assert draft == before and new["off"] == ["sorter"]


@pytest.mark.parametrize("name", ["reverse", "base", "x" * 65])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(RecipeError):
        edit.rename(drafts.demo(), "sort", name)


def test_an_expert_without_a_name_is_called_by_its_reference() -> None:
    new = edit.rename(drafts.demo(), "sort", "")
    assert labels(new)[1] == str(DEMO / "experts" / "sort")


def test_an_adapter_brings_its_base_or_takes_the_one_there_is() -> None:
    alone = edit.choose_expert(drafts.empty(), "org/lora", ("org/base",))
    assert alone["recipe"]["base"] == "org/base"
    assert alone["recipe"]["experts"][0] | {"model": "org/base", "adapter": "org/lora"} == alone["recipe"]["experts"][0]
    there = edit.choose_expert(drafts.set_base(drafts.empty(), "org/other"), "org/lora", ("org/base",))
    assert there["recipe"]["base"] == "org/other" and there["recipe"]["experts"][0]["model"] == "org/other"
    with pytest.raises(InputError, match="does not say of which model"):
        edit.choose_expert(drafts.empty(), "org/lora", ())


def test_another_base_takes_the_adapters_along() -> None:
    draft = edit.choose_expert(drafts.empty(), "org/lora", ("org/base",))
    moved = edit.choose_base(draft, "org/new")
    assert moved["recipe"]["experts"][0]["model"] == "org/new"


def test_a_new_expert_gets_what_the_others_have() -> None:
    draft = edit.set_all_weights(drafts.demo("ties"), "0.4")
    new = edit.choose_expert(draft, "org/model")
    assert new["recipe"]["experts"][-1]["parameters"] == new["recipe"]["experts"][-2]["parameters"]
    assert drafts.problem_of(new) is None
    first = edit.choose_expert({**drafts.empty(), "recipe": {"experts": [], "method": "task_arithmetic"}}, "org/model")
    assert first["recipe"]["experts"][0]["parameters"] == {"weight": 1.0}


def test_remedies() -> None:
    demo = drafts.demo()
    assert edit.apply_fix(demo, change("x", (("dtype",), "float32")))["recipe"]["dtype"] == "float32"
    assert edit.apply_fix(demo, Fix("x", "base", "org/base"))["recipe"]["base"] == "org/base"
    assert labels(edit.apply_fix(demo, Fix("x", "remove", "sort"))) == ["reverse", "unique", "rotate"]
    assert edit.apply_fix(demo, Fix("x", "rest", "sort"))["off"] == ["sort"]
    adapter = edit.apply_fix(demo, Fix("x", "adapter", "sort"))["recipe"]["experts"][1]
    assert adapter["model"] == str(DEMO / "base") and adapter["adapter"].endswith("sort") and adapter["name"] == "sort"


# -- looking ------------------------------------------------------------------------------------------------------


def test_a_weight_that_is_typed_does_not_open_the_models_again(tmp_path: Path, monkeypatch: Any) -> None:
    times = 0

    def counted(data: Any, **_: Any) -> Preflight:
        nonlocal times
        times += 1
        return Preflight()

    monkeypatch.setattr("ui.pages.experts_look.preflight", counted)
    look, draft = looks(app(tmp_path)), edit.set_all_weights(drafts.demo(), "1")
    for weight in ("0.1", "0.2", "0.3"):
        look.look(edit.set_all_weights(draft, weight))
    assert times == 1
    look.look(edit.set_all_weights(draft, "0"))  # nothing would be merged: that is worth another look
    look.look(drafts.remove_expert(draft, "sort"))
    assert times == 3


def test_changed_files_are_looked_at_again(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(DEMO / "experts" / "sort", tmp_path / "sort")
    draft = edit.choose_expert(drafts.set_base(drafts.empty(), str(DEMO / "base")), str(tmp_path / "sort"))
    look = looks(app(tmp_path))
    assert look.look(draft) is look.look(draft) and not look.look(draft).errors
    (tmp_path / "sort" / "model.safetensors").write_bytes(b"x")
    assert set(look.look(draft).errors) == {"sort"}


def test_the_demo_has_no_findings_and_known_facts(tmp_path: Path) -> None:
    one = app(tmp_path)
    look = looks(one)
    assert "862" not in model_cards(one, drafts.demo(), look)
    found = look.look(drafts.demo())
    assert found.worst in ("ok", "note") and "Nothing stands in the way" in doctor(found)
    cards = model_cards(one, drafts.demo(), look)
    assert cards.count("862 k parameters") == 5 and "float32" in cards and "4 layers × 128" in cards


# -- choosing -----------------------------------------------------------------------------------------------------


def test_a_folder_of_models_can_be_added_at_once(tmp_path: Path) -> None:
    sources = Sources(app(tmp_path))
    shown = sources.at_path(str(DEMO / "experts"))
    assert "Add all as experts" in shown and shown.count("Use as base") == 8  # label and its name aloud
    draft, _ = sources.choose(drafts.empty(), "all", str(DEMO / "experts"))
    assert sorted(labels(draft)) == ["reverse", "rotate", "sort", "unique"]


def test_recipes_and_merged_models_are_opened_with_their_recipe(tmp_path: Path) -> None:
    sources = Sources(app(tmp_path))
    (tmp_path / "r.yml").write_text(
        "method: linear\nexperts:\n- {model: ./a, parameters: {weight: 1}}\n- {model: org/b, parameters: {weight: 1}}\n"
    )
    (tmp_path / "a").mkdir()
    assert "Open this recipe" in sources.at_path(str(tmp_path / "r.yml"))
    draft, _ = sources.choose(drafts.empty(), "open", str(tmp_path / "r.yml"))
    assert draft["recipe"]["experts"][0]["model"] == str(tmp_path / "a") and draft["recipe"]["method"] == "linear"


def test_a_merged_model_gives_its_recipe_back(tmp_path: Path) -> None:
    from merging.engine import run
    from merging.plan import make_plan

    demo = drafts.demo("task_arithmetic")
    with make_plan(drafts.recipe_of(demo)) as plan:
        run(plan, tmp_path / "merged", device="cpu", threads=1)
    sources = Sources(app(tmp_path))
    assert "Restore its recipe" in sources.at_path(str(tmp_path / "merged"))
    draft, _ = sources.choose(drafts.empty(), "recipe", str(tmp_path / "merged"))
    assert drafts.recipe_of(draft) == drafts.recipe_of(demo)


@pytest.mark.parametrize(
    "typed", ["", "relative/path", "/nowhere/at/all", "/etc/hostname", "~nobody-here/x", "\0", "x" * 5000]
)
def test_wrong_paths_end_in_words(tmp_path: Path, typed: str) -> None:
    with pytest.raises(AmalgamError) as caught:
        Sources(app(tmp_path)).at_path(typed)
    assert caught.value.what


def test_a_whole_name_can_be_used_without_a_search(tmp_path: Path) -> None:
    shown = Sources(app(tmp_path)).cached("org/some-model")
    assert 'data-of="org/some-model"' in shown
    assert "Search the Hub" in Sources(app(tmp_path)).cached("qwen")


def test_on_a_space_only_the_hub_and_the_demo(tmp_path: Path) -> None:
    space = app(tmp_path, on_space=True)
    for path in ("/etc", "~/x", "./x", "../x", "C:\\x", str(tmp_path), "/" + "x" * 5000, "x.safetensors", str(DEMO / ".." / "..")):
        with pytest.raises(InputError, match="Paths cannot be used"):
            check_permitted(space, path)
        with pytest.raises(InputError, match="Paths cannot be used"):
            Sources(space).choose(drafts.empty(), "expert", path)
    check_permitted(space, "org/model")
    check_permitted(space, str(DEMO / "base"))
    done = looks(space).look(
        {**drafts.empty(), "recipe": {"base": str(tmp_path), "experts": [{"model": "/etc/passwd", "name": "x"}]}}
    )
    assert {error.code for error in done.errors.values()} == {"E_PATH"}
    assert str(tmp_path) not in model_cards(
        space, {**drafts.empty(), "recipe": {"base": str(tmp_path), "experts": []}}, looks(space)
    )


# -- showing ------------------------------------------------------------------------------------------------------


def tags(html: str) -> set[str]:
    return set(re.findall(r"<\s*([a-zA-Z]+)", html))


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_text(tmp_path: Path, name: str) -> None:
    one = app(tmp_path)
    draft: Draft = {**drafts.empty(), "recipe": {"base": name, "experts": [
        {"model": name, "name": name}, {"model": "org/x", "adapter": name}]}}  # fmt: skip
    found = Preflight(
        [Check(Finding("E_NOT_FOUND", "problem", name, name, None, name), name, (Fix(name, "remove", name),))]
    )
    model = FoundModel("org/x", False, 1, 2, name, 3, 4, (name,), True, name)
    shown = (
        model_cards(one, draft, looks(one))
        + doctor(found)
        + picker([entry_of_hub(model)], name, name)
        + picker([], name, name)
    )
    assert tags(shown) <= {
        "ol",
        "li",
        "div",
        "span",
        "b",
        "p",
        "label",
        "input",
        "button",
        "ul",
        "a",
        "details",
        "summary",
    }
    attributes = re.sub(r'"[^"]*"', '""', shown)
    assert not re.search(r"<[^>]*\son\w+\s*=", attributes) and 'href="javascript' not in shown


def test_a_disabled_button_says_why(tmp_path: Path) -> None:
    one = app(tmp_path)
    cards = model_cards(one, drafts.demo(), looks(one))
    assert cards.count("disabled title=") == 2 and "It is the first." in cards and "It is the last." in cards


def test_findings_are_counted_and_sorted_and_settled_ones_fold_away() -> None:
    fix = change("Write float32", (("dtype",), "float32"))
    note = Check(Finding("dtype", "note", "Two types.", "", None, ""), "", (fix,))
    settled = Check(Finding("dtype", "note", "Two types.", "", None, ""), "", (), "Write float32")
    assert "1 note" in doctor(Preflight([note])) and f'data-of="{fix_key(note, fix)}"' in doctor(Preflight([note]))
    shown = doctor(Preflight([settled]))
    assert "Nothing stands in the way" in shown and "Settled: Write float32." in shown
    assert shown.index("<details") < shown.index("Settled")


@pytest.mark.parametrize(
    ("count", "text"),
    [(862_080, "862 k"), (7_241_732_096, "7.24 B"), (12, "12"), (None, "unknown"), (1_500_000, "1.5 M")],
)
def test_numbers_of_parameters(count: int | None, text: str) -> None:
    assert number(count) == text
