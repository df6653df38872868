"""The journal: which tensors are finished, in a form that cannot be misread after a crash.

One line per record: eight hex digits of CRC-32, a space, and compact JSON. Record 0 names the plan; every
further record claims one finished tensor with the xxh3_128 checksum of its bytes::

    5f0c6a1e {"record":0,"journal":1,"plan":"9b1f…"}
    01d2b7c4 {"record":1,"tensor":"lm_head.weight","xxh3_128":"c2a4…"}

Reading stops at the first record that is cut off, damaged or out of sequence. A claim is only a hint where
to look: whoever resumes re-hashes the bytes themselves. Hence no fsync is needed here. If a power cut keeps
a claim but loses the data, the re-hash finds out, and if it loses the claim, one tensor is done again.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from dataclasses import dataclass, field
from pathlib import Path

VERSION = 1
_LARGEST = 1 << 30  # bytes; 200,000 tensors need about 0.05 of it


@dataclass(slots=True)
class JournalContents:
    """What could be read. ``plan`` is None when not even record 0 is sound: then nothing is claimed."""

    plan: str | None = None
    version: int = VERSION
    claims: dict[str, str] = field(default_factory=dict)  # tensor name -> xxh3_128, a later claim wins
    records: int = 0
    sound_bytes: int = 0  # length of the part before the first bad record


def _line(record: dict[str, object]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def read_journal(path: Path) -> JournalContents:
    """Read the sound beginning of the journal; an absent or unreadable one claims nothing."""
    contents = JournalContents()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            raw = file.read(_LARGEST)
    except OSError:
        return contents
    for line in raw.splitlines(keepends=True):
        record = _sound(line, contents.records)
        if record is None:
            break
        if contents.records == 0:
            plan, version = record.get("plan"), record.get("journal")
            if not isinstance(plan, str) or not isinstance(version, int):
                break
            contents.plan, contents.version = plan, version
            if version != VERSION:
                break  # the caller refuses; a newer program knows what the rest means
        else:
            tensor, checksum = record.get("tensor"), record.get("xxh3_128")
            if not isinstance(tensor, str) or not isinstance(checksum, str):
                break
            contents.claims[tensor] = checksum
        contents.records += 1
        contents.sound_bytes += len(line)
    return contents


def _sound(line: bytes, number: int) -> dict[str, object] | None:
    """The record of this line if it is complete, undamaged and the one that is due."""
    if line[-1:] != b"\n" or line[8:9] != b" " or line[:8] != b"%08x" % zlib.crc32(line[9:-1]):
        return None
    try:
        record = json.loads(line[9:-1])
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.get("record") == number else None


class Journal:
    """Appends claims. Thread-safe; raises OSError."""

    def __init__(self, path: Path, plan: str, contents: JournalContents | None = None):
        """Go on after the sound part of ``contents``, or start anew with record 0."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o666)
        self._lock = threading.Lock()
        self._records = contents.records if contents else 0
        try:
            os.ftruncate(self._descriptor, contents.sound_bytes if contents else 0)
            if not self._records:
                self._append({"record": 0, "journal": VERSION, "plan": plan})
        except OSError:
            self.close()
            raise

    def claim(self, tensor: str, checksum: str) -> None:
        """Record that ``tensor`` is completely written and its bytes have this xxh3_128."""
        with self._lock:
            self._append({"record": self._records, "tensor": tensor, "xxh3_128": checksum})

    def _append(self, record: dict[str, object]) -> None:
        line = _line(record)
        start = os.fstat(self._descriptor).st_size
        try:
            view = memoryview(line)
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            os.ftruncate(self._descriptor, start)  # half a line would hide all later ones
            raise
        self._records += 1

    def forget(self) -> None:
        """Withdraw every claim: after a failed fsync nobody knows what is on the disk."""
        os.ftruncate(self._descriptor, 0)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
