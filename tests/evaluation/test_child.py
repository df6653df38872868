"""A child without network that ends when it should, and whose errors arrive."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from merging.errors import OutputError, TaskError
from merging.evaluation.child import Child, Send

ROOT = Path(__file__).parents[2]


def probe(send: Send, port: int, local: str) -> None:
    """Try everything that reaches out, and say what came of it."""
    import urllib.request

    def attempt(name: str, call: object) -> None:
        try:
            call()  # type: ignore[operator]
            send("tried", name, "worked")
        except OSError as error:
            send("tried", name, f"{type(error).__name__} {error}")

    attempt("connect", lambda: socket.create_connection(("127.0.0.1", port), timeout=5))
    attempt("raw", lambda: socket.socket().connect(("127.0.0.1", port)))
    attempt("quiet", lambda: socket.socket().connect_ex(("127.0.0.1", port)))
    attempt("packet", lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", port)))
    attempt("listen", lambda: socket.socket().bind(("127.0.0.1", 0)))
    attempt("name", lambda: socket.getaddrinfo("localhost", port))
    attempt("http", lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5))
    attempt("within the machine", lambda: socket.socket(socket.AF_UNIX).connect(local))
    from huggingface_hub import HfApi, constants

    send("tried", "hub", f"offline {constants.HF_HUB_OFFLINE}")
    try:
        HfApi(endpoint=f"http://127.0.0.1:{port}").model_info("org/name", timeout=5)
        send("tried", "hub request", "worked")
    except Exception as error:
        send("tried", "hub request", type(error).__name__)
    send("tried", "threads", os.environ["OMP_NUM_THREADS"])


def test_there_is_no_network_in_a_child(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        server.settimeout(0.2)
        local.bind(str(tmp_path / "socket"))
        local.listen()
        with Child(probe, server.getsockname()[1], str(tmp_path / "socket"), threads=3) as child:
            found = {message[1]: message[2] for message in child.messages() if message}
        with pytest.raises(TimeoutError):
            server.accept()
    assert found.pop("within the machine") == "worked"
    assert found.pop("threads") == "3"
    assert found.pop("hub") == "offline True"
    assert found.pop("hub request") == "OfflineModeIsEnabled"
    assert found.keys() == {"connect", "raw", "quiet", "packet", "listen", "name", "http"}
    assert all("no network in this process" in said for said in found.values()), found


def work(send: Send, how: str) -> None:
    send("began", os.getpid())
    if how == "typed":
        raise TaskError("E_TASK", "what", "why", "fix")
    if how == "bug":
        raise KeyError("a bug")
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exits":
        os._exit(3)
    if how == "sleeps":
        time.sleep(600)
    send("more", 1, 2)


def run(how: str) -> list[tuple]:
    with Child(work, how) as child:
        return [message for message in child.messages() if message]


def test_messages_and_errors_arrive() -> None:
    assert [message[0] for message in run("ends")] == ["began", "more"]
    with pytest.raises(TaskError) as typed:
        run("typed")
    assert (typed.value.what, typed.value.why, typed.value.fix) == ("what", "why", "fix")
    with pytest.raises(RuntimeError, match="KeyError: 'a bug'"):
        run("bug")


@pytest.mark.parametrize(("how", "says"), [("dies", "signal 9"), ("exits", "exit code 3")])
def test_a_child_that_dies_is_a_typed_error(how: str, says: str) -> None:
    with pytest.raises(OutputError, match=says) as caught:
        run(how)
    assert caught.value.code == "E_WORKER"


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_closing_ends_it_at_once() -> None:
    with Child(work, "sleeps") as child:
        (process,) = next(message[1:] for message in child.messages() if message)
        started = time.monotonic()
    assert time.monotonic() - started < 1 and not alive(process)


SCRIPT = """
import sys
from merging.evaluation.child import Child
from tests.evaluation.test_child import work
if __name__ == "__main__":
    with Child(work, "sleeps") as child:
        for message in child.messages():
            if message:
                print(message[1], flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_does_not_outlive_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    process = int(parent.stdout.readline())
    assert alive(process)
    parent.send_signal(number)
    parent.communicate()
    limit = time.monotonic() + 5
    while alive(process) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not alive(process)
