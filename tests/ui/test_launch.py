"""Options, port, privacy of the server's settings, and that only our own page may talk to it."""

from __future__ import annotations

import argparse
import os
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import app
from merging.errors import OutputError, RecipeError
from ui import draft, launch
from ui.guard import Guard, allowed_hosts, host_of

ROOT = Path(__file__).resolve().parents[2]


def options(*arguments: str) -> argparse.Namespace:
    return app.parser().parse_args(arguments)


@pytest.fixture(autouse=True)
def no_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "SPACE_ID",
        "SPACE_HOST",
        "GRADIO_SERVER_NAME",
        "GRADIO_SERVER_PORT",
        "AMALGAM_HOSTS",
        "SPACES_ZERO_GPU",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AMALGAM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "")


# -- the command line -----------------------------------------------------------------------------------


def test_without_a_command_the_workbench_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(launch, "run", lambda options: seen.append(options) or 0)
    assert app.main([]) == 0
    assert app.main(["--port", "8000", "--no-browser", "--offline", "--demo", "--host", "localhost"]) == 0
    assert seen[0].port == "auto" and seen[1].port == "8000" and seen[1].workbench_offline and seen[1].no_browser


def test_what_keeps_it_from_opening_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(["--port", "eighty", "--no-browser"]) == 5
    assert "'eighty' is not a port" in capsys.readouterr().err
    assert app.main(["--recipe", "/nowhere.yml", "--no-browser"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_options_of_the_workbench_do_not_get_lost_before_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        app.main(["--offline", "plan", "recipe.yml"])
    assert caught.value.code == 2 and "put options of plan after it" in capsys.readouterr().err
    assert options("plan", "recipe.yml", "--offline").offline is True


# -- where it listens -----------------------------------------------------------------------------------


def test_it_listens_on_this_computer_only_and_at_the_next_free_port() -> None:
    host, first = launch.listen_at(None, "auto")
    assert host == "127.0.0.1" and 7860 <= first <= 7959
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, first))
        taken.listen()
        assert launch.listen_at(None, "auto")[1] > first
        with pytest.raises(OutputError, match="cannot be listened at"):
            launch.listen_at(None, str(first))


@pytest.mark.parametrize("port", ["0", "65536", "-1", "1.5", "http", "8000 "])
def test_ports_that_are_none(port: str) -> None:
    with pytest.raises(OutputError, match="is not a port"):
        launch.listen_at(None, port)


def test_a_space_says_where_to_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/amalgam")
    assert launch.listen_at(None, "auto")[0] == "0.0.0.0"
    monkeypatch.setenv("GRADIO_SERVER_NAME", "127.0.0.2")
    assert launch.listen_at(None, "auto")[0] == "127.0.0.2"
    made = launch.make_app(options("--no-browser"))
    assert made.on_space and made.settings == {}
    made.remember(device="cuda")
    assert not made.settings_file.exists()


def test_the_private_folder_is_private_and_empty() -> None:
    folder = launch.private_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(p.name for p in folder.rglob("*")) == ["empty", "files"]
    assert os.environ["GRADIO_TEMP_DIR"] == str(folder / "files")


# -- what it starts with --------------------------------------------------------------------------------


def test_a_recipe_file_is_opened_with_paths_that_hold_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "r.yml").write_text(
        "base: base\nexperts: [org/a, org/b]\nmethod: task_arithmetic\nparameters: {weight: 0.5}\n"
    )
    found = launch.start_recipe(options("--recipe", "r.yml"))
    assert found["recipe"]["base"] == str(tmp_path / "base") and draft.labels(found) == ["org/a", "org/b"]
    with pytest.raises(RecipeError):
        launch.start_recipe(options("--recipe", "missing.yml"))
    assert draft.recipe_of(launch.start_recipe(options("--demo"))).method == "pcb"
    assert launch.start_recipe(options()) is None


def test_settings_are_remembered_and_spoilt_ones_are_not_believed(tmp_path: Path) -> None:
    made = launch.make_app(options("--data-dir", str(tmp_path / "d")))
    made.remember(device="cpu", threads=2)
    again = launch.make_app(options("--data-dir", str(tmp_path / "d")))
    assert (again.device, again.threads, again.offline) == ("cpu", 2, False)
    made.settings_file.write_text('{"device": 3, "threads": true, "offline": true, "evil": "x"}')
    spoilt = launch.make_app(options("--data-dir", str(tmp_path / "d")))
    assert (spoilt.device, spoilt.threads, spoilt.offline) == ("auto", 0, True)
    made.settings_file.write_text("{")
    assert launch.make_app(options("--data-dir", str(tmp_path / "d"))).settings == {}


# -- the guard ------------------------------------------------------------------------------------------


def refusal(hosts: set[str], method: str = "POST", **headers: str) -> str:
    pairs = [(k.replace("_", "-").encode(), v.encode("latin-1")) for k, v in headers.items()]
    return Guard(None, hosts).refusal({"type": "http", "method": method, "headers": pairs})


LOCAL = allowed_hosts("127.0.0.1")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.com", "origin": "http://evil.com"},
        {"host": "127.0.0.1:7860", "origin": "http://evil.com"},
        {"host": "127.0.0.1:7860", "origin": "null"},
        {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7861"},
        {"host": "127.0.0.1:7860", "origin": "http://localhost:7860"},
        {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1.evil.com:7860"},
        {"host": "127.0.0.1:7860", "origin": "http://evil.com@127.0.0.1:7860"},
        {"host": "127.0.0.1:7860", "origin": "file://127.0.0.1:7860"},
        {"host": "127.0.0.1:7860"},
        {"host": "192.168.1.5:7860", "origin": "http://192.168.1.5:7860"},
        {"host": "127.0.0.1:7860@evil.com", "origin": "http://127.0.0.1:7860@evil.com"},
        {"host": "127.0.0.1:x", "origin": "http://127.0.0.1:x"},
        {"host": "[::1", "origin": "http://[::1"},
        {"origin": "http://127.0.0.1:7860"},
        {"host": "localhost:7860", "origin": "http://localhost:7860", "sec_fetch_site": "cross-site"},
    ],
)
def test_what_does_not_come_from_our_page_is_refused(headers: dict[str, str]) -> None:
    assert refusal(LOCAL, **headers)


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:80", "LOCALHOST:80", "[::1]:7860", "localhost"])
def test_our_page_may(host: str) -> None:
    assert refusal(LOCAL, host=host, origin=f"http://{host}") == ""
    assert refusal(LOCAL, method="GET", host=host) == ""
    assert refusal(LOCAL, method="GET", host=host, origin="http://evil.com")


def test_a_host_given_twice_is_no_host() -> None:
    pairs = [(b"host", b"localhost"), (b"host", b"evil.com"), (b"origin", b"http://localhost")]
    assert Guard(None, LOCAL).refusal({"type": "http", "method": "GET", "headers": pairs})
    assert Guard(None, LOCAL).refusal({"type": "websocket", "headers": pairs[:1]})


def test_for_a_whole_network_addresses_in_digits_and_our_own_name_will_do() -> None:
    hosts = allowed_hosts("0.0.0.0")
    assert refusal(hosts, host="192.168.1.5:7860", origin="http://192.168.1.5:7860") == ""
    assert refusal(hosts, host="evil.com:7860", origin="http://evil.com:7860")


def test_a_space_goes_by_its_public_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_HOST", "someone-amalgam.hf.space")
    hosts = allowed_hosts("0.0.0.0")
    assert refusal(hosts, host="10.0.0.7:7860", origin="https://someone-amalgam.hf.space") == ""
    assert refusal(hosts, host="someone-amalgam.hf.space", origin="https://someone-amalgam.hf.space") == ""
    assert refusal(hosts, host="10.0.0.7:7860", origin="https://other.hf.space")


@pytest.mark.parametrize("text", ["", "a@b", "a/b", "a?b", "a#b", "[::1", "a:b:c"])
def test_texts_that_are_no_host(text: str) -> None:
    assert host_of(text) in ("", "a")


# -- the real server ------------------------------------------------------------------------------------

CANARY = "hf_" + "Canary0" * 5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The real program, with a look-up of other hosts' names made fatal, and its start timed."""
    folder = tmp_path_factory.mktemp("served")
    guard = (
        "import socket, sys, runpy\n"
        "real = socket.getaddrinfo\n"
        "def only_here(host, *a, **k):\n"
        "    name = host.decode() if isinstance(host, bytes) else host\n"
        "    if name not in (None, '', '127.0.0.1', 'localhost', '0.0.0.0', '::1'):\n"
        "        print('LOOK-UP OF', name, flush=True)\n"
        "    return real(host, *a, **k)\n"
        "socket.getaddrinfo = only_here\n"
        "sys.argv = ['app.py', '--no-browser', '--demo']\n"
        "sys.path.insert(0, '.')\n"
        "import atexit\n"
        "atexit.register(lambda: print('TORCH', 'torch' in sys.modules, flush=True))\n"
        "runpy.run_path('app.py', run_name='__main__')\n"
    )
    environment = {
        **os.environ,
        "AMALGAM_DATA": str(folder / "data"),
        "HF_TOKEN": CANARY,
        "GRADIO_ANALYTICS_ENABLED": "True",
    }
    log = open(folder / "log", "w")  # noqa: SIM115
    process = subprocess.Popen([sys.executable, "-c", guard], cwd=ROOT, env=environment, stdout=log, stderr=log)
    until, url = time.monotonic() + 90, ""
    while not url and time.monotonic() < until and process.poll() is None:
        time.sleep(0.1)
        url = next((w for w in (folder / "log").read_text().split() if w.startswith("http://")), "")
    assert url, (folder / "log").read_text()
    yield url, folder
    process.terminate()
    assert process.wait(20) == 0, "a signal is a clean end"
    said = (folder / "log").read_text()
    assert "LOOK-UP" not in said and "Traceback" not in said, said
    assert "TORCH False" in said and CANARY not in said, said
    log.close()


def ask(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    request = urllib.request.Request(url, data, {k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def test_the_six_probes_are_refused(server: tuple[str, Path]) -> None:
    """A rebound name; another page's JSON, text, and no type; another page's upload; a page without an origin."""
    url, folder = server
    call, upload = f"{url}/gradio_api/queue/join", f"{url}/gradio_api/upload"
    body = b'{"data": [], "fn_index": 0, "session_hash": "x"}'
    form = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nevil\r\n--b--\r\n'
    evil = "http://evil.com"
    probes = [
        (call, body, {"Host": "evil.com", "Origin": evil, "Content_Type": "application/json"}),
        (call, body, {"Origin": evil, "Content_Type": "application/json"}),
        (call, body, {"Origin": evil, "Content_Type": "text/plain"}),
        (call, body, {"Content_Type": "application/json"}),
        (upload, form, {"Origin": evil, "Content_Type": "multipart/form-data; boundary=b"}),
        (call, body, {"Origin": "null", "Content_Type": "application/json"}),
        (url, None, {"Host": "evil.com"}),
    ]
    for place, data, headers in probes:
        status, text, answered = ask(place, data, **headers)
        assert status == 403 and text.startswith(b"Refused"), (place, headers, status)
        assert "access-control-allow-origin" not in {k.lower() for k in answered}


def test_our_own_page_is_served_with_a_policy(server: tuple[str, Path]) -> None:
    url, _ = server
    status, text, headers = ask(url + "/")
    assert status == 200 and b"Amalgam" in text
    lower = {k.lower(): v for k, v in headers.items()}
    assert "connect-src 'self'" in lower["content-security-policy"] and lower["x-content-type-options"] == "nosniff"
    status, script, _ = ask(url + "/amalgam/plotly.min.js")
    assert status == 200 and len(script) > 1_000_000


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "{root}/app.py", "{data}/settings.json", "{data}/runs", "app.py", "../app.py"]
)
def test_no_file_is_handed_out(server: tuple[str, Path], path: str) -> None:
    url, folder = server
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "settings.json").write_text("{}")
    full = path.format(root=ROOT, data=folder / "data")
    assert ask(f"{url}/gradio_api/file={full}")[0] in (403, 404)


def test_nothing_is_a_public_endpoint(server: tuple[str, Path]) -> None:
    url, _ = server
    status, text, _ = ask(url + "/gradio_api/info")
    assert status == 200 and b'"named_endpoints":{}' in text.replace(b" ", b"")
    assert ask(url + "/docs")[0] == 404 and ask(url + "/openapi.json")[0] == 404
    assert ask(url + "/monitoring")[0] in (403, 404)


def test_no_secret_in_what_the_browser_gets(server: tuple[str, Path]) -> None:
    url, _ = server
    for path in ("/", "/config", "/gradio_api/info"):
        assert CANARY.encode() not in ask(url + path)[1]
