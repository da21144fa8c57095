"""`keras-mha verify`: exported files in every runtime at hand, by value."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_mha_cli.console import (
    INTERRUPTED_TEXT,
    MISSING_PACKAGE,
    UNREADABLE,
    WRONG_USAGE,
    Console,
)
from keras_mha_cli.declared import FORMATS, RUNTIMES, number, seconds, whole
from keras_mha_cli.options import (
    add_import,
    check_files,
    check_model,
    check_modules,
    check_report,
)

if TYPE_CHECKING:
    from keras_mha.export import VerificationReport

_REPORTS = (".json", ".md", ".png")

_EMULATED = [name for name, runtime in RUNTIMES.items() if runtime.emulated]
_RUNTIMES = "\n".join(
    f"  {name:<13} {runtime.label:<37} {', '.join(runtime.reads)}"
    for name, runtime in RUNTIMES.items()
)

_DESCRIPTION = f"""\
Runs the same samples through a saved Keras model and through its exported files, in
every runtime at hand, and compares the values. Each file runs in a process of its own
that cannot import keras_mha, so a file need not be trusted: what it does is a row of
the table. A runtime that is not installed is "not run", never "ok".

{_RUNTIMES}
"""

_EPILOG = f"""\
examples:
  Files of a model that takes ids:
    keras-mha verify classifier.keras --samples ids.npy \\
        --tflite dist/tflite/model_64.tflite dist/tflite/model_128.tflite \\
        --onnx dist/onnx/model.onnx --report report.md report.png

  What `keras-mha export model.keras --tokens` wrote, with accuracies:
    keras-mha verify model.keras --tokens --samples reviews.txt --labels labels.npy \\
        --saved-model dist/saved_model --tflite dist/tflite/model_128.tflite

  Only in the served form:
    keras-mha verify model.keras --samples reviews.txt \\
        --saved-model dist/saved_model --runtimes saved_model

exit codes:
  0  every value is right in every runtime that ran
  1  a value is wrong, a runtime failed, or none could be run
  2  wrong usage, or a file is missing or cannot be read
  3  a package is missing: the message is the command that installs it
  {INTERRUPTED_TEXT}
"""

# The arguments of `verify`; what is absent on the command line has its defaults.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    **{name: one.file for name, one in FORMATS.items()},
    "labels": {
        "type": Path,
        "metavar": "FILE",
        "help": "the samples' right classes, whole numbers in an .npy file, for "
        "accuracies",
    },
    "runtimes": {
        "nargs": "+",
        "choices": tuple(RUNTIMES),
        "metavar": "NAME",
        "help": "only these of the runtimes above",
    },
    "tolerance": {
        "type": number,
        "help": "largest absolute difference allowed (default: 1e-5)",
    },
    "quantized_tolerance": {
        "type": number,
        "metavar": "TOLERANCE",
        "help": "the same for quantized TFLite files (default: 0.05)",
    },
    "emulated_samples": {
        "type": whole(1),
        "metavar": "N",
        "help": f"number of samples for {' and '.join(_EMULATED)}, which are slow "
        "(default: 200)",
    },
    "timed_calls": {
        "type": whole(0),
        "metavar": "N",
        "help": "calls of which a latency is the median; 0 times none (default: 20)",
    },
    "output_names": {
        "nargs": "+",
        "metavar": "NAME",
        "help": "names of the outputs, as the export had them",
    },
    "signature_name": {
        "metavar": "NAME",
        "help": "the signature in SavedModel and TFLite files (default: "
        "serving_default)",
    },
    "timeout": {
        "type": seconds,
        "metavar": "SECONDS",
        "help": "how long one runtime may take for one file (default: 600)",
    },
}


def add_verify(commands: Any) -> None:
    """Adds the command to the parser's `commands`."""
    parser = commands.add_parser(
        "verify",
        help="compare exported files with their model, in every runtime at hand",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a .keras file")
    parser.add_argument(
        "--samples",
        type=Path,
        required=True,
        metavar="FILE",
        help="inputs to compare on: .npy (one array), .npz (arrays by input name) or "
        ".txt (one text per line); hundreds of real ones work best",
    )
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="for a model of texts: files of formats that take no strings hold what "
        "follows its tokenizer and take ids",
    )
    add_import(parser)
    for name, settings in OPTIONS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **settings
        )
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="also write the report here, as .json, .md or .png",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=lambda parsed: _run(parser, parsed))


def _run(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    values = {name: value for name, value in vars(parsed).items() if name in OPTIONS}
    if not set(values) & set(FORMATS):
        *most, last = (one.flag for one in FORMATS.values())
        parser.error(f"one of {', '.join(most)} and {last} is required")
    for report in parsed.report:
        check_report(parser, report, _REPORTS)
    check_files(parser, [parsed.model, parsed.samples])
    if "labels" in values:
        check_files(parser, [values["labels"]])
    for name in set(values) & set(FORMATS):
        paths = values[name] if isinstance(values[name], list) else [values[name]]
        if not FORMATS[name].is_directory:
            check_files(parser, paths)
            continue
        for path in paths:
            if not path.is_dir():
                parser.error(f"{path} is not a directory")
    check_model(parser, parsed.model)
    check_modules(parser, parsed.modules)
    console = Console(("tokens", *OPTIONS), debug=parsed.debug)
    draws = any(report.suffix == ".png" for report in parsed.report)
    if draws and importlib.util.find_spec("matplotlib") is None:
        console.say("error: matplotlib not installed: pip install 'keras-mha[plot]'")
        return MISSING_PACKAGE
    return console.run(lambda: _verify(console, parsed, values))


def _verify(
    console: Console, parsed: argparse.Namespace, values: dict[str, Any]
) -> int:
    """Verifies, prints the report, and writes it where asked; returns the exit code."""
    load_samples = console.start().export.load_samples
    model = console.load_model(parsed.model, parsed.modules, code=WRONG_USAGE)
    with console.step(f"load {parsed.samples}", UNREADABLE, code=WRONG_USAGE):
        samples = load_samples(parsed.samples)
        if "labels" in values:
            values["labels"] = load_samples(values["labels"])
    unfit = (ValueError, TypeError, OSError)
    with console.step("compare the values", unfit, code=WRONG_USAGE):
        report = _compare(model, samples, values, tokens=parsed.tokens)
    print(report.to_markdown())
    for path in parsed.report:
        with console.step(f"write {path}", (OSError,)):
            report.write(path)
    return 0 if report.passed else 1


def _compare(
    model: Any, samples: Any, values: Mapping[str, Any], *, tokens: bool
) -> VerificationReport:
    """Returns the report; for `tokens`, of the whole model and of the rest."""
    from keras_mha.export import verify, without_tokenizer

    if not tokens:
        return verify(model, samples=samples, **values)
    rest, ids = without_tokenizer(model, samples)
    of_texts = {name for name in FORMATS if FORMATS[name].takes_texts({})}
    reports = []
    for part, inputs, formats in (
        (model, samples, of_texts),
        (rest, ids, set(FORMATS) - of_texts),
    ):
        other = set(FORMATS) - formats
        chosen = {name: value for name, value in values.items() if name not in other}
        if set(chosen) & formats:
            reports.append(verify(part, samples=inputs, **chosen))
    checks = [check for report in reports for check in report.checks]
    return replace(reports[0], model=model.name, checks=tuple(checks))
