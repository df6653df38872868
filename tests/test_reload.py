"""Merged models in the hands of transformers: every key fits, and the numbers are those of a merge in memory."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from merging.methods import Method, make
from merging.methods.scan import merge_tensors
from tests import tiny_models
from tests.small_checkpoints import INDEX, load, merge, recipe, same_bits
from tests.tiny_models import KINDS

METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "task_arithmetic": ({"lambda": 0.8}, {"weight": 0.6}),
    "ties": ({}, {"weight": 1.0, "density": 0.5}),
    "pcb": ({"ratio": 0.3}, {}),
}
LOADERS = {"bert": "AutoModelForSequenceClassification", "vit": "AutoModelForImageClassification"}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Of every kind a base and two experts, in float32 and in bfloat16."""
    folder = tmp_path_factory.mktemp("families")
    made = {}
    for kind in KINDS:
        for dtype in ("float32", "bfloat16"):
            base = tiny_models.build(kind, folder / f"{kind}-{dtype}" / "base", dtype=dtype)
            experts = [tiny_models.perturb(base, base.parent / str(k), seed=k) for k in (1, 2)]
            made[f"{kind}-{dtype}"] = [base, *experts]
    return made


def logits_in_memory(kind: str, paths: list[Path], method: Method) -> torch.Tensor:
    """Of modules that transformers loaded and whose parameters were merged there, by their names there."""
    import transformers as t

    loader = getattr(t, LOADERS.get(kind, "AutoModelForCausalLM"))
    base, *experts = (loader.from_pretrained(path, dtype="auto").state_dict() for path in paths)
    merged = merge_tensors(method, base, experts)
    model = tiny_models.make(kind, seed=99)
    model.load_state_dict({name: tensor.float() for name, tensor in merged.items()})
    with torch.no_grad():
        return model(**tiny_models.inputs(kind)).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("method", "kind"), [*product(("task_arithmetic", "ties"), KINDS), ("pcb", "qwen2"), ("pcb", "gpt2")]
)
def test_a_merged_model_is_the_merge(
    families: dict[str, list[Path]], tmp_path: Path, kind: str, dtype: str, method: str
) -> None:
    paths = families[f"{kind}-{dtype}"]
    shared, own = METHODS[method]
    merge(recipe(method, [(p, own) for p in paths[1:]], paths[0], parameters=shared), tmp_path / "out")
    base, *experts = (load(path) for path in paths)
    rule = make(method, shared, [own, own])
    assert same_bits(load(tmp_path / "out"), merge_tensors(rule, base, experts))
    found = tiny_models.logits(tmp_path / "out", kind)  # checks missing, unexpected and mismatched keys
    assert torch.equal(found, logits_in_memory(kind, paths, rule))
    assert not torch.equal(found, tiny_models.logits(paths[0], kind))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == dtype


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_in_shards_and_in_another_type(tmp_path: Path, kind: str) -> None:
    """A longer embedding, so that there is something to cut."""
    import transformers as t

    small = tiny_models.make(kind)
    small.resize_token_embeddings(12_000, mean_resizing=False)
    small.save_pretrained(tmp_path / "base")
    paths = [tmp_path / "base", tiny_models.perturb(tmp_path / "base", tmp_path / "expert", seed=1)]
    what = recipe("linear", [(p, {"weight": 0.5}) for p in paths], dtype="float64")
    merge(what, tmp_path / "out", shard_size=2_000_000)
    assert (tmp_path / "out" / INDEX).exists()
    model, info = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert model.dtype == torch.float64 and not any(info.values())
    state = load(tmp_path / "out")
    assert state.keys() <= model.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("tied_base", [True, False])
def test_a_tied_and_an_untied_model(tmp_path: Path, tied_base: bool) -> None:
    """The configuration says what the tensors are: the output has a head of its own."""
    import transformers as t

    untied = tiny_models.build("qwen2", tmp_path / "tied", seed=1)
    model = t.AutoModelForCausalLM.from_pretrained(untied)
    head = model.lm_head.weight.detach() * 1.5
    model.config.tie_word_embeddings = False
    model = t.AutoModelForCausalLM.from_config(model.config)
    model.load_state_dict(load(untied) | {"lm_head.weight": head})
    model.save_pretrained(tmp_path / "untied")
    order = ["tied", "untied"] if tied_base else ["untied", "tied"]
    paths = [tmp_path / name for name in order]
    merge(recipe("task_arithmetic", [(paths[1], {"weight": 0.5})], paths[0]), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    tiny_models.logits(tmp_path / "out", "qwen2")
    merged = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    embedding = load(tmp_path / "tied")["model.embed_tokens.weight"]
    assert torch.allclose(merged.lm_head.weight, (embedding + head) / 2, atol=1e-7)
    assert torch.equal(merged.model.embed_tokens.weight, embedding)


def test_stacked_layers_make_a_deeper_model(families: dict[str, list[Path]], tmp_path: Path) -> None:
    from merging.recipe import Recipe

    one, two = families["llama-float32"][1:]
    slices = [
        {"sources": [{"model": str(m), "layers": layers}]}
        for m, layers in ((one, [0, 2]), (two, [1, 2]), (one, [0, 1]))
    ]
    what = Recipe.parse({"method": "passthrough", "experts": [str(one), str(two)], "slices": slices})
    merge(what, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4
    tiny_models.logits(tmp_path / "out", "llama")
    out, first, second = load(tmp_path / "out"), load(one), load(two)
    for new, (state, old) in enumerate([(first, 0), (first, 1), (second, 1), (first, 0)]):
        name = "model.layers.{}.mlp.down_proj.weight"
        assert torch.equal(out[name.format(new)], state[name.format(old)])


def with_tokens(kind: str, folder: Path, words: list[str], dtype: str, seed: int) -> Path:
    """A tiny model with one embedding row per word, and a real tokenizer for them."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = tiny_models.make(kind, seed)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.save_pretrained(folder)
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_token_that_only_an_expert_knows(tmp_path: Path, kind: str) -> None:
    """Rows go by token and not by number, the new one is the expert's, and the type of the embedding stays."""
    import transformers as t

    common = ["<unk>", "<s>", "</s>", *(f"word{i}" for i in range(60))]
    base = with_tokens(kind, tmp_path / "base", common, "bfloat16", 1)
    moved = [*common[:3], "<|new|>", *reversed(common[3:])]
    expert = with_tokens(kind, tmp_path / "expert", moved, "bfloat16", 2)
    merge(recipe("task_arithmetic", [(expert, {"weight": 0.5})], base), tmp_path / "out")
    tokenizer = t.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    vocabulary = tokenizer.get_vocab()
    assert [vocabulary[w] for w in common] == list(range(len(common)))
    assert vocabulary["<|new|>"] == len(common) and len(tokenizer) == len(moved)
    model, info = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info.values()) and model.config.vocab_size == len(moved) and model.dtype == torch.bfloat16
    out, before, theirs = load(tmp_path / "out"), load(base), load(expert)
    assert {tensor.dtype for tensor in out.values()} == {torch.bfloat16}
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & out.keys():
        for number, word in enumerate(common):
            expected = (before[name][number].float() + theirs[name][moved.index(word)].float()) / 2
            assert torch.allclose(out[name][number].float(), expected, atol=1e-3, rtol=1e-2)
        assert torch.equal(out[name][-1], theirs[name][3])
