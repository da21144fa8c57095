"""Multi-head attention of a sequence to itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import keras
from keras import ops
from typing_extensions import override

from keras_mha.attention.cache import (
    Cache,
    check_cache,
    empty_cache,
    extend_cache,
    next_position,
)
from keras_mha.attention.dispatch import prepare_inputs
from keras_mha.attention.mask_arguments import as_padding, as_segments, known_booleans
from keras_mha.attention.mask_parts import NOTHING, MaskParts, spell_padding
from keras_mha.attention.masks import with_table
from keras_mha.layers.arguments import check_optional, check_positive, keyword_only
from keras_mha.layers.attention_layer import AttentionLayer, AttentionOptions
from keras_mha.layers.fused_projection import FusedProjection
from keras_mha.layers.keras_mask import get_keras_mask
from keras_mha.layers.projections import Part
from keras_mha.layers.seeded_layer import keep_frozen, not_rematerialized
from keras_mha.typing import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_mha")
class MultiHeadSelfAttention(AttentionLayer):
    """Multi-head self-attention with one fused query-key-value projection.

    Computes `softmax(mask(Q K^T / sqrt(H))) V` for each head, with Q, K and V
    projected from the same inputs, and projects the heads side by side to the
    outputs. Same function as `keras.layers.MultiHeadAttention(...)(x, x)`, in one
    product instead of three.

    Masks. All are boolean or integer, True or non-zero = attend, and all must
    agree for a pair to attend. The padding mask hides keys *and* queries; where
    `mask` is not passed it is read from the inputs (`Embedding(mask_zero=True)`,
    `Masking`), also when an `attention_mask` is passed. What stands in padding,
    NaN included, changes neither the other positions nor any gradient. A query
    that sees no key gets zeros from the attention, hence the output projection's
    bias.

    XLA. `jit_compile=True` compiles the attention between the projections (scaling,
    scores, masks, softmax, dropout, mixing) with XLA wherever the layer is called,
    on the TensorFlow backend; each projection is one matrix product and stays
    outside, where Keras' LoRA, quantization and regularizers see it. XLA compiles once
    for each new shape, so pad lengths to a multiple, of 16 say. `False` keeps
    any model that holds the layer from being compiled (`supports_jit=False`).
    `"auto"` compiles nothing by itself and leaves `model.compile` its choice. It
    is so because XLA is slower here on a CPU: on a 2-core x86-64 machine it takes 0.95
    to 1.3 times as long forward, and 1.0 to 1.35 times forward and backward, more the
    longer the sequence (`python -m benchmarks layer`). On a GPU, where
    `model.fit` compiles the whole model by default, the attention is compiled with
    it; TensorFlow on a GPU is unmeasured. Op determinism
    (`tf.config.experimental.enable_op_determinism`) turns the boundary off. A
    SavedModel made by `model.export` of a layer with `True` is marked for XLA and
    fails where XLA is disabled, as in TensorFlow Serving; use
    `keras_mha.export.export_saved_model`, which removes the marks.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.2.2.

    Letters: B batch, T length, D model width, N query heads, K key/value heads, H
    head size.

    Args:
        num_heads: N.
        key_dim: H of queries and keys. Defaults to `D / num_heads`, which must be
            whole.
        value_dim: Size of each head's values. Defaults to that of the keys.
        dropout: Share of the attention probabilities dropped in training,
            `0 <= dropout < 1`. The same positions fall in eager, graph and XLA
            execution for the same seed.
        use_bias: Whether the projections have biases.
        output_shape: Size, or shape, of each output position. Defaults to D.
        kernel_initializer: Initializer of the kernels; queries, keys and values
            are each initialized as a projection of their own.
        bias_initializer: Initializer of the biases.
        kernel_regularizer: Regularizer of the kernels.
        bias_regularizer: Regularizer of the biases.
        activity_regularizer: Regularizer of the projections' outputs, as in
            `keras.layers.MultiHeadAttention`.
        kernel_constraint: Constraint on the kernels.
        bias_constraint: Constraint on the biases.
        jit_compile: True, False or `"auto"`; see above.
        seed: Integer seed of the dropout.
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
        use_gate: Whether to multiply the mixed values by `sigmoid(dense(inputs))`
            before the output projection (Qiu et al. 2025, "Gated attention for large
            language models").
        sliding_window: Position `i` attends to `j` with `|i - j| < sliding_window`
            only. Defaults to no limit.
        flash_attention: True asks for memory linear in T, always; False for the
            reference implementation; `None` leaves the choice.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        inputs: Floating `(B, T, D)`.
        mask: Padding mask `(B, T)`. Defaults to the mask the inputs carry.
        attention_mask: `(T, T)`, `(B, T, T)` or `(B, N or 1, T, T)`, or a mask value
            such as `SlidingWindowMask(64)`.
        use_causal_mask: Whether position `i` attends to positions `j <= i` only.
        return_attention_scores: Whether to return the probabilities too.
        training: Whether dropout is active.
        segment_ids: Integers `(B, T)`; see `pack_sequences`: positions attend within
            their own segment only, negative ones to nothing.
        attention_bias: Floating `(T, T)`, `(B, T, T)` or `(B or 1, N or 1, T, T)`,
            added to the scores.
        head_mask: Floating `(N,)` or `(B, N)`: factor of each head's mixed values
            (Michel et al. 2019, "Are sixteen heads really better than one?").
        cache: What `init_cache` or an earlier call returned. The inputs then are
            the next positions, chunk by chunk or one by one, and see the earlier
            ones as in one causal call over all.

    Returns:
        Outputs `(B, T, D)`, or `(B, T, *output_shape)`; with
        `return_attention_scores`, also the probabilities before dropout
        `(B, N, T, T)`; with `cache`, also the cache for the next call. In the
        layer's compute dtype.

    Raises:
        ValueError: If an argument is out of its domain, D does not divide by
            `num_heads` where `key_dim` is `None`, or a mask has a shape that does
            not fit.
        TypeError: If a mask is floating.

    Example:

    >>> import numpy as np
    >>> import keras_mha
    >>> layer = keras_mha.MultiHeadSelfAttention(num_heads=2)
    >>> inputs = np.random.normal(size=(3, 5, 8)).astype("float32")
    >>> mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    >>> outputs, scores = layer(inputs, mask=mask, return_attention_scores=True)
    >>> tuple(outputs.shape), tuple(scores.shape)
    ((3, 5, 8), (3, 2, 5, 5))
    >>> bool(np.allclose(scores[0, :, :3, :3].numpy().sum(-1), 1.0))
    True
    """

    @keyword_only(
        "kernel_initializer",
        "bias_initializer",
        "kernel_regularizer",
        "bias_regularizer",
        "activity_regularizer",
        "kernel_constraint",
        "bias_constraint",
        "jit_compile",
        "seed",
    )
    def __init__(
        self,
        num_heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        output_shape: int | Sequence[int] | None = None,
        *,
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
        self._key_dim = check_optional(key_dim, "key_dim")
        self._value_dim = check_optional(value_dim, "value_dim")

    @override
    def argument_shapes(self) -> Mapping[str, str]:
        return {"inputs": "(B, T, D)"}

    @property
    def key_dim(self) -> int | None:
        """H as it was asked for; `None` means `D / num_heads`."""
        return self._key_dim

    @property
    def value_dim(self) -> int | None:
        """Size of each head's values as asked for; `None` means the keys'."""
        return self._value_dim

    @override
    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "key_dim": self._key_dim,
            "value_dim": self._value_dim,
        }

    @override
    def build(self, input_shape: Shape) -> None:
        if len(input_shape) != 3:
            raise ValueError(
                "`inputs` must have the shape (B, T, D). "
                f"Received: inputs of shape {tuple(input_shape)}"
            )
        width = input_shape[-1]
        key_dim = self._key_dim or self._divide(width)
        value_dim = self._value_dim or key_dim
        with not_rematerialized():
            self.qkv_dense = FusedProjection(
                self._num_heads,
                key_dim,
                value_dim,
                use_bias=self._projections.use_bias,
                num_key_value_heads=self.num_key_value_heads,
                **self._projections.projection_kwargs(),
                dtype=self.dtype_policy,
                name="qkv",
            )
        self.qkv_dense.build(input_shape)
        if self._use_gate:
            self.gate_dense = self._projection(
                "gate", 3, 1, (self._num_heads, value_dim), activation="sigmoid"
            )
            self.gate_dense.build(input_shape)
        self._build_scores((1,), key_dim)
        self.output_dense = self._projection(
            "attention_output", 4, 2, self._output_shape or (width,)
        )
        self.output_dense.build((*input_shape[:-1], self._num_heads, value_dim))
        self.input_spec = keras.layers.InputSpec(ndim=3, axes={-1: width})
        keep_frozen(self)

    @override
    def call(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_causal_mask: bool = False,
        return_attention_scores: bool = False,
        training: bool | None = None,
        segment_ids: Tensor | None = None,
        attention_bias: Tensor | None = None,
        head_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Any:
        if mask is None:
            # Keras fills `mask` only where `inputs` is the only tensor argument.
            mask = get_keras_mask(inputs)
        restrictions = self._mask(
            inputs,
            mask,
            attention_mask,
            use_causal_mask,
            segment_ids,
            attention_bias,
            head_mask,
        )
        offset: Any = 0
        if attention_mask is not None:
            length = ops.shape(inputs)[1]
            restrictions = spell_padding(restrictions, length, length)
            offset = self._offset(attention_mask)
        if restrictions.query_padding is not None:
            inputs = prepare_inputs(inputs, restrictions.query_padding)
        query, key, value = self.qkv_dense.split(self.qkv_dense(inputs))
        start = 0 if cache is None else next_position(cache)
        if self._turns:
            query = self._turn(query, self.query_norm, start)
            key = self._turn(key, self.key_norm, start)
        overflows = None
        if cache is not None:
            _check_cached(
                attention_mask=attention_mask,
                segment_ids=segment_ids,
                attention_bias=attention_bias,
                return_attention_scores=return_attention_scores or None,
            )
            key, value, restrictions, offset, cache, overflows = extend_cache(
                cache, key, value, restrictions.query_padding, self._sliding_window
            )
        mixed, scores = self._attend(
            query,
            key,
            value,
            restrictions,
            bias=attention_bias,
            head_mask=head_mask,
            training=training,
            return_scores=return_attention_scores,
            # Without them only padded keys, which are zero now, are hidden from all.
            keys_are_finite=cache is not None
            or (attention_mask is None and segment_ids is None),
            offset=offset,
        )
        if self._use_gate:
            mixed = mixed * self.gate_dense(inputs)
        outputs = self.output_dense(mixed)
        if cache is not None:
            return _refuse_overflow(outputs, overflows), cache
        return (outputs, scores) if return_attention_scores else outputs

    def init_cache(self, batch_size: Any, max_length: int) -> Cache:
        """Returns an empty cache, for `layer(inputs, cache=cache)`.

        A plain dictionary of tensors whose shapes do not change from call to call.
        Past `max_length` positions the outputs are NaN. With a sliding window no
        only its positions are stored, and decoding may go on for ever.

        Args:
            batch_size: B, an int or an integer scalar tensor.
            max_length: How many positions will go by.

        Raises:
            ValueError: If an argument is not positive, or the layer is not built.

        Example:

        >>> import numpy as np
        >>> import keras_mha
        >>> layer = keras_mha.MultiHeadSelfAttention(num_heads=2, position="rotary")
        >>> inputs = np.random.normal(size=(3, 5, 8)).astype("float32")
        >>> at_once = layer(inputs, use_causal_mask=True)
        >>> cache = layer.init_cache(batch_size=3, max_length=5)
        >>> some, cache = layer(inputs[:, :4], cache=cache)
        >>> last, cache = layer(inputs[:, 4:], cache=cache)
        >>> bool(np.allclose(last, at_once[:, 4:], atol=1e-5))
        True
        """
        if not ops.is_tensor(batch_size):
            batch_size = check_positive(batch_size, "batch_size")
        max_length = check_positive(max_length, "max_length")
        if not self.built:
            raise ValueError("`init_cache` needs a built layer: call it first.")
        key_dim, value_dim = self.qkv_dense.head_sizes
        heads = self.num_key_value_heads
        return empty_cache(
            batch_size,
            max_length,
            (heads, key_dim),
            (heads, value_dim),
            self.compute_dtype,
            self._sliding_window,
        )

    @override
    def compute_output_shape(self, input_shape: Shape) -> tuple[int | None, ...]:
        return (*input_shape[:-1], *(self._output_shape or input_shape[-1:]))

    @override
    def compute_output_spec(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_causal_mask: bool = False,
        return_attention_scores: bool = False,
        training: bool | None = None,
        segment_ids: Tensor | None = None,
        attention_bias: Tensor | None = None,
        head_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Any:
        # What is wrong raises now rather than in the first run.
        self._mask(
            inputs,
            mask,
            attention_mask,
            use_causal_mask,
            segment_ids,
            attention_bias,
            head_mask,
        )
        shape = self.compute_output_shape(inputs.shape)
        outputs = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if cache is not None:
            next_position(cache)
            _check_cached(
                attention_mask=attention_mask,
                segment_ids=segment_ids,
                attention_bias=attention_bias,
                return_attention_scores=return_attention_scores or None,
            )
            heads = (*inputs.shape[:2], self.num_key_value_heads)
            key_dim, value_dim = self.qkv_dense.head_sizes
            check_cache(
                cache, (*heads, key_dim), (*heads, value_dim), self._sliding_window
            )
            return outputs, {
                name: keras.KerasTensor(entry.shape, dtype=entry.dtype)
                for name, entry in cache.items()
            }
        if not return_attention_scores:
            return outputs
        scores = self._score_shape(inputs.shape)
        return outputs, keras.KerasTensor(scores, dtype=self.compute_dtype)

    def enable_lora(
        self,
        rank: int,
        targets: Sequence[Part] = ("query", "value"),
        lora_alpha: float | None = None,
    ) -> None:
        """Freezes the fused kernel and adapts parts of it by low-rank factors.

        Each part in `targets` gets factors of its own. They are merged into the
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
        >>> layer = keras_mha.MultiHeadSelfAttention(num_heads=2)
        >>> layer.build((None, None, 8))
        >>> layer.enable_lora(3, targets=("query",))
        >>> [tuple(v.shape) for v in layer.qkv_dense.trainable_variables]
        [(2, 12), (8, 3), (3, 8)]
        """
        if not self.built:
            raise ValueError("`enable_lora` needs a built layer: call it first.")
        self.qkv_dense.enable_lora(rank, targets, lora_alpha)

    def _mask(
        self,
        inputs: Tensor,
        padding_mask: Tensor | None,
        attention_mask: Tensor | None,
        use_causal_mask: bool,
        segment_ids: Tensor | None,
        attention_bias: Tensor | None,
        head_mask: Tensor | None,
    ) -> MaskParts:
        """Brings all masks together, and checks them and all else that must fit."""
        scores = self._score_shape(inputs.shape)
        if attention_bias is not None or head_mask is not None:
            self._check_factors(attention_bias, head_mask, scores)
        padding = as_padding(padding_mask, inputs.shape, "mask")
        segments = as_segments(segment_ids, inputs.shape, "segment_ids")
        lower, upper = self._bounds[bool(use_causal_mask)]
        if padding is lower is upper is segments is attention_mask is None:
            return NOTHING
        mask = MaskParts(padding, padding, None, lower, upper, segments, segments)
        if attention_mask is None:
            return mask
        return with_table(mask, known_booleans(attention_mask), scores, 1)

    def _divide(self, width: int | None) -> int:
        if width is None or width % self._num_heads:
            raise ValueError(
                "With `key_dim=None` the inputs' last dimension must be divisible by "
                f"`num_heads`. Received: inputs of width {width} and "
                f"num_heads={self._num_heads}"
            )
        return width // self._num_heads

    def _score_shape(self, input_shape: Shape) -> tuple[int | None, ...]:
        B, T, _ = input_shape
        return B, self._num_heads, T, T


def _check_cached(**arguments: Any) -> None:
    names = [name for name, value in arguments.items() if value is not None]
    if names:
        raise ValueError(
            "With a `cache` positions are in causal order, and only `mask` and "
            f"`head_mask` join it. Received: {', '.join(names)}"
        )


def _refuse_overflow(outputs: Tensor, overflows: Tensor | None) -> Tensor:
    """NaN where the cache was too short: no compiled call can raise."""
    if overflows is None:
        return outputs
    return ops.where(overflows, ops.full_like(outputs, float("nan")), outputs)
