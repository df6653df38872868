"""Kept results come back as they were, and nothing that happens to their file can lose or fake one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from merging.evaluation.records import Record
from merging.evaluation.scoring import KINDS, Kind, Settings
from merging.evaluation.store import Results
from merging.evaluation.tasks import Item, Task

MODEL = "ab" * 32
ITEMS = tuple(Item(f"prompt {number}", "answer", number) for number in range(1, 7))
TASK = Task("sort", ITEMS, "f" * 64)


def batch(first: int, last: int) -> list[Record]:
    return [
        Record(MODEL, "sort", item.id, "exact_match", item.line % 2, "p", 3, 0.5, "é") for item in ITEMS[first:last]
    ]


def kept(folder: Path, model: str = MODEL, task: Task = TASK, settings: Settings | None = None) -> Results:
    return Results(folder, model, task, settings or Settings())


def file_of(folder: Path) -> Path:
    (path,) = (folder / "results").rglob("*.jsonl")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two batches of two, written by two runs."""
    kept(tmp_path).add(batch(0, 2))
    kept(tmp_path).add(batch(3, 5))
    return tmp_path


def test_what_was_kept_is_found(folder: Path) -> None:
    results = kept(folder)
    assert results.missing(ITEMS) == [2, 5] and results.missing(ITEMS[:2]) == []
    assert results.records(ITEMS) == [*batch(0, 2), *batch(3, 5)] and results.notes == []
    results.add(batch(2, 3))
    assert results.records(ITEMS) == batch(0, 5) == kept(folder).records(ITEMS)


def test_results_belong_to_model_task_and_the_settings_that_matter(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept(folder, model="cd" * 32).missing(ITEMS) == list(range(6))
    assert kept(folder, task=replace(TASK, sha256="e" * 64)).missing(ITEMS) == list(range(6))
    assert kept(folder, settings=Settings(most_tokens=3)).missing(ITEMS) == list(range(6))
    assert kept(folder, settings=Settings(window=3)).missing(ITEMS) == [2, 5]  # has nothing to do with exact match
    renamed = kept(folder, task=replace(TASK, name="sort letters"))
    assert {record.task for record in renamed.records(ITEMS)} == {"sort letters"}
    monkeypatch.setitem(KINDS, "exact_match", replace_version(KINDS["exact_match"]))
    assert kept(folder).missing(ITEMS) == list(range(6))


def replace_version(kind: Kind) -> Kind:
    return replace(kind, version=kind.version + 1)


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_line_that_was_cut_off_costs_only_its_batch(folder: Path, cut: int) -> None:
    path = file_of(folder)
    os.truncate(path, path.stat().st_size - cut)
    results = kept(folder)
    assert results.records(ITEMS) == batch(0, 2)
    assert len(results.notes) == 1 and "1 line(s)" in results.notes[0] and "scored anew" in results.notes[0]
    results.add(batch(2, 4))
    again = kept(folder)
    assert again.records(ITEMS) == batch(0, 4) and again.notes == []  # said once


def test_a_writer_that_was_killed_in_the_middle_harms_nobody_else(folder: Path) -> None:
    """Another process is cut off after this one has read the file."""
    results = kept(folder)
    with open(file_of(folder), "ab") as file:
        file.write(b"0123456789abcdef [{")
    results.add(batch(2, 3))
    again = kept(folder)
    assert again.records(ITEMS) == batch(0, 5) and len(again.notes) == 1


def test_every_changed_bit_is_noticed(folder: Path) -> None:
    path = file_of(folder)
    whole = path.read_bytes()
    right = {record.item: record for record in batch(0, 6)}
    for place in range(0, len(whole), 23):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        found = kept(folder)
        assert found.notes and len(found.missing(ITEMS)) > 2
        assert all(record == right[record.item] for record in found.records(ITEMS))
        for aside in path.parent.glob("*.damaged"):
            aside.unlink()


def test_a_file_that_says_something_else_is_set_aside(folder: Path) -> None:
    path = file_of(folder)
    for content in (b"", b"\n", b"hello\n", path.read_bytes().split(b"\n", 1)[1]):
        path.write_bytes(content)
        results = kept(folder)
        assert results.missing(ITEMS) == list(range(6))
        assert "damaged" in results.notes[0] and path.with_suffix(".damaged").read_bytes() == content
        results.add(batch(0, 6))
        assert kept(folder).missing(ITEMS) == []


def test_a_line_with_a_sound_checksum_that_does_not_belong_is_not_used(folder: Path) -> None:
    from merging.evaluation.store import _line

    rows = json.loads(file_of(folder).read_bytes().split(b"\n")[1].split(b" ", 1)[1])
    for change in ({"model": "x"}, {"item": "x"}, {"metric": "choice"}, {"score": "1"}, {"colour": 3}):
        with open(file_of(folder), "ab") as file:
            file.write(_line([rows[0] | {"item": ITEMS[2].id} | change]))
        assert 2 in kept(folder).missing(ITEMS)


def test_a_folder_that_cannot_be_written_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("in the way")
    results = kept(tmp_path)
    results.add(batch(0, 2))
    results.add(batch(2, 6))
    assert results.records(ITEMS) == batch(0, 6)
    assert len(results.notes) == 1 and ("not kept" in results.notes[0] or "cannot be used" in results.notes[0])


def test_nothing_is_kept_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = Results(None, MODEL, TASK, Settings())
    results.add(batch(0, 2))
    assert results.records(ITEMS) == batch(0, 2) and list(tmp_path.iterdir()) == []


WRITER = """
import sys
from tests.evaluation.test_store import ITEMS, MODEL, Path, Record, kept
results = kept(Path(sys.argv[1]))
number = int(sys.argv[2])
for turn in range(100000):
    results.add([Record(MODEL, "sort", item.id, "exact_match", 1.0, "p", number, 0.5, "x" * 300) for item in ITEMS])
    print(turn, flush=True)
"""


def test_writers_at_the_same_time_that_are_killed(tmp_path: Path) -> None:
    """Two processes add as fast as they can and die by kill -9: what they had reported is there and sound."""
    root = Path(__file__).parents[2]
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(number)], cwd=root, stdout=subprocess.PIPE)
        for number in (1, 2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        for _ in range(20):
            assert writer.stdout.readline()
    time.sleep(0.05)
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    lines = file_of(tmp_path).read_bytes().count(b"\n")
    results = kept(tmp_path)
    assert lines >= 41 and results.missing(ITEMS) == []
    assert len(results.notes) <= 1 and all(" 1 line(s)" in note or " 2 line(s)" in note for note in results.notes)
