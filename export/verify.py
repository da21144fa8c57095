r"""Runs exported files in every runtime at hand, and compares them with their model.

Ends with 0 where all is right, 1 where something is wrong or failed, or nothing could
be run, and 2 where the arguments are wrong.

Example:
    python export/verify.py dist/sentiment/model.keras --samples ids.npy \
        --saved-model dist/sentiment/saved_model \
        --tflite dist/sentiment/model_128.tflite --report report.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the model, a .keras file")
    parser.add_argument(
        "--samples",
        type=Path,
        required=True,
        help="inputs to compare on: .txt (one text in a line), .npy (one array) or "
        ".npz (arrays by input name)",
    )
    parser.add_argument(
        "--labels", type=Path, help="the samples' right classes, an .npy file"
    )
    parser.add_argument(
        "--saved-model", type=Path, metavar="DIR", help="a SavedModel, or its versions"
    )
    parser.add_argument(
        "--tflite",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="TFLite files",
    )
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="an ONNX file")
    parser.add_argument(
        "--runtimes",
        nargs="+",
        metavar="NAME",
        help="only these: saved_model, openvino, litert, litert_gpu, litert_arm, "
        "mediapipe, onnx_runtime",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="largest absolute difference allowed (default: %(default)s)",
    )
    parser.add_argument(
        "--quantized-tolerance",
        type=float,
        default=0.05,
        metavar="TOLERANCE",
        help="the same for quantized TFLite files (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long one runtime may take for one file (default: %(default)s)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="also write the report here, as .json, .md or .png",
    )
    arguments = parser.parse_args()
    if any(path.suffix not in (".json", ".md", ".png") for path in arguments.report):
        parser.error("--report must end in .json, .md or .png")
    files = [arguments.saved_model, *arguments.tflite, arguments.onnx]
    given = [path for path in files if path is not None]
    if not given:
        parser.error("one of --saved-model, --tflite and --onnx must be given")
    for path in (arguments.model, arguments.samples, arguments.labels, *given):
        if path is not None and not path.exists():
            parser.error(f"{path} does not exist")
    return arguments


def main() -> None:
    """Verifies, prints the report, and writes it where asked."""
    arguments = parse_arguments()
    # After the arguments are known to be right: these take seconds.
    import keras

    import keras_mha.text  # noqa: F401  (registers the layers that models hold)
    from keras_mha.export import load_samples, verify

    model: Any = keras.saving.load_model(arguments.model)
    labels = arguments.labels
    try:
        report = verify(
            model,
            samples=load_samples(arguments.samples),
            saved_model=arguments.saved_model,
            tflite=arguments.tflite or None,
            onnx=arguments.onnx,
            labels=None if labels is None else load_samples(labels),
            runtimes=arguments.runtimes,
            tolerance=arguments.tolerance,
            quantized_tolerance=arguments.quantized_tolerance,
            timeout=arguments.timeout,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for path in arguments.report:
        report.write(path)
    print(report.to_markdown())
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
