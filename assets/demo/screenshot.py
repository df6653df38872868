"""The picture in the README: what ``python app.py demo`` printed. ``python -m assets.demo.screenshot``"""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

import ui.demo

HERE = Path(__file__).parent


def main() -> None:
    console = Console(record=True, width=126, file=io.StringIO(), force_terminal=True)
    ui.demo.stdout = lambda: console  # type: ignore[assignment]
    ui.demo.run_demo()
    console.save_svg(str(HERE / "demo.svg"), title="python app.py demo")


if __name__ == "__main__":
    main()
