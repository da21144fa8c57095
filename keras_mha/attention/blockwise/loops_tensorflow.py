"""Loops, arrays and sizes for TensorFlow's blockwise attention, eager and in graphs.

Sizes are integers where they are known, and scalar tensors where they are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from keras_mha.typing import Tensor


def loop(count: Any, step: Callable[..., Any], state: Any, parallel: int) -> Any:
    """Runs `step(index, *state)` for each index; one step needs no loop."""
    if isinstance(count, int) and count == 1:
        return step(0, *state)

    def body(index: Any, *state: Any) -> Any:
        results = step(index, *state)
        return index + 1, *tf.nest.map_structure(_as_before, state, results)

    _, *state = tf.while_loop(
        lambda index, *_: index < count,
        body,
        (tf.constant(0), *tf.nest.map_structure(_of_any_length, state)),
        parallel_iterations=parallel,
    )
    return state


def _of_any_length(tensor: Any) -> Any:
    """Forgets the length of `(b, k, s, X)`, which changes from step to step."""
    if isinstance(tensor, tf.TensorArray) or len(tensor.shape) < 4:
        return tensor
    return of_shape(tensor, (*tensor.shape[:2], None, tensor.shape[-1]))


def of_shape(tensor: Tensor, shape: tuple[int | None, ...] | None) -> Tensor:
    """Hides from a graph what it knows of a shape beyond `shape`."""
    if tf.executing_eagerly():
        return tensor
    return tf.raw_ops.PlaceholderWithDefault(
        input=tensor,
        shape=tf.TensorShape(shape).as_proto(),  # pyright: ignore[reportArgumentType]
    )


def _as_before(before: Any, tensor: Any) -> Any:
    if not isinstance(tensor, tf.TensorArray) and not tf.executing_eagerly():
        tensor.set_shape(before.shape)
    return tensor


def array_of(dtype: Any, size: Any, shape: tuple[int | None, ...]) -> tf.TensorArray:
    """An array for `size` tensors of a shape, as far as it is known."""
    return tf.TensorArray(
        dtype, size=size, element_shape=shape, infer_shape=False, clear_after_read=False
    )


def pick(tensor: Tensor, places: slice, axis: int = 0) -> Tensor:
    """Cuts along an axis, unless its single element serves all places."""
    if tensor.shape[axis] == 1:
        return tensor
    return tensor[(*([slice(None)] * axis), places)]


def cut_along(tensor: Tensor, places: slice) -> Tensor:
    """Cuts `(b, n, t, X)` along its length: nothing is copied if that comes first."""
    if tuple(tensor.shape[:2]) != (1, 1):
        return tensor[:, :, places]
    return tf.reshape(tensor, sizes_of(tensor)[2:])[places][None, None]


def join_heads(part: Tensor) -> Tensor:
    """`(b, n, T, X)` to `(b * n, T, X)`."""
    b, n, T, width = sizes_of(part)
    return tf.reshape(part, (b * n, T, width))


def in_xla() -> bool:
    """Returns whether XLA compiles what is being traced; it needs shapes that stay."""
    if tf.executing_eagerly():
        return False
    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def sizes_of(tensor: Tensor) -> tuple[Any, ...]:
    """Dimensions as integers where they are known, else as scalars."""
    static = tuple(tensor.shape)
    if None not in static:
        return static
    dynamic = tf.shape(tensor)
    pairs = enumerate(static)
    return tuple([dynamic[axis] if size is None else size for axis, size in pairs])


def least(one: Any, other: Any) -> Any:
    """The lesser of two sizes: an integer if both are."""
    if isinstance(one, int) and isinstance(other, int):
        return min(one, other)
    return tf.minimum(one, other)


def most(one: Any, other: Any) -> Any:
    """The greater of two sizes: an integer if both are."""
    if isinstance(one, int) and isinstance(other, int):
        return max(one, other)
    return tf.maximum(one, other)


def count_blocks(length: Any, size: Any) -> Any:
    """How many blocks of a size a length makes."""
    return (length + size - 1) // size


def greatest_divisor(number: int, most: Any) -> Any:
    """The greatest divisor of `number` that is not more than `most`."""
    divisors = [i for i in range(1, number + 1) if number % i == 0]
    if isinstance(most, int):
        return max(i for i in divisors if i <= most)
    return tf.reduce_max(tf.where(tf.constant(divisors) <= most, divisors, 1))
