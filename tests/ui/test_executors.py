"""Executors: whoever does a job, its folder and its states are the same."""

from __future__ import annotations

import contextvars
import multiprocessing
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from merging.errors import AmalgamError
from merging.jobs import Jobs
from tests.odd_jobs import WORKER, ended, install, running, wait_until
from ui.executors import BackgroundExecutor, Executor, RequestExecutor, choose_executor, follow

REQUEST: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="nobody")
lent_to: list[str] = []


def lend(work: Callable[[str], None]) -> Callable[[str], None]:
    """As ``spaces.GPU`` does: the function runs in a fork, for whoever's request this is."""

    def lent(folder: str) -> None:
        lent_to.append(REQUEST.get())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork with threads
            process = multiprocessing.get_context("fork").Process(target=work, args=(folder,), daemon=True)
            process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError("GPU task aborted")

    return lent


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    install(monkeypatch)
    jobs = Jobs(tmp_path / "runs", WORKER)
    yield jobs
    for state in jobs.states():
        jobs.stop(state.id)
        ended(jobs, state.id)
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("job ")])


@pytest.fixture(params=["background", "request", "gpu"])
def executor(request: pytest.FixtureRequest, jobs: Jobs) -> Executor:
    if request.param == "background":
        return BackgroundExecutor(jobs)
    return RequestExecutor(jobs, lend if request.param == "gpu" else None)


@pytest.fixture
def device(executor: Executor) -> dict[str, str]:
    return {"device": "cuda"} if isinstance(executor, RequestExecutor) and executor.on_gpu else {}


def test_a_job_is_the_same_whoever_does_it(executor: Executor, device: dict[str, str]) -> None:
    job = executor.start("count", {"to": 30, **device}, "thirty")
    states = list(follow(executor.jobs, job, 0.02))
    assert states[-1].status == "finished" and states[-1].result == {"from": 0, "to": 30}
    assert len({state.status for state in states}) >= 2 and states[-1].progress and states[-1].progress.share == 1
    names = [event["event"] for event in executor.jobs.events(job)[0]]
    assert names == ["waiting", "started", *["counted"] * 30, "finished"]
    assert executor.jobs.states() == [states[-1]]


def test_stop_and_resume(executor: Executor, device: dict[str, str]) -> None:
    job = executor.start("count", {"to": 60, "every": 0.02, **device})
    wait_until(lambda: len(executor.jobs.events(job)[0]) > 5)
    began = time.monotonic()
    executor.stop(job)
    assert ended(executor.jobs, job).status == "cancelled" and time.monotonic() - began < 2
    executor.resume(job)
    state = ended(executor.jobs, job)
    assert state.status == "finished" and state.result is not None and state.result["from"] > 3


def test_one_at_a_time_whoever_does_it(jobs: Jobs) -> None:
    first = BackgroundExecutor(jobs).start("count", {"to": 1000})
    running(jobs, first)
    second = RequestExecutor(jobs).start("count", {"to": 3})
    third = BackgroundExecutor(jobs).start("count", {"to": 3})
    assert [state.status for state in jobs.states()] == ["waiting", "waiting", "running"]
    jobs.stop(first)
    ends = [ended(jobs, job) for job in (second, third)]
    assert [state.status for state in ends] == ["finished"] * 2 and (ends[0].ended or 0) <= (ends[1].started or 0)


def test_stopping_a_job_in_this_process_signals_nobody(jobs: Jobs) -> None:
    executor = RequestExecutor(jobs)
    job = executor.start("count", {"to": 1000})
    running(jobs, job)
    assert (jobs.folder(job) / "lock").read_text() == ""
    executor.stop(job)  # a signal would end pytest
    assert ended(jobs, job, 2).status == "cancelled"


# -- the GPU of a visitor -----------------------------------------------------------------------------


def test_a_gpu_is_asked_for_in_the_name_of_the_visitor_and_only_for_cuda(jobs: Jobs) -> None:
    executor = RequestExecutor(jobs, lend)
    lent_to.clear()
    token = REQUEST.set("a visitor")
    try:
        with_gpu = executor.start("count", {"to": 1, "device": "cuda"})
        without = executor.start("count", {"to": 1, "device": "auto"})
    finally:
        REQUEST.reset(token)
    assert [ended(jobs, job).status for job in (with_gpu, without)] == ["finished"] * 2
    assert lent_to == ["a visitor"] and jobs.arguments(without)["device"] == "cpu"


def test_time_that_is_over_is_a_failure_that_can_be_resumed(jobs: Jobs) -> None:
    executor = RequestExecutor(jobs, lend)
    job = executor.start("crash", {"signal": 9, "device": "cuda"})
    state = ended(jobs, job)
    assert state.status == "failed" and state.error is not None and state.error["code"] == "E_WORKER"
    assert "GPU" in state.error["what"] and "GPU task aborted" in state.error["why"] and state.resumable


def test_wrong_arguments_are_refused_at_once(executor: Executor) -> None:
    with pytest.raises(AmalgamError):
        executor.start("count", {"wrong": 1})
    assert executor.jobs.states() == []


# -- which one ----------------------------------------------------------------------------------------


def test_the_place_decides(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    assert isinstance(choose_executor(jobs), BackgroundExecutor)
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    asked: list[int] = []
    spaces = types.ModuleType("spaces")
    spaces.GPU = lambda duration: asked.append(duration) or lend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spaces", spaces)
    executor = choose_executor(jobs)
    assert isinstance(executor, RequestExecutor) and executor.on_gpu is lend and asked == [60]


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, ui.executors; print([m for m in ('torch', 'gradio', 'plotly', 'transformers') if m in sys.modules])"
    root = Path(__file__).resolve().parent.parent.parent
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True) == "[]\n"
