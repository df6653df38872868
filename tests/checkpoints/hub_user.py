"""A person at another computer: a process with the real huggingface_hub client, a cache and perhaps a token.

A process of its own, because that client reads its settings once, when it is imported. ``User`` asks it to do
things and checks each answer for secrets that must not be in there.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.checkpoints.stand_in_hub import PIECE, SIGNATURE, StandInHub

ROOT = Path(__file__).resolve().parents[2]
ANN, BOB = "hf_canaryAnnAnnAnnAnnAnnAnnAnnAnnAnn", "hf_canaryBobBobBobBobBobBobBobBobBob"
SECRETS = (ANN, BOB, SIGNATURE)

WEIGHTS = random.Random(0).randbytes(40 * PIECE)
LARGE, SMALL = "model.safetensors", "config.json"
FILES = {LARGE: WEIGHTS, SMALL: b'{"model_type": "llama"}'}

WORKER = """
import json, logging, os, sys
logging.basicConfig(level=logging.WARNING)
logging.getLogger("huggingface_hub").setLevel(logging.DEBUG)
from merging.checkpoints import hub, hub_client
from merging.errors import AmalgamError, Cancelled
from huggingface_hub import constants, hf_hub_download

hub_client.RETRY_WAITS = (0.02, 0.02)

def resolve(text, offline=False, cancel_at=None):
    seen = []
    def progress(done, total, name):
        seen.append((done, total, name))
        if cancel_at is not None and done >= cancel_at:
            raise Cancelled()
    try:
        found = hub.resolve(text, offline=offline, progress=progress)
    except AmalgamError as error:
        return {"code": error.code, "text": str(error), "progress": seen}
    return {
        "path": str(found.path), "reference": found.reference, "commit": found.commit, "progress": seen,
        "warnings": found.warnings, "files": sorted(
            os.path.relpath(os.path.join(folder, name), found.path)
            for folder, _, names in os.walk(found.path) for name in names
        ),
    }

def other_tool(repo_id, file, offline=False):
    return {"path": hf_hub_download(repo_id, file, local_files_only=offline)}

print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token := request.pop("token"):
        os.environ["HF_TOKEN"] = token
    constants.HF_HUB_CACHE = request.pop("cache")
    print(json.dumps(globals()[request.pop("do")](**request)), flush=True)
"""


class User:
    def __init__(self, hub: StandInHub, **environment: str):
        self._home = tempfile.TemporaryDirectory(prefix="amalgam-user-")
        self._log = open(Path(self._home.name) / "log", "w+")  # noqa: SIM115
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": self._home.name,
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*",
            "PYTHONPATH": str(ROOT),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **settings, **environment},
        )
        assert self._process.stdout.readline() == "ready\n", self.log()

    def start(self, do: str, cache: Path, token: str = "", **request: Any) -> None:
        request |= {"do": do, "cache": str(cache), "token": token}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        assert line, self.log()
        for secret in SECRETS:
            assert secret not in line
        return json.loads(line)

    def resolve(self, text: str, cache: Path, **request: Any) -> dict[str, Any]:
        self.start("resolve", cache, text=text, **request)
        return self.answer()

    def other_tool(self, cache: Path, **request: Any) -> dict[str, Any]:
        """The same file by plain ``hf_hub_download``."""
        self.start("other_tool", cache, **request)
        return self.answer()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def log(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text()

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process.stdout.close()
        text = self.log()
        self._log.close()
        self._home.cleanup()
        for token in (ANN, BOB):
            assert token not in text


def asked(hub: StandInHub, name: str, file: str) -> list[str]:
    """The Range header of each request for the bytes of ``file``."""
    start = f"/store/{name}/" if file == LARGE else f"/{name}/resolve/"
    return [one.range for one in hub.log if one.path.startswith(start) and one.path.endswith(f"/{file}")]


def right(answer: dict) -> bool:
    """Whether the answer's folder holds FILES, byte for byte."""
    folder = Path(answer["path"])
    return all((folder / file).read_bytes() == content for file, content in FILES.items())
