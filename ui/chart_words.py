"""The words of the charts: what each asks, and what a reader who sees it for the first time has to know.

``{...}`` is filled in by the chart. The advice is that of the literature, with its source where it has one; the charts
show evidence and leave the verdict to an evaluation.
"""

from __future__ import annotations

TITLES = {
    "sizes": "How much each expert changed, and where",
    "importance": "Where a budget of coefficients is well spent",
    "cosine": "Do the experts pull in the same direction?",
    "signs": "Do they agree on signs? (largest {density:.0%} of each tensor)",
    "kept": "What the merged model kept of each expert",
    "ranks": "How many directions does each change use?",
    "spectra": "Spectra of single matrices",
    "subspaces": "Do their {rank} strongest directions coincide?",
    "principal": "Did training touch the base's principal weights?",
    "sensitivity": "Which layers does each expert depend on? (loss of the next token)",
    "entropy": "Which layers does each expert depend on? (entropy of the answer, without labels)",
    "whitened": "How many directions does each change use on its own texts?",
    "representations": "Over how many directions do the hidden states spread?",
}

READINGS = {
    "sizes": (
        "The task vector τ is what training changed: expert minus base. Each cell is the size of the change in one "
        "module, relative to the size of the base's weights there; layer 0 is on top, and all panels share one "
        "scale. Experts whose changes sit in different places get in each other's way less. Fine-tunes of large "
        "models mostly move by a few percent. A bigger change is not a more important one."
    ),
    "importance": (
        "Importance of Expert Merging++: I = Σₖ |αₖ| ‖τₖ‖₁, normalised to sum 1 over all matrices (coefficients α: "
        "{coefficients}). Long bars are layers in which the experts together moved most, where finer coefficients, "
        "more bits or more rank pay first. If all bars are about equal, one coefficient for the whole model is "
        "enough. It measures size, not what the model needs: only text can tell that."
    ),
    "cosine": (
        "Cosine of the task vectors of each pair: 1 the same change, 0 unrelated, −1 the opposite. Near 0 is usual "
        "even for related tasks; above 0.3 the experts learned something in common; below 0 they compete, and a sum "
        "of both loses. If all cosines are high, the experts may share an ancestor that is not this base."
    ),
    "signs": (
        "Each expert keeps its largest changes, as TIES does. Of what at least one of a pair keeps, weighted by "
        "size: kept by both with the same sign, by both with opposite signs, or by one alone. Large grey parts mean "
        "that the experts use different weights, and that trimming keeps them apart. Opposite signs cancel in a sum: "
        "above about 30 % of what both keep, methods that elect signs (ties, pcb) are worth comparing. Half of what "
        "both keep would be chance."
    ),
    "kept": (
        "τₘ is merge minus base. First bar: how much of an expert's change is found along its own direction (1 = all "
        "of it; experts that resemble each other lend each other some). Second: the coefficients with which task "
        "arithmetic would come nearest; {residual:.0%} of τₘ is not reached by any such sum.{aligned} What counts is "
        "the score on the task, which these numbers do not tell."
    ),
    "ranks": (
        "A task vector's matrix acts along directions of falling strength σ₁ ≥ σ₂ ≥ …, and there is no one rank of "
        "such a thing. So choose a measure, and do not compare two measures with each other: the two effective ranks "
        "differ by a third on noise, and three- to fivefold on real fine-tunes. Low numbers: an update of few "
        "directions, cheap to store and easy to keep apart. A full fine-tune is not low-rank in energy, even if its "
        "effective rank is small.{estimated}"
    ),
    "spectra": (
        "Left: singular values relative to the largest, on a logarithmic scale; the dotted lines are where they "
        "would end if the same energy were noise (Marchenko-Pastur), so what lies above is structure. Right: the "
        "share of ‖τ‖² in the first k directions, with a mark where it reaches 90 %. A merged curve that falls "
        "faster than those of the experts says that a few shared directions drown the others. Middle, first and last "
        "layer can be drawn; the measures of all matrices are in the table above.{estimated}"
    ),
    "subspaces": (
        "Overlap ‖UᵀU′‖²/k of the spaces that the leading directions of two experts span: 1 the same space, 0 at "
        "right angles; two random spaces have k/n, given as chance. High overlap with a positive cosine of the "
        "leading parts means that the experts do the same; with a negative one they undo each other. Singular task "
        "interference (TSV) asks for outputs and inputs at once: it is 0 when all experts keep out of each other's "
        "way."
    ),
    "principal": (
        "LIFT calls the largest {density:.0%} of entries of the base's rank-{rank} part principal weights. The bar "
        "is the share of an expert's change (its energy) that lies on them, divided by their share of all entries: 1 "
        "means no preference, above 1 that training preferred them. The table also tells how much the largest "
        "changes of two experts coincide there and elsewhere (intersection over union; chance would be "
        "{chance:.3f})."
    ),
    "sensitivity": (
        "Sensitivity Σ|θ · ∂L/∂θ| of each layer on the expert's own texts, as the coefficient that Sens-Merging "
        "makes of it. Layers further to the right matter more for what the expert does; a straight line says that "
        "one coefficient is enough. The scores are exact for these texts, and a sample of what the expert may be "
        "asked."
    ),
    "entropy": (
        "The same with the entropy of the model's own answers as the loss, which needs no labels (and is not the "
        "published score). Layers further to the right matter more for how sure the expert is."
    ),
    "whitened": (
        "The same ranks as above, of the change multiplied by the square root of the inputs' second moments: what the "
        "expert's texts never use counts nothing. Far fewer directions than without texts mean that most of the "
        "change is idle on what the expert is for. Where a matrix saw fewer tokens than it has columns, the rank is "
        "bounded by them (the table says so)."
    ),
    "representations": (
        "RankMe of the hidden states of all models on the same texts: how many directions they use. A merge that lies "
        "far below all its experts has folded their hidden states together. Only that can be read from it: of two "
        "models with healthy numbers the higher one is not the better one."
    ),
}
