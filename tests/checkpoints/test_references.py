"""What a recipe may call a model, and what is refused before anybody is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merging.checkpoints.hub import Reference, parse_reference, split_adapter
from merging.errors import AmalgamError, HubError, InputError
from tests.checkpoints.hub_user import ROOT


@pytest.mark.parametrize(
    ("text", "repo_id", "revision"),
    [
        ("org/name", "org/name", "main"),
        ("Qwen/Qwen2.5-0.5B_x", "Qwen/Qwen2.5-0.5B_x", "main"),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/7", "org/name", "refs/pr/7"),
        ("org/name@v1.0+cpu", "org/name", "v1.0+cpu"),
        ("org/name@" + "a" * 40, "org/name", "a" * 40),
    ],
)
def test_names_of_models_on_the_hub(text: str, repo_id: str, revision: str) -> None:
    reference = parse_reference(text)
    assert (reference.kind, reference.repo_id, reference.revision) == ("hub", repo_id, revision)


@pytest.mark.parametrize(
    "text",
    [
        *["", "  ", "a\0b", "org/na\nme", "org/\u202eeman", "x" * 5000],
        *["https://huggingface.co/org/name", "http://127.0.0.1:8000/x", "hf://org/name", "ftp://org/name"],
        *[
            "file:///etc/passwd",
            "git+https://github.com/org/name",
            "huggingface.co/org/name",
            "s3://bucket/key",
        ],
        *["org/na--me", "org/na..me", "org/name.git", "org/" + "x" * 93, "o--rg/name"],
        *["org/name@", "org/name@..", "org/name@a/../b", "org/name@/etc", "org/name@a@b", "org/name@a b"],
        *["org/name@refs//pr", "org/name@-x", "org/name@x.lock", "org/name@" + "a" * 201, "org/name@a?b=c"],
    ],
)
def test_text_that_is_no_reference_is_refused_without_asking_anyone(text: str) -> None:
    with pytest.raises(HubError) as caught:
        parse_reference(text)
    assert caught.value.code == "E_HUB_REFERENCE"
    assert str(caught.value).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "text",
    [
        *["./x", "../x", ".", "/no/such/thing", "~/no-such-thing", "~no-such-user/x", "C:/x", "C:x"],
        *["D:\\x\\y", "org\\name", "org/name.safetensors", "name", "a/b/c", "org/", "/", "org/na me"],
        *["org/näme", "-org/name"],
    ],
)
def test_paths_to_nothing(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if text in (".", "/"):
        assert parse_reference(text).kind == "local"
        return
    with pytest.raises(InputError) as caught:
        parse_reference(text)
    assert caught.value.code == "E_NOT_FOUND"


def test_what_exists_here_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", "org/name@v1", "org/na--me", "a+b"):
        Path(name).mkdir(parents=True)
        assert parse_reference(name) == Reference(Path(name))
    assert split_adapter("a+b") == ("a+b", None)


@pytest.mark.parametrize("wrong", ["mathh", "./mathh", "experts/Mth", "experts/sub/x/y"])
def test_did_you_mean_a_folder(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("experts/math").mkdir(parents=True)
    Path("math").mkdir()
    if wrong == "experts/Mth":  # could be on the Hub: only its refusal brings the hint (tested below)
        assert parse_reference(wrong).kind == "hub"
        return
    with pytest.raises(InputError) as caught:
        parse_reference(wrong)
    assert ("Did you mean ./math?" in caught.value.fix) == wrong.endswith("mathh")


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://huggingface.co/org/name", "org/name."),
        ("https://huggingface.co/org/name/tree/v2?x=1", "org/name@v2."),
        ("huggingface.co/models/org/name/", "org/name."),
        ("hf://org/name", "org/name."),
    ],
)
def test_a_web_address_of_a_model_is_answered_with_its_name(address: str, name: str) -> None:
    with pytest.raises(HubError) as caught:
        parse_reference(address)
    assert caught.value.fix == f"Write {name}"


@given(st.text("ab1-._/@~:+ é", min_size=1, max_size=12) | st.text(min_size=1, max_size=8))
def test_no_text_causes_anything_but_a_typed_error_and_accepted_names_suit_the_client(text: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    try:
        reference = parse_reference(text)
    except AmalgamError:
        return
    if reference.kind == "hub":
        validate_repo_id(reference.repo_id)
        assert reference.repo_id.count("/") == 1


def test_split_adapter() -> None:
    assert split_adapter("org/base") == ("org/base", None)
    assert split_adapter("org/base@v1+org/lora@v2") == ("org/base@v1", "org/lora@v2")
    assert split_adapter("./base + ./lora") == ("./base", "./lora")
    for wrong in ("+lora", "base+", "a+b+c", "+"):
        with pytest.raises(HubError) as caught:
            split_adapter(wrong)
        assert caught.value.code == "E_HUB_REFERENCE"


def test_reading_a_reference_does_not_load_the_client() -> None:
    code = (
        "import merging.checkpoints.hub, sys\n"
        "print([name for name in ('huggingface_hub', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
