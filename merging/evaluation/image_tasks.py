"""Image tasks: a small YAML or JSON file that says how to read arrays from the ``.npz`` beside it.

The one idea: what the model sees is written down in the task, not guessed from the model. Pixels go in as

    (stored value · rescale_factor − image_mean) / image_std

with the names that transformers' image processors use; without them, values are taken as they are::

    kind: image
    arrays: digits.npz          # numpy.savez(…, images=…, labels=…), a file in the same folder
    layout: NHW                 # or NHWC, NCHW; needed only where the shape leaves it open
    rescale_factor: 0.125
    image_mean: 1               # a number, or one per channel
    image_std: 1
    clusters: writers           # optional: the array with a label per image for clustered errors
    split: validation           # optional, as in tasks.py

Labels are numbers of the model's outputs. Sizes must fit the model: nothing is resized or cropped.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merging.errors import RecipeError, TaskError
from merging.evaluation.tasks import MOST_ITEMS, Task, name_with_split, read_bytes, split_of

LARGEST_ARRAYS = 1 << 29  # bytes, in the file and unpacked
FIX = "docs/evaluation.md describes the format."


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    kind: Literal["image"]
    arrays: str = Field(pattern=r"^[^/\\]+\.npz$")
    images: str = "images"
    labels: str = "labels"
    clusters: str | None = None
    layout: Literal["NHW", "NHWC", "NCHW"] | None = None
    rescale_factor: float = Field(1.0, allow_inf_nan=False)
    image_mean: float | list[float] = 0.0
    image_std: float | list[float] = 1.0
    split: str = Field("", pattern="^[A-Za-z0-9_-]{0,40}$")


@dataclass(frozen=True, slots=True)
class ImageItem:
    """``line``: number of the image, from 1. ``id``: hash of its stored pixels and its label."""

    label: int
    line: int
    id: str
    cluster: str = ""


@dataclass(frozen=True, slots=True)
class Images:
    """Stored images [count, channels, height, width] and how they become pixels."""

    stored: np.ndarray
    rescale_factor: float
    mean: np.ndarray
    std: np.ndarray

    def pixels(self, items: Sequence[ImageItem]) -> np.ndarray:
        """float32 [items, channels, height, width], as the model sees them."""
        chosen = self.stored[[item.line - 1 for item in items]].astype(np.float64)
        return ((chosen * self.rescale_factor - self.mean) / self.std).astype(np.float32)


def read_image_task(path: Path) -> Task:
    """Read an image task.

    Raises:
        TaskError: ``E_TASK``, with file and line or image, for anything that is not as the module says, images that
            occur twice, and pixels that are not finite.
    """
    from merging.recipe_yaml import read_yaml

    raw = read_bytes(path, 1 << 16)
    try:
        document = read_yaml(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError:
        raise TaskError("E_TASK", f"{path} is not UTF-8 text.", "", FIX) from None
    except RecipeError as error:
        raise TaskError("E_TASK", error.what, "The text is not a task in YAML or JSON.", FIX) from None
    try:
        fields = _Fields.model_validate(document.data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = tuple(first["loc"][:1])
        line, _ = document.positions.get(place, (1, 1))
        name = f"the field {place[0]!r}: " if place else ""
        raise TaskError("E_TASK", f"{path}, line {line}: {name}{first['msg']}.", "", FIX) from None

    file = path.parent / fields.arrays
    packed = read_bytes(file, LARGEST_ARRAYS, "file of arrays")
    wanted = [fields.images, fields.labels, *([fields.clusters] if fields.clusters else [])]
    arrays = _unpack(file, packed, wanted)
    images = _images(file, arrays[fields.images], fields)
    clusters = arrays[fields.clusters] if fields.clusters else None
    items = _items(file, images, arrays[fields.labels], clusters)
    base = path.name.rpartition(".")[0]
    split = fields.split or split_of(base)
    name = name_with_split(base, split)
    digest = hashlib.sha256(raw + hashlib.sha256(packed).digest()).hexdigest()
    return Task(name, items, digest, "image_label", str(file), split, images)


def _unpack(file: Path, packed: bytes, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > LARGEST_ARRAYS:
            _refuse(file, f"it holds {size:,} bytes of arrays; {LARGEST_ARRAYS:,} may be", "Use a sample of it.")
        with np.load(io.BytesIO(packed), allow_pickle=False) as found:
            for name in wanted:
                if name not in found.files:
                    _refuse(file, f"it has no array {name!r}, only {', '.join(found.files)}")
            return {name: found[name] for name in wanted}
    except (ValueError, OSError, EOFError, MemoryError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        _refuse(file, f"it cannot be read as .npz ({type(error).__name__}: {str(error)[:200]})")


def _images(file: Path, stored: np.ndarray, fields: _Fields) -> Images:
    if stored.dtype.kind not in "uif" or stored.size == 0:
        _refuse(file, f"{fields.images!r} is no array of numbers with something in it ({stored.dtype}, {stored.shape})")
    layout = fields.layout or _layout(file, stored.shape)
    if stored.ndim != len(layout):
        _refuse(file, f"{fields.images!r} has the shape {stored.shape}, which is not {layout}")
    if layout == "NHW":
        stored = stored[:, None]
    elif layout == "NHWC":
        stored = stored.transpose(0, 3, 1, 2)
    if len(stored) > MOST_ITEMS:
        _refuse(file, f"it has more than {MOST_ITEMS:,} images", "Use a sample of it.")
    if stored.dtype.kind == "f" and not (finite := np.isfinite(stored).all(axis=(1, 2, 3))).all():
        _refuse(file, f"image {int(np.argmin(finite)) + 1} has pixels that are not finite numbers")
    per_channel = []
    for name, value in (("image_mean", fields.image_mean), ("image_std", fields.image_std)):
        array = np.atleast_1d(np.asarray(value, dtype=np.float64))
        if len(array) not in (1, stored.shape[1]) or not np.isfinite(array).all():
            _refuse(file, f"{name} must be one number, or one for each of the {stored.shape[1]} channels")
        per_channel.append(array[None, :, None, None])
    if (per_channel[1] == 0).any():
        _refuse(file, "image_std is 0")
    return Images(np.ascontiguousarray(stored), fields.rescale_factor, *per_channel)


def _layout(file: Path, shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        return "NHW"
    first, last = (len(shape) == 4 and shape[axis] in (1, 3) for axis in (1, -1))
    if first == last:
        _refuse(file, f"the shape {shape} does not say where the channels are", "State the layout: NHWC or NCHW.")
    return "NCHW" if first else "NHWC"


def _items(file: Path, images: Images, labels: np.ndarray, clusters: np.ndarray | None) -> tuple[ImageItem, ...]:
    count = len(images.stored)
    if labels.shape != (count,) or labels.dtype.kind not in "ui":
        _refuse(file, f"labels must be {count} whole numbers, one per image, not {labels.dtype} {labels.shape}")
    if clusters is not None and (clusters.shape != (count,) or clusters.dtype.kind not in "uiUS"):
        _refuse(file, f"clusters must be {count} numbers or texts, not {clusters.dtype} {clusters.shape}")
    items: list[ImageItem] = []
    seen: dict[bytes, int] = {}
    kind = f"{images.stored.dtype.str} {images.stored.shape[1:]}"
    for number, (image, label) in enumerate(zip(images.stored, labels.tolist(), strict=True), 1):
        if label < 0:
            _refuse(file, f"the label of image {number} is negative")
        content = hashlib.sha256(kind.encode() + image.tobytes()).digest()
        if (before := seen.setdefault(content, number)) != number:
            _refuse(file, f"image {number} was there before, as image {before}", "Remove one of them.")
        cluster = "" if clusters is None else str(clusters[number - 1])
        identity = hashlib.sha256(content + str(label).encode()).hexdigest()[:16]
        items.append(ImageItem(label, number, identity, cluster))
    return tuple(items)


def _refuse(file: Path, why: str, fix: str = FIX) -> NoReturn:
    raise TaskError("E_TASK", f"{file}: {why}.", "", fix) from None
