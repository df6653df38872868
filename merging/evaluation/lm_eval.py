"""lm-evaluation-harness (EleutherAI, 0.4.13), as an optional extra: its tasks and its results in our records.

    pip install lm_eval==0.4.13          # brings some forty packages; nothing here needs it unless it is used

``read_results`` takes what ``lm_eval --log_samples --output_path`` has written, anywhere: ``results_*.json`` with the
``samples_*.jsonl`` beside it. ``evaluate_harness`` runs the harness on task files of its own format (local YAML) and on
our models, in a child process without network. A task file of the harness may contain Python that is run
(``!function``): use only those you trust.

What becomes of its metrics: acc -> choice, acc_bytes -> choice_normalized, acc_norm -> choice_per_character,
exact_match as it is, bits_per_byte -> nll_per_byte. Others are left out, and a note says so. Its other settings are
those that were found to work inside of an application: only the named folder is searched for tasks, no worker
processes, no bootstrap (the statistics are computed from the records).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from merging.checkpoints.files import read_whole, shown
from merging.errors import AmalgamError, Cancelled, InputError, TaskError
from merging.evaluation.child import Child, Send
from merging.evaluation.models import CAUSAL, describe, load_model, model_key
from merging.evaluation.records import ModelInfo, Record, RecordsFile, TaskInfo
from merging.evaluation.runner import Evaluation, Failure, Progress
from merging.user_folders import cache_folder

VERSION = "0.4.13"
METRICS = {
    "acc": "choice",
    "acc_bytes": "choice_normalized",
    "acc_norm": "choice_per_character",
    "exact_match": "exact_match",
    "bits_per_byte": "nll_per_byte",
}
_LARGEST = 1 << 30
_RESULTS = re.compile(r"results_(.+)\.json")
_HARNESS_TASK = re.compile(r"^(task|include|output_type)[ \t]*:", re.MULTILINE)


# -- results from elsewhere ---------------------------------------------------------------------------------------


def read_results(path: str | Path) -> tuple[RecordsFile, list[str]]:
    """Records of a ``results_*.json`` with its samples, or of all of them in a folder and its subfolders; and notes.

    A model's key is a hash of what the harness says of it (source, name, arguments, revision), not of its content. An
    item is the harness' document hash. Response lengths are not in these files: they are 0. Of a model and task that
    were evaluated several times the newest counts. Where a task has several filters, each is a task of its own,
    ``gsm8k.strict-match``.

    Raises:
        TaskError: ``E_RECORDS``, with file and line, for files that are not what the harness writes, and results
            without samples.
    """
    path = Path(path)
    files = sorted(path.rglob("results_*.json")) if path.is_dir() else [path]
    files = [file for file in files if _RESULTS.fullmatch(file.name)]
    if not files:
        what = f"{shown(path)} holds no results of lm-evaluation-harness (results_*.json)."
        raise TaskError("E_RECORDS", what, "", "Name the folder that was given to --output_path.")
    found = RecordsFile()
    notes: list[str] = []
    cells: dict[tuple[str, str], list[Record]] = {}
    for file in sorted(files, key=lambda one: _RESULTS.fullmatch(one.name)[1]):  # type: ignore[index]
        model, tasks, records = _read_one(file, notes)
        if model.key not in {one.key for one in found.models}:
            found.models.append(model)
        for task in tasks:
            found.tasks = [one for one in found.tasks if one.name != task.name] + [task]
            if (model.key, task.name) in cells:
                notes.append(f"{model.name} was evaluated on {task.name} more than once: {file.name} counts.")
            cells[model.key, task.name] = [record for record in records if record.task == task.name]
    found.records = [record for records in cells.values() for record in records]
    notes.append("Response lengths are not in the files of lm-evaluation-harness.")
    return found, list(dict.fromkeys(notes))


def is_results(path: Path) -> bool:
    """Is this a file of results, or a folder with some in it?"""
    if path.is_dir():
        return next(path.rglob("results_*.json"), None) is not None
    return bool(_RESULTS.fullmatch(path.name))


def _read_one(file: Path, notes: list[str]) -> tuple[ModelInfo, list[TaskInfo], list[Record]]:
    results = _read_json(file, read_whole_or_refuse(file), "")
    if not isinstance(results, dict) or not all(isinstance(results.get(k), dict) for k in ("configs", "config")):
        _refuse(file, "", "this is not a file of results: configs or config is missing")
    name = str(results.get("model_name") or results["config"].get("model") or "model")
    config = results["config"]
    about = [results.get("model_source"), name, config.get("model_args"), config.get("model_sha")]
    key = "lm_eval-" + hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    model = ModelInfo(key, name, name)
    when = _RESULTS.fullmatch(file.name)[1]  # type: ignore[index]
    samples: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for task in results["configs"]:
        path = file.parent / f"samples_{task}_{when}.jsonl"
        if not path.is_file():
            notes.append(f"{file.name}: {task} has no samples ({path.name}); lm_eval writes them with --log_samples.")
            continue
        rows = read_whole_or_refuse(path).split(b"\n")
        rows = rows[:-1] if rows[-1] == b"" else rows
        samples[task] = [
            (number, _sample(path, number, _read_json(path, row, f"line {number}")))
            for number, row in enumerate(rows, 1)
        ]
    if not samples:
        _refuse(file, "", "none of its tasks has samples", "Run lm_eval with --log_samples.")
    seconds = 0.0
    with contextlib.suppress(TypeError, ValueError):
        seconds = float(results.get("total_evaluation_time_seconds") or 0) / sum(map(len, samples.values()))
    hashes, shots = results.get("task_hashes") or {}, results.get("n-shot") or {}
    tasks: list[TaskInfo] = []
    records: list[Record] = []
    for task, numbered in samples.items():
        where = file.parent / f"samples_{task}_{when}.jsonl"
        made = _records(numbered, task, key, int(shots.get(task) or 0), seconds, lambda text: 0, where, notes)
        for part, mine in made.items():
            kind = str(results["configs"][task].get("output_type", ""))
            tasks.append(TaskInfo(part, str(hashes.get(task, "")), kind, len({r.item for r in mine})))
            records += mine
    return model, tasks, records


def _sample(path: Path, number: int, row: Any) -> dict[str, Any]:
    texts = ("doc_hash", "prompt_hash", "filter")
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) and row[name] for name in texts):
        _refuse(path, f"line {number}", f"a sample has the fields {', '.join(texts)}")
    if not isinstance(row.get("metrics"), list) or not isinstance(row.get("filtered_resps"), list):
        _refuse(path, f"line {number}", "a sample has lists of metrics and filtered_resps")
    return row


def read_whole_or_refuse(path: Path) -> bytes:
    """The bytes of a file; E_RECORDS if they cannot be had."""
    try:
        return read_whole(path, _LARGEST)
    except InputError as error:
        raise TaskError("E_RECORDS", error.what, error.why, error.fix) from None


def _read_json(path: Path, raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw, parse_constant=lambda name: None)  # the harness writes NaN where it has no number
    except (ValueError, RecursionError) as error:
        _refuse(path, where, f"this is not JSON: {error}")


# -- samples -> records -------------------------------------------------------------------------------------------


def _records(
    samples: Sequence[tuple[int, Mapping[str, Any]]],
    task: str,
    model: str,
    shots: int,
    seconds: float,
    length: Callable[[str], int],
    path: Path,
    notes: list[str],
) -> dict[str, list[Record]]:
    """Name of the task (with the filter, where there are several) -> its records."""
    filters = {sample["filter"] for _, sample in samples}
    found: dict[str, list[Record]] = {}
    seen: dict[tuple[str, str], int] = {}
    for number, sample in samples:
        name = task if len(filters) == 1 else f"{task}.{sample['filter']}"
        item = sample["doc_hash"][:16]
        times = seen[name, item] = seen.get((name, item), 0) + 1
        item += f"-{times}" if times > 1 else ""  # some data sets have the same document twice
        answer = _answer(sample)
        for metric in sample["metrics"]:
            if metric not in METRICS:
                notes.append(f"{task}: the metric {metric} has no counterpart here and is left out.")
                continue
            score = _score(metric, sample.get(metric))
            if score is None:
                _refuse(path, f"line {number}", f"{metric} is {sample.get(metric)!r:.80}, which is no score")
            found.setdefault(name, []).append(
                Record(
                    model=model,
                    task=name,
                    item=item,
                    metric=METRICS[metric],
                    score=score,
                    prompt=sample["prompt_hash"][:16],
                    length=length(answer) if METRICS[metric] == "exact_match" else 0,
                    seconds=seconds,
                    answer=answer,
                    shots=shots,
                )
            )
    if not found:
        _refuse(path, "", f"none of its metrics is one of {', '.join(METRICS)}")
    return found


def _score(metric: str, value: Any) -> float | None:
    """A score as ``Record`` wants it; None for what is none. Rolling metrics come as (log-likelihood, bytes)."""
    try:
        if METRICS[metric] == "nll_per_byte":
            likelihood, size = value
            score = -float(likelihood) / float(size) / math.log(2)
            return score if math.isfinite(score) else None
        return float(value) if 0 <= float(value) <= 1 else None
    except (TypeError, ValueError, ZeroDivisionError):
        return None


def _answer(sample: Mapping[str, Any]) -> str:
    """What was generated, or the most likely choice."""
    responses = sample["filtered_resps"]
    if responses and isinstance(responses[0], str):
        is_number = len(responses) == 1 and "bits_per_byte" in sample["metrics"]
        return "" if is_number else responses[0]
    try:
        likelihoods = [float(response[0]) for response in responses]
        best = likelihoods.index(max(likelihoods))
        return str(sample["arguments"][f"gen_args_{best}"]["arg_1"])
    except (TypeError, ValueError, LookupError):
        return ""


# -- running it ---------------------------------------------------------------------------------------------------


def is_harness_task(path: Path) -> bool:
    """Is this YAML file a task of the harness, and not one of ours?"""
    if path.suffix not in (".yaml", ".yml"):
        return False
    with contextlib.suppress(AmalgamError, UnicodeDecodeError):
        text = read_whole(path, 1 << 20).decode("utf-8")
        return bool(_HARNESS_TASK.search(text)) and not re.search(r"^kind[ \t]*:", text, re.MULTILINE)
    return False


def check_installed() -> None:
    """TaskError E_HARNESS, which says how to install it, unless lm_eval can be imported."""
    if importlib.util.find_spec("lm_eval") is None:
        what = "These tasks need lm-evaluation-harness, which is not installed."
        raise TaskError("E_HARNESS", what, "It is an optional extra.", f"pip install lm_eval=={VERSION}")


def evaluate_harness(
    models: Mapping[str, str | Path],
    files: Sequence[str | Path],
    *,
    roles: Mapping[str, str] | None = None,
    limit: int = 0,
    batch_size: int = 0,
    threads: int = 1,
    device: str = "cpu",
    progress: Callable[[Progress], None] = lambda progress: None,
    stop: threading.Event | None = None,
) -> Evaluation:
    """Run the harness on local task files, for each model in a child process without network.

    Its results are not kept in the store: which files a task of the harness depends on cannot be known.

    Args:
        files: YAML task files; other files that they include must lie in the same folder. The rest as in
            ``runner.evaluate``.

    Raises:
        TaskError: ``E_HARNESS`` if it is not installed. What else fails is in ``failures``.
        Cancelled: after ``stop``.
    """
    check_installed()
    started, stop = time.monotonic(), stop or threading.Event()
    result = Evaluation()
    for done, (name, folder) in enumerate(models.items()):
        progress(Progress(done, len(models), f"lm_eval: {name}"))
        try:
            if describe(folder).kind != CAUSAL:
                result.notes.append(
                    f"The tasks of lm-evaluation-harness are not run on {name}: no causal language model."
                )
                continue
            key = model_key(folder, cache_folder("evaluation"))
            arguments = str(folder), key, [str(file) for file in files], limit, batch_size, threads, device
            with Child(_work, *arguments, threads=threads) as child:
                for message in child.messages():
                    if stop.is_set():
                        raise Cancelled()
                    if message is not None:
                        _, records, tasks, notes = message
                        result.records += records
                        result.tasks = tasks
                        result.notes += [note for note in notes if note not in result.notes]
                        result.fresh += len({(record.task, record.item) for record in records})
            result.models.append(ModelInfo(key, name, str(folder), (roles or {}).get(name, "")))
        except Cancelled:
            raise
        except AmalgamError as error:
            result.failures.append(Failure(name, "", error))
    result.seconds = time.monotonic() - started
    return result


def _work(
    send: Send, folder: str, key: str, files: list[str], limit: int, batch_size: int, threads: int, device: str
) -> None:
    """In the child."""
    os.environ |= {"DISABLE_MULTIPROC": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="amalgam-lm-eval-") as scratch:
        os.environ["HF_DATASETS_CACHE"] = scratch  # else copies of the task files pile up, and may be out of date
        model = load_model(folder, device=device, threads=threads, key=key)
        with _as_harness_error():
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager

            names = [_name_of(Path(file)) for file in files]
            folders = sorted({str(Path(file).resolve().parent) for file in files})
            harness_model = HFLM(
                pretrained=model.network, tokenizer=model.tokenizer, batch_size=batch_size or 16, device=device
            )
            found = lm_eval.simple_evaluate(
                model=harness_model,
                tasks=names,
                task_manager=TaskManager(include_path=folders, include_defaults=False),
                limit=limit or None,
                bootstrap_iters=0,
                log_samples=True,
            )

    def length(text: str) -> int:
        return len(model.tokenizer(text, add_special_tokens=False)["input_ids"])

    notes: list[str] = []
    records: list[Record] = []
    tasks: list[TaskInfo] = []
    samples = json.loads(json.dumps(found["samples"], default=str))  # as in its files
    for task, rows in samples.items():
        shots = int(found.get("n-shot", {}).get(task) or 0)
        made = _records(list(enumerate(rows, 1)), task, key, shots, 0.0, length, Path(task), notes)
        for part, mine in made.items():
            kind = str(found["configs"][task].get("output_type", ""))
            tasks.append(TaskInfo(part, str(found.get("task_hashes", {}).get(task, "")), kind, len(rows)))
            records += mine
    send("result", records, tasks, list(dict.fromkeys(notes)))


def _name_of(file: Path) -> str:
    match = re.search(r"^task[ \t]*:[ \t]*['\"]?([^'\"\s#]+)", file.read_text("utf-8"), re.MULTILINE)
    if not match:
        raise TaskError("E_HARNESS", f"{file} does not name a task (task: …).")
    return match[1]


@contextlib.contextmanager
def _as_harness_error() -> Iterator[None]:
    try:
        yield
    except AmalgamError:
        raise
    except Exception as error:  # whatever a task file makes it do
        first = str(error).strip().split("\n")[0][:300]
        why = f"{type(error).__name__}: {first}"
        raise TaskError("E_HARNESS", "lm-evaluation-harness could not run these tasks.", why) from error


def _refuse(path: Path, where: str, why: str, fix: str = "") -> NoReturn:
    place = f"{shown(path)}, {where}" if where else shown(path)
    raise TaskError("E_RECORDS", f"{place}: {why}.", "", fix) from None
