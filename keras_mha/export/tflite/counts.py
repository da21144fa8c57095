"""Counts what a TFLite file holds: its operations, and the tensors of free size."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from keras_mha.export.runtimes.tflite_graph import read_graphs


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
    """Reads the `content` of a file that this process wrote itself."""
    graphs = read_graphs(content)
    operators = [operator for graph in graphs for operator in graph["operators"]]
    counts = Counter(operator["name"] for operator in operators)
    custom = dict.fromkeys(
        operator["custom"] for operator in operators if operator["name"] == "CUSTOM"
    )
    dynamic = [
        tensor["name"]
        for graph in graphs
        for tensor in graph["tensors"]
        if -1 in tensor["shape"]
    ]
    return Contents(dict(counts.most_common()), tuple(custom), tuple(dynamic))
