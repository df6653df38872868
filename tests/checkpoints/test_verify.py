"""verify finds every change of a finished model, names it, and is silent when there is none."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merging.checkpoints.manifest import DIGEST, seal
from merging.checkpoints.verify import verify
from merging.errors import InputError, VerificationError
from tests.checkpoints.output_cases import LARGER, SIDE_FILES, expected_files, layout, produce


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 1.6 MB. Not to be changed: see ``model``."""
    return produce(tmp_path_factory.mktemp("finished") / "model", LARGER)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 50 kB. Whoever changes it changes it back."""
    return produce(tmp_path_factory.mktemp("small") / "model", layout(largest=4_000))


@pytest.fixture
def model(finished: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "model"))


def kinds(folder: Path) -> dict[str, str]:
    report = verify(folder)
    assert report.ok == (not report.problems)
    return {problem.name: problem.kind for problem in report.problems}


def test_an_untouched_model_is_fine(finished: Path) -> None:
    report = verify(str(finished))
    assert report.ok and report.problems == ()
    assert report.files == len(LARGER) + len(SIDE_FILES) and report.tensors == 40
    assert report.bytes == sum(map(len, expected_files(LARGER).values()))
    report.raise_if_bad()
    assert report.as_dict()["ok"] is True


def test_500_random_bit_flips_are_all_found(small: Path) -> None:
    """Over every file with equal chance, so that small files and the manifest get their share."""
    chance, paths = random.Random(0), sorted(path for path in small.iterdir() if path.stat().st_size)
    assert {"manifest.json", "config.json", "README.md"} < {path.name for path in paths}
    found: dict[str, int] = {}
    for number in range(500):
        path = paths[number % len(paths)]
        with path.open("r+b", buffering=0) as file:
            bit = chance.randrange(8 * path.stat().st_size)
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))
            problems = verify(small).problems
            kind = "manifest" if path.name == "manifest.json" else "changed"
            assert [(p.name, p.kind) for p in problems] == [(path.name, kind)], f"bit {bit} of {path.name}"
            file.seek(bit // 8)
            file.write(bytes([byte]))
        found[path.name] = found.get(path.name, 0) + 1
    assert verify(small).ok and min(found.values()) >= 500 // len(paths)


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """All of them, for a manifest that holds one of everything."""
    (tmp_path / "x").write_bytes(b"x")
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    tensors = {"t": {"file": "x", "dtype": "F32", "shape": [1, 0], "sha256": digest}}
    content = {
        "a": 1.5,
        "ü": [True, None, -0.0, 1e-7, "\n\u2028"],
        "files": {"x": {"size": 1, "sha256": digest}},
    }
    raw = seal({**content, "tensors": tensors})
    path = tmp_path / "manifest.json"
    path.write_bytes(raw)
    assert verify(tmp_path).ok
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert [problem.kind for problem in verify(tmp_path).problems] == ["manifest"], bit


def test_the_damaged_tensor_is_named(model: Path) -> None:
    file = LARGER[1]
    first, second = [entry for entry in file.entries.values() if entry.nbytes > 1000][3:5]
    with (model / file.name).open("r+b") as opened:
        opened.seek(first.start + first.nbytes - 1)
        opened.write(b"XY")  # the last byte of one and the first of the next
    (problem,) = verify(model).problems
    assert problem.kind == "changed" and problem.tensors == (first.name, second.name)
    assert repr(first.name) in problem.detail and repr(second.name) in str(problem)


def test_a_damaged_header_is_named(model: Path) -> None:
    with (model / LARGER[0].name).open("r+b") as opened:
        opened.seek(40)
        opened.write(b"\0")
    (problem,) = verify(model).problems
    assert "header" in problem.detail and problem.tensors == ()


def edit_manifest(model: Path, change: Callable[[dict[str, Any]], object], sealed: bool) -> None:
    """Change the content; with a digest that fits (somebody knows the format) or the old one."""
    content = json.loads((model / "manifest.json").read_bytes())
    digest = content.pop(DIGEST)
    change(content)
    raw = (
        seal(content) if sealed else seal(content).replace(json.loads(seal(content))[DIGEST].encode(), digest.encode())
    )
    (model / "manifest.json").write_bytes(raw)


WEIGHTS = LARGER[0].name
DAMAGES: dict[str, tuple[Callable[[Path], object], dict[str, str]]] = {
    "a missing file": (lambda m: (m / WEIGHTS).unlink(), {WEIGHTS: "missing"}),
    "a missing empty file": (lambda m: (m / "empty.txt").unlink(), {"empty.txt": "missing"}),
    "a truncated file": (lambda m: os.truncate(m / WEIGHTS, 5000), {WEIGHTS: "changed"}),
    "a file cut to nothing": (lambda m: os.truncate(m / WEIGHTS, 0), {WEIGHTS: "changed"}),
    "an extended file": (lambda m: os.truncate(m / "config.json", 999), {"config.json": "changed"}),
    "zeros of the right size": (
        lambda m: (m / WEIGHTS).write_bytes(bytes((m / WEIGHTS).stat().st_size)),
        {WEIGHTS: "changed"},
    ),
    "two files exchanged": (
        lambda m: (
            (m / "README.md").rename(m / "x"),
            (m / "config.json").rename(m / "README.md"),
            (m / "x").rename(m / "config.json"),
        ),
        {"README.md": "changed", "config.json": "changed"},
    ),
    "a stray model": (
        lambda m: (m / "model.safetensors").write_bytes(b""),
        {"model.safetensors": "unexpected"},
    ),
    "a stray folder": (lambda m: (m / "folder").mkdir(), {"folder": "unexpected"}),
    "a stray dangling link": (lambda m: (m / "link").symlink_to("nowhere"), {"link": "unexpected"}),
    "a hidden file": (lambda m: (m / ".hidden").write_bytes(b""), {".hidden": "unexpected"}),
    "a renamed file": (
        lambda m: (m / "README.md").rename(m / "readme.md"),
        {"README.md": "missing", "readme.md": "unexpected"},
    ),
    "a folder in place of a file": (
        lambda m: ((m / "README.md").unlink(), (m / "README.md").mkdir()),
        {"README.md": "unreadable"},
    ),
    "a pipe in place of a file": (
        lambda m: ((m / "README.md").unlink(), os.mkfifo(m / "README.md")),
        {"README.md": "unreadable"},
    ),
    "a link in place of a file": (
        lambda m: ((m / "README.md").rename(m.parent / "x"), (m / "README.md").symlink_to(m.parent / "x")),
        {"README.md": "unreadable"},
    ),
    "no manifest": (lambda m: (m / "manifest.json").unlink(), {"manifest.json": "manifest"}),
    "an empty manifest": (lambda m: os.truncate(m / "manifest.json", 0), {"manifest.json": "manifest"}),
    "a cut manifest": (lambda m: os.truncate(m / "manifest.json", 900), {"manifest.json": "manifest"}),
    "a manifest that is a list": (
        lambda m: (m / "manifest.json").write_text("[]"),
        {"manifest.json": "manifest"},
    ),
    "a manifest of brackets": (
        lambda m: (m / "manifest.json").write_text("[" * 100_000),
        {"manifest.json": "manifest"},
    ),
    "a manifest with other spaces": (
        lambda m: (m / "manifest.json").write_bytes((m / "manifest.json").read_bytes() + b"\n"),
        {"manifest.json": "manifest"},
    ),
    "a manifest in another notation": (
        lambda m: (m / "manifest.json").write_bytes((m / "manifest.json").read_bytes().replace(b"0.5", b"0.50")),
        {"manifest.json": "manifest"},
    ),
    "a manifest with a key twice": (
        lambda m: (m / "manifest.json").write_bytes(
            (m / "manifest.json").read_bytes().replace(b"{\n", b'{\n"version": "1",\n', 1)
        ),
        {"manifest.json": "manifest"},
    ),
    "an edited manifest": (
        lambda m: edit_manifest(m, lambda c: c.update(version="9"), sealed=False),
        {"manifest.json": "manifest"},
    ),
    "an edited and sealed manifest": (
        lambda m: edit_manifest(m, lambda c: c["files"].pop("README.md"), sealed=True),
        {"README.md": "unexpected"},
    ),
    "another digest for a file": (
        lambda m: edit_manifest(m, lambda c: c["files"]["README.md"].update(sha256="0" * 64), sealed=True),
        {"README.md": "changed"},
    ),
    **{
        f"a manifest that points to {name!r}": (
            lambda m, name=name: edit_manifest(
                m, lambda c: c["files"].update({name: c["files"]["README.md"]}), sealed=True
            ),
            {"manifest.json": "manifest"},
        )
        for name in ("../model/README.md", "/etc/passwd", "a\\b", "..", ".", "", "x\0", "manifest.json")
    },
    **{
        f"a manifest without sense ({number})": (
            lambda m, change=change: edit_manifest(m, change, sealed=True),
            {"manifest.json": "manifest"},
        )
        for number, change in enumerate(
            [
                lambda c: c.pop("files"),
                lambda c: c.pop("tensors"),
                lambda c: c.update(files=[]),
                lambda c: c["files"].update({"README.md": None}),
                lambda c: c["files"]["README.md"].update(size=-1.5),
                lambda c: c["files"]["README.md"].update(size=True),
                lambda c: c["files"]["README.md"].update(sha256=7),
                lambda c: c["tensors"]["block.3.weight"].update(file="nowhere"),
                lambda c: c["tensors"]["block.3.weight"].update(file=[]),
                lambda c: c["tensors"]["block.3.weight"].update(sha256=""),
                lambda c: c["tensors"].update(x=1),
            ]
        )
    },
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_found_and_nothing_else_is_reported(model: Path, case: str) -> None:
    damage, expected = DAMAGES[case]
    damage(model)
    assert kinds(model) == expected


def test_all_problems_are_reported_at_once(model: Path) -> None:
    for name in ("a missing file", "an extended file", "a stray model", "a stray folder"):
        DAMAGES[name][0](model)
    report = verify(model)
    assert [problem.kind for problem in report.problems] == ["changed", "unexpected", "missing", "unexpected"]
    assert len(report.as_dict()["problems"]) == 4 and json.dumps(report.as_dict())
    with pytest.raises(VerificationError) as caught:
        report.raise_if_bad()
    assert caught.value.code == "E_VERIFY" and caught.value.why.count("\n- ") == 3
    (model / "manifest.json").unlink()
    with pytest.raises(VerificationError) as caught:
        verify(model).raise_if_bad()
    assert caught.value.code == "E_MANIFEST"


def test_a_name_that_tries_to_spoil_the_message_is_escaped(model: Path) -> None:
    name = os.fsdecode(b"\x1b[31m\n\xff")
    (model / name).write_bytes(b"")
    (problem,) = verify(model).problems
    assert str(problem).isprintable() and json.dumps(verify(model).as_dict())


@pytest.mark.parametrize("what", ["absent", "file"])
def test_no_folder(tmp_path: Path, what: str) -> None:
    if what == "file":
        (tmp_path / what).write_text("x")
    with pytest.raises(InputError) as caught:
        verify(tmp_path / what)
    assert caught.value.code == "E_NOT_FOUND"


def test_progress_counts_every_byte_once(finished: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify(finished, lambda done, total: seen.append((done, total)))
    total = sum(map(len, expected_files(LARGER).values()))
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_it_stops_in_the_middle_of_a_file(tmp_path: Path) -> None:
    """Ctrl-C must not wait until the threads have hashed what remains of files of many GB."""
    final = produce(tmp_path / "model", layout(tensors=4, shards=1, largest=8_000_000))
    seen = []

    def cancel(done: int, total: int) -> None:
        seen.append(done)
        if done > 2_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(final, cancel)
    assert max(seen) < 6_000_000 < (final / "model-00001-of-00001.safetensors").stat().st_size


def test_a_model_in_the_cache_of_the_hub(finished: Path, tmp_path: Path) -> None:
    """There every file is a link to a blob, and that is fine."""
    repository = tmp_path / "models--somebody--merged"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(finished.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert verify(snapshot).ok
