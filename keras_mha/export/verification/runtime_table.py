"""The runtimes that `verify` knows: what they read, and how they are started."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from google.protobuf.message import DecodeError

from keras_mha.export.endpoint import Endpoint
from keras_mha.export.files import highest_version
from keras_mha.export.runtimes import arm, litert_gpu
from keras_mha.export.saved_model.export import loader, read_graph
from keras_mha.export.tflite.graph import read_file
from keras_mha.export.tflite.text import registrar
from keras_mha.export.verification.cases import Arrays, Cases, fixed_cases, text_cases

Kind = Literal["saved_model", "tflite", "onnx", "tflite_text", "tflite_mediapipe"]
# Why a runtime that reads TFLite files does not read one of this kind.
UNREAD: Mapping[Kind, str] = {
    "tflite": "the file has no metadata, which `export_tflite(metadata=...)` writes",
    "tflite_text": "the file takes strings by tensorflow-text's operations, which "
    "this runtime lacks",
    "tflite_mediapipe": "the file is for MediaPipe; the file of ids has the same graph",
}
_BLOCKED = ("keras_mha", "keras", "tensorflow")
_SMALL = ("int16", "float16", "int8", "uint8", "int4", "uint4", "int2")


class AbsentError(RuntimeError):
    """A runtime cannot be used, or a file not with this model; the message says why."""


@dataclass(frozen=True)
class Start:
    """How a runtime is started.

    Attributes:
        module: Name of its module in `keras_mha.export.runtimes`.
        arguments: Further arguments of `FreshProcess`.
    """

    module: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Opened:
    """What is known of a file before it runs.

    Attributes:
        kind: Its kind.
        path: The file or directory itself.
        cases: The runs that it is given.
        quantized: Whether it holds weights in less than float32.
        outputs: Names of its outputs.
        signature_name: Name of its signature, where it has one.
        loader: How TensorFlow loads it, if it is a SavedModel.
    """

    kind: Kind
    path: Path
    cases: Cases
    quantized: bool
    outputs: tuple[str, ...]
    signature_name: str
    loader: Start | None = None


@dataclass(frozen=True)
class Runtime:
    """One runtime.

    Attributes:
        label: Its name in reports.
        reads: The kinds of files that it runs.
        find: Looks for it, and gives what `start` needs; raises `AbsentError`.
        start: How it is started on a file.
        emulated: Whether its speed says nothing.
        takes_text: Whether it takes strings where the file does.
        cuts_texts: Whether it cuts texts into ids itself, and answers these too.
    """

    label: str
    reads: tuple[Kind, ...]
    find: Callable[[], Any]
    start: Callable[[Opened, Any], Start]
    emulated: bool = False
    takes_text: bool = False
    cuts_texts: bool = False


def _need(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise AbsentError(f"pip install 'keras-mha[{extra}]'")


def _find_tensorflow() -> None:
    """It is there: this package needs it."""


def _find_openvino() -> None:
    _need("openvino", "openvino")


def _find_litert() -> None:
    _need("ai_edge_litert", "tflite")


def _find_gpu() -> str:
    _need("ai_edge_litert", "tflite")
    try:
        return str(litert_gpu.find_software_driver())
    except FileNotFoundError as error:
        raise AbsentError(str(error)) from error


def _find_arm() -> tuple[str, ...]:
    _need("ai_edge_litert", "tflite")  # it reads the file's shapes on this machine
    try:
        return arm.find_arm_python()
    except FileNotFoundError as error:
        raise AbsentError(str(error)) from error


def _find_mediapipe() -> None:
    _need("mediapipe", "mediapipe")
    _need("ai_edge_litert", "tflite")  # whose schema it reads the file's shapes with


def _find_onnx_runtime() -> None:
    _need("onnxruntime", "onnx")


def _start_tensorflow(opened: Opened, _: None) -> Start:
    if opened.loader is None:
        raise TypeError(f"{opened.path} is no SavedModel")
    return opened.loader


def _start_openvino(opened: Opened, _: None) -> Start:
    options = {"outputs": opened.outputs}
    return Start("openvino_runtime", {"blocked": _BLOCKED, "options": options})


def _start_litert(opened: Opened, _: None) -> Start:
    options: dict[str, Any] = {"signature_name": opened.signature_name}
    if opened.kind == "tflite_text":
        options["registrar"] = registrar()
    return Start("litert", {"blocked": _BLOCKED, "options": options})


def _start_gpu(opened: Opened, driver: str) -> Start:
    options = {"signature_name": opened.signature_name, "driver": driver}
    return Start("litert_gpu", {"blocked": _BLOCKED, "options": options})


def _start_arm(opened: Opened, python: tuple[str, ...]) -> Start:
    start = _start_litert(opened, None)
    return Start(start.module, {**start.arguments, "python": python})


def _start_mediapipe(_opened: Opened, _: None) -> Start:
    return Start("mediapipe_text", {"blocked": _BLOCKED, "options": {}})


def _start_onnx_runtime(_opened: Opened, _: None) -> Start:
    return Start("onnx_runtime", {"blocked": _BLOCKED, "options": {}})


# By the names that `verify` takes.
RUNTIMES: Mapping[str, Runtime] = {
    "saved_model": Runtime(
        "TensorFlow C++ loader",
        ("saved_model",),
        _find_tensorflow,
        _start_tensorflow,
        takes_text=True,
    ),
    # No strings, not even with openvino-tokenizers: 2026.4 has no rule for the
    # operations FastBertNormalize and FastWordpieceTokenizeWithOffsets.
    "openvino": Runtime(
        "OpenVINO, CPU", ("saved_model", "onnx"), _find_openvino, _start_openvino
    ),
    "litert": Runtime(
        "LiteRT interpreter, CPU",
        ("tflite", "tflite_text"),
        _find_litert,
        _start_litert,
        takes_text=True,
    ),
    "litert_gpu": Runtime(
        "LiteRT GPU delegate, software Vulkan",
        ("tflite",),
        _find_gpu,
        _start_gpu,
        emulated=True,
        takes_text=True,
    ),
    "litert_arm": Runtime(
        "LiteRT interpreter, emulated ARM",
        ("tflite",),
        _find_arm,
        _start_arm,
        emulated=True,
        takes_text=True,
    ),
    "mediapipe": Runtime(
        "MediaPipe TextClassifier, CPU",
        ("tflite_mediapipe",),
        _find_mediapipe,
        _start_mediapipe,
        takes_text=True,
        cuts_texts=True,
    ),
    "onnx_runtime": Runtime(
        "ONNX Runtime, CPU", ("onnx",), _find_onnx_runtime, _start_onnx_runtime
    ),
}


def open_file(
    kind: Kind,
    path: Path,
    endpoint: Endpoint,
    arrays: Arrays,
    free: Cases,
    *,
    signature_name: str,
    timeout: float,
) -> Opened:
    """Reads what its runtimes must know of a file, without running it.

    Raises:
        AbsentError: If it takes texts and the model ids, or the other way round.
        ValueError: If it is no such file, or does not fit the model.
    """
    names = tuple(free.wanted[0])
    if kind == "onnx":
        return Opened("onnx", path, free, False, names, "")
    if kind == "tflite":
        return _open_tflite(path, endpoint, arrays, names, signature_name, timeout)
    if not (path / "saved_model.pb").is_file():
        path /= str(highest_version(path))
    try:
        signature, operations = read_graph(path, signature_name)
    except (OSError, DecodeError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a SavedModel: {error}") from error
    if set(signature.inputs) != set(arrays):
        raise ValueError(
            f"the signature {signature_name!r} of {path} must have the model's inputs "
            f"{sorted(arrays)}, and has {sorted(signature.inputs)}"
        )
    start = Start(*loader(signature, operations, signature_name))
    return Opened("saved_model", path, free, False, names, signature_name, start)


def _open_tflite(
    path: Path,
    endpoint: Endpoint,
    arrays: Arrays,
    names: tuple[str, ...],
    signature_name: str,
    timeout: float,
) -> Opened:
    facts = read_file(path, timeout=timeout)
    graph, *_ = facts["graphs"]
    inputs = [graph["tensors"][number] for number in graph["inputs"]]
    kind = _kind_of_tflite(facts["has_metadata"], inputs)
    of_texts = any(array.dtype.kind == "O" for array in arrays.values())
    if of_texts != (kind != "tflite"):
        raise AbsentError(
            "it takes ids, and no strings"
            if of_texts
            else "it takes texts, and the model ids: verify the model of texts"
        )
    if kind == "tflite_mediapipe":
        try:
            cases = text_cases(endpoint, arrays, inputs[0]["shape"][-1])
        except ValueError as error:
            raise AbsentError(f"its ids cannot be compared: {error}") from error
    elif len(inputs) != 1:
        raise ValueError(f"{path} must have one input, and has {len(inputs)}")
    else:
        cases = fixed_cases(endpoint, arrays, inputs[0]["shape"], inputs[0]["dtype"])
    if kind == "tflite_text":
        try:
            registrar()
        except FileNotFoundError as error:
            raise AbsentError(str(error)) from error
    quantized = any(
        # The tokenizer's tables are bytes.
        tensor["constant"] and tensor["dtype"] in _SMALL and tensor["dtype"] != "uint8"
        for tensor in graph["tensors"]
    )
    return Opened(kind, path, cases, quantized, names, signature_name)


def _kind_of_tflite(has_metadata: bool, inputs: Sequence[Mapping[str, Any]]) -> Kind:
    if has_metadata:
        return "tflite_mediapipe"
    return "tflite_text" if inputs[0]["dtype"] == "string" else "tflite"
