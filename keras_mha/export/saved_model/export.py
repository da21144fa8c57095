"""Export to a TensorFlow SavedModel for TF Serving."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2

from keras_mha.export.compiled_marks import strip_compiled_marks
from keras_mha.export.drawn import drawn_cases
from keras_mha.export.endpoint import Endpoint, describe, tensor_infos
from keras_mha.export.files import (
    check_overwrite,
    highest_version,
    publish_directory,
    size_of,
    staging,
)
from keras_mha.export.parity import check_parity, check_timeout, check_tolerance
from keras_mha.export.report import TensorInfo
from keras_mha.export.runtimes.cpp_loader import RUNTIME as CPP_LOADER
from keras_mha.export.runtimes.descriptor import File
from keras_mha.export.runtimes.fresh_process import run_in_fresh_process
from keras_mha.export.saved_model.batching import (
    check_batching,
    choose_batching,
    padded,
)
from keras_mha.export.saved_model.new_axes import expand_new_axes
from keras_mha.export.saved_model.placement import gpu_note
from keras_mha.export.saved_model.reader import describe_file, read_meta_graph
from keras_mha.export.saved_model.report import SavedModelReport, SignatureReport
from keras_mha.export.saved_model.served_tflite import (
    check_served_tflite,
    write_served_tflite,
)
from keras_mha.export.saved_model.warmup import MAX_RECORDS, read_warmup, write_warmup
from keras_mha.export.tflite.signs import take_signs_of_bits
from keras_mha.export.tokens import INPUT, endpoint_of_tokens
from keras_mha.layers.arguments import check_flag

_DEFAULT, _TOKENS = "serving_default", "tokens"


def export_saved_model(
    model: keras.Model,
    directory: str | Path,
    *,
    samples: Any,
    version: int | None = None,
    overwrite: bool = False,
    tolerance: float = 1e-5,
    output_names: Sequence[str] | None = None,
    warmup: int = 16,
    tokens: bool = False,
    with_tflite: bool = False,
    batching: bool | None = None,
    timeout: float = 600.0,
) -> SavedModelReport:
    """Writes `model` as a SavedModel at `<directory>/<version>/`, and checks it.

    The signature `serving_default` (and Keras' `serve`) takes every input and gives
    every output under its name, with a free batch dimension. With `tokens=True` a
    model of texts also has the signature `tokens`, which takes what its tokenizer
    gives.
    Marks that ask for XLA are removed, since TF Serving disables it, and the first
    samples become warm-up requests.

    What was written is loaded in a fresh process that cannot import `keras_mha`, and
    its values are compared with the model's: for all samples at once, row by row for
    those of the warm-up, and for inputs drawn in addition, with other values, padding
    and half of every free size. The loader is TensorFlow's C++ one with XLA disabled,
    which TF Serving is built on. A server may batch requests: that an answer does not
    depend on the other rows is checked too, also for a batch filled up with copies of
    its first row. With `batching=False` a model whose answers do is written all the
    same; a server must then not batch.

    With `with_tflite=True` the version also holds `model.tflite`: the same signature in
    TFLite's builtin operations, with free sizes. TF Serving runs it in place of
    `saved_model.pb` if started with `--prefer_tflite_model`, an experimental flag, and
    finds inputs and outputs by the names of its tensors, which are therefore those of
    `serving_default`; it has no other signature. The server has no custom operations of
    TFLite, so the model must take no strings. The file's values are compared in LiteRT
    like the rest; the server itself was not run.

    On a GPU nothing was run. `gpu_note` in the report names the operations that have no
    GPU kernel, as those of tokenizers; TensorFlow leaves these on the CPU and copies.
    Without XLA the others run one by one. NVIDIA GPUs since Ampere multiply float32
    matrices in TF32, with errors near 1e-3, unless `NVIDIA_TF32_OVERRIDE=0` is set.

    Everything is written next to `<directory>/<version>/` under a name that is not a
    number; only a checked version is renamed. After an error nothing is left.

    Args:
        model: Any Keras model on the TensorFlow backend that was built, called or
            fitted; string inputs and several inputs included. Inputs of a subclassed
            model are free in their batch dimension only, and have the samples' shapes
            otherwise.
        directory: Where the versions are; created if absent.
        samples: Inputs in the structure that `model(...)` takes: an array, a list of
            strings, a tensor, a list or dictionary of several, or a `tf.data.Dataset`
            of batches, with or without targets. Integers for an input of floats become
            floats. Run as one batch: some dozen rows are enough.
        version: Number of the version; default one more than the highest there is.
        overwrite: Whether an existing version is replaced, in one step.
        tolerance: Largest absolute difference allowed in any output. The default
            suits float32 probabilities (measured: under 1e-6 in small models, 3e-6
            in one of 6 blocks of width 384); those of half precision need about 1e-2
            (measured: 4e-3). Nor may the other rows of a batch change an answer by
            more.
        output_names: Names for the outputs, in the order of `keras.tree.flatten`.
            Default: the keys of a dictionary output, else the names of the layers
            that a Functional or Sequential model ends in, numbered where one layer
            gives several, else `output_0`, ...
        warmup: Number of samples that become warm-up requests of one row each, at
            most 1000; 0 writes none. Without batching one request has all rows.
        tokens: Whether to write the signature `tokens`: the part of the model after
            its `keras_mha.text.WordpieceTokenizer`, which takes `ids`, and other
            inputs as they are. The weights are written once.
        with_tflite: Whether to write `model.tflite` next to `saved_model.pb`.
        batching: Whether a server may put rows of different requests into one batch.
            Default: yes, unless an input has no batch dimension. False is for models
            whose answer to a row depends on the others, such as logits between the
            rows of a batch, and for those that answer batches of one size only, which
            is then the signature's.
        timeout: Seconds that the check of one file may take.

    Returns:
        What was written, and how far its values are from the model's.

    Raises:
        FileExistsError: If the version exists and `overwrite` is False.
        ParityError: If a value differs by more than `tolerance`.
        VerificationError: If the file does not run in the fresh process.
        ImportError: If `with_tflite` is set and ai-edge-litert is not installed.
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a wrong value, an input a name that no
            signature can carry, or the model is not safe to batch and `batching` is
            not False: it answers batches of one size only, an output has another
            first dimension than the batch, or depends on other rows. With
            `with_tflite` also if the model takes strings, or needs operations that
            TFLite has not built in.

    Example:

    >>> import tempfile
    >>> import keras, numpy as np
    >>> from keras_mha.export import export_saved_model
    >>> model = keras.Sequential([
    ...     keras.Input((3,), name="features"),
    ...     keras.layers.Dense(2, activation="softmax", name="probabilities"),
    ... ])
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     report = export_saved_model(model, directory, samples=np.ones((5, 3)))
    >>> report.version, report.inputs[0].name, report.outputs[0].name
    (1, 'features', 'probabilities')
    >>> report.parity.batch_sizes, report.parity.max_absolute_difference < 1e-5
    ((1, 5), True)
    """
    directory = Path(directory)
    _check_warmup(warmup)
    check_flag(overwrite, "overwrite")
    check_tolerance(tolerance)
    check_timeout(timeout)
    final = directory / str(_check_version(version, directory))
    check_overwrite([final], overwrite=overwrite)
    endpoint, arrays = describe(model, samples, output_names)
    if with_tflite:
        _check_tflite(endpoint)
    batching = choose_batching(batching, endpoint)
    rows = endpoint.rows(arrays)

    cut = endpoint_of_tokens(endpoint, arrays) if tokens else None

    with staging(directory) as staged:
        path = staged / "model"
        further = {} if cut is None else {_TOKENS: cut[0]}
        endpoint.write(path, endpoint.inputs, further=further)
        marks = strip_compiled_marks(path)
        if with_tflite:
            expand_new_axes(path)
            take_signs_of_bits(path)
        together = endpoint.batches(arrays)
        singles = min(rows, max(warmup, 1)) if batching else 0
        requests = _single_rows(endpoint, arrays, singles) or together[:1]
        if warmup:
            write_warmup(path, requests)
            requests = read_warmup(path)
        cases = [*together, *requests] if batching else together
        drawn, wanted_of_drawn = drawn_cases(endpoint, arrays)
        wanted = [*map(endpoint.answer, cases), *wanted_of_drawn]
        cases += drawn
        meta_graph = read_meta_graph(path)
        (filled, *answers), facts = run_in_fresh_process(
            CPP_LOADER,
            describe_file(path, meta_graph),
            [padded(arrays) if batching else cases[0], *cases],
            timeout=timeout,
        )
        parity = check_parity(
            wanted,
            answers,
            tolerance=tolerance,
            samples=rows,
            runtime=facts["runtime"],
            runtime_version=facts["version"],
            drawn=len(drawn),
            again=lambda: endpoint.answers_in_graph(cases),
        )
        batch_difference = None
        if batching:
            batch_difference = check_batching(
                answers[0],
                filled,
                answers[1 : 1 + singles],
                rows=rows,
                tolerance=tolerance,
            )
        signatures = []
        if cut is not None:
            file = describe_file(path, meta_graph, _TOKENS)
            outputs = _outputs(meta_graph, _TOKENS)
            signatures = [
                _check_tokens(file, *cut, wanted[0], outputs, tolerance, timeout)
            ]
        tflite = None
        if with_tflite:
            write_served_tflite(path)
            tflite = check_served_tflite(
                path,
                cases,
                wanted,
                tensor_infos(endpoint.inputs),
                _outputs(meta_graph, _DEFAULT),
                rows=rows,
                drawn=len(drawn),
                tolerance=tolerance,
                timeout=timeout,
            )
        size = size_of(path)
        note = gpu_note(meta_graph, _DEFAULT)
        publish_directory(path, final, overwrite=overwrite)

    return SavedModelReport(
        model=model.name,
        parameters=model.count_params(),
        keras=keras.__version__,
        tensorflow=tf.__version__,
        blocked=facts["blocked"],
        path=str(final),
        version=int(final.name),
        size_bytes=size,
        inputs=tensor_infos(endpoint.inputs),
        outputs=_outputs(meta_graph, _DEFAULT),
        warmup_records=len(requests) if warmup else 0,
        compiled_marks_removed=marks,
        custom_operations=tuple(facts["custom_operations"]),
        batch_difference=batch_difference,
        parity=parity,
        gpu_note=note,
        further_signatures=tuple(signatures),
        tflite=tflite,
        notes=endpoint.notes,
    )


def _check_tokens(
    file: File,
    endpoint: Endpoint,
    arrays: Mapping[str, np.ndarray],
    wanted: Mapping[str, np.ndarray],
    outputs: tuple[TensorInfo, ...],
    tolerance: float,
    timeout: float,
) -> SignatureReport:
    """Compares the signature `tokens` with the answers of the whole model."""
    answers, facts = run_in_fresh_process(CPP_LOADER, file, [arrays], timeout=timeout)
    parity = check_parity(
        [wanted],
        answers,
        tolerance=tolerance,
        samples=len(arrays[INPUT]),
        runtime=facts["runtime"],
        runtime_version=facts["version"],
    )
    return SignatureReport(_TOKENS, tensor_infos(endpoint.inputs), outputs, parity)


def _check_warmup(warmup: int) -> None:
    if isinstance(warmup, bool) or not isinstance(warmup, int):
        raise TypeError(f"`warmup` must be an integer. Received: {warmup!r}")
    if not 0 <= warmup <= MAX_RECORDS:
        raise ValueError(
            f"`warmup` must be an integer from 0 to {MAX_RECORDS}. Received: {warmup}"
        )


def _check_tflite(endpoint: Endpoint) -> None:
    """Refuses `with_tflite` where the file could not be written or served."""
    texts = [name for name, spec in endpoint.inputs.items() if spec.dtype == tf.string]
    if texts:
        raise ValueError(
            "`with_tflite` is for models that take no strings: TF Serving has TFLite's "
            "only builtin operations, and tokenizers need others. Pass the part of "
            "the model after its tokenizer: `without_tokenizer` gives it. Received: "
            f"the string inputs {texts}"
        )
    if importlib.util.find_spec("ai_edge_litert") is None:
        raise ImportError(
            "`with_tflite` needs ai-edge-litert: pip install 'keras-mha[tflite]'"
        )


def _check_version(version: int | None, directory: Path) -> int:
    if version is None:
        return highest_version(directory) + 1
    if isinstance(version, bool) or not isinstance(version, int):
        raise TypeError(f"`version` must be an integer or None. Received: {version!r}")
    if version < 0:
        raise ValueError(f"`version` must not be negative. Received: {version}")
    return version


def _single_rows(
    endpoint: Endpoint, arrays: Mapping[str, np.ndarray], count: int
) -> list[Mapping[str, np.ndarray]]:
    """Returns the first rows one by one."""
    return [endpoint.take(arrays, slice(i, i + 1)) for i in range(count)]


def _outputs(
    meta_graph: meta_graph_pb2.MetaGraphDef, signature_name: str
) -> tuple[TensorInfo, ...]:
    specs: dict[str, Any] = {
        name: tf.TensorSpec(info.tensor_shape, info.dtype)  # pyright: ignore[reportArgumentType]
        for name, info in sorted(
            meta_graph.signature_def[signature_name].outputs.items()
        )
    }
    return tensor_infos(specs)
