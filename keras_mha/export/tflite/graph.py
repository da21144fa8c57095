"""The contents of TFLite files as values."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keras_mha.export.parity import VerificationError
from keras_mha.export.report import TensorInfo
from keras_mha.export.runtimes import fresh_process, tflite_schema
from keras_mha.export.runtimes.descriptor import File

# Operators that keep the values of what they read.
_PASSING = ("DEQUANTIZE", "QUANTIZE", "RESHAPE", "TRANSPOSE")


@dataclass(frozen=True)
class Tensor(TensorInfo):
    """A tensor in a graph.

    Attributes:
        constant: Whether the file holds its values.
        is_input: Whether it is one of its graph's inputs.
        scales: How many it was rounded by, if at all: 1, or one for each slice.
    """

    constant: bool
    is_input: bool
    scales: int

    @property
    def rank(self) -> int:
        """The number of its axes."""
        return len(self.shape or ())

    @property
    def is_dynamic(self) -> bool:
        """Whether one of its sizes is known at run time only."""
        return None in (self.shape or ())


@dataclass(frozen=True)
class Operator:
    """An operator in a graph.

    Attributes:
        name: The builtin operator's name in the schema, as `BATCH_MATMUL`.
        custom: The custom operator's name where `name` is `CUSTOM`, else empty.
        subgraph: Number of its graph in the file.
        index: Its number in that graph.
        inputs: What it reads; optional inputs that are left out are not among them.
        outputs: What it writes.
        options: Its numbers and switches, by their names in the schema.
        merges: Name of the operator of which this one reads several outputs, and all
            that anything reads; empty if there is none.
        feeds: Names of the operators that read its outputs, as they are or in another
            shape or type.
    """

    name: str
    custom: str
    subgraph: int
    index: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    options: Mapping[str, Any]
    merges: str
    feeds: frozenset[str]


@dataclass(frozen=True)
class Contents:
    """The contents of a file.

    Attributes:
        operators: The operators of all graphs, in their order.
        dynamic: Names of tensors with a size that is known at run time only.
        min_runtime_version: The oldest TensorFlow Lite that has the operators, as the
            file says itself; empty where it does not.
    """

    operators: tuple[Operator, ...]
    dynamic: tuple[str, ...]
    min_runtime_version: str

    @property
    def builtin(self) -> dict[str, int]:
        """How often each builtin operator occurs, most frequent first."""
        names = (one.name for one in self.operators if one.name != "CUSTOM")
        return dict(Counter(names).most_common())

    @property
    def custom(self) -> tuple[str, ...]:
        """Names of the operators that are not built in."""
        names = (one.custom for one in self.operators if one.name == "CUSTOM")
        return tuple(dict.fromkeys(names))


def read_file(path: Path, *, timeout: float) -> dict[str, Any]:
    """Reads the file at `path`; see `keras_mha.export.runtimes.tflite_schema.describe`.

    The file need not be trusted: a fresh process reads it, in bounded time and memory.

    Raises:
        FileNotFoundError: If the file does not exist.
        ImportError: If ai-edge-litert is not installed.
        ValueError: If it is not a TFLite file, or a broken one.
    """
    if importlib.util.find_spec("ai_edge_litert") is None:
        raise ImportError(
            "Reading TFLite files needs ai-edge-litert: pip install 'keras-mha[tflite]'"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        raise ValueError(f"{path} must be a file, which it is not")
    try:
        _, facts = fresh_process.run_in_fresh_process(
            tflite_schema.RUNTIME, File(path, "tflite"), [], timeout=timeout
        )
    except VerificationError as error:
        raise ValueError(f"{path} cannot be read as a TFLite file: {error}") from error
    if "broken" in facts:
        raise ValueError(f"{path} cannot be read as a TFLite file: {facts['broken']}")
    return facts


def contents_of(facts: Mapping[str, Any]) -> Contents:
    """Says what a file holds, from what `tflite_schema.describe` says of it."""
    graphs = facts["graphs"]
    return Contents(
        operators=tuple(
            operator
            for number, graph in enumerate(graphs)
            for operator in _operators(number, graph)
        ),
        dynamic=tuple(
            tensor["name"]
            for graph in graphs
            for tensor in graph["tensors"]
            if -1 in tensor["shape"]
        ),
        min_runtime_version=facts["min_runtime_version"],
    )


def _operators(subgraph: int, graph: Mapping[str, Any]) -> list[Operator]:
    tensors = [
        Tensor(
            name=tensor["name"],
            dtype=tensor["dtype"],
            shape=tuple(None if size < 0 else size for size in tensor["shape"]),
            constant=tensor["constant"],
            is_input=number in graph["inputs"],
            scales=tensor["scales"],
        )
        for number, tensor in enumerate(graph["tensors"])
    ]
    merged, fed = _merged(graph), _fed(graph)
    return [
        Operator(
            name=operator["name"],
            custom=operator["custom"],
            subgraph=subgraph,
            index=index,
            inputs=tuple(tensors[i] for i in operator["inputs"] if i >= 0),
            outputs=tuple(tensors[i] for i in operator["outputs"]),
            options=operator["options"],
            merges=merged.get(index, ""),
            feeds=frozenset(fed[index]),
        )
        for index, operator in enumerate(graph["operators"])
    ]


def _merged(graph: Mapping[str, Any]) -> dict[int, str]:
    """The names of operators whose outputs one other merges, by the number of that."""
    readers: dict[int, set[int]] = {number: {-1} for number in graph["outputs"]}
    for index, operator in enumerate(graph["operators"]):
        for number in operator["inputs"]:
            readers.setdefault(number, set()).add(index)
    merged = {}
    for operator in graph["operators"]:
        read = [readers[number] for number in operator["outputs"] if number in readers]
        several = set().union(*read)
        if len(read) > 1 and len(several) == 1:
            merged[several.pop()] = operator["name"]
    return merged


def _fed(graph: Mapping[str, Any]) -> dict[int, set[str]]:
    """What each operator feeds, by its number; an operator comes before its readers."""
    operators = graph["operators"]
    fed: dict[int, set[str]] = {}
    readers: dict[int, set[str]] = {}  # of each tensor
    for index in reversed(range(len(operators))):
        operator = operators[index]
        fed[index] = {
            name for number in operator["outputs"] for name in readers.get(number, ())
        }
        passed = fed[index] if operator["name"] in _PASSING else {operator["name"]}
        for number in operator["inputs"]:
            readers.setdefault(number, set()).update(passed)
    return fed
