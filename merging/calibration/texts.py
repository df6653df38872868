"""Calibration texts: read strictly, drawn without a generator, and accounted for.

The one idea: a statistic of a model is a statistic *on these texts*, so which texts they were must be known afterwards.
The draw depends on nothing but the seed and the texts themselves: each text gets the number SHA-256(seed, text), and
the smallest numbers are drawn. That is a uniform sample without replacement, the same on every machine and whatever
the order of the lines, and a sample of 16 is part of the sample of 32. With several files each gives an equal share
(stratified by source), as far as it has that many.

A file is JSON lines or plain text, in UTF-8:

    {"prompt": "reverse abcdefgh="}         one JSON object per line with either "text" or "prompt", nothing else
    A paragraph of a .txt file              texts are separated by blank lines
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from merging.checkpoints.strict_json import parse_json
from merging.errors import InputError

LONGEST_LINE = 16 << 20
"""Bytes of one line, and of one paragraph."""
MOST_TEXTS = 10_000_000
EXAMPLE = 'A line looks like this: {"text": "Some text."}'


@dataclass(frozen=True, slots=True)
class Text:
    """One text, and where it stands."""

    text: str
    source: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.source}, line {self.line}"

    @property
    def hash(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Chosen:
    """A sample of texts, by source and line. ``available``: different texts per source; ``notes``: what was unusual."""

    texts: tuple[Text, ...]
    available: dict[str, int]
    seed: int
    notes: tuple[str, ...]

    @property
    def key(self) -> str:
        """SHA-256 over the chosen texts in their order: equal keys, equal texts."""
        return hashlib.sha256("".join(text.hash for text in self.texts).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------- reading


def read_texts(path: str | Path) -> Iterator[Text]:
    """The texts of one file in its order, one at a time: memory stays small however long the file is.

    Args:
        path: JSON lines, or plain text if the name ends in ``.txt``. See the module.

    Raises:
        InputError: ``E_TEXT``, with file and line, for whatever is not as the module says: a missing or empty file, a
            blank line between JSON objects, broken JSON, a missing, unknown or doubled field, text that is empty or
            not UTF-8, a line of more than ``LONGEST_LINE`` bytes.
    """
    path = Path(path)
    name = str(path)
    read = _paragraphs if path.suffix.lower() == ".txt" else _json_lines
    count = 0
    for line, text in read(path, _lines(path)):
        count += 1
        if count > MOST_TEXTS:
            raise problem(path, line, f"more than {MOST_TEXTS:,} texts", "Use a part of the file.")
        yield Text(text, name, line)
    if not count:
        raise InputError("E_TEXT", f"{path} holds no text.", "", EXAMPLE)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line without its end) of a regular file in UTF-8."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # never hang on a named pipe
    except FileNotFoundError:
        raise InputError("E_TEXT", f"There is no calibration text {path}.", "", "Check the path.") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError("E_TEXT", f"{path} is not a file.", "", "Name a .jsonl or .txt file.")
    with open(descriptor, "rb") as file:
        for number in itertools.count(1):
            try:
                raw = file.readline(LONGEST_LINE + 1)
            except OSError as error:
                raise _unreadable(path, error) from None
            if not raw:
                return
            if len(raw) > LONGEST_LINE:
                raise problem(path, number, f"it is longer than {LONGEST_LINE:,} bytes", "Split the text.")
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError:
                raise problem(path, number, "it is not UTF-8 text", "Save the file as UTF-8.") from None
            if number == 1:
                line = line.removeprefix("\ufeff")  # a byte order mark, which some editors write
            yield number, line.removesuffix("\n").removesuffix("\r")


def _json_lines(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for number, line in lines:
        if not line.strip():
            raise problem(path, number, "it is blank", "Remove the line.")
        try:
            found = parse_json(line.encode(), f"{path}, line {number}")
        except InputError as error:
            raise problem(path, number, f"it is not the JSON asked for ({error.why.rstrip('.')})") from None
        if type(found) is not dict:
            raise problem(path, number, "it is not a JSON object")
        if "answer" in found or "label" in found:
            why = "it has an answer; calibration texts have none, and test items must not become calibration texts"
            raise problem(path, number, why, "Give texts without answers, none of which is tested on later.")
        if len(found) != 1 or (field := next(iter(found))) not in ("text", "prompt"):
            raise problem(path, number, 'it must have one field, "text" or "prompt"')
        text = found[field]
        if not isinstance(text, str) or not text.strip():
            raise problem(path, number, f"the field {field!r} is not a text with something in it")
        yield number, text


def _paragraphs(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    first, size, paragraph = 0, 0, list[str]()
    for number, line in lines:
        if line.strip():
            first = first if paragraph else number
            size += len(line)
            paragraph.append(line)
            if size > LONGEST_LINE:
                raise problem(path, first, f"a paragraph is longer than {LONGEST_LINE:,} characters", "Split it.")
        elif paragraph:
            yield first, "\n".join(paragraph)
            size, paragraph = 0, []
    if paragraph:
        yield first, "\n".join(paragraph)


def problem(path: str | Path, number: int, why: str, fix: str = EXAMPLE) -> InputError:
    """E_TEXT at a line of a file."""
    return InputError("E_TEXT", f"{path}, line {number}: {why}.", "", fix)


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError("E_TEXT", f"{path} cannot be read.", f"The system says: {reason}.", "")


# -------------------------------------------------------------------------------------------------- choosing


def choose(paths: Sequence[str | Path], count: int, seed: int = 0) -> Chosen:
    """Draw ``count`` different texts from the files, an equal share from each; see the module.

    A file with fewer texts than its share gives all of them, and the others give more. A text that occurs again, in
    the same file or a later one, counts once. Memory: the drawn texts, and 16 bytes per text of the files.

    Raises:
        InputError: ``E_TEXT`` for what ``read_texts`` refuses, no file at all, the same file twice, or a count below 1.
    """
    if count < 1:
        raise InputError("E_TEXT", f"{count} calibration texts cannot be drawn.", "", "Ask for at least 1.")
    names = [str(path) for path in paths]
    if not names or len(set(names)) < len(names):
        what = "No calibration text was given." if not names else "A calibration file was given twice."
        raise InputError("E_TEXT", what, "", "Name each file once.")
    seen: set[bytes] = set()
    doubles = 0
    available: dict[str, int] = {}
    drawn: list[list[tuple[int, Text]]] = []
    for path, name in zip(paths, names, strict=True):
        smallest: list[tuple[int, int, Text]] = []  # a heap with the largest number first
        different = 0
        for text in read_texts(path):
            digest = hashlib.sha256(f"{seed}\0{text.text}".encode()).digest()
            if digest[:16] in seen:
                doubles += 1
                continue
            seen.add(digest[:16])
            different += 1
            entry = (-int.from_bytes(digest, "big"), -text.line, text)
            if len(smallest) < count:
                heapq.heappush(smallest, entry)
            elif entry[:2] > smallest[0][:2]:
                heapq.heapreplace(smallest, entry)
        available[name] = different
        drawn.append(sorted((-number, text) for number, _, text in smallest))
    shares = equal_shares(count, list(available.values()))
    texts = [
        text
        for per_file, share in zip(drawn, shares, strict=True)
        for text in sorted((text for _, text in per_file[:share]), key=lambda text: text.line)
    ]
    notes = []
    if doubles:
        notes.append(f"{doubles} texts occur again; each counts once.")
    if len(texts) < count:
        notes.append(f"{count} texts were asked for; there are only {len(texts)}.")
    return Chosen(tuple(texts), available, seed, tuple(notes))


def equal_shares(count: int, available: Sequence[int]) -> list[int]:
    """``count`` split among sources: equal numbers, the earlier sources one more where it does not divide, and what a
    source lacks is given by the others. The sum is min(count, Σ available)."""
    shares = [0] * len(available)
    left = min(count, sum(available))
    while left:
        open_ones = [i for i, have in enumerate(available) if shares[i] < have]
        each = max(1, left // len(open_ones))
        for i in open_ones:
            more = min(each, available[i] - shares[i], left)
            shares[i] += more
            left -= more
    return shares


def find_texts(texts: str | Path | Sequence[str | Path], names: Sequence[str]) -> list[list[Path]]:
    """Which files belong to which expert.

    ``texts`` is one file (for all experts), as many files as experts (in their order), or a folder with a file
    ``<expert>.jsonl`` or ``<expert>.txt`` for each of ``names``.

    Raises:
        InputError: ``E_TEXT`` if that does not come out even.
    """
    given = [Path(texts)] if isinstance(texts, str | Path) else [Path(text) for text in texts]
    if len(given) == 1 and given[0].is_dir():
        return [[_in_folder(given[0], name)] for name in names]
    if len(given) == 1:
        return [given for _ in names]
    if len(given) != len(names):
        raise InputError(
            "E_TEXT",
            f"There are {len(given)} calibration files for {len(names)} experts.",
            "",
            "Give one file for all, one per expert in their order, or a folder with a file for each expert's name.",
        )
    return [[path] for path in given]


def _in_folder(folder: Path, name: str) -> Path:
    base = name.rsplit("/", 1)[-1]
    found = [path for suffix in (".jsonl", ".txt") if (path := folder / f"{base}{suffix}").is_file()]
    if len(found) != 1:
        how = "both" if found else "neither"
        what = f"{folder} has {how} {base}.jsonl {'and' if found else 'nor'} {base}.txt."
        raise InputError("E_TEXT", what, f"The expert {name} needs one of them.", "Or name the files themselves.")
    return found[0]
