"""Merges timed side by side: a plain copy of the same bytes, this engine, and mergekit if it is there.

    python -m benchmarks.merge_speed --peer /path/to/venv/bin/python --size 0.47b

Every contestant runs as a whole process, start-up included, reads the same recipe and the same files
(warm: they are read once before each run) and writes to the same disk. They take turns, method by method
and round by round, so that a busy minute of the machine meets all of them. Tables show the least of the
runs, since other work on the machine can only add. `benchmarks/models.py` says what is merged.

- *plain copy*: reads the input models, writes the bytes of one; imports torch.
- *verified copy*: the same, with SHA-256 of what it writes, synced to the disk, as this engine does and
  the peer does not.
- *engine*: ``python app.py merge RECIPE OUT --threads 2``.
- *peer*: ``mergekit-yaml RECIPE OUT`` as a user would type it; *peer, tuned*: with the flags and allocator
  settings that were found to suit it best.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from .measure import Measurement, measure
from .models import EXPERTS, MEMBERS, ROOT, SIZES, build_apart, clean, default_folder

PLAIN, VERIFIED, ENGINE, PEER, TUNED = "plain copy", "verified copy", "engine", "peer", "peer, tuned"

# What suits mergekit 0.1.5 best on few cores: one thread, small shards written in the background, and an
# allocator that keeps freed memory instead of returning it page by page.
TUNED_FLAGS = ["-j", "1", "--out-shard-size", "200M", "--async-write"]
TUNED_FLAGS += ["--quiet", "--lazy-unpickle", "--low-cpu-memory"]
TUNED_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
# A user's shell sets none of these; ours may.
UNSET = ("OMP_", "MKL_", "KMP_", "MALLOC_", "OPENBLAS_")


@dataclass(frozen=True)
class Case:
    """A method with its parameters, and what it reads. ``native``: the peer has no such method."""

    method: str
    shared: dict[str, Any]
    per_expert: dict[str, Any]
    experts: int = EXPERTS
    base_is_input: bool = False
    native: bool = False

    def inputs(self) -> list[str]:
        return MEMBERS[: self.experts + 1]

    def recipe(self, models: Path) -> dict[str, Any]:
        """In the mergekit dialect, which both read; in our own where the peer has no such method."""
        names = self.inputs() if self.base_is_input else self.inputs()[1:]
        entries = [{"model": str(models / name), "parameters": self.per_expert} for name in names]
        common = {"parameters": self.shared, "dtype": "bfloat16"}
        if self.native:
            # Everything takes part, as in the peer's methods; by default pcb may leave some tensors out.
            include = dict.fromkeys(["embeddings", "head", "norms", "biases"], True)
            own = {"amalgam": 1, "method": self.method, "base": str(models / "base"), "experts": entries}
            return own | common | {"include": include}
        base = {} if self.base_is_input else {"base_model": str(models / "base")}
        return {"merge_method": self.method, "models": entries} | base | common


CASES = {
    "linear": Case("linear", {}, {"weight": 0.25}, base_is_input=True),
    "task_arithmetic": Case("task_arithmetic", {}, {"weight": 0.3}),
    "slerp": Case("slerp", {"t": 0.5}, {}, experts=1),
    "ties": Case("ties", {}, {"weight": 0.33, "density": 0.5}),
    "dare_ties": Case("dare_ties", {}, {"weight": 0.33, "density": 0.5}),
    "pcb": Case("pcb", {"ratio": 0.2, "scope": "tensor"}, {"weight": 0.33}, native=True),
    "pcb_global": Case("pcb", {"ratio": 0.2, "scope": "global"}, {"weight": 0.33}, native=True),
}


class Race:
    """The contestants on one set of models, with one recipe per method."""

    def __init__(self, models: Path, scratch: Path, peer: Path | None, tuned: bool = True) -> None:
        self.models, self.scratch, self.peer, self.tuned = models, scratch, peer, tuned
        self.run_folder, self.log = scratch / "run", scratch / "log.txt"
        self.out = self.run_folder / "out"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(UNSET)}
        self.environment["HF_HUB_OFFLINE"] = "1"  # all is local: no look at the Hub for a model card

    def contestants(self, method: str) -> list[str]:
        peer = [PEER, *([TUNED] if self.tuned else [])] if self.peer and not CASES[method].native else []
        return [PLAIN, VERIFIED, ENGINE, *peer]

    def recipe(self, method: str) -> Path:
        path = self.scratch / f"{method}.yml"
        text = yaml.safe_dump(CASES[method].recipe(self.models), sort_keys=False)
        path.write_text(text, encoding="utf-8")
        return path

    def command(self, contestant: str, method: str) -> list[str]:
        inputs = [str(self.models / member) for member in CASES[method].inputs()]
        out, recipe = str(self.out), str(self.recipe(method))
        if contestant == PLAIN:
            return [sys.executable, "-m", "benchmarks.plain_copy", out, *inputs]
        if contestant == VERIFIED:
            return [sys.executable, "-m", "benchmarks.plain_copy", "--verified", out, *inputs]
        if contestant == ENGINE:
            return [sys.executable, "app.py", "merge", recipe, out, "--threads", "2"]
        assert self.peer is not None
        flags = TUNED_FLAGS if contestant == TUNED else []
        return [str(self.peer.parent / "mergekit-yaml"), recipe, out, *flags]

    def run(self, contestant: str, method: str) -> Measurement:
        """One timed run from warm inputs to a written model, which is checked for its size and removed."""
        self.run_folder.mkdir()
        self.warm(method)
        os.sync()
        environment = self.environment | (TUNED_ENVIRONMENT if contestant == TUNED else {})
        try:
            result = measure(self.command(contestant, method), environment, ROOT, self.log)
            if result.exit_code == 0:
                self.check_output()
            return result
        finally:
            shutil.rmtree(self.run_folder)  # also what a failed run left to be resumed

    def warm(self, method: str) -> None:
        buffer = bytearray(1 << 20)
        for member in CASES[method].inputs():
            for path in weight_files(self.models / member):
                with open(path, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

    def check_output(self) -> None:
        """A run that wrote less than a model has not been a merge."""
        expected, written = weight_bytes(self.models / "base"), weight_bytes(self.out)
        if not 0.999 * expected < written < 1.001 * expected + 100_000:
            raise SystemExit(f"{self.out} holds {written} bytes of weights instead of about {expected}")


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(folder))


@dataclass
class Entry:
    """All runs of one contestant at one method that ended well, and how many did not."""

    method: str
    contestant: str
    runs: list[Measurement]
    failures: int = 0

    def least(self, field: str) -> float:
        return min(getattr(run, field) for run in self.runs)

    def median(self, field: str) -> float:
        return statistics.median(getattr(run, field) for run in self.runs)

    def most(self, field: str) -> float:
        return max(getattr(run, field) for run in self.runs)


def compete(race: Race, methods: list[str], runs: int, peer_runs: int, console: Console) -> list[Entry]:
    entries = {(m, c): Entry(m, c, []) for m in methods for c in race.contestants(m)}
    for turn in range(runs):
        for (method, contestant), entry in entries.items():
            if contestant in (PEER, TUNED) and turn >= peer_runs:
                continue
            console.print(f"round {turn + 1}/{runs}  {method}  {contestant} … ", end="")
            result = race.run(contestant, method)
            if result.exit_code:
                entry.failures += 1
                console.print(f"failed with exit code {result.exit_code}", style="red")
                console.print(result.output, markup=False, highlight=False)
                continue
            entry.runs.append(result)
            console.print(f"{result.wall:.2f} s", highlight=False)
    return list(entries.values())


Rows = list[list[str]]


def times(entries: list[Entry]) -> tuple[list[str], Rows]:
    """Wall seconds of all contestants side by side."""
    header = ["wall seconds", PLAIN, VERIFIED, ENGINE, PEER, TUNED]
    rows = []
    for method in methods_of(entries):
        wall = least_wall(entries, method)
        rows.append([method, *(f"{wall[name]:.2f}" if name in wall else "–" for name in header[1:])])
    return header, rows


def ratios(entries: list[Entry]) -> tuple[list[str], Rows]:
    """What the times say: how far from a copy, how far ahead of the peer."""
    pairs = [(ENGINE, PLAIN), (ENGINE, VERIFIED), (PEER, ENGINE), (TUNED, ENGINE)]
    rows = []
    for method in methods_of(entries):
        wall = least_wall(entries, method)
        rows.append([method, *(f"{wall[a] / wall[b]:.2f}" if {a, b} <= set(wall) else "–" for a, b in pairs)])
    return ["ratio of wall times", *(f"{above} / {below}" for above, below in pairs)], rows


def methods_of(entries: list[Entry]) -> list[str]:
    return list(dict.fromkeys(entry.method for entry in entries))


def least_wall(entries: list[Entry], method: str) -> dict[str, float]:
    return {e.contestant: e.least("wall") for e in entries if e.method == method and e.runs}


def details(entries: list[Entry]) -> tuple[list[str], Rows]:
    """One line per method and contestant: least and median times, greatest memory."""
    header = ["method", "contestant", "runs", "wall s (median)", "CPU s (median)"]
    header += ["resident MB", "anonymous MB", "others' CPU s"]
    rows = []
    for entry in entries:
        if not entry.runs:
            rows.append([entry.method, entry.contestant, "0", "failed", "–", "–", "–", "–"])
            continue
        wall, cpu = (f"{entry.least(f):.2f} ({entry.median(f):.2f})" for f in ("wall", "cpu"))
        memory = [f"{entry.most(f) / 1e6:.0f}" for f in ("resident", "anonymous")]
        others = f"{entry.median('elsewhere'):.1f}"
        rows.append([entry.method, entry.contestant, str(len(entry.runs)), wall, cpu, *memory, others])
    return header, rows


def markdown(header: list[str], rows: Rows) -> str:
    alignment = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, alignment, *rows])


def show(console: Console, header: list[str], rows: Rows) -> None:
    table = Table()
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def machine(peer: Path | None) -> dict[str, str]:
    """What the figures depend on."""
    cpu = next(iter(field("/proc/cpuinfo", "model name")), platform.machine())
    code = "import importlib.metadata as m; print(m.version('{}'))"
    facts = {"cpu": f"{cpu}, {len(os.sched_getaffinity(0))} cores", "system": platform.platform()}
    for name, python, package in [
        ("python", sys.executable, ""),
        ("torch", sys.executable, "torch"),
        *([("mergekit", str(peer), "mergekit"), ("mergekit's torch", str(peer), "torch")] if peer else []),
    ]:
        command = [python, "-c", code.format(package)] if package else [python, "--version"]
        facts[name] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return facts


def field(path: str, name: str) -> Iterator[str]:
    for line in Path(path).read_text().splitlines():
        if line.startswith(name):
            yield line.split(":", 1)[1].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time merges side by side.")
    parser.add_argument("--peer", type=Path, help="Python of an environment that has mergekit")
    parser.add_argument("--size", choices=[s for s in SIZES if not SIZES[s].header_only], default="0.47b")
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(CASES), metavar="METHOD")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--untuned", action="store_true", help="leave out the peer's best flags (it is slow)")
    parser.add_argument("--peer-runs", type=int, help="fewer runs for the peer (default: as many)")
    parser.add_argument("--models", type=Path, default=default_folder(), help="folder (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write every run to this file")
    parser.add_argument("--clean", action="store_true", help="remove the models that were built, and stop")
    options = parser.parse_args()
    if options.clean:
        return clean(options.models)
    if not Path("/proc/self/status").exists():
        parser.error("memory is measured through /proc: this benchmark needs Linux")
    if options.peer and not (options.peer.parent / "mergekit-yaml").exists():
        parser.error(f"there is no mergekit-yaml beside {options.peer}: pip install mergekit==0.1.5 there")

    console = Console()
    console.print(f"models of size {options.size} in {options.models} (built now if they are not there)")
    models = build_apart(options.models, options.size)
    size = f"size {options.size}, {weight_bytes(models / 'base'):,} bytes each"
    facts = machine(options.peer) | {"models": size}
    peer_runs = options.runs if options.peer_runs is None else options.peer_runs
    with tempfile.TemporaryDirectory(prefix="run-", dir=models.parent) as scratch:
        race = Race(models, Path(scratch), options.peer, tuned=not options.untuned)
        entries = compete(race, options.methods, options.runs, peer_runs, console)

    tables = [times(entries), ratios(entries), details(entries)]
    for header, rows in tables:
        show(console, header, rows)
    print("\n" + "\n".join(f"- {name}: {value}" for name, value in facts.items()))
    for header, rows in tables:
        print("\n" + markdown(header, rows))
    if options.json:
        content = {"machine": facts, "entries": [asdict(entry) for entry in entries]}
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    if any(entry.failures for entry in entries):
        sys.exit("\nSome runs failed: see above.")


if __name__ == "__main__":
    main()
