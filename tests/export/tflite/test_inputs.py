"""Files of models that take something else than one input of ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

import keras_mha
from keras_mha.export import ParityError, export_tflite
from keras_mha.export.device.form import FORMS
from keras_mha.export.device.layers import Swap
from keras_mha.export.endpoint import describe
from keras_mha.export.tflite.inputs import even_rows, fix_inputs
from keras_mha.export.tflite.lint import lint_tflite
from tests.support.layers import randomize

layers, ops = keras.layers, keras.ops
RNG = np.random.default_rng(29)


def floats(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype("float32")


def ids(vocabulary: int, *shape: int) -> np.ndarray:
    return RNG.integers(2, vocabulary, shape).astype("int32")


def head(x: Any) -> Any:
    return layers.Dense(3, name="scores")(layers.GlobalAveragePooling1D()(x))


def run(report: Any, **case: np.ndarray) -> dict[str, np.ndarray]:
    runner = Interpreter(model_path=report.files[0].path).get_signature_runner()
    return runner(**case)


class ClassToken(layers.Layer):
    """A row of weights before those of the input; made of no other layer."""

    def build(self, shape: Any) -> None:
        self.row = self.add_weight(shape=(1, 1, shape[-1]), name="row")

    def call(self, inputs: Any) -> Any:
        sizes = (ops.shape(inputs)[0], 1, inputs.shape[-1])
        return ops.concatenate([ops.broadcast_to(self.row, sizes), inputs], axis=1)


def series() -> tuple[keras.Model, np.ndarray]:
    given = keras.Input((None, 3), name="series")
    x = layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[2.0, 3.0, 5.0])(given)
    x = layers.Conv1D(6, 3, padding="causal", activation="relu")(x)
    x = layers.MaxPooling1D(2)(x)
    return randomize(
        keras.Model(given, head(keras_mha.MultiHeadAttention(2, 5)(x, x)))
    ), floats(5, 11, 3)


def image() -> tuple[keras.Model, np.ndarray]:
    given = keras.Input((8, 12, 3), name="image")
    x = layers.Conv2D(10, 4, strides=4)(layers.Rescaling(0.7, 0.1)(given))
    x = layers.GroupNormalization(5)(x)
    x = ClassToken()(layers.Reshape((-1, 10))(x))
    x = keras_mha.TransformerEncoderBlock(2, 17, normalization="rms")(x)
    return randomize(keras.Model(given, layers.Dense(3, name="scores")(x[:, 0]))), (
        floats(5, 8, 12, 3)
    )


def table() -> tuple[keras.Model, dict[str, np.ndarray]]:
    numbers = keras.Input((5,), name="numbers")
    kind = keras.Input((1,), dtype="int64", name="kind")
    x = layers.Dense(6)(layers.BatchNormalization()(numbers)[:, :, None])
    x = ops.concatenate([layers.Embedding(7, 6)(kind), x], axis=1)
    x = keras_mha.TransformerEncoderBlock(2, 13)(x)
    model = keras.Model({"kind": kind, "numbers": numbers}, {"scores": head(x)})
    return randomize(model), {"numbers": floats(5, 5), "kind": ids(7, 5, 1)}


@pytest.mark.parametrize("target", ["cpu", "gpu"])
@pytest.mark.parametrize("make", [series, image, table])
@pytest.mark.filterwarnings("ignore:.*ClassToken.*no device form")
def test_series_images_and_tables(tmp_path: Path, make: Any, target: Any) -> None:
    model, samples = make()
    report = export_tflite(model, tmp_path, samples=samples, target=target)
    (file,) = report.files
    assert Path(file.path).name == "model.tflite"
    assert (file.kind, file.sequence_length, file.batch_size) == ("tensors", None, 1)
    assert file.parity.drawn > 0
    assert lint_tflite(file.path, target) == ()
    named = samples if isinstance(samples, dict) else {model.inputs[0].name: samples}
    types = {"numbers": "float32", "kind": "int32"}
    assert {one.name: (one.dtype, one.shape) for one in file.inputs} == {
        name: (types.get(name, "float32"), (1, *array.shape[1:]))
        for name, array in named.items()
    }
    entry = json.loads((tmp_path / "manifest.json").read_text("utf-8"))["files"]
    assert {one["name"] for one in entry["model.tflite"]["inputs"]} == set(named)
    kotlin = (tmp_path / "snippets" / "litert.kt").read_text("utf-8")
    assert all(f'"{name}" to ' in kotlin for name in named)

    other = {name: array[:1][..., ::-1].copy() for name, array in named.items()}
    typed = {name: x.astype(types.get(name, "float32")) for name, x in other.items()}
    wanted = model(other if isinstance(samples, dict) else next(iter(other.values())))
    wanted = wanted["scores"] if isinstance(wanted, dict) else wanted
    np.testing.assert_allclose(run(report, **typed)["scores"], wanted, atol=1e-5)


@pytest.mark.parametrize("quantization", ["float16", "dynamic_int8", "int8_dense"])
def test_quantized_from_the_samples(tmp_path: Path, quantization: Any) -> None:
    given = keras.Input((11, 32), name="series")
    x = keras_mha.TransformerEncoderBlock(2, 127)(layers.Dense(64)(given))
    probabilities = layers.Dense(3, activation="softmax", name="p")
    model = keras.Model(given, probabilities(layers.GlobalAveragePooling1D()(x)))
    samples = floats(31, 11, 32)
    plain = export_tflite(model, tmp_path / "float", samples=samples)
    (file,) = export_tflite(
        model, tmp_path, samples=samples, quantization=quantization
    ).files
    assert file.size_bytes < 0.6 * plain.files[0].size_bytes
    assert 1e-6 < file.parity.max_absolute_difference < file.parity.tolerance


def masked(padding: int, table_id: bool = False) -> keras.Model:
    """Its highest values come from all positions, so what stands in padding shows."""
    given = keras.Input((None,), dtype=None if table_id else "int32", name="ids")
    x = layers.Embedding(23, 8)(given)
    mask = ops.not_equal(given, padding)
    x = keras_mha.TransformerEncoderBlock(2, 17)(x, mask=mask)
    model = keras.Model(given, layers.Dense(3, name="p")(ops.max(x, axis=1)))
    return randomize(model)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_padding_is_what_the_mask_says(tmp_path: Path, target: Any) -> None:
    model = masked(1)
    report = export_tflite(
        model, tmp_path, sequence_lengths=(13,), samples=ids(23, 5, 9), target=target
    )
    rows = ids(23, 1, 13)
    rows[0, 4:] = 1
    np.testing.assert_allclose(run(report, ids=rows)["p"], model(rows), atol=1e-5)
    assert not {"NOT_EQUAL", "SELECT_V2"} & set(report.files[0].operators)


def test_shorter_rows_are_filled_up_with_what_the_model_calls_padding() -> None:
    model = masked(1)
    assert even_rows(model, [[3, 4], [5, 6, 7]]) == [[3, 4, 1], [5, 6, 7]]
    endpoint, arrays = describe(model, [[3, 4, 5]])
    (fixed,) = fix_inputs(
        endpoint, arrays, None, lengths=(5,), shapes=None, batch_size=None
    )
    np.testing.assert_array_equal(fixed.ids, [[3, 4, 5, 1, 1]])


def test_ids_that_keras_calls_float32(tmp_path: Path) -> None:
    model = masked(0, table_id=True)
    report = export_tflite(model, tmp_path, samples=[[3, 4], [5, 6, 7]])
    (file,) = report.files
    assert Path(file.path).name == "model_128.tflite"
    assert [(one.dtype, one.shape) for one in file.inputs] == [("int32", (1, 128))]
    rows = np.pad(ids(23, 1, 9), ((0, 0), (0, 119)))
    np.testing.assert_allclose(run(report, ids=rows)["p"], model(rows), atol=1e-5)


def translation() -> keras.Model:
    source, target = (
        keras.Input((None,), dtype="int32", name=name) for name in ("source", "target")
    )
    embedding = layers.Embedding(23, 8, mask_zero=True)
    memory = keras_mha.TransformerEncoderBlock(2, 17)(embedding(source))
    decoder = keras_mha.TransformerDecoderBlock(2, 17, cross_attention=True)
    x = decoder(embedding(target), memory=memory)
    model = keras.Model([source, target], layers.Dense(23, name="logits")(x))
    return randomize(model)


@pytest.mark.parametrize(
    ("arguments", "name", "shapes"),
    [
        ({"batch_size": 3}, "model.tflite", [(3, 7), (3, 5)]),
        ({"sequence_lengths": (11,)}, "model_11.tflite", [(1, 11), (1, 11)]),
        ({"shapes": {"source": (2, 13)}}, "model.tflite", [(2, 13), (2, 5)]),
    ],
)
def test_sizes_of_two_inputs(
    tmp_path: Path, arguments: Any, name: str, shapes: list[tuple[int, int]]
) -> None:
    model = translation()
    samples = [ids(23, 5, 7), ids(23, 5, 5)]
    report = export_tflite(model, tmp_path, samples=samples, **arguments)
    (file,) = report.files
    assert Path(file.path).name == name
    assert [one.shape for one in file.inputs] == shapes
    rows = [np.pad(ids(23, B, 4), ((0, 0), (0, S - 4))) for B, S in shapes]
    logits = run(report, source=rows[0], target=rows[1])["logits"]
    np.testing.assert_allclose(logits, model(rows), atol=1e-4)


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    model, samples = series()
    arguments: dict[str, Any] = {"samples": samples}
    with pytest.raises(ValueError, match=r"'series' must have the shape \(None, 13, 3"):
        export_tflite(model, tmp_path, shapes={"series": (1, 13, 3)}, **arguments)
    with pytest.raises(ValueError, match=r"that fit \(None, None, 3\).*\(1, 11, 5\)"):
        export_tflite(model, tmp_path, shapes={"series": (1, 11, 5)}, **arguments)
    fixed, samples = image()
    with pytest.raises(ValueError, match="`sequence_lengths` is for a model with an"):
        export_tflite(fixed, tmp_path, sequence_lengths=(13,), samples=samples)


def test_a_file_that_is_right_on_the_samples_only_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Table(layers.Embedding):
        """Its form takes padding for the id 1."""

        def call(self, inputs: Any) -> Any:
            return super().call(inputs)

    def form(layer: Any) -> list[Swap]:
        return [Swap(layer, "call", lambda x: Table.call(layer, ops.maximum(x, 1)))]

    monkeypatch.setitem(FORMS, Table, form)
    given = keras.Input((None,), dtype="int32", name="ids")
    x = Table(23, 8, mask_zero=True)(given)
    x = keras_mha.TransformerEncoderBlock(2, 17)(x)
    model = randomize(keras.Model(given, layers.Dense(3, name="p")(x)))
    with pytest.raises(ParityError, match="'p'"):  # no sample is padded
        export_tflite(model, tmp_path, sequence_lengths=(7,), samples=ids(23, 5, 7))


def test_rows_that_depend_on_each_other(tmp_path: Path) -> None:
    left, right = keras.Input((5,), name="left"), keras.Input((5,), name="right")
    dense = layers.Dense(4)
    logits = ops.matmul(dense(left), ops.transpose(dense(right)))
    model = keras.Model([left, right], logits)
    report = export_tflite(
        model, tmp_path, batch_size=3, samples=[floats(7, 5), floats(7, 5)]
    )
    assert report.files[0].outputs[0].shape == (3, 3)


def test_a_recurrent_model(tmp_path: Path) -> None:
    given = keras.Input((None,), dtype="int32", name="ids")
    x = layers.Embedding(23, 5, mask_zero=True)(given)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    model = randomize(
        keras.Model(given, head(keras_mha.MultiHeadAttention(2, 4)(x, x)))
    )
    report = export_tflite(
        model, tmp_path, sequence_lengths=(7,), samples=ids(23, 5, 7)
    )
    rows = np.array([[5, 9, 3, 0, 0, 0, 0]], "int32")
    np.testing.assert_allclose(run(report, ids=rows)["scores"], model(rows), atol=1e-5)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_images_of_bytes(tmp_path: Path, target: Any) -> None:
    given = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(6, 4, strides=4)(layers.Rescaling(1 / 255)(given))
    model = randomize(keras.Model(given, head(layers.Reshape((4, 6))(x))))
    images = RNG.integers(0, 256, (5, 8, 8, 3))
    report = export_tflite(
        model, tmp_path, samples=images, uint8_inputs=["image"], target=target
    )
    assert report.files[0].inputs[0].dtype == "uint8"
    other = RNG.integers(0, 256, (1, 8, 8, 3)).astype("uint8")
    np.testing.assert_allclose(
        run(report, image=other)["scores"], model(other), atol=1e-5
    )


def test_inputs_that_are_no_bytes(tmp_path: Path) -> None:
    given = keras.Input((3,), name="x")
    model = keras.Model(given, layers.Dense(2)(given))
    for names, samples, text in (
        (["y"], floats(5, 3), r"some of the model's inputs \['x'\]"),
        ("x", floats(5, 3), "must be a list"),
        (["x"], floats(5, 3), "whole numbers from 0 to 255"),
        (["x"], np.full((5, 3), 256), "from 256 to 256"),
    ):
        with pytest.raises(ValueError, match=text):
            export_tflite(model, tmp_path, samples=samples, uint8_inputs=names)


class Router(layers.Layer):
    """Chooses an expert for each position; made of no other layer."""

    def call(self, inputs: Any) -> Any:
        return ops.one_hot(ops.argmax(inputs, axis=-1), inputs.shape[-1])


@pytest.mark.filterwarnings("ignore:.*Router.*no device form")
def test_choices_by_argmax(tmp_path: Path) -> None:
    given = keras.Input((3,), name="x")
    model = keras.Model(given, layers.Identity(name="y")(Router()(given)))
    report = export_tflite(model, tmp_path, samples=floats(5, 3))
    rows = np.array([[-0.0, -1.0, 0.0], [2.0, 2.0, 1.0], [-3.0, -2.0, -2.0]], "float32")
    for row in rows:
        np.testing.assert_array_equal(run(report, x=row[None])["y"], model(row[None]))


@pytest.mark.parametrize("name", ["a[1]", "b\\c", "d*?"])
def test_directories_of_any_name(tmp_path: Path, name: str) -> None:
    given = keras.Input((3,), name="x")
    model = keras.Model(given, layers.Dense(2, name="y")(given))
    report = export_tflite(model, tmp_path / name, samples=floats(5, 3))
    assert Path(report.files[0].path) == tmp_path / name / "model.tflite"
