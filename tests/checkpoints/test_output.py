"""OutputFolder without accidents: what it publishes, what it refuses, and what it resumes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors import safe_open

from merging.checkpoints import disk
from merging.checkpoints import output as output_module
from merging.checkpoints.journal import Journal, read_journal
from merging.checkpoints.manifest import read_manifest, seal
from merging.checkpoints.output import OutputFile, OutputFolder
from merging.checkpoints.output_rules import check_layout, work_folder
from merging.errors import AmalgamError, OutputError, VerificationError
from tests.checkpoints.output_cases import (
    MANIFEST,
    PLAN,
    SIDE_FILES,
    content,
    differences,
    expected_files,
    fill,
    layout,
    produce,
)


def refused(code: str, call: Callable[[], object]) -> AmalgamError:
    with pytest.raises(AmalgamError) as caught:
        call()
    assert caught.value.code == code, caught.value
    assert caught.value.what and caught.value.fix
    return caught.value


# ------------------------------------------------------------------------------------------- publishing


def test_publishes_exactly_the_model(tmp_path: Path) -> None:
    final = produce(tmp_path / "model")
    assert final == tmp_path / "model"
    assert differences(final) == ""
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_the_manifest_states_every_file_and_tensor(tmp_path: Path) -> None:
    final = produce(tmp_path / "model")
    manifest = json.loads((final / "manifest.json").read_bytes())
    expected = expected_files()
    assert manifest["files"] == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in expected.items()
    }
    entries = {entry.name: (file.name, entry) for file in layout() for entry in file.entries.values()}
    assert manifest["tensors"] == {
        name: {
            "file": file,
            "dtype": "F16",
            "shape": list(entry.shape),
            "sha256": hashlib.sha256(content(name, entry.nbytes)).hexdigest(),
        }
        for name, (file, entry) in entries.items()
    }
    assert {key: manifest[key] for key in MANIFEST} == MANIFEST
    assert manifest["plan_hash"] == PLAN


def test_safetensors_reads_it(tmp_path: Path) -> None:
    final = produce(tmp_path / "model")
    for file in layout():
        with safe_open(final / file.name, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == set(file.entries)
            for name, entry in file.entries.items():
                array = opened.get_tensor(name)
                assert (array.dtype, array.shape) == (np.float16, entry.shape)
                assert array.tobytes() == content(name, entry.nbytes)


def test_transformers_loads_it(tmp_path: Path) -> None:
    import transformers

    from merging.checkpoints.header import build_header
    from tests.tiny_models import make

    model = make("llama")
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    header, entries = build_header([(n, "F32", tuple(t.shape)) for n, t in state.items()], {"format": "pt"})
    size = len(header) + sum(entry.nbytes for entry in entries.values())
    with OutputFolder.open(tmp_path / "model", [OutputFile("model.safetensors", header, entries, size)], PLAN) as out:
        for name, tensor in state.items():
            data = tensor.numpy().tobytes()
            out.write(name, 0, memoryview(data))
            out.complete(name, xxhash.xxh3_128_hexdigest(data))
        out.add("config.json", model.config.to_json_string().encode())
        final = out.finish({})
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all((loaded.state_dict()[name] == tensor).all() for name, tensor in state.items())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_mode_bits_are_those_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        final = produce(tmp_path / "model")
    finally:
        os.umask(before)
    assert final.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in final.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("seed", range(4))
def test_order_and_size_of_the_writes_do_not_matter(tmp_path: Path, seed: int) -> None:
    """All pieces of all tensors in random order, from four threads, in odd sizes."""
    random, files = np.random.default_rng(seed), layout()
    entries = [entry for file in files for entry in file.entries.values()]
    pieces = []
    left = {entry.name: 0 for entry in entries}
    for entry in entries:
        cuts = [0, *sorted(random.integers(0, entry.nbytes + 1, 5).tolist()), entry.nbytes]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            pieces.append((entry, start, stop))
            left[entry.name] += 1
    random.shuffle(pieces)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not pieces:
                    return
                entry, start, stop = pieces.pop()
            data = content(entry.name, entry.nbytes)
            out.write(entry.name, start, memoryview(data)[start:stop])
            with lock:
                left[entry.name] -= 1
                last = left[entry.name] == 0
            if last:
                out.complete(entry.name, xxhash.xxh3_128_hexdigest(data))

    with OutputFolder.open(tmp_path / "model", files, PLAN, threads=1 + seed) as out:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, data in SIDE_FILES.items():
            out.add(name, b"an earlier version")
            out.add(name, data)
        out.finish(MANIFEST)
    assert differences(tmp_path / "model") == ""


def test_everything_is_on_the_disk_before_it_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut may come at any time: what the rename shows must have been synced, and then the rename."""
    events, fsync, rename = [], os.fsync, disk.rename_new

    def recorded_fsync(descriptor: int) -> None:
        events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        fsync(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(output_module, "rename_new", recorded_rename)
    final = produce(tmp_path / "model")
    model = f"{work_folder(final).name}/model"
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert set(before) == {model, *(f"{model}/{path.name}" for path in final.iterdir())}
    assert before[-2:] == [f"{model}/manifest.json", model]
    assert after == ["."]


def test_progress_of_finish_ends_at_its_total(tmp_path: Path) -> None:
    files, seen = layout(), []
    with OutputFolder.open(tmp_path / "model", files, PLAN) as out:
        fill(out, files)
        out.finish({}, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(2 * file.size - len(file.header) for file in files)
    assert all(0 <= done <= total for done, total in seen)


def test_a_system_without_the_linux_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_fallocate", "_renameat2", "_sync_file_range"):
        monkeypatch.setattr(disk, name, None)
    assert differences(produce(tmp_path / "model")) == ""


def test_a_relative_path_survives_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = layout()
    with OutputFolder.open("model", files, PLAN) as out:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        fill(out, files)
        for name, data in SIDE_FILES.items():
            out.add(name, data)
        out.finish({})
    assert differences(tmp_path / "model") == ""


# -------------------------------------------------------------------------------------------- refusing


@pytest.mark.parametrize(
    "name",
    ["..", "a/..", "/", "", ".", "a\nb", "a\0b", "a\x7f", "\u202egnp", "\u2028", "\udc80"]
    + ["x" * 201, "ü" * 101, ".model.partial"],
)
def test_names_that_are_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused("E_OUTPUT_NAME", lambda: OutputFolder.open(Path(name), layout(), PLAN))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 200, "ü" * 100, "модель 🧪 v1.0", ".hidden", "-f", "a#?%&", "CON", "x."])
def test_names_that_are_fine(tmp_path: Path, name: str) -> None:
    produce(tmp_path / "new" / "parent" / name)
    assert differences(tmp_path / "new" / "parent" / name) == ""


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link", "link to a folder"])
def test_an_existing_name_is_refused_and_untouched(tmp_path: Path, kind: str) -> None:
    final = tmp_path / "model"
    {
        "folder": lambda: final.mkdir(),
        "file": lambda: final.write_text("mine"),
        "dangling link": lambda: final.symlink_to("nowhere"),
        "link to a folder": lambda: final.symlink_to(tmp_path),
    }[kind]()
    before = os.lstat(final)
    refused("E_OUTPUT_EXISTS", lambda: OutputFolder.open(final, layout(), PLAN))
    assert os.lstat(final) == before
    assert os.listdir(tmp_path) == ["model"]


def test_the_message_says_when_there_is_nothing_left_to_do(tmp_path: Path) -> None:
    produce(tmp_path / "model")
    error = refused("E_OUTPUT_EXISTS", lambda: OutputFolder.open(tmp_path / "model", layout(), PLAN))
    assert "this very plan" in error.why
    error = refused("E_OUTPUT_EXISTS", lambda: OutputFolder.open(tmp_path / "model", layout(), "other"))
    assert "this very plan" not in error.why


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused("E_OUTPUT_WRITE", lambda: OutputFolder.open(tmp_path / "file" / "model", layout(), PLAN))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("other", ["a file", "a link"])
def test_a_work_folder_that_is_no_folder(tmp_path: Path, other: str) -> None:
    work = work_folder(tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    work.write_text("mine") if other == "a file" else work.symlink_to(tmp_path / "elsewhere")
    refused("E_OUTPUT_WRITE", lambda: OutputFolder.open(tmp_path / "model", layout(), PLAN))
    assert os.listdir(tmp_path / "elsewhere") == []


def test_the_same_name_twice_at_once(tmp_path: Path) -> None:
    files = layout()
    with OutputFolder.open(tmp_path / "model", files, PLAN) as out:
        error = refused("E_BUSY", lambda: OutputFolder.open(tmp_path / "model", files, PLAN))
        assert str(os.getpid()) in error.why
        refused("E_BUSY", lambda: OutputFolder.open(tmp_path / "model", files, "other", discard=True))
        fill(out, files)
        out.finish({})
    assert (tmp_path / "model").is_dir()


def test_a_lock_that_a_child_process_inherited_ends_with_close(tmp_path: Path) -> None:
    files = layout()
    with OutputFolder.open(tmp_path / "model", files, PLAN) as out:
        inherited = os.dup(out._lock)  # what a fork does
        fill(out, files, count=4)
    with OutputFolder.open(tmp_path / "model", files, PLAN) as out:
        assert len(out.done) == 4
    os.close(inherited)


def test_of_eight_threads_one_wins(tmp_path: Path) -> None:
    outcomes, barrier = [], threading.Barrier(8)

    def contend() -> None:
        barrier.wait()
        try:
            produce(tmp_path / "model")
            outcomes.append("published")
        except OutputError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("published") == 1
    assert set(outcomes) <= {"published", "E_BUSY", "E_OUTPUT_EXISTS"}
    assert differences(tmp_path / "model") == ""


def test_a_lock_whose_file_was_removed_meanwhile_is_worth_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder finished and removed the folder between our open and our lock; another one made it anew."""
    flock, calls = disk.fcntl.flock, []

    def removed(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / "work" / "lock").unlink()
        if len(calls) == 2:
            (tmp_path / "work" / "lock").unlink()
            (tmp_path / "work" / "lock").touch()

    monkeypatch.setattr(disk.fcntl, "flock", removed)
    descriptor = disk.lock_folder(tmp_path / "work")
    assert len(calls) == 3
    assert os.path.samestat(os.fstat(descriptor), os.stat(tmp_path / "work" / "lock"))
    monkeypatch.undo()
    refused("E_BUSY", lambda: disk.lock_folder(tmp_path / "work"))
    os.close(descriptor)


def test_a_name_that_is_taken_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    files, final = layout(), tmp_path / "model"
    for taken in (lambda: final.mkdir(), lambda: final.write_text("mine")):
        with OutputFolder.open(final, files, PLAN) as out:
            fill(out, files)
            taken()
            refused("E_OUTPUT_EXISTS", lambda: out.finish({}))  # noqa: B023
        assert final.is_file() or os.listdir(final) == []
        final.unlink() if final.is_file() else final.rmdir()
    with OutputFolder.open(final, files, PLAN) as out:
        assert len(out.done) == 12  # nothing has to be done again


@pytest.mark.parametrize("with_renameat2", [True, False])
def test_rename_never_replaces(tmp_path: Path, with_renameat2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_renameat2:
        monkeypatch.setattr(disk, "_renameat2", None)
    (tmp_path / "source").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("empty", "file", "link"):
        with pytest.raises(FileExistsError):
            disk.rename_new(tmp_path / "source", tmp_path / name)
    disk.rename_new(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").is_dir() and not (tmp_path / "source").exists()


def test_a_lost_race_without_renameat2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_renameat2", None)
    (tmp_path / "source").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(os.path, "lexists", lambda path: False)  # it appeared after the check
    for name in ("full", "file"):
        with pytest.raises(FileExistsError):
            disk.rename_new(tmp_path / "source", tmp_path / name)
    assert (tmp_path / "full" / "file").read_text() == (tmp_path / "file").read_text() == "mine"


# ------------------------------------------------------------------------------------ mistakes of callers


def test_misuse_is_refused(tmp_path: Path) -> None:
    files = layout()
    entry = max(files[0].entries.values(), key=lambda entry: entry.nbytes)
    with OutputFolder.open(tmp_path / "model", files, PLAN) as out:
        for offset, size in ((-1, 1), (entry.nbytes, 1), (0, entry.nbytes + 1)):
            with pytest.raises(ValueError, match="outside"):
                out.write(entry.name, offset, memoryview(bytes(size)))
        for name in ("../x", "a/b", "..", "manifest.json", files[0].name, ""):
            with pytest.raises(ValueError, match="side file"):
                out.add(name, b"x")
        fill(out, files, count=3)
        with pytest.raises(ValueError, match="never completed"):
            out.finish({})
        fill(out, files)
        with pytest.raises(ValueError, match="finished"):
            out.complete(entry.name, "0" * 32)
        with pytest.raises(ValueError, match="finished"):
            out.write(entry.name, 0, memoryview(b"x"))
        with pytest.raises(ValueError, match="added here"):
            out.finish({"files": {}})
        for bad in ({"x": float("nan")}, {"x": {1: 2}}, {"x": "\ud800"}, {"x": object()}):
            with pytest.raises((ValueError, TypeError)):
                out.finish(bad)
        refused("E_MANIFEST", lambda: out.finish({"x": 10**50}))  # found when reading it back
        assert os.listdir(tmp_path) == [".model.partial"]
        out.finish({})
        out.close()  # once more does nothing
    assert os.listdir(tmp_path) == ["model"]


def test_a_layout_with_gaps_is_refused() -> None:
    file = layout(shards=1)[0]
    check_layout([file])
    entries = list(file.entries.values())
    for wrong in (
        OutputFile(file.name, file.header, file.entries, file.size + 8),
        OutputFile(file.name, file.header + b"        ", file.entries, file.size),
        OutputFile(file.name, file.header, {e.name: e for e in entries if e is not entries[3]}, file.size),
        OutputFile("a/b", file.header, file.entries, file.size),
        OutputFile("manifest.json", file.header, file.entries, file.size),
    ):
        with pytest.raises(ValueError):
            check_layout([wrong])
    with pytest.raises(ValueError):
        check_layout([file, file])


# ---------------------------------------------------------------------------------------------- resuming


def interrupted(final: Path, count: int = 8, plan: str = PLAN) -> Path:
    """Leave unfinished work with ``count`` of 12 tensors finished; returns its folder."""
    files = layout()
    with OutputFolder.open(final, files, plan) as out:
        fill(out, files, count=count)
    return work_folder(final)


def test_finished_tensors_are_kept(tmp_path: Path) -> None:
    interrupted(tmp_path / "model")
    files, seen = layout(), []
    with OutputFolder.open(
        tmp_path / "model", files, PLAN, progress=lambda done, total: seen.append((done, total))
    ) as out:
        assert len(out.done) == 8
        assert seen[-1][0] == seen[-1][1] > 0
        assert fill(out, files) == 4
        for name, data in SIDE_FILES.items():
            out.add(name, data)
        out.finish({})
    assert differences(tmp_path / "model") == ""


def test_hashing_again_can_be_cancelled_and_loses_nothing(tmp_path: Path) -> None:
    interrupted(tmp_path / "model")

    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        OutputFolder.open(tmp_path / "model", layout(), PLAN, progress=cancel)
    with OutputFolder.open(tmp_path / "model", layout(), PLAN) as out:
        assert len(out.done) == 8
        fill(out, layout())
        with pytest.raises(KeyboardInterrupt):
            out.finish({}, cancel)
    produce(tmp_path / "model")
    assert differences(tmp_path / "model") == ""


def test_work_without_a_finished_tensor_is_removed(tmp_path: Path) -> None:
    with OutputFolder.open(tmp_path / "model", layout(), PLAN) as out:
        out.write("block.5.weight", 0, memoryview(b"x"))
    assert os.listdir(tmp_path) == []


def test_a_flipped_bit_in_a_finished_tensor_is_noticed(tmp_path: Path) -> None:
    work = interrupted(tmp_path / "model")
    files = layout()
    name = "block.4.weight"
    file = next(file for file in files if name in file.entries)
    path, entry = work / "model" / file.name, file.entries[name]
    with path.open("r+b") as opened:
        opened.seek(entry.start + entry.nbytes // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 4]))
    with OutputFolder.open(tmp_path / "model", files, PLAN) as out:
        assert len(out.done) == 7 and name not in out.done
    produce(tmp_path / "model")
    assert differences(tmp_path / "model") == ""


def damage_weights(work: Path, change: Callable[[bytearray], None]) -> None:
    path = work / "model" / layout()[0].name
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    {
        "header overwritten": lambda work: damage_weights(work, lambda d: d.__setitem__(slice(0, 300), bytes(300))),
        "file cut off": lambda work: damage_weights(work, lambda d: d.__delitem__(slice(len(d) // 2, None))),
        "file too long": lambda work: damage_weights(work, lambda d: d.extend(bytes(999))),
        "file empty": lambda work: damage_weights(work, lambda d: d.clear()),
        "file removed": lambda work: (work / "model" / layout()[0].name).unlink(),
        "model removed": lambda work: shutil.rmtree(work / "model"),
        "stale side files": lambda work: (work / "model" / "old.safetensors").write_bytes(b"stale"),
        "lock removed": lambda work: (work / "lock").unlink(),
        "journal removed": lambda work: (work / "journal").unlink(),
        "only the journal left": lambda work: (shutil.rmtree(work / "model"), (work / "lock").unlink()),
    }.items(),
    ids=lambda case: case[0],
)
def test_damaged_work_still_gives_the_right_model(tmp_path: Path, damage: tuple[str, Callable[[Path], object]]) -> None:
    damage[1](interrupted(tmp_path / "model"))
    produce(tmp_path / "model")
    assert differences(tmp_path / "model") == ""


def lines(work: Path) -> list[bytes]:
    return (work / "journal").read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda lines: lines[:-1] + [lines[-1][:-9]], 7),
        (lambda lines: lines[:-1] + [lines[-1][:-1]], 7),
        (lambda lines: lines + [b"0"], 8),
        (lambda lines: lines + [b"garbage\n"] * 3, 8),
        (lambda lines: lines + [lines[3]], 8),
        (lambda lines: lines[:4] + [lines[5], lines[4]] + lines[6:], 3),
        (lambda lines: lines[:4] + lines[5:], 3),
        (lambda lines: lines[:4] + [b"\n"] + lines[4:], 3),
        (lambda lines: lines[:4] + [lines[4].replace(b"block", b"black")] + lines[5:], 3),
        (lambda lines: lines[:4] + [bytes(4096)] + lines[4:], 3),
        (lambda lines: lines[1:], 0),
        (lambda lines: [bytes([lines[0][0] ^ 1]) + lines[0][1:]] + lines[1:], 0),
        (lambda lines: [], 0),
        (lambda lines: [os.urandom(5000)], 0),
        (lambda lines: [b"[" * 100_000 + b"\n"], 0),
    ],
)
def test_a_damaged_journal_is_believed_up_to_the_damage(
    tmp_path: Path, damage: Callable[[list[bytes]], list[bytes]], kept: int
) -> None:
    work = interrupted(tmp_path / "model")
    (work / "journal").write_bytes(b"".join(damage(lines(work))))
    with OutputFolder.open(tmp_path / "model", layout(), PLAN) as out:
        assert len(out.done) == kept
        fill(out, layout(), count=1)
    contents = read_journal(work / "journal")  # what follows the damage is readable again
    assert contents.sound_bytes == (work / "journal").stat().st_size
    assert len(contents.claims) == kept + 1
    produce(tmp_path / "model")
    assert differences(tmp_path / "model") == ""


def test_every_bit_of_a_journal_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", PLAN)
    for number in range(3):
        journal.claim(f"t{number}", "0123456789abcdef" * 2)
    journal.close()
    raw = (tmp_path / "journal").read_bytes()
    whole = read_journal(tmp_path / "journal")
    assert (whole.plan, len(whole.claims), whole.sound_bytes) == (PLAN, 3, len(raw))
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "journal").write_bytes(flipped)
        contents = read_journal(tmp_path / "journal")
        before = raw[: bit // 8].count(b"\n")  # records in front of the flipped one
        assert len(contents.claims) == max(0, before - 1)
        assert contents.claims.items() <= whole.claims.items()
        assert contents.plan == (PLAN if before else None)


def test_claims_that_are_lies_are_not_believed(tmp_path: Path) -> None:
    work = interrupted(tmp_path / "model", count=2)
    journal = Journal(work / "journal", PLAN, read_journal(work / "journal"))
    for file in layout():
        for name in file.entries:
            journal.claim(name, xxhash.xxh3_128_hexdigest(b"never written"))
    journal.claim("no such tensor", "0" * 32)
    journal.close()
    with OutputFolder.open(tmp_path / "model", layout(), PLAN) as out:
        assert out.done == set()  # the later claim for a tensor counts


def test_another_plan_is_never_mixed_in(tmp_path: Path) -> None:
    work = interrupted(tmp_path / "model", plan="another plan")
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file() and path.name != "lock"}
    error = refused("E_RESUME", lambda: OutputFolder.open(tmp_path / "model", layout(), PLAN))
    assert "--restart" in error.fix and str(work) in error.what
    assert {path: path.read_bytes() for path in before} == before
    with OutputFolder.open(tmp_path / "model", layout(), PLAN, discard=True) as out:
        assert out.done == set()
    produce(tmp_path / "model")
    assert differences(tmp_path / "model") == ""


def test_another_plan_without_a_finished_tensor_is_not_worth_a_question(tmp_path: Path) -> None:
    work = interrupted(tmp_path / "model", plan="another plan")
    (work / "journal").write_bytes(lines(work)[0])
    produce(tmp_path / "model")
    assert differences(tmp_path / "model") == ""


def test_discard_starts_anew_with_the_same_plan_too(tmp_path: Path) -> None:
    interrupted(tmp_path / "model")
    with OutputFolder.open(tmp_path / "model", layout(), PLAN, discard=True) as out:
        assert out.done == set()


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    work = interrupted(tmp_path / "model")
    newer = read_journal_line(lines(work)[0]) | {"journal": 2, "something": "new"}
    (work / "journal").write_bytes(journal_line(newer) + b"a format that we do not know\n")
    error = refused("E_RESUME", lambda: OutputFolder.open(tmp_path / "model", layout(), PLAN))
    assert "version" in error.why
    produce_with_discard = OutputFolder.open(tmp_path / "model", layout(), PLAN, discard=True)
    produce_with_discard.close()


def read_journal_line(line: bytes) -> dict[str, object]:
    return json.loads(line[9:])


def journal_line(record: dict[str, object]) -> bytes:
    import zlib

    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


@pytest.mark.parametrize("discard", [False, True])
def test_foreign_files_in_the_work_folder_are_left_alone(tmp_path: Path, discard: bool) -> None:
    work = work_folder(tmp_path / "model")
    (work / "model").mkdir(parents=True)
    (work / "model" / "thesis.tex").write_text("mine")
    (work / "notes.txt").write_text("mine")
    refused("E_RESUME", lambda: OutputFolder.open(tmp_path / "model", layout(), PLAN, discard=discard))
    assert (work / "notes.txt").read_text() == (work / "model" / "thesis.tex").read_text() == "mine"


def test_leftovers_of_a_run_killed_after_publishing_are_removed(tmp_path: Path) -> None:
    work = interrupted(tmp_path / "model")
    journal = (work / "journal").read_bytes()
    produce(tmp_path / "model")
    work.mkdir()
    (work / "journal").write_bytes(journal)
    (work / "lock").write_text("1\n")
    refused("E_OUTPUT_EXISTS", lambda: OutputFolder.open(tmp_path / "model", layout(), PLAN))
    assert differences(tmp_path / "model") == ""


# ----------------------------------------------------------------------------------- bytes that went wrong


def test_bytes_that_differ_from_the_checksum_are_not_published(tmp_path: Path) -> None:
    files = layout()
    out = OutputFolder.open(tmp_path / "model", files, PLAN)
    fill(out, files, count=4)
    entry = [e for f in files for e in f.entries.values()][7]
    data = bytearray(content(entry.name, entry.nbytes))
    checksum = xxhash.xxh3_128_hexdigest(data)
    data[1000] ^= 16  # between the processor and the disk
    out.write(entry.name, 0, memoryview(data))
    out.complete(entry.name, checksum)
    with pytest.raises(VerificationError) as caught:  # at the latest when finishing; usually long before
        fill(out, files)
        out.finish({})
    assert caught.value.code == "E_VERIFY" and repr(entry.name) in caught.value.what
    out.close()
    assert not (tmp_path / "model").exists()
    with OutputFolder.open(tmp_path / "model", files, PLAN) as again:
        assert entry.name not in again.done and len(again.done) >= 4
    produce(tmp_path / "model")
    assert differences(tmp_path / "model") == ""


def test_a_side_file_that_changed_is_not_published(tmp_path: Path) -> None:
    files = layout()
    with OutputFolder.open(tmp_path / "model", files, PLAN) as out:
        fill(out, files)
        out.add("config.json", b"{}")
        (work_folder(tmp_path / "model") / "model" / "config.json").write_bytes(b"[]")
        refused("E_VERIFY", lambda: out.finish({}))
    assert not (tmp_path / "model").exists()


def test_after_a_failed_fsync_nothing_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel drops the dirty mark of pages that it failed to write: they read back well and are lost."""
    files = layout()
    with OutputFolder.open(tmp_path / "model", files, PLAN) as out:
        fill(out, files, count=4)  # not yet all of the first file, after which it is synced
        failing, original = out._descriptors[files[0].name], os.fsync

        def fsync(descriptor: int) -> None:
            if descriptor == failing:
                raise OSError(5, "Input/output error")
            original(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        error = refused("E_OUTPUT_WRITE", lambda: (fill(out, files), out.finish({})))
        assert "dmesg" in error.fix
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    produce(tmp_path / "model")
    assert differences(tmp_path / "model") == ""


# ---------------------------------------------------------------------------------------------- manifest


def test_a_manifest_reads_back_as_it_was(tmp_path: Path) -> None:
    content_ = {"a": 1, "b": {"ü": [1.5, None, True]}, "empty": {}, "files": {}, "tensors": {}, "c": -0.0}
    (tmp_path / "manifest.json").write_bytes(seal(content_))
    assert read_manifest(tmp_path) == content_
    assert list(read_manifest(tmp_path)) == list(content_)
