"""Gradients of a loss by head masks, which on TensorFlow a tape gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from typing_extensions import override

from keras_mha.interpret.paths import count_rows, run_model, watching
from keras_mha.layers.attention_layer import AttentionLayer
from keras_mha.layers.observer import Observer
from keras_mha.typing import Tensor

# Float16 has numbers from 6e-8 to 65504, and a position of a long text may have less of
# the gradient than that. Multiplying by powers of two changes no digit.
_SCALES = tuple(2.0**power for power in range(12, -25, -6))


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
    tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
    with tape as masks.tape:
        with watching(model, masks):
            outputs = run_model(model, inputs)
        # An example's loss depends only on its own row of the masks.
        losses = losses_of(labels, outputs, B)
    gradients = _scaled_gradients(tape, losses, masks.by_path)
    zeros = {path: np.zeros((B, layer.num_heads)) for path, layer in layers.items()}
    return zeros | gradients


def _scaled_gradients(
    tape: tf.GradientTape, losses: Tensor, masks: Mapping[str, Tensor]
) -> dict[str, np.ndarray]:
    """The gradients `(B, N)` of losses `(B,)` by masks, in float64, by path.

    They are taken of scaled losses, so that float16 inside the model does not round
    them to zero: each example's is the one of the first scale where it is finite.
    """
    gradients = {path: np.zeros(mask.shape) for path, mask in masks.items()}
    left = np.ones(int(losses.shape[0]), bool)
    for scale in _SCALES:
        scales = tf.fill(losses.shape, tf.constant(scale, losses.dtype))
        scaled: Any = tape.gradient(losses, masks, output_gradients=scales)
        cut = [path for path, each in scaled.items() if each is None]
        if cut:
            raise ValueError(
                "The loss must depend on every attention layer that is called, by a "
                "path that gradients take; layers made under `keras.RematScope` do not "
                f"let them through. Received: no gradient at {cut}"
            )
        arrays = {path: np.asarray(g, np.float64) for path, g in scaled.items()}
        finite = np.all([np.isfinite(g).all(axis=1) for g in arrays.values()], axis=0)
        taken = left & finite if scale != _SCALES[-1] else left
        for path, array in arrays.items():
            gradients[path][taken] = array[taken] / scale
        left &= ~taken
        if not left.any():
            break
    return gradients


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
