"""Reads what `keras_mha.export` declares, without its import, which takes seconds."""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_mha.export.declaration import Format, Option
    from keras_mha.export.runtimes.descriptor import Runtime

_NAME = "keras_mha_export_declared"  # of the folder as a package without `__init__`


def _read(module: str) -> Any:
    if _NAME not in sys.modules:
        spec = importlib.util.find_spec("keras_mha")  # looks for it, imports nothing
        if spec is None or spec.origin is None:
            raise ImportError("keras_mha is not installed")
        package = ModuleType(_NAME)
        package.__path__ = [str(Path(spec.origin).parent / "export")]
        sys.modules[_NAME] = package
    return import_module(f"{_NAME}.{module}")


FORMATS: dict[str, Format] = _read("formats").FORMATS
RUNTIMES: dict[str, Runtime] = _read("runtimes.table").RUNTIMES
whole, number, seconds = (
    getattr(_read("declaration"), name) for name in ("whole", "number", "seconds")
)


def options_of(formats: list[str]) -> dict[str, tuple[Option, list[str]]]:
    """Returns the options of formats by argument, each with those that have it."""
    options: dict[str, tuple[Option, list[str]]] = {}
    for name in formats:
        for argument, option in FORMATS[name].arguments.items():
            options.setdefault(argument, (option, []))[1].append(name)
    return options
