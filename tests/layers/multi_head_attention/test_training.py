"""MultiHeadAttention in training, lower precision, under XLA and adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mha import MultiHeadAttention
from tests.support.attention_cases import numbers
from tests.support.layers import normal
from tests.support.multi_head_attention import (
    DQ,
    SHAPES,
    B,
    H,
    N,
    T,
    functional,
    inputs,
)


def test_float16_by_hand() -> None:
    # Unit vectors for queries and keys: a score is 1 / sqrt(7) where they agree.
    size, unit = 7, np.eye(7)[None]
    value = np.arange(size * size).reshape(1, size, size) / 100
    layer = MultiHeadAttention(size, size, dtype="float16")
    layer.build(unit.shape, unit.shape)
    kernel = np.repeat(np.eye(size)[:, None], size, axis=1)
    bias = np.zeros((size, size))
    output = np.repeat(np.eye(size)[None], size, axis=0)
    layer.set_weights([kernel, bias] * 3 + [output, np.zeros(size)])
    found, scores = layer(unit, value, unit, return_attention_scores=True)
    weight = np.exp(1 / np.sqrt(size))
    table = np.where(np.eye(size) > 0, weight, 1.0) / (weight + size - 1)
    assert found.dtype == scores.dtype == "float16"
    np.testing.assert_allclose(
        numbers(scores), np.tile(table, (1, size, 1, 1)), atol=2e-4
    )
    np.testing.assert_allclose(numbers(found), size * (table @ value), atol=5e-3)


def test_it_learns_to_copy() -> None:
    """A task that attention alone can do: fetch the value of the matching key."""
    generator = np.random.default_rng(0)
    keys = np.eye(5, dtype="float32")[
        np.stack([generator.permutation(5) for _ in range(64)])
    ]
    value = generator.normal(size=(64, 5, 3)).astype("float32")
    query = np.broadcast_to(np.eye(5, dtype="float32"), (64, 5, 5))
    target = np.einsum("btd,bsd,bsv->btv", query, keys, value)
    arguments = [keras.Input((5, size)) for size in (5, 3, 5)]
    layer = MultiHeadAttention(1, 8, output_shape=3)
    model = keras.Model(arguments, layer(*arguments))
    model.compile(keras.optimizers.Adam(0.1), "mse", jit_compile=False)
    history = model.fit(
        [query, value, keys], target, epochs=30, batch_size=64, verbose=0
    )
    assert history.history["loss"][-1] < 0.1 * np.var(target)


PROJECTIONS = ("query_dense", "key_dense", "value_dense")


def test_lora_on_the_projections(tmp_path: Path) -> None:
    options = {"use_bias": False, "use_gate": True}
    model, plain = (functional(MultiHeadAttention, **options) for _ in range(2))
    layer: Any = model.get_layer("mha")
    before = numbers(model(inputs()))
    for name in PROJECTIONS:
        getattr(layer, name).enable_lora(2)
    assert len(layer.trainable_variables) == 8
    assert len(layer.non_trainable_variables) == 3
    np.testing.assert_allclose(model(inputs()), before, atol=1e-5)

    frozen = [numbers(getattr(layer, name)._kernel) for name in PROJECTIONS]
    model.compile("sgd", "mse", jit_compile=False)
    for _ in range(2):  # the second factor starts at zero, the first moves after it
        model.train_on_batch(inputs(), normal(B, T, DQ))
    for name, kernel in zip(PROJECTIONS, frozen, strict=True):
        np.testing.assert_array_equal(numbers(getattr(layer, name)._kernel), kernel)
        assert np.any(numbers(getattr(layer, name).lora_kernel_b) != 0)
    after = numbers(model(inputs()))
    assert np.abs(after - before).max() > 1e-3

    model.save(tmp_path / "lora.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "lora.keras")
    np.testing.assert_allclose(loaded(inputs()), after, atol=1e-5)

    model.save_weights(tmp_path / "lora.weights.h5")
    plain.load_weights(tmp_path / "lora.weights.h5")
    np.testing.assert_allclose(plain(inputs()), after, atol=1e-5)

    adapted: Any = functional(MultiHeadAttention, **options)
    adapted.get_layer("mha").query_dense.enable_lora(2)
    plain.save_weights(tmp_path / "plain.weights.h5")
    adapted.load_weights(tmp_path / "plain.weights.h5")
    np.testing.assert_allclose(adapted(inputs()), after, atol=1e-5)


# What Keras says of every Functional model.
@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize`")
@pytest.mark.parametrize("use_gate", [False, True], ids=["plain", "gate"])
@pytest.mark.parametrize("through", ["layer", "model"])
def test_int8_quantization(use_gate: bool, through: str) -> None:
    model = functional(MultiHeadAttention, use_gate=use_gate)
    layer: Any = model.get_layer("mha")
    before = numbers(model(inputs()))
    (layer if through == "layer" else model).quantize("int8")
    names = [*PROJECTIONS, "output_dense", *(["_gate_dense"] if use_gate else [])]
    for name in names:
        assert getattr(layer, name)._kernel.dtype == "int8"
    after = numbers(model(inputs()))
    assert 0 < np.mean((after - before) ** 2) < 1e-3 * np.mean(before**2)


def test_a_policy_map_reaches_the_projections_by_name() -> None:
    policies = keras.dtype_policies.DTypePolicyMap()
    for name in ("query", "value"):
        policies[f"mha/{name}"] = keras.dtype_policies.QuantizedDTypePolicy(
            "int8", "float32"
        )
    policies["mha/key"] = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    layer = MultiHeadAttention(N, H, dtype=policies, name="mha")
    layer.build(*SHAPES)
    assert layer.query_dense._kernel.dtype == layer.value_dense._kernel.dtype == "int8"
    assert layer.key_dense.compute_dtype == "bfloat16"
    assert layer.output_dense._kernel.dtype == "float32"
