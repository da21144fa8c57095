"""Runs the same inputs through every runtime at hand and through the Keras model."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mha.export.cases import Cases, Opened, Samples, labels_of
from keras_mha.export.endpoint import Endpoint, describe
from keras_mha.export.formats import FORMATS
from keras_mha.export.parity import check_timeout, check_tolerance
from keras_mha.export.runtimes.descriptor import AbsentError
from keras_mha.export.runtimes.table import RUNTIMES
from keras_mha.export.verification.job import UNCOUNTED, Job, share
from keras_mha.export.verification.report import RuntimeCheck, VerificationReport

Paths = str | Path | Sequence[str | Path]


def verify(
    model: keras.Model,
    *,
    samples: Any,
    labels: Any = None,
    runtimes: Sequence[str] | None = None,
    tolerance: float = 1e-5,
    quantized_tolerance: float = 0.05,
    emulated_samples: int = 200,
    timed_calls: int = 20,
    output_names: Sequence[str] | None = None,
    signature_name: str = "serving_default",
    timeout: float = 600.0,
    **files: Paths | None,
) -> VerificationReport:
    """Runs the same inputs through every runtime at hand, and compares the values.

    The reference is `model` in this process. Each file runs in a process of its own,
    which cannot import `keras_mha`, in every runtime that reads it:

    | name | runtime | files |
    | --- | --- | --- |
    | `saved_model` | TensorFlow's C++ loader, XLA disabled | SavedModel |
    | `openvino` | OpenVINO in float32 | SavedModel, ONNX |
    | `litert` | LiteRT on the CPU | TFLite |
    | `litert_gpu` | LiteRT's GPU delegate on a software Vulkan driver | TFLite |
    | `litert_arm` | LiteRT on an emulated ARM processor | TFLite |
    | `mediapipe` | MediaPipe's TextClassifier on the CPU | TFLite with metadata |
    | `onnx_runtime` | ONNX Runtime | ONNX |

    Files need not be trusted: nothing but those processes loads them, and their end is
    a row of the report. A file of fixed length gets the rows that fit it, padded with
    0, and so does the model it is compared with. Files that take strings, and those for
    MediaPipe, are compared with the model of texts. MediaPipe cuts texts itself: values
    are compared where it makes the ids that the model's tokenizer makes, and labels
    everywhere. Latencies are medians of calls that the processes make in turns;
    TensorFlow's use all cores, the others' one.

    Args:
        model: A Keras model on the TensorFlow backend that was built, called or fitted.
        samples: Inputs in the structure that `model(...)` takes: an array, a list of
            strings, a list or dictionary of several, or a `tf.data.Dataset` of batches.
            Hundreds of rows from the real data are best.
        labels: The right class of each sample, whole numbers `(n,)`, for accuracies.
        runtimes: Names from the table above. Default: all.
        tolerance: Largest absolute difference allowed in any output.
        quantized_tolerance: The same for TFLite files with weights in less than
            float32.
        emulated_samples: Number of samples, the first ones, for `litert_gpu` and
            `litert_arm`, which are slow.
        timed_calls: Number of calls of which the latency is the median; 0 times none.
        output_names: Names of the outputs, as the exporters had them.
        signature_name: Name of the signature in SavedModel and TFLite files.
        timeout: Seconds that one runtime may take for one file.
        **files: One or more files for each format, by its name: `saved_model`, a
            SavedModel or a directory of numbered versions, of which the highest is
            taken; `tflite`; `onnx`.

    Returns:
        The report; `passed` sums it up. A runtime that is not installed gives a row
        "not run", never "ok".

    Raises:
        FileNotFoundError: If a file does not exist.
        TypeError: If `model` or `samples` are of the wrong type.
        ValueError: If a file is missing, or an argument is out of its domain.

    Example:

    >>> import tempfile
    >>> import keras, numpy as np
    >>> from keras_mha.export import export_saved_model, verify
    >>> model = keras.Sequential([
    ...     keras.Input((3,), name="features"),
    ...     keras.layers.Dense(2, activation="softmax", name="probabilities"),
    ... ])
    >>> rows = np.eye(3, dtype="float32")
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = export_saved_model(model, directory, samples=rows)
    ...     report = verify(
    ...         model, samples=rows, saved_model=directory, runtimes=["saved_model"]
    ...     )
    >>> [(check.runtime, check.status) for check in report.checks]
    [('Keras', 'reference'), ('TensorFlow C++ loader, XLA disabled', 'ok')]
    >>> report.passed
    True
    """
    check_tolerance(tolerance)
    check_tolerance(quantized_tolerance, "quantized_tolerance")
    check_timeout(timeout)
    _check_count("emulated_samples", emulated_samples, 1)
    _check_count("timed_calls", timed_calls, 0)
    names = _check_runtimes(runtimes)
    paths = _list_files(files)
    endpoint, arrays = describe(model, samples, output_names)
    inputs = Samples(endpoint, arrays)
    free = inputs.in_batches
    right = _check_labels(labels, free)

    jobs: list[Job] = []
    for name, path in paths:
        of_file = [
            Job(path, RUNTIMES[runtime], right)
            for runtime in names
            if any(_format_of(kind) == name for kind in RUNTIMES[runtime].reads)
        ]
        jobs += of_file
        ready = [job for job in of_file if job.find(inputs)]
        if not ready:
            continue
        reader = importlib.import_module(f"keras_mha.export.{name}.reader")
        try:
            opened: Opened = reader.open_file(
                path, inputs, signature_name=signature_name, timeout=timeout
            )
        except AbsentError as error:
            for job in ready:
                job.skip(str(error))
            continue
        except ValueError as error:
            for job in ready:
                job.fail(str(error))
            continue
        allowed = quantized_tolerance if opened.quantized else tolerance
        for job in ready:
            job.open(opened, allowed, emulated_samples)

    with ExitStack() as stack:
        for job in jobs:
            job.start(stack, in_turns=timed_calls > 0, timeout=timeout)
        model_time = _take_turns(endpoint, free, jobs, timed_calls, timeout)
        for job in jobs:
            job.finish(model_time, timeout)
    return VerificationReport(
        model=model.name,
        parameters=model.count_params(),
        keras=keras.__version__,
        tensorflow=tf.__version__,
        blocked=("keras_mha",),  # in every process; most block more
        checks=(_reference(free, right, model_time), *(job.check for job in jobs)),
    )


def _check_count(argument: str, count: int, least: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise ValueError(
            f"`{argument}` must be an integer of at least {least}. Received: {count}"
        )


def _check_runtimes(names: Sequence[str] | None) -> list[str]:
    if names is None:
        return list(RUNTIMES)
    unknown = [name for name in names if name not in RUNTIMES]
    if unknown or isinstance(names, str) or not names:
        raise ValueError(
            f"`runtimes` must be a list of some of {list(RUNTIMES)}. Received: {names}"
        )
    return list(names)


def _list_files(files: Mapping[str, Paths | None]) -> list[tuple[str, Path]]:
    """Returns the files, each with the name of its format, in the table's order."""
    unknown = [name for name in files if name not in FORMATS]
    if unknown:
        raise TypeError(
            f"`verify` takes files of the formats {list(FORMATS)}. Received: {unknown}"
        )
    paths = [
        (name, Path(path)) for name in FORMATS for path in _several(files.get(name))
    ]
    if not paths:
        *most, last = (f"`{name}`" for name in FORMATS)
        raise ValueError(f"One of {', '.join(most)} and {last} must name a file")
    for name, path in paths:
        if not path.exists():
            raise FileNotFoundError(f"`{name}`: {path} does not exist")
    return paths


def _several(paths: Paths | None) -> Sequence[str | Path]:
    return [paths] if isinstance(paths, str | Path) else paths or ()


def _format_of(kind: str) -> str:
    return kind.partition("/")[0]


def _check_labels(labels: Any, cases: Cases) -> np.ndarray | None:
    if labels is None:
        return None
    right = np.asarray(labels)
    if right.shape != (cases.rows,) or right.dtype.kind not in "iu":
        raise ValueError(
            f"`labels` must be {cases.rows} whole numbers, one for each sample. "
            f"Received: {right.dtype} of shape {right.shape}"
        )
    if labels_of(cases.expected, cases.rows) is None:
        raise ValueError(
            "`labels` need a model with one output of shape (B, C). Received: "
            f"{ {name: a.shape for name, a in cases.expected[0].items()} }"
        )
    return right


def _reference(
    cases: Cases, right: np.ndarray | None, seconds: float | None
) -> RuntimeCheck:
    labels = labels_of(cases.expected, cases.rows)
    return RuntimeCheck(
        file="",
        runtime="Keras",
        status="reference",
        version=keras.__version__,
        samples=cases.rows,
        accuracy=share(labels, right),
        latency=None if seconds is None else 1.0,
    )


def _take_turns(
    endpoint: Endpoint, cases: Cases, jobs: Sequence[Job], calls: int, timeout: float
) -> float | None:
    """Times the model and every job in turns; returns the model's median seconds."""
    if not calls:
        return None
    function = tf.function(endpoint.function, autograph=False)
    inputs = {name: tf.constant(array) for name, array in cases.inputs[-1].items()}
    seconds = []
    for _ in range(UNCOUNTED + calls):
        start = time.perf_counter()
        for answer in function(inputs).values():
            answer.numpy()
        seconds.append(time.perf_counter() - start)
        for job in jobs:
            job.take_turn(timeout)
    return statistics.median(seconds[UNCOUNTED:])
