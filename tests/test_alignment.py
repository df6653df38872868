"""Which tensors meet which: every way in which models of one family differ has one rule, and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merging.alignment import Alignment, align_tensors
from merging.checkpoints.checkpoint import Source
from merging.checkpoints.header import ITEM_BITS, TORCH_NAMES
from merging.errors import RecipeError
from merging.plan import make_plan, open_models
from merging.recipe import Recipe
from tests.small_checkpoints import (
    State,
    llama_like,
    load,
    merge,
    raw,
    recipe,
    same_bits,
    save,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BIAS = "model.layers.1.mlp.up_proj.bias"
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


def aligned(what: Recipe) -> Alignment:
    models, _, _ = open_models(what)
    try:
        return align_tensors(what, models)
    finally:
        for model in models.values():
            model.close()


def values(source: Source) -> Tensor:
    buffer = bytearray(source.numel * ITEM_BITS[source.dtype] // 8)
    source.read(0, source.numel, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=getattr(torch, TORCH_NAMES[source.dtype])).view(source.shape)


def without(state: State, *names: str) -> State:
    return {name: tensor for name, tensor in state.items() if name not in names}


def messages(alignment: Alignment) -> dict[str, str]:
    return {problem.code: str(problem) for problem in alignment.problems}


def stack(*parts: tuple[Path, int, int], **fields: Any) -> Recipe:
    experts = list(dict.fromkeys(str(path) for path, _, _ in parts))
    slices = [{"sources": [{"model": str(path), "layers": [first, end]}]} for path, first, end in parts]
    return Recipe.parse({"method": "passthrough", "experts": experts, "slices": slices, **fields})


# -- heads and embeddings -----------------------------------------------------------------------------


@pytest.mark.parametrize("untied", [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_a_tied_head_is_the_embedding(tmp_path: Path, untied: tuple[int, ...], method: str) -> None:
    """Models 0 (the base, where there is one), 1 and 2; those in ``untied`` have a head of their own."""
    states = [llama_like(1, head=k in untied, seed=k) for k in range(3)]
    paths = [save(tmp_path / str(k), state) for k, state in enumerate(states)]
    base, experts = (paths[0], paths[1:]) if method == "task_arithmetic" else (None, paths)
    what = recipe(method, experts, base, parameters={"weight": 0.5})
    found = aligned(what)
    assert found.problems == []
    assert found.has_head is bool(untied)
    heads = [t for t in found.tensors if t.name == HEAD]
    assert bool(heads) == bool(untied)
    assert [bool(untied) and len(untied) < 3] == [any("tied" in note for note in found.notes)]
    for tensor in heads:
        sources = [*([tensor.base] if tensor.base else []), *tensor.experts]
        for source, state in zip(sources, states, strict=True):
            assert torch.equal(values(source), state.get(HEAD, state[EMBEDDING]))


def test_a_tied_model_merged_with_an_untied_one(tmp_path: Path) -> None:
    tied = save(tmp_path / "tied", llama_like(1, head=False, seed=1), config={"tie_word_embeddings": True})
    untied = save(tmp_path / "untied", llama_like(1, seed=2), config={"tie_word_embeddings": False})
    merge(recipe("linear", [tied, untied], parameters={"weight": 0.5}), tmp_path / "out")
    result, first, second = load(tmp_path / "out"), load(tied), load(untied)
    expected = ((first[EMBEDDING].double() + second[HEAD].double()) / 2).float()
    assert torch.equal(result[HEAD], expected)
    assert not torch.equal(result[HEAD], result[EMBEDDING])


@pytest.mark.parametrize("last_is_tied", [True, False])
def test_stacked_layers_keep_the_head_that_belongs_to_the_last(tmp_path: Path, last_is_tied: bool) -> None:
    """A tied model on top of an untied one: its head is its own embedding, not the embedding below."""
    untied = save(tmp_path / "untied", llama_like(2, seed=1))
    tied = save(tmp_path / "tied", llama_like(2, head=False, seed=2))
    below, above = (untied, tied) if last_is_tied else (tied, untied)
    merge(stack((below, 0, 1), (above, 1, 2)), tmp_path / "out")
    result = load(tmp_path / "out")
    assert torch.equal(result[EMBEDDING], load(below)[EMBEDDING])
    assert torch.equal(result[HEAD], load(tied)[EMBEDDING] if last_is_tied else load(untied)[HEAD])


def test_an_untied_model_in_the_middle_does_not_untie_the_output(tmp_path: Path) -> None:
    tied = save(tmp_path / "tied", llama_like(2, head=False, seed=1))
    untied = save(tmp_path / "untied", llama_like(2, seed=2))
    found = aligned(stack((tied, 0, 1), (untied, 1, 2), (tied, 1, 2)))
    assert found.has_head is False
    assert HEAD not in {t.name for t in found.tensors}


def test_models_without_token_embedding_have_no_head_to_speak_of(tmp_path: Path) -> None:
    paths = [save(tmp_path / str(k), {"vit.layer.0.weight": torch.ones(2, 2)}) for k in range(2)]
    assert aligned(recipe("linear", paths, parameters={"weight": 1})).has_head is None


# -- tensors that not all models have -----------------------------------------------------------------

POLICIES: list[dict[str, str]] = [
    {},
    {"extra_tensors": "drop"},
    {"extra_tensors": "copy"},
    {"missing_tensors": "base"},
    {"missing_tensors": "base", "extra_tensors": "drop"},
]


@pytest.mark.parametrize("policies", POLICIES, ids=str)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("lacking", [0, 1, 2])
def test_a_tensor_that_one_model_lacks(tmp_path: Path, method: str, lacking: int, policies: dict[str, str]) -> None:
    """Of three models (the first is the base, where there is one) one lacks a bias."""
    full = [llama_like(2, seed=k) | {BIAS: torch.full((16,), float(k + 1))} for k in range(3)]
    states = [without(state, BIAS) if k == lacking else state for k, state in enumerate(full)]
    paths = [save(tmp_path / str(k), state) for k, state in enumerate(states)]
    base, experts = (paths[0], paths[1:]) if method == "task_arithmetic" else (None, paths)
    what = recipe(method, experts, base, parameters={"weight": 0.5, "normalize": False}, policies=policies)
    plan = make_plan(what)
    extra, missing = policies.get("extra_tensors", "refuse"), policies.get("missing_tensors", "refuse")
    lacks_first = lacking == 0
    text = "\n".join(map(str, plan.blockers))
    names = {t.name for t in plan.tensors}
    if lacks_first and extra == "refuse":
        assert {b.code for b in plan.blockers} == {"E_EXTRA_TENSOR"} and BIAS in text
        assert all(str(path) in text for path in paths[1:])
        return
    if not lacks_first and not (base and missing == "base") and not (base is None and extra == "copy"):
        assert [b.code for b in plan.blockers] == ["E_MISSING_TENSOR"]
        assert BIAS in text and str(paths[lacking]) in text and "policies." in text
        return
    assert plan.blockers == []
    assert any(BIAS in note for note in plan.alignment.notes), "never silently"
    merge(what, tmp_path / "out")
    result = load(tmp_path / "out")
    if lacks_first and extra == "drop":
        assert BIAS not in names | result.keys()
        return
    if base and not lacks_first:  # the one that lacks it counts as unchanged
        other = 3 - lacking
        expected = full[0][BIAS] + 0.5 * (full[other][BIAS] - full[0][BIAS])
    else:  # copied from the first model that has it
        expected = full[1 if lacks_first else 0][BIAS]
    assert torch.equal(result[BIAS], expected)


def test_what_was_done_is_said_once_and_not_once_per_tensor(tmp_path: Path) -> None:
    base, expert = llama_like(9), llama_like(9, seed=1)
    more = {f"model.layers.{i}.mlp.extra.weight": torch.ones(2) for i in range(9)}
    paths = [save(tmp_path / "base", base | more), save(tmp_path / "expert", expert)]
    what = recipe("task_arithmetic", [(paths[1], {"weight": 1.5})], paths[0], policies={"missing_tensors": "base"})
    notes = [note for note in aligned(what).notes if "mlp.extra" in note]
    assert len(notes) == 1 and "and 4 more" in notes[0]
    paths = [save(tmp_path / "base2", base), save(tmp_path / "expert2", expert | more)]
    what = recipe("task_arithmetic", [(paths[1], {"weight": 1.5})], paths[0], policies={"extra_tensors": "drop"})
    notes = [note for note in aligned(what).notes if "mlp.extra" in note]
    assert len(notes) == 1 and "and 4 more" in notes[0]


def test_an_error_lists_a_few_names_and_counts_the_rest(tmp_path: Path) -> None:
    state = llama_like(3)
    paths = [save(tmp_path / "a", state), save(tmp_path / "b", {"model.norm.weight": torch.ones(8)})]
    with pytest.raises(RecipeError) as raised:  # without its blocks it is another architecture
        aligned(recipe("linear", paths, parameters={"weight": 1}))
    assert raised.value.code == "E_RECIPE_INPUTS" and "3" in str(raised.value) and "0" in str(raised.value)
    shorter = without(state, *[n for n in state if "mlp" in n])
    paths = [save(tmp_path / "c", state), save(tmp_path / "d", shorter)]
    text = messages(aligned(recipe("linear", paths, parameters={"weight": 1})))["E_MISSING_TENSOR"]
    assert "and 1 more" in text and text.count("mlp") == 5


# -- buffers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_buffers_are_never_merged(tmp_path: Path, method: str) -> None:
    """Each model's own: of the base, or of the first; even where they differ."""
    states = [
        llama_like(1, seed=k)
        | {FREQUENCIES: torch.arange(4) + float(k), "model.embeddings.position_ids": torch.arange(5) + k}
        for k in range(3)
    ]
    paths = [save(tmp_path / str(k), state) for k, state in enumerate(states)]
    base, experts = (paths[0], paths[1:]) if method == "ties" else (None, paths)
    merge(recipe(method, experts, base, parameters={"weight": 0.5}), tmp_path / "out")
    result = load(tmp_path / "out")
    for name in (FREQUENCIES, "model.embeddings.position_ids"):
        assert raw(result[name]) == raw(states[0][name])


def test_buffers_that_only_experts_have_are_left_out(tmp_path: Path) -> None:
    base = save(tmp_path / "base", llama_like(1))
    expert = save(tmp_path / "expert", llama_like(1, seed=1) | {FREQUENCIES: torch.arange(4.0)})
    found = aligned(recipe("ties", [expert], base))
    assert found.problems == [] and FREQUENCIES not in {t.name for t in found.tensors}
    assert any(FREQUENCIES in note for note in found.notes)


def test_buffers_that_only_the_base_has_stay(tmp_path: Path) -> None:
    base = save(tmp_path / "base", llama_like(1) | {FREQUENCIES: torch.arange(4.0)})
    expert = save(tmp_path / "expert", llama_like(1, seed=1))
    merge(recipe("ties", [expert], base, parameters={"density": 0.3}), tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")[FREQUENCIES], torch.arange(4.0))


# -- shapes and types ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_shapes_must_agree_also_where_a_model_does_not_count(tmp_path: Path, weight: float) -> None:
    state = llama_like(2)
    wider = dict(state) | {f"model.layers.{i}.mlp.down_proj.weight": torch.ones(8, 24) for i in range(2)}
    paths = [save(tmp_path / "base", state), save(tmp_path / "good", state), save(tmp_path / "bad", wider)]
    what = recipe("task_arithmetic", [(paths[1], {"weight": 1.0}), (paths[2], {"weight": weight})], paths[0])
    (problem,) = make_plan(what).blockers
    assert problem.code == "E_SHAPE" and f"[8, 24] in {paths[2]}" in str(problem) and f"[8, 16] in {paths[1]}" in str(problem)
    assert all(f"layers.{i}.mlp.down_proj" in str(problem) for i in range(2))


def test_a_transposed_tensor_is_refused(tmp_path: Path) -> None:
    state = llama_like(1)
    name = "model.layers.0.mlp.down_proj.weight"
    paths = [save(tmp_path / "a", state), save(tmp_path / "b", state | {name: state[name].T})]
    (problem,) = make_plan(recipe("linear", paths, parameters={"weight": 1})).blockers
    assert problem.code == "E_SHAPE" and name in str(problem)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.int64, torch.int32),
        (torch.bool, torch.uint8),
        (torch.int64, torch.float32),
        (torch.float32, torch.int64),
        (torch.float16, torch.bool),
    ],
)
def test_integers_do_not_mix_with_anything(tmp_path: Path, first: Any, second: Any) -> None:
    paths = [
        save(tmp_path / str(dtype), llama_like(1) | {"counter": torch.ones(3, dtype=dtype)})
        for dtype in (first, second)
    ]
    (problem,) = make_plan(recipe("linear", paths, parameters={"weight": 1})).blockers
    assert problem.code == "E_DTYPE" and "counter" in str(problem)


# -- slices -------------------------------------------------------------------------------------------


def test_stacking_renumbers_blocks_and_copies_bits(tmp_path: Path) -> None:
    one, two = llama_like(4, seed=1), llama_like(3, seed=2)
    paths = [save(tmp_path / "one", one, shards=2), save(tmp_path / "two", two)]
    what = stack((paths[0], 0, 3), (paths[1], 1, 3), (paths[0], 2, 4))
    found = aligned(what)
    assert found.problems == []
    donors = [(one, 0), (one, 1), (one, 2), (two, 1), (two, 2), (one, 2), (one, 3)]
    assert [(b.model, b.block) for b in found.blocks] == [
        (str(paths[0] if state is one else paths[1]), block) for state, block in donors
    ]
    expected = {EMBEDDING: one[EMBEDDING], "model.norm.weight": one["model.norm.weight"], HEAD: one[HEAD]}
    for new, (state, old) in enumerate(donors):
        prefix = f"model.layers.{old}."
        expected |= {n.replace(prefix, f"model.layers.{new}."): t for n, t in state.items() if n.startswith(prefix)}
    merge(what, tmp_path / "out")
    assert same_bits(load(tmp_path / "out"), expected)


def test_one_block_may_be_stacked_many_times(tmp_path: Path) -> None:
    path = save(tmp_path / "m", llama_like(2))
    found = aligned(stack(*[(path, 1, 2)] * 12))
    names = [t.name for t in found.tensors]
    assert len(found.blocks) == 12 and len(set(names)) == len(names)
    assert "model.layers.11.mlp.up_proj.weight" in names and "model.layers.12.mlp.up_proj.weight" not in names


def test_slices_of_equal_ranges_merge_block_by_block(tmp_path: Path) -> None:
    """Two runs of one block each, the second one made from other blocks than it becomes."""
    base, expert = llama_like(3), llama_like(3, seed=1)
    paths = [save(tmp_path / "base", base), save(tmp_path / "expert", expert)]
    sources = [
        [{"model": str(paths[0]), "layers": [0, 1]}, {"model": str(paths[1]), "layers": [2, 3]}],
        [{"model": str(paths[0]), "layers": [2, 3]}, {"model": str(paths[1]), "layers": [0, 1]}],
    ]
    what = Recipe.parse({
        "method": "slerp", "base": str(paths[0]), "experts": [str(paths[1])], "parameters": {"t": 0.5},
        "slices": [{"sources": s} for s in sources]})  # fmt: skip
    found = aligned(what)
    by_name = {t.name: t for t in found.tensors}
    for block, (theirs, others) in enumerate([(0, 2), (2, 0)]):
        tensor = by_name[f"model.layers.{block}.mlp.up_proj.weight"]
        assert tensor.base is not None and tensor.t == 1.0 and tensor.slice_index == block
        assert torch.equal(values(tensor.base), base[f"model.layers.{theirs}.mlp.up_proj.weight"])
        assert torch.equal(values(tensor.experts[0]), expert[f"model.layers.{others}.mlp.up_proj.weight"])
        assert tensor.names == [f"model.layers.{others}.mlp.up_proj.weight"]
    assert "model.layers.2.mlp.up_proj.weight" not in by_name


def test_a_range_that_leaves_the_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m", llama_like(2))
    with pytest.raises(RecipeError, match=r"\[1, 3\)"):
        aligned(stack((path, 1, 3)))


def test_different_depths_are_refused_without_slices(tmp_path: Path) -> None:
    paths = [save(tmp_path / str(n), llama_like(n)) for n in (2, 3)]
    with pytest.raises(RecipeError, match="slices"):
        aligned(recipe("linear", paths, parameters={"weight": 1}))


def test_output_tensors_stand_in_the_order_of_the_first_model(tmp_path: Path) -> None:
    paths = [save(tmp_path / str(k), llama_like(2, seed=k), shards=1 + 2 * k) for k in range(2)]
    models, _, _ = open_models(recipe("linear", paths, parameters={"weight": 1}))
    first = models[str(paths[0])]
    assert [t.name for t in aligned(recipe("linear", paths, parameters={"weight": 1})).tensors] == list(first.tensors)
    for model in models.values():
        model.close()
