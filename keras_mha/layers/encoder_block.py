"""A transformer encoder block: self-attention, then a feed-forward network."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from typing_extensions import override

from keras_mha.attention.dropout import check_rate
from keras_mha.layers.arguments import check_seed
from keras_mha.layers.dtype_config import dtype_config
from keras_mha.layers.feed_forward import FeedForward
from keras_mha.layers.residual_norm import ResidualNorm, clone_layer
from keras_mha.layers.seeded_layer import SeededLayer, keep_frozen, whole
from keras_mha.layers.self_attention import MultiHeadSelfAttention
from keras_mha.typing import Shape, Tensor

# Arguments that a block hands to its parts, and reads back from them.
_ATTENTION_ARGUMENTS = ("num_heads", "key_dim", "jit_compile")
_NETWORK_ARGUMENTS = (
    "hidden_dim",
    "activation",
    "gated",
    "dropout",
    "use_bias",
    "kernel_initializer",
    "kernel_regularizer",
)
_RESIDUAL_ARGUMENTS = (
    "placement",
    "normalization",
    "stochastic_depth",
    "layer_scale",
    "rezero",
    "epsilon",
)


@keras.saving.register_keras_serializable(package="keras_mha")
class TransformerEncoderBlock(SeededLayer):
    """Self-attention and a feed-forward network, each in a `ResidualNorm`.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.1; with the
    default `placement="pre"` the order of Xiong et al. 2020. A stack of `"pre"`
    blocks wants a normalization after its last block.

    Letters: B batch, T length, D model width, N heads, H head size.

    Args:
        num_heads: N.
        hidden_dim: Width of the feed-forward network's hidden layer.
        key_dim: H. Defaults to `D / num_heads`.
        activation: Activation of the feed-forward network.
        gated: Whether the feed-forward network is gated.
        placement: `"pre"`, `"post"` or `"sandwich"`; see `ResidualNorm`.
        normalization: `"layer"`, `"rms"`, or a layer, of which each place gets a
            clone.
        dropout: Share dropped in training, of each sublayer's outputs and of the
            feed-forward network's hidden values.
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
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        inputs: Floating `(B, T, D)`.
        mask: Padding mask `(B, T)`. Defaults to the mask the inputs carry.
        attention_mask: `(T, T)`, `(B, T, T)` or `(B, N or 1, T, T)`.
        use_causal_mask: Whether position `i` attends to positions `j <= i` only.
        return_attention_scores: Whether to return the probabilities too.
        training: Whether dropout is active.

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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self._attention_dropout = attention_dropout
        if attention_dropout is None:
            attention_dropout = check_rate(dropout, "dropout")
        else:
            check_rate(attention_dropout, "attention_dropout")
        self.seed = check_seed(seed)
        seeds = _derive_seeds(seed, 4)
        dense: dict[str, Any] = {
            "use_bias": use_bias,
            "kernel_initializer": kernel_initializer,
            "kernel_regularizer": kernel_regularizer,
            "dtype": self.dtype_policy,
        }
        residual: dict[str, Any] = {
            "placement": placement,
            "dropout": dropout,
            "stochastic_depth": stochastic_depth,
            "layer_scale": layer_scale,
            "rezero": rezero,
            "epsilon": epsilon,
            "dtype": self.dtype_policy,
        }
        with whole():
            attention = MultiHeadSelfAttention(
                num_heads,
                key_dim,
                dropout=attention_dropout,
                jit_compile=jit_compile,
                seed=seeds[0],
                name="self_attention",
                **dense,
            )
            network = FeedForward(
                hidden_dim,
                activation,
                gated,
                dropout,
                seed=seeds[1],
                name="network",
                **dense,
            )
            self.attention = ResidualNorm(
                attention,
                normalization=_own(normalization),
                seed=seeds[2],
                name="attention",
                **residual,
            )
            self.feed_forward = ResidualNorm(
                network,
                normalization=_own(normalization),
                seed=seeds[3],
                name="feed_forward",
                **residual,
            )

    @override
    def get_config(self) -> dict[str, Any]:
        residual = self.attention.get_config()
        attention = self.attention.sublayer.get_config()
        network = self.feed_forward.sublayer.get_config()
        return {
            **super().get_config(),
            **dtype_config(self),
            **{name: attention[name] for name in _ATTENTION_ARGUMENTS},
            **{name: network[name] for name in _NETWORK_ARGUMENTS},
            **{name: residual[name] for name in _RESIDUAL_ARGUMENTS},
            "attention_dropout": self._attention_dropout,
            "seed": self.seed,
        }

    @classmethod
    @override
    def from_config(cls, config: dict[str, Any]) -> TransformerEncoderBlock:
        if not isinstance(config.get("normalization", ""), str):
            layer = keras.saving.deserialize_keras_object(config["normalization"])
            config = {**config, "normalization": layer}
        return cls(**config)

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
    ) -> Any:
        outputs = self.attention(
            inputs,
            mask=mask,
            attention_mask=attention_mask,
            use_causal_mask=use_causal_mask,
            return_attention_scores=return_attention_scores,
            training=training,
        )
        if not return_attention_scores:
            return self.feed_forward(outputs, training=training)
        mixed, scores = outputs
        return self.feed_forward(mixed, training=training), scores

    @override
    def compute_output_shape(self, input_shape: Shape) -> tuple[int | None, ...]:
        return tuple(input_shape)

    @override
    def compute_output_spec(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.attention.compute_output_spec(inputs, *args, **kwargs)


def _own(normalization: str | keras.layers.Layer) -> str | keras.layers.Layer:
    """A layer for one place alone, where a layer was given."""
    if isinstance(normalization, keras.layers.Layer):
        return clone_layer(normalization, name=normalization.name)
    return normalization


def _derive_seeds(seed: int | None, count: int) -> list[int | None]:
    """Different seeds out of one, also between blocks of neighbouring seeds.

    With one seed, dropouts of one shape would fall on the same positions.
    """
    if seed is None:
        return [None] * count
    states = np.random.SeedSequence(seed % 2**32).generate_state(count)
    return [int(state) % 2**31 for state in states]
