"""Checks of constructor arguments that several layers share.

As in Keras, an argument of a wrong type raises ValueError too.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any


def check_positive(value: Any, name: str) -> int:
    """Returns `value` if it is a positive integer.

    Raises:
        ValueError: Otherwise.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value <= 0:
        raise ValueError(
            f"Received an invalid value for argument `{name}`, expected a positive "
            f"integer. Received: {name}={value!r}"
        )
    return int(value)


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
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(
            f"`{name}` must be a positive, finite number. Received: {name}={value!r}"
        )
    return value


def check_flag(value: object, name: str) -> bool:
    """Returns `value` if it is True or False.

    Raises:
        ValueError: Otherwise: any string that is not empty would count as True.
    """
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")
    return value


def check_seed(seed: object) -> int | None:
    """Returns `seed` if it is an integer or `None`.

    Raises:
        ValueError: Otherwise.
    """
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise ValueError(f"`seed` must be an integer or None. Received: seed={seed!r}")
    return seed


def check_output_shape(
    output_shape: int | Sequence[int] | None,
) -> tuple[int, ...] | None:
    """Returns `output_shape` as a tuple of positive integers, or `None`.

    Raises:
        ValueError: If it is not an integer or a sequence of integers.
    """
    if output_shape is None:
        return None
    sizes = (output_shape,) if isinstance(output_shape, int) else output_shape
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes:
        raise ValueError(
            f"Invalid `output_shape`: {output_shape}. When specified, the "
            "`output_shape` must be a positive integer or a tuple or list of them."
        )
    for size in sizes:
        check_positive(size, "output_shape")
    return tuple(sizes)
