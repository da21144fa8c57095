"""One scale for all rows of a narrow int8 table.

The converter gives each row of an embedding table a scale of its own, which takes 12
bytes with its zero point, always 0. A row of 32 numbers takes 32: the table is then no
quarter but 0.34 of its size in float32, and LiteRT refuses a file that leaves the zero
points out. One scale for the whole table costs nothing in size, and little in precision
where no row is much larger than the others.

For the CPU alone: LiteRT's GPU delegate takes such a table, and answers with zeros for
all rows but the first (`lint_tflite` tells).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_mha.export.tflite.model_object import read_model, write_model

# Rows shorter than this. The scales of longer ones add under a tenth to the table.
NARROW = 128
# The most that rounding may add, as a share of the table's root mean square. Rounding
# each row by itself adds near 0.005, rounding the inputs of dense layers up to 0.03.
_MOST_ERROR = 0.025
_GREATEST = 127


def with_one_scale_for_narrow_tables(content: bytes) -> bytes:
    """The file with narrow tables of embeddings rounded by one scale each.

    A table keeps its scales where one for all would round it too coarsely.
    """
    model = read_model(content)
    changed = [_give_one_scale(*found) for found in _narrow_tables(model)]
    return write_model(model) if any(changed) else content


def _narrow_tables(model: Any) -> Iterator[tuple[Any, Any]]:
    """Tables in int8 that are only looked up, with a scale a row; and their buffers."""
    from ai_edge_litert import schema_py_generated as schema

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
                and table.shape[1] < NARROW
                and table.quantization.quantizedDimension == 0
                and len(table.quantization.scale) == table.shape[0] > 1
            ):
                yield table, model.buffers[table.buffer]


def _give_one_scale(table: Any, buffer: Any) -> bool:
    """Rounds the table anew, unless that would be too coarse; says whether it did."""
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
