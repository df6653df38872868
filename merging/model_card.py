"""The README of a merged model: what it was made of, how, and how to make it again.

Names of models and tensors come from strangers, and the card is shown as a web page. So there is no template
engine: the text is put together here, and each value goes through one of three doors. ``escaped`` makes any
text stand for itself in Markdown; ``fenced`` shows YAML behind a fence that it cannot leave; and what enters
the front matter must match a pattern first (a name that is no repository id cannot become one).

Everything is a pure function of ``CardFacts``; only ``common_license`` looks at files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from merging.checkpoints.files import open_plain
from merging.errors import InputError

_REPOSITORY = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_WORD = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ADDRESS = re.compile(r"https://[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+(/[A-Za-z0-9._/-]*)?")
# What means something in Markdown: anywhere, at the edge of a word, in addresses that turn into links.
_MARKUP = re.compile(r"[\\*{}\[\]~$@#]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=[wW]{3})\.")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "`": "&#96;"}
_LICENSE = re.compile(r"^(license|license_name|license_link)[ \t]*:[ \t]+(\S.*?)[ \t]*\r?$", re.MULTILINE)
_CARD_HEAD = 65_536  # bytes of a README that are looked at


@dataclass(frozen=True)
class ModelLine:
    """One model that took part."""

    name: str  # as the recipe calls it
    role: str  # "base" or "expert"
    repository: str = ""  # on the Hub, if it came from there
    revision: str = ""  # the commit
    coefficients: str = ""  # the effective ones, in words


@dataclass(frozen=True)
class CardFacts:
    """All that a card says."""

    title: str
    method: str  # its name in recipes
    method_title: str
    recipe_yaml: str
    models: Sequence[ModelLine]
    method_idea: str = ""
    paper: str = ""
    dtype: str = ""
    parameters: int = 0
    survival: float | None = None  # share of the changed weights that the output's data type could keep
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    license: Mapping[str, str] = field(default_factory=dict)  # see common_license; empty: not stated
    library_name: str = ""
    pipeline_tag: str = ""


def model_card(facts: CardFacts) -> str:
    """The text of README.md, front matter included."""
    title = escaped(facts.title)
    link = f" ([paper]({facts.paper}))" if _ADDRESS.fullmatch(facts.paper) else ""
    program = escaped(f"Amalgam {facts.versions.get('amalgam', '')}".strip())
    parts = [
        f"---\n{_yaml(front_matter(facts))}---",
        f"# {title}" if title.strip() else "# Merged model",
        f"A merge of {len(facts.models)} models, made with {program}. "
        f"Method: **{escaped(facts.method_title)}**{link}. {escaped(facts.method_idea)}".rstrip(),
        "## Models",
        _table(
            ("Model", "Role", "Revision", "Effective coefficients"),
            [(line.name, line.role, line.revision, line.coefficients) for line in facts.models],
        ),
        "## Recipe",
        fenced(facts.recipe_yaml, "yaml"),
        "## Make it again",
        "Save the recipe as `recipe.yaml`, then:",
        fenced("python app.py merge recipe.yaml OUT\npython app.py verify OUT\n", "sh"),
        "`verify` reads every byte and compares it with the SHA-256 sums in `manifest.json`, which also "
        "lists the input files, the seed and the versions. It works on a downloaded copy of this model too.",
    ]
    if numbers := _numbers(facts):
        parts += ["## Numbers", _list(numbers)]
    if facts.warnings:
        parts += ["## Warnings", _list(facts.warnings)]
    if facts.notes:
        parts += ["## Notes", _list(facts.notes)]
    parts += ["## Licence", _about_license(facts)]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """What the Hub reads. Only values of known form get in."""
    repositories = dict.fromkeys(m.repository for m in facts.models if _REPOSITORY.fullmatch(m.repository))
    result: dict[str, Any] = {}
    if repositories:
        result |= {"base_model": list(repositories), "base_model_relation": "merge"}
    result["tags"] = ["merge", "amalgam"]
    for key, value in (("library_name", facts.library_name), ("pipeline_tag", facts.pipeline_tag)):
        if _WORD.fullmatch(value):
            result[key] = value
    return result | dict(facts.license)


def common_license(folders: Sequence[Path]) -> dict[str, str]:
    """The licence that the READMEs of *all* folders state, as fields for a card; empty unless they agree.

    ``{"license": "apache-2.0"}``; for ``other`` also ``license_name`` and ``license_link``, and ``other``
    without a name agrees with none. A README is data: a few of its lines are matched, that is all.
    """
    stated = [_stated_license(folder) for folder in folders]
    agreed = bool(stated) and all(fields == stated[0] for fields in stated)
    return stated[0] if agreed else {}


def escaped(text: str) -> str:
    """``text`` so that Markdown shows exactly it, on one line: no markup, no HTML, no link.

    Characters that cannot be seen (line breaks, controls, marks that reverse the text) are shown as escapes.
    """
    shown = "".join(c if c.isprintable() and c != "\\" else _visible(c) for c in text)
    shown = _MARKUP.sub(lambda match: "\\" + match[0], shown)
    shown = re.sub(r"^([0-9]{0,9})([-+=.)])(?=[-+= ]|$)", r"\1\\\2", shown)  # a list, a line
    shown = re.sub("^ | $", "&#32;", shown)
    return re.sub("[<>|`]|&(?!#32;)", lambda match: _ENTITIES[match[0]], shown)


def fenced(text: str, language: str) -> str:
    """A code block that shows ``text``. YAML with ``<`` in it, or with characters that cannot be seen, is
    written anew with escapes in their place; it reads back as the same data.
    """
    if "<" in text or not all(c == "\n" or c.isprintable() for c in text):
        text = _yaml(yaml.safe_load(text))
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{'' if text.endswith(chr(10)) else chr(10)}{fence}"


def _visible(character: str) -> str:
    return "\\\\" if character == "\\" else character.encode("unicode_escape").decode("ascii")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {escaped(item)}" for item in items)


def _numbers(facts: CardFacts) -> list[str]:
    numbers = []
    if facts.parameters:
        numbers.append(f"{facts.parameters:,} parameters{f' in {facts.dtype}' if facts.dtype else ''}")
    if facts.survival is not None:
        numbers.append(
            f"Delta survival {facts.survival:.1%}: this share of the weights that the merge changed still "
            "differs from the base after rounding to the output's data type"
        )
    numbers += [f"{name} {version}" for name, version in facts.versions.items()]
    return numbers


def _about_license(facts: CardFacts) -> str:
    if facts.license:
        return f"All source models state the same licence: {escaped(facts.license.get('license', ''))}."
    return (
        "Not stated, because the source models do not all state the same one. Their licences still apply: "
        "look them up before you use or share this model."
    )


def _stated_license(folder: Path) -> dict[str, str]:
    """The licence fields at the head of a README; empty if there are none, or none that mean something."""
    try:
        descriptor = open_plain(folder / "README.md")
    except InputError:
        return {}
    try:
        head = os.pread(descriptor, _CARD_HEAD, 0).decode("utf-8", "replace").removeprefix("\ufeff")
    finally:
        os.close(descriptor)
    matter = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", head, re.MULTILINE | re.DOTALL)
    found: dict[str, str] = {}
    for key, value in _LICENSE.findall(matter[1] if matter else ""):
        if key in found:
            return {}
        found[key] = value.strip("'\"")
    good = _WORD.fullmatch(found.get("license", "")) and (
        found["license"] != "other" or _WORD.fullmatch(found.get("license_name", ""))
    )
    link = found.get("license_link", "")
    if not good or (link and not (_ADDRESS.fullmatch(link) or re.fullmatch("[A-Za-z0-9._-]{1,64}", link))):
        return {}
    return found if found["license"] == "other" else {"license": found["license"]}


class _Dumper(yaml.SafeDumper):
    """Texts with ``<`` are always in double quotes, where it can be written as an escape."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quoted_if_odd(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if "<" in text or not text.isprintable() else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted_if_odd)


def _yaml(data: Any) -> str:
    """Block YAML in ASCII, without a single ``<``."""
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=1 << 30, default_flow_style=False)
    return text.replace("<", "\\x3C")
