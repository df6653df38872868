"""A model's key follows its content and nothing else, and folders that would score nonsense are refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.checkpoints import manifest
from merging.checkpoints.verify import verify
from merging.engine import run
from merging.errors import InputError
from merging.evaluation import models
from merging.evaluation.models import CAUSAL, IMAGE, describe, encode, load_model, model_key, names_of
from merging.plan import make_plan
from merging.recipe import Recipe
from tests import tiny_models
from tests.evaluation.small_models import language_model

ASSETS = Path(__file__).parents[2] / "assets"
DEMO = ASSETS / "demo"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO / "base", tmp_path / "model"))


def change_weights(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda weights: weights.pop(NAME), "E_MISSING_TENSOR"),
        (lambda weights: weights.update({"model.layers.9.extra": torch.zeros(1)}), "E_EXTRA_TENSOR"),
        (lambda weights: weights.update({NAME: weights[NAME][:-1].clone()}), "E_SHAPE"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(copy: Path, change, code: str) -> None:  # type: ignore[no-untyped-def]
    change_weights(copy, change)
    with pytest.raises(InputError) as caught:
        load_model(copy)
    assert caught.value.code == code


def test_folders_that_hold_no_language_model_are_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="E_NOT_FOUND"):
        load_model(tmp_path / "absent")
    with pytest.raises(InputError, match="E_NOT_A_MODEL"):
        load_model(tmp_path)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-8])
    with pytest.raises(InputError, match="E_HEADER_LAYOUT"):
        load_model(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="E_NOT_A_MODEL"):
        load_model(copy)
    (copy / "model.safetensors").write_bytes(weights)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_model(copy)


def test_code_that_a_model_brings_is_not_run(copy: Path) -> None:
    witness = copy / "ran"
    (copy / "own.py").write_text(f"open({str(witness)!r}, 'w')\nclass Own: pass\n")
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    change_json(copy / "config.json", model_type="own", auto_map=own)
    with pytest.raises(InputError, match="E_NOT_A_MODEL"):
        load_model(copy)
    assert not witness.exists()


# -- the key ------------------------------------------------------------------------------------------------------


def test_the_key_is_that_of_the_content(copy: Path, tmp_path: Path) -> None:
    key = model_key(copy)
    assert len(key) == 64 and key == model_key(DEMO / "base") != model_key(DEMO / "experts" / "sort")
    (copy / "README.md").write_text("new")
    (copy / "model.safetensors").touch()
    assert model_key(copy) == key == load_model(copy).key
    seen = {key}
    for name in ("config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json"):
        change_json(copy / name, added=1)
        seen.add(model_key(copy))
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "model.safetensors").write_bytes(raw)
    seen.add(model_key(copy))
    assert len(seen) == 6


def test_a_hash_is_remembered_until_the_file_changes(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, cache, read = copy / "model.safetensors", tmp_path / "cache", []
    monkeypatch.setattr(models, "_RACY", -1)
    key = model_key(copy, cache, read.append)
    assert sum(read) == weights.stat().st_size
    assert model_key(copy, cache, read.append) == key and sum(read) == weights.stat().st_size
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    before = weights.stat()
    weights.write_bytes(raw)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p and tar do: same size, same time
    other = model_key(copy, cache)
    assert other != key
    moved = copy.parent / "elsewhere.safetensors"
    raw[-1] ^= 1
    moved.write_bytes(raw)
    os.utime(moved, ns=(before.st_atime_ns, before.st_mtime_ns))
    moved.replace(weights)
    assert model_key(copy, cache) == key
    for kept in (cache / "hashes").iterdir():  # damaged: hashed again
        kept.write_text('{"stamp": 3}')
    assert model_key(copy, cache) == model_key(copy)
    (cache / "hashes").rename(cache / "gone")
    (cache / "hashes").write_text("in the way")
    assert model_key(copy, cache) == model_key(copy)


def test_a_file_that_is_just_being_written_is_not_remembered(copy: Path, tmp_path: Path) -> None:
    os.utime(copy / "model.safetensors")
    model_key(copy, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_manifest_of_a_merge_saves_the_reading(tmp_path: Path) -> None:
    experts = [{"model": str(DEMO / "experts" / name), "parameters": {"weight": 0.5}} for name in ("sort", "rotate")]
    with make_plan(Recipe.parse({"base": str(DEMO / "base"), "experts": experts, "method": "task_arithmetic"})) as plan:
        merged = run(plan, tmp_path / "merged").folder
    read: list[int] = []
    key = model_key(merged, None, read.append)
    assert read == []
    (merged / manifest.NAME).rename(tmp_path / "away")
    assert model_key(merged, None, read.append) == key and read != []  # the same SHA-256, from the bytes
    (tmp_path / "away").rename(merged / manifest.NAME)
    weights = merged / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)  # newer than the manifest: not believed
    assert model_key(merged) != key and not verify(merged).ok
    shutil.copy2(merged / "model.safetensors", tmp_path / "older.safetensors")
    os.utime(tmp_path / "older.safetensors", (1_600_000_000, 1_600_000_000))
    (tmp_path / "older.safetensors").replace(weights)  # moved here, its time kept: older than the manifest
    assert model_key(merged) != key
    (merged / manifest.NAME).write_text("{}")
    assert model_key(merged) != key


# -- what it is ---------------------------------------------------------------------------------------------------


def test_what_a_model_is_for_is_known_without_loading(tmp_path: Path) -> None:
    base = describe(DEMO / "base")
    assert (base.kind, base.context) == (CAUSAL, 64)
    vision = describe(ASSETS / "tiny_vit" / "base")
    assert (vision.kind, vision.context) == (IMAGE, None)
    assert describe(language_model(tmp_path / "gpt2", "gpt2", context=40)).context == 40
    with pytest.raises(InputError, match="no tokenizer.json"):
        describe(tiny_models.build("llama", tmp_path / "llama"))


def test_what_is_no_whole_model_is_refused(copy: Path) -> None:
    change_json(copy / "config.json", architectures=["LlamaForQuestionAnswering"])
    with pytest.raises(InputError, match="cannot be evaluated here"):
        describe(copy)
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is an adapter"):
        describe(copy)


def test_an_image_model_needs_no_tokenizer() -> None:
    model = load_model(ASSETS / "tiny_vit" / "base")
    assert (model.kind, model.tokenizer, model.ends) == (IMAGE, None, frozenset())


@pytest.mark.parametrize("begin", [True, False])
def test_end_tokens_that_a_tokenizer_adds_are_left_out(tmp_path: Path, begin: bool) -> None:
    model = load_model(language_model(tmp_path, adds_end=True, begin=begin))
    plain = load_model(language_model(tmp_path / "plain", begin=begin))
    texts = ["ab", "", "a</s>"]
    assert model.tokenizer("ab")["input_ids"][-1] == 1
    assert encode(model, texts) == encode(plain, texts)
    assert len(encode(model, texts)[0]) == 2 + begin


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/ties", "a/linear"], ["ties", "linear"]),
        (["a/ties", "b/ties", "b/linear"], ["a/ties", "b/ties", "linear"]),
        (["x/a/ties", "y/a/ties", "a/ties"], ["x/a/ties", "y/a/ties", None]),
        (["/"], ["/"]),
    ],
)
def test_names_are_short_and_different(paths: list[str], names: list[str | None]) -> None:
    found = names_of(paths)
    assert len(set(found)) == len(paths)
    assert all(name in (None, given) for given, name in zip(found, names, strict=True))
