"""The pre-flight doctor: what could go wrong with merging these models, from headers and a short look at the weights.

It answers the questions that decide about a merge before any method does: do the models belong together, is the base
the one that they were trained from, is one expert much louder than the others, is there anything to merge at all, and
will it survive the output's number type? Each answer is a ``Finding`` with its evidence and a remedy in this tool.

There is deliberately no score. A study of predicting mergeability from weights finds that what matters differs from
method to method (arXiv 2601.22285), and whether a base is at chance on a task cannot be seen in its weights at all:
evaluate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints.hub import resolve
from .doctor_files import examine_files
from .doctor_weights import examine_weights
from .finding import SEVERITIES, Finding, by_severity
from .models import Models
from .sampling import Sample, take_sample

if TYPE_CHECKING:
    from .changes import Changes
    from .spectra import Spectrum

__all__ = ["SEVERITIES", "Finding", "examine", "look"]


def examine(
    models: Models,
    *,
    bases: Sequence[str] = (),
    changes: Changes | None = None,
    spectra: Sequence[Spectrum] | None = None,
    sample: Sample | None = None,
    offline: bool = False,
) -> list[Finding]:
    """All findings, worst first. Quick (headers, side files and a sample of the weights) unless ``changes`` and
    ``spectra`` supply numbers of all weights.

    ``bases``: references of other models that the experts may really come from. ``sample``: what ``look`` gave before.
    Raises what ``resolve`` and ``open_checkpoint`` raise for ``bases``; InputError E_READ, E_PATH, E_INPUT_CHANGED.
    """
    if sample is None:
        sample = look(models, bases, offline=offline)
    return by_severity([*examine_files(models), *examine_weights(models, sample, changes, spectra)])


def look(models: Models, bases: Sequence[str] = (), *, offline: bool = False) -> Sample:
    """A sample of the weights, and of the distance to other ``bases``, which are opened and closed again."""
    others: dict[str, Checkpoint] = {}
    try:
        for reference in dict.fromkeys(bases):
            found = resolve(reference, offline=offline)
            others[reference] = open_checkpoint(found.path, reference)
        return take_sample(models, others)
    finally:
        for other in others.values():
            other.close()
