"""Quantization and low-rank adaptation of the fused query-key-value projection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mha import MultiHeadAttention, MultiHeadSelfAttention
from tests.support.layers import (
    PADDING,
    B,
    D,
    H,
    N,
    T,
    V,
    differentiate,
    normal,
    self_attention,
    split_weights,
)

# Keras warns so of the inputs of a Functional model and of what its own layer holds.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Layer (InputLayer|Dropout|Softmax) does not have a `quantize` method"
)

PARTS = ("query", "key", "value")
SIZES = (H, H, V)
RANK = 3
TARGETS = [("query",), ("value", "key"), PARTS]
# One step of int8 is 1/127 of a column's greatest weight or a row's greatest input.
INT8_TOLERANCE = 0.05


def attention(**options: Any) -> MultiHeadSelfAttention:
    """A layer with random weights whose values have a size of their own."""
    return self_attention(**{"value_dim": V, **options})


def set_factors(layer: MultiHeadSelfAttention, seed: int = 31) -> None:
    """Gives every low-rank factor random values; at first their product is zero."""
    for place, weight in enumerate(layer.qkv_dense.trainable_variables):
        if "lora" in weight.name:
            weight.assign(normal(*weight.shape, seed=seed + place, scale=0.3))


def adapted(
    targets: tuple[str, ...] = ("query", "value"), alpha: float | None = None
) -> MultiHeadSelfAttention:
    layer = attention()
    layer.enable_lora(RANK, targets, alpha)
    set_factors(layer)
    return layer


def merged_weights(layer: MultiHeadSelfAttention, alpha: float = RANK) -> list[Any]:
    """The weights with `alpha / rank * A B` in the kernel, computed in NumPy."""
    named = {weight.name: np.asarray(weight) for weight in layer.qkv_dense.weights}
    kernel = named["kernel"].astype("float64")
    for part, size, start in zip(PARTS, SIZES, (0, H, 2 * H), strict=True):
        if f"lora_{part}_a" in named:
            product = named[f"lora_{part}_a"] @ named[f"lora_{part}_b"]
            kernel[..., start : start + size] += (
                alpha / RANK * product.reshape(D, N, size)
            )
    return [
        kernel.astype("float32"),
        named["bias"],
        *(np.asarray(weight) for weight in layer.output_dense.weights),
    ]


def model_of(layer: keras.layers.Layer) -> keras.Model:
    inputs = keras.Input((None, D))
    return keras.Model(inputs, layer(inputs))


def relative_error(outputs: Any, expected: Any) -> float:
    outputs, expected = np.asarray(outputs), np.asarray(expected)
    return float(np.abs(outputs - expected).max() / np.abs(expected).max())


def test_parts_are_split_as_they_are_fused() -> None:
    layer, inputs = attention(), normal(B, T, D)
    projected = layer.qkv_dense(inputs)
    weights = split_weights(layer)
    for part, place in zip(layer.qkv_dense.split(projected), (0, 2, 4), strict=True):
        expected = np.einsum("btd,dnh->btnh", inputs, weights[place])
        np.testing.assert_allclose(part, expected + weights[place + 1], atol=1e-5)


# Low-rank adaptation.


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("alpha", [None, 7.0])
def test_factors_add_their_product_to_their_parts(
    targets: tuple[str, ...], alpha: float | None
) -> None:
    layer, inputs = adapted(targets, alpha), normal(B, T, D)
    plain = attention()
    before = np.asarray(plain(inputs, mask=PADDING))
    plain.set_weights(merged_weights(layer, alpha or RANK))
    outputs = np.asarray(layer(inputs, mask=PADDING))
    np.testing.assert_allclose(outputs, plain(inputs, mask=PADDING), atol=1e-4)
    assert np.abs(outputs - before).max() > 0.1


@pytest.mark.parametrize("targets", TARGETS)
def test_only_the_factors_of_the_targets_train(targets: tuple[str, ...]) -> None:
    layer = attention()
    before = np.asarray(layer(normal(B, T, D)))
    layer.enable_lora(RANK, targets)
    np.testing.assert_array_equal(layer(normal(B, T, D)), before)
    sizes = dict(zip(PARTS, SIZES, strict=True))
    assert [
        (weight.name, tuple(weight.shape))
        for weight in layer.qkv_dense.trainable_variables
    ] == [("bias", (N, 2 * H + V))] + [
        named
        for part in targets
        for named in (
            (f"lora_{part}_a", (D, RANK)),
            (f"lora_{part}_b", (RANK, N * sizes[part])),
        )
    ]
    assert [weight.name for weight in layer.non_trainable_variables] == ["kernel"]


def test_one_target_can_be_given_by_its_name() -> None:
    layer = attention()
    layer.enable_lora(RANK, "key")
    names = {weight.name for weight in layer.qkv_dense.trainable_variables}
    assert names == {"bias", "lora_key_a", "lora_key_b"}


@pytest.mark.parametrize("jit_compile", ["auto", True])
def test_fit_changes_the_factors_and_leaves_the_kernel(
    jit_compile: bool | str,
) -> None:
    layer = attention(jit_compile=jit_compile)
    model = model_of(layer)
    model.compile("sgd", "mse", jit_compile=False)
    data = normal(B, T, D), normal(B, T, D, seed=1)
    model.fit(*data, verbose=0)
    layer.enable_lora(RANK)
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    kernel = np.asarray(layer.qkv_dense._kernel)
    factors = [np.asarray(layer.qkv_dense.lora_query_b) for _ in range(1)]
    first = model.evaluate(*data, verbose=0)
    model.fit(*data, epochs=5, verbose=0)
    assert model.evaluate(*data, verbose=0) < first
    np.testing.assert_array_equal(layer.qkv_dense._kernel, kernel)
    assert np.abs(layer.qkv_dense.lora_query_b - factors[0]).max() > 0


def test_gradients_of_the_factors_are_those_of_their_product() -> None:
    layer, inputs = adapted(PARTS, alpha=7.0), normal(B, T, D)
    names = [
        weight
        for weight in layer.qkv_dense.trainable_variables
        if "lora" in weight.name
    ]
    result = differentiate(layer, inputs, names)
    plain = attention()
    plain.set_weights(merged_weights(layer, 7.0))
    whole = differentiate(plain, inputs, [plain.qkv_dense.kernel])
    np.testing.assert_allclose(result.inputs, whole.inputs, atol=1e-3)
    parts = np.split(whole.weights[0], (H, 2 * H), axis=-1)
    for place, part in enumerate(parts):
        down, up = (np.asarray(weight) for weight in names[2 * place : 2 * place + 2])
        flat = 7.0 / RANK * part.reshape(D, -1)
        for gradient, expected in zip(
            result.weights[2 * place :], (flat @ up.T, down.T @ flat), strict=False
        ):
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-3)


def test_factors_stay_float32_in_mixed_precision() -> None:
    layer = MultiHeadSelfAttention(N, H, V, dtype="mixed_float16")
    layer.build((B, T, D))
    layer.enable_lora(RANK)
    set_factors(layer)
    assert {weight.dtype for weight in layer.qkv_dense.weights} == {"float32"}
    outputs = layer(normal(B, T, D))
    assert outputs.dtype == "float16"
    wide = MultiHeadSelfAttention(N, H, V)
    wide.build((B, T, D))
    wide.set_weights(merged_weights(layer))
    assert relative_error(outputs, wide(normal(B, T, D))) < 0.01


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_saved_factors_are_merged_into_a_plain_layer(
    suffix: str, tmp_path: Path
) -> None:
    layer, inputs = adapted(), normal(B, T, D)
    model, path = model_of(layer), tmp_path / f"adapted{suffix}"
    expected = np.asarray(model(inputs))
    if suffix == ".keras":
        model.save(path)
        loaded: Any = keras.saving.load_model(path)
        plain = loaded.layers[-1]
    else:
        model.save_weights(path)
        plain = MultiHeadSelfAttention(N, H, V)
        loaded = model_of(plain)
        loaded.load_weights(path)
    np.testing.assert_allclose(loaded(inputs), expected, atol=1e-4)
    assert len(plain.weights) == 4
    # Saving does not change the layer.
    np.testing.assert_array_equal(model(inputs), expected)


def test_an_adapted_layer_loads_what_adapted_and_plain_layers_saved(
    tmp_path: Path,
) -> None:
    plain, other, inputs = attention(), adapted(("key",)), normal(B, T, D)
    for saved in (plain, other):
        model_of(saved).save_weights(tmp_path / "saved.weights.h5")
        layer = adapted()
        model = model_of(layer)
        model.load_weights(tmp_path / "saved.weights.h5")
        np.testing.assert_allclose(model(inputs), saved(inputs), atol=1e-4)
        assert len(layer.qkv_dense.trainable_variables) == 5
        result = differentiate(
            layer, inputs, [layer.qkv_dense.lora_query_b, layer.qkv_dense.lora_value_b]
        )
        assert all(gradient.any() for gradient in result.weights)


def test_without_bias() -> None:
    layer, inputs = attention(use_bias=False), normal(B, T, D)
    layer.enable_lora(RANK)
    set_factors(layer)
    named = [weight.name for weight in layer.qkv_dense.trainable_variables]
    assert named == ["lora_query_a", "lora_query_b", "lora_value_a", "lora_value_b"]
    plain, store = attention(use_bias=False), {}
    layer.qkv_dense.save_own_variables(store)
    assert set(store) == {"0"}
    plain.qkv_dense.load_own_variables(store)
    np.testing.assert_allclose(layer(inputs), plain(inputs), atol=1e-4)


def test_regularizers_see_the_factors() -> None:
    layer = attention(kernel_regularizer=keras.regularizers.L2(0.1))
    layer.enable_lora(RANK)
    set_factors(layer)
    factors = [
        np.asarray(weight)
        for weight in layer.qkv_dense.trainable_variables
        if "lora" in weight.name
    ]
    expected = sum(
        0.1 * np.square(array).sum() for array in (*factors, layer.output_dense.kernel)
    )
    assert float(sum(layer.losses)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "`rank`, expected a positive integer. Received: rank=0"),
        ((2.5,), "`rank`, expected a positive integer. Received: rank=2.5"),
        ((2, ()), r"`targets` must be different names .*targets=\(\)"),
        ((2, ("query", "query")), "`targets` must be different names .*'query', 'que"),
        ((2, ("output",)), r"out of \('query', 'key', 'value'\).*'output'"),
        ((2, "output"), r"`targets` must be different names .*\('output',\)"),
    ],
)
def test_arguments_out_of_their_domain(
    arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attention().enable_lora(*arguments)


def test_what_cannot_be_adapted_says_so() -> None:
    with pytest.raises(ValueError, match="`enable_lora` needs a built layer"):
        MultiHeadSelfAttention(N, H).enable_lora(RANK)
    layer = adapted()
    with pytest.raises(
        ValueError, match=r"called before .*adapted: \('query', 'value'\)"
    ):
        layer.enable_lora(RANK, ("key",))
    with pytest.raises(ValueError, match="`kernel_constraint` exclude .*NonNeg"):
        attention(kernel_constraint="non_neg").enable_lora(RANK)
    quantized = attention()
    quantized.quantize("int4")
    with pytest.raises(ValueError, match="float and int8 kernels.*mode int4"):
        quantized.enable_lora(RANK)
    with pytest.raises(ValueError, match="to int8 only. Received: mode=int4"):
        layer.quantize("int4")


# Quantization.


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("through", ["layer", "model"])
def test_int8_is_close(through: str, called_before: bool) -> None:
    layer, inputs = attention(), normal(B, T, D)
    expected = np.asarray(attention()(inputs))
    model = model_of(layer)
    if called_before:
        np.testing.assert_array_equal(model.predict(inputs, verbose=0), expected)
    (layer if through == "layer" else model).quantize("int8")
    assert layer.qkv_dense.quantization_mode == "int8"
    assert layer.output_dense.quantization_mode == "int8"
    assert layer.qkv_dense._kernel.dtype == "int8"
    assert 0 < relative_error(model(inputs), expected) < INT8_TOLERANCE
    if through == "model":  # which also drops the model's compiled functions
        outputs = model.predict(inputs, verbose=0)
        assert 0 < relative_error(outputs, expected) < INT8_TOLERANCE


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_quantized_kernels_are_those_of_keras(mode: str) -> None:
    # A column has its own scale, so quantizing the fused kernel or its parts is one.
    layer = attention()
    stock = keras.layers.MultiHeadAttention(N, H, V)
    model = cross_model_of(stock)
    stock.set_weights(split_weights(layer))
    layer.quantize(mode)
    model.quantize(mode)
    np.testing.assert_allclose(
        layer(normal(B, T, D)), model(normal(B, T, D)), atol=1e-5
    )


def cross_model_of(layer: keras.layers.Layer) -> keras.Model:
    inputs = keras.Input((None, D))
    return keras.Model(inputs, layer(inputs, inputs))


def test_both_attention_layers_quantize_alike() -> None:
    layer, other = attention(), MultiHeadAttention(N, H, V)
    other.build((B, T, D), (B, T, D))
    other.set_weights(split_weights(layer))
    layer.quantize("int8")
    other.quantize("int8")
    inputs = normal(B, T, D)
    np.testing.assert_allclose(
        layer(inputs, mask=PADDING),
        other(inputs, inputs, query_mask=PADDING, value_mask=PADDING),
        atol=1e-5,
    )


def test_gradients_flow_through_int8() -> None:
    layer, inputs = attention(), normal(B, T, D)
    expected = differentiate(layer, inputs, [])
    layer.quantize("int8")
    result = differentiate(layer, inputs, [])
    assert relative_error(result.inputs, expected.inputs) < 2 * INT8_TOLERANCE


def test_quantizing_before_the_first_call_is_refused() -> None:
    with pytest.raises(ValueError, match="[Bb]uil"):
        MultiHeadSelfAttention(N, H).quantize("int8")


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_a_quantized_model_is_saved_and_loaded(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    def fresh() -> keras.Model:
        if kind == "self":
            return model_of(MultiHeadSelfAttention(N, H, V, name="attention"))
        return cross_model_of(MultiHeadAttention(N, H, V, name="attention"))

    model, inputs, path = fresh(), normal(B, T, D), tmp_path / f"quantized{suffix}"
    model.quantize("int8")
    expected = np.asarray(model(inputs))
    if suffix == ".keras":
        model.save(path)
        loaded: Any = keras.saving.load_model(path)
    else:
        model.save_weights(path)
        loaded = fresh()
        loaded.quantize("int8")
        loaded.load_weights(path)
    assert {weight.dtype for weight in loaded.weights} == {"int8", "float32"}
    np.testing.assert_allclose(loaded(inputs), expected, atol=1e-5)


# Both.


def test_adapted_then_int8(tmp_path: Path) -> None:
    layer, inputs = adapted(), normal(B, T, D)
    model = model_of(layer)
    expected = np.asarray(model(inputs))
    model.quantize("int8")
    outputs = np.asarray(model(inputs))
    assert 0 < relative_error(outputs, expected) < INT8_TOLERANCE
    # The factors were merged, and adapt further from zero.
    for up in (layer.qkv_dense.lora_query_b, layer.qkv_dense.lora_value_b):
        assert not np.asarray(up).any()
    set_factors(layer)
    assert relative_error(model(inputs), outputs) > 0.05
    check_quantized_files(model, tmp_path)


def test_int8_then_adapted(tmp_path: Path) -> None:
    layer, inputs = attention(), normal(B, T, D)
    model = model_of(layer)
    model.quantize("int8")
    before = np.asarray(model(inputs))
    layer.enable_lora(RANK)
    np.testing.assert_allclose(model_of(layer)(inputs), before, atol=1e-6)
    set_factors(layer)
    twin = adapted()
    assert relative_error(layer(inputs), twin(inputs)) < INT8_TOLERANCE
    assert {weight.name for weight in layer.qkv_dense.trainable_variables} == {
        "bias",
        "lora_query_a",
        "lora_query_b",
        "lora_value_a",
        "lora_value_b",
    }
    check_quantized_files(model, tmp_path)


def check_quantized_files(model: keras.Model, folder: Path) -> None:
    """An int8 model with factors is saved merged, and loads without factors."""
    inputs = normal(B, T, D)
    expected = np.asarray(model(inputs))
    model.save(folder / "model.keras")
    loaded: Any = keras.saving.load_model(folder / "model.keras")
    assert relative_error(loaded(inputs), expected) < INT8_TOLERANCE
    model.save_weights(folder / "model.weights.h5")
    plain = model_of(MultiHeadSelfAttention(N, H, V))
    plain.quantize("int8")
    plain.load_weights(folder / "model.weights.h5")
    np.testing.assert_allclose(plain(inputs), loaded(inputs), atol=1e-6)
    # An int8 layer with factors loads the file as well.
    again = model_of(MultiHeadSelfAttention(N, H, V))
    again.quantize("int8")
    again.layers[-1].enable_lora(RANK)
    again.load_weights(folder / "model.weights.h5")
    np.testing.assert_allclose(again(inputs), loaded(inputs), atol=1e-6)


def test_a_projection_adapted_on_its_own_keeps_its_factors(tmp_path: Path) -> None:
    # As a loop over a model's layers does that adapts whatever can be.
    layer = attention()
    layer.qkv_dense.enable_lora(RANK)
    set_factors(layer)
    model = model_of(layer)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    inputs = normal(2, T, D)
    np.testing.assert_allclose(loaded(inputs), model(inputs), atol=1e-5)
    layer.enable_lora(RANK)  # the same once more
    with pytest.raises(ValueError, match="works once a layer"):
        layer.enable_lora(RANK + 1)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), "x", True])
def test_unusable_alphas_are_refused(alpha: Any) -> None:
    with pytest.raises(ValueError, match="`lora_alpha` must be a positive, finite"):
        attention().enable_lora(RANK, lora_alpha=alpha)


@pytest.mark.parametrize("options", [{"key_dim": 1}, {"output_shape": (5, 1)}])
def test_sizes_of_one_are_not_quantized(options: dict[str, Any]) -> None:
    # Keras would add their biases along another axis.
    layer = MultiHeadAttention(**{"num_heads": 5, "key_dim": H, **options})
    layer(normal(2, 5, D), normal(2, 5, D))
    with pytest.raises(ValueError, match="use_bias=False.*bias of shape .*, 1"):
        layer.quantize("int8")
