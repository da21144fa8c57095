"""`model.tflite` beside `saved_model.pb`, and the note for GPUs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mha
from keras_mha.export import ParityError, export_saved_model
from keras_mha.export.saved_model import export as module
from keras_mha.export.saved_model import served_tflite
from keras_mha.export.saved_model.placement import gpu_note
from keras_mha.export.saved_model.reader import read_meta_graph
from tests.support import small_models
from tests.support.small_models import dense_model, features

NAME = served_tflite.FILE


def causal_model() -> keras.Model:
    """Ids (B, T) to probabilities (B, 2) by our layers."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = keras_mha.TokenAndPositionEmbedding(13, 17, 10)(ids)
    hidden = keras_mha.TransformerEncoderBlock(2, 7)(hidden)
    hidden = keras_mha.TransformerDecoderBlock(2, 7)(hidden)
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    head = keras.layers.Dense(2, activation="softmax", name="probabilities")
    model = small_models.randomize(keras.Model(ids, head(pooled)))
    # Else one of the probabilities would be 0 for all.
    head.kernel.assign(0.05 * np.asarray(head.kernel))
    return model


def as_tf_serving_does(path: Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Answers of a TFLite file that is asked by its tensors' names.

    The steps are those of TF Serving's `TfLiteSession`: no signature is read, tensors
    are found by name, and inputs are resized to the request.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter: Any = Interpreter(str(path), num_threads=1)
    given = {one["name"]: one["index"] for one in interpreter.get_input_details()}
    asked = {one["name"]: one["index"] for one in interpreter.get_output_details()}
    assert set(given) == set(inputs)
    for name, array in inputs.items():
        interpreter.resize_tensor_input(given[name], array.shape)
    interpreter.allocate_tensors()
    for name, array in inputs.items():
        interpreter.set_tensor(given[name], array)
    interpreter.invoke()
    return {name: interpreter.get_tensor(index) for name, index in asked.items()}


@pytest.mark.parametrize("build", [causal_model, small_models.ids_model])
def test_it_answers_any_batch_and_length_by_the_signature_s_names(
    tmp_path: Path, build: Any
) -> None:
    model = build()
    generator = np.random.default_rng(5)
    ids = generator.integers(1, 11, (5, 7)).astype("int32")
    ids[1, 3:] = ids[4, 1:] = 0
    report = export_saved_model(model, tmp_path, samples=ids, with_tflite=True)
    assert report.tflite is not None
    assert report.tflite.name == "serving_default"
    assert report.tflite.parity.runtime == "LiteRT interpreter, CPU"
    assert report.tflite.parity.batch_sizes == (1, 5)
    assert report.tflite.parity.max_absolute_difference <= 1e-6
    path = Path(report.path, NAME)
    for shape in ((1, 7), (3, 11), (2, 1)):
        other = generator.integers(1, 11, shape).astype("int32")
        answer = as_tf_serving_does(path, ids=other)
        signature = tf.saved_model.load(report.path).signatures["serving_default"]
        wanted = signature(ids=tf.constant(other))
        assert set(answer) == set(wanted) == {"probabilities"}
        np.testing.assert_allclose(
            answer["probabilities"], wanted["probabilities"], atol=1e-6
        )
    # Else equal answers would say little.
    assert np.ptp(model(ids), axis=0).max() > 0.01


def test_several_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
    one = keras.Input((3,), name="one")
    other = keras.Input((2,), name="other")
    joined = keras.layers.Concatenate()([one, other])
    outputs = {
        "z": keras.layers.Dense(2)(joined),
        "a": keras.layers.Dense(2, activation="softmax")(joined),
    }
    model = small_models.randomize(keras.Model([one, other], outputs))
    x = {"one": features(), "other": features()[:, :2]}
    report = export_saved_model(model, tmp_path, samples=x, with_tflite=True)
    answer = as_tf_serving_does(Path(report.path, NAME), **x)
    wanted = model([x["one"], x["other"]])
    assert set(answer) == {"a", "z"}
    for name, value in answer.items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-6)


def test_the_converter_alone_gives_other_names(tmp_path: Path) -> None:
    """What the renaming is for: without it TF Serving would ask by other names."""
    report = export_saved_model(dense_model(), tmp_path, samples=features())
    path = tmp_path / "converted.tflite"
    path.write_bytes(
        served_tflite.convert(Path(report.path), "serving_default", None, ())
    )
    with pytest.raises(AssertionError):
        as_tf_serving_does(path, features=features())
    path.write_bytes(served_tflite.named_by_signature(path.read_bytes()))
    answer = as_tf_serving_does(path, features=features())
    np.testing.assert_allclose(
        answer["probabilities"], dense_model()(features()), atol=1e-6
    )


def test_without_asking_there_is_none(tmp_path: Path) -> None:
    report = export_saved_model(dense_model(), tmp_path, samples=features())
    assert report.tflite is None
    assert not Path(report.path, NAME).exists()
    assert "model.tflite" not in report.to_markdown()


def test_the_report_tells_of_it(tmp_path: Path) -> None:
    report = export_saved_model(
        dense_model(), tmp_path, samples=features(), with_tflite=True
    )
    assert "### signature serving_default of model.tflite" in report.to_markdown()
    assert json.loads(report.to_json())["tflite"]["parity"]["samples"] == 5
    files = [file for file in Path(report.path).rglob("*") if file.is_file()]
    assert report.size_bytes == sum(file.stat().st_size for file in files)


def test_wrong_values_are_caught_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = served_tflite.convert
    model = dense_model()
    bias = np.asarray(model.layers[-1].bias, "<f4").tobytes()

    def damaged(*arguments: Any) -> bytes:
        content = original(*arguments)
        assert content.count(bias) == 1
        return content.replace(bias, np.array([0.5, -0.5], "<f4").tobytes())

    monkeypatch.setattr(served_tflite, "convert", damaged)
    with pytest.raises(ParityError, match="in LiteRT interpreter"):
        export_saved_model(
            model, tmp_path / "out", samples=features(), with_tflite=True
        )
    assert not (tmp_path / "out").exists()


def test_an_old_version_stays_whole_where_the_file_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "old").touch()
    monkeypatch.setattr(module, "check_served_tflite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_saved_model(
            dense_model(),
            tmp_path,
            samples=features(),
            version=1,
            overwrite=True,
            with_tflite=True,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["old"]


def test_a_model_of_texts_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`with_tflite` .* strings.*\['text'\]"):
        export_saved_model(
            small_models.text_model(),
            tmp_path / "out",
            samples=small_models.TEXTS,
            with_tflite=True,
        )
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    inputs = keras.Input((3,), name="features")
    model = keras.Model(inputs, {"same": inputs, "twice": inputs + inputs})
    with pytest.raises(
        ValueError, match=r"none of whose outputs is an input.*features"
    ):
        export_saved_model(
            model, tmp_path / "out", samples=features(), with_tflite=True
        )
    assert not (tmp_path / "out").exists()


def test_operations_that_are_not_built_in_are_refused(tmp_path: Path) -> None:
    class Inverse(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            return tf.linalg.inv(inputs[:, :, None] * inputs[:, None] + tf.eye(3))

        def compute_output_spec(self, inputs: Any) -> keras.KerasTensor:
            return keras.KerasTensor((*inputs.shape, 3), inputs.dtype)

    inputs = keras.Input((3,), name="features")
    model = keras.Model(inputs, Inverse()(inputs))
    with pytest.raises(ValueError, match="not built in: .*MatrixInverse"):
        export_saved_model(
            model, tmp_path / "out", samples=features(), with_tflite=True
        )
    assert not (tmp_path / "out").exists()


def test_an_absent_runtime_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-mha\[tflite\]'"):
        export_saved_model(
            dense_model(), tmp_path / "out", samples=features(), with_tflite=True
        )


# The note for GPUs.


def test_the_note_names_what_stays_on_the_cpu(tmp_path: Path) -> None:
    dense = export_saved_model(dense_model(), tmp_path / "a", samples=features())
    assert dense.gpu_note == (
        "Not run on a GPU. The graph asks for no XLA and names no device. Of its "
        "operations these have a GPU kernel: all."
    )
    texts = export_saved_model(
        small_models.text_model(), tmp_path / "b", samples=small_models.TEXTS
    )
    assert texts.gpu_note.endswith(
        "all but FastBertNormalize, FastWordpieceTokenizeWithOffsets, "
        "RaggedTensorToTensor, which stay on the CPU."
    )
    assert texts.gpu_note in texts.to_markdown()


def test_the_note_names_devices_of_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnDevice(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            with tf.device("/GPU:1"):
                return inputs * 2.0

    inputs = keras.Input((3,), name="features")
    model = keras.Model(inputs, OnDevice()(inputs))
    endpoint, _ = module.describe(model, features())
    endpoint.write(tmp_path / "m", endpoint.inputs)
    meta_graph = read_meta_graph(tmp_path / "m")
    assert "names the devices /device:GPU:1." in gpu_note(meta_graph, "serving_default")
    monkeypatch.setattr(tf.test, "is_built_with_gpu_support", lambda: False)
    note = gpu_note(meta_graph, "serving_default")
    assert note.endswith("have a GPU kernel this TensorFlow cannot say.")
