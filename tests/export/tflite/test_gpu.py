"""Operators put in place of those that the GPU delegate does not take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from keras_mha.export.runtimes import tflite_schema
from keras_mha.export.tflite.gpu import mend_for_gpu
from keras_mha.export.tflite.lint import findings
from tests.support.gpu_runs import run_on_both
from tests.support.tflite_files import D, S, contents, convert, on, values

# Each with the rule that it breaks, and the shape of its input.
BROKEN: dict[str, tuple[str, tuple[int, ...], Callable[[Any], Any]]] = {
    "item": ("strided-slice-axes", (1, S, D), lambda x: tf.nn.relu(x)[:, 2]),
    "last": ("strided-slice-axes", (1, S, D), lambda x: tf.exp(x)[:, -1, 1:3]),
    "steps": ("strided-slice-axes", (1, S, D), lambda x: tf.exp(x)[0, 1:6:2]),
    "taken": ("gather-rank", (1, S, D), lambda x: tf.gather(tf.exp(x), 2, axis=1)),
    "rank 2": ("elementwise-constant", (S, D), lambda x: tf.nn.relu(x) + values(S, D)),
    "wider": (
        "elementwise-constant",
        (1, S),
        lambda x: tf.reshape(tf.nn.relu(x), (1, 1, 1, S)) * values(1, 1, S, S),
    ),
    "rank 3": (
        "elementwise-constant",
        (1, S, D),
        lambda x: values(1, 2, S, D) - tf.nn.relu(x),
    ),
}


def mended(content: bytes) -> bytes:
    model = tflite_schema.unpack(content)
    assert mend_for_gpu(model, len(content))
    return tflite_schema.pack(model)


def answer(content: bytes, **case: np.ndarray) -> np.ndarray:
    return Interpreter(model_content=content).get_signature_runner()(**case)["y"]


@pytest.mark.parametrize(("rule", "shape", "function"), BROKEN.values(), ids=BROKEN)
def test_what_breaks_a_rule_is_written_otherwise(
    rule: str, shape: tuple[int, ...], function: Callable[[Any], Any]
) -> None:
    content = convert(function, on(shape))
    assert {one.rule for one in findings(contents(content).operators, "gpu")} == {rule}
    other = mended(content)
    assert findings(contents(other).operators, "gpu") == ()
    x = values(*shape, seed=11)
    assert np.ptp(answer(content, x=x)) > 0.1
    np.testing.assert_array_equal(answer(other, x=x), answer(content, x=x))


def test_ids_of_two_axes_are_looked_up_along_one() -> None:
    table = values(11, D)
    content = convert(lambda ids: tf.gather(table, ids), on((2, S), tf.int32))
    other = mended(content)
    assert findings(contents(other).operators, "gpu") == ()
    ids = np.random.default_rng(3).integers(0, 11, (2, S)).astype("int32")
    np.testing.assert_array_equal(answer(other, x=ids), table[ids])


def test_int64_on_the_way_is_passed_by() -> None:
    def function(ids: Any) -> Any:
        wide = tf.cast(ids, tf.int64)
        return tf.cast(tf.minimum(tf.cast(wide, tf.int32), 3), tf.float32)

    content = convert(function, on((2, S), tf.int32))
    assert contents(content).builtin["CAST"] == 3
    other = mended(content)
    assert contents(other).builtin["CAST"] == 1
    ids = np.random.default_rng(3).integers(0, 11, (2, S)).astype("int32")
    np.testing.assert_array_equal(answer(other, x=ids), np.minimum(ids, 3))


def test_what_breaks_no_rule_stays() -> None:
    content = convert(lambda x: tf.nn.relu(x)[:, 1:] * 2.0, on((1, S, D)))
    model = tflite_schema.unpack(content)
    before = tflite_schema.pack(model)
    assert not mend_for_gpu(model, len(content))
    assert tflite_schema.pack(model) == before


@pytest.mark.gpu_software
@pytest.mark.parametrize(("rule", "shape", "function"), BROKEN.values(), ids=BROKEN)
def test_the_delegate_is_right_on_it(
    tmp_path: Path,
    driver: str,
    rule: str,
    shape: tuple[int, ...],
    function: Callable[[Any], Any],
) -> None:
    del driver, rule
    path = tmp_path / "model.tflite"
    path.write_bytes(mended(convert(function, on(shape))))
    answers = run_on_both(path, x=values(*shape, seed=11))
    assert answers.facts["fully_accelerated"] is True
    assert answers.difference < 1e-5
