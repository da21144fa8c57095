"""Inputs that a model takes, drawn with padding and without.

Letters: B batch, T length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

# Where a size is free.
_BATCH, _LENGTH = 4, 6


class _Hints(NamedTuple):
    """What the layers of a model tell of its inputs.

    Attributes:
        limit: Ids are lower; `None` if the model looks nothing up.
        mask_values: What stands for padding in floats.
        words: What texts are made of.
        single: Whether each string is one word.
    """

    limit: int | None
    mask_values: list[float]
    words: list[str]
    single: bool


class _UnknownInputsError(Exception):
    """Inputs cannot be drawn."""


def drawn_inputs(model: Any) -> Any:
    """Draws inputs for a model; `None` if that does not tell what it takes.

    The first row has no padding, others have more and more.
    """
    hints = _hints(model._flatten_layers())
    rng = np.random.default_rng(0)

    def draw(shape: Any, dtype: str) -> Any:
        sizes = [_LENGTH if size is None else size for size in shape]
        sizes[0] = shape[0] or _BATCH
        return ops.convert_to_tensor(_draw(rng, tuple(sizes), dtype, hints))

    try:
        return _in_structure(model, draw)
    except (_UnknownInputsError, KeyError):
        return None


def _in_structure(model: Any, draw: Callable[[Any, str], Any]) -> Any:
    if isinstance(model, keras.Function):
        return keras.tree.map_structure(lambda x: draw(x.shape, x.dtype), model.input)
    if getattr(model, "inputs", None):  # of a `keras.Sequential`
        return draw(model.inputs[0].shape, model.inputs[0].dtype)
    config = model.get_build_config() or {}
    return keras.tree.map_shape_structure(
        lambda shape: draw(shape, "float32"), config["input_shape"]
    )


def _hints(layers: list[Any]) -> _Hints:
    limits = [x.input_dim for x in layers if isinstance(x, keras.layers.Embedding)]
    masked: list[Any] = [
        x.mask_value for x in layers if isinstance(x, keras.layers.Masking)
    ]
    texts = [x for x in layers if isinstance(x, keras.layers.TextVectorization)]
    lookups = [x for x in layers if isinstance(x, keras.layers.StringLookup)]
    words = [
        word
        for layer in texts or lookups
        for word in layer.get_vocabulary()
        if word and word != "[UNK]"
    ]
    return _Hints(
        limit=min(limits, default=None),
        mask_values=masked,
        words=words,
        single=not texts,
    )


def _draw(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str, hints: _Hints
) -> np.ndarray:
    if dtype == "string":
        if not hints.words:
            raise _UnknownInputsError
        return _draw_texts(rng, shape, hints)
    is_ids = (
        hints.limit is not None and len(shape) == 2
    )  # Keras calls them float32, too
    if "float" in dtype and not is_ids:
        values, pads = rng.normal(size=shape), hints.mask_values
    elif dtype == "bool":
        values, pads = np.ones(shape), [0.0]
    else:
        values, pads = rng.integers(1, max(hints.limit or 2, 2), size=shape), [0.0, 1.0]
    if len(shape) > 1 and pads:
        for row, length in enumerate(_lengths(*shape[:2])):
            values[row, length:] = pads[row % len(pads)]
    return values.astype(dtype)


def _draw_texts(
    rng: np.random.Generator, shape: tuple[int, ...], hints: _Hints
) -> np.ndarray:
    texts = [
        " ".join(rng.choice(hints.words, 1 if hints.single else length))
        for length in _lengths(shape[0], _LENGTH)
    ]
    rows = np.array(texts).reshape(-1, *[1] * (len(shape) - 1))
    return np.broadcast_to(rows, shape)


def _lengths(B: int, T: int) -> list[int]:
    """Lengths of the rows without their padding."""
    if B == 1:
        return [max(1, T // 2)]
    return [max(1, T >> row) for row in range(B)]
