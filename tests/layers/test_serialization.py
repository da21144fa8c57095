"""Configurations and files: nothing is lost, and what was saved once loads for ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import (
    FeedForward,
    MultiHeadAttention,
    MultiHeadSelfAttention,
    ResidualNorm,
    TokenAndPositionEmbedding,
    TransformerEncoderBlock,
)
from tests.support.layers import (
    PADDING,
    B,
    T,
    normal,
    randomize,
)

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
VOCABULARY, LONGEST, HIDDEN = 19, 11, 17
IDS = np.where(PADDING, np.random.default_rng(1).integers(1, VOCABULARY, (B, T)), 0)

PUBLIC = [
    each
    for each in vars(keras_mha).values()
    if isinstance(each, type) and issubclass(each, keras.layers.Layer)
    if each is not keras_mha.DistanceBias  # a base without a call
]


# Kinds of models.


@keras.saving.register_keras_serializable(package="keras_mha_tests")
class Classifier(keras.Model):
    """A subclassed model that makes its layers itself."""

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width
        self.embedding = TokenAndPositionEmbedding(VOCABULARY, LONGEST, width)
        self.blocks = [TransformerEncoderBlock(2, HIDDEN) for _ in range(2)]
        self.attention = MultiHeadAttention(2, 3)
        self.head = ResidualNorm(FeedForward(HIDDEN))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = self.embedding(inputs)
        for block in self.blocks:
            x = block(x, training=training)
        return self.head(self.attention(x, x), training=training)


def model_kinds(kind: str, dropout: float = 0.1) -> keras.Model:
    if kind == "subclassed":
        model: keras.Model = Classifier(8)
        model(IDS)
        return model
    layers: list[Any] = [
        TokenAndPositionEmbedding(VOCABULARY, LONGEST, 8),
        TransformerEncoderBlock(2, HIDDEN, dropout=dropout),
        ResidualNorm(MultiHeadSelfAttention(2), "sandwich"),
        FeedForward(HIDDEN, gated=True),
    ]
    if kind == "sequential":
        return keras.Sequential([keras.Input((None,), dtype="int32"), *layers])
    inputs = keras.Input((None,), dtype="int32")
    outputs = inputs
    for layer in layers:
        outputs = layer(outputs)
    if kind == "shared":
        outputs = layers[2](layers[1](outputs))
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize("kind", ["sequential", "functional", "shared", "subclassed"])
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_models_of_each_kind(kind: str, suffix: str, tmp_path: Path) -> None:
    model, path = model_kinds(kind), tmp_path / f"model{suffix}"
    randomize(model)
    expected = np.asarray(model(IDS))
    if suffix == ".keras":
        model.save(path)
        loaded: Any = keras.saving.load_model(path)
    else:
        model.save_weights(path)
        loaded = model_kinds(kind)
        loaded.load_weights(path)
    np.testing.assert_allclose(loaded(IDS), expected, atol=1e-6)
    assert len(loaded.weights) == len(model.weights)


def test_training_goes_on_after_loading(tmp_path: Path) -> None:
    # Without dropout: Keras saves no state of random generators.
    model = model_kinds("functional", dropout=0.0)
    model.compile("adam", "mse", jit_compile=False)
    targets = normal(B, T, 8)
    model.fit(IDS, targets, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    losses = [
        each.fit(IDS, targets, epochs=2, shuffle=False, verbose=0).history["loss"]
        for each in (model, loaded)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("kind", ["sequential", "functional", "shared"])
def test_quantized_models_are_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model = model_kinds(kind)
    randomize(model)
    before = np.asarray(model(IDS))
    model.quantize("int8")
    expected = np.asarray(model(IDS))
    assert np.abs(expected - before).max() > 1e-4
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    assert [w.dtype for w in loaded.weights] == [w.dtype for w in model.weights]
    np.testing.assert_allclose(loaded(IDS), expected, atol=1e-5)


# Files of earlier versions.


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.keras")), ids=lambda p: p.stem)
def test_files_of_every_version_load(path: Path) -> None:
    saved = np.load(path.with_suffix(".npz"))
    model: Any = keras.saving.load_model(path)
    np.testing.assert_allclose(model(saved["ids"]), saved["outputs"], atol=1e-5)


def test_there_is_a_file_with_every_layer() -> None:
    paths = list(FIXTURES.glob("*.keras"))
    assert paths
    assert all(path.stat().st_size < 200_000 for path in paths)
    model: Any = keras.saving.load_model(max(paths))
    held = {type(layer) for layer in model._flatten_layers()}
    assert set(PUBLIC) <= held


FROZEN: dict[str, Callable[..., keras.layers.Layer]] = {
    "self": lambda **k: keras_mha.MultiHeadSelfAttention(2, **k),
    "options": lambda **k: keras_mha.MultiHeadSelfAttention(
        2, position="relative", qk_norm="rms", use_sinks=True, use_gate=True, **k
    ),
    "block": lambda **k: keras_mha.TransformerEncoderBlock(2, 5, **k),
    "decoder": lambda **k: keras_mha.TransformerDecoderBlock(2, 5, **k),
    "network": lambda **k: keras_mha.FeedForward(5, **k),
    "residual": lambda **k: keras_mha.ResidualNorm(
        keras.layers.Dense(6), layer_scale=0.1, **k
    ),
}


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("when", ["made", "built"])
def test_frozen_layers_stay_frozen(name: str, when: str, tmp_path: Path) -> None:
    layer = FROZEN[name](trainable=when == "built")
    inputs = keras.Input((3, 6))
    model = keras.Model(inputs, layer(inputs))
    layer.trainable = False
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    for one in (model, loaded):
        assert not one.trainable_weights
        assert len(one.weights) > 3


def test_a_layer_made_frozen_is_so_before_it_is_told_again() -> None:
    for make in FROZEN.values():
        inputs = keras.Input((3, 6))
        assert not keras.Model(inputs, make(trainable=False)(inputs)).trainable_weights


def test_attention_with_keys_and_embeddings_freeze_too() -> None:
    queries, ids = keras.Input((3, 6)), keras.Input((3,), dtype="int32")
    attention = keras_mha.MultiHeadAttention(2, 3, trainable=False)
    embedding = keras_mha.TokenAndPositionEmbedding(7, 3, 6, trainable=False)
    outputs = attention(queries, embedding(ids))
    assert not keras.Model([queries, ids], outputs).trainable_weights
