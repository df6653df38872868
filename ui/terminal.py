"""The commands, as text in a terminal: what is planned, a progress bar, what came out, and errors that help."""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from merging.errors import AmalgamError, OutputError, RecipeError

from .output import patient_output

if TYPE_CHECKING:
    from merging.engine import Progress
    from merging.plan import Plan
    from merging.recipe import Recipe

TERMINATED = 143


def run_command(options: argparse.Namespace) -> int:
    """Run the command and turn every expected failure into a message and its exit code."""
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "demo": demo,
        "plan": plan,
        "merge": merge,
        "verify": verify,
        "inspect": inspect,
        "evaluate": evaluate,
        "compare": compare,
        "errors": errors,
    }
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no text at all
    with patient_output() as out:
        try:
            code = commands[options.command](options)
        except AmalgamError as error:
            print_error(error)
            return error.exit_code
        except KeyboardInterrupt:
            say("\nStopped.", sys.stderr)
            return 130
        out.flush()
        if code == 0 and out.error is not None and not isinstance(out.error, BrokenPipeError):
            lost = OutputError("E_OUTPUT_WRITE", "What was to be printed is lost.", f"{out.error.strerror}.")
            print_error(lost)
            return lost.exit_code
        return code


def say(text: str, stream: TextIO | None = None) -> None:
    """Print at once."""
    print(text, file=stream or sys.stdout, flush=True)


def print_error(error: AmalgamError) -> None:
    say(f"error: {error}", sys.stderr)


def demo(options: argparse.Namespace) -> int:
    from .demo import run_demo

    return run_demo(options.keep, options.limit)


def plan(options: argparse.Namespace) -> int:
    recipe, notes = _read(options)
    with _make_plan(recipe, options) as made:
        made.warnings[:0] = notes
        threads = options.threads or _cores()
        out = Path(options.out) if options.out else Path.cwd()
        facts = made.as_dict(out, threads)
        if options.json:
            say(json.dumps(facts, indent=2, ensure_ascii=False))
        else:
            print_plan(facts)
        return made.blockers[0].exit_code if made.blockers else 0


def merge(options: argparse.Namespace) -> int:
    from merging import engine

    recipe, notes = _read(options)
    if options.seed is not None:
        recipe = _with_seed(recipe, options.seed)
    with _make_plan(recipe, options) as made:
        made.warnings[:0] = notes
        if made.blockers:
            for blocker in made.blockers[1:]:
                print_error(blocker)
            raise made.blockers[0]
        tell = (lambda text: None) if options.quiet else say
        tell(f"{made.recipe.method}: {', '.join(made.models)}")
        for text in [*made.alignment.notes, *(f"warning: {w}" for w in made.warnings)]:
            tell(text)
        terminated = threading.Event()
        with _stopping(terminated) as stop, _bar(options.quiet) as show:
            try:
                result = engine.run(
                    made,
                    options.out,
                    device=options.device,
                    threads=options.threads,
                    memory=options.memory,
                    restart=options.restart,
                    on_progress=show,
                    stop=stop,
                )
            except AmalgamError as error:
                if error.code == "E_CANCELLED" and terminated.is_set():
                    print_error(error)
                    return TERMINATED
                raise
        if result.resumed:
            tell(f"Resumed: {result.resumed} of {len(made.tensors)} tensors were finished by an earlier run.")
        for text in result.warnings[len(made.warnings) :]:
            tell(f"warning: {text}")
        survival = result.manifest["delta_survival"]
        if survival:
            tell(
                f"Delta survival: {survival['survived']:.1%} of the changed weights (sampled) differ from the base "
                "after rounding to the output's type."
            )
        tell(f"Wrote {result.folder} ({made.bytes_written / 1e9:.2f} GB, verified) in {result.seconds:.1f} s.")
        return 0


def verify(options: argparse.Namespace) -> int:
    from merging.checkpoints.verify import verify as check

    report = check(options.out)
    if options.json:
        say(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    elif report.ok:
        say(
            f"{report.folder}: {report.files} files and {report.tensors} tensors ({report.bytes / 1e9:.2f} GB) are "
            "as written."
        )
    else:
        report.raise_if_bad()
    return 0 if report.ok else 6


def inspect(options: argparse.Namespace) -> int:
    from .inspect import run_inspect

    return run_inspect(options)


def evaluate(options: argparse.Namespace) -> int:
    from .evaluate import run_evaluate

    return run_evaluate(options)


def compare(options: argparse.Namespace) -> int:
    from .compare import compare as run_compare

    return run_compare(options)


def errors(options: argparse.Namespace) -> int:
    from merging.errors import FAMILIES

    for number, family in FAMILIES.items():
        for code, meaning in family.items():
            print(f"exit {number:<4} {code:<22} {meaning}")
    return 0


# -- helpers ------------------------------------------------------------------------------------------------------


def _read(options: argparse.Namespace) -> tuple[Recipe, list[str]]:
    from merging.recipe_yaml import load_recipe

    loaded = load_recipe(Path(options.recipe))
    return loaded.recipe, loaded.notes


def _with_seed(recipe: Recipe, seed: int) -> Recipe:
    if not 0 <= seed < 1 << 63:
        raise RecipeError("E_RECIPE_FIELD", f"The seed {seed} is not a number from 0 to 2^63 - 1.")
    return recipe.model_copy(update={"seed": seed})


def _make_plan(recipe: Recipe, options: argparse.Namespace) -> Plan:
    from merging.plan import make_plan

    with _download_bar() as show:
        return make_plan(recipe, shard_size=options.shard_size, offline=options.offline, progress=show)


def _cores() -> int:
    from merging.cores import available_cores

    return available_cores()


@contextmanager
def _stopping(terminated: threading.Event) -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; the merge then ends at the next block and can be resumed."""
    stop = threading.Event()

    def handle(number: int, _frame: Any) -> None:
        if number == signal.SIGTERM:
            terminated.set()
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A progress bar with rate and time left; on something that is no terminal a line every ten seconds."""
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        yield _Lines().show
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    from .console import stderr

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=stderr(), transient=True) as bar:
        task = bar.add_task("merging", rate="")
        last = [0.0]

        def show(progress: Progress) -> None:
            now = time.monotonic()
            if now - last[0] < 0.1 and progress.done < progress.total:
                return
            last[0] = now
            rate = progress.moved / 1e6 / max(1e-3, now - progress.started)
            bar.update(task, total=progress.total, completed=progress.done, rate=f"{rate:,.0f} MB/s")

        yield show


class _Lines:
    """Progress for logs: one line now and then."""

    def __init__(self, every: float = 10.0) -> None:
        self.every, self.last = every, time.monotonic()

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self.last < self.every:
            return
        self.last = now
        left = progress.seconds_left
        rate = progress.moved / 1e6 / (now - progress.started)
        say(
            f"{progress.done / progress.total:4.0%}  {rate:,.0f} MB/s"
            + (f"  {left:.0f} s left" if left is not None else ""),
            sys.stderr,
        )


@contextmanager
def _download_bar() -> Iterator[Callable[[int, int, str], None] | None]:
    """Bytes, rate and time left of a download; nothing is drawn if nothing is downloaded."""
    state: dict[str, Any] = {}

    def show(done: int, total: int, name: str) -> None:
        if "bar" not in state:
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            from .console import stderr

            state["bar"] = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=stderr(),
                transient=True,
            )
            state["bar"].start()
            state["task"] = state["bar"].add_task("downloading")
        state["bar"].update(state["task"], total=total, completed=done, description=f"downloading {name}")

    try:
        yield show
    finally:
        if "bar" in state:
            state["bar"].stop()


def print_plan(facts: dict[str, Any]) -> None:
    """The plan for people: what, how, what it costs, what stands in the way."""
    from rich.table import Table

    from .console import stdout

    console = stdout()
    table = Table("model", "opened as", "tensors", "GB", title=f"{facts['method']}", title_justify="left")
    for key, model in facts["models"].items():
        table.add_row(_plain(key), _plain(model["opened"]), str(model["tensors"]), f"{model['bytes'] / 1e9:.2f}")
    console.print(table)
    actions = ", ".join(f"{n} {a}" for a, n in facts["tensors"].items())
    console.print(
        f"output      {facts['parameters']:,} parameters, tensors: {actions}, in {len(facts['files'])} file(s) "
        f"({', '.join(facts['dtypes'])})",
        highlight=False,
    )
    console.print(
        f"reads       {facts['bytes_read'] / 1e9:.2f} GB    writes  {facts['bytes_written'] / 1e9:.2f} GB    "
        f"disk free  {(facts['disk_free'] or 0) / 1e9:.1f} GB",
        highlight=False,
    )
    console.print(
        f"memory      {facts['memory'] / 1e6:.0f} MB with {facts['threads']} threads    "
        f"time  about {facts['seconds']:.0f} s on this CPU (estimate)",
        highlight=False,
    )
    for group in facts["coefficients"][:8]:
        values = group["effective"]
        text = "effective " + ", ".join(f"{v:.4g}" for v in values) if values else _parameters(group)
        console.print(
            f"coefficients  {text}  [dim]{group['tensors']} tensors, such as {_plain(group['examples'][0])}[/]",
            highlight=False,
        )
    if len(facts["coefficients"]) > 8:
        console.print(f"… and {len(facts['coefficients']) - 8} more groups (see --json)")
    for text in facts["notes"]:
        console.print(f"note: {_plain(text)}", highlight=False)
    for text in facts["warnings"]:
        console.print(f"[yellow]warning:[/] {_plain(text)}", highlight=False)
    for blocker in facts["blockers"]:
        console.print(f"[red]blocked:[/] {_plain(blocker['what'])} \\[{blocker['code']}]", highlight=False)
        for text in filter(None, (blocker["why"], blocker["fix"])):
            console.print(f"         {_plain(text)}", highlight=False)
    if not facts["blockers"]:
        console.print("[green]Nothing stands in the way.[/]")


def _parameters(group: dict[str, Any]) -> str:
    shared = " ".join(f"{k}={v}" for k, v in group["shared"].items())
    experts = "; ".join(" ".join(f"{k}={v}" for k, v in e.items()) for e in group["experts"])
    return f"{shared} | {experts}"


def _plain(text: str) -> str:
    """Text from files and users, without a meaning for the console."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else "?" for c in text))
