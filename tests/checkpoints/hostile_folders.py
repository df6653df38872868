"""The second half of the hostile corpus: folders, links, pipes, indexes and side files.

Adds to ``hostile.CASES``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from tests.checkpoints.hostile import CASES, GOOD, LFS, Case, entry, file_bytes, sparse

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SOUND = file_bytes(GOOD, bytes(8))
OTHER = file_bytes({"b": entry(0, 8)}, bytes(8))
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS: dict[str, bytes] = {FIRST: SOUND, SECOND: OTHER}
MAP = {"a": FIRST, "b": SECOND}


def folder(
    name: str, code: str | None, tensors: int = 1, words: str = ""
) -> Callable[[Callable[[Path], object]], None]:
    """Register a function that fills a folder; it may return the path to open instead of the folder."""

    def register(fill: Callable[[Path], object]) -> None:
        def make(path: Path) -> Path:
            result = fill(path)
            return result if isinstance(result, Path) else path

        assert name not in CASES
        CASES[name] = Case(make, code, tensors, words)

    return register


def files(
    name: str, content: dict[str, bytes | str | object], code: str | None, tensors: int = 1, words: str = ""
) -> None:
    """A folder with these files; what is neither text nor bytes is written as JSON."""

    def fill(path: Path) -> None:
        for file, value in content.items():
            if not isinstance(value, bytes):
                value = (value if isinstance(value, str) else json.dumps(value)).encode()
            (path / file).write_bytes(value)

    folder(name, code, tensors, words)(fill)


def index(
    name: str, table: object, code: str | None, tensors: int = 2, words: str = "", **more: object
) -> None:
    content = {file.replace("__", "."): value for file, value in more.items()}
    files(name, {**SHARDS, INDEX: {"weight_map": table}, **content}, code, tensors, words)


# 1. Indexes that lead out of the folder, or to something that is not a file name.
index("two sound shards", MAP, None)
OUTSIDE = [
    "../outside.safetensors", "/etc/passwd.safetensors", "C:\\model.safetensors", "C:model.safetensors",
    "\\\\server\\share\\x.safetensors", "sub/model.safetensors", "./model.safetensors", "..\\x.safetensors",
    "model.bin", "model.safetensors/", "model.safetensors\0.bin", "", ".", "..", "~/x.safetensors",
    "$HOME.safetensors", "a b.safetensors", "é.safetensors", "x\n.safetensors", "file:///x.safetensors",
    "https://evil.example/x.safetensors",
    "model.safetensors?download=1", "-" * 260 + ".safetensors", "con\u202e.safetensors", "model.safetensors ",
]  # fmt: skip
for number, target in enumerate(OUTSIDE):
    index(
        f"index to {number}: {target[:40]!a}",
        {"a": target, "b": SECOND},
        "E_PATH",
        words="plain .safetensors name",
    )

# 2. Indexes that contradict the shards.
index("shard that is missing", {**MAP, "c": "model-00003-of-00003.safetensors"}, "E_INDEX", words="missing")
index("tensor in another shard", {"a": SECOND, "b": FIRST}, "E_INDEX", words="does not put it")
index("tensor in no shard", {**MAP, "c": FIRST}, "E_INDEX", words="'c' is not in")
index("tensor that the index lacks", {"a": FIRST, "x": SECOND}, "E_INDEX", words="'b'")
index("shard that the index lacks", {"a": FIRST}, "E_AMBIGUOUS", words=SECOND)
index("stale single file beside the index", MAP, "E_AMBIGUOUS", words=WEIGHTS, **{WEIGHTS: SOUND})
index("pickles beside the shards", MAP, None, **{"pytorch_model.bin": b"\x80\x04."})
index("another format beside the shards", MAP, None, **{"consolidated.safetensors": b"never read"})
files("index of one plain file", {WEIGHTS: SOUND, INDEX: {"weight_map": {"a": WEIGHTS}}}, None)
files(
    "tensor in two shards",
    {FIRST: SOUND, SECOND: SOUND, INDEX: {"weight_map": {"a": FIRST, "b": SECOND}}},
    "E_INDEX",
)
files(
    "one shard twice, index silent",
    {FIRST: SOUND, SECOND: SOUND, INDEX: {"weight_map": {"a": FIRST}}},
    "E_AMBIGUOUS",
)
files("old numbered shard beside a single file", {WEIGHTS: SOUND, FIRST: OTHER}, "E_AMBIGUOUS", words=FIRST)
files("shards without an index", dict(SHARDS), "E_INDEX", words="no model.safetensors.index.json")
files(
    "one shard is a Git-LFS pointer",
    {FIRST: SOUND, SECOND: LFS, INDEX: {"weight_map": MAP}},
    "E_NOT_SAFETENSORS",
)
files(
    "one shard is cut off", {FIRST: SOUND, SECOND: OTHER[:-1], INDEX: {"weight_map": MAP}}, "E_HEADER_LAYOUT"
)

# 3. Indexes that are not the JSON that they should be.
for name, raw, code in (
    ("list", "[]", "E_INDEX"),
    ("no weight_map", "{}", "E_INDEX"),
    ("empty weight_map", '{"weight_map":{}}', "E_INDEX"),
    ("weight_map as a list", '{"weight_map":["a"]}', "E_INDEX"),
    ("number as a file", '{"weight_map":{"a":1}}', "E_INDEX"),
    ("list as a file", '{"weight_map":{"a":["x"]}}', "E_INDEX"),
    ("duplicate tensor", f'{{"weight_map":{{"a":"{FIRST}","a":"{SECOND}","b":"{SECOND}"}}}}', "E_JSON"),
    ("NaN", f'{{"metadata":{{"total_size":NaN}},"weight_map":{json.dumps(MAP)}}}', "E_JSON"),
    ("1e999", f'{{"metadata":{{"total_size":1e999}},"weight_map":{json.dumps(MAP)}}}', "E_JSON"),
    ("brackets", "[" * 100_000, "E_JSON"),
    ("nothing", "", "E_JSON"),
    ("garbage", "\0\1\2", "E_JSON"),
    ("Git-LFS pointer", LFS.decode(), "E_JSON"),
    ("5 million values", '{"weight_map":[' + "0," * 5_000_000 + "0]}", "E_JSON"),
):
    files(f"index: {name}", {**SHARDS, INDEX: raw}, code)
index(
    "100,000 shards that are missing",
    {f"t{n}": f"model-{n:05d}-of-99999.safetensors" for n in range(100_000)},
    "E_INDEX",
)
CASES["index of 70 MB of zeros"] = Case(sparse(70_000_000, INDEX), "E_JSON", words="At most")


# 4. Things that are not files, and links.
@folder("pipe", "E_PATH", words="not a plain file")
def _(path: Path) -> None:
    os.mkfifo(path / WEIGHTS)


@folder("pipe given by its path", "E_PATH")
def _(path: Path) -> Path:
    os.mkfifo(path / "x.safetensors")
    return path / "x.safetensors"


@folder("pipe as a shard", "E_PATH")
def _(path: Path) -> None:
    (path / FIRST).write_bytes(SOUND)
    os.mkfifo(path / SECOND)
    (path / INDEX).write_text(json.dumps({"weight_map": MAP}))


@folder("pipe as the index", "E_PATH")
def _(path: Path) -> None:
    os.mkfifo(path / INDEX)


@folder("pipe as the configuration", "E_PATH")
def _(path: Path) -> None:
    (path / WEIGHTS).write_bytes(SOUND)
    os.mkfifo(path / "config.json")


@folder("folder instead of a file", "E_PATH")
def _(path: Path) -> None:
    (path / WEIGHTS).mkdir()


def link(name: str, target: str, code: str | None, words: str = "") -> None:
    @folder(name, code, words=words)
    def _(path: Path) -> None:
        (path.parent / "secret.safetensors").write_bytes(SOUND)
        os.symlink(target, path / WEIGHTS)


link("link to /dev/zero", "/dev/zero", "E_PATH", "is a link")
link("link to /dev/stdin", "/dev/stdin", "E_PATH")
link("link out of the folder", "../secret.safetensors", "E_PATH")
link("link to itself", WEIGHTS, "E_PATH")
link("link to nothing", "nothing", "E_PATH")
link("link to a folder", "..", "E_PATH")


@folder("ring of links", "E_PATH")
def _(path: Path) -> None:
    os.symlink("b", path / WEIGHTS)
    os.symlink(WEIGHTS, path / "b")


@folder("link to a pipe as the configuration", "E_PATH")
def _(path: Path) -> None:
    (path / WEIGHTS).write_bytes(SOUND)
    os.mkfifo(path / "pipe")
    os.symlink("pipe", path / "config.json")


@folder("link to a shard in the same folder", "E_PATH")
def _(path: Path) -> None:
    (path / "real.safetensors").write_bytes(SOUND)
    os.symlink("real.safetensors", path / WEIGHTS)


@folder("folder that is a link to itself", "E_PATH")
def _(path: Path) -> Path:
    os.symlink("loop", path / "loop")
    return path / "loop"


def cache(path: Path, target: str, blob: str = "0" * 64) -> Path:
    """A Hugging Face cache with one snapshot whose weights are a link to ``target``."""
    repository = path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / blob).write_bytes(SOUND)
    (path / "hub" / "secret").write_bytes(SOUND)
    other = path / "hub" / "models--other--private" / "blobs"
    other.mkdir(parents=True)
    (other / blob).write_bytes(SOUND)
    os.symlink(target, snapshot / WEIGHTS)
    return snapshot


for name, target, code in (
    ("to its blob", "../../blobs/" + "0" * 64, None),
    ("out of the cache", "../../../secret", "E_PATH"),
    ("to a blob of another repository", "../../../models--other--private/blobs/" + "0" * 64, "E_PATH"),
    ("through the blobs and out", "../../blobs/../../secret", "E_PATH"),
    ("to a missing blob", "../../blobs/" + "1" * 64, "E_NOT_FOUND"),
    ("to /dev/zero", "/dev/zero", "E_PATH"),
):
    folder(f"cache link {name}", code)(lambda path, target=target: cache(path, target))


SHARED = "ab/ab" + "c" * 62


def shared(path: Path, target: str) -> Path:
    """A cache with a blob for all its repositories; the snapshot is a link to ``target``."""
    snapshot = cache(path, target)
    blob = path / "hub" / "blobs" / SHARED
    blob.parent.mkdir(parents=True)
    blob.write_bytes(SOUND)
    os.symlink("../../blobs/" + SHARED, snapshot.parent.parent / "blobs" / ("e" * 64))
    return snapshot


folder("cache link to the blob shared by all", None)(lambda path: shared(path, "../../blobs/" + "e" * 64))
folder("cache link past its own blobs", "E_PATH")(lambda path: shared(path, "../../../blobs/" + SHARED))


@folder("cache whose shared blobs are a link out", "E_PATH")
def _(path: Path) -> Path:
    snapshot = shared(path, "../../blobs/" + "e" * 64)
    (path / "hub" / "blobs" / "ab").rename(path / "outside")
    os.symlink("../../outside", path / "hub" / "blobs" / "ab")
    return snapshot


@folder("cache blob that is a link out", "E_PATH")
def _(path: Path) -> Path:
    snapshot = cache(path, "../../blobs/" + "e" * 64)
    os.symlink("../../secret", snapshot.parent.parent / "blobs" / ("e" * 64))
    return snapshot


@folder("cache whose blobs are a link to another folder", "E_PATH")
def _(path: Path) -> Path:
    snapshot = cache(path, "../../blobs/" + "0" * 64)
    blobs = snapshot.parent.parent / "blobs"
    (blobs / ("0" * 64)).unlink()
    blobs.rmdir()
    os.symlink("../models--other--private/blobs", blobs)
    return snapshot


# 5. Folders without weights that can be used.
files("empty folder", {}, "E_NOT_A_MODEL")
files("only a configuration", {"config.json": {}}, "E_NOT_A_MODEL")
files(
    "only pickles",
    {"pytorch_model.bin": b"PK\x03\x04", "config.json": {}},
    "E_NOT_SAFETENSORS",
    words="pickle",
)
files("weights under another name", {"other.safetensors": SOUND}, "E_NOT_A_MODEL", words="other.safetensors")
folder("missing folder", "E_NOT_FOUND")(lambda path: path / "nowhere")
folder("path with NUL", "E_PATH")(lambda path: path / "a\0b")
folder("path of 5,000 characters", "E_PATH")(lambda path: path / ("x" * 5000))
folder("pickle by its path", "E_NOT_SAFETENSORS")(lambda path: _write(path / "model.bin", b"\x80\x04."))
folder("pickle renamed", "E_NOT_SAFETENSORS")(
    lambda path: _write(path / "m.safetensors", b"\x80\x04\x95" + bytes(60))
)
folder("text file", "E_HEADER_SIZE")(lambda path: _write(path / "notes.txt", b"hello, these are notes"))
folder("sound file by its path", None)(lambda path: _write(path / "any name (1).safetensors", SOUND))


def _write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


@folder("folder name with a line break, blanks and signs", None)
def _(path: Path) -> Path:
    inner = path / "a\nb #?% é 🙂 \u202e"
    inner.mkdir()
    (inner / WEIGHTS).write_bytes(SOUND)
    return inner


# 6. Claims without bytes, and quantised weights.
def claim(shape: list[int], size: int) -> bytes:
    return file_bytes({"a": entry(0, size, shape)})


files("1 TiB that is not there", {WEIGHTS: claim([1 << 38], 1 << 40)}, "E_HEADER_LAYOUT", words="cut off")


@folder("1 TiB of holes", None)
def _(path: Path) -> None:
    raw = claim([1 << 38], 1 << 40)
    with (path / WEIGHTS).open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + (1 << 40))


CONFIG = {WEIGHTS: SOUND}
files(
    "quantised by its configuration",
    CONFIG | {"config.json": {"quantization_config": {"bits": 4}}},
    "E_QUANTIZED",
)
files(
    "text part quantised",
    CONFIG | {"config.json": {"text_config": {"quantization_config": {"a": 1}}}},
    "E_QUANTIZED",
)
files("quantization_config null", CONFIG | {"config.json": {"quantization_config": None}}, None)
for name in (
    *("m.qweight", "m.qzeros", "m.SCB", "m.weight.SCB", "m.weight.absmax", "m.weight_scale"),
    *("m.weight.quant_state.bitsandbytes__nf4", "m.weight_scale_inv"),
):
    files(
        f"quantised: {name}", {WEIGHTS: file_bytes({name: entry(0, 8)}, bytes(8))}, "E_QUANTIZED", words=name
    )

# 7. Configurations.
for name, raw, code in (
    ("list", "[]", "E_JSON"),
    ("duplicate key", '{"a":1,"a":2}', "E_JSON"),
    ("NaN", '{"a":NaN}', "E_JSON"),
    ("minus Infinity", '{"a":-Infinity}', "E_JSON"),
    ("1e400", '{"a":1e400}', "E_JSON"),
    ("number of a million digits", '{"a":' + "9" * 1_000_000 + "}", "E_JSON"),
    ("100,000 brackets", "[" * 100_000, "E_JSON"),
    ("half a surrogate pair", '{"a":"\\ud800"}', "E_JSON"),
    ("byte order mark", "\ufeff{}", "E_JSON"),
    ("Latin-1", b'{"a":"\xe9"}', "E_JSON"),
    ("nothing", "", "E_JSON"),
    ("9 MB", '{"a":"' + "x" * 9_000_000 + '"}', "E_JSON"),
    ("code to be run", '{"auto_map":{"AutoModel":"evil.py--Evil"},"trust_remote_code":true}', None),
):
    files(f"configuration: {name}", CONFIG | {"config.json": raw}, code)

# 8. Adapters (opened without a base: a sound one asks for it).
LORA = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
PAIR = file_bytes(
    {
        f"base_model.model.a.lora_{part}.weight": entry(n * 8, n * 8 + 8, [2, 1])
        for n, part in enumerate("AB")
    },
    bytes(16),
)
files("adapter without a base", {"adapter_config.json": LORA, "adapter_model.safetensors": PAIR}, "E_ADAPTER")
files(
    "adapter as a pickle",
    {"adapter_config.json": LORA, "adapter_model.bin": b"PK\x03\x04"},
    "E_NOT_SAFETENSORS",
)
files("adapter without weights", {"adapter_config.json": LORA}, "E_ADAPTER", words="missing")
files("adapter beside a model", {"adapter_config.json": LORA, WEIGHTS: SOUND}, "E_AMBIGUOUS")
for name, raw in (
    ("list", "[]"),
    ("text", '"LORA"'),
    ("other method", '{"peft_type":"IA3"}'),
    ("rank", '{"peft_type":"LORA","r":true}'),
):
    files(
        f"adapter configuration: {name}",
        {"adapter_config.json": raw, "adapter_model.safetensors": PAIR},
        "E_ADAPTER",
    )
files("adapter configuration: NaN", {"adapter_config.json": '{"peft_type":"LORA","r":NaN}'}, "E_JSON")


@folder("adapter configuration: pipe", "E_PATH")
def _(path: Path) -> None:
    os.mkfifo(path / "adapter_config.json")
