"""OutputFolder on bad days: real kills, full and read-only disks, lying and failing system calls.

Every fault must end in one of two states: the complete and verified model, or a typed error with nothing
visible and work that can be resumed. Where a test needs root or strace and has neither, it is skipped and
says so. ``python -m benchmarks.fault_runs`` does the same at length, to whole merges.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from merging.checkpoints import output as output_module
from merging.checkpoints.journal import read_journal
from merging.checkpoints.output import OutputFolder
from merging.checkpoints.output_rules import work_folder
from merging.checkpoints.verify import verify
from merging.errors import OutputError
from tests.checkpoints.output_cases import LARGER, PLAN, ROOT, differences, fill, layout, produce

WRITER = [sys.executable, "-m", "tests.checkpoints.output_cases"]
is_root = os.geteuid() == 0
needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="NOT TESTED: strace is not installed")


def start(command: str, final: Path, *options: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    arguments = [*before, *WRITER, command, str(final), *options]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(command: str, final: Path, *options: str, before: tuple[str, ...] = ()) -> str:
    """What the process printed; nothing may be on its standard error stream."""
    process = start(command, final, *options, before=before)
    out, err = process.communicate(timeout=120)
    assert err == "" or before, err
    return out


# --------------------------------------------------------------------------------------------- kill -9


class Observer(threading.Thread):
    """Looks at the final name again and again: it is absent, or a complete and verified model."""

    def __init__(self, final: Path):
        super().__init__(daemon=True)
        self.final, self.looks, self.wrong, self.stopping = final, 0, "", False

    def run(self) -> None:
        while not self.stopping:
            self.looks += 1
            if self.final.exists() and not verify(self.final).ok:
                self.wrong = str(verify(self.final).problems)
            time.sleep(0.0005)

    def __enter__(self) -> Observer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopping = True
        self.join()


@pytest.mark.parametrize("seed", range(6))
def test_kill_at_a_random_time_then_resume(tmp_path: Path, seed: int) -> None:
    final, chance, published = tmp_path / "model", random.Random(seed), False
    with Observer(final) as observer:
        for _ in range(2):  # a run, a resumed run; and a third is left in peace
            process = start("write", final, "0.002")
            assert process.stdout is not None
            if process.stdout.readline() == "open\n":
                time.sleep(chance.uniform(0, 0.3))
            process.kill()
            finished = process.communicate()[0].split("\n")[:-1]
            if final.exists():
                published = True  # killed between the rename and its last breath
                break
            # What was finished stays finished: the journal knows it, and the bytes are right.
            with OutputFolder.open(final, LARGER, PLAN) as resumed:
                assert set(finished) - {"done"} <= resumed.done
        last = run("write", final)
        assert last.startswith("E_OUTPUT_EXISTS") if published else last.endswith("done\n")
    assert differences(final, LARGER) == ""
    assert observer.wrong == "" and observer.looks > 20


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of fsyncs on a disk would take a minute."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    folder = memory / f"amalgam-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("fault", ["kill", "error"])
def test_every_single_call_to_the_system_may_fail(quick_disk: Path, fault: str) -> None:
    """The n-th open, write, fsync, fallocate, rename, unlink … fails, for all n; then it runs again."""
    result = json.loads(run("sweep", quick_disk, fault))
    failed = "-9" if fault == "kill" else "1"
    outcomes = result["outcomes"]
    assert set(outcomes) <= {
        f"{failed} then 0",  # nothing was visible; the next run finished the job
        f"{failed} then 1",  # it was published already, and the next run says so
        "2 then 1",  # published in spite of it: cleaning up failed, and the next run did it
        "0 then 1",  # the last run, without any fault
    }
    assert result["faults"] >= 50
    assert outcomes[f"{failed} then 0"] >= 45
    assert sum(count for outcome, count in outcomes.items() if outcome.endswith("then 1")) >= 3


# ------------------------------------------------------------------------------- system calls, by strace


def inject(rule: str) -> tuple[str, ...]:
    # With a filter strace need not stop the process at each of its calls; but then it sends no signals.
    quick = () if "signal" in rule else ("--seccomp-bpf",)
    return ("strace", "-f", *quick, f"--trace={rule.split(':')[0]}", "-o", "/dev/null", f"--inject={rule}")


@needs_strace
@pytest.mark.parametrize(
    "rule",
    [
        "pwrite64:error=EINTR:when=2+3",
        "fallocate:error=EOPNOTSUPP",
        "fallocate:error=EINTR:when=1",
        "renameat2:error=EINVAL",
        "renameat2:error=ENOSYS",
        "sync_file_range:error=EIO",
    ],
)
def test_faults_that_are_overcome(tmp_path: Path, rule: str) -> None:
    assert run("write", tmp_path / "model", before=inject(rule)).endswith("done\n")
    assert differences(tmp_path / "model", LARGER) == ""


@needs_strace
@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("pwrite64:retval=16384:when=20", "E_VERIFY"),  # the disk claims to have written and has not
        ("pwrite64:retval=100:when=20", "E_VERIFY"),
        ("pwrite64:error=EDQUOT:when=20", "E_NO_SPACE"),
        ("pwrite64:error=EIO:when=20", "E_OUTPUT_WRITE"),
        ("fallocate:error=ENOSPC:when=2", "E_NO_SPACE"),
        ("fsync:error=EIO:when=1", "E_OUTPUT_WRITE"),
        ("fsync:error=EIO:when=3", "E_OUTPUT_WRITE"),
        ("renameat2:error=EACCES", "E_OUTPUT_WRITE"),
        ("preadv,preadv2:error=EIO:when=6", "E_OUTPUT_WRITE"),
        ("flock:error=ENOLCK", "E_OUTPUT_WRITE"),
        ("renameat2:signal=KILL", ""),
        ("fsync:signal=KILL:when=4", ""),
    ],
)
def test_faults_that_end_in_an_error(tmp_path: Path, rule: str, code: str) -> None:
    final = tmp_path / "model"
    printed = run("write", final, before=inject(rule))
    assert f"\n{code}" in "\n" + printed and "\ndone\n" not in printed
    assert not final.exists()
    assert run("write", final).endswith("done\n")
    assert differences(final, LARGER) == ""


@pytest.mark.parametrize("call", ["pwrite", "write", "preadv"])
def test_short_reads_and_writes(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may do less than it was asked for, at any time."""
    original, chance = getattr(os, call), random.Random(7)

    def short(descriptor: int, data: object, *offset: int) -> int:
        if call == "preadv":
            data = [data[0][: max(1, chance.randrange(len(data[0]) + 1))]]  # type: ignore[index]
        else:
            data = memoryview(data)[: max(1, chance.randrange(len(data) + 1))]  # type: ignore[arg-type]
        return original(descriptor, data, *offset)

    monkeypatch.setattr(os, call, short)
    final = produce(tmp_path / "model")
    monkeypatch.undo()
    assert differences(final) == ""


# -------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not is_root or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("NOT TESTED: mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_too_little_room_is_said_before_anything_is_written(small_disk: Path) -> None:
    with pytest.raises(OutputError) as caught:
        OutputFolder.open(small_disk / "model", layout(largest=200_000), PLAN)
    assert caught.value.code == "E_NO_SPACE"
    assert "needs 1.7 MB; 1.0 MB are free" in caught.value.why
    assert os.listdir(small_disk) == []


def test_room_that_a_disk_only_claims_to_have(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quotas and other programs: statvfs promises the room, fallocate does not get it."""
    monkeypatch.setattr(output_module, "free_bytes", lambda path: 1 << 40)
    with pytest.raises(OutputError) as caught:
        OutputFolder.open(small_disk / "model", layout(largest=200_000), PLAN)
    assert caught.value.code == "E_NO_SPACE"
    assert os.listdir(small_disk) == []  # half of the room is not kept


def test_a_disk_that_fills_up_at_the_very_end(small_disk: Path) -> None:
    files, final = layout(largest=80_000), small_disk / "model"
    with OutputFolder.open(final, files, PLAN) as out:
        (small_disk / "other program").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 8192))
        fill(out, files)  # its room was taken at the start
        with pytest.raises(OutputError) as caught:
            out.add("tokenizer.json", bytes(100_000))
        assert caught.value.code == "E_NO_SPACE" and "are free" in caught.value.why
    assert not final.exists()
    (small_disk / "other program").unlink()
    with OutputFolder.open(final, files, PLAN) as out:
        assert len(out.done) == 12
    produce(final, files)
    assert differences(final, files) == ""


def test_a_journal_that_finds_no_room(small_disk: Path) -> None:
    """Half a record must not hide the later ones."""
    files, final = layout(tensors=400, largest=400), small_disk / "model"
    with OutputFolder.open(final, files, PLAN) as out:
        (small_disk / "other program").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
        with pytest.raises(OutputError) as caught:
            fill(out, files)
        assert caught.value.code == "E_NO_SPACE"
        first = len(out._finished)
        (small_disk / "other program").unlink()
        fill(out, files, count=5)
        assert len(read_journal(work_folder(final) / "journal").claims) == first + 5
    produce(final, files)
    assert differences(final, files) == ""


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    command = [*WRITER, "write", str(tmp_path / "model")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # noqa: E731
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, timeout=60)
    assert done.stdout.startswith("E_OUTPUT_WRITE") and "smaller shard size" in done.stdout, done
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------- places not to be written


def test_a_read_only_disk(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError) as caught:
        OutputFolder.open(small_disk / "model", layout(), PLAN)
    assert caught.value.code == "E_OUTPUT_WRITE" and "Read-only" in caught.value.why


def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    """The modes of the folders above are opened up so that only the last one can refuse."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    place = tmp_path / "theirs"
    place.mkdir(mode=0o555)
    printed = run("nobody" if is_root else "write", place / "model")
    assert printed.startswith("E_OUTPUT_WRITE") and "Permission denied" in printed
    assert os.listdir(place) == []


def test_a_place_where_nothing_can_be_made() -> None:
    for place in ("/proc/model", "/dev/null/model", "/proc/1/new/model"):
        with pytest.raises(OutputError) as caught:
            OutputFolder.open(place, layout(), PLAN)
        assert caught.value.code == "E_OUTPUT_WRITE"


# ---------------------------------------------------------------------------------------- two at one name


def test_two_processes_at_one_name(tmp_path: Path) -> None:
    final = tmp_path / "model"
    first = start("write", final, "0.05")
    assert first.stdout is not None and first.stdout.readline() == "open\n"
    printed = run("write", final)
    assert printed.startswith("E_BUSY") and f"process {first.pid}" in printed
    first.send_signal(signal.SIGSTOP)  # a process that hangs still holds its lock
    assert run("write", final).startswith("E_BUSY")
    first.kill()
    first.communicate()
    assert run("write", final).endswith("done\n")  # and one that died does not
    assert differences(final, LARGER) == ""


def test_many_processes_at_one_name(tmp_path: Path) -> None:
    processes = [start("write", tmp_path / "model") for _ in range(5)]
    printed = [process.communicate()[0] for process in processes]
    ends = ["done" if text.endswith("done\n") else text.split("\n")[0] for text in printed]
    assert ends.count("done") == 1 and set(ends) <= {"done", "E_BUSY", "E_OUTPUT_EXISTS"}
    assert differences(tmp_path / "model", LARGER) == ""
