"""Recipes as text: traps of YAML, hostile texts, damaged recipes, and the way back."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.errors import RecipeError
from merging.recipe import Recipe
from merging.recipe_yaml import MAX_BYTES, load_recipe, read_yaml, to_yaml, write_yaml

RECIPES = Path(__file__).parent / "data" / "recipes"
SAMPLES = sorted(f for f in RECIPES.glob("*.yml") if f.stem != "measured_cases")
SIMPLE = "method: linear\nexperts: [a, b]\nparameters: {weight: 1}\n"


def problem(text: str | Path) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(text)
    return caught.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("y", "y"), ("true", True), ("False", False),
        ("1:30", "1:30"), ("1e-3", 0.001), ("1E3", 1000.0), ("-2.5e+3", -2500.0), (".5", 0.5), ("1.", 1.0),
        ("-1", -1), ("+1", 1), ("0", 0), ("-0.0", -0.0), ("010", "010"), ("0x1F", "0x1F"), ("0b1", "0b1"),
        ("0o7", "0o7"), ("1_000", "1_000"), ("1,5", "1,5"), (".", "."), ("e5", "e5"), ("1e", "1e"),
        (".inf", ".inf"), (".nan", ".nan"), ("nan", "nan"), ("2026-11-21", "2026-11-21"), ("", None),
        ("~", None), ("null", None), ('"1"', "1"), ("'true'", "true"), ('"null"', "null"), ("=", "="),
        ("1 # no", 1), ("a#b", "a#b"), ("[1, two, 3.0]", [1, "two", 3.0]), ("{a: {b: }}", {"a": {"b": None}}),
        ("|\n  x\n  y\n", "x\ny\n"), (">-\n  x\n  y\n", "x y"), ("9" * 30, 1e30),
        ("9" * 200_000, "9" * 200_000), ("1e9999", float("inf")), ("1e99999", "1e99999"),
    ],
)  # fmt: skip
def test_only_plain_words_are_read_as_other_than_text(text: str, value: Any) -> None:
    found = read_yaml(f"key: {text}").data["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' stands twice"),
        ('a: 1\n"a": 2', "line 2, column 1: the key 'a' stands twice"),
        ("a: {b: 1, b: 2}", "line 1, column 11"),
        ("a: !!python/object/apply:os.system [ls]", "line 1, column 4: tags"),
        ("a: !!str 1", "tags"),
        ("a: ! 1", "tags"),
        ("!!map {a: 1}", "tags"),
        ("? !!str a\n: 1", "plain word"),
        ("? [a]\n: b", "line 1, column 3: a key must be"),
        ("? {a: b}\n: b", "a key must be"),
        ("&x a: b", "a key must be"),
        ("a: &x b\n*x : c", "a key must be"),
        ("a: *x", "the alias *x names nothing above"),
        ("a: &x [1, *x]", "the alias *x stands inside"),
        ("a: &x {b: *x}", "the alias *x stands inside"),
        ("<<: {a: 1}", "merge keys"),
        ("a: &x {b: 1}\nc: {<<: *x}", "merge keys"),
        ("a: 1\n---\nb: 2", "line 2, column 1: a second document"),
        ("a: [1, 2", "expected ',' or ']'"),
        ("a: {b: 1", "expected ',' or '}'"),
        ("a: 'x", "line 1"),
        ("a: b: c", "line 1, column 5"),
        ("\ta: b", "line 1, column 1"),
        ("a:\n\t- b", "line 2, column 1"),
        ("a: @b", "line 1"),
        ("a: `b`", "line 1"),
        ("a: %b", "line 1"),
        ("a: \x00", "recipe"),
        ("a: \x07", "recipe"),
        ('a: "\\ud800"', "recipe"),
        ('a: "\\q"', "line 1"),
        ("a: \ud800", "recipe"),
        ("[" * 33 + "]" * 33, "more than 32 deep"),
        ("[" * 500, "more than 32 deep"),
        ("{a: " * 33 + "}" * 33, "more than 32 deep"),
        ("- " * 40 + "a", "more than 32 deep"),
        ("a: &x 1\nb: [" + "*x," * 101 + "]", "more than 100 aliases"),
        ("[" + "1," * 30_000 + "]", "more than 20000 items"),
        ("x" * (MAX_BYTES + 1), "larger than 256 kB"),
        ("%YAML 3.0\n--- a", "line 1"),
        ("%TAG !e! tag:x,1:\n--- !e!a b", "tags"),
    ],
)
def test_what_is_refused(text: str, what: str) -> None:
    start = time.perf_counter()
    with pytest.raises(RecipeError) as caught:
        read_yaml(text)
    assert time.perf_counter() - start < 1
    assert caught.value.code == "E_RECIPE_READ"
    assert what in str(caught.value)
    assert len(str(caught.value)) < 500


def test_ordinary_anchors_work_and_bombs_do_not() -> None:
    document = read_yaml("a: &x {p: [1, 2]}\nb: *x\nc: [*x, &y 5, *y]")
    assert document.data["c"] == [{"p": [1, 2]}, 5, 5]
    names = "abcdefghij"
    laughs = "a: &a [ha, ha, ha, ha, ha, ha, ha, ha, ha]\n"
    for before, name in zip(names, names[1:], strict=False):
        laughs += f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    with pytest.raises(RecipeError, match="items"):
        read_yaml(laughs)


def test_positions_of_nested_items() -> None:
    document = read_yaml("a:\n  - b: 1\n    c: [x, y]\n  - z\n")
    assert document.positions[("a", 0, "c")] == (3, 5)
    assert document.positions[("a", 0, "c", 1)] == (3, 12)
    assert document.positions[("a", 1)] == (4, 5)


@pytest.mark.parametrize(
    ("text", "code", "what"),
    [
        ("\n", "E_RECIPE_READ", "not a mapping"),
        ("[1]\n", "E_RECIPE_READ", "not a mapping"),
        ("metod: ties\nx: 1", "E_RECIPE_FIELD", 'Did you mean "method"'),
        (SIMPLE + "dtyp: float32", "E_RECIPE_FIELD", 'line 4, column 1: dtyp: unknown field \'dtyp\'. '),
        (SIMPLE + "dtype: fp16", "E_RECIPE_FIELD", "float16"),
        (SIMPLE.replace("weight: 1", "weight: no"), "E_RECIPE_FIELD",
         "line 3, column 14: parameters.weight: 'no'"),
        (SIMPLE.replace("weight: 1", "weight: 1:30"), "E_RECIPE_FIELD", "'1:30'"),
        (SIMPLE.replace("weight: 1", "weight: " + "9" * 200_000), "E_RECIPE_FIELD", "'9999"),
        (SIMPLE.replace("weight: 1", "weight: 1e999"), "E_RECIPE_FIELD", "finite"),
        (SIMPLE.replace("weight: 1", "weight: .nan"), "E_RECIPE_FIELD", ".nan"),
        (SIMPLE.replace("weight: 1", "weight: 1, normalize: yes"), "E_RECIPE_FIELD", "Write true or false"),
        (SIMPLE.replace("[a, b]", "[a, a]"), "E_RECIPE_INPUTS",
         "line 2, column 14: experts[1]: 'a' is listed twice"),
        (SIMPLE.replace("[a, b]", "[a, 5]"), "E_RECIPE_FIELD", "line 2, column 14: experts[1]: 5"),
        (SIMPLE.replace("linear", "liner"), "E_RECIPE_METHOD", "Did you mean linear"),
        (SIMPLE.replace("linear", "[]"), "E_RECIPE_FIELD", "method"),
        (SIMPLE + "merge_method: linear", "E_RECIPE_FIELD", "merge_method"),
        (SIMPLE + "seed: 1e3", "E_RECIPE_FIELD", "integer"),
        (SIMPLE + "seed: -1", "E_RECIPE_FIELD", "seed"),
        (SIMPLE + "amalgam: 2", "E_RECIPE_FIELD", "format 1"),
        (SIMPLE + "include: {norm: true}", "E_RECIPE_FIELD", 'Did you mean "norms"'),
        (SIMPLE + "policies: {overflow: maybe}", "E_RECIPE_FIELD", "refuse"),
        (SIMPLE + "tokenizer: {source: unoin}", "E_RECIPE_INPUTS", 'Did you mean "union"'),
        (SIMPLE + "chat_template: a b", "E_RECIPE_INPUTS", "chat_template"),
    ],
)  # fmt: skip
def test_wrong_recipes_are_explained_with_their_place(text: str, code: str, what: str) -> None:
    error = problem(text)
    assert error.code == code
    assert what in str(error)
    assert len(str(error)) < 600


def test_recipes_from_files_and_from_text(tmp_path: Path) -> None:
    file = tmp_path / "r.yml"
    file.write_text(SIMPLE)
    assert load_recipe(file).recipe == load_recipe(SIMPLE).recipe == load_recipe(str(file)).recipe
    assert load_recipe(json.dumps({"method": "linear", "experts": ["a"], "parameters": {"weight": 1}})).recipe
    file.write_bytes(b"\xef\xbb\xbf" + SIMPLE.replace("\n", "\r\n").encode())
    assert load_recipe(file).recipe == load_recipe(SIMPLE).recipe
    file.write_text(SIMPLE + "sed: 1")
    assert "r.yml, line 4, column 1" in problem(file).what


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "big").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "binary").write_bytes(b"\x80\x04K")
    for name, why in (
        ("missing.yml", "No such file"), ("", "not a file"), ("pipe", "not a file"), ("big", "larger"),
        ("binary", "UTF-8"), ("nul\0", "null"),
    ):  # fmt: skip
        start = time.perf_counter()
        error = problem(tmp_path / name)
        assert error.code == "E_RECIPE_READ" and why in str(error), name
        assert time.perf_counter() - start < 1


# -- damaged recipes ----------------------------------------------------------------------------------


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = json.loads(json.dumps(data))
    inner = copy
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    return copy


def survives(text: str) -> bool:
    """True if it is a recipe; False if it is refused as it should be: typed, short, quickly."""
    start = time.perf_counter()
    try:
        load_recipe(text)
        return True
    except RecipeError as error:
        assert len(str(error)) < 1500
        return False
    finally:
        assert time.perf_counter() - start < 1


ODD = [
    None, True, -1, 0, 1e300, 10**18, "", " ", "x", "no", "1e-3", "auto", "base", "{{", "\u202e", "a" * 5000,
    [], {}, [[]], [{}], {"a": 1}, [1,
        [2]], [{"value": 1}], [{"filter": 1, "value": 1}], list(range(500)), "../../etc",
]  # fmt: skip


@pytest.mark.parametrize("file", SAMPLES, ids=lambda f: f.stem)
def test_a_wrong_value_anywhere_is_at_worst_a_typed_error(file: Path) -> None:
    data = read_yaml(file.read_text()).data
    mutants = [(place, odd) for place in places(data) for odd in ODD]
    chosen = random.Random(file.stem).sample(mutants, min(len(mutants), 90))
    outcomes = [survives(json.dumps(changed(data, place, odd))) for place, odd in chosen]
    assert False in outcomes


@pytest.mark.parametrize("file", SAMPLES, ids=lambda f: f.stem)
def test_a_misspelt_or_unknown_field_anywhere_is_an_error(file: Path) -> None:
    data = read_yaml(file.read_text()).data
    for path in places(data):
        if not path or not isinstance(path[-1], str) or path[:-1] in (("tokenizer", "tokens"),):
            continue  # the keys of tokens are the tokens
        parent = data
        for part in path[:-1]:
            parent = parent[part]
        wrong = path[-1][:1] + path[-1]  # "dtype" -> "ddtype"
        renamed = {wrong if key == path[-1] else key: value for key, value in parent.items()}
        assert not survives(json.dumps(changed(data, path[:-1], renamed))), path
        assert not survives(json.dumps(changed(data, path[:-1], {**parent, "surplus": 1}))), path


@pytest.mark.parametrize("file", SAMPLES, ids=lambda f: f.stem)
def test_damaged_text_is_at_worst_a_typed_error(file: Path) -> None:
    text, dice = file.read_text(), random.Random(file.stem)
    for _ in range(40):
        at, length = dice.randrange(len(text)), dice.randrange(1, 30)
        piece = "".join(
            dice.choice(" \n:-[]{}&*!|>'\"%@`#,?\t<x1\x00\u2028\U0001f600") for _ in range(length % 4 + 1)
        )
        survives(text[:at] + piece + text[at + dice.choice((0, length)) :])
        survives(text[:at] + text[at + length :] + text[at : at + length])


def test_every_sample_is_a_recipe_and_comes_back() -> None:
    for file in SAMPLES:
        loaded = load_recipe(file)
        assert loaded.dialect == file.stem.split("_")[0].replace("native", "amalgam")
        assert load_recipe(to_yaml(loaded.recipe)).recipe == loaded.recipe


# -- there and back -----------------------------------------------------------------------------------

plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["no", "1e-3", "1:30", "null", "~", "", " a", "a ", "- b", "a: b", "#", "x\ny\n", "x\n", "\nx\ny",
        "a\n\nb", "x\n y",
     "|", ">", "{{ x }}", "2001-01-01", "0x1", "010", "1_0", ".inf", "<<", "=",
     "é\u2028\ufeff\U0001f600\x85\x7f", "---",
     "x\n---\ny", "\tx\ny", "x \ny", "y", "'", '"', "\\", "%", "a\n\n", "\n", "...",
     "*a", "&a", "!a", "@a", "?", "-"]
)  # fmt: skip
numbers = st.integers(-(10**15), 10**15) | st.floats(allow_nan=False, allow_infinity=False)
plain_data = st.recursive(
    st.none() | st.booleans() | numbers | plain_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(plain_text, inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=200, deadline=None)
@given(plain_data)
def test_written_data_is_read_back_by_us_and_by_any_yaml_reader(data: Any) -> None:
    text = write_yaml(data)
    assert read_yaml(text).data == data
    assert yaml.safe_load(text) == data


names = st.from_regex(
    r"[a-zA-Z0-9_.]{1,8}/[a-zA-Z0-9_.-]{1,8}(@[a-z0-9]{1,6})?", fullmatch=True
) | plain_text.filter(lambda t: bool(t) and t == t.strip() and t.isprintable())
number = st.floats(0, 1)
filters = plain_text.filter(bool)


def settings_of(value: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    plain = value | st.lists(value, min_size=1, max_size=4)
    condition = st.fixed_dictionaries({"value": plain}, optional={"filter": filters})
    return plain | st.lists(condition, min_size=1, max_size=3)


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    keys = draw(st.lists(names, min_size=3, max_size=5, unique=True))
    base, models = keys[0], keys[1:]
    own = st.dictionaries(st.sampled_from(["weight", "density"]), settings_of(number))
    experts = [{"model": m, "parameters": draw(own)} for m in models]
    for i, expert in enumerate(experts):
        if draw(st.booleans()):
            expert["name"] = f"expert {i}"
        if draw(st.booleans()):
            expert["adapter"] = draw(names)
    data: dict[str, Any] = {
        "base": base,
        "experts": experts,
        "method": draw(st.sampled_from(["ties", "dare_ties"])),
    }
    data["parameters"] = draw(own) | {"weight": draw(number), "lambda": draw(settings_of(number))}
    if draw(st.booleans()):
        refer = [
            e.get("name") or (e["model"] + ("+" + e["adapter"] if "adapter" in e else "")) for e in experts
        ]
        sources = [{"model": m, "layers": [i, i + 3], "parameters": draw(own)} for i, m in enumerate(refer)]
        data["slices"] = [{"sources": sources, "parameters": draw(own)}]
    flags = st.dictionaries(
        st.sampled_from(["embeddings", "head", "norms", "biases"]), st.none() | st.booleans()
    )
    data["include"] = draw(flags)
    data["dtype"] = draw(st.sampled_from([None, "float16", "float32"]))
    rule = st.just({}) | st.fixed_dictionaries(
        {"source": st.sampled_from(["zero", base])}, optional={"force": st.booleans()}
    )
    data["tokenizer"] = {"source": "union", "tokens": draw(st.dictionaries(plain_text, rule, max_size=3))}
    data["chat_template"] = draw(
        st.sampled_from(["auto", "base", "none"]) | plain_text.map(lambda t: t + "{{ x }}" + t)
    )
    data["seed"] = draw(st.integers(0, 2**63 - 1))
    return data


@settings(max_examples=60, deadline=None)
@given(recipes())
def test_a_recipe_written_and_read_is_the_same_recipe(data: dict[str, Any]) -> None:
    recipe = Recipe.parse(data)
    text = to_yaml(recipe)
    again = load_recipe(text).recipe
    assert again == recipe
    assert again.canonical_json() == recipe.canonical_json()
    assert to_yaml(again) == text
    assert Recipe.parse(json.loads(recipe.canonical_json())) == recipe


def test_a_character_that_no_text_has_is_named_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "n.yml").write_bytes(b"amalgam: 1\n\0base: x\n")
    with pytest.raises(RecipeError, match=r"n\.yml, line 2, column 1: .*control characters"):
        load_recipe(tmp_path / "n.yml")
