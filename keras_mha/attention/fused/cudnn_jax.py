"""cuDNN's kernel as JAX calls it.

The kernel knows causality from the first position, a causal window and lengths of rows;
such masks take linear memory. Other masks are spelled out.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H
head size, V head size of the values.
"""

from __future__ import annotations

from typing import Any, Literal

import keras
from keras import backend, ops

from keras_mha.attention.mask_parts import (
    MaskParts,
    clear_padding,
    materialize,
    untaken,
)
from keras_mha.typing import Tensor

_DTYPES = ("float16", "bfloat16")
# What sizes must be multiples of; others are filled up. The kernel's gradient takes
# even lengths only.
_LENGTHS = 2
_SIZES = 8
_KERNEL: Literal["cudnn", "xla"] = "cudnn"


def refusal(query: Tensor, value: Tensor) -> str | None:
    """Says why the kernel cannot take these heads, if so."""
    dtype = backend.standardize_dtype(query.dtype)
    size, most = max(query.shape[-1], value.shape[-1]), largest_head_size()
    if most is None:
        return "is cuDNN on JAX, which needs a GPU of compute capability 8.0 or more"
    if dtype not in _DTYPES:
        return f"is cuDNN on JAX, which takes {' or '.join(_DTYPES)}, not {dtype}"
    if size > most:
        return f"is cuDNN on JAX, which takes head sizes up to {most}, not {size}"
    return None


def is_native(mask: MaskParts) -> bool:
    """Whether the kernel takes the mask as it is."""
    if untaken(mask, ("query_padding", "key_padding", "lower", "upper")):
        return False
    paddings = (mask.query_padding, mask.key_padding)
    if any(padding is not None and len(padding.shape) > 1 for padding in paddings):
        return False
    if mask.upper is None:
        return mask.lower is None
    whole = isinstance(mask.upper, int) and isinstance(mask.lower or 0, int)
    return whole and mask.upper == 0 and (mask.lower or 0) <= 0


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: MaskParts, scale: float
) -> Tensor:
    """Mixes the values.

    Args:
        query: `(B, T, N, H)`.
        key: `(B, S, K, H)`.
        value: `(B, S, K, V)`.
        mask: What may attend to what.
        scale: Factor of the scores.

    Returns:
        The mixed values `(B, T, N, V)`.
    """
    import jax  # pyright: ignore[reportMissingImports] - where it is the backend

    T, S, size = query.shape[1], key.shape[1], value.shape[3]
    words: dict[str, Any]
    if is_native(mask):
        sees, seen = _ends(mask, T, S)
        is_causal = mask.upper is not None
        words = {
            "is_causal": is_causal,
            "query_seq_lengths": _as_lengths(mask.query_padding, T),
            "key_value_seq_lengths": _as_lengths(mask.key_padding, S),
            "local_window_size": None if mask.lower is None else (-mask.lower, 0),
        }
        if S % 2 and mask.key_padding is None and not (is_causal and T <= S):
            # Hides the key that is filled in below.
            words["key_value_seq_lengths"] = ops.full((key.shape[0],), S, "int32")
    else:
        visible: Any = materialize(mask, T, S)
        visible = ops.broadcast_to(visible, (*visible.shape[:2], T, S))
        sees, seen = ops.any(visible, axis=(1, 3)), ops.any(visible, axis=(1, 2))
        if visible.shape[1] > 1:
            # A query may see keys by one head and none by another.
            sees = ops.swapaxes(ops.any(visible, axis=3), 1, 2)
        words = {"mask": _fill(visible, (2, 3), _LENGTHS)}
    if sees is not None:
        query = clear_padding(query, sees)
    filled = max(query.shape[3], size)
    heads = (query, clear_padding(key, seen), clear_padding(value, seen))
    heads = (_fill(_fill(x, (1,), _LENGTHS), (3,), _SIZES, filled) for x in heads)
    mixed = jax.nn.dot_product_attention(
        *heads, scale=scale, implementation=_KERNEL, **words
    )
    return clear_padding(mixed[:, :T, :, :size], sees)


def largest_head_size() -> int | None:
    """Returns the largest head size that the GPU takes; `None` without such a GPU."""
    # Asked for GPUs by name, JAX raises where there is none.
    if not any(name.startswith("gpu") for name in keras.distribution.list_devices()):
        return None
    import jax  # pyright: ignore[reportMissingImports] - likewise

    major = int(str(jax.devices()[0].compute_capability).split(".")[0])
    return None if major < 8 else 128 if major < 9 else 256


def _ends(mask: MaskParts, T: int, S: int) -> tuple[Tensor | None, Tensor | None]:
    """Which queries see a key `(B, T)`, and which keys are seen `(B, S)`.

    For masks that the kernel takes; `None` where that is all of them.
    """
    is_causal, rows, columns = mask.upper is not None, ops.arange(T), ops.arange(S)
    query_end, key_end = (
        ops.full((1,), most) if padding is None else ops.minimum(padding, most)
        for padding, most in ((mask.query_padding, T), (mask.key_padding, S))
    )
    first = 0 if mask.lower is None else ops.maximum(rows + mask.lower, 0)
    sees = (rows < query_end[:, None]) & (first < key_end[:, None])
    first = columns if is_causal else 0
    seen = (columns < key_end[:, None]) & (first < query_end[:, None])
    is_padded = mask.query_padding is not None or mask.key_padding is not None
    return (
        sees if is_padded or (mask.lower is not None and S - mask.lower < T) else None,
        seen if is_padded or (is_causal and S > T) else None,
    )


def _as_lengths(padding: Tensor | None, most: int) -> Tensor | None:
    return None if padding is None else ops.clip(ops.cast(padding, "int32"), 0, most)


def _fill(inputs: Tensor, axes: tuple[int, ...], step: int, least: int = 0) -> Tensor:
    """Zeros, or False, at the end of the axes: to `least`, and a multiple of `step`."""
    width = [(0, 0)] * len(inputs.shape)
    for axis in axes:
        size = max(inputs.shape[axis], least)
        width[axis] = (0, -(-size // step) * step - inputs.shape[axis])
    return ops.pad(inputs, width) if any(more for _, more in width) else inputs
