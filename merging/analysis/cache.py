"""Results kept on disk, so that a second look at the same models is instant.

An entry is one ``.npz`` file: the result as JSON, and the numbers of its arrays, joined by type. Its name is a SHA-256
over everything that decides about the numbers: the models, the options, and ``NUMERICS``. So an entry is never out of
date, only unused; the oldest ones are removed when the folder has grown too large.

The models enter by where they lie, by size, modification time and header of each weight file, and by samples of its
bytes (``fingerprint``). Reading them whole would take as long as the analysis; times alone do not tell files apart that
were unpacked from one archive in one second.

Nothing here can fail an inspection. Entries are written beside and moved into place, so two processes may write the
same one. A damaged, cut off or foreign entry is as good as none, and so is a folder that cannot be written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.checkpoint import Checkpoint

NUMERICS = 1
"""Raised whenever the same models and options would give other numbers: older entries are then not found."""
LARGEST_FOLDER = 2_000_000_000
"""Bytes that all entries together may take."""
SAMPLE, SAMPLES = 4096, 256
"""A fingerprint reads ``SAMPLES`` pieces of so many bytes, spread evenly over a model's files (4 per file at least)."""

_FACTS = "facts"
_DATACLASS, _TUPLE, _ARRAY = "$class", "$tuple", "$array"


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 (hex) of a model's identity and of samples of its bytes; the adapter's base counts. Not of all bytes."""
    digest = hashlib.sha256(json.dumps(checkpoint.identity(), sort_keys=True).encode())
    files = [*checkpoint.files, *(checkpoint.base.files if checkpoint.base is not None else [])]
    pieces = max(4, SAMPLES // max(1, len(files)))
    buffer = memoryview(bytearray(SAMPLE))
    for file in files:
        size = file.stamp[2]
        for i in range(pieces):
            start = (max(0, size - SAMPLE) * i) // (pieces - 1)
            piece = buffer[: min(SAMPLE, size)]
            file.read(start, piece)
            digest.update(piece)
    return digest.hexdigest()


def key_of(facts: Mapping[str, Any]) -> str:
    """The entry's name: SHA-256 (hex) of ``facts`` (JSON values) and ``NUMERICS``."""
    text = json.dumps({"numerics": NUMERICS, **facts}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """Entries in one folder; ``Cache(None)`` keeps and finds nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.problem = ""
        """Why results could not be kept, for people; empty if they could."""

    def read(self, key: str, classes: Sequence[type] = ()) -> Any:
        """The value written under ``key``; None if there is none, or if it cannot be used.

        ``classes``: the dataclasses that the value may be made of. Anything else in it makes the entry unusable.
        """
        if self.folder is None:
            return None
        path = self.folder / f"{key}.npz"
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        try:
            with np.load(io.BytesIO(raw), allow_pickle=False) as content:  # (zip checks a sum of each part)
                arrays = {name: content[name] for name in content.files}
            facts = json.loads(arrays[_FACTS].tobytes())
            if facts["key"] != key:
                raise ValueError("another entry")
            value = _unpacked(facts["value"], arrays, {cls.__name__: cls for cls in classes})
        except Exception:  # whatever a damaged file makes its readers raise: it is written anew
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used: not among the first to go
        return value

    def write(self, key: str, value: Any) -> None:
        """Keep ``value``: dataclasses, dicts with text keys, lists, tuples, arrays of numbers, plain JSON values."""
        if self.folder is None:
            return
        joined: dict[str, _Joined] = {}
        facts = {"key": key, "value": _packed(value, joined)}
        arrays = {name: np.concatenate(one.parts) for name, one in joined.items()}
        arrays[_FACTS] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        part = ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor, part = tempfile.mkstemp(prefix=f"{key[:16]}.", suffix=".part", dir=self.folder)
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            os.replace(part, self.folder / f"{key}.npz")
            self._shrink()
        except OSError as error:
            self.problem = f"{self.folder}: {error.strerror or error}"
            with contextlib.suppress(OSError):
                if part:
                    os.unlink(part)

    def _shrink(self) -> None:
        """Remove the entries that were not used for longest, until the folder is small enough."""
        assert self.folder is not None
        found = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(OSError):  # another process may have removed it
                status = entry.stat(follow_symlinks=False)
                found.append((status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= LARGEST_FOLDER:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
                total -= size


# -- values as JSON and arrays ------------------------------------------------------------------------------------


class _Joined:
    """Arrays of one type, one behind the other. (Thousands of parts of a zip file would be slow.)"""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.size = 0

    def add(self, values: np.ndarray) -> int:
        """Where the first number of ``values`` will stand."""
        start, self.size = self.size, self.size + values.size
        self.parts.append(values.ravel())
        return start


def _packed(value: Any, arrays: dict[str, _Joined]) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _packed(getattr(value, f.name), arrays) for f in dataclasses.fields(value) if f.init}
        return {_DATACLASS: type(value).__name__, "fields": fields}
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise TypeError(f"an array of {value.dtype} cannot be kept")
        name = value.dtype.newbyteorder("<").str
        start = arrays.setdefault(name, _Joined()).add(value.astype(name, copy=False))
        return {_ARRAY: [name, start, list(value.shape)]}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple):
        return {_TUPLE: [_packed(v, arrays) for v in value]}
    if isinstance(value, list):
        return [_packed(v, arrays) for v in value]
    if isinstance(value, Mapping):
        if not all(type(k) is str and not k.startswith("$") for k in value):
            raise TypeError("a dict with other keys than text cannot be kept")
        return {k: _packed(v, arrays) for k, v in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} cannot be kept")


def _unpacked(value: Any, arrays: Mapping[str, np.ndarray], classes: Mapping[str, type]) -> Any:
    if isinstance(value, list):
        return [_unpacked(v, arrays, classes) for v in value]
    if not isinstance(value, dict):
        return value
    if _ARRAY in value:
        name, start, shape = value[_ARRAY]
        return arrays[name][start : start + math.prod(shape)].reshape(shape)
    if _TUPLE in value:
        return tuple(_unpacked(v, arrays, classes) for v in value[_TUPLE])
    if _DATACLASS in value:
        fields = {name: _unpacked(v, arrays, classes) for name, v in value["fields"].items()}
        return classes[value[_DATACLASS]](**fields)
    return {name: _unpacked(v, arrays, classes) for name, v in value.items()}
