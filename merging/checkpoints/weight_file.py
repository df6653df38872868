"""One weight file that stays the same file while it is used.

A model of 300 shards must not hold 300 descriptors, so at most MOST_OPEN weight files are open at a time in
the whole process. A file that is opened again must still be the one that was opened first: same device,
inode, size and modification time. Anything else is E_INPUT_CHANGED, never a quietly mixed model.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, NoReturn

from merging.checkpoints.files import open_plain, read_at, resolve_link, shown
from merging.checkpoints.header import Header, read_header
from merging.errors import InputError

MOST_OPEN = 64


class WeightFile:
    """One safetensors file: its header, and reads by offset through a descriptor that may come and go."""

    def __init__(self, path: Path):
        self.path, self.shown = path, shown(path)
        self.users = 0
        descriptor = open_plain(path)
        try:
            self.stamp = _stamp(os.fstat(descriptor))
            self.header: Header = read_header(descriptor, shown(path))
            self._require(_stamp(os.fstat(descriptor)))
        except BaseException:
            os.close(descriptor)
            raise
        _descriptors.add(self, descriptor)

    def read(self, offset: int, out: memoryview) -> None:
        descriptor = _descriptors.acquire(self)
        try:
            read_at(descriptor, offset, out, self.shown)
        finally:
            _descriptors.release(self)

    def reopen(self) -> int:
        descriptor = open_plain(self.path)
        try:
            self._require(_stamp(os.fstat(descriptor)))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def check_unchanged(self) -> None:
        """The open file is as it was, and the path still leads to it."""
        try:
            self._require(_stamp(os.stat(resolve_link(str(self.path)), follow_symlinks=False)))
        except OSError as error:
            self._changed(error.strerror or "it is gone")
        descriptor = _descriptors.acquire(self)
        try:
            self._require(_stamp(os.fstat(descriptor)))
        finally:
            _descriptors.release(self)

    def identity(self) -> dict[str, Any]:
        _, _, size, modified = self.stamp
        return {"name": self.path.name, "size": size, "mtime_ns": modified, "header": self.header.digest}

    def close(self) -> None:
        _descriptors.remove(self)

    def _require(self, stamp: tuple[int, int, int, int]) -> None:
        if stamp != self.stamp:
            names = ("device", "inode", "size", "modification time")
            self._changed(
                ", ".join(name for name, old, new in zip(names, self.stamp, stamp, strict=True) if old != new)
            )

    def _changed(self, why: str) -> NoReturn:
        raise InputError(
            "E_INPUT_CHANGED",
            f"{shown(self.path)} was changed while it was in use.",
            f"Not as it was when it was opened: {why}.",
            "Let nothing write to the inputs during a merge, then run again.",
        ) from None


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _Descriptors:
    """The open weight files; beyond MOST_OPEN the least recently used one that nobody reads is closed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.open: OrderedDict[WeightFile, int] = OrderedDict()

    def add(self, file: WeightFile, descriptor: int) -> None:
        with self.lock:
            self.open[file] = descriptor
            self._shrink()

    def acquire(self, file: WeightFile) -> int:
        with self.lock:
            if file not in self.open:
                self.open[file] = file.reopen()
            self.open.move_to_end(file)
            file.users += 1
            self._shrink()
            return self.open[file]

    def release(self, file: WeightFile) -> None:
        with self.lock:
            file.users -= 1

    def remove(self, file: WeightFile) -> None:
        with self.lock:
            if file in self.open and file.users == 0:
                os.close(self.open.pop(file))

    def _shrink(self) -> None:
        excess = len(self.open) - MOST_OPEN
        for file in [file for file in self.open if file.users == 0][: max(excess, 0)] if excess > 0 else ():
            os.close(self.open.pop(file))


_descriptors = _Descriptors()
