"""The table in README.md: every rule at its best on the vision set. ``python -m assets.tiny_vit.table [--write]``

Settings are those of the demo set's table, chosen on the validation images and reported on the test images.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import ViTForImageClassification
from transformers.utils import logging

from assets.demo.table import candidates, label, merge
from assets.tiny_vit.build import VIEWS, Split, accuracy
from merging.evaluation.exact_match import wilson_interval

HERE = Path(__file__).parent
START, END = "<!-- table: python -m assets.tiny_vit.table --write -->", "<!-- end of table -->"

Row = list[float]  # accuracy per view, in the order of VIEWS


def read_split(name: str) -> Split:
    found = load_file(HERE / f"{name}.safetensors")
    return found["images"], found["labels"]


def accuracies(folder: Path, split: Split) -> Row:
    model = ViTForImageClassification.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
    return [accuracy(model, view, split) for view in VIEWS]


def merged_accuracies(setting: Mapping[str, Any], split: Split) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        return accuracies(merge(HERE, VIEWS, setting, Path(folder) / "model"), split)


def mean(row: Row) -> float:
    return sum(row) / len(row)


def best_settings() -> list[dict[str, Any]]:
    """For each method the candidate with the best mean accuracy on the validation images; of equals the first."""
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    split = read_split("validation")
    for setting in candidates():
        found = mean(merged_accuracies(setting, split))
        if setting["method"] not in best or found > best[setting["method"]][0]:
            best[setting["method"]] = found, setting
    return [setting for _, setting in best.values()]


def make_table() -> str:
    """The Markdown text."""
    test = read_split("test")
    items = len(test[1])
    base = accuracies(HERE / "base", test)
    experts = {view: accuracies(HERE / "experts" / view, test) for view in VIEWS}
    own = [row[place] for place, row in enumerate(experts.values())]
    titles = ["", *VIEWS, "mean", "gain kept: mean", "least"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]

    def add(name: str, row: Row, merged: bool) -> None:
        cells = [name]
        for value in row:
            low, high = wilson_interval(round(value * items), items)
            cells.append(f"{value:.3f} ({low:.2f}–{high:.2f})")
        kept = [(ours - low) / (high - low) for ours, low, high in zip(row, base, own, strict=True)]
        cells += [f"{mean(row):.3f}", *([f"{mean(kept):.0%}", f"{min(kept):.0%}"] if merged else ["", ""])]
        lines.append("| " + " | ".join(cells) + " |")

    add("base", base, False)
    for view, row in experts.items():
        add(f"expert {view}", row, False)
    add("each expert on its own view", own, False)
    settings = [*best_settings(), {"method": "task_arithmetic", "experts": {"weight": 1.0}, "parameters": {}}]
    for setting in settings:
        add(label(setting), merged_accuracies(setting, test), True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the table of assets/tiny_vit/README.md.")
    parser.add_argument("--write", action="store_true", help="also write it to README.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    table = make_table()
    print(table)
    if arguments.write:
        readme = HERE / "README.md"
        before, rest = readme.read_text("utf-8").split(START)
        readme.write_text(f"{before}{START}\n\n{table}\n\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
