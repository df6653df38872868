"""The fast code against numbers that mergekit 0.1.5 itself computed (``tests/oracles/freeze_mergekit.py``).

``tests/oracles/test_frozen_mergekit.py`` holds the naive references to the same vectors and explains the
tolerance and the intended differences; here it is the kernels, the recipe import, the plan and the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from merging.methods import Block, dare, make
from merging.methods.scan import merge_tensors
from merging.plan import make_plan
from merging.recipe_yaml import load_recipe
from tests.oracles.test_frozen_mergekit import (
    CASES,
    EQUAL_MAGNITUDES,
    ROUNDINGS,
    VALUES,
    error_in_roundings,
    inputs_of,
    vectors,
)
from tests.small_checkpoints import load, merge, save

SUPPORTED = [c for c in CASES if not c["parameters"].keys() & {"nuslerp_flatten", "nuslerp_row_wise"}]


def ours(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch, dtype: Any, **changed: Any) -> Any:
    """The result of our code for a frozen case, computed as for models stored in ``dtype``."""
    given, method = {**case["parameters"], **changed}, case["method"]
    models, base, experts, _ = inputs_of(case)
    if method in ("linear", "passthrough"):
        base, experts = None, models  # mergekit counts a base as one of the models
    own = [{name: given[name][k] if isinstance(given[name], list) else given[name]
            for name in ("weight", "density", "scale") if name in given} for k in range(len(experts))]  # fmt: skip
    shared = {k: v for k, v in given.items() if k not in ("weight", "density", "scale")}
    if method.startswith("dare"):
        shared["rescale"] = "l1" if shared["rescale"] else "none"

        def frozen_mask(block: Block, expert: int, probability: float) -> Tensor:
            mask = torch.from_numpy(vectors()[f"{case['case']}/mask{expert}"]).reshape(-1)
            return mask[block.start : block.start + block.like.numel()].to(block.like.dtype)

        monkeypatch.setattr(dare, "keep_mask", frozen_mask)  # mergekit's random numbers are its own
    if method in ("task_arithmetic", "dare_linear", "dare_ties"):
        shared.setdefault("normalize", False)
    states = [None if m is None else {"w": torch.from_numpy(m).to(dtype)} for m in (base, *experts)]
    merged = merge_tensors(make(method, shared, own), states[0], [s for s in states[1:] if s is not None])
    return merged["w"].double().numpy().reshape(case["shape"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", SUPPORTED, ids=lambda case: case["case"])
def test_the_kernels_give_mergekits_numbers(case: dict[str, Any], dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error_in_roundings(case, ours(case, monkeypatch, dtype)) <= ROUNDINGS


def test_enough_is_compared() -> None:
    counts = {m: sum(c["method"] == m for c in SUPPORTED) for m in sorted({c["method"] for c in CASES})}
    assert len(SUPPORTED) >= 70 and min(counts.values()) >= 3, counts


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("linear", {"normalize": False}),
        ("slerp", {"t": 0.26}),
        ("task_arithmetic", {"lambda": 0.99}),
        ("ties", {"normalize": False}),
        ("ties", {"lambda": 0.99}),
        ("ties", {"density": 0.35}),
        ("multislerp", {"normalize_weights": False}),
        ("dare_linear", {"rescale": True}),
        ("dare_ties", {"normalize": True}),
    ],
)
def test_a_setting_that_is_ignored_would_be_seen(
    method: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    worst = max(
        error_in_roundings(case, ours(case, monkeypatch, torch.float64, **change))
        for case in SUPPORTED
        if case["method"] == method and (method != "dare_linear" or not case["parameters"]["rescale"])
    )
    assert worst > 1000 * ROUNDINGS


@pytest.mark.parametrize("case", EQUAL_MAGNITUDES, ids=lambda case: case["case"])
def test_among_equal_magnitudes_the_first_stay(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as in mergekit, which keeps an arbitrary choice of them."""
    _, base, (expert,), theirs = inputs_of(case)
    delta, kept = (expert - base).reshape(-1), (ours(case, monkeypatch, torch.float64) - base).reshape(-1) != 0
    assert kept.sum() == ((theirs.astype("float64") - base) != 0).sum()
    threshold = abs(delta[kept]).min()
    assert kept[abs(delta) > threshold].all() and not kept[abs(delta) < threshold].any()
    on_it = kept[abs(delta) == threshold]
    assert on_it[: on_it.sum()].all()


# -- which value holds for which tensor ---------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Path]]:
    """As in mergekit's run: a base of zeros and an expert of ones, so that the output is the weight."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    for layers in {record["layers"] for record in VALUES}:
        names = next(record["values"] for record in VALUES if record["layers"] == layers)
        states = [{n: torch.full((4,) if "norm" in n else (8, 4), value) for n in names} for value in (0.0, 1.0)]
        made[layers] = tuple(save(folder / f"{name}{layers}", s) for name, s in zip("be", states, strict=True))
    return made


@pytest.mark.parametrize("record", VALUES, ids=lambda r: f"{r['layers']}-{r['base_listed']}-{r['label']}")
def test_gradients_and_filters_give_mergekits_values(
    models: dict[int, tuple[Path, Path]], record: dict[str, Any], tmp_path: Path
) -> None:
    base, expert = models[record["layers"]]
    listed = [{"model": str(expert), "parameters": {"weight": record["setting"]}}]
    if record["base_listed"]:  # its weight must not matter
        listed.insert(0, {"model": str(base), "parameters": {"weight": 123.0}})
    text = yaml.safe_dump(
        {"merge_method": "task_arithmetic", "base_model": str(base), "models": listed, "dtype": "float32"}
    )
    what = load_recipe(text).recipe
    with make_plan(what) as plan:
        assert plan.blockers == []
        planned = {t.name: t.method.coefficients()[0] if t.method else None for t in plan.tensors}  # type: ignore[index]
        copied = {
            t.name: t.sources[0] is plan.models[str(expert)].tensors[t.name] for t in plan.tensors if not t.method
        }
    planned |= {name: float(from_expert) for name, from_expert in copied.items()}
    assert planned == pytest.approx(record["values"], abs=1e-7)
    merge(what, tmp_path / "out")
    for name, tensor in load(tmp_path / "out").items():
        assert torch.equal(tensor, torch.full_like(tensor, planned[name]))  # type: ignore[arg-type]
