"""Runs the trained model's files in every runtime at hand: `make deploy-check`.

Needs what train.py wrote. Adds an ONNX file, TFLite files in float32 and int8 for the
GPU, and two that take texts, one of them for MediaPipe; and compares all with the
model, on reviews of the test part and on texts as users should not send them. The
tables and pictures are written beside.

Example:
    python examples/sentiment/deploy_check.py --directory dist/sentiment
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

# Before TensorFlow is first imported: its notes on the hardware are not the result.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from data import LABELS, load_reviews, split_fold
from model import committee, encode
from report import write_text

# Registers the layer that the saved model begins with.
import keras_mha.text  # noqa: F401
from keras_mha.export import (
    BertMetadata,
    VerificationReport,
    export_onnx,
    export_tflite,
    verify,
)

EXPORT_SAMPLES = 32
# Those that read a file which takes texts.
OF_TEXTS = ("saved_model", "litert", "mediapipe")
# Nothing, unknown words, a whole book, control characters, broken UTF-8, letters from
# right to left, emoji with joiners.
HOSTILE = [
    "",
    "qqqqq \u4e00\u4e01",
    "a fine film " * 8334,
    "bad\x00\x01\x1b[31m\r\n\tfilm",
    b"fine \xff\xfe\xc3 film",
    "\u202e\u05e1\u05e8\u05d8 \u0637\u064a\u0628 film",
    "\U0001f3ac\U0001f468\u200d\U0001f469\u200d\U0001f467 bad",
]


def check(directory: Path, rows: int) -> dict[str, VerificationReport]:
    """Exports what is missing, and verifies the files by what they take."""
    of_texts: Any = keras.saving.load_model(directory / "model.keras")
    tokenizer = of_texts.get_layer("tokenizer")
    members = [one for one in of_texts.layers if isinstance(one, keras.Sequential)]
    of_ids = committee(members)
    seed = json.loads((directory / "metrics.json").read_text("utf-8"))["seed"]
    test = split_fold(load_reviews(), 0, seed=seed).test
    chosen = np.random.default_rng(0).permutation(len(test))[:rows]
    texts, labels = test.texts[chosen].tolist(), test.labels[chosen]

    length = tokenizer.max_length
    cut = encode(texts, tokenizer.vocabulary, length)
    ids = np.stack([np.pad(row, (0, length - len(row))) for row in cut])
    few = ids[:EXPORT_SAMPLES]
    export_onnx(of_ids, directory / "model.onnx", samples=few)
    files = []
    for quantization in (None, "dynamic_int8"):
        folder = directory / "deployment" / (quantization or "float32")
        written = export_tflite(
            of_ids,
            folder,
            sequence_lengths=(length,),
            samples=few,
            quantization=quantization,
            target="gpu",
        )
        files += [file.path for file in written.files]

    written = export_tflite(
        of_texts,
        directory / "deployment" / "texts",
        sequence_lengths=(length,),
        samples=texts[:EXPORT_SAMPLES],
        text=True,
        metadata=BertMetadata(LABELS),
    )
    given: Any = {
        "saved_model": directory / "saved_model",
        "tflite": [file.path for file in written.files if file.kind != "ids"],
        "runtimes": OF_TEXTS,
    }
    return {
        "texts": verify(of_texts, samples=texts, labels=labels, **given),
        "hostile": verify(of_texts, samples=HOSTILE, **given),
        "ids": verify(
            of_ids,
            samples=ids,
            labels=labels,
            tflite=files,
            onnx=directory / "model.onnx",
        ),
    }


def main() -> None:
    """Checks, prints and writes the tables; ends with 1 where something is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("dist/sentiment"),
        help="where train.py wrote (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=1000,
        help="how many reviews; 200 where a runtime is emulated (default: %(default)s)",
    )
    options = parser.parse_args()
    if not (options.directory / "model.keras").exists():
        parser.error(f"{options.directory} holds no model.keras: run train.py first")
    reports = check(options.directory, options.rows)
    for name, report in reports.items():
        for suffix in ("json", "png"):
            report.write(options.directory / "deployment" / f"{name}.{suffix}")
    table = "\n\n".join(
        report.to_markdown().replace(" of ", f" on {name} of ", 1)
        for name, report in reports.items()
    )
    write_text(options.directory / "deployment" / "report.md", table)
    print(table)
    sys.exit(0 if all(report.passed for report in reports.values()) else 1)


if __name__ == "__main__":
    main()
