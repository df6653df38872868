"""What every page of the workbench knows about the place it runs in."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merging.jobs import Jobs

from .draft import Draft
from .executors import Executor

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class App:
    """One running workbench."""

    data: Path
    """Folder of what the user keeps: runs, settings, results of analyses that were asked to stay."""
    jobs: Jobs
    """All jobs, as they are on the disk."""
    executor: Executor
    """Starts and stops them."""
    offline: bool = False
    on_space: bool = False
    """Strangers use this: no local paths, and nobody sees or changes the settings of others."""
    device: str = "auto"
    threads: int = 0
    """0: one per core."""
    root: Path = ROOT
    """The repository."""
    start_recipe: Draft | None = None
    """What --recipe or --demo opens."""
    start_id: str = ""
    """Names this start, so that a reload does not open ``start_recipe`` over later edits."""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def settings_file(self) -> Path:
        return self.data / "settings.json"

    def remember(self, **changes: Any) -> None:
        """Keep settings for the next start. Strangers on a Space may not."""
        if self.on_space:
            return
        self.settings.update(changes)
        self.data.mkdir(parents=True, exist_ok=True)
        new = self.settings_file.with_suffix(".new")
        new.write_text(json.dumps(self.settings, indent=2), "utf-8")
        os.replace(new, self.settings_file)


def read_settings(data: Path) -> dict[str, Any]:
    """What was remembered; nothing if that is gone or spoilt."""
    try:
        found = json.loads((data / "settings.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    kinds = {"device": str, "threads": int, "offline": bool}
    return {k: v for k, v in found.items() if k in kinds and type(v) is kinds[k]} if isinstance(found, dict) else {}
