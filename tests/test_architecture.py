"""The rules on who may import whom, read off the syntax trees.

Each rule is a function of source text, so that the last tests can show it failing on
text that breaks it.
"""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "keras_mha"

# A module may import from lower floors and from its own package.
FLOORS: Mapping[str, int] = {
    # The single modules beside the packages are the cellar, below all of them.
    **{path.stem: -1 for path in PACKAGE.glob("*.py") if path.stem != "__init__"},
    "attention": 0,
    "layers": 1,
    "models": 2,
    "text": 2,
    "convert": 3,
    "export": 3,
    "interpret": 3,
}
# The floors that run on every backend of Keras, and the files there that need not.
PORTABLE_FLOORS = ("attention", "layers", "models", "text")
TENSORFLOW_FILES = ("compiled", "_tensorflow")
# Imported late, when a function needs them.
LATE = (
    "ai_edge_litert",
    "litert_quantizer",
    "matplotlib",
    "mediapipe",
    "onnx",
    "onnxruntime",
    "openvino",
    "safetensors",
    "sklearn",
    "tensorflow_text",
    "tf2onnx",
    "torch",
)
# A module of `keras_mha.export` may import from lower floors and from its own folder.
EXPORT_FLOORS: Mapping[str, int] = {
    **dict.fromkeys(
        ("declaration", "files", "ids", "report", "samples", "saved_graph"), 0
    ),
    **dict.fromkeys(("compiled_marks", "inputs", "parity"), 1),
    "endpoint": 2,
    **dict.fromkeys(("drawn", "runtimes", "tokens"), 3),
    **dict.fromkeys(("cases", "device"), 4),
    **dict.fromkeys(("onnx", "tflite"), 5),
    "saved_model": 6,  # one may hold a TFLite file
    "formats": 7,
    "verification": 8,
}
# Read by path: by the command line, or where keras_mha cannot be imported.
STAND_ALONE = ("runtimes/*.py", "*/declaration.py", "declaration.py", "formats.py")
COMMAND_FOLDERS = ("examples", "export", "benchmarks", "keras_mha_cli")


class Import(NamedTuple):
    """One imported name: `from module import name`, or `import module` (no name)."""

    line: int
    module: str
    name: str | None


def imports(source: str, package: str = "") -> Iterator[Import]:
    """Yields every import in `source`, relative ones resolved against `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                yield Import(node.lineno, module, alias.name)


def upward_imports(source: str, module: str, package: str) -> list[str]:
    """The imports of `module` that do not lead downwards."""
    own = module.split(".")[1]
    broken = []
    for line, target, name in imports(source, package):
        path = [*target.split("."), *filter(None, [name])]
        if path[0] != "keras_mha":
            continue
        other = path[1] if len(path) > 1 else ""
        # What is on no floor is a name of the root, which imports every floor.
        on_a_floor = other in FLOORS
        if not on_a_floor or (other != own and FLOORS[other] >= FLOORS[own]):
            broken.append(f"{module}:{line} imports {'.'.join(path)}")
    return broken


def upward_in_export(source: str, module: str, package: str) -> list[str]:
    """The imports of a module of `keras_mha.export` that lead upwards there."""
    own = module.split(".")[2]
    broken = []
    for line, target, name in imports(source, package):
        path = [*target.split("."), *filter(None, [name])]
        if path[:2] != ["keras_mha", "export"]:
            continue
        other = path[2] if len(path) > 2 else ""
        # What is on no floor is a public name, which the door above all floors has.
        on_a_floor = other in EXPORT_FLOORS
        higher = not on_a_floor or EXPORT_FLOORS[other] >= EXPORT_FLOORS[own]
        if other != own and higher:
            broken.append(f"{module}:{line} imports {'.'.join(path)}")
    return broken


def early_imports(source: str) -> set[str]:
    """The top-level packages that are imported as soon as the module is."""
    tree = ast.parse(source)
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in late:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


def declared_public(init: Path) -> set[str] | None:
    """The names in `__all__` of an `__init__.py`; None where it declares none."""
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__"
            for target in node.targets
        ):
            return set(ast.literal_eval(node.value))
    return None


def public_names() -> dict[str, set[str]]:
    """For keras_mha and each public package in it, its public names."""
    found = {}
    for init in (PACKAGE / "__init__.py", *sorted(PACKAGE.glob("*/__init__.py"))):
        names = declared_public(init)
        if names is not None:
            found[".".join(init.parent.relative_to(ROOT).parts)] = names
    return found


def dotted(node: ast.expr) -> list[str]:
    """The parts of `a.b.c`; none where the chain starts from anything but a name."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return [*head, node.attr] if head else []
    return []


def bind_imports(
    tree: ast.Module, public: Mapping[str, set[str]]
) -> tuple[dict[str, str], list[str]]:
    """Which local name stands for which public module, and the imports that break."""
    bound: dict[str, str] = {}
    broken = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] != "keras_mha":
                    continue
                if alias.name not in public:
                    broken.append(f"line {node.lineno}: import {alias.name}")
                elif alias.asname:
                    bound[alias.asname] = alias.name
                else:
                    bound["keras_mha"] = "keras_mha"
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] != "keras_mha":
                continue
            for alias in node.names:
                full = f"{module}.{alias.name}"
                if full in public:
                    bound[alias.asname or alias.name] = full
                elif alias.name not in public.get(module, ()):
                    broken.append(f"line {node.lineno}: {full}")
    return bound, broken


def private_uses(source: str, public: Mapping[str, set[str]]) -> list[str]:
    """The uses of keras_mha in `source` that are not of public names."""
    tree = ast.parse(source)
    bound, broken = bind_imports(tree, public)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        parts = dotted(node)
        if not parts or parts[0] not in bound:
            continue
        module = bound[parts[0]]
        for attribute in parts[1:]:
            if f"{module}.{attribute}" in public:
                module = f"{module}.{attribute}"
                continue
            if attribute not in public[module]:
                broken.append(f"line {node.lineno}: {module}.{attribute}")
            break
    return broken


def package_modules() -> Iterator[tuple[str, str, Path]]:
    """Yields each module's dotted name, the package it is in, and its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            module = package = ".".join(parts[:-1])
        else:
            module, package = ".".join(parts), ".".join(parts[:-1])
        yield module, package, path


def command_files() -> list[Path]:
    """Every program outside the package that may use public names only."""
    return [
        path
        for name in COMMAND_FOLDERS
        for path in (ROOT / name).rglob("*.py")
        # It reads by path what `keras_mha.export` declares, which is faster.
        if path != ROOT / "keras_mha_cli" / "declared.py"
    ]


def test_every_package_has_a_floor() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages <= set(FLOORS)


def test_imports_run_downwards_only() -> None:
    broken = [
        line
        for module, package, path in package_modules()
        if module != "keras_mha"
        for line in upward_imports(path.read_text("utf-8"), module, package)
    ]
    assert not broken, "\n".join(broken)


def test_imports_run_downwards_in_export() -> None:
    broken = [
        line
        for module, package, path in package_modules()
        if module.startswith("keras_mha.export.")
        # A declaration takes public names, when it needs them.
        if path.stem != "declaration"
        for line in upward_in_export(path.read_text("utf-8"), module, package)
    ]
    assert not broken, "\n".join(broken)


def test_what_is_read_by_path_needs_the_standard_library() -> None:
    known = {"__future__", *sys.stdlib_module_names}
    broken = [
        f"{path.relative_to(ROOT)} imports {name}"
        for pattern in STAND_ALONE
        for path in (PACKAGE / "export").glob(pattern)
        if path.name not in ("fresh_process.py", "exchange.py")  # parent; NumPy
        for name in sorted(early_imports(path.read_text("utf-8")) - known)
    ]
    assert not broken, "\n".join(broken)


def test_lower_floors_leave_tensorflow_to_files_of_its_own() -> None:
    broken = [
        str(path.relative_to(ROOT))
        for module, _, path in package_modules()
        if module.split(".")[1:2] and module.split(".")[1] in PORTABLE_FLOORS
        if not path.stem.endswith(TENSORFLOW_FILES)
        if any(
            found.module.split(".")[0] == "tensorflow"
            for found in imports(path.read_text("utf-8"))
        )
    ]
    assert not broken, "\n".join(broken)


def test_heavy_packages_are_not_imported_early() -> None:
    broken = [
        f"{module} imports {name}"
        for module, _, path in package_modules()
        for name in sorted(early_imports(path.read_text("utf-8")) & set(LATE))
    ]
    assert not broken, "\n".join(broken)


def test_importing_the_package_loads_no_heavy_package() -> None:
    # Keras itself loads matplotlib and scikit-learn where they are installed, so it is
    # what keras_mha adds that counts; the test above covers those two.
    program = (
        "import sys, keras; before = set(sys.modules); import keras_mha;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    loaded = set(run.stdout.split())
    assert "keras_mha" in loaded
    assert not loaded & set(LATE)


def test_commands_use_public_names_only() -> None:
    public = public_names()
    assert "keras_mha" in public
    broken = [
        f"{path.relative_to(ROOT)}, {use}"
        for path in command_files()
        for use in private_uses(path.read_text("utf-8"), public)
    ]
    assert not broken, "\n".join(broken)


def test_the_commands_folder_is_no_package() -> None:
    assert not list((ROOT / "export").rglob("__init__.py"))


def test_no_command_is_named_like_a_package() -> None:
    # A script's own folder is searched first: export/onnx.py would hide onnx.
    taken = sys.stdlib_module_names | set(importlib.metadata.packages_distributions())
    taken |= set(LATE)
    named = {path.stem for path in (ROOT / "export").rglob("*.py")}
    assert not named & taken


# The rules themselves can fail.


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("keras_mha.attention.masks", "from keras_mha.layers import residual_norm"),
        ("keras_mha.attention.masks", "from keras_mha import layers"),
        ("keras_mha.attention.masks", "def f():\n    import keras_mha.export.api"),
        ("keras_mha.attention.masks", "from ..layers import residual_norm"),
        ("keras_mha.layers.compiled", "import keras_mha"),
        ("keras_mha.layers.compiled", "from keras_mha import MultiHeadAttention"),
        ("keras_mha.text.wordpiece", "from keras_mha.models import bert"),
        ("keras_mha.convert.keras_layers", "from keras_mha.export import verify"),
        ("keras_mha.typing", "from keras_mha.attention import masks"),
    ],
)
def test_upward_imports_are_seen(module: str, statement: str) -> None:
    assert upward_imports(statement, module, module.rpartition(".")[0])


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("keras_mha.attention.masks", "from . import positions"),
        ("keras_mha.attention.masks", "from keras_mha.typing import Tensor"),
        ("keras_mha.layers.compiled", "from keras_mha.attention import api"),
        ("keras_mha.export.saved_model.export", "import keras_mha.text.wordpiece"),
        ("keras_mha.convert.keras_models", "from keras_mha.models import bert"),
        ("keras_mha.layers.compiled", "import keras"),
    ],
)
def test_downward_imports_are_let_through(module: str, statement: str) -> None:
    assert not upward_imports(statement, module, module.rpartition(".")[0])


@pytest.mark.parametrize(
    ("module", "statement", "broken"),
    [
        ("runtimes.litert", "from keras_mha.export.tflite import graph", True),
        ("runtimes.litert", "from ..tflite import graph", True),
        ("onnx.export", "from keras_mha.export.tflite.file import convert", True),
        ("tflite.file", "from keras_mha.export import verify", True),
        ("tflite.file", "from keras_mha.export.runtimes import litert", False),
        ("saved_model.export", "import keras_mha.export.tflite.file", False),
        ("runtimes.litert", "from .descriptor import Runtime", False),
    ],
)
def test_upward_imports_in_export_are_seen(
    module: str, statement: str, broken: bool
) -> None:
    module = f"keras_mha.export.{module}"
    found = upward_in_export(statement, module, module.rpartition(".")[0])
    assert bool(found) is broken


PUBLIC = {
    "keras_mha": {"MultiHeadAttention", "text"},
    "keras_mha.text": {"WordpieceTokenizer"},
}


@pytest.mark.parametrize(
    "source",
    [
        "import keras_mha.layers",
        "from keras_mha.layers import MultiHeadAttention",
        "from keras_mha.text.wordpiece import WordpieceTokenizer",
        "from keras_mha import hidden",
        "import keras_mha\nkeras_mha.hidden(1)",
        "import keras_mha as mha\nmha.text.hidden(1)",
        "from keras_mha import text\ntext.wordpiece.WordpieceTokenizer()",
    ],
)
def test_private_uses_are_seen(source: str) -> None:
    assert private_uses(source, PUBLIC)


@pytest.mark.parametrize(
    "source",
    [
        "import keras_mha\nkeras_mha.MultiHeadAttention(2).kernel",
        "import keras_mha as mha\nmha.text.WordpieceTokenizer.call",
        "from keras_mha import text\ntext.WordpieceTokenizer()",
        "from keras_mha.text import WordpieceTokenizer",
        "import keras\nkeras.hidden",
    ],
)
def test_public_uses_are_let_through(source: str) -> None:
    assert not private_uses(source, PUBLIC)


def test_early_imports_leave_out_late_ones() -> None:
    source = (
        "import onnx.helper\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import sklearn\n"
        "try:\n    import tf2onnx\nexcept ImportError:\n    raise\n"
        "def f():\n    import matplotlib\n"
        "class C:\n    import tensorflow_text\n"
    )
    assert early_imports(source) == {"onnx", "typing", "tf2onnx", "tensorflow_text"}
