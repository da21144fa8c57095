"""Reads off a functional model which inputs are ids, and which id is padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
from keras.src.ops.numpy import Equal, NotEqual

from keras_mha.layers.embedding import TokenAndPositionEmbedding

_EMBEDDINGS = (keras.layers.Embedding, TokenAndPositionEmbedding)


def is_looked_up(tensor: Any) -> bool:
    """Tells whether a table reads a tensor of a functional model.

    Then its numbers are whole and not negative, whatever type Keras gives it.

    Example:

    >>> import keras
    >>> from keras_mha.export.ids import is_looked_up
    >>> ids, image = keras.Input((7,)), keras.Input((5, 5, 3))
    >>> vectors, map = keras.layers.Embedding(11, 3)(ids), keras.layers.Dense(3)(image)
    >>> is_looked_up(ids), is_looked_up(image)
    (True, False)
    """
    return any(
        isinstance(part, _EMBEDDINGS)
        for node in _readers(tensor)
        for part in _parts(node.operation)
    )


def padding_id(tensor: Any) -> int:
    """Returns the number that stands for padding in an input of ids.

    It is the one that the model compares the ids with, as in `ids != 1`, else 0.

    Example:

    >>> import keras
    >>> from keras_mha.export.ids import padding_id
    >>> ids, others = keras.Input((7,), dtype="int32"), keras.Input((7,), dtype="int32")
    >>> mask = keras.ops.not_equal(ids, 1)
    >>> padding_id(ids), padding_id(others)
    (1, 0)
    """
    for node in _readers(tensor):
        if isinstance(node.operation, Equal | NotEqual):
            for other in node.arguments.args:
                if isinstance(other, int | float) and other == int(other):
                    return int(other)
    return 0


def _readers(tensor: Any) -> Iterator[Any]:
    """Yields the calls that read a tensor, also those inside models in the model."""
    for node in tensor._keras_history.operation._outbound_nodes:
        inner = getattr(node.operation, "_functional", node.operation)
        inputs = getattr(inner, "inputs", None)
        for place, read in enumerate(node.input_tensors):
            if read.name != tensor.name:  # the same in a copy of the model
                continue
            if inputs is not None and len(inputs) == len(node.input_tensors):
                yield from _readers(inputs[place])
            else:
                yield node


def _parts(operation: Any) -> list[Any]:
    if isinstance(operation, keras.layers.Layer):
        return list(operation._flatten_layers())
    return [operation]
