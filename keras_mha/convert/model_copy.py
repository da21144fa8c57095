"""A copy of a whole model in which some layers are swapped for others."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import keras
from keras import ops

from keras_mha.convert.keras_layers import copy_trainable, copy_weights, set_trainable


class Rule(NamedTuple):
    """Which layers are swapped, for what, and how the new ones are called.

    Attributes:
        is_swapped: Whether a layer is swapped.
        is_fused: Whether it is, and the new one takes another number of inputs.
        convert: Makes the new layer, with weights if the old one has them.
        call: Calls a new layer, given the old one, in a functional model.
        old: Names of the classes that are swapped, for messages.
        advice: What to do where one cannot be swapped.
    """

    is_swapped: Callable[[Any], bool]
    is_fused: Callable[[Any], bool]
    convert: Callable[[Any], Any]
    call: Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]
    old: str
    advice: str


def copy_model(model: keras.Model, rule: Rule) -> Any:
    """Copies a model, its weights and state included, with layers swapped.

    Raises:
        TypeError: If the model, or a layer that holds what is to be swapped, makes its
            layers in code of its own.
        ValueError: If there is nothing to swap, or something cannot be copied.
    """
    if not _holds(model, rule):
        raise ValueError(
            f"There is nothing to convert: the model holds no {rule.old}. "
            f"Received: model '{model.name}' of class {type(model).__name__}, "
            f"{'built' if model.built else 'not built'}"
        )
    copier = _Copier(rule)
    copied = copier.copy(model)
    copier.carry_state()
    return copied


class _Copier:
    """Copies layers, each once, so that shared ones stay shared."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.copies: dict[int, Any] = {}
        self.pairs: list[tuple[Any, Any]] = []  # what is inside before what holds it
        self.originals: dict[int, Any] = {}
        self.taken_apart: set[int] = set()  # models whose layers were copied singly

    def copy(self, layer: Any) -> Any:
        """The copy of a layer, or of another operation of a functional model."""
        if id(layer) not in self.copies:
            made = self._make(layer)
            self.copies[id(layer)] = made
            self.originals[id(made)] = layer
            self.pairs.append((layer, made))
        return self.copies[id(layer)]

    def carry_state(self) -> None:
        """Gives the copies the weights, other state and `trainable` of the originals.

        Holders come before what they hold: Keras hands `trainable` on inwards.
        """
        found: dict[int, Any] = {}
        for original, copied in reversed(self.pairs):
            for one, other in self._sublayers(original, copied):
                if found.setdefault(id(one), other) is not other:
                    raise ValueError(
                        "A layer inside a wrapper that is used outside it as well "
                        f"would become two. Received: {_described(one)}"
                    )
                if self.rule.is_swapped(one):
                    self._carry_attention(one, other)
                else:
                    _carry(one, other)

    def _make(self, layer: Any) -> Any:
        if self.rule.is_swapped(layer):
            return self.rule.convert(layer)
        if type(layer) is keras.Sequential or _is_functional(layer):
            self.taken_apart.add(id(layer))
            if isinstance(layer, keras.Sequential):
                return self._copy_sequential(layer)
            return self._copy_functional(layer)
        if isinstance(layer, keras.layers.Layer) and _holds(layer, self.rule):
            return self._copy_holder(layer)
        return _clone(layer)

    def _copy_sequential(self, model: Any) -> Any:
        for layer in model.layers:
            if self.rule.is_fused(layer):
                self._refuse(model, "calls it with a single input", [layer])
        layers = [self.copy(layer) for layer in model.layers]
        inputs = getattr(model, "inputs", None) or []
        return keras.Sequential([*map(_copy_input, inputs), *layers], name=model.name)

    def _copy_functional(self, model: Any) -> Any:
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

    def _call(self, copied: Any, *args: Any, **kwargs: Any) -> Any:
        original = self.originals[id(copied)]
        if not self.rule.is_swapped(original):
            return copied(*args, **kwargs)
        try:
            return self.rule.call(original, copied, args, kwargs)
        except (TypeError, ValueError) as error:
            error.add_note(f"The call of layer '{copied.name}' does not convert.")
            raise

    def _copy_holder(self, layer: Any) -> Any:
        """Copies a layer whose configuration has those that are to be swapped in it."""
        inner = [
            sublayer
            for sublayer in layer._flatten_layers(include_self=False)
            if self.rule.is_swapped(sublayer)
        ]
        if isinstance(layer, keras.Model) and hasattr(layer, "inputs"):
            raise TypeError(
                "A functional model whose class has a constructor of its own cannot be "
                "made anew from inputs and outputs: convert the plain "
                "`keras.Model(model.input, model.output)` instead. "
                f"Received: {_described(layer)}"
            )
        if isinstance(layer, keras.Model):
            self._refuse(layer, "is a model that calls it in code of its own", inner)
        if any(map(self.rule.is_fused, inner)):
            self._refuse(layer, "calls it with a single input", inner)
        kinds = {_kind(keras.saving.serialize_keras_object(each)) for each in inner}
        swapped: list[str] = []

        def swap(value: Any) -> Any:
            if isinstance(value, dict):
                if _kind(value) not in kinds:
                    return {name: swap(each) for name, each in value.items()}
                old: Any = keras.saving.deserialize_keras_object(value)
                swapped.append(old.name)
                new: Any = keras.saving.serialize_keras_object(self.rule.convert(old))
                return {**value, **new}  # a graph notes there where it is called
            if isinstance(value, list | tuple):
                return type(value)(swap(each) for each in value)
            return value

        with _own_objects(layer):
            config = swap(layer.get_config())
            if sorted(swapped) != sorted(each.name for each in inner):
                self._refuse(layer, "makes it in code of its own", inner)
            return type(layer).from_config(config)

    def _refuse(self, holder: Any, reason: str, inner: list[Any]) -> NoReturn:
        raise TypeError(
            f"Attention inside {_described(holder)} cannot be swapped: that {reason}. "
            f"{self.rule.advice} Received: {', '.join(map(_described, inner))} inside"
        )

    def _sublayers(self, one: Any, other: Any) -> Iterator[tuple[Any, Any]]:
        """Pairs of a layer and all inside it, where those inside have no other pair."""
        if not isinstance(one, keras.layers.Layer):
            return
        yield one, other
        if self.rule.is_swapped(one) or id(one) in self.taken_apart:
            return
        for pair in _children(one, other):
            yield from self._sublayers(*pair)

    def _carry_attention(self, one: Any, other: Any) -> None:
        if self.copies.get(id(one)) is other:
            copy_trainable(one, other)  # the rest was copied when it was made
            return
        if one.built:
            if not other.built:
                other.build_from_config(one.get_build_config())
            copy_weights(one, other)
        # Keras' configurations leave it out.
        other._flash_attention = one._flash_attention


# What is not swapped.


def _holds(layer: Any, rule: Rule) -> bool:
    return any(map(rule.is_swapped, layer._flatten_layers(include_self=False)))


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
        made: Any = keras.layers.Lambda(
            layer.function,
            output_shape=layer._output_shape,
            mask=layer.mask,
            arguments=layer.arguments,
            name=layer.name,
            dtype=layer.dtype_policy,
        )
        return made
    with _own_objects(layer):
        made = type(layer).from_config(layer.get_config())
    # A vocabulary must be there before the layer is called.
    _carry_assets(layer, made)
    return made


def _own_objects(layer: Any) -> Any:
    """Scope in which Keras finds the classes and functions that a layer uses."""
    found: dict[str, Any] = {}
    if isinstance(layer, keras.layers.Layer):
        for inner in layer._flatten_layers():
            found[type(inner).__name__] = type(inner)
            functions = (x for x in vars(inner).values() if inspect.isfunction(x))
            found |= {function.__name__: function for function in functions}
    # Keras' own are found without.
    return keras.saving.custom_object_scope(
        {x: own for x, own in found.items() if not own.__module__.startswith("keras.")}
    )


def _children(one: Any, other: Any) -> list[tuple[Any, Any]]:
    first, second = (
        layer._flatten_layers(include_self=False, recursive=False)
        for layer in (one, other)
    )
    if isinstance(one, keras.Model):
        # Models order their layers by their graph; names are unique there.
        first, second = (sorted(each, key=lambda x: x.name) for each in (first, second))
    if len(first) != len(second):
        raise ValueError(
            "A copy made from a layer's configuration must have as many sublayers. "
            f"Received: {_described(one)} with {[each.name for each in first]}, and "
            f"its copy with {[each.name for each in second]}"
        )
    return list(zip(first, second, strict=True))


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
    names = [weight.name for weight in first]
    if len(set(names)) == len(names):
        # Low-rank factors come in another order where they were added later.
        first, second = (sorted(each, key=lambda x: x.name) for each in (first, second))
    described = [[(x.name, tuple(x.shape)) for x in each] for each in (first, second)]
    if len(first) != len(second) or any(
        tuple(x.shape) != tuple(y.shape) for x, y in zip(first, second, strict=True)
    ):
        raise ValueError(
            "A copy made from a layer's configuration must have the same weights. "
            f"Received: {_described(one)} with {described[0]}, and its copy with "
            f"{described[1]}"
        )
    return list(zip(first, second, strict=True))


def _carry_assets(one: Any, other: Any) -> None:
    if hasattr(one, "save_assets") and hasattr(one, "load_assets"):
        with tempfile.TemporaryDirectory() as folder:
            one.save_assets(folder)
            other.load_assets(folder)


def _kind(config: Any) -> tuple[Any, ...]:
    keys = ("module", "class_name", "registered_name")
    return tuple(config.get(key) for key in keys)


def _described(layer: Any) -> str:
    return f"layer '{layer.name}' ({type(layer).__name__})"
