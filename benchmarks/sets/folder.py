"""The folder of a set while it is being built: every finished part is kept, and nothing half-finished looks finished.

The one idea: training takes minutes per expert and machines are switched off, so a build is a list of parts, each with
a folder that gets its name only when it is complete. A second run of the same command does what is missing. All parts
must come from the same settings, packages and versions: ``provenance.json`` holds them from the start, and a build with
others is refused instead of mixed in.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.sets.packages import facts
from merging.checkpoints.disk import take_lock
from merging.errors import OutputError
from merging.evaluation.exact_match import wilson_interval

Scores = dict[str, dict[str, list[int]]]
"""Model -> task -> [right answers, items]."""


class SetFolder:
    """A set that is being built in ``out``.

    Raises:
        OutputError: ``E_OUTPUT_EXISTS`` the folder holds something else; ``E_RESUME`` a set of other settings;
            ``E_BUSY`` another process is building there.
    """

    def __init__(self, out: Path, name: str, settings: Mapping[str, Any], packages: Sequence[str]):
        self.out = out
        recipe = {
            "set": name,
            "settings": dict(settings),
            "packages": {key: facts(key) for key in packages},
            "versions": {part: version(part) for part in ("torch", "transformers", "tokenizers")},
        }
        self.provenance: dict[str, Any] = json.loads(json.dumps(recipe)) | {
            "command": f"python -m benchmarks.sets.{name} OUT" + _options(settings),
            "python": platform.python_version(),
            "processor": _processor(),
            "parts": {},
        }
        known = out / "provenance.json"
        if known.is_file():
            earlier = json.loads(known.read_text("utf-8"))
            for key in recipe:
                if earlier.get(key) != self.provenance[key]:
                    what = f"{out} was begun with other {key}."
                    why = f"There: {json.dumps(earlier.get(key))[:400]}. Now: {json.dumps(self.provenance[key])[:400]}."
                    raise OutputError("E_RESUME", what, why, "Repeat the earlier command, or name a new folder.")
            self.provenance = earlier
        elif out.exists() and any(out.iterdir()):
            what, why = f"{out} is not empty.", "It has no provenance.json, so it is no set that was begun here."
            raise OutputError("E_OUTPUT_EXISTS", what, why, "Name a new folder.")
        out.mkdir(parents=True, exist_ok=True)
        self.lock = take_lock(out / ".lock")
        """Held until the process ends, however it ends."""
        if self.lock is None:
            what = f"Another process is building in {out}."
            raise OutputError("E_BUSY", what, "", "Wait for it, or name a new folder.")
        for left in out.glob(".part-*"):  # of a build that was stopped
            shutil.rmtree(left)
        self._write_provenance()

    def has(self, part: str) -> bool:
        return (self.out / part).is_dir() and part in self.provenance["parts"]

    def make(self, part: str, build: Callable[[Path], Mapping[str, Any]]) -> None:
        """Let ``build`` fill a new folder, unless the part is there; what it returns is kept as the part's facts."""
        if self.has(part):
            print(f"{part}: kept", flush=True)
            return
        began = time.perf_counter()
        fresh = Path(tempfile.mkdtemp(dir=self.out, prefix=".part-"))
        facts_of_part = dict(build(fresh))
        for path in [fresh, *fresh.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)  # transformers writes weights that only their owner can read
        place = self.out / part
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            shutil.rmtree(place)
        files = {str(path.relative_to(fresh)): _digest(path) for path in sorted(fresh.rglob("*")) if path.is_file()}
        self.provenance["parts"][part] = {
            **facts_of_part,
            "seconds": round(time.perf_counter() - began, 1),
            "sha256": files,
        }
        self._write_provenance()
        fresh.rename(place)  # last: a part with its name is complete and known
        print(f"{part}: {self.provenance['parts'][part]['seconds']:.0f} s {json.dumps(facts_of_part)}", flush=True)

    def scores(self, model: str, measure: Callable[[], dict[str, list[int]]]) -> None:
        """Measure a model, unless that was done: task -> [right answers, items]."""
        known = self.provenance.setdefault("scores", {})
        if model not in known:
            began = time.perf_counter()
            known[model] = measure()
            print(f"scores of {model}: {time.perf_counter() - began:.0f} s {known[model]}", flush=True)
            self._write_provenance()

    def finish(self, readme: Callable[[dict[str, Any]], str]) -> None:
        """Write README.md; a set that has one is complete."""
        write_text(self.out / "README.md", readme(self.provenance))

    def _write_provenance(self) -> None:
        write_text(self.out / "provenance.json", json.dumps(self.provenance, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """The file is replaced when its successor is complete."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, "utf-8")
    fresh.replace(path)


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def accuracy_table(scores: Scores, tasks: Sequence[str]) -> str:
    """Markdown: models as rows, tasks as columns, each accuracy with its Wilson 95 % interval; then the own ones."""
    lines = ["| | " + " | ".join(tasks) + " | mean |", "|---" * (len(tasks) + 2) + "|"]
    own = {task: scores[task][task] for task in tasks}
    for name, found in {**scores, "each expert on its own task": own}.items():
        label = f"expert {name}" if name in tasks else name
        cells = [_cell(found[task], bold=name == task) for task in tasks]
        mean = sum(right / items for right, items in found.values()) / len(found)
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {mean:.3f} |")
    sizes = ", ".join(f"{task} {scores['base'][task][1]}" for task in tasks)
    return "\n".join([*lines, "", f"Items: {sizes}. In brackets the Wilson 95 % interval."])


def _cell(found: list[int], bold: bool) -> str:
    right, items = found
    low, high = wilson_interval(right, items)
    mark = "**" if bold else ""
    return f"{mark}{right / items:.3f}{mark} ({low:.2f}–{high:.2f})"


def geometry(base: Path, experts: Mapping[str, Path], only: Callable[[str], bool] = lambda name: True) -> str:
    """Markdown: relative norm ‖τ‖/‖θ‖ of the task vectors τ = expert − base, and their cosines, in float64.

    Tensor by tensor, over the tensors that ``only`` names.
    """
    import torch
    from safetensors.torch import load

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return {name: value for name, value in load((folder / "model.safetensors").read_bytes()).items() if only(name)}

    origin = weights(base)
    dots = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    loaded = [weights(folder) for folder in experts.values()]
    for name, value in origin.items():
        changes = torch.stack([expert[name].double().flatten() - value.double().flatten() for expert in loaded])
        dots += changes @ changes.T
    size = sum(value.double().pow(2).sum().item() for value in origin.values()) ** 0.5
    norms = dots.diagonal().sqrt()
    cosines = dots / torch.outer(norms, norms)
    lines = ["| task vector | ‖τ‖/‖θ‖ | " + " | ".join(f"cosine with {name}" for name in experts) + " |"]
    lines.append("|---" * (len(experts) + 2) + "|")
    for row, name in enumerate(experts):
        cells = " | ".join(f"{cosine:.3f}" for cosine in cosines[row].tolist())
        lines.append(f"| {name} | {norms[row].item() / size:.4f} | {cells} |")
    return "\n".join(lines)


def package_table(provenance: Mapping[str, Any]) -> str:
    """Markdown: the packages with versions, licences and the start of their SHA-256."""
    lines = ["| package | version | from | licence | SHA-256 |", "|---|---|---|---|---|"]
    for package in provenance["packages"].values():
        cells = [package[key] for key in ("name", "version", "client", "licence")]
        lines.append("| " + " | ".join(cells) + f" | `{package['sha256'][:16]}…` |")
    return "\n".join(lines)


def time_table(provenance: Mapping[str, Any]) -> str:
    """Markdown: seconds of each part, and steps where it was trained."""
    lines = ["| part | steps | last loss | seconds |", "|---|---|---|---|"]
    for part, found in provenance["parts"].items():
        lines.append(f"| {part} | {found.get('steps', '')} | {found.get('loss', '')} | {found['seconds']:.0f} |")
    return "\n".join(lines)


def quiet_single_process(threads: int) -> None:
    """Settings of torch and transformers that every build uses; call it before torch computes anything.

    Waiting threads must not spin: on a machine with other work, two spinning threads were 43 times slower than one.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _options(settings: Mapping[str, Any]) -> str:
    return f" --seed {settings['seed']} --threads {settings['threads']}"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _processor() -> str:
    """Name of the processor: another one rounds differently and gives slightly other experts."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or sys.platform
