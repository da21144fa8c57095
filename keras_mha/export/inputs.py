"""Reads what a model is called with: inputs by name, their types, and samples."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mha.export.samples import as_array, holds_arrays

Specs = Mapping[str, tf.TensorSpec]
_MADE_UP = re.compile(r"keras_tensor(_\d+)?")


@dataclass(frozen=True)
class Inputs:
    """What a model is called with.

    Attributes:
        structure: Names in the structure of the inputs; `None` for an optional one
            that is left out.
        specs: What each input holds.
        arrays: Samples for each.
        unbatched: The inputs that have no batch dimension.
        spread: Whether the parts of the structure are arguments of their own.
        notes: A sentence for each name that Keras made up and that was replaced.
    """

    structure: Any
    specs: Specs
    arrays: Mapping[str, np.ndarray]
    unbatched: frozenset[str]
    spread: bool = False
    notes: tuple[str, ...] = ()

    def call(self, model: keras.Model, tensors: Mapping[str, Any]) -> Any:
        """Calls the model, in inference, with tensors by input name."""
        packed: Any = keras.tree.map_structure(
            lambda name: None if name is None else tensors[name], self.structure
        )
        if not self.spread:
            return model(packed, training=False)
        if isinstance(packed, Mapping):
            return model(**packed, training=False)
        return model(*packed, training=False)


def read_inputs(model: keras.Model, samples: Any) -> Inputs:
    """Reads a model's inputs, and the samples for each; see `endpoint.describe`.

    Raises:
        TypeError: If samples have another type than the input that they are for.
        ValueError: If names, ranks, sizes or numbers of rows do not fit.
    """
    tensors = getattr(model, "inputs", None) if model.built else None
    read = _of_graph if tensors else _of_call
    structure, specs, leaves, spread, notes = read(model, samples)
    _check_names(keras.tree.flatten(structure))
    unbatched = _unbatched(specs)
    arrays = {
        name: _fit(name, as_array(name, leaves[name]), spec, name not in unbatched)
        for name, spec in specs.items()
    }
    rows = {name: len(arrays[name]) for name in specs if name not in unbatched}
    if len(set(rows.values())) > 1 or 0 in rows.values():
        raise ValueError(
            "`samples` must have one or more rows, equally many in every input. "
            f"Received: {rows}"
        )
    return Inputs(structure, specs, arrays, unbatched, spread, notes)


_Read = tuple[Any, dict[str, tf.TensorSpec], Mapping[str, Any], bool, tuple[str, ...]]


def _of_graph(model: keras.Model, samples: Any) -> _Read:
    """Reads the inputs of a Functional or Sequential model."""
    tensors: Any = getattr(model, "input", model.inputs[0])
    paths = [(path, x) for path, x in keras.tree.flatten_with_path(tensors)]
    named = [_input_name(path, tensor) for path, tensor in paths]
    names = [name for name, _ in named]
    structure = keras.tree.pack_sequence_as(tensors, names)
    specs = {
        name: tf.TensorSpec(tensor.shape, tensor.dtype)
        for name, (_, tensor) in zip(names, paths, strict=True)
    }
    of_tensors = {x.name: name for name, (_, x) in zip(names, paths, strict=True)}
    leaves = _by_name(samples, structure, specs, of_tensors)
    for name, (_, tensor) in zip(names, paths, strict=True):
        if leaves[name] is None and tensor._keras_history.operation.optional:
            del specs[name]
    structure = keras.tree.map_structure(
        lambda name: name if name in specs else None, structure
    )
    return structure, specs, leaves, False, tuple(n for _, n in named if n)


def _input_name(path: Sequence[Any], tensor: Any) -> tuple[str, str | None]:
    """Returns an input's name, and a note where it is not the tensor's."""
    if getattr(tensor, "sparse", False) or getattr(tensor, "ragged", False):
        raise ValueError(
            "The model's inputs must be dense: no exported file takes sparse or "
            f"ragged tensors. Received: {tensor}"
        )
    if not _MADE_UP.fullmatch(tensor.name):
        return tensor.name, None
    key = path[-1] if path and isinstance(path[-1], str) else None
    name = key or tensor._keras_history.operation.name
    origin = "its key" if key else "its layer"
    return name, (
        f"Keras made up the name of the input {tensor.name!r}; it is called {name!r}, "
        f"as {origin} is"
    )


def _by_name(
    samples: Any, structure: Any, specs: Specs, of_tensors: Mapping[str, str]
) -> Mapping[str, Any]:
    """Returns samples by the names of a graph's inputs."""
    paired = _pair(structure, samples, specs)
    if paired is not None:
        return paired
    if isinstance(samples, Mapping):
        named = {of_tensors.get(str(key), key): part for key, part in samples.items()}
        if set(named) != set(specs):
            raise ValueError(
                f"`samples` must have the keys {sorted(specs)}, the model's inputs. "
                f"Received: {sorted(map(str, samples))}"
            )
        return named
    in_order = _pair(list(specs), samples, specs)
    if in_order is not None:
        return in_order
    if len(specs) == 1:
        return dict.fromkeys(specs, samples)
    raise ValueError(
        f"`samples` must be a dictionary with the keys {sorted(specs)}, or a list "
        f"in the order {list(specs)}. Received: {type(samples).__name__}"
    )


def _pair(structure: Any, samples: Any, specs: Specs) -> dict[str, Any] | None:
    """Returns samples by name, or `None` if they have another structure."""
    if isinstance(structure, str):
        return None if isinstance(samples, Mapping) else {structure: samples}
    if isinstance(structure, Mapping):
        if not isinstance(samples, Mapping) or set(samples) != set(structure):
            return None
        parts = [(structure[key], samples[key]) for key in structure]
    else:
        if not isinstance(samples, list | tuple) or len(samples) != len(structure):
            return None
        # A list of one may also be the one row of an input.
        if len(structure) == 1 and not _is_for(samples[0], specs.get(structure[0])):
            return None
        parts = list(zip(structure, samples, strict=True))
    paired: dict[str, Any] = {}
    for part, of_part in parts:
        inner = _pair(part, of_part, specs)
        if inner is None:
            return None
        paired |= inner
    return paired


def _is_for(samples: Any, spec: tf.TensorSpec | None) -> bool:
    return spec is None or np.ndim(samples) == spec.shape.rank


def _of_call(model: keras.Model, samples: Any) -> _Read:
    """Reads the inputs of another model off its samples."""
    required, optional = _parameters(model)
    is_list = isinstance(samples, list | tuple) and holds_arrays(samples)
    spread = len(required) > 1 and (
        set(required) <= set(samples) <= {*required, *optional}
        if isinstance(samples, Mapping)
        else is_list and len(samples) == len(required)
    )
    prefix = required[0] if required else "inputs"
    leaves: dict[str, Any] = {}

    def read(path: Sequence[Any], leaf: Any) -> str | None:
        if leaf is None:
            return None
        if spread and is_list:
            path = (required[path[0]], *path[1:])
        name = join(path, prefix)
        leaves[name] = leaf
        return name

    structure = _walk(samples, read)
    specs = {name: _free_spec(as_array(name, leaves[name])) for name in leaves}
    return structure, specs, leaves, spread, ()


def _parameters(model: keras.Model) -> tuple[list[str], list[str]]:
    """Returns the names that a model's `call` needs, and those it has a default for."""
    parameters = [
        (name, parameter.default is parameter.empty)
        for name, parameter in inspect.signature(model.call).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in ("training", "mask")
        and not name.startswith("_")
    ]
    return [n for n, needed in parameters if needed], [
        n for n, needed in parameters if not needed
    ]


def _walk(
    samples: Any,
    read: Callable[[Sequence[Any], Any], str | None],
    path: tuple[Any, ...] = (),
) -> Any:
    """Maps a structure of arrays, of which a list of numbers or strings is one."""
    if isinstance(samples, Mapping):
        return {key: _walk(part, read, (*path, key)) for key, part in samples.items()}
    if isinstance(samples, list | tuple) and holds_arrays(samples):
        parts = [_walk(part, read, (*path, i)) for i, part in enumerate(samples)]
        return tuple(parts) if isinstance(samples, tuple) else parts
    return read(path, samples)


def join(path: Sequence[Any], prefix: str) -> str:
    """Returns a name for a place in a structure.

    Example:

    >>> from keras_mha.export.inputs import join
    >>> join(("image", 0), "inputs"), join((1,), "inputs"), join((), "inputs")
    ('image_0', 'inputs_1', 'inputs')
    """
    named = path and isinstance(path[0], str)
    return "_".join(map(str, path if named else (prefix, *path)))


def _free_spec(array: np.ndarray) -> tf.TensorSpec:
    """Describes an input by its samples; Keras computes in its own float type."""
    shape = (None, *array.shape[1:]) if array.ndim else ()
    if array.dtype == np.float64:
        return tf.TensorSpec(shape, keras.config.floatx())
    return tf.TensorSpec(shape, type_of(array))


def type_of(array: np.ndarray) -> Any:
    """Returns TensorFlow's type for an array; objects are strings."""
    return tf.string if array.dtype.kind == "O" else tf.as_dtype(array.dtype)


def _unbatched(specs: Specs) -> frozenset[str]:
    """Finds the inputs whose first dimension, if any, is not the batch."""
    sizes = {name: spec.shape[0] for name, spec in specs.items() if spec.shape.rank}
    if None in sizes.values():
        return frozenset(name for name in specs if sizes.get(name, 1) is not None)
    # All are fixed: to one size, or to several that cannot be the batch's.
    several = len(set(sizes.values())) > 1
    return frozenset(name for name in specs if several or name not in sizes)


def _check_names(names: Sequence[str | None]) -> None:
    there = [name for name in names if name is not None]
    bad = [x for x in there if not re.fullmatch(r"[A-Za-z]\w*", x, re.ASCII)]
    if bad:
        raise ValueError(
            "The model's inputs must be named by a letter and then letters, digits "
            f"and underscores: TensorFlow would rename others. Received: {bad}"
        )
    if len(set(there)) != len(there) or not there:
        raise ValueError(
            "The model's inputs must be one or more, of different names. Received: "
            f"{there}"
        )


def _fit(
    name: str, array: np.ndarray, spec: tf.TensorSpec, batched: bool
) -> np.ndarray:
    """Brings samples to an input's type and rank, or says why they do not fit."""
    if (spec.dtype == tf.string) != (array.dtype.kind == "O") or not (
        spec.dtype == tf.string
        or np.can_cast(array.dtype, spec.dtype.as_numpy_dtype, casting="same_kind")
    ):
        raise TypeError(
            f"`samples` for input {name!r} must be of type {spec.dtype.name}. "
            f"Received: {type_of(array)}"
        )
    if spec.dtype != tf.string:
        array = array.astype(spec.dtype.as_numpy_dtype)
    rank = spec.shape.rank
    if array.ndim == rank - 1 and spec.shape[-1] == 1:
        array = array[..., np.newaxis]  # as Keras does
    elif array.ndim == rank + 1 and array.shape[-1] == 1:
        array = array[..., 0]
    shape = (None, *spec.shape[1:]) if batched else tuple(spec.shape)
    if not tf.TensorShape(shape).is_compatible_with(array.shape):
        raise ValueError(
            f"`samples` for input {name!r} must have the shape {shape}. "
            f"Received: {array.shape}"
        )
    return array
