"""Exports a model to an ONNX file, its sizes left free."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mha.export.drawn import drawn_cases, halved
from keras_mha.export.endpoint import Endpoint, describe, tensor_infos
from keras_mha.export.files import check_overwrite, size_of, staging
from keras_mha.export.onnx.conversion import convert, places_of
from keras_mha.export.onnx.report import ONNXReport
from keras_mha.export.onnx.rewrites import rewrite
from keras_mha.export.parity import (
    VerificationError,
    check_parity,
    check_timeout,
    check_tolerance,
)
from keras_mha.export.report import TensorInfo
from keras_mha.export.runtimes.descriptor import File
from keras_mha.export.runtimes.fresh_process import run_in_fresh_process
from keras_mha.export.runtimes.onnx_runtime import RUNTIME as ONNX_RUNTIME
from keras_mha.layers.arguments import check_flag

_OPSETS = range(13, 19)  # what tf2onnx writes; before 13, axes are attributes
_GREATEST_SIZE = 2**31 - 1  # of any protocol buffer, and so of an ONNX file

Case = Mapping[str, np.ndarray]


def export_onnx(
    model: keras.Model,
    path: str | Path,
    *,
    samples: Any,
    overwrite: bool | None = None,
    opset: int = 18,
    tolerance: float = 1e-5,
    output_names: Sequence[str] | None = None,
    timeout: float = 600.0,
) -> ONNXReport:
    """Writes `model` as the ONNX file `path`, and checks it.

    The file takes every input and gives every output under the model's names.
    The batch, and every other size that the model's inputs leave free, is free in the
    file. It holds only standard ONNX. The attention layers are traced in their
    portable form (`keras_mha.attention.portable`), whose values are the same for
    finite inputs, padding included, and scaled scores under 5e3 in size. What tf2onnx
    makes of the model is rewritten to fewer operations, among them one for each layer
    normalization.

    The file is loaded by ONNX Runtime in a fresh process that can import none of
    `keras_mha`, `keras` and `tensorflow`, and its values are compared with the
    model's: for all samples at once, for only the first, for half of them cut to half
    of every free size, and for inputs drawn in addition, with other values and padding.
    Only then is it renamed to `path`. After an error nothing new is left.

    Args:
        model: A Keras model on the TensorFlow backend that was built, called or fitted,
            without string inputs. Inputs of a subclassed model are free only in their
            batch dimension, and have the samples' shapes otherwise. The batch is fixed
            too where the model answers batches of one size only.
        path: Where the file goes, ending in `.onnx`; its directory is created if
            absent.
        samples: Inputs in the structure that `model(...)` takes: an array, a tensor,
            a list or dictionary of several, or a `tf.data.Dataset` of batches, with or
            without targets. Integers for an input of floats become floats.
        overwrite: Whether an existing file is replaced, in one step. Left out, it is
            replaced with a DeprecationWarning; a later version will refuse it.
        opset: Version of ONNX' operations, 13 to 18. Before 17 there is none for layer
            normalization.
        tolerance: Largest absolute difference allowed in any output. The default
            suits float32 probabilities (measured: under 1e-6).
        output_names: Names for the outputs, in the order of `keras.tree.flatten`.
            Default: the keys of a dictionary output, else the names of the layers
            that a Functional or Sequential model ends in, numbered where one layer
            gives several, else `output_0`, ...
        timeout: Seconds that the check may take.

    Returns:
        What was written, and how far its values are from the model's.

    Raises:
        FileExistsError: If the file exists and `overwrite` is False.
        ImportError: If onnx, onnxruntime or tf2onnx is not installed.
        ParityError: If a value differs by more than `tolerance`.
        VerificationError: If the file does not run in the fresh process.
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a wrong value, or the model takes strings,
            computes in bfloat16, is too large for an ONNX file or needs operations
            that tf2onnx does not convert, such as those of a cache for decoding.

    Example:

    >>> import tempfile
    >>> import keras, numpy as np
    >>> from keras_mha.export import export_onnx
    >>> model = keras.Sequential([
    ...     keras.Input((3,), name="features"),
    ...     keras.layers.Dense(2, activation="softmax", name="probabilities"),
    ... ])
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     report = export_onnx(
    ...         model, f"{directory}/model.onnx", samples=np.ones((5, 3))
    ...     )
    >>> report.inputs[0].shape, report.operators  # a bias of zeros is none
    ((None, 3), {'MatMul': 1, 'Softmax': 1})
    >>> report.parity.max_absolute_difference < 1e-5
    True
    """
    _check_installed()
    path = Path(path)
    if overwrite is not None:
        overwrite = check_flag(overwrite, "overwrite")
    if path.suffix != ".onnx":
        raise ValueError(f"`path` must end in .onnx. Received: {path}")
    if isinstance(opset, bool) or opset not in _OPSETS:
        raise ValueError(
            f"`opset` must be an integer from {_OPSETS[0]} to {_OPSETS[-1]}. "
            f"Received: {opset}"
        )
    check_tolerance(tolerance)
    check_timeout(timeout)
    check_overwrite([path], overwrite=overwrite)
    _check_model(model)
    endpoint, arrays = describe(model, samples, output_names)
    if tf.string in [spec.dtype for spec in endpoint.inputs.values()]:
        raise ValueError(
            "`model` must not take strings, which ONNX' own operations can neither cut "
            "into tokens nor look up. Pass the part of the model after its tokenizer, "
            "which `without_tokenizer` gives, or after its lookup. Received the inputs "
            f"{_described(endpoint)}"
        )
    with staging(path.parent) as staged:
        written = staged / path.name
        proto = _to_proto(endpoint, opset, staged)
        written.write_bytes(proto.SerializeToString(deterministic=True))
        cases, wanted = _cases(endpoint, arrays)
        drawn, wanted_of_drawn = drawn_cases(endpoint, arrays)
        cases, wanted = [*cases, *drawn], [*wanted, *wanted_of_drawn]
        try:
            answers, facts = run_in_fresh_process(
                ONNX_RUNTIME, File(written, "onnx"), cases, timeout=timeout
            )
        except VerificationError as error:
            refused = _refused(endpoint, proto, str(error))
            if refused is None:
                raise
            raise refused from error
        parity = check_parity(
            wanted,
            answers,
            tolerance=tolerance,
            samples=endpoint.rows(arrays),
            runtime=facts["runtime"],
            runtime_version=facts["version"],
            drawn=len(drawn),
            again=lambda: endpoint.answers_in_graph(cases),
        )
        size = size_of(written)
        written.replace(path)

    return ONNXReport(
        model=model.name,
        parameters=model.count_params(),
        keras=keras.__version__,
        tensorflow=tf.__version__,
        blocked=facts["blocked"],
        path=str(path),
        opset=opset,
        size_bytes=size,
        inputs=tensor_infos(endpoint.inputs),
        outputs=tuple(
            TensorInfo(name, answers[0][name].dtype.name, _free_shape(shape))
            for name, shape in facts["outputs"]
        ),
        operators=dict(Counter(n.op_type for n in proto.graph.node).most_common()),
        free_sizes=_sizes_run(endpoint, cases),
        parity=parity,
        notes=endpoint.notes,
    )


def _check_installed() -> None:
    packages = ("onnx", "onnxruntime", "tf2onnx")
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(
            f"`export_onnx` needs {', '.join(absent)}: pip install 'keras-mha[onnx]'"
        )


def _check_model(model: keras.Model) -> None:
    """Refuses what no ONNX file can hold; `describe` refuses what is not a model."""
    if not isinstance(model, keras.Model) or not model.built:
        return
    for layer in model._flatten_layers(include_self=False):
        if layer.compute_dtype == "bfloat16":
            raise ValueError(
                "`model` must not compute in bfloat16, which ONNX Runtime's CPU "
                f"operations lack. Received: layer {layer.name!r} with "
                "compute_dtype='bfloat16'. Load the weights into a model built with "
                "the policy 'float32'."
            )
    size = sum(weight.numpy().nbytes for weight in model.weights)
    if size > _GREATEST_SIZE:
        raise ValueError(
            f"`model` must have weights of at most {_GREATEST_SIZE} bytes, the most "
            f"that one ONNX file holds. Received: {size} bytes"
        )


def _described(endpoint: Endpoint) -> str:
    return ", ".join(
        f"{name}: {spec.dtype.name} {tuple(spec.shape)}"
        for name, spec in endpoint.inputs.items()
    )


def _to_proto(endpoint: Endpoint, opset: int, directory: Path) -> Any:
    """Returns the checked `onnx.ModelProto`."""
    import onnx

    proto = convert(endpoint, opset, directory)
    proto.graph.name = endpoint.model.name
    for tensor in proto.graph.input:
        for axis, dim in enumerate(tensor.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                dim.dim_param = _size_name(tensor.name, axis)
    proto = rewrite(proto)
    used = {node.domain for node in proto.graph.node} | {""}
    imports = [entry for entry in proto.opset_import if entry.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(imports)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise (_refused(endpoint, proto, str(error)) or error) from error
    return proto


def _refused(endpoint: Endpoint, proto: Any, text: str) -> ValueError | None:
    """Says which operation ONNX or its runtime refused, where `text` names one."""
    named = [node for node in proto.graph.node if node.name and node.name in text]
    if not named:
        return None
    # The longest, for one name may begin with another.
    node = max(named, key=lambda node: len(node.name))
    return ValueError(
        "`model` must convert to operations that ONNX Runtime takes. Received: "
        f"{node.op_type} in {places_of(endpoint.model, [node.name])}, refused with "
        f"{text.strip().splitlines()[-1]}"
    )


def _size_name(tensor: str, axis: int) -> str:
    return f"{tensor}_{axis}" if axis else "batch"


def _cases(endpoint: Endpoint, arrays: Case) -> tuple[list[Case], list[Case]]:
    """Returns runs of the samples in different sizes, and the model's answers.

    Sizes of several inputs may depend on each other in a way that only the model knows.
    Those that it refuses are left out; the report says which were run.
    """
    cases = endpoint.batches(arrays)
    if endpoint.batch_size is None:
        some = slice((endpoint.rows(arrays) + 1) // 2)
        first = endpoint.take(arrays, slice(1))
        cases += [first, endpoint.take(halved(endpoint, arrays), some)]
    answers = [(case, endpoint.answer_or_none(case)) for case in cases[1:]]
    answered = [(case, answer) for case, answer in answers if answer is not None]
    return (
        [cases[0], *(case for case, _ in answered)],
        [endpoint.answer(cases[0]), *(answer for _, answer in answered)],
    )


def _free_shape(shape: Sequence[int | str | None]) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in shape)


def _sizes_run(endpoint: Endpoint, cases: Sequence[Case]) -> dict[str, tuple[int, ...]]:
    """Returns the sizes that each free one had in the runs, by its name in the file."""
    free = {
        _size_name(name, axis): (name, axis)
        for name, spec in endpoint.inputs.items()
        for axis, size in enumerate(spec.shape)
        if size is None
    }
    return {
        label: tuple(sorted({case[name].shape[axis] for case in cases}))
        for label, (name, axis) in free.items()
    }
