"""Train the demo set: one base model, then one expert per skill from it. ``python -m assets.demo.build``

The one idea: everything follows from a seed and the settings below, on one thread, so that the set can be made again.

1. Held-out items are drawn first: test, validation (for choosing settings) and calibration (prompts without answers).
   No training example ever has one of their prompts.
2. The base practises all skills at mixed lengths. What is kept is a running average of its weights; training stops
   when that average answers a set share of test-length examples. A share is used and not a number of steps because
   skills appear suddenly, at steps that depend on the seed.
3. Each expert starts from the base and practises one skill at test length; one example per batch is of another skill.
4. ``provenance.json`` records the settings, seeds, steps, accuracies, versions and file digests.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import tokenizers
import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from assets.demo.skills import (
    END,
    LENGTH,
    NUMBER,
    PAD,
    PRACTICE,
    SKILLS,
    TOKENS,
    Example,
    distinct_examples,
    make_tokenizer,
    training_example,
)

HERE = Path(__file__).parent
SIZE_LIMIT = 24 * 2**20  # bytes of everything that is shipped


@dataclass(frozen=True)
class Settings:
    """All that shapes the set. README.md says how these values were found."""

    seed: int = 0
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4
    batch_size: int = 64
    base_learning_rate: float = 2e-3
    base_target: float = 0.6  # stop when the averaged base answers this share of test-length probes
    base_shorter: float = 0.4  # share of the base's examples that have 2 to 7 letters
    base_most_steps: int = 1500
    averaging: float = 0.97  # per step, of the base's weights
    expert_learning_rate: float = 1e-4
    expert_steps: int = 120
    replayed: int = 1  # examples of the other skills in each batch of an expert
    weight_decay: float = 0.01
    test_items: int = 400
    validation_items: int = 200
    calibration_items: int = 128


def draw_held_out(settings: Settings) -> dict[str, dict[str, list[Example]]]:
    """Per skill: disjoint test, validation and calibration examples. The same ones whatever the seed."""
    held_out = {}
    for skill in SKILLS:
        stream = distinct_examples(skill, random.Random(f"held out {skill}"), set())
        held_out[skill] = {
            "test": list(islice(stream, settings.test_items)),
            "validation": list(islice(stream, settings.validation_items)),
            "calibration": list(islice(stream, settings.calibration_items)),
        }
    return held_out


def assert_disjoint(held_out: dict[str, dict[str, list[Example]]]) -> set[str]:
    """All held-out prompts, after checking that none occurs twice in any splits of any skills."""
    prompts = [example.prompt for splits in held_out.values() for split in splits.values() for example in split]
    assert len(prompts) == len(set(prompts)), "a prompt occurs twice in the held-out splits"
    return set(prompts)


def tensors(examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers and targets, both (examples, tokens); targets are -100 outside of answers. Padding is on the
    right, where causal attention never sees it."""
    pairs = [example.tokens() for example in examples]
    width = max(len(question) + len(answer) for question, answer in pairs)
    inputs = torch.full((len(pairs), width), NUMBER[PAD])
    targets = torch.full((len(pairs), width), -100)
    for row, (question, answer) in enumerate(pairs):
        end = len(question) + len(answer)
        inputs[row, :end] = torch.tensor(question + answer)
        targets[row, len(question) : end] = torch.tensor(answer)
    return inputs, targets


def loss(model: LlamaForCausalLM, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens."""
    inputs, targets = batch
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Share of answers with every token right. Greedy decoding gives the whole answer exactly then, so one pass
    over the known answers measures what generation would, at a tenth of the cost."""
    inputs, targets = batch
    wanted = targets[:, 1:]
    found = model(input_ids=inputs, use_cache=False).logits[:, :-1].argmax(-1)
    return ((found == wanted) | (wanted == -100)).all(1).float().mean().item()


def new_model(settings: Settings) -> LlamaForCausalLM:
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=NUMBER[END],
        pad_token_id=NUMBER[PAD],
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=LENGTH + 1, eos_token_id=NUMBER[END], pad_token_id=NUMBER[PAD]
    )
    return model


def update(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: tuple, learning_rate: float) -> None:
    """One training step with gradients clipped to norm 1."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss(model, batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def train_base(settings: Settings, held_out: set[str]) -> tuple[LlamaForCausalLM, int]:
    """The averaged base and the steps it took. Skills that lag behind are practised more often."""
    model = new_model(settings)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=settings.weight_decay)
    generator = random.Random(f"base {settings.seed}")
    probes = {
        skill: tensors([training_example(skill, LENGTH, generator, held_out) for _ in range(150)]) for skill in SKILLS
    }
    target = settings.base_target
    weights = dict.fromkeys(PRACTICE, 1.0)
    for step in range(1, settings.base_most_steps + 1):
        examples = []
        for skill in generator.choices(list(weights), list(weights.values()), k=settings.batch_size):
            length = generator.randint(2, LENGTH - 1) if generator.random() < settings.base_shorter else LENGTH
            examples.append(training_example(skill, length, generator, held_out))
        update(model, optimizer, tensors(examples), settings.base_learning_rate * min(1.0, step / 50))
        with torch.no_grad():
            keep = min(settings.averaging, step / (step + 10))
            for averaged, current in zip(average.parameters(), model.parameters(), strict=True):
                averaged.lerp_(current, 1 - keep)
        if step % 10 == 0:
            scores = {skill: accuracy(average, probe) for skill, probe in probes.items()}
            if sum(scores.values()) >= target * len(scores) and min(scores.values()) >= target - 0.15:
                return average, step
            weights = {skill: max(0.1, 1 - score) ** 3 for skill, score in scores.items()} | {"copy": 0.1}
    raise SystemExit(f"The base did not reach {target} in {settings.base_most_steps} steps; try another seed.")


def train_expert(base: LlamaForCausalLM, skill: str, settings: Settings, held_out: set[str]) -> LlamaForCausalLM:
    """A copy of the base, fine-tuned on one skill with a learning rate that falls linearly to zero."""
    model = copy.deepcopy(base).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=settings.weight_decay)
    generator = random.Random(f"expert {settings.seed} {skill}")
    others = [other for other in SKILLS if other != skill]
    for step in range(settings.expert_steps):
        chosen = [skill] * (settings.batch_size - settings.replayed) + generator.choices(others, k=settings.replayed)
        batch = tensors([training_example(name, LENGTH, generator, held_out) for name in chosen])
        rate = settings.expert_learning_rate * min(1.0, (step + 1) / 10) * (1 - step / settings.expert_steps)
        update(model, optimizer, batch, rate)
    return model.eval()


def write_tasks(folder: Path, held_out: dict[str, dict[str, list[Example]]]) -> None:
    """``tasks/<skill>.jsonl``, ``tasks/<skill>.validation.jsonl`` and ``calibration/<skill>.jsonl`` (prompts only)."""
    for name in ("tasks", "calibration"):
        (folder / name).mkdir()
    for skill, splits in held_out.items():
        for name, split in (("", "test"), (".validation", "validation")):
            lines = [json.dumps(example._asdict()) for example in splits[split]]
            (folder / "tasks" / f"{skill}{name}.jsonl").write_text("\n".join(lines) + "\n")
        lines = [json.dumps({"prompt": example.prompt}) for example in splits["calibration"]]
        (folder / "calibration" / f"{skill}.jsonl").write_text("\n".join(lines) + "\n")


def build(settings: Settings, out: Path) -> dict:
    """Make the whole set in ``out``, replacing an earlier one there, and return its provenance."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    began = time.perf_counter()
    held_out = draw_held_out(settings)
    prompts = assert_disjoint(held_out)
    base, steps = train_base(settings, prompts)
    print(f"base: {steps} steps, {time.perf_counter() - began:.0f} s", flush=True)
    models = {"base": base}
    for skill in SKILLS:
        models[f"experts/{skill}"] = train_expert(base, skill, settings, prompts)
        print(f"expert {skill}: {settings.expert_steps} steps, {time.perf_counter() - began:.0f} s", flush=True)
    checks = {skill: tensors(splits["validation"]) for skill, splits in held_out.items()}
    scores = {}
    for place, model in models.items():
        scores[place] = {skill: round(accuracy(model, batch), 4) for skill, batch in checks.items()}
        print(f"{place:16s} validation accuracy {scores[place]}")

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as name:  # complete before anything old is removed
        fresh = Path(name)
        tokenizer = make_tokenizer()
        for place, model in models.items():
            model.save_pretrained(fresh / place)
            tokenizer.save_pretrained(fresh / place)
        write_tasks(fresh, held_out)
        files = sorted(path for path in fresh.rglob("*") if path.is_file())
        assert sum(path.stat().st_size for path in files) <= SIZE_LIMIT, "the set is larger than it may be"
        provenance = {
            "command": f"python -m assets.demo.build --seed {settings.seed}",
            "settings": asdict(settings),
            "base_steps": steps,
            "parameters": sum(weight.numel() for weight in base.parameters()),
            "validation_accuracy": scores,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
            },
            "sha256": {str(path.relative_to(fresh)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        }
        (fresh / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        for path in fresh.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # transformers writes weights that only their owner can read
        for path in fresh.iterdir():
            old = out / path.name
            if old.is_dir():
                shutil.rmtree(old)
            path.replace(old)
    print(f"done in {time.perf_counter() - began:.0f} s: {out}")
    return provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: assets/demo)")
    for name, value in asdict(Settings()).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(value), default=value, help="default %(default)s")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    build(Settings(**arguments), out)


if __name__ == "__main__":
    main()
