"""The picture in the README: the Merge page with a preview. ``python -m assets.screenshot [--page Merge] [--dark]``

Needs the packages of requirements-dev.txt and a Chromium (``CHROMIUM``, or Debian's).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


def take(out: Path, page_name: str, dark: bool, width: int, height: int) -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        environment = os.environ | {"AMALGAM_DATA": f"{folder}/data", "AMALGAM_CACHE": f"{folder}/cache"}
        command = [sys.executable, str(HERE.parent / "app.py"), "--demo", "--no-browser"]
        app = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert app.stdout is not None
            found = re.search(r"http://\S+", app.stdout.readline())
            assert found, "the workbench did not start"
            program = os.environ.get("CHROMIUM", "/usr/bin/chromium")
            browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
            )
            page.goto(found[0])
            page.get_by_role("tab", name=page_name, exact=True).click()
            if page_name == "Merge":
                page.locator("#preview").click(timeout=60_000)
                answers = "#preview-answers td, #preview-answers dd, #preview-answers li"
                page.locator(answers).first.wait_for(timeout=120_000)
            page.wait_for_timeout(3000)  # charts are drawn after their page is shown
            page.screenshot(path=out)
            browser.close()
        finally:
            app.terminate()
            app.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "workbench.png")
    parser.add_argument("--page", default="Merge")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900)
    options = parser.parse_args()
    take(options.out, options.page, options.dark, options.width, options.height)


if __name__ == "__main__":
    main()
