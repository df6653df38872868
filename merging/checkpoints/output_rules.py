"""Under which names a model may be written, and what happens to names that are taken.

These rules are checked before any work is done: a merge of an hour must not end with "that name is taken".
"""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merging.checkpoints.disk import lock_folder, unlock_folder, write_error
from merging.checkpoints.manifest import NAME as MANIFEST
from merging.checkpoints.manifest import read_manifest
from merging.errors import OutputError, VerificationError

if TYPE_CHECKING:
    from merging.checkpoints.header import TensorEntry

LONGEST_NAME = 200  # bytes: leaves room for what is put around the name of the work folder
OWN_NAMES = {"lock", "journal", "model"}  # what lies in a work folder
# Marks that change the direction of the text, so that a name reads differently from what it is.
_OVERRIDING = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class OutputFile:
    """One weight file as the plan lays it out: ``entries`` hold absolute offsets and end at ``size``."""

    name: str
    header: bytes
    entries: dict[str, TensorEntry]
    size: int


def check_output_name(final: Path) -> None:
    """OutputError E_OUTPUT_NAME unless the last part of ``final`` can name a folder."""
    name, why = final.name, ""
    if name in ("", ".", ".."):
        why = "It needs a name of its own."
    elif any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in _OVERRIDING for c in str(final)):
        why = "It holds control characters, bytes that are not UTF-8, or marks that reverse the text."
    elif len(name.encode()) > LONGEST_NAME:
        why = f"It has {len(name.encode())} bytes; at most {LONGEST_NAME} are possible."
    elif name.startswith(".") and name.endswith(".partial"):
        why = "That form of name is kept for unfinished work."
    if why:
        raise OutputError("E_OUTPUT_NAME", f"{str(final)[:300]!r} cannot name the output.", why, "Choose another name.")


def work_folder(final: Path) -> Path:
    """Where the unfinished output of ``final`` lies."""
    return final.parent / f".{final.name}.partial"


def clear_work(work: Path) -> None:
    """Remove the work folder if there is no work in it: after publishing, or when nothing was finished."""
    with contextlib.suppress(OSError):
        if set(os.listdir(work)) <= OWN_NAMES - {"model"}:
            for name in ("journal", "lock"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(work / name)
            os.rmdir(work)


def refuse_existing(final: Path, plan_hash: str) -> None:
    """E_OUTPUT_EXISTS if there is anything of that name, be it a dangling link."""
    try:
        os.lstat(final)
    except (FileNotFoundError, NotADirectoryError):  # the latter is for mkdir to report
        return
    except OSError as error:
        raise write_error(error, final) from error
    why = "An existing folder or file is never replaced, and nothing is ever added to it."
    fix = "Choose another name, or move it away."
    with contextlib.suppress(VerificationError):
        if read_manifest(final).get("plan_hash") == plan_hash:
            why = "It is the finished result of this very plan: there is nothing left to do."
            fix = "`verify` tells whether it is still as it was written."
    work = work_folder(final)
    if work.is_dir() and not os.path.lexists(work / "model"):  # a run was killed right after publishing
        with contextlib.suppress(OutputError):
            lock = lock_folder(work)
            if not os.path.lexists(work / "model"):
                clear_work(work)
            unlock_folder(lock)
    raise OutputError("E_OUTPUT_EXISTS", f"{final} exists already.", why, fix)


def check_layout(files: Sequence[OutputFile]) -> None:
    """ValueError unless names are plain and unique and every file is its header and its tensors, gap-free."""
    tensors: set[str] = set()
    for file in files:
        if Path(file.name).name != file.name or file.name in ("..", MANIFEST):
            raise ValueError(f"{file.name!r} cannot be the name of a weight file")
        position = len(file.header)
        for entry in sorted(file.entries.values(), key=lambda entry: (entry.start, entry.nbytes)):
            if entry.start != position or entry.name in tensors:
                raise ValueError(f"{entry.name} in {file.name} overlaps, leaves a gap or is there twice")
            tensors.add(entry.name)
            position += entry.nbytes
        if position != file.size:
            raise ValueError(f"the tensors of {file.name} end at {position}, not at its size {file.size}")
    if len({file.name for file in files}) != len(files):
        raise ValueError("two weight files of the same name")
