from __future__ import annotations

import re
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_mha.export.endpoint import Endpoint, describe
from tests.support.layers import randomize

GENERATOR = np.random.default_rng(20261201)
B, T, D = 3, 5, 7


def rows(*shape: int) -> np.ndarray:
    return GENERATOR.normal(size=shape).astype("float32")


def shapes(endpoint: Endpoint) -> dict[str, tuple[int | None, ...]]:
    return {name: tuple(spec.shape) for name, spec in endpoint.inputs.items()}


def values(endpoint: Endpoint, arrays: Any) -> list[np.ndarray]:
    return list(endpoint.answer(arrays).values())


# Functional and Sequential models.


def joined_model(inputs: Any) -> keras.Model:
    """Adds 100 times the first, 10 times the second and the third of three inputs."""
    one, two, three = keras.tree.flatten(inputs)
    total = layers.Identity(name="total")(100 * one + 10 * two + three)
    return keras.Model(inputs, total)


def three_inputs() -> list[Any]:
    return [keras.Input((D,), name=name) for name in ("one", "two", "three")]


ONE, TWO, THREE = (rows(B, D) for _ in range(3))
TOTAL = 100 * ONE + 10 * TWO + THREE


@pytest.mark.parametrize(
    "pack",
    [
        lambda a, b, c: [a, b, c],
        lambda a, b, c: (a, b, c),
        lambda a, b, c: {"one": a, "three": c, "two": b},
        lambda a, b, c: {"pair": [a, b], "three": c},
        lambda a, b, c: [a, (b, {"rest": c})],
    ],
    ids=["list", "tuple", "dictionary", "lists in one", "deep"],
)
def test_samples_in_the_structure_of_the_inputs(pack: Any) -> None:
    inputs = three_inputs()
    total = 100 * inputs[0] + 10 * inputs[1] + inputs[2]
    model = keras.Model(pack(*inputs), {"y": total})
    for samples in (pack(ONE, TWO, THREE), {"one": ONE, "two": TWO, "three": THREE}):
        endpoint, arrays = describe(model, samples)
        assert sorted(arrays) == ["one", "three", "two"]
        np.testing.assert_allclose(values(endpoint, arrays)[0], TOTAL, rtol=1e-5)


def test_samples_of_batches() -> None:
    model = joined_model(three_inputs())
    dataset = tf.data.Dataset.from_tensor_slices(((ONE, TWO, THREE), np.arange(B)))
    endpoint, arrays = describe(model, dataset.batch(2))
    np.testing.assert_allclose(values(endpoint, arrays)[0], TOTAL, rtol=1e-5)


def test_one_input_in_a_list() -> None:
    given = keras.Input((D,), name="one")
    model = keras.Model([given], layers.Identity(name="same")(given))
    for samples in ([ONE], ONE, ONE.tolist(), {"one": ONE}):
        endpoint, arrays = describe(model, samples)
        np.testing.assert_array_equal(values(endpoint, arrays)[0], ONE)


def test_integers_for_an_input_without_a_type() -> None:
    given = keras.Input((T,), name="ids")  # float32; the layer casts
    model = keras.Model(given, layers.Embedding(11, 2)(given))
    ids = GENERATOR.integers(0, 11, (B, T))
    endpoint, arrays = describe(model, ids)
    assert endpoint.inputs["ids"].dtype == tf.float32
    np.testing.assert_array_equal(values(endpoint, arrays)[0], model(ids))
    typed: Any = keras.Input((T,), dtype="int32", name="ids")
    model = keras.Model(typed, typed + 1)
    with pytest.raises(TypeError, match=r"'ids' must be of type int32.*float64"):
        describe(model, ids + 0.5)


def test_names_that_keras_made_up_are_replaced() -> None:
    one: Any = keras.Input((D,))
    two: Any = keras.Input((D,))
    layer = one._keras_history.operation.name
    endpoint, _ = describe(keras.Model(one, layers.Dense(2, name="y")(one)), ONE)
    assert list(endpoint.inputs) == [layer]
    (note,) = endpoint.notes
    assert re.search(rf"'{one.name}'.*'{layer}', as its layer is", note)
    with pytest.warns(UserWarning, match="keys in the dict must match"):
        model = keras.Model({"left": one, "right": two}, one - two)
    endpoint, arrays = describe(model, {"left": ONE, "right": TWO})
    assert sorted(endpoint.inputs) == ["left", "right"]
    assert len(endpoint.notes) == 2
    np.testing.assert_allclose(values(endpoint, arrays)[0], ONE - TWO)
    with pytest.raises(ValueError, match=r"\['left', 'right'\].*Received: \['left'\]"):
        describe(model, {"left": ONE})


def test_an_axis_of_one_may_be_left_out_or_added() -> None:
    one, scalar = keras.Input((1,), name="one"), keras.Input((), name="scalar")
    model = keras.Model([one, scalar], layers.Identity()(one[:, 0] - scalar))
    left, right = rows(B), rows(B, 1)
    endpoint, arrays = describe(model, [left, right])
    assert {name: array.shape for name, array in arrays.items()} == {
        "one": (B, 1),
        "scalar": (B,),
    }
    np.testing.assert_array_equal(values(endpoint, arrays)[0], left - right[:, 0])


def test_an_optional_input_may_be_left_out() -> None:
    class Shift(layers.Layer):
        def call(self, x: Any, by: Any = None) -> Any:
            return x if by is None else x + by

        def compute_output_spec(self, x: Any, by: Any = None) -> Any:
            del by
            return keras.KerasTensor(x.shape, x.dtype)

    x, by = keras.Input((D,), name="x"), keras.Input((D,), name="by", optional=True)
    model = keras.Model({"x": x, "by": by}, Shift(name="y")(x, by))
    for other in (None, TWO):
        endpoint, arrays = describe(model, {"x": ONE, "by": other})
        assert sorted(arrays) == (["x"] if other is None else ["by", "x"])
        wanted = ONE if other is None else ONE + TWO
        np.testing.assert_allclose(values(endpoint, arrays)[0], wanted)


def test_names_of_outputs() -> None:
    given = keras.Input((D,), name="x")
    one, two = layers.Dense(2, name="one")(given), layers.Dense(3, name="two")(given)
    for outputs, names in (
        ([one, two], ["one", "two"]),
        ({"b": one, "a": two}, ["a", "b"]),
        ({"pair": [one, two], "again": one}, ["again", "pair_0", "pair_1"]),
    ):
        endpoint, arrays = describe(keras.Model(given, outputs), ONE)
        assert (list(endpoint.answer(arrays)), endpoint.notes) == (names, ())


def test_outputs_of_one_layer_are_numbered() -> None:
    given = keras.Input((D,), name="x")
    model = keras.Model(
        given, layers.LSTM(2, return_state=True, name="last")(given[:, None])
    )
    endpoint, arrays = describe(model, ONE)
    assert list(endpoint.answer(arrays)) == ["last_0", "last_1", "last_2"]
    assert "called 'last_1': its layer 'last' gives several" in endpoint.notes[1]


def test_an_input_without_a_batch() -> None:
    x: Any = keras.Input((D,), name="x")
    step = keras.Input(batch_shape=(), dtype="int32", name="step")
    table = keras.Input(batch_shape=(D,), name="table")
    model = keras.Model([x, step, table], x * table + ops.cast(step, "float32"))
    endpoint, arrays = describe(model, [ONE, 3, TWO[0]])
    assert shapes(endpoint) == {"x": (None, D), "step": (), "table": (D,)}
    assert endpoint.unbatched == {"step", "table"}
    assert endpoint.rows(arrays) == B
    np.testing.assert_allclose(values(endpoint, arrays)[0], ONE * TWO[0] + 3, rtol=1e-5)
    some = endpoint.take(arrays, slice(1))
    np.testing.assert_allclose(
        values(endpoint, some)[0], ONE[:1] * TWO[0] + 3, rtol=1e-5
    )


def test_a_batch_size_that_the_model_fixes() -> None:
    x: Any = keras.Input((D,), batch_size=2, name="x")
    free, arrays = describe(keras.Model(x, x + x), ONE)  # answers any
    assert (free.batch_size, shapes(free)) == (None, {"x": (None, D)})
    fixed, arrays = describe(keras.Model(x, ops.reshape(x, (2 * D,))), ONE)
    assert (fixed.batch_size, shapes(fixed)) == (2, {"x": (2, D)})
    assert [case["x"].shape for case in fixed.batches(arrays)] == [(2, D)]
    with pytest.raises(ValueError, match=r"at least 2 rows.*Received: 1"):
        describe(fixed.model, ONE[:1])


def test_sparse_inputs_are_refused() -> None:
    given = keras.Input((D,), sparse=True, name="x")
    model = keras.Model(given, layers.Dense(2)(given))
    with pytest.raises(ValueError, match="inputs must be dense"):
        describe(model, ONE)


# Other models.


class Total(keras.Model):
    """Adds up whatever it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = layers.Dense(2)

    def call(self, given: Any) -> Any:
        parts: list[Any] = [x for x in keras.tree.flatten(given) if x is not None]
        return self.scale(sum((i + 1) * part for i, part in enumerate(parts)))


@pytest.mark.parametrize(
    ("samples", "names"),
    [
        (ONE, ["given"]),
        (ONE.tolist(), ["given"]),
        ([ONE, TWO], ["given_0", "given_1"]),
        ((ONE, TWO, THREE), ["given_0", "given_1", "given_2"]),
        ({"b": ONE, "a": TWO}, ["a", "b"]),
        ({"b": [ONE, TWO], "a": {"c": THREE}}, ["a_c", "b_0", "b_1"]),
        ([ONE, None, TWO], ["given_0", "given_2"]),
    ],
    ids=["array", "numbers", "list", "tuple", "dictionary", "nested", "with none"],
)
def test_a_subclassed_model_takes_what_it_was_called_with(
    samples: Any, names: list[str]
) -> None:
    model = Total()
    called: Any = np.array(samples) if names == ["given"] else samples
    model(called)
    randomize(model)
    endpoint, arrays = describe(model, samples)
    assert sorted(arrays) == names
    assert set(shapes(endpoint).values()) == {(None, D)}
    np.testing.assert_allclose(values(endpoint, arrays)[0], model(called), rtol=1e-5)


class Pair(keras.Model):
    """Takes its inputs as arguments of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(2)

    def call(self, left: Any, right: Any, bias: Any = None) -> Any:
        y = self.dense(left) - 2 * self.dense(right)
        return y if bias is None else y + bias


def test_arguments_of_their_own() -> None:
    model = Pair()
    wanted = model(ONE, TWO)
    for samples in ((ONE, TWO), {"left": ONE, "right": TWO}):
        endpoint, arrays = describe(model, samples)
        assert sorted(arrays) == ["left", "right"]
        np.testing.assert_allclose(values(endpoint, arrays)[0], wanted, rtol=1e-5)
    named = {"left": ONE, "right": TWO, "bias": THREE[:, :2]}
    endpoint, arrays = describe(model, named)
    np.testing.assert_allclose(values(endpoint, arrays)[0], model(**named), rtol=1e-5)


def test_arguments_by_name_only() -> None:
    class ByName(keras.Model):
        def call(self, *, left: Any, right: Any) -> Any:
            return left - 2 * right

    model, named = ByName(), {"left": ONE, "right": TWO}
    model(**named)
    endpoint, arrays = describe(model, named)
    assert endpoint.batch_size is None
    np.testing.assert_allclose(values(endpoint, arrays)[0], ONE - 2 * TWO)


def test_a_model_that_refuses_its_samples_says_why_itself() -> None:
    class Strict(keras.Model):
        def call(self, x: Any) -> Any:
            if x.shape[1] != D:
                raise ValueError("seven columns, please")
            return x

    with pytest.raises(ValueError, match="seven columns, please"):
        describe(_called(Strict()), ONE[:, :2])


def test_a_model_that_was_only_fitted() -> None:
    class Trained(keras.Model):
        """Its own `train_step` never calls the model."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = layers.Dense(4)

        def train_step(self, data: Any) -> dict[str, Any]:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self.encoder(data) ** 2)
            pairs = zip(
                tape.gradient(loss, self.trainable_variables),
                self.trainable_variables,
                strict=True,
            )
            self.optimizer.apply_gradients(pairs)
            return {"loss": loss}

        def call(self, x: Any) -> Any:
            return self.encoder(x)

    model = Trained()
    model.compile("sgd")
    model.fit(ONE, verbose=0)
    endpoint, arrays = describe(model, ONE)
    np.testing.assert_allclose(values(endpoint, arrays)[0], model.encoder(ONE))


def test_a_model_whose_call_has_weights_that_were_never_made() -> None:
    class Half(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = layers.Dense(4), layers.Dense(2)

        def call(self, x: Any) -> Any:
            return self.two(self.one(x))

    model = Half()
    model.one(ONE)
    with pytest.raises(ValueError, match="2 weights, and 4 after"):
        describe(model, ONE)


def test_double_precision_becomes_what_keras_computes_in() -> None:
    model = Total()
    model(ONE)
    endpoint, _ = describe(model, ONE.astype("float64"))
    assert endpoint.inputs["given"].dtype == tf.float32


def test_nested_answers_have_joined_names() -> None:
    class Nested(keras.Model):
        def call(self, x: Any) -> Any:
            return {"boxes": (x, 2 * x), "none": None, "scores": 3 * x}

    model = Nested()
    model(ONE)
    endpoint, arrays = describe(model, ONE)
    assert list(endpoint.answer(arrays)) == ["boxes_0", "boxes_1", "scores"]
    endpoint, arrays = describe(model, ONE, ["a", "b", "c"])
    np.testing.assert_allclose(endpoint.answer(arrays)["b"], 2 * ONE)


class Answer(NamedTuple):
    logits: Any
    hidden: Any


def test_named_tuples_name_their_parts() -> None:
    class Named(keras.Model):
        def call(self, x: Any) -> Any:
            return Answer(2 * x, x)

    endpoint, arrays = describe(_called(Named()), ONE)
    np.testing.assert_allclose(endpoint.answer(arrays)["logits"], 2 * ONE)


def test_rows_of_several_lengths_are_refused() -> None:
    given = keras.Input((None,), dtype="int32", name="ids")
    model = keras.Model(given, layers.Embedding(9, 2)(given))
    with pytest.raises(ValueError, match=r"'ids'.*pad them.*lengths \[2, 3\]"):
        describe(model, [[1, 2, 3], [4, 5]])


def test_ragged_answers_are_refused() -> None:
    class Ragged(keras.Model):
        def call(self, x: Any) -> Any:
            return tf.RaggedTensor.from_tensor(x)

    model = _called(Ragged())
    with pytest.raises(ValueError, match="outputs must be dense.*'output_0'"):
        describe(model, ONE)


def _called(model: keras.Model) -> keras.Model:
    model(ONE)
    return model


def test_a_subclassed_model_for_batches_of_one_size() -> None:
    class Fixed(keras.Model):
        def call(self, x: Any) -> Any:
            return x + tf.range(B, dtype=x.dtype)[:, None]

    endpoint, arrays = describe(_called(Fixed()), ONE)
    assert endpoint.batch_size == B
    assert shapes(endpoint) == {"x": (B, D)}
    np.testing.assert_allclose(values(endpoint, arrays)[0], ONE + np.arange(B)[:, None])


def test_rows_that_are_not_equally_many() -> None:
    with pytest.raises(ValueError, match="equally many in every input.*'given_1': 2"):
        describe(_called(Total()), [ONE, TWO[:2]])
