"""The table in README.md: every rule at its best setting, on the demo set. ``python -m assets.demo.table [--write]``

The one idea: settings are chosen on the validation items and reported on the test items, which nothing was chosen on.
With ``--write`` the table goes into README.md, and the settings that ``python app.py demo`` uses into settings.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from assets.demo.skills import SKILLS
from merging.engine import run
from merging.evaluation.exact_match import Score, evaluate, load_model, summary
from merging.evaluation.tasks import read_task
from merging.plan import make_plan
from merging.recipe import Recipe

HERE = Path(__file__).parent
START, END = "<!-- table: python -m assets.demo.table --write -->", "<!-- end of table -->"
SHOWN = ("linear", "task_arithmetic", "ties", "pcb")  # the merges of ``python app.py demo``

Scores = dict[str, Score]  # task -> score of one model


def candidates() -> Iterator[dict[str, Any]]:
    """The settings that are tried. Parameters of an expert are the same for all of them."""
    weights, factors = (0.25, 0.3, 0.35, 0.4, 0.5, 0.6), (0.6, 0.8, 1.0, 1.2, 1.5)
    yield {"method": "linear", "experts": {"weight": 0.25}, "parameters": {}}
    for weight in weights:
        yield {"method": "task_arithmetic", "experts": {"weight": weight}, "parameters": {}}
    for weight in weights:
        yield {"method": "dare_linear", "experts": {"weight": weight, "density": 0.5}, "parameters": {}}
    for density, factor in itertools.product((0.2, 0.5, 1.0), factors):
        yield {"method": "ties", "experts": {"density": density}, "parameters": {"lambda": factor}}
    for ratio, factor in itertools.product((0.2, 0.5), factors):
        yield {"method": "pcb", "experts": {}, "parameters": {"ratio": ratio, "lambda": factor}}


def defaults() -> list[dict[str, Any]]:
    """Settings that one would try without looking at any score: the plain sum, and what the papers suggest."""
    return [
        {"method": "task_arithmetic", "experts": {"weight": 1.0}, "parameters": {}},
        {"method": "ties", "experts": {"density": 0.2}, "parameters": {"lambda": 1.0}},
        {"method": "pcb", "experts": {}, "parameters": {"ratio": 0.2, "lambda": 1.0}},
    ]


def merge(models: Path, names: Iterable[str], setting: Mapping[str, Any], out: Path) -> Path:
    """One merged model of ``base`` and ``experts/<name>`` in ``models``, made by the engine, as a folder."""
    experts = [
        {"model": str(models / "experts" / name), "name": name, "parameters": dict(setting["experts"])}
        for name in names
    ]
    recipe = {
        "base": str(models / "base"),
        "experts": experts,
        "method": setting["method"],
        "parameters": dict(setting["parameters"]),
    }
    with make_plan(Recipe.parse(recipe)) as plan:
        return run(plan, out, threads=1).folder


def scores(folder: Path, demo: Path, split: str) -> Scores:
    """A model's scores; ``split`` is "" (test) or ".validation"."""
    model = load_model(folder)
    return {skill: evaluate(model, read_task(demo / "tasks" / f"{skill}{split}.jsonl", skill)) for skill in SKILLS}


def merged_scores(setting: Mapping[str, Any], demo: Path, split: str) -> Scores:
    with tempfile.TemporaryDirectory() as folder:
        return scores(merge(demo, SKILLS, setting, Path(folder) / "model"), demo, split)


def mean_accuracy(found: Mapping[str, Score]) -> float:
    return sum(score.accuracy for score in found.values()) / len(found)


def best_settings(demo: Path) -> list[dict[str, Any]]:
    """For each method the candidate with the best mean accuracy on the validation items; of equals the first."""
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for setting in candidates():
        accuracy = mean_accuracy(merged_scores(setting, demo, ".validation"))
        print(f"validation {accuracy:.4f}  {label(setting)}", flush=True)
        if setting["method"] not in best or accuracy > best[setting["method"]][0]:
            best[setting["method"]] = accuracy, setting
    return [setting for _, setting in best.values()]


def label(setting: Mapping[str, Any]) -> str:
    values = {**setting["experts"], **setting["parameters"]}
    return f"{setting['method']} ({', '.join(f'{name} {value:g}' for name, value in values.items())})"


def half_interval_of_mean(found: Mapping[str, Score]) -> float:
    """Half of a 95 % interval of the mean over tasks, which share no items: 1.96 · sqrt(Σ p(1-p)/n) / tasks."""
    variance = sum(score.accuracy * (1 - score.accuracy) / score.total for score in found.values())
    return 1.96 * variance**0.5 / len(found)


def row(name: str, found: Scores, base: Scores, experts: Scores, merged: bool) -> str:
    """One line of the table: accuracies with intervals, their mean, and for a merge the share of the gain kept."""
    cells = [name]
    for skill in SKILLS:
        low, high = found[skill].interval
        cells.append(f"{found[skill].accuracy:.3f} ({low:.2f}–{high:.2f})")
    result = summary(base, experts, found)
    cells.append(f"{result.mean:.3f} ± {half_interval_of_mean(found):.3f}")
    cells += [f"{result.mean_gain_kept:.0%}", f"{result.least_gain_kept:.0%}"] if merged else ["", ""]
    return "| " + " | ".join(cells) + " |"


def accuracy_table(demo: Path, best: list[dict[str, Any]]) -> list[str]:
    """Base, experts, best merges and merges at default settings on the test items."""
    base = scores(demo / "base", demo, "")
    by_expert = {skill: scores(demo / "experts" / skill, demo, "") for skill in SKILLS}
    own = {skill: by_expert[skill][skill] for skill in SKILLS}
    titles = ["", *SKILLS, "mean", "gain kept: mean", "least"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines.append(row("base", base, base, own, merged=False))
    lines += [row(f"expert {skill}", found, base, own, merged=False) for skill, found in by_expert.items()]
    lines.append(row("each expert on its own skill", own, base, own, merged=False))
    lines += [row(label(setting), merged_scores(setting, demo, ""), base, own, merged=True) for setting in best]
    for setting in defaults():
        lines.append(row(f"*unchosen:* {label(setting)}", merged_scores(setting, demo, ""), base, own, merged=True))
    return lines


def geometry(demo: Path) -> list[str]:
    """How the task vectors lie to each other: lengths, cosines, and how often they disagree about a sign."""
    base = load_file(demo / "base" / "model.safetensors")
    flat = {name: value.astype(np.float64).ravel() for name, value in base.items()}
    vectors = []
    for skill in SKILLS:
        expert = load_file(demo / "experts" / skill / "model.safetensors")
        vectors.append(np.concatenate([expert[name].astype(np.float64).ravel() - flat[name] for name in flat]))
    stack = np.stack(vectors)
    lengths = np.linalg.norm(stack, axis=1)
    relative = lengths / np.linalg.norm(np.concatenate(list(flat.values())))
    cosines = (stack / lengths[:, None]) @ (stack / lengths[:, None]).T
    names = list(SKILLS)
    titles = ["task vector", "length / length of the base", *(f"cosine with {name}" for name in names)]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, length, row_of in zip(names, relative, cosines, strict=True):
        lines.append(f"| {name} | {length:.4f} | " + " | ".join(f"{cosine:.2f}" for cosine in row_of) + " |")
    lines += ["", f"Entries that some expert raises and another lowers: {conflict(stack):.0%} of all; "]
    lines[-1] += f"{conflict(keep_largest(stack, 0.2)):.0%} when only each expert's largest fifth counts."
    return lines


def conflict(stack: np.ndarray) -> float:
    return float(((stack > 0).any(0) & (stack < 0).any(0)).mean())


def keep_largest(stack: np.ndarray, share: float) -> np.ndarray:
    limits = np.quantile(np.abs(stack), 1 - share, axis=1, keepdims=True)
    return np.where(np.abs(stack) >= limits, stack, 0.0)


def make_table(demo: Path) -> tuple[str, list[dict[str, Any]]]:
    """The Markdown text, and the best settings in the order of ``candidates``."""
    best = best_settings(demo)
    items = len(read_task(demo / "tasks" / f"{next(iter(SKILLS))}.jsonl").items)
    lines = [
        f"Exact match on {items} test items per skill, in brackets the Wilson 95 % interval. Settings were chosen on",
        "the validation items. *Gain kept* is (merged − base) / (expert − base), each skill against its own expert;",
        "*least* is that of the skill that lost most. The ± of the mean is half of a 95 % interval. *Unchosen* are",
        "settings that one would try without looking.",
        "",
        *accuracy_table(demo, best),
        "",
        *geometry(demo),
    ]
    return "\n".join(lines) + "\n", best


def write(demo: Path, table: str, best: list[dict[str, Any]]) -> None:
    """Put the table between its marks in README.md, and the shown merges into settings.json."""
    readme = demo / "README.md"
    before, rest = readme.read_text("utf-8").split(START)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{START}\n\n{table}\n{END}{after}", "utf-8")
    parameters = json.loads((demo / "provenance.json").read_text("utf-8"))["parameters"]
    merges = [setting for setting in best if setting["method"] in SHOWN]
    settings = {"experts": list(SKILLS), "parameters": parameters, "merges": merges}
    (demo / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the table of assets/demo/README.md.")
    parser.add_argument("--demo", type=Path, default=HERE, help="folder of the set (default: assets/demo)")
    parser.add_argument("--write", action="store_true", help="also write it to README.md and settings.json there")
    arguments = parser.parse_args()
    table, best = make_table(arguments.demo)
    print("\n" + table)
    if arguments.write:
        write(arguments.demo, table, best)


if __name__ == "__main__":
    main()
