"""What can be told about experts with the help of their texts: sensitivities, whitened spectra, hidden states.

One expert after the other is loaded, measured on its own texts and let go, so memory holds one network. Texts of all
experts are read before the first network is loaded: a mistake in a file is found in seconds, not after an hour. If one
model cannot be measured, the others are, and the reason stands in ``TextFindings.problems``.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.samples import LENGTH, Sample, Samples, tokenize
from ..calibration.texts import Chosen, choose, find_texts
from ..errors import AmalgamError, Cancelled, InputError, RecipeError
from ..methods import Workspace
from ..networks import IMAGE, Network, load_network
from .matrices import Method
from .models import BASE, Models, open_models, task_vector
from .representations import Representation, measure_representation
from .sensitivity import ENTROPY, NEXT_TOKEN, Progress, Sensitivity, check_loss, measure_sensitivity
from .spectra import check_method
from .whitened import MEMORY, Whitened, measure_whitened

if TYPE_CHECKING:
    from torch import Tensor

SENSITIVITY, WHITENED = "sensitivity", "whitened"
WHAT = (SENSITIVITY, ENTROPY, WHITENED)
"""The published Sens score (loss of the next token), its label-free variant, and the whitened spectra."""
REPRESENTATIONS = "representations"
"""The ranks of the hidden states of all models, only on request: a diagnostic of collapse."""
SAMPLES = 32
"""Texts per expert. Sens-Merging takes 100; each further one costs as much as the first."""


@dataclass(slots=True)
class ExpertFindings:
    """One expert. ``texts``: the account of its sample; ``left_out``: what was asked for but does not exist for a model
    of this kind -> why."""

    expert: str
    texts: dict[str, Any]
    sensitivity: Sensitivity | None = None
    entropy: Sensitivity | None = None
    whitened: Whitened | None = None
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class TextFindings:
    """``problems``: model -> the error that kept it from being measured (wholly). ``representations``: of the base, the
    experts and the merged model, on the same tokens, if asked for."""

    experts: list[ExpertFindings]
    problems: dict[str, AmalgamError]
    representations: list[Representation] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON values::

            {"experts": [{"expert", "texts": Samples.as_dict(), "left_out": {what: why},
                          "sensitivity": Sensitivity.as_dict() or None, "entropy": the same,
                          "whitened": {"passes", "skipped": [[tensor, why]], "tensors": [
                              {Spectrum.as_dict(), "block", "kind", "tokens", "enough"}]} or None}],
             "representations": [Representation.as_dict()],
             "problems": [{"expert" (or base, merged), "code", "what", "why", "fix"}]}

        Singular values themselves are not in it; they are in ``ExpertFindings.whitened.spectra[i].spectrum.values``.
        """
        return {
            "experts": [_expert_as_dict(one) for one in self.experts],
            "representations": [one.as_dict() for one in self.representations],
            "problems": [
                {"expert": model, "code": error.code, "what": error.what, "why": error.why, "fix": error.fix}
                for model, error in self.problems.items()
            ],
        }


def _expert_as_dict(one: ExpertFindings) -> dict[str, Any]:
    whitened = None
    if one.whitened is not None:
        whitened = {
            "passes": one.whitened.passes,
            "skipped": [list(pair) for pair in one.whitened.skipped],
            "tensors": [
                {
                    **found.spectrum.as_dict(),
                    "block": found.block,
                    "kind": found.kind,
                    "tokens": found.tokens,
                    "enough": found.enough,
                }
                for found in one.whitened.spectra
            ],
        }
    return {
        "expert": one.expert,
        "texts": one.texts,
        "left_out": one.left_out,
        "sensitivity": one.sensitivity.as_dict() if one.sensitivity else None,
        "entropy": one.entropy.as_dict() if one.entropy else None,
        "whitened": whitened,
    }


def measure_with_text(
    base: str,
    experts: Sequence[str],
    texts: str | Path | Sequence[str | Path],
    merged: str | None = None,
    *,
    offline: bool = False,
    **options: Any,
) -> TextFindings:
    """Open the models and measure each expert on its texts; options and errors as ``measure_models``."""
    with open_models(base, experts, merged, offline=offline) as models:
        return measure_models(models, texts, **options)


def measure_models(
    models: Models,
    texts: str | Path | Sequence[str | Path],
    *,
    what: Sequence[str] = WHAT,
    samples: int = SAMPLES,
    seed: int = 0,
    length: int = LENGTH,
    method: Method = "gram",
    memory: int = MEMORY,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> TextFindings:
    """Sensitivities and whitened spectra of each expert on its own texts. No child processes.

    Args:
        texts: one file for all experts, one per expert in their order, or a folder with a file ``<expert>.jsonl`` or
            ``<expert>.txt`` for each; see ``calibration.texts``.
        what: some of ``WHAT``, and ``REPRESENTATIONS``.
        samples: texts drawn per expert, by ``seed``.
        length: tokens per text at most; the model's context is a limit as well.
        method, memory: of the whitened spectra, see there.
        progress: called with (steps done, steps in all, "model: what") for each model and measurement.

    Raises:
        RecipeError: ``E_RECIPE_FIELD`` for unknown words in ``what`` or ``method``.
        InputError: ``E_TEXT`` for text files that cannot be used, before anything is loaded.
        AmalgamError: the first error, if nothing could be measured.
        Cancelled: soon after ``stop`` was set.
    """
    known = (*WHAT, REPRESENTATIONS)
    if not what or not set(what) <= set(known):
        wrong = ", ".join(name for name in what if name not in known) or "nothing"
        fix = f"Choose of {', '.join(known)}."
        raise RecipeError("E_RECIPE_FIELD", f"With texts, {wrong} cannot be measured.", "", fix)
    check_method(method)
    chosen = draw(models.names, texts, samples, seed)
    options = _Options(what, length, method, memory, device, threads, progress, stop)
    findings = TextFindings([], {})
    if set(what) & set(WHAT):
        for k, name in enumerate(models.names):
            found = ExpertFindings(name, {})
            try:
                _measure_expert(models, k, chosen[k], options, found)
            except Cancelled:
                raise
            except AmalgamError as error:
                findings.problems[name] = error
            if name not in findings.problems or found.sensitivity or found.entropy:
                findings.experts.append(found)
    if REPRESENTATIONS in what:
        _measure_representations(models, chosen, options, findings)
    if findings.problems and not findings.experts and not findings.representations:
        raise next(iter(findings.problems.values()))
    return findings


def draw(names: Sequence[str], texts: str | Path | Sequence[str | Path], samples: int, seed: int = 0) -> list[Chosen]:
    """The texts of each expert. Their ``key`` changes when the texts do: together with the models and the options they
    identify a result. Raises InputError ``E_TEXT``."""
    drawn: dict[tuple[Path, ...], Chosen] = {}
    files = [tuple(paths) for paths in find_texts(texts, names)]
    for paths in files:
        if paths not in drawn:
            drawn[paths] = choose(paths, samples, seed)
    return [drawn[paths] for paths in files]


@dataclass(frozen=True, slots=True)
class _Options:
    """Those of ``measure_models`` that a measurement needs."""

    what: Sequence[str]
    length: int
    method: Method
    memory: int
    device: str
    threads: int
    progress: Progress | None
    stop: threading.Event | None

    def common(self, model: str) -> dict[str, Any]:
        """What every measurement takes, with a progress that names the model."""

        def told(done: int, total: int, doing: str) -> None:
            if self.progress:
                self.progress(done, total, f"{model}: {doing}")

        return {"threads": self.threads, "progress": told, "stop": self.stop}


def _measure_expert(models: Models, k: int, chosen: Chosen, options: _Options, found: ExpertFindings) -> None:
    """Fill ``found``, one measurement after the other: what is done stays, whatever the next one meets."""
    network = _load(models, found.expert, options)
    losses, found.left_out = _possible(network, options.what)
    samples = as_samples(network, chosen, options.length)
    found.texts = samples.as_dict()
    common = options.common(found.expert)
    if losses:
        scores = measure_sensitivity(network, samples.samples, losses, **common)
        found.sensitivity, found.entropy = scores.get(NEXT_TOKEN), scores.get(ENTROPY)
    if WHITENED in options.what:
        tensors = {tensor.name: tensor for tensor in models.tensors}
        workspace = Workspace()

        def tau(tensor: str) -> Tensor | None:
            return task_vector(tensors[tensor], k, workspace) if tensor in tensors else None

        found.whitened = measure_whitened(
            network, samples.samples, tau, of=found.expert, method=options.method, memory=options.memory, **common
        )


def _measure_representations(
    models: Models, chosen: Sequence[Chosen], options: _Options, findings: TextFindings
) -> None:
    """All models on the texts of all experts, as the tokens of the base."""
    samples: dict[str, Sample] = {}
    for who in models.checkpoints:
        try:
            network = _load(models, who, options)
            if not samples:
                for one in {one.key: one for one in chosen}.values():
                    samples |= {sample.text.hash: sample for sample in as_samples(network, one, options.length)}
            largest = max(max(sample.tokens) for sample in samples.values())
            if largest >= network.vocabulary:
                what = f"{network.path} knows {network.vocabulary} tokens, the texts need number {largest}."
                why = "All models are shown the same tokens, those of the base."
                raise InputError("E_VOCABULARY", what, why, "Leave this model out.")
            findings.representations.append(
                measure_representation(
                    network, list(samples.values()), of=who, memory=options.memory, **options.common(who)
                )
            )
        except Cancelled:
            raise
        except AmalgamError as error:
            findings.problems.setdefault(who, error)
            if not samples:
                return  # without the base's tokens there is nothing to compare


def _load(models: Models, who: str, options: _Options) -> Network:
    fallback = [models.checkpoints[BASE].path]
    return load_network(models.checkpoints[who], device=options.device, tokenizer_from=fallback)


def _possible(network: Network, what: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The losses that this network has, and what is left out with the reason. Raises if nothing is left."""
    losses, left_out, last = [], {}, None
    for name, loss in ((SENSITIVITY, NEXT_TOKEN), (ENTROPY, ENTROPY)):
        if name not in what:
            continue
        try:
            check_loss(network.kind, loss)
            losses.append(loss)
        except InputError as error:
            left_out[name] = f"{error.what} {error.why}"
            last = error
    if last is not None and not losses and WHITENED not in what:
        raise last
    return losses, left_out


def as_samples(network: Network, chosen: Chosen, length: int = LENGTH) -> Samples:
    """The texts as this network takes them. Raises InputError ``E_TEXT`` for a model of images, ``E_NOT_A_MODEL``
    without a tokenizer, and as ``tokenize``."""
    if network.kind == IMAGE or not network.vocabulary:
        fix = "Measure it on images from Python."
        raise InputError("E_TEXT", f"{network.path} takes no text.", "It is a model of images.", fix)
    if network.tokenizer is None:
        fix = "Copy the tokenizer's files into the model's folder."
        raise InputError("E_NOT_A_MODEL", f"{network.path} has no tokenizer.", "Texts must become tokens.", fix)
    limit = min(length, network.context or length)
    return tokenize(chosen, network.tokenizer, network.vocabulary, limit, least=2 if network.kind == "causal" else 1)
