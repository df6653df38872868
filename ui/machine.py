"""What this machine has left: memory, accelerator, disk. Asked without torch, which takes seconds to import."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    device: str
    """Name of the accelerator, or of the kind of processor."""
    cores: int
    memory_free: int | None
    memory_total: int | None
    video_free: int | None
    video_total: int | None
    disk_free: int | None


def machine(folder: Path) -> Machine:
    """Facts as they are now. ``folder``: on the disk in question."""
    from merging.cores import available_cores

    free, total = memory()
    card = _graphics(int(time.monotonic() // 10))
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        disk = shutil.disk_usage(folder).free
    except OSError:
        disk = None
    name = card[0] if card else "Apple GPU" if _is_apple() else "CPU"
    return Machine(name, available_cores(), free, total, card and card[1], card and card[2], disk)


def memory() -> tuple[int | None, int | None]:
    """Bytes that could be taken now, and in all; within the container's limit if there is one."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free, total = (int(lines[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):
        try:
            page = os.sysconf("SC_PAGE_SIZE")
            total = page * os.sysconf("SC_PHYS_PAGES")
            return (page * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else None), total
        except (ValueError, OSError, AttributeError):
            return None, None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return min(free, max(0, limit - used)), min(total, limit)
    except (OSError, ValueError):
        return free, total


@lru_cache(maxsize=1)
def _graphics(_ten_seconds: int) -> tuple[str, int, int] | None:
    """The first NVIDIA card: name, free and total bytes."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        first = subprocess.run(query, capture_output=True, text=True, timeout=3).stdout.splitlines()[0]
        name, free, total = (part.strip() for part in first.rsplit(",", 2))
        return name, int(free) << 20, int(total) << 20
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None


def _is_apple() -> bool:
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def devices() -> list[tuple[str, str]]:
    """What can be chosen to compute on: (words, value), as ``merging.engine`` takes it."""
    found = [("Choose for me", "auto"), ("CPU", "cpu")]
    card = _graphics(int(time.monotonic() // 10))
    if card:
        found.append((card[0], "cuda"))
    return [*found, ("Apple GPU", "mps")] if _is_apple() else found
