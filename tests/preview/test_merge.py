"""A merge in memory gives the bytes of the written one, whatever was merged before it, and computes nothing twice."""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import merging.preview.merge as module
from merging.errors import Cancelled, InputError, NumbersError, OutputError, RecipeError
from merging.methods import METHODS, get_method
from merging.preview.merge import KeptMerge
from merging.recipe import Recipe
from merging.recipe_parameters import fields_of
from tests.engine_cases import CASES, Case, Zoo, each_case, make_zoo, recipe_for
from tests.small_checkpoints import family, llama_like, load, merge, raw, save

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "assets" / "demo"
SKILLS = ("sort", "reverse", "rotate", "unique")
STRENGTHS: dict[str, tuple[str, float]] = {
    "weight": ("own", 0.4), "scale": ("own", 0.75), "lambda": ("shared", 0.55), "t": ("shared", 0.6)}  # fmt: skip
PREPARES_NOTHING = {"linear", "task_arithmetic", "passthrough"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def written(data: Mapping[str, Any], folder: Path) -> dict[str, bytes]:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    merge(Recipe.parse(data), out)
    return {name: raw(tensor) for name, tensor in load(out).items()}


def held(kept: KeptMerge) -> dict[str, bytes]:
    return {name: source.data.tobytes() for name, (_, source) in kept.results.items()}


def stronger(data: Mapping[str, Any], which: str) -> dict[str, Any]:
    """The recipe with another strength, of one expert or of all."""
    where, value = STRENGTHS[which]
    changed = copy.deepcopy(dict(data))
    changed.setdefault("parameters", {})
    if where == "own":
        changed["experts"][0] = experts_own(changed["experts"][0], **{which: value})
    else:
        changed["parameters"][which] = value
    return changed


def experts_own(expert: Any, **parameters: Any) -> dict[str, Any]:
    expert = {"model": expert} if isinstance(expert, str) else expert
    return expert | {"parameters": expert.get("parameters", {}) | parameters}


def strengths_of(case: Case) -> list[str]:
    cls = get_method(case.method)
    return sorted(STRENGTHS.keys() & {*fields_of(cls.Shared), *fields_of(cls.PerExpert)})


def test_the_cases_cover_all_methods() -> None:
    assert {case.method for case in CASES} | {"dare_linear"} == set(METHODS)
    assert all(strengths_of(case) for case in CASES)


@each_case
def test_changed_strengths_reuse_what_was_prepared_and_give_the_same_bytes(
    zoo: Zoo, case: Case, tmp_path: Path
) -> None:
    data, kept = recipe_for(case, zoo.paths).to_data(), KeptMerge()
    first = kept.merge(data)
    assert first["complete"] and first["reused"] == 0
    assert held(kept) == written(data, tmp_path)
    for which in strengths_of(case):
        data = stronger(data, which)
        told, expected = kept.merge(data), written(data, tmp_path)
        assert held(kept) == expected
        merged = [t for t in kept.plan.tensors if t.method is not None]
        assert told["changed_tensors"] == len(merged) > 5
        assert told["reused"] == (0 if case.method in PREPARES_NOTHING else len(merged))


@pytest.mark.parametrize("case", [c for c in CASES if c.method not in PREPARES_NOTHING], ids=lambda c: c.id)
def test_what_was_prepared_is_not_used_up_by_using_it(zoo: Zoo, case: Case, tmp_path: Path) -> None:
    """Thresholds with ties count down while they are used."""
    data, kept = recipe_for(case, zoo.paths).to_data(), KeptMerge()
    which = strengths_of(case)[0]
    kept.merge(data)
    kept.merge(stronger(data, which))
    kept.merge(data)
    assert held(kept) == written(data, tmp_path)


def test_other_thresholds_are_searched_anew(zoo: Zoo, tmp_path: Path) -> None:
    kept = KeptMerge()
    for id_, change in [("ties", {"density": 0.2}), ("dare-l1", {"density": 0.2}), ("ties-global", {"density": 0.2})]:
        data = recipe_for(next(c for c in CASES if c.id == id_), zoo.paths).to_data()
        kept.merge(data)
        data["experts"][1] = experts_own(data["experts"][1], **change)
        assert kept.merge(data)["reused"] == 0
        assert held(kept) == written(data, tmp_path)
    data = recipe_for(next(c for c in CASES if c.id == "pcb"), zoo.paths).to_data()
    for shared in ({"ratio": 0.4}, {"clip": 0.1}, {"variant": "A"}, {"scope": "global"}):
        kept.merge(data)
        data["parameters"] = data.get("parameters", {}) | shared
        assert kept.merge(data)["reused"] == 0
        assert held(kept) == written(data, tmp_path)


def test_one_preview_follows_from_method_to_method_and_model_to_model(zoo: Zoo, tmp_path: Path) -> None:
    kept = KeptMerge()
    for case in CASES:
        for paths in (zoo.paths, [zoo.paths[0], *reversed(zoo.paths[1:])]):
            data = recipe_for(case, paths).to_data()
            kept.merge(data)
            assert held(kept) == written(data, tmp_path)


@pytest.mark.parametrize("change", [
    {"seed": 6}, {"dtype": "float32"}, {"include": {"norms": False}}, {"include": {"embeddings": False, "head": False}},
    {"parameters": {"lambda": [0, 1]}}, {"parameters": {"rescale": "none"}},
])  # fmt: skip
def test_every_setting_is_seen(zoo: Zoo, tmp_path: Path, change: dict[str, Any]) -> None:
    case = next(c for c in CASES if c.id == "dare-l1")
    before, kept = recipe_for(case, zoo.paths).to_data(), KeptMerge()
    kept.merge(before)
    after = before | change
    assert kept.merge(after)["changed_tensors"] > 0
    assert held(kept) == written(after, tmp_path) != written(before, tmp_path)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "pcb", "multislerp"])
def test_the_demo_experts(tmp_path: Path, method: str) -> None:
    data, kept = demo(method), KeptMerge()
    for value in (1.0, 0.5):
        for expert in data["experts"]:
            expert["parameters"]["weight"] = value * (1 if expert["name"] == "sort" else 0.8)
        kept.merge(data)
        assert held(kept) == written(data, tmp_path)


def demo(method: str, **fields: Any) -> dict[str, Any]:
    experts = [{"model": str(DEMO / "experts" / name), "name": name, "parameters": {"weight": 0.4}} for name in SKILLS]
    return {"base": str(DEMO / "base"), "experts": experts, "method": method} | fields


@pytest.mark.parametrize("id_", ["ties-global", "pcb-global"])
def test_a_global_rule_sees_that_others_are_ranked_with_it(zoo: Zoo, tmp_path: Path, id_: str) -> None:
    data, kept = recipe_for(next(c for c in CASES if c.id == id_), zoo.paths).to_data(), KeptMerge()
    kept.merge(data)
    before = held(kept)
    data["include"] = {"embeddings": False}
    assert kept.merge(data)["changed_tensors"] == len([t for t in kept.plan.tensors if t.method is not None]) + 1
    assert held(kept) == written(data, tmp_path)
    assert held(kept)["lm_head.weight"] != before["lm_head.weight"]


# -- nothing twice ----------------------------------------------------------------------------------------------------


def test_only_tensors_that_a_change_touches_are_computed(zoo: Zoo, tmp_path: Path) -> None:
    data, kept = recipe_for(CASES[1], zoo.paths).to_data(), KeptMerge()
    assert kept.merge(data)["changed_tensors"] == len(kept.plan.tensors)
    assert kept.merge(data)["changed_tensors"] == 0
    data["parameters"]["lambda"] = [{"filter": "layers.1.mlp", "value": 0.1}, {"value": 0.6}]
    assert kept.merge(data)["changed_tensors"] == 2
    assert held(kept) == written(data, tmp_path)


def test_some_tensors_only(zoo: Zoo, tmp_path: Path) -> None:
    data, kept = recipe_for(CASES[2], zoo.paths).to_data(), KeptMerge()
    names = ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
    told = kept.merge(data, names)
    assert (told["changed_tensors"], told["complete"], kept.plan) == (2, False, None)
    expected = written(data, tmp_path)
    assert held(kept) == {name: expected[name] for name in names}
    assert kept.merge(data)["changed_tensors"] == len(expected) - 2
    assert held(kept) == expected
    with pytest.raises(InputError, match="E_MISSING_TENSOR"):
        kept.merge(data, ["nothing"])


def test_an_expert_switched_off_and_on(zoo: Zoo, tmp_path: Path) -> None:
    kept, both = KeptMerge(), recipe_for(CASES[2], zoo.paths).to_data()
    one = both | {"experts": both["experts"][:1]}
    for data in (both, one, both):
        kept.merge(data)
        assert held(kept) == written(data, tmp_path)


def test_a_file_that_changed_is_read_again(zoo: Zoo, tmp_path: Path) -> None:
    paths = [shutil.copytree(path, tmp_path / path.name) for path in zoo.paths]
    data, kept = recipe_for(CASES[2], paths).to_data(), KeptMerge()
    kept.merge(data)
    state = load_file(paths[1] / "model.safetensors")
    state["model.norm.weight"] += 1
    save_file(state, paths[1] / "model.safetensors", {"format": "pt"})
    assert kept.merge(data)["changed_tensors"] > 0
    assert held(kept) == written(data, tmp_path)


def test_models_that_are_not_needed_any_more_are_let_go(zoo: Zoo) -> None:
    kept = KeptMerge()
    kept.merge(recipe_for(CASES[2], zoo.paths).to_data())
    three = sum(source.data.nbytes for source in kept.inputs.values())
    kept.merge(recipe_for(next(c for c in CASES if c.method == "slerp"), zoo.paths).to_data())
    assert sum(source.data.nbytes for source in kept.inputs.values()) == pytest.approx(three * 2 / 3, rel=0.01)


# -- workers, memory, stops, errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("id_", ["ties", "ties-global", "slerp", "pcb-global"])
def test_worker_processes_give_the_same(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, id_: str
) -> None:
    monkeypatch.setattr(module, "FORK_FROM", 0)
    case = next(c for c in CASES if c.id == id_)
    data, kept = recipe_for(case, zoo.paths).to_data(), KeptMerge(threads=2)
    kept.merge(data)
    assert held(kept) == written(data, tmp_path)
    data = stronger(data, strengths_of(case)[0])
    assert kept.merge(data)["reused"] > 5
    assert held(kept) == written(data, tmp_path)


def test_models_that_do_not_fit_are_read_from_their_files(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, kept = recipe_for(CASES[2], zoo.paths).to_data(), KeptMerge()
    everything = module.cost_of
    monkeypatch.setattr(module, "cost_of", lambda *a, **k: everything(
        *a, **k, free=everything(*a, **k).bytes_needed - 1_000_000 - a[3]))  # fmt: skip
    kept.merge(data)
    assert not kept.inputs and held(kept) == written(data, tmp_path)


def test_too_little_memory_is_said_before_anything_is_read(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = module.cost_of
    monkeypatch.setattr(module, "cost_of", lambda plan, *rest: everything(plan, *rest[:2], free=1000))
    monkeypatch.setattr(KeptMerge, "read", lambda self, source: pytest.fail("read"))
    with pytest.raises(OutputError, match="E_MEMORY") as caught:
        KeptMerge().merge(recipe_for(CASES[2], zoo.paths).to_data())
    assert "are free" in caught.value.why


def test_a_stop_in_the_middle_leaves_what_is_finished(zoo: Zoo, tmp_path: Path) -> None:
    data, stop = recipe_for(CASES[2], zoo.paths).to_data(), threading.Event()
    kept = KeptMerge(stop=stop)
    keep, seen = kept.keep, []

    def keep_and_stop(*arguments: Any) -> None:
        keep(*arguments)
        seen.append(arguments)
        if len(seen) == 3:
            stop.set()

    kept.keep = keep_and_stop  # type: ignore[method-assign]
    with pytest.raises(Cancelled):
        kept.merge(data)
    finished = len(kept.results)
    assert kept.plan is None and finished in (3, 4)  # a tensor without elements has no block to be stopped at
    stop.clear()
    assert kept.merge(data)["changed_tensors"] == len(kept.plan.tensors) - finished
    assert held(kept) == written(data, tmp_path)


def test_what_a_written_merge_refuses_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    paths = [shutil.copytree(path, tmp_path / path.name) for path in zoo.paths]
    state = load_file(paths[2] / "model.safetensors")
    state["model.norm.weight"][2] = np.inf
    save_file(state, paths[2] / "model.safetensors", {"format": "pt"})
    kept = KeptMerge()
    with pytest.raises(NumbersError, match="E_NOT_FINITE") as caught:
        kept.merge(recipe_for(CASES[2], paths).to_data())
    assert str(paths[2]) in caught.value.what and kept.plan is None
    with pytest.raises(RecipeError, match="E_RECIPE_FIELD"):
        kept.merge({"method": "ties", "experts": ["a"], "wrong": 1})


# -- inputs that are not plain files ----------------------------------------------------------------------------------


def both_strengths(data: dict[str, Any], folder: Path) -> KeptMerge:
    kept = KeptMerge()
    for weight in (0.5, 0.8, 0.5):
        data["parameters"] = {"weight": weight}
        kept.merge(data)
        assert held(kept) == written(data, folder)
    assert kept.reused > 0
    return kept


def test_an_adapter_as_an_expert(tmp_path: Path) -> None:
    paths = family(tmp_path, llama_like(2, 16, torch.bfloat16), 1)
    (adapter := tmp_path / "adapter").mkdir()
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{prefix}.lora_A.weight": torch.randn(2, 16), f"{prefix}.lora_B.weight": torch.randn(16, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    experts = [{"model": str(paths[0]), "adapter": str(adapter)}, str(paths[1])]
    kept = both_strengths({"base": str(paths[0]), "experts": experts, "method": "ties"}, tmp_path)
    # what the adapter leaves alone is the base's, and kept once
    assert len(kept.inputs) == 2 * len(kept.results) + 1


def test_stacked_layers_and_heads_of_tied_models(tmp_path: Path) -> None:
    tied = save(tmp_path / "tied", llama_like(3, 16, head=False, seed=1))
    paths = [save(tmp_path / str(k), llama_like(3, 16, seed=k)) for k in (2, 3)]
    for path in (tied, *paths):  # as files from an archive: of one size and one time, and yet not the same
        os.utime(path / "model.safetensors", (1_600_000_000, 1_600_000_000))
    both_strengths({"base": str(paths[0]), "experts": [str(tied), str(paths[1])], "method": "ties"}, tmp_path)
    slices = [{"sources": [{"model": str(paths[1]), "layers": [0, 2]}, {"model": str(tied), "layers": [1, 3]}]},
              {"sources": [{"model": str(paths[1]), "layers": [0, 2]}, {"model": str(tied), "layers": [0, 2]}]}]  # fmt: skip
    both_strengths({"base": str(paths[0]), "experts": [str(paths[1]), str(tied)], "method": "nuslerp",
                    "slices": slices}, tmp_path)  # fmt: skip


def test_different_vocabularies(tmp_path: Path) -> None:
    words = [["<unk>", "a", "b", "c"], ["<unk>", "b", "a", "c", "d"], ["<unk>", "c", "a", "b"]]
    paths = [with_vocabulary(tmp_path / str(k), listed, k) for k, listed in enumerate(words)]
    data = {"base": str(paths[0]), "experts": [str(path) for path in paths[1:]], "method": "ties",
            "tokenizer": {"source": "union"}}  # fmt: skip
    kept = both_strengths(data, tmp_path)
    assert kept.results["model.embed_tokens.weight"][1].shape == (5, 16)
    data["tokenizer"] = {"source": "base"}
    kept.merge(data)
    assert held(kept) == written(data, tmp_path)


def with_vocabulary(folder: Path, words: list[str], seed: int) -> Path:
    from tokenizers import Tokenizer, models

    state = llama_like(1, 16, seed=seed)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.randn(len(words), 16)
    save(folder, state, config={"model_type": "llama", "vocab_size": len(words)})
    numbers = {word: number for number, word in enumerate(words)}
    Tokenizer(models.WordLevel(numbers, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    return folder
