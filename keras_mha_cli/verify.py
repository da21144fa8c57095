"""`keras-mha verify`: exported files in every runtime at hand, by value."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_mha_cli.console import (
    INTERRUPTED_TEXT,
    UNREADABLE,
    WRONG_USAGE,
    Console,
)
from keras_mha_cli.options import (
    check_files,
    check_model,
    check_report,
    number,
    seconds,
    whole,
)

if TYPE_CHECKING:
    from keras_mha.export import VerificationReport

# As `keras_mha.export.verify` has them, which takes seconds to import.
RUNTIMES = (
    "saved_model",
    "openvino",
    "litert",
    "litert_gpu",
    "litert_arm",
    "mediapipe",
    "onnx_runtime",
)
_FILES = ("saved_model", "tflite", "onnx")
_REPORTS = (".json", ".md", ".png")

_DESCRIPTION = """\
Runs the same samples through a saved Keras model and through its exported files, in
every runtime at hand, and compares the values. Each file runs in a process of its own
that cannot import keras_mha, so a file need not be trusted: what it does is a row of
the table. A runtime that is not installed is "not run", never "ok".

  saved_model   TensorFlow's C++ loader, XLA disabled    SavedModel
  openvino      OpenVINO in float32                      SavedModel, ONNX
  litert        LiteRT on the CPU                        TFLite
  litert_gpu    LiteRT's GPU delegate, software Vulkan   TFLite
  litert_arm    LiteRT on an emulated ARM processor      TFLite
  mediapipe     MediaPipe's TextClassifier               TFLite with metadata
  onnx_runtime  ONNX Runtime on the CPU                  ONNX
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

  In the served form alone:
    keras-mha verify model.keras --samples reviews.txt \\
        --saved-model dist/saved_model --runtimes saved_model

exit codes:
  0  every value is right in every runtime that ran
  1  a value is wrong, a runtime failed, or none could be run
  2  wrong usage, or a file is missing or cannot be read
  3  a package is missing: the message is the command that installs it
  {INTERRUPTED_TEXT}
"""

# The arguments of `verify` that are options; what is not given is left to its defaults.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "saved_model": {
        "type": Path,
        "metavar": "DIR",
        "help": "a SavedModel, or a directory of versions, of which the highest is "
        "taken",
    },
    "tflite": {"type": Path, "nargs": "+", "metavar": "FILE", "help": "TFLite files"},
    "onnx": {"type": Path, "metavar": "FILE", "help": "an ONNX file"},
    "labels": {
        "type": Path,
        "metavar": "FILE",
        "help": "the samples' right classes, whole numbers in an .npy file, for "
        "accuracies",
    },
    "runtimes": {
        "nargs": "+",
        "choices": RUNTIMES,
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
        "help": "number of samples for litert_gpu and litert_arm, which are slow "
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
        "help": "names of the outputs, as they were given to the export",
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
        ".txt (one text in a line); hundreds of real ones are best",
    )
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="for a model of texts: the TFLite and ONNX files hold what follows its "
        "tokenizer and take ids",
    )
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
    if not set(values) & set(_FILES):
        parser.error("one of --saved-model, --tflite and --onnx must be given")
    for report in parsed.report:
        check_report(parser, report, _REPORTS)
    given = [parsed.model, parsed.samples, *values.get("tflite", [])]
    check_files(parser, given + [values[n] for n in ("onnx", "labels") if n in values])
    served = values.get("saved_model")
    if served is not None and not served.is_dir():
        parser.error(f"{served} is no directory")
    check_model(parser, parsed.model)
    console = Console(("tokens", *OPTIONS), debug=parsed.debug)
    return console.run(lambda: _verify(console, parsed, values))


def _verify(
    console: Console, parsed: argparse.Namespace, values: dict[str, Any]
) -> int:
    """Verifies, prints the report, and writes it where asked; returns the exit code."""
    with console.step("start Keras and TensorFlow"):
        # They register the layers that models hold.
        import keras_mha.models
        import keras_mha.text  # noqa: F401
        from keras_mha.export import load_samples

    model = console.load_model(parsed.model, code=WRONG_USAGE)
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
    """The report; of a model that was cut, first what takes texts, then the rest."""
    from keras_mha.export import verify, without_tokenizer

    if not tokens:
        return verify(model, samples=samples, **values)
    rest, ids = without_tokenizer(model, samples)
    of_texts = {n: v for n, v in values.items() if n not in ("tflite", "onnx")}
    of_ids = {n: v for n, v in values.items() if n != "saved_model"}
    reports = []
    if "saved_model" in of_texts:
        reports.append(verify(model, samples=samples, **of_texts))
    if set(of_ids) & set(_FILES):
        reports.append(verify(rest, samples=ids, **of_ids))
    checks = [check for report in reports for check in report.checks]
    return replace(reports[0], model=model.name, checks=tuple(checks))
