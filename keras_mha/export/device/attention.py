"""Attention layers in the form that devices run; see `device_layers`.

Queries, keys and values of one tensor come out of one product, heads of rank 4, with
the scale of the scores in the queries' kernel and bias.

Letters: B batch, T query length, S key length, D model width, N query heads, K
key/value heads, H head size of queries and keys, V head size of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import keras
import numpy as np
from keras import ops

from keras_mha.attention import portable
from keras_mha.attention.mask_parts import MaskParts
from keras_mha.export.device.layers import (
    NoDeviceFormError,
    PaddingMasks,
    Swap,
    float_bias,
    float_kernel,
    in_place_of_call,
)
from keras_mha.layers.multi_head_attention import MultiHeadAttention
from keras_mha.layers.positions import RotaryEmbedding
from keras_mha.typing import Tensor


def self_attention(layer: Any, masks: PaddingMasks) -> list[Swap]:
    """`MultiHeadSelfAttention`: the columns of its kernel in the order of parts."""
    dense = layer.qkv_dense
    key_dim, value_dim = dense.head_sizes
    shared = layer.num_key_value_heads
    shapes = ((layer.num_heads, key_dim), (shared, key_dim), (shared, value_dim))
    scale, swaps = _fold_scale(layer, key_dim)

    def cut(columns: Tensor, rows: int) -> list[Tensor]:
        parts = dense.cut(columns)
        return [
            ops.reshape(part, (rows, *shape))
            for part, shape in zip(parts, shapes, strict=True)
        ]

    def project(inputs: Tensor, training: bool | None = None) -> list[Tensor]:
        del training
        kernel, bias = float_kernel(dense), float_bias(dense)
        return project_heads(
            inputs,
            cut(kernel, kernel.shape[0]),
            None if bias is None else cut(bias, 1),
            scale=scale,
            transposed=_reaches_scores_untouched(layer),
        )

    return [
        *swaps,
        *in_place_of_call(dense, project),
        Swap(dense, "split", lambda projected: projected),
        _attend_portably(layer, masks),
    ]


def attention(layer: Any, masks: PaddingMasks) -> list[Swap]:
    """`keras_mha.MultiHeadAttention`: one product where it attends to itself."""
    _check_compute(layer, MultiHeadAttention)
    scale, swaps = _fold_scale(layer, layer.key_dim)
    transposed = _reaches_scores_untouched(layer)
    return [
        *swaps,
        *_project_together(layer, scale, transposed),
        _attend_portably(layer, masks),
    ]


def _check_compute(layer: Any, base: Any) -> None:
    """Refuses a subclass whose scores are its own."""
    if type(layer)._compute_attention is not base._compute_attention:
        raise NoDeviceFormError("it overrides `_compute_attention`")


def _attend_portably(layer: Any, masks: PaddingMasks) -> Swap:
    """Calls `keras_mha.attention.portable` with the padding masks as numbers."""
    original = layer._attend

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: MaskParts,
        *,
        bias: Tensor | None = None,
        head_mask: Tensor | None = None,
        offset: Any = 0,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if len(query.shape) != 4 or head_mask is not None:  # it folds several axes
            options |= {"bias": bias, "head_mask": head_mask, "offset": offset}
            return original(query, key, value, mask, **options)
        rows, columns = mask.query_padding, mask.key_padding
        keys = None if columns is None else masks.as_floats(columns, key.dtype)
        queries = keys  # the same tensor where both are: each query then sees itself
        if rows is not columns:
            queries = None if rows is None else masks.as_floats(rows, query.dtype)
        scale = layer._score_scale
        return portable.attend(
            query,
            key,
            value,
            mask._replace(query_padding=queries, key_padding=keys),
            layer._bias(bias, query, key, offset),
            scale=1.0 / math.sqrt(query.shape[-1]) if scale is None else scale,
            logits_soft_cap=layer._logits_soft_cap,
        )

    return Swap(layer, "_attend", attend)


def stock_attention(layer: Any, masks: PaddingMasks) -> list[Swap]:
    """`keras.layers.MultiHeadAttention`, also with masks as arithmetic.

    A query that sees no key gets there the mean of all values, or, where there is
    dropout or scores are returned, none of them; and so it does here.
    """
    _check_compute(layer, keras.layers.MultiHeadAttention)
    if layer._attention_axes != (1,):
        raise NoDeviceFormError(f"its `attention_axes` are {layer._attention_axes}")

    def mask_of(
        query: Tensor,
        value: Tensor,
        query_mask: Tensor | None = None,
        value_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_causal_mask: bool = False,
    ) -> Tensor | None:
        """1 where a query sees a key and else 0, `(B or 1, T or 1, S)`, or rank 4."""
        T, S = ops.shape(query)[1], ops.shape(value)[1]
        parts: list[Tensor] = [
            ops.reshape(masks.as_floats(padding, query.dtype), (-1, 1, S))
            for padding in (value_mask, key_mask)
            if padding is not None
        ]
        if query_mask is not None:
            rows = masks.as_floats(query_mask, query.dtype)
            parts.append(ops.reshape(rows, (-1, T, 1)))
        if use_causal_mask:
            parts.append(layer._compute_causal_mask(query, value))
        if layer._sliding_window is not None:
            parts.append(layer._compute_sliding_window_mask(query, value))
        if attention_mask is not None:
            parts.append(_as_flags(attention_mask))
        visible = None
        for part in parts:
            floats = ops.cast(part, query.dtype)
            visible = floats if visible is None else visible * floats
        return visible

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> tuple[Tensor, Tensor]:
        del training
        hides = layer._dropout > 0.0 or return_attention_scores
        visible: Any = attention_mask
        if use_causal_mask:
            causal = layer._compute_causal_mask(query, key)
            visible = ops.cast(causal, query.dtype)
        query = ops.transpose(query, (0, 2, 1, 3))
        key = ops.transpose(key, (0, 2, 3, 1))
        value = ops.transpose(value, (0, 2, 1, 3))
        if visible is not None:
            if len(visible.shape) == 3:
                visible = ops.expand_dims(visible, 1)
            if visible.shape[2] != 1 and not use_causal_mask and not hides:
                # Equal scores where nothing is seen; a single causal row sees itself.
                query = query * ops.max(visible, axis=-1, keepdims=True)
        scores = ops.matmul(query, key)
        if visible is not None:
            scores = scores + (visible - 1.0) * portable.HIDDEN
        probabilities = ops.softmax(scores, axis=-1)
        if visible is not None and hides:
            probabilities = probabilities * visible
        mixed = ops.matmul(probabilities, value)
        return ops.transpose(mixed, (0, 2, 1, 3)), probabilities

    return [
        *_project_together(layer, 1.0 / math.sqrt(layer.key_dim), transposed=True),
        Swap(layer, "_compute_attention_mask", mask_of),
        Swap(layer, "_compute_attention", attend),
    ]


def _as_flags(mask: Tensor) -> Tensor:
    """A mask of booleans, or of numbers of which all but zeros count as true."""
    if "bool" in str(mask.dtype):
        return mask
    return ops.cast(ops.cast(mask, "bool"), mask.dtype)


def project_heads(
    inputs: Tensor,
    kernels: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    *,
    scale: float,
    transposed: bool,
) -> list[Tensor]:
    """Projects inputs `(B, T, D)` to queries, keys and values in one product.

    Args:
        inputs: `(B, T, D)`.
        kernels: `(D, N, H)`, `(D, K, H)` and `(D, K, V)`.
        biases: `(1, N, H)` and so on, or `None`.
        scale: Factor of the queries.
        transposed: Whether to part the heads with their axis before the length's, and
            turn each part back. Where attention turns it again, which the converter
            sees, one transposition is left of three.

    Returns:
        `(B, T, N, H)`, `(B, T, K, H)` and `(B, T, K, V)`.
    """
    B, T, D = cast("Any", ops.shape(inputs))
    shapes = [tuple(kernel.shape[1:]) for kernel in kernels]
    outputs = ops.matmul(inputs, _join(kernels, D, scale))
    if biases is not None:
        outputs = outputs + ops.reshape(_join(biases, 1, scale), (-1,))
    if len({size for _, size in shapes}) > 1:
        parts = _part(outputs, [heads * size for heads, size in shapes], axis=-1)
        return [
            ops.reshape(part, (B, T, *shape))
            for part, shape in zip(parts, shapes, strict=True)
        ]
    counts = [heads for heads, _ in shapes]
    heads = ops.reshape(outputs, (B, T, sum(counts), shapes[0][1]))
    if not transposed:
        return _part(heads, counts, axis=2)
    parts = _part(ops.transpose(heads, (0, 2, 1, 3)), counts, axis=1)
    return [ops.transpose(part, (0, 2, 1, 3)) for part in parts]


def _join(parts: Sequence[Tensor], rows: int, scale: float) -> Tensor:
    """Lays the columns of the parts side by side, the first scaled."""
    queries, *others = (ops.reshape(part, (rows, -1)) for part in parts)
    return ops.concatenate([queries * scale, *others], axis=1)


def _part(tensor: Tensor, sizes: Sequence[int], axis: int) -> Any:
    if len(set(sizes)) == 1:
        return ops.split(tensor, len(sizes), axis=axis)
    # By slices: delegates take no split into parts of different sizes.
    ends = np.cumsum(sizes).tolist()
    whole = (slice(None),) * (axis % len(tensor.shape))
    return [
        tensor[(*whole, slice(end - size, end))]
        for size, end in zip(sizes, ends, strict=True)
    ]


def _fold_scale(layer: Any, key_dim: int) -> tuple[float, list[Swap]]:
    """The factor for the queries' kernel, and what keeps it from counting twice."""
    if layer.query_norm is not None:  # it would undo a factor before it
        return 1.0, []
    return 1.0 / math.sqrt(key_dim), [Swap(layer, "_score_scale", 1.0)]


def _reaches_scores_untouched(layer: Any) -> bool:
    """Whether nothing is done to projected heads before they are scored."""
    rotates = isinstance(layer.position_layer, RotaryEmbedding)
    return layer.query_norm is None and not rotates


def _project_together(layer: Any, scale: float, transposed: bool) -> list[Swap]:
    """Lets three projections share a product in calls in which they share inputs."""
    denses = (layer.query_dense, layer.key_dense, layer.value_dense)
    call_layer = layer.call
    shared: list[Tensor] = []  # by the call that is running

    def call(
        query: Tensor,
        value: Tensor | None = None,
        key: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        shared.clear()
        alike = query is value and (key is None or key is value)
        if alike and len(query.shape) == 3:
            biases = [float_bias(dense) for dense in denses]
            shared.extend(
                project_heads(
                    query,
                    [float_kernel(dense) for dense in denses],
                    None
                    if biases[0] is None
                    else [ops.expand_dims(bias, 0) for bias in biases],
                    scale=scale,
                    transposed=transposed,
                )
            )
        return call_layer(query, value, key, *args, **kwargs)

    def projection(place: int) -> Callable[..., Tensor]:
        dense, factor = denses[place], scale if place == 0 else 1.0

        def project(inputs: Tensor, training: bool | None = None) -> Tensor:
            del training
            if shared:
                return shared[place]
            outputs = ops.einsum(dense.equation, inputs, float_kernel(dense) * factor)
            bias = float_bias(dense)
            return outputs if bias is None else outputs + bias * factor

        return project

    return [
        Swap(layer, "call", call),
        *(
            swap
            for place, dense in enumerate(denses)
            for swap in in_place_of_call(dense, projection(place))
        ),
    ]
