"""The XLA boundary: where it compiles, what it leaves outside, equal values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha import MultiHeadAttention, MultiHeadSelfAttention, ResidualNorm
from keras_mha.layers import compiled as boundary
from keras_mha.layers.compiled import compiled
from tests.support.layers import (
    PADDING,
    PAIRS_4,
    B,
    D,
    H,
    N,
    Result,
    T,
    assert_equal,
    differentiate,
    made,
    normal,
    padding,
    randomize,
    run_fresh,
    self_attention,
)

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masks": {
        "mask": PADDING,
        "attention_mask": PAIRS_4,
        "use_causal_mask": True,
    },
    "dropout": {"mask": PADDING, "training": True},
    "hidden_row": {"mask": padding(0, 7, 3)},
}
DROPOUT = {"dropout": 0.4, "seed": 3}

EXECUTIONS: dict[str, Callable[[Any], Any]] = {
    "eager": lambda call: call,
    "graph": tf.function,
    "xla": lambda call: tf.function(call, jit_compile=True),
}


def result_of(
    jit_compile: bool | str, call: str, execution: str = "eager", **options: Any
) -> Result:
    layer = self_attention(jit_compile=jit_compile, **DROPOUT, **options)
    run = EXECUTIONS[execution](lambda x: layer(x, **CALLS[call]))
    return differentiate(run, normal(B, T, D), layer.trainable_weights)


def must_compile(function: Any, *arguments: Any) -> list[str]:
    """The names of the functions in a traced graph that XLA must compile."""
    definition = (
        tf.function(function).get_concrete_function(*arguments).graph.as_graph_def()
    )
    return [
        each.signature.name
        for each in definition.library.function
        if each.attr["_XlaMustCompile"].b
    ]


# Proof of compilation.


@pytest.mark.parametrize("stage", ["hlo", "optimized_hlo"])
def test_the_function_that_a_layer_calls_is_compiled_by_xla(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []

    def spy(function: Any, layout: Any, **options: Any) -> Any:
        used = compiled(function, layout, **options)

        # TensorFlow wants every keyword argument here, those of defaults too.
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }

        def call(*tensors: Any) -> Any:
            describe = used.experimental_get_compiler_ir(
                *tensors, **{**defaults, **options}
            )
            texts.append(describe(stage=stage))
            return used(*tensors)

        return call

    layer, inputs = self_attention(jit_compile=True), normal(B, T, D)
    with monkeypatch.context() as patch:
        patch.setattr(boundary, "compiled", spy)
        outputs = layer(inputs, mask=tf.constant(PADDING))
    np.testing.assert_allclose(
        outputs, self_attention()(inputs, mask=PADDING), atol=1e-5
    )
    (text,) = texts
    assert text.startswith("HloModule")
    assert f"f32[{B},{N},{T},{T}]" in text
    for operation in ("exponential", "dot"):
        assert operation in text


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("jit_compile", [True, "auto", False])
@pytest.mark.parametrize("cross", [False, True])
def test_only_true_marks_a_graph_for_xla(
    cross: bool, jit_compile: bool | str, training: bool
) -> None:
    if cross:
        layer = MultiHeadAttention(N, H, **DROPOUT, jit_compile=jit_compile)
        layer.build((B, T, D), (B, T, D))
        marked = must_compile(
            lambda x: layer(x, x, training=training), tf.TensorSpec((B, T, D))
        )
    else:
        attention = self_attention(**DROPOUT, jit_compile=jit_compile)
        marked = must_compile(
            lambda x: attention(x, training=training), tf.TensorSpec((B, T, D))
        )
    assert bool(marked) is (jit_compile is True)


def test_the_mark_reaches_the_graph_of_a_model_that_cannot_be_compiled() -> None:
    for jit_compile in (True, "auto"):
        model = text_model(jit_compile)
        marked = must_compile(model, tf.TensorSpec((None, 1), tf.string))
        assert bool(marked) is (jit_compile is True)


# Equal values.


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("call", CALLS)
def test_values_and_gradients_are_equal_everywhere(call: str, execution: str) -> None:
    # With dropout too: the same positions fall for the same seed.
    expected = result_of("auto", call)
    assert_equal(result_of(True, call, execution), expected)
    assert_equal(result_of("auto", call, execution), expected)


def test_dropout_of_another_seed_is_seen_by_the_comparison() -> None:
    with pytest.raises(AssertionError):
        assert_equal(result_of(True, "dropout"), result_of(True, "plain"))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_values_are_equal_in_other_dtypes(policy: str) -> None:
    expected = result_of("auto", "masks", dtype=policy)
    outcome = result_of(True, "masks", dtype=policy)
    assert_equal(outcome, expected, {"float64": 1e-6}.get(policy, 0.02))


def test_nan_in_padding_stays_there() -> None:
    layer = self_attention(jit_compile=True)
    inputs = np.where(PADDING[..., None], normal(B, T, D), np.float32(np.nan))
    result = differentiate(
        lambda x: layer(x, mask=PADDING), inputs, layer.trainable_weights
    )
    for array in (result.inputs, *result.weights, result.outputs):
        assert np.isfinite(array).all()


def test_masks_that_inputs_carry_are_kept() -> None:
    layer = self_attention(jit_compile=True)
    inputs = np.where(PADDING[..., None], normal(B, T, D), 0.0).astype("float32")
    masking, plain = keras.layers.Masking(), self_attention()
    expected = plain(inputs, mask=PADDING)
    symbolic = keras.Input((None, D))
    model = keras.Model(symbolic, layer(masking(symbolic)))
    outputs = layer(masking(inputs))
    np.testing.assert_array_equal(outputs._keras_mask, PADDING)
    for values in (
        outputs,
        model(inputs),
        model.predict(inputs, verbose=0),
        tf.function(lambda x: layer(masking(x)))(inputs),
    ):
        np.testing.assert_allclose(values, expected, atol=1e-5)


def test_options_that_alternate_are_not_mixed_up() -> None:
    layer, plain = self_attention(jit_compile=True), self_attention()
    inputs, mask = normal(B, T, D), PADDING
    calls: list[dict[str, Any]] = [
        {},
        {"use_causal_mask": True},
        {"mask": mask},
        {"mask": mask, "use_causal_mask": True},
        {"attention_mask": PAIRS_4},
    ]
    for call in (*calls, *calls):
        outputs, scores = layer(inputs, return_attention_scores=True, **call)
        expected, expected_scores = plain(inputs, return_attention_scores=True, **call)
        np.testing.assert_allclose(outputs, expected, atol=1e-5)
        np.testing.assert_allclose(scores, expected_scores, atol=1e-6)


def test_new_shapes_do_not_trace_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    # A head size of its own: compiled functions are shared by layers of one layout.
    options = {"key_dim": 17, "jit_compile": True}
    layer = self_attention(**options)
    plain = self_attention(key_dim=17)
    for batch, length in ((2, 2), (3, 3), (2, 5), (5, 7), (3, 11)):
        inputs = normal(batch, length, D)
        mask = np.ones((batch, length), bool)
        for call in ({}, {"mask": mask}, {"mask": mask, "use_causal_mask": True}):
            np.testing.assert_allclose(
                layer(inputs, **call), plain(inputs, **call), atol=1e-4
            )
    assert "retracing" not in caplog.text


# Inside models.


def text_model(jit_compile: bool | str, **options: Any) -> keras.Model:
    """Words in, one number out; the text layer cannot be compiled by XLA."""
    words = ["good", "bad", "film", "not", "very"]
    inputs = keras.Input((1,), dtype="string")
    vectorize = keras.layers.TextVectorization(
        vocabulary=words, output_sequence_length=5
    )
    x = keras.layers.Embedding(7, D, mask_zero=True)(vectorize(inputs))
    x = MultiHeadSelfAttention(N, H, jit_compile=jit_compile, **options)(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    randomize(model)
    return model


TEXTS = np.array([["very good film"], ["not good"], ["bad"]], dtype=object)
TARGETS = np.array([[1.0], [0.0], [0.0]], "float32")


def train(model: keras.Model, data: Any, jit_compile: bool | str) -> list[np.ndarray]:
    """Two epochs of plain `fit`; what the model then holds and answers."""
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=jit_compile)
    model.fit(*data, epochs=2, batch_size=B, shuffle=False, verbose=0)
    weights = [np.asarray(weight) for weight in model.trainable_weights]
    return [*weights, model.predict(data[0], verbose=0)]


def assert_all_close(left: list[np.ndarray], right: list[np.ndarray]) -> None:
    for one, other in zip(left, right, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole", [False, "auto"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_model_with_text_operations_trains(whole: bool | str, dropout: float) -> None:
    texts = tf.constant(TEXTS.astype(str))
    options = {"dropout": dropout, "seed": 3}
    model = text_model(True, **options)
    trained = train(model, (texts, TARGETS), whole)
    assert model.jit_compile is False
    expected = train(text_model("auto", **options), (texts, TARGETS), False)
    assert_all_close(trained, expected)


def functional(jit_compile: bool | str, **options: Any) -> keras.Model:
    return model_of(MultiHeadSelfAttention(N, H, jit_compile=jit_compile, **options))


def model_of(layer: keras.layers.Layer) -> keras.Model:
    """A Functional model of a layer behind masking, with random weights."""
    inputs = keras.Input((None, D))
    model = keras.Model(inputs, layer(keras.layers.Masking()(inputs)))
    randomize(model)
    return model


DATA = (
    np.where(PADDING[..., None], normal(B, T, D), 0.0).astype("float32"),
    normal(B, T, D, seed=1),
)


@pytest.mark.parametrize("whole", [False, "auto", True])
@pytest.mark.parametrize("jit_compile", [True, "auto"])
def test_fit_gives_equal_weights_whatever_compile_was_told(
    jit_compile: bool | str, whole: bool | str
) -> None:
    model = functional(jit_compile, **DROPOUT)
    trained = train(model, DATA, whole)
    if whole != "auto":  # which depends on the machine
        assert model.jit_compile is whole
    assert_all_close(trained, train(functional(False, **DROPOUT), DATA, False))


@pytest.mark.parametrize("wrapped", [False, True])
def test_false_keeps_the_whole_model_from_being_compiled(wrapped: bool) -> None:
    layer: keras.layers.Layer = MultiHeadSelfAttention(N, H, jit_compile=False)
    assert layer.supports_jit is False
    assert MultiHeadSelfAttention(N, H).supports_jit is True
    assert MultiHeadSelfAttention(N, H, jit_compile=True).supports_jit is True
    layer = ResidualNorm(layer) if wrapped else layer
    model = keras.Sequential([keras.Input((T, D)), layer])
    model.compile("sgd", "mse")
    assert model.jit_compile is False
    with pytest.warns(UserWarning, match="Model doesn't support `jit_compile=True`"):
        model.compile("sgd", "mse", jit_compile=True)
    assert model.jit_compile is False


# What must stay outside: each is changed after a first call has been traced.


@pytest.fixture(params=["eager", "graph", "functional"])
def call_again(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls one layer, traced once before; a graph is traced anew each time."""
    model: dict[str, Any] = {}

    def call(layer: Any, inputs: np.ndarray, **options: Any) -> Any:
        if request.param == "eager":
            return layer(inputs, **options)
        if request.param == "graph":
            return tf.function(lambda x: layer(x, **options))(inputs)
        if "model" not in model:
            symbolic = keras.Input((None, D))
            model["model"] = keras.Model(symbolic, layer(symbolic))
        return model["model"](inputs, **options)

    return call


def test_weights_changed_later_count(call_again: Callable[..., Any]) -> None:
    layer, inputs = self_attention(jit_compile=True), normal(B, T, D)
    call_again(layer, inputs)
    randomize(layer, seed=77)
    plain = self_attention()
    randomize(plain, seed=77)
    np.testing.assert_allclose(call_again(layer, inputs), plain(inputs), atol=1e-5)


def test_low_rank_factors_added_later_count(call_again: Callable[..., Any]) -> None:
    layer, plain = (self_attention(jit_compile=jit) for jit in (True, "auto"))
    inputs = normal(B, T, D)
    before = np.asarray(call_again(layer, inputs))
    for each in (layer, plain):
        each.enable_lora(3)
        randomize(each, seed=41)
    after = np.asarray(call_again(layer, inputs))
    np.testing.assert_allclose(after, plain(inputs), atol=1e-4)
    assert np.abs(after - before).max() > 0.1


@pytest.mark.slow
def test_quantizing_later_counts(call_again: Callable[..., Any]) -> None:
    layer, plain = (self_attention(jit_compile=jit) for jit in (True, "auto"))
    inputs = normal(B, T, D)
    before = np.asarray(call_again(layer, inputs))
    for each in (layer, plain):
        each.quantize("int8")
    after = np.asarray(call_again(layer, inputs))
    np.testing.assert_allclose(after, plain(inputs), atol=1e-5)
    assert 1e-4 < np.abs(after - before).max() < 0.1 * np.abs(before).max()


def test_activity_regularizers_see_every_call() -> None:
    options = {"activity_regularizer": keras.regularizers.L2(0.1)}
    layer, plain = (
        self_attention(jit_compile=jit, **options) for jit in (True, "auto")
    )
    symbolic = keras.Input((None, D))
    model = keras.Model(symbolic, layer(symbolic))

    @tf.function
    def losses(inputs: Any) -> Any:
        model(inputs)
        return tf.add_n(model.losses)

    for seed in (0, 1):
        inputs = normal(B, T, D, seed=seed)
        plain(inputs)
        expected = float(sum(plain.losses))
        layer(inputs)
        assert float(sum(layer.losses)) == pytest.approx(expected, rel=1e-5)
        assert float(losses(inputs)) == pytest.approx(expected, rel=1e-5)


def test_activity_regularizers_act_in_fit() -> None:
    def first_loss(jit_compile: bool | str) -> float:
        model = functional(jit_compile, activity_regularizer=keras.regularizers.L2(0.1))
        model.compile("sgd", "mse", jit_compile=False)
        return model.fit(*DATA, verbose=0).history["loss"][0]

    plain = functional("auto")
    plain.compile("sgd", "mse", jit_compile=False)
    without = plain.evaluate(*DATA, verbose=0)
    compiled_loss = first_loss(True)
    assert compiled_loss == pytest.approx(first_loss("auto"), rel=1e-5)
    assert compiled_loss > without + 1


def test_two_training_calls_drop_differently(
    call_again: Callable[..., Any],
) -> None:
    layer, plain = (
        self_attention(jit_compile=jit, **DROPOUT) for jit in (True, "auto")
    )
    inputs = normal(B, T, D)
    first, second = (
        np.asarray(call_again(layer, inputs, training=True)) for _ in range(2)
    )
    assert np.abs(first - second).max() > 0.01
    for outputs in (first, second):
        np.testing.assert_allclose(outputs, plain(inputs, training=True), atol=1e-5)
    np.testing.assert_array_equal(call_again(layer, inputs), call_again(layer, inputs))


def test_two_epochs_of_a_functional_model_drop_differently() -> None:
    # With a learning rate of zero only dropout can change the loss.
    model = functional(True, **DROPOUT)
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    losses = model.fit(*DATA, epochs=3, verbose=0).history["loss"]
    assert len(set(losses)) == 3


# Switches.


def test_op_determinism_turns_the_boundary_off() -> None:
    outputs = run_fresh(
        """
import keras, tensorflow as tf
from tests.support.layers import B, D, T, normal, self_attention
from tests.layers.test_compiled import must_compile

layers = [self_attention(jit_compile=jit) for jit in (True, "auto")]
print(len(must_compile(layers[0], tf.TensorSpec((B, T, D)))))
keras.utils.set_random_seed(1)
tf.config.experimental.enable_op_determinism()
print(len(must_compile(layers[0], tf.TensorSpec((B, T, D)))))
one, other = (layer(normal(B, T, D)).numpy() for layer in layers)
print(bool((one == other).all()))
"""
    )
    before, after, equal = outputs.split()
    assert int(before) > 0
    assert int(after) == 0
    assert equal == "True"


@pytest.mark.parametrize("name", ["jax", "torch"])
def test_true_is_refused_on_other_backends(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keras.config, "backend", lambda: name)
    with pytest.raises(
        ValueError, match=f"TensorFlow backend only.*jit_compile=True with the {name}"
    ):
        MultiHeadSelfAttention(N, H, jit_compile=True)
    assert MultiHeadSelfAttention(N, H).jit_compile == "auto"
    assert MultiHeadSelfAttention(N, H, jit_compile=False).jit_compile is False


# Rematerialization.


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("call", ["masks", "dropout"])
@pytest.mark.parametrize("jit_compile", [True, "auto"])
def test_rematerialized_values_and_gradients_are_equal(
    jit_compile: bool | str, call: str, execution: str
) -> None:
    # With dropout, computing again must not draw another seed.
    expected = result_of("auto", call)
    with keras.RematScope(mode="full"):
        layer = made(MultiHeadSelfAttention(N, H, jit_compile=jit_compile, **DROPOUT))
    run = EXECUTIONS[execution](lambda x: layer(x, **CALLS[call]))
    result = differentiate(run, normal(B, T, D), layer.trainable_weights)
    assert_equal(result, expected)


@pytest.mark.parametrize("jit_compile", [True, "auto"])
def test_rematerialized_dropout_differs_between_calls(
    jit_compile: bool | str,
) -> None:
    with keras.RematScope(mode="full"):
        layer = made(MultiHeadSelfAttention(N, H, jit_compile=jit_compile, **DROPOUT))
    inputs = normal(B, T, D)
    calls = [
        differentiate(lambda x: layer(x, training=True), inputs, []) for _ in range(2)
    ]
    assert np.abs(calls[0].outputs - calls[1].outputs).max() > 0.01


@pytest.mark.parametrize("jit_compile", [True, "auto"])
def test_a_rematerialized_layer_trains_alike_in_a_model(
    jit_compile: bool | str,
) -> None:
    expected = train(functional("auto", **DROPOUT), DATA, False)
    with keras.RematScope(mode="full"):
        layer = MultiHeadSelfAttention(N, H, jit_compile=jit_compile, **DROPOUT)
    assert_all_close(train(model_of(layer), DATA, False), expected)


# Distribution.


@pytest.mark.slow
def test_mirrored_strategy_trains_with_finite_equal_losses() -> None:
    outputs = run_fresh(
        """
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
logical = tf.config.LogicalDeviceConfiguration()
tf.config.set_logical_device_configuration(cpu, [logical, logical])
from tests.layers.test_compiled import DATA, functional
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
data = [np.concatenate([array, array[::-1]]) for array in DATA]
for jit_compile in (True, "auto"):
    with strategy.scope():
        model = functional(jit_compile, dropout=0.0)
        model.compile("sgd", "mse", jit_compile=False)
    losses = model.fit(*data, batch_size=6, epochs=3, shuffle=False, verbose=0)
    print("LOSSES", strategy.num_replicas_in_sync, *losses.history["loss"])
model = functional("auto", dropout=0.0)
model.compile("sgd", "mse", jit_compile=False)
losses = model.fit(*data, batch_size=6, epochs=3, shuffle=False, verbose=0)
print("LOSSES", 2, *losses.history["loss"])
"""
    )
    lines = [line.split()[1:] for line in outputs.splitlines() if "LOSSES" in line]
    compiled_losses, plain, alone = np.array(lines, "float64")
    assert plain[0] == 2
    assert np.isfinite(plain).all()
    assert plain[-1] < plain[1]
    np.testing.assert_allclose(compiled_losses, plain, rtol=1e-4)
    np.testing.assert_allclose(alone, plain, rtol=1e-4)


def test_masks_of_different_sharing_follow_each_other() -> None:
    """TensorFlow relaxes shapes of traces; what is 1 for all heads must stay so."""
    layer = MultiHeadSelfAttention(6, num_key_value_heads=3, jit_compile=True)
    plain = MultiHeadSelfAttention(6, num_key_value_heads=3)
    inputs = np.random.default_rng(0).normal(size=(2, 7, 12)).astype("float32")
    plain(inputs)
    layer.build(inputs.shape)
    layer.set_weights(plain.get_weights())
    for heads in (6, 1, 6, 1):
        mask = np.random.default_rng(heads).random((2, heads, 7, 7)) < 0.6
        np.testing.assert_allclose(
            layer(inputs, attention_mask=mask),
            plain(inputs, attention_mask=mask),
            atol=1e-5,
        )
