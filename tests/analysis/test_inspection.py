"""All parts together: what was kept is used again and nothing else, work can be stopped, and every number says its basis."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merging.analysis import inspection_run
from merging.analysis.cache import Cache
from merging.analysis.changes import Changes
from merging.analysis.inspection import Inspection
from merging.analysis.inspection_run import PARTS, Step, inspect
from merging.analysis.trimmed import Trimmed
from merging.errors import AmalgamError, Cancelled, InputError, NumbersError, RecipeError
from tests.small_checkpoints import family, llama_like, load, merge, recipe, save

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo"
WITHOUT_TEXTS = [part for part in PARTS if part != "texts"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base, two experts and a merge."""
    folder = tmp_path_factory.mktemp("inspection")
    paths = family(folder, llama_like(2, 16), 2, config={"model_type": "llama"})
    merge(recipe("task_arithmetic", [(p, {"weight": 0.5}) for p in paths[1:]], paths[0]), folder / "merged")
    return [*paths, folder / "merged"]


def run(models: list[Path], cache: Cache | bool = False, merged: bool = True, **options: Any) -> Inspection:
    base, *experts, one = map(str, models)
    return inspect(base, experts, one if merged else None, cache=cache, **{"threads": 1, **options})


def without_times(result: Inspection) -> dict[str, Any]:
    data = result.as_dict()
    for part in data["parts"].values():
        part["seconds"] = part["cached"] = None
    return data | {"made": None}


# -- what comes out -----------------------------------------------------------------------------------------------


def test_everything_is_there_and_says_its_basis(models: list[Path]) -> None:
    result = run(models)
    data = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert list(data["parts"]) == WITHOUT_TEXTS == data["options"]["parts"]
    assert {p["basis"] for p in data["parts"].values()} == {"exact"}
    assert "sampled" in data["parts"]["changes"]["how"] and data["changes"]["sampled"].keys() == {"survival"}
    assert data["names"] == ["expert1", "expert2"] and data["tensors"] == 13 and data["texts"] is None
    size = sum(tensor.nbytes for tensor in load(models[0]).values())
    assert list(data["models"]) == ["base", "expert1", "expert2", "merged"]
    assert all(len(m["fingerprint"]) == 64 and m["bytes"] == size for m in data["models"].values())
    assert {f["code"] for f in data["findings"]} >= {"base", "norms", "conflict", "merged", "rank"}
    assert data["importance"].keys() == {"norm", "l1", "relative", "expert_merging"}
    assert len(data["spectra"]) == 10 * 4 and all(
        len(s["values"]) <= 64 for s in data["spectra"]
    )  # 2 experts, merge, pair
    assert result.findings == sorted(
        result.findings, key=lambda f: ["problem", "warning", "note", "ok"].index(f.severity)
    )


def test_numbers_are_those_of_the_weights(models: list[Path]) -> None:
    """Against numpy, by way of the safetensors package."""
    result = run(models)
    base, one, two, merged = (load(path) for path in models)
    tau = [np.concatenate([(m[n] - base[n]).double().numpy().ravel() for n in base]) for m in (one, two, merged)]
    assert result.changes is not None
    total = result.changes.total()
    np.testing.assert_allclose(total.norm, [np.linalg.norm(t) for t in tau[:2]], rtol=1e-6)
    cosine = tau[0] @ tau[1] / np.linalg.norm(tau[0]) / np.linalg.norm(tau[1])
    assert result.as_dict()["cosine"][0][1] == pytest.approx(cosine, abs=1e-9)
    assert total.merged is not None and total.merged.projection[0] == pytest.approx(tau[2] @ tau[0] / (tau[0] @ tau[0]))
    name = "model.layers.1.mlp.up_proj.weight"
    spectrum = next(s for s in result.spectra or [] if (s.tensor, s.of) == (name, "expert2"))
    expected = np.linalg.svd((two[name] - base[name]).double().numpy(), compute_uv=False)
    np.testing.assert_allclose(spectrum.values, expected, rtol=1e-6)
    assert result.places[name] == (1, "mlp_up") and result.places["lm_head.weight"][0] is None


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"parts": ["changes"]}, ["changes"]),
        ({"parts": ["subspaces", "doctor"]}, ["doctor", "subspaces"]),
        ({"spectra": "none"}, ["doctor", "changes", "trimmed"]),
        ({"parts": ["spectra"], "spectra": "preview"}, ["spectra"]),
        ({"parts": ["spectra"], "spectra": "exact"}, ["spectra"]),
    ],
)
def test_parts_can_be_chosen(models: list[Path], options: dict[str, Any], parts: list[str]) -> None:
    result = run(models, **options)
    assert list(result.parts) == parts
    data = result.as_dict()
    for part in set(PARTS) - {"doctor", *parts}:
        assert data[part] is None
    assert bool(result.findings) == ("doctor" in parts)
    if options.get("spectra") == "preview":
        assert result.parts["spectra"].basis == "estimated"


def test_a_single_expert_has_no_pairs(models: list[Path]) -> None:
    data = inspect(str(models[0]), [str(models[1])], cache=False, threads=1).as_dict()
    assert data["cosine"] == [[1.0]] and {s["of"] for s in data["spectra"]} == {"expert1"}
    json.dumps(data, allow_nan=False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"parts": ["spectrum"]}, "no part 'spectrum'"),
        ({"parts": []}, "No part"),
        ({"spectra": "all"}, "no spectra 'all'"),
        ({"density": 0.0}, "density 0"),
        ({"density": float("nan")}, "density nan"),
        ({"rank": 0}, "rank 0"),
        ({"coefficients": [1.0]}, "1 coefficients were given for 2 experts"),
    ],
)
def test_options_that_make_no_sense(models: list[Path], options: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text) as caught:
        run(models, **options)
    assert caught.value.code == "E_RECIPE_FIELD" and caught.value.fix


def test_coefficients_enter_the_importance(models: list[Path]) -> None:
    equal, one = run(models, parts=["changes"]), run(models, parts=["changes"], coefficients=[1.0, 0.0])
    tables = [r.as_dict()["importance"]["expert_merging"]["per_block"][0] for r in (equal, one)]
    assert sum(tables[0]) == pytest.approx(1) and sum(tables[1]) == pytest.approx(1) and tables[0] != tables[1]


# -- the cache ----------------------------------------------------------------------------------------------------


def test_a_second_look_is_the_same_and_computes_nothing(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(models, Cache(tmp_path))
    for name in (
        "look",
        "measure_changes",
        "measure_trimmed",
        "measure_spectra",
        "measure_subspaces",
        "measure_both",
        "measure_principal",
    ):
        monkeypatch.setattr(inspection_run, name, lambda *_, **__: pytest.fail("computed again"))
    second = run(models, Cache(tmp_path))
    assert without_times(first) == without_times(second)
    assert all(p.cached for p in second.parts.values()) and not any(p.cached for p in first.parts.values())


def test_options_have_entries_of_their_own(models: list[Path], tmp_path: Path) -> None:
    run(models, Cache(tmp_path))
    again = run(models, Cache(tmp_path), density=0.3, rank=2)
    assert {n for n, p in again.parts.items() if not p.cached} == {"trimmed", "subspaces"}
    assert again.trimmed is not None and again.trimmed.density == 0.3
    again = run(models, Cache(tmp_path), merged=False)
    assert not any(p.cached for p in again.parts.values())


def test_what_was_kept_is_not_mistaken_for_another_model(models: list[Path], tmp_path: Path) -> None:
    """As files from one archive: equal sizes, headers and times."""
    paths = [Path(shutil.copytree(p, tmp_path / p.name)) for p in models[:3]]
    for path in paths:
        os.utime(path / "model.safetensors", ns=(10**18, 10**18))
    one = inspect(str(paths[0]), [str(paths[1])], cache=Cache(tmp_path / "c"), parts=["changes"], threads=1)
    two = inspect(str(paths[0]), [str(paths[2])], cache=Cache(tmp_path / "c"), parts=["changes"], threads=1)
    assert not two.parts["changes"].cached
    assert one.changes is not None and two.changes is not None and one.changes.total().norm != two.changes.total().norm
    # one weight changes, and nothing that a listing of the folder shows
    state = load(paths[1])
    state["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    shutil.rmtree(paths[1])
    save(paths[1], state, config={"model_type": "llama"})
    os.utime(paths[1] / "model.safetensors", ns=(10**18, 10**18))
    three = inspect(str(paths[0]), [str(paths[1])], cache=Cache(tmp_path / "c"), parts=["changes"], threads=1)
    assert not three.parts["changes"].cached


def test_damaged_entries_are_computed_anew(models: list[Path], tmp_path: Path) -> None:
    first = run(models, Cache(tmp_path))
    for k, path in enumerate(sorted(tmp_path.iterdir())):
        content = path.read_bytes()
        path.write_bytes([b"", b"nonsense", content[: len(content) // 2], content[:-100] + bytes(100)][k % 4])
    second = run(models, Cache(tmp_path))
    assert not any(p.cached for p in second.parts.values()) and without_times(first) == without_times(second)
    assert all(p.cached for p in run(models, Cache(tmp_path)).parts.values())


def test_an_older_layout_of_an_entry_is_computed_anew(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(models, Cache(tmp_path), parts=["trimmed"])

    class Other:  # as if a field had been renamed since
        def __init__(self, names: list[str]) -> None:
            self.names = names

    Other.__name__ = "Trimmed"
    monkeypatch.setattr(inspection_run, "Trimmed", Other)
    result = run(models, Cache(tmp_path), parts=["trimmed"])
    assert not result.parts["trimmed"].cached and isinstance(result.trimmed, Trimmed)


def test_a_cache_that_cannot_be_written_is_said(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(models, Cache(tmp_path / "file"), parts=["changes"])
    assert result.changes is not None and any("could not be kept" in note for note in result.notes)


def test_other_bases_are_looked_at_each_time(models: list[Path], tmp_path: Path) -> None:
    other = save(tmp_path / "other", llama_like(2, 16, seed=5))
    options = {"parts": ["doctor"], "bases": [str(other)]}
    run(models, Cache(tmp_path / "c"), **options)
    again = run(models, Cache(tmp_path / "c"), **options)
    assert (
        not again.parts["doctor"].cached and again.sample is not None and list(again.sample.other_norms) == [str(other)]
    )


def test_two_processes_at_once(models: list[Path], tmp_path: Path) -> None:
    code = (
        "import sys; from merging.analysis.inspection_run import inspect; "
        "r = inspect(sys.argv[1], sys.argv[2:], threads=1); print(r.changes.total().norm)"
    )
    command = [sys.executable, "-c", code, *map(str, models[:3])]
    environment = os.environ | {"AMALGAM_CACHE": str(tmp_path)}
    both = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert said[0] == said[1] != "" and [process.returncode for process in both] == [0, 0]


# -- progress, stopping, errors -----------------------------------------------------------------------------------


def test_progress_goes_forward_to_the_end(models: list[Path]) -> None:
    steps: list[Step] = []
    known: list[tuple[str, bool]] = []
    run(models, progress=steps.append, finished=lambda part, result: known.append((part, part in result.parts)))
    shares = [step.share for step in steps]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == pytest.approx(1)
    assert steps[-1].part == "principal" and steps[-1].number == 6 and {s.of for s in steps} == {6}
    assert steps[0].seconds_left is None and steps[-1].seconds_left in (None, pytest.approx(0, abs=1e-6))
    assert known == [(part, True) for part in WITHOUT_TEXTS]


def test_the_time_left_is_learned(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that cost three times as much as estimated: so does the rest."""
    clock = [0.0]
    monkeypatch.setattr(inspection_run.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(inspection_run, "estimated_seconds", lambda part, *_: 10.0)

    def slow(found: Any, told: Any = None) -> Any:
        for done in (1, 2):
            clock[0] += 15
            if told:
                told(done, 2, "")
        return found

    whole = run(models)
    monkeypatch.setattr(inspection_run, "look", lambda *_, **__: slow(whole.sample))
    monkeypatch.setattr(inspection_run, "measure_changes", lambda *_, **o: slow(whole.changes, o["progress"]))
    monkeypatch.setattr(inspection_run, "measure_trimmed", lambda *_, **o: slow(whole.trimmed, o["progress"]))
    steps: list[Step] = []
    run(models, parts=["doctor", "changes", "trimmed"], progress=steps.append)
    left = [(s.part, s.share, s.seconds_left) for s in steps]
    assert ("doctor", pytest.approx(1 / 3), None) in left  # nothing is learned from reading headers
    assert ("changes", 0.5, pytest.approx(45)) in left and ("trimmed", pytest.approx(5 / 6), pytest.approx(15)) in left


def test_stopping_keeps_what_is_done_and_goes_on_there(models: list[Path], tmp_path: Path) -> None:
    stop = threading.Event()

    def after(part: str, _: Inspection) -> None:
        if part == "trimmed":
            stop.set()

    with pytest.raises(Cancelled, match="Run the same command again"):
        run(models, Cache(tmp_path), finished=after, stop=stop)
    again = run(models, Cache(tmp_path))
    assert [n for n, p in again.parts.items() if p.cached] == ["doctor", "changes", "trimmed"]


def test_stopping_within_a_part(tmp_path: Path) -> None:
    paths = family(tmp_path, {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(512, 1024) for i in range(8)}, 2)
    stop, seen = threading.Event(), 0

    def told(step: Step) -> None:
        nonlocal seen
        if step.part == "spectra" and step.share > 0:
            seen += 1
            stop.set()

    began = time.monotonic()
    with pytest.raises(Cancelled):
        inspect(str(paths[0]), [str(p) for p in paths[1:]], cache=False, progress=told, stop=stop, threads=1)
    assert seen and time.monotonic() - began < 30


def test_an_error_leaves_finished_parts_in_the_cache(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> Changes:
        raise InputError("E_READ", "The disk is gone.")

    with monkeypatch.context() as patch:
        patch.setattr(inspection_run, "measure_trimmed", fails)
        with pytest.raises(InputError):
            run(models, Cache(tmp_path))
    assert run(models, Cache(tmp_path)).parts["changes"].cached


@pytest.mark.parametrize("problem", ["nan", "missing", "foreign"])
def test_bad_models_are_typed_errors(models: list[Path], tmp_path: Path, problem: str) -> None:
    state = load(models[1])
    if problem == "nan":
        state["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    path = save(tmp_path / "bad", {"x": torch.ones(3)} if problem == "foreign" else state)
    if problem == "missing":
        shutil.rmtree(path)
    with pytest.raises(AmalgamError) as caught:
        inspect(str(models[0]), [str(path)], cache=False, threads=1)
    assert (
        caught.value.code == {"nan": "E_NOT_FINITE", "missing": "E_NOT_FOUND", "foreign": "E_MISSING_TENSOR"}[problem]
    )
    if problem == "nan":
        assert isinstance(caught.value, NumbersError) and "up_proj" in caught.value.what


def test_a_second_look_needs_no_torch(models: list[Path], tmp_path: Path) -> None:
    """That is most of the time that it would take."""
    code = (
        "import sys; from merging.analysis.inspection_run import inspect; inspect(sys.argv[1], sys.argv[2:], threads=1); "
        "print([m for m in ('torch', 'scipy', 'transformers') if m in sys.modules])"
    )
    for expected in (None, "[]"):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, models[:3])], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"AMALGAM_CACHE": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0 and done.stderr == ""
        assert expected is None or done.stdout.strip() == expected


def test_results_with_texts_are_kept_until_something_changes(tmp_path: Path) -> None:
    """The texts, the tokenizer and what was asked for are part of the key; what failed is not kept."""
    base, sort = tmp_path / "base", tmp_path / "sort"
    shutil.copytree(DEMO / "base", base)
    shutil.copytree(DEMO / "experts" / "sort", sort)
    texts = tmp_path / "texts.jsonl"
    lines = (DEMO / "calibration" / "sort.jsonl").read_text("utf-8").splitlines()
    texts.write_text("\n".join(lines[:4]), "utf-8")

    def again(**options: Any) -> Inspection:
        return inspect(str(base), [str(sort)], parts=["texts"], texts=[texts], cache=Cache(tmp_path / "c"), **options)

    first, second = again(), again()
    assert not first.parts["texts"].cached and second.parts["texts"].cached and second.texts == first.texts
    texts.write_text("\n".join(lines[4:8]), "utf-8")
    third = again()
    assert not third.parts["texts"].cached and third.texts != first.texts
    config = json.loads((sort / "config.json").read_text("utf-8"))
    (sort / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}), "utf-8")
    fourth = again()
    assert not fourth.parts["texts"].cached and fourth.texts != third.texts


def test_looking_computes_nothing(tmp_path: Path) -> None:
    base, *experts = map(str, family(tmp_path, llama_like(2, 16), 2, config={"model_type": "llama"}))
    cache = Cache(tmp_path / "cache")
    assert inspect(base, experts, cache=cache, compute=False).parts == {}
    inspect(base, experts, cache=cache, parts=["doctor", "changes", "spectra"], threads=1)
    told: list[str] = []
    found = inspect(base, experts, cache=cache, compute=False, finished=lambda part, _: told.append(part))
    assert told == list(found.parts) == ["doctor", "changes", "spectra"]
    assert all(facts.cached for facts in found.parts.values()) and found.trimmed is None and found.findings
