"""Every layer refuses tensors of other ranks and layouts in words of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha import (
    FeedForward,
    MultiHeadAttention,
    MultiHeadSelfAttention,
    ResidualNorm,
    RotaryEmbedding,
    TokenAndPositionEmbedding,
    TransformerDecoderBlock,
    TransformerEncoderBlock,
)
from keras_mha.models import BertEncoder
from tests.support.layers import B, D, H, N, T, normal

VECTORS, IDS = normal(B, T, D), np.ones((B, T), "int32")
ROWS = tf.RaggedTensor.from_tensor(VECTORS, lengths=[5, 7, 3])
SPARSE = tf.sparse.from_dense(VECTORS)


def of_decoder(memory: Any) -> Any:
    block = TransformerDecoderBlock(N, 5, H, cross_attention=True)
    return block(VECTORS, memory=memory)


def of_bert(ids: Any) -> Any:
    encoder = BertEncoder(9, 8, 6, num_layers=1, num_heads=2, hidden_dim=5)
    return encoder({"input_ids": ids, "attention_mask": IDS})


def of_attention(name: str) -> Callable[[Any], Any]:
    def take(tensor: Any) -> Any:
        arguments = dict.fromkeys(("query", "value", "key"), VECTORS)
        return MultiHeadAttention(N, H)(**{**arguments, name: tensor})

    return take


# What takes a tensor, how it calls it, and its shape.
TAKERS: dict[str, tuple[Any, str, str]] = {
    "self": (MultiHeadSelfAttention(N, H), "inputs", "(B, T, D)"),
    "query": (of_attention("query"), "query", "(B, T, ..., D)"),
    "value": (of_attention("value"), "value", "(B, S, ..., D)"),
    "key": (of_attention("key"), "key", "(...)"),
    "encoder": (TransformerEncoderBlock(N, 5, H), "inputs", "(B, T, D)"),
    "decoder": (TransformerDecoderBlock(N, 5, H), "inputs", "(B, T, D)"),
    "memory": (of_decoder, "memory", "(B, S, any size)"),
    "residual": (ResidualNorm(MultiHeadSelfAttention(N, H)), "inputs", "(B, T, D)"),
    "rotary": (RotaryEmbedding(), "inputs", "(B, T, N, H)"),
    "bert": (of_bert, "input_ids", "(B, T)"),
    "feed_forward": (FeedForward(5), "inputs", "(B, ..., D)"),
    "embedding": (TokenAndPositionEmbedding(9, 8, 6), "inputs", "(B, T)"),
}
each_taker = pytest.mark.parametrize(
    ("take", "name", "shape"), TAKERS.values(), ids=TAKERS
)


@pytest.mark.parametrize(
    ("take", "name", "shape"),
    [taker for taker in TAKERS.values() if taker[2] != "(...)"],
    ids=[name for name, taker in TAKERS.items() if taker[2] != "(...)"],
)
def test_other_ranks(take: Any, name: str, shape: str) -> None:
    for tensor in (np.ones(B, "int32"), keras.Input((), dtype="int32")):
        received = re.escape(
            f"must have the shape {shape}. Received: {name} of shape "
            f"{tuple(tensor.shape)}"
        )
        with pytest.raises(ValueError, match=rf"`\w+`: `{name}` {received}"):
            take(tensor)


@pytest.mark.parametrize("name", ["self", "query", "value", "encoder", "decoder"])
def test_rank_two(name: str) -> None:
    take, *_ = TAKERS[name]
    with pytest.raises(ValueError, match=r"Received: \w+ of shape \(3, 13\)$"):
        take(normal(B, D))


@each_taker
def test_ragged_and_sparse_tensors(take: Any, name: str, shape: str) -> None:
    symbol = keras.Input((None, D), ragged=True)
    for tensor, advice in (
        (ROWS, f"`{name}.to_tensor()` pads"),
        (symbol, f"`{name}.to_tensor()` pads"),
        (SPARSE, f"`tf.sparse.to_dense({name})`"),
    ):
        text = re.escape(f"must have the shape {shape}, dense. {advice}")
        with pytest.raises(TypeError, match=text):
            take(tensor)


@each_taker
def test_what_is_not_a_tensor(take: Any, name: str, shape: str) -> None:
    text = re.escape(f"{shape}, one tensor. Received: {name} of type list")
    with pytest.raises(TypeError, match=text):
        take([VECTORS, VECTORS])


def test_an_unknown_rank() -> None:
    layer = MultiHeadSelfAttention(N, H)

    @tf.function(input_signature=[tf.TensorSpec(None)])
    def call(inputs: Any) -> Any:
        return layer(inputs)

    with pytest.raises(ValueError, match="Received: inputs of unknown rank"):
        call(VECTORS)
