"""The front door of Amalgam, a workbench for merging models.

    python app.py demo                    merge, verify and score the bundled experts
    python app.py plan   RECIPE           what a merge would do and cost; no weight is read
    python app.py merge  RECIPE OUT       run it
    python app.py verify OUT              is every byte as it was written?
    python app.py errors                  all error codes and what they mean

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

# Idle OpenMP threads must sleep, not spin: the workers need the cores. Before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="app.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    commands.add_parser("errors", help="all error codes and what they mean")
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command is None:
        parser().print_help()
        return 0
    from ui import terminal

    return terminal.run_command(options)


if __name__ == "__main__":
    sys.exit(main())
