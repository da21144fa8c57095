"""The operators on the lint's list for the GPU, and those off it, each run there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from keras_mha.export.tflite.graph import Operator, contents_of, read_file
from keras_mha.export.tflite.lint import GPU_OPERATORS, lint_tflite
from tests.export.tflite.test_lint import CONTROLS, with_new_axis
from tests.support import tflite_files
from tests.support.gpu_runs import Answers, run_on_both
from tests.support.tflite_files import D, H, N, S, V, convert, on, values


def operators_in(path: Path) -> tuple[Operator, ...]:
    return contents_of(read_file(path, timeout=60.0)).operators


def _split(x: Any) -> Any:
    first, second, third = tf.split(x, 3, axis=-1)
    return first * 2.0 + second * 3.0 + third * 5.0


FLOATS: dict[str, Callable[[Any], Any]] = {
    "ABS": tf.abs,
    "ADD": lambda x: x + tf.exp(x),
    "ARG_MAX": lambda x: tf.argmax(x, -1, output_type=tf.int32),
    "ATAN2": lambda x: tf.atan2(x, tf.exp(x)),
    "BATCH_MATMUL": lambda x: tf.matmul(x, tf.exp(x), transpose_b=True),
    "CAST": lambda x: tf.cast(x > 0, tf.float32),
    "CEIL": tf.math.ceil,
    "CONCATENATION": lambda x: tf.concat([x, tf.exp(x)], -1),
    "COS": tf.cos,
    "CUMSUM": lambda x: tf.cumsum(x, axis=1),
    "DIV": lambda x: x / (tf.exp(x) + 1.0),
    "ELU": tf.nn.elu,
    "EQUAL": lambda x: tf.cast(tf.equal(x, tf.abs(x)), tf.float32),
    "EXP": tf.exp,
    "FLOOR": tf.floor,
    "FLOOR_DIV": lambda x: tf.math.floordiv(x, tf.exp(x)),
    "FLOOR_MOD": lambda x: tf.math.floormod(x, tf.exp(x)),
    "FULLY_CONNECTED": lambda x: x @ values(D, 5),
    "GATHER": lambda x: tf.gather(x, [2, 0, 5], axis=1),
    "GELU": tf.nn.gelu,
    "GREATER": lambda x: tf.cast(x > tf.tanh(x * -3), tf.float32),
    "GREATER_EQUAL": lambda x: tf.cast(x >= tf.tanh(x * -3), tf.float32),
    "HARD_SWISH": lambda x: x * tf.nn.relu6(x + 3) / 6,
    "LEAKY_RELU": tf.nn.leaky_relu,
    "LESS": lambda x: tf.cast(x < tf.tanh(x * -3), tf.float32),
    "LESS_EQUAL": lambda x: tf.cast(x <= tf.tanh(x * -3), tf.float32),
    "LOG": lambda x: tf.math.log(tf.abs(x) + 1.0),
    "LOGICAL_AND": lambda x: tf.cast((x > 0) & (x < 1), tf.float32),
    "LOGICAL_OR": lambda x: tf.cast((x > 1) | (x < -1), tf.float32),
    "LOGISTIC": tf.sigmoid,
    "MAXIMUM": lambda x: tf.maximum(x, tf.tanh(x * -3)),
    "MEAN": lambda x: tf.reduce_mean(x, -1, keepdims=True),
    "MINIMUM": lambda x: tf.minimum(x, tf.tanh(x * -3)),
    "MIRROR_PAD": lambda x: tf.pad(x, [[0, 0], [0, 0], [1, 2]], "REFLECT"),
    "MUL": lambda x: x * tf.exp(x),
    "NEG": tf.negative,
    "NOT_EQUAL": lambda x: tf.cast(tf.not_equal(x, tf.abs(x)), tf.float32),
    "PACK": lambda x: tf.stack([x, tf.exp(x)], 0),
    "PAD": lambda x: tf.pad(x, [[0, 0], [0, 0], [1, 2]]),
    "POW": lambda x: tf.pow(tf.abs(x) + 1.0, tf.sigmoid(x)),
    "REDUCE_ANY": lambda x: tf.cast(tf.reduce_any(x > 1, -1), tf.float32),
    "REDUCE_MAX": lambda x: tf.reduce_max(x, -1, keepdims=True),
    "REDUCE_MIN": lambda x: tf.reduce_min(x, -1, keepdims=True),
    "REDUCE_PROD": lambda x: tf.reduce_prod(x, -1, keepdims=True),
    "RELU": tf.nn.relu,
    "RELU6": tf.nn.relu6,
    "RESHAPE": lambda x: tf.reshape(tf.exp(x), (1, N, S, H)),
    "REVERSE_V2": lambda x: tf.reverse(x, [1]),
    "ROUND": tf.round,
    "RSQRT": lambda x: tf.math.rsqrt(tf.abs(x) + 1.0),
    "SELECT": lambda x: tf.where(x > 0, x, tf.exp(x)),
    "SELECT_V2": lambda x: tf.where(x[:, :, :1] > 0, tf.exp(x), tf.tanh(x)),
    "SIGN": tf.sign,
    "SIN": tf.sin,
    "SLICE": lambda x: tf.slice(tf.exp(x), [0, 0, 1], [1, S, 3]),
    "SOFTMAX": tf.nn.softmax,
    "SPLIT": _split,
    "SQRT": lambda x: tf.sqrt(tf.abs(x) + 1.0),
    "SQUARE": tf.square,
    "SQUARED_DIFFERENCE": lambda x: tf.math.squared_difference(x, tf.tanh(x * -3)),
    "STRIDED_SLICE": lambda x: tf.exp(x)[:, ::2, 1:],
    "SUB": lambda x: x - tf.exp(x),
    "SUM": lambda x: tf.reduce_sum(x, -1),
    "TANH": tf.tanh,
    "TILE": lambda x: tf.tile(x, [1, 1, 3]),
    "TRANSPOSE": lambda x: tf.transpose(x, (0, 2, 1)),
    "UNPACK": lambda x: tf.add(*tf.unstack(tf.concat([x, x * 2.0], 0), axis=0)),
}
INTEGERS: dict[str, Callable[[Any], Any]] = {
    "EMBEDDING_LOOKUP": lambda x: tf.one_hot(tf.reshape(x, (S,)), V) @ values(V, D),
    "ONE_HOT": lambda x: tf.one_hot(x, V),
}
IMAGES: dict[str, Callable[[Any], Any]] = {
    "AVERAGE_POOL_2D": lambda x: tf.nn.avg_pool2d(x, 2, 2, "VALID"),
    "CONV_2D": lambda x: tf.nn.conv2d(x, values(3, 3, 3, 5), 2, "SAME"),
    "DEPTHWISE_CONV_2D": lambda x: tf.nn.depthwise_conv2d(
        x, values(3, 3, 3, 2), (1, 1, 1, 1), "SAME"
    ),
    "DEPTH_TO_SPACE": lambda x: tf.nn.depth_to_space(tf.concat([x] * 4, -1), 2),
    "MAX_POOL_2D": lambda x: tf.nn.max_pool2d(x, 2, 2, "VALID"),
    "RESIZE_BILINEAR": lambda x: tf.image.resize(x, (14, 22)),
    "RESIZE_NEAREST_NEIGHBOR": lambda x: tf.image.resize(x, (14, 22), "nearest"),
    "SPACE_TO_DEPTH": lambda x: tf.nn.space_to_depth(x[:, :6, :10], 2),
    "LOGICAL_NOT": lambda x: tf.cast(~((x > 0) & (x < 1)), tf.float32),
    "REDUCE_ALL": lambda x: tf.cast(tf.reduce_all(x > -1, -1), tf.float32),
}
# What a quantized file adds; the last test has both.
QUANTIZED = {"QUANTIZE", "DEQUANTIZE"}


def test_each_operator_of_the_list_is_tried() -> None:
    assert {*FLOATS, *INTEGERS, *IMAGES, *QUANTIZED} == GPU_OPERATORS


@pytest.mark.gpu_software
@pytest.mark.parametrize("name", [*FLOATS, *INTEGERS, *IMAGES])
def test_the_operators_of_the_list_are_answered_rightly(
    name: str, answers: Callable[..., Answers], tmp_path: Path
) -> None:
    if name in FLOATS:
        got = answers(FLOATS[name], x=values(1, S, D, seed=9))
    elif name in IMAGES:
        got = answers(IMAGES[name], x=values(1, 7, 11, 3, seed=9))
    else:
        got = answers(INTEGERS[name], x=np.array([[3, 1, 4, 1, 5, 9, 2]], "int32"))
    operators = operators_in(tmp_path / "model.tflite")
    assert name in [operator.name for operator in operators]
    assert got.facts["fully_accelerated"] is True
    assert np.ptp(got.cpu) > 0
    # The driver's sine and cosine have an error of 2e-4.
    assert got.difference < (1e-3 if "SIN" in name or "COS" in name else 1e-5)


@pytest.mark.gpu_software
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("ADD_N", lambda x: tf.add_n([x, tf.exp(x), tf.abs(x)])),
        ("L2_NORMALIZATION", lambda x: tf.nn.l2_normalize(x, -1)),
        ("LOG_SOFTMAX", tf.nn.log_softmax),
    ],
)
def test_operators_off_the_list_are_refused(
    name: str,
    function: Callable[[Any], Any],
    answers: Callable[..., Answers],
    tmp_path: Path,
) -> None:
    got = answers(function, x=values(1, S, D, seed=9))
    found = lint_tflite(tmp_path / "model.tflite", target="gpu")
    assert [(one.rule, one.operator) for one in found] == [("gpu-operator", name)]
    assert got.facts["fully_accelerated"] is False


@pytest.mark.gpu_software
@pytest.mark.parametrize(
    ("name", "shape", "function"),
    [
        ("TOPK_V2", (1, S, D), lambda x: tf.math.top_k(tf.exp(x), 2).values),
        (
            "TRANSPOSE_CONV",
            (1, 7, 11, 3),
            lambda x: tf.nn.conv2d_transpose(
                x, values(3, 3, 5, 3), (1, 14, 22, 5), 2, "SAME"
            ),
        ),
    ],
)
def test_operators_off_the_list_are_taken_and_wrong(
    name: str,
    shape: tuple[int, ...],
    function: Callable[[Any], Any],
    answers: Callable[..., Answers],
    tmp_path: Path,
) -> None:
    got = answers(function, x=values(*shape, seed=9))
    found = lint_tflite(tmp_path / "model.tflite", target="gpu")
    assert [(one.rule, one.operator) for one in found] == [("gpu-operator", name)]
    assert got.facts["fully_accelerated"] is True
    assert got.difference > 0.1


REFUSED = {"gather-rank", "rank", "strided-slice-axes", "strided-slice-bool"}


@pytest.mark.gpu_software
@pytest.mark.parametrize(
    "make",
    [
        make
        for rule, _, _, _, make in CONTROLS
        # The file with a new axis was edited and does not run.
        if rule in REFUSED and make is not with_new_axis
    ],
)
@pytest.mark.usefixtures("driver")
def test_what_the_rules_refuse_the_delegate_refuses(
    make: Callable[[], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(make())
    (given,) = {
        (tensor.shape, tensor.dtype)
        for operator in operators_in(path)
        for tensor in operator.inputs
        if tensor.is_input
    }
    case = np.arange(np.prod(given[0])).reshape(given[0]).astype(given[1])
    got = run_on_both(path, x=case)
    assert got.facts["fully_accelerated"] is False
    assert got.difference < 1e-5


@pytest.mark.gpu_software
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.usefixtures("driver")
def test_dense_layers_in_int8_are_answered_as_on_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(
        convert(
            lambda x: tf.nn.relu(x @ values(D, D)) @ values(D, D, seed=6),
            on((1, S, D)),
            **tflite_files.int8_settings(),
        )
    )
    names = {operator.name for operator in operators_in(path)}
    assert names >= QUANTIZED
    got = run_on_both(path, x=values(1, S, D, seed=77))
    assert got.facts["fully_accelerated"] is True
    assert got.difference < 1e-5
