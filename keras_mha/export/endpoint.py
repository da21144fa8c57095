"""Describes a Keras model as a function from named tensors to named tensors.

Exported files know their inputs and outputs by name; a model knows them by structure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mha.export.inputs import Inputs, Specs, join, read_inputs
from keras_mha.export.report import TensorInfo
from keras_mha.export.samples import Arrays, join_batches

_REFUSALS = (ValueError, TypeError, tf.errors.OpError)


@dataclass(frozen=True)
class Endpoint:
    """A model's inputs by name, and itself as a function of them.

    Attributes:
        model: The model.
        inputs: What each named input holds. The batch dimension is free, unless the
            model answers batches of one size only.
        function: Maps tensors by input name to tensors by output name, in inference.
        unbatched: The inputs that have no batch dimension.
        notes: A sentence for each name that Keras made up and that was replaced.
    """

    model: keras.Model
    inputs: Specs
    function: Callable[[Mapping[str, Any]], dict[str, Any]]
    unbatched: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def batch_size(self) -> int | None:
        """The only size of batches that the model answers, or `None`."""
        batched = [s for name, s in self.inputs.items() if name not in self.unbatched]
        return batched[0].shape[0] if batched else 1

    def rows(self, case: Arrays) -> int:
        """Returns the number of rows in a batch."""
        batched = [a for name, a in case.items() if name not in self.unbatched]
        return len(batched[0]) if batched else 1

    def take(self, case: Arrays, rows: slice | np.ndarray) -> dict[str, np.ndarray]:
        """Returns rows of a batch; inputs without a batch dimension stay whole."""
        return {
            name: array if name in self.unbatched else array[rows]
            for name, array in case.items()
        }

    def batches(self, case: Arrays) -> list[Arrays]:
        """Returns all rows in one batch, or in batches of the only size there is."""
        size = self.batch_size
        if size is None or self.unbatched.issuperset(case):
            return [case]
        starts = range(0, self.rows(case) - size + 1, size)
        return [self.take(case, slice(i, i + size)) for i in starts]

    def with_batch_size(self, size: int | None) -> Endpoint:
        """Returns the same for batches of one size, or of any with `None`."""
        inputs = {
            name: spec
            if name in self.unbatched
            else tf.TensorSpec((size, *spec.shape[1:]), spec.dtype)
            for name, spec in self.inputs.items()
        }
        return replace(self, inputs=inputs)

    def answer_or_none(self, case: Arrays) -> dict[str, np.ndarray] | None:
        """Returns the model's own values, or `None` where it refuses the inputs."""
        try:
            return self.answer(case)
        except _REFUSALS:
            return None

    def answer(self, case: Arrays) -> dict[str, np.ndarray]:
        """Returns the model's own values, in eager mode."""
        return _arrays(self.function(_tensors(case)))

    def answers_in_graph(self, cases: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        """Returns the same from a traced function, as `predict` computes it."""
        function = tf.function(self.function, autograph=False, reduce_retracing=True)
        return [_arrays(function(_tensors(case))) for case in cases]

    def is_traceable(self) -> bool:
        """Returns whether a graph can be made for sizes that are not known."""
        function = tf.function(self.function, autograph=False)
        try:
            function.get_concrete_function(_named(self.inputs))
        except _REFUSALS:
            return False
        return True

    def write(
        self,
        path: Path,
        specs: Specs,
        *,
        signature_name: str = "serve",
        further: Mapping[str, Endpoint] | None = None,
    ) -> None:
        """Traces the function for inputs of `specs` into a SavedModel at `path`.

        Args:
            path: A directory that does not exist.
            specs: The inputs; their shapes and types may be narrower than `inputs`.
            signature_name: Its name in the file, which also calls it `serving_default`.
            further: More signatures, by name: functions of the same weights.
        """
        archive: Any = keras.export.ExportArchive()
        # The weights are found through the function. The model itself is not tracked:
        # Keras takes `train_function` and others off it while its children are listed.
        resources: Any = tf.Module()
        resources.of_model = _resources(self.model)
        archive.track(resources)
        archive.add_endpoint(signature_name, self.function, [_named(specs)])
        for name, other in (further or {}).items():
            archive.add_endpoint(name, other.function, [_named(other.inputs)])
        archive.write_out(str(path), verbose=False)


def _resources(model: keras.Model) -> list[Any]:
    """Finds the tables, and other resources of TensorFlow's, that a model holds."""
    resources = []
    seen: set[int] = set()
    left: list[Any] = [model]
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, tf.saved_model.experimental.TrackableResource):
            resources.append(item)
        elif isinstance(item, Mapping):
            left += item.values()
        elif isinstance(item, list | tuple | set):
            left += item
        elif isinstance(item, tf.__internal__.tracking.Trackable):
            left += vars(item).values()
    return resources


def describe(
    model: keras.Model, samples: Any, output_names: Sequence[str] | None = None
) -> tuple[Endpoint, dict[str, np.ndarray]]:
    """Reads a model's named inputs and outputs, and the samples by input name.

    Functional and Sequential models name their inputs themselves. Where Keras made a
    name up (`keras_tensor_3`), the key in a dictionary of inputs takes its place, or
    else the name of the input's layer. The inputs of other models are read off
    `samples`: free in the batch dimension, and otherwise of the samples' shapes. They
    are called by the keys of a dictionary, or else by the parameter of the model's
    `call`: `inputs`, or `inputs_0` and `inputs_1` for a list of two. Names in nested
    structures are joined by underscores.

    An input has the type that the model declares. That is `float32` where none was
    given, even for ids: such an input takes integer samples, as floats of the same
    value. A scalar has no batch dimension, and neither has an input whose first size
    the model fixes while it leaves that of others free. The batch size is free unless
    the model answers batches of one size only, which is tried.

    Args:
        model: A model that was built, called or fitted.
        samples: Inputs in the structure that `model(...)` takes: an array, a tensor,
            a list of strings, a list or tuple with one entry for each of several
            inputs, a dictionary, or these nested. Or a `tf.data.Dataset` of batches of
            them, with or without targets: see `samples.join_batches`.
        output_names: Names for the outputs, in the order of `keras.tree.flatten`.
            Default: the keys of a dictionary; else the names of the layers that a
            Functional or Sequential model ends in, numbered where one layer gives
            several outputs; else `output_0`, ...

    Returns:
        The endpoint, and the samples as NumPy arrays by input name; strings are
        `bytes` in object arrays.

    Raises:
        TypeError: If `model` is not a Keras model, or samples have another type than
            the input that they are for.
        ValueError: If names, ranks, sizes or numbers of rows do not fit.

    Example:

    >>> import keras, numpy as np
    >>> from keras_mha.export.endpoint import describe
    >>> left, right = keras.Input((3,), name="left"), keras.Input((3,), name="right")
    >>> model = keras.Model([left, right], keras.layers.Add(name="sum")([left, right]))
    >>> samples = [np.ones((5, 3)), np.zeros((5, 3))]
    >>> endpoint, arrays = describe(model, samples)
    >>> list(arrays), list(endpoint.answer(arrays)), endpoint.inputs["left"].shape
    (['left', 'right'], ['sum'], TensorShape([None, 3]))
    """
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "Exporting needs Keras on its TensorFlow backend. Received: "
            f"backend={keras.backend.backend()!r}"
        )
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: {model!r}")
    if not model.built and not model.weights:
        raise ValueError(f"`model` must be built or called once. Received: {model!r}")
    inputs = read_inputs(model, join_batches(samples))
    if not model.built:
        _build(model, inputs)
    names, notes = _output_names(model, output_names)

    def function(tensors: Mapping[str, Any]) -> dict[str, Any]:
        cast = {n: tf.cast(tensors[n], spec.dtype) for n, spec in inputs.specs.items()}
        return _by_name(inputs.call(model, cast), names)

    endpoint = Endpoint(
        model, inputs.specs, function, inputs.unbatched, (*inputs.notes, *notes)
    )
    arrays = dict(inputs.arrays)
    return _with_its_batch_size(endpoint, arrays), arrays


def _build(model: keras.Model, inputs: Inputs) -> None:
    """Calls a model whose layers were trained without `call`, as in a `train_step`."""
    before = len(model.weights)
    inputs.call(model, _tensors(inputs.arrays))
    if len(model.weights) != before:
        raise ValueError(
            "`model` must have all weights that its `call` uses before it is exported. "
            f"Received: {model!r} with {before} weights, and {len(model.weights)} "
            "after it was called with `samples`"
        )


def _with_its_batch_size(endpoint: Endpoint, arrays: Arrays) -> Endpoint:
    """Frees the batch size, or fixes it where the model answers no other."""
    of_graph = getattr(endpoint.model, "inputs", None) is not None
    if endpoint.unbatched.issuperset(arrays):
        return endpoint
    if of_graph and endpoint.batch_size is None:
        return endpoint
    rows = endpoint.rows(arrays)
    size = endpoint.batch_size or rows
    free = endpoint.with_batch_size(None)
    # Not one row, which may be broadcast.
    other = endpoint.take(arrays, np.zeros(3 if size == 2 else 2, int))
    if free.answer_or_none(other) is not None and free.is_traceable():
        return free
    if rows < size:
        raise ValueError(
            f"`samples` must have at least {size} rows, the only size of batches that "
            f"`model` answers. Received: {rows}"
        )
    # Where it does not answer that size either, something else is wrong.
    endpoint.answer(endpoint.take(arrays, slice(size)))
    return endpoint.with_batch_size(size)


def _output_names(
    model: keras.Model, names: Sequence[str] | None
) -> tuple[Sequence[str] | None, tuple[str, ...]]:
    """Returns the names of a model's outputs, and notes on those that are numbered.

    `None` stands for those that only the structure of its answers gives.
    """
    outputs: Any = getattr(model, "outputs", None)
    if names is not None or not outputs:
        return names, ()
    if not isinstance(model, keras.Sequential):
        outputs = model.output
    paths = list(keras.tree.flatten_with_path(outputs))
    layers = [tensor._keras_history.operation.name for _, tensor in paths]
    if any(len(path) > 1 or isinstance(path[-1], str) for path, _ in paths if path):
        return [join(path, "output") for path, _ in paths], ()
    if isinstance(model, keras.Sequential) and len(layers) == 1:
        layers = [model.layers[-1].name]
    named = [
        f"{layer}_{layers[:i].count(layer)}" if layers.count(layer) > 1 else layer
        for i, layer in enumerate(layers)
    ]
    return named, tuple(
        f"Output {i} is called {name!r}: its layer {layer!r} gives several"
        for i, (name, layer) in enumerate(zip(named, layers, strict=True))
        if name != layer
    )


def _by_name(results: Any, names: Sequence[str] | None) -> dict[str, Any]:
    """Returns a model's answers by name."""
    if hasattr(results, "_asdict"):  # a named tuple
        results = results._asdict()
    paths = [(p, x) for p, x in keras.tree.flatten_with_path(results) if x is not None]
    if names is None:
        names = [join(path or (0,), "output") for path, _ in paths]
    if len(set(names)) != len(names) or len(names) != len(paths):
        raise ValueError(
            f"`output_names` must hold {len(paths)} different names, one "
            f"for each output of the model. Received: {list(names)}"
        )
    named = dict(zip(names, (result for _, result in paths), strict=True))
    for name, result in named.items():
        if isinstance(result, tf.RaggedTensor | tf.SparseTensor):
            raise ValueError(
                "The model's outputs must be dense: no exported file gives sparse or "
                f"ragged tensors. Received: {name!r}, a {type(result).__name__}"
            )
    return named


def _named(specs: Specs) -> dict[str, tf.TensorSpec]:
    return {n: tf.TensorSpec(s.shape, s.dtype, name=n) for n, s in specs.items()}


def tensor_infos(specs: Specs) -> tuple[TensorInfo, ...]:
    """Returns names, types and shapes, for a report."""
    return tuple(
        TensorInfo(
            name, spec.dtype.name, None if spec.shape.rank is None else (*spec.shape,)
        )
        for name, spec in specs.items()
    )


def _tensors(case: Arrays) -> dict[str, Any]:
    return {name: tf.constant(array) for name, array in case.items()}


def _arrays(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: _to_array(tensor) for name, tensor in tensors.items()}


def _to_array(tensor: Any) -> np.ndarray:
    tensor = tf.convert_to_tensor(tensor)
    if tensor.dtype == tf.bfloat16:  # NumPy has none: widen, which is exact
        tensor = tf.cast(tensor, tf.float32)
    return np.asarray(tensor.numpy())
