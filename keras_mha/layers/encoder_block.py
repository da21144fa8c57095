"""A transformer encoder block: self-attention, then a feed-forward network."""

from __future__ import annotations

from typing import Any

import keras
from typing_extensions import override

from keras_mha.layers.seeded_layer import keep_frozen
from keras_mha.layers.transformer_block import TransformerBlock
from keras_mha.typing import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_mha")
class TransformerEncoderBlock(TransformerBlock):
    """Self-attention and a feed-forward network, each in a `ResidualNorm`.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.1; with the
    default `placement="pre"` the order of Xiong et al. 2020. A stack of `"pre"`
    blocks wants a normalization after its last block.

    Letters: B batch, T length, D model width, N query heads, K key/value heads, H head
    size.

    Args:
        num_heads: N.
        hidden_dim: Width of the feed-forward network's hidden layer.
        key_dim: H. Defaults to `D / num_heads`.
        activation: Activation of the feed-forward network.
        gated: Whether the feed-forward network is gated.
        placement: `"pre"`, `"post"` or `"sandwich"`; see `ResidualNorm`.
        normalization: `"layer"`, `"rms"`, or a layer, of which each place gets a
            clone.
        dropout: Share of each sublayer's outputs dropped in training.
        attention_dropout: Share of the attention probabilities dropped in
            training. Defaults to `dropout`.
        stochastic_depth: Probability that an example skips a sublayer in training.
        layer_scale: Initial value of a learned factor for each feature of the
            branches. Defaults to none.
        rezero: Whether one learned factor, zero at first, scales each branch.
        epsilon: Added to the variance by the normalizations named by a string.
        use_bias: Whether the dense layers have biases.
        kernel_initializer: Initializer of the kernels.
        kernel_regularizer: Regularizer of the kernels.
        jit_compile: True, False or `"auto"`; see `MultiHeadSelfAttention`.
        seed: Integer seed of every dropout; each draws differently.
        num_key_value_heads: K; see `MultiHeadSelfAttention`, as for the rest.
        position: `"rotary"`, `"alibi"`, `"relative"`, or a layer.
        qk_norm: `"rms"` or `"layer"`.
        logits_soft_cap: Bound of the scores.
        use_sinks: Whether heads have sinks.
        use_gate: Whether heads have an output gate.
        sliding_window: Size of the window.
        flash_attention: Whether memory must be linear in T.
        hidden_dropout: Share of the feed-forward network's hidden values dropped in
            training. Defaults to `dropout`.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        inputs: Floating `(B, T, D)`.
        mask: Padding mask `(B, T)`. Defaults to the mask the inputs carry.
        attention_mask: `(T, T)`, `(B, T, T)` or `(B, N or 1, T, T)`.
        use_causal_mask: Whether position `i` attends to positions `j <= i` only.
        return_attention_scores: Whether to return the probabilities too.
        training: Whether dropout is active.
        segment_ids: Integers `(B, T)`; see `pack_sequences`.
        attention_bias: Floating `(T, T)`, `(B, T, T)` or `(B or 1, N or 1, T, T)`,
            added to the scores.
        head_mask: Floating `(N,)` or `(B, N)`: factor of each head's mixed values.

    Returns:
        `(B, T, D)`; with `return_attention_scores`, also `(B, N, T, T)`.

    Raises:
        ValueError: If an argument is out of its domain.
        TypeError: If a mask is floating.

    Example:

    >>> import numpy as np
    >>> import keras_mha
    >>> block = keras_mha.TransformerEncoderBlock(num_heads=2, hidden_dim=16)
    >>> tuple(block(np.ones((3, 5, 8), "float32"), use_causal_mask=True).shape)
    (3, 5, 8)
    """

    def __init__(
        self,
        num_heads: int,
        hidden_dim: int,
        key_dim: int | None = None,
        activation: Any = "gelu",
        gated: bool = False,
        placement: str = "pre",
        normalization: str | keras.layers.Layer = "layer",
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        stochastic_depth: float = 0.0,
        layer_scale: float | None = None,
        rezero: bool = False,
        epsilon: float = 1e-6,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        kernel_regularizer: Any = None,
        jit_compile: bool | str = "auto",
        seed: int | None = None,
        *,
        num_key_value_heads: int | None = None,
        position: str | keras.layers.Layer | None = None,
        qk_norm: str | None = None,
        logits_soft_cap: float | None = None,
        use_sinks: bool = False,
        use_gate: bool = False,
        sliding_window: int | None = None,
        flash_attention: bool | None = None,
        hidden_dropout: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            seeds=4,
            num_heads=num_heads,
            hidden_dim=hidden_dim,
            key_dim=key_dim,
            activation=activation,
            gated=gated,
            placement=placement,
            normalization=normalization,
            dropout=dropout,
            attention_dropout=attention_dropout,
            stochastic_depth=stochastic_depth,
            layer_scale=layer_scale,
            rezero=rezero,
            epsilon=epsilon,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            kernel_regularizer=kernel_regularizer,
            jit_compile=jit_compile,
            num_key_value_heads=num_key_value_heads,
            position=position,
            qk_norm=qk_norm,
            logits_soft_cap=logits_soft_cap,
            use_sinks=use_sinks,
            use_gate=use_gate,
            sliding_window=sliding_window,
            flash_attention=flash_attention,
            hidden_dropout=hidden_dropout,
            seed=seed,
            **kwargs,
        )

    @override
    def build(self, input_shape: Shape) -> None:
        self.attention.build(input_shape)
        self.feed_forward.build(input_shape)
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
    ) -> Any:
        outputs = self.attention(
            inputs,
            mask=mask,
            attention_mask=attention_mask,
            use_causal_mask=use_causal_mask,
            return_attention_scores=return_attention_scores,
            training=training,
            segment_ids=segment_ids,
            attention_bias=attention_bias,
            head_mask=head_mask,
        )
        if not return_attention_scores:
            return self.feed_forward(outputs, training=training)
        mixed, scores = outputs
        return self.feed_forward(mixed, training=training), scores

    @override
    def compute_output_spec(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.attention.compute_output_spec(inputs, *args, **kwargs)
