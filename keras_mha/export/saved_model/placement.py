"""Tells which operations of a SavedModel run on a machine's GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2

# Calls of functions, whose own operations count, and what gives no values to place.
_UNPLACED = frozenset(
    "NoOp Placeholder PartitionedCall StatefulPartitionedCall VarHandleOp".split()  # noqa: SIM905  (names of operations)
)


def gpu_note(meta_graph: meta_graph_pb2.MetaGraphDef, signature_name: str) -> str:
    """Says in a few sentences what to know before serving a signature on a GPU.

    TensorFlow puts an operation on the GPU where it has a kernel for it, unless the
    graph names a device. Which have one is asked of the TensorFlow that is imported.
    """
    nodes = _reached(meta_graph, signature_name)
    devices = sorted({node.device for node in nodes} - {""})
    named = f"the devices {', '.join(devices)}" if devices else "no device"
    start = f"Not run on a GPU. The graph asks for no XLA and names {named}"
    if not tf.test.is_built_with_gpu_support():
        return (
            f"{start}. Which operations have a GPU kernel this TensorFlow cannot say."
        )
    on_cpu = sorted({node.op for node in nodes if not _has_gpu_kernel(node.op)})
    rest = f"all but {', '.join(on_cpu)}, which stay on the CPU" if on_cpu else "all"
    return f"{start}. Of its operations these have a GPU kernel: {rest}."


def _reached(meta_graph: meta_graph_pb2.MetaGraphDef, signature_name: str) -> list[Any]:
    """Returns the nodes that a signature's outputs depend on, also in functions."""
    graph = meta_graph.graph_def
    functions = {one.signature.name: one.node_def for one in graph.library.function}
    top = {node.name: node for node in graph.node}
    outputs = meta_graph.signature_def[signature_name].outputs.values()
    names = [output.name for output in outputs]
    reached: dict[str, Any] = {}
    while names:
        name = names.pop().removeprefix("^").partition(":")[0]
        if name not in reached:
            reached[name] = top[name]
            names += top[name].input
    nodes = list(reached.values())
    called: set[str] = set()
    for node in nodes:  # grows
        for function in _called(node):
            if function in functions and function not in called:
                called.add(function)
                nodes += functions[function]
    return [node for node in nodes if node.op not in {*_UNPLACED, *functions}]


def _called(node: Any) -> Iterable[str]:
    yield node.op
    for value in node.attr.values():
        yield value.func.name
        yield from (function.name for function in value.list.func)


def _has_gpu_kernel(operation: str) -> bool:
    from tensorflow.python.framework import kernels

    registered: Any = kernels.get_registered_kernels_for_op(operation)
    # A kernel for the device "DEFAULT" serves every device.
    return any(one.device_type in ("GPU", "DEFAULT") for one in registered.kernel)
