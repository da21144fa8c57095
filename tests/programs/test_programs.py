"""Every program, through every door: swapped, converted, saved, and exported.

Each is compared by value on inputs that were no samples. `make test-programs` runs them
and writes what cannot go, with the reason, into `docs/programs.md`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mha
from keras_mha.convert import from_keras
from keras_mha.export import export_onnx, export_saved_model, export_tflite
from keras_mha.export.report import TensorInfo
from tests.programs import tables, text, vision
from tests.programs.program import Program, our_attention

PROGRAMS = (*text.PROGRAMS, *vision.PROGRAMS, *tables.PROGRAMS)
# Largest differences of outputs and gradients, which are of the size of one.
TOLERANCE = 1e-5
# The same of files whose weights are int8.
ROUNDED = 0.1

pytestmark = [
    pytest.mark.programs,
    # Users' programs warn: of masks that a layer drops, for one.
    pytest.mark.filterwarnings("default"),
]
each = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)


def _stock(program: Program) -> keras.Model:
    """Builds the program on Keras' layer, with random biases."""
    keras.utils.set_random_seed(7)
    model = program.build()
    rng = np.random.default_rng(1)
    for weight in model.trainable_variables:
        if weight.path.split("/")[-1] in ("bias", "beta"):
            weight.assign(rng.normal(size=weight.shape, scale=0.3))
    return model


def _ours(program: Program) -> keras.Model:
    """Builds the program on our layer, with the weights of the other."""
    keras.utils.set_random_seed(7)
    with our_attention():
        model = program.build()
    model.set_weights(_stock(program).get_weights())
    return model


def _draw(program: Program, seed: int, rows: int = 3) -> Any:
    return program.inputs(np.random.default_rng(seed), rows)


def _flat(outputs: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in keras.tree.flatten(outputs)]


def _answer(model: keras.Model, inputs: Any) -> Any:
    # Layers that augment images do so unless told otherwise.
    return model(inputs, training=False)


def _as_tensors(inputs: Any) -> Any:
    return keras.tree.map_structure(tf.constant, inputs)


def _check_same(one: Any, other: Any, tolerance: float = TOLERANCE) -> None:
    one, other = _flat(one), _flat(other)
    assert len(one) == len(other)
    for x, y in zip(one, other, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def _without_padding(program: Program, inputs: Any) -> Any:
    """Fills padding with an id where Keras' answers would depend on it."""
    if not (program.leaks or program.pads_outputs):
        return inputs
    return keras.tree.map_structure(lambda x: np.where(x == 0, 1, x), inputs)


def _gradients(model: keras.Model, inputs: Any) -> list[np.ndarray]:
    with tf.GradientTape() as tape:
        outputs = keras.tree.flatten(model(inputs, training=False))
        loss = sum(tf.reduce_mean(tf.square(x)) for x in outputs)
    found = tape.gradient(loss, model.trainable_variables)
    return [
        np.zeros(1) if x is None else np.asarray(tf.convert_to_tensor(x)) for x in found
    ]


@each
def test_swap_and_fit(program: Program) -> None:
    stock, ours = _stock(program), _ours(program)
    inputs = _without_padding(program, _draw(program, 2, 6))
    tensors = _as_tensors(inputs)
    _check_same(_answer(ours, tensors), _answer(stock, tensors))
    for one, other in zip(
        _gradients(ours, tensors), _gradients(stock, tensors), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    before = ours.get_weights()
    ours.compile("adam", **program.compile)
    targets = program.targets and program.targets(np.random.default_rng(3), 6)
    history = ours.fit(tensors, targets, epochs=2, batch_size=3, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    moved = [
        np.abs(x - y).max()
        for x, y in zip(before, ours.get_weights(), strict=True)
        if x.size and x.dtype.kind == "f"
    ]
    assert sum(m > 0 for m in moved) > len(moved) / 2


@each
def test_from_keras(program: Program) -> None:
    stock = _stock(program)
    samples, inputs = _draw(program, 4), _as_tensors(_draw(program, 5, 7))
    expected = _answer(stock, inputs)
    as_keras = from_keras(stock, samples=samples, masks="as_keras")
    _check_same(_answer(as_keras, inputs), expected)
    expectation = (
        pytest.warns(UserWarning, match="padd")
        if program.leaks
        else contextlib.nullcontext()
    )
    with expectation:
        mended = from_keras(stock, samples=samples)
    held = [type(layer) for layer in mended._flatten_layers()]
    assert keras_mha.MultiHeadAttention in held
    assert keras.layers.MultiHeadAttention not in held
    if program.leaks or program.pads_outputs:
        filled = _as_tensors(_without_padding(program, _draw(program, 5, 7)))
        _check_same(_answer(mended, filled), _answer(stock, filled))
    else:
        _check_same(_answer(mended, inputs), expected)
    _check_same(_answer(stock, inputs), expected)


@each
def test_save_and_load(program: Program, tmp_path: Path) -> None:
    model, inputs = _ours(program), _as_tensors(_draw(program, 6))
    expected = _answer(model, inputs)
    model.save_weights(tmp_path / "model.weights.h5")
    with our_attention():
        other = program.build()
    other.load_weights(tmp_path / "model.weights.h5")
    if not program.holds_constants:
        _check_same(_answer(other, inputs), expected)
    if program.loads:
        model.save(tmp_path / "model.keras")
        with our_attention():
            loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
        _check_same(_answer(loaded, inputs), expected)
        return
    with pytest.raises((TypeError, NotImplementedError)):  # noqa: PT012 (either)
        _stock(program).save(tmp_path / "stock.keras")
        keras.saving.load_model(tmp_path / "stock.keras")


@each
def test_saved_model(program: Program, tmp_path: Path) -> None:
    model = _ours(program)
    if not program.batching:
        with pytest.raises(ValueError, match="batch"):
            export_saved_model(model, tmp_path / "m", samples=_draw(program, 8))
    report = export_saved_model(
        model,
        tmp_path / "m",
        samples=_draw(program, 8),
        **({} if program.batching else {"batching": False}),
    )
    inputs = _draw(program, 9, 3 if not program.batching else 5)
    signature = tf.saved_model.load(report.path).signatures["serving_default"]
    named = _named(report.inputs, inputs)
    answers = signature(**{name: tf.constant(x) for name, x in named.items()})
    names = [x.name for x in report.outputs]
    _check_same([answers[name] for name in names], _by_name(model, inputs, names))


@each
@pytest.mark.parametrize("kind", ["float", "int8", "gpu"])
def test_tflite(
    program: Program,
    kind: str,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    model, samples = _ours(program), _draw(program, 10)
    has_free_length = any(x.shape[1:2] == (None,) for x in getattr(model, "inputs", ()))
    lengths = {"sequence_lengths": (text.LENGTH,)} if has_free_length else {}
    options: dict[str, Any] = (
        lengths
        | {
            "float": {},
            "int8": {"quantization": "dynamic_int8", "quantized_tolerance": ROUNDED},
            "gpu": {"target": "gpu"},
        }[kind]
    )
    reason = program.refused.get("tflite")
    if kind == "gpu":
        reason = reason or program.refused.get("gpu")
    if reason:
        record_property("refused", reason)
        with pytest.raises(ValueError, match=r"model|target"):
            export_tflite(model, tmp_path, samples=samples, **options)
        return
    report = export_tflite(model, tmp_path, samples=samples, **options)
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(str(report.files[0].path)).get_signature_runner()
    inputs = _draw(program, 11, 1)
    named = _named(report.files[0].inputs, inputs)
    answers = run(**named)
    names = [x.name for x in report.files[0].outputs]
    _check_same(
        [answers[name] for name in names],
        _by_name(model, inputs, names),
        ROUNDED if kind == "int8" else TOLERANCE,
    )


@each
def test_onnx(
    program: Program,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    model, samples = _ours(program), _draw(program, 12)
    path = tmp_path / "model.onnx"
    if program.refused.get("onnx"):
        record_property("refused", program.refused["onnx"])
        with pytest.raises(ValueError, match="model"):
            export_onnx(model, path, samples=samples)
        return
    report = export_onnx(model, path, samples=samples)
    import onnxruntime

    inputs = _draw(program, 13)
    session = onnxruntime.InferenceSession(str(path))
    named = _named(report.inputs, inputs)
    names = [x.name for x in report.outputs]
    answers = session.run(names, named)
    _check_same(answers, _by_name(model, inputs, names))


def _named(infos: Sequence[TensorInfo], inputs: Any) -> dict[str, np.ndarray]:
    """Names the arrays of a structure as a report does, in the types that it tells."""
    names = [info.name for info in infos]
    if isinstance(inputs, dict):
        assert set(names) == set(inputs)
    else:
        inputs = dict(zip(names, keras.tree.flatten(inputs), strict=True))
    return {
        info.name: inputs[info.name].astype(
            object if info.dtype == "string" else info.dtype
        )
        for info in infos
    }


def _by_name(model: Any, inputs: Any, names: list[str]) -> list[np.ndarray]:
    """Answers of the model in the order of the names that a report gives them."""
    outputs = _answer(model, _as_tensors(inputs))
    if not isinstance(outputs, dict):
        own = getattr(model, "output_names", names)
        outputs = dict(zip(own, keras.tree.flatten(outputs), strict=True))
    return [np.asarray(outputs[name]) for name in names]
