r"""Writes a saved Keras model as a SavedModel version for TF Serving, and checks it.

Example:
    python export/to_saved_model.py dist/sentiment/model.keras \
        dist/sentiment/saved_model --samples reviews.txt --report report.json
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
    parser.add_argument("model", type=Path, help="the model, a .keras file")
    parser.add_argument(
        "directory", type=Path, help="where the versions are; the result is below it"
    )
    parser.add_argument(
        "--samples",
        type=Path,
        required=True,
        help="inputs to check with and to warm up with: .txt (one text in a line), "
        ".npy (one array) or .npz (arrays by input name)",
    )
    parser.add_argument(
        "--version", type=int, help="the version's number (default: highest + 1)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the version if it exists"
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
        "--warmup",
        type=int,
        default=16,
        help="number of samples that become warm-up requests (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="also write the signature `tokens`, which takes ids instead of texts",
    )
    parser.add_argument(
        "--report", type=Path, help="also write the report here, as .json or .md"
    )
    arguments = parser.parse_args()
    if arguments.report and arguments.report.suffix not in (".json", ".md"):
        parser.error("--report must end in .json or .md")
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
    from keras_mha.export import export_saved_model, load_samples

    model: Any = keras.saving.load_model(arguments.model)
    report = export_saved_model(
        model,
        arguments.directory,
        samples=load_samples(arguments.samples),
        version=arguments.version,
        overwrite=arguments.overwrite,
        tolerance=arguments.tolerance,
        output_names=arguments.output_names,
        warmup=arguments.warmup,
        tokens=arguments.tokens,
    )
    if arguments.report:
        report.write(arguments.report)
    print(report.to_markdown())


if __name__ == "__main__":
    main()
