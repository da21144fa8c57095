"""The one door to attention: picks an implementation and calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from keras_mha.attention import masks, portable, reference
from keras_mha.attention.axes import (
    fold_heads,
    fold_padding,
    fold_pairs,
    unfold_heads,
    unfold_scores,
)
from keras_mha.typing import Tensor

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": reference.attend,
    "portable": portable.attend,
}

_implementation: ContextVar[str] = ContextVar("implementation", default="reference")


@contextmanager
def implementation_scope(name: str) -> Iterator[None]:
    """Makes every attention layer traced inside run on the implementation `name`.

    Exporters trace a model under `"portable"`; the model itself is not changed.

    Args:
        name: `"reference"` or `"portable"`.

    Raises:
        ValueError: If there is no implementation of that name.

    Example:

    >>> from keras_mha.attention.api import current_implementation
    >>> from keras_mha.attention.api import implementation_scope
    >>> with implementation_scope("portable"):
    ...     current_implementation()
    'portable'
    """
    _check_implementation(name, "name")
    token = _implementation.set(name)
    try:
        yield
    finally:
        _implementation.reset(token)


def current_implementation() -> str:
    """Returns the name of the implementation that layers use now."""
    return _implementation.get()


def prepare_inputs(inputs: Tensor, padding: Tensor | None) -> Tensor:
    """Clears padded positions of `inputs`, where the implementation needs it.

    See `keras_mha.attention.masks.clear_padding`. Portable's padding is finite by
    its contract, so there the selection is left out of the exported graph.
    """
    if current_implementation() == "portable":
        return inputs
    return masks.clear_padding(inputs, padding)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: masks.Mask,
    seed: Tensor | None = None,
    *,
    axes: tuple[int, ...] = (1,),
    dropout: float = 0.0,
    return_scores: bool = False,
    implementation: str = "reference",
) -> tuple[Tensor, Tensor | None]:
    """Attention on projected heads; pure, so that it can be compiled as it is.

    Args:
        query: `(B, T, N, H)`, or with more axes between the first and the last two.
        key: `(B, S, N, H)`, likewise.
        value: `(B, S, N, V)`, likewise.
        mask: What may attend to what, in the axes of the tensors above: padding
            `(B, ...)`, pairs of the scores' rank.
        seed: Seed tensor `(2,)`; needed where `dropout > 0`.
        axes: The axes that attend.
        dropout: Share of the probabilities to drop.
        return_scores: Whether the probabilities are wanted. Where they are not,
            a compiled function need not store them.
        implementation: A key of `IMPLEMENTATIONS`.

    Returns:
        The mixed values `(B, T, N, V)`, and the probabilities before dropout
        `(B, N, T, S)` or `None`. With other axes, `(B, ..., N, V)` and
        `(B, ..., N, T..., S...)`.

    Raises:
        ValueError: If a causal mask or a window is asked for over several axes,
            `dropout > 0` has no seed, or there is no such implementation.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.api import attend
    >>> from keras_mha.attention.masks import Mask
    >>> heads = np.zeros((2, 3, 5, 7), "float32")
    >>> mixed, scores = attend(heads, heads, heads, Mask(), return_scores=True)
    >>> tuple(mixed.shape), tuple(scores.shape)
    ((2, 3, 5, 7), (2, 5, 3, 3))
    """
    check_order(mask, axes)
    _check_implementation(implementation, "implementation")
    if dropout > 0 and seed is None:
        raise ValueError(
            f"`dropout` above 0 needs a `seed`. Received: dropout={dropout}, seed=None"
        )
    mixed, scores = IMPLEMENTATIONS[implementation](
        fold_heads(query, axes),
        fold_heads(key, axes),
        fold_heads(value, axes),
        mask._replace(
            query_padding=_map(fold_padding, mask.query_padding, query, axes),
            key_padding=_map(fold_padding, mask.key_padding, key, axes),
            pairs=_map(fold_pairs, mask.pairs, query, key, axes),
        ),
        dropout=dropout,
        seed=seed,
    )
    mixed = unfold_heads(mixed, query, axes)
    if not return_scores:
        return mixed, None
    return mixed, unfold_scores(scores, query, key, axes)


def check_order(mask: masks.Mask, axes: tuple[int, ...]) -> None:
    """Refuses what depends on the order of positions, over several axes.

    Raises:
        ValueError: If `mask` is causal or has a window and `axes` has no one order.
    """
    if len(axes) > 1 and (mask.is_causal or mask.sliding_window is not None):
        raise ValueError(
            "`use_causal_mask` and `sliding_window` need a single attention axis: "
            "several have no one order of positions. "
            f"Received: attention_axes={axes}, use_causal_mask={mask.is_causal}, "
            f"sliding_window={mask.sliding_window}"
        )


def _check_implementation(name: str, argument: str) -> None:
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"`{argument}` must be one of {sorted(IMPLEMENTATIONS)}. "
            f"Received: {argument}={name!r}"
        )


def _map(function: Callable[..., Tensor], mask: Tensor | None, *rest: Any) -> Any:
    return None if mask is None else function(mask, *rest)
