r"""Writes a saved Keras model as an ONNX file with free sizes, and checks it.

Example:
    python export/to_onnx.py dist/sentiment/classifier.keras dist/sentiment/model.onnx \
        --samples ids.npy
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, help="the model, a .keras file that takes no strings"
    )
    parser.add_argument("path", type=Path, help="the file to write, ending in .onnx")
    parser.add_argument(
        "--samples",
        type=Path,
        required=True,
        help="inputs to check with: .npy (one array) or .npz (arrays by input name)",
    )
    parser.add_argument(
        "--opset",
        type=int,
        default=18,
        help="version of ONNX' operations, 13 to 18 (default: %(default)s)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="largest absolute difference allowed (default: %(default)s)",
    )
    parser.add_argument(
        "--output-names",
        nargs="+",
        metavar="NAME",
        help="names for the outputs (default: the model's own)",
    )
    parser.add_argument(
        "--report", type=Path, help="also write the report here, as .json or .md"
    )
    arguments = parser.parse_args()
    if arguments.report and arguments.report.suffix not in (".json", ".md"):
        parser.error("--report must end in .json or .md")
    if arguments.path.suffix != ".onnx":
        parser.error("the path to write must end in .onnx")
    for path in (arguments.model, arguments.samples):
        if not Path(path).exists():
            parser.error(f"{path} does not exist")
    return arguments


def main() -> None:
    """Exports, prints the report, and writes it where asked."""
    arguments = parse_arguments()
    # After the arguments are known to be right: these take seconds.
    import keras

    import keras_mha.text  # noqa: F401  (registers the layers that models hold)
    from keras_mha.export import export_onnx, load_samples

    model: Any = keras.saving.load_model(arguments.model)
    report = export_onnx(
        model,
        arguments.path,
        samples=load_samples(arguments.samples),
        opset=arguments.opset,
        tolerance=arguments.tolerance,
        output_names=arguments.output_names,
    )
    if arguments.report:
        report.write(arguments.report)
    print(report.to_markdown())


if __name__ == "__main__":
    main()
