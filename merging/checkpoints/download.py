"""Files from the Hugging Face Hub into its ordinary cache, and never an unchecked byte out of it.

The Hub states a checksum for every file: sha256 for a large one (Git LFS), git's sha1 for a small one. The
client library compares sizes only, starts again after a kill, and hands out what lies in its cache to whoever
asks, even if the Hub has just refused. So the transfer is done here, on that library's session, token and
cache layout:

* The listing of one commit, asked for with the user's own token before every use, is the only authority. It
  says who may read, and the name, length and checksum of each file. Etags and file names in answers are not
  looked at, so they cannot lead a write anywhere.
* Bytes go to ``models--org--name/.amalgam/<checksum>.part``. After a cut, a cancel or a kill they stay there,
  and the next attempt asks for the rest only.
* When the checksum is right, the part becomes ``blobs/<checksum>``, linked from ``snapshots/<commit>/``,
  where every Hugging Face tool finds it.
* What was checked is noted (size, time, inode): the next use costs one ``stat`` and no hashing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from ..errors import HubError, InputError, OutputError
from . import hub_client
from .disk import free_bytes, human, write_at
from .files import open_plain
from .hub_client import CHECKSUM, COMMIT, HubFile, Listing, Patience, Refused, request_failures, status_of
from .strict_json import read_json

Progress = Callable[[int, int, str], None]  # (bytes that are here, all bytes, name of the file that moves)

WORKERS = 4  # files received or hashed at once
_PIECE = 1 << 20
_REPORT_SECONDS = 0.1


class _Stopped(Exception):
    """Another file failed or the user cancelled; this thread should end. Never leaves this module."""


# ------------------------------------------------------------------------------------------------ the cache


class RepositoryCache:
    """The folder of one repository in the Hugging Face cache."""

    def __init__(self, repo_id: str):
        from huggingface_hub import constants

        self.repo_id = repo_id
        cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
        self.folder = cache / f"models--{repo_id.replace('/', '--')}"
        self._ours = self.folder / ".amalgam"

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def blob(self, file: HubFile) -> Path:
        return self.folder / "blobs" / file.checksum

    def part(self, file: HubFile) -> Path:
        return self._ours / f"{file.checksum}.part"

    def is_checked(self, path: Path, file: HubFile) -> bool:
        """Whether the file at ``path`` is, by size, time and inode, the one whose checksum was right."""
        try:
            return (self._ours / f"{file.checksum}.checked").read_text() == _fingerprint(os.stat(path))
        except (OSError, ValueError):
            return False

    def remember(self, file: HubFile, status: os.stat_result) -> None:
        self._note(self._ours / f"{file.checksum}.checked", _fingerprint(status))

    def commit_of(self, revision: str) -> str | None:
        """The commit that ``revision`` last meant, if its snapshot is here."""
        commit = revision
        if not COMMIT.fullmatch(revision):
            try:
                commit = (self.folder / "refs" / revision).read_text().strip()
            except (OSError, ValueError):
                return None
        return commit if COMMIT.fullmatch(commit) and self.snapshot(commit).is_dir() else None

    def remember_listing(self, listing: Listing, names: Sequence[str]) -> None:
        """For offline use: which files make up this commit, and which commit the branch means."""
        files = [asdict(listing.files[name]) for name in names]
        self._note(self._ours / f"{listing.commit}.json", json.dumps(files, indent=1))
        if not COMMIT.fullmatch(listing.revision):
            self._note(self.folder / "refs" / listing.revision, listing.commit)

    def listing(self, revision: str) -> Listing:
        """What the cache knows of ``revision``. HubError E_HUB_OFFLINE if it has nothing of it."""
        commit = self.commit_of(revision)
        if commit is None:
            raise HubError(
                "E_HUB_OFFLINE",
                f"{self.repo_id}@{revision} is not in the cache, and offline mode forbids to ask the Hub.",
                f"Only {self.folder.parent} was looked at.",
                "Go online once (unset HF_HUB_OFFLINE), or give the path of a local folder.",
            )
        record = self._ours / f"{commit}.json"
        if record.exists():
            with contextlib.suppress(InputError, TypeError):
                files = [HubFile(**file) for file in read_json(record, 1 << 24)]
                if all(CHECKSUM.fullmatch(file.checksum) for file in files):
                    return Listing(self.repo_id, revision, commit, {file.name: file for file in files})
        return Listing(self.repo_id, revision, commit, self._linked_files(commit), complete=False)

    def _linked_files(self, commit: str) -> dict[str, HubFile]:
        """Files that another Hugging Face tool brought: the blob behind a link is called by its checksum."""
        snapshot, files = self.snapshot(commit), {}
        for path in [*snapshot.glob("*"), *snapshot.glob("additional_chat_templates/*")]:
            if path.is_symlink() and path.is_file() and CHECKSUM.fullmatch(Path(os.readlink(path)).name):
                name = path.relative_to(snapshot).as_posix()
                files[name] = HubFile(name, path.stat().st_size, Path(os.readlink(path)).name)
        return files

    @staticmethod
    def _note(path: Path, text: str) -> None:
        """Write a small file in one piece. A cache that cannot be written just costs the next use time."""
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
            temporary.write_text(text)
            os.replace(temporary, path)


def _fingerprint(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"


# --------------------------------------------------------------------------------------------- the transfer


class Download:
    """Brings files of one listing into the cache; several at a time, each checked before it is published."""

    def __init__(self, listing: Listing, cache: RepositoryCache, offline: bool):
        self.listing, self.cache, self.offline = listing, cache, offline
        self._stop = threading.Event()
        self._here: dict[str, int] = {}
        self._current = ""

    def bring(self, names: Sequence[str], progress: Progress | None = None) -> Path:
        """The snapshot folder, once every file in ``names`` lies in it and has the stated checksum.

        ``progress`` is called from the calling thread about ten times a second; whatever it raises stops the
        download and comes out here. Raises HubError (E_HUB_CHECKSUM, E_HUB_OFFLINE, E_HUB_NETWORK, …) and
        OutputError (E_NO_SPACE, E_OUTPUT_WRITE).
        """
        files = sorted((self.listing.files[name] for name in names), key=lambda file: (file.size, file.name))
        self._here = dict.fromkeys(names, 0)
        total = sum(file.size for file in files)
        if not self.offline:
            self._check_space(files)
        pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="hub")
        try:
            waiting = {pool.submit(self._provide_or_explain, file) for file in files}
            while waiting:
                finished, waiting = wait(waiting, _REPORT_SECONDS, FIRST_COMPLETED)
                for future in finished:
                    future.result()
                if progress:
                    progress(sum(self._here.values()), total, self._current)
        except BaseException:
            self._stop.set()  # the threads end at their next piece; a stalled one must not hold up the user
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()
        return self.cache.snapshot(self.listing.commit)

    def _check_space(self, files: Sequence[HubFile]) -> None:
        need = 0
        for file in files:
            if not self.cache.blob(file).exists():
                part = self.cache.part(file)
                need += file.size - min(file.size, part.stat().st_size if part.exists() else 0)
        folder = next(folder for folder in self.cache.folder.parents if folder.exists())
        free = free_bytes(folder)
        if need and free is not None and need > free:
            raise self._no_space(f"{human(need)} are still to be downloaded, {human(free)} are free.")

    def _no_space(self, why: str) -> OutputError:
        return OutputError(
            "E_NO_SPACE",
            f"Not enough room for {self.listing.repo_id} in {self.cache.folder.parent}.",
            why,
            "Free some room, or point HF_HUB_CACHE to another disk, then run this again.",
        )

    def _provide_or_explain(self, file: HubFile) -> None:
        try:
            self._provide(file)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._no_space("The disk, or your quota on it, became full.") from None
            raise OutputError(
                "E_OUTPUT_WRITE",
                f"The cache folder {self.cache.folder} cannot be used.",
                f"{error.strerror or error}.",
                "Check its permissions and its disk, or point HF_HUB_CACHE to another folder.",
            ) from None

    def _provide(self, file: HubFile) -> None:
        pointer, blob = self.cache.snapshot(self.listing.commit) / file.name, self.cache.blob(file)
        if self.cache.is_checked(pointer, file):
            self._count(file, file.size)
        elif self._is_right(blob, file):
            self._link(blob, pointer)
        elif self._is_right(pointer, file):
            pass  # a cache without links (some file systems have none): the file itself lies in the snapshot
        elif self.offline:
            self._refuse_offline(file, pointer)
        else:
            with self._claimed(self.cache.part(file)) as part:
                if self._is_right(blob, file):  # another process brought it while we waited
                    os.unlink(self.cache.part(file))
                else:
                    self._receive_checked(file, part, blob)
            self._link(blob, pointer)

    def _refuse_offline(self, file: HubFile, pointer: Path) -> NoReturn:
        where = f"{file.name} of {self.listing.repo_id}@{self.listing.commit}"
        if os.path.exists(pointer):
            raise HubError(
                "E_HUB_CHECKSUM",
                f"{where} in the cache is damaged.",
                f"Its checksum is not {file.checksum}.",
                "Go online (unset HF_HUB_OFFLINE): then it is fetched again.",
            )
        raise HubError(
            "E_HUB_OFFLINE",
            f"{where} is not in the cache, and offline mode forbids to fetch it.",
            "",
            "Go online once (unset HF_HUB_OFFLINE).",
        )

    def _receive_checked(self, file: HubFile, part: int, blob: Path) -> None:
        """Fill ``part`` and make it the blob. A wrong one is thrown away and fetched once more."""
        for _ in range(2):
            self._receive(file, part)
            if self._checksum(part, file, None) == file.checksum:
                os.fsync(part)  # the note below must not outlive the bytes in a power cut
                blob.parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.cache.part(file), blob)
                self.cache.remember(file, os.fstat(part))
                return
            os.ftruncate(part, 0)
        os.unlink(self.cache.part(file))
        raise HubError(
            "E_HUB_CHECKSUM",
            f"{file.name} of {self.listing.repo_id} arrived damaged, twice.",
            f"The Hub states {file.size:,} bytes with the checksum {file.checksum}; something else arrived.",
            "Run this again. If it stays, a proxy alters downloads, or the file on the Hub is broken.",
        )

    def _receive(self, file: HubFile, part: int) -> None:
        """Ask until ``part`` has all bytes that the Hub states, or it has no more (the checksum decides)."""
        waits = hub_client.RETRY_WAITS
        patience = Patience(self.listing.repo_id, self.listing.revision, self._pause, waits, reached=True)
        most = os.fstat(part).st_size
        while (have := os.fstat(part).st_size) < file.size:
            failure: Exception = ConnectionError()
            try:
                self._receive_from(have, file, part)
            except request_failures() as error:
                failure = error
            now = os.fstat(part).st_size
            if now >= file.size or status_of(failure) == 416:  # 416: it has nothing beyond what we have
                break
            if now > most:
                most, patience.failures = now, 0
            patience.bear(failure)

    def _receive_from(self, have: int, file: HubFile, part: int) -> None:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session

        headers = {**build_hf_headers(library_name="amalgam"), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        address = hf_hub_url(self.listing.repo_id, file.name, revision=self.listing.commit)
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        # A redirect to another host, where large files lie, is followed without the token.
        with get_session().stream("GET", address, headers=headers, timeout=seconds) as response:
            if response.status_code not in (200, 206):
                raise Refused(response)
            if response.status_code == 200:  # the whole file: Range was not asked for, or ignored
                have = 0
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                os.ftruncate(part, 0)
                raise ConnectionError
            os.ftruncate(part, have)
            for piece in response.iter_bytes():
                self._pause(0)
                write_at(part, piece, have)
                have += len(piece)
                self._count(file, have)
                if have > file.size:
                    return

    @contextlib.contextmanager
    def _claimed(self, path: Path) -> Iterator[int]:
        """The part file, open and locked: two processes that want the same file must not both write it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                if _lock(descriptor) and _is_still(path, descriptor):
                    yield descriptor
                    return
            finally:
                os.close(descriptor)
            self._pause(_REPORT_SECONDS)

    def _is_right(self, path: Path, file: HubFile) -> bool:
        """Whether the file at ``path`` has the stated size and checksum; if so, that is noted."""
        try:
            descriptor = open_plain(path)
        except InputError:
            return False
        try:
            status = os.fstat(descriptor)
            right = self._checksum(descriptor, file, self._count) == file.checksum
        finally:
            os.close(descriptor)
        if right:
            self.cache.remember(file, status)
        else:
            self._count(file, 0)
        return right

    def _checksum(self, descriptor: int, file: HubFile, count: Callable[[HubFile, int], None] | None) -> str:
        """Checksum of the open file, of the kind that the Hub states for it; "" if the size is wrong."""
        if os.fstat(descriptor).st_size != file.size:
            return ""
        if len(file.checksum) == 64:
            digest = hashlib.sha256()
        else:
            digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
        done = 0
        while piece := os.pread(descriptor, _PIECE, done):
            self._pause(0)
            digest.update(piece)
            done += len(piece)
            if count:
                count(file, done)
        return digest.hexdigest()

    def _link(self, blob: Path, pointer: Path) -> None:
        target = os.path.relpath(blob, pointer.parent)
        if pointer.is_symlink() and os.readlink(pointer) == target:
            return
        pointer.parent.mkdir(parents=True, exist_ok=True)
        temporary = pointer.with_name(f".{pointer.name}.{os.getpid()}.{threading.get_ident()}")
        os.symlink(target, temporary)
        os.replace(temporary, pointer)

    def _count(self, file: HubFile, done: int) -> None:
        self._here[file.name], self._current = done, file.name

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds) if seconds else self._stop.is_set():
            raise _Stopped


def _is_still(path: Path, descriptor: int) -> bool:
    """False if the one who held the lock before us has published or removed the file that we opened."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool:
    """Take the lock if it is free. On a file system without locks, go on: the checksum finds any damage."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
