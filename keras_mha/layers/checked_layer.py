"""Refuses inputs that a layer cannot take, in words of the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
from typing_extensions import override

# How to make dense what is not.
_DENSE = {
    "RaggedTensor": "`{name}.to_tensor()` pads its rows, and "
    "`tf.sequence_mask({name}.row_lengths())` is their padding mask",
    "SparseTensor": "`tf.sparse.to_dense({name})` fills it up",
}


class CheckedLayer(keras.layers.Layer):
    """Base of the layers: checks the shapes of tensors before anything is built."""

    def argument_shapes(self) -> Mapping[str, str]:
        """Returns the shapes of the call's first arguments, by name and in order.

        They are in letters, as in the docstring; `...` is any number of axes.
        """
        return {}

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shapes = self.argument_shapes()
        tensors = {**dict(zip(shapes, args, strict=False)), **kwargs}
        for name, shape in shapes.items():
            if tensors.get(name) is not None:
                check_shape(tensors[name], name, shape, type(self).__name__)
        return super().__call__(*args, **kwargs)


def check_shape(tensor: Any, name: str, shape: str, owner: str) -> None:
    """Refuses what is not a dense tensor of this rank.

    Args:
        tensor: The argument.
        name: Its name.
        shape: Its shape in letters, such as `"(B, T, D)"`; with `...` for any number
            of axes.
        owner: What takes it.

    Raises:
        TypeError: If it is not a tensor, or is ragged or sparse.
        ValueError: If it has another rank.

    Example:

    >>> import numpy as np
    >>> from keras_mha.layers.checked_layer import check_shape
    >>> check_shape(np.ones((2, 8)), "x", "(B, T, D)", "Mix")
    Traceback (most recent call last):
    ValueError: `Mix`: `x` must have the shape (B, T, D). Received: x of shape (2, 8)
    """
    text = f"`{owner}`: `{name}` must have the shape {shape}"
    kind = "RaggedTensor" if getattr(tensor, "ragged", False) else type(tensor).__name__
    if kind in _DENSE:
        raise TypeError(
            f"{text}, dense. {_DENSE[kind].format(name=name)}. "
            f"Received: a {kind} of shape {tuple(tensor.shape)}"
        )
    if not hasattr(tensor, "shape"):
        raise TypeError(f"{text}, one tensor. Received: {name} of type {kind}")
    axes = shape.strip("()").replace(" ", "").split(",")
    known = len([axis for axis in axes if axis != "..."])
    rank = _rank(tensor)
    if rank is None or rank < known or (rank > known and "..." not in axes):
        received = "unknown rank" if rank is None else f"shape {tuple(tensor.shape)}"
        raise ValueError(f"{text}. Received: {name} of {received}")


def _rank(tensor: Any) -> int | None:
    shape = tensor.shape
    # TensorFlow's shapes have a rank, which may be unknown.
    return shape.rank if hasattr(shape, "rank") else len(shape)
