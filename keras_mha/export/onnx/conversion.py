"""Converts a model's function to an ONNX graph through tf2onnx."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_mha.attention.dispatch import implementation_scope
from keras_mha.export.compiled_marks import strip_compiled_marks
from keras_mha.export.endpoint import Endpoint
from keras_mha.export.onnx.operations import HANDLERS
from keras_mha.twin import described

# What its handlers raise where a graph is not as they expect.
_TF2ONNX_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)


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
        _without_updates(endpoint).write(saved_model, endpoint.inputs)
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
    with _listening() as listener, deprecation.silence():
        frozen = _freeze(answer, endpoint)
        tensors = [tensor.name for tensor in (*frozen.inputs, *frozen.outputs)]
        try:
            model, _ = tf2onnx.convert.from_graph_def(
                frozen.graph.as_graph_def(add_shapes=True),
                input_names=tensors[: len(endpoint.inputs)],
                output_names=tensors[len(endpoint.inputs) :],
                opset=opset,
                custom_op_handlers={n: (call, []) for n, call in HANDLERS.items()},
                tensors_to_rename=dict(
                    zip(tensors, [*endpoint.inputs, *outputs], strict=True)
                ),
            )
        except _TF2ONNX_ERRORS as error:
            nodes = [*listener.nodes, *_nodes_in(str(error))]
            raise ValueError(
                "`model` needs operations that tf2onnx does not convert, in "
                f"{places_of(endpoint.model, nodes)}"
            ) from error
    _check_operations(endpoint, model, listener.nodes)
    return model


def _without_updates(endpoint: Endpoint) -> Endpoint:
    """Leaves out what a call does to variables, such as counting random numbers."""

    def function(tensors: Mapping[str, Any]) -> dict[str, Any]:
        with keras.StatelessScope():
            return endpoint.function(tensors)

    return replace(endpoint, function=function)


def _freeze(answer: Any, endpoint: Endpoint) -> Any:
    """Makes constants of all that a function took from outside, weights or not.

    Raises:
        ValueError: If it took what has no value: a table, or a variable that it sets.
    """
    from tensorflow.python.framework import convert_to_constants

    names = list(endpoint.inputs)
    signature = [
        tf.TensorSpec(spec.shape, spec.dtype, name=name)
        for name, spec in endpoint.inputs.items()
    ]

    def function(*tensors: Any) -> list[Any]:
        results = answer(**dict(zip(names, tensors, strict=True)))
        # A tensor for each name, also where two outputs are the same.
        return [tf.identity(results[name]) for name in sorted(results)]

    traced: Any = tf.function(function, autograph=False)
    try:
        frozen: Any = convert_to_constants.convert_variables_to_constants_v2(
            traced.get_concrete_function(*signature),
            lower_control_flow=False,
            aggressive_inlining=True,
        )
    except ValueError as error:
        raise _has_state(endpoint, _nodes_in(str(error))) from error
    if len(frozen.inputs) > len(names):
        graph = frozen.graph.as_graph_def()
        inner = (
            node for function in graph.library.function for node in function.node_def
        )
        looks_up = [n.name for n in (*graph.node, *inner) if "LookupTable" in n.op]
        raise _has_state(endpoint, looks_up)
    return frozen


def _has_state(endpoint: Endpoint, nodes: Sequence[str]) -> ValueError:
    return ValueError(
        "`model` must compute its outputs from its inputs and weights, without tables "
        "and variables that it sets: ONNX holds neither. Received: such operations in "
        f"{places_of(endpoint.model, nodes)}"
    )


def _nodes_in(text: str) -> list[str]:
    """Finds the names of nodes, which have the names of layers before them."""
    return [name.rstrip(".,:;'\"") for name in re.findall(r"[\w.]+(?:/[\w.]+)+", text)]


def places_of(model: keras.Model, nodes: Iterable[str]) -> str:
    """Says which layers made some nodes."""
    places = {_place_of(model, node) for node in nodes}
    return ", ".join(sorted(filter(None, places))) or "the model, outside its layers"


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
    of_tensorflow = tf.get_logger()
    level = of_tensorflow.level
    logger.handlers[:], logger.propagate = [listener], False
    of_tensorflow.setLevel(logging.ERROR)
    try:
        yield listener
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        of_tensorflow.setLevel(level)


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
            f"{places_of(endpoint.model, [node.name for node in left])}"
        )


def _place_of(model: keras.Model, node: str) -> str | None:
    """Says which layer of a model made a node of its graph, if any did.

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
    return None
