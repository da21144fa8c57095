"""Token ids to vectors that know their position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops
from typing_extensions import override

from keras_mha.attention.values import known_values
from keras_mha.layers.arguments import check_flag, check_positive
from keras_mha.layers.checked_layer import CheckedLayer
from keras_mha.layers.dtype_config import dtype_config
from keras_mha.layers.projections import clone_initializer
from keras_mha.layers.seeded_layer import keep_frozen
from keras_mha.typing import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_mha")
class TokenAndPositionEmbedding(CheckedLayer):
    """Adds a learned vector for each token and one for each position.

    Source: Devlin et al. 2019, "BERT", section 3 (learned positions).

    Letters: B batch, T length, D model width.

    Args:
        vocabulary_size: Number of token ids.
        sequence_length: Greatest T.
        embedding_dim: D.
        mask_zero: Whether id 0 is padding: the outputs then carry the mask
            `ids != 0`.
        embeddings_initializer: Initializer of both tables.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        inputs: Integer ids `(B, T)`.
        positions: Integers `(T,)` or `(B, T)` from 0 to `sequence_length - 1`, such as
            those of `pack_sequences`. Defaults to 0 to T - 1.

    Returns:
        `(B, T, D)`.

    Raises:
        ValueError: If an argument is out of its domain, T is known and greater than
            `sequence_length`, or ids or positions are known and not in the tables.
            In a graph they are not known: there the backend does as with
            `keras.layers.Embedding`, and may read another row.

    Example:

    >>> import numpy as np
    >>> import keras_mha
    >>> embedding = keras_mha.TokenAndPositionEmbedding(11, 7, 4)
    >>> ids = np.array([[2, 5, 0]])
    >>> tuple(embedding(ids).shape), embedding.compute_mask(ids).numpy().tolist()
    ((1, 3, 4), [[True, True, False]])
    """

    def __init__(
        self,
        vocabulary_size: int,
        sequence_length: int,
        embedding_dim: int,
        mask_zero: bool = True,
        embeddings_initializer: Any = "uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.vocabulary_size = check_positive(vocabulary_size, "vocabulary_size")
        self.sequence_length = check_positive(sequence_length, "sequence_length")
        self.embedding_dim = check_positive(embedding_dim, "embedding_dim")
        self.mask_zero = check_flag(mask_zero, "mask_zero")
        self.embeddings_initializer = keras.initializers.get(embeddings_initializer)
        # Ids are not cast to the layer's floating dtype.
        self.autocast = False
        self.token_embedding = keras.layers.Embedding(
            self.vocabulary_size,
            self.embedding_dim,
            embeddings_initializer=clone_initializer(self.embeddings_initializer),
            dtype=self.dtype_policy,
            name="token_embedding",
        )

    @override
    def argument_shapes(self) -> Mapping[str, str]:
        return {"inputs": "(B, T)"}

    @override
    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            **dtype_config(self),
            "vocabulary_size": self.vocabulary_size,
            "sequence_length": self.sequence_length,
            "embedding_dim": self.embedding_dim,
            "mask_zero": self.mask_zero,
            "embeddings_initializer": keras.initializers.serialize(
                self.embeddings_initializer
            ),
        }

    @override
    def build(self, inputs_shape: Shape, positions_shape: Shape | None = None) -> None:
        del positions_shape  # no weight depends on it
        self.token_embedding.build(inputs_shape)
        self.position_embedding = self.add_weight(
            name="position_embedding",
            shape=(self.sequence_length, self.embedding_dim),
            initializer=clone_initializer(self.embeddings_initializer),
        )
        keep_frozen(self)

    @override
    def call(self, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        _check_rows(inputs, "inputs", self.vocabulary_size, "vocabulary_size")
        if positions is not None:
            _check_rows(positions, "positions", self.sequence_length, "sequence_length")
            table = ops.cast(self.position_embedding, self.compute_dtype)
            return self.token_embedding(inputs) + ops.take(table, positions, axis=0)
        self._check_length(inputs)
        length = ops.shape(inputs)[1]
        positions = ops.cast(self.position_embedding, self.compute_dtype)[:length]
        # Too few positions fail here, where a sum could broadcast a single one.
        positions = ops.reshape(positions, (length, self.embedding_dim))
        return self.token_embedding(inputs) + positions

    @override
    def compute_mask(
        self, inputs: Tensor, previous_mask: Tensor | None = None
    ) -> Tensor | None:
        return ops.not_equal(inputs, 0) if self.mask_zero else previous_mask

    @override
    def compute_output_spec(
        self, inputs: Tensor, positions: Tensor | None = None
    ) -> keras.KerasTensor:
        if positions is None:
            self._check_length(inputs)
        shape = self.compute_output_shape(inputs.shape)
        return keras.KerasTensor(shape, dtype=self.compute_dtype)

    @override
    def compute_output_shape(
        self, inputs_shape: Shape, positions_shape: Shape | None = None
    ) -> tuple[int | None, ...]:
        del positions_shape  # the outputs have the shape of the inputs
        return (*inputs_shape, self.embedding_dim)

    def _check_length(self, inputs: Tensor) -> None:
        length = inputs.shape[1]
        if length is not None and length > self.sequence_length:
            raise ValueError(
                "`inputs` must not be longer than `sequence_length`. Received: "
                f"inputs of shape {tuple(inputs.shape)} and "
                f"sequence_length={self.sequence_length}"
            )


def _check_rows(rows: Tensor, name: str, size: int, argument: str) -> None:
    """Refuses rows that a table of this size has not, where they are known."""
    values = known_values(rows)
    if values is None or not values.size:
        return
    least, greatest = values.min(), values.max()
    if not 0 <= least <= greatest < size:
        raise ValueError(
            f"`{name}` must be from 0 to {size - 1}, with `{argument}={size}`. "
            f"Received: {name} from {least} to {greatest}"
        )
