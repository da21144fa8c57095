"""What `export_tflite` may be called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_mha.attention.numeric import plain_integer
from keras_mha.export.device.form import TARGETS, layers_as_they_are
from keras_mha.export.parity import check_tolerance
from keras_mha.export.tflite.quantization import TOLERANCES


def check_sizes(argument: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Refuses what are no sizes; returns each once."""
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise TypeError(
            f"`{argument}` must be a sequence, such as (16,). Received: {sizes!r}"
        )
    if not sizes:
        raise ValueError(f"`{argument}` must not be empty. Received: {sizes!r}")
    return tuple(dict.fromkeys(check_size(argument, size) for size in sizes))


def check_size(argument: str, size: Any) -> int:
    """Refuses what is no size."""
    number = plain_integer(size)
    if number is None or number < 1:
        raise ValueError(f"`{argument}` must be a positive integer. Received: {size!r}")
    return number


def check_input(model: keras.Model) -> None:
    """Refuses a model whose inputs are known and are not ids alone."""
    inputs = getattr(model, "inputs", None)
    if inputs is None:
        return
    described = ", ".join(f"{x.name}: {x.dtype} {x.shape}" for x in inputs)
    if any(x.dtype == "string" for x in inputs):
        raise ValueError(
            "`model` must take integer ids; strings need operations that TFLite has "
            "not built in. Pass the part of the model after its tokenizer: "
            "`without_tokenizer` gives it; or pass `text=True` for a file with those "
            f"operations besides. Received the inputs {described}"
        )
    if len(inputs) != 1 or "int" not in inputs[0].dtype or len(inputs[0].shape) != 2:
        raise ValueError(
            "`model` must have one integer input of shape (B, T), the ids. Received "
            f"the inputs {described}"
        )


def check_precision(model: keras.Model) -> bool:
    """Refuses half precision; returns whether Keras quantized any layer."""
    layers = list(model._flatten_layers(include_self=False))
    for layer in layers:
        if layer.compute_dtype in ("float16", "bfloat16"):
            raise ValueError(
                "`model` must compute in float32, as TFLite does. Received: layer "
                f"{layer.name!r} with compute_dtype={layer.compute_dtype!r}. Load "
                "the weights into a model made with the policy 'float32'."
            )
    return any(layer.quantization_mode is not None for layer in layers)


def check_target(
    model: keras.Model, target: str, quantization: str | None
) -> tuple[str, ...]:
    """Returns which layers stay as they are, or refuses them for the target."""
    if target not in TARGETS:
        raise ValueError(
            f"`target` must be one of {list(TARGETS)}. Received: target={target!r}"
        )
    notes = layers_as_they_are(model)
    if target == "gpu" and notes:
        raise ValueError(
            "`target='gpu'` needs every layer in its device form. Received: "
            + "; ".join(notes)
        )
    if target == "gpu" and quantization == "int8_dense":
        raise ValueError(
            "`target='gpu'` takes float activations: GPU delegates answer wrongly on "
            "int8 ones, without a word. Received: quantization='int8_dense'"
        )
    return notes


def tolerance_of_rounded(
    tolerance: float | None, quantization: str | None, rounded: bool
) -> float | None:
    """What a quantized file or model may differ by; `None` where nothing is."""
    if quantization is None and not rounded:
        if tolerance is not None:
            raise ValueError(
                "`quantized_tolerance` is for quantized files and models; the float "
                "file's is `tolerance`. Received: "
                f"quantized_tolerance={tolerance} with quantization=None"
            )
        return None
    if tolerance is None:
        return max(TOLERANCES.get(quantization or "", 0), 0.05 * rounded)
    check_tolerance(tolerance, "quantized_tolerance")
    return tolerance


def as_rows(samples: Any, argument: str) -> list[np.ndarray]:
    """Rows of ids that may differ in length."""
    rows = [np.asarray(row) for row in samples]
    if not rows or any(row.ndim != 1 or row.dtype.kind not in "iu" for row in rows):
        raise ValueError(
            f"`{argument}` must be one or more rows of integer ids. Received: "
            f"{[(str(row.dtype), row.shape) for row in rows[:3]]}"
        )
    return rows


def pad(rows: Sequence[np.ndarray], length: int, argument: str) -> np.ndarray:
    """The rows as one array, filled up with 0."""
    longest = max(map(len, rows))
    if longest > length:
        raise ValueError(
            f"`{argument}` must not be longer than any of `sequence_lengths`. "
            f"Received: a row of {longest} ids for the length {length}"
        )
    return np.stack([np.pad(row, (0, length - len(row))) for row in rows])
