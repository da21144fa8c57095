"""Export to TFLite files for LiteRT, one for each sequence length."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.lite.python.convert_phase import ConverterError

from keras_mha.attention.api import implementation_scope
from keras_mha.export.endpoint import Endpoint, describe, tensor_infos
from keras_mha.export.files import size_of, staging
from keras_mha.export.flatbuffer import read_contents
from keras_mha.export.fresh_process import run_in_fresh_process
from keras_mha.export.parity import check_parity, check_tolerance
from keras_mha.export.report import TensorInfo, TFLiteFile, TFLiteReport

_BLOCKED = ("keras_mha", "keras", "tensorflow", "tensorflow_text")


def export_tflite(
    model: keras.Model,
    directory: str | Path,
    *,
    sequence_lengths: Sequence[int] = (128,),
    batch_size: int = 1,
    samples: Any,
    tolerance: float = 1e-5,
    signature_name: str = "serving_default",
    timeout: float = 600.0,
) -> TFLiteReport:
    """Writes `model` as `<directory>/model_<S>.tflite` for each length S.

    A file takes int32 ids `(batch_size, S)` and gives the model's outputs, both under
    the model's own names in the signature `signature_name`. All its shapes are fixed
    and all its operations built in. Shorter texts are padded with 0. The attention
    layers are traced in their portable form (`keras_mha.attention.portable`), whose
    values are the same for rows with at least one id that is not padding.

    Each file is loaded by ai-edge-litert in a fresh process that can import none of
    `keras_mha`, `keras` and `tensorflow`, and its values are compared with the model's
    on the padded samples. Only when all are right are they renamed into place; files
    of the same names are replaced. After an error nothing new is left.

    Args:
        model: A built Keras model on the TensorFlow backend with one integer input
            `(B, T)`, the ids.
        directory: Where the files go; made if absent.
        sequence_lengths: The lengths S.
        batch_size: The fixed number of rows.
        samples: Ids: an array `(n, T)`, or a list of rows that may differ in length.
        tolerance: Largest absolute difference allowed in any output. The default
            suits probabilities (measured: under 1e-6).
        signature_name: Name of the signature.
        timeout: Seconds that the check of one file may take.

    Returns:
        What was written, and how far its values are from the model's.

    Raises:
        ImportError: If ai-edge-litert is not installed.
        ParityError: If a value differs by more than `tolerance`.
        VerificationError: If a file does not run in the fresh process.
        TypeError: If an argument has the wrong type.
        ValueError: If the model is no such model, is quantized or computes in half
            precision, needs
            operations that TFLite has not built in, or a sample is longer than one of
            `sequence_lengths`.

    Example:

    >>> import tempfile
    >>> import keras
    >>> from keras_mha.export import export_tflite
    >>> ids = keras.Input((None,), dtype="int32", name="ids")
    >>> vectors = keras.layers.Embedding(11, 5)(ids)
    >>> pooled = keras.layers.GlobalAveragePooling1D()(vectors)
    >>> head = keras.layers.Dense(2, activation="softmax", name="probabilities")
    >>> model = keras.Model(ids, head(pooled))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     report = export_tflite(
    ...         model, directory, sequence_lengths=(7,), samples=[[3, 1, 4], [1, 5]]
    ...     )
    >>> file = report.files[0]
    >>> file.inputs[0].name, file.inputs[0].shape, file.outputs[0].name
    ('ids', (1, 7), 'probabilities')
    >>> file.parity.max_absolute_difference < 1e-5
    True
    """
    if importlib.util.find_spec("ai_edge_litert") is None:
        raise ImportError(
            "`export_tflite` needs ai-edge-litert: pip install 'keras-mha[tflite]'"
        )
    lengths = _check_sizes("sequence_lengths", sequence_lengths)
    _check_sizes("batch_size", [batch_size])
    check_tolerance(tolerance)
    _check_input(model)
    _check_precision(model)
    rows = _as_rows(samples)
    directory = Path(directory)
    with staging(directory) as staged:
        files = []
        for length in lengths:
            endpoint, arrays = describe(model, _pad(rows, length))
            file = _export_one(
                endpoint,
                next(iter(arrays.values())),
                staged / f"model_{length}.tflite",
                batch_size=batch_size,
                signature_name=signature_name,
                tolerance=tolerance,
                timeout=timeout,
            )
            files.append(file)
        # Only now, when all are right.
        for i, file in enumerate(files):
            final = directory / Path(file.path).name
            Path(file.path).replace(final)
            files[i] = replace(file, path=str(final))

    return TFLiteReport(
        model=model.name,
        parameters=model.count_params(),
        keras=keras.__version__,
        tensorflow=tf.__version__,
        blocked=_BLOCKED,
        signature_name=signature_name,
        files=tuple(files),
    )


def _check_sizes(argument: str, sizes: Sequence[int]) -> tuple[int, ...]:
    whole = isinstance(sizes, Sequence) and all(
        isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes
    )
    if not sizes or not whole:
        raise ValueError(f"`{argument}` must be positive integers. Received: {sizes}")
    return tuple(dict.fromkeys(sizes))


def _check_input(model: keras.Model) -> None:
    """Refuses a model whose inputs are known and are not ids alone."""
    inputs = getattr(model, "inputs", None)
    if inputs is None:
        return
    described = ", ".join(f"{x.name}: {x.dtype} {x.shape}" for x in inputs)
    if any(x.dtype == "string" for x in inputs):
        raise ValueError(
            "`model` must take integer ids; strings need operations that TFLite has "
            "not built in. Pass the part of the model after its tokenizer. Received "
            f"the inputs {described}"
        )
    if len(inputs) != 1 or "int" not in inputs[0].dtype or len(inputs[0].shape) != 2:
        raise ValueError(
            "`model` must have one integer input of shape (B, T), the ids. Received "
            f"the inputs {described}"
        )


def _check_precision(model: keras.Model) -> None:
    for layer in model._flatten_layers(include_self=False):
        if layer.quantization_mode is not None:
            raise ValueError(
                "`model` must not be quantized by Keras, whose form TFLite cannot "
                f"take. Received: layer {layer.name!r} with quantization mode "
                f"{layer.quantization_mode!r}"
            )
        if layer.compute_dtype in ("float16", "bfloat16"):
            raise ValueError(
                "`model` must compute in float32, as TFLite does. Received: layer "
                f"{layer.name!r} with compute_dtype={layer.compute_dtype!r}. Load "
                "the weights into a model made with the policy 'float32'."
            )


def _as_rows(samples: Any) -> list[np.ndarray]:
    rows = [np.asarray(row) for row in samples]
    if not rows or any(row.ndim != 1 or row.dtype.kind not in "iu" for row in rows):
        raise ValueError(
            "`samples` must be one or more rows of integer ids. Received: "
            f"{[(str(row.dtype), row.shape) for row in rows[:3]]}"
        )
    return rows


def _pad(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    longest = max(map(len, rows))
    if longest > length:
        raise ValueError(
            "`samples` must not be longer than any of `sequence_lengths`. Received: "
            f"a row of {longest} ids for the length {length}"
        )
    return np.stack([np.pad(row, (0, length - len(row))) for row in rows])


def _convert(graph: Path, signature_name: str) -> bytes:
    converter = tf.lite.TFLiteConverter.from_saved_model(
        str(graph), signature_keys=[signature_name]
    )
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    try:
        return converter.convert()
    except ConverterError as error:
        names = sorted({one.operator.name for one in error.errors} - {""})
        if not names:
            raise
        raise ValueError(
            f"`model` needs operations that TFLite has not built in: {names}"
        ) from error


def _export_one(
    endpoint: Endpoint,
    ids: np.ndarray,
    path: Path,
    *,
    batch_size: int,
    signature_name: str,
    tolerance: float,
    timeout: float,
) -> TFLiteFile:
    """Writes the file at `path`, checks it, and says what it found."""
    ((name, free),) = endpoint.inputs.items()
    spec = tf.TensorSpec((batch_size, ids.shape[1]), tf.int32)
    graph = path.with_suffix("")
    with implementation_scope("portable"):
        endpoint.write(graph, {name: spec}, signature_name=signature_name)
    content = _convert(graph, signature_name)
    contents = read_contents(content)
    if contents.custom or contents.dynamic:
        raise ValueError(
            "`model` does not convert to builtin operations of fixed shape. Received: "
            f"custom operations {list(contents.custom)}, "
            f"tensors of free shape {list(contents.dynamic)}"
        )
    path.write_bytes(content)

    # The last batch is filled up with its own last row.
    rows = np.pad(ids, ((0, -len(ids) % batch_size), (0, 0)), "edge")
    wanted = endpoint.answer({name: rows.astype(free.dtype.as_numpy_dtype)})
    starts = range(0, len(rows), batch_size)
    answers, facts = run_in_fresh_process(
        "litert",
        path,
        [{name: rows[i : i + batch_size].astype(np.int32)} for i in starts],
        blocked=_BLOCKED,
        options={"signature_name": signature_name},
        timeout=timeout,
    )
    parity = check_parity(
        [{n: a[i : i + batch_size] for n, a in wanted.items()} for i in starts],
        answers,
        tolerance=tolerance,
        samples=len(ids),
        runtime=facts["runtime"],
        runtime_version=facts["version"],
    )
    return TFLiteFile(
        path=str(path),
        sequence_length=ids.shape[1],
        batch_size=batch_size,
        size_bytes=size_of(path),
        inputs=tensor_infos({name: spec}),
        outputs=tuple(
            TensorInfo(n, array.dtype.name, array.shape)
            for n, array in sorted(answers[0].items())
        ),
        operators=contents.operators,
        delegate_partitions=facts["delegate_partitions"],
        parity=parity,
    )
