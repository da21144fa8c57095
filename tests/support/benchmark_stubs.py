"""Contenders without a library, built in worker processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from benchmarks.contenders.step import Step

# Longer than the least time of one timing, so that each timing is one call.
LONG = 0.15


def steady(seconds: float = 0.0) -> Step:
    return Step(lambda: time.sleep(seconds))


def signing(name: str, path: str) -> Step:
    """Writes its name to a file at each call."""

    def call() -> None:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(name)
        time.sleep(LONG)

    return Step(call)


def printing() -> Step:
    print("not an answer", flush=True)
    return steady()


def failing(text: str) -> Step:
    raise ValueError(text)


def aborting() -> Step:
    os.abort()


def failing_at_call(number: int) -> Step:
    calls = iter(range(1, number))

    def call() -> None:
        time.sleep(LONG)
        if next(calls, None) is None:
            raise RuntimeError("worn out")

    return Step(call)


def filling(shape: tuple[int, int, int, int]) -> Step:
    """Fills as many bytes as the product of the shape, and frees them again."""

    def call() -> None:
        np.full(shape, 1, np.int8)

    return Step(call)
