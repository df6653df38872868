"""What is told about a recipe before a weight is read: also of one that is not finished, and of models that fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.errors import HubError
from merging.model_facts import card_bases, describe, models_in
from merging.preflight import Preflight, preflight
from merging.preflight_fixes import Check

from .small_checkpoints import llama_like, save

CONFIG = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "architectures": ["LlamaForCausalLM"]}


def model(folder: Path, seed: int = 0, blocks: int = 2, card: str = "", **config: Any) -> Path:
    save(folder, llama_like(blocks, seed=seed), config={**CONFIG, "num_hidden_layers": blocks, **config})
    if card:
        (folder / "README.md").write_text(f"---\n{card}\n---\n# A model\n")
    return folder


def look(base: Path | str | None, *experts: Path | str, **more: Any) -> Preflight:
    listed = [{"model": str(path), "name": Path(path).name} for path in experts]
    data: dict[str, Any] = {"experts": listed, **more}
    return preflight({**data, "base": str(base)} if base else data)


def find(done: Preflight, code: str) -> Check:
    return next(check for check in done.checks if check.finding.code == code)


def codes(done: Preflight, *severities: str) -> set[str]:
    return {check.finding.code for check in done.checks if check.finding.severity in severities}


def test_models_that_fit_are_told_to_fit_with_facts_and_cost(tmp_path: Path) -> None:
    done = look(model(tmp_path / "base"), model(tmp_path / "a", 1), model(tmp_path / "b", 2))
    assert not codes(done, "problem", "warning") and done.worst in ("ok", "note")
    assert done.facts["a"].blocks == 2 and done.facts["a"].width == 8 and done.facts["a"].dtype == "float32"
    assert done.cost is not None and done.cost["bytes_written"] >= done.facts["base"].bytes


def test_a_model_of_another_size_is_named_and_does_not_hide_the_others(tmp_path: Path) -> None:
    base, good = model(tmp_path / "base"), model(tmp_path / "good", 1)
    odd = model(tmp_path / "odd", 2, blocks=3, card="base_model: org/its-own-base")
    done = look(base, good, odd)
    check = find(done, "fit")
    assert check.who == "odd" and "3 layers" in check.finding.evidence
    assert [(fix.action, fix.model) for fix in check.fixes] == [
        ("rest", "odd"), ("remove", "odd"), ("base", "org/its-own-base"),
    ]  # fmt: skip
    assert "E_SHAPE" not in codes(done, "problem") and "tensors" in codes(done, "ok")
    assert done.cost is None  # it would not be the cost of this recipe


def test_what_cannot_be_opened_is_a_finding_with_what_to_do(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"x")
    done = look(base, tmp_path / "bases", tmp_path / "pickle", model(tmp_path / "good", 1))
    assert set(done.errors) == {"bases", "pickle"} and {"E_NOT_FOUND", "E_NOT_SAFETENSORS"} <= codes(done, "problem")
    missing = find(done, "E_NOT_FOUND")
    assert "Did you mean" in missing.finding.remedy and {fix.action for fix in missing.fixes} == {"rest", "remove"}
    assert "tensors" in codes(done, "ok")  # the good one was compared all the same


def test_models_of_the_hub_that_are_not_here_are_offered_for_a_look_and_a_download(tmp_path: Path) -> None:
    done = look("org/base", "org/first", model(tmp_path / "good", 1))
    check = find(done, "absent")
    assert [fix.action for fix in check.fixes] == ["headers", "download"]
    assert check.fixes[0].model.split("\n") == ["org/base", "org/first"] == done.absent


def test_the_base_that_cards_name_is_offered(tmp_path: Path) -> None:
    experts = [model(tmp_path / name, i, card="base_model:\n- org/base\nlicense: mit") for i, name in enumerate("ab")]
    check = find(look(None, *experts), "no_base")
    assert check.finding.severity == "warning" and [fix.model for fix in check.fixes] == ["org/base"]
    assert find(look(None, *experts, method="ties"), "no_base").finding.severity == "problem"
    assert not codes(look(None, *experts, method="linear", parameters={"weight": 1.0}), "problem")


def test_a_copy_of_the_base_is_found_whatever_it_is_called(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    shutil.copytree(base, tmp_path / "copy")
    check = find(look(base, tmp_path / "copy", model(tmp_path / "other", 1)), "same")
    assert check.who == "copy" and ("remove", "copy") in [(fix.action, fix.model) for fix in check.fixes]


def test_a_remedy_that_the_recipe_has_settles_its_finding(tmp_path: Path) -> None:
    base, expert = model(tmp_path / "base"), model(tmp_path / "expert", 1)
    state = load_file(expert / "model.safetensors")
    save_file({**state, "model.layers.0.extra.weight": torch.ones(3)}, expert / "model.safetensors")
    done = look(base, expert)
    check = find(done, "E_EXTRA_TENSOR")
    drop = next(fix for fix in check.fixes if "Drop" in fix.label)
    (((first, second), value),) = drop.changes
    again = look(base, expert, **{str(first): {str(second): value}})
    assert "E_EXTRA_TENSOR" not in codes(again, "problem") and again.cost is not None
    assert find(again, "tensors").settled and again.worst in ("ok", "note")


def test_different_number_types_can_be_settled_with_float32(tmp_path: Path) -> None:
    base, expert = model(tmp_path / "base"), model(tmp_path / "expert", 1)
    halves = {name: tensor.bfloat16() for name, tensor in load_file(expert / "model.safetensors").items()}
    save_file(halves, expert / "model.safetensors")
    check = find(look(base, expert), "dtype")
    assert [fix.label for fix in check.fixes] == ["Write float32"] and not check.settled
    settled = find(look(base, expert, dtype="float32"), "dtype")
    assert settled.settled == "Write float32" and settled.fixes == ()


def test_an_adapter_named_as_a_model_can_become_an_adapter_of_the_base(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    lora = adapter(tmp_path / "lora", base)
    check = find(look(base, lora), "E_ADAPTER")
    assert check.fixes[0].action == "adapter" and check.fixes[0].model == "lora"
    done = preflight({"base": str(base), "experts": [{"model": str(base), "adapter": str(lora), "name": "lora"}]})
    assert done.facts["lora"].kind == "adapter" and not codes(done, "problem")
    warned = find(done, "adapter_base")
    assert [(fix.action, fix.model) for fix in warned.fixes] == [("base", "org/trained-on")]


def adapter(folder: Path, base: Path) -> Path:
    weights = load_file(base / "model.safetensors")
    name = next(n for n in weights if n.endswith("q_proj.weight"))
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    folder.mkdir()
    out, into = weights[name].shape
    save_file({f"{stem}.lora_A.weight": torch.ones(2, into), f"{stem}.lora_B.weight": torch.ones(out, 2)},
              folder / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/trained-on"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_full_disk_is_told_before_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, expert = model(tmp_path / "base"), model(tmp_path / "expert", 1)
    monkeypatch.setattr("merging.preflight.free_bytes", lambda path: 100)
    data = {"base": str(base), "experts": [{"model": str(expert)}]}
    assert "E_NO_SPACE" in codes(preflight(data, out=tmp_path), "problem")
    assert "E_NO_SPACE" not in codes(preflight(data), "problem")


def test_an_unfinished_recipe_is_no_error(tmp_path: Path) -> None:
    assert preflight({"experts": []}).checks == []
    assert preflight({"experts": [], "base": str(model(tmp_path / "base"))}).facts["base"].tensors > 0


def test_a_finder_that_refuses_becomes_a_finding(tmp_path: Path) -> None:
    def refuse(text: str) -> Any:
        raise HubError("E_HUB_REFERENCE", f"{text} is not for you.", "", "Ask.")

    done = preflight({"experts": [{"model": "org/x", "name": "x"}]}, find=refuse)
    assert "not for you" in find(done, "E_HUB_REFERENCE").finding.title


# -- facts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "bases"),
    [
        ("base_model: org/base", ("org/base",)),
        ("base_model:\n- org/base\n- 'other/base'\ntags: [x]", ("org/base", "other/base")),
        ("base_model:\n  - org/base", ("org/base",)),
        ("base_model: [org/a, org/b]", ("org/a", "org/b")),
        ("base_model: <script>alert(1)</script>", ()),
        ("license: mit", ()),
        ("", ()),
    ],
)
def test_the_base_of_a_card(tmp_path: Path, card: str, bases: tuple[str, ...]) -> None:
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\nbase_model: not/this\n")
    assert card_bases(tmp_path) == bases


def test_facts_of_a_model_and_of_a_folder_of_models(tmp_path: Path) -> None:
    first = model(tmp_path / "first", card="license: apache-2.0", _name_or_path="org/origin")
    facts = describe(first)
    assert (facts.kind, facts.model_type, facts.licence, facts.bases) == (
        "folder",
        "llama",
        "apache-2.0",
        ("org/origin",),
    )
    assert facts.parameters * 4 == facts.bytes
    assert describe(first / "model.safetensors").kind == "file"
    (tmp_path / "notes").mkdir()
    (tmp_path / "r.yml").write_text("x")
    assert [path.name for path in models_in(tmp_path)] == ["first", "r.yml"]
