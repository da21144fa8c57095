"""Changes to TFLite files as objects; their weights stay as they are, or round anew.

A `ModelT` is what `keras_mha.export.runtimes.tflite_schema.unpack` returns.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from keras_mha.export.runtimes import tflite_schema

# Rows shorter than this. The scales of longer ones add under a tenth to the table.
NARROW = 128
# The most that rounding may add, as a share of the table's root mean square. Rounding
# each row by itself adds near 0.005, rounding the inputs of dense layers up to 0.03.
_MOST_ERROR = 0.025
_GREATEST = 127


def copied(model: Any) -> Any:
    """A `ModelT` to change; the weights in it are shared."""
    return copy.deepcopy(model, {id(buffer): buffer for buffer in model.buffers})


def join(front: Any, back: Any) -> Any:
    """Puts one file's graph before another's.

    Args:
        front: A `ModelT` with one graph, one signature and one output. It becomes the
            result.
        back: A `ModelT` with one signature and one input, of that output's type and
            shape.

    Returns:
        A `ModelT` with the inputs of `front` and the outputs of `back`, under the name
        of the signature of `back`.
    """
    back = copied(back)
    (graph,) = front.subgraphs
    rest = back.subgraphs[0]
    ((entry,), (end,)) = rest.inputs, graph.outputs
    buffers, codes = len(front.buffers), len(front.operatorCodes)
    tensors = len(graph.tensors)

    def moved(number: int) -> int:
        return number if number < 0 else end if number == entry else number + tensors

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
    versions = map(tflite_schema.min_runtime_version, (front, back))
    oldest = max(versions, key=_version_parts)
    front.buffers += back.buffers
    front.operatorCodes += back.operatorCodes
    front.subgraphs += back.subgraphs[1:]
    # The converter's notes on either part do not hold for both, nor do the tables of
    # names, which belong to one graph.
    tflite_schema.set_min_runtime_version(front, oldest)
    return front


def _version_parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def give_narrow_tables_one_scale(model: Any) -> bool:
    """Rounds narrow int8 tables of embeddings by one scale each; tells if any was.

    The converter gives each row of an embedding table a scale, which takes 12 bytes
    with its zero point, always 0. A row of 32 numbers takes 32: the table is then not
    a quarter but 0.34 of its size in float32, and LiteRT refuses a file that leaves the
    zero points out. One scale for the whole table costs nothing in size, and little in
    precision where no row is much larger than the others. A table keeps its scales
    where one for all would round it too coarsely.

    For the CPU only: LiteRT's GPU delegate takes such a table, and answers with zeros
    for all rows but the first (`lint_tflite` tells).
    """
    tables = [
        _give_one_scale(table, buffer)
        for table, buffer in tflite_schema.tables_by_row(model)
        if table.shape[1] < NARROW
    ]
    return any(tables)


def _give_one_scale(table: Any, buffer: Any) -> bool:
    """Rounds the table anew, unless that would be too coarse; tells whether it did."""
    scales = np.asarray(table.quantization.scale, np.float32)
    rounded = np.frombuffer(np.asarray(buffer.data).tobytes(), np.int8)
    values = rounded.reshape(table.shape).astype(np.float32) * scales[:, None]
    scale = np.float32(np.max(np.abs(values)) / _GREATEST)
    error = scale / np.sqrt(12.0)
    if error > _MOST_ERROR * np.sqrt(np.mean(np.square(values))):
        return False
    anew = np.round(values / scale).astype(np.int8)
    buffer.data = np.frombuffer(anew.tobytes(), np.uint8)
    table.quantization.scale = np.array([scale], np.float32)
    table.quantization.zeroPoint = np.zeros(1, np.int64)
    return True
