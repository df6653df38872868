"""How long the analysis of task vectors takes, each part against a plain reference in the same process.

    python -m benchmarks.analysis_speed --what changes

- *changes*: norms, cosines, signs of all task vectors (``measure_changes``, workers as told, without start-up) against
  a plain read of the same files: one thread, ``preadv`` into one buffer of 1 MiB, page cache warm.
- *spectra*: singular values of every expert's task vector, all matrices (``measure_spectra``: reading, differences and
  all, workers as told), against ``torch.linalg.svdvals`` in float32, tensor by tensor, of task vectors that are in
  memory. The reference takes minutes, so it is timed on a seeded sample of matrices of each shape and scaled to their
  number; with one thread of torch and with as many as there are workers, and the better of the two counts.

Reference and work take turns in one child process, so that a busy minute of the machine meets both; the table shows
the least of the runs of each. Memory is the peak of anonymous memory of a child that only works, with its workers, less
that of one that only imports the same packages and opens the models.

To add a part, write its reference and its work as functions of the folder of models and the number of workers, and give
it a line in ``PARTS``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .measure import Measurement, measure
from .merge_speed import markdown, show
from .models import MEMBERS, ROOT, SIZES, build_apart, clean, default_folder

BUFFER = 1 << 20
SAMPLE = 4
"""Matrices of each shape on which a reference that takes minutes is timed."""


@dataclass(frozen=True)
class Part:
    """Something to time. Both functions get what ``prepare`` opened (not timed) and the number of workers."""

    prepare: Callable[[Path], Any]
    reference: Callable[[Any, int], object]
    """May give seconds itself (a float), if it runs on a sample."""
    work: Callable[[Any, int], object]
    reference_name: str
    slowest: float
    """Target: work / reference at most."""
    memory: float
    """Target: bytes over the interpreter at most."""


def open_set(folder: Path) -> Any:
    from merging.analysis.models import open_models

    base, *experts = [str(folder / name) for name in MEMBERS]
    return open_models(base, experts)


def read_files(models: Any, threads: int) -> int:
    """All weight files once, on one thread."""
    buffer, total = bytearray(BUFFER), 0
    for checkpoint in models.checkpoints.values():
        for file in checkpoint.files:
            descriptor, at = os.open(file.path, os.O_RDONLY), 0
            try:
                while count := os.preadv(descriptor, [buffer], at):
                    at += count
            finally:
                os.close(descriptor)
            total += at
    return total


def changes(models: Any, threads: int) -> object:
    from merging.analysis.changes import measure_changes

    return measure_changes(models, threads=threads)


def spectra(models: Any, threads: int) -> object:
    from merging.analysis.spectra import measure_spectra

    return measure_spectra(models, of=["experts"], threads=threads)


def svdvals(models: Any, threads: int) -> float:
    """Seconds for all matrices of all experts, from a sample."""
    import torch

    from merging.analysis.models import task_vector
    from merging.analysis.spectra import matrices_of

    by_shape: dict[tuple[int, ...], list[tuple[Any, int]]] = {}
    for tensor in matrices_of(models):
        by_shape.setdefault(tensor.shape, []).extend((tensor, k) for k in range(len(models.names)))
    totals = dict.fromkeys({1, threads}, 0.0)
    before = torch.get_num_threads()
    for shape, members in by_shape.items():
        chosen = random.Random(f"{shape}").sample(members, min(SAMPLE, len(members)))
        for count in totals:
            torch.set_num_threads(count)
            seconds = 0.0
            for tensor, k in chosen:
                change = task_vector(tensor, k).float()
                started = time.perf_counter()
                torch.linalg.svdvals(change)
                seconds += time.perf_counter() - started
            totals[count] += seconds / len(chosen) * len(members)
    torch.set_num_threads(before)
    return min(totals.values())


PARTS = {
    "changes": Part(open_set, read_files, changes, "plain read", slowest=3.0, memory=300e6),
    "spectra": Part(open_set, svdvals, spectra, "svdvals", slowest=0.25, memory=600e6),
}


def inside(part: Part, folder: Path, runs: int, threads: int) -> None:
    """In the child: a line of JSON for each run. ``runs`` 0: nothing, -1: the work alone, once."""
    opened = part.prepare(folder)
    if runs < 0:
        part.work(opened, threads)
    if runs > 0:
        read_files(opened, threads)  # fills the page cache
    for _ in range(runs):
        seconds = []
        for function in (part.reference, part.work):
            started = time.perf_counter()
            result = function(opened, threads)
            elapsed = time.perf_counter() - started
            seconds.append(result if isinstance(result, float) else elapsed)
        print(json.dumps(seconds), flush=True)


def child(name: str, folder: Path, runs: int, threads: int) -> Measurement:
    options = ["--inside", name, "--models", str(folder), "--runs", str(runs), "--threads", str(threads)]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "benchmarks.analysis_speed", *options]
        result = measure(command, os.environ | {"OMP_NUM_THREADS": "1"}, ROOT, Path(scratch) / "log.txt")
    if result.exit_code:
        sys.exit(f"{name} failed with exit code {result.exit_code}\n{result.output}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the analysis of task vectors.")
    parser.add_argument("--what", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--size", choices=[s for s in SIZES if not SIZES[s].header_only], default="0.47b")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="workers (default: %(default)s)")
    parser.add_argument("--models", type=Path, default=default_folder(), help="folder (default: %(default)s)")
    parser.add_argument("--clean", action="store_true", help="remove the models that were built, and stop")
    parser.add_argument("--inside", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.clean:
        return clean(options.models)
    if options.inside:
        return inside(PARTS[options.inside], options.models, options.runs, options.threads)

    console = Console()
    console.print(f"models of size {options.size} in {options.models} (built now if they are not there)")
    folder = build_apart(options.models, options.size)
    header = ["what", "reference", "reference s", "s", "s / reference", "target", "MB over interpreter", "target",
              "others' CPU s"]  # fmt: skip
    rows, missed = [], []
    for name in options.what:
        part = PARTS[name]
        idle = child(name, folder, 0, options.threads)
        alone = child(name, folder, -1, options.threads)
        result = child(name, folder, options.runs, options.threads)
        pairs = [json.loads(line) for line in result.output.splitlines() if line.startswith("[")]
        reference, work = (min(column) for column in zip(*pairs, strict=True))
        memory = alone.anonymous - idle.anonymous
        rows.append([name, part.reference_name, f"{reference:.2f}", f"{work:.2f}", f"{work / reference:.2f}",
                     f"{part.slowest:g}", f"{memory / 1e6:.0f}", f"{part.memory / 1e6:.0f}",
                     f"{result.elsewhere:.0f}"])  # fmt: skip
        if work > part.slowest * reference:
            missed.append(f"{name}: {work / reference:.2f} times the {part.reference_name}, allowed {part.slowest:g}")
        if memory > part.memory:
            missed.append(f"{name}: {memory / 1e6:.0f} MB, allowed {part.memory / 1e6:.0f}")
    show(console, header, rows)
    print("\n" + markdown(header, rows))
    if missed:
        sys.exit("\nMissed: " + "; ".join(missed))


if __name__ == "__main__":
    main()
