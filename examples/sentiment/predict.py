"""Prints how likely each text is negative, and how likely positive.

Example:
    python examples/sentiment/predict.py "A fine film." "Two hours, all of them dull."
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Set before TensorFlow is imported, to silence its notes on the hardware.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

DEFAULT_DIRECTORY = Path(__file__).resolve().parents[2] / "dist" / "sentiment"
# Texts are bytes: a shell passes on invalid UTF-8, and the models take it.
Predict = Callable[[Sequence[bytes]], np.ndarray]


def load_keras(directory: Path) -> Predict:
    """Loads the `.keras` file: strings in, run by Keras."""
    import keras
    import tensorflow as tf

    import keras_mha  # noqa: F401 - registers the layers that the file names.

    model: Any = keras.saving.load_model(directory / "model.keras", compile=False)
    return lambda texts: model.predict(tf.constant(list(texts)), verbose=0)


def load_saved_model(directory: Path) -> Predict:
    """Loads the SavedModel: strings in, run without Keras or keras_mha."""
    import tensorflow as tf
    import tensorflow_text  # noqa: F401 - registers the tokenizer's operations.

    serve = tf.saved_model.load(directory / "saved_model" / "1").signatures[
        "serving_default"
    ]
    (name,) = serve.structured_input_signature[1]
    return lambda texts: serve(**{name: tf.constant(list(texts))})[
        "probabilities"
    ].numpy()


def load_tflite(directory: Path) -> Predict:
    """Loads the TFLite file: ids in, run by LiteRT after TensorFlow's tokenizer."""
    import tensorflow as tf
    from ai_edge_litert.interpreter import Interpreter

    from keras_mha.text import WordpieceTokenizer

    interpreter = Interpreter(str(directory / "model.tflite"))
    runner = interpreter.get_signature_runner()
    ((name, details),) = runner.get_input_details().items()
    length = int(details["shape"][1])
    tokenizer = WordpieceTokenizer(
        directory / "vocab.txt", max_length=length, pad_to=length
    )

    def predict(texts: Sequence[bytes]) -> np.ndarray:
        ids = tokenizer(tf.constant(list(texts))).numpy()
        rows = [runner(**{name: row[np.newaxis]})["probabilities"] for row in ids]
        return np.concatenate(rows)

    return predict


RUNTIMES = {
    "keras": load_keras,
    "saved_model": load_saved_model,
    "tflite": load_tflite,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    description, _, epilog = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="a review")
    parser.add_argument(
        "--runtime",
        choices=sorted(RUNTIMES),
        default="keras",
        help="which file answers; the probabilities are the same (default: keras)",
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=DEFAULT_DIRECTORY,
        help="where train.py wrote the files (default: dist/sentiment)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a text"
    )
    options = parser.parse_args(arguments)
    if not (options.directory / "labels.txt").exists():
        print(
            f"No trained model in {options.directory}; run `make sentiment` first.",
            file=sys.stderr,
        )
        return 2

    labels = (options.directory / "labels.txt").read_text("utf-8").split()
    # Back to the bytes that the shell passed.
    texts = [os.fsencode(text) for text in options.texts]
    probabilities = RUNTIMES[options.runtime](options.directory)(texts)
    for content, row in zip(texts, probabilities.tolist(), strict=True):
        text = content.decode("utf-8", "replace")
        named = dict(zip(labels, row, strict=True))
        if options.json:
            print(json.dumps({"text": text, **named}, ensure_ascii=False))
        else:
            figures = "  ".join(f"{name} {value:.4f}" for name, value in named.items())
            # Keep each text on one line.
            shown = "".join(c if c.isprintable() else "\ufffd" for c in text)
            print(f"{figures}  {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
