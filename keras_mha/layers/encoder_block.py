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
    blocks wants a normalization after its last block, such as `RMSNormalization`.

    Letters: B batch, T length, D model width, N query heads, K key/value heads, H head
    size.

    Args:
        num_heads: N.
        hidden_dim: Width of the feed-forward network's hidden layer.
        key_dim: H. Defaults to `D / num_heads`.
        dropout: Share of each sublayer's outputs dropped in training.
        attention_dropout: Share of the attention probabilities dropped in
            training. Defaults to `dropout`.
        hidden_dropout: Share of the feed-forward network's hidden values dropped in
            training. Defaults to `dropout`.
        seed: Integer seed of every dropout; each draws differently.
        attention: Options of the self-attention only, as a dictionary; or a
            `MultiHeadSelfAttention`, which the block copies, in place of `num_heads`
            and all other options of it.
        feed_forward: Options of the feed-forward network only, as a dictionary; or a
            layer from `(B, T, D)` to `(B, T, D)`, which the block copies, in place of
            `hidden_dim` and all other options of it.
        **options: Options of the parts. Each goes to every part that has it:
            `MultiHeadSelfAttention` (`num_key_value_heads`, `position`, `qk_norm`,
            `sliding_window`, ...), `FeedForward` (`activation`, `gated`, ...) and
            `ResidualNorm` (`placement`, `normalization`, `stochastic_depth`, ...);
            `use_bias`, initializers, regularizers and constraints thus hold for both
            attention and network. A `normalization` layer is cloned for each place.
            The arguments of `keras.layers.Layer`, such as `name`, `dtype` and
            `activity_regularizer`, are the block's.

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
        ValueError: If an argument is out of its domain, or a part is told it twice.
        TypeError: If a mask is floating, or no part takes an argument.

    Example:

    >>> import numpy as np
    >>> import keras_mha
    >>> block = keras_mha.TransformerEncoderBlock(num_heads=2, hidden_dim=16)
    >>> tuple(block(np.ones((3, 5, 8), "float32"), use_causal_mask=True).shape)
    (3, 5, 8)

    Options of one part only, and of both:

    >>> block = keras_mha.TransformerEncoderBlock(
    ...     num_heads=4,
    ...     hidden_dim=16,
    ...     position="rotary",
    ...     gated=True,
    ...     use_bias=False,
    ...     attention={"use_bias": True},
    ... )
    >>> block.attention.sublayer.use_bias, block.feed_forward.sublayer.use_bias
    (True, False)
    """

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
