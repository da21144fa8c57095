"""Configurations and files: nothing is lost, and what was saved once loads for ever."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import (
    ALiBi,
    FeedForward,
    MultiHeadAttention,
    MultiHeadSelfAttention,
    RelativePositionBias,
    ResidualNorm,
    RotaryEmbedding,
    TokenAndPositionEmbedding,
    TransformerDecoderBlock,
    TransformerEncoderBlock,
)
from keras_mha.layers.arguments import constructor_options
from keras_mha.layers.attention_layer import AttentionLayer
from tests.support.layers import (
    PADDING,
    B,
    D,
    H,
    N,
    T,
    V,
    normal,
    plain_config,
    randomize,
)

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
VOCABULARY, LONGEST, HIDDEN = 19, 11, 17
IDS = np.where(PADDING, np.random.default_rng(1).integers(1, VOCABULARY, (B, T)), 0)

# Every constructor argument but those without a default, at another value than it.
DENSE = {
    "kernel_initializer": "he_normal",
    "bias_initializer": "ones",
    "kernel_regularizer": "l2",
    "bias_regularizer": "l1",
}
ATTENTION = {
    **DENSE,
    "value_dim": V,
    "dropout": 0.3,
    "use_bias": False,
    "output_shape": (3, 5),
    "activity_regularizer": "l1",
    "kernel_constraint": "non_neg",
    "bias_constraint": "max_norm",
    "jit_compile": True,
    "seed": 7,
}
SCORES = {
    "num_key_value_heads": 1,
    "position": "alibi",
    "qk_norm": "layer",
    "logits_soft_cap": 2.0,
    "use_sinks": True,
    "use_gate": True,
    "sliding_window": 3,
    "flash_attention": False,
}
RESIDUAL = {
    "placement": "sandwich",
    "normalization": "rms",
    "dropout": 0.3,
    "stochastic_depth": 0.2,
    "layer_scale": 0.5,
    "epsilon": 0.01,
    "seed": 7,
}
BLOCK = {
    **RESIDUAL,
    **SCORES,
    "key_dim": H,
    "activation": "silu",
    "gated": True,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.2,
    "use_bias": False,
    "kernel_initializer": "he_normal",
    "kernel_regularizer": "l2",
    "jit_compile": False,
}
# Arguments that exclude each other are in separate cases of one class.
CASES: list[tuple[type[keras.layers.Layer], tuple[Any, ...], dict[str, Any]]] = [
    (MultiHeadSelfAttention, (N,), {**ATTENTION, **SCORES, "key_dim": H}),
    (
        MultiHeadSelfAttention,
        (N,),
        {"key_dim": H, "position": RelativePositionBias(N, 8), "qk_norm": "rms"},
    ),
    (MultiHeadAttention, (N, H), {**ATTENTION, **SCORES, "attention_axes": (1,)}),
    (MultiHeadAttention, (N, H), {"position": RotaryEmbedding(fraction=0.8)}),
    (
        FeedForward,
        (HIDDEN,),
        {
            **DENSE,
            "activation": "silu",
            "gated": True,
            "dropout": 0.3,
            "output_dim": 5,
            "use_bias": False,
            "seed": 7,
        },
    ),
    (ResidualNorm, (keras.layers.Dense(D),), RESIDUAL),
    (
        ResidualNorm,
        (MultiHeadSelfAttention(N, H, dropout=0.2, seed=3),),
        {"normalization": keras.layers.LayerNormalization(axis=[-1]), "rezero": True},
    ),
    (TransformerEncoderBlock, (N, HIDDEN), BLOCK),
    (
        TransformerEncoderBlock,
        (N, HIDDEN),
        {
            "key_dim": H,
            "normalization": keras.layers.RMSNormalization(axis=[-1]),
            "rezero": True,
        },
    ),
    (TransformerDecoderBlock, (N, HIDDEN), BLOCK),
    (
        TransformerDecoderBlock,
        (N, HIDDEN),
        {
            "key_dim": H,
            "cross_attention": True,
            "position": RelativePositionBias(N, 8),
            "normalization": keras.layers.RMSNormalization(axis=[-1]),
            "rezero": True,
        },
    ),
    (
        RotaryEmbedding,
        (),
        {
            "base": 500.0,
            "fraction": 0.5,
            "interleaved": True,
            "scaling": "llama3",
            "scaling_factor": 2.0,
            "original_max_length": 64,
            "low_frequency_factor": 1.0,
            "high_frequency_factor": 4.0,
        },
    ),
    (ALiBi, (N,), {}),
    (
        RelativePositionBias,
        (N,),
        {
            "num_buckets": 6,
            "max_distance": 5,
            "bidirectional": False,
            "embeddings_initializer": "he_normal",
            "embeddings_regularizer": "l2",
            "embeddings_constraint": "non_neg",
        },
    ),
    (
        TokenAndPositionEmbedding,
        (VOCABULARY, LONGEST, D),
        {"mask_zero": False, "embeddings_initializer": "he_normal"},
    ),
]
# Their head size may be left to the width of the inputs.
FREE_SIZES = MultiHeadSelfAttention, TransformerEncoderBlock, TransformerDecoderBlock
PUBLIC = [
    each
    for each in vars(keras_mha).values()
    if isinstance(each, type) and issubclass(each, keras.layers.Layer)
]
each_case = pytest.mark.parametrize(
    ("layer_class", "required", "options"),
    CASES,
    ids=[f"{case[0].__name__}-{place}" for place, case in enumerate(CASES)],
)


def arguments(layer_class: type) -> tuple[str, ...]:
    """The names of the constructor's arguments."""
    if issubclass(layer_class, AttentionLayer):
        return constructor_options(layer_class)
    parameters = inspect.signature(layer_class).parameters.values()
    kinds = inspect.Parameter
    return tuple(each.name for each in parameters if each.kind != kinds.VAR_KEYWORD)


def inputs_of(layer: keras.layers.Layer) -> list[np.ndarray]:
    """Arrays that any of the layers takes, `(B, T, ...)` each."""
    if isinstance(layer, TokenAndPositionEmbedding):
        return [IDS]
    if isinstance(layer, ALiBi | RelativePositionBias):
        return [IDS - VOCABULARY // 2]
    if isinstance(layer, RotaryEmbedding):
        return [normal(B, T, N, 12)]
    inputs = normal(B, T, D)
    if isinstance(layer, MultiHeadAttention) or getattr(
        layer, "cross_attention", False
    ):
        return [inputs, normal(B, T, D, seed=1)]
    return [inputs]


def model_of(layer: keras.layers.Layer) -> keras.Model:
    """A Functional model around any of the layers, for `inputs_of(layer)`."""
    inputs = [
        keras.Input((None, *array.shape[2:]), dtype=str(array.dtype))
        for array in inputs_of(layer)
    ]
    return keras.Model(inputs, layer(*inputs))


def test_every_public_layer_and_argument_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(PUBLIC)
    for layer_class in PUBLIC:
        covered = {
            name
            for case in CASES
            if case[0] is layer_class
            for name in (
                *case[2],
                *list(arguments(layer_class))[: len(case[1])],
            )
        }
        assert covered == set(arguments(layer_class))


@each_case
def test_the_config_holds_every_argument(
    layer_class: Any, required: tuple[Any, ...], options: dict[str, Any]
) -> None:
    default = layer_class(*required).get_config()
    config = layer_class(*required, **options).get_config()
    assert set(arguments(layer_class)) <= set(config)
    for name in options:
        assert config[name] != default[name], name
    named = layer_class(*required, name="mine", trainable=False, dtype="float64")
    assert named.get_config()["name"] == "mine"
    assert named.get_config()["trainable"] is False
    assert named.get_config()["dtype"]["config"]["name"] == "float64"


@each_case
def test_a_layer_is_made_again_from_its_config(
    layer_class: Any, required: tuple[Any, ...], options: dict[str, Any]
) -> None:
    for chosen in ({}, options):
        layer = layer_class(*required, **chosen, dtype="mixed_bfloat16")
        again = layer_class.from_config(layer.get_config())
        assert plain_config(again) == plain_config(layer)


@each_case
def test_build_changes_no_argument(
    layer_class: Any, required: tuple[Any, ...], options: dict[str, Any]
) -> None:
    for given in ({}, options):
        chosen = dict(given)
        if layer_class in FREE_SIZES:
            chosen.setdefault("key_dim", None)
        layer = layer_class(*required, **chosen)
        names = [name for name in arguments(layer_class) if hasattr(layer, name)]
        config = plain_config(layer)
        attributes = {name: getattr(layer, name) for name in names}
        shapes = [array.shape for array in inputs_of(layer)]
        if chosen.get("key_dim", 1) is None:
            shapes[0] = (*shapes[0][:-1], N * H)
        layer.build(*shapes)
        assert plain_config(layer) == config
        for name, value in attributes.items():
            assert getattr(layer, name) is value, name


@each_case
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_files_bring_back_config_and_outputs(
    layer_class: Any,
    required: tuple[Any, ...],
    options: dict[str, Any],
    suffix: str,
    tmp_path: Path,
) -> None:
    layer = fresh(layer_class, required, options)
    model, inputs = model_of(layer), inputs_of(layer)
    untrained = np.asarray(model(inputs))
    randomize(model)
    expected, path = np.asarray(model(inputs)), tmp_path / f"saved{suffix}"
    has_weights = bool(layer.weights)
    assert (np.abs(expected - untrained).max() > 1e-3) == has_weights
    if suffix == ".keras":
        model.save(path)
        loaded: Any = keras.saving.load_model(path)
        assert plain_config(loaded.layers[-1]) == plain_config(layer)
    else:
        model.save_weights(path)
        loaded = model_of(fresh(layer_class, required, options))
        assert (np.abs(loaded(inputs) - expected).max() > 1e-3) == has_weights
        loaded.load_weights(path)
    np.testing.assert_array_equal(loaded(inputs), expected)
    assert type(loaded.layers[-1]) is layer_class


def fresh(
    layer_class: Any, required: tuple[Any, ...], options: dict[str, Any]
) -> keras.layers.Layer:
    """A layer of a case that shares no sublayer with other tests."""
    return layer_class.from_config(layer_class(*required, **options).get_config())


@pytest.mark.parametrize("layer_class", PUBLIC)
def test_registered_names(layer_class: Any) -> None:
    name = f"keras_mha>{layer_class.__name__}"
    assert keras.saving.get_registered_name(layer_class) == name
    assert keras.saving.get_registered_object(name) is layer_class


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
