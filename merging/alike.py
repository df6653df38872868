"""Are two checkpoints the same weights? Told from their headers and a few samples of their bytes, in no time."""

from __future__ import annotations

from .checkpoints.checkpoint import Checkpoint

PIECES, PIECE = 32, 4096
"""So many samples of each file, of so many bytes."""


def alike(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether nothing tells them apart. Raises InputError E_READ, E_INPUT_CHANGED."""
    if not one.files or [f.header.digest for f in one.files] != [f.header.digest for f in other.files]:
        return False
    for mine, theirs in zip(one.files, other.files, strict=True):
        size = min(mine.identity()["size"], theirs.identity()["size"])
        for at in range(0, size, max(1, size // PIECES)):
            pieces = [memoryview(bytearray(min(PIECE, size - at))) for _ in range(2)]
            mine.read(at, pieces[0])
            theirs.read(at, pieces[1])
            if pieces[0] != pieces[1]:
                return False
    return True
