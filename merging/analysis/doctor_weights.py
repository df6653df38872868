"""What the weights tell about a merge: is the base right, who is loud, what is there to merge, and will it survive?

Sizes come from a sample first and from all weights once those were measured; each finding says which. The limits below
are where advice changes, with their source; none of them is a law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING

from .finding import Finding, some
from .models import Models
from .sampling import USUAL_WEIGHT, Sample, relative

if TYPE_CHECKING:
    from .changes import Changes
    from .spectra import Spectrum
    from .tensor_change import MergedChange

UNRELATED = 0.7
"""‖τ‖/‖W_0‖ of a base that is probably wrong. Two independent models of equal norm are √2 = 1.41 apart; half of that
is far beyond any fine-tune (next line)."""
LARGE = 0.12
"""‖τ‖/‖W_0‖ that is large for a fine-tune: modeldelta 0.4.4 calls more than 12 % "extreme", 1.5 to 5 % "standard"."""
CLOSER = 0.8
"""How much nearer another base must be (‖W_k − other‖ / ‖W_k − W_0‖) to be called the better one. Own judgement."""
SAME, SHARED = 0.99, 0.5
"""Cosine of two experts that are nearly one, and of all experts that share a direction. Near 0 is typical, above 0.3
means related tasks (Ilharco et al., arXiv 2212.04089). With a wrong base all contain the difference of the bases. Own
judgement."""
MOSTLY_UNTOUCHED = 0.5
"""Share of weights with τ = 0 that is worth a word. Own judgement."""
LOUDER, MUCH_LOUDER = 2.0, 4.0
"""Largest over smallest ‖τ‖. DisTaC (ICLR 2026) shows that a mismatch hurts every method it tries, that shrinking the
larger is safe and stretching the smaller is not; it names no limit, these are own judgement."""
LOW_RANK = 0.15
"""Median share of directions that hold 99 % of the change. Full fine-tunes use most (SmolLM2-135M: even 90 % of the
energy takes 20 to 34 % of them); adapters of rank 16 in a width of 1024 have 1.6 % at most."""
SURVIVES_WELL, SURVIVES_BADLY = 0.96, 0.86
"""Share of changed entries that survive rounding to bfloat16. Measured on normal weights of deviation 0.02 and changes
of 1e-3, 3e-4 and 1e-4 at weight 0.3: 4, 14 and 35 % are lost, and the whole change is off by 6, 21 and 51 %."""
LITTLE_KEPT = 0.1
"""⟨τ_m, τ_k⟩/‖τ_k‖² of an expert of which a merge holds hardly anything. Averaging E unrelated experts leaves 1/E. Own
judgement."""
BY_CHANCE = 0.05
"""Conflict this near to one half is that of unrelated changes."""
CONFLICT = 0.30
"""Sign conflict, weighted by |τ_a τ_b|, above which methods that elect signs are worth trying (TIES, arXiv 2306.01708).
Unweighted conflict is near one half for unrelated changes and says nothing."""


def examine_weights(
    models: Models, sample: Sample, changes: Changes | None = None, spectra: Sequence[Spectrum] | None = None
) -> list[Finding]:
    """All findings about weights, in the order of this module."""
    numbers = _exact(models, changes) if changes is not None else _sampled(models, sample)
    findings = [
        *_not_finite(sample),
        *_base(models, numbers, sample),
        *_directions(numbers),
        _untouched(numbers, models),
        _loudness(numbers),
        *_ranks(models, sample, spectra or ()),
        _survival(models, numbers, sample),
    ]
    if changes is not None:
        findings += [*_conflict(changes), *_merged(changes, models.reference["merged"] is not None)]
    return findings


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Sizes of the task vectors, from all weights or from a sample; lists are per expert."""

    names: list[str]
    base_norm: float
    norm: list[float]
    unchanged: list[float]
    survival: list[float]
    cosine: list[list[float]]
    basis: str
    label: str

    def each(self, values: Sequence[float], form: str) -> str:
        return _each(self.names, values, form)


def _each(names: Sequence[str], values: Sequence[float], form: str) -> str:
    return some([f"{name} {format(value, form)}" for name, value in zip(names, values, strict=True)], 4)


def _sampled(models: Models, sample: Sample) -> _Numbers:
    return _Numbers(
        models.names, sample.base_norm, sample.norm, sample.unchanged, sample.survival, sample.cosine, sample.basis,
        sample.label,
    )  # fmt: skip


def _exact(models: Models, changes: Changes) -> _Numbers:
    whole = changes.total()
    return _Numbers(
        models.names, whole.base_norm, whole.norm, whole.unchanged, whole.survival, changes.cosine().tolist(), "exact",
        "all weights",
    )  # fmt: skip


# -- checks -------------------------------------------------------------------------------------------------------


def _not_finite(sample: Sample) -> list[Finding]:
    if not sample.not_finite:
        return []
    return [
        Finding(
            "not_finite", "problem", "There are NaN or infinite weights.",
            f"In {some(sample.not_finite)}.", float(len(sample.not_finite)),
            "Use another checkpoint: this one is broken. (`policies: {non_finite: propagate}` merges it all the same.)",
            "exact",
        )
    ]  # fmt: skip


def _base(models: Models, numbers: _Numbers, sample: Sample) -> list[Finding]:
    """Is the base the one that the experts come from? An adapter cannot tell: its change is the same on every base."""
    mine = [k for k, name in enumerate(models.names) if models.checkpoints[name].kind != "adapter"]
    if not mine:
        return []
    findings = []
    equal = [numbers.names[k] for k in mine if numbers.norm[k] == 0]
    if equal:
        findings.append(
            Finding(
                "no_change", "problem" if numbers.basis == "exact" else "warning",
                f"{some(equal)} does not differ from the base.", f"‖τ‖ = 0 ({numbers.label}).", 0.0,
                "Take it out of the recipe, or check its path: there is nothing to merge.", numbers.basis,
            )
        )  # fmt: skip
    share = relative([numbers.norm[k] for k in mine], numbers.base_norm)
    shown = f"‖τ‖/‖W₀‖: {_each([numbers.names[k] for k in mine], share, '.2%')} ({numbers.label})."
    nearer = _nearer(models, sample, mine)
    if nearer:
        other, ratio = min(nearer.items(), key=lambda item: min(item[1].values()))
        worst = min(ratio.values())
        return [
            *findings,
            Finding(
                "base", "problem", f"{some(ratio)}: {_short(other)} is nearer than the base that was given.",
                f"The change against it is {worst:.2f} times as large ({sample.label}). {shown}", worst,
                f"Use `base: {other}` in the recipe: task vectors against the wrong base hold the bases' difference.",
                sample.basis,
            ),
        ]  # fmt: skip
    far = [models.names[k] for k, value in zip(mine, share, strict=True) if value >= UNRELATED]
    if far:
        found = Finding(
            "base", "problem", f"{some(far)} may come from another base.",
            f"{shown} Two unrelated models are about 141 % apart.", max(share),
            "Look the base up in the model's card; `app.py inspect --also-base OTHER` compares the distances.",
            numbers.basis,
        )  # fmt: skip
    elif max(share) > LARGE:
        found = Finding(
            "base", "note", "Large changes: these are no light fine-tunes.",
            f"{shown} Most fine-tunes of large models stay below {LARGE:.0%}; small models move more.", max(share),
            "If that surprises you, the base may be the wrong one: `app.py inspect --also-base OTHER` compares.",
            numbers.basis,
        )  # fmt: skip
    else:
        compared = f" None of {len(sample.other_norms)} other bases is nearer." if sample.other_norms else ""
        found = Finding("base", "ok", "The base fits.", shown + compared, max(share), "", numbers.basis)
    return [*findings, found]


def _nearer(models: Models, sample: Sample, mine: Sequence[int]) -> dict[str, dict[str, float]]:
    """Other base -> expert that is nearer to it -> ratio of the distances. (Distance 0: that is the expert itself.)"""
    found: dict[str, dict[str, float]] = {}
    for other, distances in sample.other_norms.items():
        for k in mine:
            if distances[k] and distances[k] < CLOSER * sample.own_norms[other][k]:
                found.setdefault(other, {})[models.names[k]] = distances[k] / sample.own_norms[other][k]
    return found


def _directions(numbers: _Numbers) -> list[Finding]:
    moved = [k for k, norm in enumerate(numbers.norm) if norm]
    found = {(a, b): numbers.cosine[a][b] for a, b in combinations(moved, 2)}
    if not found:
        return []
    (a, b), highest = max(found.items(), key=lambda item: item[1])
    lowest = min(found.values())
    evidence = f"Cosine of task vectors from {lowest:+.2f} to {highest:+.2f} ({numbers.label})."
    if highest > SAME:
        return [
            Finding(
                "direction", "warning", f"{numbers.names[a]} and {numbers.names[b]} are nearly the same change.",
                evidence, highest, "Keep one of them: together they count twice.", numbers.basis,
            )
        ]  # fmt: skip
    if lowest > SHARED:
        return [
            Finding(
                "direction", "warning", "All experts moved in one direction.", evidence, lowest,
                "Related training, or an ancestor that is not this base (often: experts of an instruct model against "
                "the pretrained one). `app.py inspect --also-base ANCESTOR` tells.", numbers.basis,
            )
        ]  # fmt: skip
    evidence += " Near 0 is usual, above 0.3 means related tasks."
    return [
        Finding("direction", "ok", "The experts moved in different directions.", evidence, highest, "", numbers.basis)
    ]


def _untouched(numbers: _Numbers, models: Models) -> Finding:
    most = max(numbers.unchanged)
    evidence = f"Weights equal to the base's: {numbers.each(numbers.unchanged, '.1%')} ({numbers.label})."
    if most < MOSTLY_UNTOUCHED:
        return Finding("untouched", "ok", "The experts changed most weights.", evidence, most, "", numbers.basis)
    who = [n for n, share in zip(numbers.names, numbers.unchanged, strict=True) if share >= MOSTLY_UNTOUCHED]
    if _is_bf16(models):
        evidence += " Saving in 16 bits may have rounded small changes away."
    return Finding(
        "untouched", "note", f"Most weights are untouched: {some(who)}.", evidence, most,
        "Frozen parts, an adapter or reinforcement learning. Trimming such an expert gains little: give it "
        "`parameters: {density: 1.0}` and trim the others.", numbers.basis,
    )  # fmt: skip


def _loudness(numbers: _Numbers) -> Finding:
    evidence = f"‖τ‖: {numbers.each(numbers.norm, '.3g')} ({numbers.label})."
    positive = [norm for norm in numbers.norm if norm]
    if len(positive) < 2:
        return Finding("norms", "ok", "Nothing to balance.", evidence, None, "", numbers.basis)
    ratio = max(positive) / min(positive)
    if ratio < LOUDER:
        evidence += f" Ratio {ratio:.2f}."
        return Finding("norms", "ok", "The changes are of similar size.", evidence, ratio, "", numbers.basis)
    loud = numbers.names[numbers.norm.index(max(positive))]
    return Finding(
        "norms", "warning" if ratio >= MUCH_LOUDER else "note",
        f"{loud} changed {ratio:.1f} times as much as the least of them.", evidence, ratio,
        f"It dominates a sum. Shrink it: `parameters: {{weight: w}}` under {loud}, with w = {1 / ratio:.2f} times that "
        "of the least one, levels them. Shrinking the larger is safe, stretching the smaller is not (DisTaC).",
        numbers.basis,
    )  # fmt: skip


def _ranks(models: Models, sample: Sample, spectra: Sequence[Spectrum]) -> list[Finding]:
    """Is a change low-rank, as an adapter's is? From spectra, else from sampled rows."""
    shares, basis = _rank_shares(models, spectra)
    where = "median over matrices"
    if not shares:
        shares = {name: median(values) for name, values in sample.rank99.items() if values}
        basis, where = "estimated", "median over sampled rows of matrices, estimated"
    if not shares:
        return []
    values = _each(list(shares), list(shares.values()), ".0%")
    evidence = f"Share of directions that hold 99 % of the change: {values} ({where})."
    low, least = [name for name, share in shares.items() if share <= LOW_RANK], min(shares.values())
    if not low:
        return [Finding("rank", "ok", "The changes are not low-rank.", evidence, least, "", basis)]
    return [
        Finding(
            "rank", "note", f"Low-rank changes, as adapters make them: {some(low)}.", evidence, least,
            "Give the adapter folder itself as the expert if you have it. Any method here will do; elsewhere, beware "
            "of those that flatten the spectrum: Iso-C collapses on such experts (26.7 in OptMerge's table).", basis,
        )
    ]  # fmt: skip


def _rank_shares(models: Models, spectra: Sequence[Spectrum]) -> tuple[dict[str, float], str]:
    found: dict[str, list[float]] = {}
    basis = "exact"
    for spectrum in spectra:
        if spectrum.of in models.names and spectrum.frobenius > 0:
            found.setdefault(spectrum.of, []).append(spectrum.measures().k99 / min(spectrum.shape))
            basis = "estimated" if spectrum.estimated_tail else basis
    return {name: median(values) for name, values in found.items()}, basis


def _survival(models: Models, numbers: _Numbers, sample: Sample) -> Finding:
    """Does the change live through rounding to bfloat16, at full strength and at a usual weight?"""
    least = min(sample.survival_scaled)
    evidence = (
        f"Changed weights that still differ in bfloat16: {numbers.each(numbers.survival, '.0%')}; added at weight "
        f"{USUAL_WEIGHT}: {numbers.each(sample.survival_scaled, '.0%')} ({sample.label})."
    )
    if least >= SURVIVES_WELL:
        return Finding("survival", "ok", "The changes survive bfloat16.", evidence, least, "", sample.basis)
    sixteen = _is_bf16(models)
    remedy = "`dtype: float32` in the recipe keeps it" if sixteen else "Leave `dtype` in the recipe out, or at float32"
    return Finding(
        "survival", "warning" if least < SURVIVES_BADLY and sixteen else "note",
        f"Saved in bfloat16, a merge would lose up to {1 - least:.0%} of the changed weights.", evidence, least,
        f"{remedy}; `app.py merge` reports what survived.", sample.basis,
    )  # fmt: skip


def _is_bf16(models: Models) -> bool:
    sizes: dict[str, int] = {}
    for tensor in models.tensors:
        sizes[tensor.base.dtype] = sizes.get(tensor.base.dtype, 0) + tensor.numel
    return max(sizes, key=lambda kind: sizes[kind]) == "BF16"


def _conflict(changes: Changes) -> list[Finding]:
    found = dict(zip(changes.pairs, changes.total().conflict_weighted, strict=True))
    if not found:
        return []
    (a, b), highest = max(found.items(), key=lambda item: item[1])
    who = f"{changes.names[a]} and {changes.names[b]}"
    evidence = f"Opposite signs, weighted by |τ_a τ_b|: up to {highest:.0%} ({who}; all weights). Chance would be 50 %."
    if highest <= CONFLICT:
        return [Finding("conflict", "ok", "Little disagreement about signs.", evidence, highest, "", "exact")]
    # Independent changes disagree on half of their weight: that is the rule, and no fault of these experts.
    title = "Experts pull the same weights in opposite directions, "
    title += "more than by chance." if highest > 0.5 + BY_CHANCE else "about as often as unrelated changes do."
    if highest < 0.5 - BY_CHANCE:
        title = "Experts pull some of the same weights in opposite directions."
    return [
        Finding(
            "conflict", "note", title, evidence, highest,
            "A plain sum cancels there. Try `method: ties` (`density: 0.2`) and `pcb` beside `task_arithmetic`, and "
            "let `app.py compare` decide.", "exact",
        )
    ]  # fmt: skip


def _merged(changes: Changes, given: bool) -> list[Finding]:
    """How much of each expert's change is in the merged model."""
    if not given:
        return []
    merged, lacking = changes.total().merged, [tensor.name for tensor in changes.tensors if tensor.merged is None]
    if merged is None or lacking:
        evidence = f"Absent or of another shape there: {len(lacking):,} of {len(changes.tensors):,} tensors, such as "
        fix = "Check that this is the merge of these models. What is said of it below holds for the other tensors."
        other = Finding("merged_tensors", "warning", "The merged model does not have all tensors of the base.",
                        f"{evidence}{lacking[0]}.", len(lacking), fix, "exact")  # fmt: skip
        return [other] if merged is None else [other, *_kept(changes, merged)]
    return _kept(changes, merged)


def _kept(changes: Changes, merged: MergedChange) -> list[Finding]:
    evidence = (
        f"⟨τ_m, τ_k⟩/‖τ_k‖²: {_each(changes.names, merged.projection, '.2f')}. The nearest weighted sum is "
        f"{_each(changes.names, merged.coefficients, '.2f')}; {merged.residual:.0%} of τ_m lies outside of it."
    )
    least = min(merged.projection)
    who = changes.names[merged.projection.index(least)]
    if least >= LITTLE_KEPT:
        return [Finding("merged", "ok", "The merge holds a part of every expert.", evidence, least, "", "exact")]
    return [
        Finding(
            "merged", "note", f"Little of {who} is in the merged model.", evidence, least,
            f"Raise the weight of {who} if its task suffered; `app.py evaluate` tells whether it did.", "exact",
        )
    ]  # fmt: skip


def _short(reference: str) -> str:
    return reference.rstrip("/").split("/")[-1]
