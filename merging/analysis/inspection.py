"""The result of an inspection: everything that is known about a set of models, and its JSON.

``inspection_run.inspect`` fills it, part by part. Every part says how its numbers were made: ``exact`` (all weights, up
to rounding), ``sampled`` (some of the weights) or ``estimated`` (from less than would settle it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .changes import Changes
from .finding import Finding
from .importance import expert_merging_table, importance_table
from .principal import Principal
from .sampling import Sample
from .spectra import Spectrum
from .subspaces import Subspaces
from .trimmed import Trimmed

FORMAT = 1
SHOWN_VALUES = 64
"""Singular values of each matrix that go into the JSON."""


@dataclass(frozen=True, slots=True)
class PartFacts:
    """How the numbers of one part were made."""

    basis: str
    """exact, sampled or estimated"""
    how: str
    seconds: float
    """That it took when it was computed."""
    cached: bool
    """Found in the cache, computed by an earlier inspection."""


@dataclass
class Inspection:
    """What is known about a set of models. Parts that were not asked for are None."""

    names: list[str]
    """The experts."""
    reference: dict[str, Any]
    options: dict[str, Any]
    made: str
    versions: dict[str, str]
    models: dict[str, dict[str, Any]]
    parameters: int
    places: dict[str, tuple[int | None, str]]
    """Compared tensor -> block (None outside of blocks) and kind."""
    skipped: list[tuple[str, str]]
    notes: list[str]
    parts: dict[str, PartFacts] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    sample: Sample | None = None
    changes: Changes | None = None
    trimmed: Trimmed | None = None
    spectra: list[Spectrum] | None = None
    subspaces: Subspaces | None = None
    principal: Principal | None = None
    texts: dict[str, Any] | None = None

    @property
    def coefficients(self) -> list[float]:
        """α_k of the importance I_l: those that were given, else 1 for all (I_l does not depend on a common factor)."""
        return self.options["coefficients"] or [1.0] * len(self.names)

    def as_dict(self) -> dict[str, Any]:
        """The JSON of ``--json``, format 1; null stands for what is undefined::

            {"format", "versions", "made", "options", "reference": {"base", "experts", "merged"}, "names",
             "models": {"base" | name | "merged": {"reference", "kind", "tensors", "bytes", "fingerprint"}},
             "parameters", "tensors", "skipped": [[tensor, why]], "notes": [text],
             "parts": {part: {"basis": "exact" | "sampled" | "estimated", "how", "seconds", "cached"}},
             "findings": [{"code", "severity", "title", "evidence", "number", "remedy", "basis"}],
             "doctor": Sample, "changes": Changes.as_dict(), "cosine": [[…]] of the whole models,
             "importance": {measure: Table.as_dict()}, "trimmed": Trimmed.as_dict(),
             "spectra": [Spectrum.as_dict() and "values": the first 64], "subspaces": Subspaces.as_dict(),
             "principal": Principal.as_dict(), "texts": TextFindings.as_dict()}

        ``parts[...].basis`` holds for all numbers of a part; what within an exact part is sampled or estimated all the
        same is named there (``changes.sampled``, ``spectra[].estimated_tail``). Parts that were not asked for are null.
        A fingerprint covers samples of a model's bytes, not all.
        """
        tables = {}
        if self.changes is not None:
            tables = {measure: importance_table(self.changes, measure) for measure in ("norm", "l1", "relative")}
            tables["expert_merging"] = expert_merging_table(self.changes, self.coefficients)
        return _plain(
            {
                "format": FORMAT,
                "versions": self.versions,
                "made": self.made,
                "options": self.options,
                "reference": self.reference,
                "names": self.names,
                "models": self.models,
                "parameters": self.parameters,
                "tensors": len(self.places),
                "skipped": self.skipped,
                "notes": self.notes,
                "parts": {name: asdict(part) for name, part in self.parts.items()},
                "findings": [finding.as_dict() for finding in self.findings],
                "doctor": asdict(self.sample) if self.sample else None,
                "changes": self.changes.as_dict() if self.changes else None,
                "cosine": self.changes.cosine() if self.changes else None,
                "importance": {measure: table.as_dict() for measure, table in tables.items()} or None,
                "trimmed": self.trimmed.as_dict() if self.trimmed else None,
                "spectra": _listed(self.spectra, lambda s: s.as_dict() | {"values": s.values[:SHOWN_VALUES]}),
                "subspaces": self.subspaces.as_dict() if self.subspaces else None,
                "principal": self.principal.as_dict() if self.principal else None,
                "texts": self.texts,
            }
        )


def _listed(values: Sequence[Any] | None, form: Callable[[Any], Any]) -> list[Any] | None:
    return None if values is None else [form(value) for value in values]


def _plain(value: Any) -> Any:
    """JSON values: NaN and infinity become null, tuples and arrays lists."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
