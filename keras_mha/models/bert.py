"""BERT's encoder, made of this package's blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import ops
from typing_extensions import override

from keras_mha.attention.dropout import check_rate
from keras_mha.attention.numeric import plain_integer
from keras_mha.layers.arguments import (
    check_flag,
    check_number,
    check_optional,
    check_positive,
    check_seed,
    constructor_options,
)
from keras_mha.layers.checked_layer import check_shape
from keras_mha.layers.dropout import Dropout
from keras_mha.layers.embedding import TokenAndPositionEmbedding
from keras_mha.layers.encoder_block import TransformerEncoderBlock
from keras_mha.layers.projections import clone_initializer
from keras_mha.typing import Tensor

_INPUTS = (
    *("input_ids", "attention_mask", "token_type_ids"),
    *("packed_segment_ids", "positions"),
)
# BERT's own code calls its token types so; here they are sequences packed in one row.
_OLD_SEGMENTS, _SEGMENTS = "segment_ids", "packed_segment_ids"
# Options of the blocks that make them BERT's.
_SET_HERE = ("hidden_dropout", "placement", "normalization")


@keras.saving.register_keras_serializable(package="keras_mha")
def gelu_tanh(inputs: Any) -> Any:
    """GELU approximated with tanh, which checkpoints call `"gelu_new"`."""
    return keras.activations.gelu(inputs, approximate=True)


@keras.saving.register_keras_serializable(package="keras_mha")
class BertEncoder(keras.Model):
    """BERT without a head: token ids to one vector for each token.

    The sum of token, position and token type embeddings, normalized; then blocks that
    normalize after each residual. The defaults are those of BERT base;
    `keras_mha.convert.load_bert` makes one with trained weights.

    Source: Devlin et al. 2019, "BERT: pre-training of deep bidirectional transformers
    for language understanding", sections 3 and A.2.

    Letters: B batch, T length, D model width, N heads, H head size.

    Args:
        vocabulary_size: Number of token ids.
        sequence_length: Greatest T.
        embedding_dim: D.
        num_layers: Number of blocks.
        num_heads: N; or a sequence of `num_layers` numbers, those of each block, as
            `keras_mha.interpret.prune_heads` leaves them.
        hidden_dim: Width of the feed-forward networks' hidden layers.
        num_token_types: Number of token type ids.
        activation: Activation of the feed-forward networks. Keras' `"gelu"` is the
            exact one, as BERT's.
        dropout: Share dropped in training, of the embeddings and of each sublayer's
            outputs.
        attention_dropout: Share of the attention probabilities dropped in training.
        epsilon: Added to the variance by the normalizations.
        pooler: Whether there is a dense layer with tanh on the first token, whose
            output is returned too.
        kernel_initializer: Initializer of kernels and embeddings. Defaults to BERT's.
        seed: Integer seed of every dropout.
        key_dim: H. Defaults to D / N; needed where `num_heads` is a sequence or no
            divisor of D.
        **kwargs: Further options of the blocks, as `TransformerEncoderBlock` takes
            them (`position`, `qk_norm`, ...), with which `keras_mha.convert.save_bert`
            cannot write the encoder; and arguments of `keras.Model`, such as `name`
            and `dtype`.

    Call arguments:
        inputs: A dictionary of integer tensors:
            `input_ids` `(B, T)`;
            `attention_mask` `(B, T)`, 0 where there is padding and 1 elsewhere;
            `token_type_ids` `(B, T)`, 0 everywhere if left out.
            Of sequences that `pack_sequences` laid side by side, its `segment_ids` go
            to `packed_segment_ids` in place of `attention_mask`, together with its
            `positions`.
        training: Whether dropout is active.

    Returns:
        The last block's outputs `(B, T, D)`, which carry the mask; with `pooler` a
        tuple of these and the pooled `(B, D)`. What stands at padding has no meaning.

    Raises:
        ValueError: If an argument is out of its domain, `key_dim` is needed
            and missing, or `inputs` lacks a name or has an unknown one.
        TypeError: If `inputs` is not a dictionary.

    Example:

    >>> import numpy as np
    >>> from keras_mha.models import BertEncoder
    >>> encoder = BertEncoder(30, 16, 8, num_layers=2, num_heads=2, hidden_dim=32)
    >>> ids = np.array([[1, 7, 9, 2], [1, 5, 2, 0]])
    >>> outputs = encoder({"input_ids": ids, "attention_mask": ids != 0})
    >>> tuple(outputs.shape)
    (2, 4, 8)
    """

    def __init__(
        self,
        vocabulary_size: int,
        sequence_length: int = 512,
        embedding_dim: int = 768,
        num_layers: int = 12,
        num_heads: int | Sequence[int] = 12,
        hidden_dim: int = 3072,
        num_token_types: int = 2,
        activation: str | Callable[[Any], Any] = "gelu",
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        epsilon: float = 1e-12,
        pooler: bool = False,
        kernel_initializer: Any = None,
        seed: int | None = None,
        *,
        key_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        options = {
            name: kwargs.pop(name)
            for name in constructor_options(TransformerEncoderBlock)
            if name in kwargs and name not in _SET_HERE
        }
        super().__init__(**kwargs)
        #: The names of the options that the blocks have beyond BERT's.
        self.block_options = sorted(options)
        self.vocabulary_size = check_positive(vocabulary_size, "vocabulary_size")
        self.sequence_length = check_positive(sequence_length, "sequence_length")
        self.embedding_dim = check_positive(embedding_dim, "embedding_dim")
        self.num_layers = check_positive(num_layers, "num_layers")
        self.num_heads = _check_heads(num_heads, self.num_layers)
        self.key_dim = _head_size(key_dim, self.embedding_dim, self.num_heads)
        self.hidden_dim = check_positive(hidden_dim, "hidden_dim")
        self.num_token_types = check_positive(num_token_types, "num_token_types")
        self.activation = keras.activations.get(activation)
        self.dropout = check_rate(dropout, "dropout")
        self.attention_dropout = check_rate(attention_dropout, "attention_dropout")
        self.epsilon = check_number(epsilon, "epsilon")
        self.pooler = check_flag(pooler, "pooler")
        if kernel_initializer is None:
            kernel_initializer = keras.initializers.TruncatedNormal(stddev=0.02)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.seed = check_seed(seed)
        #: The tensors of a checkpoint that `load_bert` had no place for.
        self.left_out: tuple[str, ...] = ()
        # Ids are not cast to the floating dtype.
        self.autocast = False
        self.embedding = TokenAndPositionEmbedding(
            self.vocabulary_size,
            self.sequence_length,
            self.embedding_dim,
            mask_zero=False,
            embeddings_initializer=clone_initializer(self.kernel_initializer),
            dtype=self.dtype_policy,
            name="embedding",
        )
        self.token_type_embedding = keras.layers.Embedding(
            self.num_token_types,
            self.embedding_dim,
            embeddings_initializer=clone_initializer(self.kernel_initializer),
            dtype=self.dtype_policy,
            name="token_type_embedding",
        )
        self.embedding_norm = keras.layers.LayerNormalization(
            epsilon=self.epsilon, dtype=self.dtype_policy, name="embedding_norm"
        )
        self.embedding_dropout = Dropout(
            self.dropout, seed=self.seed, dtype=self.dtype_policy, name="dropout"
        )
        self.blocks = [self._block(i, options) for i in range(self.num_layers)]
        self.pooler_dense = (
            keras.layers.Dense(
                self.embedding_dim,
                activation="tanh",
                kernel_initializer=clone_initializer(self.kernel_initializer),
                dtype=self.dtype_policy,
                name="pooler",
            )
            if self.pooler
            else None
        )

    @override
    def get_config(self) -> dict[str, Any]:
        block = self.blocks[0].get_config()
        return {
            **super().get_config(),
            **{name: block[name] for name in self.block_options},
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "vocabulary_size": self.vocabulary_size,
            "sequence_length": self.sequence_length,
            "embedding_dim": self.embedding_dim,
            "num_layers": self.num_layers,
            # JSON has no tuples.
            "num_heads": (
                self.num_heads
                if isinstance(self.num_heads, int)
                else list(self.num_heads)
            ),
            "hidden_dim": self.hidden_dim,
            "num_token_types": self.num_token_types,
            "activation": keras.activations.serialize(self.activation),
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "epsilon": self.epsilon,
            "pooler": self.pooler,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "seed": self.seed,
            "key_dim": self.key_dim,
        }

    @classmethod
    @override
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        return cls(**keras.saving.deserialize_keras_object(config, custom_objects))

    @override
    def build(self, input_shape: Any = None) -> None:
        del input_shape  # no weight depends on it
        ids, vectors = (None, None), (None, None, self.embedding_dim)
        self.embedding.build(ids)
        self.token_type_embedding.build(ids)
        self.embedding_norm.build(vectors)
        for block in self.blocks:
            block.build(vectors)
        if self.pooler_dense is not None:
            self.pooler_dense.build((None, self.embedding_dim))
        self.built = True

    @override
    def call(self, inputs: Mapping[str, Tensor], training: bool | None = None) -> Any:
        inputs = _check_inputs(inputs)
        outputs = self.embed(inputs, training=training)
        segment_ids = inputs.get(_SEGMENTS)
        mask = _mask(inputs) if segment_ids is None else None
        for block in self.blocks:
            outputs = block(
                outputs, mask=mask, segment_ids=segment_ids, training=training
            )
        if self.pooler_dense is None:
            return outputs
        return outputs, self.pooler_dense(outputs[:, 0])

    def embed(
        self, inputs: Mapping[str, Tensor], training: bool | None = None
    ) -> Tensor:
        """Returns the inputs of the first block, `(B, T, D)`.

        Args:
            inputs: As the model's.
            training: Whether dropout is active.
        """
        ids, types = inputs["input_ids"], inputs.get("token_type_ids")
        outputs = self.embedding(ids, positions=inputs.get("positions"))
        if types is None:
            # One row for all, without a lookup.
            table = ops.cast(self.token_type_embedding.embeddings, outputs.dtype)
            outputs = outputs + table[0]
        else:
            outputs = outputs + self.token_type_embedding(types)
        return self.embedding_dropout(self.embedding_norm(outputs), training=training)

    @override
    def compute_mask(self, inputs: Mapping[str, Tensor], previous_mask: Any) -> Any:
        del previous_mask  # ids carry none
        mask = _mask(inputs)
        return mask if self.pooler_dense is None else (mask, None)

    @override
    def compute_output_spec(
        self, inputs: Mapping[str, Tensor], training: bool | None = None
    ) -> Any:
        del training
        inputs = _check_inputs(inputs)
        shape = (*inputs["input_ids"].shape, self.embedding_dim)
        outputs = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if self.pooler_dense is None:
            return outputs
        pooled = (shape[0], self.embedding_dim)
        return outputs, keras.KerasTensor(pooled, dtype=self.compute_dtype)

    def _block(self, place: int, options: Mapping[str, Any]) -> TransformerEncoderBlock:
        heads = self.num_heads
        return TransformerEncoderBlock(
            heads if isinstance(heads, int) else heads[place],
            self.hidden_dim,
            self.key_dim,
            **options,
            activation=self.activation,
            placement="post",
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            hidden_dropout=0.0,
            epsilon=self.epsilon,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            seed=None if self.seed is None else self.seed + 1 + place,
            dtype=self.dtype_policy,
            name=f"block_{place}",
        )


def _check_heads(num_heads: Any, num_layers: int) -> int | tuple[int, ...]:
    """Returns one number of heads, or that of each block."""
    several = isinstance(num_heads, Sequence) and not isinstance(num_heads, str | bytes)
    numbers = tuple(num_heads) if several else (num_heads,)
    heads = tuple(n for n in map(plain_integer, numbers) if n is not None and n > 0)
    if len(heads) != len(numbers) or (several and len(heads) != num_layers):
        raise ValueError(
            "`num_heads` must be a positive integer, or a sequence of `num_layers` "
            f"of them. Received: num_heads={num_heads!r} and num_layers={num_layers}"
        )
    return heads if several else heads[0]


def _head_size(
    key_dim: object, embedding_dim: int, num_heads: int | tuple[int, ...]
) -> int:
    """Returns H."""
    size = check_optional(key_dim, "key_dim")
    if size is not None:
        return size
    if not isinstance(num_heads, int) or embedding_dim % num_heads:
        raise ValueError(
            "`key_dim` is needed where `num_heads` is a sequence, or "
            "`embedding_dim` is not a multiple of `num_heads`. Received: key_dim=None, "
            f"embedding_dim={embedding_dim} and num_heads={num_heads}"
        )
    return embedding_dim // num_heads


def _check_inputs(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Returns the inputs, with the present spelling of their names."""
    if not isinstance(inputs, Mapping):
        raise TypeError(
            "`inputs` must be a dictionary with 'input_ids' and 'attention_mask'. "
            f"Received: a {type(inputs).__name__}"
        )
    if _OLD_SEGMENTS in inputs:
        warnings.warn(
            f"The input '{_OLD_SEGMENTS}' of `BertEncoder` is now '{_SEGMENTS}'. "
            "Token types, which BERT's code calls segments, are 'token_type_ids'.",
            DeprecationWarning,
            stacklevel=2,
        )
        inputs = {
            _SEGMENTS if name == _OLD_SEGMENTS else name: value
            for name, value in inputs.items()
        }
    names = sorted(inputs)
    unknown = [name for name in names if name not in _INPUTS]
    if unknown:
        raise ValueError(
            f"`inputs` must have no other names than {_INPUTS}. Received: {unknown}"
        )
    if "input_ids" not in names or not {"attention_mask", _SEGMENTS} & {*names}:
        raise ValueError(
            f"`inputs` must have 'input_ids', and 'attention_mask' or '{_SEGMENTS}'. "
            f"Received: {names}"
        )
    if {"attention_mask", _SEGMENTS} <= {*names}:
        raise ValueError(
            f"`inputs` must have 'attention_mask' or '{_SEGMENTS}', not both: negative "
            f"segment ids are padding. Received: {names}"
        )
    for name, value in inputs.items():
        if name != "positions":  # of all rows, or of each
            check_shape(value, name, "(B, T)", BertEncoder.__name__)
    return inputs


def _mask(inputs: Mapping[str, Tensor]) -> Tensor:
    """Where there is a token, boolean `(B, T)`."""
    segment_ids = inputs.get(_SEGMENTS, inputs.get(_OLD_SEGMENTS))
    if segment_ids is not None:
        return ops.greater_equal(segment_ids, 0)
    return ops.not_equal(inputs["attention_mask"], 0)
