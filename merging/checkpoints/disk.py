"""What the operating system offers for writing safely, and honest fallbacks where it offers less.

Each service is one call: reserve room before writing (``reserve``), write and read all bytes at a position
(``write_at``, ``fill_from``), start write-back early so that a later fsync is short (``start_writeback``),
make a folder's names survive a power cut (``sync_folder``), rename without ever replacing (``rename_new``),
replace a small file in one step (``write_whole``), hold a file or a folder for one process (``take_lock``,
``lock_folder``). They raise OSError as it comes; ``writing`` turns it into the typed error that says what to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from merging.errors import OutputError

_NOT_OFFERED = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS}
_UMASK = os.umask(0o077)
os.umask(_UMASK)  # can only be asked for by changing it, which must not happen while other threads make files
_AT_FDCWD, _RENAME_NOREPLACE, _SYNC_FILE_RANGE_WRITE, _KEEP_SIZE = -100, 1, 2, 1


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
        "Free some room or choose an output on another disk, then run the same command again"
        + (": finished tensors are kept." if needed else "."),
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


def reserve_beyond(descriptor: int, size: int) -> None:
    """Take the room for ``size`` bytes after the end of the file, which stays as long as it is. What is appended later
    finds its place even if the disk is full by then. Does nothing where the file system does not offer it."""
    end = os.fstat(descriptor).st_size
    while _fallocate and _fallocate(descriptor, _KEEP_SIZE, end, size):
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


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that its name stands for the old content or for all of the new, whatever happens meanwhile.

    OutputError: E_OUTPUT_WRITE, E_NO_SPACE.
    """
    with writing(path):
        descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(partial, 0o666 & ~_UMASK)  # mkstemp makes files that only their owner can read
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise


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


def take_lock(path: Path) -> int | None:
    """Descriptor of the file ``path``, made if needed and locked; None if another process or thread holds it.

    The kernel drops the lock when all processes that inherited the descriptor have ended, however they end, so no
    stale lock can remain, and a number of a process that is in use again cannot be mistaken for its holder.
    """
    for _ in range(100):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have removed this very file after we opened it: then we hold
            # a lock that nobody else can see, and have to start over.
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
    return None


def is_locked(path: Path) -> bool:
    """Does anybody hold the lock of the file ``path``?"""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def sign_lock(descriptor: int, process: int) -> None:
    """Write into a locked file which process holds it."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{process}\n".encode(), 0)


def holder_of(path: Path) -> int | None:
    """The process that signed the lock file; None if nobody did."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            return int(file.read(32))
    return None


def lock_folder(folder: Path) -> int:
    """Create ``folder`` if needed and hold it: the descriptor of its locked file ``lock``.

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
                descriptor = take_lock(path)
            except FileNotFoundError:  # its holder just finished and removed the folder
                continue
            if descriptor is not None:
                sign_lock(descriptor, os.getpid())
                return descriptor
        holder = holder_of(path)
        raise OutputError(
            "E_BUSY",
            f"Another merge is writing to this name right now ({folder}).",
            f"It is the process {holder}." if holder else "",
            "Wait for it or choose another output name.",
        )
    raise OutputError("E_BUSY", f"The folder {folder} keeps being removed by another process.")


def unlock_folder(descriptor: int) -> None:
    """Give back what ``lock_folder`` gave, also if a child process inherited the descriptor."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
