"""Writes a TFLite file of a model, and checks it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.lite.python.convert_phase import ConverterError

from keras_mha.export.drawn import drawn_cases
from keras_mha.export.endpoint import Endpoint, tensor_infos
from keras_mha.export.files import size_of
from keras_mha.export.inputs import Specs
from keras_mha.export.parity import check_parity
from keras_mha.export.report import Parity, TensorInfo
from keras_mha.export.runtimes import tflite_schema
from keras_mha.export.runtimes.descriptor import File
from keras_mha.export.runtimes.fresh_process import run_in_fresh_process
from keras_mha.export.runtimes.litert import RUNTIME as LITERT
from keras_mha.export.samples import Arrays
from keras_mha.export.tflite.edit import give_narrow_tables_one_scale
from keras_mha.export.tflite.gpu import mend_for_gpu
from keras_mha.export.tflite.graph import Contents, contents_of
from keras_mha.export.tflite.inputs import FixedInputs
from keras_mha.export.tflite.lint import findings
from keras_mha.export.tflite.plan import Plan
from keras_mha.export.tflite.quantization import (
    Quantization,
    ask_converter,
    quantize_dense,
)
from keras_mha.export.tflite.report import Kind, MediaPipeCheck, TFLiteFile
from keras_mha.export.tflite.signs import take_signs_of_bits


class Written(NamedTuple):
    """A file of a model.

    Attributes:
        file: What the report says of it.
        model: The file as objects, a `ModelT`.
        contents: What it holds.
    """

    file: TFLiteFile
    model: Any
    contents: Contents


def write_model_file(plan: Plan, inputs: FixedInputs, path: Path) -> Written:
    """Writes the file of these inputs at `path`, and checks it."""
    with traced(
        plan.device.function,
        inputs.specs,
        plan.signature_name,
        # What the function reads must hang on the module.
        [v.value for v in plan.device.model.variables],
    ) as graph:
        content = convert(graph, plan.signature_name, plan.quantization, plan.notes)
    of_drawn = _drawn(inputs)
    if inputs.ranges is not None:
        # Other inputs may leave the ranges that it is rounded by: they go first.
        path.write_bytes(content)
        _try(plan, inputs, path, of_drawn).compare(plan.endpoint, plan.tolerance)
        of_drawn = []
        cases = list(map(inputs.typed, inputs.in_batches(inputs.ranges)))
        content = quantize_dense(content, plan.signature_name, cases)
    model = tflite_schema.unpack(content)
    if _edit(model, plan, len(content)):
        content = tflite_schema.pack(model)
    contents = contents_of(tflite_schema.describe(model, len(content)))
    _check_contents(contents, plan)
    path.write_bytes(content)

    trial = _try(plan, inputs, path, of_drawn)
    if plan.rounded_tolerance is not None and plan.quantization is None:
        # The weights that Keras rounded, without its rounding of activations.
        trial.compare(plan.device, plan.tolerance)
    run = (trial.answers, trial.facts, trial.compare(plan.endpoint, plan.allowed))
    kind = "tensors" if inputs.length is None else "ids"
    file = describe_file(path, kind, inputs, inputs.specs, contents, run)
    return Written(file, model, contents)


class _Trial(NamedTuple):
    """A file's answers to the samples, and to inputs that were drawn.

    Attributes:
        answers: Its answers.
        facts: Facts about the runtime.
        compare: Compares them with an endpoint's, within a tolerance.
    """

    answers: Sequence[Arrays]
    facts: Mapping[str, Any]
    compare: Callable[[Endpoint, float], Parity]


def _try(
    plan: Plan, inputs: FixedInputs, path: Path, of_drawn: Sequence[Arrays]
) -> _Trial:
    runs = [*inputs.in_batches(inputs.samples), *of_drawn]
    answers, facts = run_litert(path, list(map(inputs.typed, runs)), plan)

    def compare(endpoint: Endpoint, tolerance: float) -> Parity:
        return check_parity(
            answers_of(endpoint, runs),
            answers,
            tolerance=tolerance,
            samples=inputs.endpoint.rows(inputs.samples),
            runtime=facts["runtime"],
            runtime_version=facts["version"],
            drawn=len(of_drawn),
            again=lambda: endpoint.answers_in_graph(runs),
        )

    return _Trial(answers, facts, compare)


def _drawn(inputs: FixedInputs) -> list[Arrays]:
    """Draws runs whose inputs were no samples, in the file's sizes."""
    cases, _ = drawn_cases(inputs.endpoint, inputs.samples)
    return [run for case in cases for run in inputs.in_batches(case)]


def _edit(model: Any, plan: Plan, size: int) -> bool:
    """Changes what the converter makes for all targets alike; tells if it did."""
    if plan.target == "gpu":
        return mend_for_gpu(model, size)
    if plan.quantization == "dynamic_int8":
        return give_narrow_tables_one_scale(model)
    return False


@contextlib.contextmanager
def traced(
    function: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    specs: Specs,
    signature_name: str,
    tracked: Any,
) -> Iterator[Path]:
    """Traces a function into a SavedModel, once, which is removed at the end.

    It stands in the system's directory for temporary files: TensorFlow takes some
    characters in the names of other directories for patterns.

    Args:
        function: Takes and gives tensors by name.
        specs: Of what it takes.
        signature_name: The name of the signature.
        tracked: The variables and tables that the function reads.
    """

    def of_arguments(*tensors: Any) -> Mapping[str, Any]:
        return function(dict(zip(specs, tensors, strict=True)))

    concrete = tf.function(of_arguments, autograph=False).get_concrete_function(
        *(tf.TensorSpec(spec.shape, spec.dtype, name) for name, spec in specs.items())
    )
    module: Any = tf.Module()
    module.tracked = tracked
    with tempfile.TemporaryDirectory() as directory:
        tf.saved_model.save(module, directory, signatures={signature_name: concrete})
        take_signs_of_bits(Path(directory))
        yield Path(directory)


def convert(
    graph: Path,
    signature_name: str,
    quantization: Quantization | None,
    notes: Sequence[str],
    *,
    custom: bool = False,
) -> bytes:
    """Converts the SavedModel at `graph`.

    Args:
        graph: The SavedModel.
        signature_name: The name of its signature.
        quantization: As in `export_tflite`.
        notes: What may be to blame where it does not convert.
        custom: Whether operations that are not built in stay as they are.
    """
    converter = tf.lite.TFLiteConverter.from_saved_model(
        str(graph), signature_keys=[signature_name]
    )
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    # If Flex operations were allowed, tensorflow-text's would become such too.
    converter.allow_custom_ops = custom
    ask_converter(converter, quantization)
    try:
        return converter.convert()
    except ConverterError as error:
        names = sorted({one.operator.name for one in error.errors} - {""})
        if not names:
            raise
        suspects = "".join(f"; {note}" for note in notes)
        raise ValueError(
            f"`model` needs operations that TFLite has not built in: {names}{suspects}"
        ) from error


def _check_contents(contents: Contents, plan: Plan) -> None:
    """Refuses a file that needs more than LiteRT, or that the target runs wrongly."""
    suspects = "".join(f"; {note}" for note in plan.notes)
    if contents.custom or contents.dynamic:
        raise ValueError(
            "`model` does not convert to builtin operations of fixed shape. Received: "
            f"custom operations {list(contents.custom)}, "
            f"tensors of free shape {list(contents.dynamic)}{suspects}"
        )
    broken = findings(contents.operators, plan.target)
    errors = [str(finding) for finding in broken if finding.severity == "error"]
    if errors:
        raise ValueError(
            f"`model` does not convert to operators that `target={plan.target!r}` "
            f"runs rightly. Received: {'; '.join(errors)}{suspects}"
        )


def run_litert(
    path: Path, cases: Sequence[Arrays], plan: Plan, kind: str = "tflite"
) -> tuple[list[Arrays], dict[str, Any]]:
    """Runs the file in LiteRT, in a fresh process; see `keras_mha.export.runtimes`."""
    file = File(path, kind, plan.signature_name)
    return run_in_fresh_process(LITERT, file, cases, timeout=plan.timeout)


def answers_of(endpoint: Endpoint, runs: Sequence[Arrays]) -> Sequence[Arrays]:
    """Returns the model's answers to runs of one size.

    All rows together where that gives the same, which is faster.
    """
    first, size = endpoint.answer(runs[0]), endpoint.rows(runs[0])
    if endpoint.unbatched or endpoint.batch_size is not None:
        return [first, *map(endpoint.answer, runs[1:])]
    rows = {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
    together = endpoint.answer(rows)
    cut = [
        {name: array[i * size : (i + 1) * size] for name, array in together.items()}
        for i in range(len(runs))
    ]
    if all(_is_near(first[name], cut[0][name]) for name in first):
        return cut
    return [first, *map(endpoint.answer, runs[1:])]


def _is_near(one: np.ndarray, other: np.ndarray) -> bool:
    """Tells whether rows were answered by themselves, but for rounding."""
    if one.shape != other.shape or one.dtype.kind != "f":
        return np.array_equal(one, other)
    return np.allclose(one, other, rtol=1e-3, atol=1e-3, equal_nan=True)


def compare_runs(
    wanted: Arrays,
    *,
    actual: Sequence[Arrays],
    facts: Mapping[str, Any],
    samples: int,
    tolerance: float,
) -> Parity:
    """Compares the model's answers to all rows with the file's to batches of them."""
    size = len(next(iter(actual[0].values())))
    rows = len(next(iter(wanted.values())))
    cut = [
        {name: array[i : i + size] for name, array in wanted.items()}
        for i in range(0, rows, size)
    ]
    return check_parity(
        cut,
        actual,
        tolerance=tolerance,
        samples=samples,
        runtime=facts["runtime"],
        runtime_version=facts["version"],
    )


def describe_file(
    path: Path,
    kind: Kind,
    fixed: FixedInputs,
    inputs: Specs,
    contents: Contents,
    run: tuple[Sequence[Arrays], Mapping[str, Any], Parity],
    mediapipe: MediaPipeCheck | None = None,
) -> TFLiteFile:
    """Puts together what the report says of a file.

    Args:
        path: The file.
        kind: Its kind.
        fixed: The inputs of the model in it.
        inputs: What the file's own inputs hold.
        contents: What the file holds.
        run: Its answers in LiteRT, facts about the runtime, and the comparison.
        mediapipe: The comparison in MediaPipe.
    """
    answers, facts, parity = run
    return TFLiteFile(
        path=str(path),
        kind=kind,
        sequence_length=fixed.length,
        batch_size=fixed.batch_size,
        size_bytes=size_of(path),
        inputs=tensor_infos(inputs),
        outputs=tuple(
            TensorInfo(name, array.dtype.name, array.shape)
            for name, array in sorted(answers[0].items())
        ),
        operators=contents.builtin,
        custom_operations=contents.custom,
        min_runtime_version=contents.min_runtime_version,
        delegate_partitions=facts["delegate_partitions"],
        parity=parity,
        mediapipe=mediapipe,
    )
