"""What ONNX Runtime answers for operations that are converted here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_mha.export import export_onnx
from tests.export.onnx.test_export import run

GENERATOR = np.random.default_rng(11)


class Apply(layers.Layer):
    """Applies functions, and gives a dictionary of what they give."""

    def __init__(
        self, functions: dict[str, Callable[[Any], Any]], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.functions = functions

    def call(self, x: Any) -> Any:
        return {name: apply(x) for name, apply in self.functions.items()}


def exported(
    tmp_path: Path,
    functions: dict[str, Callable[[Any], Any]],
    x: np.ndarray,
    *,
    sizes: tuple[int | None, ...] | None = None,
) -> tuple[Any, keras.Model]:
    """Runs each function on `x`, in the file and in the model."""
    given = keras.Input(sizes or x.shape[1:], dtype=x.dtype.name, name="x")
    model = keras.Model(given, Apply(functions)(given))
    path = tmp_path / "model.onnx"
    report = export_onnx(model, path, samples=x, overwrite=True)
    other = GENERATOR.permutation(x.ravel()).reshape(x.shape)
    got, wanted = run(path, x=other), model(other)
    for name in functions:
        assert np.ptp(np.asarray(wanted[name], float)) > 0
        np.testing.assert_allclose(got[name], wanted[name], atol=1e-5, err_msg=name)
    return report, model


def patches(size: tuple[int, int], stride: int, rate: int, padding: str) -> Any:
    return lambda x: tf.image.extract_patches(
        x, [1, *size, 1], [1, stride, stride, 1], [1, rate, rate, 1], padding
    )


PATCHES = {
    "apart": patches((3, 3), 3, 1, "VALID"),
    "over": patches((3, 3), 2, 1, "VALID"),
    "oblong": patches((2, 5), 3, 1, "VALID"),
    "thin": patches((3, 3), 2, 2, "VALID"),
    "same": patches((5, 5), 5, 1, "SAME"),
    "keras": lambda x: ops.image.extract_patches(x, 3),
}
RESIZES = {
    "linear": lambda x: tf.image.resize(x, (7, 5)),  # 7 / 9 of 9 rounds to below 7
    "nearest": lambda x: tf.image.resize(x, (7, 5), "nearest"),
    "larger": lambda x: tf.image.resize(x, (13, 17)),
}


def test_images_of_known_and_free_sizes(tmp_path: Path) -> None:
    x = GENERATOR.normal(size=(3, 9, 12, 2)).astype("float32")
    report, _ = exported(tmp_path, PATCHES | RESIZES, x)
    assert report.operators["SpaceToDepth"] == 1
    exported(
        tmp_path, {n: PATCHES[n] for n in ("apart", "same")}, x, sizes=(None, None, 2)
    )


def test_integers_are_cut_into_patches(tmp_path: Path) -> None:
    x = GENERATOR.integers(0, 99, (3, 6, 6, 2)).astype("int32")
    exported(tmp_path, {n: PATCHES[n] for n in ("apart", "over")}, x)


VECTORS: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda x: ops.argmax(x, -1),
    "bucketize": lambda x: ops.digitize(x, np.array([-0.5, 0.0, 0.7])),
    "expm1": tf.math.expm1,
    "log1p": lambda x: ops.log1p(ops.abs(x)),
    "scatter": lambda x: tf.scatter_nd(
        tf.range(7)[:, None] % 3, tf.transpose(x), tf.stack([3, tf.shape(x)[0]])
    ),
    "signbit": ops.signbit,
    "pairs": lambda x: tf.gather(
        x, tf.tile([[0, 3]], [tf.shape(x)[0], 1]), batch_dims=1
    ),
    "relative": lambda x: ops.take(
        ops.transpose(x), ops.arange(3)[:, None] - ops.arange(3)[None] + 2, axis=0
    ),
}


def test_vectors(tmp_path: Path) -> None:
    x = GENERATOR.normal(size=(3, 7)).astype("float32")
    exported(tmp_path, VECTORS, x)


def test_zeros_have_signs(tmp_path: Path) -> None:
    x = np.array(
        [[-0.0, 0.0, 1.0], [0.0, -0.0, -2.0], [-np.inf, -0.0, np.inf]], "float32"
    )
    given = keras.Input((3,), name="x")
    outputs = {"argmax": ops.argmax(given, -1), "signbit": ops.signbit(given)}
    model = keras.Model(given, outputs)
    export_onnx(model, tmp_path / "model.onnx", samples=x, opset=17)
    got, wanted = run(tmp_path / "model.onnx", x=x), model(x)
    for name in outputs:
        np.testing.assert_array_equal(got[name], wanted[name])


@pytest.mark.parametrize(
    ("apply", "text"),
    [
        (lambda x: tf.bitcast(x, tf.int32), r"\['Bitcast'\], in layer 'odd' \(Apply\)"),
        (ops.erfinv, r"\['Erfinv'\], in layer 'odd'"),
        (
            lambda x: x + tf.random.stateless_normal(tf.shape(x), (1, 2)),
            r"\['StatelessRandomNormalV2'\], in layer 'odd'",
        ),
        (
            lambda x: ops.scan(lambda c, y: (c + y, c), x[0], x)[1],
            r"\['TensorListReserve', .*\], in layer 'odd'",
        ),
    ],
)
def test_what_cannot_go_is_named_with_its_layer(
    tmp_path: Path, apply: Any, text: str, caplog: Any, capfd: Any
) -> None:
    given = keras.Input((3,), name="x")
    model = keras.Model(given, Apply({"y": apply}, name="odd")(given))
    with pytest.raises(ValueError, match=text):
        export_onnx(model, tmp_path / "m.onnx", samples=np.eye(3, dtype="float32") / 2)
    # tf2onnx says nothing in its own words.
    assert not [r for r in caplog.records if r.name.startswith("tf2onnx")]
    assert "tf2onnx" not in capfd.readouterr().err


def test_a_table_is_named_with_its_layer(tmp_path: Path) -> None:
    given = keras.Input((2,), dtype="int64", name="x")
    lookup = layers.IntegerLookup(vocabulary=[10, 20, 30], name="towns")
    model = keras.Model(given, layers.Embedding(6, 2)(lookup(given)))
    with pytest.raises(ValueError, match=r"without tables.*layer 'towns' \(IntegerLo"):
        export_onnx(model, tmp_path / "m.onnx", samples=np.array([[10, 20], [30, 5]]))
