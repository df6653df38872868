"""Looking at the Hub without downloading: search, headers, and what is in the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from merging.checkpoints.hub_cache import cached_models, find_here
from merging.checkpoints.hub_search import _model, search_models
from merging.errors import HubError

from .stand_in_hub import StandInHub

ROOT = Path(__file__).resolve().parents[2]
CONFIG = json.dumps({"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 1}).encode()
# A process of its own: the client reads its settings when it is imported.
LOOK = """
import json, sys
from pathlib import Path
from merging.checkpoints.hub import resolve
from merging.checkpoints.hub_cache import cached_models, find_here
from merging.checkpoints.hub_headers import bring_headers, find_headers
from merging.checkpoints.hub_search import search_models
from merging.errors import AmalgamError
from merging.preflight import preflight

folder, said = Path(sys.argv[1]), {}
def attempt(name, act):
    try:
        said[name] = act()
    except AmalgamError as error:
        said[name] = [error.code, error.what, error.fix]
def finder(text):
    return find_headers(text, folder) or find_here(text)
def checked():
    done = preflight({"base": "org/base", "experts": [{"model": "org/expert", "name": "e"}]}, find=finder)
    return [[c.finding.code, c.finding.severity, [f.action for f in c.fixes]] for c in done.checks]
attempt("search", lambda: [m.repo_id for m in search_models("e")])
attempt("before", checked)
for name in ("org/base", "org/expert", "org/nothing", "org/broken"):
    attempt(name, lambda: str(bring_headers(name, folder).path))
attempt("after", checked)
attempt("room", lambda: sum(p.stat().st_blocks * 512 for p in folder.rglob("*.safetensors")))
attempt("cached before", lambda: [m.reference for m in cached_models()])
attempt("brought", lambda: resolve("org/expert").commit)
attempt("cached", lambda: [[m.reference, m.is_adapter, m.bytes > 0] for m in cached_models()])
attempt("here", lambda: find_here("org/expert").commit)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[StandInHub]:
    server = StandInHub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def said(hub: StandInHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def weights(seed: int, width: int = 256) -> bytes:
        generator = torch.Generator().manual_seed(seed)
        return save({f"model.layers.{i}.mlp.up_proj.weight": torch.randn(width, 4096, generator=generator)
                     for i in range(2)})  # fmt: skip

    hub.add("org/base", {"model.safetensors": weights(0), "config.json": CONFIG})
    hub.add("org/expert", {"model.safetensors": weights(1, 128), "config.json": CONFIG})
    hub.add("org/broken", {"model.safetensors": b"\xff" * 20_000, "config.json": CONFIG})
    folder = tmp_path_factory.mktemp("hub")
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOOK, str(folder / "headers")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_search_asks_once_and_only_for_weights_that_can_be_read(said: dict[str, Any], hub: StandInHub) -> None:
    assert "org/base" in said["search"]
    assert hub.log[0].path == "/api/models" and hub.log[1].path != "/api/models"


def test_headers_tell_that_models_do_not_fit_before_any_weight_moves(said: dict[str, Any]) -> None:
    assert ["absent", "problem", ["headers", "download"]] in said["before"]
    found = {code: (severity, actions) for code, severity, actions in said["after"]}
    assert found["E_SHAPE"][0] == "problem" and found["remote"] == ("note", ["download"])
    assert "same" not in found  # holes are not compared
    assert said["room"] < 500_000  # of 12 MB of weights


def test_headers_that_are_none_and_models_that_are_not_there(said: dict[str, Any]) -> None:
    assert said["org/broken"][0] == "E_HEADER_SIZE" and said["org/nothing"][0] == "E_HUB_NOT_FOUND"


def test_the_cache_lists_what_can_be_used(said: dict[str, Any]) -> None:
    assert said["cached before"] == []  # side files alone are no model
    assert said["cached"] == [["org/expert", False, True]] and said["here"] == said["brought"]


def test_no_network_says_what_can_be_done_without_it() -> None:
    with pytest.raises(HubError) as caught:  # nobody listens at this endpoint, see conftest.py
        search_models("qwen")
    assert caught.value.code == "E_HUB_OFFLINE" and "without the Hub" in caught.value.fix
    with pytest.raises(HubError, match="nothing to search"):
        search_models("  ")
    with pytest.raises(HubError, match="not on this computer"):
        find_here("org/model")
    assert cached_models() == []


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("merging.checkpoints.hub_search._get", lambda *_, **__: pytest.fail("it asked"))
    with pytest.raises(HubError, match="Offline mode is on"):
        search_models("qwen")


def test_what_a_repository_says_of_itself() -> None:
    entry = {
        "id": "org/math-7b", "downloads": 1234, "likes": 5, "gated": "manual", "lastModified": "2025-03-31T10:00:00Z",
        "tags": ["safetensors", "license:apache-2.0", "base_model:org/base", "base_model:finetune:org/base"],
        "safetensors": {"parameters": {"BF16": 10, "F32": 2}, "total": 12},
    }  # fmt: skip
    model = _model(entry)
    assert model is not None and (model.parameters, model.bytes, model.licence) == (12, 28, "apache-2.0")
    assert model.bases == ("org/base",) and model.gated and not model.is_adapter and model.changed == "2025-03-31"


@pytest.mark.parametrize(
    "entry",
    [
        {"id": "<img src=x onerror=alert(1)>/x"}, {"id": 7}, {}, {"id": "org/x/../y"}, {"id": "org"},
    ],
)  # fmt: skip
def test_names_that_are_none_are_left_out(entry: dict[str, Any]) -> None:
    assert _model(entry) is None


def test_fields_of_another_form_are_left_out() -> None:
    model = _model({"id": "org/x", "downloads": "many", "likes": -3, "tags": ["license:<b>", 7, "base_model:<i>/x"],
                    "safetensors": {"parameters": {"BF16": "1", "X": 3}}, "lastModified": "<script>"})  # fmt: skip
    assert model is not None
    assert (model.downloads, model.likes, model.licence, model.bases) == (None, None, "", ())
    assert (model.parameters, model.bytes, model.changed) == (None, None, "")
