"""A whole comparison on the demo experts: merges, tuning, evaluation in a child process, run, table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from app import main
from merging.checkpoints.disk import take_lock, unlock_folder
from merging.errors import AmalgamError, TaskError
from merging.evaluation import baselines
from merging.evaluation.baselines import Order, apart, produce
from merging.evaluation.compare import compare
from merging.evaluation.run_file import load_runs
from merging.evaluation.selection import Setting, Sources, Work, settings_for
from merging.evaluation.tasks import Task, read_tasks

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo"
NAMES = ("reverse", "sort")
TASKS = [task for task in read_tasks(DEMO / "tasks") if task.name.split(".")[0] in NAMES]
REPORTED, HELD = apart(TASKS)
SOURCES = Sources(DEMO / "base", {name: DEMO / "experts" / name for name in NAMES})
ORDER = Order(SOURCES, {name: [name] for name in NAMES}, REPORTED, HELD, budget=2)
WORK = Work(device="cpu", threads=1, limit=50)


def test_splits_are_told_apart_by_name() -> None:
    assert [task.name for task in REPORTED] == ["reverse", "sort"]
    assert [task.name for task in HELD] == ["reverse.validation", "sort.validation"]


def test_a_run_is_made_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AMALGAM_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    order = replace(ORDER, methods={"ties": settings_for("ties", 1)}, candidates={"worst": SOURCES.experts["sort"]})
    path = produce(order, out, WORK)
    assert path == out / "run.json"
    assert {folder.name for folder in (out / "models").iterdir()} == {"average", "tuned", "ties"}

    loaded = load_runs([out])
    found = compare(loaded.records, loaded.run, selected_on=loaded.selected_on, resamples=500)
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["base", "expert reverse", "expert sort", "average", "tuned", "ties", "worst"]
    assert rows["expert reverse"].tasks["reverse"].mean > 0.9 > rows["base"].tasks["reverse"].mean
    spent = {name: row.evaluations for name, row in rows.items() if row.is_merged}
    assert spent == {"average": 0, "tuned": 2, "ties": 0, "worst": None}
    assert rows["tuned"].setting in ("weight 0.5", "weight 1") and rows["average"].setting == "weight 0.5"
    assert rows["worst"].tasks == rows["expert sort"].tasks  # the same bytes under two names
    said = "\n".join(note.text for note in found.notes)
    assert "None of the 100 items that were used for choosing is among them" in said
    assert "Mini-scale: models of 862,080 parameters" in said

    with pytest.raises(AmalgamError) as caught:
        produce(order, out, WORK)
    assert caught.value.code == "E_OUTPUT_EXISTS"

    assert main(["compare", str(out), "--json", "-"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]] == list(rows)


def test_items_in_both_splits_are_refused_before_any_work(tmp_path: Path) -> None:
    leaking = replace(HELD[0], items=(*HELD[0].items, REPORTED[1].items[7]))
    with pytest.raises(TaskError, match="is also an item of sort") as caught:
        produce(replace(ORDER, selection_tasks=[leaking]), tmp_path / "run", WORK)
    assert caught.value.code == "E_SELECTION" and "line 8" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"owners": {"reverse": ["reverse"], "sort": ["sorting"]}}, "E_TASK"),
        ({"owners": {"reverse": ["sort"], "sort": ["sort"]}}, "E_RUN"),
        ({"candidates": {"tuned": DEMO / "base"}}, "E_RUN"),
        ({"candidates": {"ties": DEMO / "base"}, "methods": {"ties": settings_for("ties", 1)}}, "E_RUN"),
        ({"methods": {"ties": [Setting("ties", {"density": 7.0}, {})]}}, "E_RECIPE_FIELD"),
    ],
)
def test_wrong_orders_are_refused_before_any_work(tmp_path: Path, change: dict, code: str) -> None:
    with pytest.raises(AmalgamError) as caught:
        produce(replace(ORDER, **change), tmp_path / "run", WORK)
    assert caught.value.code == code
    assert not (tmp_path / "run").exists()


def test_an_adapter_becomes_a_model_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the runner, with an expert that is a LoRA adapter: a whole model in its place."""
    import torch
    from safetensors.torch import load_file, save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "model.layers.0.self_attn.q_proj"
    width = load_file(DEMO / "base" / "model.safetensors")[f"{name}.weight"].shape
    generator = torch.Generator().manual_seed(0)
    save_file(
        {
            f"base_model.model.{name}.lora_A.weight": torch.randn(2, width[1], generator=generator),
            f"base_model.model.{name}.lora_B.weight": torch.randn(width[0], 2, generator=generator),
        },
        adapter / "adapter_model.safetensors",
    )
    facts = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "base",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(facts))

    class Enough(Exception):
        pass

    def stop_here(models: dict[str, Path], tasks: list[Task], work: Work) -> None:
        raise Enough

    monkeypatch.setattr(baselines, "_evaluate", stop_here)
    order = replace(ORDER, sources=Sources(DEMO / "base", {"reverse": adapter, "sort": DEMO / "experts" / "sort"}))
    with pytest.raises(Enough):
        produce(order, tmp_path / "run", WORK)
    whole = load_file(tmp_path / "run" / "models" / "expert reverse" / "model.safetensors")
    base = load_file(DEMO / "base" / "model.safetensors")
    changed = [key for key in base if not torch.equal(base[key], whole[key])]
    assert changed == [f"{name}.weight"]
    average = load_file(tmp_path / "run" / "models" / "average" / "model.safetensors")
    sort = load_file(DEMO / "experts" / "sort" / "model.safetensors")
    key = f"{name}.weight"
    assert torch.allclose(average[key], (whole[key] + sort[key]) / 2, atol=1e-6)


def test_two_processes_do_not_make_one_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    held = take_lock(out / "lock")
    assert held is not None
    with pytest.raises(AmalgamError) as caught:
        produce(ORDER, out, WORK)
    assert caught.value.code == "E_BUSY" and str(out) in str(caught.value)
    unlock_folder(held)
