"""The one thing that a builder returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


def _at_once(_: Any) -> None:
    """Waits for nothing: the call returned with its result."""


class Step(NamedTuple):
    """Something to be timed.

    Attributes:
        call: Does the work once; its result is handed to `wait`.
        wait: Returns when that result has been computed.
        parts: How many equal pieces of work one call does; times are for one.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any] = _at_once
    parts: int = 1


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Draws standard normal float32 values, the same for every contender."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def heads(shape: tuple[int, int, int, int], count: int) -> list[np.ndarray]:
    """Draws `count` different arrays `(B, T, N, H)` for `shape` = `(B, N, T, H)`."""
    B, N, T, H = shape
    return [normal(B, T, N, H, seed=seed) for seed in range(count)]
