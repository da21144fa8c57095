from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import keras_mha
from keras_mha.export import ParityError, VerificationError, export_saved_model
from keras_mha.export.runtimes import cpp_loader
from keras_mha.export.saved_model import export as module
from keras_mha.export.saved_model.reader import describe_file, read_meta_graph
from tests.support import small_models
from tests.support.small_models import dense_model, features

ROOT = Path(__file__).resolve().parents[3]


def left_in(directory: Path) -> list[str]:
    """What is in `directory`, hidden names included; nothing if it is absent."""
    return sorted(p.name for p in directory.iterdir()) if directory.exists() else []


def served(report: Any, **inputs: Any) -> dict[str, np.ndarray]:
    """Answers of what was exported, loaded by TensorFlow's own Python loader."""
    endpoint = tf.saved_model.load(report.path).signatures["serving_default"]
    tensors = {name: tf.constant(value) for name, value in inputs.items()}
    return {name: value.numpy() for name, value in endpoint(**tensors).items()}


def run_in_cpp_loader(
    path: str | Path, cases: Sequence[dict[str, np.ndarray]]
) -> tuple[list[Mapping[str, np.ndarray]], dict[str, Any]]:
    file = describe_file(Path(path), read_meta_graph(Path(path)))
    return module.run_in_fresh_process(cpp_loader.RUNTIME, file, cases, timeout=120.0)


def marks(path: str | Path) -> int:
    content = Path(path, "saved_model.pb").read_bytes()
    return content.count(b"_XlaMustCompile")


# Values.


def test_values_and_report_of_a_dense_model(tmp_path: Path) -> None:
    model, x = dense_model(), features(5)
    report = export_saved_model(model, tmp_path / "deep" / "er", samples=x)

    assert report.path == str(tmp_path / "deep" / "er" / "1")
    assert left_in(tmp_path / "deep" / "er") == ["1"]
    assert (report.version, report.parameters) == (1, 32)
    assert report.size_bytes == sum(
        f.stat().st_size for f in Path(report.path).rglob("*") if f.is_file()
    )
    (given,), (got,) = report.inputs, report.outputs
    assert (given.name, given.dtype, given.shape) == ("features", "float32", (None, 3))
    assert (got.name, got.dtype, got.shape) == ("probabilities", "float32", (None, 2))
    assert (report.warmup_records, report.compiled_marks_removed) == (5, 0)
    assert report.custom_operations == ()
    assert "keras_mha" in report.blocked
    assert (report.keras, report.tensorflow) == (keras.__version__, tf.__version__)
    parity = report.parity
    assert (parity.samples, parity.batch_sizes, parity.tolerance) == (5, (1, 5), 1e-5)
    assert 0 <= parity.max_absolute_difference <= 1e-6
    assert parity.max_absolute_difference <= parity.max_relative_difference <= 1e-5
    assert parity.runtime_version == tf.__version__

    other = np.random.default_rng(5).normal(size=(11, 3)).astype("float32")
    answer = served(report, features=other)
    assert list(answer) == ["probabilities"]
    np.testing.assert_allclose(
        answer["probabilities"], model.predict(other, verbose=0), atol=1e-6
    )


def test_each_weight_is_written_once(tmp_path: Path) -> None:
    model = dense_model()
    report = export_saved_model(model, tmp_path, samples=features())
    written = tf.train.list_variables(f"{report.path}/variables/variables")
    shapes = sorted(tuple(shape) for name, shape in written if shape)
    assert shapes == sorted(tuple(weight.shape) for weight in model.weights)


def test_the_loader_is_the_cpp_one_with_xla_disabled(tmp_path: Path) -> None:
    report = export_saved_model(dense_model(), tmp_path, samples=features())
    assert report.parity.runtime == "TensorFlow C++ loader, XLA disabled"
    assert report.blocked == ("keras_mha", "keras", "tensorflow")


@pytest.mark.parametrize("form", [list, np.array, tf.constant])
def test_values_of_a_text_model(tmp_path: Path, form: Callable[[Any], Any]) -> None:
    model, texts = small_models.text_model(), small_models.TEXTS
    report = export_saved_model(model, tmp_path, samples=form(texts))
    assert report.inputs[0].dtype == "string"
    assert "FastWordpieceTokenizeWithOffsets" in report.custom_operations
    assert report.parity.max_absolute_difference <= 1e-6
    wanted = model.predict(tf.constant(texts), verbose=0)
    # Else equal answers would say little.
    assert np.ptp(wanted, axis=0).max() > 0.1
    got = served(report, text=texts)["probabilities"]
    np.testing.assert_allclose(got, wanted, atol=1e-6)


class Table(keras.layers.Layer):
    """Looks strings up in a table of its own, which needs initializing on loading."""

    def __init__(self) -> None:
        super().__init__()
        pairs = tf.lookup.KeyValueTensorInitializer(
            tf.constant(["red", "blue"]), tf.constant([0.5, -2.0])
        )
        self.table = tf.lookup.StaticHashTable(pairs, default_value=0.25)

    def call(self, inputs: Any) -> Any:
        return self.table.lookup(inputs)

    def compute_output_spec(self, inputs: Any) -> keras.KerasTensor:
        return keras.KerasTensor(inputs.shape, "float32")


def several_inputs(kind: type) -> tuple[keras.Model, Any]:
    """A model of three inputs in a `kind` of structure, and samples for it."""
    size = keras.Input((2,), name="size")
    color = keras.Input((1,), dtype="string", name="color")
    count = keras.Input((), dtype="int64", name="count")
    joined = keras.ops.concatenate([size, Table()(color)], -1)
    price = keras.layers.Dense(3, name="price")(joined)
    price = keras.layers.Identity(name="price_each")(
        price * keras.ops.cast(count, "float32")[:, None]
    )
    label = keras.layers.Dense(2, activation="softmax", name="label")(joined)
    inputs = {"size": size, "color": color, "count": count}
    x = {
        "size": features(4)[:, :2],
        "color": np.array([["red"], ["green"], ["blue"], ["red"]]),
        "count": np.array([3, 1, 4, 1]),
    }
    if kind is list:
        model = keras.Model([*inputs.values()], [price, label])
        return small_models.randomize(model), [*x.values()]
    model = keras.Model(inputs, {"z": price, "a": label})
    return small_models.randomize(model), x


@pytest.mark.parametrize(
    ("kind", "outputs"), [(list, ["label", "price_each"]), (dict, ["a", "z"])]
)
def test_several_inputs_and_outputs(
    tmp_path: Path, kind: type, outputs: list[str]
) -> None:
    model, x = several_inputs(kind)
    report = export_saved_model(model, tmp_path, samples=x)
    assert {i.name: i.shape for i in report.inputs} == {
        "size": (None, 2),
        "color": (None, 1),
        "count": (None,),
    }
    assert [o.name for o in report.outputs] == outputs
    assert report.parity.max_absolute_difference <= 1e-6

    named = x
    if kind is list:
        named = dict(zip(["size", "color", "count"], x, strict=True))
    got = served(report, **named)
    tensors = keras.tree.map_structure(tf.constant, x)
    wanted = model(tensors)
    if kind is list:
        wanted = dict(zip(["price_each", "label"], wanted, strict=True))
    for name in outputs:
        np.testing.assert_allclose(got[name], wanted[name], atol=1e-6)


class Subclassed(keras.Model):
    """Takes a dictionary and gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(2)

    def call(self, inputs: Any) -> Any:
        return self.dense(inputs["b"]) - inputs["a"], inputs["a"]


@pytest.mark.parametrize("names", [None, ["first", "second"]])
def test_a_subclassed_model(tmp_path: Path, names: list[str] | None) -> None:
    model = Subclassed()
    x = {"b": features(5), "a": features(5)[:, :2]}
    model(x)
    small_models.randomize(model)
    report = export_saved_model(model, tmp_path, samples=x, output_names=names)
    assert {i.name: i.shape for i in report.inputs} == {"a": (None, 2), "b": (None, 3)}
    got = served(report, **x)
    assert sorted(got) == (names or ["output_0", "output_1"])
    for name, wanted in zip(sorted(got), model(x), strict=True):
        np.testing.assert_allclose(got[name], wanted, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(tmp_path: Path, policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    try:
        model = dense_model()
    finally:
        keras.config.set_dtype_policy("float32")
    report = export_saved_model(model, tmp_path, samples=features(), tolerance=1e-2)
    assert report.outputs[0].dtype == policy.removeprefix("mixed_")
    assert report.parity.max_absolute_difference <= 1e-2


def test_integer_and_string_outputs(tmp_path: Path) -> None:
    inputs = keras.Input((3,), name="features")
    best = keras.ops.argmax(inputs, -1)

    class Label(keras.layers.Layer):
        def call(self, indices: Any) -> Any:
            return tf.gather(tf.constant(["no", "p\0o", "yes"]), indices)

        def compute_output_spec(self, indices: Any) -> keras.KerasTensor:
            return keras.KerasTensor(indices.shape, "string")

    model = keras.Model(inputs, {"index": best, "label": Label()(best)})
    report = export_saved_model(model, tmp_path, samples=features())
    assert [o.dtype for o in report.outputs] == ["int32", "string"]
    assert report.parity.max_absolute_difference == 0


# Several signatures.


def tokens_of(texts: Sequence[str], model: keras.Model) -> np.ndarray:
    return np.asarray(model.layers[1](tf.constant(texts)))


def test_tokens_have_a_signature_of_their_own(tmp_path: Path) -> None:
    model, texts = small_models.text_model(), small_models.TEXTS
    report = export_saved_model(model, tmp_path, samples=texts, tokens=True)
    (signature,) = report.further_signatures
    (given,), (got,) = signature.inputs, signature.outputs
    assert (signature.name, report.inputs[0].name) == ("tokens", "text")
    assert (given.name, given.dtype, given.shape) == ("ids", "int32", (None, None))
    assert (got.name, got.shape) == ("probabilities", (None, 3))
    assert signature.parity.runtime == report.parity.runtime
    assert signature.parity.samples == len(texts)
    assert signature.parity.max_absolute_difference <= 1e-6
    assert "### signature tokens" in report.to_markdown()

    signatures = tf.saved_model.load(report.path).signatures
    assert {"serving_default", "serve", "tokens"} == set(signatures)
    other = ["bad", "a good good movie"]
    ids = tokens_of(other, model)
    answer = signatures["tokens"](ids=tf.constant(ids))["probabilities"]
    wanted = model(tf.constant(other))
    assert np.ptp(wanted, axis=0).max() > 0.02
    np.testing.assert_allclose(answer, wanted, atol=1e-6)
    written = tf.train.list_variables(f"{report.path}/variables/variables")
    shapes = sorted(tuple(shape) for name, shape in written if shape)
    assert shapes == sorted(tuple(weight.shape) for weight in model.weights)


def test_tokens_beside_another_input(tmp_path: Path) -> None:
    text = small_models.text_model()
    size = keras.Input((2,), name="size")
    texts = keras.Input((), dtype="string", name="text")
    ids = text.layers[1](texts)
    joined = keras.layers.Concatenate()([text.layers[2](ids), size])
    model = keras.Model({"text": texts, "size": size}, {"joined": joined})
    x = {"text": small_models.TEXTS, "size": features(5)[:, :2]}
    tokenizer = text.layers[1]
    report = export_saved_model(model, tmp_path, samples=x, tokens=True)
    (signature,) = report.further_signatures
    assert [given.name for given in signature.inputs] == ["ids", "size"]
    endpoint = tf.saved_model.load(report.path).signatures["tokens"]
    got = endpoint(ids=tokenizer(tf.constant(x["text"])), size=tf.constant(x["size"]))[
        "joined"
    ]
    wanted = model({name: tf.constant(value) for name, value in x.items()})["joined"]
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_wrong_tokens_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = module.endpoint_of_tokens

    def off_by_one(*arguments: Any) -> Any:
        endpoint, arrays = plain(*arguments)
        return endpoint, arrays | {"ids": (arrays["ids"] + 1) % 9}

    monkeypatch.setattr(module, "endpoint_of_tokens", off_by_one)
    with pytest.raises(ParityError, match="Output 'probabilities' .* differs"):
        export_saved_model(
            small_models.text_model(),
            tmp_path / "out",
            samples=small_models.TEXTS,
            tokens=True,
        )
    assert left_in(tmp_path) == []


def test_tokens_need_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="of its own once.*Sequential with 0 such calls"
    ):
        export_saved_model(dense_model(), tmp_path, samples=features(), tokens=True)


# Batching.


class LessTheMean(keras.layers.Layer):
    """Looks at the other rows of the batch."""

    share = 1e-4

    def call(self, inputs: Any) -> Any:
        mean: Any = keras.ops.mean(inputs, axis=0, keepdims=True)
        return inputs - self.share * mean


class LessARounding(LessTheMean):
    """Differs as sums of a deep model do, which a batch of another size orders anew."""

    share = 3e-6


class Total(keras.layers.Layer):
    """Gives one number for the whole batch."""

    def call(self, inputs: Any) -> Any:
        return keras.ops.sum(inputs)

    def compute_output_spec(self, inputs: Any) -> keras.KerasTensor:
        return keras.KerasTensor((), inputs.dtype)


def test_the_other_rows_of_a_batch_change_nothing(tmp_path: Path) -> None:
    report = export_saved_model(
        small_models.text_model(), tmp_path, samples=small_models.TEXTS
    )
    assert report.batch_difference is not None
    assert 0 <= report.batch_difference <= 1e-6


def test_differences_within_the_tolerance_are_reported(tmp_path: Path) -> None:
    inputs = keras.Input((3,), name="features")
    model = keras.Model(inputs, LessARounding(name="last")(inputs))
    report = export_saved_model(model, tmp_path, samples=features(), tolerance=1e-5)
    assert report.batch_difference is not None
    assert 1e-6 < report.batch_difference <= 1e-5


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (LessTheMean, r"must not depend on the other rows.*differ by 0\.000"),
        (Total, r"the batch as its first dimension.*'last' of shape \(\) for 5 rows"),
    ],
)
@pytest.mark.parametrize("warmup", [0, 5])
def test_a_model_that_no_server_could_batch_is_refused(
    tmp_path: Path, layer: type, text: str, warmup: int
) -> None:
    inputs = keras.Input((3,), name="features")
    model = keras.Model(inputs, layer(name="last")(inputs))
    with pytest.raises(ValueError, match=re.compile(text, re.DOTALL)):
        export_saved_model(
            model, tmp_path / "out", samples=features(), warmup=warmup, tolerance=1e-5
        )
    assert left_in(tmp_path) == []


class Contrast(keras.Model):
    """Compares each row of one input with all rows of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = keras.layers.Dense(3), keras.layers.Dense(3)

    def call(self, inputs: Any) -> Any:
        one, two = self.one(inputs["one"]), self.two(inputs["two"])
        return keras.ops.matmul(one, keras.ops.transpose(two))


class Standardize(keras.Model):
    """Reads the statistics of the batch."""

    def call(self, x: Any) -> Any:
        return x - keras.ops.mean(x, 0)


class OfOneSize(keras.Model):
    """Answers batches of five rows only."""

    def call(self, x: Any) -> Any:
        return tf.reshape(tf.reshape(x, (15,))[::-1], (5, 3))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Contrast, r"and as no other.*shape \(5, 5\) for 5 rows, and \(8, 8\) for 8"),
        (Standardize, r"must not depend on the other rows"),
        (OfOneSize, r"batches of any size.*batches of 5 rows only"),
    ],
)
def test_rows_that_depend_on_each_other_need_a_server_that_does_not_batch(
    tmp_path: Path, model: type[keras.Model], text: str
) -> None:
    other = features(5) * 2
    x: Any = {"one": features(5), "two": other} if model is Contrast else features(5)
    written = model()
    written(x)
    how = ".*`batching=False` to export it"
    with pytest.raises(ValueError, match=re.compile(text + how, re.DOTALL)):
        export_saved_model(written, tmp_path / "out", samples=x)
    assert left_in(tmp_path) == []
    report = export_saved_model(written, tmp_path / "out", samples=x, batching=False)
    assert (report.batch_difference, report.warmup_records) == (None, 1)
    fixed = 5 if model is OfOneSize else None
    assert {i.shape for i in report.inputs} == {(fixed, 3)}
    x = {"one": other, "two": features(5)} if model is Contrast else other
    got = served(report, **(x if model is Contrast else {"x": x}))
    np.testing.assert_allclose(got["output_0"], written(x), atol=1e-5)


def test_whether_to_batch_is_checked(tmp_path: Path) -> None:
    wrong: Any = "no"
    with pytest.raises(ValueError, match="`batching` must be True or False"):
        export_saved_model(dense_model(), tmp_path, samples=features(), batching=wrong)


class Step(keras.Model):
    """One step of a decoder with its cache, whose length has no batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.block = keras_mha.TransformerDecoderBlock(2, 16, position="rotary")
        self.block.build((None, None, 8))

    def call(self, inputs: Any) -> Any:
        cache = {name: part for name, part in inputs.items() if name != "x"}
        y, cache = self.block(inputs["x"], cache=keras_mha.unflatten_cache(cache))
        return {"y": y, **keras_mha.flatten_cache(cache)}


def test_a_decoding_step(tmp_path: Path) -> None:
    model = Step()
    x = np.random.default_rng(3).normal(size=(2, 3, 8)).astype("float32")
    start = keras_mha.flatten_cache(model.block.init_cache(2, 5))
    model({"x": x[:, :1], **start})
    small_models.randomize(model)
    samples = {"x": x[:, :1], **start}
    report = export_saved_model(model, tmp_path, samples=samples)
    shapes = {i.name: i.shape for i in report.inputs}
    assert (shapes["x"], shapes["self__length"]) == ((None, 1, 8), ())
    assert report.batch_difference is None
    # Two steps in the file are the two positions of the block.
    first = served(report, **samples)
    cache = {name: first[name] for name in start}
    second = served(report, x=x[:, 1:2], **cache)
    wanted = model.block(x[:, :2])
    np.testing.assert_allclose(first["y"], wanted[:, :1], atol=1e-5)
    np.testing.assert_allclose(second["y"], wanted[:, 1:], atol=1e-5)
    with pytest.raises(
        ValueError, match=r"every input.*batch dimension.*\['self__length'\]"
    ):
        export_saved_model(model, tmp_path, samples=samples, batching=True)


# What is refused.


def test_a_model_that_does_not_repeat_itself_is_told(tmp_path: Path) -> None:
    class Noise(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return x + tf.random.uniform(tf.shape(x))

    inputs = keras.Input((3,), name="features")
    model = keras.Model(inputs, Noise(name="noisy")(inputs))
    text = r"'noisy' .* differs.*The model itself, run by Keras, differs by 0\.\d+"
    with pytest.raises(ParityError, match=text):
        export_saved_model(model, tmp_path / "out", samples=features())
    assert left_in(tmp_path) == []


def test_a_file_that_is_right_on_the_samples_alone_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = module.describe

    def describe_without_padding(*arguments: Any) -> Any:
        endpoint, arrays = plain(*arguments)

        def function(tensors: Any) -> Any:
            ids = tensors["ids"]
            # As if no id were padding, in graphs alone.
            real = ids if tf.executing_eagerly() else tf.maximum(ids, 1)
            return endpoint.function({"ids": real})

        return replace(endpoint, function=function), arrays

    monkeypatch.setattr(module, "describe", describe_without_padding)
    ids = np.array([[3, 1, 4], [9, 2, 6], [5, 8, 7]], "int32")
    with pytest.raises(ParityError, match="'probabilities' .* differs"):
        export_saved_model(small_models.ids_model(), tmp_path / "out", samples=ids)


def test_a_perturbed_weight_is_caught_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dense_model()

    def strip_and_perturb(_: Path) -> int:
        model.layers[-1].bias.assign_add([1e-3, 0.0])
        return 0

    monkeypatch.setattr(module, "strip_compiled_marks", strip_and_perturb)
    with pytest.raises(ParityError, match="Output 'probabilities' .* differs") as error:
        export_saved_model(model, tmp_path / "out", samples=features())
    assert "the tolerance is 1e-05" in str(error.value)
    assert left_in(tmp_path) == []


def test_an_existing_version_is_refused_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "9").mkdir()
    (tmp_path / "notes").mkdir()
    first, second = dense_model(), dense_model()
    small_models.randomize(second, seed=8)
    report = export_saved_model(first, tmp_path, samples=features())
    assert report.version == 10
    before = served(report, features=features())["probabilities"]

    with pytest.raises(ValueError, match="`overwrite` must be True or False"):
        export_saved_model(
            second,
            tmp_path,
            samples=features(),
            version=10,
            overwrite="no",  # pyright: ignore[reportArgumentType]
        )
    with pytest.raises(FileExistsError, match=r"10 exists; pass `overwrite=True`"):
        export_saved_model(second, tmp_path, samples=features(), version=10)
    np.testing.assert_array_equal(
        served(report, features=features())["probabilities"], before
    )

    export_saved_model(
        second, tmp_path, samples=features(), version=10, overwrite=True, warmup=0
    )
    after = served(report, features=features())["probabilities"]
    np.testing.assert_allclose(after, second(features()), atol=1e-6)
    assert np.abs(after - before).max() > 1e-2
    assert not Path(report.path, "assets.extra").exists()
    assert left_in(tmp_path) == ["10", "9", "notes"]


STEPS = [
    "strip_compiled_marks",
    "write_warmup",
    "read_warmup",
    "read_meta_graph",
    "run_in_fresh_process",
    "check_batching",
    "check_parity",
    "size_of",
    "publish_directory",
]


@pytest.mark.parametrize("step", STEPS)
def test_an_interruption_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, interrupt)
    # Replaying takes a process: not needed where a later step is the one that stops.
    if STEPS.index(step) > STEPS.index("run_in_fresh_process"):
        facts = {"runtime": "none", "version": "0"}

        def run(_: Any, __: Any, cases: Any, **___: Any) -> Any:
            batches = [case["features"] for case in cases]
            answers = [{"probabilities": dense_model()(x).numpy()} for x in batches]
            return answers, facts

        monkeypatch.setattr(module, "run_in_fresh_process", run)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "old").touch()
    with pytest.raises(KeyboardInterrupt):
        export_saved_model(
            dense_model(),
            tmp_path,
            samples=features(),
            version=1,
            overwrite=True,
            warmup=1,
        )
    assert left_in(tmp_path) == ["1"]
    assert left_in(tmp_path / "1") == ["old"]


def test_a_killed_process_leaves_no_version(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from keras_mha.export.saved_model import export\n"
        "from tests.support.small_models import dense_model, features\n"
        "def wait(*_, **__):\n"
        "    print('checking', flush=True)\n"
        "    time.sleep(60)\n"
        "export.run_in_fresh_process = wait\n"
        "export.export_saved_model(\n"
        "    dense_model(), sys.argv[1], samples=features())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"checking\n"
        process.send_signal(signal.SIGKILL)
    (rest,) = left_in(tmp_path)
    assert rest.startswith(".staging-")
    # What is left hinders nobody.
    report = export_saved_model(dense_model(), tmp_path, samples=features())
    assert report.version == 1


def test_a_timeout_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"took longer than timeout=0\.01 s"):
        export_saved_model(
            dense_model(), tmp_path / "out", samples=features(), timeout=0.01
        )
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"version": "1"}, TypeError, "`version` must be an integer or None"),
        ({"version": True}, TypeError, "Received: True"),
        ({"version": -1}, ValueError, "`version` must not be negative. Received: -1"),
        ({"warmup": 1001}, ValueError, "from 0 to 1000. Received: 1001"),
        ({"warmup": -1}, ValueError, "from 0 to 1000. Received: -1"),
        ({"warmup": True}, TypeError, "`warmup` must be an integer. Received: True"),
        ({"warmup": 2.0}, TypeError, "`warmup` must be an integer. Received: 2.0"),
        ({"tolerance": float("nan")}, ValueError, "of at least 0. Received: nan"),
        ({"output_names": ["a", "b"]}, ValueError, r"1 different names.*\['a', 'b'\]"),
        (
            {"samples": features()[:, :2]},
            ValueError,
            r"'features' must have the shape \(None, 3\). Received: \(5, 2\)",
        ),
        (
            {"samples": features()[:0]},
            ValueError,
            r"must have one or more rows.*Received: \{'features': 0\}",
        ),
        (
            {"samples": {"other": features()}},
            ValueError,
            r"must have the keys \['features'\].*Received: \['other'\]",
        ),
        (
            {"samples": ["a", "b"]},
            TypeError,
            "'features' must be of type float32. Received: .*string",
        ),
        ({"samples": [None]}, TypeError, "numbers or strings.*Received: NoneType"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=re.compile(text, re.DOTALL)):
        export_saved_model(
            dense_model(), tmp_path / "out", **({"samples": features()} | arguments)
        )
    assert left_in(tmp_path) == []


def test_float_samples_for_an_integer_input_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"'ids' must be of type int32.*float64"):
        export_saved_model(small_models.ids_model(), tmp_path, samples=[[1.5, 2.0]])


def test_a_model_that_is_none_or_not_built_is_refused(tmp_path: Path) -> None:
    wrong: Any = "model"
    with pytest.raises(TypeError, match=r"must be a keras\.Model. Received: 'model'"):
        export_saved_model(wrong, tmp_path, samples=features())
    model = keras.Sequential([keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="`model` must be built or called once"):
        export_saved_model(model, tmp_path, samples=features())


def test_several_inputs_need_names_or_their_order(tmp_path: Path) -> None:
    model, x = several_inputs(dict)
    with pytest.raises(
        ValueError, match=r"\['color', 'count', 'size'\], or a list in the order"
    ):
        export_saved_model(model, tmp_path, samples=features())
    x["count"] = x["count"][:3]
    with pytest.raises(ValueError, match="equally many in every input.*'count': 3"):
        export_saved_model(model, tmp_path, samples=x)


def test_a_name_that_no_signature_can_carry_is_refused(tmp_path: Path) -> None:
    inputs = keras.Input((3,), name="my features")
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    with pytest.raises(ValueError, match=r"named by a letter.*\['my features'\]"):
        export_saved_model(model, tmp_path / "out", samples=features())
    assert left_in(tmp_path) == []


# XLA.


def test_compiled_marks_are_removed_and_matter(tmp_path: Path) -> None:
    model, x = small_models.compiled_model(), features()
    model.export(str(tmp_path / "plain"), verbose=False)
    assert marks(tmp_path / "plain")
    # Keras' own export does not run there ...
    with pytest.raises(VerificationError, match="XLA compilation disabled"):
        run_in_cpp_loader(tmp_path / "plain", [{"features": x}])

    # ... ours does.
    report = export_saved_model(model, tmp_path / "ours", samples=x)
    assert report.compiled_marks_removed >= 2  # the function and its call
    assert marks(report.path) == 0
    assert not Path(report.path, "fingerprint.pb").exists()
    assert report.parity.max_absolute_difference <= 1e-6
    np.testing.assert_allclose(
        served(report, features=x)["probabilities"], model(x), atol=1e-6
    )


def test_plain_export_of_a_model_without_compiled_functions_runs(
    tmp_path: Path,
) -> None:
    model, x = dense_model(), features()
    model.export(str(tmp_path / "plain"), verbose=False)
    (answer,), facts = run_in_cpp_loader(tmp_path / "plain", [{"features": x}])
    assert facts["runtime"] == "TensorFlow C++ loader, XLA disabled"
    (values,) = answer.values()
    np.testing.assert_allclose(values, model(x), atol=1e-6)


def attention_model(jit_compile: bool | str) -> keras.Model:
    ids = keras.Input((None,), dtype="int32", name="ids")
    vectors = keras_mha.TokenAndPositionEmbedding(11, 13, 10)(ids)
    attention = keras_mha.MultiHeadSelfAttention(2, 3, jit_compile=jit_compile)
    head = keras.layers.Dense(3, activation="softmax", name="probabilities")
    pooled = keras.layers.GlobalAveragePooling1D()(attention(vectors))
    return small_models.randomize(keras.Model(ids, head(pooled)))


IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [7, 0, 0, 0, 0]], "int32")


def test_plain_export_runs_with_jit_compile_auto(tmp_path: Path) -> None:
    model = attention_model("auto")
    model.export(str(tmp_path / "plain"), verbose=False)
    (answer,), _ = run_in_cpp_loader(tmp_path / "plain", [{"ids": IDS}])
    (values,) = answer.values()
    np.testing.assert_allclose(values, model(IDS), atol=1e-6)


def test_our_export_runs_with_jit_compile_true(tmp_path: Path) -> None:
    model = attention_model(True)
    report = export_saved_model(model, tmp_path, samples=IDS)
    assert report.compiled_marks_removed > 0
    # XLA computed what it is compared with: rounding differs.
    assert report.parity.max_absolute_difference <= 1e-6
    got = served(report, ids=IDS)["probabilities"]
    np.testing.assert_allclose(got, model(IDS), atol=1e-6)


def test_the_loader_of_python_compiles_nothing_again(tmp_path: Path) -> None:
    report = export_saved_model(
        small_models.compiled_model(), tmp_path, samples=features()
    )
    content = Path(report.path, "saved_model.pb").read_bytes()
    graph = saved_model_pb2.SavedModel.FromString(content).meta_graphs[0]
    for node in graph.object_graph_def.nodes:
        assert not node.function.function_spec.jit_compile


def test_outputs_of_one_layer_get_names_of_their_own(tmp_path: Path) -> None:
    inputs = keras.Input((3, 5), name="x")
    attention = keras_mha.MultiHeadSelfAttention(5, name="attention")
    model = keras.Model(inputs, attention(inputs, return_attention_scores=True))
    samples = np.ones((2, 3, 5), "float32")
    report = export_saved_model(model, tmp_path, samples=samples)
    names = [output.name for output in report.outputs]
    assert names == ["attention_0", "attention_1"]
    assert "layer 'attention' gives several" in report.notes[0]
