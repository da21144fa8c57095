"""Copies of models, or of layers, in which attention is swapped for another class's."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any, NamedTuple

import keras

from keras_mha.convert.keras_layers import complete
from keras_mha.twin import Twins, described, own_variable, retrace, twin


class Rule(NamedTuple):
    """Which layers are swapped, for what, and how the new ones are called.

    Attributes:
        convert: Makes the new layer; returns `None` for a layer that stays.
        call: Calls a new layer, given the old one, in a functional model.
        is_fused: Whether a layer is swapped for one that takes more inputs.
        old: Names of the classes that are swapped, for messages.
    """

    convert: Callable[[Any, Twins], Any]
    call: Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]
    is_fused: Callable[[Any], bool]
    old: str


def swap_layers(
    model: Any, rule: Rule, policy: Any = None, *, share: bool = False
) -> tuple[Any, list[tuple[Any, Any]]]:
    """Copies a model or layer with layers swapped.

    Args:
        model: The model or layer.
        rule: What is swapped.
        policy: The dtype policy of the copy. Defaults to that of each layer.
        share: Whether the copy has the variables of the original.

    Returns:
        The copy, and the pairs of layers swapped and those in their place.

    Raises:
        TypeError: If a layer has one inside that would be called with more inputs.
        ValueError: If variables would be shared that have another dtype.
    """
    _check_fused(model, rule)
    swapped: list[tuple[Any, Any]] = []
    graphs: list[tuple[Any, Any]] = []  # in the place of Sequential models

    def replace(layer: Any, twins: Twins) -> Any:
        if type(layer) is keras.Sequential and any(map(rule.is_fused, layer.layers)):
            graphs.append((layer, twins.copy(_graph_of(layer))))
            return graphs[-1][1]
        new = rule.convert(layer, twins)
        if new is not None:
            swapped.append((layer, new))
        return new

    copied = twin(
        model,
        copy_variable=_variable_maker(model, policy, share=share),
        replace=replace,
    )
    for _, new in swapped:
        complete(new)
    for layer, graph in graphs:
        graph.name = layer.name
    if policy is not None:
        _set_policy(copied, policy)
    if swapped or policy is not None:
        retrace(copied, _caller(rule, swapped))
    return copied, swapped


def _check_fused(layer: Any, rule: Rule, holder: Any = None) -> None:
    """Refuses attention that other than graphs call with a single input."""
    inside = layer._layers
    if not isinstance(layer, keras.Function) and type(layer) is not keras.Sequential:
        holder = holder or layer
        fused = [each for each in inside if rule.is_fused(each)]
        if fused:
            raise TypeError(
                f"Attention inside {described(holder)} cannot be swapped: that calls "
                "it with a single input. `to_keras` converts such attention in "
                "Functional and Sequential models: build the rest anew. Received: "
                f"{', '.join(map(described, fused))} inside"
            )
    else:
        holder = None
    for inner in inside:
        _check_fused(inner, rule, holder)


def _graph_of(model: keras.Sequential) -> Any:
    # A Sequential model would call with a single input what is made of its layers.
    graph = model._functional
    if graph is None:
        raise ValueError(
            "A Sequential model with `MultiHeadSelfAttention` must be built to be "
            "converted: give it a `keras.Input`, or call it once. "
            f"Received: {described(model)}, not built"
        )
    return graph


def _caller(rule: Rule, swapped: list[tuple[Any, Any]]) -> Callable[..., Any]:
    originals = {id(new): layer for layer, new in swapped}

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            if id(layer) in originals:
                return rule.call(originals[id(layer)], layer, args, kwargs)
            return layer(*args, **kwargs)
        except (TypeError, ValueError) as error:
            if not _holds(layer, originals):
                raise
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"A call of attention, in {described(layer)}, does not convert: "
                f"{innermost(error)}"
            ) from error

    return call


def _holds(layer: Any, swapped: Container[int]) -> bool:
    inside = layer._flatten_layers() if isinstance(layer, keras.Layer) else []
    return any(id(each) in swapped for each in inside)


def innermost(error: Exception) -> str:
    """The message of an error around which Keras put more for each layer."""
    return str(error).rpartition("\x1b[1m")[2].partition("\x1b[0m")[0]


def _variable_maker(model: Any, policy: Any, *, share: bool) -> Any:
    """What makes a variable of the copy; `None` where they are shared."""
    dtypes = {
        id(variable): policy.variable_dtype
        for layer in model._flatten_layers()
        for variable in layer._trainable_variables + layer._non_trainable_variables
        if policy is not None
        and _is_floating(layer)
        and variable.dtype == layer.variable_dtype != policy.variable_dtype
    }
    if not share:
        return lambda variable: own_variable(variable, dtypes.get(id(variable)))
    if dtypes:
        raise ValueError(
            "Weights of another dtype cannot be shared: with `copy=False` pass a "
            "`dtype` that keeps the dtype of the weights, as 'mixed_bfloat16' does "
            f"with float32. Received: dtype='{policy.name}'"
        )
    return None


def _set_policy(model: Any, policy: Any) -> None:
    for layer in model._flatten_layers():
        if _is_floating(layer):
            mode = layer.quantization_mode
            name = f"{mode}_from_{policy.name}" if mode else policy
            layer._dtype_policy = keras.dtype_policies.get(name)


def _is_floating(layer: Any) -> bool:
    """Whether a layer computes with floats; others keep their dtypes."""
    return "float" in layer.compute_dtype and not isinstance(
        layer, keras.layers.InputLayer
    )
