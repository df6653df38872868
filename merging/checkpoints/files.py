"""Opening files that a stranger prepared.

A model folder comes from the internet, so a "file" in it may be a pipe that never answers, a device without
end, or a link to somebody's secrets. ``open_plain`` gives a descriptor of a regular file inside the folder or
raises; it never follows a link, with one exception: the Hugging Face cache *is* made of links
(``models--org--name/snapshots/<commit>/x`` -> ``../../blobs/<hash>``, and since huggingface_hub 2 from there
to the cache-wide ``blobs/<two digits>/<hash>``). Such a link is followed if it stays inside its own cache.

Bytes are fetched with positioned reads. A memory map would be shorter, but when the file shrinks the process
dies with SIGBUS, and no exception can be raised.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from merging.errors import InputError

FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
LARGEST_READ = 1 << 30  # Linux reads at most 2 GiB - 4 KiB at a time, macOS refuses more than 2 GiB

_SHARED_BLOB = re.compile(r"blobs/[0-9a-f]{2}/[0-9a-f]{64}")


def open_plain(path: str | Path) -> int:
    """Descriptor (read-only, close-on-exec) of the regular file ``path``.

    Raises InputError: E_NOT_FOUND, E_PATH (link out of the folder, pipe, device, folder), E_READ
    (permissions).
    """
    try:
        target = resolve_link(os.fspath(path))
        if not stat.S_ISREG(
            os.lstat(target).st_mode
        ):  # looked at before opening: opening a device has effects
            raise _not_plain(path)
        descriptor = os.open(target, FLAGS)
    except (OSError, ValueError) as error:
        raise open_error(path, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_plain(path)
    return descriptor


def resolve_link(path: str) -> str:
    """``path`` itself, or the blob that it stands for in a Hugging Face cache. E_PATH for any other link."""
    for _ in range(2):  # snapshot -> blob of the repository -> blob of the whole cache
        if not stat.S_ISLNK(os.lstat(path).st_mode):
            break
        path = _cache_target(path)
    return path


def _cache_target(link: str) -> str:
    folder = os.path.realpath(os.path.dirname(link))
    target = os.path.normpath(os.path.join(folder, os.readlink(link)))
    parts = folder.split(os.sep)
    repositories = [number for number, part in enumerate(parts) if part.startswith("models--")]
    if repositories:
        repository = os.sep.join(parts[: repositories[-1] + 1])
        inside = parts[repositories[-1] + 1 :]
        cache = os.path.dirname(repository)
        blobs = os.path.join(repository, "blobs")
        if inside[:1] == ["snapshots"] and os.path.dirname(target) == blobs == os.path.realpath(blobs):
            return target
        relative = os.path.relpath(target, cache).replace(os.sep, "/")
        real = os.path.realpath(os.path.dirname(target)) == os.path.dirname(target)
        if inside == ["blobs"] and _SHARED_BLOB.fullmatch(relative) and real:
            return target
    raise InputError(
        "E_PATH",
        f"{shown(link)} is a link to {shown(os.readlink(link))}.",
        "A downloaded folder could point anywhere, so links are followed only inside a Hugging Face cache.",
        "Replace the link by the file, or give the path that it points to.",
    )


def shown(path: str | Path) -> str:
    """``path`` for a message: no control characters, no changes of direction, no longer than a line."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))
    return text if len(text) <= 300 else f"{text[:200]}...{text[-80:]}"


def read_at(descriptor: int, offset: int, out: memoryview, where: str) -> None:
    """Fill ``out`` with the bytes of the file from ``offset`` on. Safe to call from several threads.

    Raises InputError: E_INPUT_CHANGED if the file ends too early (its size was checked when it was opened),
    E_READ if the system reports an error.
    """
    done = 0
    while done < len(out):
        try:
            count = _read_into(descriptor, out[done : done + LARGEST_READ], offset + done)
        except OSError as error:
            raise InputError(
                "E_READ",
                f"{where} cannot be read at byte {offset + done:,}.",
                error.strerror or "",
                "Check the disk.",
            ) from None
        if count == 0:
            raise InputError(
                "E_INPUT_CHANGED",
                f"{where} ends at byte {offset + done:,}, but was longer when it was opened.",
                "Something shortened the file while it was being read.",
                "Restore the file and run again.",
            )
        done += count


if hasattr(os, "preadv"):

    def _read_into(descriptor: int, out: memoryview, offset: int) -> int:
        return os.preadv(descriptor, [out], offset)

else:

    def _read_into(descriptor: int, out: memoryview, offset: int) -> int:
        data = os.pread(descriptor, len(out), offset)
        out[: len(data)] = data
        return len(data)


def read_whole(path: str | Path, limit: int, code: str = "E_READ") -> bytes:
    """All bytes of a small side file; more than ``limit`` bytes is an error with ``code``."""
    descriptor = open_plain(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise InputError(
                code,
                f"{shown(path)} has {size:,} bytes.",
                f"At most {limit:,} are read from a file of this kind.",
                "Check that this is the right file.",
            )
        data = bytearray(size)
        read_at(descriptor, 0, memoryview(data), shown(path))
        return bytes(data)
    finally:
        os.close(descriptor)


def _not_plain(path: str | Path) -> InputError:
    return InputError(
        "E_PATH",
        f"{shown(path)} is not a plain file.",
        "It is a folder, a pipe, a device or a socket.",
        "Replace it.",
    )


_PICKLE = ("a Python pickle", "Pickles can run code and are never opened. Use the safetensors version.")
_KINDS: tuple[tuple[bytes, tuple[str, str]], ...] = (
    (
        b"version https://git-lfs",
        ("a Git-LFS pointer, not the weights", "Fetch the real file: git lfs pull."),
    ),
    (b"PK\x03\x04", ("a zip archive (a PyTorch .bin file, perhaps)", "Use the safetensors version.")),
    (b"PK\x05\x06", ("an empty zip archive", "Download the file again.")),
    *((bytes([0x80, protocol]), _PICKLE) for protocol in (2, 3, 4, 5)),
    (b"GGUF", ("a GGUF file", "Merge the original safetensors checkpoint and convert the result.")),
    (b"\x89HDF", ("an HDF5 file", "Use the safetensors version of this model.")),
    (b"\x1f\x8b", ("a gzip archive", "Unpack it first.")),
)
_HTML = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype|html|head|body)", re.IGNORECASE | re.DOTALL)


def recognise(first: bytes) -> tuple[str, str] | None:
    """(what it is, what to do) for the first bytes of a file that is not safetensors; None if unknown."""
    if _HTML.match(first):
        return "an HTML page: a download was answered with a web page", "Download it again."
    return next((known for magic, known in _KINDS if first.startswith(magic)), None)


def open_error(path: str | Path, error: OSError | ValueError) -> InputError:
    """What to tell the user when the system refuses to open ``path``."""
    number = error.errno if isinstance(error, OSError) else None
    why = f"{error.strerror if isinstance(error, OSError) else error}."
    if number in (errno.ENOENT, errno.ENOTDIR):
        return InputError("E_NOT_FOUND", f"{shown(path)} does not exist.", "", "Check the path.")
    if number in (errno.ELOOP, errno.ENAMETOOLONG, None):
        return InputError("E_PATH", f"{shown(path)} cannot be opened.", why, "Check the path.")
    return InputError(
        "E_READ", f"{shown(path)} cannot be opened.", why, "Check the permissions and the disk."
    )
