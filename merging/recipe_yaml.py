"""Recipes as text: a strict YAML reader, a writer that gives the same recipe back, and ``load_recipe``.

YAML as commonly read is full of traps: ``no`` is false, ``1:30`` is 90, ``1e-3`` is text, a key may stand
twice, tags run code, and nine lines of aliases unfold to a billion items. So only YAML's *syntax* is used
here (PyYAML's events); what the text means is decided below, in few rules:

* ``true``, ``false``, ``null`` (and ``~`` and nothing) and decimal numbers are themselves; every other
  plain word is text;
* keys are text, and none may stand twice; there are no tags, no merge keys and only one document;
* size, depth, aliases and the number of items after unfolding aliases are limited.

Errors give line and column.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from .errors import RecipeError
from .recipe import Recipe
from .recipe_parameters import Path, RecipeProblem, number, path_text, suggestion

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_ALIASES = 100
MAX_ITEMS = 20_000
"""Most scalars, lists and mappings, aliases unfolded."""

INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
PLAIN = re.compile(r"[A-Za-z_./<|][A-Za-z0-9_./@+|<>-]*")
NOT_PLAIN = re.compile(
    r"(?i)true|false|null|yes|no|on|off|y|n|~|\.inf|\.nan|[-+.0-9e_]+|<<|.*---.*|[<|]|[|].*"
)
"""Words that some reader of YAML (1.1 or 1.2) may take for something other than text."""


@dataclass
class Document:
    """What a text says, and where it says it."""

    data: Any
    name: str = ""
    """The file's name, for messages."""
    positions: dict[Path, tuple[int, int]] = field(default_factory=dict)
    """Line and column (from 1) of each item."""

    def locate(self, problem: RecipeProblem, path: Path | None = None) -> RecipeError:
        """The same error with the line and column of its place (or of ``path``)."""
        path = problem.path if path is None else path
        near = path
        while near and near not in self.positions:
            near = near[:-1]
        line, column = self.positions.get(near, (1, 1))
        where = f"{self.name}, line {line}, column {column}" if self.name else f"line {line}, column {column}"
        what = f"{where}: {path_text(path)}: {problem.message}"
        return RecipeError(problem.code, what, problem.why, problem.fix)


@dataclass
class LoadedRecipe:
    """A recipe that was read from text."""

    recipe: Recipe
    dialect: str
    """"amalgam" or "mergekit"."""
    notes: list[str] = field(default_factory=list)
    """What was understood differently from how mergekit would."""


def load_recipe(source: str | FilePath) -> LoadedRecipe:
    """The recipe in a file, or in ``source`` itself if that is text (has a line break or a ``key: value``).

    The dialect shows in the keys: ``merge_method`` is mergekit's. Errors: RecipeError, with line and column.
    """
    is_text = isinstance(source, str) and (
        "\n" in source or re.match(r"\s*([\[{]|[\w\"']+\s*:(\s|$))", source)
    )
    path = FilePath("" if is_text else source)
    document = read_yaml(str(source)) if is_text else read_yaml(_read_file(path), str(path))
    keys = set(document.data) if isinstance(document.data, dict) else set()
    if "merge_method" in keys and not keys & {"method", "amalgam"}:
        from .mergekit_dialect import from_mergekit

        return from_mergekit(document)
    try:
        if isinstance(document.data, dict) and not keys & {"method", "amalgam", "experts"}:
            hints = [suggestion(key, ("method", "merge_method")) for key in document.data] or [""]
            fix = max(hints, key=lambda hint: hint.startswith("Did you mean"))
            raise RecipeProblem((), "it names no method: or merge_method: (mergekit's).", fix=fix)
        return LoadedRecipe(Recipe.parse(document.data), "amalgam")
    except RecipeProblem as problem:
        raise document.locate(problem) from None


def _read_file(path: FilePath) -> str:
    def refuse(why: str, fix: str = "") -> RecipeError:
        return RecipeError("E_RECIPE_READ", f"The recipe {str(path)[:200]} cannot be read.", why, fix)

    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise refuse("It is not a file.", "Give the path of a YAML file.")
            with os.fdopen(os.dup(descriptor), "rb") as file:
                raw = file.read(MAX_BYTES + 1)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        raise refuse(f"{getattr(error, 'strerror', None) or error}.") from None
    if len(raw) > MAX_BYTES:
        raise refuse(
            f"It is larger than {MAX_BYTES // 1024} kB.", "A recipe is a short text. Is this the right file?"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refuse(f"It is not UTF-8 text (byte {error.start}).", "Save it as UTF-8.") from None


# -- reading ------------------------------------------------------------------------------------------


def read_yaml(text: str, name: str = "") -> Document:
    """Plain data from YAML text by the rules above. RecipeError E_RECIPE_READ for anything else."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise RecipeError("E_RECIPE_READ", f"The recipe is larger than {MAX_BYTES // 1024} kB.")
    return _Reader(text, name).document


class _Reader:
    """Builds data from the events of the parser. No recursion, so depth is a matter of counting."""

    def __init__(self, text: str, name: str) -> None:
        self.document = Document(None, name)
        self.items = self.aliases = 0
        self.anchors: dict[str, tuple[Any, int] | None] = {}
        """Finished anchors: the data and how many items it has. None: still open."""
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        try:
            self._build(yaml.parse(text, Loader=loader))
        except yaml.MarkedYAMLError as error:
            raise self._error(error.problem_mark, f"{error.problem or error.context}.") from None
        except (yaml.YAMLError, UnicodeError) as error:
            reason = getattr(error, "reason", "") or "it holds characters that YAML does not allow"
            mark = None
            if isinstance(place := getattr(error, "position", None), int):
                before = text[:place]
                mark = yaml.Mark("", place, before.count("\n"), place - before.rfind("\n") - 1, None, 0)
            raise self._error(mark, f"{reason}.") from None

    def _error(self, mark: Any, what: str, fix: str = "") -> RecipeError:
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        prefix = f"{self.document.name}{', ' if where else ': '}" if self.document.name else ""
        return RecipeError(
            "E_RECIPE_READ", f"{prefix}{where}{what}", "The text is not a recipe in YAML.", fix
        )

    def _text(self, event: Any) -> str:
        """A scalar's text. Half of a surrogate pair is no character (some parsers let it pass)."""
        if any("\ud800" <= c <= "\udfff" for c in event.value):
            raise self._error(event.start_mark, "it holds half a character (a lone surrogate).")
        return event.value

    def _build(self, events: Any) -> None:
        stack: list[list[Any]] = []  # [container, path, pending key or None, anchor, items before]
        documents = 0
        for event in events:
            mark = event.start_mark
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._error(
                        mark, "a second document starts here.", "Put each recipe in a file of its own."
                    )
            elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
                container, _, _, anchor, before = stack.pop()
                if anchor:
                    self.anchors[anchor] = (container, self.items - before)
            elif isinstance(event, yaml.NodeEvent):
                if stack and isinstance(stack[-1][0], dict) and stack[-1][2] is None:
                    stack[-1][2] = self._key(event, stack[-1][0])
                    key_path = (*stack[-1][1], stack[-1][2])
                    self.document.positions[key_path] = (mark.line + 1, mark.column + 1)
                    continue
                path = self._path(stack)
                before = self.items
                value = self._value(event)
                self._attach(stack, value)
                if path not in self.document.positions:
                    self.document.positions[path] = (mark.line + 1, mark.column + 1)
                if isinstance(event, yaml.CollectionStartEvent):
                    if len(stack) >= MAX_DEPTH:
                        raise self._error(mark, f"it is nested more than {MAX_DEPTH} deep.")
                    stack.append([value, path, None, event.anchor, before])
                    if event.anchor:
                        self.anchors[event.anchor] = None
                elif isinstance(event, yaml.ScalarEvent) and event.anchor:
                    self.anchors[event.anchor] = (value, 1)

    def _path(self, stack: list[list[Any]]) -> Path:
        if not stack:
            return ()
        container, path, key = stack[-1][:3]
        return (*path, len(container) if isinstance(container, list) else key)

    def _attach(self, stack: list[list[Any]], value: Any) -> None:
        if not stack:
            self.document.data = value
        elif isinstance(stack[-1][0], list):
            stack[-1][0].append(value)
        else:
            stack[-1][0][stack[-1][2]] = value
            stack[-1][2] = None

    def _key(self, event: Any, mapping: dict[str, Any]) -> str:
        self._count(event, 1)
        if not isinstance(event, yaml.ScalarEvent) or event.anchor or event.tag:
            raise self._error(event.start_mark, "a key must be a plain word.")
        if event.value == "<<" and event.implicit[0]:
            raise self._error(event.start_mark, "merge keys (<<) are not supported.", "Write the fields out.")
        if event.value in mapping:
            raise self._error(
                event.start_mark, f"the key {ascii(event.value[:80])} stands twice.", "Keep one of them."
            )
        return self._text(event)

    def _count(self, event: Any, items: int) -> None:
        self.items += items
        if self.items > MAX_ITEMS:
            raise self._error(event.start_mark, f"it has more than {MAX_ITEMS} items.")

    def _value(self, event: Any) -> Any:
        if isinstance(event, yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > MAX_ALIASES:
                raise self._error(event.start_mark, f"it has more than {MAX_ALIASES} aliases.")
            name = str(event.anchor)
            found = self.anchors.get(name)
            if found is None:
                reason = "stands inside of what it names" if name in self.anchors else "names nothing above"
                raise self._error(event.start_mark, f"the alias *{name[:80]} {reason}.")
            self._count(event, found[1])
            return found[0]
        self._count(event, 1)
        if event.tag is not None:
            raise self._error(event.start_mark, "tags (!) are not supported.", "Write plain values.")
        if isinstance(event, yaml.MappingStartEvent):
            return {}
        if isinstance(event, yaml.SequenceStartEvent):
            return []
        text = self._text(event)
        return scalar(text) if event.implicit[0] else text


def scalar(text: str) -> Any:
    """A plain (unquoted) scalar: true, false, null, a decimal number, or text."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text[0] in "tT"
    if INTEGER.fullmatch(text):
        return int(text)
    return number(text)


# -- writing ------------------------------------------------------------------------------------------


def to_yaml(recipe: Recipe) -> str:
    """The recipe as text that ``load_recipe`` (or any reader of YAML 1.1 or 1.2) reads back as it was."""
    return write_yaml(recipe.to_data())


def write_yaml(data: Any) -> str:
    """Plain data as YAML: block style, lists of scalars in one line, texts quoted where any doubt is."""
    return "\n".join(_lines(data, 0)) + "\n"


def _lines(data: Any, indent: int) -> list[str]:
    pad = "  " * indent
    if isinstance(data, dict) and data:
        lines = []
        for key, value in data.items():
            head = f"{pad}{_text(str(key))}:"
            if _is_inline(value):
                lines.append(f"{head} {_inline(value)}")
            elif isinstance(value, str):
                lines += [f"{head} |{'' if value.endswith(chr(10)) else '-'}"]
                lines += [f"{pad}  {line}" if line else "" for line in value.removesuffix("\n").split("\n")]
            else:
                lines += [head, *_lines(value, indent + 1)]
        return lines
    if isinstance(data, list) and data:
        lines = []
        for value in data:
            inner = [f"{pad}  {_inline(value)}"] if _is_inline(value, False) else _lines(value, indent + 1)
            lines += [f"{pad}- {inner[0].lstrip(' ')}", *inner[1:]]
        return lines
    return [f"{pad}{_inline(data)}"]


def _is_inline(value: Any, block_text: bool = True) -> bool:
    if isinstance(value, dict):
        return not value
    if isinstance(value, list):
        return all(not isinstance(v, dict | list) for v in value)
    # long texts in literal style, if every character may stand there as it is
    return not (
        block_text
        and isinstance(value, str)
        and "\n" in value.strip("\n")
        and not value.endswith("\n\n")
        and not value.startswith((" ", "\n"))
        and all(c == "\n" or " " <= c <= "~" or "\xa1" <= c <= "\u1fff" for c in value)
        and all(line.strip(" ") or not line for line in value.split("\n"))
    )


def _inline(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_inline(v) for v in value)}]"
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        text = repr(value)
        # YAML 1.1 takes 1e-05 for text: it wants a point and a sign
        return re.sub(r"^(-?\d+)e", r"\1.0e", text)
    return str(value) if isinstance(value, int) else _text(value)


def _text(text: str) -> str:
    if PLAIN.fullmatch(text) and not NOT_PLAIN.fullmatch(text) and len(text) <= 200:
        return text
    # JSON's strings are YAML's, but for characters beyond 16 bits and some that YAML does not allow raw
    escaped = json.dumps(text, ensure_ascii=False)
    return re.sub("[^\n -~\xa1-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd]", _escape, escaped)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
