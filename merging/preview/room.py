"""Does a merge fit into memory? Decided from headers, before anything is loaded.

The one idea: what is free is what the system could hand out without swapping, and in a container not more than its
limit leaves; what is needed is known from shapes and types alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..alignment import COPIED_AS_THEY_ARE
from ..checkpoints.checkpoint import Source
from ..checkpoints.header import ITEM_BITS
from ..plan import Plan

LIBRARIES = 200_000_000
"""Anonymous memory of a process that has imported transformers, beyond torch, in bytes (measured)."""
SPARE = 1.1
"""So many times as much as counted must be free: batches, caches, what the system does meanwhile."""
FLOAT = 4
"""Bytes of a network's weight: networks compute in float32."""

_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class Cost:
    """What a preview takes. ``possible``: may it be started? ``why``: in words, whichever way.

    ``keep_inputs``: the models' tensors stay in memory; otherwise they are read from their files at each change, which
    is slower and needs less.
    """

    bytes_needed: int
    bytes_free: int
    possible: bool
    why: str
    keep_inputs: bool


def cost_of(plan: Plan, threads: int, device: str = "cpu", held: int = 0, free: int | None = None) -> Cost:
    """What previewing ``plan`` takes: its input tensors as they are stored, the merged tensors, the network in float32
    (on the CPU), and what the merge itself needs. ``held``: bytes that a running preview would give back."""
    inputs = {(s.name, id(s)): s for t in plan.tensors for s in t.inputs()}
    kept = sum(_bytes(s) for s in inputs.values())
    merged = sum(t.nbytes for t in plan.tensors)
    network = sum(t.numel * (0 if t.dtype in COPIED_AS_THEY_ARE else FLOAT) for t in plan.tensors)
    largest = max((t.numel * FLOAT for t in plan.tensors), default=0)  # one tensor more while loading
    rest = int(SPARE * (merged + (network if device == "cpu" else 0) + largest)) + plan.memory(threads) + LIBRARIES
    free = (free_memory() if free is None else free) + held
    for keep, needed in ((True, rest + int(SPARE * kept)), (False, rest)):
        if needed <= free:
            slow = "" if keep else " The models do not fit beside it, so they are read from disk at every change."
            return Cost(needed, free, True, f"It needs {_size(needed)} of memory; {_size(free)} are free.{slow}", keep)
    return Cost(rest, free, False, f"It needs {_size(rest)} of memory, and only {_size(free)} are free.", False)


def _bytes(source: Source) -> int:
    return source.numel * ITEM_BITS[source.dtype] // 8


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


# -- the machine --------------------------------------------------------------------------------------------------


def free_memory() -> int:
    """Bytes that can be had without swapping: of the machine, and of each control group this process is in."""
    return max(0, min([_machine(), *_limits(_CGROUPS, Path("/proc/self/cgroup"))]))


def private_memory(pid: int) -> int:
    """Bytes that ending a process would free for sure (its anonymous memory); 0 where nobody knows."""
    return _fields(Path(f"/proc/{pid}/status")).get("RssAnon", 0)


def _machine() -> int:
    known = _fields(Path("/proc/meminfo")).get("MemAvailable")
    if known is not None:
        return known
    if sys.platform == "win32":  # no such service in Python: do not stand in the way
        return _UNLIMITED
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # no more is known than the whole


def _fields(path: Path) -> dict[str, int]:
    """``Name:  123 kB`` lines, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    parts = (line.split() for line in lines)
    return {p[0].rstrip(":"): int(p[1]) * 1024 for p in parts if len(p) == 3 and p[1].isdigit() and p[2] == "kB"}


def _limits(root: Path, membership: Path) -> Iterable[int]:
    """Room below the memory limit of each control group (version 2, or the memory controller of version 1) that this
    process is in, from its own up to the root. A container often sees its own group as the root."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, most, used = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, most, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        place = top / path.lstrip("/")
        for folder in {top, *(p for p in (place, *place.parents) if p.is_relative_to(top))}:
            limit, current = _number(folder / most), _number(folder / used)
            if limit is not None and current is not None and limit < _UNLIMITED:
                # Pages of files count as used, but are given up when somebody needs the room.
                yield limit - current + _cached(_statistics(folder / "memory.stat"))


def _cached(statistics: Mapping[str, int]) -> int:
    return statistics.get("inactive_file", 0) + statistics.get("active_file", 0)


def _statistics(path: Path) -> dict[str, int]:
    try:
        pairs = (line.split() for line in path.read_text().splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    except (OSError, ValueError):
        return {}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max", or no such file
        return None
