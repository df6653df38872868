"""``python app.py``: from the options on the command line to an open workbench.

Everything that could leak is closed here: the server listens on this computer only, answers only requests that name it
by an allowed host and come from its own page, hands out no files, and asks nobody on the network for anything. Gradio
itself trusts its author, its working folder and any other page in the same browser; the guard below does not.
"""

from __future__ import annotations

import argparse
import atexit
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import webbrowser
from pathlib import Path
from typing import Any

from merging.errors import AmalgamError, OutputError
from merging.user_folders import cache_folder, data_folder

FIRST_PORT, LAST_PORT = 7860, 7959


def main(options: argparse.Namespace) -> int:
    """Open the workbench; what keeps it from opening is said in the terminal."""
    try:
        return run(options)
    except AmalgamError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def run(options: argparse.Namespace) -> int:
    """Open the workbench and stay until Ctrl-C. Exit code 0."""
    host, port = listen_at(options.host, options.port)
    scratch = private_folder()
    app = make_app(options)
    os.chdir(scratch / "empty")  # Gradio may hand out files of the working folder: there are none
    from . import workbench

    demo = workbench.build(app)
    try:
        start(demo, app, host, port, scratch)
    except OSError as error:  # somebody was faster
        why = f"{error.strerror or error}."
        raise OutputError("E_ADDRESS", f"{host}:{port} cannot be listened at.", why, "Start again.") from None
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else f'[{host}]' if ':' in host else host}:{port}"
    print(f"Amalgam is open at {url} (Ctrl-C stops it; running jobs go on)", flush=True)
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: done.set())
    if not options.no_browser and not app.on_space:
        show(url, options.window)
    done.wait()
    demo.close(verbose=False)
    return 0


def make_app(options: argparse.Namespace) -> Any:
    """The App that the options ask for."""
    from .context import App, read_settings

    if options.data_dir:
        os.environ["AMALGAM_DATA"] = str(Path(options.data_dir).expanduser().absolute())
    data, on_space = data_folder().absolute(), bool(os.environ.get("SPACE_ID"))
    settings = {} if on_space else read_settings(data)
    offline = bool(options.workbench_offline or settings.get("offline"))
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from merging.jobs import Jobs

    from .executors import choose_executor

    jobs = Jobs(data / "runs")
    return App(
        data=data,
        jobs=jobs,
        executor=choose_executor(jobs),
        offline=offline,
        on_space=on_space,
        device=settings.get("device", "auto"),
        threads=settings.get("threads", 0),
        start_recipe=start_recipe(options),
        start_id=secrets.token_hex(8),
        settings=settings,
    )


def start_recipe(options: argparse.Namespace) -> Any:
    """The draft that --recipe or --demo opens. Relative paths in the file count from the folder we were started in."""
    from . import draft

    if options.workbench_recipe:
        from merging.recipe_yaml import load_recipe

        loaded = load_recipe(Path(options.workbench_recipe))
        return draft.with_absolute_paths(draft.from_recipe(loaded.recipe), Path.cwd())
    return draft.demo() if options.workbench_demo else None


# -- the server ---------------------------------------------------------------------------------------


def start(demo: Any, app: Any, host: str, port: int, scratch: Path) -> None:
    """Serve, and return once the page answers."""
    from starlette.routing import Route

    from . import downloads
    from .components import plot
    from .guard import allowed_hosts, guarded, script_route
    from .workbench import head, theme

    demo.queue(max_size=64, default_concurrency_limit=4, api_open=False)
    blocked = [app.data, cache_folder("x").parent.absolute(), Path.home()]
    demo.launch(
        server_name=host,
        server_port=port,
        app_kwargs={
            "lifespan": guarded(allowed_hosts(host)),
            "routes": [
                Route(plot.SCRIPT, script_route(plot.SCRIPT_FILE)),
                Route(downloads.ROUTE, downloads.download_route(app.data)),
            ],
            "docs_url": None,
            "redoc_url": None,
            "openapi_url": None,
        },
        theme=theme(),
        head=head(),
        prevent_thread_lock=True,
        quiet=True,
        inbrowser=False,
        share=False,
        strict_cors=True,
        allowed_paths=[],
        blocked_paths=[str(folder) for folder in blocked if not scratch.is_relative_to(folder)],
        max_file_size="1mb",
        show_error=False,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        state_session_capacity=200,
    )


def private_folder() -> Path:
    """A folder that only this user may enter, for Gradio's temporary files; gone when we end."""
    folder = Path(tempfile.mkdtemp(prefix="amalgam-")).resolve()
    (folder / "empty").mkdir()
    (folder / "files").mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "files")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def listen_at(host: str | None, port: str) -> tuple[str, int]:
    """Host and port from the options, else from the environment (as a Space sets it), else 127.0.0.1 and the first
    free port from 7860."""
    on_space = bool(os.environ.get("SPACE_ID"))
    host = host or os.environ.get("GRADIO_SERVER_NAME") or ("0.0.0.0" if on_space else "127.0.0.1")
    asked = port if port != "auto" else os.environ.get("GRADIO_SERVER_PORT", "auto")
    if asked != "auto":
        if not asked.isdigit() or not 0 < int(asked) < 65536:
            fix = "Give a number up to 65535, or auto."
            raise OutputError("E_ADDRESS", f"{asked[:20]!r} is not a port.", "", fix)
        if not is_free(host, int(asked)):
            fix = "Close the other program, or leave --port out: the next free one is taken."
            raise OutputError("E_ADDRESS", f"{host}:{asked} cannot be listened at.", "It is in use, or not ours.", fix)
        return host, int(asked)
    found = next((number for number in range(FIRST_PORT, LAST_PORT + 1) if is_free(host, number)), None)
    if found is None:
        what = f"No port from {FIRST_PORT} to {LAST_PORT} is free at {host}."
        raise OutputError("E_ADDRESS", what, "", "Give another one with --port.")
    return host, found


def is_free(host: str, port: int) -> bool:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if sys.platform != "win32":  # there it would let two programs share a port
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return True
    except (OSError, OverflowError):
        return False


# -- showing it ---------------------------------------------------------------------------------------


def show(url: str, window: bool) -> None:
    """Open a browser, or with ``window`` a window of its own. No browser: the line in the terminal has to do."""
    if window and _own_window(url):
        return
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return  # a browser in text mode would take over this terminal
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


def _own_window(url: str) -> bool:
    import subprocess

    for name in ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge", "microsoft-edge"):
        program = shutil.which(name)
        if program:
            quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.Popen([program, f"--app={url}"], start_new_session=True, **quiet)
            return True
    return False
