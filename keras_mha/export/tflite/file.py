"""Writes a TFLite file of a model of ids, and checks it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.lite.python.convert_phase import ConverterError

from keras_mha.export.device.form import Target
from keras_mha.export.endpoint import Specs, tensor_infos
from keras_mha.export.files import size_of
from keras_mha.export.parity import Arrays, check_parity
from keras_mha.export.report import Parity, TensorInfo
from keras_mha.export.runtimes import tflite_schema
from keras_mha.export.runtimes.descriptor import File
from keras_mha.export.runtimes.fresh_process import run_in_fresh_process
from keras_mha.export.runtimes.litert import RUNTIME as LITERT
from keras_mha.export.tflite.edit import give_narrow_tables_one_scale
from keras_mha.export.tflite.graph import Contents, contents_of
from keras_mha.export.tflite.lint import findings
from keras_mha.export.tflite.plan import Padded, Plan
from keras_mha.export.tflite.quantization import (
    Quantization,
    ask_converter,
    quantize_dense,
)
from keras_mha.export.tflite.report import MediaPipeCheck, TFLiteFile


class Written(NamedTuple):
    """A file of ids.

    Attributes:
        file: What the report says of it.
        model: The file as objects, a `ModelT`.
        contents: What it holds.
    """

    file: TFLiteFile
    model: Any
    contents: Contents


def write_ids_file(plan: Plan, padded: Padded, path: Path) -> Written:
    """Writes the file of one length at `path`, and checks it."""
    name, ids = plan.input_name, padded.ids
    spec = tf.TensorSpec((plan.batch_size, padded.length), tf.int32, name)
    graph = path.with_suffix("")
    trace(
        lambda rows: plan.device.function({name: rows}),
        spec,
        graph,
        plan.signature_name,
        # What the function reads must hang on the module.
        [v.value for v in plan.device.model.variables],
    )
    content = convert(graph, plan.signature_name, plan.quantization, plan.notes)
    if padded.ranges is not None:
        cases = [{name: rows} for rows in batches(padded.ranges, plan.batch_size)]
        content = quantize_dense(content, plan.signature_name, cases)
    model = tflite_schema.unpack(content)
    by_row = plan.quantization == "dynamic_int8" and plan.target == "cpu"
    if by_row and give_narrow_tables_one_scale(model):
        content = tflite_schema.pack(model)
    contents = contents_of(tflite_schema.describe(model, len(content)))
    _check_contents(contents, plan.target)
    path.write_bytes(content)

    runs = batches(ids, plan.batch_size)
    answers, facts = run_litert(path, [{name: rows} for rows in runs], plan)
    compare = functools.partial(
        compare_runs, actual=answers, facts=facts, samples=len(ids)
    )
    rows = np.concatenate(runs)
    if plan.rounded_tolerance is not None and plan.quantization is None:
        # The weights that Keras rounded, without its rounding of activations.
        compare(plan.answer(rows, plan.device), tolerance=plan.tolerance)
    parity = compare(plan.answer(rows), tolerance=plan.allowed)
    run = (answers, facts, parity)
    file = describe_file(path, "ids", padded.length, {name: spec}, plan, contents, run)
    return Written(file, model, contents)


def trace(
    function: Callable[[Any], Any],
    spec: tf.TensorSpec,
    path: Path,
    signature_name: str,
    tracked: Any,
) -> None:
    """Traces a function of one tensor into a SavedModel, once.

    Args:
        function: Gives tensors by name.
        spec: Of the tensor, with its name.
        path: A directory that does not exist. Keras need not be able to load it.
        signature_name: The name of the signature.
        tracked: The variables and tables that the function reads.
    """
    traced = tf.function(function, autograph=False).get_concrete_function(spec)
    module: Any = tf.Module()
    module.tracked = tracked
    tf.saved_model.save(module, str(path), signatures={signature_name: traced})


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
        suspects = f"; {'; '.join(notes)}" if notes else ""
        raise ValueError(
            f"`model` needs operations that TFLite has not built in: {names}{suspects}"
        ) from error


def _check_contents(contents: Contents, target: Target) -> None:
    """Refuses a file that needs more than LiteRT, or that `target` computes wrongly."""
    if contents.custom or contents.dynamic:
        raise ValueError(
            "`model` does not convert to builtin operations of fixed shape. Received: "
            f"custom operations {list(contents.custom)}, "
            f"tensors of free shape {list(contents.dynamic)}"
        )
    broken = findings(contents.operators, target)
    errors = [str(finding) for finding in broken if finding.severity == "error"]
    if errors:
        raise ValueError(
            f"`model` does not convert to operators that `target={target!r}` runs "
            "rightly. Received: " + "; ".join(errors)
        )


def run_litert(
    path: Path, cases: Sequence[Arrays], plan: Plan, kind: str = "tflite"
) -> tuple[list[Arrays], dict[str, Any]]:
    """Runs the file in LiteRT, in a fresh process; see `keras_mha.export.runtimes`."""
    file = File(path, kind, plan.signature_name)
    return run_in_fresh_process(LITERT, file, cases, timeout=plan.timeout)


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
    kind: Literal["ids", "text", "mediapipe"],
    length: int,
    inputs: Specs,
    plan: Plan,
    contents: Contents,
    run: tuple[Sequence[Arrays], Mapping[str, Any], Parity],
    mediapipe: MediaPipeCheck | None = None,
) -> TFLiteFile:
    """Puts together what the report says of a file.

    Args:
        path: The file.
        kind: Its kind.
        length: The fixed length of its ids.
        inputs: What its inputs hold.
        plan: That of the export.
        contents: What the file holds.
        run: Its answers in LiteRT, facts about the runtime, and the comparison.
        mediapipe: The comparison in MediaPipe.
    """
    answers, facts, parity = run
    return TFLiteFile(
        path=str(path),
        kind=kind,
        sequence_length=length,
        batch_size=plan.batch_size,
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


def batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Cuts rows into batches; repeats the last row to fill the last batch."""
    filled = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % size, axis=0)])
    if filled.dtype.kind != "O":
        filled = filled.astype(np.int32)
    return [filled[i : i + size] for i in range(0, len(filled), size)]
