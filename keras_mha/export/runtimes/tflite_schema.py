"""All that this package knows of TFLite's schema: files as objects, and as values.

Stand-alone: ai_edge_litert's schema, flatbuffers and NumPy. As a runtime it reads a
file that need not be trusted, and runs nothing: a wrong file ends in an answer that
says what is wrong, and one made to take all time or memory ends this process.

Source: the schema of TensorFlow Lite, version 3, as ai-edge-litert ships it.
"""

from __future__ import annotations

import functools
import resource
import struct
from collections.abc import Iterator, Sequence
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
_ALIGNMENT = 16  # of constants: the schema asks for it, flatbuffers' Python does not
_METADATA, _MIN_RUNTIME = "TFLITE_METADATA", "min_runtime_version"
# Beyond twice the file's size; a graph of ten thousand operators takes less.
_MEMORY = 2 << 30


class BrokenFileError(ValueError):
    """The content is not a TFLite file, or one that contradicts itself."""


def load(path: str) -> Loaded:
    """Reads the file at `path`.

    Returns:
        As every runtime, without answers: nothing is run. The facts are either what
        `describe` says of the file, or what is wrong with it, under `broken`.
    """
    content = Path(path).read_bytes()
    _limit_memory(2 * len(content) + _MEMORY)
    return _answer, functools.partial(_facts, content)


def _answer(_: Arrays) -> Arrays:
    raise ValueError("a file is only read here, so there must be no cases")


def _facts(content: bytes) -> dict[str, Any]:
    try:
        return read(content)
    except BrokenFileError as error:
        return {"broken": str(error)}
    except MemoryError:
        # The error's traceback holds what fills the memory, until this block is left:
        # nothing more can be made in it.
        pass
    return {"broken": "its graph takes more memory than any real one"}


def read(content: bytes) -> dict[str, Any]:
    """Says what any file holds; see `describe`.

    Raises:
        BrokenFileError: If the content is not a TFLite file, points outside itself, or
            contradicts itself.
    """
    _check_head(content)
    try:
        model = unpack(content)
    except _OUT_OF_RANGE as error:
        raise BrokenFileError(
            f"it is corrupt or cut off: a part lies outside its {len(content)} bytes "
            f"({error})"
        ) from error
    if model.version != 3:
        raise BrokenFileError(f"its schema has version {model.version}, not 3")
    if not model.subgraphs:
        raise BrokenFileError("it holds no graph")
    return describe(model, len(content))


def unpack(content: bytes) -> Any:
    """Reads a file that this process wrote itself into objects, a `ModelT`."""
    return _schema().ModelT.InitFromPackedBuf(content, 0)


def pack(model: Any) -> bytes:
    """Writes a `ModelT` as a file; its constants begin where processors load them."""
    from flatbuffers import Builder

    class AlignedBuilder(Builder):
        def StartVector(self, elemSize: int, numElems: int, alignment: int) -> Any:  # noqa: N802  (flatbuffers' names)
            least = _ALIGNMENT if elemSize == 1 else alignment
            return super().StartVector(elemSize, numElems, max(alignment, least))

    builder = AlignedBuilder(1 << 20)
    builder.Finish(model.Pack(builder), _IDENTIFIER)
    return bytes(builder.Output())


def describe(model: Any, size: int) -> dict[str, Any]:
    """Says in plain values what a model holds.

    Args:
        model: A `ModelT`.
        size: Bytes in its file.

    Returns:
        Whether it `has_metadata` for MediaPipe; its `min_runtime_version`, the oldest
        TensorFlow Lite that has its operators, as it says itself, or ""; for each
        signature by name its `inputs`, the numbers of tensors in the first graph by
        name; and `graphs`, for each subgraph its `inputs` and `outputs` (numbers of
        tensors), `tensors` (`name`, `dtype`, `shape` with -1 for a size known at run
        time, `constant`, and `scales`, how many it was rounded by) and `operators`
        (`name`, `custom` name, `options`, and `inputs` and `outputs`, numbers of
        tensors, -1 for an optional one left out).

    Raises:
        BrokenFileError: If the model contradicts itself.
    """
    codes = [_operator_name(code) for code in model.operatorCodes or ()]
    filled = [_is_filled(buffer, size) for buffer in model.buffers or ()]
    graphs = [
        _read_graph(graph, f"graph {i}", codes, filled)
        for i, graph in enumerate(model.subgraphs)
    ]
    return {
        "graphs": graphs,
        "signatures": {
            _text(signature.signatureKey): _read_signature(signature, graphs[0])
            for signature in model.signatureDefs or ()
            if signature.subgraphIndex == 0
        },
        "has_metadata": any(_text(e.name) == _METADATA for e in model.metadata or ()),
        "min_runtime_version": min_runtime_version(model),
    }


def min_runtime_version(model: Any) -> str:
    """The oldest TensorFlow Lite that has a model's operators, as it says itself."""
    for entry in model.metadata or ():
        if _text(entry.name) == _MIN_RUNTIME:
            if entry.buffer >= len(model.buffers):
                raise BrokenFileError(f"its metadata is in buffer {entry.buffer}")
            data = model.buffers[entry.buffer].data
            return _text(bytes([] if data is None else data).rstrip(b"\0"))
    return ""


# Changes to a `ModelT`.


def set_min_runtime_version(model: Any, version: str) -> None:
    """Makes this the only metadata of a model."""
    model.metadata, model.metadataBuffer = [], None
    _add_metadata(model, _MIN_RUNTIME, version.encode().ljust(_ALIGNMENT, b"\0"))


def add_mediapipe_metadata(model: Any, metadata: bytes) -> None:
    """Adds metadata for MediaPipe, a flatbuffer of its own schema."""
    _add_metadata(model, _METADATA, metadata)


def add_unread_inputs(model: Any, names: Sequence[str]) -> None:
    """Gives the first graph inputs that nothing reads, like its first one."""
    graph, (signature,) = model.subgraphs[0], model.signatureDefs
    like = graph.tensors[graph.inputs[0]]
    inputs = [int(number) for number in graph.inputs]
    for name in names:
        inputs.append(len(graph.tensors))
        tensor = _schema().TensorT(
            shape=like.shape,
            type=like.type,
            name=name,
            shapeSignature=like.shapeSignature,
            hasRank=True,
        )
        graph.tensors.append(tensor)
        signature.inputs.append(_schema().TensorMapT(name, inputs[-1]))
    graph.inputs = inputs


def tables_by_row(model: Any) -> Iterator[tuple[Any, Any]]:
    """Yields int8 tables that are only looked up, with a scale a row, and buffers."""
    schema = _schema()
    lookups = {
        index
        for index, code in enumerate(model.operatorCodes)
        if code.builtinCode == schema.BuiltinOperator.EMBEDDING_LOOKUP
    }
    for graph in model.subgraphs:
        readers: dict[int, set[int]] = {}
        for operator in graph.operators:
            for index in operator.inputs:
                readers.setdefault(int(index), set()).add(operator.opcodeIndex)
        for index, codes in readers.items():
            table = graph.tensors[index] if index >= 0 else None
            if (
                table is not None
                and codes <= lookups
                and table.type == schema.TensorType.INT8
                and len(table.shape) == 2
                and table.quantization.quantizedDimension == 0
                and len(table.quantization.scale) == table.shape[0] > 1
            ):
                yield table, model.buffers[table.buffer]


def give_back_ids(model: Any) -> None:
    """Replaces the first graph by one that turns its first input into floats."""
    schema = _schema()
    kept = {entry.buffer for entry in model.metadata}
    for number, buffer in enumerate(model.buffers):
        if number not in kept:
            buffer.data = None
    graph = model.subgraphs[0]
    tensors = [graph.tensors[number] for number in graph.inputs]
    ids, kind = tensors[0], schema.TensorType.FLOAT32
    floats = schema.TensorT(shape=ids.shape, type=kind, name="ids_as_float")
    operator = schema.OperatorT(
        opcodeIndex=0,
        inputs=[0],
        outputs=[len(tensors)],
        builtinOptionsType=schema.BuiltinOptions.CastOptions,
        builtinOptions=schema.CastOptionsT(inDataType=ids.type, outDataType=kind),
    )
    cast = schema.BuiltinOperator.CAST
    model.operatorCodes = [
        schema.OperatorCodeT(deprecatedBuiltinCode=cast, builtinCode=cast, version=1)
    ]
    graph.inputs = list(range(len(tensors)))
    graph.outputs = [len(tensors)]
    graph.tensors, graph.operators = [*tensors, floats], [operator]
    model.subgraphs, model.signatureDefs = [graph], []


def _add_metadata(model: Any, name: str, data: bytes) -> None:
    import numpy as np

    model.metadata = model.metadata or []
    model.metadata.append(_schema().MetadataT(name, len(model.buffers)))
    model.buffers.append(_schema().BufferT(np.frombuffer(data, np.uint8)))


# What `describe` reads.


def _schema() -> Any:
    from ai_edge_litert import schema_py_generated

    return schema_py_generated


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
            f"it is not a TFLite file: bytes 4 to 7 must be {_IDENTIFIER!r}, and are "
            f"{content[4:8]!r}" + "".join(f" (it is {kind})" for kind in kinds)
        )


@functools.cache
def _names(enumeration: str) -> dict[int, str]:
    numbers = vars(getattr(_schema(), enumeration))
    return {number: name for name, number in numbers.items() if name.isupper()}


def _operator_name(code: Any) -> tuple[str, str]:
    """The builtin's name, and the custom one's where it is `CUSTOM`."""
    # Codes above 127 stand only in the newer of the two fields.
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    name = _names("BuiltinOperator").get(number, f"UNKNOWN_{number}")
    custom = _text(code.customCode) if name == "CUSTOM" else ""
    return name, custom


def _text(name: bytes | str | None) -> str:
    # A name is bytes where it was read, and a string where it was set.
    return name if isinstance(name, str) else (name or b"").decode("utf-8", "replace")


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
) -> dict[str, Any]:
    tensors = [
        _read_tensor(tensor, f"tensor {i} of {where}", filled)
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


def _read_signature(signature: Any, graph: dict[str, Any]) -> dict[str, Any]:
    entries, count = signature.inputs or (), len(graph["tensors"])
    where = f"signature {_text(signature.signatureKey)!r}"
    numbers = _numbers([entry.tensorIndex for entry in entries], where, count)
    names = [_text(entry.name) for entry in entries]
    return {"inputs": dict(zip(names, numbers, strict=True))}


def _read_tensor(tensor: Any, where: str, filled: Sequence[bool]) -> dict[str, Any]:
    types = _names("TensorType")
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
    "tflite_schema",
    "ai-edge-litert's schema",
    ("tflite",),
    blocked=("keras_mha", "keras", "tensorflow"),
)
