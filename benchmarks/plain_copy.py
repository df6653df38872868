"""The floor: what moving a merge's bytes costs when nothing is computed.

Reads every input file in blocks and writes the first model's bytes. It imports torch, as any merge must.
``--verified`` also hashes what it writes (SHA-256) and waits until it is on the disk: what a merge that
can be trusted after a power cut has to do on top.

    python -m benchmarks.plain_copy [--verified] OUT MODEL [MODEL ...]
"""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path

import torch  # noqa: F401  part of the floor

BLOCK = 1 << 20  # stays in the cache of a core


def copy(models: list[Path], out: Path, verified: bool) -> str:
    """Reads ``models``, writes the first to ``out``. Returns the SHA-256 of its bytes if ``verified``."""
    buffer = memoryview(bytearray(BLOCK))
    digest = hashlib.sha256()
    out.mkdir()
    for model in models:
        for path in sorted(model.glob("*.safetensors")):
            with open(path, "rb", buffering=0) as source:
                if model is not models[0]:
                    while source.readinto(buffer):
                        pass
                    continue
                with open(out / path.name, "wb", buffering=0) as target:
                    while count := source.readinto(buffer):
                        target.write(buffer[:count])
                        if verified:
                            digest.update(buffer[:count])
                    if verified:
                        os.fsync(target.fileno())
    return digest.hexdigest() if verified else ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--verified", action="store_true")
    parser.add_argument("out", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    options = parser.parse_args()
    print(copy(options.models, options.out, options.verified))


if __name__ == "__main__":
    main()
