"""What a comparison looks like in a terminal."""

from __future__ import annotations

import io
import re

from rich.console import Console

from merging.evaluation.compare import compare
from tests.evaluation.evaluated import SHARES, by_task, records_of, run_of
from ui.compare_tables import WIDTH, print_comparison


def printed(items: int = 400, width: int = 140, shares: dict = SHARES, **changes: object) -> str:
    comparison = compare(records_of(by_task(items, shares)), run_of(**changes), resamples=1_000)
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_comparison(console, comparison)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_tables_fit_120_columns_and_say_everything() -> None:
    text = printed(parameters=862_080)
    assert max(map(len, text.splitlines())) <= WIDTH == 120
    for words in ("scores on the split test", "task arithmetic (weight 0.4)", "plain average", "n = 400", "gain kept",
                  "evalu-", "candidate − baseline", "▲", "p = 0.", "warning: Settings were chosen", "Mini-scale"):  # fmt: skip
        assert words in text, words
    row = next(line for line in text.splitlines() if "expert sort" in line)
    assert len(re.findall(r"0\.\d{3} ±0\.\d{3}", row)) == 3  # two tasks and the mean


def test_few_items_show_counts_and_no_marks() -> None:
    text = printed(20)
    assert re.search(r"ties +│ +\d+/20 │", text)
    assert re.search(r"\d+ won", text)
    assert "▲" not in text and "▼" not in text and "p = " not in text


def test_many_tasks_are_spread_over_several_tables() -> None:
    shares = dict(SHARES) | {f"other task number {k}": SHARES["code"] for k in range(11)}
    text = printed(60, shares=shares)
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("scores, continued") == text.count("differences, continued") == 2
    assert "forgetting" in text and "number" in text


def test_names_from_files_have_no_meaning_for_the_console() -> None:
    shares = {"[red]sort[/]\x1b[2J": SHARES["sort"], "code": SHARES["code"]}
    text = printed(60, shares=shares, experts={"code": {"model": "coder", "tasks": ["code"]}},
                   candidates={"[bold]": {"model": "ties", "setting": "[/oops]"}})  # fmt: skip
    assert "[bold] ([/oops])" in text and "\x1b" not in text
    assert "[red]sort" in text.replace("\n", "")


def test_a_narrow_terminal_still_works() -> None:
    assert "gain" in printed(60, width=80)


def test_less_can_be_better() -> None:
    losses = {m: {t: 2 - v for t, v in tasks.items()} for m, tasks in by_task(100, SHARES).items()}
    comparison = compare(records_of(losses, metric="nll_per_byte"), run_of(), resamples=500)
    console = Console(file=io.StringIO(), width=140, color_system=None)
    print_comparison(console, comparison)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "(less is better)" in text and "bits per byte" in text and "▲" in text
    assert max(map(len, text.splitlines())) <= 120
