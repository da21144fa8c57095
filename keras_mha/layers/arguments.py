"""Checks of constructor arguments that several layers share.

As in Keras, an argument of a wrong type raises ValueError too.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, get_args

import keras
import numpy as np

from keras_mha.attention.numeric import plain_integer, plain_number

P = ParamSpec("P")


def constructor_options(cls: type) -> tuple[str, ...]:
    """Returns the names of the arguments that a layer's constructor takes.

    Follows `**kwargs` from class to class, as a call does, and stops at
    `keras.layers.Layer`, whose arguments (`name`, `dtype` and so on) every layer takes.

    Example:

    >>> import keras
    >>> from keras_mha.layers.arguments import constructor_options
    >>> class Scale(keras.layers.Layer):
    ...     def __init__(self, factor, **kwargs): ...
    >>> class Shift(Scale):
    ...     def __init__(self, offset=0.0, **kwargs): ...
    >>> constructor_options(Shift)
    ('offset', 'factor')
    """
    kinds = inspect.Parameter
    names: dict[str, None] = {}  # a set that keeps the order
    for base in cls.__mro__:
        if base is keras.layers.Layer:
            break
        if "__init__" not in vars(base):
            continue
        _, *parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        variadic = (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
        names |= {each.name: None for each in parameters if each.kind not in variadic}
        if all(each.kind is not kinds.VAR_KEYWORD for each in parameters):
            break
    return tuple(names)


def keyword_only(
    *names: str,
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorates a constructor whose arguments `names` once went by position.

    They still do, with a `DeprecationWarning`.

    Args:
        *names: The arguments in the order that they had, after those that the
            constructor takes by position.
    """

    def decorate(constructor: Callable[P, None]) -> Callable[P, None]:
        signature = inspect.signature(constructor)
        _, *parameters = signature.parameters.values()
        first = sum(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)

        @functools.wraps(constructor)
        def accepting(self: Any, *args: Any, **kwargs: Any) -> None:
            late = dict(zip(names, args[first:], strict=False))
            if late:
                warnings.warn(
                    f"Pass {', '.join(f'`{name}`' for name in late)} by keyword.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                args = (*args[:first], *args[first + len(late) :])
            constructor(self, *args, **late, **kwargs)  # pyright: ignore[reportCallIssue]

        # Keras reads it in two ways, of which one does not look behind `wraps`.
        vars(accepting)["__signature__"] = signature
        return accepting

    return decorate


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


def check_name(value: Any, name: str, names: Any, *, optional: bool = False) -> Any:
    """Returns `value` if it is one of the strings of a `Literal` type.

    Args:
        value: The argument.
        name: Its name, for the error text.
        names: The `Literal` type.
        optional: Whether it may be `None`.

    Raises:
        ValueError: Otherwise.
    """
    if optional and value is None:
        return None
    if not isinstance(value, str) or value not in get_args(names):
        raise ValueError(
            f"`{name}` must be {'None or ' if optional else ''}one of "
            f"{list(get_args(names))}. "
            f"Received: {name}={value!r}"
        )
    return value


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
