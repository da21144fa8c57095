"""Declares the export to an ONNX file.

Stand-alone: the standard library, and what all formats declare with.
"""

from __future__ import annotations

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
    "onnx",
    place="onnx/model.onnx",
    writes={"onnx/model.onnx": "ONNX Runtime"},
    file={"type": Path, "metavar": "FILE", "help": "an ONNX file"},
    packages=("onnx", "onnxruntime", "tf2onnx"),
    extra="onnx",
    options=(
        OVERWRITE,
        TOLERANCE,
        TIMEOUT,
        OUTPUT_NAMES,
        Option(
            "--opset",
            {
                "type": whole(13, 18),
                "metavar": "N",
                "help": "version of ONNX' operations, 13 to 18 (default: 18)",
            },
        ),
    ),
)
