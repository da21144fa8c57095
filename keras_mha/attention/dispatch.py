"""Which implementation serves a call, and why another cannot."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from keras_mha.attention.bias import Bias
from keras_mha.attention.masks import Mask
from keras_mha.typing import Tensor

# In the order in which "auto" asks them.
_AUTOMATIC = ("fused", "blockwise")


def select(
    implementations: Mapping[str, ModuleType],
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    bias: Bias,
    *,
    logits_soft_cap: float | None,
    dropout: float,
    return_scores: bool,
) -> ModuleType:
    """Returns the module that serves a call.

    Each implementation says by `refusal` why it cannot serve a call, if so, and
    those that "auto" asks say by `is_preferred` whether they should. Where there is
    nothing to compute, as T, S or the batch is known to be zero, "reference" gives the
    zeros in place of all.

    Args:
        implementations: Modules with a function `attend`, by name.
        name: One of their names, or "auto".
        query: `(B, T, N, H)`.
        key: `(B, S, K, H)`.
        value: `(B, S, K, V)`.
        mask: What may attend to what.
        bias: What joins the scores.
        logits_soft_cap: Bound of the scores before the bias.
        dropout: Share of the probabilities to drop.
        return_scores: Whether the probabilities are wanted.

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
        if is_empty:
            return implementations["reference"]
        for module in map(implementations.__getitem__, _AUTOMATIC):
            able = module.refusal(**call) is None
            if able and module.is_preferred(query, key, mask):
                return module
        return implementations["reference"]
    reason = implementations[name].refusal(**call)
    if reason is not None:
        able = [
            key for key, module in implementations.items() if not module.refusal(**call)
        ]
        raise ValueError(
            f"`implementation={name!r}` {reason}; these can: {able}. "
            f"Received: implementation={name!r}"
        )
    return implementations["reference" if is_empty else name]
