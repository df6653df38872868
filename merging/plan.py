"""The plan: everything about a merge that can be known without reading a single weight.

From the recipe and the headers of the inputs: which tensors, from which sources, with which coefficients, into
which file at which offset; how many bytes will be read and written, how much disk and memory that takes and
about how long; every reason not to start and everything worth a warning. A plan is made in seconds for any
model, and its hash is what an interrupted merge is resumed by.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .alignment import COPIED_AS_THEY_ARE, Alignment, align_tensors
from .checkpoints.checkpoint import Checkpoint, open_checkpoint
from .checkpoints.disk import free_bytes, no_space
from .checkpoints.header import ITEM_BITS, build_header
from .checkpoints.hub import Resolved, resolve
from .checkpoints.layout import is_tied
from .checkpoints.output import OutputFile
from .checkpoints.side_files import OutputFacts, SideFiles, collect
from .errors import AmalgamError, InputError, OutputError, RecipeError
from .methods import BLOCK, Method
from .methods.selection import memory
from .recipe import Recipe
from .recipe_parts import RESERVED
from .tensor_plan import DTYPES, TensorPlan, check_whole_model, is_included, plan_tensor, shape_problems
from .vocabularies import VocabularyPlan, align_vocabularies

NUMERICS = 1
"""Raised whenever the same plan would give other bytes: unfinished work of an older version is not resumed."""
SHARD_SIZE = 5_000_000_000
Find = Callable[[str], Resolved]
"""From what a recipe calls a model to where it lies."""
INTERPRETER = 230_000_000
"""Anonymous memory of Python with torch, in bytes (measured; see benchmarks)."""


@dataclass
class Plan:
    """See the module. Made by ``make_plan``; executed by ``engine.run``."""

    recipe: Recipe
    models: dict[str, Checkpoint]
    paths: dict[str, str]
    """Model key -> what was opened: a folder, or ``org/name@commit``."""
    tensors: list[TensorPlan]
    files: list[OutputFile]
    alignment: Alignment
    vocabulary: VocabularyPlan
    side_files: SideFiles
    """Configuration, tokenizer and the like, ready to be written."""
    blockers: list[AmalgamError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    shard_size: int = SHARD_SIZE

    # -- what it costs --------------------------------------------------------------------------------

    @property
    def bytes_read(self) -> int:
        return sum(t.bytes_read() for t in self.tensors)

    @property
    def bytes_written(self) -> int:
        return sum(f.size for f in self.files)

    def memory(self, threads: int) -> int:
        """Peak anonymous memory in bytes: the interpreter, each worker's buffers for one block, and what it takes to
        find thresholds."""
        inputs = max((len(t.inputs()) for t in self.tensors), default=1)
        widest = max((ITEM_BITS[s.dtype] // 8 for t in self.tensors for s in t.inputs()), default=2)
        element = 4 if widest <= 2 else 8
        buffers = 2 * threads * BLOCK * (inputs * (widest + 4 * element) + 10 * element)
        scanned = [t for t in self.tensors if t.method and t.method.passes > 1]
        in_one = sum(t.numel for t in scanned if t.method and t.method.whole_model() is not None)
        largest = max((t.numel for t in scanned), default=0)
        searches = memory(in_one, inputs, element) if in_one else threads * memory(largest, inputs, element)
        return INTERPRETER + buffers + (searches if scanned else 0)

    def seconds(self, threads: int) -> float:
        """A rough estimate of the time on a CPU: arithmetic shared by the threads, and bytes at 1 GB/s."""
        work = (
            sum(t.numel * len(t.inputs()) * t.method.nanoseconds * t.method.passes for t in self.tensors if t.method)
            * 1e-9
        )
        return (
            2
            + 0.001 * len(self.tensors)
            + work / max(1, threads)
            + (self.bytes_read / 4 + self.bytes_written * 2) / 1e9 / min(2, max(1, threads))
        )

    # -- what identifies it ---------------------------------------------------------------------------

    @property
    def hash(self) -> str:
        """SHA-256 over everything that decides about the output's bytes. Two equal hashes, one result."""
        facts = {
            "numerics": NUMERICS,
            "recipe": json.loads(self.recipe.canonical_json()),
            "inputs": {key: model.identity() for key, model in self.models.items()},
            "vocabulary": self.vocabulary.digest,
            "side_files": {
                name: hashlib.sha256(content).hexdigest() for name, content in self.side_files.files.items()
            },
            "files": [[f.name, f.size, hashlib.sha256(f.header).hexdigest()] for f in self.files],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def resume_key(self, device: str) -> str:
        """What unfinished work must have in common to be gone on with: the plan, and the kind of device, since another
        one may round the last bit of a function differently."""
        kind = device.split(":")[0]
        return self.hash if kind == "cpu" else hashlib.sha256(f"{self.hash} {kind}".encode()).hexdigest()

    # -- what it says ---------------------------------------------------------------------------------

    def coefficients(self) -> list[dict[str, Any]]:
        """Effective coefficients: tensors with equal ones together, as {expert: value} and the tensors' names."""
        by_method: dict[int, tuple[Method, list[str]]] = {}
        for tensor in self.tensors:
            if tensor.method is not None:  # tensors with the same parameters share one object
                by_method.setdefault(id(tensor.method), (tensor.method, []))[1].append(tensor.name)
        groups: dict[tuple, list[str]] = {}
        for method, names in by_method.values():
            groups.setdefault(_describe(method), []).extend(names)
        return [
            {
                "tensors": len(names),
                "examples": names[:3],
                "shared": dict(shared),
                "experts": [dict(e) for e in experts],
                "effective": list(effective) if effective else None,
            }
            for (shared, experts, effective), names in groups.items()
        ]

    def as_dict(self, out: Path | None = None, threads: int = 1) -> dict[str, Any]:
        """Everything as JSON values (without the table of tensors)."""
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            counts[tensor.action] = counts.get(tensor.action, 0) + 1
        disk_free, blockers = free_bytes(_existing(out)) if out else None, list(self.blockers)
        if out and disk_free is not None and disk_free < self.bytes_written:
            blockers.append(no_space(out, self.bytes_written))
        return {
            "method": self.recipe.method,
            "models": {
                key: {
                    "opened": self.paths[key],
                    "kind": model.kind,
                    "tensors": len(model.tensors),
                    "bytes": sum(s.numel * ITEM_BITS[s.dtype] // 8 for s in model.tensors.values()),
                }
                for key, model in self.models.items()
            },
            "tensors": counts,
            "parameters": sum(t.numel for t in self.tensors),
            "dtypes": _tally(t.dtype for t in self.tensors),
            "files": {f.name: f.size for f in self.files},
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "disk_free": disk_free,
            "memory": self.memory(threads),
            "seconds": round(self.seconds(threads), 1),
            "threads": threads,
            "coefficients": self.coefficients(),
            "notes": self.alignment.notes,
            "warnings": self.warnings,
            "blockers": [{"code": b.code, "what": b.what, "why": b.why, "fix": b.fix} for b in blockers],
            "hash": self.hash,
        }

    def close(self) -> None:
        for model in self.models.values():
            model.close()

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_plan(
    recipe: Recipe,
    *,
    shard_size: int = SHARD_SIZE,
    offline: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    find: Find | None = None,
) -> Plan:
    """Open the inputs and plan the merge. Models of the Hub are downloaded first (``progress``: bytes done, bytes in
    all, file), unless ``find`` says where models lie: for a plan that is looked at and not run. Errors about one model
    are raised; what does not fit between models is collected in ``blockers``."""
    with _no_garbage_collection():
        return _make_plan(recipe, shard_size, find or partial(resolve, offline=offline, progress=progress))


def _make_plan(recipe: Recipe, shard_size: int, find: Find) -> Plan:
    models, paths, warnings = _open_models(recipe, find)
    try:
        alignment = align_tensors(recipe, models)
        taking_part = {t.name for t in alignment.tensors if not t.keep and is_included(recipe, t)}
        vocabulary = align_vocabularies(recipe, models, alignment, taking_part)
        tensors = [plan_tensor(recipe, tensor, tensor.name in taking_part) for tensor in alignment.tensors]
        blockers: list[AmalgamError] = [*alignment.problems, *shape_problems(alignment, taking_part)]
        if not tensors and not blockers:
            blockers.append(RecipeError("E_RECIPE_INPUTS", "There is nothing to merge.", "The models have no tensors."))
        check_whole_model(alignment, tensors)
        files = lay_out(tensors, shard_size)
        side_files = _side_files(recipe, models, tensors, alignment, vocabulary)
        alignment.notes += side_files.notes
        plan = Plan(
            recipe, models, paths, tensors, files, alignment, vocabulary, side_files, blockers, shard_size=shard_size
        )
        plan.warnings += [*warnings, *_warnings(plan)]
        return plan
    except BaseException:
        for model in models.values():
            model.close()
        raise


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A plan of 60,000 tensors is a million small objects that all live on; looking through them for cycles again and
    again would take a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def open_models(
    recipe: Recipe, offline: bool = False, progress: Callable[[int, int, str], None] | None = None
) -> tuple[dict[str, Checkpoint], dict[str, str], list[str]]:
    """All models of a recipe, opened, by ``Model.key``; what each reference was resolved to; and warnings."""
    return _open_models(recipe, partial(resolve, offline=offline, progress=progress))


def _open_models(recipe: Recipe, find: Find) -> tuple[dict[str, Checkpoint], dict[str, str], list[str]]:
    warnings: list[str] = []
    models: dict[str, Checkpoint] = {}
    paths: dict[str, str] = {}
    plain: dict[str, Checkpoint] = {}
    try:
        for model in recipe.model_list:
            if model.model not in plain:
                found = find(model.model)
                plain[model.model] = open_checkpoint(found.path, model.model)
                paths[model.model] = found.reference
                warnings += found.warnings
            if model.adapter is None:
                models[model.key] = plain[model.model]
                continue
            found = find(model.adapter)
            models[model.key] = open_checkpoint(found.path, model.key, base=plain[model.model])
            if models[model.key].kind != "adapter":  # else its base would be ignored
                raise InputError(
                    "E_ADAPTER",
                    f"{model.adapter} is not an adapter.",
                    "It has no adapter_config.json.",
                    "If it is a whole model, name it as model: and leave adapter: out.",
                )
            paths[model.key] = f"{paths[model.model]}+{found.reference}"
            warnings += found.warnings
        return models, {key: paths[key] for key in models}, warnings
    except BaseException:
        for checkpoint in (*plain.values(), *models.values()):
            checkpoint.close()
        raise


# -- files --------------------------------------------------------------------------------------------------------


def lay_out(tensors: list[TensorPlan], shard_size: int) -> list[OutputFile]:
    """Shards of at most ``shard_size`` bytes (a larger tensor has one of its own), names and headers final."""
    if shard_size < 1_000_000:
        raise OutputError(
            "E_OUTPUT_NAME",
            f"A shard size of {shard_size} bytes is too small.",
            "",
            "Give at least 1MB, for example --shard-size 5GB.",
        )
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    files = []
    for i, shard in enumerate(shards):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        header, entries = build_header([(t.name, t.dtype, t.shape) for t in shard], {"format": "pt"})
        files.append(OutputFile(name, header, entries, len(header) + sum(t.nbytes for t in shard)))
    return files


def index_file(files: list[OutputFile]) -> bytes | None:
    """model.safetensors.index.json of a sharded model; None for a single file."""
    if len(files) == 1:
        return None
    table = {name: file.name for file in files for name in file.entries}
    total = sum(entry.nbytes for file in files for entry in file.entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def _side_files(
    recipe: Recipe, models: dict[str, Checkpoint], tensors: list[TensorPlan], alignment: Alignment,
    vocabulary: VocabularyPlan,
) -> SideFiles:  # fmt: skip
    """Configuration, tokenizer and templates of the output; see ``checkpoints/side_files.py``."""
    keys = list(models)
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if tensor.dtype not in COPIED_AS_THEY_ARE:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel
    dtype = max(sizes, key=lambda d: sizes[d], default="F32")
    facts = OutputFacts(
        dtype={code: name for name, code in DTYPES.items()}.get(dtype, "float32"),
        tied=_tied(models[keys[0]].config, alignment),
        rows=vocabulary.rows,
        blocks=[source.block or 0 for source in alignment.blocks] if recipe.slices is not None else None,
    )
    template: str | int = recipe.chat_template
    named = None if template in RESERVED else recipe.model_named(recipe.chat_template)
    if named is not None:
        template = keys.index(named.key)
    folders = [m.base.path if m.base is not None and key == keys[0] else m.path for key, m in models.items()]
    return collect(
        folders,
        keys,
        facts,
        0,
        keys.index(vocabulary.tokenizer) if vocabulary.tokenizer else None,
        vocabulary.added,
        template,
    )


def _tied(config: dict[str, Any] | None, alignment: Alignment) -> bool | None:
    """What config.json must say about the head: untied if the output has one; None if it is no language model."""
    if alignment.has_head:
        return False
    return True if is_tied(config, [t.name for t in alignment.tensors]) else None


# -- words --------------------------------------------------------------------------------------------------------


def _describe(method: Method) -> tuple:
    effective = method.coefficients()
    return (_items(method.shared), tuple(_items(e) for e in method.experts), tuple(effective) if effective else None)


def _items(parameters: Any) -> tuple:
    return tuple(sorted(parameters.model_dump(by_alias=True).items()))


def _tally(values: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def _warnings(plan: Plan) -> list[str]:
    found = []
    types = {s.dtype for t in plan.tensors if t.action == "merge" for s in t.inputs()}
    if len(types) > 1:
        exact = "float32" if types <= {"F16", "BF16"} else "float64"
        found.append(f"The inputs have different data types ({', '.join(sorted(types))}); arithmetic is in {exact}.")
    digests: dict[str, str] = {}
    for key, model in plan.models.items():
        same = json.dumps(model.instance(), sort_keys=True)
        if same in digests:
            found.append(f"{key} and {digests[same]} are the same files.")
        digests.setdefault(same, key)
    if (
        plan.recipe.method_class.uses_base
        and plan.recipe.base is not None
        and all(t.action == "copy" for t in plan.tensors)
    ):
        found.append("Nothing is merged: every tensor is a copy. Check weights, lambda and include.")
    return found


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path
