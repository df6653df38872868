"""A preview as the pages use it: from many threads, with a child process that may die at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from merging.errors import Cancelled, InputError, OutputError, RecipeError
from merging.preview import Preview
from merging.preview.worker import Worker, _typed

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "assets" / "demo"
TASK = str(DEMO / "tasks" / "sort.jsonl")
PROMPT = "sort hgfedcba="


def demo(lambda_: float = 1.0, method: str = "ties", **fields: Any) -> dict[str, Any]:
    experts = [{"model": str(DEMO / "experts" / name), "name": name} for name in ("sort", "rotate")]
    return {"base": str(DEMO / "base"), "experts": experts, "method": method, "parameters": {"lambda": lambda_}} | fields


@pytest.fixture(scope="module")
def preview() -> Iterator[Preview]:
    with Preview() as preview:
        assert preview.open(demo()).possible
        yield preview


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def running(preview: Preview, what: str) -> bool:
    return preview._current is not None and preview._current.what == what


def test_merge_score_and_generate(preview: Preview, tmp_path: Path) -> None:
    merged = preview.merge(demo(0.8))
    assert merged["complete"] and merged["changed_tensors"] > 30 and merged["seconds"] > 0
    (tmp_path / "side files").mkdir()
    here = Worker(tmp_path / "side files")
    here.merge(demo(0.8))
    assert preview.score([TASK], 20, of=merged["number"]) == here.score([TASK], 20)
    assert preview.generate([PROMPT], 8, of=merged["number"]) == here.generate([PROMPT], 8)


def test_typed_errors_cross_and_harm_nothing(preview: Preview, tmp_path: Path) -> None:
    number = preview.merge(demo(0.8))["number"]
    with pytest.raises(RecipeError) as caught:
        preview.merge(demo() | {"method": "teis"})
    assert "ties" in caught.value.why
    with pytest.raises(InputError, match="E_NOT_FOUND"):
        preview.merge(demo() | {"experts": [str(tmp_path / "nowhere")]})
    with pytest.raises(Cancelled):
        preview.score([TASK], 4, of=number)
    pid = preview._child.pid
    preview.merge(demo(0.8))
    assert preview.score([TASK], 4) and preview._child.pid == pid


def test_a_newer_merge_takes_the_place_of_all_older_requests(preview: Preview, pool: ThreadPoolExecutor) -> None:
    first = preview.merge(demo(0.8))
    scoring = pool.submit(preview.score, [str(DEMO / "tasks")], 400)
    wait_for(lambda: running(preview, "score"))
    waiting: list[Future] = [pool.submit(preview.generate, [PROMPT], 8), pool.submit(preview.merge, demo(0.1))]
    wait_for(lambda: len(preview._waiting) == 2 or any(one.done() for one in waiting))
    started = time.monotonic()
    newest = pool.submit(preview.merge, demo(0.6))
    for old in (scoring, waiting[0]):
        with pytest.raises(Cancelled):
            old.result(60)
    number = newest.result(60)["number"]
    assert time.monotonic() - started < 30 and number > first["number"]
    with pytest.raises(Cancelled, match="newer merge"):
        preview.score([TASK], 4, of=first["number"])
    assert preview.score([TASK], 4, of=number)


def test_scores_and_texts_do_not_disturb_each_other(preview: Preview, pool: ThreadPoolExecutor) -> None:
    number = preview.merge(demo(0.8))["number"]
    old = pool.submit(preview.score, [str(DEMO / "tasks")], 400, number)
    wait_for(lambda: running(preview, "score"))
    texts = pool.submit(preview.generate, [PROMPT], 8, number)
    wait_for(lambda: preview._waiting)
    new = pool.submit(preview.score, [TASK], 4, number)
    with pytest.raises(Cancelled):
        old.result(60)
    assert len(texts.result(60)) == 1 and new.result(60)[0]["items"] == 4


def test_stop_cancels_what_runs_and_what_waits(preview: Preview, pool: ThreadPoolExecutor) -> None:
    preview.merge(demo(0.8))
    both = [pool.submit(preview.score, [str(DEMO / "tasks")], 400)]
    wait_for(lambda: running(preview, "score"))
    both.append(pool.submit(preview.generate, [PROMPT], 8))
    wait_for(lambda: preview._waiting)
    preview.stop()
    for one in both:
        with pytest.raises(Cancelled):
            one.result(60)
    assert preview.generate([PROMPT], 8)


def test_a_child_that_dies_is_a_typed_error_and_the_next_request_has_another(
    preview: Preview, pool: ThreadPoolExecutor
) -> None:
    preview.merge(demo(0.7))
    expected, pid = preview.score([TASK], 20), preview._child.pid
    scoring = pool.submit(preview.score, [str(DEMO / "tasks")], 400)
    wait_for(lambda: running(preview, "score"))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(OutputError, match="E_WORKER") as caught:
        scoring.result(60)
    assert "preview process" in caught.value.what and "signal 9" in caught.value.what
    assert preview.score([TASK], 20) == expected  # the merge that it is about is made again
    assert preview._child.pid != pid


def test_a_child_that_died_unnoticed_is_replaced(preview: Preview) -> None:
    preview.merge(demo(0.7))
    pid = preview._child.pid
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not preview._child.alive)
    assert preview.merge(demo(0.6))["changed_tensors"] > 30
    assert preview._child.pid != pid


def test_a_child_that_does_not_give_way_is_ended(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merging.preview.client.PATIENCE", 0.2)
    with Preview() as preview:
        merging = pool.submit(preview.merge, demo())
        wait_for(lambda: running(preview, "merge"))
        os.kill(preview._child.pid, signal.SIGSTOP)
        preview.stop()
        with pytest.raises(Cancelled):
            merging.result(20)
        assert preview._child is None


def test_closing_ends_the_child_and_everybody_who_waits(pool: ThreadPoolExecutor) -> None:
    preview = Preview()
    merging = pool.submit(preview.merge, demo())
    wait_for(lambda: running(preview, "merge"))
    pid, folder = preview._child.pid, Path(preview._folder.name)
    preview.close()
    with pytest.raises(Cancelled):
        merging.result(20)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not folder.exists()
    with pytest.raises(Cancelled, match="closed"):
        preview.merge(demo())
    preview.close()
    Preview().close()  # never used


def test_the_child_outlives_the_thread_that_asked_first() -> None:
    with Preview() as preview:
        thread = threading.Thread(target=preview.merge, args=(demo(),))
        thread.start()
        thread.join()
        pid = preview._child.pid
        time.sleep(0.3)
        preview.merge(demo(0.5))
        assert preview._child.pid == pid


def test_a_device_that_is_not_there_is_a_typed_error() -> None:
    with Preview(device="cuda:99") as preview, pytest.raises(OutputError, match="E_DEVICE"):
        preview.merge(demo())


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from merging.preview import Preview
from tests.preview.test_client import demo
if __name__ == "__main__":
    preview = Preview()
    preview.merge(demo())
    print(preview._child.pid, preview._folder.name, flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["killed", "forgot to close"])
def test_the_child_ends_with_the_program(tmp_path: Path, how: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script), str(ROOT), how], capture_output=True, text=True, timeout=120)
    pid, folder = done.stdout.split()
    assert done.returncode == (-signal.SIGKILL if how == "killed" else 0), done.stderr

    def gone() -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state == "Z"

    wait_for(gone, 20)
    assert how == "killed" or not Path(folder).exists()


def test_importing_and_opening_load_no_torch() -> None:
    code = (
        "import sys; from merging.preview import Preview; from tests.preview.test_client import demo\n"
        "import merging.preview.client as c; c.Preview._start_thread = lambda self: None\n"
        "assert Preview().open(demo()).possible; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_what_is_in_the_way_of_a_merge_is_said_when_it_is_opened(tmp_path: Path) -> None:
    vit = ROOT / "assets" / "tiny_vit" / "experts" / "turned"
    with Preview() as preview:
        with pytest.raises((InputError, RecipeError)):
            preview.open(demo() | {"experts": [str(vit)]})
        assert preview._child is None


def test_whatever_goes_wrong_has_a_code() -> None:
    assert _typed(MemoryError()).code == "E_MEMORY"
    assert _typed(RuntimeError("CUDA out of memory")).code == "E_MEMORY"
    try:
        {}["x"]  # type: ignore[index]
    except KeyError as error:
        found = _typed(error)
    assert found.code == "E_WORKER" and "KeyError" in found.why and "test_client.py" in found.why
