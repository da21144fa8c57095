"""Runs a SavedModel in TensorFlow's C++ loader through its C API.

That loader is what TF Serving is built on; XLA compilation is disabled as TF
Serving disables it. Stand-alone: ctypes and NumPy, no import of tensorflow.
Source: tensorflow/c/c_api.h, tensorflow/c/tf_tstring.h.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .descriptor import Arrays, File, Loaded, Runtime

if TYPE_CHECKING:
    import numpy as np

_STRING = 7
_BFLOAT16 = 14
# TF_DataType; the numbers are part of the format.
_TYPES = {
    "float32": 1,
    "float64": 2,
    "int32": 3,
    "uint8": 4,
    "int16": 5,
    "int8": 6,
    "int64": 9,
    "bool": 10,
    "uint16": 17,
    "float16": 19,
    "uint32": 22,
    "uint64": 23,
}
_NAMES = {number: name for name, number in _TYPES.items()}
_STRING_SIZE = 24  # sizeof(TF_TString)


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("deallocator", ctypes.c_void_p),
    ]


class _Output(ctypes.Structure):
    _fields_ = [("operation", ctypes.c_void_p), ("index", ctypes.c_int)]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "TF_Version": (ctypes.c_char_p, []),
    "TF_NewStatus": (ctypes.c_void_p, []),
    "TF_GetCode": (ctypes.c_int, [ctypes.c_void_p]),
    "TF_Message": (ctypes.c_char_p, [ctypes.c_void_p]),
    "TF_NewGraph": (ctypes.c_void_p, []),
    "TF_NewSessionOptions": (ctypes.c_void_p, []),
    "TF_NewBuffer": (ctypes.POINTER(_Buffer), []),
    "TF_DeleteBuffer": (None, [ctypes.POINTER(_Buffer)]),
    "TF_LoadLibrary": (ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_void_p]),
    "TF_GraphGetOpDef": (
        None,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(_Buffer), ctypes.c_void_p],
    ),
    "TF_LoadSessionFromSavedModel": (
        ctypes.c_void_p,
        [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_char_p),
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ],
    ),
    "TF_GraphOperationByName": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
    "TF_AllocateTensor": (
        ctypes.c_void_p,
        [
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_int64),
            ctypes.c_int,
            ctypes.c_size_t,
        ],
    ),
    "TF_DeleteTensor": (None, [ctypes.c_void_p]),
    "TF_TensorData": (ctypes.c_void_p, [ctypes.c_void_p]),
    "TF_TensorType": (ctypes.c_int, [ctypes.c_void_p]),
    "TF_TensorByteSize": (ctypes.c_size_t, [ctypes.c_void_p]),
    "TF_NumDims": (ctypes.c_int, [ctypes.c_void_p]),
    "TF_Dim": (ctypes.c_int64, [ctypes.c_void_p, ctypes.c_int]),
    "TF_StringInit": (None, [ctypes.c_void_p]),
    "TF_StringCopy": (None, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]),
    "TF_StringGetSize": (ctypes.c_size_t, [ctypes.c_void_p]),
    "TF_StringGetDataPointer": (ctypes.c_void_p, [ctypes.c_void_p]),
    "TF_SessionRun": (
        None,
        [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.POINTER(_Output),
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int,
            ctypes.POINTER(_Output),
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ],
    ),
}


def _load_tensorflow(libraries: Sequence[str]) -> Any:
    """Binds the C API; what comes back has its functions and one status object."""
    handles = [ctypes.CDLL(path, ctypes.RTLD_GLOBAL) for path in libraries]
    tf = SimpleNamespace()
    for name, (result, arguments) in _SIGNATURES.items():
        handle = next(handle for handle in handles if hasattr(handle, name))
        function = handle[name]
        function.restype, function.argtypes = result, arguments
        setattr(tf, name, function)
    # tensorflow::DisableXlaCompilation() has no C name.
    disable = handles[-1]["_ZN10tensorflow21DisableXlaCompilationEv"]
    disable.restype, disable.argtypes = None, []
    disable()
    tf.status = tf.TF_NewStatus()
    return tf


def _failed(tf: Any) -> bool:
    return tf.TF_GetCode(tf.status) != 0


def _check(tf: Any) -> None:
    if _failed(tf):
        raise RuntimeError(tf.TF_Message(tf.status).decode("utf-8", "replace"))


def _unregistered(tf: Any, operations: Sequence[str]) -> list[str]:
    graph = tf.TF_NewGraph()
    missing = []
    for name in operations:
        buffer = tf.TF_NewBuffer()
        tf.TF_GraphGetOpDef(graph, name.encode(), buffer, tf.status)
        if _failed(tf):
            missing.append(name)
        tf.TF_DeleteBuffer(buffer)
    return missing


def _register(
    tf: Any, operations: Sequence[str], libraries: Sequence[str]
) -> list[str]:
    """Loads op libraries until `operations` are all known; returns what was new."""
    custom = missing = _unregistered(tf, operations)
    for library in libraries:
        if not missing:
            break
        tf.TF_LoadLibrary(library.encode(), tf.status)
        _check(tf)
        missing = _unregistered(tf, missing)
    if missing:
        raise RuntimeError(f"No library at hand registers the operations {missing}")
    return custom


def _to_tensor(tf: Any, array: np.ndarray) -> int:
    import numpy as np

    shape = (ctypes.c_int64 * array.ndim)(*array.shape)
    if array.dtype.kind == "O":
        size = _STRING_SIZE * array.size
        tensor = tf.TF_AllocateTensor(_STRING, shape, array.ndim, size)
        data = tf.TF_TensorData(tensor)
        for i, item in enumerate(array.ravel()):
            tf.TF_StringInit(data + i * _STRING_SIZE)
            tf.TF_StringCopy(data + i * _STRING_SIZE, item, len(item))
        return tensor
    array = np.asarray(array, order="C")  # a scalar stays one
    kind = _TYPES[array.dtype.name]
    tensor = tf.TF_AllocateTensor(kind, shape, array.ndim, array.nbytes)
    ctypes.memmove(tf.TF_TensorData(tensor), array.ctypes.data, array.nbytes)
    return tensor


def _to_array(tf: Any, tensor: int) -> np.ndarray:
    import numpy as np

    shape = [tf.TF_Dim(tensor, axis) for axis in range(tf.TF_NumDims(tensor))]
    kind, data = tf.TF_TensorType(tensor), tf.TF_TensorData(tensor)
    if kind == _STRING:
        strings = np.empty(int(np.prod(shape)), object)
        for i in range(strings.size):
            item = data + i * _STRING_SIZE
            strings[i] = ctypes.string_at(
                tf.TF_StringGetDataPointer(item), tf.TF_StringGetSize(item)
            )
        return strings.reshape(shape)
    raw = ctypes.string_at(data, tf.TF_TensorByteSize(tensor))
    if kind == _BFLOAT16:  # NumPy has none: widen, which is exact
        halves = np.frombuffer(raw, np.uint16).astype(np.uint32)
        return (halves << 16).view(np.float32).reshape(shape)
    return np.frombuffer(raw, _NAMES[kind]).reshape(shape)


def load(
    path: str,
    *,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    operations: Sequence[str],
    tensorflow_libraries: Sequence[str],
    operation_libraries: Sequence[str],
) -> Loaded:
    """Loads the SavedModel at `path`.

    Args:
        path: The SavedModel's directory.
        inputs: Graph tensor (`"operation:index"`) by input name.
        outputs: Graph tensor by output name.
        operations: Names of all operations in the file.
        tensorflow_libraries: The C API's shared libraries, in loading order.
        operation_libraries: Shared libraries that may hold custom operations.

    Returns:
        As every runtime. The facts hold `custom_operations`, the operations that were
        not registered before.
    """
    tf = _load_tensorflow(tensorflow_libraries)
    custom = _register(tf, operations, operation_libraries)
    graph = tf.TF_NewGraph()
    tags = (ctypes.c_char_p * 1)(b"serve")
    session = tf.TF_LoadSessionFromSavedModel(
        tf.TF_NewSessionOptions(), None, path.encode(), tags, 1, graph, None, tf.status
    )
    _check(tf)

    def locate(tensor: str) -> _Output:
        operation, _, index = tensor.partition(":")
        address = tf.TF_GraphOperationByName(graph, operation.encode())
        if not address:
            raise RuntimeError(f"The graph has no operation {operation!r}")
        return _Output(address, int(index))

    fed = (_Output * len(inputs))(*map(locate, inputs.values()))
    fetched = (_Output * len(outputs))(*map(locate, outputs.values()))

    def answer(case: Arrays) -> Arrays:
        tensors = [_to_tensor(tf, case[name]) for name in inputs]
        results = (ctypes.c_void_p * len(outputs))()
        tf.TF_SessionRun(
            session,
            None,
            fed,
            (ctypes.c_void_p * len(tensors))(*tensors),
            len(tensors),
            fetched,
            results,
            len(outputs),
            None,
            0,
            None,
            tf.status,
        )
        _check(tf)
        arrays = [_to_array(tf, tensor) for tensor in results]
        for tensor in [*tensors, *results]:
            tf.TF_DeleteTensor(tensor)
        return dict(zip(outputs, arrays, strict=True))

    def facts() -> dict[str, Any]:
        return {"version": tf.TF_Version().decode(), "custom_operations": custom}

    return answer, facts


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def _tensorflow_libraries() -> list[str]:
    """Finds the shared libraries with the C API, in loading order."""
    folder = _folder("tensorflow") or Path("tensorflow")
    names = ("libtensorflow_framework.so.2", "libtensorflow_cc.so.2")
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f"This TensorFlow for Linux lacks {folder / name}")
    return [str(folder / name) for name in names]


def _operation_libraries() -> list[str]:
    """Finds the shared libraries of tensorflow-text without importing it."""
    folder = _folder("tensorflow_text")
    if folder is None:
        return []
    return sorted(str(path) for path in (folder / "python" / "ops").glob("*.so"))


def _options(file: File) -> Mapping[str, Any]:
    return {
        "inputs": dict(file.inputs),
        "outputs": dict(file.outputs),
        "operations": list(file.operations),
        "tensorflow_libraries": _tensorflow_libraries(),
        "operation_libraries": _operation_libraries(),
    }


RUNTIME = Runtime(
    "cpp_loader",
    "TensorFlow C++ loader, XLA disabled",
    ("saved_model",),
    find=_tensorflow_libraries,
    options=_options,
    blocked=("keras_mha", "keras", "tensorflow"),
    takes_text=True,
)
