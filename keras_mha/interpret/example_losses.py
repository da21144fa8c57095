"""The loss of each example, counted as Keras' `compile` and `evaluate` count it."""

from __future__ import annotations

from functools import partial
from typing import Any

import keras
from keras import ops

# What `compile` makes of a name or a function, which has no public name.
from keras.src.trainers.compile_utils import get_loss

from keras_mha.layers.keras_mask import get_keras_mask
from keras_mha.typing import Tensor


def check_loss(loss: Any) -> None:
    """Refuses what `example_losses` does not take.

    Raises:
        TypeError: If it is not a name, a `keras.losses.Loss` or a function.
        ValueError: If there is none.
    """
    if loss is None:
        raise ValueError(
            "`loss` is needed where `model` was not compiled with one. "
            "Received: loss=None"
        )
    if not isinstance(loss, str) and not callable(loss):
        raise TypeError(
            "`loss` must be the name of a loss, a `keras.losses.Loss` or a function. "
            f"Received: loss={loss!r}"
        )


def example_losses(loss: Any, labels: Any, outputs: Any, rows: int) -> Tensor:
    """The loss of each example, averaged over its positions.

    Args:
        loss: What `compile` takes for one output; see `head_importance`.
        labels: Tensors of B rows, in any structure that the loss takes.
        outputs: What the model answered, with the masks that Keras attached.
        rows: B.

    Returns:
        `(B,)`, in the loss's dtype, which is `keras.config.floatx()` unless it was
        made with another. It averages over the positions that the masks of `outputs`
        and of the losses leave, and is zero where they leave none.

    Raises:
        ValueError: If losses are not one or more for each example, or a mask does not
            fit them.

    Example:

    >>> import numpy as np
    >>> from keras_mha.interpret.example_losses import example_losses
    >>> labels, outputs = np.array([0, 1]), np.array([[0.5], [0.5]], "float16")
    >>> example_losses("mae", labels, outputs, 2).numpy().tolist()
    [0.5, 0.5]
    """
    resolved: Any = get_loss(loss, labels, outputs)
    as_floats = partial(ops.convert_to_tensor, dtype=resolved.dtype)
    named = isinstance(loss, str | type | keras.losses.Loss)
    # What `compile` hands a function is of one structure; ours may take others.
    several = keras.tree.is_nested(labels) or keras.tree.is_nested(outputs)
    function: Any = loss if several and not named else resolved.call
    unreduced: Any = function(
        keras.tree.map_structure(as_floats, labels),
        keras.tree.map_structure(as_floats, outputs),
    )
    masks = get_keras_mask(outputs), get_keras_mask(unreduced)
    losses: Any = as_floats(unreduced)
    shape = tuple(losses.shape)
    if not shape or shape[0] != rows:
        raise ValueError(
            f"`loss` must return one number or more for each of the {rows} examples, "
            f"unreduced. Received: losses of shape {shape}"
        )
    if len(shape) == 1 and not named:
        return losses  # the function knows best which positions to average
    counted = ops.ones(shape, "bool")
    for mask in masks:
        if mask is not None:
            counted = ops.logical_and(counted, _spread(mask, shape))
    sums = ops.sum(ops.reshape(ops.where(counted, losses, 0), (rows, -1)), axis=1)
    counts = ops.sum(ops.reshape(ops.cast(counted, losses.dtype), (rows, -1)), axis=1)
    return ops.divide_no_nan(sums, counts)


def _spread(mask: Any, shape: tuple[int, ...]) -> Tensor:
    """A mask of the first axes of losses of that shape, that spreads over them."""
    first = tuple(mask.shape)
    if len(first) > len(shape) and first[-1] == 1:
        first = first[:-1]
    if first != shape[: len(first)]:
        raise ValueError(
            "`loss` must keep the axes of the outputs' mask; one that averages the "
            "last axis needs labels of as many axes as the outputs. Received: losses "
            f"of shape {shape} and a mask of shape {tuple(mask.shape)}"
        )
    ones = (1,) * (len(shape) - len(first))
    return ops.reshape(ops.cast(mask, "bool"), first + ones)
