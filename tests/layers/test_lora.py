"""Low-rank factors of every layer of a model, and of `MultiHeadAttention`.

Those of the fused projection are tested in `test_fused_projection.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mha import (
    MultiHeadAttention,
    MultiHeadSelfAttention,
    TransformerDecoderBlock,
    TransformerEncoderBlock,
)
from tests.support.layers import normal, randomize

B, T, S, N, H, V, D, M, RANK = 3, 7, 5, 2, 3, 11, 13, 17, 2
QUERIES, VALUES = normal(B, T, D), normal(B, S, M, seed=1)


def attention(**options: Any) -> Any:
    layer = MultiHeadAttention(N, H, V, **options)
    layer.build(QUERIES.shape, VALUES.shape)
    randomize(layer)
    return layer


def names(variables: list[Any]) -> list[str]:
    return [variable.path.partition("/")[2] for variable in variables]


def test_targets_are_adapted_and_the_three_kernels_frozen() -> None:
    layer = attention()
    before = np.asarray(layer(QUERIES, VALUES))
    layer.enable_lora(RANK, ("value", "key"), lora_alpha=3.0)
    assert set(names(layer.trainable_variables)) == {
        "query/bias",
        "key/bias",
        "key/lora_kernel_a",
        "key/lora_kernel_b",
        "value/bias",
        "value/lora_kernel_a",
        "value/lora_kernel_b",
        "attention_output/kernel",
        "attention_output/bias",
    }
    np.testing.assert_array_equal(layer(QUERIES, VALUES), before)


def test_factors_join_the_kernels_and_are_merged_when_saved(tmp_path: Path) -> None:
    layer, merged = attention(), attention()
    layer.enable_lora(RANK, ("query", "value"), lora_alpha=3.0)
    for place, variable in enumerate(layer.trainable_variables):
        if "lora" in variable.name:
            variable.assign(normal(*variable.shape, seed=20 + place))
    for name in ("query", "value"):
        adapted, plain = (getattr(each, f"{name}_dense") for each in (layer, merged))
        down, up = map(np.asarray, (adapted.lora_kernel_a, adapted.lora_kernel_b))
        plain._kernel.assign_add(3.0 / RANK * down @ up)
    expected = merged(QUERIES, VALUES)
    assert np.abs(expected - np.asarray(attention()(QUERIES, VALUES))).max() > 0.1
    np.testing.assert_allclose(layer(QUERIES, VALUES), expected, atol=1e-4)
    values, queries = keras.Input(VALUES.shape[1:]), keras.Input(QUERIES.shape[1:])
    loaded: Any = None
    for each, name in ((layer, "adapted"), (attention(), "plain")):
        model = keras.Model([queries, values], each(queries, values))
        if name == "adapted":
            model.save_weights(tmp_path / "m.weights.h5")
        else:
            model.load_weights(tmp_path / "m.weights.h5")
            loaded = model([QUERIES, VALUES])
    np.testing.assert_allclose(loaded, expected, atol=1e-4)


@pytest.mark.parametrize("make", [attention, None], ids=["cross", "self"])
def test_the_same_call_again_changes_nothing(make: Any) -> None:
    if make is None:
        layer: Any = MultiHeadSelfAttention(N)
        layer.build((B, T, 2 * H))
    else:
        layer = make()
    layer.enable_lora(RANK, lora_alpha=0.5)
    adapted = names(layer.variables)
    layer.enable_lora(RANK, lora_alpha=0.5)
    assert names(layer.variables) == adapted
    for arguments in ((RANK + 1,), (RANK, ("query", "value"), 0.75)):
        with pytest.raises(ValueError, match="once a layer"):
            layer.enable_lora(*arguments)
    assert names(layer.variables) == adapted


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0,), "`rank`.*rank=0"),
        ((RANK, ()), r"`targets` .*targets=\(\)"),
        ((RANK, ("query", "output")), "`targets` .*'output'"),
        ((RANK, ("query", "query")), "`targets` must be different"),
        ((RANK, "query", -1.0), "`lora_alpha`.*-1.0"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        attention().enable_lora(*arguments)


def test_what_cannot_be_adapted_is_refused_before_anything_changes() -> None:
    with pytest.raises(ValueError, match="needs a built layer"):
        MultiHeadAttention(N, H).enable_lora(RANK)
    with pytest.raises(ValueError, match="`kernel_constraint` exclude"):
        attention(kernel_constraint="non_neg").enable_lora(RANK)
    layer = attention()
    layer.value_dense.enable_lora(RANK + 1)
    before = names(layer.variables)
    with pytest.raises(ValueError, match=f"'value' has factors of rank {RANK + 1}"):
        layer.enable_lora(RANK, ("query", "value"))
    assert names(layer.variables) == before


@pytest.mark.parametrize("is_reversed", [False, True])
def test_a_loop_over_all_layers_of_a_model(is_reversed: bool) -> None:
    queries, values = keras.Input((T, D)), keras.Input((S, M))
    x = TransformerEncoderBlock(N, 4, key_dim=H, use_gate=True)(queries)
    x = TransformerDecoderBlock(N, 4, key_dim=H, cross_attention=True)(x, values)
    x = MultiHeadAttention(N, H)(x, values)
    model = keras.Model([queries, values], x)
    randomize(model)
    before = np.asarray(model([QUERIES, VALUES]))
    layers = model._flatten_layers(include_self=False)
    for layer in reversed(list(layers)) if is_reversed else list(layers):
        if hasattr(layer, "enable_lora"):
            layer.enable_lora(RANK)
    np.testing.assert_array_equal(model([QUERIES, VALUES]), before)
    trained = {variable.name for variable in model.trainable_variables}
    assert not any("kernel" in name and "lora" not in name for name in trained)
    kernels = [v for v in model.non_trainable_variables if v.name == "kernel"]
    assert len(kernels) > 10
    frozen = [np.asarray(kernel) for kernel in kernels]
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch([QUERIES, VALUES], normal(*before.shape, seed=9))
    for kernel, value in zip(kernels, frozen, strict=True):
        np.testing.assert_array_equal(kernel, value)
    assert np.abs(model([QUERIES, VALUES]) - before).max() > 1e-4
