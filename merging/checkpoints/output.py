"""OutputFolder: a model that becomes visible only when it is complete, verified and safe on the disk.

While the merge runs, everything lies beside the final folder, on the same disk::

    merged/                     does not exist yet
    .merged.partial/
        lock                    held while a process works on it
        journal                 which plan, which tensors are finished (see journal.py)
        model/                  the folder to be: weight files at full size from the start, side files

Layout and headers are known from the plan, so every block is written straight to its final place, in any
order, by any thread. A background pool reads the finished tensors back, compares them with the checksums
that the writers computed, and hashes (hashing.py). ``finish`` then writes the manifest, makes everything
durable and renames ``model`` to the final name, which replaces nothing and cannot be seen half done.

After a crash at any point the same plan goes on where it stood: what the journal claims is hashed again and
kept if it is right. Unfinished work of *another* plan is never mixed in and never deleted unasked (E_RESUME).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merging.checkpoints.disk import (
    free_bytes,
    lock_folder,
    no_space,
    rename_new,
    reserve,
    start_writeback,
    sync_folder,
    unlock_folder,
    write_at,
    write_error,
    writing,
)
from merging.checkpoints.hashing import Follower, matching
from merging.checkpoints.journal import VERSION, Journal, JournalContents, read_journal
from merging.checkpoints.manifest import NAME as MANIFEST
from merging.checkpoints.manifest import read_manifest, seal
from merging.checkpoints.output_rules import (
    OWN_NAMES,
    OutputFile,
    check_layout,
    check_output_name,
    clear_work,
    refuse_existing,
    work_folder,
)
from merging.errors import OutputError, VerificationError

_READ_WRITE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class OutputFolder:
    """See the module. Use ``OutputFolder.open``; then ``write`` and ``complete`` from any thread; then
    ``finish``, or ``close`` to leave the work for a later run. As a context manager it closes at the end."""

    done: set[str]  # tensors finished by an earlier run, whose bytes were hashed again and found right

    def __init__(self, final: Path, files: Sequence[OutputFile], plan_hash: str, lock: int):
        self.final, self.plan_hash, self.done = final, plan_hash, set()
        self._work, self._model = work_folder(final), work_folder(final) / "model"
        self._files = {file.name: file for file in files}
        self._home = {entry.name: (file.name, entry) for file in files for entry in file.entries.values()}
        self._descriptors: dict[str, int] = {}
        self._finished: set[str] = set()
        self._side_files: dict[str, tuple[int, str]] = {}  # name -> (size, SHA-256)
        self._lock = lock
        self._worth_keeping = True  # known after the journal was read
        self._journal: Journal | None = None
        self._follower: Follower | None = None

    # --------------------------------------------------------------------------------------------- opening

    @classmethod
    def open(
        cls,
        final: str | Path,
        files: Sequence[OutputFile],
        plan_hash: str,
        *,
        discard: bool = False,
        threads: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> OutputFolder:
        """Start, or resume where a run of the same plan stopped.

        discard: delete unfinished work for this name first, whatever plan it belongs to.
        threads: for hashing; 0 = as many as there are cores, two at least.
        progress: called with (bytes, of bytes) while finished tensors of an earlier run are hashed again.

        Nothing is read or computed before these are known to be fine. OutputError: E_OUTPUT_NAME;
        E_OUTPUT_EXISTS; E_BUSY (another run writes there now); E_RESUME (unfinished work of another plan);
        E_NO_SPACE (the room for all weight files is taken here, not later); E_OUTPUT_WRITE.
        """
        final = Path(final)
        check_output_name(final)
        check_layout(files)
        final = final.parent.absolute() / final.name  # a later chdir must not matter
        refuse_existing(final, plan_hash)
        with writing(final.parent):
            final.parent.mkdir(parents=True, exist_ok=True)
        folder = cls(final, files, plan_hash, lock_folder(work_folder(final)))
        try:
            refuse_existing(final, plan_hash)  # it may have been published while we took the lock
            folder._start(discard, threads, progress)
        except BaseException:
            folder.close()
            raise
        return folder

    def _start(self, discard: bool, threads: int, progress: Callable[[int, int], None] | None) -> None:
        earlier = self._earlier_work(discard)
        self._worth_keeping = bool(earlier.claims)
        with writing(self._work):
            if not earlier.claims and os.path.lexists(self._model):
                shutil.rmtree(self._model)
            self._journal = Journal(self._work / "journal", self.plan_hash, earlier)
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._model)
            for name in os.listdir(self._model):
                if name not in self._files:  # side files and the manifest are written anew
                    os.unlink(self._model / name)
        self._take_room()
        claims = [
            (self._descriptors[self._home[name][0]], self._home[name][1], checksum)
            for name, checksum in earlier.claims.items()
            if name in self._home
        ]
        with writing(self._model):
            self.done = matching(claims, progress)
        self._finished = set(self.done)
        self._worth_keeping = bool(self.done)
        self._follower = Follower(
            [
                (file.name, self._descriptors[file.name], list(file.entries.values()), file.size)
                for file in self._files.values()
            ],
            threads,
        )
        for name in self.done:
            self._follower.completed(name, earlier.claims[name])

    def _earlier_work(self, discard: bool) -> JournalContents:
        """What can be resumed; empty if there is nothing. E_RESUME if there is something that is not ours."""
        with writing(self._work):
            present = set(os.listdir(self._work))
        foreign = sorted(present - OWN_NAMES)
        if foreign:
            raise OutputError(
                "E_RESUME",
                f"{self._work} holds files that no merge put there: {', '.join(map(repr, foreign[:5]))}.",
                "That folder is needed for unfinished work, and nothing of yours is ever deleted.",
                "Move it away or choose another output name.",
            )
        earlier = read_journal(self._work / "journal")
        if discard or "model" not in present or not earlier.claims and earlier.version == VERSION:
            return JournalContents()  # nothing of worth: not one finished tensor
        if earlier.plan == self.plan_hash and earlier.version == VERSION:
            return earlier
        owner = "another recipe, other inputs or other settings"
        if earlier.version != VERSION:
            owner = "another version of this program"
        raise OutputError(
            "E_RESUME",
            f"There is unfinished work for {self.final.name!r} in {self._work}.",
            f"It belongs to {owner}, and mixing the two would give a wrong model.",
            "Finish it with its own recipe, choose another output name, or start anew with --restart "
            "(which deletes the unfinished work).",
        )

    def _take_room(self) -> None:
        """Open all weight files at full size and write their headers."""
        here = 0
        for name in self._files:
            with contextlib.suppress(OSError):
                here += os.lstat(self._model / name).st_blocks * 512
        needed = sum(file.size for file in self._files.values()) + 400 * len(self._home) - here
        free = free_bytes(self._work)
        if free is not None and needed > free:
            raise no_space(self.final, needed)
        for file in self._files.values():
            path = self._model / file.name
            with writing(path, needed):
                descriptor = os.open(path, _READ_WRITE, 0o666)  # the umask is subtracted by the kernel
                self._descriptors[file.name] = descriptor
                reserve(descriptor, file.size)
                write_at(descriptor, file.header, 0)

    # --------------------------------------------------------------------------------------------- writing

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Write ``data`` at byte ``offset`` of the tensor. From any thread, in any order.

        OutputError E_OUTPUT_WRITE or E_NO_SPACE. ValueError for bytes outside the tensor.
        """
        name, entry = self._home[tensor]
        if offset < 0 or offset + data.nbytes > entry.nbytes:
            raise ValueError(f"bytes {offset}…{offset + data.nbytes} are outside of {tensor} ({entry.nbytes} bytes)")
        if tensor in self._finished:
            raise ValueError(f"{tensor} is finished already")
        try:
            write_at(self._descriptors[name], data, entry.start + offset)
        except OSError as error:
            raise write_error(error, self._model / name) from error

    def complete(self, tensor: str, checksum: str) -> None:
        """All bytes of ``tensor`` are written. ``checksum``: xxh3_128 of them in order, in hexadecimal.

        To be called once per tensor that is not in ``done``, empty ones included. Raises what the background
        found so far: VerificationError E_VERIFY, OutputError E_OUTPUT_WRITE.
        """
        assert self._follower and self._journal
        if tensor in self._finished:
            raise ValueError(f"{tensor} is finished already")
        self._check_follower()
        with writing(self._work / "journal"):
            self._journal.claim(tensor, checksum)
        self._finished.add(tensor)
        self._worth_keeping = True
        self._follower.completed(tensor, checksum)

    def add(self, name: str, content: bytes) -> None:
        """Write a side file (config.json, README.md …) into the model. The last call for a name counts."""
        path = self._model / name
        if path.name != name or name in self._files or name in ("..", MANIFEST):
            raise ValueError(f"{name!r} cannot be the name of a side file")
        with writing(path):
            descriptor = os.open(path, _READ_WRITE | os.O_TRUNC, 0o666)
            try:
                write_at(descriptor, content, 0)
                start_writeback(descriptor, 0, len(content))
            finally:
                os.close(descriptor)
        self._side_files[name] = len(content), hashlib.sha256(content).hexdigest()

    # ------------------------------------------------------------------------------------------- finishing

    def finish(self, manifest: Mapping[str, Any], progress: Callable[[int, int], None] | None = None) -> Path:
        """Verify and make durable everything, write manifest.json, and rename the folder into place.

        The manifest gets the keys described in manifest.py. ``progress``: (bytes hashed, of bytes), counted
        from the start of the merge. Returns the final path; the OutputFolder is closed then.
        VerificationError E_VERIFY: bytes do not read back as written. OutputError: E_OUTPUT_EXISTS (somebody
        took the name meanwhile), E_OUTPUT_WRITE, E_NO_SPACE. After an error ``close`` and run again.
        """
        assert self._follower
        seal(manifest)  # what JSON cannot hold must show now and not after the wait
        missing = self._home.keys() - self._finished
        if missing:
            example = min(missing)
            raise ValueError(f"{len(missing)} tensors were never completed, {example} among them")
        digests = self._wait(progress)
        with writing(self._model):
            for name in self._side_files:
                self._seal_side_file(name)
            self._write_manifest(manifest, digests)
            sync_folder(self._model)
        try:
            rename_new(self._model, self.final)
        except FileExistsError:
            refuse_existing(self.final, self.plan_hash)
            raise
        except OSError as error:
            raise write_error(error, self.final) from error
        self.close()
        with writing(self.final.parent):
            sync_folder(self.final.parent)
        return self.final

    def _wait(self, progress: Callable[[int, int], None] | None) -> dict[str, str]:
        assert self._follower
        try:
            return self._follower.wait(progress)
        except OSError as error:
            raise write_error(error, self._model) from error

    def _check_follower(self) -> None:
        assert self._follower
        try:
            self._follower.check()
        except OSError as error:
            raise write_error(error, self._model) from error

    def _seal_side_file(self, name: str) -> None:
        """fsync it and compare what reads back with what was given."""
        descriptor = os.open(self._model / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            os.fsync(descriptor)
            content = file.read()
        if (len(content), hashlib.sha256(content).hexdigest()) != self._side_files[name]:
            raise VerificationError(
                "E_VERIFY",
                f"{name} reads back differently from what was written.",
                "A faulty disk or memory, or another program that writes to the same file.",
                "Check the hardware, then run the same command again.",
            )

    def _write_manifest(self, manifest: Mapping[str, Any], digests: dict[str, str]) -> None:
        assert self._follower
        files = {name: {"size": file.size, "sha256": digests[name]} for name, file in self._files.items()}
        files |= {name: {"size": size, "sha256": sha256} for name, (size, sha256) in self._side_files.items()}
        tensors = {
            name: {
                "file": file,
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "sha256": self._follower.tensor_digests[name],
            }
            for name, (file, entry) in self._home.items()
        }
        added = {"plan_hash": self.plan_hash, "files": dict(sorted(files.items())), "tensors": tensors}
        if added.keys() & manifest.keys():
            raise ValueError(f"the manifest may not hold {', '.join(added)}: they are added here")
        descriptor = os.open(self._model / MANIFEST, _READ_WRITE | os.O_TRUNC, 0o666)
        try:
            write_at(descriptor, seal({**manifest, **added}), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        read_manifest(self._model)  # a manifest that cannot be read must not be published

    # --------------------------------------------------------------------------------------------- closing

    def close(self) -> None:
        """Let go of everything. Work in which at least one tensor is finished stays for a later run."""
        if self._lock < 0:
            return
        if self._follower:
            self._follower.stop()
            if self._follower.sync_failed and self._journal:
                # The kernel may go on showing pages that never reached the disk: trust none of it.
                self._worth_keeping = False
                with contextlib.suppress(OSError):
                    self._journal.forget()
        for descriptor in self._descriptors.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        if self._journal:
            self._journal.close()
        if not self._worth_keeping:
            shutil.rmtree(self._model, ignore_errors=True)
        clear_work(self._work)
        unlock_folder(self._lock)
        self._lock = -1

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
