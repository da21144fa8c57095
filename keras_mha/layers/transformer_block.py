"""What encoder and decoder blocks share."""

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
from keras_mha.layers.seeded_layer import SeededLayer, whole
from keras_mha.layers.self_attention import MultiHeadSelfAttention
from keras_mha.typing import Shape

# Arguments that a block hands to its parts, and reads back from them.
_ATTENTION_ARGUMENTS = (
    "num_heads",
    "key_dim",
    "jit_compile",
    "num_key_value_heads",
    "position",
    "qk_norm",
    "logits_soft_cap",
    "use_sinks",
    "use_gate",
    "sliding_window",
    "flash_attention",
)
_NETWORK_ARGUMENTS = (
    "hidden_dim",
    "activation",
    "gated",
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


class TransformerBlock(SeededLayer):
    """Base of the blocks: self-attention and a feed-forward network, with residuals.

    Args:
        seeds: How many seeds the block needs; the first four are taken.
        **arguments: What the constructors of the blocks list.
    """

    def __init__(self, *, seeds: int, **arguments: Any) -> None:
        parts = {
            name: arguments.pop(name)
            for name in (
                *_ATTENTION_ARGUMENTS,
                *_NETWORK_ARGUMENTS,
                *_RESIDUAL_ARGUMENTS,
                "dropout",
                "attention_dropout",
                "hidden_dropout",
                "seed",
            )
        }
        super().__init__(**arguments)
        self.supports_masking = True
        dropout = check_rate(parts["dropout"], "dropout")
        self._attention_dropout, self._hidden_dropout = (
            None if parts[name] is None else check_rate(parts[name], name)
            for name in ("attention_dropout", "hidden_dropout")
        )
        self.seed = check_seed(parts["seed"])
        self._seeds = _derive_seeds(self.seed, seeds)
        self._dense = {
            "use_bias": parts["use_bias"],
            "kernel_initializer": parts["kernel_initializer"],
            "kernel_regularizer": parts["kernel_regularizer"],
            "dtype": self.dtype_policy,
        }
        # A layer kept in an attribute would be saved as one of the block's own.
        normalization = parts.pop("normalization")
        self._residual = {
            **{name: parts[name] for name in _RESIDUAL_ARGUMENTS if name in parts},
            "dropout": dropout,
            "dtype": self.dtype_policy,
        }
        with whole():
            attention = MultiHeadSelfAttention(
                **{name: parts[name] for name in _ATTENTION_ARGUMENTS},
                dropout=self._share_of_attention(dropout),
                seed=self._seeds[0],
                name="self_attention",
                **self._dense,
            )
            network = FeedForward(
                parts["hidden_dim"],
                parts["activation"],
                parts["gated"],
                _first_given(self._hidden_dropout, dropout),
                seed=self._seeds[1],
                name="network",
                **self._dense,
            )
            self.attention = self._with_residual(
                attention, normalization, "attention", 2
            )
            self.feed_forward = self._with_residual(
                network, normalization, "feed_forward", 3
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
            "dropout": residual["dropout"],
            "attention_dropout": self._attention_dropout,
            "hidden_dropout": self._hidden_dropout,
            "seed": self.seed,
        }

    @classmethod
    @override
    def from_config(cls, config: dict[str, Any]) -> Any:
        layers = {
            name: keras.saving.deserialize_keras_object(config[name])
            for name in ("normalization", "position")
            if isinstance(config.get(name), dict)
        }
        return cls(**{**config, **layers})

    @override
    def compute_output_shape(self, input_shape: Shape) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def _share_of_attention(self, dropout: float) -> float:
        return _first_given(self._attention_dropout, dropout)

    def _with_residual(
        self,
        sublayer: keras.layers.Layer,
        normalization: str | keras.layers.Layer,
        name: str,
        seed: int,
    ) -> ResidualNorm:
        """Puts a residual and a normalization of its own around a sublayer."""
        if isinstance(normalization, keras.layers.Layer):
            normalization = clone_layer(normalization, name=normalization.name)
        return ResidualNorm(
            sublayer,
            **self._residual,
            normalization=normalization,
            seed=self._seeds[seed],
            name=name,
        )


def _first_given(rate: float | None, default: float) -> float:
    return default if rate is None else rate


def _derive_seeds(seed: int | None, count: int) -> list[int | None]:
    """Different seeds out of one, also between blocks of neighboring seeds.

    With one seed, dropouts of one shape would fall on the same positions.
    """
    if seed is None:
        return [None] * count
    states = np.random.SeedSequence(seed % 2**32).generate_state(count)
    return [int(state) % 2**31 for state in states]
