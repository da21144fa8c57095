"""Reads samples for an export from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


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
