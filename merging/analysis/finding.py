"""One thing worth knowing about a set of models: how serious, how it shows, and what to do about it in this tool."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

SEVERITIES = ("problem", "warning", "note", "ok")
"""Worst first. A problem makes a merge fail or useless, a warning makes it worse, a note is good to know."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding speaks of evidence, never of a verdict: nobody can tell from weights alone how good a merge will be."""

    code: str
    """Stable, for programs."""
    severity: str
    """One of SEVERITIES."""
    title: str
    """What was found, in one plain sentence."""
    evidence: str
    """The numbers behind it, with their units."""
    number: float | None
    """The one number that decided; None if none did."""
    remedy: str
    """What to do here: a recipe field or a command. Empty if there is nothing to do."""
    basis: str = "headers"
    """Where the number comes from: "headers", "files", "exact", "sampled" or "estimated"."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Worst first, otherwise in the order in which they were found."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def some(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
