"""Describes an export format, and an option of it on the command line.

Stand-alone: the standard library.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


def whole(least: int, greatest: int | None = None) -> Callable[[str], int]:
    """Returns a function that reads an integer of this range."""

    def integer(text: str) -> int:
        number = int(text)
        if number < least or (greatest is not None and number > greatest):
            limit = (
                f"at least {least}" if greatest is None else f"{least} to {greatest}"
            )
            raise argparse.ArgumentTypeError(f"must be {limit}, not {text}")
        return number

    return integer


def number(text: str) -> float:
    """Reads a finite number of at least 0; argparse tells users its name."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be finite and at least 0, not {text}")
    return value


def seconds(text: str) -> float:
    """Reads a finite number above 0; argparse tells users its name."""
    value = number(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def sizes(text: str) -> tuple[str, tuple[int, ...]]:
    """Reads the sizes of an input, as `ids=1,64`."""
    name, _, shape = text.partition("=")
    if not name or not all(size.isdecimal() for size in shape.split(",")):
        raise argparse.ArgumentTypeError(f"must be written as ids=1,64, not {text}")
    return name, tuple(map(int, shape.split(",")))


class ByName(argparse.Action):
    """Turns pairs of a name and a value into a dictionary."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Sets the option to the dictionary."""
        del parser, option_string
        setattr(namespace, self.dest, dict(values))


@dataclass(frozen=True)
class Option:
    """An option of the exports to some formats.

    Attributes:
        flag: How it is written.
        settings: Further arguments of `ArgumentParser.add_argument`.
        read: For an option that names a file: `"samples"` for more of what the
            model takes, or a function that reads the file.
    """

    flag: str
    settings: Mapping[str, Any]
    read: Literal["samples"] | Callable[[Path], Any] | None = None

    @property
    def argument(self) -> str:
        """The exporters' name of it."""
        return self.flag.removeprefix("--").replace("-", "_")


TOLERANCE = Option(
    "--tolerance",
    {
        "type": number,
        "help": "largest absolute difference allowed in float files (default: 1e-5)",
    },
)
OVERWRITE = Option(
    "--overwrite",
    {
        "action": "store_true",
        "help": "replace what exists; without it a SavedModel's version is refused, "
        "and other files are replaced with a warning",
    },
)
TIMEOUT = Option(
    "--timeout",
    {
        "type": seconds,
        "metavar": "SECONDS",
        "help": "how long the check of one file may take (default: 600)",
    },
)
OUTPUT_NAMES = Option(
    "--output-names",
    {
        "nargs": "+",
        "metavar": "NAME",
        "help": "names for the outputs (default: the model's own)",
    },
)


def _never(_: Mapping[str, Any]) -> bool:
    return False


def _nothing(_: Mapping[str, Any], __: Sequence[str]) -> str | None:
    return None


@dataclass(frozen=True)
class Format:
    """A format that a model is exported to.

    Attributes:
        name: Its name: that of its folder, and of its exporter after `export_`.
        place: Where it goes below a directory of all formats.
        writes: What is written below that directory, and what reads it.
        file: How a file is named to `verify` on the command line: further arguments of
            `ArgumentParser.add_argument`.
        is_directory: Whether what is written is a directory.
        packages: Packages the exporter needs in addition to TensorFlow.
        extra: The extra of keras-mha that installs them.
        options: The exporter's options.
        takes_texts: Whether the exporter, with these options, takes a model of texts.
        signature_of_tokens: Whether it then has an argument `tokens`, for a signature
            that takes what the tokenizer gives.
        problem: What is wrong with these options for an export to these formats.
        examples: Lines for the help of the command.
    """

    name: str
    place: str
    writes: Mapping[str, str]
    file: Mapping[str, Any]
    is_directory: bool = False
    packages: tuple[str, ...] = ()
    extra: str = ""
    options: tuple[Option, ...] = ()
    takes_texts: Callable[[Mapping[str, Any]], bool] = _never
    signature_of_tokens: bool = False
    problem: Callable[[Mapping[str, Any], Sequence[str]], str | None] = _nothing
    examples: str = ""

    @property
    def flag(self) -> str:
        """The option of `keras-mha verify` that names a file of it."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def arguments(self) -> dict[str, Option]:
        """The options by the exporter's names of them."""
        return {option.argument: option for option in self.options}
