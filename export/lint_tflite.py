r"""Finds what a TFLite file's target refuses, or computes wrongly without a word.

The file is read in a process of its own and not run. Ends with 0 where there are no
errors (warnings may be), 1 where there are, and 2 where the file is no TFLite file.

Example:
    python export/lint_tflite.py dist/sentiment/model_128.tflite --target gpu
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="the TFLite file")
    parser.add_argument(
        "--target",
        choices=("cpu", "gpu"),
        default="cpu",
        help="what shall run it: LiteRT's interpreter or its GPU delegate "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long reading may take (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if not arguments.path.exists():
        parser.error(f"{arguments.path} does not exist")
    return arguments


def main() -> None:
    """Prints the findings, one in a line, and their number."""
    arguments = parse_arguments()
    # After the arguments are known to be right: this takes seconds.
    from keras_mha.export import lint_tflite

    try:
        found = lint_tflite(
            arguments.path, target=arguments.target, timeout=arguments.timeout
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for finding in found:
        print(finding)
    errors = sum(finding.severity == "error" for finding in found)
    print(
        f"{arguments.path}, target {arguments.target}: "
        f"{errors} errors, {len(found) - errors} warnings"
    )
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
