"""The front door of Amalgam, a workbench for merging models.

    python app.py                         open the workbench in a browser
    python app.py demo                    merge, verify and score the bundled experts
    python app.py plan   RECIPE           what a merge would do and cost; no weight is read
    python app.py merge  RECIPE OUT       run it
    python app.py verify OUT              is every byte as it was written?
    python app.py inspect --base BASE EXPERT…   what the experts changed, and what to do about it
    python app.py evaluate MODEL…         score models on tasks, item by item
    python app.py compare RUN             base, experts, baselines and candidates, with what is proven
    python app.py errors                  all error codes and what they mean

Add --help to any of them for its options; those below are the workbench's.

Exit codes: 0 done · 2 recipe or command line · 3 input models · 4 Hugging Face Hub · 5 output, disk, memory or
device · 6 verification failed · 7 numbers (NaN, infinity, overflow) · 8 evaluation tasks · 130 stopped by the
user (143 by the system) · 1 a bug of ours.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

# Idle OpenMP threads must sleep, not spin: the workers need the cores. Before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Nobody is told that or how this program is used. Before gradio and huggingface_hub are imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def size(text: str) -> int:
    """Bytes from "800", "400MB", "5GB", "2GiB"."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(?:([kKMGT])(i?))?[bB]?\s*", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a size like 400MB or 5GB")
    exponent = "KMGT".index(match[2].upper()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** exponent)


def count(text: str) -> int:
    """A whole number, 1 or more."""
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number of 1 or more")
    return int(text)


def share(text: str) -> float:
    """A number above 0, up to 1."""
    if not re.fullmatch(r"[0-9]{0,3}\.?[0-9]{1,12}", text) or not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number above 0, up to 1")
    return float(text)


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="app.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_workbench(whole)
    commands = whole.add_subparsers(dest="command", metavar="COMMAND")

    demo = commands.add_parser("demo", help="merge, verify and score the bundled experts")
    demo.add_argument("--keep", metavar="FOLDER", help="keep the merged models in this new folder")
    demo.add_argument("--limit", type=count, metavar="N", help="use the first N test items of each task")

    plan = commands.add_parser("plan", help="what a merge would do and cost")
    plan.add_argument("recipe", metavar="RECIPE", help="YAML file, native or in the mergekit dialect")
    plan.add_argument("--out", metavar="FOLDER", help="where it would be written, to see the free disk space")
    plan.add_argument("--json", action="store_true", help="print everything as JSON")

    merge = commands.add_parser("merge", help="run a merge")
    merge.add_argument("recipe", metavar="RECIPE", help="YAML file, native or in the mergekit dialect")
    merge.add_argument("out", metavar="OUT", help="the folder to make; it must not exist")
    merge.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    merge.add_argument("--memory", type=size, metavar="SIZE", help="most memory to use, for example 2GB")
    merge.add_argument("--seed", type=int, metavar="N", help="seed of random methods, instead of the recipe's")
    merge.add_argument("--restart", action="store_true", help="discard unfinished work of another recipe")
    merge.add_argument("--quiet", action="store_true", help="print nothing but errors")
    for command in (plan, merge):
        command.add_argument("--threads", type=count, default=0, metavar="N", help="workers (default: one per core)")
        command.add_argument(
            "--shard-size",
            type=size,
            default=5_000_000_000,
            metavar="SIZE",
            help="largest weight file, for example 2GB (default: 5GB)",
        )
        command.add_argument("--offline", action="store_true", help="never ask the Hub; use what is in its cache")

    verify = commands.add_parser("verify", help="check a merged model against its manifest")
    verify.add_argument("out", metavar="OUT", help="folder of a merged model")
    verify.add_argument("--json", action="store_true", help="print the report as JSON")
    add_inspect(commands)
    add_evaluate(commands)
    add_compare(commands)
    commands.add_parser("errors", help="all error codes and what they mean")
    return whole


WORKBENCH_DEFAULTS: dict[str, Any] = {
    "host": None,
    "port": "auto",
    "no_browser": False,
    "window": False,
    "data_dir": None,
    "workbench_offline": False,
    "workbench_demo": False,
    "workbench_recipe": None,
}


def add_workbench(whole: argparse.ArgumentParser) -> None:
    """The options without a command. Names that commands have too are told apart by their destination."""
    own = whole.add_argument_group("the workbench (without a command)")
    own.add_argument("--host", metavar="HOST", help="address to listen at (default: 127.0.0.1, this computer only)")
    own.add_argument("--port", metavar="N", help="port, or auto: the first free one from 7860 (default: auto)")
    own.add_argument("--no-browser", action="store_true", help="only print the address")
    own.add_argument("--window", action="store_true", help="open a window of its own instead of a browser tab")
    own.add_argument("--data-dir", metavar="FOLDER", help="where runs and settings are kept")
    own.add_argument("--offline", action="store_true", dest="workbench_offline", help="never ask the Hub")
    own.add_argument("--demo", action="store_true", dest="workbench_demo", help="start with the bundled experts")
    own.add_argument("--recipe", metavar="FILE", dest="workbench_recipe", help="start with this recipe")
    whole.set_defaults(**WORKBENCH_DEFAULTS)


def add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="what the experts changed, and what to do about it",
        description="Look at what experts changed in their base: mistakes first, then sizes, directions, signs, "
        "spectra. "
        "What was computed before is kept; Ctrl-C is safe, the same command goes on.",
    )
    inspect.add_argument("experts", nargs="+", metavar="EXPERT", help="model folder, adapter, or org/name on the Hub")
    inspect.add_argument("--base", required=True, metavar="BASE", help="the model that the experts were made from")
    inspect.add_argument("--merged", metavar="DIR", help="a merge of them: what did it keep of each?")
    inspect.add_argument("--also-base", action="append", metavar="OTHER", help="perhaps this is the base; repeatable")
    inspect.add_argument("--json", metavar="FILE", help="write all numbers as JSON; - prints only that")
    inspect.add_argument("--html", metavar="FILE", help="write a report with charts, one file that works offline")
    inspect.add_argument(
        "--parts", metavar="LIST", help="doctor,changes,trimmed,spectra,subspaces,principal,texts (default: all)"
    )
    inspect.add_argument(
        "--density", type=share, default=0.2, metavar="D", help="share kept in trimming (default: 0.2)"
    )
    inspect.add_argument(
        "--spectra",
        choices=("gram", "exact", "preview", "none"),
        default="gram",
        help="how singular values are computed (default: gram; none also leaves out subspaces and principal)",
    )
    inspect.add_argument("--rank", type=count, default=16, metavar="K", help="directions to compare (default: 16)")
    inspect.add_argument("--coefficients", metavar="LIST", help="one per expert, for the importance of layers: 0.3,0.5")
    inspect.add_argument(
        "--texts", action="append", metavar="FILE", help="texts of the experts; repeatable, or a folder"
    )
    inspect.add_argument("--offline", action="store_true", help="never ask the Hub; use what is in its cache")
    inspect.add_argument("--no-cache", action="store_true", help="neither use nor keep earlier results")
    inspect.add_argument("--threads", type=count, default=0, metavar="N", help="workers (default: one per core)")


def add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="score models on local tasks",
        description="Score models on local tasks: exact answers, multiple choice, texts, classes of texts and images. "
        "What was scored before is not scored again; Ctrl-C is safe, the same command goes on.",
    )
    evaluate.add_argument("models", nargs="+", metavar="MODEL", help="model folder, or org/name on the Hub")
    evaluate.add_argument(
        "--tasks", nargs="+", required=True, metavar="PATH", help="task files (.jsonl, .yaml), or folders of them"
    )
    evaluate.add_argument("--baseline", action="append", metavar="NAME=PATH", help="also this model; repeatable")
    evaluate.add_argument("--limit", type=count, metavar="N", help="use the first N items of each task")
    evaluate.add_argument("--batch-size", type=count, metavar="N", help="items at a time (default: by kind of task)")
    evaluate.add_argument("--threads", type=count, default=1, metavar="N", help="CPU threads (default: 1)")
    evaluate.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:1 or mps (default: cpu)")
    evaluate.add_argument("--json", metavar="FILE", help="also write the results as JSON; - prints only that")
    evaluate.add_argument("--out", metavar="FILE", help="write all records: .jsonl or .parquet, for compare")
    evaluate.add_argument("--no-cache", action="store_true", help="neither use nor keep earlier results")


def add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="base, experts, baselines and candidates in one table, with paired tests",
        description="Compare merged models with their base, their experts, the plain average and tuned task "
        "arithmetic: from runs, from files of records (with options that say who is who), or by making a new run.",
    )
    compare.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="run file or its folder, a file of records, or an output folder of lm_eval --log_samples",
    )
    compare.add_argument("--json", metavar="FILE", help="also write everything as JSON; - prints only that")
    compare.add_argument("--base", metavar="MODEL", help="the base: a folder, or its name in the records")
    compare.add_argument(
        "--expert",
        action="append",
        metavar="NAME=MODEL[:TASK,…]",
        help="an expert and its own tasks (default: the task of its name)",
    )
    compare.add_argument("--candidate", action="append", metavar="NAME=MODEL", help="a merged model to judge")
    compare.add_argument("--average", metavar="MODEL", help="the plain average, by its name in the records")
    compare.add_argument("--tuned", metavar="MODEL", help="the tuned task arithmetic, by its name in the records")
    new = compare.add_argument_group("a new run")
    new.add_argument("--out", metavar="FOLDER", help="where to write it: records, run.json and merged models")
    new.add_argument("--tasks", metavar="PATH", help="task file or folder; ….validation tasks are for choosing")
    new.add_argument("--selection-tasks", metavar="PATH", help="tasks for choosing, if they lie elsewhere")
    new.add_argument("--budget", type=count, default=8, metavar="N", help="settings to try per method (default: 8)")
    new.add_argument(
        "--tune",
        action="append",
        metavar="METHOD[:PARAMETER=VALUE,…]",
        help="also merge by this method, at the best of its settings; ranges may be given",
    )
    new.add_argument("--limit", type=count, metavar="N", help="use the first N items of each task")
    new.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    new.add_argument("--threads", type=count, default=0, metavar="N", help="workers (default: one per core)")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command is None:
        from ui import launch

        return launch.main(options)
    misplaced = [name for name, default in WORKBENCH_DEFAULTS.items() if getattr(options, name) != default]
    if misplaced:
        option = "--" + misplaced[0].removeprefix("workbench_").replace("_", "-")
        parser().error(f"{option} before a command is for the workbench; put options of {options.command} after it")
    from ui import terminal

    return terminal.run_command(options)


def missing_package(error: ModuleNotFoundError) -> str:
    """What to do when Python lacks what requirements.txt names; "" for a module of our own."""
    name = (error.name or "").split(".")[0]
    if not name or name in ("merging", "ui"):
        return ""
    ready = os.path.join(os.path.dirname(os.path.abspath(__file__)), ".venv", "bin", "python")
    how = f"Use {ready}." if os.path.exists(ready) else "Run `make run` once, or pip install -r requirements.txt."
    return f"error: This Python lacks the package {name}, which Amalgam needs.\n{how}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while packages were being imported
        sys.exit(130)
    except ModuleNotFoundError as missing:
        if not (message := missing_package(missing)):
            raise
        sys.exit(message)
