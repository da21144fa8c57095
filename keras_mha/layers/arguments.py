"""Checks of constructor arguments that several layers share.

As in Keras, an argument of a wrong type raises ValueError too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_mha.attention.numeric import plain_integer, plain_number


def check_positive(value: Any, name: str) -> int:
    """Returns `value` if it is a positive integer.

    Raises:
        ValueError: Otherwise.
    """
    number = plain_integer(value)
    if number is None or number <= 0:
        raise ValueError(
            f"Received an invalid value for argument `{name}`, expected a positive "
            f"integer. Received: {name}={value!r}"
        )
    return number


def check_optional(value: object, name: str) -> int | None:
    """Returns `value` if it is a positive integer or `None`.

    Raises:
        ValueError: Otherwise.
    """
    return None if value is None else check_positive(value, name)


def check_number(value: Any, name: str) -> float:
    """Returns `value` if it is a positive, finite number.

    Raises:
        ValueError: Otherwise.
    """
    number = plain_number(value)
    if number is None or number <= 0:
        raise ValueError(
            f"`{name}` must be a positive, finite number. Received: {name}={value!r}"
        )
    return number


def check_flag(value: object, name: str) -> bool:
    """Returns `value`, Python's or NumPy's True or False, as Python's.

    Raises:
        ValueError: Otherwise: any string that is not empty would count as True.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")
    return bool(value)


def check_seed(seed: object) -> int | None:
    """Returns `seed` if it is an integer or `None`.

    Raises:
        ValueError: Otherwise.
    """
    number = plain_integer(seed)
    if number is None and seed is not None:
        raise ValueError(f"`seed` must be an integer or None. Received: seed={seed!r}")
    return number


def check_output_shape(
    output_shape: int | Sequence[int] | None,
) -> tuple[int, ...] | None:
    """Returns `output_shape` as a tuple of positive integers, or `None`.

    Raises:
        ValueError: If it is not an integer or a sequence of integers.
    """
    if output_shape is None:
        return None
    number = plain_integer(output_shape)
    sizes: Any = output_shape if number is None else (number,)
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes:
        raise ValueError(
            f"Invalid `output_shape`: {output_shape}. When specified, the "
            "`output_shape` must be a positive integer or a tuple or list of them."
        )
    return tuple(check_positive(size, "output_shape") for size in sizes)
