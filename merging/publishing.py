"""What lies beside the weights of a merged model: configuration, tokenizer, index, model card, manifest."""

from __future__ import annotations

import datetime
import platform
from functools import cache
from importlib import metadata
from typing import Any

from .model_card import CardFacts, ModelLine, common_license, model_card
from .plan import NUMERICS, Plan, index_file
from .recipe_yaml import to_yaml
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


@cache
def versions() -> dict[str, str]:
    """This program, Python, and the libraries that touch the numbers. Do not change the result: it is shared."""
    return {
        "amalgam": VERSION,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "numpy", "xxhash")},
    }


def _survival_warning(survival: dict[str, Any] | None) -> list[str]:
    if survival is None or survival["survived"] >= 0.9:
        return []
    return [
        f"The output's 16-bit type rounded {1 - survival['survived']:.0%} of the changed weights back to the base. "
        "Use dtype: float32 to keep them."
    ]


def side_files(plan: Plan, title: str) -> dict[str, bytes]:
    """All files but weights and manifest, by name. They depend on the plan and the title only, not on the run."""
    files = dict(plan.side_files.files)
    index = index_file(plan.files)
    if index is not None:
        files["model.safetensors.index.json"] = index
    files["README.md"] = model_card(card_facts(plan, title)).encode()
    return files


def card_facts(plan: Plan, title: str) -> CardFacts:
    """What the model card says about a plan."""
    recipe, method = plan.recipe, plan.recipe.method_class
    lines = []
    if recipe.base is not None:
        lines.append(_line(plan, recipe.base.key, "base", ""))
    groups = plan.coefficients()
    for k, expert in enumerate(recipe.experts):
        lines.append(_line(plan, expert.key, "expert", _coefficients(groups, k, len(recipe.experts))))
    sizes = plan.as_dict()["dtypes"]
    return CardFacts(
        title=title,
        method=recipe.method,
        method_title=method.title,
        method_idea=method.idea,
        paper=method.paper,
        recipe_yaml=to_yaml(recipe),
        models=lines,
        dtype=", ".join(sizes),
        parameters=sum(t.numel for t in plan.tensors),
        warnings=plan.warnings,
        notes=plan.alignment.notes,
        versions=versions(),
        license=common_license([m.path for m in plan.models.values()]),
        library_name="transformers" if "config.json" in plan.side_files.files else "",
    )


def _line(plan: Plan, key: str, role: str, coefficients: str) -> ModelLine:
    opened = plan.paths[key].rpartition("+")[2]  # of an adapter on its base: the adapter
    name, _, commit = opened.partition("@")
    from_hub = len(commit) == 40 and "/" in name
    return ModelLine(key, role, name if from_hub else "", commit if from_hub else "", coefficients)


def _coefficients(groups: list[dict[str, Any]], k: int, count: int) -> str:
    """Expert ``k``'s effective coefficient or parameters: one value, or the range over the tensors."""
    ranges: dict[str, list[float]] = {}
    for group in groups:
        if len(group["experts"]) != count:
            continue
        values = {"coefficient": group["effective"][k]} if group["effective"] else group["experts"][k]
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                ranges.setdefault(name, []).append(value)
    return ", ".join(
        f"{name} {min(v):.4g}" if min(v) == max(v) else f"{name} {min(v):.4g} to {max(v):.4g}"
        for name, v in ranges.items()
    )
