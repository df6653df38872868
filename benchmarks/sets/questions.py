"""Questions with one right answer each, for three experts of a language model: math, pyeval and wordnet.

    math      a word problem of one or two steps, small numbers   "Ada owns 14 keys and is given 9. …"   23
    pyeval    the value of a Python expression                    sorted([7, 2, 11])                     [2, 7, 11]
    wordnet   the class of a noun, from WordNet's definition      "otter", defined as: freshwater …      animal

The first two are drawn without end from templates, the third from 56,000 senses. An answer is computed beside the text
and never by running the text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.sets.corpora import CHOSEN_CLASSES, Example, divide, noun_class, senses

PEOPLE = ("Ada", "Bruno", "Chloe", "Dario", "Elif", "Finn", "Greta", "Hana", "Igor", "Jun", "Kofi", "Lena")
THINGS = ("buttons", "candles", "feathers", "keys", "lemons", "maps", "nails", "plums", "ribbons", "tickets")
WORDS = ("anchor", "basket", "copper", "dragon", "ember", "forest", "garden", "harbor", "island", "jacket", "kettle")
GLOSS_WORDS = 16


class Question(NamedTuple):
    text: str
    answer: str


def word_problem(draw: random.Random) -> Question:
    """One of eight templates; the operands are small enough for a model of 135 M parameters to learn some."""
    one, two = draw.sample(PEOPLE, 2)
    things = draw.choice(THINGS)
    a, b, c = draw.randint(5, 50), draw.randint(2, 30), draw.randint(2, 9)
    templates: list[tuple[str, int]] = [
        (f"{one} owns {a} {things} and is given {b}. How many {things} does {one} own now?", a + b),
        (f"Of {a + b} {things} that {one} had, {two} took {b}. How many {things} does {one} still have?", a),
        (f"A crate holds {b} {things}. How many {things} do {c} crates hold?", b * c),
        (f"{one} divides {b * c} {things} evenly between {c} people. How many does each person get?", b),
        (f"{one} has {a} {things}, {two} has {b} more than {one}. How many {things} does {two} have?", a + b),
        (f"{one} fills {c} bowls with {b} {things} each; {a} are left. How many {things} were there?", b * c + a),
        (f"{one} and {two} have {a + b} {things} together. {a} belong to {two}. How many belong to {one}?", b),
        (f"{one} needs {a + b + c} {things}, has {a} and buys {b}. How many are missing?", c),
    ]
    text, answer = draw.choice(templates)
    return Question(text, str(answer))


def expression(draw: random.Random) -> Question:
    """One of fourteen kinds of Python expressions, with the representation of its value."""
    word, other = draw.sample(WORDS, 2)
    numbers = [draw.randint(0, 20) for _ in range(draw.randint(3, 5))]
    start, width, n, letter = draw.randint(0, 3), draw.randint(1, 3), draw.randint(2, 5), draw.choice(word)
    dividend, divisor, limit = draw.randint(20, 99), draw.randint(3, 9), draw.randint(3, 12)
    kinds: list[tuple[str, Any]] = [
        (f'len("{word}" + "{other}")', len(word + other)),
        (f'"{word}"[{start}:{start + width}]', word[start : start + width]),
        (f'"{word}"[::-1]', word[::-1]),
        (f'"{word}".upper()[:{n}]', word.upper()[:n]),
        (f'"{word}".count("{letter}")', word.count(letter)),
        (f'"{word}".index("{letter}")', word.index(letter)),
        (f'"{word[:3]}" * {n - 1}', word[:3] * (n - 1)),
        (f"sorted({numbers})", sorted(numbers)),
        (f"max({numbers}) - min({numbers})", max(numbers) - min(numbers)),
        (f"{numbers}[-{width}]", numbers[-width]),
        (f"{numbers}[::-1]", numbers[::-1]),
        (f"[x for x in {numbers} if x > {limit}]", [x for x in numbers if x > limit]),
        (f"list(range({start}, {start + n}))", list(range(start, start + n))),
        (f"{dividend} % {divisor}", dividend % divisor),
    ]
    code, value = draw.choice(kinds)
    return Question(f"What does this Python expression evaluate to? {code}", repr(value))


def distinct(make: Callable[[random.Random], Question], draw: random.Random, taken: set[str]) -> Iterator[Question]:
    """Questions whose text is not in ``taken``, which is extended."""
    while True:
        question = make(draw)
        if question.text not in taken:
            taken.add(question.text)
            yield question


def drawn_splits(
    make: Callable[[random.Random], Question], name: str, sizes: dict[str, int], training: int, seed: int
) -> dict[str, list[Question]]:
    """Held-out splits (the same ones whatever the seed), then training questions without a held-out text."""
    taken: set[str] = set()
    stream = distinct(make, random.Random(f"held out {name}"), taken)
    splits = {split: list(islice(stream, size)) for split, size in sizes.items()}
    splits["train"] = list(islice(without(make, random.Random(f"training {name} {seed}"), taken), training))
    return splits


def without(
    make: Callable[[random.Random], Question], draw: random.Random, taken: Collection[str]
) -> Iterator[Question]:
    """Questions, also the same one again, whose text is not in ``taken``."""
    while True:
        question = make(draw)
        if question.text not in taken:
            yield question


def definition_splits(folder: Path, sizes: dict[str, int], training: int, seed: int) -> dict[str, list[Question]]:
    """Questions about nouns, balanced over the classes and divided by definition. ``folder``: WordNet's."""
    examples = []
    for sense in senses(folder / "data.noun"):
        label = noun_class(sense)
        if label in CHOSEN_CLASSES and sense.gloss:
            gloss = " ".join(sense.gloss.split()[:GLOSS_WORDS])
            examples.append(Example(f'"{sense.word}", defined as: {gloss}', label))
    divided = divide({"wordnet": examples}, **sizes, most_training=len(examples))["wordnet"]
    classes = ", ".join(CHOSEN_CLASSES)
    found = {
        split: [Question(f"What kind of thing is {e.text}? One of: {classes}.", e.label) for e in some]
        for split, some in divided.items()
    }
    draw = random.Random(f"training wordnet {seed}")
    draw.shuffle(found["train"])
    while len(found["train"]) < training:  # more steps than definitions: again, in the same order
        found["train"] *= 2
    found["train"] = found["train"][:training]
    return found
