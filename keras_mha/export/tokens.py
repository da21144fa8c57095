"""Cuts a model after its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from keras_mha.export.endpoint import Endpoint, describe

if TYPE_CHECKING:
    from keras_mha.text import WordpieceTokenizer

INPUT = "ids"


def without_tokenizer(model: keras.Model, samples: Any) -> tuple[keras.Model, Any]:
    """Cuts a model behind its tokenizer, for runtimes that take no strings.

    Args:
        model: A Functional or Sequential model, one of whose layers is a
            `keras_mha.text.WordpieceTokenizer` that is called once.
        samples: What one would hand to `model.predict`.

    Returns:
        The rest of the model, of the same layers, which takes what the tokenizer gives
        as `ids`, int32 `(B, T)`, and the other inputs as they are; and the samples for
        it: an array of ids, or where there are other inputs a dictionary by name.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the model has no such tokenizer, or the samples do not fit it.

    Example:

    >>> import keras
    >>> from keras_mha.export import without_tokenizer
    >>> from keras_mha.text import WordpieceTokenizer
    >>> tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "film"]
    >>> texts = keras.Input((), dtype="string", name="text")
    >>> ids = WordpieceTokenizer(tokens, max_length=7)(texts)
    >>> vectors = keras.layers.Embedding(6, 3, mask_zero=True)(ids)
    >>> model = keras.Model(texts, keras.layers.GlobalAveragePooling1D()(vectors))
    >>> rest, samples = without_tokenizer(model, ["Good film", "film"])
    >>> [tensor.name for tensor in rest.inputs], samples.tolist()
    (['ids'], [[2, 4, 5, 3], [2, 5, 3, 0]])
    """
    endpoint, arrays = describe(model, samples)
    rest, cut = _cut(endpoint.model, arrays)
    return rest, cut[INPUT] if len(cut) == 1 else cut


def after_tokenizer(
    endpoint: Endpoint, arrays: Mapping[str, np.ndarray]
) -> tuple[Endpoint, dict[str, np.ndarray]]:
    """Does as `without_tokenizer` for an endpoint, whose outputs keep their names."""
    rest, cut = _cut(endpoint.model, arrays)
    inner, _ = describe(rest, cut, output_names=_output_names(endpoint, arrays))
    return inner, cut


def endpoint_of_tokens(
    endpoint: Endpoint, arrays: Mapping[str, np.ndarray]
) -> tuple[Endpoint, dict[str, np.ndarray]]:
    """Does as `after_tokenizer`, without another model: no layer gets a new call.

    The endpoint's function takes `ids`; its model is still the whole one.
    """
    rest, inputs, cut = _part_after_tokenizer(endpoint.model, arrays)
    names = _output_names(endpoint, arrays)
    specs = {n: tf.TensorSpec((None, *x.shape[1:]), x.dtype) for n, x in inputs.items()}

    def function(tensors: Mapping[str, Any]) -> dict[str, Any]:
        flat = [tf.cast(tensors[name], spec.dtype) for name, spec in specs.items()]
        return dict(zip(names, keras.tree.flatten(rest.call(flat)), strict=True))

    return Endpoint(endpoint.model, specs, function), cut


def tokenizer_of(model: keras.Model) -> WordpieceTokenizer:
    """Returns the tokenizer that the model has and calls once.

    Raises:
        ValueError: If it has none, or more such calls than one.
    """
    return _call_of_tokenizer(model)[0]


def _output_names(
    endpoint: Endpoint, arrays: Mapping[str, np.ndarray]
) -> Sequence[str]:
    return list(endpoint.answer(endpoint.take(arrays, slice(1))))


def _cut(
    model: keras.Model, arrays: Mapping[str, np.ndarray]
) -> tuple[keras.Model, dict[str, np.ndarray]]:
    """Returns the model after its tokenizer, and samples by the names of its inputs."""
    rest, tensors, cut = _part_after_tokenizer(model, arrays)
    inputs = [
        keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=name)
        for name, tensor in tensors.items()
    ]
    outputs = rest.call(inputs)
    return keras.Model(inputs, outputs, name=f"{model.name}_tokens"), cut


def _part_after_tokenizer(
    model: keras.Model, arrays: Mapping[str, np.ndarray]
) -> tuple[Any, dict[str, keras.KerasTensor], dict[str, np.ndarray]]:
    """Returns the part as a function, its inputs by name, and samples for them."""
    _, ids = _call_of_tokenizer(model)
    others = {
        tensor.name: tensor for tensor in model.inputs if tensor.dtype != "string"
    }
    if INPUT in others:
        raise ValueError(
            f"With `tokens` no input of the model may be called {INPUT!r}, the name "
            f"of what its tokenizer gives. Received: {sorted(arrays)}"
        )
    tokenize = keras.Function(model.inputs, ids)
    texts = [tf.constant(arrays[tensor.name]) for tensor in model.inputs]
    cut = {INPUT: np.asarray(tokenize.call(texts))}
    inputs = {INPUT: ids, **others}
    return (
        keras.Function(list(inputs.values()), model.outputs),
        inputs,
        cut | {name: arrays[name] for name in others},
    )


def _call_of_tokenizer(
    model: keras.Model,
) -> tuple[WordpieceTokenizer, keras.KerasTensor]:
    """Returns the model's tokenizer, and what that gives in its graph."""
    from keras_mha.text import WordpieceTokenizer

    inputs = getattr(model, "inputs", None)
    graph: Any = keras.Function(inputs, model.outputs) if inputs else None
    depths = graph._nodes_by_depth.values() if graph else ()
    # The layer's own `output` may be one that it gave in another model.
    calls = [
        (node.operation, node.outputs[0])
        for nodes in depths
        for node in nodes
        if isinstance(node.operation, WordpieceTokenizer)
    ]
    if len(calls) != 1:
        raise ValueError(
            "The model must be Functional or Sequential and call a "
            "`keras_mha.text.WordpieceTokenizer` of its own once. Received: "
            f"{type(model).__name__} with {len(calls)} such calls"
        )
    return calls[0]
