"""Converts operations that tf2onnx converts wrongly, slowly or not at all.

- `Erfc`, which Keras' GELU is made of, is unknown to it, as are `Log1p`, `Expm1`,
  `Bucketize`, which discretizes, and `Bitcast`, by which `keras.ops.argmax` reads the
  signs of floats.
- `Select` becomes `mask * x + (1 - mask) * y`, where one infinity or NaN in what is not
  selected spoils the result. Here it becomes ONNX' `Where`.
- `Einsum`, which Keras' `EinsumDense` and `MultiHeadAttention` are made of, becomes a
  product of padded operands and some twenty operations on their shapes. Here it
  becomes `MatMul` between transpositions or constant `Reshape`s.
- `ExtractImagePatches`, which many cut images with, fails where the batch is free. Here
  it becomes `SpaceToDepth`, or a `Conv` that picks pixels.
- `ResizeBilinear` and the like multiply sizes by rounded quotients, and may lose a row.
- `ScatterNd` keeps one of the values for a place, and not their sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np


def _replace(
    graph: Any, node: Any, op_type: str, inputs: list[str], **attributes: Any
) -> None:
    """Puts another operation in the place of `node`."""
    output = node.output[0]
    dtype, shape = graph.get_dtype(output), graph.get_shape(output)
    graph.remove_node(node.name)
    graph.make_node(
        op_type,
        inputs,
        name=node.name,
        outputs=[output],
        dtypes=[dtype],
        shapes=[shape],
        attr=attributes,
    )


def _constant(graph: Any, node: Any, value: Any) -> str:
    return graph.make_const(f"{node.name}/{len(graph.get_nodes())}", value).output[0]


def _erfc(graph: Any, node: Any, _: str, __: list[Any]) -> None:
    """`erfc(-x / sqrt 2)` of GELU as `1 + erf(x / sqrt 2)`, which runtimes fuse."""
    from tf2onnx.utils import map_onnx_to_numpy_type

    dtype = map_onnx_to_numpy_type(graph.get_dtype(node.output[0]))
    one = _constant(graph, node, np.array(1.0, dtype))
    scaled = node.inputs[0]
    factors = scaled.inputs if scaled.type == "Mul" else []
    if [factor.type for factor in factors[:1]] == ["Neg"] and factors[1].is_const():
        divisor = 1.0 / factors[1].get_tensor_value(as_list=False)
        divisor = _constant(graph, node, np.asarray(divisor, dtype))
        positive = graph.make_node("Div", [factors[0].input[0], divisor]).output[0]
        error = graph.make_node("Erf", [positive]).output[0]
        _replace(graph, node, "Add", [error, one])
    else:
        error = graph.make_node("Erf", [node.input[0]]).output[0]
        _replace(graph, node, "Sub", [one, error])


def _select(graph: Any, node: Any, _: str, __: list[Any]) -> None:
    condition, *values = node.input
    rank = len(graph.get_shape(node.output[0]) or ())
    # The older operation lays a vector of conditions along the first axis.
    if node.type == "Select" and len(graph.get_shape(condition) or ()) == 1 < rank:
        shape = _constant(graph, node, np.array([-1] + [1] * (rank - 1), np.int64))
        condition = graph.make_node("Reshape", [condition, shape]).output[0]
    _replace(graph, node, "Where", [condition, *values])


def _einsum(graph: Any, node: Any, _: str, __: list[Any]) -> None:
    equation = node.get_attr_value("equation").decode().replace(" ", "")
    product = _as_product(equation)
    batched = _as_batched_product(equation)
    if product is not None and node.inputs[1].is_const():
        _multiply_by_kernel(graph, node, *product)
    elif batched is not None:
        _multiply_batched(graph, node, *batched)
    else:
        from tf2onnx.onnx_opset.math import Einsum

        Einsum.version_12(graph, node)


def _multiply_by_kernel(graph: Any, node: Any, leading: int, contracted: int) -> None:
    inputs = node.input[0]
    kernel = node.inputs[1].get_tensor_value(as_list=False)
    inner, outer = kernel.shape[:contracted], kernel.shape[contracted:]

    def reshape(tensor: str, sizes: tuple[int, ...]) -> list[str]:
        # Zero keeps a size.
        target = np.array([0] * leading + [*sizes], np.int64)
        return [tensor, _constant(graph, node, target)]

    if contracted > 1:
        joined = reshape(inputs, (math.prod(inner),))
        inputs = graph.make_node("Reshape", joined).output[0]
    matrix = kernel.reshape(math.prod(inner), math.prod(outer))
    matrix = _constant(graph, node, matrix)
    if len(outer) == 1:
        _replace(graph, node, "MatMul", [inputs, matrix])
    else:
        product = graph.make_node("MatMul", [inputs, matrix]).output[0]
        _replace(graph, node, "Reshape", reshape(product, outer))


def _multiply_batched(graph: Any, node: Any, *orders: list[int]) -> None:
    left, right, result = orders
    operands = [
        graph.make_node("Transpose", [operand], attr={"perm": order}).output[0]
        for operand, order in zip(node.input, (left, right), strict=True)
    ]
    product = graph.make_node("MatMul", operands).output[0]
    _replace(graph, node, "Transpose", [product], perm=result)


def _extract_patches(graph: Any, node: Any, _: str, __: list[Any]) -> None:
    """Cuts images `(B, Y, X, C)` into patches, `(B, Y', X', Y" * X" * C)`."""
    from onnx import TensorProto

    sizes, strides, rates = (
        list(node.get_attr_value(name)[1:3]) for name in ("ksizes", "strides", "rates")
    )
    padding = node.get_attr_value("padding").decode()
    rows, columns, channels = graph.get_shape(node.input[0])[1:]
    # Neither operation takes integers.
    floats = graph.make_node("Cast", [node.input[0]], attr={"to": TensorProto.FLOAT})
    first = graph.make_node("Transpose", floats.output, attr={"perm": [0, 3, 1, 2]})
    if (
        sizes == strides
        and sizes[0] == sizes[1]
        and rates == [1, 1]
        and min(rows, columns) > 0
        and rows % sizes[0] == columns % sizes[0] == 0
    ):
        cut = graph.make_node(
            "SpaceToDepth", first.output, attr={"blocksize": sizes[0]}
        )
    else:
        # One output for each pixel of a patch, which is 1 there and 0 elsewhere.
        kernel = np.eye(sizes[0] * sizes[1] * channels, dtype=np.float32)
        kernel = kernel.reshape(-1, *sizes, channels).transpose(0, 3, 1, 2)
        cut = graph.make_node(
            "Conv",
            [*first.output, _constant(graph, node, np.ascontiguousarray(kernel))],
            attr={
                "kernel_shape": sizes,
                "strides": strides,
                "dilations": rates,
                "auto_pad": "VALID" if padding == "VALID" else "SAME_UPPER",
            },
        )
    last = graph.make_node("Transpose", cut.output, attr={"perm": [0, 2, 3, 1]})
    _replace(graph, node, "Cast", list(last.output), to=graph.get_dtype(node.output[0]))


def _as_product(equation: str) -> tuple[int, int] | None:
    """Reads `xy,yz->xz`, each letter any number of axes and z at least one.

    Returns:
        How many axes x and y are, or `None` if the equation is not such a product.
    """
    left, right, result = _terms(equation)
    contracted = len([letter for letter in left if letter in right])
    leading = len(left) - contracted
    is_product = (
        contracted > 0
        and leading > 0
        and len(right) > contracted
        and left[leading:] == right[:contracted]
        and result == left[:leading] + right[contracted:]
        and len(set(left + right)) == len(left + right) - contracted
        and (left + right).isalpha()
    )
    return (leading, contracted) if is_product else None


def _as_batched_product(equation: str) -> tuple[list[int], list[int], list[int]] | None:
    """Reads a product of matrices, one for each of the axes that all three have.

    Returns:
        The orders of axes that bring the operands to `(..., X, Y)` and `(..., Y, Z)`,
        and `(..., X, Z)` to the result; `None` if the equation is not such a product.

    Example:

    >>> from keras_mha.export.onnx.operations import _as_batched_product
    >>> _as_batched_product("bskh,btkh->bkts")
    ([0, 2, 1, 3], [0, 2, 3, 1], [0, 1, 3, 2])
    """
    terms = left, right, result = _terms(equation)
    letters = set(left + right + result)
    shared = [x for x in left if x in right and x in result]
    inner = [x for x in left if x in right and x not in result]
    rows = [x for x in left if x in result and x not in right]
    columns = [x for x in right if x in result and x not in left]
    if (
        any(len(set(term)) != len(term) or not term.isalpha() for term in terms)
        or (len(inner), len(rows), len(columns)) != (1, 1, 1)
        or len(letters) != len(shared) + 3
    ):
        return None
    product = [*shared, *rows, *columns]
    return (
        [left.index(x) for x in [*shared, *rows, *inner]],
        [right.index(x) for x in [*shared, *inner, *columns]],
        [product.index(x) for x in result],
    )


def _terms(equation: str) -> tuple[str, str, str]:
    operands, _, result = equation.partition("->")
    left, _, right = operands.partition(",")
    return left, right, result


def _log1p(graph: Any, node: Any, _: str, __: list[Any]) -> None:
    """`log(1 + x)`."""
    total = graph.make_node("Add", [node.input[0], _like(graph, node, 1)])
    _replace(graph, node, "Log", [total.output[0]])


def _expm1(graph: Any, node: Any, _: str, __: list[Any]) -> None:
    """`exp(x) - 1`."""
    power = graph.make_node("Exp", [node.input[0]])
    _replace(graph, node, "Sub", [power.output[0], _like(graph, node, 1)])


def _bucketize(graph: Any, node: Any, _: str, __: list[Any]) -> None:
    """Counts the boundaries that are not above a value."""
    from onnx import TensorProto

    boundaries = np.array(node.get_attr("boundaries").floats, np.float32)
    values = graph.make_node("Cast", [node.input[0]], attr={"to": TensorProto.FLOAT})
    last = _constant(graph, node, np.array([-1], np.int64))
    column = graph.make_node("Unsqueeze", [values.output[0], last])
    reached = graph.make_node(
        "GreaterOrEqual", [column.output[0], _constant(graph, node, boundaries)]
    )
    ones = graph.make_node("Cast", reached.output, attr={"to": TensorProto.INT32})
    _replace(graph, node, "ReduceSum", [ones.output[0], last], keepdims=0)


def _bitcast(graph: Any, node: Any, _: str, __: list[Any]) -> None:
    """Takes the sign of floats, which is all that Keras reads their bits for.

    Raises:
        ValueError: If other bits are read.
    """
    lowest = np.iinfo(np.int32).min
    readers = graph.find_output_consumers(node.output[0])
    for reader in readers:
        masks = [x.get_tensor_value() for x in reader.inputs if x.is_const()]
        if reader.type != "BitwiseAnd" or masks != [lowest]:
            raise ValueError("only the sign of a float is read")
    zero = _constant(graph, node, np.zeros((), np.float32))
    # Only its inverse tells the sign of zero.
    inverse = graph.make_node("Reciprocal", [node.input[0]]).output[0]
    below = [
        graph.make_node("Less", [x, zero]).output[0] for x in (node.input[0], inverse)
    ]
    negative = graph.make_node("Or", below)
    bits = [_constant(graph, node, np.array(x, np.int32)) for x in (lowest, 0)]
    # The operation that reads them is newer than most versions of ONNX.
    for reader in readers:
        graph.replace_all_inputs(reader.output[0], node.output[0])
    _replace(graph, node, "Where", [negative.output[0], *bits])


def _scatter(graph: Any, node: Any, _: str, __: list[Any]) -> None:
    """Adds up what goes to the same place."""
    from onnx import TensorProto, helper

    indices, values, shape = node.input
    shape = graph.make_node("Cast", [shape], attr={"to": TensorProto.INT64})
    indices = graph.make_node("Cast", [indices], attr={"to": TensorProto.INT64})
    zero = helper.make_tensor("value", graph.get_dtype(values), [1], [0])
    zeros = graph.make_node("ConstantOfShape", shape.output, attr={"value": zero})
    inputs = [zeros.output[0], indices.output[0], values]
    attributes = {"reduction": "add"} if graph.opset >= 16 else {}
    _replace(graph, node, "ScatterND", inputs, **attributes)


_RESIZE_MODES: dict[str, dict[str, Any]] = {
    "ResizeBilinear": {"mode": "linear"},
    "ResizeNearestNeighbor": {"mode": "nearest", "nearest_mode": "round_prefer_ceil"},
    "ResizeBicubic": {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1},
}


def _resize(graph: Any, node: Any, name: str, arguments: list[Any]) -> None:
    """Resizes to whole sizes; their quotients, rounded, may give others."""
    from onnx import TensorProto
    from tf2onnx.onnx_opset.nn import Resize

    if not node.get_attr_value("half_pixel_centers", False):
        Resize.version_11(graph, node, name=name, args=arguments)
        return
    first = graph.make_node("Transpose", [node.input[0]], attr={"perm": [0, 3, 1, 2]})
    shape = graph.make_node("Shape", first.output)
    bounds = [_constant(graph, node, np.array([x], np.int64)) for x in (0, 2)]
    batch = graph.make_node("Slice", [shape.output[0], *bounds])
    sizes = graph.make_node("Cast", [node.input[1]], attr={"to": TensorProto.INT64})
    whole = graph.make_node(
        "Concat", [batch.output[0], sizes.output[0]], attr={"axis": 0}
    )
    resized = graph.make_node(
        "Resize",
        [first.output[0], "", "", whole.output[0]],
        attr={
            "coordinate_transformation_mode": "half_pixel",
            **_RESIZE_MODES[node.type],
        },
    )
    _replace(graph, node, "Transpose", [resized.output[0]], perm=[0, 2, 3, 1])


def _like(graph: Any, node: Any, value: float) -> str:
    """Makes a constant of the type that a node gives."""
    from tf2onnx.utils import map_onnx_to_numpy_type

    dtype = map_onnx_to_numpy_type(graph.get_dtype(node.output[0]))
    return _constant(graph, node, np.array(value, dtype))


HANDLERS: dict[str, Callable[[Any, Any, str, list[Any]], None]] = {
    "Bitcast": _bitcast,
    "Bucketize": _bucketize,
    "Einsum": _einsum,
    "Erfc": _erfc,
    "Expm1": _expm1,
    "ExtractImagePatches": _extract_patches,
    "Log1p": _log1p,
    **dict.fromkeys(_RESIZE_MODES, _resize),
    "ScatterNd": _scatter,
    "Select": _select,
    "SelectV2": _select,
}
