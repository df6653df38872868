"""``manifest.json``: what every byte of a finished model was when it was written.

The writer of the folder adds four keys to what the engine tells about the merge::

    "plan_hash":        the plan that was executed
    "files":            {"model.safetensors": {"size": 1234, "sha256": "…"}, …}       all files but this one
    "tensors":          {"lm_head.weight": {"file": "model.safetensors", "dtype": "BF16", "shape": [8, 8],
                         "sha256": "…"}, …}                                        bytes of the tensor alone
    "manifest_sha256":  SHA-256 of this manifest as it would be without this key

``render`` is a function of the content alone, so that *any* changed byte of the manifest shows: either the
text is no longer what ``render`` makes of its content, or its digest is wrong. The digests guard against
accidents, not against somebody who rewrites the model and the manifest together: that takes a signature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merging.checkpoints.files import read_whole
from merging.checkpoints.strict_json import parse_json
from merging.errors import InputError, VerificationError

NAME = "manifest.json"
DIGEST = "manifest_sha256"
_LARGEST = 1 << 28  # bytes; 60,000 tensors make about 15 MB


def render(content: Mapping[str, Any]) -> bytes:
    """JSON with one line per key, and one line per entry of every table below it.

    Raises ValueError or TypeError for what JSON cannot hold (NaN, foreign types).
    """
    lines = []
    for key, value in content.items():
        if isinstance(value, dict) and value:
            entries = ",\n".join(f"  {_name(name)}: {_compact(entry)}" for name, entry in value.items())
            lines.append(f"{_name(key)}: {{\n{entries}\n}}")
        else:
            lines.append(f"{_name(key)}: {_compact(value)}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("ascii")


def _name(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"the key {key!r} is not text")
    return json.dumps(key)


def _compact(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def seal(content: Mapping[str, Any]) -> bytes:
    """The bytes of the manifest file: ``content`` and, as its last key, the digest over it.

    Raises ValueError or TypeError for content that could not be read back.
    """
    if DIGEST in content:
        raise ValueError(f"{DIGEST} is added by seal itself")
    # Half a surrogate pair could be written, but no strict reader would take it.
    json.dumps(dict(content), ensure_ascii=False).encode("utf-8")
    return render({**content, DIGEST: hashlib.sha256(render(content)).hexdigest()})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of ``folder/manifest.json`` (without its digest), with every byte checked.

    Raises VerificationError E_MANIFEST if it is missing, damaged or not a manifest.
    """
    path = folder / NAME
    try:
        raw = read_whole(path, _LARGEST, "E_READ")
        content = parse_json(raw, str(path), depth=64, values=16_000_000)
    except InputError as error:
        raise _refusal(path, f"{error.what} {error.why}") from None
    if not isinstance(content, dict) or DIGEST not in content:
        raise _refusal(path, "It is not a manifest: its own digest is missing.")
    del content[DIGEST]
    # What was parsed holds no NaN and nothing foreign, so sealing it again cannot fail.
    if seal(content) != raw:
        raise _refusal(path, "Its bytes are not those that were written: its own digest does not fit.")
    problem = _malformed(content)
    if problem:
        raise _refusal(path, problem)
    return content


def _malformed(content: dict[str, Any]) -> str | None:
    """Why an undamaged manifest cannot be one of ours, or None. (Names lead to files: none may leave.)"""
    files, tensors = content.get("files"), content.get("tensors")
    if not isinstance(files, dict) or not isinstance(tensors, dict):
        return "The tables of files and tensors are missing."
    for name, entry in files.items():
        if not name or "/" in name or "\\" in name or "\0" in name or name in (".", "..", NAME):
            return f"It lists {name!r}, which is not the name of a file in this folder."
        if not isinstance(entry, dict) or type(entry.get("size")) is not int or not _digest_in(entry):
            return f"Size and SHA-256 of {name!r} are malformed."
    for name, entry in tensors.items():
        known = isinstance(entry, dict) and isinstance(entry.get("file"), str) and entry["file"] in files
        if not known or not _digest_in(entry):
            return f"The entry of tensor {name!r} is malformed."
    return None


def _digest_in(entry: dict[str, Any]) -> bool:
    value = entry.get("sha256")
    return isinstance(value, str) and len(value) == 64


def _refusal(path: Path, why: str) -> VerificationError:
    return VerificationError(
        "E_MANIFEST",
        f"There is no sound manifest in {path.parent}.",
        why,
        "Without it nothing can be verified: restore the folder, or merge again.",
    )
