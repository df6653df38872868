"""Hashing that follows the writers.

Every output byte goes into two SHA-256 digests, one of its tensor and one of its file, and is compared with
the checksum that the writer computed *before* writing it. Done after the merge this would cost 2 s per GB.
Done while the merge runs, on bytes that were just written and still sit in memory, nearly nothing is left
when the last tensor is written.

A tensor can be hashed as soon as it is complete. A file must be hashed from its first byte to its last, so
it advances up to the first tensor that is still missing. Both kinds of work go through one small pool of
threads; hashlib and xxhash release the interpreter lock while they compute.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import xxhash

from merging.checkpoints.disk import fill_from, start_writeback
from merging.errors import VerificationError

if TYPE_CHECKING:
    from merging.checkpoints.header import TensorEntry

BLOCK = 1 << 20  # bytes per read: fits the second-level cache, so that hashing does not wait for memory
_STRETCH = 64 * BLOCK  # a file gives its thread back after this much, so that tensors get their turn


def hash_threads() -> int:
    """How many threads hash: two at least (file and tensor digests), and no more than eight."""
    return max(2, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))


def feed(
    descriptor: int,
    start: int,
    size: int,
    buffer: bytearray,
    updates: Iterable[Callable[[memoryview], object]],
) -> None:
    """Read ``size`` bytes from ``start`` through ``buffer`` and hand every block to each of ``updates``."""
    updates, view, end = tuple(updates), memoryview(buffer), start + size
    while start < end:
        block = view[: min(len(buffer), end - start)]
        fill_from(descriptor, block, start)
        for update in updates:
            update(block)
        start += len(block)


class Stopped(Exception):
    """Raised between two blocks when nobody waits for the result any more."""


def stop_when(event: threading.Event) -> Callable[[memoryview], None]:
    """An ``update`` for ``feed`` that ends it soon after ``event`` is set, in the middle of a large tensor too."""

    def update(_block: memoryview) -> None:
        if event.is_set():
            raise Stopped

    return update


def matching(
    claims: Sequence[tuple[int, TensorEntry, str]], progress: Callable[[int, int], None] | None = None
) -> set[str]:
    """The names among ``(descriptor, entry, xxh3_128)`` whose bytes on disk have that checksum."""
    total, done, found = sum(entry.nbytes for _, entry, _ in claims), 0, set()
    stopped = threading.Event()
    stop = stop_when(stopped)

    def holds(claim: tuple[int, TensorEntry, str]) -> bool:
        descriptor, entry, expected = claim
        digest = xxhash.xxh3_128()
        buffer = bytearray(max(1, min(BLOCK, entry.nbytes)))
        feed(descriptor, entry.start, entry.nbytes, buffer, (digest.update, stop))
        return digest.hexdigest() == expected

    with ThreadPoolExecutor(hash_threads()) as pool:
        try:
            for (_, entry, _), equal in zip(claims, pool.map(holds, claims), strict=True):
                if equal:
                    found.add(entry.name)
                done += entry.nbytes
                if progress:
                    progress(done, total)
        except BaseException:
            stopped.set()
            raise
    return found


class _File:
    """How far one output file has been hashed."""

    def __init__(self, name: str, descriptor: int, entries: Iterable[TensorEntry], size: int):
        self.name, self.descriptor, self.size = name, descriptor, size
        self.entries = sorted(entries, key=lambda entry: (entry.start, entry.nbytes))
        self.next = 0  # index of the first tensor that is not complete
        self.hashed = 0  # bytes that went into the digest
        self.digest = hashlib.sha256()
        self.queued = False  # waits for a thread or has one
        self.finished = False  # hashed to the end and fsynced

    @property
    def reachable(self) -> int:
        """End of the part in which every tensor is complete."""
        return self.entries[self.next].start if self.next < len(self.entries) else self.size


class Follower:
    """Hashes tensors and files in the background and fsyncs each file at its end.

    ``completed`` is called once per tensor, in any order and from any thread. An error (bytes that differ
    from what was written: VerificationError E_VERIFY; a failed read or fsync: OSError) is kept and raised
    by every later ``check`` and by ``wait``.
    """

    def __init__(self, files: Iterable[tuple[str, int, Sequence[TensorEntry], int]], threads: int = 0):
        """``files``: (name, descriptor, entries, size). ``threads``: 0 chooses by ``hash_threads``."""
        self._files = [_File(*file) for file in files]
        self._home = {entry.name: (file, entry) for file in self._files for entry in file.entries}
        self._threads_wanted = threads or hash_threads()
        self._condition = threading.Condition()
        self._complete: set[str] = set()
        self._tensors: deque[tuple[_File, TensorEntry, str]] = deque()
        self._ready: deque[_File] = deque()
        self._files_running = 0
        self._error: BaseException | None = None
        self._stopping = threading.Event()
        self._stop = stop_when(self._stopping)
        self.sync_failed = False  # a failed fsync: what is on the disk is unknown
        self.tensor_digests: dict[str, str] = {}  # name -> SHA-256
        self.hashed_bytes = 0
        self.total_bytes = sum(file.size for file in self._files)
        self.total_bytes += sum(entry.nbytes for _, entry in self._home.values())
        for file in self._files:
            self._offer(file)
        self._threads = [
            threading.Thread(target=self._run, name=f"hashing-{index}", daemon=True)
            for index in range(self._threads_wanted)
        ]
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------------------------- called by the writers

    def completed(self, tensor: str, expected: str) -> None:
        """All bytes of ``tensor`` are written; ``expected`` is their xxh3_128."""
        file, entry = self._home[tensor]
        with self._condition:
            self._complete.add(tensor)
            self._tensors.append((file, entry, expected))
            while file.next < len(file.entries) and file.entries[file.next].name in self._complete:
                file.next += 1
            self._offer(file)
            self._condition.notify_all()

    def check(self) -> None:
        """Raise the first error of the background threads, if any."""
        if self._error is not None:
            raise self._error

    def wait(self, progress: Callable[[int, int], None] | None = None) -> dict[str, str]:
        """Wait until everything is hashed and fsynced; SHA-256 of each file by name.

        ``progress(done, total)`` is called about five times a second; each byte counts twice, once for
        its tensor and once for its file.
        """
        with self._condition:
            while not self._error and not self._finished():
                self._condition.wait(0.2)
                if progress:
                    progress(self.hashed_bytes, self.total_bytes)
        self.check()
        if progress:
            progress(self.total_bytes, self.total_bytes)
        return {file.name: file.digest.hexdigest() for file in self._files}

    def stop(self) -> None:
        """End the threads; work that was not done is dropped. May be called twice."""
        with self._condition:
            self._stopping.set()
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    # ------------------------------------------------------------------------------------------- the threads

    def _finished(self) -> bool:
        hashed = len(self.tensor_digests) == len(self._home)
        return hashed and all(file.finished for file in self._files)

    def _offer(self, file: _File) -> None:
        """Put the file into the queue if part of it can be hashed and no thread has it. Under the lock."""
        if not file.queued and not file.finished and file.reachable > file.hashed:
            file.queued = True
            self._ready.append(file)

    def _take(self) -> Callable[[bytearray], None] | None:
        """The next piece of work. Half of the threads go on with files as long as tensors wait."""
        if self._ready and (not self._tensors or self._files_running < max(1, len(self._threads) // 2)):
            file = self._ready.popleft()
            self._files_running += 1
            return lambda buffer: self._hash_file(file, buffer)
        if self._tensors:
            job = self._tensors.popleft()
            return lambda buffer: self._hash_tensor(*job, buffer)
        return None

    def _run(self) -> None:
        buffer = bytearray(BLOCK)
        while True:
            with self._condition:
                work = None
                while not self._stopping.is_set() and not self._error and not (work := self._take()):
                    self._condition.wait()
                if work is None:
                    return
            try:
                work(buffer)
            except BaseException as error:
                with self._condition:
                    self._error = self._error or error
                    self._condition.notify_all()
                return

    def _hash_tensor(self, file: _File, entry: TensorEntry, expected: str, buffer: bytearray) -> None:
        start_writeback(file.descriptor, entry.start, entry.nbytes)
        sha256, xxh3 = hashlib.sha256(), xxhash.xxh3_128()
        feed(file.descriptor, entry.start, entry.nbytes, buffer, (xxh3.update, sha256.update, self._stop))
        if xxh3.hexdigest() != expected:
            raise VerificationError(
                "E_VERIFY",
                f"Tensor {entry.name!r} in {file.name} reads back differently from what was written.",
                "A faulty disk, cable or memory, or another program that writes to the same file.",
                "Check the hardware, then run the same command again: only this tensor is done anew.",
            )
        with self._condition:
            self.tensor_digests[entry.name] = sha256.hexdigest()
            self.hashed_bytes += entry.nbytes
            self._condition.notify_all()

    def _hash_file(self, file: _File, buffer: bytearray) -> None:
        with self._condition:
            size = min(file.reachable - file.hashed, _STRETCH)
        feed(file.descriptor, file.hashed, size, buffer, (file.digest.update, self._stop))
        at_end = file.hashed + size == file.size
        if at_end:
            try:
                os.fsync(file.descriptor)
            except OSError:
                self.sync_failed = True
                raise
        with self._condition:
            file.hashed += size
            file.queued = False
            file.finished = at_end
            self.hashed_bytes += size
            self._files_running -= 1
            self._offer(file)
            self._condition.notify_all()
