"""A copy of a whole model in which attention is swapped for Keras', or for ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import keras
from typing_extensions import override

from keras_mha.convert.keras_layers import copy_trainable, copy_weights
from keras_mha.copying import Copier, described, own_objects


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
    copier = _Converter(rule)
    if not copier.holds(model):
        raise ValueError(
            f"There is nothing to convert: the model holds no {rule.old}. "
            f"Received: model '{model.name}' of class {type(model).__name__}, "
            f"{'built' if model.built else 'not built'}"
        )
    copied = copier.copy(model)
    copier.carry_state()
    return copied


class _Converter(Copier):
    """Swaps attention by a rule."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    @override
    def is_swapped(self, layer: Any) -> bool:
        return self.rule.is_swapped(layer)

    @override
    def swap(self, layer: Any) -> Any:
        return self.rule.convert(layer)

    @override
    def call(
        self, original: Any, copied: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return self.rule.call(original, copied, args, kwargs)
        except (TypeError, ValueError) as error:
            error.add_note(f"The call of layer '{copied.name}' does not convert.")
            raise

    @override
    def copy_sequential(self, model: Any) -> Any:
        fused = [layer for layer in model.layers if self.rule.is_fused(layer)]
        if not fused:
            return super().copy_sequential(model)
        # A Sequential model would call with a single input what is made of them.
        graph = model._functional
        if graph is None:
            raise ValueError(
                "A Sequential model with `MultiHeadSelfAttention` must be built to be "
                "converted: give it a `keras.Input`, or call it once. "
                f"Received: {described(model)}, not built"
            )
        return self.copy_functional(
            keras.Model(graph.input, graph.output, name=model.name)
        )

    @override
    def copy_holder(self, layer: Any) -> Any:
        """Copies a layer whose configuration has those that are to be swapped in it."""
        inner = [
            sublayer
            for sublayer in layer._flatten_layers(include_self=False)
            if self.is_swapped(sublayer)
        ]
        if isinstance(layer, keras.Model) and hasattr(layer, "inputs"):
            raise TypeError(
                "A functional model whose class has a constructor of its own cannot be "
                "made anew from inputs and outputs: convert the plain "
                "`keras.Model(model.input, model.output)` instead. "
                f"Received: {described(layer)}"
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

        with own_objects(layer):
            config = swap(layer.get_config())
            if sorted(swapped) != sorted(each.name for each in inner):
                self._refuse(layer, "makes it in code of its own", inner)
            return type(layer).from_config(config)

    def _refuse(self, holder: Any, reason: str, inner: list[Any]) -> NoReturn:
        raise TypeError(
            f"Attention inside {described(holder)} cannot be swapped: that {reason}. "
            f"{self.rule.advice} Received: {', '.join(map(described, inner))} inside"
        )

    @override
    def carry_swapped(self, one: Any, other: Any) -> None:
        if self.copies.get(id(one)) is other:
            copy_trainable(one, other)  # the rest was copied when it was made
            return
        if one.built:
            if not other.built:
                other.build_from_config(one.get_build_config())
            copy_weights(one, other)
        # Keras' configurations leave it out.
        other._flash_attention = one._flash_attention


def _kind(config: Any) -> tuple[Any, ...]:
    keys = ("module", "class_name", "registered_name")
    return tuple(config.get(key) for key in keys)
