"""Tells what a command does, and how it ends."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAILED, WRONG_USAGE, MISSING_PACKAGE, INTERRUPTED = 1, 2, 3, 130
INTERRUPTED_TEXT = "130  interrupted by Ctrl-C"
# How reading a file fails: as a whole, or where an entry of it is missing.
UNREADABLE = (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile)


class StepError(Exception):
    """A step that failed in a way that was to be expected."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Console:
    """Tells the error stream what is done; only the results go to the output.

    Attributes:
        options: The command's options by the names of the arguments they become.
        debug: Whether errors are shown with their traceback.
    """

    options: Collection[str] = ()
    debug: bool = False

    def run(self, work: Callable[[], int]) -> int:
        """Does the work; returns its exit code, or that of how it ended early."""
        # TensorFlow reads this when it is imported; its notes on the machine would
        # hide what is said here.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if self.debug else "3")
        # What is compared is computed on the CPU.
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
        hidden = nullcontext() if self.debug else _compiled_code_is_silent()
        try:
            with hidden, warnings.catch_warnings():
                # Python hides these unless the program asks, and users are to know.
                warnings.filterwarnings(
                    "default", category=DeprecationWarning, module="keras_mha_cli"
                )
                warnings.showwarning = self._show_warning
                return work()
        except StepError as error:
            return error.code
        except KeyboardInterrupt:
            self.say("interrupted; what is unfinished was removed")
            return INTERRUPTED

    def say(self, message: str) -> None:
        """Prints one message, at once."""
        print(f"keras-mha: {message}", file=sys.stderr, flush=True)

    @contextmanager
    def step(
        self,
        label: str,
        expected: Sequence[type[Exception]] = (),
        *,
        code: int = FAILED,
    ) -> Iterator[None]:
        """Says what is done, and how long it took or why it failed.

        Args:
            label: What is done.
            expected: Errors that are told in a line, and end with `code`.
            code: The exit code of these.

        Raises:
            StepError: For an ImportError, and for errors that are `expected`.
        """
        self.say(f"{label} ...")
        start = time.perf_counter()
        try:
            yield
        except (ImportError, *expected) as error:
            if self.debug:
                traceback.print_exc()
            message = self.with_options(f"{error}" or type(error).__name__)
            self.say(f"error: {message}")
            missing = isinstance(error, ImportError)
            raise StepError(message, MISSING_PACKAGE if missing else code) from error
        self.say(f"{label}: done in {time.perf_counter() - start:.1f} s")

    def with_options(self, message: str) -> str:
        """Adds how arguments in a message are written on the command line.

        Example:

        >>> console = Console(("overwrite", "target"))
        >>> console.with_options("pass `overwrite=True`")
        'pass `overwrite=True` (On the command line: --overwrite)'
        """
        flags = {name: f"--{name.replace('_', '-')}" for name in self.options}
        flags |= {"samples": "--samples", "without_tokenizer": "--tokens"}
        ends = ("`", "=", "(")  # of a name in backticks, with a value, or called
        here = [
            flag
            for name, flag in flags.items()
            if any(f"`{name}{end}" in message for end in ends)
        ]
        return (
            f"{message} (On the command line: {', '.join(here)})" if here else message
        )

    def start(self) -> Any:
        """Imports `keras_mha.export` in a step; returns the package."""
        with self.step("start Keras and TensorFlow"):
            import keras_mha.export
        if not self.debug:
            for name in ("absl", "tensorflow", "tf2onnx"):
                logging.getLogger(name).setLevel(logging.ERROR)
        return keras_mha

    def load_model(
        self, path: Path, modules: Sequence[str] = (), *, code: int = FAILED
    ) -> Any:
        """Loads a `.keras` file in a step, after the modules that register its layers.

        Raises:
            StepError: If that fails.
        """
        for name in modules:
            with (
                self.step(f"import {name}", (Exception,), code=code),
                modules_of_this_directory(),
            ):
                importlib.import_module(name)
        with self.step(f"load {path}", (ValueError,), code=code):
            return _load_model(path)

    def _show_warning(self, message: Warning | str, *_: Any, **__: Any) -> None:
        self.say(f"warning: {self.with_options(str(message))}")


@contextmanager
def modules_of_this_directory() -> Iterator[None]:
    """Lets Python find the modules of the current directory, after all others."""
    place = str(Path.cwd())
    sys.path.append(place)
    try:
        yield
    finally:
        sys.path.remove(place)


@contextmanager
def _compiled_code_is_silent() -> Iterator[None]:
    """Drops what libraries write to the error stream behind Python's back."""
    python = sys.stderr
    if not _is_standard_error(python):
        yield  # a test reads it
        return
    python.flush()
    own, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    # Not closed: handlers of logging may hold it until the program ends.
    sys.stderr = os.fdopen(own, "w", encoding=python.encoding, buffering=1)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(own, 2)
        sys.stderr = python


def _is_standard_error(stream: Any) -> bool:
    try:
        return stream.fileno() == 2
    except (AttributeError, OSError, ValueError):
        return False


def _load_model(path: Path) -> Any:
    import keras

    try:
        return keras.saving.load_model(path)
    except TypeError as error:  # a layer's class is unknown, or cannot be built
        _raise_import_error(error)
        # Keras quotes the configuration of every layer around the one that failed.
        told = str(error).rsplit("Exception encountered: ")[-1]
        raise ValueError(
            f"{told.split(' Full object config')[0]}\nThis command knows the layers "
            "of Keras and of keras_mha. Name the module that registers your own: "
            "--import MODULE"
        ) from error
    except UNREADABLE as error:
        raise ValueError(f"{path} holds no whole model: {error}") from error


def _raise_import_error(error: BaseException | None) -> None:
    """Raises the ImportError that led to `error`, if one did."""
    while error is not None:
        if isinstance(error, ImportError):
            raise error
        error = error.__cause__ or error.__context__
