"""Reads samples for an export: from a file, a dataset, and into arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

Arrays = Mapping[str, np.ndarray]
_MOST_ROWS = 256  # of a dataset, which may have no end


def load_samples(path: str | Path) -> Any:
    r"""Reads samples in the form that the exporters take.

    Args:
        path: An `.npy` file with one array, an `.npz` file with one array for each
            of the model's inputs, by name, or a UTF-8 `.txt` file with one text per
            line.

    Returns:
        An array, a dictionary of arrays, or a list of strings.

    Raises:
        ValueError: If the file has another extension, holds pickled objects, no text
            or text that is not UTF-8.

    Example:

    >>> import tempfile
    >>> from pathlib import Path
    >>> from keras_mha.export import load_samples
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = Path(directory, "reviews.txt")
    ...     _ = path.write_text("A fine film.\nNo.\n", "utf-8")
    ...     load_samples(path)
    ['A fine film.', 'No.']
    """
    path = Path(path)
    if path.suffix == ".txt":
        # Not splitlines(): it also splits at characters that are part of a text.
        try:
            text = path.read_text("utf-8-sig").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"`path` must hold UTF-8, and {path} does not: {error}. Texts of any "
                "bytes go into an .npy file."
            ) from error
        if not text:
            raise ValueError(f"`path` must hold at least one text. Received: {path}")
        return text.split("\n")
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    raise ValueError(f"`path` must end in .txt, .npy or .npz. Received: {path}")


def join_batches(samples: Any) -> Any:
    """Joins the batches of a dataset; returns other samples as they are.

    Of pairs `(x, y)`, or with weights `(x, y, w)`, as `fit` takes them, x is read.
    Batches are read until there are 256 rows; shorter ones are padded to the longest,
    numbers with 0 and strings with empty ones.

    Args:
        samples: A `tf.data.Dataset` or a `keras.utils.PyDataset` of batches, or
            anything else.

    Raises:
        ValueError: If a dataset is empty.

    Example:

    >>> import numpy as np, tensorflow as tf
    >>> from keras_mha.export.samples import join_batches
    >>> pairs = ([[1, 2], [3, 4], [5, 6]], [0, 1, 0])
    >>> dataset = tf.data.Dataset.from_tensor_slices(pairs)
    >>> join_batches(dataset.batch(2)).tolist()
    [[1, 2], [3, 4], [5, 6]]
    """
    batches: Iterable[Any]
    if isinstance(samples, keras.utils.PyDataset):
        batches = (samples[i] for i in range(samples.num_batches or 2**31))
    elif isinstance(samples, tf.data.Dataset):
        batches = samples
    else:
        return samples
    read: list[Any] = []
    rows = 0
    for batch in islice(batches, _MOST_ROWS):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
        arrays = keras.tree.map_structure(_dense, x)
        read.append(arrays)
        rows += max(len(a) for a in keras.tree.flatten(arrays) if np.ndim(a))
        if rows >= _MOST_ROWS:
            break
    if not read:
        raise ValueError(
            f"`samples` must have one or more batches. Received: {samples!r}, which "
            "is empty"
        )
    return keras.tree.map_structure(_concatenate, *read)


def _dense(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.to_tensor() if hasattr(tensor, "to_tensor") else tensor)


def _concatenate(*parts: np.ndarray) -> np.ndarray:
    """Joins arrays along their first axis, the shorter ones padded."""
    if not parts[0].ndim:
        return parts[0]
    longest = np.max([part.shape[1:] for part in parts], axis=0, initial=0).astype(int)
    filler = b"" if parts[0].dtype.kind == "O" else 0
    padded = [
        np.pad(
            part,
            [(0, n) for n in (0, *(longest - part.shape[1:]))],
            constant_values=filler,
        )
        for part in parts
    ]
    return np.concatenate(padded)


def holds_arrays(samples: Any) -> bool:
    """Returns whether there is an array somewhere in a structure.

    Example:

    >>> import numpy as np
    >>> from keras_mha.export.samples import holds_arrays
    >>> holds_arrays([np.ones(3)]), holds_arrays([[1, 2], [3, 4]])
    (True, False)
    """
    if isinstance(samples, Mapping):
        return True
    if isinstance(samples, list | tuple):
        return any(map(holds_arrays, samples))
    return hasattr(samples, "shape") and not isinstance(samples, np.generic)


def as_array(name: str, samples: Any) -> np.ndarray:
    """Converts samples to an array; strings become `bytes` in an object array."""
    try:
        array = np.asarray(samples)
    except UnicodeDecodeError:  # str mixed with bytes that are not ASCII
        array = np.array(samples, object)
    except ValueError as error:
        lengths = sorted({len(row) for row in samples if hasattr(row, "__len__")})
        raise ValueError(
            f"`samples` for input {name!r} must have equally many numbers or strings "
            f"in each row: pad them. Received: rows of the lengths {lengths}"
        ) from error
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
