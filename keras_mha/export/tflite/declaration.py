"""Declares the export to TFLite files.

Stand-alone: the standard library, and what all formats declare with.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..declaration import (  # noqa: TID252  (the command line reads it by path)
    OVERWRITE,
    TIMEOUT,
    TOLERANCE,
    ByName,
    Format,
    Option,
    number,
    sizes,
    whole,
)


def _takes_texts(options: Mapping[str, Any]) -> bool:
    return bool({"text", "metadata"} & set(options))


def _problem(options: Mapping[str, Any], formats: Sequence[str]) -> str | None:
    metadata = options.get("metadata")
    if metadata is not None and metadata.suffix not in (".txt", ".json"):
        return "--metadata must end in .txt or .json"
    reads_ranges = options.get("quantization") == "int8_dense"
    if "representative_data" in options and not reads_ranges:
        return "--representative-data goes with --quantization int8_dense"
    if {"shapes", "sequence_lengths"} <= set(options):
        return "--shapes and --sequence-lengths both set sizes: give one of them"
    if tuple(formats) == ("tflite",) and {"quantization", "tolerance"} <= set(options):
        return "with --quantization the tolerance is --quantized-tolerance"
    return None


def _read_metadata(path: Path) -> Any:
    """Reads labels, one in a line, or all that metadata can hold, by name."""
    from keras_mha.export import BertMetadata, RegexMetadata, load_samples

    if path.suffix == ".txt":
        return BertMetadata(load_samples(path))
    fields = json.loads(path.read_text("utf-8"))
    is_object = isinstance(fields, dict)
    kind = RegexMetadata if is_object and "delimiter" in fields else BertMetadata
    known = list(inspect.signature(kind).parameters)
    if not is_object or "labels" not in fields or set(fields) - {*known}:
        raise ValueError(
            f"`metadata` must hold an object with `labels` and further of {known}. "
            f"Received in {path}: "
            f"{list(fields) if is_object else type(fields).__name__}"
        )
    return kind(**fields)


FORMAT = Format(
    "tflite",
    place="tflite",
    writes={
        "tflite/model_<S>.tflite": "LiteRT: phones, ARM, browsers; for ids",
        "tflite/model.tflite": "the same for what other models take",
        "tflite/text_<S>.tflite": "the same for strings, with --text",
        "tflite/mediapipe_<S>.tflite": "MediaPipe, with --metadata",
    },
    file={"type": Path, "nargs": "+", "metavar": "FILE", "help": "TFLite files"},
    packages=("ai_edge_litert",),
    extra="tflite",
    takes_texts=_takes_texts,
    problem=_problem,
    options=(
        OVERWRITE,
        TOLERANCE,
        TIMEOUT,
        Option(
            "--sequence-lengths",
            {
                "type": whole(1),
                "nargs": "+",
                "metavar": "S",
                "help": "one file for each of these lengths; none shorter than a "
                "sample (default for ids of any length: 128)",
            },
        ),
        Option(
            "--shapes",
            {
                "type": sizes,
                "nargs": "+",
                "action": ByName,
                "metavar": "NAME=B,...",
                "help": "sizes of inputs, the batch's first, as ids=1,64 (default: the "
                "model's own, and where they are free the samples')",
            },
        ),
        Option(
            "--batch-size",
            {
                "type": whole(1),
                "metavar": "B",
                "help": "rows in a call (default: the model's own, else 1)",
            },
        ),
        Option(
            "--uint8-inputs",
            {
                "nargs": "+",
                "metavar": "NAME",
                "help": "inputs, such as images, that the file takes as uint8",
            },
        ),
        Option(
            "--quantization",
            {
                "choices": ("dynamic_int8", "float16", "int8_dense"),
                "help": "how to make the files smaller; dynamic_int8 is the one to try "
                "first (default: float32)",
            },
        ),
        Option(
            "--representative-data",
            {
                "type": Path,
                "metavar": "FILE",
                "help": "typical inputs, a file like that of --samples, from which "
                "int8_dense takes its ranges (default: the samples)",
            },
            read="samples",
        ),
        Option(
            "--quantized-tolerance",
            {
                "type": number,
                "metavar": "TOLERANCE",
                "help": "--tolerance of quantized files (default: 0.002 for float16, "
                "else 0.05)",
            },
        ),
        Option(
            "--target",
            {
                "choices": ("cpu", "gpu"),
                "help": "gpu refuses layers that would keep the file off it "
                "(default: cpu)",
            },
        ),
        Option(
            "--text",
            {
                "action": "store_true",
                "help": "for a model of texts: also write text_<S>.tflite, which takes "
                "strings; the interpreter needs the operations of tensorflow-text",
            },
        ),
        Option(
            "--metadata",
            {
                "type": Path,
                "metavar": "FILE",
                "help": "also write mediapipe_<S>.tflite for MediaPipe's "
                "TextClassifier, with these labels: a .txt with one in a line, for a "
                'model of texts; for a model of ids a .json, {"labels": [...], '
                '"vocabulary": [...], "texts": [...]}, with "delimiter" for words '
                "instead of wordpieces",
            },
            read=_read_metadata,
        ),
        Option(
            "--signature-name",
            {
                "metavar": "NAME",
                "help": "the signature's name (default: serving_default)",
            },
        ),
    ),
    examples="""\
  A quarter of the size for a phone:
    keras-mha export classifier.keras --to tflite --out dist \\
        --samples ids.npy --quantization dynamic_int8

  Files that take texts, for LiteRT and for MediaPipe on a phone:
    keras-mha export model.keras --to tflite --out dist --samples reviews.txt \\
        --text --metadata labels.txt
""",
)
