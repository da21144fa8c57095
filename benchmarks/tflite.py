"""Compares our TFLite files with Keras' of the same model from stock layers.

    python -m benchmarks.tflite

A classifier of two blocks, 256 wide, with 4 heads, at 128 tokens. All files run in
one process on one thread, in turns, and medians are printed as a Markdown table.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_mha
from keras_mha.export import export_tflite

VOCABULARY, LENGTH, WIDTH, HEADS, HIDDEN, BLOCKS = 2000, 128, 256, 4, 1024, 2
ROUNDS, UNCOUNTED = 120, 20


def build_ours() -> keras.Model:
    """Builds a model of our layers from ids `(B, T)` to probabilities `(B, 2)`."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = keras_mha.TokenAndPositionEmbedding(VOCABULARY, LENGTH, WIDTH)(ids)
    for _ in range(BLOCKS):
        hidden = keras_mha.TransformerEncoderBlock(HEADS, HIDDEN)(hidden)
    return _finish(ids, hidden)


def build_stock() -> keras.Model:
    """Builds it from Keras' layers, with one length, which its converter keeps."""
    layers = keras.layers
    ids = keras.Input((LENGTH,), dtype="int32", name="ids")
    mask = keras.ops.not_equal(ids, 0)
    seen = keras.ops.expand_dims(mask, 1)
    hidden = layers.Embedding(VOCABULARY, WIDTH)(ids)
    positions = layers.Embedding(LENGTH, WIDTH)(keras.ops.arange(LENGTH))
    hidden = layers.Add()([hidden, keras.ops.expand_dims(positions, 0)])
    for _ in range(BLOCKS):
        normal = layers.LayerNormalization(epsilon=1e-6)(hidden)
        attention = layers.MultiHeadAttention(HEADS, WIDTH // HEADS)
        mixed = attention(normal, normal, attention_mask=seen)
        hidden = layers.Add()([hidden, mixed])
        normal = layers.LayerNormalization(epsilon=1e-6)(hidden)
        inner = layers.Dense(HIDDEN, activation="gelu")(normal)
        hidden = layers.Add()([hidden, layers.Dense(WIDTH)(inner)])
    return _finish(ids, hidden, mask)


def _finish(ids: Any, hidden: Any, mask: Any = None) -> keras.Model:
    pooled = keras.layers.GlobalAveragePooling1D()(hidden, mask=mask)
    head = keras.layers.Dense(2, activation="softmax", name="probabilities")
    model = keras.Model(ids, head(pooled))
    generator = np.random.default_rng(7)
    for weight in model.weights:  # no factor of one, no offset of zero: they fold away
        weight.assign(generator.normal(scale=0.1, size=weight.shape))
    return model


class Contender:
    """A file in its interpreter.

    Attributes:
        name: Its name in the table.
        size: Of the file, in bytes.
        operations: How many it holds.
        partitions: How many parts of it the CPU's delegate takes over.
        seconds: How long its runs took.
    """

    def __init__(self, name: str, path: Path, ids: np.ndarray) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        plain = Interpreter(
            model_path=str(path),
            experimental_op_resolver_type=(
                OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            ),
        )
        self.name = name
        self.size = path.stat().st_size
        self.operations = len(plain._get_ops_details())
        self._interpreter: Any = Interpreter(model_path=str(path), num_threads=1)
        (details,) = self._interpreter.get_input_details()
        if details["shape"].tolist() != list(ids.shape):
            self._interpreter.resize_tensor_input(details["index"], ids.shape)
        self._interpreter.allocate_tensors()
        self._interpreter.set_tensor(details["index"], ids.astype(details["dtype"]))
        details = self._interpreter._get_ops_details()
        self.partitions = sum(op["op_name"] == "DELEGATE" for op in details)
        self.seconds: list[float] = []

    def run(self) -> None:
        """Runs once, and notes how long it took."""
        start = time.perf_counter()
        self._interpreter.invoke()
        self.seconds.append(time.perf_counter() - start)


def export_all(directory: Path, ids: np.ndarray) -> list[Contender]:
    """Writes and loads every file."""
    stock = build_stock()
    stock.export(str(directory / "stock.tflite"), format="litert", verbose=False)
    contenders = [Contender("Keras, stock layers", directory / "stock.tflite", ids)]
    variants: tuple[tuple[str, Any, Any], ...] = (
        ("stock layers, our export", stock, None),
        ("our layers, float", build_ours(), None),
        ("our layers, float16", build_ours(), "float16"),
        ("our layers, dynamic int8", build_ours(), "dynamic_int8"),
        ("our layers, int8 dense", build_ours(), "int8_dense"),
    )
    for name, model, quantization in variants:
        (file,) = export_tflite(
            model,
            directory,
            sequence_lengths=(LENGTH,),
            samples=ids,
            overwrite=True,
            quantization=quantization,
            quantized_tolerance=1.0 if quantization else None,
            representative_data=ids if quantization == "int8_dense" else None,
        ).files
        contenders.append(Contender(name, Path(file.path), ids))
    return contenders


def to_markdown(contenders: list[Contender]) -> str:
    """Writes a row for each file; times as medians and as ratios to the first."""
    rows = [
        "| file | operations | partitions | kB | ms | of Keras' |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    medians = [statistics.median(c.seconds[UNCOUNTED:]) for c in contenders]
    for one, median in zip(contenders, medians, strict=True):
        rows.append(
            f"| {one.name} | {one.operations} | {one.partitions} | "
            f"{one.size / 1000:.0f} | {1000 * median:.2f} | {median / medians[0]:.2f} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Exports, measures in turns and prints."""
    ids = np.random.default_rng(3).integers(1, VOCABULARY, (1, LENGTH))
    ids[:, 100:] = 0
    with tempfile.TemporaryDirectory() as name:
        contenders = export_all(Path(name), ids)
        for _ in range(ROUNDS):
            for contender in contenders:
                contender.run()
    print(to_markdown(contenders))


if __name__ == "__main__":
    main()
