"""Multi-head attention of queries to keys and values, a drop-in for Keras' layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import keras
from keras import ops
from typing_extensions import override

from keras_mha.attention.cache import Cache
from keras_mha.attention.dispatch import prepare_inputs
from keras_mha.attention.mask_arguments import (
    as_padding,
    as_pair,
    as_segments,
    known_booleans,
)
from keras_mha.attention.mask_parts import (
    MaskParts,
    intersect,
    materialize,
    meet,
    spell_padding,
)
from keras_mha.attention.masks import with_table
from keras_mha.attention.numeric import plain_integer
from keras_mha.layers.arguments import check_optional, check_positive
from keras_mha.layers.attention_layer import (
    AttentionLayer,
    AttentionOptions,
    scale_heads,
)
from keras_mha.layers.axes import (
    attend_over,
    check_order,
    fold_mask,
    is_folded,
    resolve_axes,
    score_shape,
    unfold_scores,
)
from keras_mha.layers.keras_mask import get_keras_mask, set_keras_mask
from keras_mha.layers.projections import PARTS, Part, check_lora
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

    Letters: B batch, T query length, S key length, D model width, N query heads, K
    key/value heads, H head size of queries and keys, V head size of values.

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
        flash_attention: True asks for memory linear in T and S, always; False for
            the reference implementation; `None` leaves the choice. Scores that are
            asked for are materialized in any case.
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
        num_key_value_heads: K, a divisor of N: queries of N / K heads in a row share
            keys and values (Ainslie et al. 2023, "GQA"). Defaults to N.
        position: How scores know of positions: `"rotary"`, `"alibi"`, `"relative"`,
            a `RotaryEmbedding` or a `DistanceBias` such as `ALiBi`, of which the layer
            makes a copy of its own, or a function that maps integer distances
            of key from query to biases `(N or 1, *shape)`. Defaults to not at all.
        qk_norm: `"rms"` or `"layer"`: normalizes each head's queries and keys over H
            before they are rotated (Dehghani et al. 2023, "Scaling vision
            transformers to 22 billion parameters"). Defaults to none.
        qk_norm_epsilon: Added to the variance by these normalizations.
        logits_soft_cap: `c` turns scores `x` into `c tanh(x / c)` (Gemma Team 2024,
            "Gemma 2"). Defaults to no bound.
        use_sinks: Whether each head learns the score of a key that is always there
            and whose value is zero (Xiao et al. 2024, "Efficient streaming language
            models with attention sinks").
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        query: Floating `(B, T, D)`.
        value: Floating `(B, S, D)`; any D.
        key: Floating `(B, S, D)`; any D. Defaults to `value`.
        query_mask: Padding mask `(B, T)`. Defaults to the mask `query` carries.
        value_mask: Padding mask `(B, S)`. Defaults to the mask `value` carries.
        key_mask: Padding mask `(B, S)`. Defaults to the mask `key` carries.
        attention_mask: `(T, S)`, `(B, T, S)` or `(B, N or 1, T, S)`, or a mask value
            such as `SlidingWindowMask(64)`.
        return_attention_scores: Whether to return the probabilities too.
        training: Whether dropout is active.
        use_causal_mask: Whether query `i` attends to keys `j <= i` only, counted
            from the first query and the first key; needs a single attention axis.
        segment_ids: Integers `(B, T)` where T = S, or a pair of `(B, T)` and
            `(B, S)`: attention stays within equal ids, and negative ids see nothing;
            needs a single attention axis.
        attention_bias: Floating `(T, S)`, `(B, T, S)` or `(B or 1, N or 1, T, S)`,
            added to the scores; needs a single attention axis.
        head_mask: Floating `(N,)` or `(B, N)`: factor of each head's mixed values.
        cache: What `init_cache` returned, instead of `value` and `key`, which then
            are `None`: their projections, computed once for many queries.

    Returns:
        Outputs `(B, T, D)`, or `(B, T, *output_shape)`; with
        `return_attention_scores`, also the probabilities before dropout
        `(B, N, T, S)`. In the layer's compute dtype.

    Raises:
        ValueError: If an argument is out of its domain, or shapes do not fit each
            other.
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
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(
            num_heads=num_heads,
            dropout=dropout,
            use_bias=use_bias,
            output_shape=output_shape,
            sliding_window=sliding_window,
            flash_attention=flash_attention,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            use_gate=use_gate,
            seed=seed,
            **options,
        )
        self._key_dim = check_positive(key_dim, "key_dim")
        self._value_dim = check_optional(value_dim, "value_dim")
        self._attention_axes = _check_axes(attention_axes)
        computes: Any = type(self)._compute_attention
        self._is_overridden = computes is not MultiHeadAttention._compute_attention

    @override
    def argument_shapes(self) -> Mapping[str, str]:
        # Of another rank than values, keys are refused with both shapes.
        return {"query": "(B, T, ..., D)", "value": "(B, S, ..., D)", "key": "(...)"}

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
        keys = (self.num_key_value_heads, self._key_dim)
        values = (self.num_key_value_heads, self.value_dim)
        mixed = (self._num_heads, self.value_dim)
        self._query_dense = self._projection("query", rank, 1, heads)
        self._query_dense.build(query_shape)
        self._key_dense = self._projection("key", len(key_shape), 1, keys)
        self._key_dense.build(key_shape)
        if self._use_gate:
            self._gate_dense = self._projection(
                "gate", rank, 1, mixed, activation="sigmoid"
            )
            self._gate_dense.build(query_shape)
        self._value_dense = self._projection("value", len(value_shape), 1, values)
        self._value_dense.build(value_shape)
        self._output_dense = self._projection(
            "attention_output", rank + 1, 2, self._output_shape or (query_shape[-1],)
        )
        self._output_dense.build((*query_shape[:-1], *mixed))
        self._build_scores(self._axes(query_shape), self._key_dim)
        keep_frozen(self)

    @override
    def call(
        self,
        query: Tensor,
        value: Tensor | None = None,
        key: Tensor | None = None,
        query_mask: Tensor | None = None,
        value_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        segment_ids: Any = None,
        attention_bias: Tensor | None = None,
        head_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        key = value if key is None else key
        shapes = _shapes(query, value, key, cache)
        mask = self._mask(
            shapes,
            query_mask,
            value_mask,
            key_mask,
            attention_mask,
            use_causal_mask,
            segment_ids,
            attention_bias,
            head_mask,
        )
        offset = 0
        if attention_mask is not None:
            offset = self._offset(attention_mask)
        if attention_mask is not None and len(query.shape) == 3:
            keys = cache["key"] if cache is not None else key
            mask = spell_padding(mask, ops.shape(query)[1], ops.shape(keys)[1])
        query = prepare_inputs(query, mask.query_padding)
        if cache is None:
            keys = self._project_keys(value, key, mask.key_padding)
        else:
            self._check_cached(mask)
            keys = cache["key"], cache["value"]
            mask = meet(mask, MaskParts(key_padding=cache["mask"]))
        heads = (self._turn(self._query_dense(query), self.query_norm), *keys)
        axes = self._axes(query.shape)
        if self._is_overridden:
            mixed, scores = self._compute_attention(
                *heads,
                _spell_out(mask, *heads[:2], axes),
                training,
                return_attention_scores,
            )
            mixed = scale_heads(mixed, head_mask)
        else:
            mixed, scores = self._attend(
                *heads,
                mask,
                bias=attention_bias,
                head_mask=head_mask,
                training=training,
                return_scores=return_attention_scores,
                keys_are_finite=cache is not None,
                offset=offset,
            )
        if self._use_gate:
            mixed = ops.multiply(mixed, self._gate_dense(query))
        outputs = self._output_dense(mixed)
        if mask.query_padding is not None:
            set_keras_mask(outputs, mask.query_padding)
        return (outputs, scores) if return_attention_scores else outputs

    def init_cache(
        self,
        value: Tensor,
        key: Tensor | None = None,
        value_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> Cache:
        """Projects keys and values once, for `layer(query, cache=cache)`.

        A decoder attends to the same encoded inputs with every token.

        Args:
            value: Floating `(B, S, D)`.
            key: Floating `(B, S, D)`. Defaults to `value`.
            value_mask: Padding mask `(B, S)`. Defaults to the mask `value` carries.
            key_mask: Padding mask `(B, S)`. Defaults to the mask `key` carries.

        Returns:
            `"key"` `(B, S, K, H)`, `"value"` `(B, S, K, V)` and `"mask"` `(B, S)`.

        Raises:
            ValueError: If the layer is not built, or has several attention axes.

        Example:

        >>> import numpy as np
        >>> import keras_mha
        >>> layer = keras_mha.MultiHeadAttention(num_heads=2, key_dim=4)
        >>> query, value = np.ones((3, 1, 8)), np.ones((3, 5, 7))
        >>> at_once = layer(query, value)
        >>> cache = layer.init_cache(value)
        >>> bool(np.allclose(layer(query, cache=cache), at_once))
        True
        """
        if not self.built:
            raise ValueError("`init_cache` needs a built layer: call it first.")
        key = value if key is None else key
        if len(value.shape) != 3:
            raise ValueError(
                "`init_cache` takes `value` of shape (B, S, D). "
                f"Received: value of shape {tuple(value.shape)}"
            )
        masks = [
            as_padding(
                get_keras_mask(tensor) if mask is None else mask, tensor.shape, name
            )
            for mask, tensor, name in (
                (value_mask, value, "value_mask"),
                (key_mask, key, "key_mask"),
            )
        ]
        padding = intersect(*masks)
        keys, values = self._project_keys(value, key, padding)
        if padding is None:
            padding = ops.ones(ops.shape(keys)[:2], dtype="bool")
        return {"key": keys, "value": values, "mask": padding}

    def enable_lora(
        self,
        rank: int,
        targets: Sequence[Part] = ("query", "value"),
        lora_alpha: float | None = None,
    ) -> None:
        """Freezes the kernels of queries, keys and values and adapts some of them.

        Each projection in `targets` gets low-rank factors, which are merged into its
        kernel when weights are saved. The output projection is adapted by
        `layer.output_dense.enable_lora(rank)`. A model compiled before must be
        compiled again. A second call with the same arguments changes nothing.

        Source: Hu et al. 2021, "LoRA: low-rank adaptation of large language
        models".

        Args:
            rank: Rank of the factors.
            targets: Names out of "query", "key" and "value".
            lora_alpha: The factors' product is scaled by `lora_alpha / rank`.
                Defaults to `rank`.

        Raises:
            ValueError: If an argument is out of its domain, the layer is not
                built, was adapted before, or has a kernel constraint.

        Example:

        >>> import keras_mha
        >>> layer = keras_mha.MultiHeadAttention(num_heads=2, key_dim=4)
        >>> layer.build((None, None, 8), (None, None, 7))
        >>> layer.enable_lora(3, targets=("query",))
        >>> [tuple(v.shape) for v in layer.query_dense.trainable_variables]
        [(2, 4), (8, 2, 3), (3, 4)]
        """
        rank, targets, lora_alpha = check_lora(rank, targets, lora_alpha)
        if not self.built:
            raise ValueError("`enable_lora` needs a built layer: call it first.")
        dense = {name: getattr(self, f"_{name}_dense") for name in PARTS}
        for target in targets:
            dense[target].is_adapted(rank, lora_alpha)  # all raise before any changes
        for target in targets:
            dense[target].enable_lora(rank, lora_alpha)
        for projection in dense.values():
            projection._kernel.trainable = False

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
        value: Tensor | None = None,
        key: Tensor | None = None,
        query_mask: Tensor | None = None,
        value_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        segment_ids: Any = None,
        attention_bias: Tensor | None = None,
        head_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Any:
        shapes = _shapes(query, value, value if key is None else key, cache)
        # What is wrong raises now rather than in the first run.
        mask = self._mask(
            shapes,
            query_mask,
            value_mask,
            key_mask,
            attention_mask,
            use_causal_mask,
            segment_ids,
            attention_bias,
            head_mask,
        )
        if cache is not None:
            self._check_cached(mask)
        outputs = keras.KerasTensor(
            self.compute_output_shape(*shapes), dtype=self.compute_dtype
        )
        if mask.query_padding is not None and len(mask.query_padding.shape) > 1:
            set_keras_mask(outputs, mask.query_padding)
        if not return_attention_scores:
            return outputs
        scores = self._score_shape(shapes[0], shapes[2])
        return outputs, keras.KerasTensor(scores, dtype=self.compute_dtype)

    def _compute_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends with projected heads; a subclass may override it, as in Keras.

        An override is called by position, without `use_causal_mask`, and gets all
        masks as one. The layer's options of the scores (`position` biases, soft cap,
        sinks, dropout) are in this method, not around it.

        Args:
            query: `(B, T, N, H)`, or with several axes for T.
            key: `(B, S, K, H)`, likewise.
            value: `(B, S, K, V)`, likewise.
            attention_mask: Boolean `(B or 1, T, S)` or `(B or 1, N, T, S)`, or
                `None`.
            training: Whether dropout is active.
            return_attention_scores: Whether the probabilities are wanted.
            use_causal_mask: Whether query `i` attends to keys `j <= i` only.

        Returns:
            The mixed values `(B, T, N, V)`, and the probabilities before dropout
            or `None`.
        """
        tensors: Any = map(ops.convert_to_tensor, (query, key, value))
        query, key, value = tensors
        axes = self._axes(query.shape[:-1])
        shape = score_shape(query.shape[:-1], key.shape[:-1], self._num_heads, axes)
        mask = MaskParts(upper=0 if use_causal_mask else None)
        if attention_mask is not None:
            mask = with_table(mask, attention_mask, shape, len(axes))
        check_order(mask, axes)
        return self._attend(
            query,
            key,
            value,
            mask,
            training=training,
            return_scores=return_attention_scores,
        )

    @override
    def _mix(self, query: Tensor, *others: Any, **options: Any) -> Any:
        axes = self._axes(query.shape[:-1])
        attend = super()._mix
        if is_folded(len(query.shape), axes):
            return attend(query, *others, **options)
        return attend_over(axes, attend, query, *others, **options)

    def _project_keys(
        self, value: Tensor, key: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns keys `(B, S, K, H)`, ready to be scored, and values."""
        keys = self._key_dense(prepare_inputs(key, padding))
        values = self._value_dense(prepare_inputs(value, padding))
        return self._turn(keys, self.key_norm), values

    def _check_cached(self, mask: MaskParts) -> None:
        if mask.is_ordered or self.position_layer is not None:
            raise ValueError(
                "A `cache` of projected keys has no order for queries that come "
                "one by one: it goes with neither `position`, `sliding_window` "
                "nor `use_causal_mask`. `MultiHeadSelfAttention` has a cache that "
                "does."
            )
        if mask.key_padding is not None:
            raise ValueError(
                "A `cache` holds the padding of its keys. "
                "Received: cache with `value_mask` or `key_mask`"
            )

    def _mask(
        self,
        shapes: tuple[Shape, Shape, Shape],
        query_mask: Tensor | None,
        value_mask: Tensor | None,
        key_mask: Tensor | None,
        attention_mask: Tensor | None,
        use_causal_mask: bool,
        segment_ids: Any,
        attention_bias: Tensor | None,
        head_mask: Tensor | None,
    ) -> MaskParts:
        """Brings all masks together, and checks them and all else that must fit."""
        query_shape, value_shape, key_shape = shapes
        _check_keys(*shapes)
        if self._is_overridden and attention_bias is not None:
            raise ValueError(
                "`_compute_attention` takes no `attention_bias`, and "
                f"{type(self).__name__} overrides it. "
                f"Received: attention_bias of shape {_shape_of(attention_bias)}"
            )
        axes = self._axes(query_shape)
        _check_single_axis(axes, segment_ids=segment_ids, attention_bias=attention_bias)
        pair = as_pair(segment_ids, "segment_ids")
        mask = MaskParts(
            as_padding(query_mask, query_shape, "query_mask"),
            intersect(
                as_padding(value_mask, value_shape, "value_mask"),
                as_padding(key_mask, key_shape, "key_mask"),
            ),
            None,
            *self._bounds[bool(use_causal_mask)],
            as_segments(pair[0], query_shape, "segment_ids"),
            as_segments(pair[1], key_shape, "segment_ids"),
        )
        scores = self._score_shape(query_shape, key_shape)
        self._check_factors(attention_bias, head_mask, scores)
        if attention_mask is not None:
            table = known_booleans(attention_mask)
            mask = with_table(mask, table, scores, len(axes))
        check_order(mask, axes)
        return mask

    def _score_shape(
        self, query_shape: Shape, key_shape: Shape
    ) -> tuple[int | None, ...]:
        axes = self._axes(query_shape)
        return score_shape(query_shape, key_shape, self._num_heads, axes)

    def _axes(self, query_shape: Shape) -> tuple[int, ...]:
        return resolve_axes(self._attention_axes, len(query_shape))


def _spell_out(
    mask: MaskParts, query: Tensor, key: Tensor, axes: tuple[int, ...]
) -> Tensor | None:
    """Returns a mask as one boolean tensor, of rank 3 where all heads share it."""
    if not is_folded(len(query.shape), axes):
        mask = fold_mask(mask, query, key, axes)
    queries: Any = ops.shape(query)
    keys: Any = ops.shape(key)
    T, S = (math.prod(shape[axis] for axis in axes) for shape in (queries, keys))
    visible = materialize(mask, T, S)
    if visible is None:
        return None
    if len(query.shape) == 4:
        return visible if visible.shape[1] != 1 else ops.squeeze(visible, 1)
    batch = math.prod(size for i, size in enumerate(queries[:-2]) if i not in axes)
    visible = ops.broadcast_to(visible, (batch, queries[-2], T, S))
    return unfold_scores(visible, query, key, axes)


def _shapes(
    query: Tensor, value: Tensor | None, key: Tensor | None, cache: Cache | None
) -> tuple[Shape, Shape, Shape]:
    """Shapes of queries, values and keys, whose projections may be cached."""
    if (value is None) != (cache is not None) or (
        cache is not None and key is not None
    ):
        raise ValueError(
            "Pass `value`, and `key` if it differs, or else a `cache` of their "
            f"projections. Received: value={_shape_of(value)}, key={_shape_of(key)}, "
            f"cache={None if cache is None else sorted(cache)}"
        )
    if cache is not None:
        names = {"key", "value", "mask"}
        if not names <= cache.keys():
            raise ValueError(
                f"A cache holds {sorted(names)}, as `init_cache` makes it. "
                f"Received: {sorted(cache)}"
            )
        projected = (*cache["key"].shape[:2], None)
        return query.shape, projected, projected
    return query.shape, value.shape, key.shape


def _shape_of(tensor: Tensor | None) -> Shape | None:
    return None if tensor is None else tuple(tensor.shape)


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
    if len(value_shape) != len(key_shape) or any(
        None not in pair and pair[0] != pair[1]
        for pair in zip(value_shape[:-1], key_shape[:-1], strict=True)
    ):
        raise ValueError(
            "All dimensions of `value` and `key`, except the last one, must be equal. "
            f"Received: value_shape={value_shape} and key_shape={key_shape}"
        )
    return key_shape


def _check_single_axis(axes: tuple[int, ...], **arguments: Any) -> None:
    names = [name for name, value in arguments.items() if value is not None]
    if len(axes) > 1 and names:
        raise ValueError(
            "`segment_ids` and `attention_bias` need a single attention axis. "
            f"Received: attention_axes={axes} and {', '.join(names)}"
        )


def _check_axes(axes: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if axes is None:
        return None
    sequence = axes if isinstance(axes, list | tuple) else (axes,)
    numbers = [plain_integer(axis) for axis in sequence]
    if None in numbers:
        raise ValueError(
            "`attention_axes` must be an int, or a list or tuple of ints. "
            f"Received: attention_axes={axes}"
        )
    return tuple(number for number in numbers if number is not None)
