"""An export changes nothing of the model that it is given, not even for a moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mha.export import export_onnx, export_saved_model, export_tflite
from tests.support import small_models

IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [5, 3, 0, 0, 0]], "int32")


def serve_ids(model: keras.Model, directory: Path) -> None:
    export_saved_model(model, directory, samples=IDS)


def serve_texts(model: keras.Model, directory: Path) -> None:
    export_saved_model(model, directory, samples=small_models.TEXTS, tokens=True)


def to_onnx(model: keras.Model, directory: Path) -> None:
    export_onnx(model, directory / "model.onnx", samples=IDS)


def to_tflite(model: keras.Model, directory: Path) -> None:
    export_tflite(model, directory, samples=IDS, sequence_lengths=(5,))


def to_tflite_texts(model: keras.Model, directory: Path) -> None:
    export_tflite(
        model, directory, samples=small_models.TEXTS, sequence_lengths=(7,), text=True
    )


@pytest.mark.parametrize(
    ("build", "export"),
    [
        (small_models.ids_model, serve_ids),
        (small_models.text_model, serve_texts),
        (small_models.ids_model, to_onnx),
        (small_models.ids_model, to_tflite),
        (small_models.text_model, to_tflite_texts),
    ],
)
def test_no_attribute_is_set_and_no_call_is_added(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[[], keras.Model],
    export: Callable[[keras.Model, Path], None],
) -> None:
    model = build()
    model.compile("sgd", "mse")
    model.make_train_function()
    model(
        np.array(small_models.TEXTS) if build is small_models.text_model else IDS
    )  # once called
    layers = list(model._flatten_layers())
    plain = keras.layers.Layer.__setattr__
    absent = object()
    changed = []

    def watch(layer: Any, name: str, value: Any) -> None:
        known = any(layer is one for one in layers)
        if known and getattr(layer, name, absent) is not value:
            changed.append((layer.name, name))
        plain(layer, name, value)

    calls = [len(layer._inbound_nodes) for layer in layers]
    monkeypatch.setattr(keras.layers.Layer, "__setattr__", watch)
    export(model, tmp_path)
    monkeypatch.undo()
    assert changed == []
    assert [len(layer._inbound_nodes) for layer in layers] == calls
