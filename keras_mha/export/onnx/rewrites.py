"""Rewrites an ONNX graph to fewer operations with the same values.

What Keras' layers convert to computes shapes at run time that are known, and spells
layers out that ONNX has an operation for. Every rewrite here is exact up to rounding
and leaves standard ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from keras_mha.export.onnx.graph import AS_VECTOR, LARGE, Graph, Size, attribute


def rewrite(model: Any) -> Any:
    """Returns an `onnx.ModelProto` with the same values and fewer operations."""
    from onnx import shape_inference

    with _without_large_constants(model) as restore:
        changed = True
        while changed:
            model = shape_inference.infer_shapes(model, data_prop=True)
            graph = Graph(model)
            changed = any(step(graph) for step in _STEPS)
            graph.drop_unused()
        return restore(model)


@contextmanager
def _without_large_constants(model: Any) -> Iterator[Callable[[Any], Any]]:
    """Takes the data of weights out, which shape inference would copy each time."""
    data = {}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) > LARGE and tensor.HasField("raw_data"):
            data[tensor.name] = tensor.raw_data
            tensor.ClearField("raw_data")

    def restore(rewritten: Any) -> Any:
        for tensor in rewritten.graph.initializer:
            name = tensor.name.removesuffix(AS_VECTOR)
            if name in data:
                tensor.raw_data = data[name]
        return rewritten

    try:
        yield restore
    finally:
        restore(model)


# The rewrites. Each says whether it changed anything.


def _fix_reshapes(graph: Graph) -> bool:
    """Makes targets of `Reshape` constant: 0 for the same size, -1 for one other."""
    changed = False
    for node in graph.proto.node:
        if node.op_type != "Reshape" or node.input[1] in graph.constants:
            continue
        before = graph.sizes(node.input[0])
        after = graph.elements(node.input[1])
        if before is None or after is None or attribute(node, "allowzero", 0):
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
    """Returns a target without free sizes, if the number of elements surely stays.

    Example:

    >>> from keras_mha.export.onnx.rewrites import _constant_target
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
    """Returns where `after` has sizes of one that `before` lacks; none if more differs.

    Example:

    >>> from keras_mha.export.onnx.rewrites import _inserted_axes
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
    """Returns the one size by which `before` has a larger product than `after`."""
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


def _keep_rank_in_products(graph: Graph) -> bool:
    """Multiplies `(..., K)` with a matrix as it is: Keras flattens it before."""
    pattern = ("Reshape", ("MatMul", ("Reshape", "inputs", "flat"), "matrix"), "target")
    changed = False
    for node in graph.proto.node:
        tensors = _match_any(graph, [pattern], node.output[0])
        if tensors is None:
            continue
        sizes = graph.sizes(tensors["inputs"])
        matrix = graph.sizes(tensors["matrix"])
        flat = graph.elements(tensors["flat"])
        after = graph.sizes(node.output[0])
        if (
            sizes is not None
            and matrix is not None
            and len(matrix) == 2
            and flat == [-1, sizes[-1]]
            and after == [*sizes[:-1], matrix[1]]
        ):
            graph.become(node, "MatMul", [tensors["inputs"], tensors["matrix"]])
            changed = True
    return changed


def _layer_normalization(mean_op: str) -> Any:
    """Returns what Keras' `LayerNormalization` over the last axis becomes."""
    mean = (f"mean={mean_op}", "x")
    centered = ("Sub", "x", mean)
    variance = (f"variance={mean_op}", ("Mul", centered, centered))
    factor = ("Mul", ("Reciprocal", ("Sqrt", ("Add", variance, "epsilon"))), "gamma")
    shift = ("Add", ("Mul", factor, ("Neg", mean)), "beta")
    return ("Add", ("Mul", factor, "x"), shift)


# Up to opset 17, tf2onnx takes the last axis of three for that of an image.
_LAYER_NORMALIZATIONS = [
    _layer_normalization(mean_op) for mean_op in ("ReduceMean", "GlobalAveragePool")
]


def _fuse_layer_normalization(graph: Graph) -> bool:
    """Makes one operation of what spells a layer normalization out."""
    changed = False
    for node in graph.proto.node:
        tensors = _match_any(graph, _LAYER_NORMALIZATIONS, node.output[0])
        if graph.opset < 17 or tensors is None:
            continue
        sizes, epsilon = graph.sizes(tensors["x"]), graph.value(tensors["epsilon"])
        if sizes is None or not isinstance(sizes[-1], int) or epsilon is None:
            continue
        means = [graph.producers[tensors[name]] for name in ("mean", "variance")]
        gamma = graph.flat_constant(tensors["gamma"], sizes[-1])
        beta = graph.flat_constant(tensors["beta"], sizes[-1])
        over_last = all(_is_over_last(graph, mean, len(sizes)) for mean in means)
        if over_last and gamma and beta and epsilon.size == 1:
            graph.become(
                node,
                "LayerNormalization",
                [tensors["x"], gamma, beta],
                axis=-1,
                epsilon=epsilon.item(),
            )
            changed = True
    return changed


def _match_any(graph: Graph, patterns: list[Any], name: str) -> dict[str, str] | None:
    for pattern in patterns:
        tensors: dict[str, str] = {}
        if graph.match(pattern, name, tensors):
            return tensors
    return None


def _is_over_last(graph: Graph, node: Any, rank: int) -> bool:
    if node.op_type == "GlobalAveragePool":
        return rank == 3
    axes: Any = list(attribute(node, "axes", []))
    if len(node.input) > 1:
        axes = graph.elements(node.input[1])
    return axes in ([-1], [rank - 1]) and attribute(node, "keepdims", 1) == 1


_NEGATIVE_FROM_THE_END = (
    "Where",
    ("Less", ("Cast", "ids"), "zero"),
    ("Add", "ids", "size"),
    "ids",
)


def _gather_directly(graph: Graph) -> bool:
    """Lets `Gather` count negative ids from the end, which it does by itself."""
    changed = False
    for node in graph.proto.node:
        if node.op_type != "Gather":
            continue
        tensors = _match_any(graph, [_NEGATIVE_FROM_THE_END], node.input[1])
        if tensors is None:
            continue
        axis, sizes = attribute(node, "axis", 0), graph.sizes(node.input[0])
        size, zero = graph.value(tensors["size"]), graph.value(tensors["zero"])
        if sizes is None or size is None or zero is None:
            continue
        if size.size == 1 and size.item() == sizes[axis] and not zero.any():
            node.input[1] = tensors["ids"]
            changed = True
    return changed


_STEPS = (
    _gather_directly,
    _fix_reshapes,
    _keep_rank_in_products,
    _fuse_layer_normalization,
)
