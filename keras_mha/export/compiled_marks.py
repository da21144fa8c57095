"""Removes from a SavedModel what asks for XLA: TF Serving disables it."""

from __future__ import annotations

from pathlib import Path

from tensorflow.core.protobuf import meta_graph_pb2, saved_object_graph_pb2

from keras_mha.export.saved_graph import edit_graphs, functions_of

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
        Number of marks removed.
    """
    return edit_graphs(saved_model, _strip)


def _strip(meta_graph: meta_graph_pb2.MetaGraphDef) -> int:
    functions = functions_of(meta_graph)
    nodes = [node for function in functions for node in function.node_def]
    marked = [*meta_graph.graph_def.node, *functions, *nodes]
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
