"""The cache is the one that all Hugging Face tools share: damage in it is found, whoever put it there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints.hub_user import FILES, LARGE, SMALL, WEIGHTS, User, asked, right
from tests.checkpoints.stand_in_hub import StandInHub


def damage_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def replace_file(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"x" * len(FILES[LARGE]))


@pytest.mark.parametrize("file", [LARGE, SMALL])
@pytest.mark.parametrize("damage", [damage_byte, cut_short, empty, replace_file, os.unlink])
def test_damage_in_the_cache(
    damage: Callable, file: str, name: str, hub: StandInHub, user: User, tmp_path: Path
) -> None:
    path = Path(user.resolve(name, tmp_path)["path"]) / file
    damage(path.resolve())
    offline = user.resolve(name, tmp_path, offline=True)
    assert offline["code"] == ("E_HUB_OFFLINE" if damage is os.unlink else "E_HUB_CHECKSUM")
    assert right(user.resolve(name, tmp_path))
    assert asked(hub, name, file) == ["", ""]
    assert "path" in user.resolve(name, tmp_path, offline=True)


def test_a_checked_file_is_not_read_again(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    """Seen by damage that hides from size and time; found as soon as one of them shows a change."""
    blob = (Path(user.resolve(name, tmp_path)["path"]) / LARGE).resolve()
    before = blob.stat()
    with open(blob, "r+b") as file:
        file.write(b"hidden")
    os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not right(user.resolve(name, tmp_path))
    os.utime(blob)
    assert right(user.resolve(name, tmp_path))


def test_notes_do_not_travel(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    """A cache copied to another disk has other inodes and times: all is hashed again, nothing is fetched."""
    user.resolve(name, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
    damage_byte((next((tmp_path / "b").glob("*/snapshots/*")) / LARGE).resolve())
    assert right(user.resolve(name, tmp_path / "b"))
    assert len(asked(hub, name, LARGE)) == 2 and len(asked(hub, name, SMALL)) == 1


def test_the_cache_is_the_one_of_all_tools(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    found = user.resolve(name, tmp_path / "ours")
    other = user.other_tool(tmp_path / "ours", repo_id=name, file=LARGE, offline=True)
    assert other["path"] == str(Path(found["path"]) / LARGE)

    for file in FILES:
        user.other_tool(tmp_path / "theirs", repo_id=name, file=file)
    before = len(hub.log)
    assert right(user.resolve(name, tmp_path / "theirs"))
    assert len(hub.log) == before + 1
    assert len(list((tmp_path / "theirs").glob("models--*/.amalgam/*.checked"))) == len(FILES)


def test_offline_with_what_another_tool_left(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    for file in FILES:
        user.other_tool(tmp_path, repo_id=name, file=file)
    answer = user.resolve(name, tmp_path, offline=True)
    assert right(answer) and "another tool" in answer["warnings"][1]
    damage_byte((Path(answer["path"]) / LARGE).resolve())
    assert user.resolve(name, tmp_path, offline=True)["code"] == "E_HUB_CHECKSUM"
    (Path(answer["path"]) / LARGE).unlink()
    answer = user.resolve(name, tmp_path, offline=True)
    assert answer["code"] == "E_HUB_OFFLINE" and "no weights" in answer["text"]


def test_offline_with_shards_missing(hub: StandInHub, user: User, tmp_path: Path) -> None:
    shards = {f"model-0000{n}-of-00002.safetensors": WEIGHTS[n:] for n in (1, 2)}
    index = json.dumps({"weight_map": {f"t{n}": shard for n, shard in enumerate(shards)}}).encode()
    hub.add("org/halves", {**shards, "model.safetensors.index.json": index})
    for file in ("model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        user.other_tool(tmp_path, repo_id="org/halves", file=file)
    answer = user.resolve("org/halves", tmp_path, offline=True)
    assert answer["code"] == "E_HUB_OFFLINE" and "model-00002-of-00002.safetensors" in answer["text"]


def test_a_link_out_of_the_cache_is_replaced(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    """Even to the right bytes: what lies outside can be changed by whoever put the link there."""
    path = Path(user.resolve(name, tmp_path / "cache")["path"]) / LARGE
    blob = path.resolve()
    blob.rename(tmp_path / "outside")
    blob.symlink_to(tmp_path / "outside")
    os.utime(tmp_path / "outside", ns=(1, 1))
    assert right(user.resolve(name, tmp_path / "cache"))
    assert not blob.is_symlink() and (tmp_path / "outside").exists()


def test_a_blob_that_repositories_share(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    """huggingface_hub 2 keeps some blobs in ``<cache>/blobs/<two digits>/<hash>``, behind one more link."""
    blob = (Path(user.resolve(name, tmp_path)["path"]) / LARGE).resolve()
    shared = tmp_path / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    os.utime(shared)
    assert right(user.resolve(name, tmp_path)) and right(user.resolve(name, tmp_path, offline=True))
    assert asked(hub, name, LARGE) == [""] and blob.is_symlink()


def test_a_cache_that_cannot_be_written(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    answer = user.resolve(name, tmp_path / "cache")
    assert answer["code"] == "E_OUTPUT_WRITE" and str(tmp_path / "cache") in answer["text"]
