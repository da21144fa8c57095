"""Wraps an ONNX graph: nodes by name, and sizes followed as symbols."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Size = int | str  # a number, or the name of a free size
LARGE = 1024  # elements; larger constants are not shapes
AS_VECTOR = "/vector"  # ends the name of a constant's copy in one dimension
_COMMUTATIVE = ("Add", "Mul")


class Graph:
    """A graph with its nodes and constants at hand by name, and sizes as symbols."""

    def __init__(self, model: Any) -> None:
        self.proto = model.graph
        self.opset = next(o.version for o in model.opset_import if not o.domain)
        self.producers = {
            name: node for node in self.proto.node for name in node.output if name
        }
        self.constants = {tensor.name: tensor for tensor in self.proto.initializer}
        self._infos = {
            info.name: info
            for group in (self.proto.input, self.proto.value_info, self.proto.output)
            for info in group
        }
        self._made = itertools.count()

    def sizes(self, name: str) -> list[Size] | None:
        """Returns the shape of a tensor, if every size is a number or has a name."""
        if name in self.constants:
            return list(self.constants[name].dims)
        if name not in self._infos:
            return None
        tensor = self._infos[name].type.tensor_type
        if not tensor.HasField("shape"):
            return None
        sizes = [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param
            for dim in tensor.shape.dim
        ]
        return None if "" in sizes else sizes

    def value(self, name: str) -> np.ndarray | None:
        """Returns a small constant."""
        from onnx import numpy_helper

        tensor = self.constants.get(name)
        if tensor is None or math.prod(tensor.dims) > LARGE:
            return None
        return numpy_helper.to_array(tensor)

    def elements(self, name: str) -> list[Size] | None:
        """Returns the integers in a tensor of sizes, or the names of free ones."""
        constant = self.value(name)
        if constant is not None:
            known = constant.dtype.kind == "i" and constant.ndim <= 1
            return [int(item) for item in constant.ravel()] if known else None
        node = self.producers.get(name)
        evaluate = None if node is None else _ELEMENTS.get(node.op_type)
        return None if evaluate is None else evaluate(self, node)

    def constant(self, like: str, value: np.ndarray) -> str:
        """Adds a constant, named after the tensor `like`."""
        from onnx import numpy_helper

        name = f"{like}/constant_{next(self._made)}"
        while name in self.constants:
            name = f"{like}/constant_{next(self._made)}"
        tensor = numpy_helper.from_array(value, name)
        self.proto.initializer.append(tensor)
        self.constants[name] = self.proto.initializer[-1]
        return name

    def flat_constant(self, name: str, size: int) -> str | None:
        """Returns a constant of `size` elements as a vector."""
        tensor = self.constants.get(name)
        if tensor is None or math.prod(tensor.dims) != size:
            return None
        if list(tensor.dims) == [size]:
            return name
        flat = f"{name}{AS_VECTOR}"
        if flat not in self.constants:
            vector = self.proto.initializer.add()
            vector.CopyFrom(tensor)
            vector.name, vector.dims[:] = flat, [size]
            self.constants[flat] = vector
        return flat

    def become(
        self, node: Any, op_type: str, inputs: list[str], **attributes: Any
    ) -> None:
        """Turns a node with one output into another operation with that output."""
        from onnx import helper

        node.CopyFrom(
            helper.make_node(
                op_type, inputs, list(node.output), name=node.name, **attributes
            )
        )

    def match(self, pattern: Any, name: str, tensors: dict[str, str]) -> bool:
        """Returns whether the tensor `name` is computed as `pattern` says.

        Args:
            pattern: A variable, a string that stands for one tensor wherever it
                occurs, or a tuple of an operation and the patterns of its inputs.
                `"variable=Operation"` gives the operation's output a name too.
            name: The tensor.
            tensors: Tensors by variable; filled where the pattern fits.
        """
        if isinstance(pattern, str):
            return tensors.setdefault(pattern, name) == name
        variable, _, op_type = pattern[0].rpartition("=")
        operands = pattern[1:]
        node = self.producers.get(name)
        if node is None or node.op_type != op_type or len(node.input) < len(operands):
            return False
        if variable and tensors.setdefault(variable, name) != name:
            return False
        inputs = list(node.input[: len(operands)])
        orders = [inputs, inputs[::-1]] if op_type in _COMMUTATIVE else [inputs]
        for order in orders:
            trial = dict(tensors)
            pairs = zip(operands, order, strict=True)
            if all(self.match(operand, tensor, trial) for operand, tensor in pairs):
                tensors.update(trial)
                return True
        return False

    def drop_unused(self) -> None:
        """Removes nodes and constants that no output needs."""
        needed = {output.name for output in self.proto.output}
        nodes = []
        for node in reversed(self.proto.node):
            if needed.intersection(node.output):
                nodes.append(node)
                needed.update(node.input)
                needed.update(_captured(node))
        nodes.reverse()
        constants = [t for t in self.proto.initializer if t.name in needed]
        infos = [info for info in self.proto.value_info if info.name in needed]
        _refill(self.proto.node, nodes)
        _refill(self.proto.initializer, constants)
        _refill(self.proto.value_info, infos)


def _refill(field: Any, items: list[Any]) -> None:
    if len(items) != len(field):
        copies = [type(item).FromString(item.SerializeToString()) for item in items]
        del field[:]
        field.extend(copies)


def _captured(node: Any) -> Iterator[str]:
    """Tensors that a node's subgraphs may take from outside."""
    for held in node.attribute:
        for graph in [
            *held.graphs,
            *([held.g] if held.HasField("g") else []),
        ]:
            for inner in graph.node:
                yield from inner.input
                yield from _captured(inner)
            yield from (output.name for output in graph.output)


# What integer operations do to sizes.


def attribute(node: Any, name: str, default: Any) -> Any:
    """Returns the value of an attribute of a node, or `default`."""
    from onnx import helper

    for entry in node.attribute:
        if entry.name == name:
            return helper.get_attribute_value(entry)
    return default


def _shape(graph: Graph, node: Any) -> list[Size] | None:
    sizes = graph.sizes(node.input[0])
    start, end = attribute(node, "start", 0), attribute(node, "end", None)
    return None if sizes is None else sizes[start:end]


def _same(graph: Graph, node: Any) -> list[Size] | None:
    return graph.elements(node.input[0])


def _gather(graph: Graph, node: Any) -> list[Size] | None:
    items, indices = map(graph.elements, node.input)
    if items is None or indices is None:
        return None
    return [items[index] for index in indices if isinstance(index, int)]


def _slice(graph: Graph, node: Any) -> list[Size] | None:
    items, *bounds = map(graph.elements, node.input)
    starts, ends, steps = bounds[0], bounds[1], [1]
    if len(bounds) == 4:
        steps = bounds[3]
    if items is None or starts is None or ends is None or steps is None:
        return None
    start, end, step = starts[0], ends[0], steps[0]
    if not (isinstance(start, int) and isinstance(end, int) and isinstance(step, int)):
        return None
    return items[start:end:step]


def _concat(graph: Graph, node: Any) -> list[Size] | None:
    parts = [graph.elements(name) for name in node.input]
    joined: list[Size] = []
    for part in parts:
        if part is None:
            return None
        joined += part
    return joined


def _product(graph: Graph, node: Any) -> list[Size] | None:
    items = graph.elements(node.input[0])
    if items is None or not all(isinstance(item, int) for item in items):
        return None
    return [math.prod(item for item in items if isinstance(item, int))]


_ELEMENTS: dict[str, Callable[[Graph, Any], list[Size] | None]] = {
    "Shape": _shape,
    "Cast": _same,
    "Identity": _same,
    "Squeeze": _same,
    "Unsqueeze": _same,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "ReduceProd": _product,
}
