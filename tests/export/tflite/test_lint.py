"""Negative controls: for each rule a file that breaks it and no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf

from keras_mha.export import Finding, export_tflite, lint_tflite
from keras_mha.export.tflite.lint import RULES, findings
from tests.support import small_models, tflite_files
from tests.support.tflite_files import D, S, convert, edited, on, values

# TensorFlow's own calibration runs in its old interpreter, which says that it is old.
pytestmark = pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")


def lint(content: bytes, target: Any) -> tuple[Finding, ...]:
    return findings(tflite_files.contents(content).operators, target)


def with_flex() -> bytes:
    spec = tf.lite.TargetSpec()
    spec.supported_ops = [
        tf.lite.OpsSet.TFLITE_BUILTINS,
        tf.lite.OpsSet.SELECT_TF_OPS,
    ]
    return convert(tf.linalg.inv, on((3, 3)), target_spec=spec)


def with_variables() -> bytes:
    """The converter's trap: a Keras model as the object that is tracked."""
    model = small_models.dense_model()
    signature = [tf.TensorSpec((1, 3), tf.float32)]
    function = tf.function(model.call, input_signature=signature)
    return tf.lite.TFLiteConverter.from_concrete_functions(
        [function.get_concrete_function()], model
    ).convert()


def with_code(code: int) -> bytes:
    def edit(model: Any) -> None:
        model.operatorCodes[0].builtinCode = code

    return edited(convert(tf.exp, on((S, D))), edit)


def with_new_axis() -> bytes:
    """Today's converter writes a reshape instead; older ones did not."""

    def edit(model: Any) -> None:
        model.subgraphs[0].operators[1].builtinOptions.newAxisMask = 1

    return edited(convert(lambda x: tf.exp(x)[:, 1:], on((1, S, D))), edit)


def attention_in_int8() -> bytes:
    return convert(
        tflite_files.masked_attention, on((1, S, D)), **tflite_files.int8_settings()
    )


def lookup_by_one_scale() -> bytes:
    return tflite_files.with_one_scale(tflite_files.lookup())


def plus(*shape: int) -> Callable[[Any], Any]:
    """A sum with a constant, of what is no input: the delegate copies inputs."""
    return lambda x: tf.nn.relu(x) + values(*shape)


def constant_in_half_precision() -> bytes:
    spec = tf.lite.TargetSpec()
    spec.supported_types = [tf.float16]
    return convert(
        plus(S, 601),
        on((S, 601)),
        optimizations=[tf.lite.Optimize.DEFAULT],
        target_spec=spec,
    )


GATHERED = values(11, D)
# The rule, the severity on the CPU and on the GPU, the operator, the file.
CONTROLS: list[tuple[str, str | None, str | None, str, Callable[[], bytes]]] = [
    ("cpu-operator", "error", None, "STABLEHLO_ADD", lambda: with_code(163)),
    ("cpu-operator", "error", None, "UNKNOWN_9999", lambda: with_code(9999)),
    (
        "gpu-operator",
        None,
        "error",
        "LOG_SOFTMAX",
        lambda: convert(tf.nn.log_softmax, on((1, S, D))),
    ),
    ("flex", "error", "error", "FlexMatrixInverse", with_flex),
    (
        "custom-operator",
        "warning",
        "error",
        "MatrixInverse",
        lambda: convert(tf.linalg.inv, on((3, 3)), allow_custom_ops=True),
    ),
    ("variable", "error", "error", "VAR_HANDLE", with_variables),
    (
        "dynamic-shape",
        "warning",
        "error",
        "EXP",
        lambda: convert(tf.exp, on((None, D))),
    ),
    (
        "rank",
        None,
        "error",
        "RESHAPE",
        lambda: convert(lambda x: tf.reshape(x, (1, S, 1, 2, 3)) * 2, on((1, S, D))),
    ),
    (
        "gather-rank",
        None,
        "error",
        "GATHER",
        lambda: convert(lambda x: tf.gather(GATHERED, x), on((1, S), tf.int32)),
    ),
    (
        "gather-rank",
        None,
        "error",
        "GATHER",
        lambda: convert(lambda x: tf.gather(x, 3, axis=1), on((1, S, D))),
    ),
    ("embedding-scale", None, "error", "EMBEDDING_LOOKUP", lookup_by_one_scale),
    (
        "strided-slice-axes",
        None,
        "error",
        "STRIDED_SLICE",
        lambda: convert(lambda x: x[:, 0], on((1, S, D))),
    ),
    ("strided-slice-axes", None, "error", "STRIDED_SLICE", with_new_axis),
    (
        "strided-slice-bool",
        None,
        "error",
        "STRIDED_SLICE",
        lambda: convert(
            lambda x: tf.cast((x > 3)[:, :5], tf.float32), on((1, S), tf.int32)
        ),
    ),
    ("elementwise-constant", None, "error", "ADD", constant_in_half_precision),
    (
        "elementwise-constant",
        None,
        "error",
        "SUB",
        lambda: convert(lambda x: values(S, D) - tf.nn.relu(x), on((S, D))),
    ),
    (
        "elementwise-constant",
        None,
        "error",
        "ADD",
        # The trap as users meet it: the converter folds the reshape of the lookup.
        lambda: convert(
            lambda x: (
                tf.reshape(tf.one_hot(tf.reshape(x, (S,)), 11) @ GATHERED, (1, S, D))
                + values(1, S, D)
            ),
            on((1, S), tf.int32),
        ),
    ),
    (
        "split-merge",
        None,
        "error",
        "ADD",
        lambda: convert(lambda x: tf.add(*tf.split(x, 2, -1)), on((1, S, D))),
    ),
    ("int8-attention", "warning", "error", "BATCH_MATMUL", attention_in_int8),
]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("rule", "cpu", "gpu", "operator", "make"),
    CONTROLS,
    ids=[f"{control[0]}-{control[3]}" for control in CONTROLS],
)
def test_each_bad_file_breaks_its_own_rule(
    rule: str,
    cpu: str | None,
    gpu: str | None,
    operator: str,
    make: Callable[[], bytes],
    target: str,
) -> None:
    if rule == "cpu-operator" and target == "gpu":
        rule, gpu = "gpu-operator", "error"  # the GPU's list is a part of the CPU's
    severity = {"cpu": cpu, "gpu": gpu}[target]
    found = lint(make(), target)
    if severity is None:
        assert found == ()
        return
    assert {(one.rule, one.severity) for one in found} == {(rule, severity)}
    assert found[0].operator == operator
    line = str(found[0])
    assert line.startswith(f"{severity}: {rule}: {operator} (operator ")
    for tensor in (*found[0].inputs, *found[0].outputs):
        assert f"{tensor.name} {tensor.dtype}" in line


def test_each_rule_has_its_bad_file() -> None:
    assert {control[0] for control in CONTROLS} == {rule.name for rule in RULES}


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_good_files_have_no_findings(target: str) -> None:
    def mixed(x: Any) -> Any:
        return tf.nn.relu(x @ values(D, D)) @ values(D, D, seed=6)

    ids = {"ids": ((1, S), tf.int32)}

    def choose(x: Any) -> Any:
        return tf.nn.softmax(tf.reshape(x @ values(D, D), (S, D)))

    for content in (
        convert(choose, on((1, S, D)), **tflite_files.int8_settings()),
        convert(tflite_files.classify, ids),
        convert(tflite_files.classify, ids, optimizations=[tf.lite.Optimize.DEFAULT]),
        convert(mixed, on((1, S, D)), **tflite_files.int8_settings()),
        tflite_files.lookup(),
    ):
        assert lint(content, target) == ()


def test_a_finding_says_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(convert(lambda x: tf.exp(x)[:, 0], on((1, S, D))))
    (finding,) = lint_tflite(path, target="gpu")
    assert (finding.subgraph, finding.index) == (0, 1)
    assert (finding.operator, finding.rule) == ("STRIDED_SLICE", "strided-slice-axes")
    assert (finding.inputs[0].dtype, finding.inputs[0].shape) == ("float32", (1, S, D))
    assert finding.outputs[0].shape == (1, D)
    assert "reshape" in finding.message
    assert lint_tflite(path) == ()


def test_files_of_the_exporter_run_on_the_cpu_and_the_gpu(tmp_path: Path) -> None:
    ids = keras.Input((None,), dtype="int32", name="ids")
    model = keras.Model(ids, keras.layers.Embedding(11, 3)(ids))
    (file,) = export_tflite(
        model, tmp_path, sequence_lengths=(S,), samples=[[3, 1, 4]]
    ).files
    assert lint_tflite(file.path) == ()
    assert lint_tflite(file.path, "gpu") == ()


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='`target` must be "cpu" or "gpu".*npu'):
        lint_tflite(tmp_path / "model.tflite", target="npu")


@pytest.mark.parametrize(
    ("activation", "constant", "misread"),
    [
        *[((D,), shape, True) for shape in [(D,), (1, D)]],
        *[((D,), shape, False) for shape in [(), (1,)]],
        *[((S, D), shape, False) for shape in [(), (D,), (1, D), (1, 1)]],
        *[((S, D), shape, True) for shape in [(S, D), (S, 1), (1, S, D), (1, 1, D)]],
        *[((1, S, D), shape, False) for shape in [(S, D), (1, S, D), (1, 1, S, D)]],
        *[((1, S, D), shape, True) for shape in [(2, S, D), (2, 1, S, D)]],
        *[((2, S, D), shape, True) for shape in [(2, 1, 1), (2, S, D)]],
        *[((3, 2, S, D), shape, False) for shape in [(3, 1, 1, 1), (2, S, D)]],
    ],
)
@pytest.mark.parametrize("operation", [tf.add, tf.multiply])
def test_which_constants_are_misread(
    activation: tuple[int, ...],
    constant: tuple[int, ...],
    misread: bool,
    operation: Callable[..., Any],
) -> None:
    content = convert(
        lambda x: operation(tf.nn.relu(x), values(*constant)), on(activation)
    )
    rules = [one.rule for one in lint(content, "gpu")]
    assert rules == (["elementwise-constant"] if misread else [])


SPLITS: list[tuple[Callable[..., Any], int, bool]] = [
    (lambda a, b: a + b, 2, True),
    (lambda a, b: tf.nn.gelu(a - b), 2, True),
    (lambda a, b: tf.maximum(a, b), 2, True),  # noqa: PLW0108  (it also takes a name)
    (lambda a, b: tf.concat([b, a], -1), 2, True),
    (lambda a, b, _: a + b, 3, True),
    (lambda a, b: a * b, 2, False),
    (lambda a, b: a * tf.nn.gelu(b), 2, False),
    (lambda a, b: tf.concat([-b, a], -1), 2, False),
    (lambda a, b: (a + b) * a, 2, False),
    (lambda a, b, c: a + b + c, 3, False),
    (lambda a, b, c: tf.matmul(a, b, transpose_b=True) @ c, 3, False),
]


@pytest.mark.parametrize(("function", "parts", "wrong"), SPLITS)
def test_which_splits_are_merged(
    function: Callable[..., Any], parts: int, wrong: bool
) -> None:
    content = convert(
        lambda x: function(*tf.split(tf.exp(x), parts, -1)), on((1, S, D))
    )
    rules = [one.rule for one in lint(content, "gpu")]
    assert rules == (["split-merge"] if wrong else [])
