"""One face for everything that can be merged.

A ``Checkpoint`` is a table of named tensors, each a ``Source`` that can be read by element range with
positioned reads. It is the same for a folder with one or 300 shards, a single ``.safetensors`` file, and a
LoRA adapter on its base. What the table says comes from the headers of the weight files; an index that
contradicts them is an error, and so is every folder in which two readers could find two different models.

Opening reads headers only. Few descriptors stay open however many shards there are, and a file that is opened
again must still be the file that was opened first.
"""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from merging.checkpoints.files import open_error, shown
from merging.checkpoints.header import ITEM_BITS, Header, collector_paused, item_size
from merging.checkpoints.quantized import refuse_quantized, refuse_quantized_config
from merging.checkpoints.strict_json import read_json
from merging.checkpoints.weight_file import WeightFile
from merging.errors import InputError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LARGEST_CONFIG, LARGEST_INDEX = 8_000_000, 64_000_000

_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
_NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt)")


class Source(Protocol):
    """One tensor, readable by element range."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    numel: int

    def read(self, start: int, stop: int, out: memoryview) -> None:
        """Elements [start, stop) of the row-major tensor, as little-endian ``dtype`` bytes, into ``out``.

        Thread-safe. Raises InputError E_READ or E_INPUT_CHANGED.
        """


class FileSource:
    """A tensor as it lies in a file."""

    __slots__ = ("name", "dtype", "shape", "numel", "file", "offset", "size")

    def __init__(
        self, name: str, dtype: str, shape: tuple[int, ...], numel: int, file: WeightFile, offset: int
    ):
        self.name, self.dtype, self.shape, self.numel = name, dtype, shape, numel
        self.file, self.offset, self.size = file, offset, ITEM_BITS[dtype] // 8

    def read(self, start: int, stop: int, out: memoryview) -> None:
        out = check_range(self, start, stop, out)
        if out:
            self.file.read(self.offset + start * self.size, out)


def renamed(source: Source, name: str) -> Source:
    """The same tensor under another name."""
    if source.name == name:
        return source
    other = copy.copy(source)
    other.name = name
    return other


class RowsSource:
    """Rows of ``source`` in another order: row i is ``source`` row rows[i], or, where rows[i] < 0, row
    fallback_rows[i] of ``fallback``. Used for vocabularies whose token numbers differ.

    Both sources have the same dtype and the same shape after the first dimension. Raises ValueError if a row
    does not exist.
    """

    def __init__(
        self,
        source: Source,
        rows: np.ndarray,
        fallback: Source | None = None,
        fallback_rows: np.ndarray | None = None,
    ):
        rows = np.ascontiguousarray(rows, dtype=np.int64)
        other = (
            np.full_like(rows, -1)
            if fallback_rows is None
            else np.ascontiguousarray(fallback_rows, dtype=np.int64)
        )
        own = rows >= 0
        if not source.shape or other.shape != rows.shape or (rows >= source.shape[0]).any():
            raise ValueError(f"rows out of range for {source.name} {source.shape}")
        if not own.all():
            if fallback is None or (fallback.dtype, fallback.shape[1:]) != (source.dtype, source.shape[1:]):
                raise ValueError(f"no fallback that fits {source.name} {source.dtype} {source.shape}")
            needed = other[~own]
            if (needed < 0).any() or (needed >= fallback.shape[0]).any():
                raise ValueError(f"fallback rows out of range for {fallback.name} {fallback.shape}")
        self.name, self.dtype = source.name, source.dtype
        self.shape: tuple[int, ...] = (len(rows), *source.shape[1:])
        self.width = source.numel // source.shape[0] if source.shape[0] else 0
        self.numel = len(rows) * self.width
        self.sources = (source, fallback)
        self.which = (~own).astype(np.int8)
        self.rows = np.where(own, rows, other)
        # A run is a stretch of rows that lie one after another in one source: read in one go.
        breaks = (np.diff(self.rows) != 1) | (np.diff(self.which) != 0)
        self.run_starts = (
            np.concatenate([[0], np.flatnonzero(breaks) + 1]) if len(rows) else np.zeros(0, np.int64)
        )

    def read(self, start: int, stop: int, out: memoryview) -> None:
        out = check_range(self, start, stop, out)
        size = item_size(self.dtype)
        position = start
        while position < stop:
            row, column = divmod(position, self.width)
            run = int(np.searchsorted(self.run_starts, row, side="right"))
            run_end = int(self.run_starts[run]) if run < len(self.run_starts) else len(self.rows)
            end = min(stop, run_end * self.width)
            begin = int(self.rows[row]) * self.width + column
            source = self.sources[self.which[row]]
            assert source is not None
            part = out[(position - start) * size : (end - start) * size]
            source.read(begin, begin + end - position, part)
            position = end


def check_range(source: Source, start: int, stop: int, out: memoryview) -> memoryview:
    """``out`` as bytes; ValueError unless it is writable and exactly as long as elements [start, stop)."""
    if out.format != "B" or out.ndim != 1:
        out = out.cast("B")
    size = ITEM_BITS[source.dtype] // 8
    if not 0 <= start <= stop <= source.numel or len(out) != (stop - start) * size or out.readonly:
        raise ValueError(
            f"range [{start}, {stop}) into {len(out)} bytes does not fit {source.name} ({source.numel})"
        )
    return out


class Checkpoint:
    """A model on disk. Use as a context manager, or call ``close``."""

    def __init__(
        self,
        reference: str,
        path: Path,
        kind: str,
        tensors: dict[str, Source],
        config: dict[str, Any] | None,
        files: list[WeightFile],
        base: Checkpoint | None = None,
        settings: dict[str, Any] | None = None,
    ):
        self.reference, self.path, self.kind = reference, path, kind
        self.tensors, self.config, self.files = tensors, config, files
        self.base = base  # of an adapter; owned by whoever opened it
        self.settings = settings  # of an adapter: what enters its identity beside the weights

    def identity(self) -> dict[str, Any]:
        """What was opened, as JSON values that stay equal while the files do; part of the plan's hash."""
        result: dict[str, Any] = {"kind": self.kind, "files": [file.identity() for file in self.files]}
        if self.base is not None:
            result |= {"base": self.base.identity(), "settings": self.settings}
        return result

    def instance(self) -> list[Any]:
        """Which very files were opened, as JSON values: equal only for the same files on this machine, unchanged since.
        (``identity`` stays equal for copies, and is so too for files of one size that were written in one tick.)"""
        found: list[Any] = [self.kind]
        for file in self.files:
            path = os.path.realpath(file.path)
            found.append([path, *file.stamp, os.stat(path).st_ctime_ns])
        return [*found, self.base.instance(), self.settings] if self.base is not None else found

    def check_unchanged(self) -> None:
        """InputError E_INPUT_CHANGED if a weight file was modified, replaced or removed since opening."""
        for file in self.files:
            file.check_unchanged()
        if self.base is not None:
            self.base.check_unchanged()

    def close(self) -> None:
        """Give the descriptors back. Reading afterwards opens the files again."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: str | Path, reference: str = "", base: Checkpoint | None = None) -> Checkpoint:
    """Open a model folder, a ``.safetensors`` file, or an adapter folder; ``base`` is the model it changes.

    Raises InputError: E_NOT_FOUND, E_NOT_A_MODEL, E_NOT_SAFETENSORS, E_AMBIGUOUS, E_INDEX, E_PATH, E_JSON,
    E_QUANTIZED, E_ADAPTER, E_HEADER_*, E_READ, E_INPUT_CHANGED.
    """
    with collector_paused():
        return _open(Path(path), reference or str(path), base)


def _open(path: Path, reference: str, base: Checkpoint | None) -> Checkpoint:
    try:
        os.lstat(path)
        is_folder = path.is_dir()
        names = set(os.listdir(path)) if is_folder else set()
    except (OSError, ValueError) as error:
        raise open_error(path, error) from None
    if is_folder and ADAPTER_CONFIG in names:
        from merging.checkpoints.adapter import open_adapter

        return open_adapter(path, names, reference, base)
    if is_folder:
        shards = _shards(path, names)
        config = read_config(path, names)
    else:
        if _PICKLES.fullmatch(path.name):
            _pickles_only(path)
        shards = {path.name: None}
        folder = path.parent
        config = read_config(folder, {"config.json"} if os.path.lexists(folder / "config.json") else set())
    refuse_quantized_config(config, path)
    folder = path if is_folder else path.parent
    tensors, files = open_weights(folder, shards)
    return Checkpoint(reference, folder, "folder" if is_folder else "file", tensors, config, files)


def read_config(folder: Path, names: set[str]) -> dict[str, Any] | None:
    """``config.json`` of a folder whose file names are ``names``; None if there is none."""
    if "config.json" not in names:
        return None
    config = read_json(folder / "config.json", LARGEST_CONFIG)
    if type(config) is not dict:
        raise InputError(
            "E_JSON", f"{shown(folder / 'config.json')} is not an object.", "", "Restore the file."
        )
    return config


def _shards(folder: Path, names: set[str]) -> dict[str, set[str] | None]:
    """Weight file -> the tensors that the index puts there (None: whatever its header lists)."""
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if INDEX in names:
        return _read_index(folder, names, weights)
    if WEIGHTS in names:
        leftover = [name for name in weights if _NUMBERED.fullmatch(name)]
        if leftover:
            _ambiguous(folder, f"It has {WEIGHTS} and also {shown(leftover[0])}.")
        return {WEIGHTS: None}
    if any(_NUMBERED.fullmatch(name) for name in weights):
        raise InputError(
            "E_INDEX",
            f"{shown(folder)} has shards but no {INDEX}.",
            "",
            "Download the index, or give one file by its path.",
        )
    if weights:
        raise InputError(
            "E_NOT_A_MODEL",
            f"{shown(folder)} has no {WEIGHTS}.",
            f"It has {shown(', '.join(weights[:5]))}.",
            f"Give the path of the file, for example {shown(folder / weights[0])}.",
        )
    if any(_PICKLES.fullmatch(name) for name in names):
        _pickles_only(folder)
    raise InputError(
        "E_NOT_A_MODEL",
        f"{shown(folder)} holds no weights.",
        f"There is neither {WEIGHTS} nor {INDEX}.",
        "Check the path.",
    )


def _read_index(folder: Path, names: set[str], weights: list[str]) -> dict[str, set[str] | None]:
    where = folder / INDEX
    index = read_json(where, LARGEST_INDEX)
    table = index.get("weight_map") if type(index) is dict else None
    if type(table) is not dict or not table or not all(type(file) is str for file in table.values()):
        raise InputError(
            "E_INDEX", f"{shown(where)} has no weight_map from tensor to file.", "", "Restore the index."
        )
    shards: dict[str, set[str] | None] = {}
    for file in sorted(set(table.values())):
        if not _SHARD_NAME.fullmatch(file) or len(file) > 255:
            raise InputError(
                "E_PATH",
                f"{shown(where)} names the file {file!a:.200}.",
                "A shard is a plain .safetensors name without folders (letters, digits and . _ -).",
                "Do not use this model unless you know where it comes from.",
            )
        if file not in names:
            raise InputError(
                "E_INDEX", f"{shown(folder / file)} is missing.", f"{INDEX} needs it.", "Download it."
            )
        shards[file] = set()
    for tensor, file in table.items():
        shards[file].add(tensor)  # type: ignore[union-attr]
    families = {match[1] for match in map(_NUMBERED.fullmatch, shards) if match}
    for file in weights:
        match = _NUMBERED.fullmatch(file)
        if file not in shards and (file == WEIGHTS or (match and match[1] in families)):
            _ambiguous(
                folder,
                f"{shown(file)} is not named by {INDEX}: one of the two is left over from another model.",
            )
    return shards


def open_weights(
    folder: Path, shards: dict[str, set[str] | None]
) -> tuple[dict[str, Source], list[WeightFile]]:
    """Open weight files of ``folder``: file name -> the tensors that it must hold (None: any)."""
    tensors: dict[str, Source] = {}
    files: list[WeightFile] = []
    places: dict[str, str] = {}
    try:
        for name, expected in shards.items():
            file = WeightFile(folder / name)
            files.append(file)
            if expected is not None and expected != file.header.tensors.keys():
                _index_differs(folder, name, expected, file.header, places)
            refuse_quantized(file)
            for entry in file.header.tensors.values():
                source = FileSource(entry.name, entry.dtype, entry.shape, entry.numel, file, entry.start)
                tensors[entry.name] = source
                places[entry.name] = name
    except BaseException:
        for file in files:
            file.close()
        raise
    return tensors, files


def _index_differs(
    folder: Path, name: str, expected: set[str], header: Header, places: dict[str, str]
) -> NoReturn:
    extra, missing = sorted(header.tensors.keys() - expected), sorted(expected - header.tensors.keys())
    if extra and extra[0] in places:
        why = f"The tensor {extra[0]!a} is in {name} and in {places[extra[0]]}."
    elif extra:
        why = f"The tensor {extra[0]!a} is in {name}, where the index does not put it."
    else:
        why = f"The tensor {missing[0]!a} is not in {name}, where the index puts it."
    raise InputError(
        "E_INDEX",
        f"{shown(folder / INDEX)} contradicts the shards.",
        why,
        "Download the index and the shards again.",
    )


def _pickles_only(path: Path) -> NoReturn:
    raise InputError(
        "E_NOT_SAFETENSORS",
        f"{shown(path)} has weights only as Python pickles (.bin, .pt, .ckpt).",
        "Pickles can run code when they are opened, so they never are.",
        "Look for a safetensors version (on the Hub often revision refs/pr/1), or convert it yourself.",
    )


def _ambiguous(folder: Path, why: str) -> NoReturn:
    raise InputError(
        "E_AMBIGUOUS",
        f"{shown(folder)} holds several sets of weights.",
        why,
        "Move the files that do not belong there away.",
    )
