r"""Writes a saved Keras model as TFLite files of fixed length, and checks them.

Example:
    python export/to_tflite.py dist/sentiment/model.keras dist/sentiment \
        --samples ids.npy --sequence-lengths 64 128 --quantization dynamic_int8
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
        "model", type=Path, help="the model, a .keras file that takes integer ids"
    )
    parser.add_argument("directory", type=Path, help="where the model_<S>.tflite go")
    parser.add_argument(
        "--samples",
        type=Path,
        required=True,
        help="ids to check with: an .npy file of shape (n, T), padded with 0",
    )
    parser.add_argument(
        "--sequence-lengths",
        type=int,
        nargs="+",
        default=[128],
        metavar="S",
        help="one file for each of these lengths (default: 128)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="rows in a call (default: 1)"
    )
    parser.add_argument(
        "--quantization",
        choices=("dynamic_int8", "float16", "int8_dense"),
        help="how to make the files smaller; dynamic_int8 is the one to try first "
        "(default: float32)",
    )
    parser.add_argument(
        "--representative-data",
        type=Path,
        metavar="FILE",
        help="typical ids, an .npy file, from which int8_dense takes its ranges",
    )
    parser.add_argument(
        "--target",
        choices=("cpu", "gpu"),
        default="cpu",
        help="gpu refuses layers that would keep the file off it (default: cpu)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="largest absolute difference allowed in float files "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--quantized-tolerance",
        type=float,
        metavar="TOLERANCE",
        help="the same for quantized files (default: 0.002 for float16, else 0.05)",
    )
    parser.add_argument(
        "--signature-name",
        default="serving_default",
        help="the signature's name (default: %(default)s)",
    )
    parser.add_argument(
        "--report", type=Path, help="also write the report here, as .json or .md"
    )
    arguments = parser.parse_args()
    if arguments.report and arguments.report.suffix not in (".json", ".md"):
        parser.error("--report must end in .json or .md")
    for path in (arguments.model, arguments.samples, arguments.representative_data):
        if path is not None and not path.exists():
            parser.error(f"{path} does not exist")
    if (arguments.representative_data is None) == (
        arguments.quantization == "int8_dense"
    ):
        parser.error("--representative-data goes with --quantization int8_dense")
    return arguments


def main() -> None:
    """Exports, prints the report, and writes it where asked."""
    arguments = parse_arguments()
    # After the arguments are known to be right: these take seconds.
    import keras

    import keras_mha.text  # noqa: F401  (registers the layers that models hold)
    from keras_mha.export import export_tflite, load_samples

    model: Any = keras.saving.load_model(arguments.model)
    data = arguments.representative_data
    report = export_tflite(
        model,
        arguments.directory,
        samples=load_samples(arguments.samples),
        sequence_lengths=arguments.sequence_lengths,
        batch_size=arguments.batch_size,
        quantization=arguments.quantization,
        representative_data=None if data is None else load_samples(data),
        target=arguments.target,
        tolerance=arguments.tolerance,
        quantized_tolerance=arguments.quantized_tolerance,
        signature_name=arguments.signature_name,
    )
    if arguments.report:
        report.write(arguments.report)
    print(report.to_markdown())


if __name__ == "__main__":
    main()
