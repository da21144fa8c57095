"""Removes from a SavedModel what asks for XLA: TF Serving disables it."""

from __future__ import annotations

from pathlib import Path

from tensorflow.core.protobuf import (
    meta_graph_pb2,
    saved_model_pb2,
    saved_object_graph_pb2,
)

# Attributes of functions and of nodes. The first is what `jit_compile=True` leaves;
# it makes a call fail where XLA is disabled. The others only suggest clusters.
_MARKS = frozenset(
    {
        "_XlaMustCompile",
        "_XlaCompile",
        "_XlaScope",
        "_XlaInternalScope",
        "_XlaSeparateCompiledGradients",
    }
)
_FUNCTION_SPEC = saved_object_graph_pb2.FunctionSpec


def strip_compiled_marks(saved_model: Path) -> int:
    """Rewrites `saved_model.pb` without compiled-function marks.

    The functions stay as they are and run op by op.

    Args:
        saved_model: The SavedModel's directory, not yet published.

    Returns:
        Number of marks removed. `fingerprint.pb` describes the file as it was
        before, so it goes where there were any.
    """
    path = saved_model / "saved_model.pb"
    proto = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    removed = sum(_strip(graph) for graph in proto.meta_graphs)
    if removed:
        path.write_bytes(proto.SerializeToString(deterministic=True))
        (saved_model / "fingerprint.pb").unlink(missing_ok=True)
    return removed


def _strip(meta_graph: meta_graph_pb2.MetaGraphDef) -> int:
    graph = meta_graph.graph_def
    functions = graph.library.function
    marked = [*graph.node, *functions, *(n for f in functions for n in f.node_def)]
    removed = 0
    for owner in marked:
        for mark in _MARKS.intersection(owner.attr):
            del owner.attr[mark]
            removed += 1
    # What the Python loader would compile again.
    for node in meta_graph.object_graph_def.nodes:
        if node.function.function_spec.jit_compile == _FUNCTION_SPEC.JitCompile.ON:
            node.function.function_spec.jit_compile = _FUNCTION_SPEC.JitCompile.DEFAULT
            removed += 1
    return removed
