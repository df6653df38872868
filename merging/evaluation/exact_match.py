"""Exact match: what share of a task's answers does a model write, letter for letter?

The one idea: keep a record per item and derive everything else from the records. Two models are then compared item by
item, a score never comes without its interval, and what a model really wrote can be read.

Decoding is greedy, offline and deterministic: the same folder, task, batch size and machine give the same records.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.errors import InputError, TaskError
from merging.evaluation.tasks import Task

Z_95 = 1.959963984540054  # 97.5 % point of the standard normal distribution: two-sided 95 %


@dataclass(frozen=True, slots=True)
class Record:
    """What one model did with one item. ``tokens``: length of the response, without end and padding tokens."""

    item: str
    prediction: str
    correct: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class Score:
    """One model on one task."""

    task: str
    task_sha256: str
    records: tuple[Record, ...]

    @property
    def total(self) -> int:
        return len(self.records)

    @property
    def correct(self) -> int:
        return sum(record.correct for record in self.records)

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson 95 % interval of the accuracy."""
        return wilson_interval(self.correct, self.total)


def wilson_interval(correct: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Interval for a share that was measured on ``total`` items.

        (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n),   p = correct/n

    Unlike p ± z·sqrt(p(1-p)/n) it stays inside [0, 1] and does not collapse at p = 0 or 1.
    Source: E. B. Wilson, JASA 22 (1927) 209.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} of {total} is no share")
    share = correct / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # the exact limits at 0 and 1 are 0 and 1; rounding would miss them by a last bit
    low = 0.0 if correct == 0 else (middle - half) / scale
    high = 1.0 if correct == total else (middle + half) / scale
    return low, high


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded transformers model with its tokenizer. Load once, evaluate on many tasks.

    ``ends``: the tokens that end a response: the model's own list (chat models have several) and the tokenizer's.
    """

    folder: Path
    network: Any
    tokenizer: Any
    ends: frozenset[int]
    device: str
    threads: int


def load_model(folder: str | Path, *, device: str = "cpu", threads: int = 1) -> Model:
    """Load a causal language model from a local folder, in float32, without any code of its own and without network.

    Args:
        folder: a transformers model folder with safetensors weights and a tokenizer.
        device: where to compute, as torch names it.
        threads: CPU threads of torch. Small models are fastest with one; many threads on busy cores can be 40 times
            slower than one.

    Raises:
        InputError: ``E_NOT_FOUND`` no such folder; ``E_NOT_A_MODEL`` nothing that loads as a language model with a
            tokenizer; ``E_MISSING_TENSOR``, ``E_EXTRA_TENSOR``, ``E_SHAPE`` when the weights are not those of the
            config. transformers would fill such gaps with random numbers, and the score would mean nothing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("E_NOT_FOUND", f"There is no model folder {folder}.", "", "Check the path.")
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            why = "To be evaluated, a folder needs config.json, safetensors weights and tokenizer.json."
            raise InputError("E_NOT_A_MODEL", f"{folder} has no {name}.", why, "Choose a transformers model folder.")

    import torch
    import transformers  # seconds to import, so only now

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with _quiet(transformers):
        try:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **local)
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                **local,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation="eager",  # on short texts faster than the fused kernels
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that we can say which
            )
        except Exception as error:  # whatever a foreign folder makes the library do
            first = str(error).strip().split("\n")[0][:300]
            what = f"{folder} cannot be loaded as a language model."
            why = f"transformers says: {type(error).__name__}: {first}"
            raise InputError("E_NOT_A_MODEL", what, why, "Check that its files are complete.") from error
    network, keys = loaded
    for code, kind, verb in (
        ("E_MISSING_TENSOR", "missing_keys", "lacks"),
        ("E_EXTRA_TENSOR", "unexpected_keys", "has, beyond its config,"),
        ("E_SHAPE", "mismatched_keys", "has in the wrong shape"),
    ):
        if found := sorted(key if isinstance(key, str) else key[0] for key in keys.get(kind, ())):
            what = f"{folder} {verb} {found[0]}" + (f" and {len(found) - 1} more." if len(found) > 1 else ".")
            why = "Its score would be that of partly random weights."
            raise InputError(code, what, why, "Check that config.json belongs to these weights.")
    tokenizer.padding_side = "left"  # so that all responses of a batch start at the same column
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            what = f"The tokenizer in {folder} has neither a padding token nor an end token."
            raise InputError("E_NOT_A_MODEL", what, "", "Name one in tokenizer_config.json.")
        tokenizer.pad_token = tokenizer.eos_token
    named = network.generation_config.eos_token_id
    ends = frozenset(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    # generate() fills what a call leaves open from the model's own settings (temperature, penalties, beams ...):
    # leave nothing of them, so that decoding is greedy for every model
    network.generation_config = transformers.GenerationConfig()
    return Model(folder, network.eval().to(device), tokenizer, ends - {None}, device, threads)


def evaluate(
    model: Model,
    task: Task,
    *,
    batch_size: int = 256,
    most_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Greedy answers to every item of a task, compared with the right ones.

    An answer is right when it equals the item's answer, apart from white space at its ends.

    Args:
        batch_size: items that are generated together. Prompts of a batch are padded on the left; other batches can
            change the last bits of the numbers, and with them, rarely, a token.
        most_tokens: where a response is cut off; by default one more than the task's longest answer has, which leaves
            room for the end token and lets longer responses count as wrong without writing them out.
        progress: called with (items done, items in all) after each batch.

    Raises:
        TaskError: ``E_TASK`` when an answer has a character that the tokenizer cannot write, or a prompt with its
            answer is longer than the model's context.
    """
    import torch

    limit = _longest_answer(model, task) + 1 if most_tokens is None else most_tokens
    records: list[Record] = []
    with _threads(torch, model.threads), torch.inference_mode():
        for start in range(0, len(task.items), batch_size):
            items = task.items[start : start + batch_size]
            batch = model.tokenizer([item.prompt for item in items], padding=True, return_tensors="pt")
            prompt_tokens = batch["input_ids"].shape[1]
            _check_context(model, task, prompt_tokens + limit)
            responses = model.network.generate(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                generation_config=_greedy(model, limit),
            )[:, prompt_tokens:].tolist()
            for item, response in zip(items, responses, strict=True):
                response = _until_end(response, model.ends)
                # special tokens stay visible: left out, "ab<pad>c" would pass for "abc"
                prediction = model.tokenizer.decode(response, skip_special_tokens=False)
                correct = prediction.strip() == item.answer.strip()
                records.append(Record(item.id, prediction, correct, len(response)))
            if progress:
                progress(len(records), len(task.items))
    return Score(task.name, task.sha256, tuple(records))


@dataclass(frozen=True, slots=True)
class Summary:
    """A merged model against its base and its experts. Tasks are in the order of the experts.

    ``gain_kept``: (merged − base) / (expert − base) per task, where the expert is the one of that task: the share of
    what fine-tuning brought that the merge keeps. ``retention``: merged / expert per task, as most papers print it.
    Either is NaN where it would divide by nothing. The means are NaN when a part is.
    """

    accuracy: dict[str, float]
    mean: float
    gain_kept: dict[str, float]
    mean_gain_kept: float
    least_gain_kept: float
    retention: dict[str, float]
    mean_retention: float
    least_retention: float


def summary(
    base: Mapping[str, Score], experts: Mapping[str, Score], merged: Mapping[str, Score]
) -> Summary:
    """Accuracy, gain kept and retention of a merged model.

    Args:
        base, merged: task name -> score of that model.
        experts: task name -> score of *that task's own* expert.

    Raises:
        TaskError: ``E_TASK`` when the three were not scored on the same items.
    """
    accuracy, gains, shares = {}, {}, {}
    for task, expert in experts.items():
        three = [scores.get(task) for scores in (base, experts, merged)]
        if len({score and (score.task_sha256, score.total) for score in three}) != 1:
            raise TaskError("E_TASK", f"The models were not all scored on the same items of {task}.")
        low, mine = base[task].accuracy, merged[task].accuracy
        accuracy[task] = mine
        gains[task] = _ratio(mine - low, expert.accuracy - low)
        shares[task] = _ratio(mine, expert.accuracy)
    return Summary(
        accuracy=accuracy,
        mean=_mean(accuracy.values()),
        gain_kept=gains,
        mean_gain_kept=_mean(gains.values()),
        least_gain_kept=_least(gains.values()),
        retention=shares,
        mean_retention=_mean(shares.values()),
        least_retention=_least(shares.values()),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _mean(values: Any) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _least(values: Any) -> float:
    values = list(values)
    return math.nan if any(math.isnan(value) for value in values) else min(values)


def _longest_answer(model: Model, task: Task) -> int:
    answers = model.tokenizer([item.answer.strip() for item in task.items], add_special_tokens=False)["input_ids"]
    unknown = model.tokenizer.unk_token_id
    for item, numbers in zip(task.items, answers, strict=True):
        if unknown is not None and unknown in numbers:
            what = f"Line {item.line} of {task.name}: the answer has a character that the model's tokenizer lacks."
            raise TaskError("E_TASK", what, f"The model is {model.folder}.", "Use a task in the model's own letters.")
    return max(map(len, answers))


def _check_context(model: Model, task: Task, needed: int) -> None:
    room = getattr(model.network.config, "max_position_embeddings", None)
    if room is not None and needed > room:
        what = f"{task.name} needs {needed} tokens for prompt and answer; {model.folder} has room for {room}."
        raise TaskError("E_TASK", what, "", "Shorten the prompts.")


def _greedy(model: Model, limit: int) -> Any:
    import transformers

    return transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=sorted(model.ends) or None,
        pad_token_id=model.tokenizer.pad_token_id,
    )


def _until_end(response: Sequence[int], ends: frozenset[int]) -> list[int]:
    for position, token in enumerate(response):
        if token in ends:
            return list(response[:position])
    return list(response)


@contextlib.contextmanager
def _threads(torch: Any, count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and reports on the terminal: what matters in them becomes an error of ours."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
