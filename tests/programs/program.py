"""Describes a small program: a model on Keras' own attention, and data for it.

The models call `keras.layers.MultiHeadAttention` by that name. A test that wants ours
sets that name to ours while the model is built, as a user edits a program.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import keras
import numpy as np

import keras_mha

# Rows of text end in this id.
PADDING = 0


@dataclass(frozen=True)
class Program:
    """A model and its data.

    Attributes:
        build: Makes the model, not compiled.
        inputs: Draws `n` rows of inputs in the structure that the model takes, with
            padding if the program knows padding.
        targets: Draws `n` rows of targets; `None` where the model trains on its
            inputs only.
        compile: Arguments of `compile`.
        pads: Whether the inputs of the program can be padded.
        leaks: Whether Keras' answers depend on padding and ours do not.
        pads_outputs: Whether outputs have rows of padded positions, which the outputs'
            mask hides.
        loads: Whether Keras loads the model's own file: it does not where the
            constructor of a layer passes no base arguments on.
        holds_constants: Whether the model holds random numbers that are no weights.
        batching: Whether rows are independent of each other.
        refused: Reasons why an export cannot be, by the format's name.
    """

    build: Callable[[], keras.Model]
    inputs: Callable[[np.random.Generator, int], Any]
    targets: Callable[[np.random.Generator, int], Any] | None
    compile: dict[str, Any] = field(default_factory=dict)
    pads: bool = False
    leaks: bool = False
    pads_outputs: bool = False
    loads: bool = True
    holds_constants: bool = False
    batching: bool = True
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the function that builds the model."""
        return self.build.__name__


@contextmanager
def our_attention() -> Any:
    """Puts our layer in the place of Keras', for models that are built inside."""
    with mock.patch.object(
        keras.layers, "MultiHeadAttention", keras_mha.MultiHeadAttention
    ):
        yield


def numbers(*shape: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Returns a function that draws `(n, *shape)` from the normal distribution."""
    return lambda rng, n: rng.normal(size=(n, *shape)).astype("float32")


def classes(
    count: int, *shape: int
) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Returns a function that draws integers `(n, *shape)` below `count`."""
    return lambda rng, n: rng.integers(count, size=(n, *shape)).astype("int32")


def tokens(
    count: int, length: int, *, padded: bool = True
) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Returns a function that draws rows of ids, of unequal lengths if padded."""

    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        ids = rng.integers(1, count, size=(n, length))
        if padded:
            ends = rng.integers(1, length + 1, size=(n, 1))
            ids = np.where(np.arange(length) < ends, ids, PADDING)
        return ids.astype("int32")

    return draw
