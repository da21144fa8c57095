"""Steps from TensorFlow functions, in a graph or compiled by XLA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from benchmarks.contenders.step import Step, heads, normal


def of_heads(
    attend: Callable[..., Any],
    shape: tuple[int, int, int, int],
    *,
    dtype: str,
    backward: bool,
    compiled: bool,
) -> Step:
    """Times `attend(query, key, value)`, or its gradients for an upstream one."""
    tensors = [tf.cast(array, dtype) for array in heads(shape, 4)]
    # TensorFlow lets go of NumPy's arrays at the operation after.
    tf.identity(tensors[0])

    @tf.function(jit_compile=compiled, autograph=False)
    def forward(query: Any, key: Any, value: Any) -> Any:
        return attend(query, key, value)

    @tf.function(jit_compile=compiled, autograph=False)
    def gradients(query: Any, key: Any, value: Any, upstream: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch((query, key, value))
            mixed = attend(query, key, value)
        return mixed, tape.gradient(mixed, (query, key, value), upstream)

    if backward:
        return Step(lambda: gradients(*tensors))
    return Step(lambda: forward(*tensors[:3]))


def of_layer(
    layer: Any, shape: tuple[int, int, int], *, backward: bool, compiled: bool
) -> Step:
    """Times a layer on inputs `(B, T, D)`, or its gradients for inputs and weights."""
    inputs = tf.constant(normal(*shape))
    layer(inputs[:, :1])

    @tf.function(jit_compile=compiled, autograph=False)
    def forward(inputs: Any) -> Any:
        return layer(inputs)

    @tf.function(jit_compile=compiled, autograph=False)
    def gradients(inputs: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(tf.square(layer(inputs)))
        return tape.gradient(loss, [inputs, *layer.trainable_variables])

    chosen = gradients if backward else forward
    return Step(lambda: chosen(inputs))


def of_training(
    block: Any, shape: tuple[int, int, int], *, jit_compile: bool | Literal["auto"]
) -> Step:
    """Times the step that `model.fit` repeats, for a model of only `block`."""
    inputs = keras.Input(shape[1:])
    model = keras.Model(inputs, block(inputs))
    model.compile(keras.optimizers.SGD(1e-3), "mse", jit_compile=jit_compile)  # pyright: ignore[reportArgumentType]
    examples, targets = (tf.constant(normal(*shape, seed=seed)) for seed in (0, 1))
    return Step(lambda: model.train_on_batch(examples, targets))


def of_batches(
    model: Any, batches: Sequence[tuple[np.ndarray, ...]], width: int
) -> Step:
    """Times a training step for each batch, in a graph, for different shapes.

    Args:
        model: Called with the tensors of a batch; gives `(rows, T, width)`.
        batches: Integer arrays `(rows, T)`; 0 in the first of a batch is padding.
        width: Size of the model's outputs; targets are zeros of that size.
    """
    tensors = [tuple(tf.constant(array) for array in batch) for batch in batches]
    optimizer = keras.optimizers.SGD(1e-3)
    model(*tensors[0])
    optimizer.build(model.trainable_variables)

    @tf.function(
        autograph=False,
        input_signature=[
            tf.TensorSpec((None, None), tensor.dtype) for tensor in tensors[0]
        ],
    )
    def train(*batch: Any) -> Any:
        with tf.GradientTape() as tape:
            real = tf.cast(batch[0] != 0, "float32")[..., None]
            squares = tf.square(model(*batch)) * real
            loss = tf.reduce_sum(squares) / (tf.reduce_sum(real) * width)
        weights = model.trainable_variables
        optimizer.apply(tape.gradient(loss, weights), weights)
        return loss

    return Step(lambda: [train(*batch) for batch in tensors], parts=len(tensors))
