"""Which files of a repository are brought, with how many requests, and to whom."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints.hub_user import ANN, BOB, ROOT, User
from tests.checkpoints.stand_in_hub import Fault, StandInHub

WEIGHTS = bytes(range(256)) * 300
TINY = {"config.json": b"{}", "model.safetensors": WEIGHTS}


# ----------------------------------------------------------------------------- what is fetched, and how often


def test_one_model_first_again_and_offline(hub: StandInHub, user: User, tmp_path: Path) -> None:
    side = {
        name: f"content of {name}".encode()
        for name in ["README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
        + ["special_tokens_map.json", "merges.txt", "vocab.json", "tokenizer.model", "chat_template.jinja"]
        + ["additional_chat_templates/tools.jinja"]
    }
    other = {
        name: b"not needed"
        for name in [".gitattributes", "consolidated.safetensors", "pytorch_model.bin"]
        + ["fp16/model.safetensors", "fp16/config.json", "modeling_custom.py", "model.fp16.safetensors"]
        + ["onnx/model.onnx", "training_args.bin", "optimizer.pt", "additional_chat_templates/x.py"]
    }
    commit = hub.add("org/plain", {**side, **other, "model.safetensors": WEIGHTS})

    first = user.resolve("org/plain", tmp_path)
    assert first["reference"] == f"org/plain@{commit}" and first["commit"] == commit
    assert first["files"] == sorted([*side, "model.safetensors"]) and first["warnings"] == []
    assert (Path(first["path"]) / "model.safetensors").read_bytes() == WEIGHTS
    for name, content in side.items():
        assert (Path(first["path"]) / name).read_bytes() == content
    asked = hub.requests("org/plain")
    assert asked[0] == "GET /api/models/org/plain/revision/main"
    large = ["model.safetensors", "tokenizer.json", "tokenizer.model"]
    assert sorted(asked[1:]) == sorted(
        [f"GET /org/plain/resolve/@/{name}" for name in first["files"]]
        + [f"GET /store/org/plain/@/{name}" for name in large]
    )

    again = user.resolve("org/plain", tmp_path)
    assert (again["path"], again["files"]) == (first["path"], first["files"])
    assert hub.requests("org/plain")[len(asked) :] == ["GET /api/models/org/plain/revision/main"]

    pinned = user.resolve(f"org/plain@{commit}", tmp_path)
    assert (pinned["path"], pinned["reference"]) == (first["path"], first["reference"])

    before = len(hub.log)
    offline = user.resolve("org/plain", tmp_path, offline=True)
    assert (offline["path"], offline["reference"]) == (first["path"], first["reference"])
    assert "the Hub was not asked" in offline["warnings"][0]
    assert len(hub.log) == before


def test_only_the_shards_of_the_index(hub: StandInHub, user: User, tmp_path: Path) -> None:
    shards = {f"model-0000{n}-of-00003.safetensors": WEIGHTS[n:] for n in (1, 2, 3)}
    index = {"metadata": {}, "weight_map": {f"t{n}": name for n, name in enumerate([*shards, *shards])}}
    hub.add(
        "org/sharded",
        {
            **shards,
            "model.safetensors.index.json": json.dumps(index).encode(),
            "config.json": b"{}",
            "model-00004-of-00003.safetensors": b"stray",
            "consolidated.00.safetensors": b"the same again in another layout",
        },
    )
    found = user.resolve("org/sharded", tmp_path)
    assert found["files"] == sorted([*shards, "model.safetensors.index.json", "config.json"])
    gets = [line for line in hub.requests("org/sharded") if "/resolve/" in line]
    assert len(gets) == 5 and "index.json" in gets[0]
    before = len(hub.log)
    user.resolve("org/sharded", tmp_path)
    assert len(hub.log) == before + 1


def test_an_adapter(hub: StandInHub, user: User, tmp_path: Path) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}
    hub.add("org/lora", {**files, "adapter_model.bin": b""})
    assert user.resolve("org/lora", tmp_path)["files"] == sorted(files)


def test_a_branch_a_tag_and_a_moving_branch(hub: StandInHub, user: User, tmp_path: Path) -> None:
    old = hub.add("org/moving", TINY)
    hub.add("org/moving", TINY, revision="refs/pr/1")
    assert user.resolve("org/moving@refs/pr/1", tmp_path)["commit"] == old
    assert user.resolve("org/moving@refs/pr/1", tmp_path, offline=True)["commit"] == old
    assert user.resolve("org/moving", tmp_path)["commit"] == old
    new = hub.add("org/moving", {**TINY, "config.json": b'{"a": 1}'})
    before = len(hub.log)
    found = user.resolve("org/moving", tmp_path)
    assert found["commit"] == new and (Path(found["path"]) / "config.json").read_bytes() == b'{"a": 1}'
    assert len(hub.log) == before + 2  # the weights are the same and not fetched again
    assert user.resolve(f"org/moving@{old}", tmp_path)["commit"] == old


def test_single_file_and_index_at_once(hub: StandInHub, user: User, tmp_path: Path) -> None:
    index = b'{"weight_map": {"a": "other.safetensors"}}'
    hub.add("org/both", {**TINY, "model.safetensors.index.json": index, "other.safetensors": b"x"})
    found = user.resolve("org/both", tmp_path)
    assert found["files"] == sorted(TINY) and "as transformers does" in found["warnings"][0]


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "E_NOT_SAFETENSORS"),
        ({"model.Q4.gguf": b"x"}, "E_NOT_SAFETENSORS"),
        ({"README.md": b"x"}, "E_NOT_A_MODEL"),
        ({"fp16/model.safetensors": b"x"}, "E_NOT_A_MODEL"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}'}, "E_INDEX"),
        ({"model.safetensors.index.json": b'{"weight_map": {}}'}, "E_INDEX"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": 1}}'}, "E_INDEX"),
        ({"model.safetensors.index.json": b"[]"}, "E_INDEX"),
        ({"model.safetensors.index.json": b"<html>"}, "E_INDEX"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'}, "E_PATH"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "/etc/x.safetensors"}}'}, "E_PATH"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "x\\\\y.safetensors"}}'}, "E_PATH"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "pytorch_model.bin"}}'}, "E_PATH"),
    ],
)
def test_repositories_without_usable_weights(
    files: dict[str, bytes], code: str, hub: StandInHub, user: User, tmp_path: Path
) -> None:
    name = f"org/bad-{hashlib.md5(repr(files).encode()).hexdigest()}"
    hub.add(name, {"config.json": b"{}", **files})
    assert user.resolve(name, tmp_path)["code"] == code


def test_hostile_names_in_a_listing_lead_nowhere(hub: StandInHub, user: User, tmp_path: Path) -> None:
    names = ["../../../evil.json", "/tmp/evil.json", "..\\evil.json", "a/../config.json", "config.json/x"]
    names += ["additional_chat_templates/../../../evil.jinja", "additional_chat_templates/.jinja"]
    hub.add("org/evil", {**TINY, **{name: b"evil" for name in names}})
    cache = tmp_path / "deep" / "down" / "cache"
    assert user.resolve("org/evil", cache)["files"] == sorted(TINY)
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name.replace("models--org--evil", "")]
    assert not [line for line in hub.requests("org/evil") if "evil." in line]


# ------------------------------------------------------------------------------------------- who may read


@pytest.mark.parametrize("kind", ["private", "gated"])
def test_a_cached_model_is_not_given_to_somebody_else(kind: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    """The client itself hands out the cached file here (for a commit without any request)."""
    hub.users |= {ANN, BOB}
    name = f"org/{kind}"
    commit = hub.add(name, TINY, readers={ANN}, **{kind: True})
    assert user.resolve(name, tmp_path, token=ANN)["files"] == sorted(TINY)
    refused = "E_HUB_GATED" if kind == "gated" else "E_HUB_NOT_FOUND"
    for revision in ("", "@main", f"@{commit}"):
        for token in (BOB, ""):
            answer = user.resolve(name + revision, tmp_path, token=token)
            assert answer["code"] == refused
            assert ("hf auth login" in answer["text"]) == (token == "")
    assert user.resolve(name, tmp_path, token=ANN)["files"] == sorted(TINY)


def test_access_that_was_withdrawn(hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.add("org/withdrawn", TINY, readers={ANN}, gated=True)
    assert "path" in user.resolve("org/withdrawn", tmp_path, token=ANN)
    hub.repositories["org/withdrawn"].readers.clear()
    answer = user.resolve("org/withdrawn", tmp_path, token=ANN)
    assert answer["code"] == "E_HUB_GATED" and f"{hub.url}/org/withdrawn" in answer["text"]


def test_a_token_that_the_hub_does_not_know(hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.add("org/open", TINY)
    answer = user.resolve("org/open", tmp_path, token="hf_revoked")
    assert answer["code"] == "E_HUB_GATED" and "does not accept your access token" in answer["text"]
    for unsendable in (f"“{ANN}”", f"{ANN}\x01", f"{ANN}\nX: y"):
        answer = user.resolve("org/open", tmp_path, token=unsendable)
        assert answer["code"] == "E_HUB_GATED" and "characters" in answer["text"]


def test_the_token_goes_to_the_hub_only(hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.add("org/secret", TINY, readers={ANN}, private=True)
    user.resolve("org/secret", tmp_path, token=ANN)
    seen = [one for one in hub.log if "/org/secret" in one.path]
    assert {(one.origin, one.authorization) for one in seen} == {("hub", f"Bearer {ANN}"), ("cdn", "")}
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"canary" not in path.read_bytes()


# ------------------------------------------------------------------------------------------- not there


def test_a_model_that_does_not_exist(hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.add("lab/Parrot-7B", TINY)
    for wrong in ("lab/Parot-7B", "labb/parrot-7b", "lab/parrot-7b"):
        answer = user.resolve(wrong, tmp_path)
        assert answer["code"] == "E_HUB_NOT_FOUND"
        assert ("Did you mean lab/Parrot-7B?" in answer["text"]) == wrong.startswith("lab/")
    assert "Did you mean" not in user.resolve("nobody/nothing-like-it", tmp_path)["text"]
    answer = user.resolve("lab/Parrot-7B@v9", tmp_path)
    assert answer["code"] == "E_HUB_NOT_FOUND" and "no revision 'v9'" in answer["text"]
    assert user.resolve("lab/Parrot-7B@" + "0" * 40, tmp_path)["code"] == "E_HUB_NOT_FOUND"


def test_a_missing_folder_that_looks_like_a_name(hub: StandInHub, tmp_path: Path) -> None:
    (tmp_path / "experts" / "maths").mkdir(parents=True)
    code = (
        "from merging.checkpoints.hub import resolve\nfrom merging.errors import HubError\n"
        "try: resolve('experts/math')\nexcept HubError as error: print(error)"
    )
    environment = {"HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "Did you mean ./experts/maths?" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "body",
    [
        b"<html>Please log in to the wireless network</html>",
        *[b"{}", b"[]", b"null", b'{"id": "org/x", "sha": null, "siblings": []}'],
        b'{"id": "org/x", "sha": "../../../evil", "siblings": []}',
        b'{"id": "o/x", "sha": "%s", "siblings": [{"rfilename": "x", "size": 2}]}' % (b"a" * 40),
        b'{"id": "o/x", "sha": "%s", "siblings": [{"rfilename": "x", "size": 2, "blobId": "../../x"}]}' % (b"a" * 40),
    ],
)
def test_answers_that_make_no_sense(body: bytes, hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.add("org/nonsense", TINY)
    hub.describe_body["org/nonsense"] = body
    assert user.resolve("org/nonsense", tmp_path)["code"] == "E_HUB_NETWORK"
    assert list(tmp_path.iterdir()) == []


def test_another_commit_than_was_asked_for(hub: StandInHub, user: User, tmp_path: Path) -> None:
    commit = hub.add("org/mirror", TINY)
    hub.repositories["org/mirror"].revisions["b" * 40] = commit
    assert user.resolve("org/mirror@" + "b" * 40, tmp_path)["code"] == "E_HUB_NETWORK"


def test_a_busy_hub(hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.add("org/busy", TINY)
    hub.describe_status["org/busy"] = [429, 503]
    assert user.resolve("org/busy", tmp_path)["files"] == sorted(TINY)
    hub.describe_status["org/busy"] = [500] * 9
    answer = user.resolve("org/busy", tmp_path)
    assert answer["code"] == "E_HUB_NETWORK" and "status 500" in answer["text"]
    hub.describe_status["org/busy"] = [429]
    hub.retry_after = "3600"
    try:
        answer = user.resolve("org/busy", tmp_path)
    finally:
        hub.retry_after = "0"
    assert answer["code"] == "E_HUB_NETWORK" and "3600 seconds" in answer["text"]


def test_no_network(hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.add("org/cached", TINY)
    user.resolve("org/cached", tmp_path)
    lonely = User(hub, HF_ENDPOINT="http://ann:secret-password@127.0.0.1:9")
    try:
        answer = lonely.resolve("org/cached", tmp_path)
        assert answer["code"] == "E_HUB_OFFLINE" and "HF_HUB_OFFLINE=1" in answer["text"]
        assert "secret-password" not in answer["text"]
        answer = lonely.resolve("org/other", tmp_path)
        assert answer["code"] == "E_HUB_OFFLINE" and "HF_HUB_OFFLINE=1" not in answer["text"]
    finally:
        lonely.close()


def test_the_variable_for_offline_work(hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.add("org/kept", TINY)
    user.resolve("org/kept", tmp_path)
    before = len(hub.log)
    offline = User(hub, HF_HUB_OFFLINE="1")
    try:
        assert offline.resolve("org/kept", tmp_path)["files"] == sorted(TINY)
        assert offline.resolve("org/unknown", tmp_path)["code"] == "E_HUB_OFFLINE"
        assert offline.resolve("org/kept@v2", tmp_path)["code"] == "E_HUB_OFFLINE"
    finally:
        offline.close()
    assert len(hub.log) == before


def test_room_on_the_disk_is_looked_at_first(hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.add("org/huge", TINY)
    hub.faults["org/huge", "model.safetensors"] = Fault(claim={"size": 10**17})
    answer = user.resolve("org/huge", tmp_path)
    assert answer["code"] == "E_NO_SPACE" and "100000.0 TB are still to be downloaded" in answer["text"]
    assert [line for line in hub.requests("org/huge") if "resolve" in line] == []
