"""Copies of models in which some layers are swapped for others."""

from __future__ import annotations

import abc
import inspect
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import keras
from keras import ops

# Arguments of layers that are neither functions nor layers.
_PARTS = (
    keras.initializers.Initializer,
    keras.regularizers.Regularizer,
    keras.constraints.Constraint,
)


class Copier(abc.ABC):
    """Copies layers, each once, so that shared ones stay shared.

    Functional and Sequential models are taken apart, and their layers copied one by
    one. A subclass says what is swapped, and how layers are copied that hold it.
    """

    def __init__(self) -> None:
        self.copies: dict[int, Any] = {}
        self._pairs: list[tuple[Any, Any]] = []  # what is inside before what holds it
        self._originals: dict[int, Any] = {}
        self._taken_apart: set[int] = set()  # models whose layers were copied singly

    def copy(self, layer: Any) -> Any:
        """The copy of a layer, or of another operation of a functional model.

        Its weights are not those of the original before `carry_state` was called.
        """
        if id(layer) not in self.copies:
            copied = self._make(layer)
            self.copies[id(layer)] = copied
            self._originals[id(copied)] = layer
            self._pairs.append((layer, copied))
        return self.copies[id(layer)]

    def carry_state(self) -> None:
        """Gives the copies the weights, other state and `trainable` of the originals.

        Holders come before what they hold: Keras hands `trainable` on inwards.
        """
        partners: dict[int, Any] = {}
        for original, copied in reversed(self._pairs):
            for one, other in self._sublayers(original, copied):
                if partners.setdefault(id(one), other) is not other:
                    raise ValueError(
                        "A layer inside a wrapper that is used outside it as well "
                        f"would become two. Received: {described(one)}"
                    )
                if self.is_swapped(one):
                    self.carry_swapped(one, other)
                else:
                    _carry(one, other)

    @abc.abstractmethod
    def is_swapped(self, layer: Any) -> bool:
        """Whether a layer is swapped."""

    @abc.abstractmethod
    def swap(self, layer: Any) -> Any:
        """Makes what takes the place of a layer that is swapped."""

    @abc.abstractmethod
    def carry_swapped(self, one: Any, other: Any) -> None:
        """Gives what was swapped its weights."""

    @abc.abstractmethod
    def copy_holder(self, layer: Any) -> Any:
        """Copies a layer with such inside, unless it is a model taken apart."""

    def call(
        self, original: Any, copied: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Calls in a functional model what was swapped."""
        del original  # takes the same arguments
        return copied(*args, **kwargs)

    def copy_sequential(self, model: Any) -> Any:
        """Copies a Sequential model."""
        layers = [self.copy(layer) for layer in model.layers]
        inputs = getattr(model, "inputs", None) or []
        return keras.Sequential([*map(_copy_input, inputs), *layers], name=model.name)

    def copy_functional(self, model: Any) -> Any:
        """Copies a Functional model."""
        # The same graph without what the model was compiled with, which would be
        # copied with it.
        view = keras.Model(model.input, model.output, name=model.name)
        copied: Any = keras.models.clone_model(
            view,
            input_tensors=keras.tree.map_structure(_copy_input, model.input),
            clone_function=self.copy,
            call_function=self._call,
        )
        if type(model) is type(view):
            return copied
        return type(model)(copied.input, copied.output, name=model.name)

    def holds(self, layer: Any) -> bool:
        """Whether there is something to swap inside a layer."""
        return any(map(self.is_swapped, layer._flatten_layers(include_self=False)))

    def _make(self, layer: Any) -> Any:
        if self.is_swapped(layer):
            return self.swap(layer)
        if type(layer) is keras.Sequential:
            self._taken_apart.add(id(layer))
            return self.copy_sequential(layer)
        if _is_functional(layer):
            self._taken_apart.add(id(layer))
            return self.copy_functional(layer)
        if isinstance(layer, keras.layers.Layer) and self.holds(layer):
            return self.copy_holder(layer)
        return _clone(layer)

    def _call(self, copied: Any, *args: Any, **kwargs: Any) -> Any:
        original = self._originals[id(copied)]
        if not self.is_swapped(original):
            return copied(*args, **kwargs)
        return self.call(original, copied, args, kwargs)

    def _sublayers(self, one: Any, other: Any) -> Iterator[tuple[Any, Any]]:
        """Pairs of a layer and all inside it, where those inside have no other pair."""
        if not isinstance(one, keras.layers.Layer):
            return
        yield one, other
        if self.is_swapped(one) or id(one) in self._taken_apart:
            return
        for pair in _children(one, other):
            yield from self._sublayers(*pair)


def own_objects(layer: Any) -> AbstractContextManager[Any]:
    """Scope in which Keras finds the classes and functions that a layer uses.

    Raises:
        ValueError: If two of them have one name, by which Keras would find them.
    """
    objects: dict[str, Any] = {}
    for each in _objects_of(layer):
        if objects.setdefault(each.__name__, each) is not each:
            raise ValueError(
                "Classes and functions that Keras finds by name must not share one "
                f"name inside a layer. Received: {each.__name__!r} twice in "
                f"{described(layer)}"
            )
    return keras.saving.custom_object_scope(objects)


def described(layer: Any) -> str:
    """Name and class of a layer, for messages."""
    return f"layer '{layer.name}' ({type(layer).__name__})"


def set_trainable(weight: Any, trainable: bool) -> None:
    """Says whether a variable is trained; Keras refuses it to integers."""
    if weight.trainable != trainable:
        weight.trainable = trainable


def _objects_of(layer: Any) -> Iterator[Any]:
    """Yields what Keras does not find by itself."""
    layers = layer._flatten_layers() if isinstance(layer, keras.layers.Layer) else []
    for inner in layers:
        kind = type(inner)
        # A function that replaces a method is not an argument.
        functions = [
            value
            for name, value in vars(inner).items()
            if inspect.isfunction(value) and not callable(getattr(kind, name, None))
        ]
        parts = [type(x) for x in vars(inner).values() if isinstance(x, _PARTS)]
        for each in (kind, *functions, *parts):
            registered = keras.saving.get_registered_name(each) != each.__name__
            if not registered and not each.__module__.startswith("keras."):
                yield each


def _is_functional(layer: Any) -> bool:
    """Whether it is a functional model, made of inputs and outputs by its class."""
    if not isinstance(layer, keras.Model) or isinstance(layer, keras.Sequential):
        return False
    constructors = [keras.Model.__init__]
    constructors += [
        base.__init__ for base in type(layer).__mro__ if base.__name__ == "Functional"
    ]
    return len(constructors) > 1 and type(layer).__init__ in constructors


def _copy_input(tensor: Any) -> Any:
    layer = tensor._keras_history.operation
    return type(layer).from_config(layer.get_config()).output


def _clone(layer: Any) -> Any:
    if type(layer) is keras.layers.Lambda:
        # Its configuration has the function as code, which Keras does not load.
        copied: Any = keras.layers.Lambda(
            layer.function,
            output_shape=layer._output_shape,
            mask=layer.mask,
            arguments=layer.arguments,
            name=layer.name,
            dtype=layer.dtype_policy,
        )
        return copied
    with own_objects(layer):
        copied = type(layer).from_config(layer.get_config())
    # A vocabulary must be there before the layer is called.
    _carry_assets(layer, copied)
    return copied


def _children(one: Any, other: Any) -> list[tuple[Any, Any]]:
    first, second = (
        layer._flatten_layers(include_self=False, recursive=False)
        for layer in (one, other)
    )
    if len(first) != len(second):
        raise ValueError(
            "A copy made from a layer's configuration must have as many sublayers. "
            f"Received: {described(one)} with {[each.name for each in first]}, and "
            f"its copy with {[each.name for each in second]}"
        )
    # Functional models order their layers by their graph.
    return _paired(first, second)


def _carry(one: Any, other: Any) -> None:
    """Copies what a layer itself has, sublayers left aside."""
    if one.built and not other.built:
        other.build_from_config(one.get_build_config())
    store: dict[str, Any] = {}
    pairs = _own_weights(one, other)
    one.save_own_variables(store)
    # What is computed from weights when they are loaded is so here too.
    other.load_own_variables(
        {name: ops.convert_to_numpy(value) for name, value in store.items()}
    )
    for seed, copied in zip(one._seed_generators, other._seed_generators, strict=False):
        copied.state.assign(seed.state)
    _carry_assets(one, other)
    if getattr(one, "lora_enabled", False):
        # Saving merges the low-rank factors into the kernel.
        for weight, copied in pairs:
            copied.assign(weight)
    other.trainable = one.trainable
    for weight, copied in pairs:
        set_trainable(copied, weight.trainable)


def _own_weights(one: Any, other: Any) -> list[tuple[Any, Any]]:
    first, second = (
        layer._trainable_variables + layer._non_trainable_variables
        for layer in (one, other)
    )
    if len(first) == len(second):
        # Low-rank factors come in another order where they were added later.
        pairs = _paired(first, second)
        if all(tuple(x.shape) == tuple(y.shape) for x, y in pairs):
            return pairs
    listed = [[(x.name, tuple(x.shape)) for x in each] for each in (first, second)]
    raise ValueError(
        "A copy made from a layer's configuration must have the same weights. "
        f"Received: {described(one)} with {listed[0]}, and its copy with {listed[1]}"
    )


def _paired(first: list[Any], second: list[Any]) -> list[tuple[Any, Any]]:
    """Pairs by name; in order where names were given automatically, or repeat."""
    names = [{x.name for x in each} for each in (first, second)]
    if names[0] == names[1] and len(names[0]) == len(first):
        first, second = (sorted(each, key=lambda x: x.name) for each in (first, second))
    return list(zip(first, second, strict=True))


def _carry_assets(one: Any, other: Any) -> None:
    if hasattr(one, "save_assets") and hasattr(one, "load_assets"):
        with tempfile.TemporaryDirectory() as folder:
            one.save_assets(folder)
            other.load_assets(folder)
