"""What lies beside the weights: configurations that transformers accepts, bytes of one declared origin."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.checkpoints.layout import role
from merging.checkpoints.side_files import OutputFacts, SideFiles, collect, edit_config
from merging.checkpoints.tokenizer import align
from merging.checkpoints.vocabulary import read_vocabulary
from merging.errors import InputError, RecipeError
from tests import tiny_models
from tests.checkpoints.test_tokenizer import WORDS, folder_with, tokenizer_json

F32 = OutputFacts("float32")
TEMPLATE = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
OTHER = "{{ messages[0]['content'] }}"


def model(folder: Path, **files: Any) -> Path:
    return folder_with(folder, config_json={"model_type": "llama"}, tokenizer_json=tokenizer_json(WORDS), **files)


def write(result: SideFiles, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in result.files.items():
        (folder / name).write_bytes(content)
    return folder


def config_of(result: SideFiles) -> dict[str, Any]:
    return json.loads(result.files["config.json"])


# config.json


@pytest.mark.parametrize(
    ("config", "facts", "expected"),
    [
        ({}, F32, {"torch_dtype": "float32"}),
        ({"torch_dtype": "bfloat16"}, F32, {"torch_dtype": "float32"}),
        ({"dtype": "bfloat16"}, F32, {"dtype": "float32"}),
        ({"dtype": "float16", "torch_dtype": "float16"}, F32, {"dtype": "float32", "torch_dtype": "float32"}),
        (
            {"text_config": {"dtype": "bfloat16"}, "vision_config": {"torch_dtype": "bfloat16"}},
            F32,
            {"text_config": {"dtype": "float32"}, "vision_config": {"torch_dtype": "float32"}},
        ),
        (
            {"dtype": "float32", "_name_or_path": "/home/ann/m", "text_config": {"_name_or_path": "x"}},
            F32,
            {"dtype": "float32", "text_config": {}},
        ),
        ({"dtype": "float32", "quantization_config": None}, F32, {"dtype": "float32"}),
        (
            {"dtype": "x", "tie_word_embeddings": True},
            OutputFacts("x", tied=False),
            {"dtype": "x", "tie_word_embeddings": False},
        ),
        ({"dtype": "x"}, OutputFacts("x", tied=True), {"dtype": "x", "tie_word_embeddings": True}),
        (
            {"dtype": "x", "tie_word_embeddings": True},
            OutputFacts("x"),
            {"dtype": "x", "tie_word_embeddings": True},
        ),
        (
            {"dtype": "x", "text_config": {"vocab_size": 5}, "vision_config": {"vocab_size": 7}},
            OutputFacts("x", tied=True, rows=9),
            {
                "dtype": "x",
                "tie_word_embeddings": True,
                "text_config": {"vocab_size": 9, "tie_word_embeddings": True},
                "vision_config": {"vocab_size": 7},
            },
        ),
        ({"dtype": "x", "vocab_size": 5}, OutputFacts("x", rows=9), {"dtype": "x", "vocab_size": 9}),
        ({"dtype": "x"}, OutputFacts("x", rows=9), {"dtype": "x", "vocab_size": 9}),
    ],
    ids=range(13),
)
def test_config_describes_the_weights(config: dict[str, Any], facts: OutputFacts, expected: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    assert edit_config(config, facts, []) == expected
    assert config == before


LAYERED = {
    "dtype": "x",
    "architectures": ["A", "B", "C", "D"],
    "num_hidden_layers": 4,
    "layer_types": ["full", "slide", "full", "linear"],
    "no_rope_layers": [1, 1, 1, 0],
    "mlp_only_layers": [1, 3],
    "eos_token_id": [1, 2, 3, 4],
    "max_window_layers": 3,
}


@pytest.mark.parametrize(
    ("blocks", "kinds", "rope", "dense"),
    [
        ([0, 1, 2, 3], ["full", "slide", "full", "linear"], [1, 1, 1, 0], [1, 3]),
        ([0, 1], ["full", "slide"], [1, 1], [1]),
        ([0, 1, 1, 2, 3], ["full", "slide", "slide", "full", "linear"], [1, 1, 1, 1, 0], [1, 2, 4]),
        ([3, 0], ["linear", "full"], [0, 1], [0]),
    ],
)
def test_lists_per_block_follow_the_blocks(
    blocks: list[int], kinds: list[str], rope: list[int], dense: list[int]
) -> None:
    notes: list[str] = []
    edited = edit_config(LAYERED, OutputFacts("x", blocks=blocks), notes)
    assert edited == LAYERED | {
        "num_hidden_layers": len(blocks),
        "layer_types": kinds,
        "no_rope_layers": rope,
        "mlp_only_layers": dense,
    }
    moved = blocks != list(range(len(blocks)))
    assert any("max_window_layers" in note for note in notes) == moved


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "n_layers", "num_layers"])
def test_the_count_of_blocks_is_found(key: str) -> None:
    assert edit_config({key: 4}, OutputFacts("x", blocks=[0]), [])[key] == 1
    nested = edit_config({"text_config": {key: 4}}, OutputFacts("x", blocks=[0]), [])
    assert nested["text_config"][key] == 1


def test_blocks_that_the_configuration_does_not_know() -> None:
    with pytest.raises(RecipeError) as caught:
        edit_config(LAYERED, OutputFacts("x", blocks=[0, 7]), [])
    assert caught.value.code == "E_RECIPE_UNSUPPORTED"
    notes: list[str] = []
    edit_config({}, OutputFacts("x", blocks=[0, 1]), notes)
    assert notes == ["config.json does not state the number of blocks; the output has 2."]


def test_quantised_configurations_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        edit_config({"quantization_config": {"bits": 4}}, F32, [])
    assert caught.value.code == "E_QUANTIZED"


def test_remote_code_is_pointed_out_and_never_copied(tmp_path: Path) -> None:
    code = {"AutoModel": "modeling_x.Model"}
    folder = folder_with(
        tmp_path, config_json={"auto_map": code}, modeling_x_py="raise SystemExit", README_md="# hello"
    )
    result = collect([folder], ["base"], F32)
    assert set(result.files) == {"config.json"}
    assert any("auto_map" in note for note in result.notes)
    assert "Not copied from base: 'modeling_x.py'." in result.notes


# Whole models, loaded by transformers


@pytest.mark.parametrize(("kind", "blocks"), [("qwen2", [0, 1, 0, 1, 1]), ("llama", [1]), ("gpt2", [1, 0, 1])])
def test_stacked_models_load(tmp_path: Path, kind: str, blocks: list[int]) -> None:
    base = tiny_models.build(kind, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    stacked = {}
    for name, tensor in weights.items():
        old = role(name, tuple(tensor.shape)).block
        if old is None:
            stacked[name] = tensor
        for new, source in enumerate(blocks):
            if source == old:
                stacked[name.replace(f".{old}.", f".{new}.", 1)] = tensor.clone()
    out = write(collect([base], ["base"], OutputFacts("float32", blocks=blocks)), tmp_path / "out")
    save_file(stacked, out / "model.safetensors", {"format": "pt"})
    assert torch.isfinite(tiny_models.logits(out, kind)).all()  # fails on any key that does not fit


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_configurations_of_real_models_survive(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig

    base = tiny_models.build(kind, tmp_path / "base")
    tied = {"qwen2": True, "gpt2": True, "llama": False, "mistral": False}.get(kind)
    rows = None if kind == "vit" else 99
    result = collect([base], ["base"], OutputFacts("bfloat16", tied, rows))
    loaded = AutoConfig.from_pretrained(write(result, tmp_path / "out"))
    assert loaded.dtype == torch.bfloat16
    before = AutoConfig.from_pretrained(base)
    before.dtype = torch.bfloat16
    unlike = {
        key: value
        for key, value in loaded.to_dict().items()
        if before.to_dict().get(key) != value and key not in ("_name_or_path", "tie_word_embeddings")
    }
    assert not unlike
    if tied is not None:
        assert loaded.tie_word_embeddings == tied


@pytest.mark.parametrize("untie", [True, False])
def test_the_tie_flag_agrees_with_the_tensors(tmp_path: Path, untie: bool) -> None:
    """A flag that says tied while the tensors differ makes some loaders overwrite the head."""
    base = tiny_models.build("qwen2", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone() * (3 if untie else 1)
    out = write(collect([base], ["base"], OutputFacts("float32", tied=not untie)), tmp_path / "out")
    save_file(weights | ({"lm_head.weight": head} if untie else {}), out / "model.safetensors", {"format": "pt"})
    expected = tiny_models.logits(base, "qwen2") * (3 if untie else 1)
    torch.testing.assert_close(tiny_models.logits(out, "qwen2"), expected)


def test_an_extended_vocabulary_works_in_transformers(tmp_path: Path) -> None:
    """Tokenizer, table and configuration agree on the number of every token, also of the appended ones."""
    from transformers import AutoConfig, AutoTokenizer

    base = model(tmp_path / "base", tokenizer_config_json={"tokenizer_class": "PreTrainedTokenizerFast"})
    chat = folder_with(
        tmp_path / "chat",
        config_json={"model_type": "llama"},
        tokenizer_json=tokenizer_json(WORDS, ["<|im_start|>", "<|im_end|>"]),
        tokenizer_config_json={"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE},
        generation_config_json={"eos_token_id": 6},
    )
    found = align([read_vocabulary(base), read_vocabulary(chat)], [5, 7])
    result = collect([base, chat], ["base", "chat"], OutputFacts("float32", rows=found.rows), added=found.added)
    out = write(result, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == {text: i for i, text in enumerate([*WORDS, "<|im_start|>", "<|im_end|>"])}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<a>"
    assert AutoConfig.from_pretrained(out).vocab_size == 7
    assert json.loads(result.files["generation_config.json"]) == {"eos_token_id": 6}
    assert result.origins["tokenizer.json"] == "base" and result.origins["generation_config.json"] == "chat"


# Files and where they come from


def test_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    files = {
        "tokenizer_config_json": '{ "tokenizer_class":"X",\n\n"chat_template": "{{ 1 }}"}',
        "special_tokens_map_json": '{"a":   1}',
        "vocab_json": "{}",
        "merges_txt": "#version: 0.2\r\n",
        "chat_template_jinja": "{{ 1 }}\n\n",
        "generation_config_json": '{"eos_token_id":[1,\t2]}',
        "preprocessor_config_json": '{"size": 3 }',
        "processor_config_json": "{}",
        "tokenizer_model": b"\x00\xff",
    }
    base = model(tmp_path, **files, training_args_bin=b"x", optimizer_pt=b"x", notes_txt="x", README_md="x")
    result = collect([base], ["org/base"], F32)
    for name, content in result.files.items():
        if name != "config.json":
            assert content == (base / name).read_bytes()
    assert set(result.files) == {
        "config.json",
        "tokenizer.json",
        *(".".join(name.rsplit("_", 1)) for name in files),
    }
    assert set(result.origins.values()) == {"org/base"}
    assert result.notes == ["Not copied from org/base: 'notes.txt'."]
    assert collect([base], ["org/base"], F32) == result


def test_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    base = folder_with(
        tmp_path / "base",
        config_json={"eos_token_id": 1, "bos_token_id": 3},
        tokenizer_json=tokenizer_json(WORDS),
        merges_txt="base's",
        generation_config_json={"eos_token_id": 1},
        preprocessor_config_json={"size": 1},
    )
    other = folder_with(
        tmp_path / "other",
        config_json={"eos_token_id": 2, "bos_token_id": 3, "hidden_size": 7},
        tokenizer_json=tokenizer_json(["x", *WORDS]),
        generation_config_json={"eos_token_id": 2},
        preprocessor_config_json={"size": 2},
    )
    result = collect([base, other], ["base", "other"], F32, tokenizer=1)
    assert result.files["tokenizer.json"] == (other / "tokenizer.json").read_bytes()
    assert "merges.txt" not in result.files  # never a mixture of two tokenizers
    assert config_of(result) == {"eos_token_id": 2, "bos_token_id": 3, "torch_dtype": "float32"}
    assert result.origins["generation_config.json"] == "other"
    assert result.origins["preprocessor_config.json"] == "base"
    assert "eos_token_id in config.json are those of other" in result.notes[0]


def test_a_base_without_a_tokenizer(tmp_path: Path) -> None:
    base = folder_with(tmp_path / "base", config_json={})
    expert = model(tmp_path / "expert")
    assert collect([base, expert], ["base", "expert"], F32).origins["tokenizer.json"] == "expert"


def test_a_single_file_has_nothing_to_copy(tmp_path: Path) -> None:
    result = collect([tmp_path], ["model.safetensors"], F32)
    assert result.files == {}
    assert result.notes == ["model.safetensors has no config.json, so the output has none either."]


def test_generation_settings(tmp_path: Path) -> None:
    """Settings lost, or an end token lost, and the model never stops."""
    base = model(tmp_path / "base")
    one = model(tmp_path / "one", generation_config_json={"eos_token_id": [1, 2]})
    two = model(tmp_path / "two", generation_config_json={"eos_token_id": 3})
    names = ["base", "one", "two"]

    agreed = collect([base, one, one], names, F32)
    assert agreed.origins["generation_config.json"] == "one"
    differing = collect([base, one, two], names, F32)
    assert "generation_config.json" not in differing.files
    assert any("generation_config.json is not written" in note for note in differing.notes)
    own = collect([two, one, base], ["two", "one", "base"], F32)
    assert own.origins["generation_config.json"] == "two"
    assert any("one also stops at 'a', 'b'" in note for note in own.notes)

    renumbered = folder_with(
        tmp_path / "renumbered",
        config_json={},
        tokenizer_json=tokenizer_json(["<unk>", "ab", "a", "b", "c"]),
        generation_config_json={"eos_token_id": 1},
    )
    assert not collect([two, renumbered], ["two", "renumbered"], F32).notes  # number 1 there is token 3 here


# Chat templates


def jinja(folder: Path, text: str | None = TEMPLATE, **files: Any) -> Path:
    return model(folder, **({} if text is None else {"chat_template_jinja": text}), **files)


def template_of(result: SideFiles, folder: Path) -> Any:
    """As transformers sees it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(write(result, folder), tokenizer_type=None).chat_template


@pytest.mark.parametrize("place", ["jinja", "config", "none"])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", {"jinja": TEMPLATE, "config": TEMPLATE, "none": OTHER}),
        ("base", {"jinja": TEMPLATE, "config": TEMPLATE, "none": None}),
        (None, {"jinja": TEMPLATE, "config": TEMPLATE, "none": None}),
        ("most", {"jinja": OTHER, "config": OTHER, "none": OTHER}),
        ("none", {"jinja": None, "config": None, "none": None}),
        (1, {"jinja": OTHER, "config": OTHER, "none": OTHER}),
        ("{{ 'own' }}", {"jinja": "{{ 'own' }}", "config": "{{ 'own' }}", "none": "{{ 'own' }}"}),
    ],
)
def test_the_chosen_template_is_what_transformers_sees(
    tmp_path: Path, place: str, inside: bool, choice: Any, expected: dict[str, str | None]
) -> None:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    base = model(
        tmp_path / "base",
        tokenizer_config_json=config | ({"chat_template": TEMPLATE} if place == "config" else {}),
        **({"chat_template_jinja": TEMPLATE} if place == "jinja" else {}),
    )
    if inside:
        experts = [model(tmp_path / f"e{i}", tokenizer_config_json=config | {"chat_template": OTHER}) for i in (1, 2)]
    else:
        experts = [jinja(tmp_path / f"e{i}", OTHER, tokenizer_config_json=config) for i in (1, 2)]
    result = collect([base, *experts], ["base", "e1", "e2"], F32, chat_template=choice)
    assert template_of(result, tmp_path / "out") == expected[place]


def test_templates_that_differ_need_a_choice(tmp_path: Path) -> None:
    folders = [jinja(tmp_path / "b", None), jinja(tmp_path / "x"), jinja(tmp_path / "y", OTHER)]
    result = collect(folders, ["b", "x", "y"], F32)
    assert "chat_template.jinja" not in result.files
    assert "The chat templates of x, y differ, so none is written; choose one of these models." in result.notes


def test_template_bytes_are_those_of_the_source(tmp_path: Path) -> None:
    text = "{{ 'ünï' }}\r\n\n"
    base, expert = jinja(tmp_path / "base", None), jinja(tmp_path / "expert")
    (expert / "chat_template.jinja").write_bytes(text.encode())
    result = collect([base, expert], ["base", "expert"], F32)
    assert result.files["chat_template.jinja"] == text.encode()
    assert result.origins["chat_template.jinja"] == "expert"
    assert result.notes == ["The chat template is that of expert; base has none."]


def test_a_list_of_named_templates_is_kept(tmp_path: Path) -> None:
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tools", "template": OTHER}]
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    base = model(tmp_path / "base", tokenizer_config_json=config)
    expert = model(tmp_path / "expert", tokenizer_config_json=config | {"chat_template": named})
    result = collect([base, expert], ["base", "expert"], F32)
    assert template_of(result, tmp_path / "out") == {"default": TEMPLATE, "tools": OTHER}


def test_templates_are_never_rendered(tmp_path: Path) -> None:
    """An endless loop, and a walk to os.system: copied as they are, in no time."""
    evil = "{% for i in range(10**12) %}{{ ''.__class__.__mro__[1].__subclasses__() }}{% endfor %}"
    result = collect([jinja(tmp_path, evil)], ["base"], F32)
    assert result.files["chat_template.jinja"] == evil.encode()


@pytest.mark.parametrize("choice", ["chatml", "automatic", "", 1, 5, -1])
def test_choices_that_do_not_exist(tmp_path: Path, choice: str | int) -> None:
    folders = [jinja(tmp_path / "a"), jinja(tmp_path / "b", None)]
    with pytest.raises(RecipeError) as caught:
        collect(folders, ["a", "b"], F32, chat_template=choice)
    assert caught.value.code == "E_RECIPE_FIELD"


# Hostile folders


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "merges.txt"]
)
@pytest.mark.parametrize("what", ["link", "dangling", "pipe", "folder"])
def test_only_plain_files_are_copied(tmp_path: Path, name: str, what: str) -> None:
    """A link in a downloaded folder must not bring one of the user's own files into a published model."""
    secret = folder_with(tmp_path / "home", token_json='{"secret": 1}') / "token.json"
    base = model(tmp_path / "base")
    (base / name).unlink(missing_ok=True)
    if what in ("link", "dangling"):
        (base / name).symlink_to(secret if what == "link" else tmp_path / "nowhere")
    elif what == "pipe":
        os.mkfifo(base / name)
    else:
        (base / name).mkdir()
    with pytest.raises(InputError) as caught:
        collect([base], ["base"], F32)
    assert caught.value.code == "E_PATH"


def test_the_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    plain = jinja(tmp_path / "plain")
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert collect([snapshot], ["m"], F32) == collect([plain], ["m"], F32)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "chat_template.json"])
@pytest.mark.parametrize("content", ["", "[]", "3", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, "\ufeff{}"])
def test_malformed_json_is_refused(tmp_path: Path, name: str, content: str) -> None:
    base = model(tmp_path)
    (base / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        collect([base], ["base"], F32)
    assert caught.value.code == "E_JSON"
