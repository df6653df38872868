"""Tuning with a budget: real merges of the demo experts; only the score is a made-up one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merging.errors import RecipeError
from merging.evaluation import selection
from merging.evaluation.records import Record
from merging.evaluation.selection import (
    Setting,
    Sources,
    Work,
    average_of,
    merge_into,
    settings_for,
    tune,
    validation_score,
)

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo"
SOURCES = Sources(DEMO / "base", {name: DEMO / "experts" / name for name in ("reverse", "sort")})
WORK = Work(device="cpu", threads=1)


def test_task_arithmetic_gets_as_many_weights_as_the_budget() -> None:
    weights = [setting.experts["weight"] for setting in settings_for("task_arithmetic", 8)]
    assert weights == [k / 8 for k in range(1, 9)]
    assert settings_for("task_arithmetic", 3)[0].name == "task_arithmetic (weight 0.3333)"


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear", "pcb", "nuslerp", "linear"])
@pytest.mark.parametrize("budget", [1, 2, 5, 8, 100])
def test_no_method_gets_more_than_the_budget(method: str, budget: int) -> None:
    settings = settings_for(method, budget)
    assert 1 <= len(settings) <= budget
    assert len({setting.name for setting in settings}) == len(settings)
    SOURCES.recipe(settings[0])  # a recipe that the engine takes


def test_a_thinned_grid_covers_every_value() -> None:
    settings = settings_for("ties", 8)
    assert {setting.experts["density"] for setting in settings} == set(selection.SHARES)
    assert {setting.parameters["lambda"] for setting in settings} == set(selection.FACTORS)


def test_ranges_may_be_given_and_wrong_ones_are_named() -> None:
    settings = settings_for("ties", 8, {"density": [0.1, 0.3], "lambda": [1.0]})
    assert [setting.text for setting in settings] == ["density 0.1, lambda 1", "density 0.3, lambda 1"]
    with pytest.raises(RecipeError, match="no parameter 'densty'") as caught:
        settings_for("ties", 8, {"densty": [0.1]})
    assert "density" in str(caught.value)
    with pytest.raises(RecipeError, match="tiess"):
        settings_for("tiess", 8)


def test_the_average_is_the_mean_of_the_experts(tmp_path: Path) -> None:
    folder = merge_into(SOURCES.recipe(average_of(2)), tmp_path / "average", WORK)
    merged = load_file(folder / "model.safetensors")
    one, two = (load_file(path / "model.safetensors") for path in SOURCES.experts.values())
    for name, value in merged.items():
        assert torch.allclose(value, (one[name].double() + two[name].double()).div(2).float(), atol=1e-7)


def test_a_finished_merge_is_not_made_again(tmp_path: Path) -> None:
    recipe = SOURCES.recipe(average_of(2))
    folder = merge_into(recipe, tmp_path / "average", WORK)
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert merge_into(recipe, folder, WORK) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("on_disk", [4_000_000_000, 1])
def test_the_best_setting_is_kept_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_disk: int
) -> None:
    """The score is made up: weight 0.5 is best. It is asked for all merges at once, or one at a time."""
    monkeypatch.setattr(selection, "TRIALS_ON_DISK", on_disk)
    asked: list[list[str]] = []
    said: list[str] = []

    def score(trials: Mapping[str, Path]) -> dict[str, float]:
        asked.append(list(trials))
        assert all((folder / "model.safetensors").is_file() for folder in trials.values())
        return {name: -abs(float(name.split()[-1].strip(")")) - 0.5) for name in trials}

    settings = settings_for("task_arithmetic", 4)
    work = Work("cpu", 1, tell=said.append)
    found = tune(SOURCES, settings, score, tmp_path / "models" / "tuned", work)
    assert found.setting.experts == {"weight": 0.5} and len(found.tried) == 4
    assert [len(names) for names in asked] == ([4] if on_disk > 1 else [1, 1, 1, 1])
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tuned"]
    recipe = json.loads((found.folder / "manifest.json").read_text())["recipe"]
    assert recipe["experts"][0]["parameters"] == {"weight": 0.5}
    assert "# tuned" in (found.folder / "README.md").read_text()
    assert len(said) == 4 and "-0.2500  task_arithmetic (weight 0.25)" in said[0]


def test_of_equal_settings_the_first_is_kept(tmp_path: Path) -> None:
    settings = [Setting("task_arithmetic", {"weight": weight}, {}) for weight in (0.3, 0.2)]
    found = tune(SOURCES, settings, lambda trials: dict.fromkeys(trials, 1.0), tmp_path / "tuned", WORK)
    assert found.setting.experts["weight"] == 0.3


def test_what_an_interrupted_search_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".tuned" / "best" / "tuned"
    shutil.copytree(SOURCES.base, left)
    (left / "stray").touch()
    found = tune(SOURCES, settings_for("task_arithmetic", 1), lambda t: dict.fromkeys(t, 0.0), tmp_path / "tuned", WORK)
    assert not (tmp_path / ".tuned").exists() and not (found.folder / "stray").exists()


def record(task: str, metric: str, score: float, item: str = "1") -> Record:
    return Record("m", task, item, metric, score, "p", 0, 0.0, "")


def test_the_validation_score_is_a_mean_over_tasks_not_over_items() -> None:
    mine = [record("a", "exact_match", 1.0), record("b", "choice", 0.0), record("b", "choice", 1.0, "2"),
            record("b", "choice_normalized", 0.0)]  # fmt: skip
    assert validation_score(mine, []) == pytest.approx(0.75)
    assert validation_score([record("a", "nll_per_byte", 2.0)], []) == -2.0


def test_scores_of_different_kinds_are_taken_relative_to_the_base() -> None:
    base = [record("a", "exact_match", 0.5), record("b", "nll_per_byte", 2.0)]
    mine = [record("a", "exact_match", 0.6), record("b", "nll_per_byte", 1.5)]
    assert validation_score(mine, base) == pytest.approx((0.1 / 0.5 + 0.5 / 2.0) / 2)
    assert validation_score(base, base) == 0
