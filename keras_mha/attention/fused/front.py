"""The backend's own fused kernel, where it has one: torch's, and cuDNN's on JAX.

Its domain is narrower than the reference's: neither dropout nor anything that joins
the scores. Masks that the kernel does not know are spelled out; all others, and no mask
at all, take linear memory.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H
head size, V head size of the values.
"""

from __future__ import annotations

from keras import backend, ops

from keras_mha.attention.bias import Bias
from keras_mha.attention.fused import cudnn_jax
from keras_mha.attention.masks import Mask, clear_padding, materialize
from keras_mha.typing import Tensor


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
    if name not in ("jax", "torch"):
        return f"needs the backend jax or torch: {name} has no fused kernel"
    if name == "jax" and (reason := cudnn_jax.refusal(query, value)) is not None:
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


def is_preferred(query: Tensor, key: Tensor, mask: Mask) -> bool:
    """Whether no mask needs to be spelled out; other calls go to "blockwise"."""
    del query, key
    return cudnn_jax.is_native(mask) if backend.backend() == "jax" else _is_plain(mask)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    bias: Bias,
    *,
    scale: float,
    logits_soft_cap: None = None,
    dropout: float = 0.0,
    seed: None = None,
) -> tuple[Tensor, None]:
    """Mixes the values by cuDNN, or by `keras.ops.dot_product_attention` on torch.

    Args are those of `keras_mha.attention.reference.attend`, without bias, cap and
    dropout. Returns the mixed values `(B, T, N, V)`, and `None`.
    """
    del bias, logits_soft_cap, dropout, seed  # see `refusal`
    if backend.backend() == "jax":
        return cudnn_jax.attend(query, key, value, mask, scale), None
    visible = sees = None
    if not _is_plain(mask):
        T, S = ops.shape(query)[1], ops.shape(key)[1]
        visible = materialize(mask, T, S)
        visible = ops.broadcast_to(visible, (*ops.shape(visible)[:2], T, S))
        sees = ops.expand_dims(ops.swapaxes(ops.any(visible, axis=3), 1, 2), -1)
        seen = ops.any(visible, axis=(1, 2))
        query = ops.where(sees, query, ops.zeros_like(query))
        key, value = clear_padding(key, seen), clear_padding(value, seen)
    mixed = ops.dot_product_attention(
        query,
        key,
        value,
        mask=visible,
        scale=scale,
        is_causal=mask.is_causal and visible is None,
    )
    if sees is not None:
        mixed = ops.where(sees, mixed, ops.zeros_like(mixed))
    return mixed, None


def _is_plain(mask: Mask) -> bool:
    """Whether nothing but plain causality hides a pair."""
    tensors = (mask.query_padding, mask.key_padding, mask.pairs, mask.query_segments)
    if mask.sliding_window is not None or any(part is not None for part in tensors):
        return False
    return not mask.is_causal or (isinstance(mask.offset, int) and mask.offset == 0)
