"""The four skills as text: what a prompt looks like, what its one right answer is, and how text becomes tokens.

A prompt is a skill word, a space, eight letters and an equals sign; the answer follows from the letters alone:

    reverse abcdefgh=   hgfedcba      last letter first
    sort    dbcaaegf=   aabcdefg      alphabetical
    unique  abacadbb=   abcd          drop letters that came before (letters a to f only, so that repeats are common)
    rotate  abcdefgh=   cdefghab      the first two letters move to the end

A fifth skill, ``copy``, is only used to train the base: it makes reading the letters easier to learn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTH = 8  # letters in a test item
SKILLS: dict[str, Callable[[str], str]] = {
    "reverse": lambda word: word[::-1],
    "sort": lambda word: "".join(sorted(word)),
    "unique": lambda word: "".join(dict.fromkeys(word)),
    "rotate": lambda word: word[2:] + word[:2],
}
PRACTICE: dict[str, Callable[[str], str]] = {**SKILLS, "copy": lambda word: word}
PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"
TOKENS = [PAD, END, UNKNOWN, *(f"{skill} " for skill in PRACTICE), "=", *LETTERS]
NUMBER = {token: number for number, token in enumerate(TOKENS)}


class Example(NamedTuple):
    prompt: str
    answer: str

    def tokens(self) -> tuple[list[int], list[int]]:
        """Token numbers of the prompt, and of the answer with the end token. Equal to what the tokenizer gives."""
        skill, letters = self.prompt.split(" ")
        question = [NUMBER[f"{skill} "], *(NUMBER[letter] for letter in letters)]
        return question, [*(NUMBER[letter] for letter in self.answer), NUMBER[END]]


def make_example(skill: str, length: int, generator: random.Random) -> Example:
    """One random example of a skill with that many letters."""
    alphabet = LETTERS[:6] if skill == "unique" else LETTERS
    word = "".join(generator.choices(alphabet, k=length))
    return Example(f"{skill} {word}=", PRACTICE[skill](word))


def distinct_examples(skill: str, generator: random.Random, taken: set[str]) -> Iterator[Example]:
    """Endless test-length examples whose prompts are not in ``taken``; each prompt given out is added to it."""
    while True:
        example = make_example(skill, LENGTH, generator)
        if example.prompt not in taken:
            taken.add(example.prompt)
            yield example


def training_example(skill: str, length: int, generator: random.Random, held_out: Collection[str]) -> Example:
    """A random example that is in no held-out split."""
    while (example := make_example(skill, length, generator)).prompt in held_out:
        pass
    return example


def make_tokenizer():  # type: ignore[no-untyped-def]  # the type needs transformers, which this module need not import
    """A word-level tokenizer: one token per skill word with its space, per letter, and for ``=``. No token is added
    around the text; the end token closes an answer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(NUMBER, unk_token=UNKNOWN))
    pieces = Regex("(?:" + "|".join(PRACTICE) + ") |.")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )
