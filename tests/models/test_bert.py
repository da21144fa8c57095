from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha import pack_sequences, unpack_sequences
from keras_mha.convert import save_bert
from keras_mha.export import export_saved_model, export_tflite
from keras_mha.models import BertEncoder

V, LONGEST, D, N, F, B, T = 31, 13, 15, 3, 17, 5, 11
SIZES = {
    "vocabulary_size": V,
    "sequence_length": LONGEST,
    "embedding_dim": D,
    "num_layers": 2,
    "num_heads": N,
    "hidden_dim": F,
}
IDS = np.random.default_rng(7).integers(1, V, (B, T))
LENGTHS = np.array([11, 2, 7, 3, 1])
MASK = np.arange(T) < LENGTHS[:, None]
IDS = np.where(MASK, IDS, 0)
INPUTS = {"input_ids": IDS, "attention_mask": MASK.astype("int32")}


def made(**options: Any) -> BertEncoder:
    encoder = BertEncoder(**{**SIZES, "kernel_initializer": "he_normal", **options})
    encoder.build()
    generator = np.random.default_rng(3)
    for weight in encoder.weights:
        if "bias" in weight.path or "beta" in weight.path:
            weight.assign(generator.normal(size=weight.shape))
    return encoder


def test_it_is_a_model_of_our_blocks() -> None:
    encoder = made()
    kinds = {type(layer).__name__ for layer in encoder.layers}
    assert kinds == {
        "TokenAndPositionEmbedding",
        "Embedding",
        "LayerNormalization",
        "Dropout",
        "TransformerEncoderBlock",
    }
    assert [block.name for block in encoder.blocks] == ["block_0", "block_1"]


@pytest.mark.parametrize("pooler", [True, False])
def test_saved_and_loaded(tmp_path: Path, pooler: bool) -> None:
    encoder = made(pooler=pooler, num_token_types=3, activation="relu", epsilon=0.01)
    inputs = {**INPUTS, "token_type_ids": IDS % 3}
    expected = encoder(inputs)
    encoder.save(tmp_path / "encoder.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "encoder.keras")
    for found, wanted in zip(
        keras.tree.flatten(loaded(inputs)), keras.tree.flatten(expected), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_config_has_every_argument() -> None:
    options = {
        **SIZES,
        "num_token_types": 3,
        "activation": "relu",
        "dropout": 0.2,
        "attention_dropout": 0.3,
        "epsilon": 0.01,
        "pooler": True,
        "kernel_initializer": "he_normal",
        "seed": 7,
        "key_dim": 7,
    }
    names = {*inspect.signature(BertEncoder.__init__).parameters} - {"self", "kwargs"}
    assert names == {*options}
    config = BertEncoder(**options, dtype="mixed_bfloat16", name="one").get_config()
    assert names <= {*config}
    again = BertEncoder.from_config(config)
    assert again.get_config() == config
    assert (again.name, again.compute_dtype) == ("one", "bfloat16")
    for name in {*options} - {"activation", "kernel_initializer"}:
        assert getattr(again, name) == options[name], name


@pytest.mark.parametrize("heads", [[5, 2], (np.int64(5), np.int32(2))])
def test_heads_of_each_block_are_saved_and_loaded(tmp_path: Path, heads: Any) -> None:
    encoder = made(num_heads=heads, key_dim=np.int64(7), pooler=True)
    layers = [block.attention.sublayer for block in encoder.blocks]
    assert [(layer.num_heads, layer.key_dim) for layer in layers] == [(5, 7), (2, 7)]
    assert encoder.num_heads == (5, 2)
    assert json.loads(json.dumps(encoder.get_config())) == encoder.get_config()
    encoder.save(tmp_path / "encoder.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "encoder.keras")
    assert loaded.get_config() == encoder.get_config()
    for found, wanted in zip(loaded(INPUTS), encoder(INPUTS), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_the_default_size_of_heads_is_an_equal_part() -> None:
    assert made().key_dim == D // N
    given = made(key_dim=D // N)
    assert [w.shape for w in given.weights] == [w.shape for w in made().weights]
    # As configurations were before there was `key_dim`.
    config = given.get_config()
    older = {name: value for name, value in config.items() if name != "key_dim"}
    assert BertEncoder.from_config(older).get_config() == config


def test_padding_changes_nothing() -> None:
    encoder = made()
    garbage = {**INPUTS, "input_ids": np.where(MASK, IDS, 5)}
    outputs = np.asarray(encoder(INPUTS))
    np.testing.assert_allclose(outputs[MASK], np.asarray(encoder(garbage))[MASK])
    for row, length in enumerate(LENGTHS):
        alone = {name: array[row : row + 1, :length] for name, array in INPUTS.items()}
        found = np.asarray(encoder(alone))[0]
        np.testing.assert_allclose(outputs[row, :length], found, atol=1e-5)


def test_outputs_carry_the_mask() -> None:
    encoder = made(pooler=True)
    outputs, _ = encoder(INPUTS)
    pooled = keras.layers.GlobalAveragePooling1D()(outputs)
    expected = [
        np.asarray(row)[:n].mean(0) for row, n in zip(outputs, LENGTHS, strict=True)
    ]
    np.testing.assert_allclose(pooled, expected, atol=1e-5)


def test_token_types_count_and_default_to_zero() -> None:
    encoder = made()
    zeros = encoder({**INPUTS, "token_type_ids": np.zeros_like(IDS)})
    ones = encoder({**INPUTS, "token_type_ids": np.ones_like(IDS)})
    np.testing.assert_allclose(encoder(INPUTS), zeros, atol=1e-6)
    assert not np.allclose(zeros, ones, atol=1e-2)


def test_packed_rows_give_the_same() -> None:
    encoder = made()
    rows = [row[:n] for row, n in zip(IDS, LENGTHS, strict=True)]
    packed = pack_sequences(rows, row_length=LONGEST)
    assert packed.values.shape[0] < B
    inputs = {"input_ids": packed.values, "positions": packed.positions}
    outputs = encoder({**inputs, "packed_segment_ids": packed.segment_ids})
    found = np.asarray(unpack_sequences(outputs, packed.index))
    expected = np.asarray(encoder(INPUTS))
    np.testing.assert_allclose(
        found[MASK[:, : found.shape[1]]], expected[MASK], atol=1e-5
    )
    with pytest.warns(DeprecationWarning, match="is now 'packed_segment_ids'"):
        old = encoder({**inputs, "segment_ids": packed.segment_ids})
    np.testing.assert_array_equal(old, outputs)
    assert old._keras_mask is not None


def test_dropout_by_seed() -> None:
    first, twin, other = (made(seed=seed, dropout=0.3) for seed in (1, 1, 2))
    for encoder in (twin, other):
        encoder.set_weights(first.get_weights())
    outputs = np.asarray(first(INPUTS, training=True))
    np.testing.assert_array_equal(outputs, twin(INPUTS, training=True))
    assert not np.allclose(outputs, other(INPUTS, training=True), atol=1e-2)
    np.testing.assert_array_equal(first(INPUTS), other(INPUTS))


def scoring_model(encoder: BertEncoder) -> keras.Model:
    """Ids `(B, T)`, 0 at padding, to one number."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    mask = keras.ops.not_equal(ids, 0)
    outputs = encoder({"input_ids": ids, "attention_mask": mask})
    pooled = keras.layers.GlobalAveragePooling1D()(outputs)
    return keras.Model(ids, keras.layers.Dense(1, name="score")(pooled))


def test_options_of_the_blocks_are_handed_on(tmp_path: Path) -> None:
    encoder = made(position="rotary", key_dim=6, qk_norm="rms", gated=True, dropout=0.0)
    attention = encoder.blocks[1].attention.sublayer
    network = encoder.blocks[1].feed_forward.sublayer
    assert (attention.get_config()["qk_norm"], network.gated) == ("rms", True)
    assert encoder.block_options == ["gated", "position", "qk_norm"]
    encoder.save(tmp_path / "encoder.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "encoder.keras")
    np.testing.assert_array_equal(loaded(INPUTS), encoder(INPUTS))
    with pytest.raises(ValueError, match=r"beyond BERT's.*gated, position, qk_norm"):
        save_bert(encoder, tmp_path / "files")
    with pytest.raises(ValueError, match="placement"):
        made(placement="pre")


def test_the_dropout_of_embeddings_is_the_same_in_xla() -> None:
    encoder = made(seed=3, dropout=0.4)
    inputs = tf.ones((2, 5, D))

    def call() -> np.ndarray:
        state = np.array([3, 0], "uint32")
        encoder.embedding_dropout.seed_generator.state.assign(state)
        function = tf.function(
            lambda: encoder.embedding_dropout(inputs, training=True),
            jit_compile=compiled,
        )
        return np.asarray(function())

    compiled = False
    graph = call()
    compiled = True
    np.testing.assert_array_equal(call(), graph)
    assert set(np.unique(graph)) == {0.0, np.float32(1 / 0.6)}


def test_every_weight_is_trained() -> None:
    encoder = made(dropout=0.0, attention_dropout=0.0)
    model = scoring_model(encoder)
    before = [np.asarray(weight) for weight in encoder.trainable_weights]
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(IDS, np.arange(float(B)), epochs=1, verbose=0)
    for weight, old in zip(encoder.trainable_weights, before, strict=True):
        # The keys' biases have no gradient: they add the same to all of a query's
        # scores. Here they share one weight with the other two.
        assert not np.allclose(weight, old, atol=1e-7), weight.path


def test_exports(tmp_path: Path) -> None:
    model = scoring_model(made())
    samples = IDS.astype("int32")
    served = export_saved_model(model, tmp_path / "served", samples=samples, version=1)
    lite = export_tflite(
        model, tmp_path / "lite", sequence_lengths=(T,), samples=samples
    )
    # Each loads what it wrote and raises where a value differs from the model's.
    assert Path(served.path).is_dir()
    assert [Path(file.path).name for file in lite.files] == [f"model_{T}.tflite"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_heads": 4},
            "`key_dim` is needed .* multiple of `num_heads`. Received: "
            "key_dim=None, embedding_dim=15 and num_heads=4",
        ),
        (
            {"num_heads": [3, 3]},
            r"`key_dim` is needed where `num_heads` is a sequence.*=\(3, 3\)",
        ),
        ({"key_dim": 0}, "`key_dim`.*a positive integer.*key_dim=0"),
        ({"key_dim": 5.0}, "`key_dim`.*a positive integer.*key_dim=5.0"),
        (
            {"num_heads": 0},
            "`num_heads` must be a positive integer, or a sequence of `num_layers` "
            "of them. Received: num_heads=0",
        ),
        ({"num_heads": 3.0}, "`num_heads` must be .*num_heads=3.0"),
        ({"num_heads": True}, "`num_heads` must be .*num_heads=True"),
        ({"num_heads": "33"}, "`num_heads` must be .*num_heads='33'"),
        ({"num_heads": b"33", "key_dim": 5}, "`num_heads` must be .*num_heads=b'33'"),
        ({"num_heads": (3, 0), "key_dim": 5}, r"`num_heads` .*num_heads=\(3, 0\)"),
        ({"num_heads": (3, 1.0), "key_dim": 5}, r"`num_heads` .*\(3, 1.0\)"),
        ({"num_heads": [], "key_dim": 5}, r"`num_heads` must be .*num_heads=\[\]"),
        (
            {"num_heads": [3, 2, 5], "key_dim": 5},
            r"`num_layers` of them. Received: num_heads=\[3, 2, 5\] and num_layers=2",
        ),
        ({"dropout": 1.0}, "`dropout` must be"),
        ({"attention_dropout": -1}, "`attention_dropout` must be"),
        ({"num_layers": 0}, "`num_layers`.*num_layers=0"),
        ({"num_token_types": 1.5}, "`num_token_types`.*1.5"),
        ({"epsilon": 0}, "`epsilon` must be"),
        ({"pooler": "yes"}, "`pooler` must be True or False"),
        ({"seed": "a"}, "`seed` must be an integer"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BertEncoder(**{**SIZES, **options})


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (IDS, TypeError, "`inputs` must be a dictionary"),
        (
            {"input_ids": IDS},
            ValueError,
            "'attention_mask' or 'packed_segment_ids'.*input_id",
        ),
        ({"attention_mask": IDS}, ValueError, "must have 'input_ids'"),
        ({**INPUTS, "mask": IDS}, ValueError, r"no other names.*Received: \['mask'\]"),
        ({**INPUTS, "packed_segment_ids": IDS}, ValueError, "not both"),
        (
            {name: np.ones((2, LONGEST + 1), "int32") for name in INPUTS},
            ValueError,
            "longer than `sequence_length`",
        ),
    ],
)
def test_wrong_inputs(inputs: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        made()(inputs)
