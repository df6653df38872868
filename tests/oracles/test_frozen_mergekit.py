"""Do our plain float64 references agree with what mergekit 0.1.5 computed in float32?

`frozen/mergekit_vectors.*` holds small inputs and mergekit's outputs (made by `freeze_mergekit.py`); mergekit
itself is not needed here.

Tolerance: mergekit worked in float32, where one rounding is at most 2^-24 of the number rounded. A case may
differ by `ROUNDINGS` such roundings of the largest number that occurs on the way. Measured over all cases:
2.5 at most (multislerp), 4e-7 in absolute terms. A setting that is ignored or mistaken makes a difference
more than a thousand times larger (see `test_a_wrong_setting_would_be_seen`).

Where we differ from mergekit on purpose:
 1. DARE: ours scales survivors by 1 / density (the paper, unbiased); mergekit's `rescale: true` keeps the L1
    norm instead, a factor that changes from tensor to tensor. Both are in `reference.dare`;
    `test_dare_rescaling_differs_as_documented` shows the exact relation.
 2. TIES: equal magnitudes at the threshold. Ours fills up by flat index, mergekit's choice is arbitrary.
    Shown by `test_equal_magnitudes_differ_as_documented`; no other case depends on it.
 3. linear, multislerp: weights that sum to 0 are refused when they must be normalised; mergekit gives inf
    or nan.
 4. nuslerp: for almost opposite vectors the formula divides by almost 0; neither result means anything, so no
    case covers it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.oracles import reference

FROZEN = Path(__file__).parent / "frozen"
ROUNDINGS = 4
SETTINGS = json.loads((FROZEN / "mergekit_vectors.json").read_text())
CASES: list[dict[str, Any]] = [case for case in SETTINGS["cases"] if case["kind"] != "eighths"]
EQUAL_MAGNITUDES = [case for case in SETTINGS["cases"] if case["kind"] == "eighths"]
VALUES: list[dict[str, Any]] = json.loads((FROZEN / "mergekit_values.json").read_text())["records"]


@cache
def vectors() -> dict[str, np.ndarray]:
    with np.load(FROZEN / "mergekit_vectors.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def inputs_of(
    case: dict[str, Any],
) -> tuple[list[np.ndarray], Any, list[np.ndarray], np.ndarray]:
    """(all models in order, base or None, models that are not the base, mergekit's output)."""
    models = [vectors()[f"{case['case']}/model{index}"].astype(np.float64) for index in range(case["models"])]
    base = None if case["base"] is None else models[case["base"]]
    experts = [model for index, model in enumerate(models) if index != case["base"]]
    return models, base, experts, vectors()[f"{case['case']}/output"]


def ours(case: dict[str, Any], **changed: Any) -> np.ndarray:
    """The reference's result for a frozen case; `changed` overrides keyword arguments of the reference."""
    models, base, experts, _ = inputs_of(case)
    given = dict(case["parameters"])
    method = case["method"]
    common = {"lambda_": given.get("lambda", 1.0)}
    if method == "linear":
        return reference.linear(
            models, given["weight"], **{"normalize": given.get("normalize", True), **changed}
        )
    if method == "slerp":
        return reference.slerp(base, experts[0], **{"t": given["t"], **changed})
    if method == "nuslerp":
        options = {
            "flatten": given.get("nuslerp_flatten", True),
            "row_wise": given.get("nuslerp_row_wise", False),
        }
        return reference.nuslerp(experts, given["weight"], base, **{**options, **changed})
    if method == "multislerp":
        options = {"normalize_weights": given.get("normalize_weights", True), "eps": given.get("eps", 1e-8)}
        return reference.multislerp(experts, given["weight"], base, **{**options, **changed})
    if method == "task_arithmetic":
        options = {**common, "normalize": given.get("normalize", False)}
        return reference.task_arithmetic(base, experts, given["weight"], **{**options, **changed})
    if method == "ties":
        options = {**common, "normalize": given.get("normalize", True)}
        return reference.ties(base, experts, given["weight"], given["density"], **{**options, **changed})
    if method in ("dare_linear", "dare_ties"):
        masks = [vectors()[f"{case['case']}/mask{index}"] for index in range(len(experts))]
        options = {
            **common,
            "rescale": "l1" if given["rescale"] else "none",
            "consensus": method == "dare_ties",
            "normalize": given.get("normalize", False),
        }
        return reference.dare(
            base, experts, given["weight"], given["density"], masks, **{**options, **changed}
        )
    assert method == "passthrough"
    return reference.passthrough(models[0], given["scale"][0] if "scale" in given else None)


def error_in_roundings(case: dict[str, Any], result: np.ndarray) -> float:
    """Largest difference to mergekit, in units of 2^-24 times the largest number on the way."""
    models, _, _, output = inputs_of(case)
    weights = case["parameters"].get("weight", [1.0])
    largest = max([1.0, *(float(np.max(np.abs(model))) for model in [*models, output])])
    largest *= max(1.0, *(abs(weight) for weight in weights))
    difference = np.max(np.abs(result - output.astype(np.float64)), initial=0.0)
    return float(difference) / (2.0**-24 * largest)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_reference_agrees_with_mergekit(case: dict[str, Any]) -> None:
    output = inputs_of(case)[3]
    result = ours(case)
    assert output.dtype == np.float32
    assert result.shape == output.shape == tuple(case["shape"])
    assert error_in_roundings(case, result) <= ROUNDINGS


def test_there_are_enough_vectors_of_every_method() -> None:
    assert SETTINGS["made_with"]["mergekit"] == "0.1.5"
    assert len(CASES) >= 60
    for method in (
        "linear",
        "slerp",
        "nuslerp",
        "multislerp",
        "task_arithmetic",
        "ties",
        "dare_linear",
        "dare_ties",
        "passthrough",
    ):
        assert sum(case["method"] == method for case in CASES) >= 3, method


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("linear", {"normalize": "flip"}),
        ("slerp", {"t": 0.26}),
        ("nuslerp", {"flatten": "flip"}),
        ("multislerp", {"normalize_weights": "flip"}),
        ("task_arithmetic", {"normalize": "flip"}),
        ("task_arithmetic", {"lambda_": 0.99}),
        ("ties", {"normalize": "flip"}),
        ("ties", {"lambda_": 0.99}),
        ("dare_linear", {"consensus": True}),
        ("dare_ties", {"consensus": False}),
        ("dare_linear", {"rescale": "inverse"}),
    ],
)
def test_a_wrong_setting_would_be_seen(method: str, change: dict[str, Any]) -> None:
    """Every setting matters to some frozen case, by far more than the tolerance."""
    worst = 0.0
    for case in CASES:
        if case["method"] != method:
            continue
        default = method in (
            "linear",
            "multislerp",
            "ties",
            "nuslerp",
        )  # normalize / flatten are on by default
        keys = {
            "normalize_weights": "normalize_weights",
            "flatten": "nuslerp_flatten",
            "normalize": "normalize",
        }
        changed = {
            name: (not case["parameters"].get(keys[name], default)) if value == "flip" else value
            for name, value in change.items()
        }
        try:
            worst = max(worst, error_in_roundings(case, ours(case, **changed)))
        except ValueError:
            continue
    assert worst > 1000 * ROUNDINGS


def test_the_other_ties_cases_have_no_equal_magnitudes() -> None:
    """So that mergekit's arbitrary choice among equals cannot matter in the comparison above."""
    for case in CASES:
        if case["method"] == "ties":
            _, base, experts, _ = inputs_of(case)
            for expert in experts:
                magnitudes = np.abs(expert - base).reshape(-1)
                assert len(np.unique(magnitudes)) == magnitudes.size


@pytest.mark.parametrize("case", EQUAL_MAGNITUDES, ids=lambda case: case["case"])
def test_equal_magnitudes_differ_as_documented(case: dict[str, Any]) -> None:
    """Same number of entries kept and same entries above the threshold; only equal ones may be other ones."""
    _, base, (expert,), output = inputs_of(case)
    delta = (expert - base).reshape(-1)
    theirs = output.astype(np.float64).reshape(-1) - base.reshape(-1)
    our_result = ours(case).reshape(-1) - base.reshape(-1)
    kept = reference.kept_count(case["parameters"]["density"], delta.size)
    threshold = np.sort(np.abs(delta))[-kept]
    assert threshold > 0 and np.sum(np.abs(delta) == threshold) > 2
    for result in (theirs, our_result):
        assert np.count_nonzero(result) == kept
        assert np.array_equal(result[np.abs(delta) > threshold], delta[np.abs(delta) > threshold])
        assert not np.any(result[np.abs(delta) < threshold])
    at_threshold = np.flatnonzero(np.abs(delta) == threshold)
    ours_kept = [index for index in at_threshold if our_result[index] != 0]
    assert ours_kept == list(at_threshold[: len(ours_kept)])  # lowest flat index first
    assert not np.array_equal(theirs, our_result)  # the difference is real in these cases


def test_dare_rescaling_differs_as_documented() -> None:
    """mergekit's factor is (L1 norm before) / (L1 norm after) per expert, ours is 1 / density."""
    checked = 0
    for case in CASES:
        if case["method"] != "dare_linear" or not case["parameters"]["rescale"]:
            continue
        _, base, experts, _ = inputs_of(case)
        density = case["parameters"]["density"]
        for index, expert in enumerate(experts):
            share = density[index] if isinstance(density, list) else density
            if not 0 < share < 1:
                continue
            mask = vectors()[f"{case['case']}/mask{index}"]
            paper = reference.dare(base, [expert], 1.0, share, [mask], rescale="inverse") - base
            theirs = reference.dare(base, [expert], 1.0, share, [mask], rescale="l1") - base
            delta = expert - base
            factor = np.abs(delta).sum() / np.abs(delta[mask]).sum()
            np.testing.assert_allclose(paper, np.where(mask, delta / share, 0), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(theirs, np.where(mask, delta * factor, 0), rtol=1e-9, atol=1e-12)
            assert abs(factor * share - 1) > 1e-3  # they really are two different numbers
            checked += 1
    assert checked >= 4


@pytest.mark.parametrize("record", VALUES, ids=lambda r: f"{r['layers']}-{r['base_listed']}-{r['label']}")
def test_list_valued_parameters_resolve_as_in_mergekit(record: dict[str, Any]) -> None:
    """Gradients over depth and name filters, against the weights that a real mergekit run used."""
    layers = record["layers"]
    assert len(record["values"]) == 3 + 9 * layers
    for name, used in record["values"].items():
        position = 0.0
        if name.startswith("model.layers."):
            block = int(name.split(".")[2])
            position = block / (layers - 1) if layers > 1 else 1.0
        setting = record["setting"]
        if isinstance(setting, list) and isinstance(setting[0], dict):
            setting = next(s["value"] for s in setting if s.get("filter", "*") == "*" or s["filter"] in name)
        expected = reference.gradient(setting, position) if isinstance(setting, list) else setting
        assert used == pytest.approx(expected, abs=1e-7), name
