"""Writes signs as TFLite can: it has no operation that combines bits.

Keras' `argmax` and `argmin` tell -0.0 from 0.0 by the sign bit of a float: they read
the float's bits as an integer, keep the highest, and ask whether that is below 0. So
is the integer itself then.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_mha.export.saved_graph import edit_graphs, functions_of, node_of

_HIGHEST_BIT = np.iinfo(np.int32).min


def take_signs_of_bits(saved_model: Path) -> None:
    """Leaves out the mask of the highest bit in the SavedModel at a directory."""
    edit_graphs(
        saved_model,
        lambda graph: sum(_take_signs(each.node_def) for each in functions_of(graph)),
    )


def _take_signs(nodes: Sequence[Any]) -> int:
    """Returns how many masks were left out of a function."""
    by_name = {node.name: node for node in nodes}
    left_out = 0
    for node in nodes:
        if node.op != "BitwiseAnd":
            continue
        bits, mask = (by_name.get(node_of(name)) for name in node.input)
        readers = [
            other
            for other in nodes
            if any(node_of(name) == node.name for name in other.input)
        ]
        if (
            bits is not None
            and bits.op == "Bitcast"
            and _is(mask, _HIGHEST_BIT)
            and all(
                other.op == "Less"
                and node_of(other.input[0]) == node.name
                and _is(by_name.get(node_of(other.input[1])), 0)
                for other in readers
            )
        ):
            node.op = "Identity"
            del node.input[1]
            left_out += 1
            _rename_output(node.name, readers)
    return left_out


def _is(node: Any, value: int) -> bool:
    """Tells whether a node is this constant."""
    if node is None or node.op != "Const":
        return False
    return bool(np.all(tf.make_ndarray(node.attr["value"].tensor) == value))


def _rename_output(name: str, readers: Sequence[Any]) -> None:
    """Reads an operation's output by the name that it has for another operation."""
    for reader in readers:
        for place, read in enumerate(reader.input):
            if node_of(read) == name:
                reader.input[place] = f"{name}:output:0"
