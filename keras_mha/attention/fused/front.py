"""The backend's own fused kernel, where it has one: torch's, and cuDNN's on JAX.

Its domain is narrower than the reference's: neither dropout nor anything that joins
the scores. Masks that the kernel does not know are spelled out; all others, and no mask
at all, take linear memory.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H
head size, V head size of the values.
"""

from __future__ import annotations

from keras import backend

from keras_mha.attention.bias import Bias
from keras_mha.attention.fused import cudnn_jax, sdpa_torch
from keras_mha.attention.mask_parts import (
    MaskParts,
)
from keras_mha.typing import Tensor

# By backend.
_KERNELS = {"jax": cudnn_jax, "torch": sdpa_torch}
# What the kernels do not know is spelled out.
TAKES = frozenset(MaskParts._fields)


def refusal(
    *,
    query: Tensor,
    value: Tensor,
    bias: Bias,
    logits_soft_cap: float | None,
    dropout: float,
    return_scores: bool,
) -> str | None:
    """Says why a call cannot be served, if so."""
    name = backend.backend()
    if name not in _KERNELS:
        known = " or ".join(_KERNELS)
        return f"needs the backend {known}: {name} has no fused kernel"
    if (reason := _KERNELS[name].refusal(query, value)) is not None:
        return reason
    if backend.standardize_dtype(query.dtype) == "float64":
        return "takes no float64"
    if return_scores:
        return "computes no table of scores"
    if dropout > 0:
        return "drops other positions than the other implementations do"
    if logits_soft_cap is not None or any(part is not None for part in bias):
        return "takes no soft cap, no bias and no sinks"
    return None


def is_preferred(query: Tensor, key: Tensor, mask: MaskParts) -> bool:
    """Whether no mask needs to be spelled out; other calls go to "blockwise"."""
    del query, key
    return _KERNELS[backend.backend()].is_native(mask)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MaskParts,
    bias: Bias,
    *,
    scale: float,
    logits_soft_cap: None = None,
    dropout: float = 0.0,
    seed: None = None,
    keys_are_finite: bool = False,
) -> tuple[Tensor, None]:
    """Mixes the values by the backend's kernel.

    Args are those of `keras_mha.attention.reference.attend`, without bias, cap and
    dropout. Returns the mixed values `(B, T, N, V)`, and `None`.
    """
    del bias, logits_soft_cap, dropout, seed  # see `refusal`
    del keys_are_finite  # the kernels clear what they hide
    kernel = _KERNELS[backend.backend()]
    return kernel.attend(query, key, value, mask, scale), None
