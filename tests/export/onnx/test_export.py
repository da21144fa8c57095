from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf

import keras_mha
from keras_mha.export import ParityError, VerificationError, export_onnx
from keras_mha.export.onnx import export as module
from tests.support import small_models
from tests.support.small_models import dense_model, features, ids_model

IDS = np.array(
    [[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [10, 0, 0, 0, 0], [8, 9, 7, 9, 0]], "int32"
)


def left_in(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir()) if directory.exists() else []


def run(path: str | Path, **inputs: np.ndarray) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def random_ids(rows: int, length: int, vocabulary: int = 11) -> np.ndarray:
    """Ids with 0 behind a length of its own in every row, the first one full."""
    generator = np.random.default_rng(rows * length)
    ids = generator.integers(1, vocabulary, (rows, length)).astype("int32")
    ends = generator.integers(1, length + 1, rows)
    ends[0] = length
    return np.where(np.arange(length) < ends[:, None], ids, 0).astype("int32")


def assert_same(model: keras.Model, path: str | Path, ids: np.ndarray) -> None:
    (got,) = run(path, ids=ids).values()
    wanted = np.asarray(model(ids, training=False))
    assert len(ids) == 1 or np.ptp(wanted, axis=0).max() > 0.02
    np.testing.assert_allclose(got, wanted, atol=2e-6)


def encoder(**kwargs: Any) -> keras.Model:
    """Ids (B, T) to probabilities (B, 3), of our layers, with unequal prime sizes."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = keras_mha.TokenAndPositionEmbedding(11, 23, 10)(ids)
    hidden = keras_mha.TransformerEncoderBlock(2, 13)(hidden)
    hidden = keras_mha.MultiHeadSelfAttention(2, **{"key_dim": 3, **kwargs})(hidden)
    head = keras.layers.Dense(3, activation="softmax", name="probabilities")
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    # Normalized, or one probability would be 1 whatever the ids.
    pooled = keras.layers.LayerNormalization()(pooled)
    return small_models.randomize(keras.Model(ids, head(pooled)))


# Values.


def test_values_and_report(tmp_path: Path) -> None:
    model, path = ids_model(), tmp_path / "deep" / "er" / "model.onnx"
    report = export_onnx(model, path, samples=IDS)
    assert left_in(path.parent) == ["model.onnx"]
    assert (report.path, report.opset) == (str(path), 18)
    assert report.size_bytes == path.stat().st_size
    (given,), (got,) = report.inputs, report.outputs
    assert (given.name, given.dtype, given.shape) == ("ids", "int32", (None, None))
    assert (got.name, got.dtype, got.shape) == ("probabilities", "float32", (None, 3))
    assert {"keras_mha", "keras", "tensorflow"} <= set(report.blocked)
    assert report.free_sizes == {"batch": (1, 2, 4), "ids_1": (3, 5)}
    parity = report.parity
    assert (parity.samples, parity.batch_sizes) == (4, (1, 2, 4))
    assert parity.runtime == "ONNX Runtime, CPU"
    assert parity.runtime_version == onnxruntime.__version__
    assert 0 <= parity.max_absolute_difference <= 1e-6
    for rows, length in ((1, 1), (1, 7), (5, 2), (7, 13)):
        assert_same(model, path, random_ids(rows, length))

    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    assert [(o.domain, o.version) for o in written.opset_import] == [("", 18)]
    counted = [node.op_type for node in written.graph.node]
    assert report.operators == {name: counted.count(name) for name in counted}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"jit_compile": True},
        {"position": "rotary", "key_dim": 4},
        {"position": "alibi"},
        {"position": "relative", "num_key_value_heads": 1},
        {"sliding_window": 2, "qk_norm": "rms"},
        {"use_gate": True, "use_sinks": True, "logits_soft_cap": 3.0},
    ],
    ids=lambda arguments: "-".join(arguments) or "plain",
)
def test_our_layers(tmp_path: Path, arguments: dict[str, Any]) -> None:
    model, path = encoder(**arguments), tmp_path / "model.onnx"
    report = export_onnx(model, path, samples=IDS)
    assert report.operators["LayerNormalization"] == 3
    # Choosing an implementation at run time would leave branches.
    assert not {"If", "Loop"} & set(report.operators)
    for rows, length in ((1, 1), (1, 3), (7, 13)):
        assert_same(model, path, random_ids(rows, length))


def test_cross_attention_with_masks(tmp_path: Path) -> None:
    texts = keras.Input((None, 5), name="texts")
    images = keras.Input((None, 7), name="images")
    visible = keras.Input((None,), dtype="bool", name="visible")
    mixed, scores = keras_mha.MultiHeadAttention(2, 3, name="mixed")(
        texts, images, value_mask=visible, return_attention_scores=True
    )
    model = keras.Model([texts, images, visible], {"mixed": mixed, "scores": scores})
    small_models.randomize(model)
    generator = np.random.default_rng(5)

    def inputs(rows: int, queries: int, keys: int) -> dict[str, np.ndarray]:
        shown = generator.random((rows, keys)) < 0.6
        shown[:, 0] = True
        image = generator.normal(size=(rows, keys, 7)).astype("float32")
        return {
            "texts": generator.normal(size=(rows, queries, 5)).astype("float32"),
            # Huge but finite where nobody may look.
            "images": np.where(shown[..., None], image, np.float32(100)),
            "visible": shown,
        }

    path = tmp_path / "model.onnx"
    report = export_onnx(model, path, samples=inputs(5, 3, 7))
    assert {i.name: i.dtype for i in report.inputs} == {
        "texts": "float32",
        "images": "float32",
        "visible": "bool",
    }
    assert {o.name: o.shape for o in report.outputs} == {
        "mixed": (None, None, 5),
        "scores": (None, 2, None, None),
    }
    other = inputs(2, 11, 13)
    poisoned = other | {
        "images": np.where(other["visible"][..., None], other["images"], -300)
    }
    poisoned["images"] = poisoned["images"].astype("float32")
    got, again, wanted = run(path, **other), run(path, **poisoned), model(other)
    for name in ("mixed", "scores"):
        np.testing.assert_allclose(got[name], wanted[name], atol=1e-5)
        np.testing.assert_allclose(again[name], got[name], atol=1e-5)
    assert np.all(
        got["scores"][
            ~np.broadcast_to(other["visible"][:, None, None], got["scores"].shape)
        ]
        == 0
    )


def test_what_is_not_selected_may_be_nan(tmp_path: Path) -> None:
    # tf2onnx alone multiplies with the mask, and 0 * NaN is NaN.
    inputs: Any = keras.Input((None,), name="x")
    kept = keras.ops.where(inputs > 0, inputs, keras.ops.zeros_like(inputs))
    model = keras.Model(inputs, keras.layers.Identity(name="kept")(kept))
    x = np.array([[1.0, np.nan, -3.0], [np.inf, -np.inf, 7.0]], "float32")
    export_onnx(model, tmp_path / "model.onnx", samples=x)
    got = run(tmp_path / "model.onnx", x=x)["kept"]
    np.testing.assert_array_equal(got, [[1, 0, 0], [np.inf, 0, 7]])


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    size = keras.Input((2,), name="size")
    count: Any = keras.Input((), dtype="int64", name="count")
    price = keras.layers.Dense(3, activation="gelu", name="price")(size)
    total = keras.layers.Identity(name="total")(count + 1)
    model = small_models.randomize(keras.Model([size, count], [price, total]))
    x = {"size": features(5)[:, :2], "count": np.arange(5)}
    report = export_onnx(model, tmp_path / "m.onnx", samples=x, output_names=["p", "t"])
    assert [(o.name, o.dtype) for o in report.outputs] == [
        ("p", "float32"),
        ("t", "int64"),
    ]
    got = run(tmp_path / "m.onnx", **x)
    np.testing.assert_allclose(got["p"], model(x)[0], atol=1e-6)
    assert got["t"].tolist() == [1, 2, 3, 4, 5]


class Subclassed(keras.Model):
    """Two heads over one dense layer, in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(2)

    def call(self, inputs: Any) -> Any:
        hidden = self.dense(inputs)
        return hidden, hidden


def test_a_subclassed_model(tmp_path: Path) -> None:
    model = Subclassed()
    model(features())
    small_models.randomize(model)
    report = export_onnx(model, tmp_path / "model.onnx", samples=features())
    assert [i.name for i in report.inputs] == ["inputs"]
    got = run(tmp_path / "model.onnx", inputs=features(7))
    for name in ("output_0", "output_1"):
        np.testing.assert_allclose(got[name], model(features(7))[0], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [13, 15, 17])
def test_older_opsets(tmp_path: Path, opset: int) -> None:
    model, path = encoder(), tmp_path / "model.onnx"
    report = export_onnx(model, path, samples=IDS, opset=opset)
    (entry,) = onnx.load(path).opset_import
    assert (entry.version, report.opset) == (opset, opset)
    assert report.operators.get("LayerNormalization", 0) == (3 if opset >= 17 else 0)
    assert_same(model, path, random_ids(3, 7))


def test_mixed_precision(tmp_path: Path) -> None:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = dense_model()
    finally:
        keras.config.set_dtype_policy("float32")
    report = export_onnx(
        model, tmp_path / "model.onnx", samples=features(), tolerance=1e-2
    )
    assert report.outputs[0].dtype == "float16"


# What is refused.


def test_a_perturbed_weight_is_caught_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = dense_model(), tmp_path / "model.onnx"
    path.write_bytes(b"old")
    plain = module.convert

    def convert_and_perturb(*arguments: Any) -> Any:
        converted = plain(*arguments)
        model.layers[-1].bias.assign_add([1e-3, 0.0])
        return converted

    monkeypatch.setattr(module, "convert", convert_and_perturb)
    with pytest.raises(ParityError, match="Output 'probabilities' .* differs"):
        export_onnx(model, path, samples=features(), overwrite=True)
    assert (left_in(tmp_path), path.read_bytes()) == (["model.onnx"], b"old")


def test_an_existing_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    model, path = dense_model(), tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="onnx exists; pass `overwrite=True`"):
        export_onnx(model, path, samples=features(), overwrite=False)
    with pytest.raises(ValueError, match="`overwrite` must be True or False"):
        export_onnx(
            model,
            path,
            samples=features(),
            overwrite="no",  # pyright: ignore[reportArgumentType]
        )
    assert path.read_bytes() == b"old"
    with pytest.warns(DeprecationWarning, match="exists and is replaced") as caught:
        export_onnx(model, path, samples=features())
    assert {Path(warning.filename) for warning in caught} == {Path(__file__)}
    (got,) = run(path, features=features()).values()
    np.testing.assert_allclose(got, model(features()), atol=1e-5)
    export_onnx(model, path, samples=features(), overwrite=True)
    assert left_in(tmp_path) == ["model.onnx"]


def test_a_wrong_rewrite_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fuse_with_another_epsilon(proto: Any) -> Any:
        proto = plain(proto)
        for node in proto.graph.node:
            if node.op_type == "LayerNormalization":
                for attribute in node.attribute:
                    if attribute.name == "epsilon":
                        attribute.f = 0.5
        return proto

    plain = module.rewrite
    monkeypatch.setattr(module, "rewrite", fuse_with_another_epsilon)
    with pytest.raises(ParityError, match="Output 'probabilities' .* differs"):
        export_onnx(encoder(), tmp_path / "out" / "model.onnx", samples=IDS)
    assert left_in(tmp_path) == []


def test_a_broken_file_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        graph = onnx.GraphProto()

        def SerializeToString(self, **_: Any) -> bytes:  # noqa: N802
            return b"broken"

    monkeypatch.setattr(module, "_to_proto", lambda *_: Broken())
    with pytest.raises(VerificationError, match=r"model\.onnx failed with exit status"):
        export_onnx(dense_model(), tmp_path / "out" / "model.onnx", samples=features())
    assert left_in(tmp_path) == []


def test_strings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"part of the model after.*text: string"):
        export_onnx(
            small_models.text_model(), tmp_path / "m.onnx", samples=small_models.TEXTS
        )


def test_what_onnx_has_not_is_named(tmp_path: Path) -> None:
    inputs = keras.Input((3,), name="features")

    class Bessel(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return tf.math.special.bessel_j0(x)

        def compute_output_spec(self, x: Any) -> keras.KerasTensor:
            return keras.KerasTensor(x.shape, x.dtype)

    model = keras.Model(inputs, Bessel()(inputs))
    with pytest.raises(ValueError, match=r"tf2onnx does not convert: \['BesselJ0'"):
        export_onnx(model, tmp_path / "out" / "m.onnx", samples=features())
    assert left_in(tmp_path) == []


def test_bfloat16_is_refused(tmp_path: Path) -> None:
    inputs = keras.Input((3,), name="features")
    layer = keras.layers.Dense(2, dtype="bfloat16", name="narrow")
    with pytest.raises(ValueError, match="must not compute in bfloat16.*'narrow'"):
        export_onnx(
            keras.Model(inputs, layer(inputs)), tmp_path / "m.onnx", samples=features()
        )


def test_one_name_for_input_and_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"different names.*\['features'\] for both"):
        export_onnx(
            dense_model(),
            tmp_path / "m.onnx",
            samples=features(),
            output_names=["features"],
        )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"opset": 12}, "`opset` must be an integer from 13 to 18. Received: 12"),
        ({"opset": True}, "Received: True"),
        ({"tolerance": -1.0}, "`tolerance` must be a finite number of at least 0"),
        ({"path": "model.pb"}, r"must end in \.onnx. Received: .*model\.pb"),
        ({"output_names": ["a", "b"]}, r"1 different names.*\['a', 'b'\]"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any], text: str) -> None:
    path = tmp_path / "out" / arguments.pop("path", "model.onnx")
    with pytest.raises(ValueError, match=text):
        export_onnx(dense_model(), path, samples=features(), **arguments)
    assert left_in(tmp_path) == []


def test_an_absent_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "tf2onnx" else plain(n)
    )
    with pytest.raises(ImportError, match=r"needs tf2onnx: pip install 'keras-mha\[on"):
        export_onnx(dense_model(), tmp_path / "m.onnx", samples=features())


def test_sizes_that_depend_on_each_other(tmp_path: Path) -> None:
    # Cutting both in half would break the model's own rule.
    image = keras.Input((None, None, 2), name="image")
    weights = keras.Input((None,), name="weights")

    class Weigh(keras.layers.Layer):
        def call(self, image: Any, weights: Any) -> Any:
            shape = keras.ops.shape(image)
            flat = keras.ops.reshape(image, (-1, shape[1] * shape[2], 2))
            return keras.ops.sum(flat * weights[..., None], 1)

        def compute_output_spec(self, image: Any, weights: Any) -> keras.KerasTensor:
            del weights
            return keras.KerasTensor((image.shape[0], 2))

    model = keras.Model([image, weights], Weigh(name="sum")(image, weights))
    generator = np.random.default_rng(3)
    x = {
        "image": generator.normal(size=(5, 3, 7, 2)).astype("float32"),
        "weights": generator.normal(size=(5, 21)).astype("float32"),
    }
    report = export_onnx(model, tmp_path / "model.onnx", samples=x)
    assert report.free_sizes["batch"] == (1, 5)
    assert report.free_sizes["weights_1"] == (21,)
    got = run(
        tmp_path / "model.onnx", image=x["image"][:2, :2], weights=x["weights"][:2, :14]
    )
    wanted = model([x["image"][:2, :2], x["weights"][:2, :14]])
    np.testing.assert_allclose(got["sum"], wanted, atol=1e-5)


# What layers keep, and random layers.

TABLE = np.random.default_rng(2).normal(size=(13, 11)).astype("float32") / 5


class Keeps(keras.layers.Layer):
    """Keeps constants of several kinds, small and large."""

    def __init__(self) -> None:
        super().__init__()
        self.places = tf.range(5)
        self.table = tf.constant(TABLE)
        self.shift = tf.Variable(TABLE[0])
        self.scale = keras.Variable(TABLE[1], trainable=False)
        self.embedding = keras.layers.Embedding(5, 11)

    def call(self, x: Any) -> Any:
        return (x @ self.table + self.shift) * self.scale + self.embedding(self.places)


def test_constants_that_layers_keep_or_close_over(tmp_path: Path) -> None:
    inputs: Any = keras.Input((5, 13), name="x")
    hidden = inputs + keras.layers.Embedding(5, 13)(keras.ops.arange(5))
    hidden = keras.ops.matmul(hidden, tf.constant(TABLE @ TABLE.T))
    hidden = Keeps()(hidden + TABLE[:5, :1])
    mask = keras.ops.tril(keras.ops.ones((5, 5), "bool"))
    hidden = keras_mha.MultiHeadSelfAttention(11)(hidden, attention_mask=mask)
    model = small_models.randomize(keras.Model(inputs, {"y": hidden}))
    x = np.random.default_rng(4).normal(size=(3, 5, 13)).astype("float32")
    export_onnx(model, tmp_path / "m.onnx", samples=x)
    got = run(tmp_path / "m.onnx", x=x[:2] / 2)["y"]
    np.testing.assert_allclose(got, model(x[:2] / 2)["y"], atol=1e-5)


def test_augmentation_and_random_layers_in_inference(tmp_path: Path) -> None:
    x = np.random.default_rng(4).normal(size=(4, 7, 9, 3)).astype("float32")
    normalization = keras.layers.Normalization()
    normalization.adapt(x)
    augmentation = keras.Sequential(
        [
            normalization,
            keras.layers.Resizing(6, 6),
            keras.layers.RandomFlip("horizontal"),
            keras.layers.RandomRotation(0.1),
            keras.layers.RandomZoom(0.1),
            keras.layers.RandomSharpness(0.3),  # draws, and throws away
            keras.layers.GaussianNoise(0.1),
        ]
    )
    image = keras.Input((7, 9, 3), name="image")
    hidden = keras.layers.Reshape((36, 3))(augmentation(image))
    hidden = keras_mha.MultiHeadAttention(2, 4, dropout=0.1)(hidden, hidden)
    label = keras.layers.Dense(2, name="label")(keras.layers.Flatten()(hidden))
    model = keras.Model(image, label)
    export_onnx(model, tmp_path / "m.onnx", samples=x)
    got = run(tmp_path / "m.onnx", image=x[:2] + 1)["label"]
    np.testing.assert_allclose(got, model(x[:2] + 1, training=False), atol=1e-5)


# Inputs.


class Translate(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.table = keras.layers.Embedding(9, 8)
        self.mix = keras_mha.MultiHeadAttention(2, 4)

    def call(self, inputs: Any) -> Any:
        source, target = inputs
        return self.mix(self.table(target), self.table(source))


def test_a_subclassed_model_called_with_a_list(tmp_path: Path) -> None:
    model, generator = Translate(), np.random.default_rng(3)
    samples = [generator.integers(1, 9, (4, length)) for length in (7, 5)]
    model(samples)
    report = export_onnx(model, tmp_path / "m.onnx", samples=samples)
    assert [i.name for i in report.inputs] == ["inputs_0", "inputs_1"]
    assert report.parity.drawn == 8
    got = run(tmp_path / "m.onnx", inputs_0=samples[0] // 2, inputs_1=samples[1] // 2)
    wanted = model([samples[0] // 2, samples[1] // 2])
    np.testing.assert_allclose(got["output_0"], wanted, atol=1e-5)


def test_a_model_for_batches_of_one_size(tmp_path: Path) -> None:
    inputs: Any = keras.Input((4,), batch_size=2, name="x")
    rows = keras.ops.flip(keras.ops.reshape(inputs, (8,)))
    model = keras.Model(inputs, {"y": keras.ops.reshape(rows, (2, 4))})
    x = features(5)[:, [0, 1, 2, 0]]
    report = export_onnx(model, tmp_path / "m.onnx", samples=x)
    assert (report.inputs[0].shape, report.parity.batch_sizes) == ((2, 4), (2,))
    got = run(tmp_path / "m.onnx", x=x[2:4])["y"]
    np.testing.assert_array_equal(got, x[2:4].ravel()[::-1].reshape(2, 4))


def test_a_file_that_is_right_on_the_samples_alone_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.array([[3, 1, 4], [9, 2, 6], [5, 8, 7]], "int32")  # no padding
    plain = module.convert

    def convert_without_padding(endpoint: Any, *arguments: Any) -> Any:
        def function(tensors: Any) -> Any:
            # As if no id were padding.
            return endpoint.function({"ids": tf.maximum(tensors["ids"], 1)})

        return plain(replace(endpoint, function=function), *arguments)

    monkeypatch.setattr(module, "convert", convert_without_padding)
    with pytest.raises(ParityError, match="Output 'probabilities' .* differs"):
        export_onnx(ids_model(), tmp_path / "m.onnx", samples=ids)
