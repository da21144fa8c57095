"""Reads the command line."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import override

from keras_mha_cli import options
from keras_mha_cli.console import INTERRUPTED_TEXT, WRONG_USAGE
from keras_mha_cli.declared import FORMATS, options_of
from keras_mha_cli.export import Request, export
from keras_mha_cli.lint import add_lint
from keras_mha_cli.serve_config import add_serve_config
from keras_mha_cli.verify import add_verify

_WRITTEN = {
    place: reader for one in FORMATS.values() for place, reader in one.writes.items()
}
_FORMATS = "\n".join(
    f"  DIR/{place:<30} {reader}" for place, reader in _WRITTEN.items()
)

_DESCRIPTION = f"""\
Writes a saved Keras model for other runtimes. Each file is loaded by its runtime in a
fresh process that cannot import keras_mha, and its values are compared with the
model's; only a file whose values are right appears, whole, under its name. A format
that fails leaves nothing new and does not stop the others.

{_FORMATS}
"""

_EPILOG = f"""\
examples:
  Everything, from a model that takes ids:
    keras-mha export classifier.keras --to {" ".join(FORMATS)} --out dist \\
        --samples ids.npy

  Everything, from a model that takes texts:
    keras-mha export model.keras --to {" ".join(FORMATS)} --out dist \\
        --samples reviews.txt --tokens --report report.md

{"".join(one.examples for one in FORMATS.values())}
What to give as --samples: a few dozen inputs like those that the model will meet.

exit codes:
  0  every file was written, and its values are the model's
  1  a value differs, or the model cannot be exported: the message says what to change
  2  wrong usage, or a file is missing
  3  a package is missing: the message is the command that installs it
  {INTERRUPTED_TEXT}; what is unfinished was removed
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command `keras-mha`; returns its exit code."""
    parser = _Parser(
        prog="keras-mha",
        description="Attention layers for Keras: exports and checks saved models.",
        epilog="`keras-mha COMMAND --help` tells more, with examples and exit codes.",
    )
    parser.add_argument("--version", action=_Version, help="print it and end")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_export(commands)
    add_verify(commands)
    add_lint(commands)
    add_serve_config(commands)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="write a model for other runtimes, checked by value",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", metavar="MODEL", type=Path, help="a .keras file")
    command.add_argument(
        "--to",
        nargs="+",
        required=True,
        choices=tuple(FORMATS),
        help=f"the formats: {', '.join(FORMATS)}",
        metavar="FORMAT",
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="created if absent"
    )
    command.add_argument(
        "--samples",
        type=Path,
        required=True,
        metavar="FILE",
        help="inputs to check with: .npy (one array), .npz (arrays by input name) or "
        ".txt (one text per line)",
    )
    command.add_argument(
        "--tokens",
        action="store_true",
        help="for a model of texts: formats that take no strings get the part after "
        "its tokenizer, which takes ids; the others also get a signature for ids",
    )
    command.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="also write all results here, as .json or .md",
    )
    command.add_argument(
        "--debug", action="store_true", help="show tracebacks of errors"
    )
    options.add_import(command)
    options.add_options(command)
    command.set_defaults(run=lambda parsed: export(_request(command, parsed)))


class _Parser(argparse.ArgumentParser):
    """Tells wrong usage in two lines; argparse would print all options first."""

    @override
    def error(self, message: str) -> NoReturn:
        self.exit(
            WRONG_USAGE,
            f"{self.prog}: error: {message}\nTry '{self.prog} --help'.\n",
        )


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


def _request(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> Request:
    """Returns what was asked for; ends the program where that cannot be done."""
    formats = tuple(dict.fromkeys(parsed.to))
    values = options.chosen(parsed)
    problem = options.find_problem(values, formats)
    if problem is not None:
        parser.error(problem)
    if parsed.report is not None:
        options.check_report(parser, parsed.report, (".json", ".md"))
    known = options_of(list(formats))
    read = [values[name] for name in values if name in known and known[name][0].read]
    options.check_files(parser, [parsed.model, parsed.samples, *read])
    options.check_model(parser, parsed.model)
    options.check_modules(parser, parsed.modules)
    return Request(
        model=parsed.model,
        samples=parsed.samples,
        places={name: parsed.out / FORMATS[name].place for name in formats},
        options=values,
        tokens=parsed.tokens,
        modules=parsed.modules,
        report=parsed.report,
        debug=parsed.debug,
    )
