"""Merges on bad days: kills, changed inputs, full and read-only disks, no memory, somebody else at the same work.

Everything is real. Where that needs root and there is none, the test is skipped and says so. Whatever happens, there is
a typed error and no output, or the complete output; and the same merge, done again, ends well.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merging.checkpoints.output_rules import work_folder
from merging.checkpoints.verify import verify
from merging.engine import Progress, run
from merging.errors import AmalgamError, Cancelled, InputError, NumbersError, OutputError
from merging.plan import make_plan
from merging.recipe_yaml import to_yaml
from tests.engine_cases import CASES, ONE_OF_EACH_KIND, ROOT, Case, Zoo, make_zoo, recipe_for
from tests.small_checkpoints import family, llama_like, load, merge, planned, recipe, same_bits, save


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


# -- kills --------------------------------------------------------------------------------------------


def children_of(process: int) -> list[int]:
    """Its worker processes."""
    path = Path(f"/proc/{process}/task/{process}/children")
    return list(map(int, path.read_text().split())) if path.exists() else []


def runs(process: int) -> bool:
    """Does it still do anything? (A dead one may wait for somebody to ask how it died.)"""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("case", ONE_OF_EACH_KIND, ids=lambda case: case.id)
def test_kill_9_then_the_same_merge_again(zoo: Zoo, case: Case, tmp_path: Path) -> None:
    """The process that the user started, at a random time; its workers must not live on and write."""
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe_for(case, zoo.paths)))
    command = [
        sys.executable,
        "app.py",
        "merge",
        str(tmp_path / "recipe.yaml"),
        str(tmp_path / "out"),
        "--threads",
        "2",
    ]
    journal = work_folder(tmp_path / "out") / "journal"
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not journal.exists():
        time.sleep(0.001)
    time.sleep(random.Random(case.id).uniform(0, 0.3))
    workers = children_of(child.pid)
    child.kill()
    child.communicate()
    deadline = time.monotonic() + 10
    while any(map(runs, workers)):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.01)
    assert not (tmp_path / "out").exists() or verify(tmp_path / "out").ok
    if not (tmp_path / "out").exists():
        merge(recipe_for(case, zoo.paths), tmp_path / "out")
    assert same_bits(load(tmp_path / "out"), zoo.expected(case)) and verify(tmp_path / "out").ok


@pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED: workers are threads here")
@pytest.mark.parametrize("case", ONE_OF_EACH_KIND, ids=lambda case: case.id)
def test_a_worker_that_is_killed(zoo: Zoo, case: Case, tmp_path: Path) -> None:
    """As the system does when memory runs out. The error says so, and the same merge goes on."""
    errors: list[AmalgamError] = []

    def run_it(out: Path) -> None:
        try:
            merge(recipe_for(case, zoo.paths), out, threads=2)
        except AmalgamError as error:
            errors.append(error)

    before = set(multiprocessing.active_children())
    for attempt in range(10):  # on a busy machine the work may be done before we get to kill anybody
        out = tmp_path / str(attempt)
        merging = threading.Thread(target=run_it, args=(out,))
        merging.start()
        while merging.is_alive() and not set(multiprocessing.active_children()) - before:
            time.sleep(0.0005)
        for worker in list(set(multiprocessing.active_children()) - before)[:1]:
            worker.kill()
        merging.join(30)
        if errors:
            break
    assert [error.code for error in errors] == ["E_WORKER"] and "signal 9" in str(errors[0])
    assert not out.exists() and not set(multiprocessing.active_children()) - before
    merge(recipe_for(case, zoo.paths), out, threads=2)
    assert same_bits(load(out), zoo.expected(case))


@pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED: there is no fork")
def test_a_merge_inside_of_a_process_that_may_have_no_children(zoo: Zoo, tmp_path: Path) -> None:
    """Its workers are threads."""
    context = multiprocessing.get_context("fork")
    process = context.Process(
        target=merge, args=(recipe_for(CASES[2], zoo.paths), tmp_path / "out"), kwargs={"threads": 3}, daemon=True
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert same_bits(load(tmp_path / "out"), zoo.expected(CASES[2]))


# -- a world that does not keep still -----------------------------------------------------------------


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def _replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def _overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"12345")


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [_cut, _replace, _overwrite, _remove])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_input_that_changes_during_the_run(
    zoo: Zoo, tmp_path: Path, change: Callable[[Path], None], threads: int
) -> None:
    case = CASES[2]
    paths = [save(tmp_path / str(k), load(path)) for k, path in enumerate(zoo.paths)]
    changed: list[bool] = []

    def once(_: Progress) -> None:
        if not changed:
            changed.append(True)
            change(paths[2] / "model.safetensors")

    with pytest.raises(InputError) as raised:
        merge(recipe_for(case, paths), tmp_path / "out", on_progress=once, threads=threads)
    assert raised.value.code == "E_INPUT_CHANGED" and str(paths[2]) in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_an_input_that_changed_since_the_plan(zoo: Zoo, tmp_path: Path) -> None:
    paths = [save(tmp_path / str(k), load(path)) for k, path in enumerate(zoo.paths)]
    with planned(recipe_for(CASES[1], paths)) as plan:
        _overwrite(paths[1] / "model.safetensors")
        with pytest.raises(InputError) as raised:
            run(plan, tmp_path / "out", device="cpu")
    assert raised.value.code == "E_INPUT_CHANGED" and not (tmp_path / "out").exists()


def test_two_merges_into_one_name(zoo: Zoo, tmp_path: Path) -> None:
    started, finish, errors = threading.Event(), threading.Event(), []

    def wait(_: Progress) -> None:
        started.set()
        finish.wait(60)

    first = threading.Thread(target=lambda: merge(recipe_for(CASES[2], zoo.paths), tmp_path / "out", on_progress=wait))
    first.start()
    try:
        assert started.wait(60)
        for case in (CASES[2], CASES[1]):
            with pytest.raises(OutputError) as raised:
                merge(recipe_for(case, zoo.paths), tmp_path / "out", restart=True)
            errors.append(raised.value.code)
    finally:
        finish.set()
        first.join()
    assert errors == ["E_BUSY", "E_BUSY"]
    assert same_bits(load(tmp_path / "out"), zoo.expected(CASES[2]))
    with pytest.raises(OutputError) as raised:
        merge(recipe_for(CASES[2], zoo.paths), tmp_path / "out")
    assert raised.value.code == "E_OUTPUT_EXISTS"


@pytest.mark.parametrize("case", ONE_OF_EACH_KIND, ids=lambda case: case.id)
@pytest.mark.parametrize("moment", ["first block", "all computed"])
def test_cancelling_takes_less_than_two_seconds(zoo: Zoo, tmp_path: Path, case: Case, moment: str) -> None:
    stop, asked = threading.Event(), []

    def ask(progress: Progress) -> None:
        if not asked and (moment == "first block" or progress.done == progress.total):
            asked.append(time.monotonic())
            stop.set()

    with pytest.raises(Cancelled):
        merge(recipe_for(case, zoo.paths), tmp_path / "out", stop=stop, on_progress=ask, threads=2)
    assert time.monotonic() - asked[0] < 2
    assert not (tmp_path / "out").exists()
    stop.clear()
    merge(recipe_for(case, zoo.paths), tmp_path / "out", stop=stop)
    assert same_bits(load(tmp_path / "out"), zoo.expected(case))


def test_an_error_is_not_taken_for_the_users_wish_to_stop(tmp_path: Path) -> None:
    paths = family(tmp_path, llama_like(4), 1)
    state = load(paths[1])
    state["lm_head.weight"][0] = float("nan")
    save_file(state, paths[1] / "model.safetensors")
    stop = threading.Event()
    with pytest.raises(NumbersError):
        merge(recipe("linear", paths, parameters={"weight": 1}), tmp_path / "out", threads=3, stop=stop)
    assert not stop.is_set()


# -- the machine --------------------------------------------------------------------------------------


def test_too_little_memory(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as raised:
        merge(recipe_for(CASES[2], zoo.paths), tmp_path / "out", memory=10_000_000)
    assert raised.value.code == "E_MEMORY" and "--memory" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_system_that_gives_no_more_memory(tmp_path: Path) -> None:
    """In a process of its own that may not grow by more than a megabyte once everything is loaded."""
    code = """if True:
        import resource, sys
        from pathlib import Path
        import torch, merging.engine, merging.methods.pcb
        from merging.errors import AmalgamError
        from tests.small_checkpoints import family, planned, recipe
        folder = Path(sys.argv[1])
        paths = family(folder, {"w": torch.randn(1000, 700)}, 2)
        with planned(recipe("pcb", paths[1:], paths[0])) as plan:
            limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (1 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            try:
                merging.engine.run(plan, folder / "out", device="cpu", threads=3)
            except AmalgamError as error:
                print(error.code)
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("NOT TESTED: no /proc")
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (child.stdout, child.stderr) == ("E_MEMORY\n", "")


def test_a_device_that_is_not_there(zoo: Zoo, tmp_path: Path) -> None:
    for device in ("mps", "cuda:99", "abacus", ""):
        if device == "cuda:99" and torch.cuda.is_available():
            continue
        with pytest.raises(OutputError) as raised:
            merge(recipe_for(CASES[2], zoo.paths), tmp_path / "out", device=device)
        assert raised.value.code == "E_DEVICE"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts (or mounts again) a disk in memory with the given options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        remount = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", remount + options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"NOT TESTED: mount cannot be run: {error}")
        if done.returncode:
            pytest.skip(f"NOT TESTED: mounting is not permitted here: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_noticed_before_the_work(zoo: Zoo, small_disk: Callable[[str], Path]) -> None:
    disk, asked = small_disk("size=600k"), []
    with pytest.raises(OutputError) as raised:
        merge(recipe_for(CASES[2], zoo.paths), disk / "out", on_progress=asked.append)
    assert raised.value.code == "E_NO_SPACE" and asked == [] and not (disk / "out").exists()


def test_a_disk_that_fills_up_at_the_end(zoo: Zoo, small_disk: Callable[[str], Path]) -> None:
    """The weights find room, the manifest does not. With more room the same command ends well."""
    what = recipe_for(CASES[2], zoo.paths)
    with planned(what) as plan:
        room = plan.bytes_written // 4096 * 4 + 8
    disk = small_disk(f"size={room}k")
    for _ in range(2):
        with pytest.raises(OutputError) as raised:
            merge(what, disk / "out")
        assert raised.value.code == "E_NO_SPACE" and not (disk / "out").exists()
    result = merge(what, small_disk("size=20m") / "out")
    assert same_bits(load(result.folder), zoo.expected(CASES[2])) and verify(result.folder).ok


def test_a_read_only_disk(zoo: Zoo, small_disk: Callable[[str], Path]) -> None:
    small_disk("size=20m")
    disk, asked = small_disk("ro"), []
    with pytest.raises(OutputError) as raised:
        merge(recipe_for(CASES[2], zoo.paths), disk / "out", on_progress=asked.append)
    assert raised.value.code == "E_OUTPUT_WRITE" and asked == [] and list(disk.iterdir()) == []


def test_an_output_inside_of_an_input_is_an_ordinary_folder(tmp_path: Path) -> None:
    """But an input is never overwritten."""
    paths = family(tmp_path, llama_like(1), 1)
    what = recipe("ties", paths[1:], paths[0])
    with pytest.raises(AmalgamError) as raised:
        merge(what, paths[0])
    assert raised.value.code == "E_OUTPUT_EXISTS"
    merge(what, paths[0] / "merged")
    with make_plan(what) as plan:
        assert plan.blockers == []
