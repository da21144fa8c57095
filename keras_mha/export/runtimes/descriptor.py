"""Describes a runtime, and a file that one runs.

Stand-alone: the standard library.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Arrays = Mapping[str, "np.ndarray"]
# What `load` returns: a function of one case, and one that says, after the cases, what
# is to be known of the run: its `version`, and whatever else the runtime tells.
Loaded = tuple[Callable[[Arrays], Arrays], Callable[[], dict[str, Any]]]


class AbsentError(RuntimeError):
    """A runtime cannot be used here, or not for this file; the message says why."""


@dataclass(frozen=True)
class File:
    """A file as its runtimes need to know it.

    Attributes:
        path: The file or directory.
        kind: A format, such as `"tflite"`, or a kind of it, such as `"tflite/text"`.
        signature_name: The signature to run, where the format has them.
        inputs: For a SavedModel, the graph's tensor for each input.
        outputs: The outputs' names; for a SavedModel with the graph's tensors.
        operations: For a SavedModel, the names of all operations in it.
    """

    path: Path
    kind: str
    signature_name: str = "serving_default"
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    operations: Sequence[str] = ()


def _nothing(*_: Any) -> Mapping[str, Any]:
    return {}


def _this_python() -> Sequence[str]:
    # -P: neither the script's nor the current directory becomes importable.
    return (sys.executable, "-P")


@dataclass(frozen=True)
class Runtime:
    """One runtime.

    Attributes:
        module: The name of the file in this folder whose `load` runs it.
        label: Its name in reports.
        reads: The kinds of file that it runs.
        packages: The packages that it needs, each with the extra that installs it.
        find: Raises a FileNotFoundError where something else that it needs is missing.
        options: Keyword arguments of `load` for a file; may raise as `find`.
        python: The command that starts its Python, without a script.
        blocked: Top-level packages that its process must be unable to import.
        takes_text: Whether it takes strings where the file does.
        cuts_texts: Whether it cuts texts into ids itself, and answers these too.
        emulated: Whether its speed says nothing.
    """

    module: str
    label: str
    reads: tuple[str, ...]
    packages: Mapping[str, str] = field(default_factory=dict)
    find: Callable[[], object] = _nothing
    options: Callable[[File], Mapping[str, Any]] = _nothing
    python: Callable[[], Sequence[str]] = _this_python
    blocked: tuple[str, ...] = ("keras_mha", "keras", "tensorflow", "tensorflow_text")
    takes_text: bool = False
    cuts_texts: bool = False
    emulated: bool = False

    def check_present(self) -> None:
        """Raises an AbsentError, with what to install, where it cannot be used."""
        for package, extra in self.packages.items():
            if importlib.util.find_spec(package) is None:
                raise AbsentError(f"pip install 'keras-mha[{extra}]'")
        try:
            self.find()
        except FileNotFoundError as error:
            raise AbsentError(str(error)) from error

    def options_for(self, file: File) -> Mapping[str, Any]:
        """Returns the keyword arguments of `load` for `file`.

        Raises:
            AbsentError: If something that the file needs is missing.
        """
        try:
            return self.options(file)
        except FileNotFoundError as error:
            raise AbsentError(str(error)) from error
