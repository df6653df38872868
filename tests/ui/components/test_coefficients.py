"""Settings by layer: they mean in the editor what they mean in the merge."""

from __future__ import annotations

import json

import pytest

from merging.errors import RecipeError
from merging.layer_plan import layer_fraction
from ui import draft as drafts
from ui.components import coefficients
from ui.components.layer_values import SHARED, lines_of, parameters_of, set_line, set_range
from ui.draft import Draft

NAMES = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)]


def values(draft: Draft, name: str = "weight") -> dict[str, list[float | None]]:
    return {line.label: line.values for line in lines_of(draft, name, NAMES)}


def in_the_merge(draft: Draft, expert: int, name: str = "weight") -> list[float]:
    """What the recipe itself says for the layers' tensors."""
    recipe = drafts.recipe_of(draft)
    return [
        recipe.resolve_parameters(tensor, layer_fraction(i, len(NAMES))).experts[expert][name]
        for i, tensor in enumerate(NAMES)
    ]


@pytest.mark.parametrize(
    "setting",
    [
        0.3,
        [0.1, 0.2, 0.3, 0.4],
        [0.0, 1.0],
        [1.0, 0.0, 0.5],
        [{"filter": "layers.2.", "value": 0.9}, {"value": [0.0, 0.6]}],
        [{"filter": "self_attn", "value": 0.9}],
    ],
)
def test_lines_are_what_the_merge_does(setting: object) -> None:
    draft = drafts.set_parameter(drafts.demo("ties"), ("experts", "sort", "parameters", "weight"), setting)
    assert values(draft)["sort"] == pytest.approx(in_the_merge(draft, 1))
    assert values(draft)["rotate"] == [1.0] * 4


def test_a_line_goes_back_as_a_curve_or_a_number() -> None:
    draft = set_line(drafts.demo("ties"), "weight", "sort", [0.1, 0.2, 0.3, 0.4])
    assert draft["recipe"]["experts"][1]["parameters"]["weight"] == [0.1, 0.2, 0.3, 0.4]
    assert in_the_merge(draft, 1) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    flat = set_line(draft, "weight", "sort", [0.5] * 4)
    assert flat["recipe"]["experts"][1]["parameters"]["weight"] == 0.5


def test_a_shared_setting_is_one_line() -> None:
    draft = set_line(drafts.demo("pcb"), "lambda", SHARED, [1, 1, 0.5, 0.5])
    assert draft["recipe"]["parameters"]["lambda"] == [1, 1, 0.5, 0.5]
    assert values(draft, "lambda") == {SHARED: [1, 1, 0.5, 0.5]}


def test_a_range_of_layers() -> None:
    draft = set_range(drafts.demo("ties"), "weight", ["sort", "rotate"], 1, 2, 0.25, NAMES)
    assert values(draft) == {
        "reverse": [1.0] * 4, "sort": [1, 0.25, 0.25, 1], "unique": [1.0] * 4, "rotate": [1, 0.25, 0.25, 1],
    }  # fmt: skip


def test_a_range_over_all_layers_replaces_conditions() -> None:
    conditions = [{"filter": "mlp", "value": 0.9}, {"value": 0.1}]
    draft = drafts.set_parameter(drafts.demo("ties"), ("experts", "sort", "parameters", "weight"), conditions)
    draft = set_range(draft, "weight", ["sort"], 0, 3, 0.4, NAMES)
    assert draft["recipe"]["experts"][1]["parameters"]["weight"] == 0.4


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (2, 1), (0, 4)])
def test_layers_that_are_not_there(first: int, last: int) -> None:
    with pytest.raises(RecipeError, match="There are no layers"):
        set_range(drafts.demo("ties"), "weight", ["sort"], first, last, 0.5, NAMES)


def test_a_required_setting_needs_all_layers() -> None:
    draft = drafts.set_method(drafts.demo("ties"), "task_arithmetic")
    draft = drafts.set_parameter(draft, ("experts", "sort", "parameters", "weight"), None)
    with pytest.raises(RecipeError, match="must be set for all layers first"):
        set_range(draft, "weight", ["sort"], 0, 1, 0.5, NAMES)
    assert values(set_range(draft, "weight", ["sort"], 0, 3, 0.5, NAMES))["sort"] == [0.5] * 4


@pytest.mark.parametrize(("name", "numbers"), [("density", [2.0] * 4), ("scope", [1.0] * 4), ("weight", [])])
def test_what_does_not_fit_is_refused(name: str, numbers: list[float]) -> None:
    with pytest.raises(RecipeError):
        set_line(drafts.demo("ties"), name, "sort", numbers)


def test_which_settings_can_change_with_depth() -> None:
    assert list(parameters_of("ties")) == ["weight", "density", "lambda"]
    assert list(parameters_of("slerp")) == ["t"]
    assert parameters_of(None) == {}


def test_curves_have_room_above_and_keep_bounds() -> None:
    draft = set_line(drafts.demo("ties"), "weight", "sort", [1.0, 1.9, -0.5, 1.0])
    data = json.loads(coefficients.curves_of("weight", lines_of(draft, "weight", NAMES), None, None))
    assert data["low"] == -0.5 and data["high"] == 3.0
    assert [line["fixed"] for line in data["lines"]] == [False] * 4
    assert len({(line["colour"], line["dash"]) for line in data["lines"]}) == 4
    bounded = json.loads(coefficients.curves_of("density", lines_of(draft, "density", NAMES), 0, 1))
    assert (bounded["low"], bounded["high"]) == (0, 1)


def test_heat_map_and_table_show_the_same() -> None:
    draft = set_line(drafts.demo("ties"), "weight", "sort", [1.0, 1.9, -0.5, 1.0])
    lines = lines_of(draft, "weight", NAMES)
    figure = coefficients.heat_map("weight", lines, 0.8)
    assert figure is not None
    assert [row[1] for row in figure.data[0].z] == [1.0, 1.9, -0.5, 1.0]
    assert figure.data[0].zmid == 0.8 and figure.layout.yaxis.range == (3.5, -0.5)
    table = coefficients.numbers_table("weight", lines)
    assert table.count("<tr>") == 5 and "<td>-0.5</td>" in table
    assert len(coefficients.remarks(lines)) == 2, "below 0, and above 1.5"


def test_names_are_escaped() -> None:
    draft = drafts.add_expert(drafts.demo("ties"), "org/x", name="<img src=x>")
    lines = lines_of(draft, "weight", NAMES)
    assert "<img" not in coefficients.numbers_table("weight", lines)
    figure = coefficients.heat_map("weight", lines, 1.0)
    assert figure is not None and "<img" not in str(figure.data[0].x)
