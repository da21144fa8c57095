"""Writes one TFLite file of a model of ids, and checks it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import tensorflow as tf
from tensorflow.lite.python.convert_phase import ConverterError

from keras_mha.export.device.form import device_form, reads_padded_queries
from keras_mha.export.endpoint import Endpoint, Specs, tensor_infos
from keras_mha.export.files import size_of
from keras_mha.export.parity import check_parity
from keras_mha.export.report import Parity, TensorInfo
from keras_mha.export.runtimes.descriptor import File
from keras_mha.export.runtimes.fresh_process import run_in_fresh_process
from keras_mha.export.runtimes.litert import RUNTIME as LITERT
from keras_mha.export.runtimes.tflite_graph import read_graphs
from keras_mha.export.tflite.counts import read_contents
from keras_mha.export.tflite.edit import min_runtime_version
from keras_mha.export.tflite.graph import operators_of
from keras_mha.export.tflite.lint import Target, findings
from keras_mha.export.tflite.narrow_tables import with_one_scale_for_narrow_tables
from keras_mha.export.tflite.quantization import ask_converter, quantize_dense
from keras_mha.export.tflite.report import MediaPipeCheck, TFLiteFile

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """What holds for all files of an export; see `export_tflite`.

    Attributes:
        rounded_tolerance: What a quantized file or model may differ by; `None` where
            nothing is rounded.
        notes: One sentence for each layer that is exported as it is.
    """

    batch_size: int
    quantization: str | None
    target: str
    signature_name: str
    tolerance: float
    rounded_tolerance: float | None
    timeout: float
    notes: tuple[str, ...]

    @property
    def allowed(self) -> float:
        """What the files may differ by from the model."""
        rounded = self.rounded_tolerance
        return self.tolerance if rounded is None else rounded


def write_ids_file(
    endpoint: Endpoint,
    ids: np.ndarray,
    ranges: np.ndarray | None,
    path: Path,
    settings: Settings,
) -> TFLiteFile:
    """Writes the file at `path`, checks it, and says what it found."""
    ((name, free),) = endpoint.inputs.items()
    spec = tf.TensorSpec((settings.batch_size, ids.shape[1]), tf.int32, name)
    graph = path.with_suffix("")
    padded_queries_read = reads_padded_queries(endpoint, ids)
    with device_form(
        endpoint.model,
        target=settings.target,
        padded_queries_read=padded_queries_read,
    ):
        trace(
            lambda given: endpoint.function({name: given}),
            spec,
            graph,
            settings.signature_name,
            # What the function reads must hang on the module.
            [v.value for v in endpoint.model.variables],
        )
    content = convert(
        graph, settings.signature_name, settings.quantization, settings.notes
    )
    if ranges is not None:
        cases = [{name: rows} for rows in batches(ranges, settings.batch_size)]
        content = quantize_dense(content, settings.signature_name, cases)
    if settings.quantization == "dynamic_int8" and settings.target == "cpu":
        content = with_one_scale_for_narrow_tables(content)
    contents = read_contents(content)
    if contents.custom or contents.dynamic:
        raise ValueError(
            "`model` does not convert to builtin operations of fixed shape. Received: "
            f"custom operations {list(contents.custom)}, "
            f"tensors of free shape {list(contents.dynamic)}"
        )
    _check_operators(content, settings.target)
    path.write_bytes(content)

    runs = batches(ids, settings.batch_size)
    answers, facts = run_litert(path, [{name: rows} for rows in runs], settings)
    rows = np.concatenate(runs).astype(free.dtype.as_numpy_dtype)
    compare = functools.partial(
        compare_runs, actual=answers, facts=facts, samples=len(ids)
    )
    if settings.rounded_tolerance is not None and settings.quantization is None:
        # The weights that Keras rounded, without its rounding of activations.
        with device_form(endpoint.model, target=settings.target):
            wanted = endpoint.answer({name: rows})
        compare(wanted, tolerance=settings.tolerance)
    parity = compare(endpoint.answer({name: rows}), tolerance=settings.allowed)
    return describe_file(
        path, "ids", ids.shape[1], {name: spec}, settings, (answers, facts, parity)
    )


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
    quantization: str | None,
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
    # With Flex operations besides, tensorflow-text's would become such too.
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


def _check_operators(content: bytes, target: str) -> None:
    """Refuses a file whose operators `target` refuses or computes wrongly."""
    found = findings(operators_of(read_graphs(content)), cast("Target", target))
    errors = [str(finding) for finding in found if finding.severity == "error"]
    if errors:
        raise ValueError(
            f"`model` does not convert to operators that `target={target!r}` runs "
            "rightly. Received: " + "; ".join(errors)
        )


def run_litert(
    path: Path, cases: Sequence[Arrays], settings: Settings, kind: str = "tflite"
) -> tuple[list[Arrays], dict[str, Any]]:
    """Runs the file in LiteRT, in a fresh process; see `keras_mha.export.runtimes`."""
    file = File(path, kind, settings.signature_name)
    return run_in_fresh_process(LITERT, file, cases, timeout=settings.timeout)


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
    settings: Settings,
    found: tuple[Sequence[Arrays], Mapping[str, Any], Parity],
    mediapipe: MediaPipeCheck | None = None,
) -> TFLiteFile:
    """What the report says of a file.

    Args:
        path: The file.
        kind: Its kind.
        length: The fixed length of its ids.
        inputs: What its inputs hold.
        settings: Those of the export.
        found: Its answers in LiteRT, facts about the runtime, and the comparison.
        mediapipe: The comparison in MediaPipe.
    """
    answers, facts, parity = found
    content = path.read_bytes()
    contents = read_contents(content)
    builtin = {n: count for n, count in contents.operators.items() if n != "CUSTOM"}
    return TFLiteFile(
        path=str(path),
        kind=kind,
        sequence_length=length,
        batch_size=settings.batch_size,
        size_bytes=size_of(path),
        inputs=tensor_infos(inputs),
        outputs=tuple(
            TensorInfo(name, array.dtype.name, array.shape)
            for name, array in sorted(answers[0].items())
        ),
        operators=builtin,
        custom_operations=contents.custom,
        min_runtime_version=min_runtime_version(content),
        delegate_partitions=facts["delegate_partitions"],
        parity=parity,
        mediapipe=mediapipe,
    )


def batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Cuts rows into batches, the last one filled up with its own last row."""
    filled = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % size, axis=0)])
    own = filled if filled.dtype.kind == "O" else filled.astype(np.int32)
    return [own[i : i + size] for i in range(0, len(own), size)]
