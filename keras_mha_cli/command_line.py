"""Reads the command line."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_mha_cli import options
from keras_mha_cli.console import INTERRUPTED_TEXT
from keras_mha_cli.export import Request, export
from keras_mha_cli.lint import add_lint
from keras_mha_cli.verify import add_verify

_EXIT_CODES = f"""\
exit codes:
  0  every file was written, and its values are the model's
  1  a value differs, or the model cannot be exported: the message says what to change
  2  wrong usage, or a file is missing
  3  a package is missing: the message is the command that installs it
  {INTERRUPTED_TEXT}; what is unfinished was removed
"""

_EXPORT = """\
Writes a saved Keras model for other runtimes. Each file is loaded by its runtime in a
fresh process that cannot import keras_mha, and its values are compared with the
model's; only a file whose values are right appears, whole, under its name. A format
that fails leaves nothing new and does not stop the others.

  saved_model  DIR/saved_model/<version>/    TensorFlow Serving
  tflite       DIR/tflite/model_<S>.tflite   LiteRT: phones, ARM, browsers
               DIR/tflite/text_<S>.tflite    the same for strings, with --text
               DIR/tflite/mediapipe_<S>.tflite  MediaPipe, with --metadata
  onnx         DIR/onnx/model.onnx           ONNX Runtime
"""

_EXAMPLES = f"""\
examples:
  Everything, from a model that takes ids:
    keras-mha export classifier.keras --to saved_model tflite onnx --out dist \\
        --samples ids.npy --sequence-lengths 64 128

  Everything, from a model that takes texts:
    keras-mha export model.keras --to saved_model tflite onnx --out dist \\
        --samples reviews.txt --tokens --report report.md

  A quarter of the size for a phone:
    keras-mha export classifier.keras --to tflite --out dist \\
        --samples ids.npy --quantization dynamic_int8

  Files that take texts, for LiteRT and for MediaPipe on a phone:
    keras-mha export model.keras --to tflite --out dist --samples reviews.txt \\
        --text --metadata labels.txt

What to give as --samples: some dozen inputs like those that the model will meet.

{_EXIT_CODES}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `keras-mha`; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="keras-mha",
        description="Attention layers for Keras: what one does with saved models.",
        epilog="`keras-mha COMMAND --help` tells more, with examples and exit codes.",
    )
    parser.add_argument("--version", action=_Version, help="print it and end")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_export(commands)
    add_verify(commands)
    add_lint(commands)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="write a model as SavedModel, TFLite and ONNX, checked by value",
        description=_EXPORT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", metavar="MODEL", type=Path, help="a .keras file")
    command.add_argument(
        "--to",
        nargs="+",
        required=True,
        choices=tuple(options.FORMATS),
        help="the formats",
        metavar="FORMAT",
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="made if absent"
    )
    _add_common(command)
    options.add_options(command, tuple(options.FORMATS))

    def run(parsed: argparse.Namespace) -> int:
        formats = tuple(dict.fromkeys(parsed.to))
        places = {name: parsed.out / options.FORMATS[name].place for name in formats}
        return export(_request(command, parsed, places))

    command.set_defaults(run=run)


def export_one(name: str, description: str | None) -> int:
    """A command that writes the format `name` alone, to a place given in full."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    destination = options.FORMATS[name].destination
    parser.add_argument("model", type=Path, help="a .keras file")
    parser.add_argument(
        "place",
        type=Path,
        metavar=destination,
        help="the file to write" if destination == "path" else "made if absent",
    )
    _add_common(parser)
    options.add_options(parser, [name])
    parsed = parser.parse_args()
    if destination == "path" and parsed.place.suffix != f".{name}":
        parser.error(f"the path to write must end in .{name}")
    return export(_request(parser, parsed, {name: parsed.place}, in_full=True))


class _Version(argparse.Action):
    """Prints the version; reading it only then keeps the rest fast."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:  # noqa: A002  (argparse's own name)
        # Without a default: `export` has a `--version` too, and shares the result.
        super().__init__(
            option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help
        )

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"{parser.prog} {importlib.metadata.version('keras-mha')}")
        parser.exit()


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples",
        type=Path,
        required=True,
        metavar="FILE",
        help="inputs to check with: .npy (one array), .npz (arrays by input name) or "
        ".txt (one text in a line)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="also write all that was found out, as .json or .md",
    )
    parser.add_argument(
        "--debug", action="store_true", help="show tracebacks of errors"
    )


def _request(
    parser: argparse.ArgumentParser,
    parsed: argparse.Namespace,
    places: dict[str, Path],
    *,
    in_full: bool = False,
) -> Request:
    """What was asked for; ends the program where that cannot be done."""
    values = options.given(parsed)
    report: Path | None = parsed.report
    wrong = options.misplaced(values, tuple(places))
    if wrong is not None:
        parser.error(wrong)
    if report is not None:
        options.check_report(parser, report, (".json", ".md"))
    further = [values.get(name) for name in ("representative_data", "metadata")]
    options.check_files(
        parser,
        [path for path in (parsed.model, parsed.samples, *further) if path is not None],
    )
    options.check_model(parser, parsed.model)
    return Request(
        model=parsed.model,
        samples=parsed.samples,
        places=places,
        options=values,
        report=report,
        debug=parsed.debug,
        in_full=in_full,
    )
