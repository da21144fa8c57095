"""The formats, and the options of each. The defaults are the exporters' own."""

from __future__ import annotations

import argparse
import importlib.util
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Format:
    """A format that a model is exported to.

    Attributes:
        name: What the command calls it.
        exporter: The function of `keras_mha.export` that writes it.
        destination: That function's second argument.
        place: Where it goes below `--out`.
        packages: What that function needs beside TensorFlow.
        extra: The extra of keras-mha that installs them.
        takes_texts: Whether that function takes models of texts.
    """

    name: str
    exporter: str
    destination: str
    place: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    takes_texts: bool = False


FORMATS: Mapping[str, Format] = {
    one.name: one
    for one in (
        Format(
            "saved_model",
            "export_saved_model",
            "directory",
            "saved_model",
            takes_texts=True,
        ),
        Format(
            "tflite",
            "export_tflite",
            "directory",
            "tflite",
            ("ai_edge_litert",),
            "tflite",
        ),
        Format(
            "onnx",
            "export_onnx",
            "path",
            "onnx/model.onnx",
            ("onnx", "onnxruntime", "tf2onnx"),
            "onnx",
        ),
    )
}


@dataclass(frozen=True)
class Option:
    """An option of the exports to some formats.

    Attributes:
        flag: How it is written.
        formats: Names of the formats that it applies to.
        settings: Further arguments of `ArgumentParser.add_argument`.
    """

    flag: str
    formats: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def argument(self) -> str:
        """The exporters' name of it."""
        return self.flag.removeprefix("--").replace("-", "_")


def whole(least: int, greatest: int | None = None) -> Callable[[str], int]:
    """Reads an integer of this range."""

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


def check_files(parser: argparse.ArgumentParser, paths: Iterable[Path]) -> None:
    """Ends the program where one of `paths` is no file."""
    for path in paths:
        if not path.is_file():
            parser.error(
                f"{path} {'is no file' if path.exists() else 'does not exist'}"
            )


def check_model(parser: argparse.ArgumentParser, path: Path) -> None:
    """Ends the program where the file at `path` cannot be a `.keras` file."""
    if not zipfile.is_zipfile(path):
        parser.error(
            f"{path} is no .keras file, which `model.save('name.keras')` writes"
        )


def check_report(
    parser: argparse.ArgumentParser, path: Path, suffixes: Sequence[str]
) -> None:
    """Ends the program where no report can be written to `path`."""
    if path.suffix not in suffixes:
        *most, last = suffixes
        parser.error(f"--report must end in {', '.join(most)} or {last}")
    if not path.parent.is_dir():
        parser.error(f"the directory {path.parent} does not exist")


_ALL = tuple(FORMATS)
OPTIONS: Sequence[Option] = (
    Option(
        "--tolerance",
        _ALL,
        {
            "type": number,
            "help": "largest absolute difference allowed in float files "
            "(default: 1e-5)",
        },
    ),
    Option(
        "--timeout",
        _ALL,
        {
            "type": seconds,
            "metavar": "SECONDS",
            "help": "how long the check of one file may take (default: 600)",
        },
    ),
    Option(
        "--tokens",
        _ALL,
        {
            "action": "store_true",
            "help": "for a model of texts: tflite and onnx hold what follows its "
            "tokenizer and take ids; saved_model has a signature for ids besides",
        },
    ),
    Option(
        "--output-names",
        ("saved_model", "onnx"),
        {
            "nargs": "+",
            "metavar": "NAME",
            "help": "names for the outputs (default: the model's own)",
        },
    ),
    Option(
        "--with-tflite",
        ("saved_model",),
        {
            "action": "store_true",
            "help": "also write model.tflite beside saved_model.pb, which TF Serving "
            "runs instead under --prefer_tflite_model; not for models of texts",
        },
    ),
    Option(
        "--version",
        ("saved_model",),
        {
            "type": whole(0),
            "metavar": "N",
            "help": "the version's number, at least 0 (default: highest + 1)",
        },
    ),
    Option(
        "--overwrite",
        ("saved_model",),
        {"action": "store_true", "help": "replace the version if it exists"},
    ),
    Option(
        "--warmup",
        ("saved_model",),
        {
            "type": whole(0, 1000),
            "metavar": "N",
            "help": "number of samples that become warm-up requests, 0 to 1000 "
            "(default: 16)",
        },
    ),
    Option(
        "--sequence-lengths",
        ("tflite",),
        {
            "type": whole(1),
            "nargs": "+",
            "metavar": "S",
            "help": "one file for each of these lengths; none shorter than a sample "
            "(default: 128)",
        },
    ),
    Option(
        "--batch-size",
        ("tflite",),
        {"type": whole(1), "metavar": "B", "help": "rows in a call (default: 1)"},
    ),
    Option(
        "--quantization",
        ("tflite",),
        {
            "choices": ("dynamic_int8", "float16", "int8_dense"),
            "help": "how to make the files smaller; dynamic_int8 is the one to try "
            "first (default: float32)",
        },
    ),
    Option(
        "--representative-data",
        ("tflite",),
        {
            "type": Path,
            "metavar": "FILE",
            "help": "typical inputs, a file like that of --samples, from which "
            "int8_dense takes its ranges",
        },
    ),
    Option(
        "--quantized-tolerance",
        ("tflite",),
        {
            "type": number,
            "metavar": "TOLERANCE",
            "help": "--tolerance of quantized files (default: 0.002 for float16, "
            "else 0.05)",
        },
    ),
    Option(
        "--target",
        ("tflite",),
        {
            "choices": ("cpu", "gpu"),
            "help": "gpu refuses layers that would keep the file off it (default: cpu)",
        },
    ),
    Option(
        "--text",
        ("tflite",),
        {
            "action": "store_true",
            "help": "for a model of texts: also write text_<S>.tflite, which takes "
            "strings; the interpreter needs the operations of tensorflow-text",
        },
    ),
    Option(
        "--metadata",
        ("tflite",),
        {
            "type": Path,
            "metavar": "FILE",
            "help": "also write mediapipe_<S>.tflite for MediaPipe's TextClassifier, "
            "with these labels: a .txt with one in a line, for a model of texts; for a "
            'model of ids a .json, {"labels": [...], "vocabulary": [...], "texts": '
            '[...]}, with "delimiter" for words instead of wordpieces',
        },
    ),
    Option(
        "--signature-name",
        ("tflite",),
        {
            "metavar": "NAME",
            "help": "the signature's name (default: serving_default)",
        },
    ),
    Option(
        "--opset",
        ("onnx",),
        {
            "type": whole(13, 18),
            "metavar": "N",
            "help": "version of ONNX' operations, 13 to 18 (default: 18)",
        },
    ),
)


def add_options(parser: argparse.ArgumentParser, formats: Sequence[str]) -> None:
    """Adds the options that apply to `formats`, in one group for each set of these.

    What is not given on the command line is absent from the result, so that the
    exporters' own defaults hold.
    """
    groups: dict[tuple[str, ...], Any] = {}
    for option in OPTIONS:
        applies = tuple(name for name in formats if name in option.formats)
        if not applies:
            continue
        if applies not in groups:
            groups[applies] = parser.add_argument_group(f"for {', '.join(applies)}")
        groups[applies].add_argument(
            option.flag, default=argparse.SUPPRESS, **option.settings
        )


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given of `OPTIONS`, by the exporters' names."""
    names = {option.argument for option in OPTIONS}
    return {key: value for key, value in vars(arguments).items() if key in names}


def of_format(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Those of `values` that the exporter of the format `name` takes."""
    takes = {"samples"} | {
        option.argument for option in OPTIONS if name in option.formats
    }
    return {key: value for key, value in values.items() if key in takes}


def misplaced(values: Mapping[str, Any], formats: Sequence[str]) -> str | None:
    """What is wrong with `values` for an export to `formats`, if anything is."""
    for option in OPTIONS:
        if option.argument in values and not set(option.formats) & set(formats):
            return (
                f"{option.flag} is for {' and '.join(option.formats)}, not for "
                f"{' and '.join(formats)}: leave it out, or add one to --to"
            )
    metadata = values.get("metadata")
    if metadata is not None and metadata.suffix not in (".txt", ".json"):
        return "--metadata must end in .txt or .json"
    wants_ranges = values.get("quantization") == "int8_dense"
    if ("representative_data" in values) != wants_ranges:
        return "--representative-data goes with --quantization int8_dense"
    if tuple(formats) == ("tflite",) and {"quantization", "tolerance"} <= set(values):
        return "with --quantization the tolerance is --quantized-tolerance"
    return None


def absent_packages(formats: Sequence[str]) -> tuple[list[str], list[str]]:
    """The packages that `formats` need and that are absent, and their extras."""
    absent = {
        name: [p for p in FORMATS[name].packages if importlib.util.find_spec(p) is None]
        for name in formats
    }
    extras = [FORMATS[name].extra for name in formats if absent[name]]
    return [package for packages in absent.values() for package in packages], extras
