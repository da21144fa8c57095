"""TFLite files taken apart and put together: one behind another, with further inputs.

A file's operators, weights and quantization stay as they are; only where they stand in
the file changes.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flatbuffers import Builder
from typing_extensions import override

_MIN_RUNTIME = "min_runtime_version"
_METADATA = "TFLITE_METADATA"
_ALIGNMENT = (
    16  # of weights, as the schema demands and flatbuffers' Python code forgets
)


def join(first: bytes, second: bytes) -> bytes:
    """One file that gives what `first` answers to `second`.

    Args:
        first: A file with one graph, one signature and one output.
        second: A file with one signature and one input, of that output's type and
            shape.

    Returns:
        A file with the inputs of `first` and the outputs of `second`, under the name
        of the signature of `second`.
    """
    front, back = unpack(first), unpack(second)
    (graph,) = front.subgraphs
    rest = back.subgraphs[0]
    ((given,), (made,)) = rest.inputs, graph.outputs
    buffers, codes = len(front.buffers), len(front.operatorCodes)
    tensors = len(graph.tensors)

    def moved(number: int) -> int:
        return number if number < 0 else made if number == given else number + tensors

    for other in back.subgraphs:
        for tensor in other.tensors:
            tensor.buffer += buffers
        for operator in other.operators:
            operator.opcodeIndex += codes
    for operator in rest.operators:
        operator.inputs = [moved(number) for number in operator.inputs]
        operator.outputs = [moved(number) for number in operator.outputs]
        if operator.intermediates is not None:
            operator.intermediates = [moved(n) for n in operator.intermediates]
    graph.tensors += rest.tensors
    graph.operators += rest.operators
    graph.outputs = [moved(number) for number in rest.outputs]
    (signature,), (other,) = front.signatureDefs, back.signatureDefs
    for output in other.outputs:
        output.tensorIndex = moved(output.tensorIndex)
    signature.outputs, signature.signatureKey = other.outputs, other.signatureKey
    oldest = max(min_runtime_version(first), min_runtime_version(second), key=_parts)
    front.buffers += back.buffers
    front.operatorCodes += back.operatorCodes
    front.subgraphs += back.subgraphs[1:]
    # What the converter notes of each part holds of neither alone; nor do the tables
    # of names, which belong to one graph.
    front.metadata, front.metadataBuffer = [], None
    _add_metadata(front, _MIN_RUNTIME, oldest.encode().ljust(_ALIGNMENT, b"\0"))
    return pack(front)


def with_inputs(model: Any, names: Sequence[str]) -> None:
    """Gives the graph of `model` inputs that nothing reads, like its first one."""
    from ai_edge_litert import schema_py_generated as schema

    graph, (signature,) = model.subgraphs[0], model.signatureDefs
    like = graph.tensors[graph.inputs[0]]
    inputs = [int(number) for number in graph.inputs]
    for name in names:
        inputs.append(len(graph.tensors))
        graph.tensors.append(
            schema.TensorT(
                shape=like.shape,
                type=like.type,
                name=name,
                shapeSignature=like.shapeSignature,
                hasRank=True,
            )
        )
        signature.inputs.append(schema.TensorMapT(name, inputs[-1]))
    graph.inputs = inputs


def with_metadata(model: Any, metadata: bytes, files: Mapping[str, bytes]) -> bytes:
    """The file of `model` with metadata in it, and files behind it in a zip archive.

    Source: "TensorFlow Lite metadata" (the flatbuffer stands in a buffer named
    TFLITE_METADATA; associated files follow the model as a zip archive).
    """
    _add_metadata(model, _METADATA, metadata)
    content = io.BytesIO()
    content.write(pack(model))
    with zipfile.ZipFile(content, "a") as archive:
        for name, data in files.items():
            # With a fixed date, the same model always gives the same file.
            archive.writestr(zipfile.ZipInfo(name), data)
    return content.getvalue()


def min_runtime_version(content: bytes) -> str:
    """The oldest TensorFlow Lite that has the file's operators, as it says itself."""
    model = unpack(content)
    for entry in model.metadata or ():
        if entry.name == _MIN_RUNTIME.encode():
            data = model.buffers[entry.buffer].data
            return bytes(data).rstrip(b"\0").decode("ascii")
    return ""


def unpack(content: bytes) -> Any:
    """The objects of a file that this process wrote itself, a `ModelT`."""
    from ai_edge_litert import schema_py_generated as schema

    return schema.ModelT.InitFromPackedBuf(content, 0)


def pack(model: Any) -> bytes:
    """The file of a `ModelT`."""
    builder = _AlignedBuilder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


class _AlignedBuilder(Builder):
    """Lets the bytes of weights begin where every processor can load them."""

    @override
    def StartVector(self, elemSize: int, numElems: int, alignment: int) -> Any:
        least = _ALIGNMENT if elemSize == 1 else alignment
        return super().StartVector(elemSize, numElems, max(alignment, least))


def _add_metadata(model: Any, name: str, data: bytes) -> None:
    from ai_edge_litert import schema_py_generated as schema

    model.metadata = model.metadata or []
    model.metadata.append(schema.MetadataT(name, len(model.buffers)))
    model.buffers.append(schema.BufferT(np.frombuffer(data, np.uint8)))


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
