"""Files that need not be trusted: a ValueError that names them, or their graph."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import Builder

from keras_mha.export import VerificationError, lint_tflite
from keras_mha.export.runtimes import tflite_schema
from keras_mha.export.tflite import graph
from keras_mha.export.tflite.graph import contents_of, read_file
from keras_mha.export.tflite.lint import findings
from tests.support.tflite_files import (
    S,
    classify,
    contents,
    convert,
    edited,
    on,
    values,
)


@pytest.fixture(scope="module")
def content() -> bytes:
    return convert(classify, {"ids": ((1, S), tf.int32)})


def refuse(path: Path, content: bytes, text: str, **kwargs: Any) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} cannot be read(?s:.*){text}"):
        read_file(path, **({"timeout": 60.0} | kwargs))


# What is read.


def test_operators_and_their_tensors(tmp_path: Path) -> None:
    table = values(11, 5)
    path = tmp_path / "model.tflite"
    path.write_bytes(
        convert(
            lambda x: tf.nn.relu(tf.gather(table, x))[:, ::3],
            on((None, 7), tf.int32),
        )
    )
    gather, relu, strided = contents_of(read_file(path, timeout=60.0)).operators
    assert [one.name for one in (gather, relu, strided)] == [
        "GATHER",
        "RELU",
        "STRIDED_SLICE",
    ]
    assert [(one.subgraph, one.index) for one in (gather, strided)] == [(0, 0), (0, 2)]
    embeddings, ids = gather.inputs
    assert (embeddings.shape, embeddings.dtype) == ((11, 5), "float32")
    assert (embeddings.constant, embeddings.is_input) == (True, False)
    assert (ids.shape, ids.dtype, ids.rank) == ((None, 7), "int32", 2)
    assert (ids.constant, ids.is_input, ids.is_dynamic) == (False, True, True)
    assert relu.inputs == gather.outputs
    assert not relu.inputs[0].constant
    assert strided.options["endMask"] & 0b11 == 0b11
    assert strided.options["newAxisMask"] == 0
    assert strided.outputs[0].shape == (None, 3, 5)


def test_half_precision_weights_are_constants() -> None:
    content = convert(
        lambda x: tf.nn.relu(x) + values(7, 601),
        on((7, 601)),
        optimizations=[tf.lite.Optimize.DEFAULT],
        target_spec=half_precision(),
    )
    operators = contents(content).operators
    assert [one.name for one in operators] == ["DEQUANTIZE", "RELU", "ADD"]
    assert [one.constant for one in operators[2].inputs] == [False, True]
    assert operators[0].inputs[0].dtype == "float16"


def half_precision() -> tf.lite.TargetSpec:
    spec = tf.lite.TargetSpec()
    spec.supported_types = [tf.float16]
    return spec


# What is refused.


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'a'} does not exist"):
        read_file(tmp_path / "a", timeout=60.0)
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match=f"{path} must be a file"):
            read_file(path, timeout=60.0)


def zipped() -> bytes:
    path = Path("model.keras")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", "{}")
    return path.read_bytes()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: b"", "it is empty"),
        (lambda: b"TFL3", "bytes 4 to 7 must be"),
        (zipped, "it is a zip archive, as a .keras file is"),
        (
            lambda: tf.io.encode_png(np.zeros((5, 3, 1), "uint8")).numpy(),
            "it is a PNG image",
        ),
        (lambda: np.random.default_rng(0).bytes(997), "it is not a TFLite file"),
        (lambda: b"\x20\0\0\0TFL3" + b"\0" * 5, "outside its 13 bytes"),
        (lambda: b"\0\0\0\0TFL3" + b"\0" * 50, "its schema has version 0, not 3"),
    ],
)
def test_foreign_files_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], bytes],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    refuse(tmp_path / "model.tflite", make(), text)


def test_a_file_cut_off_anywhere_is_refused(content: bytes) -> None:
    broken = tflite_schema.BrokenFileError
    for end in [*range(8, len(content) - 8, 13), len(content) - 8]:
        with pytest.raises(broken, match="corrupt or cut off|no graph|schema"):
            tflite_schema.read(content[:end])


@pytest.mark.parametrize("offset", [0x7FFFFFF0, 0xFFFFFFF0])
@pytest.mark.parametrize("place", ["root", "vector"])
def test_offsets_out_of_range_are_refused(
    tmp_path: Path, content: bytes, offset: int, place: str
) -> None:
    root = struct.unpack_from("<I", content)[0]
    fields = root - struct.unpack_from("<i", content, root)[0]
    subgraphs = root + struct.unpack_from("<H", content, fields + 4 + 2 * 2)[0]
    damaged = bytearray(content)
    struct.pack_into("<I", damaged, 0 if place == "root" else subgraphs, offset)
    refuse(tmp_path / "model.tflite", bytes(damaged), "outside its [0-9]+ bytes")


def put(path: str, value: Any) -> Callable[[Any], None]:
    """An edit: `put("subgraphs.0.tensors", [])`."""

    def edit(model: Any) -> None:
        *parents, last = path.split(".")
        for name in parents:
            model = model[int(name)] if name.isdigit() else getattr(model, name)
        setattr(model, last, value)

    return edit


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (put("version", 4), "schema has version 4, not 3"),
        (put("subgraphs", []), "it holds no graph"),
        (put("subgraphs.0.operators.3.inputs", [0, 9999]), "operator 3 of graph 0"),
        (put("subgraphs.0.operators.3.inputs", [-2]), "operator 3 of graph 0"),
        (put("subgraphs.0.operators.3.outputs", [-1]), "operator 3 of graph 0"),
        (put("subgraphs.0.operators.3.opcodeIndex", 99), "has the code 99"),
        (put("subgraphs.0.inputs", [9999]), "an input of graph 0"),
        (put("subgraphs.0.outputs", [-1]), "an output of graph 0"),
        (put("subgraphs.0.tensors.2.buffer", 9999), "tensor 2 of graph 0 is in buffer"),
        (put("subgraphs.0.tensors.2.type", 99), "tensor 2 of graph 0 .* type 99"),
        (put("subgraphs.0.tensors.2.shape", [-7]), "tensor 2 of graph 0 .* shape"),
        (put("buffers.2.offset", 1 << 40), "a buffer ends at byte"),
    ],
)
def test_files_that_contradict_themselves_are_refused(
    tmp_path: Path, content: bytes, edit: Callable[[Any], None], text: str
) -> None:
    refuse(tmp_path / "model.tflite", edited(content, edit), text)


def bomb(times: int) -> bytes:
    """A few kilobytes that stand for `times`² tensors: all offsets are the same."""

    def repeated(start: Callable[..., Any], offset: int) -> int:
        start(builder, times)
        for _ in range(times):
            builder.PrependUOffsetTRelative(offset)
        return builder.EndVector()

    builder = Builder(1024)
    schema.TensorStart(builder)
    tensors = repeated(schema.SubGraphStartTensorsVector, schema.TensorEnd(builder))
    schema.SubGraphStart(builder)
    schema.SubGraphAddTensors(builder, tensors)
    graph = schema.SubGraphEnd(builder)
    subgraphs = repeated(schema.ModelStartSubgraphsVector, graph)
    schema.ModelStart(builder)
    schema.ModelAddVersion(builder, 3)
    schema.ModelAddSubgraphs(builder, subgraphs)
    builder.Finish(schema.ModelEnd(builder), b"TFL3")
    return bytes(builder.Output())


def test_a_file_that_takes_for_ever_is_given_up(tmp_path: Path) -> None:
    # 10^10 tensors in 800 kB.
    refuse(tmp_path / "model.tflite", bomb(100_000), "longer than timeout", timeout=3.0)


# Several, since it is chance what the last bytes are asked for.
@pytest.mark.parametrize(
    "limit",
    [
        67_870_000,
        *(pytest.param(x, marks=pytest.mark.slow) for x in (64_000_000, 67_100_000)),
    ],
)
def test_a_file_that_takes_all_memory_is_given_up(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(tflite_schema.__file__).read_text("utf-8")
    assert "_MEMORY = 2 << 30" in source
    small = source.replace("_MEMORY = 2 << 30", f"_MEMORY = {limit}")
    for name in ("child", "descriptor", "exchange"):
        script = Path(tflite_schema.__file__).with_name(f"{name}.py")
        (tmp_path / f"{name}.py").write_bytes(script.read_bytes())
    (tmp_path / "tflite_schema.py").write_text(small, "utf-8")
    monkeypatch.setattr(graph.fresh_process, "_CHILD", tmp_path / "child.py")
    refuse(tmp_path / "model.tflite", bomb(100_000), "takes more memory")


def test_an_end_of_the_process_is_an_error(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise VerificationError("tflite_schema was killed by signal 11.")

    monkeypatch.setattr(graph.fresh_process, "run_in_fresh_process", crash)
    refuse(tmp_path / "model.tflite", content, "killed by signal 11")


# Flipped bytes: the graph, whatever it is now, or the one error.


def flipped(content: bytes, seed: int) -> bytes:
    generator = np.random.default_rng(seed)
    damaged = bytearray(content)
    for place in generator.integers(0, len(content), generator.integers(1, 5)):
        damaged[place] ^= int(generator.integers(1, 256))
    return bytes(damaged)


def test_flipped_bytes_are_read_or_refused(content: bytes) -> None:
    refused = 0
    for seed in range(600):
        try:
            graphs = tflite_schema.read(flipped(content, seed))
        except tflite_schema.BrokenFileError:
            refused += 1
            continue
        operators = contents_of(graphs).operators
        for target in ("cpu", "gpu"):
            assert all(map(str, findings(operators, target)))
    assert 50 < refused < 550  # the flips do reach what is read, and not its head alone


def lint_flipped(path: Path, content: bytes, seeds: range) -> None:
    for seed in seeds:
        path.write_bytes(flipped(content, seed))
        try:
            found = lint_tflite(path, target="gpu")
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017  (either outcome is right)
        else:
            assert all(map(str, found))


def test_flipped_files_are_linted_or_refused(tmp_path: Path, content: bytes) -> None:
    lint_flipped(tmp_path / "model.tflite", content, range(1000, 1010))


@pytest.mark.slow
def test_many_flipped_files_are_linted_or_refused(
    tmp_path: Path, content: bytes
) -> None:
    lint_flipped(tmp_path / "model.tflite", content, range(2000, 2100))
