"""A model's layers by path, and runs of it that leave no trace."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mha.layers.attention_layer import AttentionLayer
from keras_mha.layers.observer import Observer, observe

# Those of Keras' attention layers that `from_keras` swaps; subclasses it does not.
_SWAPPED = keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention
# Layers of Keras that attend too and tell nobody of their scores, and subclasses.
_STOCK = *_SWAPPED, keras.layers.Attention, keras.layers.AdditiveAttention


def layer_paths(model: keras.layers.Layer) -> dict[str, keras.layers.Layer]:
    """Every layer inside a model once, by the names of the layers that lead to it.

    Keras' own `layer.path` repeats itself in nested models. Here a name that two
    layers of one parent share gets a number: `dense`, `dense_1`.

    Args:
        model: A layer or model. It is not part of the paths.

    Example:

    >>> import keras
    >>> from keras_mha.interpret.paths import layer_paths
    >>> inner = keras.Sequential([keras.layers.Dense(2, name="dense")], name="inner")
    >>> outer = keras.Sequential([inner, keras.layers.ReLU(name="relu")])
    >>> list(layer_paths(outer))
    ['inner', 'inner/dense', 'relu']
    """
    paths: dict[str, keras.layers.Layer] = {}
    seen: set[int] = set()

    def walk(parent: Any, prefix: str) -> None:
        for child in parent._layers:  # Keras has no public name for all of them
            if id(child) in seen:
                continue
            seen.add(id(child))
            path = next(p for p in _numbered(prefix + child.name) if p not in paths)
            paths[path] = child
            walk(child, f"{path}/")

    walk(model, "")
    return paths


def attention_layers(model: keras.layers.Layer) -> dict[str, AttentionLayer]:
    """The attention layers inside a model by path, or the one that it is by name.

    Raises:
        TypeError: If `model` is not a Keras layer or model.
        ValueError: If it is not built, has no attention layer, or has one of Keras'.
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"`model` must be a Keras model or layer. Received: {model!r}")
    paths = layer_paths(model)
    if isinstance(model, (AttentionLayer, *_STOCK)):
        paths = {model.name: model}
    _check_stock(paths)
    attention: dict[str, Any] = {
        path: layer
        for path, layer in paths.items()
        if isinstance(layer, AttentionLayer)
    }
    if not attention:
        raise ValueError(
            f"`model` has no attention layer. Received: {type(model).__name__} "
            f"{model.name!r}"
        )
    if not model.built or not all(layer.built for layer in attention.values()):
        raise ValueError(
            "`model` must be built: call it once. Received: an unbuilt "
            f"{type(model).__name__} {model.name!r}"
        )
    return attention


def _check_stock(paths: Mapping[str, keras.layers.Layer]) -> None:
    """Refuses attention layers of Keras, and says what to do about each layer."""
    stock = {path: type(la) for path, la in paths.items() if isinstance(la, _STOCK)}
    if not stock:
        return
    swapped = [path for path, kind in stock.items() if kind in _SWAPPED]
    others = {
        path: kind.__name__ for path, kind in stock.items() if path not in swapped
    }
    advice = ""
    if swapped:
        advice += (
            " `keras_mha.convert.from_keras` swaps, weights included, those of the "
            f"classes MultiHeadAttention and GroupQueryAttention: {swapped}."
        )
    if others:
        advice += (
            " Other classes and subclasses are not converted: put layers of keras_mha "
            f"in their place in the code that makes the model, {others}."
        )
    raise ValueError(
        "`model` must attend by layers of keras_mha only; Keras' layers do not show "
        f"their scores.{advice} Received: Keras' layers {list(stock)}"
    )


@contextmanager
def watching(model: keras.layers.Layer, observer: Observer) -> Iterator[None]:
    """Inside, `observer` watches attention, and calls of the model write nothing to it.

    What a layer assigns in a call, such as a counter, is dropped, and the losses that
    an earlier call left in `model.losses` are kept.
    """
    layers = [model, *layer_paths(model).values()]
    losses = [list(layer._losses) for layer in layers]
    try:
        with keras.StatelessScope(), observe(observer):
            yield
    finally:
        for layer, earlier in zip(layers, losses, strict=True):
            layer._losses[:] = earlier


def as_tensors(inputs: Any) -> Any:
    """Turns what one would hand to `model.predict` into tensors.

    Args:
        inputs: An array, a tensor, a list of strings, a dictionary of these by input
            name, or a list with one of them for each of several inputs.

    Example:

    >>> from keras_mha.interpret.paths import as_tensors
    >>> tuple(as_tensors(["A fine film.", "A dull one."]).shape)
    (2,)
    """
    if isinstance(inputs, Mapping):
        return {name: as_tensors(value) for name, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        if not inputs or not isinstance(inputs[0], str | bytes):
            return [as_tensors(value) for value in inputs]
        inputs = np.array(inputs, dtype=object)
    elif isinstance(inputs, np.ndarray) and inputs.dtype.kind in "US":
        inputs = inputs.astype(object)
    return ops.convert_to_tensor(inputs)


def run_model(model: keras.layers.Layer, inputs: Any) -> Any:
    """Calls a model in inference on what `as_tensors` made.

    A `keras.Model` takes one structure. Any other layer takes several arguments: a list
    gives them in their order, a dictionary by name. Yet a list is the first argument
    where the layer was built on a list, or where `call` has no other argument for
    tensors, `mask` aside. So is a dictionary with other keys than the arguments' names.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from keras_mha.interpret.paths import run_model
    >>> one, two = np.ones((1, 3, 2)), np.ones((1, 5, 2))
    >>> layer = keras.layers.MultiHeadAttention(2, 4)
    >>> run_model(layer, [one, two]).shape == run_model(
    ...     layer, {"value": two, "query": one}
    ... ).shape
    True
    """
    if not isinstance(model, keras.Model) and not _built_on_a_structure(model):
        arguments = inspect.signature(model.call).parameters
        if isinstance(inputs, Mapping) and inputs.keys() <= arguments.keys():
            return model(**inputs, training=False)
        several = sum(map(_may_be_a_tensor, arguments.values())) > 1
        if isinstance(inputs, list) and several:
            return model(*inputs, training=False)
    return model(inputs, training=False)


def _built_on_a_structure(layer: Any) -> bool:
    """Whether the first argument was a list or dictionary when the layer was built."""
    shapes = layer._build_shapes_dict  # Keras has no public name for what it recorded
    first = next(iter(shapes.values()), None) if shapes else None
    return isinstance(first, Mapping) or (
        isinstance(first, list | tuple)
        and any(isinstance(each, list | tuple | Mapping) for each in first)
    )


def _may_be_a_tensor(argument: inspect.Parameter) -> bool:
    """Whether an argument of `call` takes what a user counts among the inputs."""
    return (
        argument.kind not in (argument.KEYWORD_ONLY, argument.VAR_KEYWORD)
        and argument.name not in ("mask", "training")  # Keras itself hands these on
        and not isinstance(argument.default, bool)
    )


def count_rows(tensors: Any) -> int:
    """B of what `as_tensors` made.

    Raises:
        ValueError: If rows are missing, or the inputs have unequal numbers of them.
    """
    rows = {int(tensor.shape[0]) for tensor in keras.tree.flatten(tensors)}
    if len(rows) != 1 or 0 in rows:
        raise ValueError(
            "`inputs`, and `labels` where there are, must have one or more rows, "
            f"equally many in each. Received: {sorted(rows)} rows"
        )
    return rows.pop()


def pair_batches(
    inputs: Any, labels: Any, batch_size: int
) -> Iterator[tuple[Any, Any]]:
    """Yields inputs and labels of one batch after the other, as tensors.

    Args:
        inputs: As `as_tensors` takes them; or with `labels=None` an iterable of pairs
            `(inputs, labels)` of batches.
        labels: One row for each of the inputs' rows.
        batch_size: Rows of a batch where there are `labels`.

    Raises:
        ValueError: If labels are missing, their rows are not as many as the inputs',
            or no batch comes.
    """
    if labels is not None:
        pairs: Any = as_tensors(inputs), as_tensors(labels)
        for start in range(0, count_rows(pairs), batch_size):
            rows = slice(start, start + batch_size)
            some, targets = (
                keras.tree.map_structure(operator.itemgetter(rows), each)
                for each in pairs
            )
            yield some, targets
        return
    if not isinstance(inputs, Iterable) or isinstance(inputs, Mapping | np.ndarray):
        raise ValueError(
            "Without `labels`, `inputs` must be an iterable of batches "
            f"`(inputs, labels)`. Received: labels=None, inputs of type {type(inputs)}"
        )
    empty = True
    for batch in inputs:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                "Batches must be pairs `(inputs, labels)`; weights of examples are "
                f"not supported. Received: a batch of type {type(batch)}"
                + (f" and length {len(batch)}" if isinstance(batch, tuple) else "")
            )
        pair = as_tensors(batch[0]), as_tensors(batch[1])
        count_rows(pair)
        yield pair
        empty = False
    if empty:
        raise ValueError("`inputs` must hold one batch or more. Received: none")


def _numbered(path: str) -> Iterator[str]:
    yield path
    number = 0
    while True:
        number += 1
        yield f"{path}_{number}"
