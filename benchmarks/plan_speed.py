"""How long a plan takes: for an 8-billion-parameter set, and for sets of very many tiny tensors.

    python -m benchmarks.plan_speed

A plan reads headers only, so these models are headers only (`benchmarks/models.py`). Each time is the
least of the runs of ``python app.py plan RECIPE --json`` as a whole process. The cost must grow with the
number of tensors and not with its square: the last column is the processor time of a tensor beyond
start-up, and start-up is what the plan of a tiny model takes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import yaml
from rich.console import Console

from .measure import Measurement, measure
from .merge_speed import CASES, markdown, show
from .models import ROOT, SIZES, build_apart, clean, default_folder, llama_shapes

SETS: list[str | int] = ["tiny", "8b", 15_000, 30_000, 60_000]
LIMITS: dict[str | int, float] = {"8b": 2.0, 60_000: 10.0}
STEEPEST = 1.5  # times as much per tensor in the largest set as in the smallest


def plan(which: str | int, method: str, models: Path, scratch: Path) -> Measurement:
    recipe = scratch / "recipe.yml"
    recipe.write_text(yaml.safe_dump(CASES[method].recipe(models)), encoding="utf-8")
    command = [sys.executable, "app.py", "plan", str(recipe), "--json"]
    result = measure(command, os.environ, ROOT, scratch / "log.txt")
    if result.exit_code:
        sys.exit(f"planning {which} failed with exit code {result.exit_code}\n{result.output}")
    return result


def per_tensor(cpu: dict[str | int, float]) -> dict[int, float]:
    """Seconds for each further tensor, by number of tensors."""
    return {n: (cpu[n] - cpu["tiny"]) / n for n in cpu if isinstance(n, int)}


def judge(wall: dict[str | int, float], cpu: dict[str | int, float]) -> list[str]:
    """The targets that were missed."""
    missed = [
        f"{which}: {wall[which]:.2f} s, allowed {limit:.0f} s" for which, limit in LIMITS.items() if wall[which] > limit
    ]
    cost = per_tensor(cpu)
    if cost[max(cost)] > STEEPEST * cost[min(cost)]:
        missed.append(f"a tensor among {max(cost)} costs more than {STEEPEST} times one among {min(cost)}")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description="Time plans.")
    parser.add_argument("--method", choices=CASES, default="ties")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--models", type=Path, default=default_folder(), help="folder (default: %(default)s)")
    parser.add_argument("--clean", action="store_true", help="remove the models that were built, and stop")
    options = parser.parse_args()
    if options.clean:
        return clean(options.models)

    console = Console()
    console.print(f"models in {options.models} (built now if they are not there)")
    best: dict[str | int, Measurement] = {}
    for which in SETS:
        models = build_apart(options.models, which)
        with tempfile.TemporaryDirectory() as scratch:
            results = [plan(which, options.method, models, Path(scratch)) for _ in range(options.runs)]
        best[which] = min(results, key=lambda result: result.wall)

    wall = {which: result.wall for which, result in best.items()}
    cpu = {which: result.cpu for which, result in best.items()}
    header = ["plan of", "tensors each", "wall s", "allowed s", "CPU s", "resident MB", "CPU µs / tensor"]
    rows = []
    for which, result in best.items():
        count = which if isinstance(which, int) else len(llama_shapes(SIZES[which]))
        name = which if isinstance(which, str) else "tiny tensors"
        allowed = f"{LIMITS[which]:.0f}" if which in LIMITS else "–"
        each = f"{per_tensor(cpu)[which] * 1e6:.0f}" if isinstance(which, int) else "–"
        memory = f"{result.resident / 1e6:.0f}"
        rows.append([name, f"{count:,}", f"{result.wall:.2f}", allowed, f"{result.cpu:.2f}", memory, each])
    show(console, header, rows)
    print("\n" + markdown(header, rows))
    if missed := judge(wall, cpu):
        sys.exit("\nMissed: " + "; ".join(missed))


if __name__ == "__main__":
    main()
