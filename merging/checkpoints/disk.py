"""What the operating system offers for writing safely, and honest fallbacks where it offers less.

Each service is one call: reserve room before writing (``reserve``), write and read all bytes at a position
(``write_at``, ``fill_from``), start write-back early so that a later fsync is short (``start_writeback``),
make a folder's names survive a power cut (``sync_folder``), rename without ever replacing (``rename_new``),
and hold a folder for one process (``lock_folder``). They raise OSError as it comes; ``writing`` turns it
into the typed error that says what to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from merging.errors import OutputError

_NOT_OFFERED = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS}
_AT_FDCWD, _RENAME_NOREPLACE, _SYNC_FILE_RANGE_WRITE = -100, 1, 2


def _c_function(name: str, *argument_types: type) -> Callable[..., int] | None:
    """A function of the C library that Python's ``os`` lacks, or None on systems that lack it too."""
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes, function.restype = argument_types, ctypes.c_int
    return function


_fallocate = _c_function("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_sync_file_range = _c_function("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_renameat2 = _c_function("renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


# ------------------------------------------------------------------------------------------------- errors


def human(count: int) -> str:
    """``1536`` -> ``1.5 kB``; powers of 1000, as disks are sold and ``df --si`` prints."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


def free_bytes(path: Path) -> int | None:
    """Room on the disk of ``path`` for this user; None where the file system does not say."""
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def no_space(where: Path, needed: int = 0) -> OutputError:
    """E_NO_SPACE with what is needed and what is free."""
    free = free_bytes(where if where.is_dir() else where.parent)
    why = f"It needs {human(needed)}" if needed else "The disk or your quota on it is full"
    if free is not None:
        why += f"; {human(free)} are free"
    return OutputError(
        "E_NO_SPACE",
        f"Not enough room to write {where}.",
        why + ".",
        "Free some room or choose an output on another disk, then run the same command again: "
        "finished tensors are kept.",
    )


def write_error(error: OSError, where: Path, needed: int = 0) -> OutputError:
    """The typed error for a failed write, fsync, rename or mkdir at ``where``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space(where, needed)
    fix = {
        errno.EFBIG: "A file may not grow that large here (file system or `ulimit -f`): choose a smaller shard size.",
        errno.EMFILE: "Too many open files: choose a larger shard size or raise `ulimit -n`.",
        errno.EIO: "The disk reports a fault. Check it (`dmesg`), then run the same command again.",
        errno.ENAMETOOLONG: "Choose a shorter name.",
    }.get(error.errno or 0, "Choose a folder that you may write to.")
    return OutputError("E_OUTPUT_WRITE", f"Cannot write {where}.", f"{error.strerror or error}.", fix)


@contextlib.contextmanager
def writing(where: Path, needed: int = 0) -> Iterator[None]:
    """``with writing(path): …`` turns any OSError of the block into the typed error for ``path``."""
    try:
        yield
    except OSError as error:
        raise write_error(error, where, needed) from error


# ----------------------------------------------------------------------------------------- bytes and room


def reserve(descriptor: int, size: int) -> None:
    """Make the file exactly ``size`` bytes with its room on the disk taken now, not when it is too late.

    A file system without ``fallocate`` gets a sparse file. (``os.posix_fallocate`` is not used because the
    C library then writes every page once, which on a network disk sends the whole model twice.)
    """
    os.ftruncate(descriptor, size)
    while _fallocate and _fallocate(descriptor, 0, 0, size):
        code = ctypes.get_errno()
        if code in _NOT_OFFERED:
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def write_at(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of ``data`` at ``offset``, whatever the number of calls that takes."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)  # Python itself repeats the call after EINTR
        if not written:
            raise OSError(errno.EIO, "the disk accepted no bytes")
        view, offset = view[written:], offset + written


def fill_from(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill all of ``buffer`` from ``offset``."""
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if not count:
            raise OSError(errno.EIO, "the file is shorter than it was")
        buffer, offset = buffer[count:], offset + count


def start_writeback(descriptor: int, offset: int, size: int) -> None:
    """Ask the kernel to start writing these pages to the disk now. A hint: says nothing about success."""
    if _sync_file_range:
        _sync_file_range(descriptor, offset, size, _SYNC_FILE_RANGE_WRITE)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------- exclusion


def rename_new(source: Path, target: Path) -> None:
    """Rename the folder ``source`` to ``target`` unless ``target`` exists (FileExistsError).

    Atomic with Linux' ``renameat2``. Elsewhere the name is checked first; should another program slip in
    between, a plain rename can at worst replace an *empty* folder, never one with something in it.
    """
    if _renameat2:
        arguments = _AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE
        if _renameat2(*arguments) == 0:
            return
        code = ctypes.get_errno()
        if code not in _NOT_OFFERED:
            raise OSError(code, os.strerror(code), str(target))
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        raise


def lock_folder(folder: Path) -> int:
    """Create ``folder`` if needed and hold it: the descriptor of its locked file ``lock``.

    The kernel drops the lock when the process ends, however it ends, so no stale lock can remain.
    Raises OutputError E_BUSY at once if another process (or another thread of this one) holds it.
    """
    path = folder / "lock"
    for _ in range(100):
        with writing(folder):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder)
            if not stat.S_ISDIR(os.lstat(folder).st_mode):
                raise OSError(errno.ENOTDIR, "There is something else of that name")
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:  # its holder just finished and removed the folder
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The holder before us may have removed this very file after we opened it: then we hold
                # a lock that nobody else can see, and have to start over.
                if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                    return descriptor
            except BlockingIOError:
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                os.close(descriptor)
                raise OutputError(
                    "E_BUSY",
                    f"Another merge is writing to this name right now ({folder}).",
                    f"It is the process {holder}." if holder else "",
                    "Wait for it or choose another output name.",
                ) from None
            except FileNotFoundError:
                pass
            except OSError:
                os.close(descriptor)
                raise
            os.close(descriptor)
    raise OutputError("E_BUSY", f"The folder {folder} keeps being removed by another process.")


def unlock_folder(descriptor: int) -> None:
    """Give back what ``lock_folder`` gave, also if a child process inherited the descriptor."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
