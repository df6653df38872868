"""Tables per layer and module against plain sums, and the worked example of Expert Merging++."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from merging.analysis.changes import Changes, TensorChange, measure_changes
from merging.analysis.importance import (
    MEASURES,
    expert_merging_importance,
    expert_merging_table,
    importance_table,
)
from merging.analysis.models import open_models
from merging.errors import RecipeError
from tests.analysis.plain_changes import tensors
from tests.small_checkpoints import family, llama_like, load


def made_up(l1: list[list[float]], kinds: list[str]) -> Changes:
    """Changes with given ‖τ_k‖₁ [experts][tensors], a tensor per block."""
    experts, pairs = len(l1), len(l1) * (len(l1) - 1) // 2
    return Changes(
        [f"e{k}" for k in range(experts)],
        [
            TensorChange(
                f"t{i}", i, kind, (3, 4), 1.0, [1.0] * experts, [row[i] for row in l1], [1.0] * experts,
                [0.0] * experts, [1.0] * experts, [0.0] * pairs, [12] * pairs, [0.5] * pairs, [1.0] * pairs, [0.5] * pairs,
            )
            for i, kind in enumerate(kinds)
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Changes, list[dict[str, torch.Tensor]]]:
    paths = family(tmp_path_factory.mktemp("family"), llama_like(3, dtype=torch.bfloat16), 2)
    with open_models(str(paths[0]), [str(path) for path in paths[1:]]) as models:
        return measure_changes(models, threads=1), [load(path) for path in paths]


PLAIN = {
    "norm": lambda w, tau: np.linalg.norm(tau),
    "l1": lambda w, tau: np.abs(tau).sum(),
    "relative": lambda w, tau: np.linalg.norm(tau) / np.linalg.norm(w),
    "spread": lambda w, tau: np.abs(tau).mean(),
    "largest": lambda w, tau: np.abs(tau).max(),
    "unchanged": lambda w, tau: (tau == 0).mean(),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_tables_are_plain_sums_over_the_tensors_of_a_cell(measured: tuple, measure: str) -> None:
    changes, (base, *experts) = measured
    table = importance_table(changes, measure)
    assert table.blocks == [None, 0, 1, 2]
    assert table.kinds == ["attn_q", "attn_o", "mlp_up", "mlp_down", "norm", "embed", "head"]
    assert np.isnan(table.values).sum() == 2 * (4 + 3 * 2)  # outside of blocks: embed, head, norm; in blocks the others

    def expected(k: int, chosen: list[TensorChange]) -> float:
        names = [t.name for t in chosen]
        w, e = (tensors(state, names).double().numpy() for state in (base, experts[k]))
        return float(PLAIN[measure](w, e - w))

    for k in range(2):
        for i, block in enumerate(table.blocks):
            assert table.per_block[k, i] == pytest.approx(expected(k, changes.select(block)), rel=1e-5)
            for j, kind in enumerate(table.kinds):
                if chosen := changes.select(block, kind):
                    assert table.values[k, i, j] == pytest.approx(expected(k, chosen), rel=1e-5)
        for j, kind in enumerate(table.kinds):
            assert table.per_kind[k, j] == pytest.approx(expected(k, changes.select(kind=kind)), rel=1e-5)


def test_tables_are_json(measured: tuple) -> None:
    table = importance_table(measured[0], "l1").as_dict()
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert table["values"][0][0][0] is None and table["values"][0][1][0] > 0


def test_a_base_of_zeros_has_no_relative_change(tmp_path: Path) -> None:
    changes = made_up([[1.0]], ["attn_q"])
    changes.tensors[0].base_norm = 0.0
    assert importance_table(changes, "relative").as_dict()["values"] == [[[None]]]


def test_the_worked_example_of_expert_merging() -> None:
    alpha = [[0.10, 0.12, 0.20, -0.15], [0.11, 0.09, 0.25, 0.10]]
    changes = made_up([[10, 40, 90, 20], [12, 30, 80, 30]], ["attn_q", "attn_k", "mlp_up", "mlp_down"])
    found = expert_merging_importance(changes, alpha)
    np.testing.assert_allclose(list(found.values()), [0.043107, 0.139353, 0.706057, 0.111483], atol=1e-6)
    # One coefficient per expert: what counts is |α_k| ‖τ_k‖₁.
    found = expert_merging_importance(changes, [0.3, 0])
    np.testing.assert_allclose(list(found.values()), np.array([10, 40, 90, 20]) / 160)


def test_what_expert_merging_leaves_alone_has_no_importance() -> None:
    changes = made_up([[1.0, 1, 2, 5, 3, 4]], ["embed", "attn_q", "mlp_up", "norm", "bias", "head"])
    assert expert_merging_importance(changes, [0.3]) == pytest.approx({"t1": 1 / 3, "t2": 2 / 3})
    assert len(expert_merging_importance(changes, [0.3], without=())) == 6


def test_the_table_of_expert_merging_adds_up_to_one(measured: tuple) -> None:
    changes, _ = measured
    table = expert_merging_table(changes, [0.3, 0.5])
    importance = expert_merging_importance(changes, [0.3, 0.5])
    assert (table.names, table.blocks) == (["all experts"], [0, 1, 2])
    assert table.kinds == ["attn_q", "attn_o", "mlp_up", "mlp_down"]
    for values in (table.values, table.per_block, table.per_kind):
        assert values.sum() == pytest.approx(1)
    assert table.values[0, 1, 2] == pytest.approx(importance["model.layers.1.mlp.up_proj.weight"])


def test_nothing_changed_is_no_importance_and_no_error() -> None:
    assert expert_merging_importance(made_up([[0.0, 0]], ["attn_q", "attn_k"]), [1]) == {"t0": 0, "t1": 0}


def test_tensors_of_one_cell_are_joined() -> None:
    changes = made_up([[1.0, 2]], ["mlp_up", "mlp_up"])
    changes.tensors[1].block = 0
    assert importance_table(changes, "l1").values.tolist() == [[[3]]]
    assert importance_table(changes, "norm").values[0, 0, 0] == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("coefficients", [[0.3], [0.3, 0.3, 0.3], [[0.1, 0.2], [0.1]], [[0.1], [0.1]]])
def test_coefficients_that_do_not_fit_are_refused(coefficients: list) -> None:
    with pytest.raises(RecipeError) as error:
        expert_merging_importance(made_up([[1.0, 2], [1, 2]], ["attn_q", "attn_k"]), coefficients)
    assert error.value.code == "E_RECIPE_INPUTS"


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(RecipeError, match="norms"):
        importance_table(made_up([[1.0]], ["attn_q"]), "norms")
