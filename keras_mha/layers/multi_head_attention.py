"""Multi-head attention of queries to keys and values, Keras' layer mended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops
from typing_extensions import override

from keras_mha.attention.api import check_order, prepare_inputs
from keras_mha.attention.axes import resolve_axes, score_shape
from keras_mha.attention.masks import Mask, as_padding, as_pairs, intersect
from keras_mha.layers.arguments import check_optional, check_positive
from keras_mha.layers.attention_layer import AttentionLayer
from keras_mha.layers.keras_mask import set_keras_mask
from keras_mha.layers.projections import ProjectionOptions
from keras_mha.layers.seeded_layer import keep_frozen
from keras_mha.typing import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_mha")
class MultiHeadAttention(AttentionLayer):
    """Multi-head attention, a drop-in for `keras.layers.MultiHeadAttention`.

    Same constructor, call, weights and weight files as the Keras 3.15 layer, and
    the same values wherever that layer is right. Where it is not:

    - A query that sees no key gets zeros from the attention (hence the output
      projection's bias), with zero gradient, on every path. Keras gives the mean
      of all values, padding included, on one path and the bias on the other.
    - float16 scores do not overflow.
    - Causal masking converts to TFLite with a dynamic length.
    - An explicit `query_mask` counts, and the outputs carry it.
    - The inputs keep the masks they carry.
    - `jit_compile=True` keeps masks.
    - The symbolic scores of cross-attention are `(B, N, T, S)`.
    - An `attention_mask` of rank 4 combines with padding masks.
    - A floating `attention_mask` raises instead of being read as its opposite.

    What stands in padding, NaN included, changes neither the other positions nor
    any gradient.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.2.2; the
    gate is that of Qiu et al. 2025, "Gated attention for large language models".

    Letters: B batch, T query length, S key length, D model width, N heads, H head
    size of queries and keys, V head size of values.

    Args:
        num_heads: N.
        key_dim: H.
        value_dim: V. Defaults to `key_dim`.
        dropout: Share of the attention probabilities dropped in training,
            `0 <= dropout < 1`.
        use_bias: Whether the projections have biases.
        output_shape: Size, or shape, of each output position. Defaults to the
            queries' D.
        attention_axes: Axes over which attention runs. Defaults to all but the
            batch and the features.
        sliding_window: Query `i` attends to keys with `|i - j| < sliding_window`;
            needs a single attention axis. Defaults to no limit.
        flash_attention: True asks for memory linear in the lengths, which is not
            there yet and raises; False asks for the reference implementation;
            `None` leaves the choice.
        kernel_initializer: Initializer of the kernels.
        bias_initializer: Initializer of the biases.
        kernel_regularizer: Regularizer of the kernels.
        bias_regularizer: Regularizer of the biases.
        activity_regularizer: Regularizer of the projections' outputs.
        kernel_constraint: Constraint on the kernels.
        bias_constraint: Constraint on the biases.
        use_gate: Whether to multiply the mixed values by
            `sigmoid(dense(query))` before the output projection.
        seed: Integer seed of the dropout.
        jit_compile: True, False or `"auto"`, as in `MultiHeadSelfAttention`.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        query: Floating `(B, T, D)`.
        value: Floating `(B, S, D)`; any D.
        key: Floating `(B, S, D)`; any D. Defaults to `value`.
        query_mask: Padding mask `(B, T)`. Defaults to the mask `query` carries.
        value_mask: Padding mask `(B, S)`. Defaults to the mask `value` carries.
        key_mask: Padding mask `(B, S)`. Defaults to the mask `key` carries.
        attention_mask: `(T, S)`, `(B, T, S)` or `(B, N or 1, T, S)`.
        return_attention_scores: Whether to return the probabilities too.
        training: Whether dropout is active.
        use_causal_mask: Whether query `i` attends to keys `j <= i` only, counted
            from the first query and the first key; needs a single attention axis.

    Returns:
        Outputs `(B, T, D)`, or `(B, T, *output_shape)`; with
        `return_attention_scores`, also the probabilities before dropout
        `(B, N, T, S)`. In the layer's compute dtype.

    Raises:
        ValueError: If an argument is out of its domain, shapes do not fit each
            other, or `flash_attention` is True.
        TypeError: If a mask is floating.

    Example:

    >>> import numpy as np
    >>> import keras
    >>> import keras_mha
    >>> query = np.random.normal(size=(2, 3, 8)).astype("float32")
    >>> value = np.random.normal(size=(2, 5, 7)).astype("float32")
    >>> stock = keras.layers.MultiHeadAttention(num_heads=2, key_dim=4)
    >>> expected = stock(query, value)
    >>> layer = keras_mha.MultiHeadAttention(num_heads=2, key_dim=4)
    >>> layer.build(query.shape, value.shape)
    >>> layer.set_weights(stock.get_weights())
    >>> bool(np.allclose(layer(query, value), expected, atol=1e-5))
    True
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        output_shape: int | Sequence[int] | None = None,
        attention_axes: int | Sequence[int] | None = None,
        sliding_window: int | None = None,
        flash_attention: bool | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        use_gate: bool = False,
        seed: int | None = None,
        *,
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        if flash_attention:
            raise ValueError(
                "`flash_attention=True` asks for attention in memory linear in the "
                "length, which this version does not have yet; use False or None. "
                f"Received: flash_attention={flash_attention}"
            )
        super().__init__(
            num_heads=num_heads,
            dropout=dropout,
            output_shape=output_shape,
            projections=ProjectionOptions(
                use_bias=use_bias,
                kernel_initializer=kernel_initializer,
                bias_initializer=bias_initializer,
                kernel_regularizer=kernel_regularizer,
                bias_regularizer=bias_regularizer,
                activity_regularizer=activity_regularizer,
                kernel_constraint=kernel_constraint,
                bias_constraint=bias_constraint,
            ),
            jit_compile=jit_compile,
            seed=seed,
            **kwargs,
        )
        self._key_dim = check_positive(key_dim, "key_dim")
        self._value_dim = check_optional(value_dim, "value_dim")
        self._attention_axes = _check_axes(attention_axes)
        self._sliding_window = check_optional(sliding_window, "sliding_window")
        self._flash_attention = flash_attention
        self._use_gate = use_gate

    @property
    def key_dim(self) -> int:
        """H, the head size of queries and keys."""
        return self._key_dim

    @property
    def value_dim(self) -> int:
        """V, the head size of values."""
        return self._value_dim or self._key_dim

    @property
    def attention_axes(self) -> tuple[int, ...] | None:
        """The attention axes as asked for; `None` means all inner ones."""
        return self._attention_axes

    @property
    def query_dense(self) -> Any:
        """The queries' projection, an `EinsumDense`."""
        return self._query_dense

    @property
    def key_dense(self) -> Any:
        """The keys' projection."""
        return self._key_dense

    @property
    def value_dense(self) -> Any:
        """The values' projection."""
        return self._value_dense

    @property
    def output_dense(self) -> Any:
        """The projection of the mixed values to the outputs."""
        return self._output_dense

    @override
    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "key_dim": self._key_dim,
            "value_dim": self._value_dim,
            "attention_axes": self._attention_axes,
            "sliding_window": self._sliding_window,
            "flash_attention": self._flash_attention,
            "use_gate": self._use_gate,
        }

    @override
    def build(
        self,
        query_shape: Shape,
        value_shape: Shape,
        key_shape: Shape | None = None,
    ) -> None:
        key_shape = _check_keys(query_shape, value_shape, key_shape)
        rank = len(query_shape)
        self._axes(query_shape)  # raises where they do not fit
        # The order of creation is that of Keras' `weights`.
        heads = (self._num_heads, self._key_dim)
        values = (self._num_heads, self.value_dim)
        self._query_dense = self._projection("query", rank, 1, heads)
        self._query_dense.build(query_shape)
        self._key_dense = self._projection("key", len(key_shape), 1, heads)
        self._key_dense.build(key_shape)
        if self._use_gate:
            self._gate_dense = self._projection(
                "gate", rank, 1, values, activation="sigmoid"
            )
            self._gate_dense.build(query_shape)
        self._value_dense = self._projection("value", len(value_shape), 1, values)
        self._value_dense.build(value_shape)
        self._output_dense = self._projection(
            "attention_output", rank + 1, 2, self._output_shape or (query_shape[-1],)
        )
        self._output_dense.build((*query_shape[:-1], *values))
        keep_frozen(self)

    @override
    def call(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor | None = None,
        query_mask: Tensor | None = None,
        value_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> Tensor:
        key = value if key is None else key
        mask = self._mask(
            query,
            value,
            key,
            query_mask,
            value_mask,
            key_mask,
            attention_mask,
            use_causal_mask,
        )
        query = prepare_inputs(query, mask.query_padding)
        mixed, scores = self._attend(
            self._query_dense(query),
            self._key_dense(prepare_inputs(key, mask.key_padding)),
            self._value_dense(prepare_inputs(value, mask.key_padding)),
            mask,
            axes=self._axes(query.shape),
            training=training,
            return_scores=return_attention_scores,
        )
        if self._use_gate:
            mixed = ops.multiply(mixed, self._gate_dense(query))
        outputs = self._output_dense(mixed)
        if mask.query_padding is not None:
            set_keras_mask(outputs, mask.query_padding)
        return (outputs, scores) if return_attention_scores else outputs

    @override
    def compute_output_shape(
        self,
        query_shape: Shape,
        value_shape: Shape,
        key_shape: Shape | None = None,
    ) -> tuple[int | None, ...]:
        _check_keys(query_shape, value_shape, key_shape)
        return (*query_shape[:-1], *(self._output_shape or query_shape[-1:]))

    @override
    def compute_output_spec(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor | None = None,
        query_mask: Tensor | None = None,
        value_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> Any:
        key = value if key is None else key
        # What is wrong raises now rather than in the first run.
        mask = self._mask(
            query,
            value,
            key,
            query_mask,
            value_mask,
            key_mask,
            attention_mask,
            use_causal_mask,
        )
        shape = self.compute_output_shape(query.shape, value.shape, key.shape)
        outputs = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if mask.query_padding is not None:
            set_keras_mask(outputs, mask.query_padding)
        if not return_attention_scores:
            return outputs
        shape = self._score_shape(query.shape, key.shape)
        return outputs, keras.KerasTensor(shape, dtype=self.compute_dtype)

    def _mask(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor,
        query_mask: Tensor | None,
        value_mask: Tensor | None,
        key_mask: Tensor | None,
        attention_mask: Tensor | None,
        use_causal_mask: bool,
    ) -> Mask:
        """Brings all masks together, and checks them and the inputs' shapes."""
        _check_keys(query.shape, value.shape, key.shape)
        shape = self._score_shape(query.shape, key.shape)
        mask = Mask(
            as_padding(query_mask, query.shape, "query_mask"),
            intersect(
                as_padding(value_mask, value.shape, "value_mask"),
                as_padding(key_mask, key.shape, "key_mask"),
            ),
            as_pairs(attention_mask, shape, len(self._axes(query.shape))),
            bool(use_causal_mask),
            self._sliding_window,
        )
        check_order(mask, self._axes(query.shape))
        return mask

    def _score_shape(
        self, query_shape: Shape, key_shape: Shape
    ) -> tuple[int | None, ...]:
        axes = self._axes(query_shape)
        return score_shape(query_shape, key_shape, self._num_heads, axes)

    def _axes(self, query_shape: Shape) -> tuple[int, ...]:
        return resolve_axes(self._attention_axes, len(query_shape))


def _check_keys(
    query_shape: Shape, value_shape: Shape, key_shape: Shape | None
) -> Shape:
    """Returns the keys' shape, which must be the values' but for the features."""
    key_shape = value_shape if key_shape is None else key_shape
    if len(query_shape) != len(value_shape):
        raise ValueError(
            "`query` and `value` must have as many dimensions. Received: "
            f"query_shape={query_shape} and value_shape={value_shape}"
        )
    if tuple(value_shape[1:-1]) != tuple(key_shape[1:-1]):
        raise ValueError(
            "All dimensions of `value` and `key`, except the last one, must be equal. "
            f"Received: value_shape={value_shape} and key_shape={key_shape}"
        )
    return key_shape


def _check_axes(axes: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if axes is None:
        return None
    axes = (axes,) if isinstance(axes, int) else axes
    if not isinstance(axes, list | tuple) or not all(
        isinstance(axis, int) for axis in axes
    ):
        raise ValueError(
            "`attention_axes` must be an int, or a list or tuple of ints. "
            f"Received: attention_axes={axes}"
        )
    return tuple(axes)
