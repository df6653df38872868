"""Which tensors of a family of models are compared with which, and what is said about the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merging.analysis.models import BASE, MERGED, Models, open_models, task_vector
from merging.errors import HubError, InputError, NumbersError
from tests.small_checkpoints import State, family, llama_like, load, save


def opened(paths: list[Path], merged: Path | None = None) -> Models:
    return open_models(str(paths[0]), [str(path) for path in paths[1:]], str(merged) if merged else None)


def noisy(state: State, seed: int, scale: float = 0.01) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {n: t + (torch.randn(t.shape, generator=generator) * scale).to(t.dtype) for n, t in state.items()}


def low_rank(folder: Path, base: State, target: str, rank: int = 2, base_model: str = "") -> tuple[Path, torch.Tensor]:
    """A LoRA adapter on one weight, and the change that it means: (alpha / rank) B A."""
    rows, columns = base[f"{target}.weight"].shape
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(rank, columns, generator=generator) * 0.1
    b = torch.randn(rows, rank, generator=generator) * 0.1
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": [target.rsplit(".", 1)[-1]],
              "base_model_name_or_path": base_model, "bias": "none", "task_type": "CAUSAL_LM"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = f"base_model.model.{target}"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    return folder, 4 / rank * b.double() @ a.double()


def test_tensors_come_in_the_order_of_computation(tmp_path: Path) -> None:
    paths = family(tmp_path, llama_like(blocks=11), 2)
    with opened(paths) as models:
        names = [tensor.name for tensor in models.tensors]
        assert [models.tensors[0].kind, *[t.kind for t in models.tensors[-2:]]] == ["embed", "norm", "head"]
        assert [t.block for t in models.tensors[1:-2]] == [i for i in range(11) for _ in range(5)]
        assert [t.kind for t in models.tensors[1:6]] == ["attn_q", "attn_o", "mlp_up", "mlp_down", "norm"]
        assert sorted(names) == sorted(llama_like(blocks=11))
        assert (models.skipped, models.notes) == ([], [])
        assert models.parameters == sum(t.numel() for t in llama_like(blocks=11).values())
        assert list(models.checkpoints) == [BASE, "expert1", "expert2"]


def test_the_parts_of_a_mixture_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    state = {f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight": torch.ones(2, 2) for i in range(12)}
    with opened(family(tmp_path, state, 1)) as models:
        assert [int(t.name.split(".")[5]) for t in models.tensors] == list(range(12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shards", [1, 3])
def test_task_vectors_are_the_differences(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    state = llama_like(1, dtype=dtype)
    state["model.embed_tokens.weight"] = torch.randn(700, 200).to(dtype)  # several blocks and a rest
    paths = family(tmp_path, state, 2, shards=shards)
    base, *experts = [load(path) for path in paths]
    with opened(paths, paths[2]) as models:
        for tensor in models.tensors:
            for k, expert in enumerate([*experts, experts[1]]):
                tau = task_vector(tensor, k)
                exact = expert[tensor.name].double() - base[tensor.name].double()
                wide = torch.float32 if dtype.itemsize == 2 else torch.float64
                assert tau.dtype == wide and tau.shape == tensor.shape
                assert torch.equal(tau, expert[tensor.name].to(wide) - base[tensor.name].to(wide))
                assert torch.allclose(tau.double(), exact, rtol=1e-6, atol=0)


def test_task_vectors_of_other_shapes_are_matrices(tmp_path: Path) -> None:
    shapes = {"conv": (6, 2, 3, 3), "position": (1, 5, 4), "one_row": (1, 7), "bias": (4,), "number": ()}
    paths = family(tmp_path, {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}, 1)
    with opened(paths) as models:
        found = {t.name.split(".")[0]: tuple(task_vector(t, 0).shape) for t in models.tensors}
    assert found == {"conv": (6, 18), "position": (5, 4), "one_row": (1, 7), "bias": (4,), "number": (1,)}


def test_an_adapter_counts_as_the_model_it_makes(tmp_path: Path) -> None:
    state = llama_like(1, dtype=torch.bfloat16)
    base = save(tmp_path / "base", state, config={"architectures": ["LlamaForCausalLM"]})
    adapter, change = low_rank(tmp_path / "adapter", state, "model.layers.0.self_attn.q_proj")
    with opened([base, adapter]) as models:
        assert models.names == ["adapter"]
        for tensor in models.tensors:
            tau = task_vector(tensor, 0)
            if tensor.kind == "attn_q":
                assert tau.dtype == torch.float64
                assert torch.allclose(tau, change, atol=1e-7)
            else:
                assert not tau.any()


def test_what_cannot_be_compared_is_named_with_the_reason(tmp_path: Path) -> None:
    state = llama_like(1) | {"model.rotary_emb.inv_freq": torch.ones(3), "counter": torch.arange(4),
                             "gate": torch.ones(3, 2), "only_base": torch.ones(2), "empty": torch.zeros(0, 3)}  # fmt: skip
    base = save(tmp_path / "base", state)
    changed = {n: t for n, t in state.items() if n != "only_base"} | {"gate": torch.ones(2, 3), "extra": torch.ones(1)}
    expert = save(tmp_path / "expert", changed)
    with opened([base, expert]) as models:
        assert dict(models.skipped) == {
            "model.rotary_emb.inv_freq": "a buffer, not a weight",
            "counter": "integers (I64)",
            "gate": "shapes differ: base 3 x 2, expert 2 x 3",
            "only_base": "missing in expert",
            "extra": "missing in base",
            "empty": "it has no elements",
        }
        assert {t.name for t in models.tensors} == set(llama_like(1))


def test_a_padded_vocabulary_is_compared_on_the_rows_that_all_have(tmp_path: Path) -> None:
    state = llama_like(1)
    longer = noisy(state, 1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        longer[name] = torch.cat([longer[name], torch.ones(4, 8)])
    paths = [save(tmp_path / "base", state), save(tmp_path / "long", longer), save(tmp_path / "short", noisy(state, 2))]
    with opened(paths) as models:
        embedding = next(t for t in models.tensors if t.kind == "embed")
        assert embedding.shape == (20, 8) and [s.shape for s in embedding.changed] == [(20, 8)] * 2
        assert torch.equal(
            task_vector(embedding, 0), longer[embedding.name][:20].double() - state[embedding.name].double()
        )
        assert models.notes == [
            "model.embed_tokens.weight, lm_head.weight: compared on the first 20 rows, each with the row of the same "
            "number (base 20, long 24, short 20)."
        ]


def test_other_tensors_are_not_cut_to_fit(tmp_path: Path) -> None:
    state = llama_like(1)
    other = state | {"model.layers.0.mlp.up_proj.weight": torch.ones(24, 8)}
    with opened([save(tmp_path / "base", state), save(tmp_path / "expert", other)]) as models:
        assert models.skipped == [("model.layers.0.mlp.up_proj.weight", "shapes differ: base 16 x 8, expert 24 x 8")]


def test_the_embedding_stands_in_for_the_head_of_a_tied_model(tmp_path: Path) -> None:
    tied, untied = llama_like(1, head=False), llama_like(1)
    base = save(tmp_path / "base", tied, config={"tie_word_embeddings": True})
    expert = save(tmp_path / "expert", untied)
    with opened([base, expert]) as models:
        head = models.tensors[-1]
        assert head.name == "lm_head.weight"
        assert torch.equal(
            task_vector(head, 0), (untied[head.name].double() - tied["model.embed_tokens.weight"].double())
        )
        assert models.notes == ["lm_head.weight: base is tied, its embedding stands in for the head."]


def test_a_model_without_any_head_has_none_to_lend(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaModel"]}
    base = save(tmp_path / "base", llama_like(1, head=False), config=config)
    with opened([base, save(tmp_path / "expert", llama_like(1))]) as models:
        assert models.skipped == [("lm_head.weight", "missing in base")]


def test_a_head_that_only_the_merged_model_has_is_not_compared(tmp_path: Path) -> None:
    paths = family(tmp_path, llama_like(1, head=False), 1, config={"tie_word_embeddings": True})
    with opened(paths, save(tmp_path / "merged", llama_like(1))) as models:
        assert models.skipped == [("lm_head.weight", "only the merged model has it")]
        assert all(t.merged is not None for t in models.tensors)


def test_what_only_the_merged_model_lacks_is_compared_without_it(tmp_path: Path) -> None:
    paths = family(tmp_path, llama_like(1), 2)
    partial = {n: t for n, t in llama_like(1).items() if "q_proj" not in n}
    partial["model.layers.0.mlp.up_proj.weight"] = torch.ones(3, 3)
    with opened(paths, save(tmp_path / "merged", partial)) as models:
        without = {t.kind for t in models.tensors if t.merged is None}
        assert without == {"attn_q", "mlp_up"} and models.skipped == []
        assert models.notes == [
            "model.layers.0.self_attn.q_proj.weight: compared without the merged model: missing in merged.",
            "model.layers.0.mlp.up_proj.weight: compared without the merged model: shapes differ: base 16 x 8, "
            "merged 3 x 3.",
        ]
        assert list(models.checkpoints) == [BASE, "expert1", "expert2", MERGED]


def test_names_are_short_and_different(tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(2)}
    folders = [save(tmp_path / name, state) for name in ("math", "x/final", "y/final", "base", "file")]
    references = [*map(str, folders[:4]), str(folders[4] / "model.safetensors"), str(folders[0])]
    with open_models(str(folders[0]), references) as models:
        assert models.names == ["math", "x/final", "y/final", f"{tmp_path.name}/base", "file", "math (2)"]
        assert models.reference == {"base": str(folders[0]), "experts": references, "merged": None}


def test_the_key_tells_files_and_roles_apart(tmp_path: Path) -> None:
    base, a, b = family(tmp_path, {"a.weight": torch.ones(2)}, 2)

    def key(*paths: Path, merged: Path | None = None) -> str:
        with opened(list(paths), merged) as models:
            return models.key

    keys = [key(base, a, b), key(base, b, a), key(base, a), key(base, a, merged=b), key(a, base)]
    assert len(set(keys)) == len(keys) and key(base, a, b) == keys[0]
    save_file({"a.weight": torch.zeros(2)}, b / "model.safetensors")
    assert key(base, a, b) != keys[0] and key(base, a) == keys[2]


def test_models_with_nothing_in_common_are_refused(tmp_path: Path) -> None:
    base, other = save(tmp_path / "base", {"a": torch.ones(2)}), save(tmp_path / "other", {"b": torch.ones(2)})
    with pytest.raises(InputError, match="no tensor in common.*\n.*a: missing in other") as error:
        opened([base, other])
    assert error.value.code == "E_MISSING_TENSOR"


def test_bad_references_are_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"a": torch.ones(2)})
    for references, code in [([], "E_NOT_A_MODEL"), ([str(tmp_path / "no")], "E_NOT_FOUND"), ([""], "E_HUB_REFERENCE")]:
        with pytest.raises((InputError, HubError)) as error:
            open_models(str(base), references)
        assert error.value.code == code


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    base, good, bad = family(tmp_path, {"a.weight": torch.ones(3000, 30, dtype=torch.bfloat16)}, 2)
    state = load(bad)
    state["a.weight"][2500, 7] = float("nan")
    save_file(state, bad / "model.safetensors")
    with opened([base, good, bad]) as models:
        assert task_vector(models.tensors[0], 0).isfinite().all()
        with pytest.raises(NumbersError, match=f"a.weight: element 75007 is nan in .*{bad.name}") as error:
            task_vector(models.tensors[0], 1)
        assert error.value.code == "E_NOT_FINITE" and "policies" not in str(error.value)


def test_a_difference_that_no_number_can_hold_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"a.weight": torch.full((4,), 3e38, dtype=torch.bfloat16)})
    expert = save(tmp_path / "expert", {"a.weight": torch.full((4,), -3e38, dtype=torch.bfloat16)})
    with opened([base, expert]) as models, pytest.raises(NumbersError) as error:
        task_vector(models.tensors[0], 0)
    assert error.value.code == "E_OVERFLOW"
