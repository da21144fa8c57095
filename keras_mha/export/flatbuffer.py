"""Reads a TFLite file: which operations it has, and their inputs' and outputs' sizes.

Source: the schema of TensorFlow Lite, version 3, as ai-edge-litert ships it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple


class Contents(NamedTuple):
    """What a TFLite file holds.

    Attributes:
        operators: How often each builtin operation occurs, most frequent first.
        custom: Names of operations that are not built in.
        dynamic: Names of tensors with a size that is only known at run time.
    """

    operators: dict[str, int]
    custom: tuple[str, ...]
    dynamic: tuple[str, ...]


def read_contents(content: bytes) -> Contents:
    """Reads the file's `content`."""
    from ai_edge_litert import schema_py_generated as schema

    builtin: Any = schema.BuiltinOperator
    names = {number: name for name, number in vars(builtin).items() if name.isupper()}
    model: Any = schema.ModelT.InitFromPackedBuf(content, 0)
    # Codes above 127 stand in the newer of the two fields alone.
    codes = [
        max(code.builtinCode, code.deprecatedBuiltinCode)
        for code in model.operatorCodes
    ]
    custom = [
        code.customCode.decode()
        for code, number in zip(model.operatorCodes, codes, strict=True)
        if number == builtin.CUSTOM
    ]
    counts = Counter(
        names[codes[operator.opcodeIndex]]
        for graph in model.subgraphs
        for operator in graph.operators
    )
    dynamic = [
        tensor.name.decode()
        for graph in model.subgraphs
        for tensor in graph.tensors
        if tensor.shapeSignature is not None and -1 in tensor.shapeSignature
    ]
    return Contents(dict(counts.most_common()), tuple(custom), tuple(dynamic))
