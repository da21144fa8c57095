"""Faults of Keras' layer that ours mends, each shown there and shown absent here.

The first half of a pair runs on the one Keras version that the fault was seen in; the
second half always.

Letters: B batch, T query length, S key length, N heads, H head size, D width.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha import MultiHeadAttention, MultiHeadSelfAttention
from keras_mha.layers.keras_mask import get_keras_mask, set_keras_mask
from tests.support import reference as oracle
from tests.support.attention_cases import numbers, pairs
from tests.support.layers import made, normal

Stock = keras.layers.MultiHeadAttention

B, T, S, N, H, D = 2, 5, 7, 3, 11, 13
QUERY_MASK = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)
VALUE_MASK = np.array([[1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1, 1]], bool)

seen_in_keras = pytest.mark.skipif(
    keras.__version__ != "3.15.1", reason="the fault was seen in Keras 3.15.1"
)


def layer_of(layer_class: Any, **options: Any) -> Any:
    return made(layer_class(N, H, **options), (B, T, D), (B, S, D))


def heads_inputs(mask: bool = False, scale: float = 1.0) -> tuple[Any, Any]:
    """Queries and values, which carry their padding masks if asked to."""
    query = tf.constant(normal(B, T, D, scale=scale))
    value = tf.constant(normal(B, S, D, seed=1, scale=scale))
    if mask:
        set_keras_mask(query, tf.constant(QUERY_MASK))
        set_keras_mask(value, tf.constant(VALUE_MASK))
    return query, value


def expected(layer: Any, visible: np.ndarray) -> np.ndarray:
    query, value = map(numbers, heads_inputs())
    weights = oracle.layer_weights(layer)
    return oracle.multi_head_attention(weights, query, value, visible=visible)[0]


def padding_visible(**more: Any) -> np.ndarray:
    return oracle.visible_pairs((B, N, T, S), QUERY_MASK, VALUE_MASK, **more)


# 1. Rows that see no key differ by path.


@seen_in_keras
def test_1_keras_rows_that_see_no_key_differ_by_path() -> None:
    layer = layer_of(Stock)
    fused = numbers(layer(*heads_inputs(mask=True)))
    manual, _ = layer(*heads_inputs(mask=True), return_attention_scores=True)
    difference = np.abs(fused - numbers(manual)).max(axis=-1)
    assert np.all(difference[~QUERY_MASK] > 0.1)
    assert np.all(difference[QUERY_MASK] < 1e-5)


def test_1_ours_give_the_bias_on_every_path() -> None:
    outputs = []
    for options in ({}, {"dropout": 0.5}, {"jit_compile": True}):
        layer = layer_of(MultiHeadAttention, **options)
        outputs.append(layer(*heads_inputs(mask=True)))
        outputs.append(layer(*heads_inputs(mask=True), return_attention_scores=True)[0])
    bias = oracle.layer_weights(layer)["attention_output/bias"]
    for found in map(numbers, outputs):
        padded = found[~QUERY_MASK]
        np.testing.assert_allclose(padded, np.broadcast_to(bias, padded.shape))
        np.testing.assert_allclose(found, expected(layer, padding_visible()), atol=1e-5)


# 2. float16 scores overflow.


@seen_in_keras
def test_2_keras_scores_overflow_in_float16() -> None:
    layer = layer_of(Stock, dtype="mixed_float16")
    assert np.isnan(numbers(layer(*heads_inputs(scale=60.0)))).any()
    manual, _ = layer(*heads_inputs(scale=60.0), return_attention_scores=True)
    assert np.isfinite(numbers(manual)).all()


@pytest.mark.parametrize("scores", [False, True])
def test_2_ours_stay_finite_and_right_in_float16(scores: bool) -> None:
    layer = layer_of(MultiHeadAttention, dtype="mixed_float16")
    exact = layer_of(MultiHeadAttention)
    found, wanted = (
        keras.tree.flatten(
            one(*heads_inputs(scale=60.0), return_attention_scores=scores)
        )
        for one in (layer, exact)
    )
    # Scores in the thousands: one key takes all the weight, and rounding moves little.
    size = np.abs(numbers(wanted[0])).max()
    np.testing.assert_allclose(numbers(found[0]), numbers(wanted[0]), atol=5e-3 * size)


# 3. A causal mask of dynamic length needs an operation that TFLite lacks.


def tflite(layer: Any) -> bytes:
    """Converts causal attention of dynamic length, with builtin operations alone."""
    inputs = [keras.Input(batch_shape=(1, None, D), name=name) for name in "qv"]
    model = keras.Model(inputs, layer(*inputs, use_causal_mask=True))
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    return converter.convert()


@seen_in_keras
def test_3_keras_causal_mask_does_not_convert() -> None:
    with pytest.raises(Exception, match="FlexStridedSlice|tf.StridedSlice"):
        tflite(layer_of(Stock))


def test_3_our_causal_mask_converts() -> None:
    from ai_edge_litert.interpreter import Interpreter

    layer = layer_of(MultiHeadAttention)
    interpreter = Interpreter(model_content=tflite(layer))
    operations = {detail["op_name"] for detail in interpreter._get_ops_details()}
    assert not [name for name in operations if name.startswith("Flex")]
    inputs = sorted(interpreter.get_input_details(), key=lambda detail: detail["name"])
    for lengths in ((T, S), (S, T), (2, 3)):
        arrays = [normal(1, n, D, seed=i) for i, n in enumerate(lengths)]
        for detail, array in zip(inputs, arrays, strict=True):
            interpreter.resize_tensor_input(detail["index"], array.shape)
        interpreter.allocate_tensors()
        for detail, array in zip(inputs, arrays, strict=True):
            interpreter.set_tensor(detail["index"], array)
        interpreter.invoke()
        found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        wanted = layer(*arrays, use_causal_mask=True)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert np.abs(found - numbers(layer(*arrays))).max() > 1e-2


# 6. An explicit query mask is ignored.


@seen_in_keras
def test_6_keras_ignores_an_explicit_query_mask() -> None:
    layer = layer_of(Stock)
    masked = layer(*heads_inputs(), query_mask=QUERY_MASK)
    np.testing.assert_array_equal(masked, layer(*heads_inputs()))
    assert get_keras_mask(masked) is None


def test_6_our_explicit_query_mask_counts() -> None:
    layer = layer_of(MultiHeadAttention)
    masked = layer(*heads_inputs(), query_mask=QUERY_MASK)
    visible = oracle.visible_pairs((B, N, T, S), QUERY_MASK)
    np.testing.assert_allclose(masked, expected(layer, visible), atol=1e-5)
    assert np.abs(numbers(masked) - numbers(layer(*heads_inputs()))).max() > 1e-2
    np.testing.assert_array_equal(get_keras_mask(masked), QUERY_MASK)


def test_6_our_explicit_query_mask_replaces_the_carried_one() -> None:
    layer = layer_of(MultiHeadAttention)
    query, value = heads_inputs(mask=True)
    other = ~QUERY_MASK
    masked = layer(query, value, query_mask=other)
    visible = oracle.visible_pairs((B, N, T, S), other, VALUE_MASK)
    np.testing.assert_allclose(masked, expected(layer, visible), atol=1e-5)
    np.testing.assert_array_equal(get_keras_mask(masked), other)


# 7. The inputs lose the masks that they carry.


@seen_in_keras
def test_7_keras_strips_the_masks_of_its_inputs() -> None:
    query, value = heads_inputs(mask=True)
    outputs = layer_of(Stock)(query, value)
    assert get_keras_mask(query) is None
    assert get_keras_mask(value) is None
    assert get_keras_mask(keras.layers.Add()([query, outputs])) is None


@pytest.mark.parametrize("jit_compile", [True, "auto"])
def test_7_our_inputs_keep_their_masks(jit_compile: bool | str) -> None:
    query, value = heads_inputs(mask=True)
    outputs = layer_of(MultiHeadAttention, jit_compile=jit_compile)(query, value)
    np.testing.assert_array_equal(get_keras_mask(query), QUERY_MASK)
    np.testing.assert_array_equal(get_keras_mask(value), VALUE_MASK)
    added = keras.layers.Add()([query, outputs])
    np.testing.assert_array_equal(get_keras_mask(added), QUERY_MASK)


# 8. A compiled call drops the masks.


@seen_in_keras
def test_8_keras_compiled_call_drops_the_masks() -> None:
    layer = layer_of(Stock)
    compiled = tf.function(layer.call, jit_compile=True)
    found = compiled(*heads_inputs(mask=True))
    np.testing.assert_allclose(found, layer(*heads_inputs()), atol=1e-5)
    masked = numbers(layer(*heads_inputs(mask=True)))
    assert np.abs(numbers(found) - masked)[QUERY_MASK].max() > 1e-2


def test_8_our_compiled_call_keeps_the_masks() -> None:
    layer = layer_of(MultiHeadAttention, jit_compile=True)
    found = layer(*heads_inputs(mask=True))
    np.testing.assert_allclose(found, expected(layer, padding_visible()), atol=1e-5)
    assert np.abs(numbers(found) - numbers(layer(*heads_inputs()))).max() > 1e-2
    np.testing.assert_array_equal(get_keras_mask(found), QUERY_MASK)


def test_8_our_compiled_call_keeps_the_masks_in_a_model() -> None:
    layer = layer_of(MultiHeadAttention, jit_compile=True)
    query, value = keras.Input((T, D)), keras.Input((S, D))
    masking = keras.layers.Masking(mask_value=9.0)
    model = keras.Model([query, value], layer(masking(query), masking(value)))
    arrays = [np.array(numbers(x), "float32") for x in heads_inputs()]
    arrays[0][~QUERY_MASK] = 9.0
    arrays[1][~VALUE_MASK] = 9.0
    for found in (model(arrays), model.predict_on_batch(arrays)):
        np.testing.assert_allclose(found, expected(layer, padding_visible()), atol=1e-5)


# 9. The symbolic scores of cross-attention have the queries' length twice.


def symbolic_scores(layer_class: Any) -> tuple[int, ...]:
    query, value = (keras.Input(batch_shape=(B, n, D)) for n in (T, S))
    return layer_class(N, H)(query, value, return_attention_scores=True)[1].shape


@seen_in_keras
def test_9_keras_symbolic_scores_have_a_wrong_shape() -> None:
    assert symbolic_scores(Stock) == (B, N, T, T)


def test_9_our_symbolic_scores_have_the_shape_of_real_ones() -> None:
    layer = layer_of(MultiHeadAttention)
    _, scores = layer(*heads_inputs(), return_attention_scores=True)
    assert symbolic_scores(MultiHeadAttention) == tuple(scores.shape) == (B, N, T, S)


# 10. A mask of rank 4 does not combine with padding masks.


@seen_in_keras
def test_10_keras_rank_4_mask_with_padding_raises() -> None:
    with pytest.raises(Exception, match=r"(?i)incompatible shapes|broadcast"):
        layer_of(Stock)(*heads_inputs(mask=True), attention_mask=pairs(B, N, T, S))


@seen_in_keras
def test_10_keras_rank_4_mask_with_padding_is_wrong_where_heads_equal_batch() -> None:
    shape = (B, B, T, S)
    pair = pairs(*shape)
    visible = oracle.visible_pairs(shape, None, VALUE_MASK, pair)
    query, value = heads_inputs()
    layers = [
        made(c(B, H), query.shape, value.shape) for c in (Stock, MultiHeadAttention)
    ]
    found, right = (
        one(
            query,
            value,
            value_mask=VALUE_MASK,
            attention_mask=pair,
            return_attention_scores=True,
        )[1]
        for one in layers
    )
    assert np.all(numbers(right)[~visible] == 0)
    assert np.any(numbers(found)[~visible] > 0.01)


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("num_heads", [1, B, N])
def test_10_our_rank_4_mask_combines_with_padding(batch: int, num_heads: int) -> None:
    pair = pairs(batch, num_heads, T, S)
    layer = made(MultiHeadAttention(num_heads, H), (B, T, D), (B, S, D))
    found = layer(*heads_inputs(mask=True), attention_mask=pair)
    visible = oracle.visible_pairs((B, num_heads, T, S), QUERY_MASK, VALUE_MASK, pair)
    np.testing.assert_allclose(found, expected(layer, visible), atol=1e-5)
    without = numbers(layer(*heads_inputs(mask=True)))
    assert np.abs(numbers(found) - without).max() > 1e-2


# 11. A floating mask, which other libraries add to the scores, means its opposite.


ADDITIVE = np.where(np.tril(np.ones((T, S), bool)), 0.0, -1e9).astype("float32")


@seen_in_keras
def test_11_keras_reads_an_additive_mask_as_its_opposite() -> None:
    layer = layer_of(Stock)
    _, scores = layer(
        *heads_inputs(), attention_mask=ADDITIVE, return_attention_scores=True
    )
    hidden = np.broadcast_to(ADDITIVE != 0, scores.shape)
    assert np.all(numbers(scores)[hidden][:5] > 0)
    assert np.all(numbers(scores)[:, :, 0, 0] == 0)


def test_11_ours_refuse_it() -> None:
    with pytest.raises(TypeError, match="`attention_mask`.*an additive mask"):
        layer_of(MultiHeadAttention)(*heads_inputs(), attention_mask=ADDITIVE)


# 12. NaN in padding.


def poisoned_gradients(layer_class: Any) -> list[np.ndarray]:
    """Outputs at real positions, and the weights' gradients, with NaN in padding."""
    layer = layer_of(layer_class)
    query, value = map(numbers, heads_inputs())
    query[~QUERY_MASK], value[~VALUE_MASK] = np.nan, np.nan
    query, value = tf.constant(query), tf.constant(value)
    with tf.GradientTape() as tape:
        outputs = layer(query, value, query_mask=QUERY_MASK, value_mask=VALUE_MASK)
        real = tf.boolean_mask(outputs, QUERY_MASK)
        loss = tf.reduce_sum(real**2)
    return [numbers(real), *map(numbers, tape.gradient(loss, layer.trainable_weights))]


@seen_in_keras
def test_12_keras_nan_in_padding_spreads() -> None:
    outputs, *gradients = poisoned_gradients(Stock)
    assert np.all(np.isnan(outputs))
    assert any(np.any(np.isnan(gradient)) for gradient in gradients)


def test_12_ours_keep_nan_in_padding_there() -> None:
    outputs, *gradients = poisoned_gradients(MultiHeadAttention)
    clean = expected(layer_of(MultiHeadAttention), padding_visible())[QUERY_MASK]
    np.testing.assert_allclose(outputs, clean, atol=1e-5)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


# 13. `keras.RematScope` around a layer, in `fit`.


def fit_rematerialized(make: Any) -> keras.Model:
    inputs = keras.Input((T, D))
    with keras.RematScope(mode="full"):
        layer = make()
        outputs = layer(inputs)
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    model.fit(normal(B, T, D), np.zeros((B, T, D)), verbose=0)
    return model


@seen_in_keras
def test_13_keras_rematerialized_dense_does_not_fit() -> None:
    with pytest.raises(ValueError, match="keywords arguments only when eager"):
        fit_rematerialized(lambda: keras.layers.Dense(D))


def test_13_ours_fit_when_rematerialized() -> None:
    def make() -> keras.layers.Layer:
        return MultiHeadSelfAttention(N, H, seed=1)

    keras.utils.set_random_seed(0)
    rematerialized = fit_rematerialized(make)
    keras.utils.set_random_seed(0)
    inputs = keras.Input((T, D))
    plain = keras.Model(inputs, make()(inputs))
    before = [numbers(weight) for weight in plain.weights]
    plain.compile("sgd", "mse")
    plain.fit(normal(B, T, D), np.zeros((B, T, D)), verbose=0)
    for mended, weight, old in zip(
        rematerialized.weights, plain.weights, before, strict=True
    ):
        np.testing.assert_allclose(numbers(mended), numbers(weight), atol=1e-6)
        assert "key" in weight.path or np.abs(numbers(weight) - old).max() > 0


# 14. A model saved after `quantize("int8")`.


def quantized(layer_class: Any) -> keras.Model:
    query, value = keras.Input((T, D)), keras.Input((S, D))
    model = keras.Model([query, value], layer_class(N, H)(query, value))
    with warnings.catch_warnings():
        # Keras warns of every layer without a kernel.
        warnings.filterwarnings("ignore", "Layer .* does not have a `quantize`")
        model.quantize("int8")
    return model


@seen_in_keras
def test_14_keras_quantized_model_does_not_load(tmp_path: Path) -> None:
    quantized(Stock).save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="could not be loaded"):
        keras.saving.load_model(tmp_path / "model.keras")


def test_14_our_quantized_model_loads(tmp_path: Path) -> None:
    model = quantized(MultiHeadAttention)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    inputs = list(map(numbers, heads_inputs()))
    np.testing.assert_allclose(loaded(inputs), model(inputs), atol=1e-6)
