"""Jobs: real worker processes that are stopped, killed, queued and looked at by several programs at once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from merging.checkpoints.disk import is_locked, take_lock
from merging.errors import AmalgamError
from merging.job_files import JobProgress, JobWriter, read_events, read_progress
from merging.jobs import ROOT, Jobs
from tests.odd_jobs import WORKER, ended, install, running, wait_until


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    install(monkeypatch)
    jobs = Jobs(tmp_path / "runs", WORKER)
    yield jobs
    for state in jobs.states():
        jobs.stop(state.id)
    for state in jobs.states():
        ended(jobs, state.id)


def refused(code: str, call: object, *arguments: object) -> AmalgamError:
    with pytest.raises(AmalgamError) as caught:
        call(*arguments)  # type: ignore[operator]
    assert caught.value.code == code
    return caught.value


def exists(process: int) -> bool:
    """Does it still do anything? (A dead one may wait for somebody to ask how it died.)"""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# -- one job ------------------------------------------------------------------------------------------


def test_a_job_from_start_to_end(jobs: Jobs) -> None:
    before = time.time()
    job = jobs.start("count", {"to": 30}, "  thirty\nsteps ")
    state = ended(jobs, job)
    assert (state.id, state.kind, state.title, state.status) == (job, "count", "thirty steps", "finished")
    assert state.result == {"from": 0, "to": 30} and state.error is None and state.pid is None
    assert before <= state.created <= (state.started or 0) <= (state.ended or 0) <= time.time()
    assert state.progress == JobProgress(30, 30, "items", "counting") and state.progress.share == 1
    assert jobs.arguments(job) == {"to": 30}
    events, cursor = jobs.events(job)
    assert [e["event"] for e in events] == ["waiting", "started", *["counted"] * 30, "finished"]
    assert jobs.events(job, cursor) == ([], cursor)


def test_events_come_once_each_while_they_happen(jobs: Jobs) -> None:
    job = jobs.start("count", {"to": 40})
    seen, cursor, looks = [], 0, 0
    while not seen or seen[-1]["event"] != "finished":
        new, cursor = jobs.events(job, cursor)
        seen += new
        looks += bool(new)
    assert [e["number"] for e in seen if e["event"] == "counted"] == list(range(40)) and looks > 3


def test_starting_is_quick_and_needs_nothing_heavy(jobs: Jobs, tmp_path: Path) -> None:
    jobs.start("count", {"to": 1})
    times = []
    for _ in range(3):
        began = time.perf_counter()
        jobs.start("count", {"to": 1})
        times.append(time.perf_counter() - began)
    assert min(times) < 0.5
    code = "import sys, merging.jobs, merging.job_worker; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


def test_the_progress_is_written_at_most_five_times_a_second(tmp_path: Path) -> None:
    with JobWriter(tmp_path) as writer:
        changes, last, began = 0, None, time.monotonic()
        while time.monotonic() - began < 0.9:
            writer.tell(JobProgress(int((time.monotonic() - began) * 1e6), 10**6, "bytes", "reading"))
            found = read_progress(tmp_path)
            assert found is not None
            changes += found != last
            last = found
        assert 2 <= changes <= 5
        writer.tell(JobProgress(10**6, 10**6, "bytes", "reading"))
        writer.end({"event": "finished", "result": {}})
        assert read_progress(tmp_path) == JobProgress(10**6, 10**6, "bytes", "reading")


def test_a_long_text_does_not_spoil_the_progress(tmp_path: Path) -> None:
    with JobWriter(tmp_path) as writer:
        writer.tell(JobProgress(1, 2, "items", "ü" * 5000))
    found = read_progress(tmp_path)
    assert found is not None and found.doing == "ü" * 60


def test_wrong_arguments_and_tokens_are_refused_before_there_is_a_job(jobs: Jobs) -> None:
    refused("E_RECIPE_FIELD", jobs.start, "count", {"wrong": 1})
    secret = "hf_" + "aB3" * 10
    error = refused("E_RECIPE_FIELD", jobs.start, "count", {"models": [["a", f"org/name?token={secret}", ""]]})
    assert secret not in str(error)
    assert not jobs.path.exists() or list(jobs.path.iterdir()) == []


def test_an_error_of_ours_is_typed_and_its_trace_is_in_the_log(jobs: Jobs) -> None:
    state = ended(jobs, jobs.start("crash", {}))
    assert state.status == "failed" and state.error is not None and state.error["code"] == "E_WORKER"
    assert "an error that nobody foresaw" in state.error["what"]
    assert "Traceback" in (jobs.folder(state.id) / "log.txt").read_text()


# -- stop ---------------------------------------------------------------------------------------------


def test_stop_and_resume(jobs: Jobs) -> None:
    job = jobs.start("count", {"to": 100, "every": 0.02})
    wait_until(lambda: len(jobs.events(job)[0]) > 5)
    began = time.monotonic()
    jobs.stop(job)
    state = ended(jobs, job)
    assert time.monotonic() - began < 2 and state.status == "cancelled"
    assert state.error is not None and state.error["code"] == "E_CANCELLED" and state.resumable
    jobs.resume(job)
    assert jobs.state(job).alive
    state = ended(jobs, job)
    assert state.status == "finished" and state.error is None and state.result is not None and state.result["from"] > 3
    numbers = [e["number"] for e in jobs.events(job)[0] if e["event"] == "counted"]
    assert numbers == list(range(100))
    refused("E_RESUME", jobs.resume, job)
    jobs.stop(job)
    assert jobs.state(job).status == "finished"


def test_one_that_does_not_listen_is_ended_with_all_it_started(jobs: Jobs) -> None:
    job = jobs.start("stubborn", {})
    wait_until(lambda: any(e["event"] == "deaf" for e in jobs.events(job)[0]))
    processes = [jobs.state(job).pid or 0, int((jobs.folder(job) / "child").read_text())]
    assert all(map(exists, processes))
    began = time.monotonic()
    jobs.stop(job)
    state = ended(jobs, job)
    assert time.monotonic() - began < 2.5 and state.status == "cancelled"
    wait_until(lambda: not any(map(exists, processes)), 2)


def test_stop_at_once(jobs: Jobs) -> None:
    """Before the worker has looked around."""
    job = jobs.start("count", {"to": 1000})
    jobs.stop(job)
    state = ended(jobs, job)
    assert state.status == "cancelled" and state.error is not None and state.error["code"] == "E_CANCELLED"


def test_stop_while_it_waits(jobs: Jobs) -> None:
    first = jobs.start("count", {"to": 1000})
    running(jobs, first)
    second = jobs.start("count", {"to": 1})
    wait_until(lambda: jobs.state(second).pid)
    jobs.stop(second)
    state = ended(jobs, second, 2)
    assert state.status == "cancelled" and state.started is None
    jobs.resume(second)
    jobs.stop(first)
    assert ended(jobs, second).status == "finished"


# -- kills --------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_says_by_which_signal(jobs: Jobs) -> None:
    job = jobs.start("count", {"to": 1000})
    state = running(jobs, job)
    assert state.pid is not None
    os.kill(state.pid, signal.SIGKILL)
    state = ended(jobs, job, 5)
    assert state.status == "failed" and state.error is not None and state.error["code"] == "E_WORKER"
    assert "signal 9" in state.error["what"] and "memory" in state.error["why"] and "Resume" in state.error["fix"]
    assert "signal 11" in (ended(jobs, jobs.start("crash", {"signal": signal.SIGSEGV})).error or {})["what"]


def test_everything_is_killed(jobs: Jobs) -> None:
    """Both processes at once, as at a power cut: nobody is left who could say anything, and the lock tells."""
    job = jobs.start("count", {"to": 1000})
    state = running(jobs, job)
    wait_until(lambda: len(jobs.events(job)[0]) > 5)
    keeper = int((jobs.folder(job) / "lock").read_text())
    assert state.pid is not None and keeper != state.pid
    os.kill(keeper, signal.SIGKILL)
    state = ended(jobs, job, 5)
    assert state.status == "failed" and state.error is not None and state.error["code"] == "E_WORKER"
    assert state.resumable and state.ended is not None and state.pid is None
    wait_until(lambda: not is_locked(jobs.folder(job) / "lock"))
    with open(jobs.folder(job) / "events.jsonl", "ab") as file:
        file.write(b'{"time": 1, "event": "cou')  # as a kill in the middle of a line leaves it
    before, cursor = jobs.events(job)
    assert before[-1]["event"] == "counted"
    jobs.resume(job)
    jobs.stop(job)
    ended(jobs, job)
    after, _ = jobs.events(job, cursor)
    assert [e["event"] for e in after][0] == "waiting" and after[-1]["event"] == "cancelled"


def test_a_number_of_a_process_that_is_in_use_again_fools_nobody(jobs: Jobs) -> None:
    job = jobs.start("count", {"to": 1000})
    running(jobs, job)
    keeper = int((jobs.folder(job) / "lock").read_text())
    os.kill(keeper, signal.SIGKILL)
    ended(jobs, job, 5)
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        (jobs.folder(job) / "lock").write_text(f"{os.getpid()}\n")
        assert jobs.state(job).status == "failed"
        jobs.stop(job)
        assert jobs.state(job).status == "failed"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == []


# -- several jobs, several programs -------------------------------------------------------------------


def another_app(jobs: Jobs, kind: str, arguments: dict) -> str:
    command = [*WORKER, "app", str(jobs.path), kind, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.strip()


def test_one_at_a_time_in_the_order_of_start_across_programs(jobs: Jobs) -> None:
    first = jobs.start("count", {"to": 1000})
    running(jobs, first)
    others = [jobs.start("count", {"to": 3}), another_app(jobs, "count", {"to": 3}), jobs.start("count", {"to": 3})]
    states = {state.id: state.status for state in jobs.states()}
    assert states == {first: "running", **dict.fromkeys(others, "waiting")}
    for job in others:
        assert exists(wait_until(lambda job=job: jobs.state(job).pid))
    jobs.stop(first)
    last = [ended(jobs, job) for job in others]
    assert [state.status for state in last] == ["finished"] * 3
    spans = [(state.started or 0, state.ended or 0) for state in [jobs.state(first), *last]]
    assert spans == sorted(spans)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    wait_until(lambda: list((jobs.path / ".turns").iterdir()) == [])


def test_one_in_the_queue_that_is_killed_holds_up_nobody(jobs: Jobs) -> None:
    first = jobs.start("count", {"to": 1000})
    running(jobs, first)
    second, third = jobs.start("count", {"to": 3}), jobs.start("count", {"to": 3})
    os.kill(wait_until(lambda: jobs.state(second).pid), signal.SIGKILL)
    ended(jobs, second, 5)
    jobs.stop(first)
    assert ended(jobs, third).status == "finished" and jobs.state(second).status == "failed"


def test_a_job_outlives_the_program_that_started_it(jobs: Jobs) -> None:
    job = another_app(jobs, "count", {"to": 100, "every": 0.02})
    assert running(jobs, job).status == "running"
    assert [state.id for state in Jobs(jobs.path).states()] == [job]
    jobs.stop(job)
    assert ended(jobs, job, 2).status == "cancelled"


# -- bad folders, full disks --------------------------------------------------------------------------


def test_foreign_and_damaged_folders_are_listed_or_passed_over(jobs: Jobs) -> None:
    assert jobs.states() == []
    good = jobs.start("count", {"to": 1})
    ended(jobs, good)
    names = [f"20200101-00000{n}-0123456{n}" for n in range(8)]
    for name in [*names, "holiday", "20200101"]:
        (jobs.path / name).mkdir()
    (jobs.path / names[1] / "job.json").write_text("{")
    (jobs.path / names[2] / "job.json").write_text('{"kind": 5}')
    (jobs.path / names[3] / "job.json").mkdir()
    os.mkfifo(jobs.path / names[4] / "job.json")
    (jobs.path / names[5] / "job.json").symlink_to("/etc/passwd")
    os.mkfifo(jobs.path / names[6] / "events.jsonl")
    (jobs.path / names[6] / "job.json").write_bytes((jobs.folder(good) / "job.json").read_bytes())
    (jobs.path / "20200101-000009-01234569").symlink_to(jobs.folder(good))
    (jobs.path / "20200101-000008-01234568").write_text("a file")
    states = {state.id: state for state in jobs.states()}
    assert set(states) == {good, *names[1:7]} and states[good].status == "finished"
    for name in names[1:6]:
        assert states[name].status == "failed" and states[name].error and not states[name].resumable
    assert states[names[6]].error == {**(states[names[6]].error or {}), "code": "E_WORKER"}
    for wrong in ("", "..", "../x", "holiday", names[0], "20200101-000009-01234569", "x" * 5000, "a\0b"):
        refused("E_NOT_FOUND", jobs.state, wrong)


def test_random_damage_never_stops_the_list(jobs: Jobs) -> None:
    job = jobs.start("count", {"to": 20})
    ended(jobs, job)
    chance, folder = random.Random(4), jobs.folder(job)
    files = {name: (folder / name).read_bytes() for name in ("job.json", "events.jsonl", "progress", "lock")}
    values = [b"1e999", b"null", b"-1", b'"x"', b"[]", b"{}", b"\xff", b"\0", b"NaN", b"[" * 3000, b""]
    for _ in range(250):
        name = chance.choice(list(files))
        data = files[name]
        start = chance.randrange(len(data))
        damaged = data[:start] + chance.choice(values) + data[start + chance.choice([0, 1, 8, len(data)]) :]
        (folder / name).write_bytes(damaged)
        (state,) = jobs.states() + jobs.states(removed=True)
        assert state.id == job and isinstance(state.error, dict | None) and isinstance(state.result, dict | None)
        assert all(type(event["time"]) in (int, float) for event in jobs.events(job, chance.randrange(-9, 9999))[0])
        (folder / name).write_bytes(data)
    assert jobs.state(job).status == "finished"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("NOT TESTED: mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_a_typed_failure(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a byte is free when the job has to say so: the room was taken before."""
    install(monkeypatch)
    jobs = Jobs(small_disk / "runs", WORKER)
    job = jobs.start("fill", {})
    state = ended(jobs, job)
    assert state.status == "failed" and state.error is not None and state.error["code"] == "E_NO_SPACE"
    assert jobs.events(job)[0][-1]["event"] == "failed"  # its own last word, no guess
    refused("E_NO_SPACE", jobs.start, "count", {"to": 1})
    assert [state.id for state in jobs.states()] == [job]
    (jobs.path / "filler").unlink()
    state = ended(jobs, jobs.start("fill", {"signal": signal.SIGKILL}))
    assert state.error is not None and "signal 9" in state.error["what"]
    (jobs.path / "filler").unlink()
    assert ended(jobs, jobs.start("count", {"to": 1})).status == "finished"


def test_only_whole_lines_are_events(tmp_path: Path) -> None:
    with JobWriter(tmp_path) as writer:
        writer.event({"event": "one"})
    path = tmp_path / "events.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"time": 1, "event": "two"')
    events, cursor = read_events(tmp_path)
    assert [e["event"] for e in events] == ["one"] and cursor == len(whole)
    with open(path, "ab") as file:
        file.write(b"}\n\0\0\0\n[]\n")
    assert [e["event"] for e in read_events(tmp_path, cursor)[0]] == ["two"]
    path.write_bytes(whole + b'{"to')
    with JobWriter(tmp_path) as writer:
        writer.event({"event": "three"})
    assert [e["event"] for e in read_events(tmp_path)[0]] == ["one", "three"]


# -- keeping ------------------------------------------------------------------------------------------


def test_titles_tags_notes_and_soft_deletion(jobs: Jobs) -> None:
    one, two = jobs.start("count", {"to": 1}, "one"), jobs.start("count", {"to": 1}, "two")
    for job in (one, two):
        ended(jobs, job)
    jobs.change(one, title="first\x07", tags=["good", "good", " ", "b\nc"], note="a\nnote")
    jobs.change(one, tags=None)
    state = jobs.state(one)
    assert (state.title, state.tags, state.note) == ("first", ["good", "b c"], "a\nnote")
    assert [state.id for state in jobs.states()] == [two, one]
    jobs.remove(one)
    assert [state.id for state in jobs.states()] == [two] and [s.id for s in jobs.states(removed=True)] == [one]
    jobs.restore(one)
    assert len(jobs.states()) == 2 and jobs.purge() == []
    jobs.remove(two)
    assert jobs.purge() == [two] and [state.id for state in jobs.states()] == [one]
    assert sorted(p.name for p in jobs.path.iterdir() if not p.name.startswith(".")) == [one]


def test_what_is_at_work_is_neither_removed_nor_resumed(jobs: Jobs) -> None:
    job = jobs.start("count", {"to": 1000})
    refused("E_BUSY", jobs.remove, job)
    refused("E_BUSY", jobs.resume, job)
    assert jobs.state(job).alive


def test_a_lock_that_is_looked_at_can_be_taken(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "lock")
    held = take_lock(tmp_path / "lock")
    assert held is not None and is_locked(tmp_path / "lock") and take_lock(tmp_path / "lock") is None
    os.close(held)
    assert not is_locked(tmp_path / "lock")
