"""Declares the export to a SavedModel.

Stand-alone: the standard library, and what all formats declare with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..declaration import (  # noqa: TID252  (the command line reads it by path)
    OUTPUT_NAMES,
    OVERWRITE,
    TIMEOUT,
    TOLERANCE,
    Format,
    Option,
    whole,
)

FORMAT = Format(
    "saved_model",
    place="saved_model",
    writes={"saved_model/<version>/": "TensorFlow Serving"},
    file={
        "type": Path,
        "metavar": "DIR",
        "help": "a SavedModel, or a directory of versions, of which the highest is "
        "taken",
    },
    is_directory=True,
    takes_texts=lambda _: True,
    signature_of_tokens=True,
    options=(
        OVERWRITE,
        TOLERANCE,
        TIMEOUT,
        OUTPUT_NAMES,
        Option(
            "--with-tflite",
            {
                "action": "store_true",
                "help": "also write model.tflite next to saved_model.pb, which TF "
                "Serving runs instead under --prefer_tflite_model; not for models of "
                "texts",
            },
        ),
        Option(
            "--batching",
            {
                "action": argparse.BooleanOptionalAction,
                "help": "whether a server may batch requests (default: yes, unless an "
                "input has no batch dimension); --no-batching is for models whose "
                "rows depend on each other",
            },
        ),
        Option(
            "--version",
            {
                "type": whole(0),
                "metavar": "N",
                "help": "the version's number, at least 0 (default: highest + 1)",
            },
        ),
        Option(
            "--warmup",
            {
                "type": whole(0, 1000),
                "metavar": "N",
                "help": "number of samples that become warm-up requests, 0 to 1000 "
                "(default: 16)",
            },
        ),
    ),
)
