"""Which tensors of the inputs make which tensor of the output.

One table, made from headers alone: for each output tensor its source in the base and in each expert that
takes part. Every way in which models of one family differ has one explicit rule here, and whatever a rule
does is said in a note that the plan shows:

* the output head exists if any input has one; models with a tied head lend their embedding for it;
* buffers that are no weights (rotary frequencies, position ids) come from the first model that has them;
* tensors that an expert lacks, or has in excess, follow the recipe's policies;
* embeddings and heads of different vocabularies are matched row by row (``checkpoints/tokenizer.py``);
* tensors of one name but different shapes are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from .checkpoints.checkpoint import Checkpoint, Source
from .checkpoints.layout import IGNORABLE, Role, block_count, block_number, head_and_embedding, rename_block, role
from .errors import AmalgamError, InputError
from .layer_plan import BlockSource, OutputBlock, layer_plan, place_of
from .recipe import Recipe

FLOATS = {"F16", "BF16", "F32", "F64"}
COPIED_AS_THEY_ARE = {"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL"}
COPIED = "copied as they are (not all models have them)."
SHOWN = 5
"""How many names an error lists before it says "and n more"."""


@dataclass(slots=True)
class Aligned:
    """One output tensor and where it comes from."""

    name: str
    role: Role
    base: Source | None
    experts: list[Source]
    """Sources of the experts that take part, in order."""
    names: list[str]
    """The tensor's name in each of those experts."""
    models: list[str]
    """``Model.key`` of the base (if there is one) and of those experts, in that order."""
    t: float = 0.0
    """Layer fraction, at which depth gradients are read."""
    slice_index: int | None = None
    keep: bool = False
    """Not merged: copied from the base (or the first expert) whatever the method."""
    dtype: str = ""
    """The type that the template is stored in: an adapter and a rearranged embedding are read in a wider one."""

    @property
    def template(self) -> Source:
        """The source that an unmerged tensor is copied from, and whose shape is the output's."""
        return self.base if self.base is not None else self.experts[0]


@dataclass(slots=True)
class Alignment:
    tensors: list[Aligned] = field(default_factory=list)
    problems: list[AmalgamError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    remarks: dict[tuple[str, str], dict[str, None]] = field(default_factory=dict)
    """(model, what was done) -> names of tensors; they become notes at the end."""
    has_head: bool | None = None
    """Does the output have a head of its own? None if no input has a token embedding."""
    blocks: list[BlockSource] = field(default_factory=list)
    """For each output block, the block whose tensors' names and types it has."""

    def remark(self, label: str, what: str, names: Sequence[str]) -> None:
        self.remarks.setdefault((label, what), {}).update(dict.fromkeys(names))


class _Inputs:
    """The models of a recipe with what alignment asks about each."""

    def __init__(
        self, recipe: Recipe, models: Mapping[str, Checkpoint], places: Sequence[OutputBlock]
    ) -> None:
        self.recipe, self.models = recipe, models
        # Only models that give the output its ends have a say in whether it is tied.
        outer = {s.model for p in places if p.block is None for s in (p.base, *p.sources) if s is not None}
        ends = {key: head_and_embedding(model.tensors) for key, model in models.items() if key in outer}
        self.heads = {head for head, _ in ends.values() if head}
        self.tied = {key: embedding for key, (head, embedding) in ends.items() if embedding and not head}
        self.embeddings = {embedding for _, embedding in ends.values() if embedding}

    def source(self, key: str, name: str) -> Source | None:
        """The tensor ``name`` of a model; a tied model's embedding for the head that others have."""
        found = self.models[key].tensors.get(name)
        if found is None and name in self.heads and key in self.tied:
            return self.models[key].tensors[self.tied[key]]
        return found

    def names(self, source: BlockSource) -> list[str]:
        """Names of a model's tensors in one place, in file order."""
        return self._by_place(source.model).get(source.block, [])

    @cache  # noqa: B019 - lives as long as one call of align_tensors
    def _by_place(self, key: str) -> dict[int | None, list[str]]:
        groups: dict[int | None, list[str]] = {}
        for name in self.models[key].tensors:
            groups.setdefault(block_number(name), []).append(name)
        return groups


def align_tensors(recipe: Recipe, models: Mapping[str, Checkpoint]) -> Alignment:
    """The table for ``recipe`` over opened ``models`` (by ``Model.key``). Problems are collected, not raised."""
    places = layer_plan(recipe, {key: block_count(model.tensors) for key, model in models.items()})
    result, inputs = Alignment(), _Inputs(recipe, models, places)
    if inputs.embeddings:
        result.has_head = bool(inputs.heads)
        if inputs.heads and inputs.tied:
            result.notes.append(
                f"{some_of(list(inputs.tied))}: the head is tied to the embedding, other inputs have one of their "
                "own; the embedding stands in for it, and the output is untied.")
    for place in places:
        _add_place(inputs, place, result)
    if recipe.slices is None:
        order = {name: i for i, name in enumerate(models[recipe.model_list[0].key].tensors)}
        result.tensors.sort(key=lambda t: order.get(t.name, len(order)))
    result.notes += [
        f"{label}: {some_of(list(names))} {what}" for (label, what), names in result.remarks.items()]
    _join_missing(result, recipe)
    _check_types(result)
    return result


def _add_place(inputs: _Inputs, place: OutputBlock, result: Alignment) -> None:
    donor = place.base or place.sources[0]
    if place.block is not None:
        result.blocks.append(donor)
    labels = [inputs.recipe.experts[s.expert or 0].label for s in place.sources]
    for name in _names(inputs, place, donor, result):

        def at(block: int | None, name: str = name) -> str:
            return name if block is None or block == donor.block else rename_block(name, block)

        base = inputs.source(place.base.model, at(place.base.block)) if place.base else None
        found = []
        for source, label in zip(place.sources, labels, strict=True):
            there = at(source.block)
            found.append(_Part(label, source.model, there, inputs.source(source.model, there)))
        _add(inputs.recipe, at(place.block), place, base, found, result)


def _names(inputs: _Inputs, place: OutputBlock, donor: BlockSource, result: Alignment) -> list[str]:
    """The donor's names in this place, and by policy what only others have."""
    names = dict.fromkeys(inputs.names(donor))
    if place.block is None:
        wanted = [n for n in names if place_of(role(n, ()).kind) == place.place]
        names = dict.fromkeys(wanted)
    if place.place == "after":  # a tied model's head is its embedding: no name says so
        names.update(dict.fromkeys(sorted(inputs.heads)))
    recipe = inputs.recipe
    for source in place.sources:
        theirs = inputs.names(source)
        if place.block is None:
            theirs = [n for n in theirs if place_of(role(n, ()).kind) == place.place]
        elif source.block != donor.block:
            theirs = [rename_block(n, donor.block or 0) for n in theirs]
        extra = [n for n in theirs if n not in names]
        label = recipe.experts[source.expert or 0].label
        buffers = [n for n in extra if IGNORABLE.fullmatch(n)]
        weights = [n for n in extra if not IGNORABLE.fullmatch(n)]
        if buffers:
            result.remark(label, "left out (buffers, not weights).", buffers)
        if weights and recipe.policies.extra_tensors == "refuse":
            result.problems += [_Mismatch("E_EXTRA_TENSOR", n, label) for n in weights]
        elif weights and recipe.policies.extra_tensors == "copy":
            names.update(dict.fromkeys(weights))
            result.remark(label, COPIED, weights)
        elif weights:
            result.remark(label, "dropped, as the recipe says.", weights)
    return list(names)


class _Part(NamedTuple):
    """One expert's share in an output tensor."""

    label: str
    model: str
    name: str
    source: Source | None


def _add(
    recipe: Recipe, name: str, place: OutputBlock, base: Source | None, parts: list[_Part], result: Alignment
) -> None:
    """Enter one output tensor, or say which model lacks it."""
    missing = [p.label for p in parts if p.source is None]
    present = [p for p in parts if p.source is not None]
    buffer, keep = IGNORABLE.fullmatch(name) is not None, False
    if place.base is not None and base is None:
        if not (buffer or recipe.policies.extra_tensors == "copy"):
            result.problems.append(_Mismatch("E_MISSING_TENSOR", name, place.base.model))
            return
        present, keep = present[:1], True
    elif buffer or (missing and base is None and recipe.policies.extra_tensors == "copy"):
        keep = True
        if missing and not buffer:
            result.remark(present[0].label, COPIED, [name])
    elif missing and base is not None and recipe.policies.missing_tensors == "base":
        present = [p._replace(source=p.source or base) for p in parts]
        for label in missing:
            result.remark(label, "missing; they count as unchanged, as the recipe says.", [name])
    elif missing:
        result.problems += [_Mismatch("E_MISSING_TENSOR", name, label) for label in missing]
        return
    sources = [p.source for p in present if p.source is not None]
    if base is None and not sources:
        return
    template = base if base is not None else sources[0]
    models = ([place.base.model] if place.base and base is not None else []) + [p.model for p in present]
    result.tensors.append(Aligned(
        name, role(name, template.shape), base, sources, [p.name for p in present], models,
        place.t, place.slice_index, keep, getattr(template, "below", template).dtype))  # fmt: skip


class _Mismatch(InputError):
    """One tensor that one model lacks or has in excess; joined into one error per model at the end."""

    def __init__(self, code: str, name: str, label: str) -> None:
        super().__init__(code, name)
        self.name, self.label = name, label


def _join_missing(result: Alignment, recipe: Recipe) -> None:
    groups: dict[tuple[str, str], list[str]] = {}
    for problem in result.problems:
        if isinstance(problem, _Mismatch):
            groups.setdefault((problem.code, problem.label), []).append(problem.name)
    result.problems = [p for p in result.problems if not isinstance(p, _Mismatch)]
    for (code, label), names in groups.items():
        if code == "E_EXTRA_TENSOR":
            result.problems.append(InputError(
                code, f"{label} has tensors that the first model lacks: {some_of(names)}.",
                "They would be lost, or would enter the result unmerged.",
                "Check that the models belong together. If so, set policies.extra_tensors to drop or copy."))
        else:
            result.problems.append(InputError(
                code, f"{label} lacks tensors that the others have: {some_of(names)}.",
                "Nobody can tell what they should be in this model.",
                "Check that the models belong together. If so, set policies."
                + ("missing_tensors: base (they then count as unchanged)." if recipe.base is not None
                   else "extra_tensors: copy (they are then taken from the first model that has them).")))


def _check_types(alignment: Alignment) -> None:
    """Data types that can be merged or copied, alone and together; adds a problem for each other one."""
    strange: dict[str, list[str]] = {}
    mixed: dict[tuple[str, ...], list[str]] = {}
    for tensor in alignment.tensors:
        types = dict.fromkeys(s.dtype for s in (tensor.base, *tensor.experts) if s is not None)
        unknown = [t for t in types if t not in FLOATS and t not in COPIED_AS_THEY_ARE]
        for dtype in unknown:
            strange.setdefault(dtype, []).append(tensor.name)
        if len(types) > 1 and not unknown and not tensor.keep and not types.keys() <= FLOATS:
            mixed.setdefault(tuple(types), []).append(tensor.name)
    for kinds, names in mixed.items():
        alignment.problems.append(InputError(
            "E_DTYPE", f"{some_of(names)}: the models store it as {' and as '.join(kinds)}.",
            "Integers and bools are not averaged; they are copied if they are the same in all models.",
            "Check that the models belong together."))
    for dtype, names in strange.items():
        alignment.problems.append(InputError(
            "E_DTYPE", f"{some_of(names)}: data type {dtype} cannot be merged.",
            "Merging takes float16, bfloat16, float32 and float64; integers and bools are copied if equal.",
            "Use the checkpoint in its original precision, or convert it first."))


def some_of(names: Sequence[str]) -> str:
    """The names, or the first few of them and how many more there are."""
    shown = ", ".join(list(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
