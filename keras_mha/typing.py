"""Names for the types that pass through every floor of the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

# A tensor of whichever backend Keras runs on, a Keras variable or a NumPy
# array: the backends share no base class that could be named here.
Tensor: TypeAlias = Any
Shape: TypeAlias = Sequence[int | None]
