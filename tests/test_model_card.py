"""A model card says what it was told, whatever the names in it try to be."""

from __future__ import annotations

import ast
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from merging import model_card as module
from merging.model_card import CardFacts, ModelLine, common_license, escaped, front_matter, model_card
from merging.recipe import Recipe
from merging.recipe_yaml import load_recipe, to_yaml

FACTS = CardFacts(
    title="My merge",
    method="ties",
    method_title="TIES",
    method_idea="Keep the largest changes.",
    paper="https://arxiv.org/abs/2306.01708",
    recipe_yaml="method: ties\nbase: org/base\nexperts: [org/one, ./two]\n",
    models=[
        ModelLine("org/base", "base", "org/base", "0123abc"),
        ModelLine("org/one", "expert", "org/one", "4567def", "weight 0.5, density 0.2"),
        ModelLine("./two", "expert", coefficients="weight 0.5"),
    ],
    dtype="bfloat16",
    parameters=494_032_768,
    survival=0.931,
    warnings=["The type rounded 7% away."],
    notes=["two has 7 more tokens."],
    versions={"amalgam": "0.1.0", "torch": "2.13.0"},
    license={"license": "apache-2.0"},
    library_name="transformers",
    pipeline_tag="text-generation",
)

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!-- comment", "-->", "<?php",
    "<![CDATA[x]]>", "</div>", "<b", "< b >", "&lt;script&gt;", "&#60;b&#62;", "&#x3c;", "&amp;", "&",
    "&copy;", "[x](javascript:alert(1))", "](javascript:alert(1))", "![x](http://evil/x.png)",
    "[x]: javascript:alert(1)", "[x][y]", "[^1]", "<javascript:alert(1)>", "<http://evil.example>",
    "http://evil.example/x", "www.evil.example", "WWW.evil.example", "ann@evil.example",
    "mailto:ann@evil.example", "@everyone", "javascript:alert(1)", "```", "`", "``x``", "````yaml", "~~~",
    "a`b", "\\", "\\`", "\\\\<b>", "a\\", "C:\\temp\\new", "a|b", "||", "| a | b |", "\\|", "---", "- - -",
    "===", "# heading", "#", "x #", "1. one", "1) one", "99999. x", "- item", "+ item", "* item",
    "> quote", "    code", "\tcode", "*a*", "**a**", "_a_", "__a__", "a_b_c", "~a~", "~~a~~", "$x$",
    "$$x$$", ":smile:", "a\nb", "a\n\n# b", "a\r\nb", "a\rb", "x\nlicense: mit", "x\n---\nlicense: mit",
    "a\x00b", "\x1b[31mred", "\x7f", "a\u202eb", "\u2066x\u2069", "a\u200bb", "\ufeffa", "a\u2028b",
    "\x85", "\xa0", "{{ cycler.__init__.__globals__.os.popen('id') }}",
    "{% for i in range(10) %}x{% endfor %}", "{{7*7}}", "${7*7}", "#{7*7}", "<%= 7*7 %>",
    "!!python/object/apply:os.system ['id']", "&anchor", "*alias", "%YAML 1.1", "? key", "- ", "no",
    "null", "1e-3", "1:30", "~", "", " ", " lead", "trail ", "a  b", "ünï", "模型", "🙂", "\ud800", "a" * 500,
    "org/name\u0000", "../../etc/passwd", "org//name", "-org/name", "org/na--me", "a" * 97,
    "org/name@main", "'", '"', "'\"",
]  # fmt: skip
PARSER = MarkdownIt("commonmark").enable("table")


def body_of(card: str) -> str:
    assert card.startswith("---\n")
    return card[4:].split("\n---\n", 1)[1]


def matter_of(card: str) -> Any:
    return yaml.safe_load(card[4:].split("\n---\n", 1)[0])


def inline(tokens: list[Token]) -> list[Token]:
    return [child for token in tokens for child in token.children or []]


def cells(card: str) -> list[str]:
    """The texts of the table's body, as a reader of the page sees them."""
    tokens = PARSER.parse(body_of(card))
    opened = [i for i, token in enumerate(tokens) if token.type == "td_open"]
    assert all(child.type == "text" for i in opened for child in tokens[i + 1].children or [])
    return ["".join(child.content for child in tokens[i + 1].children or []) for i in opened]


def unescaped(shown: str) -> str:
    """The text of which ``escaped`` shows this."""

    def one(match: re.Match[str]) -> str:
        if match[1] is not None:
            return chr(int(match[1][1:], 16))
        return {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}[match[2]]

    return re.sub(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})|\\(.)", one, shown)


def test_a_plain_card_reads_well() -> None:
    card = model_card(FACTS)
    assert "| org/one | expert | 4567def | weight 0.5, density 0.2 |" in card
    assert "```yaml\nmethod: ties\nbase: org/base\nexperts: [org/one, ./two]\n```" in card
    assert "([paper](https://arxiv.org/abs/2306.01708))" in card
    assert "python app.py verify OUT" in card
    assert "- 494,032,768 parameters in bfloat16" in card and "- Delta survival 93.1%: this share" in card
    assert "- The type rounded 7% away." in card and "- two has 7 more tokens." in card
    assert "\\" not in card


def test_the_hub_reads_the_front_matter() -> None:
    assert ModelCard(model_card(FACTS)).data.to_dict() == {
        "base_model": ["org/base", "org/one"],
        "base_model_relation": "merge",
        "tags": ["merge", "amalgam"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
    }


def test_what_is_not_known_is_left_out() -> None:
    card = model_card(CardFacts("x", "linear", "Linear", "method: linear\n", [ModelLine("a", "expert")]))
    assert matter_of(card) == {"tags": ["merge", "amalgam"]}
    assert "Not stated, because the source models do not all state the same one." in card
    assert "## Warnings" not in card and "## Notes" not in card and "## Numbers" not in card


def check_card(text: str, facts: CardFacts, recipe: Any) -> None:
    """The card has the shape of every card, and ``text`` stands in it exactly where it was put."""
    card = model_card(facts)
    card.encode("utf-8")
    assert "<" not in card
    assert matter_of(card) == front_matter(facts)
    tokens = PARSER.parse(body_of(card))
    assert not {"html_block", "blockquote_open", "hr", "code_block"} & {token.type for token in tokens}
    kinds = {token.type for token in inline(tokens)}
    assert not kinds & {"html_inline", "image", "em_open", "softbreak", "hardbreak"}
    links = [token.attrs["href"] for token in inline(tokens) if token.type == "link_open"]
    assert links == ["https://arxiv.org/abs/2306.01708"]
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[1:] == ["Models", "Recipe", "Make it again", "Numbers", "Warnings", "Notes", "Licence"]
    fences = [token for token in tokens if token.type == "fence"]
    assert [fence.info for fence in fences] == ["yaml", "sh"]
    assert yaml.safe_load(fences[0].content) == recipe
    assert [unescaped(cell) for cell in cells(card)] == [text, "expert", text, text]
    items = [tokens[i + 2] for i, token in enumerate(tokens) if token.type == "list_item_open"]
    shown = ["".join(child.content for child in item.children or []) for item in items]
    assert [unescaped(item) for item in shown[-2:]] == [text, text]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_stand_for_themselves(text: str) -> None:
    recipe = {"method": text, "experts": [text, {text: {"deep": text}}], "n": 1e-05}
    facts = replace(
        FACTS,
        title=text,
        recipe_yaml=yaml.safe_dump(recipe, sort_keys=False),
        models=[ModelLine(text, "expert", text, text, text)],
        warnings=[text],
        notes=[text],
        versions={"amalgam": text, "torch": text},
        library_name=text,
        pipeline_tag=text,
    )
    check_card(text, facts, recipe)
    matter = front_matter(facts)
    assert matter.get("base_model", []) in ([], [text])
    if "base_model" in matter:
        assert re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", text, re.ASCII)


def test_there_are_enough_hostile_names() -> None:
    assert len(set(HOSTILE)) >= 60


PIECES = st.one_of(st.sampled_from("<>&[]()!*_`~#|\\-+.:@$ \n\t0w/"), st.characters())


@given(st.text(PIECES, max_size=30))
def test_any_text_stands_for_itself(text: str) -> None:
    shown = escaped(text)
    assert "<" not in shown and "\n" not in shown
    for before, prefix, after in (("- ", "", ""), ("# ", "", ""), ("see ", "see ", " there")):
        tokens = PARSER.parse(before + shown + after)
        assert {child.type for child in inline(tokens)} <= {"text", "text_special"}
        assert unescaped("".join(child.content for child in inline(tokens))) == prefix + text + after


@pytest.mark.parametrize(
    "recipe", ["a: '```'\n", "a: |\n  ```yaml\n  ````\n  x\n", "a: '" + "`" * 50 + "'\n"]
)
def test_recipes_stay_behind_their_fence_as_they_are(recipe: str) -> None:
    card = model_card(replace(FACTS, recipe_yaml=recipe))
    fences = [token for token in PARSER.parse(body_of(card)) if token.type == "fence"]
    assert fences[0].content == recipe and len(fences) == 2


def test_the_recipe_in_a_card_makes_the_same_merge() -> None:
    recipe = Recipe.parse(
        {
            "method": "ties",
            "base": "./ba`se<b>",
            "experts": [{"model": "org/one", "parameters": {"weight": 1e-05, "density": 0.2}}, "./ünï"],
            "tokenizer": {"source": "union", "tokens": {"<|im_start|>": {"source": "org/one"}}},
            "chat_template": "{% if a %}\n```<{{ b }}>\n{% endif %}\n\u202e",
        }
    )
    card = model_card(replace(FACTS, recipe_yaml=to_yaml(recipe)))
    fence = next(token for token in PARSER.parse(body_of(card)) if token.type == "fence")
    assert "<" not in card and "\u202e" not in card
    assert load_recipe(fence.content).recipe == recipe


@pytest.mark.parametrize(
    "repository",
    ["org/name", "gpt2", "Qwen/Qwen2.5-0.5B", "123", "no", "a/b_c.d-e"],
)
def test_repositories_are_listed_once_and_as_text(repository: str) -> None:
    lines = [ModelLine("x", "base", repository), ModelLine("y", "expert", repository)]
    assert matter_of(model_card(replace(FACTS, models=lines)))["base_model"] == [repository]


def test_no_template_engine() -> None:
    """A card template that a user can write runs code, as in huggingface_hub's ModelCard.from_template."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {"jinja2", "string", "mako", "huggingface_hub"}
    assert not [
        n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("format", "Template")
    ]


# Licences


def readme(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["---\nlicense: mit\n---\n"] * 2, {"license": "mit"}),
        (["---\nlicense: mit\n---\n", '---\r\ntags: [a]\r\nlicense: "mit"\r\n---\r\nx'], {"license": "mit"}),
        (["---\nlicense: mit\n---\n", "---\nlicense: apache-2.0\n---\n"], {}),
        (["---\nlicense: mit\n---\n", "# nothing stated"], {}),
        (["license: mit\n"], {}),
        (["x\n---\nlicense: mit\n---\n"], {}),
        (["---\nlicense: mit\nno end"], {}),
        (["---\nlicense: mit\nlicense: apache-2.0\n---\n"], {}),
        (["---\nlicense:\n- mit\n---\n"], {}),
        (["---\nlicense: <b>\n---\n"], {}),
        (["---\nlicense: !!python/object:x\n---\n"], {}),
        (["---\nx: |\n  license: mit\n---\n"], {}),
        (["---\nlicense: other\n---\n"], {}),
        (
            ["---\nlicense: other\nlicense_name: llama3\nlicense_link: https://x.org/l\n---\n"],
            {"license": "other", "license_name": "llama3", "license_link": "https://x.org/l"},
        ),
        (["---\nlicense: other\nlicense_name: llama3\nlicense_link: javascript:alert(1)\n---\n"], {}),
        (
            [
                "---\nlicense: other\nlicense_name: llama3\n---\n",
                "---\nlicense: other\nlicense_name: gemma\n---\n",
            ],
            {},
        ),
        (["---\n" + "a: &a [*a, *a]\n" * 5_000 + "license: mit\n---\n"], {}),
        ([], {}),
    ],
    ids=range(18),
)
def test_a_licence_is_stated_only_if_all_agree(
    tmp_path: Path, texts: list[str], expected: dict[str, str]
) -> None:
    folders = [readme(tmp_path / str(i), text) for i, text in enumerate(texts)]
    assert common_license(folders) == expected
    assert matter_of(model_card(replace(FACTS, license=expected))).get("license") == expected.get("license")


def test_readmes_that_are_no_files(tmp_path: Path) -> None:
    good = readme(tmp_path / "good", "---\nlicense: mit\n---\n")
    link, pipe, empty = tmp_path / "link", tmp_path / "pipe", tmp_path / "empty"
    for folder in (link, pipe, empty):
        folder.mkdir()
    (link / "README.md").symlink_to(good / "README.md")
    os.mkfifo(pipe / "README.md")
    for folder in (link, pipe, empty):
        assert common_license([good, folder]) == {}
