"""Layers other than attention in the form that devices run.

Each function here takes a layer and returns replacements of its methods, with which it
computes the same values in inference.

Letters: B batch, T length, D model width, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
import tensorflow as tf
from keras import ops
from keras.src.backend import set_keras_mask

from keras_mha.export.ids import is_looked_up
from keras_mha.layers.fused_projection import FusedProjection
from keras_mha.typing import Tensor


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
    """

    def __init__(self) -> None:
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


def reversible_embedding(layer: Any, masks: PaddingMasks) -> list[Swap]:
    """As in `embedding`; back from vectors to ids it stays as it is."""
    return _reversible(layer, masks, lambda ids: look_up(ids, float_table(layer)))


def guarded_reversible_embedding(layer: Any, masks: PaddingMasks) -> list[Swap]:
    """As in `guarded_embedding`."""
    return _reversible(
        layer, masks, lambda ids: _add_to_rows(ids, float_table(layer), 0.0)
    )


def _reversible(
    layer: Any, masks: PaddingMasks, look_up_rows: Callable[[Tensor], Tensor]
) -> list[Swap]:
    if layer.quantization_mode is not None:
        raise NoDeviceFormError("Keras quantized it")
    original = layer.call

    def call(inputs: Tensor, reverse: bool = False) -> Tensor:
        if reverse:
            return original(inputs, reverse=True)
        rows = look_up_rows(inputs)
        if layer.mask_zero:  # it hands the mask on by itself, and not by `compute_mask`
            visible = ops.not_equal(inputs, 0)
            set_keras_mask(rows, masks.remember(visible, _ids_as_floats(inputs)))
        return rows

    return [Swap(layer, "call", call)]


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
    counts = ops.expand_dims(_ids_as_floats(ids), -1)
    return rows * counts + (vectors + padding)


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
    """The mask `ids != padding`, which functional models compute for all layers."""
    original = operation.call
    # Several where the operation is in several models, as in one and a part of it.
    if not all(
        is_looked_up(node.input_tensors[0]) for node in operation._inbound_nodes
    ):
        return []

    def call(x1: Tensor, x2: Any) -> Tensor:
        visible = original(x1, x2)
        if not isinstance(x2, int):
            return visible
        floats = _ids_as_floats(x1) if x2 == 0 else _differs(x1, x2)
        return masks.remember(visible, floats)

    return [Swap(operation, "call", call)]


def _differs(ids: Tensor, padding: int) -> Tensor:
    """0 for the id `padding` and 1 for all others."""
    distance = ops.abs(ops.cast(ids, "float32") - float(padding))
    return ops.minimum(distance, 1.0)


# Normalization.


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


def group_normalization(layer: Any) -> list[Swap]:
    """The axes between batch and channels as one: devices take four at most."""
    rank = len(layer._build_shapes_dict["input_shape"])
    if layer.axis % rank != rank - 1:
        raise NoDeviceFormError(f"it normalizes over the axis {layer.axis}")

    def call(inputs: Tensor) -> Tensor:
        channels = inputs.shape[-1]
        groups = (-1, math.prod(inputs.shape[1:-1]), layer.groups)
        grouped = ops.reshape(inputs, (*groups, channels // layer.groups))
        deviations = grouped - ops.mean(grouped, axis=(1, 3), keepdims=True)
        squares = ops.mean(deviations * deviations, axis=(1, 3), keepdims=True)
        normalized = deviations * ops.rsqrt(squares + layer.epsilon)
        outputs = ops.reshape(normalized, ops.shape(inputs))
        outputs = outputs if layer.gamma is None else outputs * layer.gamma
        return outputs if layer.beta is None else outputs + layer.beta

    return in_place_of_call(layer, call)


def up_sampling(layer: Any) -> list[Swap]:
    """Repeats rows and columns by one operation, without a fifth axis."""
    if layer.data_format != "channels_last" or layer.interpolation != "nearest":
        return []

    def call(inputs: Tensor) -> Tensor:
        sizes: Any = ops.shape(inputs)
        rows, columns = (
            size * n for size, n in zip(sizes[1:3], layer.size, strict=True)
        )
        return tf.image.resize(inputs, (rows, columns), method="nearest")

    return [Swap(layer, "call", call)]


# Recurrent layers.


def recurrent(layer: Any, masks: PaddingMasks) -> list[Swap]:
    """A step after another: loops hold tensors of free shape, which devices refuse.

    Not by the layer's own `unroll`, which takes a mask in the wrong order where it
    goes backwards (Keras 3.15).
    """

    def inner_loop(
        sequences: Tensor,
        initial_state: Any,
        mask: Tensor | None,
        training: bool = False,
    ) -> tuple[Tensor, Tensor, Any]:
        order = slice(None, None, -1 if layer.go_backwards else 1)
        rows: Any = ops.unstack(sequences, axis=1)
        counts: Any = [None] * len(rows)
        if mask is not None:
            floats = masks.as_floats(keras.tree.flatten(mask)[0], sequences.dtype)
            counts = ops.split(floats, len(rows), axis=1)
        output, states, outputs = None, initial_state, []
        for row, count in zip(rows[order], counts[order], strict=True):
            new, new_states = layer.cell(row, states, training=training)
            before = None if layer.zero_output_for_mask else output
            output = _where(count, new, before)
            states = keras.tree.map_structure(
                lambda new, before, count=count: _where(count, new, before),
                new_states,
                states,
            )
            outputs.append(output)
        return output, ops.stack(outputs, axis=1), states

    return [Swap(layer, "inner_loop", inner_loop)]


def _where(count: Tensor | None, new: Tensor, before: Tensor | None) -> Tensor:
    """What is new where a row counts, and else what was before, or 0."""
    if count is None:
        return new
    return new * count if before is None else before + (new - before) * count


# Pooling, and items of tensors.


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
    """`x[:, 0]` and `x[:, None]` by slices and a reshape.

    GPU delegates take no slice that drops or adds axes, and with free sizes the
    converter none that adds them.
    """
    original = operation.call

    def call(inputs: Tensor, key: Any) -> Tensor:
        keys = key if isinstance(key, tuple) else (key,)
        kinds = (int, slice, type(None), type(...))
        if not all(isinstance(part, kinds) for part in keys):
            return original(inputs, key)
        keys = _without_ellipsis(keys, len(inputs.shape))
        slices = tuple(
            slice(part, part + 1 or None) if isinstance(part, int) else part
            for part in keys
            if part is not None
        )
        takes_all = all(part == slice(None) for part in slices)
        outputs = inputs if takes_all else inputs[slices]
        shape_of: Any = ops.shape(outputs)
        sizes = iter(shape_of)
        shape: list[Any] = []
        for part in keys:
            size = 1 if part is None else next(sizes)
            if not isinstance(part, int):
                shape.append(size)
        same = all(isinstance(part, slice) for part in keys)
        return outputs if same else ops.reshape(outputs, shape)

    return [Swap(operation, "call", call)]


def _without_ellipsis(keys: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    """Spells out `...`, and the axes that are left out at the end."""
    keys = keys if any(part is ... for part in keys) else (*keys, ...)
    place = next(i for i, part in enumerate(keys) if part is ...)
    named = sum(part is not None and part is not ... for part in keys)
    whole = (slice(None),) * (rank - named)
    return (*keys[:place], *whole, *keys[place + 1 :])
