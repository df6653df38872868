"""Every finding can be made to appear by a set of models that has the defect, and stays away where it has not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merging.analysis.changes import measure_changes
from merging.analysis.doctor import SEVERITIES, Finding, examine, look
from merging.analysis.models import open_models
from merging.analysis.sampling import take_sample
from merging.analysis.spectra import measure_spectra
from tests.small_checkpoints import State, llama_like, save

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo"
CONFIG = {"model_type": "llama", "rope_theta": 10000.0, "num_attention_heads": 2}


def noise(state: Mapping[str, Tensor], scale: float = 0.01, seed: int = 1) -> State:
    """A model beside ``state``."""
    generator = torch.Generator().manual_seed(seed)
    return {n: (t + torch.randn(t.shape, generator=generator) * scale).to(t.dtype) for n, t in state.items()}


def findings(
    base: Path, experts: list[Path], merged: Path | None = None, exact: bool = False, **options: Any
) -> dict[str, Finding]:
    """All findings by their code."""
    with open_models(str(base), [str(e) for e in experts], str(merged) if merged else None) as models:
        changes = measure_changes(models, threads=1) if exact else None
        found = examine(models, changes=changes, **options)
    ranks = [SEVERITIES.index(one.severity) for one in found]
    assert ranks == sorted(ranks), "worst first"
    for one in found:
        assert one.title and one.evidence and (one.remedy or one.severity == "ok")
        assert one.number is None or math.isfinite(one.number)
        assert one.basis in ("headers", "files", "exact", "sampled", "estimated")
    assert len({one.code for one in found}) == len(found)
    return {one.code: one for one in found}


def pair(folder: Path, change: Callable[[State], State] = noise, **options: Any) -> dict[str, Finding]:
    """A base, a sound expert, and one made by ``change``."""
    base = llama_like(2, 16)
    paths = [
        save(folder / "base", base, config=CONFIG),
        save(folder / "sound", noise(base, seed=2), config=CONFIG),
        save(folder / "other", change(base), config=CONFIG),
    ]
    return findings(paths[0], paths[1:], **options)


# -- all is well --------------------------------------------------------------------------------------------------


def test_the_demo_has_no_problem() -> None:
    experts = [DEMO / "experts" / name for name in ("reverse", "sort", "unique", "rotate")]
    found = findings(DEMO / "base", experts, exact=True)
    assert {one.severity for one in found.values()} == {"note", "ok"}
    assert found["base"].severity == "ok" and 0.02 < (found["base"].number or 0) < 0.04
    assert set(found) >= {"architecture", "tensors", "dtype", "tied_head", "vocabulary_rows", "tokenizer", "direction",
                          "untouched", "norms", "rank", "survival", "conflict"}  # fmt: skip


def test_quick_and_exact_agree_where_the_sample_is_everything(tmp_path: Path) -> None:
    quick, exact = pair(tmp_path / "a"), pair(tmp_path / "b", exact=True)
    assert quick["norms"].number == pytest.approx(exact["norms"].number, rel=1e-5)
    assert quick["base"].number == pytest.approx(exact["base"].number, rel=1e-5)
    assert quick["direction"].number == pytest.approx(exact["direction"].number, abs=1e-5)
    assert quick["norms"].basis == exact["norms"].basis == "exact"


# -- headers and files --------------------------------------------------------------------------------------------


def test_different_architectures(tmp_path: Path) -> None:
    base = llama_like(1, 8)
    one = save(tmp_path / "base", base, config=CONFIG)
    two = save(tmp_path / "expert", noise(base), config=CONFIG | {"model_type": "qwen2"})
    found = findings(one, [two])["architecture"]
    assert found.severity == "problem" and "qwen2" in found.evidence


@pytest.mark.parametrize("nested", [False, True])
def test_settings_that_change_what_the_weights_mean(tmp_path: Path, nested: bool) -> None:
    base, other = llama_like(1, 8), CONFIG | {"rope_theta": 1e6}
    one = save(tmp_path / "base", base, config={"model_type": "x", "text_config": CONFIG} if nested else CONFIG)
    two = save(tmp_path / "expert", noise(base), config={"model_type": "x", "text_config": other} if nested else other)
    found = findings(one, [two])["architecture"]
    assert found.severity == "warning" and "rope_theta" in found.title and "1000000" in found.evidence


def test_a_model_without_configuration(tmp_path: Path) -> None:
    base = llama_like(1, 8)
    found = findings(save(tmp_path / "base", base), [save(tmp_path / "expert", noise(base), config=CONFIG)])
    assert found["architecture"].severity == "note" and "base" in found["architecture"].evidence


def test_other_shapes_and_missing_tensors(tmp_path: Path) -> None:
    def wider(state: State) -> State:
        return noise(state) | {"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 16)}

    found = pair(tmp_path / "a", wider)["tensors"]
    assert found.severity == "problem" and found.number == 1 and "up_proj" in found.evidence

    def fewer(state: State) -> State:
        return {n: t for n, t in noise(state).items() if "layers.1" not in n}

    found = pair(tmp_path / "b", fewer)["tensors"]
    assert found.severity == "warning" and found.number == 5
    assert "missing_tensors: base" in found.remedy and "extra_tensors: drop" in found.remedy


def test_buffers_are_nobodys_business(tmp_path: Path) -> None:
    def buffers(state: State) -> State:
        return noise(state) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}

    assert pair(tmp_path, buffers)["tensors"].severity == "ok"


def test_number_types(tmp_path: Path) -> None:
    found = pair(tmp_path, lambda state: {n: t.bfloat16() for n, t in noise(state).items()})["dtype"]
    assert found.severity == "note" and "bfloat16: other" in found.evidence and "dtype: float32" in found.remedy


def test_tied_heads(tmp_path: Path) -> None:
    found = pair(tmp_path, lambda state: {n: t for n, t in noise(state).items() if n != "lm_head.weight"})["tied_head"]
    assert found.severity == "note" and "Tied: other" in found.evidence and "head: false" in found.remedy


def tokenizer(folder: Path, tokens: list[str], template: str | None = None) -> None:
    vocabulary = {"model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    settings = {"tokenizer_class": "X"} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


TOKENS = [f"t{i}" for i in range(18)]


@pytest.mark.parametrize(
    ("theirs", "severity", "text"),
    [
        (TOKENS, "ok", "same tokens"),
        ([*TOKENS, "<new>"], "warning", "1 more ('<new>')"),
        (TOKENS[:-1], "warning", "1 fewer"),
        ([*TOKENS[1:], TOKENS[0]], "warning", "18 numbered otherwise"),
    ],
)
def test_vocabularies(tmp_path: Path, theirs: list[str], severity: str, text: str) -> None:
    base = llama_like(1, 8)
    paths = [save(tmp_path / name, noise(base, seed=k), config=CONFIG) for k, name in enumerate(("base", "expert"))]
    tokenizer(paths[0], TOKENS)
    tokenizer(paths[1], theirs)
    found = findings(paths[0], paths[1:])
    assert found["tokenizer"].severity == severity and text in found["tokenizer"].evidence
    assert found["vocabulary_rows"].severity == "ok" and found["vocabulary_rows"].number == 2  # 20 rows, 18 tokens
    if severity != "ok":
        assert "tokenizer: {source: base}" in found["tokenizer"].remedy


def test_one_file_written_in_two_ways_is_one_vocabulary(tmp_path: Path) -> None:
    base = llama_like(1, 8)
    paths = [save(tmp_path / name, noise(base, seed=k), config=CONFIG) for k, name in enumerate(("base", "expert"))]
    for path in paths:
        tokenizer(path, TOKENS)
    text = (paths[1] / "tokenizer.json").read_text()
    (paths[1] / "tokenizer.json").write_text(text.replace(", ", ",   "))
    assert findings(paths[0], paths[1:])["tokenizer"].severity == "ok"


def test_embeddings_of_different_length(tmp_path: Path) -> None:
    def longer(state: State) -> State:
        rows = {"model.embed_tokens.weight", "lm_head.weight"}
        return {n: torch.cat([t, t[:4]]) if n in rows else t for n, t in noise(state).items()}

    base = llama_like(1, 8)
    paths = [save(tmp_path / "base", base, config=CONFIG), save(tmp_path / "expert", longer(base), config=CONFIG)]
    for path in paths:
        tokenizer(path, TOKENS)
    found = findings(paths[0], paths[1:])
    assert found["vocabulary_rows"].severity == "warning" and found["vocabulary_rows"].number == 4
    assert found["tensors"].severity == "ok"  # they are compared on the rows that both have


@pytest.mark.parametrize(
    ("base", "expert", "severity"),
    [
        (None, None, None),
        ("{{a}}", "{{a}}", "ok"),
        ("{{a}}", "{{b}}", "warning"),
        (None, "{{a}}", "note"),
        ("{{a}}", None, "note"),
    ],
)
def test_chat_templates(tmp_path: Path, base: str | None, expert: str | None, severity: str | None) -> None:
    state = llama_like(1, 8)
    paths = [save(tmp_path / name, noise(state, seed=k), config=CONFIG) for k, name in enumerate(("base", "expert"))]
    tokenizer(paths[0], TOKENS, base)
    tokenizer(paths[1], TOKENS, expert)
    found = findings(paths[0], paths[1:])
    assert (found["chat_template"].severity if "chat_template" in found else None) == severity
    assert found["tokenizer"].severity == "ok"  # the template is a matter of its own


# -- weights ------------------------------------------------------------------------------------------------------


def test_the_nearer_base_is_found(tmp_path: Path) -> None:
    """Experts of an instruct model against the pretrained one."""
    pretrained = llama_like(2, 16)
    instruct = noise(pretrained, 0.02, seed=7)
    paths = {name: save(tmp_path / name, state, config=CONFIG) for name, state in [
        ("pretrained", pretrained), ("instruct", instruct),
        ("one", noise(instruct, 0.005, seed=8)), ("two", noise(instruct, 0.005, seed=9))]}  # fmt: skip
    experts = [paths["one"], paths["two"]]
    found = findings(paths["pretrained"], experts)
    assert found["direction"].severity == "warning" and "--also-base" in found["direction"].remedy
    found = findings(paths["pretrained"], experts, bases=[str(paths["instruct"])])
    assert found["base"].severity == "problem" and f"base: {paths['instruct']}" in found["base"].remedy
    assert found["base"].number == pytest.approx(0.005 / math.hypot(0.02, 0.005), rel=0.1)
    right = findings(paths["instruct"], experts, bases=[str(paths["pretrained"])])
    assert right["base"].severity in ("ok", "note") and right["direction"].severity == "ok"


def test_an_expert_given_as_another_base_is_not_its_own_base(tmp_path: Path) -> None:
    base = llama_like(1, 8)
    paths = [save(tmp_path / name, noise(base, 0.01, seed=k), config=CONFIG) for k, name in enumerate("bxy")]
    assert findings(paths[0], paths[1:], bases=[str(paths[1])])["base"].severity != "problem"


def test_an_unrelated_base(tmp_path: Path) -> None:
    paths = [save(tmp_path / str(k), llama_like(1, 16, seed=k), config=CONFIG) for k in range(2)]
    found = findings(paths[0], paths[1:])["base"]
    assert found.severity == "problem" and (found.number or 0) > 0.7


def test_an_expert_that_is_the_base(tmp_path: Path) -> None:
    found = pair(tmp_path, dict)
    assert found["no_change"].severity == "problem" and "other" in found["no_change"].title


def test_two_names_for_one_expert(tmp_path: Path) -> None:
    found = pair(tmp_path, lambda state: noise(state, seed=2))
    assert found["direction"].severity == "warning" and "count twice" in found["direction"].remedy


@pytest.mark.parametrize(("factor", "severity"), [(1.0, "ok"), (3.0, "note"), (10.0, "warning")])
def test_a_loud_expert(tmp_path: Path, factor: float, severity: str) -> None:
    found = pair(tmp_path, lambda state: noise(state, 0.01 * factor))["norms"]
    assert found.severity == severity and found.number == pytest.approx(factor, rel=0.15)
    if severity != "ok":
        assert f"w = {1 / (found.number or 1):.2f}" in found.remedy and "parameters: {weight: w}" in found.remedy


def test_frozen_parts(tmp_path: Path) -> None:
    def mostly_frozen(state: State) -> State:
        return {
            n: t if "mlp" not in n or "layers.1" not in n else changed
            for (n, t), changed in zip(state.items(), noise(state).values(), strict=True)
        }

    found = pair(tmp_path, mostly_frozen)["untouched"]
    assert found.severity == "note" and "other" in found.title and (found.number or 0) > 0.6


def test_a_low_rank_change(tmp_path: Path) -> None:
    base = llama_like(2, 64)

    def adapter(state: State) -> State:
        generator = torch.Generator().manual_seed(3)
        return {
            n: t + 0.02 * torch.randn(t.shape[0], 2, generator=generator) @ torch.randn(2, t.shape[1], generator=generator)
            if "proj" in n else t for n, t in state.items()
        }  # fmt: skip

    full, low = save(tmp_path / "full", noise(base)), save(tmp_path / "low", adapter(base))
    path = save(tmp_path / "base", base)
    quick = findings(path, [full, low])["rank"]
    assert (
        quick.severity == "note" and "low" in quick.title and "full" not in quick.title and quick.basis == "estimated"
    )
    assert quick.number == pytest.approx(2 / 64, abs=1e-9)
    with open_models(str(path), [str(full), str(low)]) as models:
        exact = {f.code: f for f in examine(models, spectra=measure_spectra(models, threads=1))}["rank"]
    assert exact.basis == "exact" and exact.severity == "note" and exact.number == pytest.approx(2 / 64, abs=1e-9)
    assert findings(path, [full])["rank"].severity == "ok"


@pytest.mark.parametrize(("scale", "severity"), [(5e-2, "ok"), (3e-5, "warning")])
def test_changes_that_bfloat16_rounds_away(tmp_path: Path, scale: float, severity: str) -> None:
    base = {n: t.bfloat16() for n, t in llama_like(2, 32).items()}
    paths = [
        save(tmp_path / "base", base),
        save(tmp_path / "expert", noise({n: t.float() for n, t in base.items()}, scale)),
    ]
    found = findings(paths[0], paths[1:])["survival"]
    assert found.severity == severity
    # against the definition, entry by entry
    changed = alive = 0
    expert = noise({n: t.float() for n, t in base.items()}, scale)
    for name, values in base.items():
        tau = expert[name].double() - values.double()
        moved = tau != 0
        changed += int(moved.sum())
        alive += int((((values.double() + 0.3 * tau).bfloat16() != values) & moved).sum())
    assert found.number == pytest.approx(alive / changed, abs=1e-9)
    if severity == "warning":
        assert "dtype: float32" in found.remedy


def test_conflicting_experts(tmp_path: Path) -> None:
    def opposite(state: State) -> State:
        return {
            n: t - (changed - t) for (n, t), changed in zip(state.items(), noise(state, seed=2).values(), strict=True)
        }

    found = pair(tmp_path, opposite, exact=True)
    assert found["conflict"].severity == "note" and found["conflict"].number == pytest.approx(1, abs=1e-3)
    assert "ties" in found["conflict"].remedy and "more than by chance" in found["conflict"].title


def test_a_merge_of_another_shape(tmp_path: Path) -> None:
    base, wider = llama_like(2, 16), llama_like(2, 16) | {"model.layers.1.mlp.up_proj.weight": torch.ones(7, 16)}
    paths = [save(tmp_path / name, state) for name, state in [("base", base), ("one", noise(base)), ("merged", wider)]]
    found = findings(paths[0], paths[1:2], paths[2], exact=True)["merged_tensors"]
    assert found.severity == "warning" and found.number == 1 and "layers.1.mlp.up_proj" in found.evidence


def test_what_a_merge_kept(tmp_path: Path) -> None:
    base = llama_like(2, 16)
    one, two = noise(base, seed=1), noise(base, seed=2)
    merged = {n: 0.5 * one[n] + 0.5 * base[n] for n in base}
    paths = [
        save(tmp_path / name, state) for name, state in [("base", base), ("one", one), ("two", two), ("merged", merged)]
    ]
    found = findings(paths[0], paths[1:3], paths[3], exact=True)["merged"]
    assert found.severity == "note" and "two" in found.title and "one 0.50" in found.evidence
    assert abs(found.number or 0) < 0.1


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    def broken(state: State) -> State:
        state = noise(state)
        state["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
        return state

    found = pair(tmp_path, broken)
    assert (
        found["not_finite"].severity == "problem"
        and "other: model.layers.1.mlp.up_proj.weight" in found["not_finite"].evidence
    )


def lora(folder: Path, base: State, name: str) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    state = {}
    for key, tensor in base.items():
        if key.endswith("q_proj.weight"):
            module = f"base_model.model.{key.removesuffix('.weight')}"
            state[f"{module}.lora_A.weight"] = torch.randn(2, tensor.shape[1], generator=generator)
            state[f"{module}.lora_B.weight"] = torch.randn(tensor.shape[0], 2, generator=generator)
    save_file(state, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": name,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_adapters(tmp_path: Path) -> None:
    base = llama_like(2, 32)
    path = save(tmp_path / "base", base, config=CONFIG)
    mine, other = lora(tmp_path / "mine", base, "org/base"), lora(tmp_path / "other", base, "org/another-model")
    found = findings(path, [mine])
    assert "adapter_base" not in found and "base" not in found  # its change is the same on any base
    assert found["rank"].severity == "note" and found["untouched"].severity == "note"
    found = findings(path, [other])
    assert found["adapter_base"].severity == "warning" and "org/another-model" in found["adapter_base"].remedy


# -- the sample ---------------------------------------------------------------------------------------------------


def test_a_sample_is_near_the_whole(tmp_path: Path) -> None:
    base = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(256, 512) * 0.02 for i in range(3)}
    paths = [
        save(tmp_path / name, noise(base, 0.001 * (k + 1), seed=k)) for k, name in enumerate(("base", "one", "two"))
    ]
    with open_models(str(paths[0]), [str(p) for p in paths[1:]]) as models:
        whole, part = take_sample(models), take_sample(models, budget=40_000)
        assert whole.whole and not part.whole and 30_000 < part.elements < 60_000
        assert whole.label == "all weights" and part.label.startswith("sampled: ") and part.basis == "sampled"
        for k in range(2):
            assert part.norm[k] == pytest.approx(whole.norm[k], rel=0.05)
        assert part.base_norm == pytest.approx(whole.base_norm, rel=0.05)
        changes = measure_changes(models, threads=1)
        assert whole.norm == pytest.approx(changes.total().norm, rel=1e-6)
        assert whole.cosine[0][1] == pytest.approx(changes.cosine()[0, 1], abs=1e-6)
        sampled = {f.code: f for f in examine(models, sample=part)}
        assert sampled["norms"].basis == "sampled" and "sampled: " in sampled["norms"].evidence


def test_looking_opens_and_closes_other_bases(tmp_path: Path) -> None:
    base = llama_like(1, 8)
    paths = [save(tmp_path / name, noise(base, seed=k)) for k, name in enumerate(("base", "expert", "other"))]
    with open_models(str(paths[0]), [str(paths[1])]) as models:
        sample = look(models, [str(paths[2])])
        shutil.rmtree(paths[2])
        assert examine(models, sample=sample)
    assert sample.other_norms[str(paths[2])][0] > 0
