"""Named arrays in one file without pickle: how parent and child talk.

Stand-alone: NumPy only, so that the child can load it by path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes `arrays` as an `.npz`; an object array holds only `bytes`.

    NumPy's own string types drop trailing NULs, so strings travel as their
    concatenated bytes and their lengths.
    """
    members: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if array.dtype.kind == "O":
            joined = b"".join(array.ravel())
            lengths = [len(item) for item in array.ravel()]
            members[f"bytes:{name}"] = np.frombuffer(joined, np.uint8)
            members[f"lengths:{name}"] = np.reshape(
                np.array(lengths, np.int64), array.shape
            )
        elif array.dtype.kind in "biuf":
            members[f"array:{name}"] = array
        else:
            raise TypeError(
                "Arrays must hold numbers, booleans or bytes. Received: "
                f"{name!r} of dtype {array.dtype}"
            )
    with path.open("wb") as file:
        np.savez(file, **members)  # pyright: ignore[reportArgumentType]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads what `write_arrays` wrote, in its order."""
    arrays: dict[str, np.ndarray] = {}
    with np.load(path, allow_pickle=False) as members:
        for member in members.files:
            kind, name = member.split(":", 1)
            if kind == "array":
                arrays[name] = members[member]
            elif kind == "bytes":
                joined = members[member].tobytes()
                lengths = members[f"lengths:{name}"]
                ends = np.cumsum(lengths)
                strings = np.empty(lengths.size, object)
                for i, end in enumerate(ends):
                    strings[i] = joined[end - lengths.flat[i] : end]
                arrays[name] = strings.reshape(lengths.shape)
    return arrays
