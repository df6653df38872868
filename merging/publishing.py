"""What lies beside the weights of a merged model: configuration, tokenizer, index, model card, manifest."""

from __future__ import annotations

import datetime
import platform
from importlib import metadata
from typing import Any

from .plan import NUMERICS, Plan, index_file
from .version import VERSION

MOST_COEFFICIENTS = 200
"""Groups of tensors with different coefficients that the manifest lists; more are counted."""


def make_manifest(plan: Plan, device: str, survival: dict[str, Any] | None) -> dict[str, Any]:
    """The record of a merge. The output folder adds the hashes of files and tensors."""
    groups = plan.coefficients()
    return {
        "format": "amalgam-manifest-1",
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "recipe": plan.recipe.to_data(),
        "plan": plan.hash,
        "inputs": {key: {"opened": plan.paths[key], **model.identity()} for key, model in plan.models.items()},
        "coefficients": groups[:MOST_COEFFICIENTS],
        "coefficient_groups": len(groups),
        "seed": plan.recipe.seed,
        "device": device,
        "versions": versions(),
        "numerics": NUMERICS,
        "notes": plan.alignment.notes,
        "warnings": plan.warnings + _survival_warning(survival),
        "delta_survival": survival,
    }


def versions() -> dict[str, str]:
    """This program, Python, and the libraries that touch the numbers."""
    return {"amalgam": VERSION, "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "numpy", "xxhash")}}


def _survival_warning(survival: dict[str, Any] | None) -> list[str]:
    if survival is None or survival["survived"] >= 0.9:
        return []
    return [f"The output's 16-bit type rounded {1 - survival['survived']:.0%} of the changed weights back to the base. "
            "Use dtype: float32 to keep them."]


def side_files(plan: Plan) -> dict[str, bytes]:
    """All files but weights and manifest, by name."""
    files: dict[str, bytes] = {}
    index = index_file(plan.files)
    if index is not None:
        files["model.safetensors.index.json"] = index
    return files
