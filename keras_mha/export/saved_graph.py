"""Edits the graphs in a SavedModel that is not yet published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorflow.core.protobuf import saved_model_pb2


def edit_graphs(saved_model: Path, edit: Callable[[Any], int]) -> int:
    """Rewrites `saved_model.pb` by a function of each of its graphs.

    Where anything changes, `fingerprint.pb`, which describes the file as it was before,
    is removed.

    Args:
        saved_model: The SavedModel's directory.
        edit: Changes a `MetaGraphDef`, and returns the number of changes.

    Returns:
        The number of changes in all graphs.
    """
    path = saved_model / "saved_model.pb"
    proto = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    changes = sum(map(edit, proto.meta_graphs))
    if changes:
        path.write_bytes(proto.SerializeToString(deterministic=True))
        (saved_model / "fingerprint.pb").unlink(missing_ok=True)
    return changes


def functions_of(meta_graph: Any) -> list[Any]:
    """Returns the functions of a graph, each with its nodes in `node_def`."""
    return list(meta_graph.graph_def.library.function)


def node_of(output: str) -> str:
    """Returns the name of the node that gives an output, as inputs name it.

    Example:

    >>> from keras_mha.export.saved_graph import node_of
    >>> node_of("dense/add:z:0")
    'dense/add'
    """
    return output.partition(":")[0]
