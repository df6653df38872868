"""Which layers of which models make up which block of the output, and at what depth.

The layer fraction t, at which depth gradients are read, follows mergekit 0.1.5 (measured, see
``tests/oracles/measure_mergekit_parameters.py``): block i of a run of n blocks has t = i / (n − 1), a run of
one block t = 1, and in a recipe with slices every slice is a run of its own. All tensors outside of blocks
have t = 0: the embeddings take models and parameters from the first slice, everything else (final norm,
head) from the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import RecipeError
from .recipe import Recipe
from .recipe_parts import Model

MAX_BLOCKS = 10_000


@dataclass(frozen=True, slots=True)
class BlockSource:
    """One block of one model, or its tensors outside of blocks."""

    model: str
    """``Model.key`` of the model."""
    block: int | None
    expert: int | None
    """Index in ``Recipe.experts``; None for the base."""


@dataclass(frozen=True, slots=True)
class OutputBlock:
    """One block of the output, or (``block`` None) its tensors before or after the blocks."""

    place: str
    """"before" (embeddings), "block", or "after" (everything else outside of blocks)."""
    block: int | None
    t: float
    slice_index: int | None
    base: BlockSource | None
    """What the experts are compared with. Where the method uses no base: whose tensors stay when a kind of
    tensor is not included; then None in slices that do not say which layers that would be."""
    sources: tuple[BlockSource, ...]


def place_of(kind: str) -> str:
    """The place of a tensor outside of blocks, from the kind that ``checkpoints.layout.role`` tells."""
    return "before" if kind == "embed" else "after"


def layer_fraction(index: int, count: int) -> float:
    """t of block ``index`` in a run of ``count`` blocks."""
    return index / (count - 1) if count > 1 else 1.0


def layer_plan(recipe: Recipe, block_counts: Mapping[str, int]) -> list[OutputBlock]:
    """All output blocks in order, between one entry for "before" and one for "after".

    ``block_counts``: for each ``Model.key`` of ``recipe.model_list`` the number of its blocks. RecipeError
    E_RECIPE_INPUTS if the models' depths differ (without slices) or a range leaves its model.
    """
    if recipe.slices is None:
        return _whole_models(recipe, block_counts)
    blocks: list[OutputBlock] = []
    for index, part in enumerate(recipe.slices):
        experts = recipe.slice_experts(index)
        base, base_start = _base_of_slice(recipe, index)
        count = part.sources[0].layers[1] - part.sources[0].layers[0]
        if len(blocks) + count > MAX_BLOCKS:
            raise RecipeError("E_RECIPE_INPUTS", f"The slices make more than {MAX_BLOCKS} blocks.")
        runs = [(recipe.experts[i].key, source.layers[0], i) for i, source in experts if source]
        for key, start, _ in [
            *runs,
            *([(base.key, base_start, None)] if base and base_start is not None else []),
        ]:
            _check_range(key, start, start + count, block_counts, index)
        for offset in range(count):
            blocks.append(
                OutputBlock(
                    "block",
                    len(blocks),
                    layer_fraction(offset, count),
                    index,
                    BlockSource(base.key, base_start + offset, None)
                    if base and base_start is not None
                    else None,
                    tuple(BlockSource(key, start + offset, expert) for key, start, expert in runs),
                )
            )
    return [_outside(recipe, "before", 0), *blocks, _outside(recipe, "after", len(recipe.slices) - 1)]


def _whole_models(recipe: Recipe, block_counts: Mapping[str, int]) -> list[OutputBlock]:
    counts = {model.key: block_counts[model.key] for model in recipe.model_list}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{key}: {count}" for key, count in counts.items())
        raise RecipeError(
            "E_RECIPE_INPUTS",
            f"The models have different numbers of blocks ({listed}).",
            "Blocks are merged one to one.",
            "Leave a model out, or say with slices which layers belong together.",
        )
    count = next(iter(counts.values()))
    blocks = [
        OutputBlock(
            "block",
            i,
            layer_fraction(i, count),
            None,
            BlockSource(recipe.base.key, i, None) if recipe.base else None,
            tuple(BlockSource(e.key, i, k) for k, e in enumerate(recipe.experts)),
        )
        for i in range(count)
    ]
    return [_outside(recipe, "before", None), *blocks, _outside(recipe, "after", None)]


def _outside(recipe: Recipe, place: str, index: int | None) -> OutputBlock:
    base = recipe.slice_base(recipe.slices[index] if recipe.slices and index is not None else None)
    sources = tuple(BlockSource(recipe.experts[i].key, None, i) for i, _ in recipe.slice_experts(index))
    return OutputBlock(place, None, 0.0, index, BlockSource(base.key, None, None) if base else None, sources)


def _base_of_slice(recipe: Recipe, index: int) -> tuple[Model | None, int | None]:
    """The base of a slice and its first layer (None: the slice does not say, and need not)."""
    assert recipe.slices is not None
    part = recipe.slices[index]
    base = recipe.slice_base(part)
    if base is None or not recipe.method_class.uses_base:
        return base, None
    listed = [source for source in part.sources if recipe.is_base(source, part)]
    return base, (listed or part.sources)[0].layers[0]


def _check_range(key: str, start: int, end: int, block_counts: Mapping[str, int], index: int) -> None:
    if end > block_counts[key]:
        raise RecipeError(
            "E_RECIPE_INPUTS",
            f"slices[{index}]: layers [{start}, {end}) of {key} do not exist.",
            f"It has {block_counts[key]} blocks, numbered from 0; the end is not included.",
            "Correct the range.",
        )
