"""Positions for attention: rotary embedding, ALiBi, T5's relative biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops
from typing_extensions import override

from keras_mha.attention.positions import (
    RotaryOptions,
    alibi_slopes,
    as_integers,
    check_buckets,
    check_rotary,
    relative_position_bucket,
    turn,
)
from keras_mha.layers.arguments import check_flag, check_positive
from keras_mha.layers.checked_layer import CheckedLayer
from keras_mha.layers.projections import clone_initializer
from keras_mha.typing import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_mha")
class RotaryEmbedding(CheckedLayer):
    """Turns queries or keys by their position, so that scores depend only on distances.

    It has no weights; one layer serves queries and keys. See
    `keras_mha.attention.positions.rotate` for the formulas.

    Sources: Su et al. 2021, "RoFormer" (rotary); Black et al. 2022, "GPT-NeoX-20B"
    (part of the features); Chen et al. 2023, "Extending context window of large
    language models via positional interpolation" (linear); Peng et al. 2023, "YaRN",
    section 3.1 (NTK-aware); Grattafiori et al. 2024, "The Llama 3 herd of models".

    Letters: B batch, T length, N heads, H head size.

    Args:
        base: At least 1; the greater, the slower the last pairs of features turn.
        fraction: Share of H that is rotated, `0 < fraction <= 1`: the first
            `int(fraction * H)` features, an even number.
        interleaved: Whether neighbors are a pair, as in RoFormer, or features half
            of the rotated ones apart, as in GPT-NeoX, Llama and Hugging Face.
        scaling: How angles are stretched for sequences longer than the trained ones:
            `None`, `"linear"`, `"ntk"` or `"llama3"`.
        scaling_factor: By how much, at least 1; for every `scaling`.
        original_max_length: Greatest length trained on; for `"llama3"`.
        low_frequency_factor: Frequencies with fewer turns in that length are divided
            by `scaling_factor`; for `"llama3"`, which was published with 1.
        high_frequency_factor: Frequencies with more turns stay; those between are
            blended; for `"llama3"`, which was published with 4.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        inputs: Floating `(B, T, N, H)`.
        positions: Integers `(T,)`, `(1, T)` or `(B, T)`. Defaults to 0 to T - 1.

    Returns:
        A tensor of the shape of `inputs`, with their mask, in the layer's compute
        dtype. Angles are computed in float32 or wider.

    Raises:
        ValueError: If an argument is out of its domain or would be ignored, or the
            shapes do not fit.
        TypeError: If `inputs` is not floating or `positions` not integer.

    Example:

    >>> import numpy as np
    >>> from keras_mha.layers.positions import RotaryEmbedding
    >>> rotary = RotaryEmbedding()
    >>> heads = np.random.normal(size=(2, 7, 3, 4)).astype("float32")
    >>> tail = rotary(heads[:, 5:], positions=np.array([5, 6]))
    >>> bool(np.allclose(rotary(heads)[:, 5:], tail, atol=1e-6))
    True
    """

    def __init__(
        self,
        base: float = 10000.0,
        fraction: float = 1.0,
        interleaved: bool = False,
        scaling: str | None = None,
        scaling_factor: float | None = None,
        original_max_length: int | None = None,
        low_frequency_factor: float | None = None,
        high_frequency_factor: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.options = RotaryOptions(
            base,
            fraction,
            check_flag(interleaved, "interleaved"),
            scaling,
            scaling_factor,
            original_max_length,
            low_frequency_factor,
            high_frequency_factor,
        )

    @override
    def argument_shapes(self) -> Mapping[str, str]:
        return {"inputs": "(B, T, N, H)"}

    @override
    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **dataclasses.asdict(self.options)}

    @override
    def quantize(
        self, mode: Any = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Changes nothing: the layer has no kernel. See `keras.Model.quantize`."""
        del mode, type_check, config

    @override
    def call(self, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            positions = ops.arange(ops.shape(inputs)[1], dtype="int32")
        positions = as_integers(positions, "positions")
        check_rotary(inputs, positions, self.options)
        return turn(inputs, positions, self.options)

    @override
    def compute_output_shape(
        self, inputs_shape: Shape, positions_shape: Shape | None = None
    ) -> Shape:
        del positions_shape  # one tensor keeps the shape of the other
        return inputs_shape

    @override
    def compute_output_spec(
        self, inputs: Tensor, positions: Tensor | None = None
    ) -> keras.KerasTensor:
        if positions is not None:
            positions = as_integers(positions, "positions")
        check_rotary(inputs, positions, self.options)
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)


class DistanceBias(keras.layers.Layer):
    """Base of the biases that are functions of the distance, one for each head.

    A bias of your own is a subclass that maps distances to biases in `call`; weights
    are made in `build`. Pass it to a layer as `position=` or to
    `dot_product_attention` as `bias=`. It is called once, on the T + S - 1 distances
    of S keys from T queries, so that memory stays linear. To save layers that hold
    it, register the class with `keras.saving.register_keras_serializable`, and add
    its arguments to `get_config`.

    Letters: T query length, S key length, N query heads.

    Args:
        num_heads: N.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        distances: Integers of any shape, key position minus query position.

    Returns:
        `(N or 1, *distances.shape)`, floating.

    Raises:
        ValueError: If `num_heads` is not a positive integer.

    Example:

    >>> import numpy as np
    >>> from keras import ops
    >>> import keras_mha
    >>> class Recent(keras_mha.DistanceBias):
    ...     def call(self, distances):
    ...         nearness = -ops.log1p(ops.abs(ops.cast(distances, "float32")))
    ...         return ops.stack([nearness] * self.num_heads)
    >>> layer = keras_mha.MultiHeadSelfAttention(2, position=Recent(2))
    >>> tuple(layer(np.ones((3, 5, 8), "float32")).shape)
    (3, 5, 8)
    """

    def __init__(self, num_heads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_heads = check_positive(num_heads, "num_heads")
        # Distances are not cast to the layer's floating dtype.
        self.autocast = False

    @override
    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "num_heads": self.num_heads}

    @override
    def quantize(
        self, mode: Any = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Changes nothing: the layer has no kernel. See `keras.Model.quantize`."""
        del mode, type_check, config

    @override
    def compute_output_shape(self, distances_shape: Shape) -> tuple[int | None, ...]:
        return (self.num_heads, *distances_shape)

    @override
    def compute_output_spec(self, distances: Tensor) -> keras.KerasTensor:
        shape = self.compute_output_shape(as_integers(distances, "distances").shape)
        return keras.KerasTensor(shape, dtype=self.compute_dtype)


@keras.saving.register_keras_serializable(package="keras_mha")
class FunctionBias(DistanceBias):
    """A bias of distances that any callable computes.

    Args:
        function: Maps integer distances to floating biases `(N or 1,
            *distances.shape)`. To be saved it must be registered with
            `keras.saving.register_keras_serializable`.
        num_heads: N.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Raises:
        ValueError: If `num_heads` is not a positive integer.

    Example:

    >>> import numpy as np
    >>> from keras import ops
    >>> from keras_mha.layers.positions import FunctionBias
    >>> bias = FunctionBias(lambda distances: -ops.cast(distances, "float32")[None], 2)
    >>> np.asarray(bias(np.array([-1, 2]))).tolist()
    [[1.0, -2.0]]
    """

    def __init__(self, function: Any, num_heads: int, **kwargs: Any) -> None:
        super().__init__(num_heads, **kwargs)
        self.function = function

    @override
    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments.

        Raises:
            ValueError: If the function is not registered, and could not be loaded.
        """
        known = self.function if _is_function(self.function) else type(self.function)
        name = keras.saving.get_registered_name(known)
        if keras.saving.get_registered_object(name) is None:
            raise ValueError(
                "To be saved, the callable that a layer has as `position` must be "
                "registered with `keras.saving.register_keras_serializable`. "
                f"Received: position={self.function!r}"
            )
        function = keras.saving.serialize_keras_object(self.function)
        return {**super().get_config(), "function": function}

    @classmethod
    @override
    def from_config(cls, config: dict[str, Any]) -> Any:
        function = keras.saving.deserialize_keras_object(config["function"])
        return cls(**{**config, "function": function})

    @override
    def call(self, distances: Tensor) -> Tensor:
        return self.function(distances)


def _is_function(function: Any) -> bool:
    return hasattr(function, "__name__")


@keras.saving.register_keras_serializable(package="keras_mha")
class ALiBi(DistanceBias):
    """Attention with linear biases: each head takes off its slope times the distance.

    It has no weights. Pass the layer itself as `bias` of attention: any callable from
    integer distances to `(N, *distances.shape)` will do there, and is called once, on
    the T + S - 1 distances that there are between T queries and S keys. The `(T, S)`
    table is never made, and memory stays linear.

    Source: Press et al. 2022, "Train short, test long: attention with linear biases
    enables input length extrapolation"; the slopes for N not a power of two are those
    of its code, see `keras_mha.attention.positions.alibi_slopes`. Keys ahead of the
    query, which the paper masks, count by their distance as those behind do.

    Letters: T query length, S key length, N query heads.

    Args:
        num_heads: N.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        distances: Integers of any shape, key position minus query position.

    Returns:
        `(N, *distances.shape)`, computed in float32 or wider, in the layer's compute
        dtype.

    Raises:
        ValueError: If `num_heads` is not a positive integer.
        TypeError: If `distances` is not integer.

    Example:

    >>> import numpy as np
    >>> from keras_mha.layers.positions import ALiBi
    >>> np.asarray(ALiBi(2)(np.array([-16, 32]))).tolist()
    [[-1.0, -2.0], [-0.0625, -0.125]]
    """

    @override
    def call(self, distances: Tensor) -> Tensor:
        wide = "float64" if self.compute_dtype == "float64" else "float32"
        distances = ops.abs(ops.cast(as_integers(distances, "distances"), wide))
        slopes = ops.convert_to_tensor(-alibi_slopes(self.num_heads), dtype=wide)
        slopes = ops.reshape(slopes, (-1, *[1] * len(distances.shape)))
        return ops.cast(slopes * distances, self.compute_dtype)


@keras.saving.register_keras_serializable(package="keras_mha")
class RelativePositionBias(DistanceBias):
    """T5's learned biases: one for each head and each bucket of distances.

    Pass the layer itself as `bias` of attention: any callable from integer distances
    to `(N, *distances.shape)` will do there, and is called once, on the T + S - 1
    distances that there are between T queries and S keys. The `(T, S)` table is never
    made, and memory stays linear, also in the gradient of the weights.

    Source: Raffel et al. 2020, "Exploring the limits of transfer learning with a
    unified text-to-text transformer", section 2.1; buckets as in its code, see
    `keras_mha.attention.positions.relative_position_bucket`.

    Letters: T query length, S key length, N query heads.

    Args:
        num_heads: N.
        num_buckets: Rows of the table `embeddings`, `(num_buckets, N)`; at least 2, and
            if `bidirectional` at least 4 and even.
        max_distance: From where on all distances share a bucket.
        bidirectional: Whether keys ahead of the query have buckets of their own;
            otherwise, as in decoders, they count as distance 0.
        embeddings_initializer: Initializer of the table.
        embeddings_regularizer: Regularizer of the table.
        embeddings_constraint: Constraint of the table.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        distances: Integers of any shape, key position minus query position.

    Returns:
        `(N, *distances.shape)`, in the layer's compute dtype.

    Raises:
        ValueError: If an argument is out of its domain.
        TypeError: If `distances` is not integer.

    Example:

    >>> import numpy as np
    >>> from keras_mha.layers.positions import RelativePositionBias
    >>> bias = RelativePositionBias(num_heads=3)
    >>> rows, columns = np.arange(5)[:, None], np.arange(7)
    >>> tuple(bias(columns - rows).shape), tuple(bias.embeddings.shape)
    ((3, 5, 7), (32, 3))
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        embeddings_initializer: Any = "uniform",
        embeddings_regularizer: Any = None,
        embeddings_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, **kwargs)
        self.bidirectional = check_flag(bidirectional, "bidirectional")
        self.num_buckets, self.max_distance = check_buckets(
            self.bidirectional, num_buckets, max_distance
        )
        self.embeddings_initializer = keras.initializers.get(embeddings_initializer)
        self.embeddings_regularizer = keras.regularizers.get(embeddings_regularizer)
        self.embeddings_constraint = keras.constraints.get(embeddings_constraint)

    @override
    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_buckets": self.num_buckets,
            "max_distance": self.max_distance,
            "bidirectional": self.bidirectional,
            "embeddings_initializer": keras.initializers.serialize(
                self.embeddings_initializer
            ),
            "embeddings_regularizer": keras.regularizers.serialize(
                self.embeddings_regularizer
            ),
            "embeddings_constraint": keras.constraints.serialize(
                self.embeddings_constraint
            ),
        }

    @override
    def build(self, distances_shape: Shape | None = None) -> None:
        del distances_shape  # the table is the same for all
        self.embeddings = self.add_weight(
            name="embeddings",
            shape=(self.num_buckets, self.num_heads),
            initializer=clone_initializer(self.embeddings_initializer),
            regularizer=self.embeddings_regularizer,
            constraint=self.embeddings_constraint,
        )

    @override
    def call(self, distances: Tensor) -> Tensor:
        buckets = relative_position_bucket(
            distances,
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        biases = ops.take(self.embeddings, buckets, axis=0)
        return ops.cast(ops.moveaxis(biases, -1, 0), self.compute_dtype)
