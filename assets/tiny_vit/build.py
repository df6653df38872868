"""Train the vision set: a tiny ViT on real digits, then one expert per view. ``python -m assets.tiny_vit.build``

The one idea: all models share the same ten labels, so that every tensor, the classifier's included, can be merged; the
skills differ in how the image is shown. The images are the UCI handwritten digits (1,797 real ones of 8 × 8 pixels)
that scikit-learn carries; it is only needed here.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import platform
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification

HERE = Path(__file__).parent
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "turned": lambda images: torch.rot90(images, 1, (2, 3)),  # a quarter to the left
    "upside_down": lambda images: torch.rot90(images, 2, (2, 3)),
    "inverted": lambda images: -images,
    "mirrored": lambda images: images.flip(3),
}
SPLITS = {"train": 1097, "validation": 200, "test": 500}


@dataclass(frozen=True)
class Settings:
    """All that shapes the set. README.md says how these values were found."""

    seed: int = 0
    batch_size: int = 128
    base_learning_rate: float = 2e-3
    base_steps: int = 400
    base_views: float = 0.08  # share of the base's images that are shown in one of the four views, not upright
    expert_learning_rate: float = 2e-4
    expert_steps: int = 150
    replay: float = 0.06  # share of an expert's images that are shown in another view
    weight_decay: float = 0.01


Split = tuple[torch.Tensor, torch.Tensor]  # images (n, 8, 8) with values 0 to 16, labels (n,), both uint8


def read_digits() -> dict[str, Split]:
    """The real digits in a fixed random order, cut into disjoint splits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.uint8)[order].split(list(SPLITS.values()))
    labels = torch.tensor(digits.target, dtype=torch.uint8)[order].split(list(SPLITS.values()))
    return dict(zip(SPLITS, zip(images, labels, strict=True), strict=True))


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Stored images -> what the model sees: (n, 1, 8, 8), -1 (paper) to 1 (ink)."""
    return images[:, None].float() / 8 - 1


def new_model(settings: Settings) -> ViTForImageClassification:
    torch.manual_seed(settings.seed)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.08,  # at the usual 0.02 it does not learn in this time
        attn_implementation="eager",
    )
    return ViTForImageClassification(config)


@torch.no_grad()
def accuracy(model: ViTForImageClassification, view: str, split: Split) -> float:
    images, labels = split
    return (model(pixel_values=VIEWS[view](pixels(images))).logits.argmax(-1) == labels).float().mean().item()


def train(
    model: ViTForImageClassification,
    split: Split,
    steps: int,
    learning_rate: float,
    choose_view: Callable[[random.Random], Callable[[torch.Tensor], torch.Tensor]],
    settings: Settings,
    name: str,
) -> None:
    """Warm up for 20 steps, then let the learning rate fall linearly to zero. 16 images at a time share a view."""
    images, labels = pixels(split[0]), split[1].long()
    generator = random.Random(f"{name} {settings.seed}")
    picks = torch.Generator().manual_seed(generator.getrandbits(62))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=settings.weight_decay)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        chosen = torch.randint(len(images), (settings.batch_size,), generator=picks)
        shown = torch.cat([choose_view(generator)(part) for part in images[chosen].chunk(16)])
        loss = torch.nn.functional.cross_entropy(model(pixel_values=shown).logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def train_all(settings: Settings, split: Split) -> dict[str, ViTForImageClassification]:
    """The base and one expert per view, by their place in the output folder."""
    views = list(VIEWS.values())

    def for_base(generator: random.Random) -> Callable[[torch.Tensor], torch.Tensor]:
        return generator.choice(views) if generator.random() < settings.base_views else lambda images: images

    base = new_model(settings)
    train(base, split, settings.base_steps, settings.base_learning_rate, for_base, settings, "base")
    models = {"base": base}
    for name, view in VIEWS.items():

        def for_expert(
            generator: random.Random, own: Callable[[torch.Tensor], torch.Tensor] = view
        ) -> Callable[[torch.Tensor], torch.Tensor]:
            return generator.choice(views) if generator.random() < settings.replay else own

        expert = copy.deepcopy(base)
        train(expert, split, settings.expert_steps, settings.expert_learning_rate, for_expert, settings, name)
        models[f"experts/{name}"] = expert
    return models


def build(settings: Settings, out: Path) -> None:
    """Write base/, experts/*/, test.safetensors, validation.safetensors and provenance.json."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    began = time.perf_counter()
    splits = read_digits()
    models = train_all(settings, splits["train"])
    scores = {
        place: {view: round(accuracy(model, view, splits["validation"]), 4) for view in VIEWS}
        for place, model in models.items()
    }
    for place, score in scores.items():
        print(f"{place:20s} validation accuracy {score}")
    for place, model in models.items():
        model.save_pretrained(out / place)
    for name in ("validation", "test"):
        images, labels = splits[name]
        save_file({"images": images.contiguous(), "labels": labels.contiguous()}, out / f"{name}.safetensors")
    kinds = (".safetensors", ".json")
    files = sorted(path for path in out.rglob("*") if path.suffix in kinds and path.name != "provenance.json")
    for path in files:
        path.chmod(0o644)  # transformers writes weights that only their owner can read
    provenance = {
        "command": f"python -m assets.tiny_vit.build --seed {settings.seed}",
        "settings": asdict(settings),
        "splits": SPLITS,
        "parameters": sum(weight.numel() for weight in models["base"].parameters()),
        "validation_accuracy": scores,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "sha256": {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    print(f"done in {time.perf_counter() - began:.0f} s: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: assets/tiny_vit)")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="default %(default)s")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    build(Settings(**arguments), out)


if __name__ == "__main__":
    main()
