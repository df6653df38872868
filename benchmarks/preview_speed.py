"""How long it takes from a moved slider to new scores and texts.

    python -m benchmarks.preview_speed

The demo experts, each method in turn: the strength of one expert is changed (weights, λ or t, as a slider would), and
timed are the merge in memory, the scores on the first 50 items of the four tasks, and four generated answers. The first
round of all is shown apart: it loads the models, the libraries and the network. Then the least and the median of the
rounds; the target holds for the median. How many cores were busy is told too: with others at work, times are longer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from merging.preview import Preview

from .merge_speed import markdown, show

TARGET = 3.0
"""Seconds from slider to scores and texts, after the first round."""
LIMIT, TOKENS = 50, 12
DEMO = Path(__file__).resolve().parent.parent / "assets" / "demo"
SKILLS = ("sort", "reverse", "rotate", "unique")
PROMPTS = ["sort hgfedcba=", "reverse abcdefgh=", "rotate abcdefgh=", "unique aabbccdd="]
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # method -> parameters of each expert, shared ones
    "linear": ({}, {}),
    "task_arithmetic": ({}, {"lambda": 1.0}),
    "ties": ({"density": 0.3}, {"lambda": 1.0}),
    "dare_ties": ({"density": 0.3}, {"lambda": 1.0}),
    "pcb": ({}, {"ratio": 0.5, "lambda": 1.0}),
    "multislerp": ({}, {}),
}


def recipe(method: str, weight: float) -> dict[str, Any]:
    own, shared = METHODS[method]
    experts = [
        {"model": str(DEMO / "experts" / name), "name": name,
         "parameters": own | {"weight": weight if name == "sort" else 0.4}}
        for name in SKILLS
    ]  # fmt: skip
    return {"base": str(DEMO / "base"), "experts": experts, "method": method, "parameters": shared}


def one_round(preview: Preview, method: str, weight: float) -> tuple[float, float, float]:
    """Seconds of merge, scores and texts."""
    times = [time.perf_counter()]
    number = preview.merge(recipe(method, weight))["number"]
    times.append(time.perf_counter())
    rows = preview.score([str(DEMO / "tasks" / f"{name}.jsonl") for name in SKILLS], LIMIT, of=number)
    times.append(time.perf_counter())
    texts = preview.generate(PROMPTS, TOKENS, of=number)
    times.append(time.perf_counter())
    assert len(rows) == len(SKILLS) and len(texts) == len(PROMPTS)
    merging, scoring, generating = (b - a for a, b in zip(times, times[1:], strict=False))
    return merging, scoring, generating


def busy() -> float:
    """CPU seconds that the whole machine has spent so far, if it tells."""
    try:
        fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    except OSError:
        return 0.0
    return sum(int(fields[i]) for i in (0, 1, 2)) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time previews of the demo experts.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the preview (default: %(default)s)")
    options = parser.parse_args()

    console, rows, slow = Console(), [], []
    with Preview(threads=options.threads) as preview:
        cost = preview.open(recipe("ties", 0.4))
        if not cost.possible:
            sys.exit(cost.why)
        first = one_round(preview, "ties", 0.4)
        merging, scoring, generating = first
        console.print(f"{cost.why}\nFirst: merge {merging:.1f} s, scores {scoring:.1f} s, texts {generating:.1f} s")
        before, started = busy(), time.perf_counter()
        for method in METHODS:
            one_round(preview, method, 0.4)
            rounds = [one_round(preview, method, 0.4 + 0.01 * n) for n in range(1, options.rounds + 1)]
            parts = [statistics.median(column) for column in zip(*rounds, strict=True)]
            totals = [sum(one) for one in rounds]
            middle = statistics.median(totals)
            rows.append([method, *(f"{part:.2f}" for part in parts), f"{min(totals):.2f}", f"{middle:.2f}"])
            if middle > TARGET:
                slow.append(f"{method}: {middle:.2f} s, allowed {TARGET:.0f} s")
        spent = time.perf_counter() - started
        used = (busy() - before) / spent
    header = ["method", "merge s", "scores s", "texts s", "least s", "median s"]
    show(console, header, rows)
    print(f"\n{markdown(header, rows)}\n\n{spent:.0f} s in all; {used:.1f} cores of the machine were busy")
    if slow:
        sys.exit("\nMissed: " + "; ".join(slow))


if __name__ == "__main__":
    main()
