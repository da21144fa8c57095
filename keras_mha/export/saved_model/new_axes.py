"""Writes `x[:, None]` in a SavedModel as operations that TFLite has.

Its converter takes new axes in a slice only where all sizes are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import node_def_pb2

from keras_mha.export.saved_graph import edit_graphs, functions_of, node_of

_MASKS = ("begin_mask", "end_mask", "ellipsis_mask", "shrink_axis_mask")
_BOUNDS = ("begin", "end", "strides")


def expand_new_axes(saved_model: Path) -> None:
    """Rewrites `saved_model.pb`: each slice is taken first, and gets new axes then.

    Slices whose bounds are not constant stay as they are.

    Args:
        saved_model: The SavedModel's directory, not yet published.
    """
    edit_graphs(
        saved_model,
        lambda graph: sum(_expand(each.node_def) for each in functions_of(graph)),
    )


def _expand(nodes: Any) -> int:
    """Rewrites the nodes of one function; returns how many slices."""
    by_name = {node.name: node for node in nodes}
    rewritten = 0
    for node in list(nodes):
        if node.op != "StridedSlice" or not _mask(node, "new_axis_mask"):
            continue
        bounds = [by_name.get(node_of(name)) for name in node.input[1:4]]
        if all(bound is not None and bound.op == "Const" for bound in bounds):
            values = [tf.make_ndarray(bound.attr["value"].tensor) for bound in bounds]
            nodes.extend(list(_in_steps(node, values)))
            rewritten += 1
    return rewritten


def _mask(node: Any, name: str) -> int:
    # To read what is absent would write it, without a type.
    return node.attr[name].i if name in node.attr else 0


def _in_steps(node: Any, bounds: list[np.ndarray]) -> Iterator[Any]:
    """Makes a slice the last of its steps, and yields those before."""
    bits = {
        name: [_mask(node, name) >> i & 1 for i in range(len(bounds[0]))]
        for name in (*_MASKS, "new_axis_mask")
    }
    stays = [i for i, is_new in enumerate(bits["new_axis_mask"]) if not is_new]
    plain = _node(f"{node.name}/slice", "StridedSlice", [node.input[0]])
    for name, bound in zip(_BOUNDS, bounds, strict=True):
        constant = _constant(f"{node.name}/{name}", bound[stays])
        plain.input.append(f"{constant.name}:output:0")
        yield constant
    for name in ("T", "Index"):
        plain.attr[name].CopyFrom(node.attr[name])
    plain.attr["new_axis_mask"].i = 0
    for name in _MASKS:
        plain.attr[name].i = sum(bits[name][i] << j for j, i in enumerate(stays))
    yield plain

    last = plain.name
    axes = _new_axes(bits)
    for number, axis in enumerate(axes, 1):
        constant = _constant(f"{node.name}/axis_{number}", np.array(axis, np.int32))
        yield constant
        name = node.name if number == len(axes) else f"{node.name}/expand_{number}"
        inputs = [f"{last}:output:0", f"{constant.name}:output:0"]
        expand = _node(name, "ExpandDims", inputs)
        expand.attr["T"].CopyFrom(node.attr["T"])
        expand.attr["Tdim"].type = tf.int32.as_datatype_enum
        if name == node.name:
            node.CopyFrom(expand)
        else:
            yield expand
        last = name


def _new_axes(bits: dict[str, list[int]]) -> list[int]:
    """Returns the axes to insert, in this order; behind an ellipsis from the end.

    Example:

    >>> from keras_mha.export.saved_model.new_axes import _new_axes
    >>> _new_axes({  # x[None, 0, ..., None]
    ...     "new_axis_mask": [1, 0, 0, 1],
    ...     "shrink_axis_mask": [0, 1, 0, 0],
    ...     "ellipsis_mask": [0, 0, 1, 0],
    ... })
    [0, -1]
    """
    is_new, ellipsis = bits["new_axis_mask"], bits["ellipsis_mask"]
    # How many axes of the result stand for each entry; the ellipsis is never counted.
    sizes = [
        int(new or not shrunk)
        for new, shrunk in zip(is_new, bits["shrink_axis_mask"], strict=True)
    ]
    split = ellipsis.index(1) if any(ellipsis) else len(ellipsis)
    front = [sum(sizes[:i]) for i, new in enumerate(is_new) if new and i < split]
    back = [-sum(sizes[i:]) for i, new in enumerate(is_new) if new and i > split]
    return [*front, *reversed(back)]


def _node(name: str, op: str, inputs: list[str]) -> Any:
    module: Any = node_def_pb2  # its stub lacks the message
    return module.NodeDef(name=name, op=op, input=inputs)


def _constant(name: str, value: np.ndarray) -> Any:
    node = _node(name, "Const", [])
    node.attr["dtype"].type = tf.as_dtype(value.dtype).as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
    return node
