"""Who may know whom (app -> ui -> merging -> ...), and what nobody may do. Read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path.relative_to(ROOT)
    for pattern in ("app.py", "merging/**/*.py", "ui/**/*.py", "benchmarks/**/*.py", "assets/**/*.py")
    for path in ROOT.glob(pattern)
)

# Package -> what nothing in it may import.
FORBIDDEN = {
    "merging": ["ui", "app", "benchmarks", "tests", "gradio", "plotly"],
    "merging.checkpoints": ["merging.methods", "merging.engine", "merging.recipe"],
    "merging.recipe": ["merging.engine"],
    "ui": ["app", "benchmarks", "tests"],
}
# Package -> all it may import besides the standard library.
ALLOWED = {
    "merging.errors": [],
    "merging.methods": ["merging.methods", "merging.errors", "torch", "numpy", "pydantic"],
    "merging.checkpoints": [
        *["merging.checkpoints", "merging.errors"],
        *["torch", "numpy", "xxhash", "huggingface_hub"],
    ],
}
# Costs seconds to import: only these may, wherever in the file the import stands.
ONLY_IN = {"transformers": ["merging.networks", "merging.evaluation", "ui", "assets", "benchmarks.sets"]}
# Planning reads headers and must start at once: no torch while these are being imported.
LIGHT = ["merging.errors", "merging.recipe", "merging.checkpoints", "merging.methods"]

# Running what a file says (unpickling, shells, remote code), and parsers without a safe default.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "yaml.load", "os.system", "os.popen", "eval", "exec"}
UNSAFE_FLAGS = {"trust_remote_code", "shell", "allow_pickle"}
# Mapped files: a file that shrinks kills the process, and its pages count as our memory.
MAPPING = {"mmap", "memmap", "mmap_mode", "safe_open", "load_file"}
MAY_MAP = ["merging.evaluation", "assets", "benchmarks.sets"]


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports(tree: ast.Module, path: Path) -> Iterator[tuple[str, bool]]:
    """Each imported module, absolute, and whether importing the file already imports it.

    ``from .a import b`` counts as ``package.a`` and ``package.a.b``: b may be a module or a name.
    """
    package = list(path.parts[:-1])
    for node, deferred in walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, not deferred
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module, not deferred
            for alias in node.names:
                yield f"{module}.{alias.name}", not deferred


def walk(node: ast.AST, deferred: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it runs only later (in a function) or never (under TYPE_CHECKING)."""
    yield node, deferred
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for child in node.body:
            yield from walk(child, True)
        for child in node.orelse:
            yield from walk(child, deferred)
        return
    for child in ast.iter_child_nodes(node):
        yield from walk(child, deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def wrong_imports(source: str, path: Path) -> list[str]:
    me = module_name(path)
    wrong = []
    for name, at_once in imports(ast.parse(source), path):
        top = name.split(".")[0]
        for package, forbidden in FORBIDDEN.items():
            if within(me, package) and any(within(name, f) for f in forbidden):
                wrong.append(f"{me} imports {name}: {package} must not know it")
        for package, allowed in ALLOWED.items():
            known = top in sys.stdlib_module_names or any(within(name, a) or within(a, name) for a in allowed)
            if within(me, package) and not known:
                wrong.append(f"{me} imports {name}: {package} may only know {allowed}")
        for module, packages in ONLY_IN.items():
            if within(name, module) and not any(within(me, p) for p in packages):
                wrong.append(f"{me} imports {name}: only {', '.join(packages)} may")
        if top == "torch" and at_once and any(within(me, p) for p in LIGHT):
            wrong.append(f"{me} imports torch when it is itself imported: do it where it is used")
    return wrong


def wrong_calls(source: str, path: Path) -> list[str]:
    wrong, words = [], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names]
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            words |= {part for module in modules for part in module.split(".")}
            wrong += [f"import {name}" for name in modules if name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.Call):
            words |= {keyword.arg for keyword in node.keywords}
            flags = [k for k in node.keywords if k.arg in UNSAFE_FLAGS and not is_constant(k.value, False)]
            if flags or ast.unparse(node.func) in UNSAFE_CALLS:
                wrong.append(ast.unparse(node))
        elif isinstance(node, ast.Attribute):
            words.add(node.attr)
    if not any(within(module_name(path), package) for package in MAY_MAP):
        wrong += sorted(words & MAPPING)
    return [f"{path}: {what}" for what in wrong]


def is_constant(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_everyone_keeps_to_the_floor_plan(path: Path) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    assert wrong_imports(source, path) + wrong_calls(source, path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("merging/engine.py", "import gradio"),
        ("merging/methods/ties.py", "from ..checkpoints import header"),
        ("merging/methods/ties.py", "def f():\n    import safetensors"),
        ("merging/methods/ties.py", "import torch"),
        ("merging/checkpoints/layout.py", "from .. import methods"),
        ("merging/checkpoints/layout.py", "from ..engine import plan"),
        ("merging/checkpoints/layout.py", "import torch"),
        ("merging/recipe.py", "def f():\n    from merging.engine import plan"),
        ("merging/engine.py", "from transformers import AutoModel"),
        ("merging/jobs.py", "import ui.pages"),
    ],
)
def test_the_rules_notice_wrong_imports(path: str, source: str) -> None:
    assert wrong_imports(source, Path(path)) != []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("merging/methods/ties.py", "from .base import Method\nfrom ..errors import InputError\nimport math"),
        ("merging/methods/ties.py", "from .. import errors\ndef f():\n    import torch.nn.functional"),
        ("merging/checkpoints/adapter.py", "def f():\n    import torch"),
        ("merging/checkpoints/adapter.py", "if TYPE_CHECKING:\n    import torch"),
        ("merging/evaluation/runner.py", "import transformers"),
        ("merging/engine.py", "import torch\nfrom .methods import get_method"),
    ],
)
def test_the_rules_let_right_imports_pass(path: str, source: str) -> None:
    assert wrong_imports(source, Path(path)) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "yaml.load(text, Loader=Strict)",
        "import pickle",
        "from safetensors import safe_open",
        "numpy.memmap(path)",
        "numpy.load(path, mmap_mode='r')",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=anything)",
        "eval(text)",
    ],
)
def test_the_bans_notice(source: str) -> None:
    assert wrong_calls(source, Path("merging/engine.py")) != []


def test_the_bans_let_the_safe_ways_pass() -> None:
    source = "yaml.safe_load(text)\nmodel.eval()\nsubprocess.run([tool], shell=False)\nnumpy.load(path)"
    assert wrong_calls(source, Path("merging/engine.py")) == []


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("merging, merging.engine", ["transformers", "gradio", "plotly", "safetensors"]),
        ("merging.recipe, merging.methods", ["torch", "transformers", "huggingface_hub"]),
    ],
)
def test_importing_the_engine_stays_light(modules: str, heavy: list[str]) -> None:
    """What the trees cannot show: imports of imports."""
    code = f"import {modules}, sys; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
