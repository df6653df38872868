"""Quantised checkpoints are refused: their numbers are codes, and the average of two codes means nothing.

They show themselves in three places: ``quantization_config`` in config.json, data types of fewer than 16
bits, and tensors beside the weights that hold scales (bitsandbytes, GPTQ, AWQ, compressed-tensors, fp8).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

from merging.checkpoints.files import shown
from merging.checkpoints.header import ITEM_BITS
from merging.checkpoints.weight_file import WeightFile
from merging.errors import InputError

_QUANTIZED_NAMES = (
    ".qweight", ".qzeros", ".SCB", ".absmax", ".quant_map", ".nested_absmax",
    ".weight_scale_inv", ".weight_scale", ".weight_packed", "_scale_inv",
)  # fmt: skip
_QUANTIZED_PART = re.compile(r"\.quant_state\.|\.SCB$")
_STRANGE_TYPES = {dtype for dtype in ITEM_BITS if dtype.startswith(("F8_", "F6_")) or dtype == "F4"}


def refuse_quantized_config(config: dict[str, Any] | None, path: Path) -> None:
    """InputError E_QUANTIZED if the configuration says that the weights are quantised."""
    parts = [config or {}, *(part for part in (config or {}).values() if type(part) is dict)]
    if any(part.get("quantization_config") for part in parts):
        _quantized(path, "config.json has a quantization_config")


def refuse_quantized(file: WeightFile) -> None:
    """InputError E_QUANTIZED if names or data types of the tensors show packed or scaled weights."""
    for entry in file.header.tensors.values():
        if entry.dtype in _STRANGE_TYPES:
            _quantized(file.path, f"{shown(entry.name)} is stored as {entry.dtype}")
        if entry.name.endswith(_QUANTIZED_NAMES) or _QUANTIZED_PART.search(entry.name):
            _quantized(file.path, f"it has the tensor {shown(entry.name)}")


def _quantized(path: Path, why: str) -> NoReturn:
    raise InputError(
        "E_QUANTIZED",
        f"{shown(path)} is quantised.",
        f"Packed or scaled numbers cannot be averaged: {why}.",
        "Merge the original 16- or 32-bit checkpoints and quantise the result.",
    )
