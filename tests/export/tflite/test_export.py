from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

import keras_mha
from keras_mha.export import (
    ParityError,
    VerificationError,
    export_tflite,
    without_tokenizer,
)
from keras_mha.export.tflite import file as module
from keras_mha.export.tflite import lint
from keras_mha.export.tflite.graph import Contents
from keras_mha.text import WordpieceTokenizer
from tests.support import small_models
from tests.support.small_models import ids_model

ROWS = [[3, 1, 4, 1, 5], [9, 2, 6], [10], [8, 9, 7, 9], [3, 2, 3, 8, 4]]


def padded(length: int) -> np.ndarray:
    return np.array([row + [0] * (length - len(row)) for row in ROWS], "int32")


def interpreter(path: str | Path) -> Any:
    return Interpreter(model_path=str(path))


BESIDE = {"manifest.json", "snippets"}


def left_in(directory: Path) -> list[str]:
    """The names of all but what stands beside files of every kind."""
    names = {p.name for p in directory.iterdir()} if directory.exists() else set()
    return sorted(names - BESIDE)


# Values.


def test_values_and_report(tmp_path: Path) -> None:
    model = ids_model()
    report = export_tflite(
        model,
        tmp_path,
        sequence_lengths=(7, 13),
        batch_size=2,
        samples=ROWS,
        signature_name="classify",
    )
    assert left_in(tmp_path) == ["model_13.tflite", "model_7.tflite"]
    assert report.signature_name == "classify"
    assert {"keras_mha", "keras", "tensorflow"} <= set(report.blocked)
    for file, length in zip(report.files, (7, 13), strict=True):
        assert file.path == str(tmp_path / f"model_{length}.tflite")
        assert (file.sequence_length, file.batch_size) == (length, 2)
        assert file.size_bytes == Path(file.path).stat().st_size
        (given,), (got,) = file.inputs, file.outputs
        assert (given.name, given.dtype, given.shape) == ("ids", "int32", (2, length))
        assert (got.name, got.dtype, got.shape) == ("probabilities", "float32", (2, 3))
        parity = file.parity
        assert (parity.samples, parity.batch_sizes) == (5, (2,))
        assert parity.runtime == "LiteRT interpreter, CPU"
        assert 0 <= parity.max_absolute_difference <= 3e-6

        loaded = interpreter(file.path)
        assert list(loaded.get_signature_list()) == ["classify"]
        classify = loaded.get_signature_runner("classify")
        wanted = model.predict(padded(length), verbose=0)
        assert np.ptp(wanted, axis=0).max() > 0.1
        for i in (0, 1, 3):
            got = classify(ids=padded(length)[i : i + 2])["probabilities"]
            np.testing.assert_allclose(got, wanted[i : i + 2], atol=1e-6)


def test_the_file_holds_builtin_operations_of_fixed_shape(tmp_path: Path) -> None:
    (file,) = export_tflite(
        ids_model(), tmp_path, sequence_lengths=[7], samples=ROWS
    ).files
    loaded = interpreter(file.path)
    for tensor in loaded.get_tensor_details():
        assert -1 not in tensor["shape_signature"]
    # The runtime counts the same, before its delegate takes parts over.
    plain = Interpreter(
        model_path=file.path,
        experimental_op_resolver_type=_without_delegates(),
    )
    names = [op["op_name"] for op in plain._get_ops_details()]
    assert file.operators == {name: names.count(name) for name in names}
    assert list(file.operators.values()) == sorted(
        file.operators.values(), reverse=True
    )
    assert file.delegate_partitions is not None
    assert file.delegate_partitions >= 1


def _without_delegates() -> Any:
    from ai_edge_litert.interpreter import OpResolverType

    return OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES


def test_int64_ids_are_taken_as_int32(tmp_path: Path) -> None:
    ids = keras.Input((None,), dtype="int64", name="tokens")
    model = keras.Model(ids, keras.layers.Embedding(11, 3)(ids))
    report = export_tflite(model, tmp_path, sequence_lengths=(7,), samples=ROWS)
    (given,) = report.files[0].inputs
    assert (given.name, given.dtype) == ("tokens", "int32")
    (given,) = interpreter(report.files[0].path).get_input_details()
    assert given["dtype"] == np.int32


def encoder(**kwargs: Any) -> keras.Model:
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = keras_mha.TokenAndPositionEmbedding(11, 13, 10)(ids)
    hidden = keras_mha.TransformerEncoderBlock(2, 14)(hidden)
    hidden = keras_mha.MultiHeadSelfAttention(2, 3, **kwargs)(hidden)
    head = keras.layers.Dense(3, activation="softmax", name="probabilities")
    model = keras.Model(ids, head(keras.layers.GlobalAveragePooling1D()(hidden)))
    return small_models.randomize(model)


@pytest.mark.parametrize("jit_compile", ["auto", True])
def test_our_layers_are_traced_in_their_portable_form(
    tmp_path: Path, jit_compile: bool | str
) -> None:
    model = encoder(jit_compile=jit_compile)
    report = export_tflite(model, tmp_path, sequence_lengths=(7,), samples=ROWS)
    (file,) = report.files
    assert file.parity.max_absolute_difference <= 3e-6
    # The reference selects by mask; the one selection left is the pooling's.
    assert file.operators.get("SELECT_V2", 0) <= 1
    assert file.operators["BATCH_MATMUL"] == 4
    from keras_mha.attention.dispatch import current_implementation

    assert current_implementation() == "auto"


def two_block_model() -> keras.Model:
    """Two blocks, whose normalizations are not trivial."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = keras_mha.TokenAndPositionEmbedding(61, 13, 12)(ids)
    for _ in range(2):
        hidden = keras_mha.TransformerEncoderBlock(3, 29)(hidden)
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    head = keras.layers.Dense(2, activation="softmax", name="probabilities")
    return small_models.randomize(keras.Model(ids, head(pooled)))


def test_the_device_form_is_small_and_one_partition(tmp_path: Path) -> None:
    for target in ("cpu", "gpu"):
        (file,) = export_tflite(
            two_block_model(),
            tmp_path / target,
            sequence_lengths=(13,),
            samples=ROWS,
            target=target,
            overwrite=True,
        ).files
        assert sum(file.operators.values()) <= 79
        assert file.delegate_partitions == 1
        assert file.parity.max_absolute_difference <= 3e-6
        assert file.operators["EMBEDDING_LOOKUP"] == 1
        refused = {"GATHER", "SELECT_V2", "NOT_EQUAL", "LOGICAL_AND", "SHAPE"}
        assert not refused & set(file.operators)


def test_stock_layers_take_the_form_too(tmp_path: Path) -> None:
    (file,) = export_tflite(
        ids_model(), tmp_path, sequence_lengths=(7,), samples=ROWS
    ).files
    assert file.delegate_partitions == 1
    assert not {"GATHER", "NOT_EQUAL", "SELECT_V2"} & set(file.operators)


def test_what_stands_in_padding_does_not_count(tmp_path: Path) -> None:
    model = two_block_model()
    table = model.layers[1].token_embedding.embeddings
    table.assign(np.concatenate([np.full((1, 12), 50.0), np.asarray(table)[1:]]))
    export_tflite(model, tmp_path, sequence_lengths=(5, 13), samples=ROWS)
    answers = [
        interpreter(tmp_path / f"model_{length}.tflite").get_signature_runner()(
            ids=padded(length)[1:2]
        )["probabilities"]
        for length in (5, 13)
    ]
    np.testing.assert_allclose(*answers, atol=1e-6)


def test_a_row_for_each_token_is_right_in_padding_too(tmp_path: Path) -> None:
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = keras_mha.TokenAndPositionEmbedding(11, 7, 6)(ids)
    hidden = keras_mha.TransformerEncoderBlock(2, 14, position="rotary", key_dim=4)(
        hidden, use_causal_mask=True
    )
    model = small_models.randomize(
        keras.Model(ids, keras.layers.Dense(3, name="tags")(hidden))
    )
    (file,) = export_tflite(model, tmp_path, sequence_lengths=(7,), samples=ROWS).files
    assert file.delegate_partitions == 1
    assert file.parity.max_absolute_difference <= 1e-5


def test_a_part_of_a_model_that_shares_its_mask(tmp_path: Path) -> None:
    """The part after the tokenizer is traced anew with the operations of the whole."""
    texts = keras.Input((), dtype="string", name="text")
    ids = WordpieceTokenizer(small_models.VOCABULARY, max_length=6)(texts)
    hidden = keras_mha.TokenAndPositionEmbedding(9, 6, 10)(ids)
    hidden = keras_mha.TransformerEncoderBlock(2, 7)(hidden)
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    head = keras.layers.Dense(2, activation="softmax", name="probabilities")
    model = small_models.randomize(keras.Model(texts, head(pooled)))
    rest, given = without_tokenizer(model, small_models.TEXTS)
    report = export_tflite(rest, tmp_path, sequence_lengths=(6,), samples=given)
    assert report.files[0].parity.max_absolute_difference <= 3e-6
    assert report.files[0].delegate_partitions == 1


# Quantized files.


@pytest.mark.parametrize(
    ("quantization", "share"),
    [("float16", 0.6), ("dynamic_int8", 0.4), ("int8_dense", 0.45)],
)
def test_quantized_files(tmp_path: Path, quantization: str, share: float) -> None:
    model = wide()
    data: dict[str, Any] = {}
    if quantization == "int8_dense":
        data["representative_data"] = ROWS
    lengths = {"sequence_lengths": (7,), "samples": ROWS}
    plain = export_tflite(model, tmp_path, **lengths)
    data |= {"quantization": quantization, "overwrite": True}
    small = export_tflite(model, tmp_path, **lengths, **data)
    assert (plain.quantization, small.quantization) == (None, quantization)
    assert small.files[0].size_bytes < share * plain.files[0].size_bytes
    parity = small.files[0].parity
    # Rounded, so not equal; and yet near.
    assert 1e-6 < parity.max_absolute_difference < parity.tolerance


def test_int8_cuts_off_nothing_that_the_representative_rows_reach(
    tmp_path: Path,
) -> None:
    keras.utils.set_random_seed(0)
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = keras_mha.TokenAndPositionEmbedding(50, 7, 16)(ids)
    hidden = keras_mha.TransformerEncoderBlock(4, 32)(hidden)
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    model = keras.Model(ids, keras.layers.Dense(3, activation="softmax")(pooled))
    rows = np.random.default_rng(0).integers(1, 50, (40, 7))
    data = {"samples": rows, "representative_data": rows}
    (file,) = export_tflite(
        model, tmp_path, sequence_lengths=(7,), quantization="int8_dense", **data
    ).files
    # With averaged ranges it was 0.1 and more.
    assert 1e-6 < file.parity.max_absolute_difference < 0.02


def test_a_quantized_file_that_is_too_far_off_is_caught(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="tolerance is 1e-07"):
        export_tflite(
            wide(),
            tmp_path / "out",
            sequence_lengths=(7,),
            samples=ROWS,
            quantization="dynamic_int8",
            quantized_tolerance=1e-7,
        )
    assert left_in(tmp_path) == []


def test_more_ids_than_the_model_has_positions_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not be longer than `sequence_length`"):
        export_tflite(wide(), tmp_path / "out", sequence_lengths=(8,), samples=ROWS)
    assert left_in(tmp_path) == []


def test_sizes_of_numpy(tmp_path: Path) -> None:
    report = export_tflite(
        ids_model(),
        tmp_path,
        sequence_lengths=(np.int64(7),),  # pyright: ignore[reportArgumentType]
        batch_size=np.int32(2),  # pyright: ignore[reportArgumentType]
        samples=ROWS,
    )
    assert report.files[0].inputs[0].shape == (2, 7)


def wide() -> keras.Model:
    """Wide enough that its weights, not its graph, make the file's size."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = keras_mha.TokenAndPositionEmbedding(997, 7, 32)(ids)
    hidden = keras_mha.TransformerEncoderBlock(2, 127)(hidden)
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    head = keras.layers.Dense(2, activation="softmax", name="probabilities")
    model = keras.Model(ids, head(pooled))
    generator = np.random.default_rng(3)
    for weight in model.weights:
        weight.assign(generator.normal(scale=0.2, size=weight.shape))
    return model


def test_int8_leaves_attention_in_float(tmp_path: Path) -> None:
    (file,) = export_tflite(
        wide(),
        tmp_path,
        sequence_lengths=(7,),
        samples=ROWS,
        quantization="int8_dense",
        representative_data=padded(7),
    ).files
    plain = Interpreter(
        model_path=file.path, experimental_op_resolver_type=_without_delegates()
    )
    types = {t["index"]: t["dtype"] for t in plain.get_tensor_details()}
    seen = {}
    for operation in plain._get_ops_details():
        # The third input of a dense layer, its bias, is int32 then.
        ends = [*operation["inputs"][:2], *operation["outputs"]]
        seen.setdefault(operation["op_name"], set()).update(types[i] for i in ends)
    assert seen["FULLY_CONNECTED"] == {np.int8}
    for float_operation in ("BATCH_MATMUL", "RSQRT", "MEAN"):
        assert seen[float_operation] - {np.int32} == {np.float32}


@pytest.mark.slow
def test_a_model_quantized_by_keras(tmp_path: Path) -> None:
    model = wide()
    expected = model.predict(padded(7), verbose=0)
    for layer in model._flatten_layers():
        if isinstance(
            layer,
            keras.layers.Dense | keras.layers.EinsumDense | keras.layers.Embedding,
        ):
            layer.quantize("int8", type_check=False)
    (file,) = export_tflite(model, tmp_path, sequence_lengths=(7,), samples=ROWS).files
    assert file.parity.tolerance == 0.05
    assert 0 < file.parity.max_absolute_difference < 0.02
    answer = interpreter(file.path).get_signature_runner()(ids=padded(7)[:1])
    gap = np.abs(answer["probabilities"] - expected[:1]).max()
    assert 1e-6 < gap < 0.02


class Sine(keras.layers.Layer):
    def call(self, inputs: Any) -> Any:
        return keras.ops.sin(inputs)


def test_a_layer_of_unknown_form_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = keras.layers.Embedding(11, 3)(ids)
    model = keras.Model(ids, Sine(name="wave")(hidden))
    note = r"layer 'wave' \(Sine\) has no device form"
    with pytest.warns(UserWarning, match=f"`export_tflite`: {note}"):
        report = export_tflite(
            model, tmp_path, sequence_lengths=(7,), samples=ROWS, target="gpu"
        )
    assert len(report.notes) == 1
    assert re.fullmatch(note, report.notes[0])
    monkeypatch.setattr(lint, "GPU_OPERATORS", lint.GPU_OPERATORS - {"SIN"})
    with pytest.raises(ValueError, match=rf"gpu-operator: SIN (.|\s)*; {note}"):
        export_tflite(
            model, tmp_path / "gpu", sequence_lengths=(7,), samples=ROWS, target="gpu"
        )


# What is refused.


def test_a_perturbed_weight_is_caught_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ids_model()
    convert = module.convert
    lengths = [13, 7]

    def convert_and_perturb(graph: Path, *arguments: Any) -> bytes:
        content = convert(graph, *arguments)
        lengths.pop()
        if not lengths:
            model.layers[-1].bias.assign_add([1e-3, 0.0, 0.0])
        return content

    monkeypatch.setattr(module, "convert", convert_and_perturb)
    old = tmp_path / "model_7.tflite"
    old.write_bytes(b"old")
    with pytest.raises(ParityError, match="'probabilities' .* LiteRT"):
        export_tflite(
            model, tmp_path, sequence_lengths=(7, 13), samples=ROWS, overwrite=True
        )
    # The file of length 7 was right, but none is published before all are.
    assert left_in(tmp_path) == ["model_7.tflite"]
    assert old.read_bytes() == b"old"


def test_a_damaged_file_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = module.convert

    def convert_and_damage(graph: Path, *arguments: Any) -> bytes:
        content = bytearray(convert(graph, *arguments))
        content[len(content) // 2 :: 7] = bytes(len(content[len(content) // 2 :: 7]))
        return bytes(content)

    monkeypatch.setattr(module, "convert", convert_and_damage)
    monkeypatch.setattr(module.tflite_schema, "unpack", lambda _: None)
    monkeypatch.setattr(module.tflite_schema, "describe", lambda *_: None)
    monkeypatch.setattr(module, "contents_of", lambda _: Contents((), (), ""))
    with pytest.raises(VerificationError, match=r"litert on model_7\.tflite"):
        export_tflite(
            ids_model(), tmp_path / "out", sequence_lengths=(7,), samples=ROWS
        )
    assert left_in(tmp_path) == []


def test_an_operator_that_the_target_runs_wrongly_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lint, "GPU_OPERATORS", lint.GPU_OPERATORS - {"SOFTMAX"})
    arguments = {"sequence_lengths": (7,), "samples": ROWS}
    export_tflite(encoder(), tmp_path / "cpu", **arguments)
    with pytest.raises(ValueError, match=r"`target='gpu'` runs .*gpu-operator: SOFTM"):
        export_tflite(encoder(), tmp_path / "gpu", target="gpu", **arguments)
    assert left_in(tmp_path) == ["cpu"]


@pytest.mark.parametrize(
    "step", ["convert", "contents_of", "run_in_fresh_process", "check_parity"]
)
def test_an_interruption_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_tflite(
            ids_model(), tmp_path / "out", sequence_lengths=(7,), samples=ROWS
        )
    assert left_in(tmp_path) == []


def test_operations_that_are_not_built_in_are_named(tmp_path: Path) -> None:
    class Rare(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            x = tf.cast(inputs, "float32")
            return tf.math.betainc(x, x, x) + tf.math.bessel_i0(x)

    ids = keras.Input((None,), dtype="int32", name="ids")
    model = keras.Model(ids, Rare(name="rare")(ids))
    text = r"has not built in: \['tf.Bes.*tf.Betainc'\]; layer 'rare' \(Rare\) has no"
    with pytest.raises(ValueError, match=text):
        export_tflite(model, tmp_path / "out", sequence_lengths=(7,), samples=ROWS)
    assert left_in(tmp_path) == []


def test_sizes_known_at_run_time_alone_are_refused(tmp_path: Path) -> None:
    class Ragged(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            return tf.cast(tf.where(inputs > 0), "float32")

    ids = keras.Input((None,), dtype="int32", name="ids")
    model = keras.Model(ids, Ragged()(ids))
    with pytest.raises(ValueError, match="does not convert.*tensors of free shape"):
        export_tflite(model, tmp_path / "out", sequence_lengths=(7,), samples=ROWS)


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Pass the part of the model after its token"):
        export_tflite(small_models.text_model(), tmp_path, samples=small_models.TEXTS)


def test_half_precision_is_refused(tmp_path: Path) -> None:
    ids = keras.Input((None,), dtype="int32", name="ids")
    inner = keras.Sequential([keras.layers.Embedding(11, 3, dtype="mixed_bfloat16")])
    model = keras.Model(ids, inner(ids))
    text = "must compute in float32.*'embedding.*' with compute_dtype='bfloat16'"
    with pytest.raises(ValueError, match=text):
        export_tflite(model, tmp_path, sequence_lengths=(7,), samples=ROWS)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"sequence_lengths": (7, 4)},
            "must not be longer.*a row of 5 ids for the length 4",
        ),
        ({"sequence_lengths": ()}, r"`sequence_lengths` must not be empty.*\(\)"),
        ({"sequence_lengths": (0,)}, "`sequence_lengths` must be a positive.*: 0"),
        ({"tolerance": -1e-5}, "number of at least 0. Received: -1e-05"),
        ({"batch_size": 0}, "`batch_size` must be a positive integer. Received: 0"),
        ({"text": "no"}, "`text` must be True or False"),
        ({"samples": np.zeros((0, 3), "int32")}, "one or more rows"),
        ({"shapes": {"ids": (1, 9)}}, "`sequence_lengths` and `shapes` both"),
        (
            {"shapes": {"x": (1, 9)}, "sequence_lengths": None},
            r"`shapes` must name some of.*\['ids'\].*'x'",
        ),
        (
            {"shapes": {"ids": (1, 0)}, "sequence_lengths": None},
            r"`shapes` for input 'ids' must hold positive.*\(1, 0\)",
        ),
        (
            {"shapes": {"ids": (2, 9)}, "sequence_lengths": None, "batch_size": 3},
            "`shapes`, `batch_size` and the model must agree.*batch_size=3",
        ),
        ({"target": "tpu"}, r"`target` must be one of \['cpu', 'gpu'\].*'tpu'"),
        ({"quantization": "int4"}, "`quantization` must be None or one of.*'int4'"),
        ({"representative_data": ROWS}, "`representative_data` is for.*=None"),
        (
            {
                "quantization": "int8_dense",
                "representative_data": ROWS,
                "target": "gpu",
            },
            "`target='gpu'` takes float activations",
        ),
        (
            {"quantization": "int8_dense", "representative_data": [[1] * 8]},
            "`representative_data` must not be longer.*8 ids for the length 7",
        ),
        ({"quantized_tolerance": 0.1}, "`quantized_tolerance` is for quantized files"),
        (
            {"quantization": "float16", "quantized_tolerance": -1.0},
            "`quantized_tolerance` must be a finite number of at least 0",
        ),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.compile(text, re.DOTALL)):
        export_tflite(
            ids_model(),
            tmp_path / "out",
            **({"samples": ROWS, "sequence_lengths": (7,)} | arguments),
        )
    assert left_in(tmp_path) == []


def test_a_missing_runtime_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'keras-mha\[tflite\]'"):
        export_tflite(ids_model(), tmp_path, samples=ROWS)


def test_models_quantized_by_keras_to_less_than_int8_are_refused(
    tmp_path: Path,
) -> None:
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = keras.layers.Embedding(11, 4, name="table")(ids)
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    model = keras.Model(ids, keras.layers.Dense(2, name="dense")(pooled))
    model.get_layer("dense").quantize("int4")
    with pytest.raises(ValueError, match=r"quantized.*'dense' \(Dense\) .*'int4'"):
        export_tflite(model, tmp_path, sequence_lengths=(3,), samples=[[1, 2]])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lengths", "error"),
    [(8, TypeError), ("8", TypeError), ((0,), ValueError), ((True,), ValueError)],
)
def test_lengths_that_are_none_are_refused(
    lengths: Any, error: type[Exception], tmp_path: Path
) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(error, match="`sequence_lengths` must be a"):
        export_tflite(model, tmp_path, sequence_lengths=lengths, samples=[[1]])
