"""The position-wise network of a transformer block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
from typing_extensions import override

from keras_mha.attention.dropout import check_rate, dropout
from keras_mha.layers.arguments import (
    check_flag,
    check_optional,
    check_positive,
    check_seed,
)
from keras_mha.layers.dtype_config import dtype_config
from keras_mha.layers.projections import clone_initializer
from keras_mha.layers.seeded_layer import SeededLayer, keep_frozen, not_rematerialized
from keras_mha.typing import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_mha")
class FeedForward(SeededLayer):
    """Two dense layers with an activation between them, optionally gated.

    Plain: `W2 act(W1 x)`. Gated: `W2 (act(Wg x) * (W1 x))`; with `"silu"` this is
    SwiGLU, with `"gelu"` GEGLU.

    Sources: Vaswani et al. 2017, "Attention is all you need", section 3.3;
    Shazeer 2020, "GLU variants improve transformer".

    Args:
        hidden_dim: Width between the two dense layers.
        activation: Name of a Keras activation, or a callable.
        gated: Whether a third dense layer gates the hidden values.
        dropout: Share of the hidden values dropped in training.
        output_dim: Width of the outputs. Defaults to D, the inputs'.
        use_bias: Whether the dense layers have biases.
        kernel_initializer: Initializer of the kernels.
        bias_initializer: Initializer of the biases.
        kernel_regularizer: Regularizer of the kernels.
        bias_regularizer: Regularizer of the biases.
        seed: Integer seed of the dropout.
        kernel_constraint: Constraint on the kernels.
        bias_constraint: Constraint on the biases.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        inputs: Floating `(B, ..., D)`.
        training: Whether dropout is active.

    Returns:
        `(B, ..., output_dim)`.

    Raises:
        ValueError: If an argument is out of its domain.

    Example:

    >>> import numpy as np
    >>> import keras_mha
    >>> swiglu = keras_mha.FeedForward(hidden_dim=16, activation="silu", gated=True)
    >>> tuple(swiglu(np.ones((2, 3, 8), "float32")).shape)
    (2, 3, 8)
    """

    def __init__(
        self,
        hidden_dim: int,
        activation: str | Callable[[Any], Any] = "gelu",
        gated: bool = False,
        dropout: float = 0.0,
        output_dim: int | None = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        seed: int | None = None,
        *,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.hidden_dim = check_positive(hidden_dim, "hidden_dim")
        self.activation = keras.activations.get(activation)
        self.gated = check_flag(gated, "gated")
        self.dropout = check_rate(dropout, "dropout")
        self.output_dim = check_optional(output_dim, "output_dim")
        self.use_bias = check_flag(use_bias, "use_bias")
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.seed = check_seed(seed)
        if self.dropout > 0:
            self._add_generator(self.seed)

    @override
    def argument_shapes(self) -> Mapping[str, str]:
        return {"inputs": "(B, ..., D)"}

    @override
    def get_config(self) -> dict[str, Any]:
        initializers, regularizers = keras.initializers, keras.regularizers
        constraints = keras.constraints
        return {
            **super().get_config(),
            **dtype_config(self),
            "hidden_dim": self.hidden_dim,
            "activation": keras.activations.serialize(self.activation),
            "gated": self.gated,
            "dropout": self.dropout,
            "output_dim": self.output_dim,
            "use_bias": self.use_bias,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "kernel_regularizer": regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": constraints.serialize(self.kernel_constraint),
            "bias_constraint": constraints.serialize(self.bias_constraint),
            "seed": self.seed,
        }

    @override
    def build(self, input_shape: Shape) -> None:
        hidden_shape = (*input_shape[:-1], self.hidden_dim)
        self.hidden_dense = self._dense(self.hidden_dim, "hidden")
        self.hidden_dense.build(input_shape)
        if self.gated:
            self.gate_dense = self._dense(self.hidden_dim, "gate")
            self.gate_dense.build(input_shape)
        self.output_dense = self._dense(self.output_dim or input_shape[-1], "output")
        self.output_dense.build(hidden_shape)
        keep_frozen(self)

    @override
    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        hidden = self.hidden_dense(inputs)
        if self.gated:
            hidden = self.activation(self.gate_dense(inputs)) * hidden
        else:
            hidden = self.activation(hidden)
        if training and self.dropout > 0:
            hidden = dropout(hidden, self.dropout, self._draw_seed())
        return self.output_dense(hidden)

    @override
    def compute_output_shape(self, input_shape: Shape) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.output_dim or input_shape[-1])

    def _dense(self, units: int | None, name: str) -> Any:
        with not_rematerialized():
            dense = keras.layers.Dense(
                units,
                use_bias=self.use_bias,
                kernel_initializer=clone_initializer(self.kernel_initializer),
                bias_initializer=clone_initializer(self.bias_initializer),
                kernel_regularizer=self.kernel_regularizer,
                bias_regularizer=self.bias_regularizer,
                kernel_constraint=self.kernel_constraint,
                bias_constraint=self.bias_constraint,
                dtype=self.dtype_policy,
                name=name,
            )
        dense.supports_masking = True
        return dense
