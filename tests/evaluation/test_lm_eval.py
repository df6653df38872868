"""Results of lm-evaluation-harness become records with the same means, and our own scorers agree with it.

``tests/data/lm_eval`` was written by lm_eval 0.4.13 on two of the bundled models (``lm_eval run --model hf --log_samples
--limit 6``, three local tasks); only descriptions of the machine were removed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from merging.errors import TaskError
from merging.evaluation.choice import Choice
from merging.evaluation.exact_match import evaluate
from merging.evaluation.likelihood import log_likelihoods
from merging.evaluation.lm_eval import check_installed, evaluate_harness, is_harness_task, read_results
from merging.evaluation.models import Model, load_model, model_key
from merging.evaluation.records import Record, read_records, write_records
from merging.evaluation.scoring import Settings, make_scorer, score_batch
from merging.evaluation.tasks import ChoiceItem, Item, Task, TextItem

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "lm_eval"
SORT = ROOT / "assets" / "demo" / "experts" / "sort"


def results(name: str) -> Path:
    (path,) = (DATA / name).glob("results_*.json")
    return path


def samples(task: str) -> list[dict]:
    (path,) = (DATA / "sort").glob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def mean(records: list[Record], metric: str) -> float:
    scores = [record.score for record in records if record.metric == metric]
    return math.fsum(scores) / len(scores)


# -- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "sort"])
def test_means_are_those_that_the_harness_printed(name: str) -> None:
    found, notes = read_results(results(name))
    printed = json.loads(results(name).read_text())["results"]
    by_task = {task.name: [r for r in found.records if r.task == task.name] for task in found.tasks}
    choice = by_task["demo_choice"]
    for theirs, ours in [("acc", "choice"), ("acc_norm", "choice_per_character"), ("acc_bytes", "choice_normalized")]:
        assert mean(choice, ours) == pytest.approx(printed["demo_choice"][f"{theirs},none"])
    assert mean(by_task["demo_exact"], "exact_match") == pytest.approx(printed["demo_exact"]["exact_match,none"])
    sizes = [len(sample["doc"]["text"].encode()) for sample in samples("demo_text")]
    bits = [record.score for record in by_task["demo_text"]]
    weighted = sum(b * size for b, size in zip(bits, sizes, strict=True)) / sum(sizes)
    assert weighted == pytest.approx(printed["demo_text"]["bits_per_byte,none"])
    assert all("word_perplexity" in note or "Response lengths" in note for note in notes) and len(notes) == 2
    assert {(task.kind, task.items) for task in found.tasks} == {
        ("multiple_choice", 6), ("generate_until", 6), ("loglikelihood_rolling", 6)}  # fmt: skip


def test_a_folder_of_several_models_can_be_paired_and_written(tmp_path: Path) -> None:
    found, _ = read_results(DATA)
    assert [model.name for model in found.models] == ["assets/demo/base", "assets/demo/experts/sort"]
    base, sort = (
        [(r.task, r.item, r.metric, r.prompt) for r in found.records if r.model == m.key] for m in found.models
    )
    assert base == sort and len(set(base)) == 6 * 5
    assert all(record.seconds > 0 for record in found.records)
    write_records(tmp_path / "run.parquet", found.records, found.models, found.tasks)
    assert read_records(tmp_path / "run.parquet") == found.records
    answers = {r.answer for r in found.records if r.task == "demo_choice"}
    assert answers <= {choice for sample in samples("demo_choice") for choice in sample["doc"]["c"]}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "sort", tmp_path / "out"))


def change(folder: Path, task: str, line: int, **changes: object) -> Path:
    (path,) = folder.glob(f"samples_{task}_*.jsonl")
    rows = path.read_text().splitlines()
    rows[line - 1] = json.dumps(json.loads(rows[line - 1]) | changes)
    path.write_text("\n".join(rows) + "\n")
    return path


def test_the_newest_results_of_a_model_count(copy: Path) -> None:
    for path in list(copy.iterdir()):
        shutil.copy(path, str(path).replace("_2026-11-22", "_2026-12-01"))
    for line in range(1, 7):
        change_newest = next(copy.glob("samples_demo_exact_2026-12-01*"))
        rows = change_newest.read_text().splitlines()
        rows[line - 1] = json.dumps(json.loads(rows[line - 1]) | {"exact_match": 0.0})
        change_newest.write_text("\n".join(rows))
    found, notes = read_results(copy)
    assert len(found.models) == 1 and len(found.records) == 6 * 5
    assert mean([r for r in found.records if r.task == "demo_exact"], "exact_match") == 0
    assert any("more than once: results_2026-12-01" in note for note in notes)


def test_filters_are_tasks_of_their_own_and_doubled_documents_are_told_apart(copy: Path) -> None:
    path = change(copy, "demo_exact", 1, filter="strict-match")
    with open(path, "a") as file:
        file.write(path.read_text().splitlines()[1] + "\n")
    found, _ = read_results(copy)
    names = {task.name: task.items for task in found.tasks}
    assert names == {"demo_choice": 6, "demo_exact.none": 6, "demo_exact.strict-match": 1, "demo_text": 6}
    items = [record.item for record in found.records if record.task == "demo_exact.none"]
    assert items[-1] == f"{items[0]}-2"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"exact_match": float("nan")}, "exact_match is None"),
        ({"exact_match": 3}, "exact_match is 3"),
        ({"exact_match": "yes"}, "no score"),
        ({"doc_hash": None}, "doc_hash"),
        ({"metrics": "exact_match"}, "lists of metrics"),
    ],
    ids=str,
)
def test_a_damaged_sample_names_file_and_line(copy: Path, changes: dict, says: str) -> None:
    path = change(copy, "demo_exact", 3, **changes)
    with pytest.raises(TaskError) as caught:
        read_results(copy)
    assert caught.value.code == "E_RECORDS" and f"{path}, line 3" in caught.value.what and says in caught.value.what


def test_what_holds_no_results(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="holds no results"):
        read_results(tmp_path / "absent")
    (path,) = copy.glob("samples_demo_text_*")
    path.unlink()
    assert any("demo_text has no samples" in note for note in read_results(copy)[1])
    path = change(copy, "demo_exact", 1)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TaskError, match="line 6: this is not JSON"):
        read_results(copy)
    for path in copy.glob("samples_*"):
        path.unlink()
    with pytest.raises(TaskError, match="none of its tasks has samples"):
        read_results(copy)
    (file,) = copy.glob("results_*")
    file.write_text("[]")
    with pytest.raises(TaskError, match="not a file of results"):
        read_results(file)


# -- our scorers against the harness ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(SORT)


def test_log_likelihoods_of_choices_are_those_of_the_harness(model: Model) -> None:
    rows = samples("demo_choice")
    items = tuple(ChoiceItem(row["doc"]["q"], tuple(row["doc"]["c"]), row["doc"]["a"], 1) for row in rows)
    task = Task("demo_choice", items, "0", "choice")
    scorer = Choice(model, task, Settings(), 16)
    for item, row in zip(items, rows, strict=True):
        with torch.inference_mode():
            found = log_likelihoods(model, scorer.sequences[item], 16)
        assert found == pytest.approx([float(value) for value, _ in row["filtered_resps"]], abs=1e-4)
    records = score_batch(model, make_scorer(model, task, Settings()), task, items)
    assert [r.score for r in records if r.metric == "choice"] == [row["acc"] for row in rows]
    assert [r.score for r in records if r.metric == "choice_normalized"] == [row["acc_bytes"] for row in rows]
    theirs = [r for r in read_results(results("sort"))[0].records if r.task == "demo_choice"]
    assert [r.answer for r in records if r.metric == "choice"] == [r.answer for r in theirs if r.metric == "choice"]


def test_losses_of_texts_are_those_of_the_harness(model: Model) -> None:
    rows = samples("demo_text")
    task = Task("demo_text", tuple(TextItem(row["doc"]["text"], n) for n, row in enumerate(rows)), "0", "text")
    records = score_batch(model, make_scorer(model, task, Settings()), task, task.items)
    expected = [-ll / size / math.log(2) for ll, size in (row["bits_per_byte"] for row in rows)]
    assert [r.score for r in records if r.metric == "nll_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_exact_matches_are_those_of_the_harness(model: Model) -> None:
    rows = samples("demo_exact")
    items = tuple(Item(row["doc"]["prompt"], row["doc"]["answer"], n) for n, row in enumerate(rows))
    found = evaluate(model, Task("demo_exact", items, "0")).records
    assert [r.score for r in found] == [row["exact_match"] for row in rows]
    assert [r.answer for r in found] == [row["filtered_resps"][0] for row in rows]


# -- running ------------------------------------------------------------------------------------------------------


def write_task(folder: Path) -> Path:
    rows = [sample["doc"] for sample in samples("demo_exact")]
    (folder / "gen.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = folder / "demo_exact.yaml"
    path.write_text(
        f"""task: demo_exact
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/gen.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["<eos>"], max_gen_toks: 10, do_sample: false}}
metric_list:
  - metric: exact_match
"""
    )
    return path


def test_its_tasks_are_told_from_ours(tmp_path: Path) -> None:
    assert is_harness_task(write_task(tmp_path))
    (tmp_path / "ours.yaml").write_text("kind: image\narrays: a.npz\n")
    assert not is_harness_task(tmp_path / "ours.yaml") and not is_harness_task(tmp_path / "gen.jsonl")
    assert not is_harness_task(tmp_path / "absent.yaml")


def test_when_it_is_missing_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TaskError) as caught:
        evaluate_harness({"sort": SORT}, [write_task(tmp_path)])
    assert caught.value.code == "E_HARNESS" and "pip install lm_eval==0.4.13" in caught.value.fix
    with pytest.raises(TaskError):
        check_installed()


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is an optional extra")
def test_it_runs_here_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMALGAM_CACHE", str(tmp_path / "cache"))
    found = evaluate_harness({"sort": SORT}, [write_task(tmp_path)], limit=4)
    assert found.failures == [] and found.models[0].key == model_key(SORT)
    theirs = [r for r in read_results(results("sort"))[0].records if r.task == "demo_exact"][:4]
    assert [(r.item, r.metric, r.score, r.prompt, r.answer) for r in found.records] == [
        (r.item, r.metric, r.score, r.prompt, r.answer) for r in theirs
    ]
    assert [r.length for r in found.records] == [8] * 4
    (tmp_path / "demo_exact.yaml").write_text(
        "task: demo_exact\ndataset_path: nowhere/at-all\noutput_type: generate_until\n"
    )
    bad = evaluate_harness({"sort": SORT}, [tmp_path / "demo_exact.yaml"])
    assert [failure.error.code for failure in bad.failures] == ["E_HARNESS"]
