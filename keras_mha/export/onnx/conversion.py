"""Converts a model's function to an ONNX graph through tf2onnx.

Five TensorFlow operations are converted here, because tf2onnx converts them wrongly,
slowly or not at all:

- `Erfc`, which Keras' GELU is made of, is unknown to it.
- `Select` becomes `mask * x + (1 - mask) * y`, where one infinity or NaN in what is not
  selected spoils the result. Here it becomes ONNX' `Where`.
- `Einsum`, which Keras' `EinsumDense` and `MultiHeadAttention` are made of, becomes a
  product of padded operands and some twenty operations on their shapes. Here it
  becomes `MatMul` between transpositions or constant `Reshape`s.
- `Bitcast`, by which Keras' `argmax` and `signbit` read a sign, is unknown to it. Here
  that one bit is computed.
- `ExtractImagePatches`, which many cut images with, fails where the batch is free. Here
  it becomes `SpaceToDepth`, or a `Conv` that picks pixels.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mha.attention.dispatch import implementation_scope
from keras_mha.copying import described
from keras_mha.export.compiled_marks import strip_compiled_marks
from keras_mha.export.endpoint import Endpoint
from keras_mha.export.inputs import Specs


def convert(endpoint: Endpoint, opset: int, directory: Path) -> Any:
    """Converts an endpoint to an `onnx.ModelProto`, sizes that are free left free.

    The attention layers are traced in their portable form.

    Args:
        endpoint: What to convert.
        opset: Version of ONNX' operations.
        directory: Where a SavedModel is written on the way. Read back from there the
            function has no marks for XLA, which would keep it from being inlined.

    Raises:
        ValueError: If the model needs operations that ONNX or tf2onnx lack.
    """
    import tf2onnx
    from tensorflow.python.util import deprecation

    saved_model = directory / "saved_model"
    with implementation_scope("portable"):
        endpoint.write(saved_model, endpoint.inputs)
    strip_compiled_marks(saved_model)
    loaded: Any = tf.saved_model.load(str(saved_model))
    answer = loaded.signatures["serving_default"]
    outputs = sorted(answer.structured_outputs)
    taken = sorted(set(outputs) & set(endpoint.inputs))
    if taken:
        raise ValueError(
            "An ONNX file's inputs and outputs must have different names; pass "
            f"other `output_names`. Received: {taken} for both"
        )
    frozen = _freeze(answer, endpoint.inputs)
    tensors = [tensor.name for tensor in (*frozen.inputs, *frozen.outputs)]
    with _listening() as listener, deprecation.silence():
        model, _ = tf2onnx.convert.from_graph_def(
            frozen.graph.as_graph_def(add_shapes=True),
            input_names=tensors[: len(endpoint.inputs)],
            output_names=tensors[len(endpoint.inputs) :],
            opset=opset,
            custom_op_handlers={name: (call, []) for name, call in _HANDLERS.items()},
            tensors_to_rename=dict(
                zip(tensors, [*endpoint.inputs, *outputs], strict=True)
            ),
        )
    _check_operations(endpoint, model, listener.nodes)
    return model


def _freeze(answer: Any, specs: Specs) -> Any:
    """Makes constants of all that a function took from outside, weights or not."""
    from tensorflow.python.framework import convert_to_constants

    names = list(specs)
    signature = [tf.TensorSpec(s.shape, s.dtype, name=n) for n, s in specs.items()]

    def function(*tensors: Any) -> list[Any]:
        results = answer(**dict(zip(names, tensors, strict=True)))
        # A name for each, also where two are the same tensor.
        return [tf.identity(results[name]) for name in sorted(results)]

    traced: Any = tf.function(function, autograph=False)
    return convert_to_constants.convert_variables_to_constants_v2(
        traced.get_concrete_function(*signature),
        lower_control_flow=False,
        aggressive_inlining=True,
    )


class _Listener(logging.Handler):
    """Keeps the names of the nodes that tf2onnx could not convert."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.nodes: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Reads a message, whose first argument is the node's name."""
        if isinstance(record.args, tuple):
            self.nodes.add(str(record.args[0]))


@contextmanager
def _listening() -> Iterator[_Listener]:
    """Reads tf2onnx' log in the user's place; it tells of problems nowhere else."""
    logger, listener = logging.getLogger("tf2onnx"), _Listener()
    handlers, propagate = logger.handlers[:], logger.propagate
    logger.handlers[:], logger.propagate = [listener], False
    try:
        yield listener
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate


def _check_operations(endpoint: Endpoint, model: Any, failed: set[str]) -> None:
    """Refuses a graph in which operations of TensorFlow's are left."""
    import onnx

    left = [
        node
        for node in model.graph.node
        if node.name in failed or not onnx.defs.has(node.op_type)
    ]
    if left:
        raise ValueError(
            "`model` needs operations that tf2onnx does not convert: "
            f"{sorted({node.op_type for node in left})}, in "
            + ", ".join(sorted({place_of(endpoint.model, n.name) for n in left}))
        )


def place_of(model: keras.Model, node: str) -> str:
    """Says which layer of a model made a node of its graph.

    Args:
        model: The model.
        node: The node's name, which has the names of the layers around it.
    """
    layers = {layer.name: layer for layer in model._flatten_layers(include_self=False)}
    for part in reversed(node.split("/")):
        # A layer that is called again gets a number.
        layer = layers.get(part) or layers.get(re.sub(r"_\d+$", "", part))
        if layer is not None:
            return described(layer)
    return f"{node.rsplit('/', 1)[-1]!r} outside any layer"


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


def _bitcast(graph: Any, node: Any, _: str, __: list[Any]) -> None:
    """The sign bit of a float as an integer; other uses are left as they are."""
    lowest = np.iinfo(np.int32).min
    for user in graph.find_output_consumers(node.output[0]):
        constants = [part for part in user.inputs if part.is_const()]
        if user.type != "BitwiseAnd" or [
            part.get_tensor_value() for part in constants
        ] != [lowest]:
            return
    (x,) = node.input
    zero = _constant(graph, node, np.zeros((), np.float32))
    # Only its inverse tells the sign of zero.
    inverse = graph.make_node("Reciprocal", [x]).output[0]
    negative = [graph.make_node("Less", [y, zero]).output[0] for y in (x, inverse)]
    sign = graph.make_node("Or", negative).output[0]
    values = [_constant(graph, node, np.array(y, np.int32)) for y in (lowest, 0)]
    _replace(graph, node, "Where", [sign, *values])


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
    dtype = graph.get_dtype(node.output[0])
    first = graph.make_node(
        "Transpose", [node.input[0]], attr={"perm": [0, 3, 1, 2]}
    ).output[0]
    if (
        sizes == strides
        and sizes[0] == sizes[1]
        and rates == [1, 1]
        and min(rows, columns) > 0
        and rows % sizes[0] == columns % sizes[0] == 0
    ):
        cut = graph.make_node("SpaceToDepth", [first], attr={"blocksize": sizes[0]})
    else:
        # One output for each pixel of a patch, which is 1 there and 0 elsewhere.
        kernel = np.eye(sizes[0] * sizes[1] * channels, dtype=np.float32)
        kernel = kernel.reshape(-1, *sizes, channels).transpose(0, 3, 1, 2)
        floats = graph.make_node("Cast", [first], attr={"to": TensorProto.FLOAT})
        cut = graph.make_node(
            "Conv",
            [floats.output[0], _constant(graph, node, np.ascontiguousarray(kernel))],
            attr={
                "kernel_shape": sizes,
                "strides": strides,
                "dilations": rates,
                "auto_pad": "VALID" if padding == "VALID" else "SAME_UPPER",
            },
        )
        cut = graph.make_node("Cast", [cut.output[0]], attr={"to": dtype})
    _replace(graph, node, "Transpose", [cut.output[0]], perm=[0, 2, 3, 1])


_HANDLERS = {
    "Bitcast": _bitcast,
    "Einsum": _einsum,
    "Erfc": _erfc,
    "ExtractImagePatches": _extract_patches,
    "Select": _select,
    "SelectV2": _select,
}


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

    >>> from keras_mha.export.onnx.conversion import _as_batched_product
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
