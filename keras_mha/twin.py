"""Copies of models made object by object, to change without touching the model."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import keras
import numpy as np
from keras.src.models.model import Trainer
from keras.src.ops.function import make_node_key, map_graph
from keras.src.ops.node import Node
from keras.src.ops.operation import Operation
from keras.src.ops.symbolic_arguments import SymbolicArguments
from keras.src.utils import tracking

_Model = TypeVar("_Model", bound=keras.layers.Layer)

# The parts of a graph, and what keeps its layers.
_COPIED = (Operation, Node, SymbolicArguments, keras.KerasTensor, tracking.Tracker)
# What changes while a model runs.
_STATE = (keras.Variable, keras.random.SeedGenerator, keras.metrics.Metric)
# Containers that tell a layer's tracker what is put into them.
_TRACKED = (
    tracking.TrackedList,
    tracking.TrackedSet,
    tracking.TrackedOrderedDict,
    tracking.TrackedDict,
)
# The first kind that a container is of is the kind of its copy.
_CONTAINERS: tuple[Any, ...] = (*_TRACKED, list, set, OrderedDict, defaultdict, dict)
# Layers that follow the model in other graphs are not part of it.
_LATER = ("_outbound_nodes",)
# Keras wraps these methods of each layer in functions that hold that layer.
_WRAPPED = ("build", "quantize")
# What `map_graph` returns.
_MAPPED = ("_nodes", "_nodes_by_depth", "_operations", "_operations_by_depth")
# What says what a variable is for.
_OF_VARIABLES = (
    "_path",
    "_regularizer",
    "_constraint",
    "_layout",
    "_overwrite_with_gradient",
)
# What `fit` and its like leave in a model, and what `compile` does.
_RUN = ("train_function", "test_function", "predict_function")
_COMPILED = ("optimizer", "_compile_config", "_compiled_trainable_state")


def twin(
    model: _Model,
    *,
    copy_variable: Callable[[keras.Variable], Any] | None = None,
    replace: Callable[[Any, Twins], Any] | None = None,
) -> _Model:
    """Copies a model or layer with all its layers and its graph.

    Assigning an attribute of a copied layer does not reach the model's layer. Unlike
    `keras.models.clone_model` this calls no constructor, so it serves any layer,
    subclassed models and layers without a configuration included. The copy is not
    compiled. Lookup tables, initializers and the like are shared: nothing changes them.

    Args:
        model: A model or layer of any kind.
        copy_variable: Makes the copy's variable of each variable; metrics and
            generators of random seeds are then copied too, and optimizers made anew.
            By default all these are shared: a weight assigned in the model is assigned
            in the copy.
        replace: Asked for each layer and other operation; what it returns, unless it is
            `None`, takes the place of the copy wherever that would be: in attributes,
            containers and graphs. Follow up with `retrace` where there are graphs.

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
    return Twins(copy_variable, replace).make(model)


class Twins:
    """Copies of objects, each made once, so that what is shared stays shared."""

    def __init__(
        self,
        copy_variable: Callable[[keras.Variable], Any] | None = None,
        replace: Callable[[Any, Twins], Any] | None = None,
    ) -> None:
        self._copy_variable = copy_variable
        self._replace = replace
        self._twins: dict[int, Any] = {}
        # Copies whose attributes are yet to be set.
        self._empty: list[tuple[Any, Any]] = []
        self._kept: list[Any] = []  # while their identities are keys

    def make(self, model: Any) -> Any:
        """Copies a model or layer; see `twin`."""
        made = self.copy(model)
        filled = []
        while self._empty:  # and not recursively: models can be deep
            filled.append(self._empty.pop())
            self._fill(*filled[-1])
        for original, copied in filled:
            _finish(original, copied)
        return made

    def copy(self, value: Any, kind: type | None = None) -> Any:
        """Returns the copy of a value, which `make` completes.

        Args:
            value: Anything; what needs no copy is returned.
            kind: A class for the copy of a layer. Defaults to that of the layer.
        """
        if id(value) not in self._twins:
            copied = self._copied(value, kind)
            if copied is value:
                return value
            self._twins[id(value)] = copied
            self._kept.append(value)
        return self._twins[id(value)]

    def _copied(self, value: Any, kind: type | None) -> Any:
        if kind is None and self._replace and isinstance(value, Operation):
            replaced = self._replace(value, self)
            if replaced is not None:
                return replaced
        if isinstance(value, _COPIED):
            return self._later(value, kind or type(value))
        if isinstance(value, list | set | dict):
            return self._copy_container(value)
        if isinstance(value, tuple):
            items = [self.copy(item) for item in value]
            if all(x is y for x, y in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if callable(value) and not isinstance(value, type):
            copied = self._copy_callable(value)
            if copied is not value:
                return copied
        if self._copy_variable is not None:
            if isinstance(value, keras.Variable):
                return self._copy_variable(value)
            if isinstance(value, keras.optimizers.Optimizer):
                return type(value).from_config(value.get_config())
            if isinstance(value, np.ndarray) or _is_variable_of_tensorflow(value):
                return copy.deepcopy(value)
        return self._later(value, type(value)) if self._holds(value) else value

    def _later(self, value: Any, kind: type) -> Any:
        """Makes an object without calling a constructor, and fills it later."""
        base: Any = (
            keras.layers.Layer if issubclass(kind, keras.layers.Layer) else object
        )
        copied = base.__new__(kind)
        self._empty.append((value, copied))
        return copied

    def _copy_container(self, value: Any) -> Any:
        kind = next(kind for kind in _CONTAINERS if isinstance(value, kind))
        copied = kind.__new__(kind)
        self._twins[id(value)] = copied  # it may hold itself
        self._kept.append(value)
        # Not through methods of Keras' containers, which would track what is put in.
        if isinstance(value, _TRACKED):
            copied.tracker = self.copy(value.tracker)
        if isinstance(value, defaultdict):
            copied.default_factory = value.default_factory
        if isinstance(value, list):
            list.extend(copied, map(self.copy, value))
        elif isinstance(value, set):
            set.update(copied, map(self.copy, value))
        else:
            store = OrderedDict if isinstance(value, OrderedDict) else dict
            for key, item in value.items():
                store.__setitem__(copied, self.copy(key), self.copy(item))
        return copied

    def _copy_callable(self, value: Any) -> Any:
        if isinstance(value, MethodType):
            bound = self.copy(value.__self__)
            same = bound is value.__self__
            return value if same else MethodType(value.__func__, bound)
        if isinstance(value, FunctionType):
            return self._copy_function(value)
        if isinstance(value, functools.partial):
            function, args, keywords = map(
                self.copy, (value.func, value.args, value.keywords)
            )
            return functools.partial(function, *args, **keywords)
        if hasattr(value, "python_function") and hasattr(value, "_clone"):
            # A `tf.function`.
            function = self.copy(value.python_function)
            same = function is value.python_function
            return value if same else value._clone(function)
        return value

    def _copy_function(self, function: FunctionType) -> Any:
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
        self._twins[id(function)] = copied  # it may hold itself
        self._kept.append(function)
        copied.__kwdefaults__ = function.__kwdefaults__
        copied.__dict__.update(function.__dict__)
        for i, value in zip(holders, held, strict=True):
            cells[i].cell_contents = self.copy(value)
        return copied

    def _holds(self, value: Any) -> bool:
        """Whether a plain object has layers, or state that is to be copied."""
        kinds = (Operation,) if self._copy_variable is None else (Operation, *_STATE)
        if isinstance(value, kinds):
            return True
        if isinstance(value, type | ModuleType) or not hasattr(value, "__dict__"):
            return False
        return any(isinstance(item, kinds) for item in _items(vars(value).values()))

    def _fill(self, original: Any, copied: Any) -> None:
        is_layer = isinstance(copied, keras.layers.Layer)
        left = _WRAPPED if is_layer else ()
        if isinstance(original, keras.Model):
            left += (*_RUN, *(_COMPILED if original.compiled else ()))
        for name, value in dict(vars(original)).items():
            if name in _LATER:
                copied.__dict__[name] = list(value)
            elif name not in left:
                copied.__dict__[name] = self.copy(value)


def own_variable(variable: keras.Variable, dtype: str | None = None) -> keras.Variable:
    """Makes a variable of the same name and value, and of a `dtype` if one is given."""
    made: Any = type(variable)(
        keras.ops.convert_to_tensor(variable),
        dtype=dtype or variable.dtype,
        trainable=variable.trainable,
        autocast=variable._autocast,
        aggregation=variable.aggregation,
        synchronization=variable.synchronization,
        name=variable.name,
    )
    for name, value in vars(variable).items():
        # Not its value, nor what a backend notes.
        if name in _OF_VARIABLES or name not in vars(made):
            vars(made)[name] = value
    return made


def retrace(model: keras.layers.Layer, call: Callable[..., Any] | None = None) -> None:
    """Calls again the layers of all functional models in a copy, in place.

    The graphs then say what the layers do now: dtypes, shapes, and that they were
    called by others.

    Args:
        model: A model or layer, of which no other has layers.
        call: Calls an operation, which comes before its arguments. Defaults to just
            this.
    """
    graphs = _graphs(model)
    for graph in graphs:
        for operation in graph.operations:
            if not isinstance(operation, keras.layers.InputLayer):
                operation._inbound_nodes = []
            operation._outbound_nodes = []
    for graph in graphs:
        outputs = graph._run_through_graph(
            graph.inputs,
            call_fn=call or (lambda layer, *args, **kw: layer(*args, **kw)),
        )
        flat = keras.tree.flatten(outputs)
        # Not through `setattr`, with which Keras tracks what layers own.
        vars(graph).update(_outputs_struct=outputs, _outputs=flat)
        vars(graph).update(zip(_MAPPED, map_graph(graph.inputs, flat), strict=True))


def put(layer: keras.layers.Layer, name: str, part: Any) -> None:
    """Puts a part in an attribute of a built layer, in the place of what is there."""
    tracker: Any = layer._tracker
    locked = tracker.locked
    tracker.untrack(getattr(layer, name, None))
    tracker.unlock()
    setattr(layer, name, part)
    tracker.locked = locked


def described(layer: Any) -> str:
    """Name and class of a layer, for messages."""
    return f"layer '{layer.name}' ({type(layer).__name__})"


def set_trainable(weight: Any, trainable: bool) -> None:
    """Says whether a variable is trained; Keras refuses it to integers."""
    if weight.trainable != trainable:
        weight.trainable = trainable


def _graphs(model: keras.layers.Layer) -> list[Any]:
    """The functional models in a model, inner ones first."""
    found: dict[int, Any] = {}

    def visit(layer: Any) -> None:
        if id(layer) in found:
            return
        found[id(layer)] = None
        for inner in [*layer._flatten_layers(include_self=False, recursive=False)]:
            visit(inner)
        graph = getattr(layer, "_functional", None)  # of a `keras.Sequential`
        if graph is not None:
            visit(graph)
        if isinstance(layer, keras.Function):
            del found[id(layer)]  # to come after what is inside
            found[id(layer)] = layer

    visit(model)
    return [graph for graph in found.values() if graph is not None]


def _items(values: Any) -> Iterator[Any]:
    """Yields values, and what is in the lists and so on among them."""
    for value in values:
        if isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, list | tuple | set):
            yield from value
        else:
            yield value


def _is_variable_of_tensorflow(value: Any) -> bool:
    return hasattr(value, "handle") and hasattr(value, "assign_sub")


def _holds_a_callable(cell: CellType) -> bool:
    try:
        return isinstance(cell.cell_contents, Operation | MethodType | FunctionType)
    except ValueError:  # nothing yet
        return False


def _finish(original: Any, copied: Any) -> None:
    """Renews what is kept of identities, and what a model is that is not compiled."""
    if isinstance(copied, tracking.Tracker):
        copied.stored_ids = {
            name: set(map(id, store)) for name, (_, store) in copied.config.items()
        }
    if isinstance(copied, keras.Function):
        copied._nodes = {
            make_node_key(node.operation, node.operation._inbound_nodes.index(node))
            for nodes in copied._nodes_by_depth.values()
            for node in nodes
            if node in node.operation._inbound_nodes
        }
    if isinstance(copied, keras.Model):
        if original.compiled:
            Trainer.__init__(copied)
        for name in _RUN:
            setattr(copied, name, None)
