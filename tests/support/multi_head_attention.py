"""Built `MultiHeadAttention` layers, calls of them, and what they should answer.

Letters: B batch, T query length, S key length, N heads, H head size of queries and
keys, V head size of values, DQ, DV, DK widths of queries, values and keys.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mha import MultiHeadAttention
from keras_mha.layers.keras_mask import set_keras_mask
from tests.support import reference as oracle
from tests.support.attention_cases import draw, numbers, pairs
from tests.support.layer_oracle import visible_in_call
from tests.support.layers import made

Stock = keras.layers.MultiHeadAttention
B, T, S, N, H, V, DQ, DV, DK = 2, 5, 7, 3, 11, 4, 13, 17, 19
SHAPES = (B, T, DQ), (B, S, DV), (B, S, DK)
QUERY_MASK = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)
VALUE_MASK = np.array([[1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1, 1]], bool)
KEY_MASK = np.array([[1, 1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 1, 1, 0]], bool)
PAIRS = {2: pairs(T, S), 3: pairs(B, T, S), 4: pairs(B, N, T, S)}
PADDING = {"query_mask": QUERY_MASK, "value_mask": VALUE_MASK, "key_mask": KEY_MASK}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "value_dim": {"value_dim": V},
    "gate": {"use_gate": True, "value_dim": V},
    "no bias": {"use_bias": False},
    "gate, no bias": {"use_bias": False, "use_gate": True},
    "output size": {"output_shape": 23},
    "output shape": {"output_shape": (2, 3), "value_dim": V},
    "window": {"sliding_window": 3},
    "all": {
        "value_dim": V,
        "use_gate": True,
        "output_shape": [2, 3],
        "sliding_window": 4,
        "dropout": 0.3,
    },
}
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"use_causal_mask": True},
    "query": {"query_mask": QUERY_MASK},
    "value": {"value_mask": VALUE_MASK},
    "key": {"key_mask": KEY_MASK},
    "padding": PADDING,
    "rank 2": {"attention_mask": PAIRS[2]},
    "rank 3": {"attention_mask": PAIRS[3]},
    "rank 4": {"attention_mask": PAIRS[4]},
    "one head": {"attention_mask": PAIRS[4][:, :1]},
    "one example": {"attention_mask": PAIRS[4][:1]},
    "empty rows": {"attention_mask": PAIRS[3] & (np.arange(T) != 2)[:, None]},
    "all": {**PADDING, "attention_mask": PAIRS[4], "use_causal_mask": True},
}


def inputs(dtype: str = "float32", seed: int = 0) -> list[np.ndarray]:
    """Queries, values and keys: the order of the layer's arguments."""
    return [draw(*shape, seed=seed + i).astype(dtype) for i, shape in enumerate(SHAPES)]


@functools.cache
def _layer(option_items: tuple[tuple[str, Any], ...]) -> MultiHeadAttention:
    return made(MultiHeadAttention(N, H, **dict(option_items)), *SHAPES)


def layer_of(name: str = "plain", **options: Any) -> MultiHeadAttention:
    """A built layer with random weights; the same object for the same options."""
    given = {**OPTIONS[name], **options}
    shape = given.get("output_shape")
    if isinstance(shape, list):
        given["output_shape"] = tuple(shape)
    return _layer(tuple(sorted(given.items())))


def twin(layer: MultiHeadAttention, **options: Any) -> Any:
    """Keras' layer of the same options with the same weights."""
    config = layer.get_config()
    known = inspect.signature(Stock.__init__).parameters.keys() - {"self", "kwargs"}
    stock = Stock(**{**{name: config[name] for name in known}, **options})
    stock.build(*SHAPES)
    stock.set_weights(layer.get_weights())
    return stock


def expected(
    layer: MultiHeadAttention, arrays: list[Any], mask: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    visible = visible_in_call(
        (B, N, T, S), layer.get_config()["sliding_window"], **mask
    )
    return oracle.multi_head_attention(oracle.layer_weights(layer), *arrays, visible)


def carrying(array: Any, mask: Any) -> Any:
    """A tensor that carries a Keras mask, as an Embedding's outputs do."""
    tensor = tf.constant(array)
    if mask is not None:
        set_keras_mask(tensor, tf.constant(mask))
    return tensor


def differentiate(
    layer: Any, arrays: list[np.ndarray], **call: Any
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Outputs, and the gradients of all inputs and weights of a weighted sum."""
    tensors = [tf.constant(array) for array in arrays]
    variables = [weight.value for weight in layer.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        outputs = layer(*tensors, **call)
        upstream = tf.constant(draw(*outputs.shape, seed=7), outputs.dtype)
        loss = tf.reduce_sum(outputs * upstream)
    found = tape.gradient(loss, [*tensors, *variables])
    return numbers(outputs), [numbers(gradient) for gradient in found]


def functional(layer_class: Any, **options: Any) -> keras.Model:
    arguments = [keras.Input(shape[1:]) for shape in SHAPES]
    return keras.Model(arguments, layer_class(N, H, name="mha", **options)(*arguments))


def embedded() -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """Queries and values from embeddings, with the masks they carry."""
    ids = np.array([[1, 2, 3, 0, 0], [3, 3, 1, 1, 2], [1, 0, 0, 0, 0]])
    other = np.array([[5, 4, 0], [3, 0, 0], [2, 1, 1]])
    query = keras.layers.Embedding(4, 8, mask_zero=True)(ids)
    value = keras.layers.Embedding(6, 8, mask_zero=True)(other)
    return query, value, ids != 0, other != 0
