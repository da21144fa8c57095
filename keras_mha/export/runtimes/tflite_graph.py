"""Reads the graphs of a TFLite file that need not be trusted.

Stand-alone: ai_edge_litert's schema and NumPy. Nothing is run. A wrong file ends in an
answer that says what is wrong; one made to take all time or memory ends this process.

Source: the schema of TensorFlow Lite, version 3, as ai-edge-litert ships it.
"""

from __future__ import annotations

import functools
import resource
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .descriptor import Arrays, Loaded, Runtime

_IDENTIFIER = b"TFL3"
_FOREIGN = {
    b"PK\x03\x04": "a zip archive, as a .keras file is",
    b"\x89PNG": "a PNG image",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"\x7fELF": "a program",
}
# What a file that points outside itself raises in the schema's code.
_OUT_OF_RANGE = (struct.error, ValueError, TypeError, IndexError, OverflowError)
# Beyond twice the file's size; a graph of ten thousand operators takes less.
_MEMORY = 2 << 30


class BrokenFileError(ValueError):
    """The content is no TFLite file, or one that contradicts itself."""


def load(path: str) -> Loaded:
    """Reads the file at `path`.

    Returns:
        As every runtime, without answers: nothing is run. The facts hold either the
        `graphs`, in the form that `read_graphs` gives, and whether the file
        `has_metadata` for MediaPipe, or what is wrong with it, under `broken`.
    """
    content = Path(path).read_bytes()
    _limit_memory(2 * len(content) + _MEMORY)
    return _answer, functools.partial(_read, content)


def _answer(_: Arrays) -> Arrays:
    raise ValueError("a file is only read here, so there must be no cases")


def _read(content: bytes) -> dict[str, Any]:
    try:
        graphs = read_graphs(content)
        return {"graphs": graphs, "has_metadata": _has_metadata(content)}
    except BrokenFileError as error:
        return {"broken": str(error)}
    except MemoryError:
        # The error's traceback holds what fills the memory, until this block is left:
        # nothing more can be made in it.
        pass
    return {"broken": "its graph takes more memory than any real one"}


def read_graphs(content: bytes) -> list[dict[str, Any]]:
    """Reads every subgraph of a file's `content`.

    Returns:
        For each its `inputs` and `outputs` (numbers of tensors), `tensors` (`name`,
        `dtype`, `shape` with -1 for a size known at run time, `constant`, and `scales`,
        how many it was rounded by) and
        `operators` (`name`, `custom` name, `options`, and `inputs` and `outputs`,
        numbers of tensors, -1 for an optional one left out).

    Raises:
        BrokenFileError: If the content is no TFLite file, points outside itself, or
            contradicts itself.
    """
    from ai_edge_litert import schema_py_generated as schema

    _check_head(content)
    try:
        model: Any = schema.ModelT.InitFromPackedBuf(content, 0)
    except _OUT_OF_RANGE as error:
        raise BrokenFileError(
            f"it is corrupt or cut off: a part lies outside its {len(content)} bytes "
            f"({error})"
        ) from error
    if model.version != 3:
        raise BrokenFileError(f"its schema has version {model.version}, not 3")
    if not model.subgraphs:
        raise BrokenFileError("it holds no graph")
    codes = [_operator_name(schema, code) for code in model.operatorCodes or ()]
    filled = [_is_filled(buffer, len(content)) for buffer in model.buffers or ()]
    types = _names(schema.TensorType)
    return [
        _read_graph(graph, f"graph {i}", codes, filled, types)
        for i, graph in enumerate(model.subgraphs)
    ]


def _has_metadata(content: bytes) -> bool:
    from ai_edge_litert import schema_py_generated as schema

    model: Any = schema.ModelT.InitFromPackedBuf(content, 0)
    return any(entry.name == b"TFLITE_METADATA" for entry in model.metadata or ())


def _limit_memory(size: int) -> None:
    """Makes what asks for more than `size` further bytes a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    limit = pages * resource.getpagesize() + size
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _check_head(content: bytes) -> None:
    if not content:
        raise BrokenFileError("it is empty")
    if content[4:8] != _IDENTIFIER:
        kinds = [kind for head, kind in _FOREIGN.items() if content.startswith(head)]
        raise BrokenFileError(
            f"it is no TFLite file: bytes 4 to 7 must be {_IDENTIFIER!r}, and are "
            f"{content[4:8]!r}" + "".join(f" (it is {kind})" for kind in kinds)
        )


def _names(enumeration: Any) -> dict[int, str]:
    return {
        number: name for name, number in vars(enumeration).items() if name.isupper()
    }


def _operator_name(schema: Any, code: Any) -> tuple[str, str]:
    """The builtin's name, and the custom one's where it is `CUSTOM`."""
    # Codes above 127 stand in the newer of the two fields alone.
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    name = _names(schema.BuiltinOperator).get(number, f"UNKNOWN_{number}")
    custom = _text(code.customCode) if name == "CUSTOM" else ""
    return name, custom


def _text(name: bytes | None) -> str:
    return (name or b"").decode("utf-8", "replace")


def _is_filled(buffer: Any, size: int) -> bool:
    """Whether a buffer holds values: in the table or, in large files, behind it."""
    if buffer.offset > 1:
        if buffer.offset + buffer.size > size:
            raise BrokenFileError(
                f"it is cut off: a buffer ends at byte {buffer.offset + buffer.size} "
                f"of {size}"
            )
        return buffer.size > 0
    return buffer.data is not None and len(buffer.data) > 0


def _read_graph(
    graph: Any,
    where: str,
    codes: Sequence[tuple[str, str]],
    filled: Sequence[bool],
    types: Mapping[int, str],
) -> dict[str, Any]:
    tensors = [
        _read_tensor(tensor, f"tensor {i} of {where}", filled, types)
        for i, tensor in enumerate(graph.tensors or ())
    ]
    operators = [
        _read_operator(operator, f"operator {i} of {where}", codes, len(tensors))
        for i, operator in enumerate(graph.operators or ())
    ]
    for operator in operators:
        # Weights stored in half precision are constants all the same.
        if operator["name"] == "DEQUANTIZE":
            for source, target in zip(
                operator["inputs"], operator["outputs"], strict=False
            ):
                tensors[target]["constant"] = (
                    source >= 0 and tensors[source]["constant"]
                )
    return {
        "inputs": _numbers(graph.inputs, f"an input of {where}", len(tensors)),
        "outputs": _numbers(graph.outputs, f"an output of {where}", len(tensors)),
        "tensors": tensors,
        "operators": operators,
    }


def _read_tensor(
    tensor: Any, where: str, filled: Sequence[bool], types: Mapping[int, str]
) -> dict[str, Any]:
    if tensor.type not in types:
        raise BrokenFileError(f"{where} has the unknown type {tensor.type}")
    if tensor.buffer >= len(filled):
        raise BrokenFileError(f"{where} is in buffer {tensor.buffer} of {len(filled)}")
    # The signature has -1 where the shape has the size that the converter assumed.
    free = tensor.shapeSignature
    sizes = tensor.shape if free is None or len(free) == 0 else free
    shape = [int(size) for size in (() if sizes is None else sizes)]
    if any(size < -1 for size in shape):
        raise BrokenFileError(f"{where} has the shape {shape}")
    scales = tensor.quantization and tensor.quantization.scale
    return {
        "name": _text(tensor.name),
        "dtype": types[tensor.type].lower(),
        "shape": shape,
        "constant": filled[tensor.buffer],
        "scales": 0 if scales is None else len(scales),
    }


def _read_operator(
    operator: Any, where: str, codes: Sequence[tuple[str, str]], tensors: int
) -> dict[str, Any]:
    if operator.opcodeIndex >= len(codes):
        raise BrokenFileError(f"{where} has the code {operator.opcodeIndex}")
    name, custom = codes[operator.opcodeIndex]
    options = vars(operator.builtinOptions) if operator.builtinOptions else {}
    return {
        "name": name,
        "custom": custom,
        "options": {
            key: value
            for key, value in options.items()
            if isinstance(value, bool | int | float)
        },
        "inputs": _numbers(operator.inputs, where, tensors, optional=True),
        "outputs": _numbers(operator.outputs, where, tensors),
    }


def _numbers(
    given: Any, where: str, tensors: int, *, optional: bool = False
) -> list[int]:
    numbers = [int(number) for number in (() if given is None else given)]
    first = -1 if optional else 0
    if any(not first <= number < tensors for number in numbers):
        raise BrokenFileError(f"{where} names tensors {numbers} of {tensors}")
    return numbers


# It reads files for others and runs none, so it is not in the table.
RUNTIME = Runtime(
    "tflite_graph",
    "ai-edge-litert's schema",
    ("tflite",),
    blocked=("keras_mha", "keras", "tensorflow"),
)
