"""The Analyse page without a browser: questions, cells, details, findings with their places, and conditions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merging.analysis.histogram import histogram_of
from merging.analysis.inspection import Inspection
from merging.analysis.inspection_run import inspect
from merging.errors import RecipeError
from tests.small_checkpoints import family, llama_like, merge, recipe
from ui import draft as drafts
from ui.chart import pairs_of
from ui.components.plot import figure_json
from ui.pages import analyse_cells as cells
from ui.pages.analyse_detail import detail_of, words_of
from ui.pages.analyse_findings import findings_html, has_place, place_of
from ui.pages.analyse_state import (
    Answers,
    add_condition,
    arguments_of,
    filters_for,
    is_about,
    matches,
    question_of,
    wanted_parts,
    weight_problem,
)
from ui.pages.analyse_status import status_html

NASTY = "<img src=x onerror=alert(1)>"
TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("analyse")


@pytest.fixture(scope="module")
def paths(folder: Path) -> list[Path]:
    return family(folder, llama_like(2, 16), 3, config={"model_type": "llama"})


@pytest.fixture(scope="module")
def result(paths: list[Path], folder: Path) -> Inspection:
    merge(recipe("task_arithmetic", [(p, {"weight": 0.4}) for p in paths[1:]], paths[0]), folder / "merged")
    base, *experts = map(str, paths)
    return inspect(base, experts, str(folder / "merged"), cache=False, threads=1)


def draft_of(paths: list[Path], method: str | None = "task_arithmetic") -> drafts.Draft:
    made = drafts.set_base(drafts.empty(), str(paths[0]))
    for path in paths[1:]:
        made = drafts.add_expert(made, str(path))
    return drafts.set_method(made, method) if method else made


# -- questions and answers ------------------------------------------------------------------------------------------


def test_a_question_names_what_is_missing(paths: list[Path]) -> None:
    with pytest.raises(RecipeError, match="nothing to analyse"):
        question_of(drafts.empty(), "gram", 0.2, "")
    with pytest.raises(RecipeError, match="No base"):
        question_of(drafts.set_base(draft_of(paths), None), "gram", 0.2, "")
    other = drafts.add_expert(draft_of(paths), "org/other", adapter="org/lora")
    with pytest.raises(RecipeError, match="adapter on another model"):
        question_of(other, "gram", 0.2, "")


def test_a_job_answers_its_own_question_only(paths: list[Path]) -> None:
    asked = question_of(draft_of(paths), "gram", 0.2, "")
    assert is_about(asked, arguments_of(asked)) and is_about(asked, arguments_of(asked, offline=True))
    assert not is_about(question_of(draft_of(paths), "gram", 0.3, ""), arguments_of(asked))
    assert not is_about(question_of(draft_of(paths[:3]), "gram", 0.2, ""), arguments_of(asked))
    assert wanted_parts(question_of(draft_of(paths), "none", 0.2, "")) == ["doctor", "changes", "trimmed"]


def test_answers_come_from_the_cache_and_grow(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMALGAM_CACHE", str(tmp_path))
    answers, asked = Answers(), question_of(draft_of(paths), "gram", 0.2, "")
    assert answers.look(asked) == "" and answers.get("") is None, "nothing is computed by looking"
    base, *experts = map(str, paths)
    inspect(base, experts, parts=["changes"], threads=1)
    first = answers.look(asked)
    found = answers.get(first)
    assert found is not None and list(found.parts) == ["changes"] and found.trimmed is None
    assert answers.map(first, asked, "erank") is None and answers.map(first, asked, "relative") is not None
    inspect(base, experts, threads=1)
    second = answers.look(asked)
    assert second not in ("", first) and answers.look(asked) == second
    assert answers.chart(second, asked, "subspaces") is not None
    whole = answers.get(Answers().look(asked), asked)
    assert whole is not None and len(whole.parts) == 6, "a token that was forgotten is looked up again"


def test_the_status_says_what_is_known_and_what_is_not(paths: list[Path], result: Inspection) -> None:
    asked = question_of(draft_of(paths), "gram", 0.2, "")
    _, words, may_start = status_html(asked, None, None)
    assert may_start and "Reads all weights once" in words
    parts, words, may_start = status_html(asked, result, None)
    assert not may_start and "Everything is computed" in words and parts.count("(known)") == 6


# -- cells ----------------------------------------------------------------------------------------------------------


def test_every_metric_draws_and_shares_one_range(result: Inspection) -> None:
    metrics = cells.metrics_of(result)
    assert {m.key for m in metrics} == {m.key for m in cells.METRICS}, "with a merge there are all"
    for one in metrics:
        drawn = cells.map_of(result, one)
        values = np.concatenate([grid.values.ravel() for grid in drawn.grids.values()])
        known = values[np.isfinite(values)]
        assert known.size, one.key
        assert drawn.limits[0] <= known.min() and known.max() <= drawn.limits[1] + 1e-12, one.key
        wanted = {"pair": pairs_of(result.names), "all": [cells.ALL], "expert": result.names}[one.whose]
        assert set(drawn.grids) - {"merged"} == set(wanted), one.key


def test_a_cell_is_the_number_of_its_tensor(result: Inspection) -> None:
    assert result.changes is not None
    change = next(t for t in result.changes.tensors if t.name == TENSOR)
    drawn = cells.map_of(result, cells.metric("relative") or pytest.fail())
    grid = drawn.grids[result.names[1]]
    cell = grid.values[grid.layers.index(1), grid.modules.index("up")]
    assert cell == pytest.approx(change.norm[1] / change.base_norm)
    assert cells.tensors_at(result, 1, "up") == [TENSOR] and cells.cell_of(result, TENSOR) == (1, "up")
    table = cells.map_table(drawn)
    assert [1, "up", *(pytest.approx(n / change.base_norm) for n in change.norm)] in table.rows
    importance = cells.map_of(result, cells.metric("importance") or pytest.fail()).grids[cells.ALL]
    assert math.isclose(float(np.nansum(importance.values)), 1.0), "shares of the whole"


def test_one_expert_has_no_pairs(paths: list[Path]) -> None:
    alone = inspect(str(paths[0]), [str(paths[1])], cache=False, threads=1)
    assert all(m.whose != "pair" for m in cells.metrics_of(alone))
    detail = detail_of(alone, TENSOR, "none")
    assert detail.signs is None and detail.pairs is None and "single expert" in words_of(alone).signs


# -- one tensor -----------------------------------------------------------------------------------------------------


def test_the_detail_of_a_tensor(result: Inspection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMALGAM_CACHE", str(tmp_path))
    for tensor in result.places:
        detail = detail_of(result, tensor, histogram_of(result, tensor))
        for figure in (detail.spectrum, detail.histogram, detail.signs):
            assert figure is None or len(figure_json(figure)) < 300_000
        matrix = any(s.tensor == tensor for s in result.spectra or [])
        assert (detail.spectrum is not None) == matrix and ("no single matrix" in detail.head) != matrix
        assert detail.signs is not None and detail.pairs is not None and len(detail.pairs.rows) == 3
        assert all(len(row) == len(detail.numbers.columns) for row in detail.numbers.rows)
    kept = next(row for row in detail.numbers.rows if row[0].startswith("kept by the merge"))
    assert all(isinstance(value, float) for value in kept[1:4])


def test_names_are_escaped(result: Inspection) -> None:
    tensor = f"model.layers.0.{NASTY}.weight"
    places = {**result.places, tensor: (0, "mlp_up")}
    nasty = Inspection(**{**vars(result), "places": places})
    assert NASTY not in detail_of(nasty, tensor, NASTY).head


# -- findings -------------------------------------------------------------------------------------------------------


def test_a_finding_leads_to_the_cell_that_shows_it(result: Inspection) -> None:
    linked = 0
    for finding in result.findings:
        place = place_of(result, finding)
        assert (place is not None) == has_place(result, finding)
        if place is None:
            continue
        linked += 1
        drawn = cells.map_of(result, cells.metric(place.metric) or pytest.fail())
        assert place.whose in drawn.grids and place.tensor in result.places
        grid, (layer, module) = drawn.grids[place.whose], cells.cell_of(result, place.tensor) or pytest.fail()
        value = grid.values[grid.layers.index(layer), grid.modules.index(module)]
        assert value in (np.nanmax(grid.values), np.nanmin(grid.values)), finding.code
    assert linked >= 4


def test_the_list_of_findings(result: Inspection) -> None:
    text = findings_html(result.findings, [has_place(result, f) for f in result.findings])
    assert text.count("<article") == len(result.findings)
    assert text.count("data-pick") == sum(has_place(result, f) for f in result.findings)
    nasty = [type(f)(**{**f.as_dict(), "title": NASTY, "evidence": f"`{NASTY}`"}) for f in result.findings[:2]]
    assert NASTY not in findings_html(nasty, [True, False])


# -- conditions -----------------------------------------------------------------------------------------------------


def weights(draft: drafts.Draft) -> list[Any]:
    return [expert.get("parameters", {}).get("weight") for expert in draft["recipe"]["experts"]]


def test_filters_keep_the_dot_behind_the_layer(result: Inspection) -> None:
    found = [value for _, value in filters_for(result, TENSOR)]
    assert found == [TENSOR, "mlp.up_proj", "layers.1."]
    assert matches(result, "mlp.up_proj") == 2 and matches(result, TENSOR) == 1
    assert [value for _, value in filters_for(result, "model.norm.weight")] == ["model.norm.weight"]


def test_a_condition_comes_before_what_was_set(paths: list[Path]) -> None:
    draft = draft_of(paths)
    first, second, third = drafts.labels(draft)
    draft = drafts.set_parameter(draft, ("experts", first, "parameters", "weight"), 0.5)
    draft = drafts.set_parameter(draft, ("experts", second, "parameters", "weight"), [0.0, 1.0])
    draft = drafts.set_parameter(draft, ("experts", third, "parameters", "weight"), 0.3)
    one = add_condition(draft, first, "layers.1.", 0.0)
    assert weights(one) == [[{"filter": "layers.1.", "value": 0.0}, {"value": 0.5}], [0.0, 1.0], 0.3]
    every = add_condition(one, "", "mlp", 0.1)
    assert weights(every)[0][0] == {"filter": "mlp", "value": 0.1} and len(weights(every)[0]) == 3
    assert weights(every)[1] == [{"filter": "mlp", "value": 0.1}, {"value": [0.0, 1.0]}]
    again = add_condition(every, "", "mlp", 0.2)
    assert len(weights(again)[0]) == 3, "the same filter is replaced"
    drafts.recipe_of(again)  # it is a recipe


def test_a_weight_of_all_experts_stays_the_rest(paths: list[Path]) -> None:
    draft = drafts.set_parameter(draft_of(paths), ("parameters", "weight"), 0.4)
    made = add_condition(draft, drafts.labels(draft)[0], "mlp", 0.0)
    assert weights(made)[0] == [{"filter": "mlp", "value": 0.0}, {"value": 0.4}] and weights(made)[1] is None


def test_what_cannot_be_a_condition(paths: list[Path]) -> None:
    assert "Choose a method" in weight_problem(draft_of(paths, None))
    with pytest.raises(RecipeError):
        add_condition(draft_of(paths, None), "", "mlp", 0.0)
    with pytest.raises(RecipeError, match="no expert"):
        add_condition(draft_of(paths), "stranger", "mlp", 0.0)
    with pytest.raises(RecipeError, match="No tensor"):
        add_condition(draft_of(paths), "", "", 0.0)


def test_a_question_is_plain_text(paths: list[Path]) -> None:
    assert json.loads(question_of(draft_of(paths), "gram", 0.2, None))["labels"] == drafts.labels(draft_of(paths))
