"""One scale for narrow int8 tables: smaller, and nearly as precise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mha
from keras_mha.export import export_tflite, lint_tflite
from keras_mha.export.runtimes.tflite_schema import pack, unpack
from keras_mha.export.tflite.edit import NARROW
from tests.support import small_models
from tests.support.tflite_files import convert, values, with_one_scale

IDS = np.array([[0, 5, 211, 7, 3]], "int32")
DYNAMIC = {"optimizations": [tf.lite.Optimize.DEFAULT]}


def lookup(table: np.ndarray, tied: bool = False) -> bytes:
    """A file that looks rows up in `table`, and may also multiply by it."""

    def function(ids: Any) -> Any:
        rows = tf.one_hot(tf.reshape(ids, [-1]), len(table)) @ tf.constant(table)
        if tied:
            rows = tf.matmul(rows, tf.constant(table), transpose_b=True)
        return rows[None]

    return convert(function, {"ids": (IDS.shape, tf.int32)}, **DYNAMIC)


def answer(content: bytes) -> np.ndarray:
    from ai_edge_litert.interpreter import Interpreter

    runner: Any = Interpreter(model_content=content, num_threads=1)
    return runner.get_signature_runner()(ids=IDS)["y"][0]


def test_it_is_smaller_and_off_by_no_more_than_rounding() -> None:
    table = values(223, 31)
    by_row = lookup(table)
    by_one = with_one_scale(by_row)
    # A float scale and a zero point of 8 bytes for each row but one.
    assert len(by_row) - len(by_one) == pytest.approx(222 * 12, abs=64)
    wanted = table[IDS[0]]
    got = answer(by_one)
    error = np.abs(got - wanted)
    # Half a step of the row's own scale, and half a step of the table's.
    assert error.max() <= np.abs(table).max() / 127 * 1.001
    assert error.max() > np.abs(answer(by_row) - wanted).max()
    assert not np.array_equal(got[1:], np.zeros_like(got[1:]))


@pytest.mark.parametrize("kind", ["wide", "uneven", "tied", "float"])
def test_other_tables_stay_as_they_are(kind: str) -> None:
    table = values(223, NARROW if kind == "wide" else 31)
    if kind == "uneven":
        table[7] *= 100.0
    content = lookup(table, tied=kind == "tied")
    if kind == "float":
        ids = {"ids": (IDS.shape, tf.int32)}
        content = convert(lambda x: tf.one_hot(x[0], 223)[None] @ table, ids)
    assert with_one_scale(content) == content


def test_constants_stay_aligned() -> None:
    content = pack(unpack(lookup(values(223, 31))))
    found = 0
    for buffer in unpack(content).buffers:
        if buffer.data is not None and len(buffer.data) >= 16:
            found += 1
            assert content.index(np.asarray(buffer.data).tobytes()) % 16 == 0
    assert found


def test_files_for_the_cpu_have_it_and_those_for_gpus_do_not(tmp_path: Path) -> None:
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = keras_mha.TokenAndPositionEmbedding(997, 7, 20)(ids)
    hidden = keras_mha.TransformerEncoderBlock(2, 13)(hidden)
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    head = keras.layers.Dense(2, activation="softmax", name="probabilities")
    model = small_models.randomize(keras.Model(ids, head(pooled)))
    files = {
        target: export_tflite(
            model,
            tmp_path / target,
            sequence_lengths=(7,),
            samples=[[3, 1, 4, 1, 5], [9, 2, 6], [996, 990]],
            target=target,
            quantization="dynamic_int8",
        ).files[0]
        for target in ("cpu", "gpu")
    }
    saved = files["gpu"].size_bytes - files["cpu"].size_bytes
    assert saved == pytest.approx(996 * 12, abs=999)
    found = lint_tflite(files["cpu"].path, "gpu")
    assert [finding.rule for finding in found] == ["embedding-scale"]
    assert lint_tflite(files["cpu"].path) == ()
    assert lint_tflite(files["gpu"].path, "gpu") == ()
    assert files["cpu"].delegate_partitions == files["gpu"].delegate_partitions == 1
