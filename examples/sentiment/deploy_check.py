"""Runs the trained model's files in every installed runtime: `make deploy-check`.

Run train.py first. This adds an ONNX file, TFLite files in float32, in int8 for GPUs
and in int8 for the CPU, and two that take texts, one of them for MediaPipe. It compares
all of them with the model, on the whole test part and on hostile texts, and writes
tables and pictures into the same directory. It exits with 1 if a value is wrong, or if
the accuracy of int8 is more than half a point away from that of float.

Example:
    python examples/sentiment/deploy_check.py --directory dist/sentiment
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Set before TensorFlow is imported, to silence its notes on the hardware.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from data import LABELS, load_reviews, split_fold
from model import committee, encode
from report import write_text

from keras_mha.export import (
    BertMetadata,
    RuntimeCheck,
    VerificationReport,
    export_onnx,
    export_tflite,
    verify,
)

EXPORT_SAMPLES = 32
# The largest allowed difference of int8's accuracy from float's, in percent of reviews.
MOST_POINTS = 0.5
# Folders of TFLite files, with their quantization and target.
FLOAT, INT8_GPU, INT8_CPU = "float32", "dynamic_int8_gpu", "dynamic_int8"
FILES = {
    FLOAT: (None, "gpu"),
    INT8_GPU: ("dynamic_int8", "gpu"),
    INT8_CPU: ("dynamic_int8", "cpu"),
}
LITERT = "LiteRT interpreter, CPU"
# The runtimes that read files which take texts.
OF_TEXTS = ("saved_model", "litert", "mediapipe")
# Empty, unknown words, a whole book, control characters, invalid UTF-8, right-to-left
# letters, emoji with joiners.
HOSTILE = [
    "",
    "qqqqq \u4e00\u4e01",
    "a fine film " * 8334,
    "bad\x00\x01\x1b[31m\r\n\tfilm",
    b"fine \xff\xfe\xc3 film",
    "\u202e\u05e1\u05e8\u05d8 \u0637\u064a\u0628 film",
    "\U0001f3ac\U0001f468\u200d\U0001f469\u200d\U0001f467 bad",
]


def check(directory: Path, rows: int | None) -> dict[str, VerificationReport]:
    """Exports the missing files, and verifies all, grouped by their inputs."""
    of_texts: Any = keras.saving.load_model(directory / "model.keras")
    tokenizer = of_texts.get_layer("tokenizer")
    members = [one for one in of_texts.layers if isinstance(one, keras.Sequential)]
    of_ids = committee(members)
    seed = json.loads((directory / "metrics.json").read_text("utf-8"))["seed"]
    test = split_fold(load_reviews(), 0, seed=seed).test
    chosen = np.random.default_rng(0).permutation(len(test))[:rows]
    texts, labels = test.texts[chosen].tolist(), test.labels[chosen]

    def to_ids(texts: list[Any]) -> np.ndarray:
        cut = encode(texts, tokenizer.vocabulary, length)
        return np.stack([np.pad(row, (0, length - len(row))) for row in cut])

    length = tokenizer.max_length
    ids, hostile = to_ids(texts), to_ids(HOSTILE)
    few = ids[:EXPORT_SAMPLES]
    onnx = directory / "model.onnx"
    tell(f"export to {onnx}")
    export_onnx(of_ids, onnx, samples=few, overwrite=True)
    files = {}
    for name, (quantization, target) in FILES.items():
        tell(f"export to {directory / 'deployment' / name}")
        written = export_tflite(
            of_ids,
            directory / "deployment" / name,
            sequence_lengths=(length,),
            samples=few,
            overwrite=True,
            quantization=quantization,
            target=target,
        )
        files[name] = written.files[0].path

    tell(f"export to {directory / 'deployment' / 'texts'}")
    written = export_tflite(
        of_texts,
        directory / "deployment" / "texts",
        sequence_lengths=(length,),
        samples=texts[:EXPORT_SAMPLES],
        overwrite=True,
        text=True,
        metadata=BertMetadata(LABELS),
    )
    text_files: Any = {
        "saved_model": directory / "saved_model",
        "tflite": [file.path for file in written.files if file.kind != "ids"],
        "runtimes": OF_TEXTS,
    }
    on_gpus, on_cpus = [files[FLOAT], files[INT8_GPU]], [files[INT8_CPU]]
    of_gpu = {"tflite": on_gpus, "onnx": onnx}
    of_cpu = {"tflite": on_cpus, "runtimes": ["litert", "litert_arm"]}
    runs: dict[str, tuple[Any, dict[str, Any]]] = {
        "texts": (of_texts, {"samples": texts, "labels": labels, **text_files}),
        "hostile": (of_texts, {"samples": HOSTILE, **text_files}),
        "ids": (of_ids, {"samples": ids, "labels": labels, **of_gpu}),
        "ids_cpu": (of_ids, {"samples": ids, "labels": labels, **of_cpu}),
        "hostile_ids": (of_ids, {"samples": hostile, **of_gpu}),
        "hostile_ids_cpu": (of_ids, {"samples": hostile, **of_cpu}),
    }
    reports = {}
    for name, (model, arguments) in runs.items():
        tell(f"verify {name}")
        reports[name] = verify(model, **arguments)
    return reports


def tell(step: str) -> None:
    """Announces the next step, which may take minutes."""
    print(f"{step} ...", file=sys.stderr, flush=True)


def compare_accuracies(checks: Sequence[RuntimeCheck]) -> tuple[str, bool]:
    """Compares size and accuracy of the TFLite files, run in LiteRT, with float's.

    Returns:
        A Markdown section, and whether every accuracy is near float's. An unknown
        accuracy is not.
    """
    by_folder = {
        Path(check.file).parent.name: check
        for check in checks
        if check.runtime == LITERT and check.file
    }
    plain = by_folder.get(FLOAT)
    if plain is None or plain.accuracy is None or plain.size_bytes is None:
        return f"## Accuracy of int8: not passed\n\n{LITERT} ran no float file.", False
    lines = [
        "| file | bytes | share of float | accuracy | points from float | agreement |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    passed = True
    for name in FILES:
        one = by_folder.get(name)
        if one is None or one.accuracy is None or one.label_agreement is None:
            lines.append(f"| {name} | not run | | | | |")
            passed = False
            continue
        points = 100 * (one.accuracy - plain.accuracy)
        passed = passed and abs(points) <= MOST_POINTS
        share = (one.size_bytes or 0) / plain.size_bytes
        lines.append(
            f"| {name} | {one.size_bytes} | {share:.3f} | {one.accuracy:.2%} | "
            f"{points:+.2f} | {one.label_agreement:.2%} |"
        )
    verdict = "passed" if passed else "not passed"
    head = (
        f"## Accuracy of int8 on {plain.samples} reviews of the test part: {verdict}"
        f"\n\nIn {LITERT}; up to {MOST_POINTS} points from float are allowed. "
        "Agreement is with the Keras model's labels."
    )
    return "\n\n".join([head, "\n".join(lines)]), passed


def main() -> None:
    """Checks, prints and writes the tables; exits with 1 if something is wrong."""
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
        help="how many reviews (default: the whole test part); 200 in an emulated "
        "runtime",
    )
    options = parser.parse_args()
    if not (options.directory / "model.keras").exists():
        parser.error(f"{options.directory} holds no model.keras: run train.py first")
    reports = check(options.directory, options.rows)
    folder = options.directory / "deployment"
    for name, report in reports.items():
        for suffix in ("json", "png"):
            report.write(folder / f"{name}.{suffix}")
    of_ids = [*reports["ids"].checks, *reports["ids_cpu"].checks]
    accuracies, near = compare_accuracies(of_ids)
    tables = [
        report.to_markdown().replace(" of ", f" on {name} of ", 1)
        for name, report in reports.items()
    ]
    text = "\n\n".join([*tables, accuracies])
    write_text(folder / "report.md", text)
    print(text)
    passed = near and all(report.passed for report in reports.values())
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
