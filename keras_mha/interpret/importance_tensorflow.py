"""Gradients of a loss by head masks, which on TensorFlow a tape gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from typing_extensions import override

from keras_mha.interpret.paths import count_rows, watching
from keras_mha.layers.attention_layer import AttentionLayer
from keras_mha.layers.observer import Observer
from keras_mha.typing import Tensor


def head_gradients(
    model: keras.layers.Layer,
    layers: Mapping[str, AttentionLayer],
    inputs: Any,
    labels: Any,
    losses_of: Callable[[Any, Any, int], Tensor],
) -> dict[str, np.ndarray]:
    """The gradient of each example's loss by the head masks of its layers.

    Args:
        model: The model, called once in inference.
        layers: Its attention layers by path.
        inputs: Tensors of B rows.
        labels: Likewise.
        losses_of: Function of labels, outputs and B that gives losses `(B,)`.

    Returns:
        `(B, N)` for each layer, by path; zeros for one that is not called.

    Raises:
        ValueError: If a layer sees other rows than the examples, or no gradient
            reaches a layer that was called.
    """
    B = count_rows(labels)
    masks = _Masks({id(layer): path for path, layer in layers.items()}, B)
    with tf.GradientTape(watch_accessed_variables=False) as masks.tape:
        with watching(model, masks):
            outputs = model(inputs, training=False)
        # An example's loss depends on its own row of the masks alone.
        losses = losses_of(labels, outputs, B)
    gradients: Any = masks.tape.gradient(losses, masks.by_path)
    cut = [path for path, gradient in gradients.items() if gradient is None]
    if cut:
        raise ValueError(
            "The loss must depend on every attention layer that is called, by a path "
            "that gradients take; layers made under `keras.RematScope` do not let "
            f"them through. Received: no gradient at {cut}"
        )
    found = {path: np.zeros((B, layer.num_heads)) for path, layer in layers.items()}
    return found | {path: np.asarray(g, np.float64) for path, g in gradients.items()}


class _Masks(Observer):
    """Head masks of ones `(B, N)`, one a layer, which a tape watches."""

    tape: tf.GradientTape

    def __init__(self, paths: Mapping[int, str], rows: int) -> None:
        self.paths = paths
        self.rows = rows
        self.by_path: dict[str, Tensor] = {}

    @override
    def head_mask(self, layer: keras.layers.Layer, mixed: Tensor) -> Tensor | None:
        path = self.paths.get(id(layer))
        if path is None:
            return None  # a layer that Keras does not know to be the model's
        if mixed.shape[0] != self.rows:
            raise ValueError(
                "Every attention layer must see one row for each example. Received: "
                f"{mixed.shape[0]} rows at {path!r} of {self.rows} examples"
            )
        if path not in self.by_path:
            mask = tf.ones((self.rows, mixed.shape[-2]))
            self.tape.watch(mask)
            self.by_path[path] = mask
        return self.by_path[path]
