"""The choice by length, in TensorFlow's operations."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from keras_mha.attention import reference
from keras_mha.attention.bias import Bias
from keras_mha.attention.blockwise import front as blockwise
from keras_mha.attention.mask_parts import MaskParts
from keras_mha.typing import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MaskParts,
    bias: Bias,
    **options: Any,
) -> Tensor:
    """Returns the mixed values `(B, T, N, V)`, from the form that suits the lengths."""
    call = (query, key, value, mask, bias)
    B, T, N, _ = tf.unstack(tf.shape(query, tf.int64))
    S = tf.shape(key, tf.int64)[1]
    mixed = tf.cond(
        blockwise.pays(mask, B * T * N * S, tf.minimum(T, S)),
        lambda: blockwise.attend(*call, **options)[0],
        lambda: reference.attend(*call, **options)[0],
    )
    mixed.set_shape((*query.shape[:3], value.shape[-1]))
    return mixed
