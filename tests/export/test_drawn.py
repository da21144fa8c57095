from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha.export.drawn import drawn_cases
from keras_mha.export.endpoint import Endpoint, describe
from keras_mha.export.parity import ParityError, check_parity

GENERATOR = np.random.default_rng(7)


def model_of(*inputs: Any) -> keras.Model:
    """Gives its inputs back, each as a float."""
    outputs = {x.name: keras.ops.cast(x, "float32") for x in inputs}
    return keras.Model(list(inputs), outputs)


def drawn(*inputs: Any, samples: Any) -> list[Any]:
    endpoint, arrays = describe(model_of(*inputs), samples)
    cases, answers = drawn_cases(endpoint, arrays)
    for case, answer in zip(cases, answers, strict=True):
        for name in case:
            np.testing.assert_array_equal(answer[name], case[name])
    return cases


def test_values_stay_within_the_range_of_each_place() -> None:
    table = np.array([[0, 10, 5], [1, 13, 5], [1, 19, 5]])
    inputs = keras.Input((3,), dtype="int32", name="table")
    others = drawn(inputs, samples=table)[0]["table"]
    assert others.dtype == np.int32
    assert np.all((table.min(0) <= others) & (others <= table.max(0)))
    assert not np.array_equal(others, table)

    floats = GENERATOR.normal(size=(5, 3)).astype("float32")
    (case,) = drawn(keras.Input((3,), name="x"), samples=floats)
    assert np.all((floats.min(0) <= case["x"]) & (case["x"] <= floats.max(0)))
    assert np.isin(case["x"], floats).mean() < 0.5


def test_integers_that_keras_calls_floats_stay_whole() -> None:
    ids = GENERATOR.integers(2, 30, (4, 6))
    for case in drawn(keras.Input((6,), name="ids"), samples=ids):
        assert case["ids"].dtype == np.float32
        np.testing.assert_array_equal(case["ids"], np.rint(case["ids"]))


def test_rows_end_in_what_may_be_padding() -> None:
    ids = GENERATOR.integers(4, 30, (4, 6))
    series = GENERATOR.normal(size=(4, 6, 2)).astype("float32")
    inputs = (
        keras.Input((6,), dtype="int32", name="ids"),
        keras.Input((6, 2), name="series"),
    )
    others, padded = drawn(*inputs, samples=[ids, series])
    assert padded["ids"][:, -1].tolist() == [0, 1, 2, 3]
    # The same places in both; the first is seen in every row.
    np.testing.assert_array_equal(
        padded["ids"] != others["ids"], np.all(padded["series"] == 0, axis=-1)
    )
    assert np.all(padded["ids"][:, 0] >= 4)


def test_masks_keep_what_all_samples_see() -> None:
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
    for samples in (mask, mask[:1]):
        for case in drawn(
            keras.Input((3,), dtype="bool", name="mask"), samples=samples
        ):
            assert case["mask"][:, 0].all()


def test_free_sizes_are_halved() -> None:
    ids = GENERATOR.integers(1, 9, (4, 7))
    cases = drawn(keras.Input((None,), dtype="int32", name="ids"), samples=ids)
    assert [case["ids"].shape for case in cases] == [(4, 7), (4, 7), (4, 4)]


def test_strings_come_from_other_rows() -> None:
    texts = [f"text {i}" for i in range(9)]
    given = keras.Input((), dtype="string", name="text")

    class Length(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return tf.strings.length(x)

        def compute_output_spec(self, x: Any) -> Any:
            return keras.KerasTensor(x.shape, "int32")

    endpoint, arrays = describe(keras.Model(given, Length()(given)), texts)
    ((case,), _) = drawn_cases(endpoint, arrays)
    assert sorted(case["text"]) == sorted(arrays["text"])
    assert case["text"].tolist() != arrays["text"].tolist()


def test_what_the_model_refuses_is_left_out() -> None:
    class Sorted(keras.Model):
        def call(self, x: Any) -> Any:
            with tf.control_dependencies([tf.debugging.assert_equal(tf.sort(x), x)]):
                return tf.identity(x)

    model, x = Sorted(), np.sort(GENERATOR.normal(size=(3, 9))).astype("float32")
    model(x)
    assert drawn_cases(*describe(model, x)) == ([], [])


def test_a_file_that_is_right_on_the_samples_alone_is_found() -> None:
    given = keras.Input((5,), dtype="int32", name="ids")
    table = keras.layers.Embedding(30, 3, mask_zero=True)(given)
    model = keras.Model(given, keras.layers.GlobalAveragePooling1D(name="mean")(table))
    samples = GENERATOR.integers(1, 30, (4, 5))  # no padding
    endpoint, arrays = describe(model, samples)
    blind, _ = describe(without_mask(model), samples)

    def compare(cases: Any, answers: Any) -> None:
        check_parity(
            answers,
            [blind.answer(case) for case in cases],
            tolerance=1e-5,
            samples=4,
            runtime="by hand",
            runtime_version="1",
        )

    compare([arrays], [endpoint.answer(arrays)])
    with pytest.raises(ParityError, match="'mean' .* differs"):
        compare(*drawn_cases(endpoint, arrays))


def without_mask(model: keras.Model) -> keras.Model:
    given = keras.Input((5,), dtype="int32", name="ids")
    table = keras.layers.Embedding(30, 3)
    blind = keras.Model(
        given, keras.layers.GlobalAveragePooling1D(name="mean")(table(given))
    )
    blind.set_weights(model.get_weights())
    return blind


def test_inputs_without_a_batch_stay() -> None:
    x: Any = keras.Input((3,), name="x")
    step = keras.Input(batch_shape=(), dtype="int32", name="step")
    model = keras.Model([x, step], x + keras.ops.cast(step, "float32"))
    described: tuple[Endpoint, Any] = describe(model, [np.eye(3, dtype="float32"), 4])
    cases, _ = drawn_cases(*described)
    assert [case["step"].item() for case in cases] == [4] * len(cases)
