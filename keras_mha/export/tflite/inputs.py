"""The inputs of TFLite files: their fixed shapes and types, and the rows to try.

Letters: B batch, T length, S length of a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mha.attention.numeric import plain_integer
from keras_mha.export.endpoint import Endpoint
from keras_mha.export.ids import is_looked_up, padding_id
from keras_mha.export.samples import Arrays

DEFAULT_LENGTH = 128
# What TFLite computes in.
_NARROWED = {
    tf.int64: tf.int32,
    tf.float64: tf.float32,
    tf.float16: tf.float32,
    tf.bfloat16: tf.float32,
}


@dataclass(frozen=True)
class FixedInputs:
    """The inputs of one file.

    Attributes:
        name: The file's name without its ending.
        length: S where the file is for one of several lengths, else `None`.
        batch_size: The number of rows in a call.
        endpoint: The model, with these sizes; the batch's stays free.
        types: The type of each input in the file.
        samples: The samples in these shapes, in the model's types.
        ranges: The representative data likewise, or `None`.
    """

    name: str
    length: int | None
    batch_size: int
    endpoint: Endpoint
    types: Mapping[str, tf.DType]
    samples: Arrays
    ranges: Arrays | None

    @property
    def specs(self) -> dict[str, tf.TensorSpec]:
        """Returns the shape and the type of each input in the file."""
        fixed = self.endpoint.with_batch_size(self.batch_size).inputs
        return {
            name: tf.TensorSpec(spec.shape, self.types[name], name)
            for name, spec in fixed.items()
        }

    @property
    def ids(self) -> np.ndarray:
        """Returns the samples of a model with one input."""
        (ids,) = self.samples.values()
        return ids

    def in_batches(self, arrays: Arrays) -> list[Arrays]:
        """Cuts rows into runs of the file, the last one filled up."""
        rows, size = self.endpoint.rows(arrays), self.batch_size
        numbers = np.minimum(np.arange(-(-rows // size) * size), rows - 1)
        if self.endpoint.unbatched.issuperset(arrays):
            return [arrays]
        return [
            self.endpoint.take(arrays, numbers[i : i + size])
            for i in range(0, len(numbers), size)
        ]

    def typed(self, run: Arrays) -> dict[str, np.ndarray]:
        """Returns a run in the file's types."""
        return {
            name: array.astype(self.types[name].as_numpy_dtype)
            for name, array in run.items()
        }


def even_rows(model: keras.Model, samples: Any) -> Any:
    """Fills up rows of ids that differ in length; leaves other samples as they are."""
    if isinstance(samples, Mapping):
        return {name: even_rows(model, rows) for name, rows in samples.items()}
    if not isinstance(samples, list | tuple) or not all(map(_is_row, samples)):
        return samples
    lengths = set(map(len, samples))
    if len(lengths) < 2:
        return samples
    inputs = getattr(model, "inputs", None) or ()
    padding = padding_id(inputs[0]) if len(inputs) == 1 else 0
    return [[*row, *[padding] * (max(lengths) - len(row))] for row in samples]


def _is_row(row: Any) -> bool:
    """Tells whether it is one row of whole numbers."""
    if isinstance(row, list | tuple):
        return all(plain_integer(number) is not None for number in row)
    return isinstance(row, np.ndarray) and row.ndim == 1 and row.dtype.kind in "iu"


def fix_inputs(
    endpoint: Endpoint,
    samples: Arrays,
    ranges: Arrays | None,
    *,
    lengths: Sequence[int] | None,
    shapes: Mapping[str, Sequence[int]] | None,
    batch_size: int | None,
    uint8_inputs: Sequence[str] = (),
    named_by_length: bool = False,
) -> tuple[FixedInputs, ...]:
    """Chooses the fixed shapes and types of each file's inputs.

    Args:
        endpoint: The model.
        samples: The samples by input name.
        ranges: The representative data likewise, or `None`.
        lengths: As `sequence_lengths` of `export_tflite`.
        shapes: As `shapes` of `export_tflite`.
        batch_size: As `batch_size` of `export_tflite`.
        uint8_inputs: As `uint8_inputs` of `export_tflite`.
        named_by_length: Whether the files' names need a length, also where there is
            only one that they can have.
    """
    if lengths is not None and shapes is not None:
        raise ValueError(
            "`sequence_lengths` and `shapes` both set sizes: pass one of them. "
            f"Received: sequence_lengths={lengths!r} and shapes={shapes!r}"
        )
    batch, sizes = _check_shapes(endpoint, shapes, batch_size)
    _check_uint8(samples, uint8_inputs)
    if lengths is not None:
        _check_lengths(endpoint, lengths)
    elif shapes is None and takes_ids(endpoint):
        ((name, spec),) = endpoint.inputs.items()
        own: int | None = spec.shape[1]
        if own is None:
            lengths = (_default_length(endpoint, name, samples[name]),)
        elif named_by_length:
            lengths = (own,)
    return tuple(
        _fix(
            endpoint,
            samples,
            ranges,
            batch=batch,
            sizes=sizes,
            length=length,
            uint8_inputs=uint8_inputs,
        )
        for length in lengths or (None,)
    )


def _default_length(endpoint: Endpoint, name: str, ids: np.ndarray) -> int:
    """Chooses the length of ids: that of the samples where the model takes no more."""
    missing = max(DEFAULT_LENGTH - ids.shape[1], 0)
    longer = {name: np.pad(ids[:1], ((0, 0), (0, missing)))}
    takes_longer = endpoint.answer_or_none(longer) is not None
    return DEFAULT_LENGTH if takes_longer else ids.shape[1]


def _check_shapes(
    endpoint: Endpoint,
    shapes: Mapping[str, Sequence[int]] | None,
    batch_size: int | None,
) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Returns the number of rows, and the shapes by input name."""
    named = {} if shapes is None else dict(shapes)
    unknown = sorted(set(named) - set(endpoint.inputs))
    if unknown or (shapes is not None and not named):
        raise ValueError(
            f"`shapes` must name some of the model's inputs {sorted(endpoint.inputs)}. "
            f"Received: {shapes!r}"
        )
    for name, shape in named.items():
        spec = endpoint.inputs[name]
        if not _is_shape(shape) or not spec.shape.is_compatible_with(shape):
            raise ValueError(
                f"`shapes` for input {name!r} must hold positive integers that fit "
                f"{tuple(spec.shape)}, the batch's size first. Received: {shape!r}"
            )
    batches = {
        shape[0] for name, shape in named.items() if name not in endpoint.unbatched
    }
    batches |= {size for size in (batch_size, endpoint.batch_size) if size is not None}
    if len(batches) > 1:
        raise ValueError(
            "`shapes`, `batch_size` and the model must agree on the number of rows. "
            f"Received: shapes={shapes!r}, batch_size={batch_size!r} and a model of "
            f"{endpoint.batch_size or 'any number of'} rows"
        )
    return next(iter(batches), 1), {name: tuple(x) for name, x in named.items()}


def _check_uint8(samples: Arrays, names: Sequence[str]) -> None:
    """Refuses unknown inputs, and samples that uint8 does not hold."""
    if isinstance(names, str) or set(names) - set(samples):
        raise ValueError(
            f"`uint8_inputs` must be a list of some of the model's inputs "
            f"{sorted(samples)}. Received: {names!r}"
        )
    for name in names:
        array = samples[name]
        if not np.array_equal(array, array.astype(np.uint8)):
            raise ValueError(
                "`uint8_inputs` is for inputs of whole numbers from 0 to 255. Received "
                f"samples for {name!r} from {array.min():g} to {array.max():g}"
            )


def _is_shape(shape: Any) -> bool:
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        return False
    return all((plain_integer(size) or 0) > 0 for size in shape)


def _tensors(endpoint: Endpoint) -> dict[str, keras.KerasTensor]:
    """Returns the inputs of a functional model by name; none of any other."""
    tensors = getattr(endpoint.model, "inputs", None) or ()
    named = {tensor.name: tensor for tensor in tensors}
    if not tensors or set(named) == set(endpoint.inputs):
        return named
    # Names that Keras made up are others in the endpoint; the order is the same.
    flat = keras.tree.flatten(endpoint.model.input)
    return dict(zip(endpoint.inputs, flat, strict=True))


def takes_ids(endpoint: Endpoint) -> bool:
    """Tells whether the model has one input, of ids `(B, T)`."""
    return len(endpoint.inputs) == 1 and _is_ids(endpoint, next(iter(endpoint.inputs)))


def _is_ids(endpoint: Endpoint, name: str) -> bool:
    spec = endpoint.inputs[name]
    if spec.shape.rank != 2 or spec.dtype == tf.string:
        return False
    tensor = _tensors(endpoint).get(name)
    return spec.dtype.is_integer or (tensor is not None and is_looked_up(tensor))


def _has_free_length(endpoint: Endpoint, name: str) -> bool:
    """Tells whether `sequence_lengths` sets the size of an input's second axis.

    Nothing tells of a model that is not functional which axes are free.
    """
    shape = endpoint.inputs[name].shape
    if name in _tensors(endpoint):
        return shape.rank > 1 and shape[1] is None
    return _is_ids(endpoint, name)


def _check_lengths(endpoint: Endpoint, lengths: Sequence[int]) -> None:
    """Refuses lengths that no input has or can take."""
    sizes = [
        None if _has_free_length(endpoint, name) else spec.shape[1]
        for name, spec in endpoint.inputs.items()
        if spec.shape.rank > 1
    ]
    if None not in sizes and not set(lengths) <= set(sizes):
        raise ValueError(
            "`sequence_lengths` is for a model with an input of a free length. "
            "Received a model with the inputs "
            f"{ {name: tuple(spec.shape) for name, spec in endpoint.inputs.items()} }"
        )


def _fix(
    endpoint: Endpoint,
    samples: Arrays,
    ranges: Arrays | None,
    *,
    batch: int,
    sizes: Mapping[str, tuple[int, ...]],
    length: int | None,
    uint8_inputs: Sequence[str],
) -> FixedInputs:
    """Chooses the shapes and types of one file's inputs."""
    shapes = {
        name: _shape(endpoint, name, array, sizes, length)
        for name, array in samples.items()
    }
    narrowed = {
        name: tf.TensorSpec(shape, endpoint.inputs[name].dtype)
        for name, shape in shapes.items()
    }

    def fitted(arrays: Arrays, argument: str) -> dict[str, np.ndarray]:
        return {
            name: _fit(endpoint, name, array, shapes[name], argument)
            for name, array in arrays.items()
        }

    return FixedInputs(
        name="model" if length is None else f"model_{length}",
        length=length,
        batch_size=batch,
        endpoint=replace(endpoint, inputs=narrowed),
        types={
            name: tf.uint8
            if name in uint8_inputs
            else _file_type(endpoint, name, samples[name])
            for name in shapes
        },
        samples=fitted(samples, "samples"),
        ranges=None if ranges is None else fitted(ranges, "representative_data"),
    )


def _shape(
    endpoint: Endpoint,
    name: str,
    array: np.ndarray,
    sizes: Mapping[str, tuple[int, ...]],
    length: int | None,
) -> tuple[int | None, ...]:
    """Chooses the sizes of an input; that of the batch stays the endpoint's."""
    own = array.shape
    if name in sizes:
        own = sizes[name]
    elif length is not None and _has_free_length(endpoint, name):
        own = (*own[:1], length, *own[2:])
    batched = name not in endpoint.unbatched
    return (endpoint.inputs[name].shape[0], *own[1:]) if batched else own


def _file_type(endpoint: Endpoint, name: str, array: np.ndarray) -> tf.DType:
    """Chooses the type of an input: ids are int32, also where Keras says float32."""
    dtype = endpoint.inputs[name].dtype
    if _is_ids(endpoint, name) and np.array_equal(array, np.round(array)):
        return tf.int32
    return _NARROWED.get(dtype, dtype)


def _fit(
    endpoint: Endpoint,
    name: str,
    array: np.ndarray,
    shape: tuple[int | None, ...],
    argument: str,
) -> np.ndarray:
    """Fills up rows of ids with padding; refuses other sizes than the file's."""
    if array.shape[1:] == shape[1:]:
        return array
    if not _is_ids(endpoint, name):
        raise ValueError(
            f"`{argument}` for input {name!r} must have the shape {shape}, as `shapes` "
            f"or `sequence_lengths` say. Received: {array.shape}"
        )
    missing = (shape[1] or 0) - array.shape[1]
    if missing < 0:
        raise ValueError(
            f"`{argument}` must not be longer than any of `sequence_lengths`, or than "
            f"`shapes` say. Received: a row of {array.shape[1]} ids for the length "
            f"{shape[1]}"
        )
    tensor = _tensors(endpoint).get(name)
    padding = 0 if tensor is None else padding_id(tensor)
    return np.pad(array, ((0, 0), (0, missing)), constant_values=padding)
