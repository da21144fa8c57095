"""The part of a model after its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
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
    """`without_tokenizer` for an endpoint, whose outputs keep their names."""
    rest, cut = _cut(endpoint.model, arrays)
    first = {name: array[:1] for name, array in arrays.items()}
    inner, _ = describe(rest, cut, output_names=list(endpoint.answer(first)))
    return inner, cut


def tokenizer_of(model: keras.Model) -> WordpieceTokenizer:
    """The tokenizer that the model has and calls once.

    Raises:
        ValueError: If it has none, or more such calls than one.
    """
    return _with_output_of_tokenizer(model)[1]


def _cut(
    model: keras.Model, arrays: Mapping[str, np.ndarray]
) -> tuple[keras.Model, dict[str, np.ndarray]]:
    """The model after its tokenizer, and samples by the names of its inputs."""
    traced, _, ids = _with_output_of_tokenizer(model)
    kept = [tensor for tensor in traced.inputs if tensor.dtype != "string"]
    cut = {tensor.name: arrays[tensor.name] for tensor in kept}
    if INPUT in cut:
        raise ValueError(
            f"With `tokens` no input of the model may be called {INPUT!r}, the name "
            f"of what its tokenizer gives. Received: {sorted(arrays)}"
        )
    tokenize = keras.Model(traced.inputs, ids)
    given = [tf.constant(arrays[tensor.name]) for tensor in traced.inputs]
    inputs = [
        keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=name)
        for name, tensor in zip([INPUT, *cut], [ids, *kept], strict=True)
    ]
    # Keras names the inputs of a part after the tensors inside; these have their own.
    rest = keras.models.clone_model(
        keras.Model([ids, *kept], traced.outputs, name=f"{model.name}_tokens"),
        input_tensors=inputs,
        clone_function=_keep,
    )
    return rest, {INPUT: np.asarray(tokenize(given)), **cut}


def _keep(layer: Any) -> Any:
    return layer


def _with_output_of_tokenizer(
    model: keras.Model,
) -> tuple[keras.Model, WordpieceTokenizer, Any]:
    """The model traced anew, its tokenizer, and what that gives there."""
    from keras_mha.text import WordpieceTokenizer

    found = []

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        output = layer(*args, **kwargs)
        if isinstance(layer, WordpieceTokenizer):
            found.append((layer, output))
        return output

    traced: Any = model
    if getattr(model, "inputs", None) is not None:
        # The layer's own `output` may be one that it gave in another model.
        functional = keras.Model(model.inputs, model.outputs, name=model.name)
        traced = keras.models.clone_model(
            functional, clone_function=_keep, call_function=call
        )
    if len(found) != 1:
        raise ValueError(
            "The model must be Functional or Sequential and call a "
            "`keras_mha.text.WordpieceTokenizer` of its own once. Received: "
            f"{type(model).__name__} with {len(found)} such calls"
        )
    return traced, *found[0]
