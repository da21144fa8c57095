"""A copy of a model that shares its variables, to change without touching the model."""

from __future__ import annotations

from collections import OrderedDict
from types import CellType, FunctionType, MethodType
from typing import Any

import keras
from keras.src.ops.node import Node
from keras.src.ops.operation import Operation
from keras.src.ops.symbolic_arguments import SymbolicArguments
from keras.src.utils.tracking import Tracker

# The parts of a graph, and what keeps its layers.
_COPIED = (Operation, Node, SymbolicArguments, keras.KerasTensor, Tracker)
# Layers that follow the model in other graphs are not part of it.
_LATER = ("_outbound_nodes",)
# Keras wraps these methods of each layer in functions that hold that layer.
_WRAPPED = ("build", "quantize")


def twin(model: keras.Model) -> keras.Model:
    """Copies a model, its layers and its graph, and shares all variables and tables.

    Assigning an attribute of a copied layer does not reach the model's layer, and a
    weight assigned in the model is assigned in the copy. Unlike `keras.models.
    clone_model` this calls no constructor, so it serves any layer, subclassed models
    and layers without a configuration included.

    Args:
        model: A built model, of any kind.

    Example:

    >>> import keras
    >>> from keras_mha.twin import twin
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> other = twin(model)
    >>> other.layers[0] is model.layers[0]
    False
    >>> other.layers[0].kernel is model.layers[0].kernel
    True
    """
    twins: dict[int, Any] = {}
    empty: list[tuple[Any, Any]] = []  # copies whose attributes are yet to be set

    def copy(value: Any) -> Any:
        if id(value) in twins:
            return twins[id(value)]
        if isinstance(value, _COPIED):
            copied = _new(type(value))
            empty.append((value, copied))
        elif isinstance(value, MethodType) and isinstance(value.__self__, Operation):
            return MethodType(value.__func__, copy(value.__self__))
        elif isinstance(value, FunctionType):
            return copy_function(value)
        elif isinstance(value, tuple):
            items = [copy(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        elif isinstance(value, list | set | dict):
            # Plain containers: Keras' own would track what is put into them.
            kinds: tuple[Any, ...] = (list, set, OrderedDict, dict)
            copied = next(kind for kind in kinds if isinstance(value, kind))()
        else:
            return value
        twins[id(value)] = copied
        if isinstance(value, list):
            copied.extend(copy(item) for item in value)
        elif isinstance(value, set):
            copied.update(copy(item) for item in value)
        elif isinstance(value, dict):
            copied.update((key, copy(item)) for key, item in value.items())
        return copied

    def copy_function(function: FunctionType) -> Any:
        """Copies a function that holds layers; shares what else it holds."""
        cells = list(function.__closure__ or ())
        holders = [i for i, cell in enumerate(cells) if _holds_a_callable(cell)]
        if not holders:
            return function
        held = [cells[i].cell_contents for i in holders]
        for i in holders:
            cells[i] = CellType()
        copied = FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            tuple(cells),
        )
        twins[id(function)] = copied  # it may hold itself
        copied.__kwdefaults__ = function.__kwdefaults__
        copied.__dict__.update(function.__dict__)
        for i, value in zip(holders, held, strict=True):
            cells[i].cell_contents = copy(value)
        return copied

    copied = copy(model)
    while empty:  # and not recursively: models can be deep
        original, other = empty.pop()
        for name, value in dict(vars(original)).items():
            if name in _LATER:
                other.__dict__[name] = list(value)
            elif not (name in _WRAPPED and isinstance(other, keras.layers.Layer)):
                other.__dict__[name] = copy(value)
    return copied


def _holds_a_callable(cell: CellType) -> bool:
    try:
        return isinstance(cell.cell_contents, Operation | MethodType | FunctionType)
    except ValueError:  # nothing yet
        return False


def _new(kind: type) -> Any:
    """Makes an object of a class without calling its constructor."""
    base: Any = keras.layers.Layer if issubclass(kind, keras.layers.Layer) else object
    return base.__new__(kind)
