"""The part of a model after its tokenizer, as an endpoint of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mha.export.endpoint import Endpoint, describe

INPUT = "ids"


def after_tokenizer(
    endpoint: Endpoint, arrays: Mapping[str, np.ndarray]
) -> tuple[Endpoint, dict[str, np.ndarray]]:
    """Cuts a model behind its tokenizer.

    Args:
        endpoint: A Functional or Sequential model, one of whose layers is a
            `keras_mha.text.WordpieceTokenizer` that is called once.
        arrays: Samples by the model's input names.

    Returns:
        The rest of the model, which takes what the tokenizer gives as `ids` and the
        other inputs as they are, and the samples for it.

    Raises:
        ValueError: If the model has no such tokenizer.
    """
    model, ids = _with_output_of_tokenizer(endpoint.model)
    kept = [tensor for tensor in model.inputs if tensor.dtype != "string"]
    cut = {tensor.name: arrays[tensor.name] for tensor in kept}
    if INPUT in cut:
        raise ValueError(
            f"With `tokens` no input of the model may be called {INPUT!r}, the name "
            f"of what its tokenizer gives. Received: {sorted(arrays)}"
        )
    tokenize = keras.Model(model.inputs, ids)
    given = [tf.constant(arrays[tensor.name]) for tensor in model.inputs]
    cut = {INPUT: np.asarray(tokenize(given)), **cut}
    rest = keras.Model([ids, *kept], model.outputs, name=f"{model.name}_tokens")
    first = {name: array[:1] for name, array in arrays.items()}
    inner, _ = describe(
        rest, [*cut.values()], output_names=list(endpoint.answer(first))
    )
    inner_names = dict(zip(cut, inner.inputs, strict=True))
    specs = {name: inner.inputs[inner_name] for name, inner_name in inner_names.items()}

    def function(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return inner.function({inner_names[name]: tensors[name] for name in tensors})

    return Endpoint(rest, specs, function), cut


def _with_output_of_tokenizer(model: keras.Model) -> tuple[keras.Model, Any]:
    """The model traced anew with its own layers, and what its tokenizer gives there."""
    from keras_mha.text import WordpieceTokenizer

    found = []

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        output = layer(*args, **kwargs)
        if isinstance(layer, WordpieceTokenizer):
            found.append(output)
        return output

    def keep(layer: Any) -> Any:
        return layer

    traced: Any = model
    if getattr(model, "inputs", None) is not None:
        # The layer's own `output` may be one that it gave in another model.
        functional = keras.Model(model.inputs, model.outputs, name=model.name)
        traced = keras.models.clone_model(
            functional, clone_function=keep, call_function=call
        )
    if len(found) != 1:
        raise ValueError(
            "With `tokens` the model must be Functional or Sequential and call a "
            "`keras_mha.text.WordpieceTokenizer` of its own once. Received: "
            f"{type(model).__name__} with {len(found)} such calls"
        )
    return traced, found[0]
