"""Inputs drawn for a comparison.

Letters: B batch, T length, D width.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers

from keras_mha.convert.drawn_inputs import drawn_inputs
from tests.support.layers import normal

B, T, D = 2, 5, 7


def test_ids_are_in_the_table_and_end_in_padding() -> None:
    ids = keras.Input((None,), dtype="int32")
    model = keras.Model(ids, layers.Embedding(11, D)(ids))
    drawn = np.asarray(drawn_inputs(model))
    assert drawn.dtype == np.int32
    assert drawn[0].min() >= 1
    assert drawn.max() < 11
    assert [tuple(row[-1:]) for row in drawn[1:]] == [(1,), (0,), (1,)]
    assert len(set(drawn[0].tolist())) > 2
    model(drawn)


def test_ids_that_keras_calls_floats() -> None:
    ids = keras.Input((T,), batch_size=1)
    model = keras.Model(ids, layers.Embedding(11, D, mask_zero=True)(ids))
    drawn = np.asarray(drawn_inputs(model))
    assert drawn.shape == (1, T)
    assert np.array_equal(drawn, drawn.round())
    assert not drawn[0, -1]


def test_floats_where_a_value_is_padding() -> None:
    x = keras.Input((T, D))
    model = keras.Model(x, layers.Masking(-3.0)(x))
    drawn = np.asarray(drawn_inputs(model))
    assert (drawn[1:, -1] == -3).all()
    assert drawn[0].std() > 0.5


def test_every_input_in_the_structure_of_the_model() -> None:
    x, seen = (
        keras.Input((T, D), name="x"),
        keras.Input((T,), dtype="bool", name="seen"),
    )
    model = keras.Model({"x": x, "seen": seen}, layers.Lambda(lambda x: x)(x))
    drawn = drawn_inputs(model)
    assert sorted(drawn) == ["seen", "x"]
    assert np.asarray(drawn["seen"])[0].all()
    assert not np.asarray(drawn["seen"])[1].all()


def test_texts_are_made_of_the_vocabulary() -> None:
    text = keras.Input((1,), dtype="string")
    vectorize = layers.TextVectorization()
    vectorize.adapt(["a b c d"])
    drawn = np.asarray(drawn_inputs(keras.Model(text, vectorize(text))))
    lengths = [len(row[0].split()) for row in drawn]
    assert lengths == [6, 3, 1, 1]
    assert {word for row in drawn for word in row[0].decode().split()} <= set("abcd")
    word = keras.Input((), dtype="string")
    lookup = layers.StringLookup(vocabulary=["x y", "z"])
    drawn = np.asarray(drawn_inputs(keras.Model(word, lookup(word))))
    assert {each.decode() for each in drawn} <= {"x y", "z"}


class Own(keras.Model):
    def call(self, inputs: Any) -> Any:
        return inputs["a"] + inputs["b"]


def test_what_a_model_was_called_with_tells_its_inputs() -> None:
    model = Own()
    model({"a": normal(B, T), "b": normal(B, T)})
    assert {name: tuple(x.shape) for name, x in drawn_inputs(model).items()} == {
        "a": (B, T),
        "b": (B, T),
    }


def test_nothing_is_drawn_where_nothing_tells() -> None:
    text = keras.Input((1,), dtype="string")
    for model in (keras.Model(text, layers.Lambda(lambda x: x)(text)), Own()):
        assert drawn_inputs(model) is None
