"""One inspection: all analyses of a set of models, in the order of their cost, with one progress and one result.

The doctor's quick look comes first and takes a second; then the passes over all weights: sizes and angles
(``changes``), signs after trimming (``trimmed``), singular values (``spectra``), shared directions (``subspaces``), the
base's principal weights (``principal``), and, with texts, what only text can tell (``texts``). Each part is kept in the
cache as soon as it is done: an inspection that was interrupted goes on with the part that it was at, and a second look
is instant.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoints.header import ITEM_BITS
from ..cores import available_cores
from ..errors import Cancelled, RecipeError
from ..user_folders import cache_folder
from ..version import VERSION
from .cache import NUMERICS, Cache, fingerprint, key_of
from .changes import Changes, MergedChange, TensorChange, measure_changes
from .doctor import examine, look
from .inspection import Inspection, PartFacts
from .models import Models, open_models
from .principal import Principal, PrincipalTensor, measure_principal
from .sampling import Sample
from .spectra import Spectrum, left_out, measure_spectra
from .subspaces import Overlap, Subspaces, TensorSubspaces, measure_both, measure_subspaces
from .trimmed import DENSITY, Trimmed, TrimmedTensor, measure_trimmed

PARTS = ("doctor", "changes", "trimmed", "spectra", "subspaces", "principal", "texts")
"""In the order in which they run. The importance tables are arithmetic on ``changes`` and no part of their own."""
SPECTRA = ("gram", "exact", "preview", "none")
RANK = 16
SIDE_FILES = (".json", ".txt", ".model", ".jinja")
LEARNING = 1.0
"""Seconds of work before the time left is guessed."""


@dataclass(frozen=True, slots=True)
class Step:
    """Where an inspection is."""

    part: str
    number: int
    of: int
    """Part ``number`` (from 1) of so many."""
    share: float
    """Of the whole work, 0 to 1 (estimated)."""
    seconds_left: float | None
    """Estimated; None until there is something to learn from."""


def inspect(
    base: str,
    experts: Sequence[str],
    merged: str | None = None,
    *,
    bases: Sequence[str] = (),
    parts: Sequence[str] = PARTS,
    density: float = DENSITY,
    spectra: str = "gram",
    rank: int = RANK,
    coefficients: Sequence[float] = (),
    texts: Sequence[str | Path] = (),
    cache: Cache | bool = True,
    compute: bool = True,
    offline: bool = False,
    threads: int = 0,
    progress: Callable[[Step], None] | None = None,
    download: Callable[[int, int, str], None] | None = None,
    finished: Callable[[str, Inspection], None] | None = None,
    stop: threading.Event | None = None,
) -> Inspection:
    """Inspect ``experts`` (and ``merged``) against ``base``.

    ``bases``: other models that may be the true base. ``parts``: some of PARTS. ``density``: of ``trimmed``.
    ``spectra``: gram, exact, preview, or none (no decompositions at all: no subspaces, no principal weights).
    ``rank``: directions that ``subspaces`` compares. ``coefficients``: one per expert, for the importance of Expert
    Merging++. ``texts``: files for the part ``texts``, which is left out without them. ``cache``: True for the usual
    folder, False for none. ``compute``: False leaves out what is not in the cache, and takes no longer than reading it.
    ``finished(part, inspection)`` is called after each part, with what is known so far.

    Raises RecipeError E_RECIPE_FIELD for options that make no sense, Cancelled soon after ``stop`` is set, and what
    ``open_models`` and the parts raise; parts that were finished before are kept in the cache.
    """
    check_options(parts, density, spectra, rank)
    where = Cache(cache_folder("analysis")) if cache is True else cache or Cache(None)
    with open_models(base, experts, merged, offline=offline, progress=download) as models:
        if coefficients and len(coefficients) != len(models.names):
            what = f"{len(coefficients)} coefficients were given for {len(models.names)} experts."
            raise RecipeError("E_RECIPE_FIELD", what, "", "Give one per expert, in their order.")
        chosen = [p for p in PARTS if p in parts and (p != "texts" or texts)]
        if spectra == "none":
            chosen = [p for p in chosen if p not in ("spectra", "subspaces", "principal")]
        options: dict[str, Any] = {"parts": chosen, "bases": list(bases), "density": density, "spectra": spectra}
        options |= {"rank": rank, "coefficients": list(coefficients), "texts": [str(text) for text in texts]}
        result = _start(models, options)
        run = _Run(result, models, where, progress, finished, threads, stop or threading.Event(), compute)
        run.all(bases, offline, texts)
    if where.problem:
        result.notes.append(f"Results could not be kept for the next time: {where.problem}.")
    return result


def check_options(parts: Sequence[str], density: float, spectra: str, rank: int) -> None:
    """RecipeError E_RECIPE_FIELD for what makes no sense."""
    unknown = [part for part in parts if part not in PARTS]
    what = fix = ""
    if unknown or not parts:
        what = f"There is no part {unknown[0]!r}." if unknown else "No part was asked for."
        fix = f"Parts: {', '.join(PARTS)}."
    elif spectra not in SPECTRA:
        what, fix = f"There are no spectra {spectra!r}.", f"Choose of {', '.join(SPECTRA)}."
    elif not 0 < density <= 1:
        what, fix = f"The density {density:g} makes no sense.", "Give a share above 0, up to 1, such as 0.2."
    elif not 1 <= rank <= 1024:
        what, fix = f"The rank {rank} makes no sense.", "Give a number from 1 to 1024."
    if what:
        raise RecipeError("E_RECIPE_FIELD", what, "", fix)


def _start(models: Models, options: dict[str, Any]) -> Inspection:
    merged = [models.reference["merged"]] if models.reference["merged"] is not None else []
    references = [models.reference["base"], *models.reference["experts"], *merged]
    facts = {
        who: {
            "reference": reference,
            "kind": model.kind,
            "tensors": len(model.tensors),
            "bytes": sum(s.numel * ITEM_BITS[s.dtype] // 8 for s in model.tensors.values()),
            "fingerprint": fingerprint(model),
        }
        for (who, model), reference in zip(models.checkpoints.items(), references, strict=True)
    }
    versions = {"amalgam": VERSION, "analysis": str(NUMERICS), "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "numpy", "scipy")}  # importing torch would take seconds
    return Inspection(
        names=models.names,
        reference=models.reference,
        options=options,
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=versions,
        models=facts,
        parameters=models.parameters,
        places={tensor.name: (tensor.block, tensor.kind) for tensor in models.tensors},
        skipped=list(models.skipped),
        notes=list(models.notes),
    )


@dataclass(slots=True)
class _Entry:
    """What the cache keeps of a part."""

    seconds: float
    value: Any


class _NotKept(Exception):
    """A part is not in the cache, and was not to be computed."""


class _Run:
    """The parts, one after the other."""

    def __init__(
        self,
        result: Inspection,
        models: Models,
        cache: Cache,
        progress: Callable[[Step], None] | None,
        finished: Callable[[str, Inspection], None] | None,
        threads: int,
        stop: threading.Event,
        compute: bool = True,
    ) -> None:
        self.compute = compute
        self.result, self.models, self.cache, self.options = result, models, cache, result.options
        self.progress, self.finished, self.stop = progress, finished, stop
        self.common: dict[str, Any] = {"threads": threads, "progress": self._told, "stop": stop}
        self.chosen: list[str] = result.options["parts"]
        cores = threads or available_cores()
        self.costs = {part: estimated_seconds(part, models, result.options, cores) for part in self.chosen}
        self.part, self.within = "", 0.0
        self.done: set[str] = set()
        self.estimated = self.spent = 0.0
        """Seconds of the parts that were computed here, but for the doctor's: as estimated, and real."""
        self.began: float | None = None
        """When the computation of the current part began; None while it is not being computed."""
        # The table's key knows where the files lie, the fingerprints more of what is in them.
        self.identity = [models.key, *(facts["fingerprint"] for facts in result.models.values())]

    def all(self, bases: Sequence[str], offline: bool, texts: Sequence[str | Path]) -> None:
        parts: dict[str, Callable[[], None]] = {
            "doctor": lambda: self._doctor(bases, offline),
            "changes": self._changes,
            "trimmed": self._trimmed,
            "spectra": self._spectra,
            "subspaces": self._subspaces,
            "principal": self._principal,
            "texts": lambda: self._texts(texts),
        }
        for part in self.chosen:
            if self.stop.is_set():
                raise Cancelled()
            self.part, self.within = part, 0.0
            self._tell()
            try:
                parts[part]()
            except _NotKept:
                self.result.parts.pop(part, None)
                continue
            self.done.add(part)
            self._tell()
            if self.finished is not None:
                self.finished(part, self.result)
        known = self.result
        if known.sample is not None:  # the same findings, from all weights where these were measured
            known.findings = examine(self.models, sample=known.sample, changes=known.changes, spectra=known.spectra)

    # -- the parts --------------------------------------------------------------------------------------------

    def _doctor(self, bases: Sequence[str], offline: bool) -> None:
        # Other bases are not among the models that a key names, so what was seen of them is not kept.
        key = None if bases else self._key("doctor")
        sample = self._get(key, (Sample,), lambda: look(self.models, bases, offline=offline))
        self.result.sample = sample
        self.result.findings = examine(self.models, sample=sample)
        self._made(sample.basis, f"headers, side files and {sample.label}")

    def _changes(self) -> None:
        kinds = (Changes, TensorChange, MergedChange)
        changes = self._get(self._key("changes"), kinds, lambda: measure_changes(self.models, **self.common))
        self.result.changes = changes
        sampled = "".join(f"; {name} sampled: {how}" for name, how in changes.sampled.items())
        self._made("exact", f"all weights; {changes.accuracy}{sampled}")

    def _trimmed(self) -> None:
        density = self.options["density"]
        self.result.trimmed = self._get(
            self._key("trimmed", density=density),
            (Trimmed, TrimmedTensor),
            lambda: measure_trimmed(self.models, density, **self.common),
        )
        self._made("exact", f"all weights, exact thresholds per tensor at density {density:g}")

    def _spectra(self) -> None:
        """Singular values; and, if both are new, subspaces from the same decompositions."""
        method, rank = self.options["spectra"], self.options["rank"]
        both = self.compute and "subspaces" in self.chosen and self._find(self._subspaces_key(), _SUBSPACES) is None

        def compute() -> list[Spectrum]:
            if not both:
                return measure_spectra(self.models, method=method, **self.common)
            began = time.monotonic()
            spectra, self.result.subspaces = measure_both(self.models, rank=rank, method=method, **self.common)
            self.cache.write(self._subspaces_key(), _Entry(time.monotonic() - began, self.result.subspaces))
            return spectra

        self.result.spectra = self._get(self._key("spectra", method=method), (Spectrum,), compute)
        basis, how = _basis(method)
        others = len(left_out(self.models))
        self._made(basis, f"{how}; {others} tensors that are no matrices have none" if others else how)

    def _subspaces(self) -> None:
        method, rank = self.options["spectra"], self.options["rank"]
        found = self.result.subspaces
        self.result.subspaces = self._get(
            None if found is not None else self._subspaces_key(),
            _SUBSPACES,
            lambda: found or measure_subspaces(self.models, rank=rank, method=method, **self.common),
        )
        basis, how = _basis(method)
        self._made(basis, f"leading {rank} directions; {how}")

    def _principal(self) -> None:
        kinds = (Principal, PrincipalTensor)
        found = self._get(self._key("principal"), kinds, lambda: measure_principal(self.models, **self.common))
        self.result.principal = found
        self._made("exact", f"all weights of matrices in blocks; rank {found.rank}, density {found.density:g}")

    def _subspaces_key(self) -> str:
        return self._key("subspaces", method=self.options["spectra"], rank=self.options["rank"])

    def _texts(self, texts: Sequence[str | Path]) -> None:
        from .with_text import REPRESENTATIONS, SAMPLES, WHAT, draw, measure_models

        # Hidden states are for seeing whether a merge has folded them together.
        what = [*WHAT, *([REPRESENTATIONS] if self.result.reference["merged"] is not None else [])]
        drawn = [one.key for one in draw(self.models.names, list(texts), SAMPLES)]

        def compute() -> dict[str, Any]:
            found = measure_models(
                self.models, list(texts), what=what, samples=SAMPLES, progress=self._told, stop=self.stop
            )
            return found.as_dict()

        key = self._key("texts", what=what, texts=drawn, networks=side_files(self.models))
        self.result.texts = self._get(key, (), compute, lambda found: not found["problems"])
        self._made("sampled", "a sample of the given texts; see each expert's account")

    # -- results, kept or computed ----------------------------------------------------------------------------

    def _key(self, part: str, **options: Any) -> str:
        return key_of({"part": part, "models": self.identity, "names": self.models.names, **options})

    def _find(self, key: str, classes: Sequence[type]) -> _Entry | None:
        found = self.cache.read(key, (*classes, _Entry))
        return found if isinstance(found, _Entry) else None

    def _get(
        self,
        key: str | None,
        classes: Sequence[type],
        compute: Callable[[], Any],
        worth: Callable[[Any], bool] = lambda value: True,
    ) -> Any:
        """The current part's result, from the cache or computed and then kept (not without a key, nor if it is not
        ``worth`` it)."""
        entry = self._find(key, classes) if key else None
        cached = entry is not None
        if entry is None and not self.compute:
            raise _NotKept
        if entry is None:
            self.began = began = time.monotonic()
            value = compute()
            self.began, entry = None, _Entry(time.monotonic() - began, value)
            if self.part != "doctor":  # it reads headers: its pace says nothing about the others'
                self.estimated, self.spent = self.estimated + self.costs[self.part], self.spent + entry.seconds
            if key and worth(value):
                self.cache.write(key, entry)
        self.result.parts[self.part] = PartFacts("exact", "", entry.seconds, cached)
        return entry.value

    def _made(self, basis: str, how: str) -> None:
        """Say how the current part's numbers were made."""
        facts = self.result.parts.get(self.part)
        seconds, cached = (facts.seconds, facts.cached) if facts else (0.0, False)
        self.result.parts[self.part] = PartFacts(basis, how, seconds, cached)

    # -- progress ---------------------------------------------------------------------------------------------

    def _told(self, done: int, total: int, what: str) -> None:
        self.within = done / max(1, total)
        self._tell()

    def _tell(self) -> None:
        if self.progress is None:
            return
        whole, current = sum(self.costs.values()), self.costs[self.part] * self.within
        shares = {part: cost if part in self.done else 0.0 for part, cost in self.costs.items()}
        if self.part not in self.done:
            shares[self.part] = current
        share = sum(shares.values()) / whole
        # The estimates are right up to a common factor, which is learned from what was computed so far.
        estimated, spent = self.estimated, self.spent
        if self.began is not None and self.part != "doctor":
            estimated, spent = estimated + current, spent + time.monotonic() - self.began
        left = (1 - share) * whole * spent / estimated if estimated > 0 and spent > LEARNING else None
        self.progress(Step(self.part, self.chosen.index(self.part) + 1, len(self.chosen), share, left))


def side_files(models: Models) -> list[list[Any]]:
    """What besides weights decides what a network does with a text: configuration, tokenizer. Name, size and time."""
    found = []
    for who, checkpoint in models.checkpoints.items():
        for place in [checkpoint.path, *([checkpoint.base.path] if checkpoint.base is not None else [])]:
            folder = place if place.is_dir() else place.parent
            for path in sorted(path for path in folder.iterdir() if path.suffix in SIDE_FILES):
                status = path.stat()
                found.append([who, path.name, status.st_size, status.st_mtime_ns])
    return found


_SUBSPACES = (Subspaces, TensorSubspaces, Overlap)


def _basis(method: str) -> tuple[str, str]:
    """How singular values were computed."""
    return {
        "gram": ("exact", "all weights; eigenvalues of Gram matrices in float64, values below 1e-7 σ₁ mean 0"),
        "exact": ("exact", "all weights; triangular factors in float64, error about 1e-15 σ₁"),
        "preview": (
            "estimated",
            "leading values by randomised iteration, never above the truth; the tail is estimated",
        ),
    }[method]


def estimated_seconds(part: str, models: Models, options: dict[str, Any], cores: int) -> float:
    """About how long a part takes on so many cores. Good for proportions: the factor is learned while it runs."""
    count = len(models.names) + (models.reference["merged"] is not None)
    weights = models.parameters
    if part == "doctor":
        return 0.3 + 5e-4 * len(models.tensors)
    if part == "texts":
        return 10 + weights * count * 2e-7
    if part in ("changes", "trimmed"):
        return 0.05 + weights * count * (2e-9 if part == "changes" else 6e-9) / cores
    shapes = [tensor.shape for tensor in models.tensors if len(tensor.shape) == 2]
    work = sum(max(s) * min(s) ** 2 + 4 * min(s) ** 3 for s in shapes) / 3e10
    share = {"spectra": count * (count + 1) / 2, "subspaces": 0.5 * count, "principal": 1.0}[part]
    passes = weights * count * 2e-8 if part == "principal" else 0.0
    return 0.05 + (work * share + passes) / cores
