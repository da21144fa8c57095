"""Which inputs are ids, and which id is padding, as the graph tells."""

from __future__ import annotations

from typing import Any

import keras
import pytest

import keras_mha
from keras_mha.export.ids import is_looked_up, padding_id
from keras_mha.twin import twin

ops = keras.ops


class Own(keras.layers.Layer):
    """A layer of a user's, with a table in it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table = keras.layers.Embedding(11, 3)

    def call(self, inputs: Any) -> Any:
        return self.table(inputs)


def inner() -> keras.Model:
    given = keras.Input((None,))
    return keras.Model(given, keras.layers.Embedding(11, 3)(given) * 2.0)


@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.Embedding(11, 3),
        keras.layers.ReversibleEmbedding(11, 3),
        keras_mha.TokenAndPositionEmbedding(11, 7, 3),
        Own(),
        inner(),
        keras.Sequential([inner()]),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_a_table_reads(layer: Any) -> None:
    ids, other = keras.Input((7,)), keras.Input((7,))
    model = keras.Model([ids, other], [layer(ids), keras.layers.Dense(3)(other)])
    assert is_looked_up(ids)
    assert not is_looked_up(other)
    assert is_looked_up(twin(model).inputs[0])


def test_the_id_that_masks_compare_with() -> None:
    ids, pairs, others = (keras.Input((7,), dtype="int32") for _ in range(3))
    outputs = [ops.not_equal(ids, 1), ops.equal(pairs, 7), ops.greater(others, 5)]
    model = keras.Model([ids, pairs, others], outputs)
    assert [padding_id(tensor) for tensor in (ids, pairs, others)] == [1, 7, 0]
    assert padding_id(twin(model).inputs[0]) == 1
