"""Describes a Keras model as a function from named tensors to named tensors.

Exported files know their inputs and outputs by name; `model.predict` by structure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mha.export.report import TensorInfo

Specs = Mapping[str, tf.TensorSpec]


@dataclass(frozen=True)
class Endpoint:
    """A model's inputs by name, and itself as a function of them.

    Attributes:
        model: The model.
        inputs: What each named input holds; the batch dimension is free.
        function: Maps tensors by input name to tensors by output name, in inference.
    """

    model: keras.Model
    inputs: Specs
    function: Callable[[Mapping[str, Any]], dict[str, Any]]

    def answer(self, case: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the model's own values, in eager mode."""
        tensors = {name: tf.constant(array) for name, array in case.items()}
        return {n: _to_array(t) for n, t in self.function(tensors).items()}

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

    Args:
        model: A built model. Functional and Sequential models name their inputs
            themselves. Of others the inputs are read off `samples`: free in the
            batch dimension and otherwise of the samples' shapes, called by the keys
            of a dictionary or else `inputs`.
        samples: What one would hand to `model.predict`: an array, a tensor, a list
            of strings, a dictionary by input name, or a list with one entry for each
            of several inputs.
        output_names: Names for the outputs, in the order of `keras.tree.flatten`.
            Default: the keys of a dictionary output, else the names of the layers
            that a Functional or Sequential model ends in, else `output_0`, ...

    Returns:
        The endpoint, and the samples as NumPy arrays by input name; strings are
        `bytes` in object arrays.

    Raises:
        TypeError: If `model` is not a Keras model, or samples have another type than
            the input that they are for.
        ValueError: If names, ranks, sizes or numbers of rows do not fit.
    """
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "Exporting needs Keras on its TensorFlow backend. Received: "
            f"backend={keras.backend.backend()!r}"
        )
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: {model!r}")
    if not model.built:
        raise ValueError(f"`model` must be built or called once. Received: {model!r}")
    structure, specs, arrays = _read_inputs(model, samples)
    _check_names(specs)
    arrays = {name: _fit(name, arrays[name], specs[name]) for name in specs}
    rows = {name: len(array) for name, array in arrays.items()}
    if len(set(rows.values())) != 1 or 0 in rows.values():
        raise ValueError(
            "`samples` must have one or more rows, equally many in every input. "
            f"Received: {rows}"
        )
    names = output_names or _default_output_names(model)

    def function(tensors: Mapping[str, Any]) -> dict[str, Any]:
        flat = [tf.cast(tensors[name], spec.dtype) for name, spec in specs.items()]
        packed = keras.tree.pack_sequence_as(structure, flat)
        results = model(packed, training=False)
        if output_names is None and isinstance(results, Mapping):
            return dict(results)
        flat_results = keras.tree.flatten(results)
        if names is None:
            return {f"output_{i}": result for i, result in enumerate(flat_results)}
        if len(set(names)) != len(flat_results) or len(names) != len(flat_results):
            raise ValueError(
                f"`output_names` must hold {len(flat_results)} different names, one "
                f"for each output of the model. Received: {list(names)}"
            )
        return dict(zip(names, flat_results, strict=True))

    return Endpoint(model, specs, function), arrays


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


def _read_inputs(
    model: keras.Model, samples: Any
) -> tuple[Any, dict[str, tf.TensorSpec], dict[str, np.ndarray]]:
    """Reads what `model` is called with, a tensor or a structure of them, by name."""
    inputs: list[keras.KerasTensor] | None = getattr(model, "inputs", None)
    if inputs is not None:
        specs = {
            tensor.name: tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype)
            for tensor in inputs
        }
        return getattr(model, "input", inputs[0]), specs, _by_name(samples, specs)
    named = samples if isinstance(samples, Mapping) else {"inputs": samples}
    structure = {name: name for name in named} if named is samples else "inputs"
    arrays = {name: _as_array(name, array) for name, array in named.items()}
    specs = {
        name: tf.TensorSpec((None, *arrays[name].shape[1:]), _dtype(arrays[name]))
        for name in keras.tree.flatten(structure)
    }
    return structure, specs, arrays


def _check_names(names: Iterable[str]) -> None:
    bad = [name for name in names if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII)]
    if bad:
        raise ValueError(
            "The model's inputs must be named by a letter and then letters, digits "
            f"and underscores: TensorFlow would rename others. Received: {bad}"
        )


def _default_output_names(model: keras.Model) -> Sequence[str] | None:
    if isinstance(model, keras.Sequential):
        return [model.layers[-1].name]
    names = getattr(model, "output_names", None)
    # A layer with several outputs gives them all its name.
    return names if names is None or len(set(names)) == len(names) else None


def _by_name(samples: Any, specs: Specs) -> dict[str, np.ndarray]:
    if isinstance(samples, Mapping):
        named = samples
    elif _is_one_for_each(samples, specs):
        named = dict(zip(specs, samples, strict=True))
    elif len(specs) == 1:
        named = dict.fromkeys(specs, samples)
    else:
        raise ValueError(
            f"`samples` must be a dictionary with the keys {sorted(specs)}, or a list "
            f"in the order {list(specs)}. Received: {type(samples).__name__}"
        )
    if set(named) != set(specs):
        raise ValueError(
            f"`samples` must have the keys {sorted(specs)}, the model's inputs. "
            f"Received: {sorted(named)}"
        )
    return {name: _as_array(name, array) for name, array in named.items()}


def _is_one_for_each(samples: Any, specs: Specs) -> bool:
    return (
        isinstance(samples, list | tuple)
        and len(samples) == len(specs)
        and all(
            np.ndim(entry) == spec.shape.rank
            for entry, spec in zip(samples, specs.values(), strict=True)
        )
    )


def _as_array(name: str, samples: Any) -> np.ndarray:
    """Converts samples to an array; strings become `bytes` in an object array."""
    try:
        array = np.asarray(samples)
    except UnicodeDecodeError:  # str mixed with bytes that are not ASCII
        array = np.array(samples, object)
    if array.dtype.kind in "biuf":
        return array
    # Again from the samples: NumPy's own bytes type drops trailing NULs.
    strings = np.array(samples, object)
    encoded = np.empty(strings.shape, object)
    for index, item in np.ndenumerate(strings):
        if not isinstance(item, str | bytes):
            raise TypeError(
                f"`samples` for input {name!r} must be numbers or strings, equally "
                f"many in each row. Received: {type(item).__name__}"
            )
        encoded[index] = item if isinstance(item, bytes) else _to_bytes(name, item)
    return encoded


def _to_bytes(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`samples` for input {name!r} must be text that UTF-8 can write. "
            f"Received: {error}"
        ) from error


def _dtype(array: np.ndarray) -> Any:
    return tf.string if array.dtype.kind == "O" else array.dtype


def _fit(name: str, array: np.ndarray, spec: tf.TensorSpec) -> np.ndarray:
    """Brings samples to an input's type and rank, or says why they do not fit."""
    if (spec.dtype == tf.string) != (array.dtype.kind == "O") or not (
        spec.dtype == tf.string
        or np.can_cast(array.dtype, spec.dtype.as_numpy_dtype, casting="same_kind")
    ):
        raise TypeError(
            f"`samples` for input {name!r} must be of type {spec.dtype.name}. "
            f"Received: {_dtype(array)}"
        )
    if spec.dtype != tf.string:
        array = array.astype(spec.dtype.as_numpy_dtype)
    if array.ndim == spec.shape.rank - 1 and spec.shape[-1] == 1:
        array = array[..., np.newaxis]  # as Keras does
    if not spec.shape.is_compatible_with(array.shape):
        raise ValueError(
            f"`samples` for input {name!r} must have the shape {tuple(spec.shape)}. "
            f"Received: {array.shape}"
        )
    return array


def _to_array(tensor: Any) -> np.ndarray:
    if tensor.dtype == tf.bfloat16:  # NumPy has none: widen, which is exact
        tensor = tf.cast(tensor, tf.float32)
    return np.asarray(tensor.numpy())
