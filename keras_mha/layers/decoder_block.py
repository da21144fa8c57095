"""A transformer decoder block: self-attention, attention to a memory, a network."""

from __future__ import annotations

from typing import Any

import keras
from typing_extensions import override

from keras_mha.attention.cache import Cache
from keras_mha.attention.mask_arguments import as_padding
from keras_mha.layers.arguments import check_flag
from keras_mha.layers.multi_head_attention import MultiHeadAttention
from keras_mha.layers.seeded_layer import keep_frozen, whole
from keras_mha.layers.transformer_block import TransformerBlock
from keras_mha.typing import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_mha")
class TransformerDecoderBlock(TransformerBlock):
    """Causal self-attention, attention to a memory if asked for, and a network.

    Each is in a `ResidualNorm`. Position `i` sees positions `j <= i` only. With a
    cache, positions come chunk by chunk or one by one, with the same outputs as all
    at once.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.1; with the
    default `placement="pre"` the order of Xiong et al. 2020. A stack of `"pre"`
    blocks wants a normalization after its last block.

    Letters: B batch, T length, S length of the memory, D model width, N query heads,
    K key/value heads, H head size.

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
        cross_attention: Whether the block attends to a memory, such as an encoder's
            outputs, with `num_heads` heads of its own. Options of the scores hold
            for the self-attention alone.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        inputs: Floating `(B, T, D)`.
        memory: Floating `(B, S, any size)`, with `cross_attention`, unless the cache
            holds it.
        mask: Padding mask `(B, T)`. Defaults to the mask the inputs carry.
        memory_mask: Padding mask `(B, S)`. Defaults to the mask the memory carries.
        attention_mask: `(T, T)`, `(B, T, T)` or `(B, N or 1, T, T)`, of the
            self-attention.
        training: Whether dropout is active.
        segment_ids: Integers `(B, T)`; see `pack_sequences`.
        cache: What `init_cache` or an earlier call returned.
        return_attention_scores: Whether to return the probabilities too; not with
            a `cache`.
        attention_bias: Floating `(T, T)`, `(B, T, T)` or `(B or 1, N or 1, T, T)`,
            added to the scores of the self-attention; not with a `cache`.
        head_mask: Floating `(N,)` or `(B, N)`: factor of each head's mixed values in
            the self-attention.

    Returns:
        `(B, T, D)`; with `cache`, also the cache for the next call; with
        `return_attention_scores`, also the self-attention's `(B, N, T, T)` and, with
        `cross_attention`, those of the attention to the memory, `(B, N, T, S)`.

    Raises:
        ValueError: If an argument is out of its domain, or a memory is missing or
            superfluous.
        TypeError: If a mask is floating.

    Example:

    >>> import numpy as np
    >>> import keras_mha
    >>> block = keras_mha.TransformerDecoderBlock(2, 16, position="rotary")
    >>> inputs = np.random.normal(size=(3, 5, 8)).astype("float32")
    >>> at_once = block(inputs)
    >>> cache, steps = block.init_cache(batch_size=3, max_length=5), []
    >>> for position in range(5):
    ...     step, cache = block(inputs[:, position : position + 1], cache=cache)
    ...     steps.append(step)
    >>> bool(np.allclose(np.concatenate(steps, axis=1), at_once, atol=1e-5))
    True
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
        cross_attention: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            seeds=6,
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
        self.cross_attention = check_flag(cross_attention, "cross_attention")
        self._memory_options = {
            "num_heads": num_heads,
            "dropout": self._share_of_attention(dropout),
            "flash_attention": flash_attention,
            "jit_compile": jit_compile,
        }
        self._key_dim = key_dim

    @override
    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "cross_attention": self.cross_attention}

    @override
    def build(self, inputs_shape: Shape, memory_shape: Shape | None = None) -> None:
        self.attention.build(inputs_shape)
        if self.cross_attention:
            if memory_shape is None:
                raise ValueError(
                    "A block with `cross_attention` is built with a `memory`: call it "
                    "with one first. Received: memory=None"
                )
            width = inputs_shape[-1]
            key_dim = self._key_dim or width // self._memory_options["num_heads"]
            with whole():
                attention = MultiHeadAttention(
                    key_dim=key_dim,
                    seed=self._seeds[4],
                    name="cross_attention",
                    **self._memory_options,
                    **self._dense,
                )
                attention.build(inputs_shape, memory_shape)
                self.memory_attention = self._with_residual(
                    attention, self.attention.normalization, "memory_attention", 5
                )
            self.memory_attention.build(inputs_shape)
        self.feed_forward.build(inputs_shape)
        keep_frozen(self)

    @override
    def call(
        self,
        inputs: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        training: bool | None = None,
        segment_ids: Tensor | None = None,
        cache: dict[str, Cache] | None = None,
        return_attention_scores: bool = False,
        attention_bias: Tensor | None = None,
        head_mask: Tensor | None = None,
    ) -> Any:
        memory_mask = self._check_memory(memory, memory_mask, cache, inputs.shape[0])
        outputs = self.attention(
            inputs,
            mask=mask,
            attention_mask=attention_mask,
            use_causal_mask=True,
            training=training,
            segment_ids=segment_ids,
            cache=None if cache is None else cache["self"],
            return_attention_scores=return_attention_scores,
            attention_bias=attention_bias,
            head_mask=head_mask,
        )
        others: list[Any] = []  # the scores, or the cache
        if return_attention_scores or cache is not None:
            outputs, other = outputs
            others.append(other if cache is None else {**cache, "self": other})
        if self.cross_attention:
            outputs = self.memory_attention(
                outputs,
                memory,
                value_mask=memory_mask,
                training=training,
                cache=None if cache is None else cache["memory"],
                return_attention_scores=return_attention_scores,
            )
            if return_attention_scores:
                outputs, scores = outputs
                others.append(scores)
        outputs = self.feed_forward(outputs, training=training)
        return (outputs, *others) if others else outputs

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> dict[str, Cache]:
        """Returns an empty cache, for `block(inputs, cache=cache)`.

        Keys and values of the memory are projected here, once.

        Args:
            batch_size: B.
            max_length: How many positions will go by.
            memory: Floating `(B, S, any size)`, with `cross_attention`.
            memory_mask: Padding mask `(B, S)`. Defaults to the mask of the memory.

        Returns:
            `"self"`, the cache of the self-attention, and with `cross_attention`
            `"memory"`. Past `max_length` positions outputs are NaN, unless a window
            bounds what is kept.

        Raises:
            ValueError: If the block is not built, an argument is not positive, or a
                memory is missing or superfluous.

        Example:

        >>> import numpy as np
        >>> import keras_mha
        >>> block = keras_mha.TransformerDecoderBlock(num_heads=2, hidden_dim=16)
        >>> inputs = np.random.normal(size=(3, 5, 8)).astype("float32")
        >>> at_once = block(inputs)
        >>> cache = block.init_cache(batch_size=3, max_length=5)
        >>> some, cache = block(inputs[:, :4], cache=cache)
        >>> last, cache = block(inputs[:, 4:], cache=cache)
        >>> bool(np.allclose(last, at_once[:, 4:], atol=1e-5))
        True
        """
        memory_mask = self._check_memory(memory, memory_mask, None, batch_size)
        cache = {"self": self.attention.sublayer.init_cache(batch_size, max_length)}
        if self.cross_attention:
            cache["memory"] = self.memory_attention.sublayer.init_cache(
                memory, value_mask=memory_mask
            )
        return cache

    @override
    def compute_output_shape(
        self, inputs_shape: Shape, memory_shape: Shape | None = None
    ) -> tuple[int | None, ...]:
        del memory_shape  # the outputs have the shape of the inputs
        return tuple(inputs_shape)

    @override
    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        # Traces `call`, which has as many outputs as there are caches.
        return keras.Operation.compute_output_spec(self, *args, **kwargs)

    def _check_memory(
        self,
        memory: Tensor | None,
        memory_mask: Tensor | None,
        cache: Any,
        batch_size: Any,
    ) -> Tensor | None:
        """Refuses what does not fit, by the block's own names; returns the mask."""
        names = {"self", "memory"} if self.cross_attention else {"self"}
        if cache is not None and not names <= cache.keys():
            raise ValueError(
                f"A cache of this block holds {sorted(names)}, as `init_cache` makes "
                f"it. Received: {sorted(cache)}"
            )
        wants_memory = self.cross_attention and cache is None
        if (memory is not None) != wants_memory:
            raise ValueError(
                "`memory` is for blocks made with `cross_attention=True`, which need "
                "it unless their cache holds it. Received: "
                f"cross_attention={self.cross_attention}, "
                f"memory={'None' if memory is None else tuple(memory.shape)}, "
                f"cache={'None' if cache is None else sorted(cache)}"
            )
        if memory is None and memory_mask is not None:
            raise ValueError(
                "`memory_mask` needs a `memory`; a cache holds the mask of its own. "
                f"Received: memory=None, memory_mask of shape {memory_mask.shape}"
            )
        if memory is None:
            return None
        shape = tuple(memory.shape)
        known = isinstance(batch_size, int) and len(shape) > 0 and shape[0] is not None
        if len(shape) != 3 or (known and shape[0] != batch_size):
            raise ValueError(
                "`memory` must have the shape (B, S, any size), with the inputs' B. "
                f"Received: memory of shape {shape} and B={batch_size}"
            )
        return as_padding(memory_mask, shape, "memory_mask")
