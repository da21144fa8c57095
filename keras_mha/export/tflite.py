"""Export to TFLite files for LiteRT, one for each sequence length."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf
from tensorflow.lite.python.convert_phase import ConverterError

from keras_mha.export.device_form import (
    TARGETS,
    device_form,
    layers_as_they_are,
    reads_padded_queries,
)
from keras_mha.export.endpoint import Endpoint, describe, tensor_infos
from keras_mha.export.files import size_of, staging
from keras_mha.export.flatbuffer import read_contents
from keras_mha.export.fresh_process import run_in_fresh_process
from keras_mha.export.graph import operators_of
from keras_mha.export.lint import Target, findings
from keras_mha.export.narrow_tables import with_one_scale_for_narrow_tables
from keras_mha.export.parity import check_parity, check_timeout, check_tolerance
from keras_mha.export.quantization import (
    TOLERANCES,
    ask_converter,
    check_quantization,
    quantize_dense,
)
from keras_mha.export.report import TensorInfo, TFLiteFile, TFLiteReport
from keras_mha.export.runtimes.tflite_graph import read_graphs

_BLOCKED = ("keras_mha", "keras", "tensorflow", "tensorflow_text")


def export_tflite(
    model: keras.Model,
    directory: str | Path,
    *,
    sequence_lengths: Sequence[int] = (128,),
    batch_size: int = 1,
    samples: Any,
    quantization: str | None = None,
    representative_data: Any = None,
    target: str = "cpu",
    tolerance: float = 1e-5,
    quantized_tolerance: float | None = None,
    signature_name: str = "serving_default",
    timeout: float = 600.0,
) -> TFLiteReport:
    """Writes `model` as `<directory>/model_<S>.tflite` for each length S.

    A file takes int32 ids `(batch_size, S)` and gives the model's outputs, both under
    the model's own names in the signature `signature_name`. All its shapes are fixed
    and all its operations built in. Shorter texts are padded with 0.

    The model is traced in its device form (`keras_mha.export.device_form`), in which
    our layers and stock Keras ones compute the same values in few operations, which
    delegates take: attention in its portable form (`keras_mha.attention.portable`),
    with one product for queries, keys and values. The values are the same for rows
    with at least one id that is not padding. Layers that are not known to have such a
    form are traced as they are, with a warning; outputs that are pooled by mask let
    attention skip what it gives to padding.

    Each file is loaded by ai-edge-litert in a fresh process that can import none of
    `keras_mha`, `keras` and `tensorflow`, and its values are compared with the model's
    on the padded samples. Only when all are right are they renamed into place; files
    of the same names are replaced. After an error nothing new is left.

    Args:
        model: A built Keras model on the TensorFlow backend with one integer input
            `(B, T)`, the ids. Layers that Keras quantized to int8 are dequantized,
            which is exact in the weights; Keras also rounds activations.
        directory: Where the files go; made if absent.
        sequence_lengths: The lengths S.
        batch_size: The fixed number of rows.
        samples: Ids: an array `(n, T)`, or a list of rows that may differ in length.
        quantization: How the file's numbers are made smaller. `"dynamic_int8"` keeps
            the weights of dense layers and embeddings in int8, a quarter of the size,
            and rounds what is multiplied by them row by row: the one to choose first.
            `"int8_dense"` also fixes the ranges of dense layers' inputs and outputs
            beforehand, from `representative_data`; attention stays float. `"float16"`
            halves the size, for delegates that compute in it.
        representative_data: Ids like `samples`, not longer than any S, from which
            `"int8_dense"` takes those ranges. Some hundred typical rows do.
        target: `"cpu"`, or `"gpu"` for files that LiteRT's GPU delegate is to take
            over whole: layers that stay as they are then raise instead of warning, and
            each row of an int8 embedding keeps a scale of its own, 12 bytes, without
            which the delegate answers wrongly.
        tolerance: Largest absolute difference allowed in any output of a float file.
            The default suits probabilities (measured: under 1e-6).
        quantized_tolerance: The same for quantized files, and for models that Keras
            quantized. Defaults, for probabilities, to 0.002 for `"float16"` and to
            0.05 otherwise.
        signature_name: Name of the signature.
        timeout: Seconds that the check of one file may take.

    Returns:
        What was written, and how far its values are from the model's.

    Raises:
        ImportError: If ai-edge-litert is not installed.
        ParityError: If a value differs by more than `tolerance`.
        VerificationError: If a file does not run in the fresh process.
        TypeError: If an argument has the wrong type.
        ValueError: If the model is no such model, is quantized by Keras in another
            way than int8, computes in half precision, needs operations that TFLite
            has not built in, or has a layer that `target` cannot take; if a sample is
            longer than one of `sequence_lengths`, or an argument is out of its domain
            or would be ignored.

    Warns:
        UserWarning: For each layer that was exported as it is.

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
    check_timeout(timeout)
    check_quantization(quantization, representative_data)
    _check_input(model)
    rounded = _check_precision(model)
    allowed = _tolerance_of_rounded(quantized_tolerance, quantization, rounded)
    notes = _check_target(model, target, quantization)
    rows = _as_rows(samples, "samples")
    ranges = (
        None
        if representative_data is None
        else _as_rows(representative_data, "representative_data")
    )
    directory = Path(directory)
    with staging(directory) as staged:
        files = []
        for length in lengths:
            endpoint, arrays = describe(model, _pad(rows, length, "samples"))
            file = _export_one(
                endpoint,
                next(iter(arrays.values())),
                staged / f"model_{length}.tflite",
                batch_size=batch_size,
                quantization=quantization,
                ranges=None
                if ranges is None
                else _pad(ranges, length, "representative_data"),
                target=target,
                notes=notes,
                signature_name=signature_name,
                tolerances=(tolerance, allowed),
                timeout=timeout,
            )
            files.append(file)
        # Only now, when all are right.
        for i, file in enumerate(files):
            final = directory / Path(file.path).name
            Path(file.path).replace(final)
            files[i] = replace(file, path=str(final))

    for note in notes:
        warnings.warn(f"`export_tflite`: {note}", UserWarning, stacklevel=2)
    return TFLiteReport(
        model=model.name,
        parameters=model.count_params(),
        keras=keras.__version__,
        tensorflow=tf.__version__,
        blocked=_BLOCKED,
        signature_name=signature_name,
        quantization=quantization,
        target=target,
        notes=notes,
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
            "not built in. Pass the part of the model after its tokenizer: "
            f"`without_tokenizer` gives it. Received the inputs {described}"
        )
    if len(inputs) != 1 or "int" not in inputs[0].dtype or len(inputs[0].shape) != 2:
        raise ValueError(
            "`model` must have one integer input of shape (B, T), the ids. Received "
            f"the inputs {described}"
        )


def _check_precision(model: keras.Model) -> bool:
    """Refuses half precision; returns whether Keras quantized any layer."""
    layers = model._flatten_layers(include_self=False)
    for layer in layers:
        if layer.compute_dtype in ("float16", "bfloat16"):
            raise ValueError(
                "`model` must compute in float32, as TFLite does. Received: layer "
                f"{layer.name!r} with compute_dtype={layer.compute_dtype!r}. Load "
                "the weights into a model made with the policy 'float32'."
            )
    return any(
        layer.quantization_mode is not None
        for layer in model._flatten_layers(include_self=False)
    )


def _check_target(
    model: keras.Model, target: str, quantization: str | None
) -> tuple[str, ...]:
    """Returns which layers stay as they are, or refuses them for the target."""
    if target not in TARGETS:
        raise ValueError(
            f"`target` must be one of {list(TARGETS)}. Received: target={target!r}"
        )
    notes = layers_as_they_are(model)
    if target == "gpu" and notes:
        raise ValueError(
            "`target='gpu'` needs every layer in its device form. Received: "
            + "; ".join(notes)
        )
    if target == "gpu" and quantization == "int8_dense":
        raise ValueError(
            "`target='gpu'` takes float activations: GPU delegates answer wrongly on "
            "int8 ones, without a word. Received: quantization='int8_dense'"
        )
    return notes


def _tolerance_of_rounded(
    tolerance: float | None, quantization: str | None, rounded: bool
) -> float | None:
    """What a quantized file or model may differ by; `None` where nothing is."""
    if quantization is None and not rounded:
        if tolerance is not None:
            raise ValueError(
                "`quantized_tolerance` is for quantized files and models; the float "
                "file's is `tolerance`. Received: "
                f"quantized_tolerance={tolerance} with quantization=None"
            )
        return None
    if tolerance is None:
        return max(TOLERANCES.get(quantization or "", 0), 0.05 * rounded)
    check_tolerance(tolerance, "quantized_tolerance")
    return tolerance


def _as_rows(samples: Any, argument: str) -> list[np.ndarray]:
    rows = [np.asarray(row) for row in samples]
    if not rows or any(row.ndim != 1 or row.dtype.kind not in "iu" for row in rows):
        raise ValueError(
            f"`{argument}` must be one or more rows of integer ids. Received: "
            f"{[(str(row.dtype), row.shape) for row in rows[:3]]}"
        )
    return rows


def _pad(rows: Sequence[np.ndarray], length: int, argument: str) -> np.ndarray:
    longest = max(map(len, rows))
    if longest > length:
        raise ValueError(
            f"`{argument}` must not be longer than any of `sequence_lengths`. "
            f"Received: a row of {longest} ids for the length {length}"
        )
    return np.stack([np.pad(row, (0, length - len(row))) for row in rows])


def _trace(
    endpoint: Endpoint, name: str, spec: tf.TensorSpec, path: Path, signature_name: str
) -> None:
    """Traces the model into a SavedModel, once; it need not be loaded by Keras."""

    def function(ids: Any) -> dict[str, Any]:
        return endpoint.function({name: ids})

    named = tf.TensorSpec(spec.shape, spec.dtype, name=name)
    traced = tf.function(function, autograph=False).get_concrete_function(named)
    module: Any = tf.Module()
    # What the function reads must hang on the module.
    module.weights = [v.value for v in endpoint.model.variables]
    tf.saved_model.save(module, str(path), signatures={signature_name: traced})


def convert(
    graph: Path,
    signature_name: str,
    quantization: str | None,
    notes: Sequence[str],
) -> bytes:
    """Converts a signature of a SavedModel to builtin operations.

    Raises:
        ValueError: If it has others; the text tells what `notes` say of its layers.
    """
    converter = tf.lite.TFLiteConverter.from_saved_model(
        str(graph), signature_keys=[signature_name]
    )
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
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


def _export_one(
    endpoint: Endpoint,
    ids: np.ndarray,
    path: Path,
    *,
    batch_size: int,
    quantization: str | None,
    ranges: np.ndarray | None,
    target: str,
    notes: Sequence[str],
    signature_name: str,
    tolerances: tuple[float, float | None],
    timeout: float,
) -> TFLiteFile:
    """Writes the file at `path`, checks it, and says what it found."""
    ((name, free),) = endpoint.inputs.items()
    spec = tf.TensorSpec((batch_size, ids.shape[1]), tf.int32)
    graph = path.with_suffix("")
    padded_queries_read = reads_padded_queries(endpoint, ids)
    with device_form(
        endpoint.model, target=target, padded_queries_read=padded_queries_read
    ):
        _trace(endpoint, name, spec, graph, signature_name)
    content = convert(graph, signature_name, quantization, notes)
    if ranges is not None:
        cases = [{name: batch} for batch in _batches(ranges, batch_size)]
        content = quantize_dense(content, signature_name, cases)
    if quantization == "dynamic_int8" and target == "cpu":
        content = with_one_scale_for_narrow_tables(content)
    contents = read_contents(content)
    if contents.custom or contents.dynamic:
        raise ValueError(
            "`model` does not convert to builtin operations of fixed shape. Received: "
            f"custom operations {list(contents.custom)}, "
            f"tensors of free shape {list(contents.dynamic)}"
        )
    _check_operators(content, target)
    path.write_bytes(content)

    batches = _batches(ids, batch_size)
    answers, facts = run_in_fresh_process(
        "litert",
        path,
        [{name: batch} for batch in batches],
        blocked=_BLOCKED,
        options={"signature_name": signature_name},
        timeout=timeout,
    )
    rows = np.concatenate(batches).astype(free.dtype.as_numpy_dtype)
    compare = functools.partial(
        check_parity,
        actual=answers,
        samples=len(ids),
        runtime=facts["runtime"],
        runtime_version=facts["version"],
    )
    exact, rounded = tolerances
    if rounded is not None and quantization is None:
        # The weights that Keras rounded, without its rounding of activations.
        with device_form(endpoint.model, target=target):
            wanted = endpoint.answer({name: rows})
        compare(_cut(wanted, batch_size), tolerance=exact)
    wanted = endpoint.answer({name: rows})
    parity = compare(
        _cut(wanted, batch_size), tolerance=exact if rounded is None else rounded
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


def _batches(ids: np.ndarray, size: int) -> list[np.ndarray]:
    """Cuts rows into batches, the last one filled up with its own last row."""
    rows = np.pad(ids, ((0, -len(ids) % size), (0, 0)), "edge").astype(np.int32)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _cut(answers: Mapping[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    rows = len(next(iter(answers.values())))
    return [
        {name: array[i : i + size] for name, array in answers.items()}
        for i in range(0, rows, size)
    ]
