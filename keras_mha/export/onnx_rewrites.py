"""Rewrites an ONNX graph to fewer operations with the same values.

What Keras' layers convert to computes shapes at run time that are known, and spells
layers out that ONNX has an operation for. Every rewrite here is exact up to rounding
and leaves standard ONNX.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

Size = int | str  # a number, or the name of a free size
_LARGE = 1024  # elements; larger constants are no shapes
_COMMUTATIVE = ("Add", "Mul")


def rewrite(model: Any) -> Any:
    """Returns an `onnx.ModelProto` with the same values and fewer operations."""
    from onnx import shape_inference

    with _without_large_constants(model) as restore:
        changed = True
        while changed:
            model = shape_inference.infer_shapes(model, data_prop=True)
            graph = _Graph(model)
            changed = any(step(graph) for step in _STEPS)
            graph.drop_unused()
        return restore(model)


@contextmanager
def _without_large_constants(model: Any) -> Iterator[Callable[[Any], Any]]:
    """Takes the data of weights out, which shape inference would copy each time."""
    data = {}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) > _LARGE and tensor.HasField("raw_data"):
            data[tensor.name] = tensor.raw_data
            tensor.ClearField("raw_data")

    def restore(rewritten: Any) -> Any:
        for tensor in rewritten.graph.initializer:
            if tensor.name in data:
                tensor.raw_data = data[tensor.name]
        return rewritten

    try:
        yield restore
    finally:
        restore(model)


class _Graph:
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
        """The shape of a tensor, if every size is a number or has a name."""
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
        """A small constant."""
        from onnx import numpy_helper

        tensor = self.constants.get(name)
        if tensor is None or math.prod(tensor.dims) > _LARGE:
            return None
        return numpy_helper.to_array(tensor)

    def elements(self, name: str) -> list[Size] | None:
        """The integers in a tensor of sizes, each a number or a free size's name."""
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
        """A constant of `size` elements as a vector."""
        tensor = self.constants.get(name)
        if tensor is None or math.prod(tensor.dims) != size:
            return None
        if list(tensor.dims) == [size]:
            return name
        flat = f"{name}/vector"
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

    def match(self, pattern: Any, name: str, found: dict[str, str]) -> bool:
        """Whether the tensor `name` is computed as `pattern` says.

        Args:
            pattern: A variable, a string that stands for one tensor wherever it
                occurs, or a tuple of an operation and the patterns of its inputs.
                `"variable=Operation"` gives the operation's output a name too.
            name: The tensor.
            found: Tensors by variable; filled where the pattern fits.
        """
        if isinstance(pattern, str):
            return found.setdefault(pattern, name) == name
        variable, _, op_type = pattern[0].rpartition("=")
        operands = pattern[1:]
        node = self.producers.get(name)
        if node is None or node.op_type != op_type or len(node.input) < len(operands):
            return False
        if variable and found.setdefault(variable, name) != name:
            return False
        inputs = list(node.input[: len(operands)])
        orders = [inputs, inputs[::-1]] if op_type in _COMMUTATIVE else [inputs]
        for order in orders:
            trial = dict(found)
            pairs = zip(operands, order, strict=True)
            if all(self.match(operand, given, trial) for operand, given in pairs):
                found.update(trial)
                return True
        return False

    def drop_unused(self) -> None:
        """Removes nodes and constants that no output needs."""
        needed = {output.name for output in self.proto.output}
        kept = []
        for node in reversed(self.proto.node):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
                needed.update(_captured(node))
        kept.reverse()
        constants = [t for t in self.proto.initializer if t.name in needed]
        infos = [info for info in self.proto.value_info if info.name in needed]
        _refill(self.proto.node, kept)
        _refill(self.proto.initializer, constants)
        _refill(self.proto.value_info, infos)


def _refill(field: Any, items: list[Any]) -> None:
    if len(items) != len(field):
        copies = [type(item).FromString(item.SerializeToString()) for item in items]
        del field[:]
        field.extend(copies)


def _captured(node: Any) -> Iterator[str]:
    """Tensors that a node's subgraphs may take from outside."""
    for attribute in node.attribute:
        for graph in [
            *attribute.graphs,
            *([attribute.g] if attribute.HasField("g") else []),
        ]:
            for inner in graph.node:
                yield from inner.input
                yield from _captured(inner)
            yield from (output.name for output in graph.output)


# What integer operations do to sizes.


def _attribute(node: Any, name: str, default: Any) -> Any:
    from onnx import helper

    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default


def _shape(graph: _Graph, node: Any) -> list[Size] | None:
    sizes = graph.sizes(node.input[0])
    start, end = _attribute(node, "start", 0), _attribute(node, "end", None)
    return None if sizes is None else sizes[start:end]


def _same(graph: _Graph, node: Any) -> list[Size] | None:
    return graph.elements(node.input[0])


def _gather(graph: _Graph, node: Any) -> list[Size] | None:
    items, indices = map(graph.elements, node.input)
    if items is None or indices is None:
        return None
    return [items[index] for index in indices if isinstance(index, int)]


def _slice(graph: _Graph, node: Any) -> list[Size] | None:
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


def _concat(graph: _Graph, node: Any) -> list[Size] | None:
    parts = [graph.elements(name) for name in node.input]
    joined: list[Size] = []
    for part in parts:
        if part is None:
            return None
        joined += part
    return joined


def _product(graph: _Graph, node: Any) -> list[Size] | None:
    items = graph.elements(node.input[0])
    if items is None or not all(isinstance(item, int) for item in items):
        return None
    return [math.prod(item for item in items if isinstance(item, int))]


_ELEMENTS: dict[str, Callable[[_Graph, Any], list[Size] | None]] = {
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


# The rewrites. Each says whether it changed anything.


def _fix_reshapes(graph: _Graph) -> bool:
    """Makes targets of `Reshape` constant: 0 for a kept size, -1 for one other."""
    changed = False
    for node in graph.proto.node:
        if node.op_type != "Reshape" or node.input[1] in graph.constants:
            continue
        before = graph.sizes(node.input[0])
        after = graph.elements(node.input[1])
        if before is None or after is None or _attribute(node, "allowzero", 0):
            continue
        target = _constant_target(before, after)
        axes = _inserted_axes(before, after)
        if axes and graph.opset >= 13:
            where = graph.constant(node.output[0], np.array(axes, np.int64))
            graph.become(node, "Unsqueeze", [node.input[0], where])
            changed = True
        elif target is not None:
            node.input[1] = graph.constant(node.output[0], np.array(target, np.int64))
            changed = True
    return changed


def _constant_target(before: list[Size], after: list[Size]) -> list[int] | None:
    """A target without free sizes, if `after` is certain to have as many elements.

    Example:

    >>> from keras_mha.export.onnx_rewrites import _constant_target
    >>> _constant_target(["batch", "length", 6], ["batch", "length", 2, 3])
    [0, 0, 2, 3]
    >>> _constant_target(["batch", "length"], ["batch", 1, "length", 1])
    [0, 1, -1, 1]
    >>> _constant_target(["other", 6], ["length", 6]) is None
    True
    """
    if 0 in after:
        return None
    if after.count(-1) == 1:  # the size that the others leave
        left = _quotient(before, [size for size in after if size != -1])
        if left is None:
            return None
        after = [left if size == -1 else size for size in after]
    if _quotient(before, after) != 1:
        return None
    target = [
        size
        if isinstance(size, int)
        else (0 if i < len(before) and before[i] == size else -1)
        for i, size in enumerate(after)
    ]
    return target if target.count(-1) <= 1 else None


def _inserted_axes(before: list[Size], after: list[Size]) -> list[int]:
    """Where `after` has sizes of one that `before` has not; none if more differs.

    Example:

    >>> from keras_mha.export.onnx_rewrites import _inserted_axes
    >>> _inserted_axes(["batch", "length"], [-1, 1, "length", 1])
    [1, 3]
    """
    rest = list(before)
    axes = []
    for i, size in enumerate(after):
        if rest and size in (rest[0], -1) and size != 1:
            rest.pop(0)
        elif size == 1:
            axes.append(i)
        else:
            return []
    return [] if rest else axes


def _quotient(before: list[Size], after: list[Size]) -> Size | None:
    """The one size by which the product of `before` is larger than that of `after`."""
    names = [size for size in before if isinstance(size, str)]
    for size in after:
        if isinstance(size, str):
            if size not in names:
                return None
            names.remove(size)
    numbers = [
        math.prod(size for size in sizes if isinstance(size, int))
        for sizes in (before, after)
    ]
    if numbers[1] == 0 or numbers[0] % numbers[1]:
        return None
    factor = numbers[0] // numbers[1]
    if not names:
        return factor
    return names[0] if len(names) == 1 and factor == 1 else None


def _keep_rank_in_products(graph: _Graph) -> bool:
    """Multiplies `(..., K)` with a matrix as it is: Keras flattens it before."""
    pattern = ("Reshape", ("MatMul", ("Reshape", "inputs", "flat"), "matrix"), "target")
    changed = False
    for node in graph.proto.node:
        found = _match_any(graph, [pattern], node.output[0])
        if found is None:
            continue
        sizes = graph.sizes(found["inputs"])
        matrix = graph.sizes(found["matrix"])
        flat = graph.elements(found["flat"])
        after = graph.sizes(node.output[0])
        if (
            sizes is not None
            and matrix is not None
            and len(matrix) == 2
            and flat == [-1, sizes[-1]]
            and after == [*sizes[:-1], matrix[1]]
        ):
            graph.become(node, "MatMul", [found["inputs"], found["matrix"]])
            changed = True
    return changed


def _layer_normalization(mean_op: str) -> Any:
    """What Keras' `LayerNormalization` over the last axis is converted to."""
    mean = (f"mean={mean_op}", "x")
    centred = ("Sub", "x", mean)
    variance = (f"variance={mean_op}", ("Mul", centred, centred))
    factor = ("Mul", ("Reciprocal", ("Sqrt", ("Add", variance, "epsilon"))), "gamma")
    shift = ("Add", ("Mul", factor, ("Neg", mean)), "beta")
    return ("Add", ("Mul", factor, "x"), shift)


# Up to opset 17, tf2onnx takes the last axis of three for that of an image.
_LAYER_NORMALIZATIONS = [
    _layer_normalization(mean_op) for mean_op in ("ReduceMean", "GlobalAveragePool")
]


def _fuse_layer_normalization(graph: _Graph) -> bool:
    """Makes one operation of what spells a layer normalization out."""
    changed = False
    for node in graph.proto.node:
        found = _match_any(graph, _LAYER_NORMALIZATIONS, node.output[0])
        if graph.opset < 17 or found is None:
            continue
        sizes, epsilon = graph.sizes(found["x"]), graph.value(found["epsilon"])
        if sizes is None or not isinstance(sizes[-1], int) or epsilon is None:
            continue
        means = [graph.producers[found[name]] for name in ("mean", "variance")]
        gamma = graph.flat_constant(found["gamma"], sizes[-1])
        beta = graph.flat_constant(found["beta"], sizes[-1])
        over_last = all(_is_over_last(graph, mean, len(sizes)) for mean in means)
        if over_last and gamma and beta and epsilon.size == 1:
            graph.become(
                node,
                "LayerNormalization",
                [found["x"], gamma, beta],
                axis=-1,
                epsilon=epsilon.item(),
            )
            changed = True
    return changed


def _match_any(graph: _Graph, patterns: list[Any], name: str) -> dict[str, str] | None:
    for pattern in patterns:
        found: dict[str, str] = {}
        if graph.match(pattern, name, found):
            return found
    return None


def _is_over_last(graph: _Graph, node: Any, rank: int) -> bool:
    if node.op_type == "GlobalAveragePool":
        return rank == 3
    axes: Any = list(_attribute(node, "axes", []))
    if len(node.input) > 1:
        axes = graph.elements(node.input[1])
    return axes in ([-1], [rank - 1]) and _attribute(node, "keepdims", 1) == 1


_NEGATIVE_FROM_THE_END = (
    "Where",
    ("Less", ("Cast", "ids"), "zero"),
    ("Add", "ids", "size"),
    "ids",
)


def _gather_directly(graph: _Graph) -> bool:
    """Lets `Gather` count negative ids from the end, which it does by itself."""
    changed = False
    for node in graph.proto.node:
        if node.op_type != "Gather":
            continue
        found = _match_any(graph, [_NEGATIVE_FROM_THE_END], node.input[1])
        if found is None:
            continue
        axis, sizes = _attribute(node, "axis", 0), graph.sizes(node.input[0])
        size, zero = graph.value(found["size"]), graph.value(found["zero"])
        if sizes is None or size is None or zero is None:
            continue
        if size.size == 1 and size.item() == sizes[axis] and not zero.any():
            node.input[1] = found["ids"]
            changed = True
    return changed


_STEPS = (
    _gather_directly,
    _fix_reshapes,
    _keep_rank_in_products,
    _fuse_layer_normalization,
)
