"""Slow proofs that a merge survives kill -9, stops, full disks, failing system calls and flipped bits.

    python -m benchmarks.fault_runs                       all of them: about half an hour on two cores
    python -m benchmarks.fault_runs kills --count 60      some of them
    python -m benchmarks.fault_runs calls --every 1       every single system call (strace), not each 4th

Whole ``python app.py merge`` processes are run. Each fault must end in one of two states: the complete and
verified model, or an error of the documented kind with nothing visible and work that the next run resumes.
"The same model" means equal in every byte, except for what the manifest and the model card say about the
run itself (when it was made). While a fault runs, an observer looks at the output all the time: nothing that
is not complete and verified may ever be seen under its name.

Parts that need root (full and read-only disks) or strace (calls) are left out without them, which is said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from merging.checkpoints.verify import verify

from .merge_speed import CASES
from .models import MEMBERS, ROOT, Size, llama_config, llama_shapes, write_side_files, write_weights

SIZE = Size(256, 6, 768, 8, 6000, shard_bytes=1 << 40)  # 8 million parameters: 1 s of work for a merge
SMALL = Size(64, 2, 96, 4, 256, shard_bytes=1 << 40)  # 21 tensors, to try every system call
METHODS = ["linear", "slerp", "ties", "dare_ties", "pcb", "pcb_global"]
SHARDS = ["--shard-size", "4MB"]
ABOUT_THE_RUN = {"created", "delta_survival", "warnings", "files", "manifest_sha256"}  # of the manifest


Ended = subprocess.CompletedProcess[str]


class Failure(Exception):
    """A fault that did not end as it must."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Try what must not hurt.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--count", type=int, default=60, help="kills, and races (a tenth) (default: 60)")
    parser.add_argument("--flips", type=int, default=500, help="bits to flip (default: 500)")
    parser.add_argument("--every", type=int, default=4, help="try each n-th system call (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="folder for the runs (default: a temporary one)")
    options = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="fault-runs-") as folder:
        runs = Runs(Path(folder), options)
        for name in options.parts or PARTS:
            began = time.monotonic()
            print(f"== {name}: {PARTS[name].__doc__}", flush=True)
            try:
                print(PARTS[name](runs), flush=True)
            except Failure as failure:
                failed.append(name)
                print(f"FAILED: {failure}", flush=True)
            print(f"   ({time.monotonic() - began:.0f} s)", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


# ------------------------------------------------------------------------------------------ merges to disturb


class Runs:
    """Models, recipes and undisturbed results to compare with."""

    def __init__(self, scratch: Path, options: argparse.Namespace):
        self.scratch, self.options = scratch, options
        self.chance = random.Random(options.seed)
        self.models, self.small = scratch / "models", scratch / "small"
        build(self.models, SIZE)
        build(self.small, SMALL)
        self.references: dict[Path, Path] = {}
        self.number = 0

    def recipe(self, method: str, models: Path | None = None) -> Path:
        models = models or self.models
        path = self.scratch / f"{models.name}-{method}.yml"
        path.write_text(yaml.safe_dump(CASES[method].recipe(models), sort_keys=False), encoding="utf-8")
        return path

    def reference(self, recipe: Path) -> Path:
        """An undisturbed merge."""
        if recipe not in self.references:
            out = self.scratch / f"reference-{recipe.stem}" / "model"  # the model card tells the name
            done = merge(recipe, out)
            if done.returncode:
                raise Failure(f"the undisturbed merge failed: {done.stderr}")
            self.references[recipe] = out
        return self.references[recipe]

    def new_output(self) -> Path:
        self.number += 1
        return self.scratch / "out" / f"run-{self.number}" / "model"

    def check(self, recipe: Path, out: Path) -> None:
        """``out`` must be verified, equal to the undisturbed merge, and alone."""
        if not verify(out).ok:
            raise Failure(f"{out} does not verify: {verify(out).problems}")
        first, second = facts(self.reference(recipe)), facts(out)
        if first != second:
            wrong = sorted(k for k in first.keys() | second.keys() if first.get(k) != second.get(k))
            raise Failure(f"{out} differs from the undisturbed merge in {wrong}")
        left = sorted(name for name in os.listdir(out.parent) if name != out.name)
        if left:
            raise Failure(f"{left} was left beside {out}")
        shutil.rmtree(out.parent)


def build(folder: Path, size: Size) -> None:
    shapes = llama_shapes(size)
    for member in MEMBERS:
        (folder / member).mkdir(parents=True)
        write_side_files(folder / member, llama_config(size), shapes, size.shard_bytes)
    write_weights(folder, shapes, size.layers, size.shard_bytes)


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "app.py",
        "merge",
        str(recipe),
        str(out),
        "--threads",
        "2",
        *SHARDS,
        "--quiet",
        *more,
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}


def start(recipe: Path, out: Path, *more: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, *command(recipe, out, *more)],
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def merge(recipe: Path, out: Path, *more: str, before: tuple[str, ...] = ()) -> Ended:
    return ended(start(recipe, out, *more, before=before))


def ended(process: subprocess.Popen[str], limit: float = 300) -> Ended:
    """Wait for the end. A process that hangs is made to print where (PYTHONFAULTHANDLER), and is a failure."""
    for _ in range(int(10 * limit)):  # counted in short waits: a machine that sleeps meanwhile proves nothing
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, err = process.communicate(timeout=0.1)
            return subprocess.CompletedProcess(process.args, process.returncode, "", err)
    process.send_signal(signal.SIGABRT)
    raise Failure(f"it hung for {limit:.0f} s: {process.communicate()[1]}")


def facts(out: Path) -> dict[str, Any]:
    """All that must be equal between two runs of one recipe: bytes of files, and what the manifest says."""
    manifest = json.loads((out / "manifest.json").read_bytes())
    wanted = {key: value for key, value in manifest.items() if key not in ABOUT_THE_RUN}
    for name, entry in manifest["files"].items():
        if name == "README.md":  # it may tell the time of the run
            wanted[name] = re.sub(r"\d{4}-\d\d-\d\d[T ]?[\d:+.]*", "", (out / name).read_text(encoding="utf-8"))
        else:
            wanted[name] = entry
    return wanted


def must_refuse(done: Ended, exit_code: int, code: str, out: Path) -> None:
    """The run must have ended with this exit code and error code, and nothing may be visible."""
    if done.returncode != exit_code or f"[{code}]" not in done.stderr:
        raise Failure(f"exit code {done.returncode} instead of {exit_code} [{code}]: {done.stderr[-2000:]}")
    if "Traceback" in done.stderr:
        raise Failure(f"a bare traceback: {done.stderr}")
    if os.path.lexists(out):
        raise Failure(f"{out} is visible after an error")


class Observer(threading.Thread):
    """Looks at the output again and again: it is absent, or complete and verified."""

    def __init__(self, out: Path):
        super().__init__(daemon=True)
        self.out, self.looks, self.wrong, self.stopping = out, 0, "", False

    def run(self) -> None:
        while not self.stopping:
            self.looks += 1
            if os.path.lexists(self.out):
                report = verify(self.out)
                self.wrong = self.wrong or str(report.problems if report.problems else "")
                time.sleep(0.05)
            time.sleep(0.001)

    def __enter__(self) -> Observer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopping = True
        self.join()
        if self.wrong:
            raise Failure(f"{self.out} was seen incomplete: {self.wrong}")


# ----------------------------------------------------------------------------------------------------- parts


def kills(runs: Runs) -> str:
    """kill -9 at random points, up to three times per merge, then a run in peace: every byte as without"""
    phases, resumed, looks = Counter[str](), 0, 0
    for number in range(runs.options.count):
        recipe = runs.recipe(METHODS[number % len(METHODS)])
        tensors = len(facts(runs.reference(recipe))["tensors"])
        out = runs.new_output()
        with Observer(out) as observer:
            for _ in range(runs.chance.randint(1, 3)):
                process = start(recipe, out)
                # Spread over the work and not over the time, most of which Python needs to start: while it
                # starts, after each number of finished tensors, and while it publishes.
                wait_for_tensors(process, out, runs.chance.randint(-5, tensors + 20))
                process.kill()
                _, err = process.communicate()
                phases[phase(out, process.returncode)] += 1
                if "Traceback" in err:
                    raise Failure(err)
                if out.exists():
                    break
            had_claims = claims(out)
            done = merge(recipe, out)
        if done.returncode and "[E_OUTPUT_EXISTS]" not in done.stderr:
            raise Failure(f"the run after a kill failed: {done.stderr}")
        resumed += bool(had_claims)
        looks += observer.looks
        runs.check(recipe, out)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(phases.items()))
    return (
        f"   {runs.options.count} merges, {sum(phases.values())} kills ({counts});\n"
        f"   {resumed} merges were resumed with finished tensors; all are bit-identical;\n"
        f"   {looks} looks at the output saw nothing incomplete"
    )


def wait_for_tensors(process: subprocess.Popen[str], out: Path, count: int) -> None:
    """Until ``count`` tensors are finished, and a moment more. Below 0: some time before the first; more
    than there are: some time after the last."""
    while process.poll() is None and claims(out) < count and not (work(out) / "model/manifest.json").exists():
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.3 if count < 0 else 0.03))


def work(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def claims(out: Path) -> int:
    with contextlib.suppress(OSError):
        return max(0, (work(out) / "journal").read_bytes().count(b"\n") - 1)
    return 0


def phase(out: Path, exit_code: int) -> str:
    if exit_code == 0:
        return "too late"
    if out.exists():
        return "after publishing"
    if (work(out) / "model" / "manifest.json").exists():
        return "while publishing"
    return "while merging" if claims(out) else "before the first tensor"


def stops(runs: Runs) -> str:
    """Ctrl-C and SIGTERM: gone within 5 s with the documented exit code, and resumed"""
    slowest = 0.0
    for number in range(10):
        number_of_signal, exit_code = [(signal.SIGINT, 130), (signal.SIGTERM, 143)][number % 2]
        recipe, out = runs.recipe(METHODS[number % len(METHODS)]), runs.new_output()
        runs.reference(recipe)
        process = start(recipe, out)
        wait_for_tensors(process, out, 1)
        began = time.monotonic()
        process.send_signal(number_of_signal)
        stopped = ended(process)
        slowest = max(slowest, time.monotonic() - began)
        if stopped.returncode != 0:  # it may have been too late
            must_refuse(stopped, exit_code, "E_CANCELLED", out)
            if not claims(out):
                raise Failure("finished tensors were not kept")
            done = merge(recipe, out)
            if done.returncode:
                raise Failure(done.stderr)
        runs.check(recipe, out)
    if slowest > 5:
        raise Failure(f"it took {slowest:.1f} s to stop")
    return f"   10 stops, the slowest took {slowest:.2f} s; all resumed to the same bytes"


def races(runs: Runs) -> str:
    """Three merges into one name at once: one writes, the others refuse"""
    endings = Counter[str]()
    for _ in range(max(1, runs.options.count // 10)):
        recipe, out = runs.recipe("ties"), runs.new_output()
        runs.reference(recipe)
        with Observer(out):
            processes = [start(recipe, out) for _ in range(3)]
            endeds = [ended(process) for process in processes]
        if sorted(one.returncode for one in endeds) != [0, 5, 5]:
            raise Failure(str(endeds))
        losers = [one for one in endeds if one.returncode]
        endings.update("E_BUSY" if "[E_BUSY]" in one.stderr else "E_OUTPUT_EXISTS" for one in losers)
        runs.check(recipe, out)
    return f"   {sum(endings.values()) // 2} races; the losers: {dict(endings)}"


def inputs(runs: Runs) -> str:
    """An expert is cut off or replaced while it is being merged: a typed error, no model, no dead process"""
    recipe, outcomes = runs.recipe("ties"), Counter[str]()
    runs.reference(recipe)
    path = runs.models / "expert1" / "model.safetensors"
    original, status = path.read_bytes(), path.stat()
    for number in range(12):
        out = runs.new_output()
        process = start(recipe, out)
        wait_for_tensors(process, out, runs.chance.randint(0, 20))
        if number % 3 == 0:
            os.truncate(path, runs.chance.randrange(len(original)))
        elif number % 3 == 1:
            path.unlink()
            path.write_bytes(original)  # even the same bytes: nobody can know
        else:
            with path.open("r+b") as file:
                file.seek(len(original) // 2)
                file.write(b"?")
        done = ended(process)
        late = done.returncode == 0  # it had read all before, and published
        if not late:
            must_refuse(done, 3, "E_INPUT_CHANGED", out)
        outcomes["too late" if late else ["cut off", "replaced", "overwritten"][number % 3]] += 1
        path.unlink()
        path.write_bytes(original)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        if not late:
            done = merge(recipe, out, "--restart")
            if done.returncode:
                raise Failure(done.stderr)
        runs.check(recipe, out)
    return f"   {dict(outcomes)}; all noticed, and right after the input was restored"


def disks(runs: Runs) -> str:
    """Disks that are too small, fill up at the end, or are read-only; a limit on file sizes"""
    if os.geteuid():
        return "   NOT TESTED: mounting disks needs root"
    recipe = runs.recipe("linear")
    size = sum(path.stat().st_size for path in runs.reference(recipe).iterdir())
    outcomes = Counter[str]()
    with disk(runs.scratch / "disk", size // 2) as folder:
        must_refuse(merge(recipe, folder / "model"), 5, "E_NO_SPACE", folder / "model")
        if os.listdir(folder):
            raise Failure("a disk that is too small was filled all the same")
    outcomes["refused at once"] += 1
    weights = sum(path.stat().st_size for path in runs.reference(recipe).glob("*.safetensors"))
    for room in range(weights, size + 100_000, 16_384):  # enough for the weights; then for ever more of the rest
        with disk(runs.scratch / "disk", room) as folder:
            out = folder / "parent" / "model"
            done = merge(recipe, out)
            if done.returncode:
                must_refuse(done, 5, "E_NO_SPACE", out)
                outcomes["full at the end" if claims(out) else "refused at once"] += 1
                if claims(out):
                    enlarge = ["mount", "-o", f"remount,size={2 * size}", str(folder)]
                    subprocess.run(enlarge, check=True)
                    if merge(recipe, out).returncode:
                        raise Failure("more room did not help")
                    runs.check(recipe, out)
            else:
                outcomes["enough"] += 1
                runs.check(recipe, out)
    with disk(runs.scratch / "disk", 2 * size) as folder:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        must_refuse(merge(recipe, folder / "model"), 5, "E_OUTPUT_WRITE", folder / "model")
        outcomes["read-only"] += 1
    out = runs.new_output()
    limited = merge(recipe, out, before=("bash", "-c", 'ulimit -f 1000; exec "$@"', "-"))
    must_refuse(limited, 5, "E_OUTPUT_WRITE", out)
    outcomes["size limit"] += 1
    return f"   {dict(outcomes)}"


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


CALLS = {
    "pwrite64": ["error=ENOSPC", "error=EIO", "error=EINTR", "retval=64", "signal=KILL"],
    "fsync": ["error=EIO", "error=ENOSPC", "signal=KILL"],
    "fallocate": ["error=ENOSPC", "error=EOPNOTSUPP", "error=EINTR", "signal=KILL"],
    "renameat2": ["error=EIO", "error=EINVAL", "signal=KILL"],
    "flock": ["error=ENOLCK", "signal=KILL"],
    "ftruncate": ["error=EIO", "signal=KILL"],
    "preadv,preadv2": ["error=EIO", "error=EINTR", "signal=KILL"],
    "unlink,rmdir,unlinkat": ["error=EIO", "signal=KILL"],
}


def calls(runs: Runs) -> str:
    """The n-th system call of a kind fails, lies or kills (strace), in merges of 21 tensors"""
    if not shutil.which("strace"):
        return "   NOT TESTED: strace is not installed"
    recipe, outcomes = runs.recipe("task_arithmetic", runs.small), Counter[str]()
    totals = count_calls(recipe, runs.new_output())
    runs.reference(recipe)
    for names, faults in CALLS.items():
        # strace counts per thread, so that the count of all threads is more than enough for each of them.
        most = sum(totals.get(name, 0) for name in names.split(","))
        for fault in faults:
            for at in range(1 + runs.chance.randrange(runs.options.every), most + 1, runs.options.every):
                out = runs.new_output()
                rule = f"--inject={names}:{fault}:when={at}"
                # With a filter strace need not stop the process at each of its calls; but then it sends no signals.
                quick = () if "signal" in fault else ("--seccomp-bpf",)
                strace = ("strace", "-f", *quick, f"--trace={names}", "-o", "/dev/null", rule)
                with Observer(out):
                    done = merge(recipe, out, before=strace)
                text = str(re.findall(r"\[(E_\w+)\]", done.stderr) or done.returncode)
                outcomes[f"{fault} -> {text}"] += 1
                if "Traceback" in done.stderr or done.returncode not in (0, 3, 5, 6, -9, 137):
                    raise Failure(f"{rule}: exit code {done.returncode}: {done.stderr[-3000:]}")
                if done.returncode or (work(out)).exists():
                    again = merge(recipe, out)
                    if again.returncode and "[E_OUTPUT_EXISTS]" not in again.stderr:
                        raise Failure(f"{rule}: the next run failed: {again.stderr}")
                runs.check(recipe, out)
    lines = "\n".join(f"     {count:4} x {name}" for name, count in sorted(outcomes.items()))
    return f"   {sum(outcomes.values())} faults, none visible and wrong, all well after the next run:\n{lines}"


def count_calls(recipe: Path, out: Path) -> dict[str, int]:
    table = out.parent.parent / "calls.txt"
    table.parent.mkdir(parents=True, exist_ok=True)
    if merge(recipe, out, before=("strace", "-f", "-c", "-o", str(table))).returncode:
        raise Failure("the merge under strace failed")
    shutil.rmtree(out.parent)
    rows = [line.split() for line in table.read_text().splitlines()]
    return {row[-1]: int(row[3]) for row in rows if len(row) in (5, 6) and row[3].isdigit()}


def flips(runs: Runs) -> str:
    """Random single bits of a merged model are flipped: verify finds every one"""
    recipe = runs.recipe("pcb", runs.small)
    out = runs.reference(recipe)
    paths, hit = sorted(path for path in out.iterdir() if path.stat().st_size), Counter[str]()
    for number in range(runs.options.flips):
        path = paths[number % len(paths)]
        bit = runs.chance.randrange(8 * path.stat().st_size)
        flip(path, bit)
        if number % 50 == 0:  # by the command too
            check = [sys.executable, "app.py", "verify", str(out)]
            code = subprocess.run(check, cwd=ROOT, env=environment(), capture_output=True).returncode
            if code != 6:
                raise Failure(f"bit {bit} of {path.name}: the command says {code}")
        if [problem.name for problem in verify(out).problems] != [path.name]:
            raise Failure(f"bit {bit} of {path.name} was not found")
        flip(path, bit)
        hit[path.name] += 1
    if not verify(out).ok:
        raise Failure("the model was not restored")
    return f"   {sum(hit.values())} of {runs.options.flips} found: {dict(hit)}"


def flip(path: Path, bit: int) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


PARTS: dict[str, Callable[[Runs], str]] = {
    function.__name__: function for function in (kills, stops, races, inputs, disks, calls, flips)
}

if __name__ == "__main__":
    main()
