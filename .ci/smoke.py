"""Uses an installed keras_mha as a new user would: values, training, saving, export."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_mha
import keras_mha.export

BATCH, LENGTH, WIDTH, HEADS = 3, 7, 10, 2


def check_origin() -> None:
    """Checks that this environment's package is imported, with its type marker."""
    package = Path(keras_mha.__file__).resolve().parent
    assert package.is_relative_to(Path(sys.prefix).resolve()), package
    assert (package / "py.typed").is_file()
    files = importlib.metadata.files("keras-mha") or []
    assert any(Path(file).name == "py.typed" for file in files)


def check_values(inputs: np.ndarray) -> None:
    """Checks that the layer gives Keras' numbers with Keras' weights."""
    theirs = keras.layers.MultiHeadAttention(HEADS, 5, bias_initializer="normal")
    ours = keras_mha.MultiHeadAttention(HEADS, 5)
    mask = np.random.default_rng(1).random((BATCH, LENGTH, LENGTH)) < 0.5
    mask |= np.eye(LENGTH, dtype=bool)
    expected = theirs(inputs, inputs, attention_mask=mask)
    ours.build(inputs.shape, inputs.shape)
    ours.set_weights(theirs.get_weights())
    np.testing.assert_allclose(
        ours(inputs, inputs, attention_mask=mask), expected, atol=1e-5
    )


def trained_model(inputs: np.ndarray) -> keras.Model:
    """Trains a small model for one step of `fit`; checks that its weights changed."""
    tokens = keras.Input((None, WIDTH), name="tokens")
    hidden = keras_mha.MultiHeadSelfAttention(HEADS, name="attention")(tokens)
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    outputs = keras.layers.Dense(2, activation="softmax", name="probabilities")(pooled)
    model = keras.Model(tokens, outputs)
    before = [weight.copy() for weight in model.get_weights()]
    model.compile("adam", "sparse_categorical_crossentropy")
    history = model.fit(inputs, np.arange(BATCH) % 2, batch_size=BATCH, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    changed = [
        np.any(old != new) for old, new in zip(before, model.get_weights(), strict=True)
    ]
    assert any(changed)
    return model


def check_files(model: keras.Model, inputs: np.ndarray, directory: Path) -> None:
    """Checks that the saved and the exported model give the model's probabilities."""
    expected = model.predict(inputs, verbose=0)
    model.save(directory / "model.keras")
    loaded = keras.models.load_model(directory / "model.keras")
    np.testing.assert_allclose(loaded.predict(inputs, verbose=0), expected, atol=1e-6)

    keras_mha.export.export_saved_model(
        model, directory / "saved_model", version=1, samples=inputs
    )
    served = tf.saved_model.load(directory / "saved_model" / "1")
    answer = served.signatures["serving_default"](tokens=tf.constant(inputs))
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)


def check_command() -> None:
    """Checks that the console command runs and explains itself."""
    command = Path(sys.executable).with_name("keras-mha")
    for arguments, expected in (
        (("--version",), importlib.metadata.version("keras-mha")),
        (("export", "--help"), "--to"),
    ):
        done = subprocess.run(
            [command, *arguments], check=True, capture_output=True, text=True
        )
        assert expected in done.stdout, done.stdout


def main() -> None:
    """Runs every check; the first failure ends the program."""
    keras.utils.set_random_seed(0)
    inputs = np.random.default_rng(0).normal(size=(BATCH, LENGTH, WIDTH))
    inputs = inputs.astype("float32")
    check_origin()
    check_values(inputs)
    check_command()
    with tempfile.TemporaryDirectory() as directory:
        check_files(trained_model(inputs), inputs, Path(directory))
    print(f"keras-mha {importlib.metadata.version('keras-mha')}: smoke test passed")


if __name__ == "__main__":
    main()
