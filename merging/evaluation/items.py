"""What one line of a task file holds, by kind.

The one idea: an item has an ``id`` that is a hash of its content and of nothing else, so that records of different
runs, models and versions of a file can be paired. Line, cluster and split are not part of it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Item:
    """One question with its one right answer."""

    prompt: str
    answer: str
    line: int
    cluster: str = ""

    @property
    def id(self) -> str:
        return _hash([self.prompt, self.answer])

    @property
    def question(self) -> Any:
        """What no two items of a task may share."""
        return self.prompt


@dataclass(frozen=True, slots=True)
class ChoiceItem:
    """One question with choices; ``answer`` is the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    line: int
    cluster: str = ""

    @property
    def id(self) -> str:
        return _hash([self.prompt, self.choices, self.answer])

    @property
    def question(self) -> Any:
        return self.prompt, self.choices


@dataclass(frozen=True, slots=True)
class TextItem:
    """A text to predict."""

    text: str
    line: int
    cluster: str = ""

    @property
    def id(self) -> str:
        return _hash(["text", self.text])

    @property
    def question(self) -> Any:
        return self.text


@dataclass(frozen=True, slots=True)
class TextLabelItem:
    """A text with its class: a number of the model's outputs. ``labels``: choose among these outputs; (): all."""

    text: str
    label: int
    labels: tuple[int, ...]
    line: int
    cluster: str = ""

    @property
    def id(self) -> str:
        return _hash(["text_label", self.text, self.label, self.labels])

    @property
    def question(self) -> Any:
        return self.text
