"""What the tests of the layers share: data, weights, gradients, Keras' own layer.

Letters: B batch, T length, N heads, H head size, V head size of values, D width.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_mha import MultiHeadSelfAttention

ROOT = Path(__file__).resolve().parents[2]

# Unequal primes, so that no axis can be taken for another.
B, T, N, H, V, D = 3, 7, 2, 5, 11, 13


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Normal float32 numbers that depend on the seed alone."""
    drawn = np.random.default_rng(seed).normal(size=shape, scale=scale)
    return drawn.astype("float32")


def padding(*lengths: int, length: int = T) -> np.ndarray:
    """Boolean `(B, T)`, True for the first `lengths[b]` positions."""
    return np.arange(length) < np.array(lengths)[:, None]


PADDING = padding(5, 7, 3)
# Most pairs see each other, many do not, and every position sees itself.
PAIRS_2 = (np.random.default_rng(2).random((T, T)) < 0.6) | np.eye(T, dtype=bool)
PAIRS_3 = (np.random.default_rng(3).random((B, T, T)) < 0.6) | np.eye(T, dtype=bool)
PAIRS_4 = (np.random.default_rng(4).random((B, N, T, T)) < 0.6) | np.eye(T, dtype=bool)


def randomize(layer: Any, seed: int = 5, scale: float = 0.5) -> Any:
    """Gives every floating weight, biases included, normal values of its own."""
    for place, weight in enumerate(layer.weights):
        if keras.backend.is_float_dtype(weight.dtype):
            values = normal(*weight.shape, seed=seed + place, scale=scale)
            # A variance is positive.
            weight.assign(abs(values) if "variance" in weight.path else values)
    return layer


def made(layer: Any, *shapes: tuple[int | None, ...], seed: int = 5) -> Any:
    """Builds a layer and gives it random weights."""
    layer.build(*(shapes or [(B, T, D)]))
    randomize(layer, seed)
    return layer


def self_attention(**options: Any) -> MultiHeadSelfAttention:
    """A built layer of N heads of size H for width D, with random weights."""
    return made(MultiHeadSelfAttention(**{"num_heads": N, "key_dim": H, **options}))


def plain_config(layer: keras.layers.Layer) -> dict[str, Any]:
    """A configuration without what belongs to one build of one object."""
    config = keras.saving.serialize_keras_object(layer)["config"]
    return without_builds(config)


def without_builds(config: Any) -> Any:
    if isinstance(config, dict):
        return {
            name: without_builds(value)
            for name, value in config.items()
            if name not in ("build_config", "shared_object_id")
        }
    if isinstance(config, list | tuple):
        return [without_builds(each) for each in config]
    return config


def split_weights(layer: MultiHeadSelfAttention) -> list[np.ndarray]:
    """The weights in the order of `keras.layers.MultiHeadAttention.weights`."""
    return split_arrays([np.asarray(weight) for weight in layer.weights], layer)


def split_arrays(
    arrays: list[np.ndarray], layer: MultiHeadSelfAttention
) -> list[np.ndarray]:
    """Cuts what belongs to the fused weights into queries, keys and values."""
    size = layer.key_dim or D // N
    fused = 2 if layer.get_config()["use_bias"] else 1
    parts = [np.split(array, (size, 2 * size), axis=-1) for array in arrays[:fused]]
    return [part[place] for place in range(3) for part in parts] + arrays[fused:]


def stock_twin(layer: MultiHeadSelfAttention) -> keras.layers.MultiHeadAttention:
    """Keras' layer of the same options with the same weights, split."""
    config = layer.get_config()
    options = ("num_heads", "value_dim", "use_bias", "output_shape")
    stock = keras.layers.MultiHeadAttention(
        key_dim=layer.key_dim or D // N, **{name: config[name] for name in options}
    )
    width = int(layer.qkv_dense.kernel.shape[0])
    stock.build((B, T, width), (B, T, width))
    stock.set_weights(split_weights(layer))
    return stock


class Result(NamedTuple):
    """Outputs, and the gradients of a fixed random sum of them."""

    outputs: np.ndarray
    inputs: np.ndarray
    weights: list[np.ndarray]


def differentiate(
    function: Callable[[Any], Any], inputs: np.ndarray, weights: list[Any]
) -> Result:
    """Calls `function` and differentiates by its inputs and by `weights`."""
    tensor = tf.convert_to_tensor(inputs)
    with tf.GradientTape() as tape:
        tape.watch(tensor)
        outputs = function(tensor)
        loss = tf.reduce_sum(
            tf.cast(outputs, "float32") * normal(*outputs.shape, seed=9)
        )
    variables = [weight.value for weight in weights]
    gradients: Any = tape.gradient(loss, (tensor, variables))
    d_inputs, d_weights = gradients
    return Result(
        np.asarray(tf.cast(outputs, "float32")),
        np.asarray(d_inputs),
        [np.asarray(tf.convert_to_tensor(gradient)) for gradient in d_weights],
    )


def assert_equal(left: Result, right: Result, tolerance: float = 1e-5) -> None:
    """Compares two results, each array to the size of its own greatest value."""
    assert len(left.weights) == len(right.weights)
    pairs = [
        (left.outputs, right.outputs),
        (left.inputs, right.inputs),
        *zip(left.weights, right.weights, strict=True),
    ]
    for one, other in pairs:
        scale = max(1.0, float(np.abs(other).max(initial=0.0)))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


def run_fresh(program: str) -> str:
    """Runs a program in a fresh process, for what cannot be undone in this one."""
    run = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", program],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout
