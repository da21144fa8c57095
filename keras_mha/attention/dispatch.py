"""Which implementation serves a call, and why another cannot.

Each implementation is a module with

- `TAKES`: the parts of a mask (`MaskParts`) that it knows. A mask that has more goes to
  another implementation;
- `refusal(**call)`: why else it cannot serve a call, or `None`;
- `is_preferred(query, key, mask)`: whether "auto" should take it, if "auto" asks it;
- `attend(query, key, value, mask, bias, **options)`.

Arguments were checked before: by `dot_product_attention`, or by a layer.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H head
size of queries and keys, V head size of values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from keras_mha.attention import by_length, portable, reference
from keras_mha.attention.bias import Bias
from keras_mha.attention.blockwise import front as blockwise
from keras_mha.attention.fused import front as fused
from keras_mha.attention.mask_parts import (
    NOTHING,
    MaskParts,
    clear_padding,
    untaken,
)
from keras_mha.typing import Tensor

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "reference": reference,
    "blockwise": blockwise,
    "portable": portable,
    "fused": fused,
}
# In the order in which "auto" asks them, in inference and in training.
_AUTOMATIC = {False: (fused, blockwise), True: (fused, blockwise, by_length)}

_implementation: ContextVar[str] = ContextVar("implementation", default="auto")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MaskParts = NOTHING,
    bias: Bias = Bias(),  # noqa: B008 - a tuple, which nobody can change
    seed: Tensor | None = None,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    dropout: float = 0.0,
    return_scores: bool = False,
    implementation: str = "auto",
    training: bool = False,
    keys_are_finite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention on projected heads; pure, so that it can be compiled as it is.

    Args:
        query: `(B, T, N, H)`.
        key: `(B, S, K, H)`.
        value: `(B, S, K, V)`.
        mask: What may attend to what.
        bias: What joins the scores.
        seed: Seed tensor `(2,)`; needed where `dropout > 0`.
        scale: Factor of the scores. Defaults to `1 / sqrt(H)`.
        logits_soft_cap: Bound of the scores before the bias.
        dropout: Share of the probabilities to drop.
        return_scores: Whether the probabilities are wanted. Where they are not,
            a compiled function need not store them.
        implementation: A key of `IMPLEMENTATIONS`, or `"auto"`.
        training: Whether it is part of a training step; see `by_length`.
        keys_are_finite: Whether keys and values are known to hold neither NaN nor
            infinities where they are hidden, so that they need not be cleared.

    Returns:
        The mixed values `(B, T, N, V)`, and the probabilities before dropout
        `(B, N, T, S)` or `None`.

    Raises:
        ValueError: If the implementation asked for cannot serve the call.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.dispatch import attend
    >>> heads = np.zeros((2, 3, 5, 7), "float32")
    >>> mixed, scores = attend(heads, heads, heads, return_scores=True)
    >>> tuple(mixed.shape), tuple(scores.shape)
    ((2, 3, 5, 7), (2, 5, 3, 3))
    """
    chosen = select(
        implementation,
        query,
        key,
        value,
        mask,
        bias,
        logits_soft_cap=logits_soft_cap,
        dropout=dropout,
        return_scores=return_scores,
        training=training,
    )
    mixed, scores = chosen.attend(
        query,
        key,
        value,
        mask,
        bias,
        scale=1.0 / math.sqrt(query.shape[-1]) if scale is None else scale,
        logits_soft_cap=logits_soft_cap,
        dropout=dropout,
        seed=seed,
        keys_are_finite=keys_are_finite,
    )
    return mixed, scores if return_scores else None


def select(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MaskParts,
    bias: Bias,
    *,
    logits_soft_cap: float | None,
    dropout: float,
    return_scores: bool,
    training: bool = False,
) -> ModuleType:
    """Returns the module that serves a call.

    Each implementation names in `TAKES` the parts of masks that it knows, and a mask
    that has more goes to the next. Each says by `refusal` why else it cannot serve a
    call, if so, and those that "auto" asks say by `is_preferred` whether they should.
    Where T, S or the batch is known to be zero, "reference" returns the zeros
    instead of any other.

    Args:
        name: A key of `IMPLEMENTATIONS`, or "auto".
        query: `(B, T, N, H)`.
        key: `(B, S, K, H)`.
        value: `(B, S, K, V)`.
        mask: What may attend to what.
        bias: What joins the scores.
        logits_soft_cap: Bound of the scores before the bias.
        dropout: Share of the probabilities to drop.
        return_scores: Whether the probabilities are wanted.
        training: Whether the call is part of a training step.

    Raises:
        ValueError: If the implementation asked for cannot serve the call.
    """
    call: dict[str, Any] = {
        "query": query,
        "value": value,
        "bias": bias,
        "logits_soft_cap": logits_soft_cap,
        "dropout": dropout,
        "return_scores": return_scores,
    }
    is_empty = 0 in (*query.shape[:3], key.shape[1])
    if name == "auto":
        for module in () if is_empty else _AUTOMATIC[training]:
            able = _refusal(module, mask, call) is None
            if able and module.is_preferred(query, key, mask):
                return module
        return reference
    reason = _refusal(IMPLEMENTATIONS[name], mask, call)
    if reason is not None:
        able = [
            other
            for other, module in IMPLEMENTATIONS.items()
            if _refusal(module, mask, call) is None
        ]
        raise ValueError(
            f"`implementation={name!r}` {reason}; these can: {able}. "
            f"Received: implementation={name!r}"
        )
    return reference if is_empty else IMPLEMENTATIONS[name]


def _refusal(module: ModuleType, mask: MaskParts, call: dict[str, Any]) -> str | None:
    left = [] if mask is NOTHING else untaken(mask, module.TAKES)
    if left:
        return f"does not take a mask with {', '.join(left)}"
    return module.refusal(**call)


def check_implementation(name: str, argument: str) -> str:
    """Returns `name` if it is "auto" or names an implementation.

    Raises:
        ValueError: Otherwise.
    """
    names = ["auto", *IMPLEMENTATIONS]
    if name not in names:
        raise ValueError(
            f"`{argument}` must be one of {names}. Received: {argument}={name!r}"
        )
    return name


@contextmanager
def implementation_scope(name: str) -> Iterator[None]:
    """Makes every attention layer traced inside run on the implementation `name`.

    Exporters trace a model under `"portable"`; the model itself is not changed.

    Args:
        name: `"auto"`, or the name of an implementation.

    Raises:
        ValueError: If no implementation has that name.

    Example:

    >>> from keras_mha.attention.dispatch import current_implementation
    >>> from keras_mha.attention.dispatch import implementation_scope
    >>> with implementation_scope("portable"):
    ...     current_implementation()
    'portable'
    """
    check_implementation(name, "name")
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

    See `keras_mha.attention.mask_parts.clear_padding`. Portable's padding is finite by
    its contract, so there the selection is left out of the exported graph.
    """
    if current_implementation() == "portable":
        return inputs
    return clear_padding(inputs, padding)
