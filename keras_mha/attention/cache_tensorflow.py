"""Writing into a tensor by TensorFlow's own operations.

`keras.ops.slice_update` is XLA's on TensorFlow: a graph then compiles and runs it
apart from the rest, and a server that has XLA disabled cannot run it at all.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from keras import ops

from keras_mha.attention.blockwise.loops_tensorflow import in_xla
from keras_mha.typing import Tensor


def put(kept: Tensor, new: Tensor, start: list[Any]) -> Tensor:
    """Returns `kept` with `new` in the place that begins at `start`."""
    if in_xla():
        if kept.dtype == tf.bool:  # XLA's update takes none
            return put(tf.cast(kept, "int32"), tf.cast(new, "int32"), start) > 0
        return ops.slice_update(kept, start, new)
    begin = tf.stack(start)
    return tf.raw_ops.TensorStridedSliceUpdate(
        input=kept,
        begin=begin,
        end=begin + tf.shape(new),
        strides=tf.ones_like(begin),
        value=new,
    )
