"""What the doctor found, in plain sentences, each with the place in the map that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merging.analysis.finding import Finding
from merging.analysis.inspection import Inspection

from ..chart import pairs_of
from ..components.cards import text
from .analyse_cells import extreme, map_of, metric, tensors_at

MOST = 5
"""Findings in sight; the others are folded away."""
SIGNS = {"problem": "✗", "warning": "!", "note": "i", "ok": "✓"}
WORDS = {"problem": "Problem", "warning": "Warning", "note": "Note", "ok": "Fine"}
LOWEST = ("survival", "rank", "merged", "no_change")
"""Findings that speak of the smallest value."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the map a finding can be seen."""

    metric: str
    whose: str
    tensor: str


def has_place(result: Inspection, finding: Finding) -> bool:
    one = metric(_METRICS.get(finding.code, ""))
    return one is not None and bool(getattr(result, one.part)) and (one.whose != "pair" or len(result.names) > 1)


def place_of(result: Inspection, finding: Finding) -> Place | None:
    one = metric(_METRICS.get(finding.code, ""))
    if one is None or not has_place(result, finding):
        return None
    whose = _whose(result, finding.code)
    cell = extreme(map_of(result, one), whose, finding.code in LOWEST)
    tensors = tensors_at(result, *cell) if cell else []
    return Place(one.key, whose, tensors[0]) if tensors else None


_METRICS = {
    "base": "relative", "no_change": "relative", "direction": "cosine", "untouched": "unchanged", "norms": "norm",
    "rank": "k90", "survival": "survival", "conflict": "conflict", "merged": "kept",
}  # fmt: skip


def _whose(result: Inspection, code: str) -> str:
    """The expert or pair that a finding is about."""
    changes = result.changes
    if changes is None:
        return result.names[0]
    whole = changes.total()
    if code in ("conflict", "direction"):
        values = whole.conflict_weighted if code == "conflict" else [changes.cosine()[a, b] for a, b in changes.pairs]
        return pairs_of(result.names)[int(np.argmax(values))]
    if code == "survival":
        return result.names[int(np.argmin(whole.survival))]
    if code == "untouched":
        return result.names[int(np.argmax(whole.unchanged))]
    if code == "no_change":
        return result.names[int(np.argmin(whole.norm))]
    if code == "merged" and whole.merged is not None:
        return result.names[int(np.argmin(whole.merged.projection))]
    if code == "rank" and result.spectra:
        sums = [sum(s.measures().k99 / min(s.shape) for s in result.spectra if s.of == name) for name in result.names]
        return result.names[int(np.argmin(sums))]
    return result.names[int(np.argmax(whole.norm))]


def findings_html(findings: Sequence[Finding], shown: Sequence[bool]) -> str:
    """The list; ``shown``: for which of them there is a place in the map."""
    if not findings:
        return ""
    each = list(enumerate(findings))
    worth = [(i, f) for i, f in each if f.severity != "ok"]
    fine = [(i, f) for i, f in each if f.severity == "ok"]
    parts = [_finding(i, f, shown[i]) for i, f in worth[:MOST]] or ["<p>Nothing stands out.</p>"]
    if worth[MOST:]:
        more = "".join(_finding(i, f, shown[i]) for i, f in worth[MOST:])
        parts.append(f"<details><summary>{len(worth) - MOST} more</summary>{more}</details>")
    if fine:
        checks = "".join(_finding(i, f, shown[i]) for i, f in fine)
        parts.append(f"<details><summary>{len(fine)} checks found nothing wrong</summary>{checks}</details>")
    return f'<section class="findings" aria-label="Findings"><h3>Findings</h3>{"".join(parts)}</section>'


def _finding(number: int, one: Finding, has_place: bool) -> str:
    button = f'<button type="button" data-pick="{number}">Show in the map</button>' if has_place else ""
    remedy = f'<p class="remedy">{_code(one.remedy)}</p>' if one.remedy else ""
    return (
        f'<article class="finding {one.severity}"><p class="severity"><span aria-hidden="true">{SIGNS[one.severity]}'
        f"</span> {WORDS[one.severity]}</p><div><p><b>{text(one.title)}</b> {button}</p>"
        f'<p>{_code(one.evidence)} <span class="badge">{text(one.basis)}</span></p>{remedy}</div></article>'
    )


def _code(words: str) -> str:
    """Escaped; what stands between backticks as code."""
    parts = text(words).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
