"""A transformer decoder block: self-attention, attention to a memory, a network."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from typing_extensions import override

from keras_mha.attention.cache import Cache
from keras_mha.attention.mask_arguments import as_padding
from keras_mha.layers.arguments import check_flag
from keras_mha.layers.feed_forward import FeedForward
from keras_mha.layers.multi_head_attention import MultiHeadAttention
from keras_mha.layers.positions import RelativePositionBias
from keras_mha.layers.residual_norm import trace_spec
from keras_mha.layers.seeded_layer import keep_frozen, not_rematerialized
from keras_mha.layers.transformer_block import (
    TransformerBlock,
    block_options,
    check_part,
    list_options,
    make_part,
    once_positional,
    pick,
)
from keras_mha.typing import Shape, Tensor

# Options of the block that hold for the attention to the memory too: those of all its
# dense layers, and how attention is computed.
_OF_MEMORY = (
    *(
        name
        for name in block_options(FeedForward)
        if name in block_options(MultiHeadAttention)
    ),
    "jit_compile",
    "flash_attention",
)


@keras.saving.register_keras_serializable(package="keras_mha")
class TransformerDecoderBlock(TransformerBlock):
    """Causal self-attention, attention to a memory if asked for, and a network.

    Each is in a `ResidualNorm`. Position `i` sees positions `j <= i` only. With a
    cache, positions come chunk by chunk or one by one, with the same outputs as all
    at once.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.1; with the
    default `placement="pre"` the order of Xiong et al. 2020. A stack of `"pre"`
    blocks wants a normalization after its last block, such as `RMSNormalization`.

    Letters: B batch, T length, S length of the memory, D model width, N query heads,
    K key/value heads, H head size.

    Args:
        num_heads: N.
        hidden_dim: Width of the feed-forward network's hidden layer.
        key_dim: H. Defaults to `D / num_heads`.
        cross_attention: Whether the block attends to a memory, such as an encoder's
            outputs. True makes a `MultiHeadAttention` with the N and H of the
            self-attention and the block's `use_bias`, initializers, regularizers,
            constraints, `jit_compile` and `flash_attention`. A dictionary holds
            options of it that differ; a `MultiHeadAttention` is copied as it is.
        **options: As for `TransformerEncoderBlock`. `position="relative"` here has
            buckets for earlier positions only, as in T5's decoder.

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

    @list_options(inspect.signature(TransformerBlock.__init__).parameters.values())
    @once_positional
    def __init__(
        self,
        num_heads: int | None = None,
        hidden_dim: int | None = None,
        key_dim: int | None = None,
        *,
        cross_attention: bool | Mapping[str, Any] | MultiHeadAttention = False,
        **options: Any,
    ) -> None:
        super().__init__(num_heads, hidden_dim, key_dim, **options)
        memory: Any = None
        if cross_attention is None or isinstance(cross_attention, bool | np.bool_):
            self.cross_attention = check_flag(cross_attention, "cross_attention")
        else:
            memory = cross_attention
            check_part("cross_attention", memory, MultiHeadAttention)
            self.cross_attention = True
        copies = isinstance(memory, MultiHeadAttention)
        self._memory_told = None if copies else list(memory or ())
        # Inside a function: Keras would save a layer in an attribute as the block's.
        self._make_memory_attention = functools.partial(
            make_part, MultiHeadAttention, memory, **pick(options, _OF_MEMORY)
        )
        if memory is not None:
            self._memory_attention()  # raises now what `build` would

    @override
    def argument_shapes(self) -> Mapping[str, str]:
        return {**super().argument_shapes(), "memory": "(B, S, any size)"}

    @override
    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        return {**config, "cross_attention": self._cross_attention_config(config)}

    @classmethod
    @override
    def from_config(cls, config: dict[str, Any]) -> Any:
        if config.get("position") == "relative":
            # Of version 0.1.0, whose decoders had buckets for later positions too.
            position = RelativePositionBias(
                config["num_heads"], dtype=config.get("dtype"), name="relative"
            )
            position = keras.saving.serialize_keras_object(position)
            config = {**config, "position": position}
        return super().from_config(config)

    @override
    def build(self, inputs_shape: Shape, memory_shape: Shape | None = None) -> None:
        self.attention.build(inputs_shape)
        if self.cross_attention:
            if memory_shape is None:
                raise ValueError(
                    "A block with `cross_attention` is built with a `memory`: call it "
                    "with one first. Received: memory=None"
                )
            attention = self._memory_attention()
            attention.build(inputs_shape, memory_shape)
            with not_rematerialized():
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
        return trace_spec(self, *args, **kwargs)

    @override
    def _make(self, part: type, **options: Any) -> keras.layers.Layer:
        if options.get("position") == "relative":
            options["position"] = RelativePositionBias(
                options["num_heads"],
                bidirectional=False,
                dtype=self.dtype_policy,
                name="relative",
            )
        return super()._make(part, **options)

    def _memory_attention(self) -> MultiHeadAttention:
        """Makes the attention to the memory."""
        with not_rematerialized():
            return self._make_memory_attention(
                num_heads=self.attention.sublayer.num_heads,
                key_dim=self._head_size(),
                dropout=self._told["attention"]["dropout"],
                seed=self._seeds[4],
                dtype=self.dtype_policy,
                name="cross_attention",
            )

    def _head_size(self) -> int:
        """H of the self-attention; before `build`, which may decide it, any number."""
        attention = self.attention.sublayer
        if attention.built:
            return attention.qkv_dense.head_sizes[0]
        return attention.key_dim or 1

    def _cross_attention_config(self, config: dict[str, Any]) -> Any:
        """Returns the `cross_attention` that makes the attention of this block."""
        if not self.cross_attention:
            return False
        built = hasattr(self, "memory_attention")
        layer = self.memory_attention.sublayer if built else self._memory_attention()
        if self._memory_told is None:
            return keras.saving.serialize_keras_object(layer)
        usual = {
            # Its configuration knows of pruning, where the layer itself does not.
            "num_heads": self.attention.sublayer.get_config()["num_heads"],
            "num_key_value_heads": None,
            "key_dim": self._head_size(),
            "value_dim": layer.get_config()["value_dim"] and self._head_size(),
            **pick(config, _OF_MEMORY),
        }
        return {
            name: value
            for name, value in layer.get_config().items()
            if name in self._memory_told or value != usual.get(name, value)
        } or True

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
                "`memory` is for blocks with `cross_attention=True`, which need "
                "it unless their cache holds it. Received: "
                f"cross_attention={self.cross_attention}, "
                f"memory={'None' if memory is None else tuple(memory.shape)}, "
                f"cache={'None' if cache is None else sorted(cache)}"
            )
        if memory is None and memory_mask is not None:
            raise ValueError(
                "`memory_mask` needs a `memory`; a cache holds its mask already. "
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
