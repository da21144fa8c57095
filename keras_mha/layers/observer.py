"""Watches a model's attention layers while it runs, and masks their heads.

The layers ask here for an observer. It is set for the calls of one thread and leaves no
trace in the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import keras

from keras_mha.typing import Tensor


class Observer:
    """Is told of each call of an attention layer inside `observe`; changes nothing.

    Attributes:
        wants_scores: Whether layers must compute their scores for `see_scores`,
            whatever implementation they run on otherwise.
    """

    wants_scores = False

    def see_scores(self, layer: keras.layers.Layer, scores: Tensor) -> None:
        """Takes the probabilities before dropout `(B, N, T, S)` of one call."""

    def head_mask(self, layer: keras.layers.Layer, mixed: Tensor) -> Tensor | None:
        """Returns a factor `(N,)` or `(B, N)` of each head's `mixed` values, or none.

        Args:
            layer: The layer that is called.
            mixed: Its heads' values `(B, ..., N, V)`.
        """


# The observer of this thread's calls.
current_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Tells `observer` of every attention layer called inside, in this thread.

    Args:
        observer: Replaces the current observer, if any.

    Example:

    >>> import numpy as np
    >>> import keras_mha
    >>> from keras_mha.layers.observer import Observer, observe
    >>> class Shapes(Observer):
    ...     wants_scores = True
    ...     def see_scores(self, layer, scores):
    ...         print(tuple(scores.shape))
    >>> layer = keras_mha.MultiHeadSelfAttention(num_heads=2)
    >>> with observe(Shapes()):
    ...     outputs = layer(np.ones((3, 5, 8), "float32"))
    (3, 2, 5, 5)
    """
    token = current_observer.set(observer)
    try:
        yield
    finally:
        current_observer.reset(token)
