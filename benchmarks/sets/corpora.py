"""Three collections of real text, read into labelled examples, and their division into splits that share nothing.

The one idea: an accuracy means something only on texts that no training saw. So a text is identified by its letters
alone (white space, digits and punctuation do not make a new text: junk mail is sent again with another number in it),
and what comes from one document stays in one split. Held-out texts are drawn before anything is trained, without
looking at the seed of the training, and training never uses a text that any task holds out.
"""

from __future__ import annotations

import email
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path

MAIL_WORDS = 60  # subject not counted
PASSAGE_WORDS = 60
DOCUMENT_WORDS = 1600  # read of each document of the Brown corpus
HELD_OUT_PER_DOCUMENT = 6  # passages at most, so that a held-out split has many documents
SPLITS = ("report", "validation", "calibration", "train")

MAIL = {"ham": ("easy-ham-1", "easy-ham-2"), "spam": ("spam-1", "spam-2")}
# The 26 classes of nouns, in the order of WordNet's lexicographer files 03 to 28 (lexnames(5WN)).
NOUN_CLASSES = (
    *("top", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling"),
    *("food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process"),
    *("quantity", "relation", "shape", "state", "substance", "time"),
)
CHOSEN_CLASSES = ("act", "animal", "artifact", "body", "feeling", "food", "location", "person", "plant", "substance")
PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adjective": "adj", "adverb": "adv"}  # -> end of the file name
GENRES = {
    "press": ("news", "editorial", "reviews"),
    "learned": ("government", "learned"),
    "essay": ("religion", "belles_lettres", "lore"),
    "fiction": ("fiction", "mystery", "romance", "adventure", "science_fiction", "humor"),
}


@dataclass(frozen=True, slots=True)
class Example:
    """A text with its label. ``document``: where it was cut from; examples of one document are not independent."""

    text: str
    label: str
    document: str = ""

    @property
    def key(self) -> str:
        """Equal for texts that count as one and the same."""
        return re.sub(r"[\W\d_]+", "", self.text).lower()


# -- SpamAssassin ---------------------------------------------------------------------------------------------------


def mails(folder: Path) -> list[Example]:
    """Labels ``ham`` and ``spam``: subject and first words of each mail of the npm package's ``data`` folder."""
    found = []
    for label, groups in MAIL.items():
        for group in groups:
            for path in sorted((folder / group).glob("*.txt")):
                text = mail_text(path.read_bytes())
                if len(text.split()) >= 5:
                    found.append(Example(text, label))
    return found


def mail_text(content: bytes) -> str:
    """Subject and first words of a mail, without mark-up and addresses of the web."""
    message = email.message_from_bytes(content)
    subject = " ".join(str(message.get("Subject", "")).split())
    body = re.sub(r"https?://\S+", " ", _readable(message))
    return f"{subject} . {' '.join(body.split()[:MAIL_WORDS])}".strip()


def _readable(message: Message) -> str:
    """The first part of a mail that is text, with HTML stripped."""
    for part in message.walk():
        if part.get_content_maintype() == "text":
            payload = part.get_payload(decode=True)
            text = payload.decode("utf-8", "replace") if isinstance(payload, bytes) else ""
            if text.strip():
                return _without_html(text) if re.search(r"<(html|body|p|br|table|font|a)\b", text, re.I) else text
    return ""


class _Words(HTMLParser):
    """Collects what a reader of a page would see."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def _without_html(text: str) -> str:
    parser = _Words()
    try:
        parser.feed(text)
        return " ".join(parser.parts)
    except AssertionError:  # broken declarations in junk mail
        return re.sub(r"<[^>]*>", " ", text)


# -- WordNet --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sense:
    """A line of a WordNet data file: first word, number of the lexicographer file, first part of the gloss."""

    word: str
    file: int
    gloss: str


def senses(path: Path) -> Iterator[Sense]:
    """All senses of ``data.noun`` or a like file (wndb(5WN)): fields, `` | ``, gloss; the licence above is indented.

    A gloss is a definition and examples, separated by semicolons; only the definition is kept.
    """
    with open(path, encoding="latin-1") as file:
        for line in file:
            if not line.startswith(" "):
                fields, _, gloss = line.partition("|")
                parts = fields.split()
                yield Sense(parts[4].replace("_", " "), int(parts[1]), gloss.split(";")[0].strip())


def noun_class(sense: Sense) -> str:
    return NOUN_CLASSES[sense.file - 3]


def glosses_by_class(folder: Path) -> list[Example]:
    """Definitions of nouns, labelled with one of ``CHOSEN_CLASSES``."""
    found = ((sense.gloss, noun_class(sense)) for sense in senses(folder / "data.noun"))
    return [Example(gloss, label) for gloss, label in found if label in CHOSEN_CLASSES and gloss]


def glosses_by_part_of_speech(folder: Path) -> list[Example]:
    """Definitions, labelled with the part of speech of what they define."""
    return [
        Example(sense.gloss, label)
        for label, ending in PARTS_OF_SPEECH.items()
        for sense in senses(folder / f"data.{ending}")
        if sense.gloss
    ]


# -- Brown ----------------------------------------------------------------------------------------------------------


def passages(folder: Path) -> list[Example]:
    """Passages of 60 words of the Brown corpus, labelled with a group of genres (``GENRES``), with their document.

    ``cats.txt`` lists document and genre; in a document each word carries its part of speech behind a slash.
    """
    group_of = {genre: group for group, genres in GENRES.items() for genre in genres}
    found = []
    for line in sorted((folder / "cats.txt").read_text("ascii").splitlines()):
        document, genre = line.split()
        if genre in group_of:
            tagged = (folder / document).read_text("ascii").split()[:DOCUMENT_WORDS]
            words = [word.rpartition("/")[0] for word in tagged]
            for start in range(0, len(words) - PASSAGE_WORDS + 1, PASSAGE_WORDS):
                text = " ".join(words[start : start + PASSAGE_WORDS])
                found.append(Example(text, group_of[genre], document))
    return found


# -- splits ---------------------------------------------------------------------------------------------------------


def shortened(examples: Sequence[Example], shorten: Callable[[list[str]], list[str]]) -> list[Example]:
    """The examples with other texts; those that nothing is left of are dropped."""
    texts = shorten([example.text for example in examples])
    return [replace(example, text=text) for example, text in zip(examples, texts, strict=True) if text.strip()]


def without_doubles(examples: Iterable[Example]) -> list[Example]:
    """One example per text, in the order given; none where the labels of equal texts differ."""
    first: dict[str, Example] = {}
    contradicted = set()
    for example in examples:
        if first.setdefault(example.key, example).label != example.label:
            contradicted.add(example.key)
    return [example for key, example in first.items() if key and key not in contradicted]


def divide(
    tasks: Mapping[str, Sequence[Example]], *, report: int, validation: int, calibration: int, most_training: int
) -> dict[str, dict[str, list[Example]]]:
    """Per task the splits report, validation, calibration and train, all balanced over the labels.

    No text (``Example.key``) is in two held-out splits of any tasks or in a held-out split and any training split,
    and no document in two splits of a task. The draw depends on the names of the tasks and the texts, on no seed.

    Raises:
        ValueError: a label has too few examples.
    """
    sizes = {"report": report, "validation": validation, "calibration": calibration}
    held_out: set[str] = set()
    divided: dict[str, dict[str, list[Example]]] = {}
    rest: dict[str, dict[str, list[Example]]] = {}
    for task, examples in tasks.items():
        generator = random.Random(f"held out {task}")
        divided[task], rest[task] = {name: [] for name in sizes}, {}
        by_label = _grouped(without_doubles(examples), lambda example: example.label)
        for label in sorted(by_label):
            documents = _documents(by_label[label], generator)
            for split, size in sizes.items():
                chosen = divided[task][split]
                wanted = len(chosen) + size // len(by_label)
                while len(chosen) < wanted:
                    if not documents:
                        raise ValueError(f"task {task}: too few examples of {label}")
                    free = [example for example in documents.pop() if example.key not in held_out]
                    chosen += free[: min(HELD_OUT_PER_DOCUMENT, wanted - len(chosen))]
                held_out |= {example.key for example in chosen}
            rest[task][label] = [example for document in documents for example in document]
        for split in sizes:
            generator.shuffle(divided[task][split])
    for task, by_label in rest.items():
        free_of = {k: [e for e in found if e.key not in held_out] for k, found in by_label.items()}
        most = min(most_training // len(free_of), *(len(found) for found in free_of.values()))
        generator = random.Random(f"training {task}")
        divided[task]["train"] = [e for found in free_of.values() for e in generator.sample(found, most)]
    return divided


def _grouped(examples: Iterable[Example], by: Callable[[Example], str]) -> dict[str, list[Example]]:
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[by(example)].append(example)
    return groups


def _documents(examples: list[Example], generator: random.Random) -> list[list[Example]]:
    """The examples by document, both in random order; without documents each example alone."""
    groups = _grouped(examples, lambda example: example.document or f"text {example.key}")
    documents = [groups[name] for name in sorted(groups)]
    for document in documents:
        generator.shuffle(document)
    generator.shuffle(documents)
    return documents


def counts(divided: Mapping[str, Mapping[str, Sequence[Example]]]) -> dict[str, dict[str, int]]:
    """Examples per task and split; for tasks that have documents also their number."""
    found = {}
    for task, splits in divided.items():
        found[task] = {split: len(examples) for split, examples in splits.items()}
        for split, examples in splits.items():
            if documents := Counter(example.document for example in examples if example.document):
                found[task][f"{split} documents"] = len(documents)
    return found
