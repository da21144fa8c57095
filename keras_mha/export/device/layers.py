"""Layers other than attention in the form that devices run.

Each function here takes a layer and returns replacements of its methods, with which it
computes the same values in inference.

Letters: B batch, T length, D model width, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
import tensorflow as tf
from keras import ops

from keras_mha.layers.embedding import TokenAndPositionEmbedding
from keras_mha.layers.fused_projection import FusedProjection
from keras_mha.typing import Tensor

_EMBEDDINGS = (keras.layers.Embedding, TokenAndPositionEmbedding)


class NoDeviceFormError(Exception):
    """A layer of a known class cannot take its device form; the text says why."""


class Swap(NamedTuple):
    """Replaces a layer's method or attribute in a copy of a model.

    Attributes:
        owner: The layer, or an operation of a functional model.
        name: The attribute's name.
        value: Its value in the device form.
    """

    owner: Any
    name: str
    value: Any


class PaddingMasks:
    """The padding masks of a model's call as numbers, 1 for True and 0 for False.

    Keras hands boolean masks from layer to layer. A file whose numbers come from the
    ids by arithmetic holds no boolean operation, which delegates do not take.

    Attributes:
        padded_queries_read: Whether what attention gives queries that are padding
            must be right.
    """

    def __init__(self, *, padded_queries_read: bool) -> None:
        self.padded_queries_read = padded_queries_read
        self._floats: dict[int, tuple[Tensor, Tensor]] = {}

    def remember(self, mask: Tensor, floats: Tensor) -> Tensor:
        """Keeps the numbers of a mask, and returns the mask."""
        self._floats[id(mask)] = mask, floats
        return mask

    def forget(self) -> None:
        """Forgets all masks, at the end of a call."""
        self._floats.clear()

    def as_floats(self, mask: Tensor, dtype: Any) -> Tensor:
        """Returns a mask as numbers, those that it was remembered with if any."""
        _, floats = self._floats.get(id(mask), (mask, mask))
        return ops.cast(floats, dtype)


Form: TypeAlias = Callable[[Any], Sequence[Swap]]
MaskForm: TypeAlias = Callable[[Any, PaddingMasks], Sequence[Swap]]


def in_place_of_call(layer: Any, call: Callable[..., Any]) -> list[Swap]:
    """Puts `call` in place of the layer's own, also where Keras quantized it."""
    return [Swap(layer, "call", call), Swap(layer, "quantized_call", call)]


# Weights.


def float_kernel(layer: Any) -> Tensor:
    """The kernel of a dense layer in float, low-rank factors merged in."""
    if isinstance(layer, FusedProjection):
        return layer.merged_kernel()
    if layer.quantization_mode is None:
        return ops.convert_to_tensor(layer.kernel)
    scale: Any = ops.convert_to_tensor(layer.kernel_scale)
    if isinstance(layer, keras.layers.EinsumDense):
        scale = layer._adjust_scale_for_dequant(scale)
    kernel = ops.cast(layer._kernel, scale.dtype) / scale
    return kernel + _delta(layer, "kernel") if layer.lora_enabled else kernel


def float_table(layer: Any) -> Tensor:
    """The table `(V, D)` of an embedding in float, low-rank factors merged in."""
    if layer.quantization_mode is None:
        return ops.convert_to_tensor(layer.embeddings)
    scale: Any = ops.expand_dims(layer.embeddings_scale, -1)
    table = ops.cast(layer._embeddings, scale.dtype) / scale
    return table + _delta(layer, "embeddings") if layer.lora_enabled else table


def _delta(layer: Any, name: str) -> Tensor:
    down, up = (getattr(layer, f"lora_{name}_{letter}") for letter in "ab")
    return layer.lora_alpha / layer.lora_rank * ops.matmul(down, up)


def float_bias(layer: Any) -> Tensor | None:
    """The bias of a dense layer, which is never quantized."""
    return None if layer.bias is None else ops.convert_to_tensor(layer.bias)


# Dense layers.


def dense(layer: Any) -> list[Swap]:
    """As it is; in float if Keras quantized it."""

    def call(inputs: Tensor, training: bool | None = None) -> Tensor:
        del training
        outputs = ops.matmul(inputs, float_kernel(layer))
        return _finish(layer, outputs)

    return in_place_of_call(layer, call)


def einsum_dense(layer: Any) -> list[Swap]:
    """As it is; in float if Keras quantized it."""

    def call(inputs: Tensor, training: bool | None = None) -> Tensor:
        del training
        outputs = ops.einsum(layer.equation, inputs, float_kernel(layer))
        return _finish(layer, outputs)

    return in_place_of_call(layer, call)


def _finish(layer: Any, outputs: Tensor) -> Tensor:
    bias = float_bias(layer)
    outputs = outputs if bias is None else outputs + bias
    return outputs if layer.activation is None else layer.activation(outputs)


# Embeddings.


def embedding(layer: Any, masks: PaddingMasks) -> list[Swap]:
    """The rows of a one-dimensional lookup; its mask by arithmetic."""

    def call(ids: Tensor) -> Tensor:
        return look_up(ids, float_table(layer))

    return [*in_place_of_call(layer, call), *_masks_by_arithmetic(layer, masks)]


def guarded_embedding(layer: Any, masks: PaddingMasks) -> list[Swap]:
    """`(E - E[0])[ids] * counts + E[0]`, which is `E[ids]`, for GPU delegates.

    They add a constant to a result of rank 2 wrongly, without a word (LiteRT issue
    8980), and the converter makes what comes after a lookup of rank 2 where it can.
    It cannot move the product, which is of rank 3.
    """

    def call(ids: Tensor) -> Tensor:
        return _add_to_rows(ids, float_table(layer), 0.0)

    return [*in_place_of_call(layer, call), *_masks_by_arithmetic(layer, masks)]


def token_and_position_embedding(layer: Any, masks: PaddingMasks) -> list[Swap]:
    """`(E - E[0])[ids] * counts + (P + E[0])`; see `guarded_embedding`."""

    def call(ids: Tensor, positions: Tensor | None = None) -> Tensor:
        table = float_table(layer.token_embedding)
        places: Any = ops.convert_to_tensor(layer.position_embedding)
        if positions is not None:
            return look_up(ids, table) + look_up(positions, places)
        layer._check_length(ids)
        return _add_to_rows(ids, table, places[: ops.shape(ids)[1]])

    return [*in_place_of_call(layer, call), *_masks_by_arithmetic(layer, masks)]


def _add_to_rows(ids: Tensor, table: Tensor, vectors: Tensor | float) -> Tensor:
    padding = table[:1]
    rows = look_up(ids, table - padding)
    counts = ops.reshape(_ids_as_floats(ids), (-1, ops.shape(ids)[1], 1))
    return rows * counts + ops.expand_dims(vectors + padding, 0)


def look_up(ids: Tensor, table: Tensor) -> Tensor:
    """`table[ids]` in the form that converts to EMBEDDING_LOOKUP.

    A gather with ids of rank 2 is refused by GPU delegates, and its table is never
    quantized.
    """
    flat = tf.one_hot(ops.reshape(ops.cast(ids, "int32"), (-1,)), table.shape[0])
    rows = tf.matmul(flat, table)
    shape: Any = ops.shape(ids)
    return ops.reshape(rows, (*shape, table.shape[1]))


def _masks_by_arithmetic(layer: Any, masks: PaddingMasks) -> list[Swap]:
    compute_mask = layer.compute_mask

    def compute_with_floats(ids: Tensor, mask: Tensor | None = None) -> Tensor | None:
        visible = compute_mask(ids, mask)
        if visible is None or not layer.mask_zero:
            return visible
        return masks.remember(visible, _ids_as_floats(ids))

    return [Swap(layer, "compute_mask", compute_with_floats)]


def _ids_as_floats(ids: Tensor) -> Tensor:
    """0 for the id 0 and 1 for those above."""
    return ops.minimum(ops.cast(ids, "float32"), 1.0)


def not_equal(operation: Any, masks: PaddingMasks) -> list[Swap]:
    """The mask `ids != 0`, which functional models compute once for all layers."""
    original = operation.call
    # Several where the operation is in several models, as in one and a part of it.
    if not all(
        _is_looked_up(node.input_tensors[0]) for node in operation._inbound_nodes
    ):
        return []

    def call(x1: Tensor, x2: Any) -> Tensor:
        visible = original(x1, x2)
        is_mask = isinstance(x2, int) and x2 == 0
        return masks.remember(visible, _ids_as_floats(x1)) if is_mask else visible

    return [Swap(operation, "call", call)]


def _is_looked_up(ids: Any) -> bool:
    """Whether a table reads them: then they are whole and not negative."""
    readers = ids._keras_history.operation._outbound_nodes
    return any(isinstance(reader.operation, _EMBEDDINGS) for reader in readers)


# Normalization and pooling.


def layer_normalization(layer: Any) -> list[Swap]:
    """Deviations squared by a product: SQUARED_DIFFERENCE has no 16-bit kernel."""
    _check_last_axis(layer)
    if layer.rms_scaling:
        raise NoDeviceFormError("it has `rms_scaling`")

    def call(inputs: Tensor) -> Tensor:
        deviations = inputs - ops.mean(inputs, axis=-1, keepdims=True)
        outputs = _over_root_mean_square(deviations, layer.epsilon)
        outputs = outputs if layer.gamma is None else outputs * layer.gamma
        return outputs if layer.beta is None else outputs + layer.beta

    return in_place_of_call(layer, call)


def rms_normalization(layer: Any) -> list[Swap]:
    """As in `layer_normalization`."""
    _check_last_axis(layer)

    def call(inputs: Tensor) -> Tensor:
        return _over_root_mean_square(inputs, layer.epsilon) * layer.scale

    return in_place_of_call(layer, call)


def _over_root_mean_square(inputs: Tensor, epsilon: float) -> Tensor:
    squares = ops.mean(inputs * inputs, axis=-1, keepdims=True)
    return inputs * ops.rsqrt(squares + epsilon)


def _check_last_axis(layer: Any) -> None:
    axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    rank = len(layer._build_shapes_dict["input_shape"])
    if [axis % rank for axis in axes] != [rank - 1]:
        raise NoDeviceFormError(f"it normalizes over the axes {list(axes)}")


def global_average_pooling(layer: Any, masks: PaddingMasks) -> list[Swap]:
    """The sum of what counts over its number."""
    if layer.data_format != "channels_last":
        raise NoDeviceFormError(f"its `data_format` is {layer.data_format!r}")

    def call(inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return ops.mean(inputs, axis=1, keepdims=layer.keepdims)
        shape = (-1, ops.shape(inputs)[1], 1)
        counts = ops.reshape(masks.as_floats(mask, inputs.dtype), shape)
        total = ops.sum(inputs * counts, axis=1, keepdims=layer.keepdims)
        return total / ops.sum(counts, axis=1, keepdims=layer.keepdims)

    return in_place_of_call(layer, call)


def get_item(operation: Any) -> list[Swap]:
    """`x[:, 0]` by slice and reshape: GPU delegates take no slice that drops axes."""
    original = operation.call

    def call(inputs: Tensor, key: Any) -> Tensor:
        keys = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(part, int | slice) for part in keys):
            return original(inputs, key)
        slices = tuple(
            slice(part, part + 1 or None) if isinstance(part, int) else part
            for part in keys
        )
        outputs = inputs[slices]
        dropped = {i for i, part in enumerate(keys) if isinstance(part, int)}
        sizes: Any = ops.shape(outputs)
        left = [size for axis, size in enumerate(sizes) if axis not in dropped]
        return ops.reshape(outputs, left) if dropped else outputs

    return [Swap(operation, "call", call)]
